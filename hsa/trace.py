"""What really ran: rows and block calls per step, branch and expert, counted from outside."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field, fields
from math import prod
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import nn

from hsa.registry import RunningBranch, noisy_latents, registered
from hsa.schedulers import current_step

TRACE_HOOK = "hsa_trace"


@dataclass(frozen=True)
class StepRecord:
    """One forward of the transformer as the pipeline asked for it.

    `active_tokens` is the mean number of rows a sample had in what ran of the blocks (rows that pad
    a batch included), 0 where every block was skipped. A block's self-attention and its
    feed-forward count for half a call each: there are methods that skip one of them.
    """

    step: int
    branch: str
    expert: str
    active_tokens: float
    tokens: int
    block_calls: float
    blocks: int


@dataclass
class Trace:
    """The record of everything sampled while a method was attached.

    `arrays` is what the method recorded of the last video, by name, on the CPU, samples first; it
    is stored with the video. `expected_fraction` is what HSA's schedule promises for its
    allocation, to hold against `active_fraction`: a full step that a second expert starts with,
    and rows that pad a batch, come on top. None where nothing is promised.
    """

    records: list[StepRecord] = field(default_factory=list)
    arrays: dict[str, torch.Tensor] = field(default_factory=dict)
    expected_fraction: float | None = None

    @property
    def allocation(self) -> torch.Tensor | None:
        """Group of each token, 0 = full budget: `(B, F, H, W)` int8 on the latent token grid."""
        return self.arrays.get("allocation")

    @property
    def velocity_change(self) -> torch.Tensor | None:
        """Mean relative change over the warm-up: `(B, F, H, W)` fp32 on the latent token grid."""
        return self.arrays.get("velocity_change")

    @property
    def active_fraction(self) -> float:
        """Rows computed as a share of those flow matching computes: 1.0 when nothing is skipped."""
        computed = sum(record.active_tokens * record.block_calls for record in self.records)
        total = sum(record.tokens * record.blocks for record in self.records)
        return computed / total if total else 1.0

    @property
    def block_calls(self) -> float:
        return sum(record.block_calls for record in self.records)

    def to_dict(self) -> dict[str, Any]:
        """JSON-able summary; `records` as one list per column. Tensors are left out."""
        rows = [asdict(record) for record in self.records]
        columns = {column.name: [row[column.name] for row in rows] for column in fields(StepRecord)}
        return {
            "active_fraction": self.active_fraction,
            "expected_fraction": self.expected_fraction,
            "block_calls": self.block_calls,
            "records": columns,
        }


def experts(pipe: DiffusionPipeline) -> dict[str, nn.Module]:
    """The denoisers of a pipeline by component name; Wan 2.2 A14B has two.

    Raises:
        ValueError: it has none.
    """
    names = ("transformer", "transformer_2")
    found = {name: model for name in names if (model := getattr(pipe, name, None)) is not None}
    if not found:
        raise ValueError(f"pipe: {type(pipe).__name__} has no transformer; choices: {names}")
    return found


def blocks(transformer: nn.Module) -> nn.ModuleList:
    """The transformer blocks, whatever the model family calls them."""
    return transformer.blocks if hasattr(transformer, "blocks") else transformer.transformer_blocks


@contextmanager
def record_calls(pipe: DiffusionPipeline, trace: Trace) -> Iterator[Trace]:
    """Fill `trace.records`, one record a transformer call, whatever other hooks do to the calls.

    Counted at the last layer of each self-attention and feed-forward: whatever skips a block, or
    part of one, replaces the forward of a module around it.
    """
    with ExitStack() as stack:
        for expert, transformer in experts(pipe).items():
            branch = stack.enter_context(registered(transformer, RunningBranch(), TRACE_HOOK))
            stack.enter_context(_recorded(pipe, transformer, expert, branch, trace))
        yield trace


@contextmanager
def _recorded(pipe, transformer, expert, branch, trace) -> Iterator[None]:
    # Tensors, because a Python counter would have compiled blocks compiled again at every call.
    counts = torch.zeros((2, 1), dtype=torch.long, device=transformer.device)
    calls, rows = counts
    tokens = 0  # that the pipeline asked for

    def start(module, args, kwargs):
        nonlocal tokens
        counts.zero_()
        latents = noisy_latents(args, kwargs)
        shape = latents.shape  # Wan: (B, C, F, H, W), LTX: (B, N, C)
        tokens = prod(shape[2:]) // prod(module.config.patch_size) if len(shape) == 5 else shape[1]

    def count(linear, args):
        calls.add_(1)
        rows.add_(args[0].shape[1])

    def finish(module, args, output):
        num_calls, num_rows = counts.flatten().tolist()  # one wait for the device
        trace.records.append(
            StepRecord(
                step=current_step(pipe.scheduler),
                branch=branch.name,
                expert=expert,
                active_tokens=num_rows / max(num_calls, 1),
                tokens=tokens,
                block_calls=num_calls / 2,
                blocks=len(blocks(module)),
            )
        )

    handles = [
        transformer.register_forward_pre_hook(start, with_kwargs=True),
        *(layer.register_forward_pre_hook(count) for layer in _last_layers(transformer)),
        transformer.register_forward_hook(finish),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _last_layers(transformer: nn.Module) -> Iterator[nn.Module]:
    """Of the self-attention and the feed-forward of each block."""
    for block in blocks(transformer):
        yield block.attn1.to_out[0]
        yield (block.ffn if hasattr(block, "ffn") else block.ff).net[-1]
