"""Flow matching: every token, every step. With fewer steps it is the baseline to beat."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from baselines.base import Method, Request, is_count, require


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
