"""Scores every stored video of a plan that has none yet. What is scored stays scored."""

from __future__ import annotations

import json
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cache, lru_cache
from typing import TYPE_CHECKING, Any

from analysis.metrics.base import BatchMetric, Metric

if TYPE_CHECKING:
    import numpy as np

    from experiments.plan import Cell, Plan
    from experiments.store import Sample, Store

Progress = Callable[[int, int], None]


def score(
    plan: Plan, store: Store, metrics: Iterable[Metric], progress: Progress | None = None
) -> None:
    """Writes the missing scores of all stored cells.

    A metric that this machine cannot compute is left out with a warning. A video that a metric
    cannot judge gets a score record with the error; it counts as missing and is tried again.

    Args:
        progress: called with (cells done, cells) after every cell, once more of all cells for
            every metric that scores many videos at once.
    """
    metrics = list(metrics)
    for reason in dict.fromkeys(metric.unavailable() for metric in metrics):
        if reason:
            warnings.warn(reason, stacklevel=2)
    usable = available(metrics)
    batches = [metric for metric in usable if isinstance(metric, BatchMetric)]
    waiting: list[list[Cell]] = [[] for _ in batches]
    total = len(plan.cells) * (1 + len(batches))
    refused: dict[str, list[str]] = defaultdict(list)  # metric -> errors
    # the plan keeps a prompt's settings together: two are its current video and its reference
    load = lru_cache(maxsize=2)(lambda key: _Decoded(store.sample(key)))
    for done, cell in enumerate(plan.cells, start=1):
        for metric in _missing(cell, usable, store):
            if metric in batches:
                waiting[batches.index(metric)].append(cell)
            elif error := _score_cell(cell, metric, store, load):
                refused[metric.name].append(error)
        if progress:
            progress(done, total)
    for i, (metric, cells) in enumerate(zip(batches, waiting, strict=True), start=1):
        for left, errors in _score_chunks(cells, metric, store):
            if errors:
                refused[metric.name] += errors
            if progress:
                progress((i + 1) * len(plan.cells) - left, total)
    for metric, errors in refused.items():
        message = f"metric {metric} could not judge {len(errors)} videos, the first: {errors[0]}"
        warnings.warn(message, stacklevel=2)


def available(metrics: Iterable[Metric]) -> list[Metric]:
    """Those that can be computed on this machine."""
    return [metric for metric in metrics if metric.unavailable() is None]


def stored_values(
    cell: Cell, metric: Metric, scores: Iterable[Mapping[str, Any]]
) -> Mapping[str, float] | None:
    """What this metric, with these parameters, said of the cell; None if there is nothing.

    Args:
        scores: the cell's, from the store.
    """
    identity = _identity(cell, metric)
    for record in scores:
        if record["values"] is not None and identity == {k: record[k] for k in identity}:
            return record["values"]
    return None


class _Decoded:
    """A stored video that is decoded once, however many metrics read it."""

    def __init__(self, sample: Sample):
        self._sample = sample
        self.record = sample.record
        self.frames = cache(sample.frames)

    @property
    def arrays(self) -> Mapping[str, np.ndarray]:
        return self._sample.arrays


def _missing(cell: Cell, metrics: Iterable[Metric], store: Store) -> list[Metric]:
    """Those that can say something of the cell and have not."""
    if not store.has(cell.key):
        return []
    scores = store.scores(cell.key)
    return [
        metric
        for metric in metrics
        if metric.applies(cell.inputs)
        and (not metric.needs_reference or _has_reference(cell, store))
        and stored_values(cell, metric, scores) is None
    ]


def _has_reference(cell: Cell, store: Store) -> bool:
    """Fidelity of the reference to itself is no measurement."""
    return cell.reference_key != cell.key and store.has(cell.reference_key)


def _score_cell(
    cell: Cell, metric: Metric, store: Store, load: Callable[[str], _Decoded]
) -> str | None:
    """Writes a score; the error where the cell cannot be judged."""
    identity = _identity(cell, metric)
    values, error = _evaluate(metric, cell.key, identity["reference_key"], load)
    store.write_score(cell.key, **identity, values=values, error=error)
    return error


def _score_chunks(
    cells: Sequence[Cell], metric: BatchMetric, store: Store
) -> Iterator[tuple[int, list[str]]]:
    """Writes scores chunk by chunk; yields (cells left, errors) before the first and after each."""
    yield len(cells), []
    for start in range(0, len(cells), metric.chunk):
        chunk = cells[start : start + metric.chunk]
        errors = []
        outcomes = metric.batch([store.sample(cell.key) for cell in chunk])
        for cell, outcome in zip(chunk, outcomes, strict=True):
            values, error = (None, outcome) if isinstance(outcome, str) else (outcome, None)
            store.write_score(cell.key, **_identity(cell, metric), values=values, error=error)
            errors += [error] if error else []
        yield len(cells) - start - len(chunk), errors


def _evaluate(
    metric: Metric, key: str, reference_key: str | None, load: Callable[[str], _Decoded]
) -> tuple[dict[str, float] | None, str | None]:
    try:
        return metric(load(key), load(reference_key) if reference_key else None), None
    except ValueError as error:
        return None, str(error)


def _identity(cell: Cell, metric: Metric) -> dict[str, Any]:
    """What distinguishes a score from the others of the same video."""
    return {
        "metric": metric.name,
        "version": metric.version,
        "params": json.loads(json.dumps(metric.parameters())),
        "reference_key": cell.reference_key if metric.needs_reference else None,
    }
