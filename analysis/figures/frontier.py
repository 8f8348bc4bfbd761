"""Quality against measured runtime, with the front of settings that none beats in both."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle, pairwise

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from analysis.figures.base import (
    FADED,
    MARKERS,
    PALETTE,
    Drawing,
    Look,
    Plot,
    Results,
    empty,
    freeze,
    grid,
    legend,
    orient,
)
from analysis.labels import around, place
from analysis.metrics.base import Metric
from analysis.pareto import front
from analysis.summary import select

CAPTION = (
    "Quality against measured runtime; up is better in every panel. Settings that none beats in "
    "both are named, the others faded. Bars: 95 % bootstrap intervals over prompts."
)


@dataclass(frozen=True)
class Frontier(Plot):
    """A panel for each metric and task."""

    def drawings(self, results: Results) -> Iterator[Drawing]:
        yield Drawing("frontier", CAPTION, lambda: frontier(results.summary, results.metrics))


def frontier(summary: pd.DataFrame, metrics: Sequence[Metric]) -> Figure:
    """Quality against measured runtime, a panel for each metric and task; up is always better.

    Settings that none beats in both are named; the others are faded. A line joins the settings
    of a method that none of its own beats. Bars are 95 % intervals over prompts.
    """
    panels = [
        (metric, task, view)
        for metric in metrics
        for task in summary["task"].unique()
        for view in [_measured(summary, metric, task)]
        if len(view)
    ]
    if not panels:
        return empty("no setting has both a score and a measured runtime")
    looks = _looks(summary)
    figure, axes = grid(len(panels), columns=2)
    for ax, (metric, task, view) in zip(axes, panels, strict=True):
        _draw_panel(ax, view, metric, looks)
        ax.set_title(f"{metric.title}, {task.upper()}")
    right = 1.05 * max(_cost(view)[1].max() for *_, view in panels)
    for ax in axes:
        ax.set_xlim(0, right)
    shown = {method for *_, view in panels for method in view["method"]}
    legend(figure, {method: look for method, look in looks.items() if method in shown})
    freeze(figure)
    for ax, (metric, _, view) in zip(axes, panels, strict=True):
        _name_front(ax, view, metric, looks)
    return figure


def _measured(summary: pd.DataFrame, metric: Metric, task: str) -> pd.DataFrame:
    view = select(summary, task, metric)
    return view.dropna(subset=["mean", "runtime_s"]).reset_index(drop=True)


def _looks(summary: pd.DataFrame) -> dict[str, Look]:
    """Colour and marker of each method, the same in all panels."""
    methods = summary["method"].unique()
    return dict(zip(methods, map(Look, cycle(PALETTE), cycle(MARKERS)), strict=False))


def _cost(view: pd.DataFrame) -> tuple[str, pd.Series]:
    """Axis label and values: percent of the reference's runtime, or seconds if that is unknown."""
    if view["runtime"].notna().all():
        return "Runtime (% of the reference)", 100 * view["runtime"]
    return "Runtime (s)", view["runtime_s"]


def _draw_panel(ax: Axes, view: pd.DataFrame, metric: Metric, looks: Mapping[str, Look]) -> None:
    name, cost = _cost(view)
    best = front(cost.to_numpy(), view["mean"].to_numpy(), metric.higher_is_better)
    for method, rows in view.groupby("method", sort=False):
        look, x = looks[method], cost[rows.index].to_numpy()
        own = front(x, rows["mean"].to_numpy(), metric.higher_is_better)
        order = np.flatnonzero(own)[np.argsort(x[own], kind="stable")]
        ax.plot(x[order], rows["mean"].to_numpy()[order], color=look.colour, alpha=0.6, zorder=2)
        for i, (_, row) in enumerate(rows.iterrows()):
            alpha = 1.0 if best[row.name] else FADED
            if np.isfinite(row["low"]):
                ax.vlines(x[i], row["low"], row["high"], look.colour, alpha=alpha, lw=0.8, zorder=3)
            ax.plot(x[i], row["mean"], look.marker, color=look.colour, alpha=alpha, mew=0, zorder=4)
    ax.set_xlabel(name)
    ax.margins(y=0.12)
    orient(ax, metric)


def _name_front(ax: Axes, view: pd.DataFrame, metric: Metric, looks: Mapping[str, Look]) -> None:
    """Names the settings on the panel's front; a hairline joins a name that had to move away."""
    _, cost = _cost(view)
    best = front(cost.to_numpy(), view["mean"].to_numpy(), metric.higher_is_better)
    scale = ax.figure.dpi / 72
    pixels = ax.transData.transform(np.column_stack([cost, view["mean"]]))
    looks_of = [looks[method] for method in view.loc[best, "method"]]
    paper = {"facecolor": "white", "alpha": 0.7, "linewidth": 0, "pad": 0.2}
    font = {"fontsize": 6, "transform": ax.transAxes, "zorder": 5, "bbox": paper}
    texts = [
        ax.text(0, 0, label, color=look.colour, **font)
        for label, look in zip(view.loc[best, "label"], looks_of, strict=True)
    ]
    sizes = np.array([text.get_window_extent().size for text in texts])
    boxes = place(
        pixels[best], sizes, np.array(ax.get_window_extent().extents), _drawn(ax, scale), scale
    )
    # axes coordinates, so that output formats of different resolution agree
    to_axes = ax.transAxes.inverted().transform
    for text, box, point, look in zip(texts, boxes, pixels[best], looks_of, strict=True):
        text.set_position(to_axes(box[:2]))
        end = np.clip(point, box[:2], box[2:])
        if np.hypot(*(end - point)) > 8 * scale:
            x, y = zip(to_axes(point), to_axes(end), strict=True)
            ax.plot(x, y, color=look.colour, lw=0.4, alpha=0.6, transform=ax.transAxes, zorder=1)


def _drawn(ax: Axes, scale: float) -> np.ndarray:
    """Pixels that a panel's markers, bars and lines cover, as boxes (M, 4)."""
    boxes = [np.empty((0, 4))]
    for line in ax.lines:
        points = ax.transData.transform(line.get_xydata())
        if len(points) == 1:
            boxes.append(around(points, 0.5 * line.get_markersize() * scale))
        for start, end in pairwise(points):
            count = max(2, round(np.hypot(*(end - start)) / (4 * scale)))
            boxes.append(around(np.linspace(start, end, count), scale))
    for bars in ax.collections:
        for segment in bars.get_segments():
            ends = np.sort(ax.transData.transform(segment), axis=0)
            boxes.append(np.concatenate([ends[0] - scale, ends[1] + scale])[None])
    return np.concatenate(boxes)
