"""TeaCache by the official rules, and the fit of its polynomial for other models.

On Wan the rule looks at the timestep embedding only, so its decisions are the same for every
prompt, seed and guidance branch: an adaptive-looking schedule that is fixed by the threshold. On
LTX-Video it looks at the modulated input of the first block, which is the sample's own.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import partial
from importlib.resources import files
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from baselines.base import Request, is_count, is_number, is_numbers, require
from baselines.policy import (
    Call,
    Policy,
    ReuseMethod,
    Tap,
    modulated_input,
    one_video,
    relative_change,
)

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline
    from torch import Tensor

Watch = Callable[[Call], "Tensor"]

IDENTITY = (1.0, 0.0)
# model -> {"ret" or "noret": coefficients}, highest power first; its "source" says whose.
OFFICIAL = json.loads((files("baselines") / "tables/teacache_coefficients.json").read_text())
OFFICIAL.pop("source")


@dataclass(frozen=True)
class TeaCache(ReuseMethod):
    """Skip while the accumulated, rescaled change of the signal is below ``threshold``.

    ``coefficients``: a model of the official table, ``identity``, or the numbers of a polynomial
    that `calibrate` fitted. ``use_ret_steps``: the official flag of that name for Wan, which
    watches the projected embedding, protects 5 first steps instead of 1, and does not protect the
    last one.
    """

    version: ClassVar[int] = 1
    implementation: ClassVar[str] = "official-rule"
    paper: ClassVar[str] = "arXiv 2411.19108"
    source: ClassVar[str] = "github.com/ali-vilab/TeaCache 7c10efc"
    deviations: ClassVar[tuple[str, ...]] = (
        "identity or fitted coefficients, for models that the authors have none for; fitted ones "
        "predict the change of the blocks' residual, the authors' that of the model's output",
        "timesteps are Euler's own; the authors' samplers cut them to whole numbers, so that on "
        "Wan a published threshold can compute some steps more or less",
        "models with a timestep per token: the last token's embedding stands for all",
        "two experts: each starts with a computed step",
        "bf16 checkpoints: on Wan with ret steps the signal is in the model's dtype, officially in "
        "fp32; on LTX-Video changes are measured in fp32, officially in the model's dtype",
        "LTX-Video: the residual ends at the last block, the official one after the output norm",
        "LTX-2, for which there is no official rule: that of LTX-Video on the video tokens",
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
        return tuple(OFFICIAL[self.coefficients]["ret" if self.use_ret_steps else "noret"])

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
        with_ret = [model for model, fits in OFFICIAL.items() if "ret" in fits]
        require(
            not self.use_ret_steps or self.coefficients not in OFFICIAL.keys() - with_ret,
            "teacache.coefficients",
            self.coefficients,
            f"one of {', '.join(with_ret)} with use_ret_steps",
        )

    def neutral(self, request: Request) -> TeaCache:
        return replace(self, threshold=0.0, coefficients="identity")

    def free_steps(self, steps: int) -> range:
        """The steps that may be skipped."""
        return range(5, steps) if self.use_ret_steps else range(1, steps - 1)

    def policy(self, request: Request, watch: Watch) -> Policy:
        return _Rule(self.threshold, self.polynomial, self.free_steps(request.steps), watch)

    def install(self, pipe: DiffusionPipeline, request: Request) -> AbstractContextManager[None]:
        from baselines.reuse import residual_reuse

        wan = _is_wan(pipe)
        require(
            wan or not self.use_ret_steps, "teacache.use_ret_steps", True, "false, except on Wan"
        )
        fitting = [model for model in OFFICIAL if model.startswith("wan" if wan else "ltx")]
        require(
            self.coefficients not in OFFICIAL.keys() - fitting,
            "teacache.coefficients",
            self.coefficients,
            f"identity, {', '.join(fitting)}: those of the model's family",
        )
        tap, watch = _watched(pipe, self.use_ret_steps)
        return residual_reuse(pipe, partial(self.policy, request, watch), tap)


@dataclass(frozen=True)
class ProtectedTeaCache(TeaCache):
    """TeaCache that protects as many first and last steps as the methods beside it."""

    deviations: ClassVar[tuple[str, ...]] = (
        *TeaCache.deviations,
        "protected steps are a setting",
    )

    first_steps: int = 5
    last_steps: int = 1

    def validate(self, request: Request) -> None:
        super().validate(request)
        for name, least in (("first_steps", 1), ("last_steps", 0)):
            value, choices = getattr(self, name), f"a whole number >= {least}"
            require(is_count(value, minimum=least), f"teacache.{name}", value, choices)

    def free_steps(self, steps: int) -> range:
        return range(self.first_steps, steps - self.last_steps)


class _Rule(Policy):
    """Steps outside of ``free`` are computed whatever the signal says."""

    def __init__(
        self, threshold: float, polynomial: Sequence[float], free: range, watch: Watch
    ) -> None:
        self.threshold, self.rescale, self.free = threshold, np.poly1d(polynomial), free
        self.watch = watch
        self.signal: Tensor | None = None
        self.accumulated = 0.0

    def decide(self, call: Call) -> bool:
        previous, self.signal = self.signal, self.watch(call)
        if previous is not None and call.step in self.free:
            self.accumulated += self.rescale(relative_change(self.signal, previous))
            if self.accumulated < self.threshold:
                return False
        self.accumulated = 0.0
        return True


class _Probe(Policy):
    """Computes every step and notes how signal and residual changed since the one before."""

    def __init__(self, watch: Watch, points: list[tuple[float, float]]) -> None:
        self.watch, self.points = watch, points
        self.before: tuple[Tensor, Tensor] | None = None

    def decide(self, call: Call) -> bool:
        return True

    def observe(self, call: Call, residual: Tensor) -> None:
        now = self.watch(call), residual.float()
        if self.before is not None:
            self.points.append(tuple(map(relative_change, now, self.before)))
        self.before = now


def calibrate(
    pipe: DiffusionPipeline, requests: Iterable[Request], use_ret_steps: bool = False
) -> dict[str, Any]:
    """Fit the polynomial that predicts the residual's change from the signal's.

    Every step of every request is computed, on the sigma grid that the methods use. Points are
    (relative change of the signal, relative change of the residual) of consecutive steps.

    Returns:
        ``coefficients`` (degree 4, highest power first), ``r2`` of the fit, and ``points``.
    """
    from baselines.reuse import residual_reuse
    from hsa.schedulers import euler

    points: list[tuple[float, float]] = []
    tap, watch = _watched(pipe, use_ret_steps)
    with euler(pipe), residual_reuse(pipe, partial(_Probe, watch, points), tap):
        for request in requests:
            pipe(**request.kwargs(pipe) | {"output_type": "latent"})

    x, y = np.array(points).T
    coefficients = np.polyfit(x, y, deg=4)
    unexplained = np.sum((y - np.polyval(coefficients, x)) ** 2) / np.sum((y - y.mean()) ** 2)
    return {"coefficients": coefficients.tolist(), "r2": float(1 - unexplained), "points": points}


def _watched(pipe: DiffusionPipeline, use_ret_steps: bool) -> tuple[Tap, Watch]:
    """On Wan, official names: `e0`, the projected embedding, with ret steps; `e` without."""
    if not _is_wan(pipe):
        return modulated_input, _video_tokens
    return "condition_embedder." + ("time_proj" if use_ret_steps else "time_embedder"), _embedding


def _is_wan(pipe: DiffusionPipeline) -> bool:
    from hsa.trace import experts

    return all(hasattr(model, "condition_embedder") for model in experts(pipe).values())


def _embedding(call: Call) -> Tensor:
    """(B, D) or (B, N, D) -> (D): the same for every sample; the last token is a noisy one."""
    return call.signal[0].reshape(-1, call.signal.shape[-1])[-1].float()


def _video_tokens(call: Call) -> Tensor:
    """(B, N, D), of the one video whose decisions the rule may take."""
    one_video(call, "teacache")
    return call.signal.float()
