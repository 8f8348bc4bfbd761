"""What every metric is: a frozen dataclass that maps a stored video to named numbers.

Metrics are built to read scores too, so their modules import torch only where they compute.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol

import numpy as np


class Sample(Protocol):
    """What a metric may read of a stored video."""

    record: Mapping[str, Any]

    def frames(self) -> np.ndarray:
        """uint8 (F, H, W, 3)."""

    @property
    def arrays(self) -> Mapping[str, np.ndarray]:
        """latents float32 (C, F, H, W); a token method's allocation int8 (F, h, w) of groups."""


@dataclass(frozen=True)
class Metric(ABC):
    """Fields are the metric's parameters; with name and version they identify a score.

    `version` rises whenever the same video could get another number.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    version: ClassVar[int]
    unit: ClassVar[str] = ""
    higher_is_better: ClassVar[bool]
    needs_reference: ClassVar[bool]

    @abstractmethod
    def __call__(self, sample: Sample, reference: Sample | None = None) -> dict[str, float]:
        """Named values; the headline value carries the metric's own name.

        Raises:
            ValueError: the video cannot be scored (no reference of its shape, no attributes, ...).
        """

    def unavailable(self) -> str | None:
        """Why this machine cannot compute the metric and what to do about it; None if it can."""
        return None

    def applies(self, record: Mapping[str, Any]) -> bool:
        """Whether the metric is defined for a video, by its record."""
        return True

    def parts(self) -> Sequence[Metric]:
        """What is computed and stored by itself: the metric, or those that it is made of."""
        return (self,)

    def parameters(self) -> dict[str, Any]:
        """Everything besides name and version that determines the numbers, JSON-able."""
        return asdict(self)


class StoredSample(Sample, Protocol):
    """A sample whose files another program can read."""

    path: Path


class BatchMetric(Metric):
    """A metric that looks at many videos at once, because starting it is expensive."""

    chunk: int

    @abstractmethod
    def batch(self, samples: Sequence[StoredSample]) -> list[dict[str, float] | str]:
        """Named values of each video, or why it cannot be scored; at most `chunk` videos."""

    def __call__(self, sample: StoredSample, reference: Sample | None = None) -> dict[str, float]:
        (outcome,) = self.batch([sample])
        if isinstance(outcome, str):
            raise ValueError(outcome)
        return outcome


def frame_pair(sample: Sample, reference: Sample | None) -> tuple[np.ndarray, np.ndarray]:
    """Frames of both, uint8 (F, H, W, 3), checked to be of one shape."""
    if reference is None:
        raise ValueError("no reference video to compare with")
    frames, target = sample.frames(), reference.frames()
    if frames.shape != target.shape:
        raise ValueError(f"frames {frames.shape} and reference frames {target.shape} differ")
    return frames, target
