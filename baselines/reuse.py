"""Residual reuse: what a skipped part of the transformer would return is ``x + residual``.

The one mechanism under every whole-step cache. What was added to the tokens the last time is added
again: by the blocks (embeddings and head still run), or by the whole model. A `Policy` says for
each call whether to compute. State is born with a video and kept by expert, by guidance branch
(diffusers' cache context) and by stream (video, and audio on LTX-2), so nothing ever mixes and an
expert that takes over starts with a computed step.
"""

from __future__ import annotations

import inspect
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, Literal

from diffusers import DiffusionPipeline
from diffusers.hooks.hooks import ModelHook
from torch import Tensor, nn

from baselines.policy import Call, Policy, Tap
from baselines.videos import num_videos
from hsa.registry import RunningBranch, VideoClock, registered
from hsa.schedulers import current_step
from hsa.trace import blocks, experts

_HOOK = "residual_reuse"
_MODEL_HOOK = "residual_reuse_model"
_STREAMS = ("hidden_states", "audio_hidden_states")

Streams = tuple[Tensor, ...]


class _Branch:
    """What one guidance branch of one expert remembers."""

    def __init__(self, policy: Policy) -> None:
        self.policy = policy
        self.history: deque[tuple[int, Streams]] = deque(maxlen=policy.memory)
        self.entered: tuple[Call, Streams] | None = None
        self.reusing = False


class _Follower(Policy):
    """Does as the branch that decides for all."""

    def __init__(self, leader: _Branch) -> None:
        self.leader = leader
        self.memory = leader.policy.memory

    def decide(self, call: Call) -> bool:
        return not self.leader.reusing

    def forecast(self, step, history):
        return self.leader.policy.forecast(step, history)


class _Video:
    """The running video, shared by the experts of a pipeline."""

    def __init__(
        self, pipe: DiffusionPipeline, make_policy: Callable[[], Policy], joint: bool
    ) -> None:
        self.pipe, self.make_policy, self.joint = pipe, make_policy, joint
        self.clock = VideoClock()
        self.forget()

    def forget(self) -> None:
        self.clock.reset()
        self.expert: str | None = None
        self.branches: dict[str, _Branch] = {}
        self.running: _Branch | None = None

    @property
    def step(self) -> int:
        return current_step(self.pipe.scheduler)

    def run(self, expert: str, name: str) -> _Branch:
        """The branch that is running from here on."""
        if self.clock.begins(name, self.step) or expert != self.expert:
            self.expert, self.branches = expert, {}
            self.sigmas = self.pipe.scheduler.sigmas.tolist()
            self.spans = expert_steps(self.pipe)
        if name not in self.branches:
            leader = next(iter(self.branches.values()), None) if self.joint else None
            self.branches[name] = _Branch(_Follower(leader) if leader else self.make_policy())
        self.running = self.branches[name]
        return self.running


