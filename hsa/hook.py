"""HSA on a diffusers pipeline: which tokens run at which step, and what a video remembers."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from diffusers import DiffusionPipeline
from diffusers.hooks import HookRegistry, ModelHook
from diffusers.hooks.hooks import BaseState, StateManager
from torch import Tensor, nn

from hsa.allocation import Rows, groups_by_fraction, groups_by_threshold, velocity_change
from hsa.config import HSAConfig
from hsa.kv_cache import Branch, Forward
from hsa.registry import registered
from hsa.schedulers import EulerFlowMatch, euler
from hsa.trace import TRACE_HOOK, Trace, experts, record_calls
from hsa.wan import WanAdapter

HSA_HOOK = "hsa"
ADAPTERS = {"WanTransformer3DModel": WanAdapter}


@contextmanager
def apply_hsa(pipe: DiffusionPipeline, config: HSAConfig) -> Iterator[Trace]:
    """Sample with HSA inside the block; the pipeline is as before when it ends, however it ends.

    The scheduler is replaced by `EulerFlowMatch` on the same sigma grid for the length of the
    block: the cached Euler update is exact under it alone.

    Yields:
        The trace of what runs. Its allocation is that of the last video made.

    Raises:
        ValueError: a transformer that HSA does not support, or that has a cache installed; while
            sampling, a number of steps other than `config.budgets[0]`.
        FloatingPointError: while sampling, a velocity that is not finite.
    """
    trace = Trace()
    with ExitStack() as stack:
        stack.enter_context(euler(pipe))
        session = _Session(pipe, config, trace)
        for expert, transformer in experts(pipe).items():
            adapter = _adapter(transformer, expert)
            stack.enter_context(adapter.installed())
            hook = HSAHook(session, adapter, expert)
            stack.enter_context(registered(transformer, hook, HSA_HOOK))
        stack.enter_context(record_calls(pipe, trace))
        yield trace


class Video:
    """One video in the making: its branches, their measured velocity change, its allocation."""

    def __init__(self, config: HSAConfig, trace: Trace) -> None:
        self.config, self.trace = config, trace
        self.expert: str | None = None
        self.branches: dict[str, Branch] = {}
        self.steps: dict[str, int] = {}  # last step of each branch; the first branch is measured
        self.changes: list[Tensor] = []  # (B, N) each
        self.groups: Tensor | None = None  # (B, N)
        self._rows: dict[tuple[int, ...], Rows | None] = {}

    def follows(self, step: int, branch: str) -> bool:
        """Whether a forward of `branch` at `step` can belong to this video: time only advances."""
        return step >= max(self.steps.values()) and step != self.steps.get(branch)

    def branch(self, step: int, branch: str, expert: str) -> Branch:
        """The memory of a branch; an expert that takes over starts without any."""
        if expert != self.expert:
            self.expert, self.branches = expert, {}
        self.steps[branch] = step
        return self.branches.setdefault(branch, Branch())

    def active_rows(self, step: int) -> Rows | None:
        """The tokens of all groups active at `step`; None where that is every token."""
        groups = self.config.schedule.active_groups(step)
        if len(groups) == len(self.config.budgets):
            return None
        if groups not in self._rows:
            active = torch.isin(self.groups, self.groups.new_tensor(groups))
            self._rows[groups] = None if active.all() else Rows(active)
        return self._rows[groups]

    def measure(self, step: int, branch: str, forward: Forward, previous: Tensor | None) -> None:
        """Note the velocity change of a warm-up step; cut the groups after the last of them."""
        if branch != next(iter(self.steps)) or step >= self.config.warmup_steps:
            return
        if previous is not None:
            change = velocity_change(forward.branch.velocity, previous)
            self.changes.append(change if forward.given is None else change * ~forward.given)
        if step == self.config.warmup_steps - 1:
            self._allocate(forward.grid)

    def _allocate(self, grid: tuple[int, int, int]) -> None:
        if not self.changes:
            raise ValueError(
                f"warmup_steps: {self.config.warmup_steps} left no velocity change to measure, "
                f"{self.expert} took over in between; it must be larger"
            )
        change = torch.stack(self.changes).mean(0)
        if self.config.fractions is None:
            self.groups = groups_by_threshold(change, self.config.thresholds)
        else:
            self.groups = groups_by_fraction(change, self.config.fractions)
        self.trace.allocation = self.groups.unflatten(1, grid).cpu()
        self.trace.velocity_change = change.unflatten(1, grid).cpu()


class HSAHook(ModelHook):
    """Runs each forward of one expert on the active tokens only."""

    _is_stateful = True

    def __init__(self, session: "_Session", adapter: WanAdapter, expert: str) -> None:
        super().__init__()
        self.session, self.adapter, self.expert = session, adapter, expert
        self.contexts = StateManager(BaseState)  # diffusers sets the running guidance branch here

    def new_forward(self, module: nn.Module, *args, **kwargs):
        name = self.contexts.context.name
        try:
            step, video = self.session.enter(name)
            branch = video.branch(step, name, self.expert)
            previous = branch.velocity
            rows = None if previous is None else video.active_rows(step)
            self.adapter.forward = forward = Forward(branch, rows)
            output = self.fn_ref.original_forward(*args, **kwargs)
            if not branch.velocity.isfinite().all():
                raise FloatingPointError(
                    f"velocity is not finite at step {step}, branch {name!r}, {self.expert}"
                )
            video.measure(step, name, forward, previous)
            if step == video.config.schedule.steps - 1:
                del video.branches[name]  # makes room for the decoder
            return output
        except BaseException:
            self.session.video = None
            raise
        finally:
            self.adapter.forward = None

    def reset_state(self, module: nn.Module) -> None:
        """Called by diffusers at the end of a pipeline call."""
        self.session.video = None


class _Session:
    """What the experts of one pipeline share while HSA is applied: the running video."""

    def __init__(self, pipe: DiffusionPipeline, config: HSAConfig, trace: Trace) -> None:
        self.pipe, self.config, self.trace = pipe, config, trace
        self.video: Video | None = None

    def enter(self, branch: str) -> tuple[int, Video]:
        """The running step and its video, a new one where the last was left unfinished."""
        step = self.pipe.scheduler.step_index or 0
        if self.video is None or not self.video.follows(step, branch):
            self._check_scheduler()
            self.video = Video(self.config, self.trace)
        return step, self.video

    def _check_scheduler(self) -> None:
        scheduler = self.pipe.scheduler
        if not isinstance(scheduler, EulerFlowMatch):
            raise ValueError(
                f"scheduler: {type(scheduler).__name__} was set after HSA; choices: EulerFlowMatch"
            )
        if scheduler.num_inference_steps != self.config.schedule.steps:
            raise ValueError(
                f"budgets: {self.config.budgets} are for {self.config.schedule.steps} steps, "
                f"but num_inference_steps is {scheduler.num_inference_steps}"
            )


def _adapter(transformer: nn.Module, expert: str) -> WanAdapter:
    kind = type(transformer).__name__
    if kind not in ADAPTERS:
        raise ValueError(f"{expert}: {kind} is not supported; choices: {', '.join(ADAPTERS)}")
    for module in transformer.modules():
        registry: HookRegistry | None = getattr(module, "_diffusers_hook", None)
        for name, hook in registry.hooks.items() if registry else ():
            if hook._is_stateful and name != TRACE_HOOK:
                raise ValueError(f"{expert}: the cache {name!r} is installed; remove it first")
    return ADAPTERS[kind](transformer)
