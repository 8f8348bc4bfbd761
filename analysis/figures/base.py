"""What every figure is, and the style they share: the same bytes from the same data.

A figure is drawn at the width that it has in print, `COLUMN` or `PAGE`, so that its letters are
printed at the size given here.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from analysis.metrics.base import Metric
from analysis.tables import heading

if TYPE_CHECKING:
    from experiments.plan import Cell, Plan
    from experiments.store import Sample, Store

COLUMN, PAGE = 3.25, 6.75  # inches: one column of two, and both
PANEL_HEIGHT = 2.35
DPI = 200
# Okabe and Ito (2008): told apart with every common colour vision; the yellow is too pale for lines
PALETTE = ("#000000", "#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
MARKERS = "os^Dvp*X"
COLOURS = "viridis"  # of maps: the same order in every colour vision, and in grey
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


@dataclass(frozen=True)
class Results:
    """What a run left, for figures to show.

    Attributes:
        configured: the metrics of the configuration; one may have several parts.
        metrics: the parts that are available here.
    """

    plan: Plan
    store: Store
    frame: pd.DataFrame
    summary: pd.DataFrame
    configured: Sequence[Metric]
    metrics: Sequence[Metric]

    @property
    def tasks(self) -> list[str]:
        return list(dict.fromkeys(cell.task for cell in self.plan.cells))

    def settings(self, task: str) -> dict[str, list[Cell]]:
        """Label -> its cells of a task, in the order of the plan."""
        groups = self.plan.by_setting().items()
        return {label: cells for (of, label), cells in groups if of == task}

    def sample(self, cell: Cell) -> Sample | None:
        return self.store.sample(cell.key) if self.store.has(cell.key) else None

    def recorded(self, name: str, task: str) -> list[np.ndarray]:
        """What the videos of a task recorded under a name, of those that did."""
        return [
            sample.arrays[name]
            for cells in self.settings(task).values()
            for cell in cells
            if (sample := self.sample(cell)) and name in sample.arrays
        ]

    def cost(self, task: str) -> tuple[str, dict[str, float]]:
        """What cost is measured in, and each setting's as a share of the reference's.

        It is the runtime. Where that is not measured for every setting, it is the forwards that
        their computed rows amount to, and the name says so.
        """
        view = self.summary[self.summary["task"] == task].drop_duplicates("label")
        view = view.set_index("label")
        if view["runtime"].notna().all():
            return "runtime", view["runtime"].to_dict()
        frame = self.frame[self.frame["task"] == task].drop_duplicates("key")
        forwards = frame["nfe"].map(lambda nfe: sum(nfe.values())).groupby(frame["label"]).mean()
        full = forwards[view.index[view["reference"]]].mean()
        return "forwards", (forwards / full).to_dict()


@dataclass(frozen=True)
class Drawing:
    """One picture: what its files are called, what stands below it, and how it is drawn."""

    name: str
    caption: str
    draw: Callable[[], Figure]


@dataclass(frozen=True)
class Plot(ABC):
    """A kind of figure; fields are its settings."""

    @abstractmethod
    def drawings(self, results: Results) -> Iterator[Drawing]:
        """The pictures that the results allow.

        Raises:
            ValueError: a setting that does not fit the run.
        """


def save(draw: Callable[[], Figure], path: Path, note: str | None = None) -> list[Path]:
    """`draw()` in the project's style as path.png and path.svg.

    Args:
        note: written into the picture's corner, for pictures that must not be shown without it.
    """
    with matplotlib.rc_context(STYLE):
        figure = draw()
        if note:
            figure.text(0.005, 0.005, note, fontsize=5, color="#888888")
        figure.savefig(path.with_suffix(".png"), dpi=DPI)
        figure.savefig(path.with_suffix(".svg"), metadata={"Date": None})
    return [path.with_suffix(".png"), path.with_suffix(".svg")]


def by_task(results: Results, name: str, task: str) -> str:
    """Name of a picture that there is of every task."""
    return name if len(results.tasks) == 1 else f"{name}_{task}"


def orient(ax: Axes, metric: Metric) -> None:
    ax.set_ylabel(heading(metric))
    if not metric.higher_is_better:
        ax.invert_yaxis()


def grid(count: int, columns: int) -> tuple[Figure, list[Axes]]:
    columns = min(columns, count)
    rows = -(-count // columns)
    size = (PAGE * columns / 2, PANEL_HEIGHT * rows + 0.35)
    figure = Figure(size, layout="constrained", dpi=DPI)
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for ax in axes[count:]:
        ax.set_axis_off()
    return figure, list(axes[:count])


def legend(figure: Figure, looks: Mapping[str, Look]) -> None:
    handles = [
        Line2D([], [], color=look.colour, marker=look.marker, mew=0, label=name.replace("_", " "))
        for name, look in looks.items()
    ]
    columns = min(len(handles), int(figure.get_figwidth() / 1.15))
    figure.legend(handles=handles, loc="outside upper center", ncols=columns)


def freeze(figure: Figure) -> None:
    """Solve the layout once: labels know their pixels, and saving twice gives one picture."""
    figure.draw_without_rendering()
    figure.set_layout_engine("none")


def empty(message: str) -> Figure:
    figure = Figure((PAGE / 2, PANEL_HEIGHT))
    figure.text(0.5, 0.5, message, ha="center", va="center", wrap=True)
    return figure
