"""Settings minus the one that each is held against, per video: what an ablation gains or costs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from analysis.figures.base import DPI, PAGE, PALETTE, Drawing, Plot, Results, by_task, empty
from analysis.frame import by_prompt, per_video
from analysis.metrics.base import Metric
from analysis.stats import Estimate, paired
from analysis.tables import difference, heading
from experiments.errors import UserError

ROW, MARGIN = 0.17, 0.75  # inches
Rows = dict[str, dict[str, Estimate]]  # what is subtracted -> setting -> difference


@dataclass(frozen=True)
class Differences(Plot):
    """A picture for each task, with a panel for each metric; parts of metrics have none.

    `against` has the label of the setting to subtract for the first words of other labels; of
    several that fit the longest counts. What fits none is left out.
    """

    against: Mapping[str, str] = field(default_factory=dict)

    def drawings(self, results: Results) -> Iterator[Drawing]:
        caption = (
            "Each setting minus the one above it that has no bar, per video; right is better. Mean "
            "and 95 % bootstrap interval over prompts."
        )
        for task in results.tasks:
            labels = list(results.settings(task))
            if unknown := sorted(set(self.against.values()) - set(labels)):
                choices = ", ".join(labels)
                raise UserError(f"figure.differences.against={unknown}: choose {choices}")
            frame = results.frame[results.frame["task"] == task]
            metrics = [metric for metric in results.metrics if "." not in metric.name]
            found = {metric: differences(frame, metric, self.against) for metric in metrics}
            draw = partial(draw_differences, {m: rows for m, rows in found.items() if rows})
            yield Drawing(by_task(results, "differences", task), caption, draw)


def differences(frame: pd.DataFrame, metric: Metric, against: Mapping[str, str]) -> Rows:
    """Paired differences in one metric, from the rows of one task of `frame.tidy`."""
    quality = per_video(frame[frame["metric"] == metric.name].dropna(subset="value"))
    values = {label: by_prompt(row.to_numpy(), quality) for (*_, label), row in quality.iterrows()}
    rows: Rows = {base: {} for base in against.values() if base in values}
    for label in values:
        words = max((w for w in against if label.startswith(w)), key=len, default=None)
        base = against.get(words)
        if base in values and label != base:
            rows[base][label] = paired(values[label], values[base])
    return {base: minus for base, minus in rows.items() if minus}


def draw_differences(found: Mapping[Metric, Rows]) -> Figure:
    if not found:
        return empty("no two settings to compare have videos of the same prompt")
    each = (line for rows in found.values() for base in rows for line in (base, *rows[base]))
    names = list(dict.fromkeys(each))
    size = PAGE, ROW * len(names) + MARGIN
    figure = Figure(size, layout="constrained", dpi=DPI)
    axes = figure.subplots(1, len(found), sharey=True, squeeze=False)[0]
    for ax, (metric, rows) in zip(axes, found.items(), strict=True):
        _draw_panel(ax, metric, rows, names)
    axes[0].set_yticks(range(len(names)), names)
    axes[0].set_ylim(len(names) - 0.5, -0.5)
    return figure


def _draw_panel(ax: Axes, metric: Metric, rows: Rows, names: Sequence[str]) -> None:
    ax.axvline(0, color="black", lw=0.6)
    for colour, minus in zip(PALETTE[1:], rows.values(), strict=False):
        for name, estimate in minus.items():
            y = names.index(name)
            if np.isfinite(estimate.low):
                ax.hlines(y, estimate.low, estimate.high, color=colour)
            ax.plot(estimate.mean, y, "o", color=colour, ms=3, mew=0)
            text = difference(estimate, metric).text
            ax.text(1.02, y, text, transform=ax.get_yaxis_transform(), va="center", fontsize=6)
    if not metric.higher_is_better:
        ax.invert_xaxis()
    ax.set_xlabel(f"\N{INCREMENT} {heading(metric)}")
    ax.grid(axis="y", visible=False)
