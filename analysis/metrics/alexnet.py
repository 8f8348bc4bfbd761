"""LPIPS (Zhang et al. 2018) over AlexNet in plain torch: no torchvision, weights in safetensors.

    python -m analysis.metrics.alexnet alexnet-owt-7be5be79.pth

joins the AlexNet trunk, from https://download.pytorch.org/models/alexnet-owt-7be5be79.pth, to the
calibrated heads that torchmetrics ships, and writes the file that `lpips` looks for.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from analysis.metrics.lpips import DEFAULT_WEIGHTS

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


def convert(
    trunk: Mapping[str, torch.Tensor], heads: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """The tensors of `lpips` from torchvision's AlexNet and torchmetrics' heads."""
    weights = {
        f"trunk.{i}.{part}": trunk[f"features.{i}.{part}"].contiguous()
        for i in CONVOLUTIONS
        for part in ("weight", "bias")
    }
    calibrated = {f"head.{k}": heads[f"lin{k}.model.1.weight"].flatten() for k in range(5)}
    return weights | calibrated


def main(trunk: str, output: str = DEFAULT_WEIGHTS) -> None:
    import torchmetrics

    bundled = Path(torchmetrics.__file__).parent / "functional/image/lpips_models/alex.pth"
    tensors = (torch.load(path, map_location="cpu", weights_only=True) for path in (trunk, bundled))
    path = Path(output).expanduser()
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(convert(*tensors), path)
    print(f"wrote {path}")


if __name__ == "__main__":
    if len(sys.argv) not in (2, 3):
        sys.exit("usage: python -m analysis.metrics.alexnet <alexnet.pth> [<output.safetensors>]")
    main(*sys.argv[1:])
