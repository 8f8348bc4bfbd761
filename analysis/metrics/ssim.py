"""Structural similarity of the raw frames to the reference run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from analysis.metrics.base import Metric, Sample, frame_pair

if TYPE_CHECKING:
    import torch

WINDOW = 11  # pixels
C1, C2 = 0.01**2, 0.03**2  # for levels in 0..1


@dataclass(frozen=True)
class SSIM(Metric):
    """Wang et al. (2004) as TeaCache and PAB evaluate it: the one papers on caching report.

    RGB channels by themselves, a Gaussian window of 11 pixels with sigma 1.5, only where the
    window lies within the picture, averaged over pixels and frames (`eval/teacache/common_metrics`
    of github.com/ali-vilab/TeaCache). SSIMs with another window, border or colour space differ
    from it by up to 0.14 on the same videos.
    """

    sigma: float = 1.5

    name: ClassVar[str] = "ssim"
    title: ClassVar[str] = "SSIM"
    version: ClassVar[int] = 2
    higher_is_better: ClassVar[bool] = True
    needs_reference: ClassVar[bool] = True

    def __call__(self, sample: Sample, reference: Sample | None = None) -> dict[str, float]:
        import torch

        x, y = (
            torch.from_numpy(frames).permute(0, 3, 1, 2).double() / 255  # (F, 3, H, W)
            for frames in frame_pair(sample, reference)
        )
        if min(x.shape[2:]) < WINDOW:
            raise ValueError(f"SSIM needs pictures of {WINDOW} pixels a side or more")
        mx, my = self._smooth(x), self._smooth(y)
        vx = self._smooth(x * x) - mx**2
        vy = self._smooth(y * y) - my**2
        vxy = self._smooth(x * y) - mx * my
        values = ((2 * mx * my + C1) * (2 * vxy + C2)) / ((mx**2 + my**2 + C1) * (vx + vy + C2))
        return {self.name: float(values.mean())}

    def _smooth(self, x: torch.Tensor) -> torch.Tensor:
        """(F, C, H, W) -> (F, C, H - 10, W - 10), the window's means."""
        import torch
        import torch.nn.functional as F

        offsets = torch.arange(WINDOW, dtype=x.dtype) - WINDOW // 2
        window = torch.exp(-(offsets**2) / (2 * self.sigma**2))
        window = (window / window.sum()).expand(x.shape[1], 1, 1, WINDOW)
        rows = F.conv2d(x, window, groups=x.shape[1])
        return F.conv2d(rows, window.transpose(2, 3), groups=x.shape[1])
