"""Distance of the final latents to those of the reference run, free of the decoder."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from analysis.metrics.base import Metric, Sample


@dataclass(frozen=True)
class LatentError(Metric):
    """|x - r|_2 / |r|_2 over the latents x of the video and r of the reference.

    Image-to-video counts without the first latent frame: it is given.
    """

    name: ClassVar[str] = "latent_error"
    title: ClassVar[str] = "Latent error"
    version: ClassVar[int] = 1
    higher_is_better: ClassVar[bool] = False
    needs_reference: ClassVar[bool] = True

    def __call__(self, sample: Sample, reference: Sample | None = None) -> dict[str, float]:
        if reference is None:
            raise ValueError("no reference latents to compare with")
        latents, target = np.asarray(sample.latents()), np.asarray(reference.latents())
        if latents.shape != target.shape:
            raise ValueError(f"latents {latents.shape} and reference {target.shape} differ")
        if sample.record["request"]["task"] == "i2v":
            latents, target = latents[:, 1:], target[:, 1:]
        error = np.linalg.norm((latents - target).astype(np.float64))
        return {self.name: float(error / np.linalg.norm(target.astype(np.float64)))}
