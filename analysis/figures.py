"""Figures for a two-column paper, the same bytes from the same data in every process."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle, pairwise
from pathlib import Path

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from analysis.labels import around, place
from analysis.metrics.base import Metric
from analysis.pareto import front
from analysis.summary import select
from analysis.tables import heading

WIDTH = 7.0  # inches: both columns of a page
PANEL_HEIGHT = 2.35
DPI = 200
# Okabe and Ito (2008): told apart with every common colour vision; the yellow is too pale for lines
PALETTE = ("#000000", "#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
MARKERS = "os^Dvp*X"
FADED = 0.3
STYLE = {
    "font.size": 7.5,
    "axes.titlesize": 8,
    "axes.labelsize": 8,
    "axes.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e6e6e6",
    "grid.linewidth": 0.5,
    "axes.axisbelow": True,
    "legend.frameon": False,
    "lines.linewidth": 1.0,
    "lines.markersize": 4.5,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "svg.hashsalt": "hsa-bench",
    "svg.fonttype": "path",
}


@dataclass(frozen=True)
class Look:
    colour: str
    marker: str


def save(draw: Callable[[], Figure], path: Path) -> list[Path]:
    """`draw()` in the project's style as path.png and path.svg."""
    with matplotlib.rc_context(STYLE):
        figure = draw()
        figure.savefig(path.with_suffix(".png"), dpi=DPI)
        figure.savefig(path.with_suffix(".svg"), metadata={"Date": None})
    return [path.with_suffix(".png"), path.with_suffix(".svg")]


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
        return _empty("no setting has both a score and a measured runtime")
    looks = _looks(summary)
    figure, axes = _grid(len(panels), columns=2)
    for ax, (metric, task, view) in zip(axes, panels, strict=True):
        _draw_panel(ax, view, metric, looks)
        ax.set_title(f"{metric.title}, {task.upper()}")
    right = 1.05 * max(_cost(view)[1].max() for *_, view in panels)
    for ax in axes:
        ax.set_xlim(0, right)
    _legend(figure, looks)
    _freeze(figure)
    for ax, (metric, _, view) in zip(axes, panels, strict=True):
        _name_front(ax, view, metric, looks)
    return figure


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
    figure, axes = _grid(len(shown) + 1, columns=2)
    tasks = dict(zip(rows["task"].unique(), map(Look, PALETTE[1:], MARKERS), strict=False))
    for task, look in tasks.items():
        mine = rows[rows["task"] == task]
        for ax, metric in zip(axes, shown, strict=False):
            _draw_line(ax, mine[mine["metric"] == metric.name], ("mean", "low", "high"), look)
        once = mine.drop_duplicates("label")
        _draw_line(axes[-1], once, ("runtime_s", "runtime_low", "runtime_high"), look)
    for ax, metric in zip(axes, shown, strict=False):
        _orient(ax, metric)
    axes[-1].set_ylabel("Runtime (s)")
    axes[-1].set_ylim(bottom=0)
    for ax in axes:
        ax.locator_params(axis="x", nbins=6)
        ax.set_xlabel(f"{rows['method'].iloc[0]} {rows['parameter'].iloc[0]}")
    _legend(figure, tasks)
    _freeze(figure)
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
    _orient(ax, metric)


def _orient(ax: Axes, metric: Metric) -> None:
    ax.set_ylabel(heading(metric))
    if not metric.higher_is_better:
        ax.invert_yaxis()


def _draw_line(ax: Axes, rows: pd.DataFrame, columns: tuple[str, str, str], look: Look) -> None:
    rows = rows.dropna(subset=[columns[0]])
    middle, low, high = (rows[column] for column in columns)
    ax.plot(rows["x"], middle, f"{look.marker}-", color=look.colour)
    ax.fill_between(rows["x"], low, high, color=look.colour, alpha=0.15, lw=0)


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


def _grid(count: int, columns: int) -> tuple[Figure, list[Axes]]:
    columns = min(columns, count)
    rows = -(-count // columns)
    size = (WIDTH * columns / 2, PANEL_HEIGHT * rows + 0.35)
    figure = Figure(size, layout="constrained", dpi=DPI)
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for ax in axes[count:]:
        ax.set_axis_off()
    return figure, list(axes[:count])


def _legend(figure: Figure, looks: Mapping[str, Look]) -> None:
    handles = [
        Line2D([], [], color=look.colour, marker=look.marker, mew=0, label=name.replace("_", " "))
        for name, look in looks.items()
    ]
    columns = min(len(handles), int(figure.get_figwidth() / 1.15))
    figure.legend(handles=handles, loc="outside upper center", ncols=columns)


def _freeze(figure: Figure) -> None:
    """Solve the layout once: labels know their pixels, and saving twice gives one picture."""
    figure.draw_without_rendering()
    figure.set_layout_engine("none")


def _empty(message: str) -> Figure:
    figure = Figure((WIDTH / 2, PANEL_HEIGHT))
    figure.text(0.5, 0.5, message, ha="center", va="center", wrap=True)
    return figure


def _scalar(value: object) -> float | None:
    """A number, or the first of a list of numbers."""
    first = value[0] if isinstance(value, list) and value else value
    is_number = isinstance(first, int | float) and not isinstance(first, bool)
    return float(first) if is_number else None
