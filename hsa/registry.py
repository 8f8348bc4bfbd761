"""diffusers' hook registry as context managers that leave nothing behind, and what hooks know of
a call: its guidance branch, and whether it begins a video."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from diffusers import DiffusionPipeline
from diffusers.hooks import HookRegistry, ModelHook
from diffusers.hooks.hooks import BaseState, StateManager
from torch import Tensor, nn


@contextmanager
def registered(module: nn.Module, hook: ModelHook, name: str) -> Iterator[ModelHook]:
    """Register `hook` on `module` for the length of the block.

    `HookRegistry.remove_hook` leaves the bound original `forward` in the instance dictionary; it
    is taken out again, so that the module ends exactly as it began. A `forward` that somebody else
    has set meanwhile (CPU offload re-installs its own after every call) stays.

    Raises:
        ValueError: a hook of that name is registered already.
    """
    registry = HookRegistry.check_if_exists_or_initialize(module)
    pristine = "forward" not in vars(module)
    registry.register_hook(hook, name)
    ours = module.forward
    try:
        yield hook
    finally:
        theirs = None if module.forward is ours else vars(module).get("forward")
        registry.remove_hook(name, recurse=False)
        if theirs is not None:
            module.forward = theirs
        elif pristine and not registry.hooks:
            del module.forward


class RunningBranch(ModelHook):
    """Knows which guidance branch a transformer is running: diffusers tells its `StateManager`.

    Args:
        ended: called when diffusers resets its caches, at the end of a pipeline call.
    """

    _is_stateful = True

    def __init__(self, ended: Callable[[], None] = lambda: None) -> None:
        super().__init__()
        self._states = StateManager(BaseState)
        self._ended = ended

    @property
    def name(self) -> str:
        """Name of the running cache context: "cond", "uncond", "cond_uncond", ..."""
        return self._states.context.name

    def reset_state(self, module: nn.Module) -> None:
        self._states.reset()
        self._ended()


class VideoClock:
    """Tells one video from the next by the steps in which guidance branches run.

    Within a video time only advances, and a branch runs once a step. diffusers says when a call of
    the pipeline ends, but not when one is interrupted.

    Attributes:
        steps: last step of each branch of the running video, in the order in which they began.
    """

    def __init__(self) -> None:
        self.steps: dict[str, int] = {}

    def begins(self, branch: str, step: int) -> bool:
        """Note a forward; tell whether it is the first of a video."""
        steps = self.steps
        begins = not steps or step < max(steps.values()) or step == steps.get(branch)
        if begins:
            steps.clear()
        steps[branch] = step
        return begins

    def reset(self) -> None:
        """The video has ended: the next forward begins another one."""
        self.steps.clear()


def branch_copies(pipe: DiffusionPipeline, branch: str) -> int:
    """How many times a call of a guidance branch holds the samples, the conditional ones last.

    LTX pipelines run [uncond, cond] as one batch; their branch is "cond_uncond", guided or not.
    """
    return 2 if branch == "cond_uncond" and pipe.do_classifier_free_guidance else 1


def noisy_latents(args: tuple, kwargs: dict[str, Any]) -> Tensor:
    """The latents in the arguments of a transformer: by name, or first."""
    return kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
