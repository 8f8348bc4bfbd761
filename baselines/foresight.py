"""Foresight: blocks whose output changes less than it did in the warm-up are reused."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

from baselines.base import Request, is_count, is_number, require
from baselines.rule import Rule, RuleMethod, Streams

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Foresight(RuleMethod):
    """Between full steps, reuse the blocks up to the last whose change is within its limit.

    The change of a block is the mean squared difference of its output to that of the last time it
    ran; its limit is ``threshold`` times the change in the last of ``warmup`` full steps. Every
    step whose number divides by ``recalculate`` is full. Names are those of the official code,
    values those of its example for CogVideoX, the official model nearest to Wan and LTX.
    """

    version: ClassVar[int] = 1
    implementation: ClassVar[str] = "official-rule"
    paper: ClassVar[str] = "arXiv 2506.00329"
    source: ClassVar[str] = (
        "github.com/STAR-Laboratory/foresight a4dba33, cogvideox_transformer_3d.py (Apache-2.0)"
    )
    deviations: ClassVar[tuple[str, ...]] = (
        "limits as released, from the last warm-up step; the paper weights the last three",
        "Wan: each guidance branch decides for itself; the official models batch them",
        "every video has a warm-up of its own; the released code never starts anew, and its second "
        "video goes by the limits of the first",
        "changes are measured in fp32; officially in the model's dtype, infinite ones set to zero",
        "two experts: each counts its own steps and has its own warm-up",
        "LTX-2: the video stream decides for both",
    )
    knob: ClassVar[tuple[str, float, float]] = ("threshold", 0.001, 100.0)

    warmup: int = 8
    recalculate: int = 2
    threshold: float = 0.5

    def validate(self, request: Request) -> None:
        for name, minimum in (("warmup", 2), ("recalculate", 1)):
            value = getattr(self, name)
            choices = f"a whole number >= {minimum}"
            require(is_count(value, minimum), f"foresight.{name}", value, choices)
        require(is_number(self.threshold), "foresight.threshold", self.threshold, "a number >= 0")

    def neutral(self, request: Request) -> Foresight:
        return replace(self, recalculate=1)

    def rule(self, request: Request) -> Rule:
        return _Layers(self)


class _Layers(Rule):
    def __init__(self, method: Foresight) -> None:
        self.method = method
        self.count = -1  # steps of this expert
        self.outputs: dict[int, Streams] = {}
        self.measured: dict[int, Tensor] = {}  # in the running forward
        self.change: dict[int, float] = {}
        self.limit: dict[int, float] = {}

    def begin(self, step: int) -> None:
        self.count += 1
        full = self.count < self.method.warmup or self.count % self.method.recalculate == 0
        self.measured = {}
        settled = () if full else (b for b in self.limit if self.change[b] <= self.limit[b])
        self.last_reused = max(settled, default=-1)

    def run(self, key: int, tokens: Streams, compute: Callable[[], Streams]) -> Streams:
        if key <= self.last_reused:
            return self.outputs[key]
        output = compute()
        if key in self.outputs and self.count >= self.method.warmup - 1:
            self.measured[key] = _mean_squared(output[0], self.outputs[key][0])
        self.outputs[key] = output
        return output

    def end(self) -> None:
        import torch

        if self.measured:  # fetched together: each wait for the device costs time
            values = torch.stack([*self.measured.values()]).tolist()
            self.change.update(zip(self.measured, values, strict=True))
        if self.count == self.method.warmup - 1:
            threshold = self.method.threshold
            self.limit = {block: threshold * change for block, change in self.change.items()}


def _mean_squared(new: Tensor, old: Tensor) -> Tensor:
    return (new.float() - old.float()).square().mean()