class _Engine(RunningBranch):
    """Sits on the transformer root, where diffusers hands it the cache context and the inputs.

    By plain torch hooks: they outlive whatever replaces `forward` in between, as CPU offload does.
    """

    def __init__(self, video: _Video, expert: str, tap: Tap | None) -> None:
        super().__init__(ended=video.forget)
        self.video, self.expert, self.tap = video, expert, tap
        self._forget()

    def _forget(self) -> None:
        self.inputs: Mapping[str, Any] | None = None
        self.signal: Any = None

    def start(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        self.config, self.inputs = module.config, kwargs

    def note(self, module: nn.Module, args: tuple, output: Any) -> None:
        self.signal = output

    def reset_state(self, module: nn.Module) -> None:
        super().reset_state(module)
        self._forget()

    def enter(self, streams: Streams, block: nn.Module | None, arguments: Mapping) -> Streams:
        """Decide; return the streams as they leave on reuse, else as they are."""
        video, name = self.video, self.name
        branch = video.run(self.expert, name)
        signal = self.tap(block, arguments) if callable(self.tap) else self.signal
        call = Call(
            step=video.step,
            branch=name,
            tokens=streams[0],
            signal=signal,
            sigma=video.sigmas[video.step],
            spans=video.spans,
            videos=num_videos(video.pipe, name, streams[0]),
            config=self.config,
            inputs=self.inputs,
        )
        branch.reusing = not branch.policy.decide(call) and len(branch.history) > 0
        if not branch.reusing:
            branch.entered = call, streams
            return streams
        residuals = (
            branch.policy.forecast(call.step, [(step, kept[i]) for step, kept in branch.history])
            for i in range(len(streams))
        )
        return tuple(x + residual for x, residual in zip(streams, residuals, strict=True))

    def leave(self, streams: Streams) -> None:
        branch = self.video.running
        (call, entered), branch.entered = branch.entered, None
        residuals = tuple(out - x for out, x in zip(streams, entered, strict=True))
        branch.history.append((call.step, residuals))
        branch.policy.observe(call, residuals[0])


class _Block(ModelHook):
    """Runs its block, or passes the streams through while the engine reuses."""

    def __init__(self, engine: _Engine, block: nn.Module, first: bool, last: bool) -> None:
        super().__init__()
        self.engine, self.first, self.last = engine, first, last
        self.signature = inspect.signature(type(block).forward)

    def new_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Tensor | Streams:
        arguments = self.signature.bind(module, *args, **kwargs).arguments
        names = [name for name in _STREAMS if name in arguments]
        streams = tuple(arguments[name] for name in names)
        if self.first:
            streams = self.engine.enter(streams, module, arguments)
        if self.engine.video.running.reusing:
            return streams if len(streams) > 1 else streams[0]
        output = self.fn_ref.original_forward(*args, **kwargs)
        if self.last:
            self.engine.leave(output if isinstance(output, tuple) else (output,))
        return output


class _Model(ModelHook):
    """Runs the transformer, or adds the last velocity's distance from its latents to the new ones.

    Pipelines ask for the tuple of velocities, one a stream (``return_dict=False``).
    """

    def __init__(self, engine: _Engine) -> None:
        super().__init__()
        self.engine = engine

    def new_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Streams:
        streams = tuple(kwargs[name] for name in _STREAMS if name in kwargs)
        if streams[0].ndim == 5:
            streams = (streams[0][:, : module.config.out_channels],)
        streams = self.engine.enter(streams, None, kwargs)
        if self.engine.video.running.reusing:
            return streams
        output = self.fn_ref.original_forward(*args, **kwargs)
        self.engine.leave(output)
        return output


@contextmanager
def residual_reuse(
    pipe: DiffusionPipeline,
    make_policy: Callable[[], Policy],
    tap: Tap | None = None,
    *,
    boundary: Literal["blocks", "model"] = "blocks",
    joint: bool = False,
) -> Iterator[None]:
    """Reuse residuals in every expert of the pipe as the policy says.

    Args:
        make_policy: called for each branch of each expert at the start of each video.
        tap: where the policy's ``call.signal`` comes from.
        boundary: what a reused call skips.
        joint: the policy of the first branch of a step decides for all branches.
    """
    with ExitStack() as stack:
        video = _Video(pipe, make_policy, joint)
        for expert, transformer in experts(pipe).items():
            engine = _Engine(video, expert, tap)
            if boundary == "model":
                stack.enter_context(registered(transformer, _Model(engine), _MODEL_HOOK))
            stack.enter_context(registered(transformer, engine, _HOOK))
            start = transformer.register_forward_pre_hook(engine.start, with_kwargs=True)
            stack.callback(start.remove)
            skipped = blocks(transformer) if boundary == "blocks" else ()
            for index, block in enumerate(skipped):
                last = index == len(skipped) - 1
                hook = _Block(engine, block, first=index == 0, last=last)
                stack.enter_context(registered(block, hook, _HOOK))
            if isinstance(tap, str):
                handle = transformer.get_submodule(tap).register_forward_hook(engine.note)
                stack.callback(handle.remove)
        yield


def expert_steps(pipe: DiffusionPipeline) -> tuple[range, ...]:
    """The steps of each expert once the scheduler has them; Wan hands over below a timestep."""
    timesteps, boundary = pipe.scheduler.timesteps, pipe.config.get("boundary_ratio")
    if boundary is None:
        return (range(len(timesteps)),)
    high = timesteps >= boundary * pipe.scheduler.config.num_train_timesteps
    switch = int(high.sum())
    return range(switch), range(switch, len(timesteps))
