"""First Block Cache: diffusers' own hook, switched on for one video and off again."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

from baselines.base import Method, Request, is_number, require

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline


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

    @contextmanager
    def install(self, pipe: DiffusionPipeline, request: Request) -> Iterator[None]:
        from diffusers import FirstBlockCacheConfig

        from hsa.trace import experts

        with ExitStack() as stack:
            for transformer in experts(pipe).values():
                transformer.enable_cache(FirstBlockCacheConfig(threshold=self.threshold))
                stack.callback(transformer.disable_cache)
                handle = transformer.register_forward_pre_hook(_one_video, with_kwargs=True)
                stack.callback(handle.remove)
            yield


def _one_video(module, args: tuple, kwargs: dict) -> None:
    """diffusers compares means over the whole batch: videos in it would steer each other."""
    batch = len(kwargs["hidden_states"])
    require(batch == 1, "first_block_cache: batch", batch, "1, one video a call")
