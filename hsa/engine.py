"""Sampling with a part of the tokens at each step: what HSA and its relatives share.

A rule says which tokens run. The engine runs them, keeps everybody's keys, values and velocity, and
forgets them with the video.
"""

import logging
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Protocol

import torch
from diffusers import DiffusionPipeline
from diffusers.hooks import HookRegistry
from torch import Tensor, nn

from hsa.adapter import Adapter, Branch, Forward
from hsa.allocation import Rows
from hsa.ltx import LTX2Adapter, LTXAdapter
from hsa.memory import kv_memory
from hsa.registry import RunningBranch, VideoClock, branch_copies, noisy_latents, registered
from hsa.schedulers import CachedEuler, current_step, euler
from hsa.trace import TRACE_HOOK, Trace, experts, record_calls
from hsa.wan import WanAdapter

HSA_HOOK = "hsa"
ADAPTERS = {
    "WanTransformer3DModel": WanAdapter,
    "LTX2VideoTransformer3DModel": LTX2Adapter,
    "LTXVideoTransformer3DModel": LTXAdapter,
}
logger = logging.getLogger("hsa")


class TokenRule(Protocol):
    """Which tokens of one video run at a step: where token methods differ. All else is shared."""

    def rows(self, step: int, copies: int) -> Rows | None:
        """The rows to run at `step`, None for every token; the same for all guidance branches.

        The batch holds the samples `copies` times. Not asked where a branch has no memory yet.
        """

    def measure(self, forward: Forward, previous: Tensor | None) -> None:
        """Learn from the first guidance branch's forward; `previous` is its last velocity."""


@contextmanager
def token_sampler(
    pipe: DiffusionPipeline,
    make_rule: Callable[[CachedEuler, Trace], TokenRule],
    kv_policy: tuple[str, str] = ("model", "model"),
    make_branch: Callable[..., Branch] = Branch,
) -> Iterator[Trace]:
    """Run the tokens that a rule names inside the block; the pipeline is as before when it ends.

    The scheduler is replaced by `CachedEuler` on the same sigma grid for the length of the block:
    the cached Euler update is exact under it alone.

    Args:
        make_rule: called when a video begins, with its scheduler and the trace.
        kv_policy: `kv_dtype` and `kv_device`, as in `HSAConfig`.
        make_branch: called as `Branch` is when a guidance branch of an expert begins.

    Raises:
        ValueError: a transformer that is not supported, is compiled as a whole, or has a cache or
            parallelism installed; while sampling, a scheduler that was set in between.
        FloatingPointError: while sampling, a velocity that is not finite.
    """
    trace = Trace()
    with ExitStack() as stack:
        stack.enter_context(euler(pipe, CachedEuler))
        adapters = {name: _adapter(model, name) for name, model in experts(pipe).items()}
        rule = partial(make_rule, pipe.scheduler, trace)
        session = _Session(pipe, rule, kv_policy, make_branch)
        stack.enter_context(record_calls(pipe, trace))
        for expert, adapter in adapters.items():
            stack.enter_context(_Expert(session, adapter, expert).installed())
        yield trace


class _Video:
    """One video in the making: its rule, and the memory of its guidance branches."""

    def __init__(
        self, rule: TokenRule, steps: int, make_branch: Callable[[torch.device], Branch]
    ) -> None:
        self.rule, self.last, self.make_branch = rule, steps - 1, make_branch
        self.expert: str | None = None
        self.branches: dict[str, Branch] = {}
        self.measured: str | None = None  # the branch that began

    def start(
        self, step: int, branch: str, expert: str, copies: int, device: torch.device
    ) -> Forward:
        """The forward of `branch` at `step`, on a batch of `copies` times the samples.

        An expert that takes over starts without a memory, so that its first forward is a full one.
        """
        if expert != self.expert:
            self.expert, self.branches = expert, {}
        self.measured = self.measured or branch
        if branch not in self.branches:
            self.branches[branch] = self.make_branch(device)
        memory = self.branches[branch]
        rows = None if memory.velocity is None else self.rule.rows(step, copies)
        return memory.new_forward(rows, step, branch, copies)

    def finish(self, forward: Forward, previous: Tensor | None) -> None:
        if forward.name == self.measured:
            self.rule.measure(forward, previous)
        if forward.step == self.last:
            del self.branches[forward.name]  # makes room for the decoder


