"""Methods against each other at fixed shares of the reference runtime: `comparison.md`.

A method is all of its settings; what it reaches at a runtime is read off its own front
(`stats.at_runtime`), per prompt, so that differences are paired.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from analysis.frame import per_prompt
from analysis.metrics.base import Metric
from analysis.pareto import area
from analysis.stats import Estimate, at_runtime, bootstrap, paired
from analysis.tables import MISSING, Entry, Table, difference, heading, interval, number

SUBJECT = "hsa"
TARGETS = (0.25, 0.5)


@dataclass(frozen=True)
class Comparison:
    """One task and metric at one runtime: what each method reaches, and HSA minus it."""

    task: str
    metric: Metric
    target: float  # share of the reference runtime
    reached: dict[str, Estimate]
    lead: dict[str, Estimate]  # empty without HSA

    @property
    def best(self) -> str | None:
        """The method with the best mean; None where no method reaches the runtime."""
        means = {name: e.mean for name, e in self.reached.items() if np.isfinite(e.mean)}
        pick = max if self.metric.higher_is_better else min
        return pick(means, key=means.get, default=None)


def compare(
    frame: pd.DataFrame,
    summary: pd.DataFrame,
    metrics: Sequence[Metric],
    targets: Sequence[float] = TARGETS,
    seed: int = 0,
) -> list[Comparison]:
    """Every task, metric and target runtime, from `frame.tidy` and `summary.summarise`."""
    quality = per_prompt(frame)
    return [
        _compare(task, metric, target, methods, seed)
        for task in frame["task"].unique()
        for metric in metrics
        for methods in [dict(_curves(quality, summary, task, metric))]
        for target in targets
    ]


def tables(
    comparisons: Sequence[Comparison], summary: pd.DataFrame, metrics: Sequence[Metric]
) -> list[Table]:
    """Per task: who is best at each runtime, what each method reaches, HSA's lead, the areas."""
    made = []
    for task in dict.fromkeys(c.task for c in comparisons):
        mine = [c for c in comparisons if c.task == task]
        made.append(_winners(task, mine))
        for target in dict.fromkeys(c.target for c in mine):
            at = [c for c in mine if c.target == target]
            made += [_reached(task, target, at), _lead(task, target, at)]
        made.append(_areas(task, summary, metrics))
    return [table for table in made if table.rows]


def areas(summary: pd.DataFrame, task: str, metric: Metric) -> dict[str, float]:
    """Area under each method's front up to the reference runtime, above the worst setting's mean.

    In units of quality: 0 for a method that only has the worst setting.
    """
    view = summary[(summary["task"] == task) & (summary["metric"] == metric.name)]
    means = view["mean"].dropna()
    if means.empty or view["runtime"].isna().all():
        return {}
    worst = means.min() if metric.higher_is_better else means.max()
    return {
        method: area(
            lines["runtime"].to_numpy(),
            lines["mean"].to_numpy(),
            limit=1.0,
            worst=worst,
            higher_is_better=metric.higher_is_better,
        )
        for method, lines in view.groupby("method", sort=False)
    }


Curve = tuple[np.ndarray, np.ndarray]  # runtime (K,), quality (P, K)


def _curves(
    quality: pd.DataFrame, summary: pd.DataFrame, task: str, metric: Metric
) -> Iterator[tuple[str, Curve]]:
    view = summary[(summary["task"] == task) & (summary["metric"] == metric.name)]
    for method, lines in view.groupby("method", sort=False):
        labels = [(task, metric.name, label) for label in lines["label"]]
        yield method, (lines["runtime"].to_numpy(), quality.loc[labels].to_numpy().T)


def _compare(
    task: str, metric: Metric, target: float, methods: dict[str, Curve], seed: int
) -> Comparison:
    values = {
        name: at_runtime(*curve, target, metric.higher_is_better) for name, curve in methods.items()
    }
    subject = values.get(SUBJECT)
    return Comparison(
        task,
        metric,
        target,
        reached={name: bootstrap(v, seed) for name, v in values.items()},
        lead={
            name: paired(subject, v, seed)
            for name, v in values.items()
            if subject is not None and name != SUBJECT
        },
    )


def _winners(task: str, comparisons: Sequence[Comparison]) -> Table:
    targets = list(dict.fromkeys(c.target for c in comparisons))
    best = {(c.metric, c.target): c.best or MISSING for c in comparisons}
    rows = tuple(
        (
            Entry(heading(metric), number=False),
            *(Entry(best[metric, target], number=False) for target in targets),
        )
        for metric in dict.fromkeys(c.metric for c in comparisons)
    )
    return Table(f"Best method, {task.upper()}", ("Metric", *map(_at, targets)), rows)


def _reached(task: str, target: float, comparisons: Sequence[Comparison]) -> Table:
    rows = tuple(
        (
            Entry(method, number=False),
            *(Entry(interval(c.reached[method]), method == c.best) for c in comparisons),
        )
        for method in dict.fromkeys(name for c in comparisons for name in c.reached)
    )
    return Table(f"Reached {_at(target)}, {task.upper()}", _header("Method", comparisons), rows)


def _lead(task: str, target: float, comparisons: Sequence[Comparison]) -> Table:
    rows = tuple(
        (
            Entry(method, number=False),
            *(difference(c.lead[method], c.metric) for c in comparisons),
        )
        for method in dict.fromkeys(name for c in comparisons for name in c.lead)
    )
    return Table(
        f"HSA minus the others {_at(target)}, {task.upper()}", _header("Minus", comparisons), rows
    )


def _areas(task: str, summary: pd.DataFrame, metrics: Sequence[Metric]) -> Table:
    found = [(metric, a) for metric in metrics if (a := areas(summary, task, metric))]
    rows = tuple(
        (
            Entry(method, number=False),
            *(Entry(number(area[method]), method == max(area, key=area.get)) for _, area in found),
        )
        for method in dict.fromkeys(name for _, area in found for name in area)
    )
    header = ("Method", *(f"{metric.title} \N{UPWARDS ARROW}" for metric, _ in found))
    return Table(f"Area under the front, {task.upper()}", header, rows)


def _header(first: str, comparisons: Sequence[Comparison]) -> tuple[str, ...]:
    return (first, *(heading(c.metric) for c in comparisons))


def _at(target: float) -> str:
    return f"at {100 * target:g} % of the runtime"
