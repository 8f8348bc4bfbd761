"""Flow matching that notes how much Q, K and V of each block change from step to step."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

from baselines.base import Request, require
from baselines.flow_matching import FlowMatching

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline
    from torch import Tensor, nn

    from hsa.registry import RunningBranch
    from hsa.trace import Trace

PROJECTIONS = ("to_q", "to_k", "to_v")
CONDITIONAL = ("cond", "cond_uncond")  # diffusers' cache contexts that hold the conditional samples
NAME = "qkv_change"


@dataclass(frozen=True)
class QKVChange(FlowMatching):
    """A probe, not a competitor: the video is that of flow matching.

    Records `qkv_change` (B, 3, L, T - 1): for Q, K and V of the self-attention over the video
    tokens of each of L blocks, the relative L1 change of a token from step i to step i + 1 of the
    conditional branch, the mean over tokens (arXiv 2605.06892, figure 2). Taken at the output of
    the projections, before norm and rotation. NaN where another expert took over in between.

    Q, K and V of one step stay in memory: 3 x L x N x width numbers.
    """

    version: ClassVar[int] = 1
    paper: ClassVar[str] = "arXiv 2605.06892"

    @contextmanager
    def attach(self, pipe: DiffusionPipeline, request: Request) -> Iterator[Trace]:
        from hsa.registry import RunningBranch, registered
        from hsa.trace import blocks, experts

        for transformer in experts(pipe).values():
            fused = any(block.attn1.fused_projections for block in blocks(transformer))
            choices = "separate ones: unfuse_qkv_projections()"
            require(not fused, f"{NAME}: projections", "fused", choices)
        with super().attach(pipe, request) as trace, ExitStack() as stack:
            probe = _Probe(pipe, trace)
            for transformer in experts(pipe).values():
                hook = RunningBranch(ended=probe.last.clear)
                branch = stack.enter_context(registered(transformer, hook, NAME))
                for block, module in enumerate(blocks(transformer)):
                    for row, name in enumerate(PROJECTIONS):
                        note = partial(probe.note, branch, len(blocks(transformer)), row, block)
                        projection = getattr(module.attn1, name)
                        stack.callback(projection.register_forward_hook(note).remove)
            yield trace


class _Probe:
    """The last output of every projection, and where its change is written."""

    def __init__(self, pipe: DiffusionPipeline, trace: Trace) -> None:
        self.pipe, self.trace = pipe, trace
        # By row and block: its step, whose it is, and the output. Another expert's replaces it.
        self.last: dict[tuple[int, int], tuple[int, nn.Module, Tensor]] = {}

    def note(
        self,
        branch: RunningBranch,
        depth: int,
        row: int,
        block: int,
        projection: nn.Module,
        args: Any,
        output: Tensor,
    ) -> None:
        import torch

        from hsa.allocation import velocity_change
        from hsa.registry import branch_copies
        from hsa.schedulers import current_step

        if branch.name not in CONDITIONAL:
            return
        step = current_step(self.pipe.scheduler)
        fresh = output.chunk(branch_copies(self.pipe, branch.name))[-1]
        if (step, row, block) == (0, 0, 0):
            shape = len(fresh), len(PROJECTIONS), depth, self.pipe.scheduler.num_inference_steps - 1
            self.trace.arrays[NAME] = torch.full(shape, torch.nan)
        last_step, whose, last = self.last.get((row, block), (None, None, None))
        if step > 0 and last_step == step - 1 and whose is projection:
            change = velocity_change(fresh, last).mean(1)
            self.trace.arrays[NAME][:, row, block, last_step] = change.cpu()
        self.last[row, block] = step, projection, fresh
