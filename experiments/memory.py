"""How much memory a run holds on to between its steps, whoever holds it."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch


@dataclass
class Held:
    """Bytes of the tensors that came alive since `held` began: `peak`, the most `note` saw."""

    peak: int = 0

    def note(self) -> None:
        """Count every storage once, whoever refers to it: hooks, caches, closures, the pipeline."""
        storages = {}
        for item in gc.get_objects():
            if issubclass(type(item), torch.Tensor):  # isinstance would wake lazy modules
                storage = item.untyped_storage()
                storages[storage.data_ptr()] = storage.nbytes()
        self.peak = max(self.peak, sum(storages.values()))


@contextmanager
def held() -> Iterator[Held]:
    """Count inside the block; what was alive before, such as the weights, does not count."""
    gc.collect()
    gc.freeze()
    try:
        yield Held()
    finally:
        gc.unfreeze()
