"""SeaCache: skip while the signal, filtered to what is denoised by now, changes little."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

from baselines.base import Request, is_count, is_number, require
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
    from torch import Tensor

SIGNALS = ("modulated", "latent")


@dataclass(frozen=True)
class SeaCache(ReuseMethod):
    """Skip while the accumulated change of the filtered ``signal`` is below ``threshold``.

    ``signal``: the ``modulated`` input of the first block, or the ``latent``. ``residual_order``:
    0 reuses the last residual, 1 continues the line through the last two. The first
    ``retention_steps`` and the last ``cache_end_steps`` steps are computed, and the one after
    ``max_consecutive_cached`` skips (0: no limit). In effect so is the one after the first steps,
    whose signal the authors' script for Wan leaves unfiltered: a filtered one is far from it.
    ``power_exp``: exponent of the clean signal's power spectrum.
    """

    version: ClassVar[int] = 1
    implementation: ClassVar[str] = "official-rule"
    paper: ClassVar[str] = "arXiv 2602.18993"
    source: ClassVar[str] = "github.com/jiwoogit/SeaCache 0a91c2b"
    deviations: ClassVar[tuple[str, ...]] = (
        "two experts: each starts with a computed step",
        "a timestep per token (TI2V): all tokens are filtered for the noise level of the step, the "
        "given ones too",
        "bf16 checkpoints: the modulation is in the model's dtype, officially in fp32",
        "LTX-2, for which there is no official rule: that of Wan on the video tokens",
    )
    knob: ClassVar[tuple[str, float, float]] = ("threshold", 0.001, 10.0)

    threshold: float = 0.2
    signal: str = "modulated"
    residual_order: int = 0
    retention_steps: int = 1
    cache_end_steps: int = 1
    max_consecutive_cached: int = 0
    power_exp: float = 3.0

    def validate(self, request: Request) -> None:
        require(is_number(self.threshold), "seacache.threshold", self.threshold, "a number >= 0")
        require(self.signal in SIGNALS, "seacache.signal", self.signal, ", ".join(SIGNALS))
        require(
            self.residual_order in (0, 1), "seacache.residual_order", self.residual_order, "0 or 1"
        )
        for name in ("retention_steps", "cache_end_steps", "max_consecutive_cached"):
            value = getattr(self, name)
            require(is_count(value, minimum=0), f"seacache.{name}", value, "a whole number >= 0")
        require(
            is_number(self.power_exp) and self.power_exp > 0,
            "seacache.power_exp",
            self.power_exp,
            "a number > 0",
        )

    def neutral(self, request: Request) -> SeaCache:
        return replace(self, threshold=0.0)

    @property
    def tap(self) -> Tap | None:
        return modulated_input if self.signal == "modulated" else None

    def policy(self, request: Request) -> Policy:
        free = range(self.retention_steps, request.steps - self.cache_end_steps)
        return _Rule(self, free)


@dataclass(frozen=True)
class DiffusersSeaCache(SeaCache):
    """diffusers' variant: the latent, residuals extrapolated, at most two skips in a row."""

    implementation: ClassVar[str] = "diffusers-hook"
    source: ClassVar[str] = "diffusers.hooks.sea_cache"
    deviations: ClassVar[tuple[str, ...]] = (
        "own code, bit-equal to the hook on Wan text-to-video; elsewhere the hook never skips, and "
        "on LTX-2 it fails",
        *SeaCache.deviations,
    )

    threshold: float = 0.25
    signal: str = "latent"
    residual_order: int = 1
    max_consecutive_cached: int = 2


class _Rule(Policy):
    """Steps outside of ``free`` are computed."""

    def __init__(self, method: SeaCache, free: range) -> None:
        self.method, self.free = method, free
        self.memory = 1 + method.residual_order
        self.signal: Tensor | None = None
        self.accumulated, self.cached = 0.0, 0

    def decide(self, call: Call) -> bool:
        one_video(call, "seacache")
        previous, self.signal = self.signal, self._signal(call)
        limit = self.method.max_consecutive_cached
        if call.step in self.free and previous is not None and not 0 < limit <= self.cached:
            self.accumulated += relative_change(self.signal.float(), previous.float())
            if self.accumulated < self.method.threshold:
                self.cached += 1
                return False
        self.accumulated, self.cached = 0.0, 0
        return True

    def _signal(self, call: Call) -> Tensor:
        """(B, F, H, W, C or D). The authors' script for Wan leaves that of a protected step
        unfiltered; diffusers, whose signal the latent is, rounds it to the model's dtype.
        """
        power = self.method.power_exp
        if self.method.signal == "latent":
            return filtered(call.latents.float(), call.sigma, power).to(call.latents.dtype)
        tokens = call.signal.float().unflatten(1, call.grid)
        return filtered(tokens, call.sigma, power) if call.step in self.free else tokens

    def forecast(self, step: int, history: Sequence[tuple[int, Tensor]]) -> Tensor:
        latest, residual = history[-1]
        if len(history) < 2:
            return residual
        before, previous = history[-2]
        return residual + (residual - previous) * ((step - latest) / (latest - before))


def filtered(signal: Tensor, sigma: float, power_exp: float) -> Tensor:
    """Wiener filter for a signal of power 1 / |f|^p in noise of level sigma, along F, H and W.

    Per axis the gain is (1 - sigma) S / ((1 - sigma)^2 S + sigma^2) with S = 1 / |f|^p; the product
    of the three has mean 1.

    Args:
        signal: (B, F, H, W, C).
    """
    import torch

    sigma = min(max(sigma, 1e-6), 1 - 1e-6)
    gain = signal.new_ones(())
    for axis in (1, 2, 3):
        frequency = torch.fft.fftfreq(signal.shape[axis], device=signal.device).abs()
        inverse_power = frequency**power_exp  # 1 / S
        along = (1 - sigma) / ((1 - sigma) ** 2 + sigma**2 * inverse_power)
        gain = gain * along.view([-1 if dim == axis else 1 for dim in range(signal.ndim)])
    spectrum = torch.fft.fftn(signal, dim=(1, 2, 3)) * (gain / gain.mean())
    return torch.fft.ifftn(spectrum, dim=(1, 2, 3)).real
