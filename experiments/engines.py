"""Who makes the cells: this process, several on this machine, or a share of them on many."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import cache
from multiprocessing.connection import wait
from multiprocessing.queues import SimpleQueue
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from experiments.cell import Cell
from experiments.errors import UserError

if TYPE_CHECKING:
    from experiments.execute import Outcome, Worker


class Engine(ABC):
    """Makes cells in any order. Importing this module costs no torch.

    `partial`: makes only a share of the cells, so that timing and analysis wait for a run on all.
    `workers`: how many make cells at the same time.
    `threads`: of torch in the process that measures runtime; None leaves torch's default.
    """

    partial: ClassVar[bool] = False
    workers: int = 1
    threads: int | None = None

    def share(self, cells: Sequence[Cell]) -> list[Cell]:
        """The cells that are this engine's to make."""
        return list(cells)

    @abstractmethod
    def generate(self, cells: Sequence[Cell], worker: Worker) -> Iterator[Outcome]:
        """Make cells and store them with a worker, or with workers of its own on the same store.

        Raises:
            StoreError: the store cannot be written.
        """


@dataclass(frozen=True)
class Serial(Engine):
    """One after the other in this process."""

    threads: int | None = None

    def __post_init__(self) -> None:
        if self.threads is not None:
            _require_count("engine.threads", self.threads)

    def generate(self, cells: Sequence[Cell], worker: Worker) -> Iterator[Outcome]:
        return map(worker.make, cells)


@dataclass(frozen=True)
class Shard(Serial):
    """Every n-th cell by its key: `shard=3/8` is the fourth of eight shares.

    Needs no coordinator: any number of machines run their shares on one store, or on stores
    that rsync merges.
    """

    partial: ClassVar[bool] = True
    shard: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        index, count = self._parts
        if not 0 <= index < count:
            raise ValueError(f"shard={self.shard}: choose 0/{count} to {count - 1}/{count}")

    @property
    def _parts(self) -> tuple[int, int]:
        try:
            index, count = map(int, str(self.shard).split("/"))
        except ValueError:
            raise ValueError(f"shard={self.shard}: choose one like 0/8") from None
        return index, count

    def share(self, cells: Sequence[Cell]) -> list[Cell]:
        index, count = self._parts
        return [cell for cell in cells if int(cell.key[:16], 16) % count == index]


@dataclass(frozen=True)
class Procs(Engine):
    """Worker processes of one thread each, which is faster than one process of many threads where
    a model is small. Results are those of `Serial` with one thread.

    ``workers``: how many at most. On CUDA each has a device of its own, so that there are no more
    than devices.
    """

    workers: int = 2
    threads: ClassVar[int] = 1

    def __post_init__(self) -> None:
        _require_count("engine.workers", self.workers)

    def generate(self, cells: Sequence[Cell], worker: Worker) -> Iterator[Outcome]:
        context = multiprocessing.get_context("spawn")
        devices = _devices() or [None] * self.workers
        free = context.SimpleQueue()
        for device in devices:
            free.put(device)
        pool = ProcessPoolExecutor(
            min(self.workers, len(devices), len(cells)),
            mp_context=context,
            initializer=_start,
            initargs=(self.threads, free),
        )
        try:
            futures = [pool.submit(_make, worker.store.root, cell) for cell in cells]
            for future in as_completed(futures):
                yield future.result()
        except BrokenProcessPool as error:
            raise UserError("a worker process died; run the same command again to go on") from error
        finally:
            pool.shutdown(cancel_futures=True)


def _devices() -> list[int]:
    """Those of CUDA."""
    import torch

    return list(range(torch.cuda.device_count()))


def _start(threads: int, free: SimpleQueue) -> None:
    """Prepare a worker process, which takes a device of those that are free."""
    import torch

    if (device := free.get()) is not None:
        torch.cuda.set_device(device)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides
    threading.Thread(target=_die_with_parent, daemon=True).start()
    torch.set_num_threads(threads)


def _die_with_parent() -> None:
    wait([multiprocessing.parent_process().sentinel])
    os._exit(1)


def _make(store: Path, cell: Cell) -> Outcome:
    return _worker_of(store).make(cell)


@cache
def _worker_of(store: Path) -> Worker:
    """The one worker of a process, so that its model is loaded once."""
    from experiments.execute import Worker
    from experiments.store import Store

    return Worker(Store(store))


def _require_count(key: str, value: object) -> None:
    if not isinstance(value, int) or value < 1:
        raise ValueError(f"{key}={value!r}: choose a whole number from 1")
