"""What really ran: rows and block calls per step, branch and expert, counted from outside."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field, fields
from math import prod
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import nn

from hsa.registry import RunningBranch, registered

TRACE_HOOK = "hsa_trace"


@dataclass(frozen=True)
class StepRecord:
    """One forward of the transformer as the pipeline asked for it.

    `active_tokens` is the mean number of rows a sample had in the block calls that ran (rows
    that pad a batch included), 0 where every block was skipped.
    """

    step: int
    branch: str
    expert: str
    active_tokens: float
    tokens: int
    block_calls: int
    blocks: int


@dataclass
class Trace:
    """The record of everything sampled while a method was attached.

    `allocation` (group of each token, 0 = full budget) and `velocity_change` are those of the last
    video, both `(B, F, H, W)` on the latent token grid, and None for methods that measure nothing.
    """

    records: list[StepRecord] = field(default_factory=list)
    allocation: torch.Tensor | None = None
    velocity_change: torch.Tensor | None = None

    @property
    def active_fraction(self) -> float:
        """Rows computed as a share of those flow matching computes: 1.0 when nothing is skipped."""
        computed = sum(record.active_tokens * record.block_calls for record in self.records)
        total = sum(record.tokens * record.blocks for record in self.records)
        return computed / total if total else 1.0

    @property
    def block_calls(self) -> int:
        return sum(record.block_calls for record in self.records)

    def to_dict(self) -> dict[str, Any]:
        """JSON-able summary; `records` as one list per column. Tensors are left out."""
        rows = [asdict(record) for record in self.records]
        columns = {column.name: [row[column.name] for row in rows] for column in fields(StepRecord)}
        return {
            "active_fraction": self.active_fraction,
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

    Block calls are counted at each block's self-attention: hooks that skip a block replace its
    forward, so only a submodule tells whether the block really ran.
    """
    with ExitStack() as stack:
        for expert, transformer in experts(pipe).items():
            branch = stack.enter_context(registered(transformer, RunningBranch(), TRACE_HOOK))
            stack.enter_context(_recorded(pipe, transformer, expert, branch, trace))
        yield trace


@contextmanager
def _recorded(pipe, transformer, expert, branch, trace) -> Iterator[None]:
    rows: list[int] = []  # of each block call of the running forward
    tokens = 0  # that the pipeline asked for

    def start(module, args, kwargs):
        nonlocal tokens
        rows.clear()
        shape = _hidden_states(args, kwargs).shape  # Wan: (B, C, F, H, W), LTX: (B, N, C)
        tokens = prod(shape[2:]) // prod(module.config.patch_size) if len(shape) == 5 else shape[1]

    def count(attention, args, kwargs):
        rows.append(_hidden_states(args, kwargs).shape[1])

    def finish(module, args, output):
        trace.records.append(
            StepRecord(
                step=pipe.scheduler.step_index or 0,
                branch=branch.name,
                expert=expert,
                active_tokens=sum(rows) / len(rows) if rows else 0.0,
                tokens=tokens,
                block_calls=len(rows),
                blocks=len(blocks(module)),
            )
        )

    handles = [
        transformer.register_forward_pre_hook(start, with_kwargs=True),
        *(
            block.attn1.register_forward_pre_hook(count, with_kwargs=True)
            for block in blocks(transformer)
        ),
        transformer.register_forward_hook(finish),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _hidden_states(args, kwargs) -> torch.Tensor:
    return kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
