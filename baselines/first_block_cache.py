"""First Block Cache: diffusers' own hook, and the same rule over both streams of LTX-2."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

from baselines.base import Method, Request, is_number, require
from baselines.policy import relative_change
from baselines.rule import Rule, Streams

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline
    from torch import Tensor, nn


@dataclass(frozen=True)
class FirstBlockCache(Method):
    """Reuse the blocks' residual while the first block's residual changes by ``threshold`` or less.

    The first block always runs. Each branch decides for itself, by comparison with its last
    computed step; there is no warm-up and no limit on consecutive skips.
    """

    version: ClassVar[int] = 1
    implementation: ClassVar[str] = "diffusers-hook"
    paper: ClassVar[str] = "none: ParaAttention's First Block Cache"
    source: ClassVar[str] = "diffusers.hooks.first_block_cache"
    deviations: ClassVar[tuple[str, ...]] = (
        "diffusers reuses at equality with the threshold, ParaAttention below it",
        "LTX-2, which the hook cannot run: the same rule decides on video and serves both streams",
        "LTX: guidance is one batch, so both branches share a decision",
    )
    knob: ClassVar[tuple[str, float, float]] = ("threshold", 0.001, 4.0)

    threshold: float = 0.05

    def validate(self, request: Request) -> None:
        require(
            is_number(self.threshold),
            "first_block_cache.threshold",
            self.threshold,
            "a number >= 0",
        )

    def neutral(self, request: Request) -> FirstBlockCache:
        return replace(self, threshold=0.0)

    def install(self, pipe: DiffusionPipeline, request: Request) -> AbstractContextManager[None]:
        from hsa.trace import experts

        families = {type(transformer).__name__ for transformer in experts(pipe).values()}
        if families == {"LTX2VideoTransformer3DModel"}:
            return first_block_rule(pipe, self.threshold)
        return _diffusers_hook(pipe, self.threshold)


@contextmanager
def _diffusers_hook(pipe: DiffusionPipeline, threshold: float) -> Iterator[None]:
    from diffusers import FirstBlockCacheConfig
    from diffusers.hooks.first_block_cache import _FBC_LEADER_BLOCK_HOOK

    from baselines.videos import each_video
    from hsa.trace import blocks, experts

    def begin(transformer: nn.Module, branch: str, videos: int) -> None:
        require(videos == 1, "first_block_cache: batch", videos, "1, one video a call")
        leader = blocks(transformer)[0]._diffusers_hook.get_hook(_FBC_LEADER_BLOCK_HOOK)
        state = leader.state_manager.get_state()
        state.reset()
        state.head_block_residual = None  # diffusers resets it at the end of a call alone

    with ExitStack() as stack:
        for transformer in experts(pipe).values():
            transformer.enable_cache(FirstBlockCacheConfig(threshold=threshold))
            stack.callback(transformer.disable_cache)
        stack.enter_context(each_video(pipe, begin))
        yield


def first_block_rule(pipe: DiffusionPipeline, threshold: float) -> AbstractContextManager[None]:
    """The hook's rule for blocks with any number of streams."""
    from baselines.blocks import ruled_modules
    from hsa.trace import blocks

    return ruled_modules(
        pipe,
        lambda branch: _FirstBlock(threshold),
        lambda transformer: dict(enumerate(blocks(transformer))),
        refusing="first_block_cache",
    )


class _FirstBlock(Rule):
    def __init__(self, threshold: float) -> None:
        self.threshold = threshold
        self.residual: Tensor | None = None  # the first block's, video stream, last computed step
        self.rest: Streams = ()  # residuals of the other blocks at that step

    def begin(self, step: int) -> None:
        self.skipping = False

    def run(self, key: int, tokens: Streams, compute: Callable[[], Streams]) -> Streams:
        if self.skipping:
            return tokens
        self.left = compute()
        if key == 0:
            self.entered, residual = self.left, self.left[0] - tokens[0]
            if (
                self.residual is not None
                and relative_change(residual, self.residual) <= self.threshold
            ):
                self.skipping = True
                return tuple(rest + x for x, rest in zip(self.left, self.rest, strict=True))
            self.residual = residual
        return self.left

    def end(self) -> None:
        if not self.skipping:
            self.rest = tuple(out - x for out, x in zip(self.left, self.entered, strict=True))
        del self.left, self.entered
