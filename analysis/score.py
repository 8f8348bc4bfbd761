"""Scores every stored video of a plan that has none yet. What is scored stays scored."""

from __future__ import annotations

import json
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cache, lru_cache
from typing import TYPE_CHECKING, Any

from analysis.metrics.base import Metric

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
        progress: called with (cells done, cells) after every cell.
    """
    metrics = list(metrics)
    for metric in metrics:
        if reason := metric.unavailable():
            warnings.warn(reason, stacklevel=2)
    usable = available(metrics)
    refused: dict[str, list[str]] = defaultdict(list)  # metric -> errors
    # the plan keeps a prompt's settings together: two are its current video and its reference
    load = lru_cache(maxsize=2)(lambda key: _Decoded(store.sample(key)))
    for done, cell in enumerate(plan.cells, start=1):
        if store.has(cell.key):
            for metric, error in _score_cell(cell, store, usable, load):
                refused[metric].append(error)
        if progress:
            progress(done, len(plan.cells))
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


def _score_cell(
    cell: Cell, store: Store, metrics: Sequence[Metric], load: Callable[[str], _Decoded]
) -> Iterator[tuple[str, str]]:
    """Writes what is missing; yields (metric, error) for what cannot be judged."""
    scores = store.scores(cell.key)
    for metric in metrics:
        identity = _identity(cell, metric)
        reference_key = identity["reference_key"]
        if reference_key == cell.key:  # fidelity of the reference to itself is no measurement
            continue
        if reference_key is not None and not store.has(reference_key):
            continue
        if stored_values(cell, metric, scores) is None:
            values, error = _evaluate(metric, cell.key, reference_key, load)
            store.write_score(cell.key, **identity, values=values, error=error)
            if error is not None:
                yield metric.name, error


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
