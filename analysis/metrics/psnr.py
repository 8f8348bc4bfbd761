"""Peak signal-to-noise ratio of the raw frames to the reference run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from analysis.metrics.base import Metric, Sample, frame_pair


@dataclass(frozen=True)
class PSNR(Metric):
    """10 log10(255^2 / MSE), the MSE pooled over the whole video.

    Pooled, not averaged over frames: an image-to-video frame that equals its given image would
    make the average infinite. Identical videos get `ceiling`, which lies above what one wrong
    level in one pixel gives at the sizes used here.
    """

    ceiling: float = 100.0

    name: ClassVar[str] = "psnr"
    title: ClassVar[str] = "PSNR"
    version: ClassVar[int] = 1
    unit: ClassVar[str] = "dB"
    higher_is_better: ClassVar[bool] = True
    needs_reference: ClassVar[bool] = True

    def __call__(self, sample: Sample, reference: Sample | None = None) -> dict[str, float]:
        import torch
        from torchmetrics.functional.image import peak_signal_noise_ratio

        frames, target = (
            torch.from_numpy(frames).double() for frames in frame_pair(sample, reference)
        )
        value = peak_signal_noise_ratio(frames, target, data_range=255.0)
        return {self.name: min(float(value), self.ceiling)}
