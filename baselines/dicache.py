"""DiCache: the first block, run at every step, says when to skip and how far to extrapolate."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

from baselines.base import Request, is_count, is_number, require
from baselines.policy import relative_change
from baselines.rule import Rule, RuleMethod, Streams

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline
    from torch import Tensor


@dataclass(frozen=True)
class DiCache(RuleMethod):
    """Skip while the accumulated change of the probe's output is below ``threshold``.

    The probe is the first ``probe_depth`` blocks. The first ``ret_ratio`` of the steps are
    computed. A skipped step adds R2 + g (R1 - R2), where R1 and R2 are the blocks' last two
    computed residuals and g in [1, ``max_gamma``] is how far the probe's residual has moved from
    its value at R2, relative to the way it went from R2 to R1. The defaults are those of the
    authors' code for Wan; the paper's threshold there is 0.2, and for Hunyuan and FLUX the limit is
    1.5.
    """

    version: ClassVar[int] = 1
    implementation: ClassVar[str] = "from-paper"
    paper: ClassVar[str] = "arXiv 2508.17356"
    source: ClassVar[str] = "the paper, section 3; the authors' code has no licence"
    deviations: ClassVar[tuple[str, ...]] = (
        "the share of computed first steps and the limits of g are those of the authors' code; the "
        "paper has neither",
        "two experts: each starts with a computed step and reuses plainly until it has two",
        "LTX: guidance is one batch, so both branches share a decision and an extrapolation",
        "LTX-2: the video stream decides; each stream extrapolates by its own probe",
    )
    knob: ClassVar[tuple[str, float, float]] = ("threshold", 0.001, 4.0)

    threshold: float = 0.08
    probe_depth: int = 1
    ret_ratio: float = 0.2
    max_gamma: float = 2.0

    def validate(self, request: Request) -> None:
        require(is_number(self.threshold), "dicache.threshold", self.threshold, "a number >= 0")
        require(
            is_count(self.probe_depth),
            "dicache.probe_depth",
            self.probe_depth,
            "a whole number >= 1",
        )
        require(
            is_number(self.ret_ratio) and self.ret_ratio <= 1,
            "dicache.ret_ratio",
            self.ret_ratio,
            "a number in 0..1",
        )
        require(is_number(self.max_gamma, 1), "dicache.max_gamma", self.max_gamma, "a number >= 1")

    def neutral(self, request: Request) -> DiCache:
        return replace(self, threshold=0.0)

    def install(self, pipe: DiffusionPipeline, request: Request) -> AbstractContextManager[None]:
        from hsa.trace import experts

        depth = min(len(self.modules(transformer)) for transformer in experts(pipe).values())
        require(
            self.probe_depth < depth,
            "dicache.probe_depth",
            self.probe_depth,
            f"less than the model's {depth} blocks",
        )
        return super().install(pipe, request)

    def rule(self, request: Request) -> Rule:
        return _Probed(self, protected=int(self.ret_ratio * request.steps))


class _Probed(Rule):
    def __init__(self, method: DiCache, protected: int) -> None:
        self.method, self.protected = method, protected
        self.accumulated = 0.0
        self.probe: Tensor | None = None  # video output of the probe at the step before
        self.residuals: list[tuple[Streams, Streams]] = []  # (all blocks, probe), newest first

    def begin(self, step: int) -> None:
        self.step, self.skipping = step, False

    def run(self, key: int, tokens: Streams, compute: Callable[[], Streams]) -> Streams:
        if key == 0:
            self.entered = tokens
        if key == self.method.probe_depth:  # the probe has run: tokens are its output
            self.probe_residual = _difference(tokens, self.entered)
            self.skipping = self._skip(tokens[0])
            if self.skipping:
                return self._extrapolated()
        if self.skipping:
            return tokens
        self.left = compute()
        return self.left

    def end(self) -> None:
        if not self.skipping:
            newest = _difference(self.left, self.entered), self.probe_residual
            self.residuals = [newest, *self.residuals[:1]]
        del self.entered, self.left, self.probe_residual

    def _skip(self, probe: Tensor) -> bool:
        previous, self.probe = self.probe, probe
        if previous is None or self.step < self.protected:
            return False
        self.accumulated += relative_change(probe, previous)
        if self.accumulated < self.method.threshold:
            return True
        self.accumulated = 0.0
        return False

    def _extrapolated(self) -> Streams:
        residual, probe1 = self.residuals[0]
        if len(self.residuals) == 2:
            older, probe2 = self.residuals[1]
            residual = tuple(
                r2 + _gamma(p, p1, p2, self.method.max_gamma) * (r1 - r2)
                for r1, r2, p, p1, p2 in zip(
                    residual, older, self.probe_residual, probe1, probe2, strict=True
                )
            )
        return tuple(x + r for x, r in zip(self.entered, residual, strict=True))


def _difference(new: Streams, old: Streams) -> Streams:
    return tuple(a - b for a, b in zip(new, old, strict=True))


def _gamma(p: Tensor, p1: Tensor, p2: Tensor, limit: float) -> Tensor:
    return ((p - p2).abs().mean() / (p1 - p2).abs().mean()).clamp(1, limit)
