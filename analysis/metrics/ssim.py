"""Structural similarity of the raw frames to the reference run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from analysis.metrics.base import Metric, Sample, frame_pair


@dataclass(frozen=True)
class SSIM(Metric):
    """Wang et al. (2004), per channel, averaged over frames.

    The Gaussian window reaches 3.5 sigma; pictures are reflected at their border.
    """

    sigma: float = 1.5

    name: ClassVar[str] = "ssim"
    title: ClassVar[str] = "SSIM"
    version: ClassVar[int] = 1
    higher_is_better: ClassVar[bool] = True
    needs_reference: ClassVar[bool] = True

    def __call__(self, sample: Sample, reference: Sample | None = None) -> dict[str, float]:
        import torch
        from torchmetrics.functional.image import structural_similarity_index_measure

        frames, target = (
            torch.from_numpy(frames).permute(0, 3, 1, 2).float()  # (F, 3, H, W)
            for frames in frame_pair(sample, reference)
        )
        value = structural_similarity_index_measure(
            frames, target, sigma=self.sigma, data_range=255.0
        )
        return {self.name: float(value)}
