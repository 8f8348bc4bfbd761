"""Learned perceptual similarity (Zhang et al. 2018); its weights are installed separately."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from analysis.metrics.base import Metric, Sample, frame_pair

if TYPE_CHECKING:
    import torch

DEFAULT_WEIGHTS = "~/.cache/hsa-bench/lpips_alex.safetensors"


@dataclass(frozen=True)
class LPIPS(Metric):
    """Mean over frames of the AlexNet distance to the reference run."""

    weights: str = DEFAULT_WEIGHTS

    name: ClassVar[str] = "lpips"
    title: ClassVar[str] = "LPIPS"
    version: ClassVar[int] = 1
    higher_is_better: ClassVar[bool] = False
    needs_reference: ClassVar[bool] = True

    @property
    def path(self) -> Path:
        return Path(self.weights).expanduser()

    def unavailable(self) -> str | None:
        if self.path.is_file():
            return None
        return (
            f"metric lpips needs the weights file {self.weights}: download "
            "https://download.pytorch.org/models/alexnet-owt-7be5be79.pth and run "
            "`python -m analysis.metrics.alexnet alexnet-owt-7be5be79.pth`"
        )

    def parameters(self) -> dict[str, Any]:
        return {"weights_sha256": self._digest}

    def __call__(self, sample: Sample, reference: Sample | None = None) -> dict[str, float]:
        import torch

        from analysis.metrics.alexnet import lpips

        frames, target = (
            torch.from_numpy(frames).permute(0, 3, 1, 2).float() / 127.5 - 1
            for frames in frame_pair(sample, reference)
        )
        with torch.inference_mode():
            return {self.name: float(lpips(frames, target, self._tensors).mean())}

    @cached_property
    def _digest(self) -> str:
        return hashlib.sha256(self.path.read_bytes()).hexdigest()

    @cached_property
    def _tensors(self) -> dict[str, torch.Tensor]:
        from safetensors.torch import load_file

        return load_file(self.path)