class _Session:
    """What the experts of one pipeline share while a method is attached: the running video."""

    def __init__(
        self,
        pipe: DiffusionPipeline,
        make_rule: Callable[[], TokenRule],
        kv_policy: tuple[str, str],
        make_branch: Callable[..., Branch],
    ) -> None:
        self.pipe, self.make_rule, self.kv_policy = pipe, make_rule, kv_policy
        kv_dtype, kv_device = kv_policy
        self.make_branch = partial(make_branch, kv_dtype=kv_dtype, kv_device=kv_device)
        self.clock = VideoClock()
        self.video: _Video | None = None

    def forget(self) -> None:
        self.clock.reset()
        self.video = None

    def start(self, branch: str, expert: str, device: torch.device) -> Forward:
        """The running forward, of a new video where the last was left unfinished."""
        scheduler = self.pipe.scheduler
        step = current_step(scheduler)
        if self.clock.begins(branch, step):
            if not isinstance(scheduler, CachedEuler):
                raise ValueError(
                    f"scheduler: {type(scheduler).__name__} was set after HSA; choices: CachedEuler"
                )
            steps = scheduler.num_inference_steps
            self.video = _Video(self.make_rule(), steps, self.make_branch)
        copies = branch_copies(self.pipe, branch)
        return self.video.start(step, branch, expert, copies, device)


class _Expert:
    """Runs each forward of one transformer on the active tokens only.

    By plain torch hooks: they outlive whatever replaces `forward` in between, as CPU offload does.
    """

    def __init__(self, session: _Session, adapter: Adapter, name: str) -> None:
        self.session, self.adapter, self.name = session, adapter, name
        self.branch = RunningBranch(ended=session.forget)
        self.latents: Tensor | None = None  # of the running forward
        self.previous: Tensor | None = None  # velocity of the branch before it

    @contextmanager
    def installed(self) -> Iterator[None]:
        transformer = self.adapter.transformer
        with registered(transformer, self.branch, HSA_HOOK), self.adapter.installed():
            handles = [
                transformer.register_forward_pre_hook(self._start, with_kwargs=True),
                # Inside the forward: offloaded weights have come, those of other models have gone.
                transformer.rope.register_forward_pre_hook(self._announce),
                transformer.register_forward_hook(self._finish, always_call=True),
            ]
            try:
                yield
            finally:
                for handle in handles:
                    handle.remove()

    def _start(self, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        self.latents = noisy_latents(args, kwargs)
        # Not the module's device: weights that are offloaded come only now.
        forward = self.session.start(self.branch.name, self.name, self.latents.device)
        self.previous = forward.branch.velocity
        return self.adapter.begin(forward, args, kwargs)

    def _announce(self, rope: nn.Module, args: tuple) -> None:
        """Say what a new video's K/V will take; loudly where there is no room for it."""
        forward, latents = self.adapter.forward, self.latents
        if forward.step > 0 or forward.name != self.session.video.measured:
            return
        policy, batch = self.session.kv_policy, len(latents) // forward.copies
        memory = kv_memory(self.session.pipe, self.adapter, forward.grid, batch, latents.device)
        level = logging.INFO if memory.fits(*policy) else logging.WARNING
        logger.log(level, memory.describe(*policy))

    def _finish(self, module: nn.Module, args: tuple, output: tuple | None) -> tuple | None:
        """`output` is None where the forward has failed."""
        forward, video = self.adapter.forward, self.session.video
        try:
            if output is None:
                return None
            output = self.adapter.scatter(output)
            if not forward.branch.velocity.isfinite().all():
                raise FloatingPointError(
                    f"velocity is not finite at step {forward.step}, branch {forward.name!r}, "
                    f"{self.name}"
                )
            video.finish(forward, self.previous)
            self.session.pipe.scheduler.stale = forward.stale()
            video = None
            return output
        finally:
            self.latents = self.previous = None
            self.adapter.end()
            if video is not None:
                self.session.forget()


def _adapter(transformer: nn.Module, expert: str) -> Adapter:
    kind = type(transformer).__name__
    if kind == "OptimizedModule" or transformer._compiled_call_impl is not None:
        raise ValueError(f"{expert}: it is compiled as a whole; use compile_repeated_blocks()")
    if kind not in ADAPTERS:
        raise ValueError(f"{expert}: {kind} is not supported; choices: {', '.join(ADAPTERS)}")
    if transformer._parallel_config is not None:
        raise ValueError(f"{expert}: parallelism is enabled; HSA runs on one device")
    for module in transformer.modules():
        registry: HookRegistry | None = getattr(module, "_diffusers_hook", None)
        for name, hook in registry.hooks.items() if registry else ():
            if hook._is_stateful and name != TRACE_HOOK:
                raise ValueError(f"{expert}: the cache {name!r} is installed; remove it first")
    return ADAPTERS[kind](transformer)
