"""When a video begins: the moment for a cache to forget the one before, finished or not."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from diffusers import DiffusionPipeline
from torch import Tensor, nn

from hsa.registry import RunningBranch, branch_copies, registered
from hsa.schedulers import current_step
from hsa.trace import experts

_HOOK = "each_video"

# Called with the transformer, the guidance branch and the number of videos in the call.
Begin = Callable[[nn.Module, str, int], None]


def num_videos(pipe: DiffusionPipeline, branch: str, batch: Tensor) -> int:
    """How many videos a call serves: LTX's guidance is one batch, in which a video is two rows."""
    return len(batch) // branch_copies(pipe, branch)


class _FirstCalls(RunningBranch):
    """Sits on the transformer root by plain torch hooks: they outlive those of CPU offload."""

    def __init__(self, pipe: DiffusionPipeline, begin: Begin) -> None:
        super().__init__()
        self.pipe, self.begin = pipe, begin
        self.steps: dict[str, int] = {}  # last step of each branch

    def start(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        step, branch = current_step(self.pipe.scheduler), self.name
        if step <= self.steps.get(branch, step):  # within a video, time only advances
            self.begin(module, branch, num_videos(self.pipe, branch, kwargs["hidden_states"]))
        self.steps[branch] = step


@contextmanager
def each_video(pipe: DiffusionPipeline, begin: Begin) -> Iterator[None]:
    """Call ``begin`` before the first call of each guidance branch of each expert in every video.

    A video that was interrupted counts as ended when the next one begins.
    """
    with ExitStack() as stack:
        for transformer in experts(pipe).values():
            hook = _FirstCalls(pipe, begin)
            stack.enter_context(registered(transformer, hook, _HOOK))
            start = transformer.register_forward_pre_hook(hook.start, with_kwargs=True)
            stack.callback(start.remove)
        yield
