"""What HSA needs to know of a model family, and what a running forward carries.

Shapes: B batch, N latent tokens, K rows that run, C channels of one token.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from hsa.allocation import Rows, velocity_change
from hsa.kv_cache import HostCache, LayerCache, Transfers


class Branch:
    """Memory of one guidance branch of one expert: K/V and velocity, each token's latest.

    What the rows that run attend to is up to the caches, and which rows run to the forward: a
    subclass that makes others of either is another attention context than HSA's.

    Args:
        kv_dtype, kv_device: as in `HSAConfig`.

    Attributes:
        velocity: (B, N, C) in the model's dtype, None before the first forward.
    """

    def __init__(
        self, device: torch.device, kv_dtype: str = "model", kv_device: str = "model"
    ) -> None:
        self.velocity: Tensor | None = None
        self.fp8 = kv_dtype == "fp8"
        self.transfers = Transfers(device) if kv_device == "host" else None
        self.caches: dict[nn.Module, LayerCache] = {}

    def cache(self, layer: nn.Module) -> LayerCache:
        if layer not in self.caches:
            self.caches[layer] = self.new_cache()
        return self.caches[layer]

    def new_cache(self) -> LayerCache:
        """The memory of one layer, before its first forward."""
        if self.transfers is None:
            return LayerCache(self.fp8)
        return HostCache(self.transfers, self.fp8)

    def new_forward(self, rows: Rows | None, step: int, name: str, copies: int) -> "Forward":
        """The forward that starts, with these rows due."""
        return Forward(self, rows, step, name, copies)


class Forward:
    """One running forward: its branch, the rows it runs (None: every token), its place in time.

    Attributes:
        step: index of the denoising step.
        name: of the guidance branch.
        copies: how many times the samples the batch holds; the last is the conditional one.
        grid: (F, H, W) of the tokens; the adapter fills it in.
        given: (B, N) bool, true where a token is a condition and not denoised (None: nowhere);
            the adapter fills it in.
    """

    def __init__(
        self, branch: Branch, rows: Rows | None, step: int = 0, name: str = "", copies: int = 1
    ) -> None:
        self.branch, self.rows = branch, rows
        self.step, self.name, self.copies = step, name, copies
        self.grid: tuple[int, int, int] | None = None
        self.given: Tensor | None = None

    def take(self, full: Tensor) -> Tensor:
        """The rows that run: (B, N, ...) -> (B, K, ...)."""
        return full if self.rows is None else self.rows.take(full)

    def velocity(self, fresh: Tensor) -> Tensor:
        """(B, K, C) fresh -> (B, N, C), cached rows included."""
        if self.rows is None:
            self.branch.velocity = fresh
        else:
            # A copy, so that a rule can compare it with the one before.
            self.branch.velocity = self.branch.velocity.clone()
            self.rows.put(self.branch.velocity, fresh)
        return self.branch.velocity

    def velocity_change(self, previous: Tensor) -> Tensor:
        """Relative change of each sample's velocity since `previous` (copies * B, N, C): (B, N)."""
        change = velocity_change(self.branch.velocity, previous)
        if self.given is not None:
            change = change * ~self.given
        return change.chunk(self.copies)[-1]

    def stale(self) -> Tensor | None:
        """(B, F, H, W) bool, true where a token did not run; None where every token did."""
        if self.rows is None:
            return None
        return ~self.rows.active.chunk(self.copies)[-1].unflatten(1, self.grid)


class Adapter(ABC):
    """Gathers the rows of a running forward of one transformer and scatters what they yield.

    Everything in these transformers is per token but the K/V that an attention layer reads, so a
    family says which layers read the K/V of video tokens, replaces their processors by one that
    exchanges K/V with the layer's `kv_cache`, and slices what goes in.

    Raises:
        ValueError: the transformer is set up in a way that HSA cannot run.
    """

    processors: Sequence[type]  # of diffusers, that `rows_processor` stands in for

    def __init__(self, transformer: nn.Module) -> None:
        self.transformer = transformer
        self.layers = tuple(self.cached_layers())
        self.forward: Forward | None = None
        choices = self.processors
        for layer in self.layers:
            if type(layer.processor) not in choices:
                raise ValueError(
                    f"processor: {type(layer.processor).__name__} cannot be replaced; "
                    f"choices: {', '.join(choice.__name__ for choice in choices)}"
                )

    @abstractmethod
    def cached_layers(self) -> Iterator[nn.Module]:
        """The attention layers that read keys and values of video tokens."""

    @abstractmethod
    def kv_width(self, layer: nn.Module) -> int:
        """Channels of a layer's keys, all heads together."""

    @abstractmethod
    def rows_processor(self) -> Any:
        """A processor for those layers that attends to what `attn.kv_cache` returns."""

    @abstractmethod
    def gather(self, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        """Arguments of the transformer, cut down to the rows that run where they hold tokens.

        Fills in the forward's `grid`.
        """

    def scatter(self, output: tuple) -> tuple:
        """Output of the transformer, every token's velocity in it."""
        return output

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Replace the processors; afterwards the transformer has the ones it had."""
        originals = [(layer, layer.processor) for layer in self.layers]
        processor = self.rows_processor()
        processor._attention_backend = originals[0][1]._attention_backend
        processor._parallel_config = originals[0][1]._parallel_config
        try:
            for layer, _ in originals:
                layer.set_processor(processor)
                layer.kv_cache = None
            yield
        finally:
            for layer, original in originals:
                layer.set_processor(original)
                del layer.kv_cache

    def begin(self, forward: Forward, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        """Bind the branch's caches to the layers; return the arguments to run with."""
        self.forward = forward
        for layer in self.layers:
            layer.kv_cache = forward.branch.cache(layer)
            layer.kv_cache.rows = forward.rows
        transfers = forward.branch.transfers
        if forward.rows is not None and transfers is not None:
            transfers.layers[0].prefetch()
        return self.gather(args, kwargs)

    def end(self) -> None:
        """Forget the forward, so that nothing but its branch holds the K/V."""
        self.forward = None
        for layer in self.layers:
            layer.kv_cache = None
