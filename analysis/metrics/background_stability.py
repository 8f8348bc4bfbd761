"""How much the background changes over time, from pixels alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from analysis.metrics.base import Metric, Sample


@dataclass(frozen=True)
class BackgroundStability(Metric):
    """Mean absolute change over time of the background, in 8-bit levels.

    A pixel's change is its absolute deviation from its median over the frames, averaged over
    frames and channels: the median is the background wherever an object covers the pixel in fewer
    than half of the frames, and unlike a difference of neighbouring frames it sees slow drift.
    The background is taken to be the `background` share of pixels that change least. A share, not
    a threshold on the change: under a threshold a flickering background would stop counting as
    background and escape the measurement. The camera must stand still.
    """

    background: float = 0.5

    name: ClassVar[str] = "background_stability"
    title: ClassVar[str] = "Background change"
    version: ClassVar[int] = 1
    unit: ClassVar[str] = "levels"
    higher_is_better: ClassVar[bool] = False
    needs_reference: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if not 0 < self.background <= 1:
            raise ValueError(f"background={self.background} must lie in (0, 1]")

    def __call__(self, sample: Sample, reference: Sample | None = None) -> dict[str, float]:
        frames = sample.frames().astype(np.float32)  # (F, H, W, 3)
        if len(frames) < 2:
            raise ValueError("a single frame has no change over time")
        change = np.abs(frames - np.median(frames, axis=0)).mean(axis=(0, 3)).ravel()  # (H*W,)
        count = max(1, round(self.background * change.size))
        return {self.name: float(np.partition(change, count - 1)[:count].mean())}
