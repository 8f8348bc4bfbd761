"""Quality and runtime against the one parameter of a method that a grid varies."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from analysis.figures.base import (
    MARKERS,
    PALETTE,
    Drawing,
    Look,
    Plot,
    Results,
    freeze,
    grid,
    legend,
    orient,
)
from analysis.metrics.base import Metric


@dataclass(frozen=True)
class Sweep(Plot):
    """A picture for each method that is swept; none where none is."""

    def drawings(self, results: Results) -> Iterator[Drawing]:
        for method, rows in sweeps(results.summary).items():
            caption = f"Quality and runtime of {method} against {rows['parameter'].iloc[0]}."
            yield Drawing(f"sweep_{method}", caption, partial(sweep, rows, results.metrics))


def sweeps(summary: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """Methods of which one numeric parameter takes three values or more and no other changes.

    Returns:
        method -> its rows with the columns `parameter` (name) and `x` (value; of a list its
        first element) added, sorted by x.
    """
    found = {}
    for method, rows in summary.groupby("method", sort=False):
        params = pd.DataFrame([json.loads(text) for text in rows["params"]], index=rows.index)
        varying = [name for name in params if params[name].map(json.dumps).nunique() > 1]
        if len(varying) != 1:
            continue
        x = params[varying[0]].map(_scalar)
        if x.notna().all() and x.nunique() >= 3:
            found[method] = rows.assign(parameter=varying[0], x=x.astype(float)).sort_values("x")
    return found


def sweep(rows: pd.DataFrame, metrics: Sequence[Metric]) -> Figure:
    """Each metric, then runtime, against the swept parameter; a line for every task."""
    shown = [m for m in metrics if rows.loc[rows["metric"] == m.name, "mean"].notna().any()]
    figure, axes = grid(len(shown) + 1, columns=2)
    tasks = dict(zip(rows["task"].unique(), map(Look, PALETTE[1:], MARKERS), strict=False))
    for task, look in tasks.items():
        mine = rows[rows["task"] == task]
        for ax, metric in zip(axes, shown, strict=False):
            _draw_line(ax, mine[mine["metric"] == metric.name], ("mean", "low", "high"), look)
        once = mine.drop_duplicates("label")
        _draw_line(axes[-1], once, ("runtime_s", "runtime_low", "runtime_high"), look)
    for ax, metric in zip(axes, shown, strict=False):
        orient(ax, metric)
    axes[-1].set_ylabel("Runtime (s)")
    axes[-1].set_ylim(bottom=0)
    for ax in axes:
        ax.locator_params(axis="x", nbins=6)
        ax.set_xlabel(f"{rows['method'].iloc[0]} {rows['parameter'].iloc[0]}")
    legend(figure, tasks)
    freeze(figure)
    return figure


def _draw_line(ax: Axes, rows: pd.DataFrame, columns: tuple[str, str, str], look: Look) -> None:
    rows = rows.dropna(subset=[columns[0]])
    middle, low, high = (rows[column] for column in columns)
    ax.plot(rows["x"], middle, f"{look.marker}-", color=look.colour)
    ax.fill_between(rows["x"], low, high, color=look.colour, alpha=0.15, lw=0)


def _scalar(value: object) -> float | None:
    """A number, or the first of a list of numbers."""
    first = value[0] if isinstance(value, list) and value else value
    is_number = isinstance(first, int | float) and not isinstance(first, bool)
    return float(first) if is_number else None
