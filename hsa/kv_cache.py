"""Keys and values of every token, kept by attention layer, in the dtype and place that fit.

Shapes: B batch, N latent tokens, K rows that run, H heads, D head width.
"""

from typing import Any

import torch
from torch import Tensor

from hsa.allocation import Rows
from hsa.memory import piece

FP8 = torch.float8_e4m3fn
FP8_TOP = 440.0  # of 448: rounding a scale to the model's dtype must not push past the largest


class LayerCache:
    """K/V of one attention layer in one guidance branch, resident where the model runs.

    Allocated once, by the first forward; later forwards write their rows in place. An instance sits
    on its attention module while a forward runs, so that one processor serves all layers and
    `torch.compile` sees one graph for all blocks.
    """

    def __init__(self, fp8: bool = False) -> None:
        self.fp8 = fp8
        self.rows: Rows | None = None  # of the running forward; None: every token
        self.stored: tuple[Tensor, ...] = ()  # key, value; under fp8 each followed by its scales

    def exchange(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Take in fresh rows (B, K, H, D), return the keys and values (B, N, H, D) to attend to.

        Where every token is fresh these are the given tensors themselves, whatever the policy.
        """
        fresh = self._encode(key) + self._encode(value)
        if self.rows is None:
            self._keep(fresh)
            return key, value
        stored = self._fetch()
        for full, rows in zip(stored, fresh, strict=True):
            self.rows.put(full, rows)
        self._return(stored)
        half = len(stored) // 2
        return self._decode(*stored[:half]), self._decode(*stored[half:])

    def _encode(self, x: Tensor) -> tuple[Tensor, ...]:
        """(B, K, H, D) -> itself, or fp8 bytes (B, K, H, D) and scales (B, K, H, 1)."""
        if not self.fp8:
            return (x,)
        scale = x.abs().amax(-1, keepdim=True) / FP8_TOP
        scale = scale.clamp_min(torch.finfo(x.dtype).tiny)
        return (x / scale).to(FP8).view(torch.uint8), scale

    def _decode(self, x: Tensor, scale: Tensor | None = None) -> Tensor:
        return x if scale is None else x.view(FP8).to(scale.dtype) * scale

    def _keep(self, fresh: tuple[Tensor, ...]) -> None:
        if not self.stored:
            self.stored = tuple(torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in fresh)
        for full, x in zip(self.stored, fresh, strict=True):
            full.copy_(x)

    def _fetch(self) -> tuple[Tensor, ...]:
        return self.stored

    def _return(self, stored: tuple[Tensor, ...]) -> None:
        pass


class Transfers:
    """Host traffic of one branch: a stream beside the model's, and the order of its layers."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.module: Any = torch.get_device_module(device)
        self.stream = self.module.Stream(device)
        self.layers: list[HostCache] = []  # in the order in which a forward meets them

    def current_stream(self) -> Any:
        """The stream that the model computes on."""
        return self.module.current_stream(self.device)

    def wait_for_model(self) -> None:
        self.stream.wait_stream(self.current_stream())

    def used_by(self, tensor: Tensor, stream: Any) -> None:
        """Keep the memory of a device tensor until `stream` is done with it."""
        if self.device.type != "cpu":
            tensor.record_stream(stream)


class HostTensor:
    """A tensor (B, ...) on the host, each sample in pieces so that pinning wastes little."""

    def __init__(self, like: Tensor, pinned: bool) -> None:
        self.shape, self.dtype = like.shape, like.dtype
        self.pieces = [
            torch.empty(x.shape, dtype=x.dtype, pin_memory=pinned)
            for x in _pieces(torch.empty(like.shape, dtype=like.dtype, device="meta"))
        ]

    def to(self, device: torch.device) -> Tensor:
        """A copy on `device` that may be under way."""
        full = torch.empty(self.shape, dtype=self.dtype, device=device)
        for x, kept in zip(_pieces(full), self.pieces, strict=True):
            x.copy_(kept, non_blocking=True)
        return full

    def copy_(self, full: Tensor) -> None:
        """Start to overwrite it."""
        for kept, x in zip(self.pieces, _pieces(full.contiguous()), strict=True):
            kept.copy_(x, non_blocking=True)


def _pieces(full: Tensor) -> list[Tensor]:
    """Views of the bytes of contiguous `full`."""
    samples = full.flatten(1).view(torch.uint8)  # (B, bytes)
    return [x for sample in samples for x in sample.split(piece(len(sample)))]


class HostCache(LayerCache):
    """K/V of one layer in pinned host memory.

    While a layer computes, the next one's K/V travel to the device and the last one's back, all on
    one stream of their own; a partial step moves every row of every layer both ways. The device
    holds about three layers at a time.
    """

    def __init__(self, transfers: Transfers, fp8: bool = False) -> None:
        super().__init__(fp8)
        self.stored: tuple[HostTensor, ...] = ()
        self.transfers = transfers
        self.arriving: tuple[Tensor, ...] = ()
        self.arrived: Any = None  # event

    @torch.compiler.disable(reason='kv_device="host" breaks graphs: compile with fullgraph=False')
    def exchange(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        return super().exchange(key, value)

    def prefetch(self) -> None:
        """Start the way to the device; does nothing where it is under way or nothing is kept."""
        if self.arriving or not self.stored:
            return
        link = self.transfers
        with link.module.stream(link.stream):
            self.arriving = tuple(kept.to(link.device) for kept in self.stored)
            self.arrived = link.stream.record_event()

    def _keep(self, fresh: tuple[Tensor, ...]) -> None:
        if not self.stored:
            pinned = self.transfers.device.type != "cpu"
            self.stored = tuple(HostTensor(x, pinned) for x in fresh)
            self.transfers.layers.append(self)
        self._return(fresh)

    def _fetch(self) -> tuple[Tensor, ...]:
        self.prefetch()
        link = self.transfers
        current = link.current_stream()
        current.wait_event(self.arrived)
        here, self.arriving = self.arriving, ()
        for x in here:
            link.used_by(x, current)
        following = link.layers.index(self) + 1
        if following < len(link.layers):
            link.layers[following].prefetch()
        return here

    def _return(self, fresh: tuple[Tensor, ...]) -> None:
        link = self.transfers
        link.wait_for_model()
        with link.module.stream(link.stream):
            for kept, x in zip(self.stored, fresh, strict=True):
                kept.copy_(x)
                link.used_by(x, link.stream)
