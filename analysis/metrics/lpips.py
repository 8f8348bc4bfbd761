"""Learned perceptual similarity (Zhang et al. 2018) over AlexNet, without torchvision.

The weights are not part of this repository. Install them once:

    curl -O https://download.pytorch.org/models/alexnet-owt-7be5be79.pth
    python -m analysis.metrics.lpips alexnet-owt-7be5be79.pth

which joins the AlexNet trunk to the calibrated heads that torchmetrics ships and writes one
safetensors file.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
import torchmetrics
from safetensors.torch import load_file, save_file

from analysis.metrics.base import Metric, Sample, frame_pair

DEFAULT_WEIGHTS = "~/.cache/hsa-bench/lpips_alex.safetensors"
CONVOLUTIONS = {0: (4, 2), 3: (1, 2), 6: (1, 1), 8: (1, 1), 10: (1, 1)}  # index: stride, padding
POOLED_BEFORE = (3, 6)
SHIFT, SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)


def lpips(x: torch.Tensor, y: torch.Tensor, weights: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Distance of each pair of images.

    Args:
        x, y: (B, 3, H, W) in [-1, 1].
        weights: `trunk.<i>.weight`, `trunk.<i>.bias` of AlexNet's features; `head.<k>` (C_k,).

    Returns:
        (B,)
    """
    pairs = zip(features(x, weights), features(y, weights), strict=True)
    layers = [
        torch.einsum("bchw,c->bhw", (a - b) ** 2, weights[f"head.{k}"]).mean((1, 2))
        for k, (a, b) in enumerate(pairs)
    ]
    return torch.stack(layers).sum(0)


def features(x: torch.Tensor, weights: Mapping[str, torch.Tensor]) -> list[torch.Tensor]:
    """The five ReLU outputs of AlexNet, each position scaled to unit length over channels."""
    x = (x - x.new_tensor(SHIFT).view(1, 3, 1, 1)) / x.new_tensor(SCALE).view(1, 3, 1, 1)
    outputs = []
    for i, (stride, padding) in CONVOLUTIONS.items():
        if i in POOLED_BEFORE:
            x = F.max_pool2d(x, 3, 2)
        x = F.conv2d(x, weights[f"trunk.{i}.weight"], weights[f"trunk.{i}.bias"], stride, padding)
        x = x.relu()
        outputs.append(x / (x.square().sum(1, keepdim=True) + 1e-8).sqrt())
    return outputs


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
            "`python -m analysis.metrics.lpips alexnet-owt-7be5be79.pth`"
        )

    def parameters(self) -> dict[str, Any]:
        return {"weights_sha256": self._digest}

    def __call__(self, sample: Sample, reference: Sample | None = None) -> dict[str, float]:
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
        return load_file(self.path)


def convert(trunk: Mapping[str, torch.Tensor], heads: Mapping[str, torch.Tensor]) -> dict:
    """The tensors of `lpips` from torchvision's AlexNet and torchmetrics' heads."""
    weights = {
        f"trunk.{i}.{part}": trunk[f"features.{i}.{part}"].contiguous()
        for i in CONVOLUTIONS
        for part in ("weight", "bias")
    }
    heads = {f"head.{k}": heads[f"lin{k}.model.1.weight"].flatten() for k in range(5)}
    return weights | heads


def main(trunk: str, output: str = DEFAULT_WEIGHTS) -> None:
    bundled = Path(torchmetrics.__file__).parent / "functional/image/lpips_models/alex.pth"
    tensors = (torch.load(path, map_location="cpu", weights_only=True) for path in (trunk, bundled))
    path = Path(output).expanduser()
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(convert(*tensors), path)
    print(f"wrote {path}")


if __name__ == "__main__":
    main(*sys.argv[1:])
