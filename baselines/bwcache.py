"""BWCache: when the blocks' outputs have settled, all of them are reused for some steps."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from statistics import fmean
from typing import ClassVar

from baselines.base import Request, is_number, require
from baselines.policy import relative_distance
from baselines.rule import Rule, RuleMethod, Streams


@dataclass(frozen=True)
class BWCache(RuleMethod):
    """Reuse every block's output for ``interval`` of the steps once they change by less than
    ``threshold``.

    The change is the relative L1 distance of a block's output to that of the last computed step,
    averaged over the blocks; it is looked at after every computed step. If k steps have run when
    it is first low, the last k / 2 steps are computed.
    """

    version: ClassVar[int] = 2
    implementation: ClassVar[str] = "from-paper"
    paper: ClassVar[str] = "arXiv 2509.13789"
    source: ClassVar[str] = "the paper, section 3, equations 5 to 8; no reachable code"
    deviations: ClassVar[tuple[str, ...]] = (
        "what the paper says of the last steps can be read in two ways; to compute the second half "
        "of those after the first low change cannot give its shares of reused steps, 41 to 59 %",
        "every block is measured; on Wan the authors measure a selection they do not name",
        "two experts: each is triggered by itself, its remaining steps are those of the video",
        "LTX: guidance is one batch, so both branches share a decision",
        "LTX-2: the video stream decides for both",
    )
    knob: ClassVar[tuple[str, float, float]] = ("threshold", 0.001, 4.0)

    threshold: float = 0.15
    interval: float = 0.1

    def validate(self, request: Request) -> None:
        require(is_number(self.threshold), "bwcache.threshold", self.threshold, "a number >= 0")
        require(
            is_number(self.interval) and 0 < self.interval <= 1,
            "bwcache.interval",
            self.interval,
            "a share of the steps, above 0 and at most 1",
        )

    def neutral(self, request: Request) -> BWCache:
        return replace(self, threshold=0.0)

    def rule(self, request: Request) -> Rule:
        return _Settled(self.threshold, max(1, round(self.interval * request.steps)), request.steps)


class _Settled(Rule):
    def __init__(self, threshold: float, interval: int, steps: int) -> None:
        self.threshold, self.interval, self.steps = threshold, interval, steps
        self.outputs: dict[int, Streams] = {}
        self.reuse_until = -1  # last step of the running reuse
        self.last_free: int | None = None  # last step that may be reused, once triggered

    def begin(self, step: int) -> None:
        self.step, self.reusing, self.changes = step, step <= self.reuse_until, []

    def run(self, key: int, tokens: Streams, compute: Callable[[], Streams]) -> Streams:
        if self.reusing:
            return self.outputs[key]
        output, before = compute(), self.outputs.get(key)
        if before is not None:
            self.changes.append(relative_distance(output[0], before[0]))
        self.outputs[key] = output
        return output

    def end(self) -> None:
        import torch

        if not self.changes or fmean(torch.stack(self.changes).tolist()) >= self.threshold:
            return
        if self.last_free is None:
            self.last_free = self.steps - 1 - (self.step + 1) // 2
        self.reuse_until = min(self.step + self.interval, self.last_free)
