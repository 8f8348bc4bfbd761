"""FasterCache: attention outputs and the unconditional branch are extrapolated, not recomputed.

Dynamic feature reuse: between computed steps, a self-attention's output continues the change from
the computed step before the last to the last. CFG-Cache: between full steps, the unconditional
velocity is the conditional one plus their last measured difference, whose low or high spatial
frequencies are emphasised.

diffusers' own hook expects both guidance branches in one batch and fails on Wan, which runs them
one after the other; here each runs in its own cache context.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, ClassVar

from baselines.base import (
    Method,
    Request,
    is_count,
    is_number,
    require,
    require_own_forward,
    require_wan,
)
from baselines.rule import Rule, Streams

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline
    from torch import nn


@dataclass(frozen=True)
class FasterCache(Method):
    """Extrapolate attention and the unconditional branch from the share ``start`` of the steps on.

    Every ``guidance_interval``-th step from there runs both branches in full. On the others the
    unconditional branch does not run, and the conditional one computes its self-attention in one
    of ``attention_interval`` steps. The difference of the branches is multiplied in its low
    frequencies by 1 + ``alpha_low`` before the share ``switch`` of the steps, and in the high ones
    by 1 + ``alpha_high`` from there on. Without guidance, attention alone is extrapolated.
    """

    version: ClassVar[int] = 1
    implementation: ClassVar[str] = "from-paper"
    paper: ClassVar[str] = "arXiv 2410.19355"
    source: ClassVar[str] = "the paper, sections 2.4 and 3.1; the authors' code has no licence"
    deviations: ClassVar[tuple[str, ...]] = (
        "the paper gives a start for CFG-Cache only: feature reuse begins with it",
        "the paper leaves two numbers open: the switch from low to high frequencies is half of the "
        "steps, as in MaxDiffusion's port to Wan (Apache-2.0); low is within a fifth of the "
        "shorter side, as in diffusers' port (Apache-2.0)",
        "a full step computes every attention, also where feature reuse would skip it",
        "two experts: each starts with a full step",
        "as the paper writes it, not as its code for each model runs: that multiplies the factors "
        "again at every step, switches later, and on some models keeps w constant or reuses two "
        "attentions of three",
    )
    knob: ClassVar[tuple[str, float, float]] = ("start", 1 / 3, 1.0)  # not before the paper's

    start: float = 1 / 3
    attention_interval: int = 2
    guidance_interval: int = 5
    alpha_low: float = 0.2
    alpha_high: float = 0.2
    switch: float = 0.5

    def validate(self, request: Request) -> None:
        for name in ("start", "switch"):
            value = getattr(self, name)
            require(
                is_number(value) and value <= 1, f"fastercache.{name}", value, "a number in 0..1"
            )
        for name in ("attention_interval", "guidance_interval"):
            value = getattr(self, name)
            require(is_count(value), f"fastercache.{name}", value, "a whole number >= 1")
        for name in ("alpha_low", "alpha_high"):
            value = getattr(self, name)
            require(is_number(value), f"fastercache.{name}", value, "a number >= 0")

    def neutral(self, request: Request) -> FasterCache:
        return replace(self, start=1.0)

    @contextmanager
    def install(self, pipe: DiffusionPipeline, request: Request) -> Iterator[None]:
        from baselines.blocks import ruled_modules
        from baselines.guidance_cache import guidance_cache

        require_wan(pipe, "fastercache", "whose guidance branches run one after the other")
        require_own_forward(pipe, "fastercache")
        schedule = _Schedule(self, request.steps)
        with ExitStack() as stack:
            reuse = partial(_DynamicReuse, schedule)
            stack.enter_context(ruled_modules(pipe, reuse, _self_attentions))
            stack.enter_context(guidance_cache(pipe, schedule.full, schedule.weights))
            yield


@dataclass(frozen=True)
class _Schedule:
    """What runs at each of the ``steps``, by the settings of ``method``."""

    method: FasterCache
    steps: int

    @property
    def first(self) -> int:
        """The first step at which the method is on; it is a full one."""
        return round(self.method.start * self.steps)

    def full(self, step: int) -> bool:
        """Both branches, every attention."""
        return step < self.first or (step - self.first) % self.method.guidance_interval == 0

    def cached(self, step: int) -> bool:
        """One of the steps t, t + 2, ... between which attention is extrapolated."""
        return (step - self.first) % self.method.attention_interval == 0

    def progress(self, step: int) -> float:
        """w(t): from 0 at the first step to 1 at the last."""
        return (step - self.first) / (self.steps - 1 - self.first)

    def weights(self, step: int) -> tuple[float, float]:
        """Factors w1 and w2 of the low and the high frequencies of the branches' difference."""
        if step < self.method.switch * self.steps:
            return 1 + self.method.alpha_low, 1.0
        return 1.0, 1 + self.method.alpha_high


class _DynamicReuse(Rule):
    """F[t-1] = F[t] + (F[t] - F[t+2]) w(t) in place of a self-attention.

    The unconditional branch keeps nothing: it runs in full or not at all.
    """

    def __init__(self, schedule: _Schedule, branch: str) -> None:
        self.schedule, self.keeps = schedule, branch != "uncond"
        self.cache: dict[int, list[Streams]] = {}  # block -> at most two outputs, newest first

    def begin(self, step: int) -> None:
        self.step = step

    def run(self, key: int, tokens: Streams, compute: Callable[[], Streams]) -> Streams:
        cache = self.cache.setdefault(key, [])
        if self.schedule.full(self.step) or self.schedule.cached(self.step) or not cache:
            output = compute()
            if self.keeps and self.schedule.cached(self.step):
                self.cache[key] = [output, *cache[:1]]
            return output
        newest, older = cache[0], cache[-1]
        weight = self.schedule.progress(self.step)
        return tuple(f + (f - f2) * weight for f, f2 in zip(newest, older, strict=True))


def _self_attentions(transformer: nn.Module) -> dict[int, nn.Module]:
    return {index: block.attn1 for index, block in enumerate(transformer.blocks)}
