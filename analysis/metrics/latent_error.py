"""Distance of the final latents to those of the reference run, free of the decoder."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from analysis.metrics.base import Metric, Sample


@dataclass(frozen=True)
class LatentError(Metric):
    """|x - r|_2 / |r|_2 over the latents x of the video and r of the reference.

    Where the method gave tokens different budgets, also over the tokens of each group, `group_0`
    the one with all steps: its error is not its own updates' but that of what it attends to.
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
        latents, target = (x.arrays["latents"].astype(np.float64) for x in (sample, reference))
        if latents.shape != target.shape:
            raise ValueError(f"latents {latents.shape} and reference {target.shape} differ")
        counted = np.ones(target.shape[1:], bool)  # (F, H, W)
        if sample.record["request"]["task"] == "i2v":
            counted[0] = False
        error, size = (latents - target)[:, counted], target[:, counted]
        values = {self.name: _ratio(error, size)}
        if (allocation := sample.arrays.get("allocation")) is not None:
            patch = [c // t for c, t in zip(counted.shape, allocation.shape, strict=True)]
            group = np.kron(allocation, np.ones(patch, allocation.dtype))[counted]
            for k in np.unique(group):
                values[f"group_{k}"] = _ratio(error[:, group == k], size[:, group == k])
        return values


def _ratio(error: np.ndarray, size: np.ndarray) -> float:
    return float(np.linalg.norm(error) / np.linalg.norm(size))
