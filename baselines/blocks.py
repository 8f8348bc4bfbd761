"""Caching inside the transformer: a `Rule` decides about every hooked module of every forward.

`baselines.reuse` skips all blocks together and adds their residual; here a method sees them one by
one. State is born with a video and kept by guidance branch (diffusers' cache context) for the
expert that runs, so nothing ever mixes and an expert that takes over starts with nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

from diffusers import DiffusionPipeline
from diffusers.hooks.hooks import ModelHook
from torch import Tensor, nn

from baselines.base import require
from baselines.rule import Rule, Streams
from baselines.videos import num_videos
from hsa.registry import RunningBranch, VideoClock, registered
from hsa.schedulers import current_step
from hsa.trace import experts

_HOOK = "ruled_modules"
_STREAMS = ("hidden_states", "audio_hidden_states")


class _Video:
    """The running video: what the guidance branches of the running expert remember."""

    def __init__(self, pipe: DiffusionPipeline, make_rule: Callable[[str], Rule]) -> None:
        self.pipe, self.make_rule = pipe, make_rule
        self.clock = VideoClock()
        self.forget()

    def forget(self) -> None:
        self.clock.reset()
        self.expert: nn.Module | None = None
        self.rules: dict[str, Rule] = {}
        self.rule: Rule | None = None  # of the running branch

    def start(self, expert: nn.Module, name: str) -> None:
        """A forward of an expert begins; whatever another one remembered makes room for it."""
        step = current_step(self.pipe.scheduler)
        if self.clock.begins(name, step) or expert is not self.expert:
            self.expert, self.rules = expert, {}
        if name not in self.rules:
            self.rules[name] = self.make_rule(name)
        self.rule = self.rules[name]
        self.rule.begin(step)


class _Transformer(RunningBranch):
    """Sits on the transformer root, where diffusers hands it the cache context.

    By plain torch hooks: they outlive whatever replaces `forward` in between, as CPU offload does.
    """

    def __init__(self, video: _Video, refusing: str | None) -> None:
        super().__init__(ended=video.forget)
        self.video, self.refusing = video, refusing

    def start(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        if self.refusing:
            videos = num_videos(self.video.pipe, self.name, kwargs["hidden_states"])
            require(videos == 1, f"{self.refusing}: batch", videos, "1, one video a call")
        self.video.start(module, self.name)

    def end(self, module: nn.Module, args: tuple, output: Any) -> None:
        self.video.rule.end()


class _Module(ModelHook):
    """Asks the rule of the running branch what its module returns."""

    def __init__(self, video: _Video, key: Hashable) -> None:
        super().__init__()
        self.video, self.key = video, key

    def new_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Tensor | Streams:
        def compute() -> Streams:
            output = self.fn_ref.original_forward(*args, **kwargs)
            return output if isinstance(output, tuple) else (output,)

        tokens = tuple(kwargs[name] for name in _STREAMS if name in kwargs) or args[:1]
        output = self.video.rule.run(self.key, tokens, compute)
        return output if len(output) > 1 else output[0]


@contextmanager
def ruled_modules(
    pipe: DiffusionPipeline,
    make_rule: Callable[[str], Rule],
    modules: Callable[[nn.Module], Mapping[Hashable, nn.Module]],
    refusing: str | None = None,
) -> Iterator[None]:
    """Let rules stand in for modules of every expert of the pipe.

    Args:
        make_rule: called with the name of each branch of each expert, in each video.
        modules: what the rule decides about in a transformer, by the keys it knows.
        refusing: name of the method, if it refuses a batch of videos.

    Raises:
        ValueError: rules are attached already; while sampling, a batch where one is refused.
    """
    video = _Video(pipe, make_rule)
    with ExitStack() as stack:
        for transformer in experts(pipe).values():
            root = _Transformer(video, refusing)
            stack.enter_context(registered(transformer, root, _HOOK))
            start = transformer.register_forward_pre_hook(root.start, with_kwargs=True)
            stack.callback(start.remove)
            stack.callback(transformer.register_forward_hook(root.end).remove)
            for key, module in modules(transformer).items():
                stack.enter_context(registered(module, _Module(video, key), _HOOK))
        yield
