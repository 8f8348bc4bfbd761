"""VBench's dimensions of every setting, a panel for each share of the runtime."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import cycle

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from analysis.figures.base import (
    DPI,
    MARKERS,
    PAGE,
    PALETTE,
    Drawing,
    Plot,
    Results,
    by_task,
    empty,
)
from analysis.metrics.vbench import VBench, scorecard
from analysis.metrics.vbench.dimensions import SUITES
from experiments.errors import UserError

SPREAD = 0.6  # of a dimension's place that its markers are spread over
PANEL = 1.25  # inches
FOOT = 1.15  # inches for the names of the dimensions
ABSENT = "#eeeeee"


@dataclass(frozen=True)
class VBenchProfile(Plot):
    """Every dimension as a percentage of a long flow-matching run.

    Attributes:
        baseline: label of the setting that counts as 100 %.
        shares: of the reference's runtime, a panel for each; settings stand in the nearest.
        tolerance: how far from a share a setting's cost may be; others are left out.
    """

    baseline: str = "FM T=100"
    shares: Sequence[float] = (0.25, 0.5, 0.75)
    tolerance: float = 0.1

    def drawings(self, results: Results) -> Iterator[Drawing]:
        for task in results.tasks:
            labels = list(results.settings(task))
            if self.baseline not in labels:
                raise UserError(
                    f"figure.vbench_profile.baseline={self.baseline!r}: choose {', '.join(labels)}"
                )
            name = by_task(results, "vbench_profile", task)
            lacking = _lacking(results.configured)
            if lacking:
                yield Drawing(name, f"No profile: {lacking}.", partial(empty, lacking))
                continue
            measure, cost = results.cost(task)
            profile = relative(self._values(results, task), self.baseline)
            panels = assigned(cost, self.shares, self.tolerance)
            methods = {
                label: cells[0].inputs["method"]["name"]
                for label, cells in results.settings(task).items()
            }
            caption = self._caption(profile, panels, measure, task)
            how = (profile, self.baseline, panels, methods, measure)
            yield Drawing(name, caption, partial(vbench_profile, *how))

    def _values(self, results: Results, task: str) -> pd.DataFrame:
        """Dimensions (rows) of every setting (columns), raw; NaN where it has no value."""
        (vbench,) = (metric for metric in results.configured if isinstance(metric, VBench))
        cards = scorecard.cards(results.plan, results.store, vbench)
        names = [name for names, _ in SUITES[task].values() for name in names]
        found = {card.label: card.values for card in cards if card.task == task}
        return pd.DataFrame(found, index=names, dtype=float)

    def _caption(
        self,
        profile: pd.DataFrame,
        panels: Mapping[float, Sequence[str]],
        measure: str,
        task: str,
    ) -> str:
        missing = absent(profile)
        shown = {label for labels in panels.values() for label in labels}
        left_out = [label for label in profile if label not in {*shown, self.baseline}]
        parts = [
            f"VBench's dimensions, {task.upper()}, as a percentage of {self.baseline}, of the "
            f"settings within {100 * self.tolerance:.0f} points of each share of the reference's "
            f"{measure}.",
            "The runtime is not measured for all of them." if measure != "runtime" else "",
            f"Near none: {', '.join(left_out)}." if left_out else "",
            f"Not scored, grey: {', '.join(missing)}.".replace("_", " ") if missing else "",
        ]
        return " ".join(filter(None, parts))


def relative(values: pd.DataFrame, baseline: str) -> pd.DataFrame:
    """Percent of the baseline's value; NaN where either is missing or the baseline's is 0."""
    return 100 * values.div(values[baseline].replace(0, np.nan), axis=0)


def assigned(
    cost: Mapping[str, float], shares: Sequence[float], tolerance: float
) -> dict[float, list[str]]:
    """Share -> the settings whose cost is nearest to it, and near enough."""
    panels: dict[float, list[str]] = {share: [] for share in shares}
    for label, own in cost.items():
        nearest = min(shares, key=lambda share: abs(share - own))
        if abs(nearest - own) <= tolerance:
            panels[nearest].append(label)
    return panels


def absent(profile: pd.DataFrame) -> list[str]:
    """The dimensions that no setting has."""
    return list(profile.index[profile.isna().all(axis=1)])


def vbench_profile(
    profile: pd.DataFrame,
    baseline: str,
    panels: Mapping[float, Sequence[str]],
    methods: Mapping[str, str],
    measure: str,
) -> Figure:
    """Percent (dimensions x settings), a panel for each share; columns without a value are grey.

    A colour stands for a method, a marker for a setting within its panel.
    """
    colours = dict(zip(dict.fromkeys(methods.values()), cycle(PALETTE), strict=False))
    figure = Figure((PAGE, PANEL * len(panels) + FOOT), layout="constrained", dpi=DPI)
    axes = figure.subplots(len(panels), 1, sharex=True, sharey=True, squeeze=False)[:, 0]
    places = np.arange(len(profile))
    missing = np.isin(profile.index, absent(profile))
    for ax, (share, labels) in zip(axes, panels.items(), strict=True):
        ax.axhline(100, color="#888888", lw=0.8, zorder=1)
        for place in places[missing]:
            ax.axvspan(place - 0.5, place + 0.5, color=ABSENT, lw=0, zorder=0)
            ax.text(
                place,
                0.5,
                "not scored",
                color="#888888",
                fontsize=6,
                rotation=90,
                ha="center",
                va="center",
                transform=ax.get_xaxis_transform(),
            )
        offsets = SPREAD * ((np.arange(len(labels)) + 0.5) / max(len(labels), 1) - 0.5)
        for i, (label, offset) in enumerate(zip(labels, offsets, strict=True)):
            look = {"color": colours[methods[label]], "marker": MARKERS[i % len(MARKERS)]}
            x, y = places + offset, profile[label].to_numpy()
            ax.vlines(x, 100, y, look["color"], lw=0.8, zorder=2)
            ax.plot(x, y, linestyle="", mew=0, label=label, zorder=3, **look)
        ax.set_title(f"{100 * share:.0f} % of the {measure}", loc="left")
        ax.grid(axis="x", visible=False)
        ax.margins(y=0.15)
        if labels:
            ax.legend(loc="upper left", bbox_to_anchor=(1, 1), borderaxespad=0)
    axes[len(axes) // 2].set_ylabel(f"Percent of {baseline}")
    names = [name.replace("_", " ") for name in profile.index]
    axes[-1].set_xticks(places, names, rotation=40, ha="right", rotation_mode="anchor")
    for tick, gone in zip(axes[-1].get_xticklabels(), missing, strict=True):
        tick.set_color("#999999" if gone else "black")
    axes[-1].set_xlim(-0.5, len(profile) - 0.5)
    return figure


def _lacking(configured: Sequence[object]) -> str | None:
    """Why there can be no profile."""
    vbench = next((metric for metric in configured if isinstance(metric, VBench)), None)
    if vbench is None:
        return "vbench is not among the metrics"
    if vbench.unavailable():
        return "VBench can score nothing here, `hsa-bench doctor` says what it lacks"
    return None
