"""Every method at equal runtime: a row for each method, a panel for each target."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from analysis.figures.base import DPI, PAGE, PALETTE, Drawing, Plot, Results, by_task, empty
from analysis.frame import untargeted
from analysis.metrics.base import Metric
from analysis.summary import BASELINE, select
from analysis.tables import MISSING, heading
from experiments.errors import UserError

ROW, MARGIN = 0.145, 0.6  # inches
OURS = "hsa"  # how the names of our methods begin
FM, OWN, OTHER = PALETTE[:3]
BESIDE = 1.16  # end of what is written beside a panel, in its widths
PLANNED = ["task", "label", "row", "method", "target"]
MEASURED = ["label", "mean", "low", "high", "runtime"]


@dataclass(frozen=True)
class Matched(Plot):
    """A picture for each metric and task, of the settings that have a target runtime.

    `metrics` are names, None the first of the run's; what is not available here has no picture.
    A setting whose measured share of the runtime is within `tolerance` of its target is solid.
    """

    metrics: Sequence[str] | None = None
    tolerance: float = 0.05

    def drawings(self, results: Results) -> Iterator[Drawing]:
        settings = planned(results)
        methods = dict(zip(settings["row"], settings["method"], strict=True))
        for metric in self._shown(results):
            for task in results.tasks:
                measured = select(results.summary, task, metric)[MEASURED]
                mine = settings[settings["task"] == task].merge(measured, "left", on="label")
                name = by_task(results, f"matched_{metric.name}", task)
                draw = partial(matched, mine, metric, methods, self.tolerance)
                yield Drawing(name, self._caption(mine, metric, task), draw)

    def _shown(self, results: Results) -> Sequence[Metric]:
        if self.metrics is None:
            return results.metrics[:1]
        choices = [part.name for metric in results.configured for part in metric.parts()]
        if unknown := sorted(set(self.metrics) - set(choices)):
            raise UserError(f"figure.matched.metrics={unknown}: choose {', '.join(choices)}")
        return [metric for metric in results.metrics if metric.name in self.metrics]

    def _caption(self, settings: pd.DataFrame, metric: Metric, task: str) -> str:
        targets = descending(settings)
        if not targets:
            return "No setting has a target runtime."
        return (
            f"{metric.title}, {task.upper()}, at equal runtime; right is better, each panel has "
            "its own scale. Mean and 95 % bootstrap interval over prompts; line and band: flow "
            "matching in fewer steps. Beside a panel the measured share of the reference's "
            f"runtime; the point is hollow where it is more than {100 * self.tolerance:g} points "
            f"from the target. {MISSING}: no setting of the method is known that meets the target. "
            f"Rows are in the order of their means at {_percent(middle(targets))}, those without "
            "one in that at the other targets."
        )


def planned(results: Results) -> pd.DataFrame:
    """The settings that have a target, with the row that each stands in."""
    first = (cells[0] for cells in results.plan.by_setting().values())
    rows = [
        (
            cell.task,
            cell.label,
            untargeted(cell.label, target),
            cell.inputs["method"]["name"],
            target,
        )
        for cell in first
        if (target := cell.config.target) is not None
    ]
    return pd.DataFrame(rows, columns=PLANNED)


def descending(settings: pd.DataFrame) -> list[float]:
    """The targets, the slowest first."""
    return sorted(settings["target"].unique(), reverse=True)


def middle(targets: Sequence[float]) -> float:
    return targets[len(targets) // 2]


def ordered(settings: pd.DataFrame, metric: Metric, rows: Sequence[str]) -> list[str]:
    """The best mean at the middle target first; without one, at the slowest other target."""
    targets = descending(settings)
    means = settings.pivot(index="row", columns="target", values="mean").reindex(rows)
    keys = sorted(targets, key=lambda target: target != middle(targets))
    return list(means.sort_values(keys, ascending=not metric.higher_is_better).index)


def matched(
    settings: pd.DataFrame, metric: Metric, methods: Mapping[str, str], tolerance: float
) -> Figure:
    """Settings of one task, with the columns `PLANNED` and `MEASURED`.

    Args:
        methods: every row that there is to be and the name of its method.
    """
    if settings["mean"].isna().all():
        return empty("no setting with a target runtime has a score")
    targets, names = descending(settings), ordered(settings, metric, list(methods))
    figure = Figure((PAGE, ROW * len(names) + MARGIN), layout="constrained", dpi=DPI)
    axes = figure.subplots(1, len(targets), sharey=True, squeeze=False)[0]
    for ax, target in zip(axes, targets, strict=True):
        ax.set_title(f"{_percent(target)} of the runtime", loc="left", pad=9)
        at_target = settings[settings["target"] == target].set_index("row")
        _draw_panel(ax, at_target, metric, names, tolerance)
    axes[0].set_yticks(range(len(names)), names)
    axes[0].set_ylim(len(names) - 0.5, -0.5)
    for tick, name in zip(axes[0].get_yticklabels(), names, strict=True):
        if methods[name].startswith(OURS):
            tick.set(color=OWN, weight="bold")
    return figure


def _draw_panel(
    ax: Axes, settings: pd.DataFrame, metric: Metric, names: Sequence[str], tolerance: float
) -> None:
    beside = {"transform": ax.get_yaxis_transform(), "fontsize": 6, "ha": "right", "va": "center"}
    ax.text(BESIDE, -0.75, "measured", **beside)
    for _, fm in settings[settings["method"] == BASELINE].iterrows():
        ax.axvline(fm["mean"], color=FM, lw=0.6, zorder=1)
        if np.isfinite(fm["low"]):
            ax.axvspan(fm["low"], fm["high"], color=FM, alpha=0.08, lw=0, zorder=0)
    for y, name in enumerate(names):
        if name not in settings.index:
            ax.text(BESIDE, y, MISSING, color="#888888", **beside)
            continue
        row = settings.loc[name]
        colour, own = _colour(row["method"]), row["method"].startswith(OURS)
        if np.isfinite(row["low"]):
            ax.hlines(y, row["low"], row["high"], color=colour, lw=1.6 if own else 1, zorder=2)
        missed = abs(row["runtime"] - row["target"]) > tolerance
        face = "white" if missed else colour
        ax.plot(row["mean"], y, "o", color=colour, mfc=face, ms=4 if own else 3, mew=0.8, zorder=3)
        if np.isfinite(row["runtime"]):
            ax.text(BESIDE, y, _percent(row["runtime"]), color=colour, **beside)
    if not metric.higher_is_better:
        ax.invert_xaxis()
    ax.set_xlabel(heading(metric))
    ax.locator_params(axis="x", nbins=5)
    ax.tick_params(axis="y", length=0)


def _colour(method: str) -> str:
    return OWN if method.startswith(OURS) else FM if method == BASELINE else OTHER


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %"
