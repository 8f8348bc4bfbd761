"""Methods against each other at fixed shares of the reference runtime: `comparison.md`.

A method is all of its settings; what it reaches at a runtime is read off its own front
(`stats.at_runtime`), per video, so that differences are paired. No setting takes exactly 25 % of
the runtime: the methods are compared at the measured runtime of the HSA setting closest to it.
Where settings were matched to target runtimes, they alone are compared, and a method is what their
labels say before the target: two variants of one method stay two.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from analysis.frame import by_prompt, per_video, untargeted
from analysis.metrics.base import Metric
from analysis.pareto import area
from analysis.stats import HELD, Estimate, at_runtime, bootstrap, paired
from analysis.summary import select
from analysis.tables import (
    MISSING,
    Entry,
    Table,
    difference,
    heading,
    interval,
    leaders,
    number,
    percent,
    placed,
)

SUBJECT = "hsa"
TARGETS = (0.25, 0.5)
NAMED = 3  # of methods that are equally good; more are counted
TOLERANCE = 0.1  # an HSA setting further than this from a target does not stand for it
NOTE = (
    "Every method is read off its own settings, per video, at the measured runtime of the HSA "
    f"setting closest to each target; one that is {100 * HELD:g} points off at most counts as "
    f"there. {MISSING}: its settings do not reach that runtime."
)
AREA_NOTE = (
    "Area between the staircase of the best mean reachable for a share of the reference's runtime "
    "and the mean of the worst setting in the table, over shares from 0 to 1, in the metric's "
    "unit: more is better whatever the metric's direction; 0 for a method that has nothing but "
    "the worst setting. It compares methods within one table only."
)


@dataclass(frozen=True)
class Comparison:
    """One task and metric at one runtime: what each method reaches, and HSA minus it."""

    task: str
    metric: Metric
    target: float  # share of the reference runtime
    runtime: float  # the measured one near it, where the methods are compared
    reached: dict[str, Estimate]
    lead: dict[str, dict[str, Estimate]]  # HSA's curves -> the others

    @property
    def best(self) -> list[str]:
        """The methods with the best mean; none where no method reaches the runtime."""
        top = leaders((e.mean for e in self.reached.values()), self.metric.higher_is_better)[:1]
        return [name for name, e in self.reached.items() if e.mean in top]


def compare(
    frame: pd.DataFrame,
    summary: pd.DataFrame,
    metrics: Sequence[Metric],
    seed: int = 0,
) -> list[Comparison]:
    """Every task, metric and target runtime, from `frame.tidy` and `summary.summarise`.

    Target runtimes are those that the settings were matched to, or else `TARGETS`.
    """
    quality = per_video(frame)
    targets = sorted(frame["target"].dropna().unique().tolist()) or TARGETS
    return [
        _compare(task, metric, target, _measured_near(summary, task, target), methods, seed)
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
            subjects = dict.fromkeys(subject for c in at for subject in c.lead)
            made += [_reached(at), *(_lead(at, subject) for subject in subjects)]
        made.append(_areas(task, summary, metrics))
    return [table for table in made if table.rows]


def areas(summary: pd.DataFrame, task: str, metric: Metric) -> dict[str, float]:
    """Area under each method's front up to the reference runtime, above the worst setting's mean.

    In units of quality: 0 for a method that only has the worst setting.
    """
    view = select(summary, task, metric)
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
        for method, lines in _by_curve(view)
    }


@dataclass(frozen=True)
class Curve:
    """All settings of a `method`: runtime (K,), and quality of each video (V, K) as `per_video`."""

    method: str
    runtime: np.ndarray
    quality: pd.DataFrame

    def at(self, runtime: float, higher_is_better: bool) -> np.ndarray:
        """Quality there, (prompts, seeds)."""
        values = self.quality.to_numpy().T
        there = at_runtime(self.runtime, values, runtime, higher_is_better, HELD)
        return by_prompt(there, self.quality)


def _curves(
    quality: pd.DataFrame, summary: pd.DataFrame, task: str, metric: Metric
) -> Iterator[tuple[str, Curve]]:
    view = select(summary, task, metric)
    for name, lines in _by_curve(view):
        labels = [(task, metric.name, label) for label in lines["label"]]
        method = lines["method"].iloc[0]
        yield name, Curve(method, lines["runtime"].to_numpy(), quality.loc[labels])


def _by_curve(view: pd.DataFrame) -> Iterator[tuple[str, pd.DataFrame]]:
    """The rows of one task and metric by the method that they are settings of."""
    matched = view.dropna(subset="target")
    if matched.empty:
        yield from view.groupby("method", sort=False)
        return
    names = matched.apply(lambda row: untargeted(row["label"], row["target"]), axis=1)
    yield from matched.groupby(names, sort=False)


def _measured_near(summary: pd.DataFrame, task: str, target: float) -> float:
    """Runtime of the HSA setting closest to the target, or the target if none is near."""
    mine = summary[(summary["task"] == task) & (summary["method"] == SUBJECT)]
    runtimes = mine["runtime"].dropna().to_numpy()
    if not len(runtimes):
        return target
    closest = float(runtimes[np.abs(runtimes - target).argmin()])
    return closest if abs(closest - target) <= TOLERANCE else target


def _compare(
    task: str,
    metric: Metric,
    target: float,
    runtime: float,
    methods: dict[str, Curve],
    seed: int,
) -> Comparison:
    values = {name: curve.at(runtime, metric.higher_is_better) for name, curve in methods.items()}
    return Comparison(
        task,
        metric,
        target,
        runtime,
        reached={name: bootstrap(v, seed) for name, v in values.items()},
        lead={
            subject: {
                name: paired(values[subject], v, seed)
                for name, v in values.items()
                if name != subject
            }
            for subject, curve in methods.items()
            if curve.method == SUBJECT
        },
    )


def _winners(task: str, comparisons: Sequence[Comparison]) -> Table:
    places = list(dict.fromkeys(map(_at, comparisons)))
    best = {(c.metric, _at(c)): _named(c.best) for c in comparisons}
    rows = tuple(
        (
            Entry(heading(metric), number=False),
            *(Entry(best[metric, place], number=False) for place in places),
        )
        for metric in dict.fromkeys(c.metric for c in comparisons)
    )
    return Table(f"Best method, {task.upper()}", ("Metric", *places), rows, NOTE)


def _named(best: Sequence[str]) -> str:
    return ", ".join(best) or MISSING if len(best) <= NAMED else f"{len(best)} alike"


def _reached(comparisons: Sequence[Comparison]) -> Table:
    columns = {
        heading(c.metric): {
            method: placed(interval(estimate), estimate.mean, top)
            for method, estimate in c.reached.items()
        }
        for c in comparisons
        for top in [leaders((e.mean for e in c.reached.values()), c.metric.higher_is_better)]
    }
    first = comparisons[0]
    return _by_method(f"Reached {_at(first)}, {first.task.upper()}", "Method", columns)


def _lead(comparisons: Sequence[Comparison], subject: str) -> Table:
    columns = {
        heading(c.metric): {
            method: difference(estimate, c.metric)
            for method, estimate in c.lead.get(subject, {}).items()
        }
        for c in comparisons
    }
    first = comparisons[0]
    name = "HSA" if subject == SUBJECT else subject
    title = f"{name} minus the others {_at(first)}, {first.task.upper()}"
    return _by_method(title, "Minus", columns)


def _areas(task: str, summary: pd.DataFrame, metrics: Sequence[Metric]) -> Table:
    columns = {}
    for metric in metrics:
        found = areas(summary, task, metric)
        top = leaders(found.values())
        columns[f"{metric.title} \N{UPWARDS ARROW}"] = {
            method: placed(number(value), value, top) for method, value in found.items()
        }
    return _by_method(f"Area under the front, {task.upper()}", "Method", columns, AREA_NOTE)


def _by_method(
    title: str, first: str, columns: Mapping[str, Mapping[str, Entry]], note: str = ""
) -> Table:
    """A row for every method that any column has."""
    methods = dict.fromkeys(method for column in columns.values() for method in column)
    rows = tuple(
        (
            Entry(method, number=False),
            *(column.get(method, Entry(MISSING)) for column in columns.values()),
        )
        for method in methods
    )
    return Table(title, (first, *columns), rows, note)


def _at(comparison: Comparison) -> str:
    return f"at {percent(comparison.runtime)} of the runtime"
