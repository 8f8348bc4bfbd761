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
    single = [metric for metric in usable if not isinstance(metric, BatchMetric)]
    batches = [metric for metric in usable if isinstance(metric, BatchMetric)]
    total = len(plan.cells) * (1 + len(batches))
    refused: dict[str, list[str]] = defaultdict(list)  # metric -> errors
    # the plan keeps a prompt's settings together: two are its current video and its reference
    load = lru_cache(maxsize=2)(lambda key: _Decoded(store.sample(key)))
    for done, cell in enumerate(plan.cells, start=1):
        if store.has(cell.key):
            for metric, error in _score_cell(cell, store, single, load):
                refused[metric].append(error)
        if progress:
            progress(done, total)
    for i, metric in enumerate(batches, start=1):
        for done, errors in _score_chunks(plan, store, metric):
            refused[metric.name] += errors
            if progress:
                progress(i * len(plan.cells) + done, total)
    for metric, errors in refused.items():
        if not errors:
            continue
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


def _score_cell(
    cell: Cell, store: Store, metrics: Sequence[Metric], load: Callable[[str], _Decoded]
) -> Iterator[tuple[str, str]]:
    """Writes what is missing; yields (metric, error) for what cannot be judged."""
    scores = store.scores(cell.key)
    for metric in metrics:
        identity = _identity(cell, metric)
        reference_key = identity["reference_key"]
        if not metric.applies(cell.inputs):
            continue
        if reference_key == cell.key:  # fidelity of the reference to itself is no measurement
            continue
        if reference_key is not None and not store.has(reference_key):
            continue
        if stored_values(cell, metric, scores) is None:
            values, error = _evaluate(metric, cell.key, reference_key, load)
            store.write_score(cell.key, **identity, values=values, error=error)
            if error is not None:
                yield metric.name, error


def _score_chunks(plan: Plan, store: Store, metric: BatchMetric) -> Iterator[tuple[int, list[str]]]:
    """Writes what is missing chunk by chunk; yields (cells done, errors) after each."""
    missing = [
        cell
        for cell in plan.cells
        if store.has(cell.key)
        and metric.applies(cell.inputs)
        and stored_values(cell, metric, store.scores(cell.key)) is None
    ]
    settled = len(plan.cells) - len(missing)
    yield settled, []
    for start in range(0, len(missing), metric.chunk):
        chunk = missing[start : start + metric.chunk]
        errors = []
        outcomes = metric.batch([store.sample(cell.key) for cell in chunk])
        for cell, outcome in zip(chunk, outcomes, strict=True):
            values, error = (None, outcome) if isinstance(outcome, str) else (outcome, None)
            store.write_score(cell.key, **_identity(cell, metric), values=values, error=error)
            errors += [error] if error else []
        yield settled + start + len(chunk), errors


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
