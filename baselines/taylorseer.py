"""TaylorSeer: features of skipped steps are predicted from finite differences of computed ones."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, replace
from math import factorial
from typing import TYPE_CHECKING, ClassVar

from baselines.base import Request, is_count, require
from baselines.rule import Rule, RuleMethod, Streams

if TYPE_CHECKING:
    from torch import Tensor, nn

PARTS = (  # what adds to the tokens within a block
    *("attn1", "attn2", "ffn"),  # Wan; LTX says ff
    *("ff", "audio_attn1", "audio_attn2", "audio_ff", "audio_to_video_attn", "video_to_audio_attn"),
)
HEADS = ("proj_out", "audio_proj_out")


@dataclass(frozen=True)
class TaylorSeer(RuleMethod):
    """Compute every ``interval``-th step, predict in between by a Taylor series in elapsed steps.

    The first ``warmup_steps`` steps are computed, then every ``interval``-th; derivatives up to
    ``max_order`` are finite differences between computed steps. The authors say fresh_threshold
    for ``interval`` and first_enhance for ``warmup_steps``; their values for Wan are the defaults.

    Every attention and feed-forward output is predicted on its own, and modulation and gates are
    computed in every step, which stores ``max_order`` + 1 tensors for each of them. ``lite``
    predicts the velocity instead and runs no block at all on skipped steps.
    """

    version: ClassVar[int] = 1
    implementation: ClassVar[str] = "from-paper"
    paper: ClassVar[str] = "arXiv 2503.06923"
    source: ClassVar[str] = "the paper, section 3; the authors' code is GPL-3.0"
    deviations: ClassVar[tuple[str, ...]] = (
        "lite is diffusers' variant, on the authors' schedule and on both heads of LTX-2",
        "differences are taken from the first step on; the authors' code begins with the last "
        "warm-up step, which matters from order 2 and 3 warm-up steps on",
        "skipped steps compute the blocks' norms, which the authors' forward leaves out: that "
        "costs time and changes nothing",
        "two experts: each counts its own steps",
    )
    one_video: ClassVar[bool] = False
    knob: ClassVar[tuple[str, int, int]] = ("interval", 1, 40)

    interval: int = 5
    max_order: int = 1
    warmup_steps: int = 1
    lite: bool = False

    def validate(self, request: Request) -> None:
        for name, minimum in (("interval", 1), ("max_order", 0), ("warmup_steps", 1)):
            value = getattr(self, name)
            choices = f"a whole number >= {minimum}"
            require(is_count(value, minimum), f"taylorseer.{name}", value, choices)
        require(isinstance(self.lite, bool), "taylorseer.lite", self.lite, "true or false")

    def neutral(self, request: Request) -> TaylorSeer:
        return replace(self, interval=1)

    def modules(self, transformer: nn.Module) -> Mapping[Hashable, nn.Module]:
        blocks = super().modules(transformer)
        if self.lite:
            heads = {name: getattr(transformer, name, None) for name in HEADS}
            return blocks | {name: head for name, head in heads.items() if head is not None}
        return {
            (index, name): getattr(block, name)
            for index, block in blocks.items()
            for name in PARTS
            if hasattr(block, name)
        }

    def rule(self, request: Request) -> Rule:
        return _Series(self)


class _Series(Rule):
    def __init__(self, method: TaylorSeer) -> None:
        self.method = method
        self.first: int | None = None  # step this expert began with
        self.last = 0  # computed step
        self.factors: dict[Hashable, list[tuple[Tensor, ...]]] = {}  # by stream, then by order

    def begin(self, step: int) -> None:
        if self.first is None:
            self.first = step
        after_warmup = step - self.first - (self.method.warmup_steps - 1)
        self.computing = after_warmup <= 0 or after_warmup % self.method.interval == 0
        self.elapsed = step - self.last
        if self.computing:
            self.last = step

    def run(self, key: Hashable, tokens: Streams, compute: Callable[[], Streams]) -> Streams:
        if self.method.lite and key not in HEADS:
            return compute() if self.computing else tokens
        if not self.computing:
            return tuple(taylor(factors, self.elapsed) for factors in self.factors[key])
        features = compute()
        before = self.factors.get(key, [()] * len(features))
        self.factors[key] = [
            differences(feature, older[: self.method.max_order], self.elapsed)
            for feature, older in zip(features, before, strict=True)
        ]
        return features


def differences(feature: Tensor, before: tuple[Tensor, ...], elapsed: int) -> tuple[Tensor, ...]:
    """The feature and its backward differences a step, from those ``elapsed`` steps ``before``."""
    factors = [feature]
    for older in before:
        factors.append((factors[-1] - older) / elapsed)
    return tuple(factors)


def taylor(factors: tuple[Tensor, ...], elapsed: int) -> Tensor:
    """Sum of factor * elapsed^order / order!"""
    value = factors[0]
    for order, factor in enumerate(factors[1:], start=1):
        value = value.add(factor, alpha=elapsed**order / factorial(order))
    return value
