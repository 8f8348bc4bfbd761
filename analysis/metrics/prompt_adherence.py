"""Does the video show what its caption says? For the embedded model's procedural captions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from analysis.metrics.base import Metric, Sample
from experiments.embedded.classify import adherence


@dataclass(frozen=True)
class PromptAdherence(Metric):
    """Share of colour, shape, direction and background that pixel classifiers find as captioned.

    Each attribute is reported beside the share, and `all` is 1 where all four are right.
    """

    name: ClassVar[str] = "prompt_adherence"
    title: ClassVar[str] = "Prompt adherence"
    version: ClassVar[int] = 1
    higher_is_better: ClassVar[bool] = True
    needs_reference: ClassVar[bool] = False

    def __call__(self, sample: Sample, reference: Sample | None = None) -> dict[str, float]:
        meta = sample.record["request"]["meta"]
        if not meta:
            raise ValueError("the prompt carries no caption attributes to check")
        right = adherence(sample.frames(), meta)
        parts = [value for name, value in right.items() if name != "all"]
        return {self.name: sum(parts) / len(parts), **right}
