"""When a video begins: the moment for a cache to forget the one before, finished or not."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial

from diffusers import DiffusionPipeline
from torch import Tensor, nn

from hsa.registry import RunningBranch, VideoClock, branch_copies, registered
from hsa.schedulers import current_step
from hsa.trace import experts

_HOOK = "each_video"

# Called with the transformer, the guidance branch and the number of videos in the call.
Begin = Callable[[nn.Module, str, int], None]


def num_videos(pipe: DiffusionPipeline, branch: str, batch: Tensor) -> int:
    """How many videos a call serves: LTX's guidance is one batch, in which a video is two rows."""
    return len(batch) // branch_copies(pipe, branch)


@contextmanager
def each_video(pipe: DiffusionPipeline, begin: Begin) -> Iterator[None]:
    """Call ``begin`` before the first call of each guidance branch of each expert in every video.

    A video that was interrupted counts as ended when the next one begins.
    """
    clock, begun = VideoClock(), set()

    def start(branch: RunningBranch, expert: nn.Module, args: tuple, kwargs: dict) -> None:
        if clock.begins(branch.name, current_step(pipe.scheduler)):
            begun.clear()
        if (expert, branch.name) not in begun:
            begun.add((expert, branch.name))
            begin(expert, branch.name, num_videos(pipe, branch.name, kwargs["hidden_states"]))

    with ExitStack() as stack:
        for transformer in experts(pipe).values():
            branch = stack.enter_context(registered(transformer, RunningBranch(), _HOOK))
            # Plain torch hooks outlive those of CPU offload.
            hook = transformer.register_forward_pre_hook(partial(start, branch), with_kwargs=True)
            stack.callback(hook.remove)
        yield
