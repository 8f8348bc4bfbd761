"""DBCache, and DBCache with TaylorSeer: the package cache-dit on the transformers of a Wan pipe."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, ClassVar

from baselines.base import (
    Method,
    Request,
    is_count,
    is_number,
    require,
    require_own_forward,
    require_wan,
)

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline
    from torch import nn


@dataclass(frozen=True)
class DBCache(Method):
    """Run the first blocks; while their residual changes by less than ``threshold``, skip the rest.

    ``front_blocks`` and ``back_blocks`` (Fn, Bn) run at every step. A change is measured against
    the last computed step of the branch. ``max_continuous_cached_steps`` and ``max_cached_steps``
    limit the skipped steps, -1 for no limit. ``taylorseer_order``: 1 or 2 to extrapolate the
    skipped residual, None to reuse it. The defaults are those of cache-dit's command line, which
    its Wan 2.1 examples use; its library defaults are 8 front blocks and a threshold of 0.08.
    """

    version: ClassVar[int] = 1
    implementation: ClassVar[str] = "cache-dit"
    paper: ClassVar[str] = "none: cache-dit's Dual Block Cache; TaylorSeer is arXiv 2503.06923"
    source: ClassVar[str] = "github.com/vipshop/cache-dit 1.5.3 (Apache-2.0)"
    deviations: ClassVar[tuple[str, ...]] = (
        "installed on transformers, whose contexts are renewed for every video, as cache-dit does "
        "by itself where it is installed on the pipeline",
        "without guidance every call is one of the same branch; cache-dit takes every second one "
        "for unconditional whatever the guidance",
        "the attention backend is left alone, where enable_cache() picks one",
        "two experts: the same settings for both, the warm-up included; cache-dit's Wan 2.2 "
        "example has 4 warm-up and at most 8 cached steps for the first, 2 and 20 for the second",
    )
    knob: ClassVar[tuple[str, float, float]] = ("threshold", 0.001, 1.0)

    threshold: float = 0.12
    front_blocks: int = 1
    back_blocks: int = 0
    max_warmup_steps: int = 8
    max_cached_steps: int = -1
    max_continuous_cached_steps: int = 3
    taylorseer_order: int | None = None

    @property
    def installed(self) -> bool:
        """Whether the package is there."""
        return find_spec("cache_dit") is not None

    def validate(self, request: Request) -> None:
        require(is_number(self.threshold), "dbcache.threshold", self.threshold, "a number >= 0")
        lowest = {"front_blocks": 1, "back_blocks": 0, "max_warmup_steps": 0}
        limits = {"max_cached_steps": -1, "max_continuous_cached_steps": -1}
        for name, minimum in (lowest | limits).items():
            value = getattr(self, name)
            require(
                is_count(value, minimum), f"dbcache.{name}", value, f"a whole number >= {minimum}"
            )
        require(
            self.taylorseer_order in (None, 1, 2),
            "dbcache.taylorseer_order",
            self.taylorseer_order,
            "1, 2 or null",
        )
        if not self.installed:
            raise ValueError("cache-dit: not installed; run pip install 'hsa-bench[cache-dit]'")

    def neutral(self, request: Request) -> DBCache:
        return replace(self, threshold=0.0)

    @contextmanager
    def install(self, pipe: DiffusionPipeline, request: Request) -> Iterator[None]:
        from baselines.videos import each_video
        from hsa.trace import experts

        require_wan(pipe, "dbcache", "the only one that cache-dit runs correctly")
        require_own_forward(pipe, "dbcache")
        for transformer in experts(pipe).values():
            always, depth = self.front_blocks + self.back_blocks, len(transformer.blocks)
            require(
                always < depth,
                "dbcache.front_blocks + back_blocks",
                always,
                f"less than the model's {depth} blocks",
            )
        # Quiet unless the user asks otherwise: it reports its settings for every transformer.
        os.environ.setdefault("CACHE_DIT_LOG_LEVEL", "error")
        import cache_dit

        def begin(transformer: nn.Module, branch: str, videos: int) -> None:
            require(videos == 1, "dbcache: batch", videos, "1, one video a call")
            if branch == "cond":
                cache_dit.refresh_context(
                    transformer,
                    cache_config=cache_dit.DBCacheConfig().reset(
                        enable_separate_cfg=pipe.do_classifier_free_guidance,
                        num_inference_steps=pipe.scheduler.num_inference_steps,
                    ),
                )

        with ExitStack() as stack:
            for transformer in experts(pipe).values():
                stack.enter_context(self._cached(transformer))
            stack.enter_context(each_video(pipe, begin))
            yield

    @contextmanager
    def _cached(self, transformer: nn.Module) -> Iterator[None]:
        import cache_dit
        from cache_dit.caching.cache_adapters import CachedAdapter

        forward, submodules = vars(transformer).get("forward"), list(transformer._modules)
        try:
            CachedAdapter.apply(transformer, **self._settings())
            yield
        finally:
            # cache-dit would leave a forward on the instance, and the blocks after the head.
            vars(transformer).pop("_original_forward", None)
            cache_dit.disable_cache(transformer)
            vars(transformer).pop("forward", None)
            if forward is not None:
                transformer.forward = forward
            for name in submodules:
                transformer._modules[name] = transformer._modules.pop(name)

    def _settings(self) -> dict[str, Any]:
        from cache_dit import DBCacheConfig, TaylorSeerCalibratorConfig

        order = self.taylorseer_order
        return {
            "cache_config": DBCacheConfig(
                Fn_compute_blocks=self.front_blocks,
                Bn_compute_blocks=self.back_blocks,
                residual_diff_threshold=self.threshold,
                max_warmup_steps=self.max_warmup_steps,
                max_cached_steps=self.max_cached_steps,
                max_continuous_cached_steps=self.max_continuous_cached_steps,
                enable_separate_cfg=True,
            ),
            "calibrator_config": order and TaylorSeerCalibratorConfig(taylorseer_order=order),
        }
