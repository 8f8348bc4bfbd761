"""Flow matching: every token, every step. With fewer steps it is the baseline to beat."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from baselines.base import Method, Request, is_count, require

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline


@dataclass(frozen=True)
class FlowMatching(Method):
    """Euler integration of the learned velocity.

    ``steps``: number of steps T, on the sigma grid that the scheduler derives for that T;
    None keeps the schedule's own number, which is the reference run.
    """

    version: ClassVar[int] = 1
    implementation: ClassVar[str] = "native"
    paper: ClassVar[str] = "arXiv 2210.02747"
    source: ClassVar[str] = "diffusers"
    knob: ClassVar[tuple[str, int, int]] = ("steps", 1, 40)

    steps: int | None = None

    def validate(self, request: Request) -> None:
        require(
            self.steps is None or is_count(self.steps),
            "flow_matching.steps",
            self.steps,
            "a whole number >= 1, or null for the schedule's steps",
        )

    def neutral(self, request: Request) -> FlowMatching:
        return FlowMatching()


@dataclass(frozen=True)
class NativeSampler(FlowMatching):
    """Flow matching with the scheduler that the model ships: UniPC on Wan.

    An extra row beside the comparison, in which every method samples with Euler.
    """

    version: ClassVar[int] = 1
    paper: ClassVar[str] = "the model's own"
    deviations: ClassVar[tuple[str, ...]] = ("the model's own scheduler instead of Euler",)

    def sampler(self, pipe: DiffusionPipeline) -> AbstractContextManager[None]:
        return nullcontext()
