"""What a step of HSA costs against a plain one, by the share of tokens that run."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from analysis.tables import MISSING, Entry, Table, megabytes, number, percent
from experiments.bench import loops, note
from experiments.bench.loops import Loop
from experiments.errors import UserError
from hsa.allocation import Rows
from hsa.engine import ADAPTERS, token_sampler
from hsa.memory import kv_memory
from hsa.schedulers import euler

PLAIN, ALL = "plain", "all active"


@dataclass(frozen=True)
class Size:
    """A model and a video to run steps of."""

    title: str
    loop: Callable[[], Loop]
    cuda: bool = True  # too slow elsewhere


SIZES = {
    "embedded": Size("Embedded model", loops.embedded, cuda=False),
    "wan-slice": Size("Wan, 2 layers of width 512, fp32", loops.wan_slice, cuda=False),
    "wan2.1-1.3b": Size("Wan2.1-1.3B, 480 x 832, 81 frames, bf16", loops.wan_1_3b),
    "ltx2": Size(
        f"LTX-2, {loops.LTX2_LAYERS} of 48 layers, 512 x 768, 121 frames, bf16", loops.ltx2_layers
    ),
}


@dataclass
class Measured:
    """Of one size: seconds of each kind of step, and memory in bytes.

    Attributes:
        active: kind of step -> share of the tokens that really ran.
        announced: K/V that HSA says it keeps.
        peak_plain, peak_hsa: most that the device had allocated; None without CUDA.
    """

    tokens: int
    announced: int
    seconds: dict[str, list[float]] = field(default_factory=dict)
    active: dict[str, float] = field(default_factory=dict)
    peak_plain: int | None = None
    peak_hsa: int | None = None

    def median(self, kind: str) -> float:
        return float(np.median(self.seconds[kind]))

    def ratio(self, kind: str) -> float:
        """To the plain step."""
        return self.median(kind) / self.median(PLAIN)


def measure(loop: Loop, shares: Sequence[float], repeats: int) -> Measured:
    """Rounds of a plain step, a step of HSA with all tokens active, and one for each share.

    The kinds of step take turns; a first round warms up and is dropped. The tokens that run are
    drawn at random, which is the worst case for gathering them.
    """
    adapter = ADAPTERS[type(loop.transformer).__name__](loop.transformer)
    found = Measured(
        loop.tokens, kv_memory(loop, adapter, loop.grid, 1, adapter.transformer.device).total()
    )
    kinds = {ALL: 1.0} | {f"{share:.1%} active": share for share in shares}
    for turn in range(repeats + 1):
        with euler(loop), _peak(loop.transformer.device) as plain:
            (plain_seconds,), _ = loop.steps(1)
        rule = _Shares(loop, [1.0, *kinds.values()])  # the first step fills the cache
        with token_sampler(loop, rule) as trace, _peak(loop.transformer.device) as peak:
            (_, *seconds), _ = loop.steps(len(kinds) + 1)
        if turn == 0:
            continue
        found.peak_plain, found.peak_hsa = plain.get("bytes"), peak.get("bytes")
        found.active = {
            kind: record.active_tokens / record.tokens
            for kind, record in zip(kinds, trace.records[1:], strict=True)
        }
        for kind, taken in zip((PLAIN, *kinds), (plain_seconds, *seconds), strict=True):
            found.seconds.setdefault(kind, []).append(taken)
    return found


def bench(names: Sequence[str], shares: Sequence[float], repeats: int) -> Iterator[tuple]:
    """(size, what was measured) of each; None for a size that wants a CUDA device where none is.

    Raises:
        UserError: there is no such size, or a share is not one.
    """
    for name in names:
        if name not in SIZES:
            raise UserError(f"bench.sizes={name!r}: choose from {', '.join(SIZES)}")
    for share in shares:
        if not 0 < share < 1:
            raise UserError(f"bench.shares={share}: choose shares between 0 and 1")
    if repeats < 1:
        raise UserError(f"bench.repeats={repeats}: choose a whole number from 1")
    for name in names:
        size = SIZES[name]
        missing = size.cuda and not torch.cuda.is_available()
        yield size, None if missing else measure(size.loop(), shares, repeats)


def tables(results: Sequence[tuple[Size, Measured | None]]) -> list[Table]:
    steps, memory = [], []
    for size, found in results:
        if found is None:
            unmeasured = Entry("unmeasured: no CUDA device", number=False)
            steps.append((Entry(size.title, number=False), unmeasured, *[Entry(MISSING)] * 5))
            memory.append((Entry(size.title, number=False), *[Entry(MISSING)] * 5))
            continue
        steps += [_step(size, found, kind) for kind in found.seconds]
        memory.append(_memory(size, found))
    header = (
        "Size",
        "Step",
        "Tokens",
        "Time (ms)",
        "Quartiles (ms)",
        "To plain",
        "To plain / active",
    )
    columns = ("Size", "Tokens", "K/V announced (MB)", "Peak, plain (MB)", "Peak, HSA (MB)")
    return [
        Table("Time of a step", header, tuple(steps), f"Medians. {note()}"),
        Table(
            "Memory",
            (*columns, "Peak to plain + K/V"),
            tuple(memory),
            "Peaks are of the CUDA device and measured there alone.",
        ),
    ]


def rows(results: Sequence[tuple[Size, Measured | None]]) -> list[Mapping[str, Any]]:
    """One for each kind of step, as raw numbers."""
    return [
        {
            "size": size.title,
            "step": kind,
            "tokens": found.tokens,
            "active": found.active.get(kind, 1.0),
            "seconds": " ".join(f"{value:.6f}" for value in seconds),
            "median_s": found.median(kind),
            "to_plain": found.ratio(kind),
            "kv_bytes": found.announced,
            "peak_plain": found.peak_plain,
            "peak_hsa": found.peak_hsa,
        }
        for size, found in results
        if found is not None
        for kind, seconds in found.seconds.items()
    ]


class _Shares:
    """A token rule that runs a random subset of a given share at each step."""

    def __init__(self, loop: Loop, shares: Sequence[float]) -> None:
        self.device = loop.transformer.device
        generator = torch.Generator().manual_seed(0)
        self.order = torch.randperm(loop.tokens, generator=generator)
        self.counts = [round(share * loop.tokens) for share in shares]

    def __call__(self, scheduler: Any, trace: Any) -> _Shares:
        return self

    def rows(self, step: int, copies: int) -> Rows | None:
        count = self.counts[step]
        if count == len(self.order):
            return None
        active = torch.zeros(copies, len(self.order), dtype=torch.bool)
        active[:, self.order[:count]] = True
        return Rows(active.to(self.device))

    def measure(self, forward: Any, previous: Tensor | None) -> None:
        pass


@contextmanager
def _peak(device: torch.device) -> Iterator[dict[str, int]]:
    """The most memory that a CUDA device has allocated in the block, under "bytes"."""
    found: dict[str, int] = {}
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    yield found
    if device.type == "cuda":
        found["bytes"] = torch.cuda.max_memory_allocated()


def _step(size: Size, found: Measured, kind: str) -> tuple[Entry, ...]:
    share = found.active.get(kind, 1.0)
    low, high = np.quantile(found.seconds[kind], [0.25, 0.75]) * 1000
    return (
        Entry(size.title, number=False),
        Entry(kind, number=False),
        Entry(str(round(share * found.tokens))),
        Entry(number(1000 * found.median(kind))),
        Entry(f"{number(low)} to {number(high)}"),
        Entry(percent(found.ratio(kind))),
        Entry(number(found.ratio(kind) / share)),
    )


def _memory(size: Size, found: Measured) -> tuple[Entry, ...]:
    if found.peak_plain is None:
        peaks = [Entry(MISSING)] * 3
    else:
        bound = found.peak_plain + found.announced
        peaks = [
            Entry(megabytes(found.peak_plain)),
            Entry(megabytes(found.peak_hsa)),
            Entry(percent(found.peak_hsa / bound)),
        ]
    return (
        Entry(size.title, number=False),
        Entry(str(found.tokens)),
        Entry(megabytes(found.announced)),
        *peaks,
    )
