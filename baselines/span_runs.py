"""One video again and again, each time with one span of steps that reuse a residual.

What a span does to the finished video costs no more than the steps from there on: up to the step
whose residual is reused, all runs are the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

from diffusers import DiffusionPipeline
from torch import Tensor, nn

from baselines.base import Request
from baselines.policy import Call, Policy
from baselines.reuse import residual_reuse
from hsa.registry import RunningBranch, registered
from hsa.trace import experts

_HOOK = "span_runs"

Span = tuple[int, int]  # a computed step and the next one; those between reuse the first


@dataclass
class _Video:
    """The span of the next run, and by step and guidance branch the velocities of the first."""

    span: Span = (0, 1)
    velocities: dict[tuple[int, str], Any] = field(default_factory=dict)


class _OneSpan(Policy):
    def __init__(self, video: _Video) -> None:
        self.video = video

    def decide(self, call: Call) -> bool:
        start, end = self.video.span
        return not start < call.step < end


class _Replay(RunningBranch):
    """Before the span, answers for the transformer with what it gave in the first run."""

    def __init__(self, pipe: DiffusionPipeline, video: _Video) -> None:
        super().__init__()
        self.pipe, self.video = pipe, video

    def new_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        step, velocities = self.pipe.scheduler.step_index or 0, self.video.velocities
        if step < self.video.span[0]:
            return velocities[step, self.name]
        output = self.fn_ref.original_forward(*args, **kwargs)
        velocities.setdefault((step, self.name), output)
        return output


@contextmanager
def span_runs(pipe: DiffusionPipeline, request: Request) -> Iterator[Callable[[Span], Tensor]]:
    """Gives a function that makes the video with a span of reuse and returns its final latents.

    It wants a run with nothing to reuse, (0, 1), before all others.
    """
    video = _Video()

    def run(span: Span) -> Tensor:
        video.span = span
        return pipe(**request.kwargs(pipe) | {"output_type": "latent"}).frames

    with ExitStack() as stack:
        stack.enter_context(residual_reuse(pipe, lambda: _OneSpan(video)))
        for transformer in experts(pipe).values():  # outside of the reuse: what it answers is final
            stack.enter_context(registered(transformer, _Replay(pipe, video), _HOOK))
        yield run
