"""TeaCache by the official rule for Wan, and the fit of its polynomial for other models.

On Wan the rule looks at the timestep embedding only, so its decisions are the same for every
prompt, seed and guidance branch: an adaptive-looking schedule that is fixed by the threshold.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from baselines.base import Request, is_number, is_numbers, require
from baselines.policy import Call, Policy, ReuseMethod, relative_change

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline
    from torch import Tensor

# Highest power first. The official sets: github.com/ali-vilab/TeaCache (Apache-2.0) at 7c10efc,
# TeaCache4Wan2.1/teacache_generate.py; model -> {use_ret_steps: coefficients}.
IDENTITY = (1.0, 0.0)
OFFICIAL = {
    "wan2.1-t2v-1.3b": {
        True: (-5.21862437e04, 9.23041404e03, -5.28275948e02, 1.36987616e01, -4.99875664e-02),
        False: (2.39676752e03, -1.31110545e03, 2.01331979e02, -8.29855975e00, 1.37887774e-01),
    },
    "wan2.1-t2v-14b": {
        True: (-3.03318725e05, 4.90537029e04, -2.65530556e03, 5.87365115e01, -3.15583525e-01),
        False: (-5784.54975374, 5449.50911966, -1811.16591783, 256.27178429, -13.02252404),
    },
    "wan2.1-i2v-14b-480p": {
        True: (2.57151496e05, -3.54229917e04, 1.40286849e03, -1.35890334e01, 1.32517977e-01),
        False: (-3.02331670e02, 2.23948934e02, -5.25463970e01, 5.87348440e00, -2.01973289e-01),
    },
    "wan2.1-i2v-14b-720p": {
        True: (8.10705460e03, 2.13393892e03, -3.72934672e02, 1.66203073e01, -4.17769401e-02),
        False: (-114.36346466, 65.26524496, -18.82220707, 4.91518089, -0.23412683),
    },
}


@dataclass(frozen=True)
class TeaCache(ReuseMethod):
    """Skip while the accumulated, rescaled change of the timestep embedding is below ``threshold``.

    ``coefficients``: a model of the official table, ``identity``, or the numbers of a polynomial
    that `calibrate` fitted. ``use_ret_steps``: the official flag of that name, which watches the
    projected embedding, protects 5 first steps instead of 1, and does not protect the last one.
    """

    version: ClassVar[int] = 1
    implementation: ClassVar[str] = "official-rule"
    paper: ClassVar[str] = "arXiv 2411.19108"
    source: ClassVar[str] = "github.com/ali-vilab/TeaCache 7c10efc"
    deviations: ClassVar[tuple[str, ...]] = (
        "models with a timestep per token: the last token's embedding stands for all",
        "two experts: each starts with a computed step",
    )
    knob: ClassVar[tuple[str, float, float]] = ("threshold", 0.001, 10.0)

    threshold: float = 0.2
    coefficients: str | Sequence[float] = "identity"
    use_ret_steps: bool = False

    @property
    def polynomial(self) -> tuple[float, ...]:
        """Coefficients, highest power first."""
        if not isinstance(self.coefficients, str):
            return self.coefficients
        if self.coefficients == "identity":
            return IDENTITY
        return OFFICIAL[self.coefficients][self.use_ret_steps]

    def validate(self, request: Request) -> None:
        require(is_number(self.threshold), "teacache.threshold", self.threshold, "a number >= 0")
        require(
            isinstance(self.use_ret_steps, bool),
            "teacache.use_ret_steps",
            self.use_ret_steps,
            "true or false",
        )
        polynomial = is_numbers(self.coefficients, minimum=float("-inf")) and self.coefficients
        require(
            self.coefficients in ("identity", *OFFICIAL) or polynomial,
            "teacache.coefficients",
            self.coefficients,
            f"one of identity, {', '.join(OFFICIAL)}, or a list from `hsa-bench calibrate`",
        )

    def neutral(self, request: Request) -> TeaCache:
        return replace(self, threshold=0.0, coefficients="identity")

    @property
    def tap(self) -> str:
        return _tap(self.use_ret_steps)

    def policy(self, request: Request) -> Policy:
        if self.use_ret_steps:
            return _Rule(self.threshold, self.polynomial, range(5, request.steps))
        return _Rule(self.threshold, self.polynomial, range(1, request.steps - 1))


class _Rule(Policy):
    """Steps outside of ``free`` are computed whatever the embedding says."""

    def __init__(self, threshold: float, polynomial: Sequence[float], free: range) -> None:
        self.threshold, self.rescale, self.free = threshold, np.poly1d(polynomial), free
        self.embedding: Tensor | None = None
        self.accumulated = 0.0

    def decide(self, call: Call) -> bool:
        previous, self.embedding = self.embedding, _embedding(call.signal)
        if previous is not None and call.step in self.free:
            self.accumulated += self.rescale(relative_change(self.embedding, previous))
            if self.accumulated < self.threshold:
                return False
        self.accumulated = 0.0
        return True


class _Probe(Policy):
    """Computes every step and notes how embedding and residual changed since the one before."""

    def __init__(self, points: list[tuple[float, float]]) -> None:
        self.points = points
        self.before: tuple[Tensor, Tensor] | None = None

    def decide(self, call: Call) -> bool:
        return True

    def observe(self, call: Call, residual: Tensor) -> None:
        now = _embedding(call.signal), residual.float()
        if self.before is not None:
            self.points.append(tuple(map(relative_change, now, self.before)))
        self.before = now


def calibrate(
    pipe: DiffusionPipeline, requests: Iterable[Request], use_ret_steps: bool = False
) -> dict[str, Any]:
    """Fit the polynomial that predicts the residual's change from the embedding's.

    Every step of every request is computed, on the sigma grid that the methods use. Points are
    (relative change of the embedding, relative change of the residual) of consecutive steps.

    Returns:
        ``coefficients`` (degree 4, highest power first), ``r2`` of the fit, and ``points``.
    """
    from baselines.reuse import residual_reuse
    from hsa.schedulers import euler

    points: list[tuple[float, float]] = []
    with euler(pipe), residual_reuse(pipe, partial(_Probe, points), tap=_tap(use_ret_steps)):
        for request in requests:
            pipe(**request.kwargs(pipe) | {"output_type": "latent"})

    x, y = np.array(points).T
    coefficients = np.polyfit(x, y, deg=4)
    unexplained = np.sum((y - np.polyval(coefficients, x)) ** 2) / np.sum((y - y.mean()) ** 2)
    return {"coefficients": coefficients.tolist(), "r2": float(1 - unexplained), "points": points}


def _tap(use_ret_steps: bool) -> str:
    """Official names: `e0`, the projected embedding, with ret steps; `e` without."""
    return "condition_embedder." + ("time_proj" if use_ret_steps else "time_embedder")


def _embedding(signal: Tensor) -> Tensor:
    """(B, D) or (B, N, D) -> (D): the same for every sample; the last token is a noisy one."""
    return signal[0].reshape(-1, signal.shape[-1])[-1].float()
