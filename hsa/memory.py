"""How much memory the keys and values of a video take, and where they fit.

The arithmetic needs no torch, so that an experiment is planned at once.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING

import psutil

if TYPE_CHECKING:
    import torch
    from diffusers import DiffusionPipeline

    from hsa.adapter import Adapter

POLICIES = (("model", "model"), ("fp8", "model"), ("model", "host"), ("fp8", "host"))
LAYERS_ON_DEVICE = 3  # under kv_device "host": computing, arriving, leaving


@dataclass(frozen=True)
class KVMemory:
    """K/V that HSA keeps for one batch of videos, all guidance passes together.

    An upper bound: passes of LTX-2 that skip an attention layer keep nothing for it.

    Attributes:
        tokens: of one video.
        passes: videos that one step runs: batch times guidance passes.
        layers: width (channels of all heads) and number of heads of each layer's K.
        itemsize: bytes of the model's dtype.
        device: where the model runs; None as long as that is open, when only sizes are known.
    """

    tokens: int
    passes: int
    layers: tuple[tuple[int, int], ...]
    itemsize: int
    device: torch.device | None

    def total(self, kv_dtype: str = "model") -> int:
        """Bytes of all layers."""
        return sum(self._layer(*layer, kv_dtype) for layer in self.layers)

    def needed(self, kv_dtype: str, kv_device: str) -> tuple[int, int]:
        """Bytes on the model's device and on the host, what pinning wastes included."""
        if kv_device == "model":
            return self.total(kv_dtype), 0
        widest = max(self._layer(*layer, kv_dtype) for layer in self.layers)
        host = sum(self._layer(*layer, kv_dtype, pinned) for layer in self.layers)
        return LAYERS_ON_DEVICE * widest, host

    def fits(self, kv_dtype: str, kv_device: str) -> bool:
        """Whether there is room now."""
        here, host = self.needed(kv_dtype, kv_device)
        if self.device.type == "cpu":
            return here + host <= free(self.device)
        return here <= free(self.device) and host <= psutil.virtual_memory().available

    def policy(self) -> tuple[str, str] | None:
        """The first (kv_dtype, kv_device) that fits, the exact and fast ones first."""
        return next((policy for policy in POLICIES if self.fits(*policy)), None)

    def describe(self, kv_dtype: str, kv_device: str) -> str:
        """One line: what is kept and where, what is free, and what fits if that does not."""
        here, host = self.needed(kv_dtype, kv_device)
        text = (
            f"K/V of {self.tokens} tokens x {len(self.layers)} layers x {self.passes} passes: "
            f"{gigabytes(here)} on {self.device} ({gigabytes(free(self.device))} free)"
        )
        if host:
            text += f", {gigabytes(host)} on the host"
        text += f"; kv_dtype={kv_dtype}, kv_device={kv_device}"
        if self.fits(kv_dtype, kv_device):
            return text
        if (policy := self.policy()) is None:
            return f"{text} does not fit, nor does any other: smaller or shorter videos would"
        return f"{text} does not fit; kv_dtype={policy[0]}, kv_device={policy[1]} does"

    def _layer(
        self, width: int, heads: int, kv_dtype: str, taken: Callable[[int], int] = int
    ) -> int:
        """Bytes of a layer, where a video's tensor of so many bytes takes `taken` of them."""
        values, scales = width * self.itemsize, 0
        if kv_dtype == "fp8":
            values, scales = width, heads * self.itemsize
        return 2 * self.passes * (taken(self.tokens * values) + taken(self.tokens * scales))


def kv_memory(
    pipe: DiffusionPipeline,
    adapter: Adapter,
    grid: tuple[int, int, int],
    batch: int,
    device: torch.device,
) -> KVMemory:
    """What a call of `pipe` that is under way keeps, for `batch` videos of a token grid."""
    guidance = (
        "do_classifier_free_guidance",
        "do_spatio_temporal_guidance",
        "do_modality_isolation_guidance",
    )
    return KVMemory(
        tokens=prod(grid),
        passes=batch * (1 + sum(bool(getattr(pipe, name, False)) for name in guidance)),
        layers=tuple((adapter.kv_width(layer), layer.heads) for layer in adapter.layers),
        itemsize=adapter.transformer.dtype.itemsize,
        device=device,
    )


def piece(size: int) -> int:
    """Bytes of each piece, but the last, in which a video's tensor of `size` bytes is pinned.

    torch rounds every pinned block up to a power of two. Of 8 to 16 pieces of such a size the last
    alone wastes anything, less than 1/16 of the tensor.
    """
    return 1 << max(size.bit_length() - 4, 0)


def pinned(size: int) -> int:
    """Bytes that those pieces take."""
    last = size % piece(size)
    return size - last + (1 << (last - 1).bit_length() if last else 0)


def free(device: torch.device) -> int:
    """Bytes that can still be allocated on a device."""
    if device.type == "cpu":
        return psutil.virtual_memory().available

    import torch

    unused = torch.accelerator.memory_reserved(device) - torch.accelerator.memory_allocated(device)
    return torch.accelerator.get_memory_info(device)[0] + unused


def gigabytes(size: int) -> str:
    return f"{size / 1e9:.3g} GB"
