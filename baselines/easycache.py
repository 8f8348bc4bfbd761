"""EasyCache: skip while the velocity, predicted from how the latents move, changes little."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

from baselines.base import Request, is_count, is_number, require
from baselines.policy import Call, Policy, ReuseMethod, one_video

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class EasyCache(ReuseMethod):
    """Reuse velocity minus latents while the accumulated, predicted change is below ``threshold``.

    The conditional branch decides for all branches. The first ``warmup_steps`` steps and the last
    one are computed.
    """

    version: ClassVar[int] = 2
    implementation: ClassVar[str] = "official-rule"
    paper: ClassVar[str] = "arXiv 2507.02860"
    source: ClassVar[str] = "github.com/H-EmbodVis/EasyCache 5127804 (Apache-2.0)"
    deviations: ClassVar[tuple[str, ...]] = (
        "two experts: each starts afresh, with computed steps; the last step of all is protected",
        "a timestep per token (TI2V): the frame that is given is part of the means",
        "LTX-2: the video stream decides for both",
        "bf16 checkpoints: latents and velocities are in the model's dtype, officially in fp32, "
        "and a velocity is taken from its distance to the latents, which rounds it once more",
    )
    knob: ClassVar[tuple[str, float, float]] = ("threshold", 0.001, 10.0)
    boundary: ClassVar = "model"
    joint: ClassVar[bool] = True

    threshold: float = 0.05
    warmup_steps: int = 10

    def validate(self, request: Request) -> None:
        require(is_number(self.threshold), "easycache.threshold", self.threshold, "a number >= 0")
        require(
            is_count(self.warmup_steps),
            "easycache.warmup_steps",
            self.warmup_steps,
            "a whole number >= 1",
        )

    def neutral(self, request: Request) -> EasyCache:
        return replace(self, threshold=0.0)

    def policy(self, request: Request) -> Policy:
        return _Rule(self.threshold, range(self.warmup_steps, request.steps - 1))


class _Rule(Policy):
    """Steps outside of ``free`` are computed.

    ``rate`` is by how much the velocity changed for a change of the latents between the last two
    computed steps, both in mean absolute value.
    """

    def __init__(self, threshold: float, free: range) -> None:
        self.threshold, self.free = threshold, free
        self.latents: Tensor | None = None  # of the last step
        self.computed: tuple[Tensor, Tensor] | None = None  # latents and velocity, last computed
        self.rate: float | None = None
        self.accumulated = 0.0

    def decide(self, call: Call) -> bool:
        one_video(call, "easycache")
        previous, self.latents = self.latents, conditional(call.tokens)
        if call.step in self.free and self.rate is not None:
            _, velocity = self.computed
            change = _distance(self.latents, previous) / velocity.abs().mean().item()
            self.accumulated += self.rate * change
            if self.accumulated < self.threshold:
                return False
        self.accumulated = 0.0
        return True

    def observe(self, call: Call, residual: Tensor) -> None:
        latents, velocity = self.latents, self.latents + conditional(residual)
        if self.computed is not None:
            before, velocity_before = self.computed
            self.rate = _distance(velocity, velocity_before) / _distance(latents, before)
        self.computed = latents, velocity


def conditional(rows: Tensor) -> Tensor:
    """Of the one video's rows, two where LTX runs its guidance as a batch: the last, in fp32."""
    return rows[-1:].float()


def _distance(new: Tensor, old: Tensor) -> float:
    return (new - old).abs().mean().item()
