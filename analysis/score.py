"""Scores every stored video of a plan that has none yet. What is scored stays scored."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from analysis.metrics.base import Metric

if TYPE_CHECKING:
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
    for done, cell in enumerate(plan.cells, start=1):
        if store.has(cell.key):
            _score_cell(cell, store, usable)
        if progress:
            progress(done, len(plan.cells))


def available(metrics: Iterable[Metric]) -> list[Metric]:
    """Those that can be computed on this machine."""
    return [metric for metric in metrics if metric.unavailable() is None]


def find(
    scores: Sequence[Mapping[str, Any]], metric: Metric, reference_key: str | None
) -> Mapping[str, float] | None:
    """Values of the stored score that this metric, with these parameters, gave; None if none."""
    identity = _identity(metric, reference_key)
    for record in scores:
        if record["values"] is not None and identity == {k: record[k] for k in identity}:
            return record["values"]
    return None


def reference_of(cell: Cell, metric: Metric) -> str | None:
    """Key of the video that the cell is compared with under a metric."""
    return cell.reference_key if metric.needs_reference else None


def is_defined(cell: Cell, metric: Metric) -> bool:
    """False for fidelity of the reference run to itself: that is no measurement."""
    return reference_of(cell, metric) != cell.key


def _score_cell(cell: Cell, store: Store, metrics: Sequence[Metric]) -> None:
    stored = store.scores(cell.key)
    missing = [
        metric
        for metric in metrics
        if is_defined(cell, metric) and find(stored, metric, reference_of(cell, metric)) is None
    ]
    if not missing:
        return
    sample = store.sample(cell.key)
    for metric in missing:
        values, error = _evaluate(metric, sample, reference_of(cell, metric), store)
        store.write_score(
            cell.key, **_identity(metric, reference_of(cell, metric)), values=values, error=error
        )


def _evaluate(
    metric: Metric, sample: Sample, reference_key: str | None, store: Store
) -> tuple[dict[str, float] | None, str | None]:
    if metric.needs_reference and (reference_key is None or not store.has(reference_key)):
        return None, "the reference video is not in the store"
    try:
        return metric(sample, store.sample(reference_key) if reference_key else None), None
    except ValueError as error:
        return None, str(error)


def _identity(metric: Metric, reference_key: str | None) -> dict[str, Any]:
    return {
        "metric": metric.name,
        "version": metric.version,
        "params": json.loads(json.dumps(metric.parameters())),
        "reference_key": reference_key,
    }
