"""What skipped steps cost: one cached Euler update, and many of them after one another."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial

import numpy as np
from matplotlib.figure import Figure

from analysis.figures.base import (
    DPI,
    MARKERS,
    PAGE,
    PALETTE,
    PANEL_HEIGHT,
    Drawing,
    Plot,
    Results,
    by_task,
    empty,
)

NAME = "euler_error"
METRIC = "latent_error"
Line = dict[int, float]  # steps of an update -> error


@dataclass(frozen=True)
class EulerErrors(Plot):
    """Left the error of one update by m steps over the steps on which it begins, of `shown`;
    right the errors of whole videos in which tokens run every m-th step, and the sum of their
    single updates' errors.

    The left panel and the sum come from the videos of method=euler_error; a line of the right one
    from the settings of two budgets that differ in the smaller budget alone.
    """

    shown: tuple[int, ...] = (2, 4, 8)

    def drawings(self, results: Results) -> Iterator[Drawing]:
        for task in results.tasks:
            recorded = results.recorded(NAME, task)
            caption = (
                "Left: distance between one Euler update by m steps with a cached velocity and the "
                "m steps of the full run, from the same latents. Right: such updates after one "
                "another, summed and as they add up in the video. Both as a share of the final "
                f"latents' norm; mean of {len(recorded)} videos, {task.upper()}."
            )
            draw = _nothing
            if recorded:
                local = np.mean(recorded, 0, dtype=np.float64)
                draw = partial(euler_errors, local, _accumulated(results, task), self.shown)
            yield Drawing(by_task(results, NAME, task), caption, draw)


def summed(local: np.ndarray) -> Line:
    """Of (M, T) errors of single updates: the sum over a run whose every m-th step is computed."""
    longest, steps = local.shape
    return {
        m: sum(local[min(m, steps - i) - 1, i] for i in range(0, steps, m))
        for m in range(1, longest + 1)
    }


def euler_errors(local: np.ndarray, accumulated: Mapping[str, Line], shown: tuple) -> Figure:
    """`local` is (M, T), NaN past the end; `accumulated` has a line for each name."""
    figure = Figure((PAGE, PANEL_HEIGHT), layout="constrained", dpi=DPI)
    left, right = figure.subplots(1, 2)
    steps = np.arange(1, local.shape[1] + 1)
    for m, colour, marker in zip(shown, PALETTE, MARKERS, strict=False):
        left.plot(steps, local[m - 1], color=colour, marker=marker, ms=2.5, label=f"m = {m}")
    left.set_xlabel("Step of the cached velocity")
    left.set_ylabel("Local error")
    lines = {"sum of local errors": summed(local), **accumulated}
    for (name, line), colour, marker in zip(lines.items(), PALETTE, MARKERS, strict=False):
        known = {m: error for m, error in sorted(line.items()) if error > 0}
        right.plot(known.keys(), known.values(), color=colour, marker=marker, ms=3.5, label=name)
    right.set_xlabel("Steps of one update, m")
    right.set_ylabel("Accumulated error")
    for ax in (left, right):
        ax.set_yscale("log")
        ax.legend(fontsize=6)
    return figure


def _accumulated(results: Results, task: str) -> dict[str, Line]:
    """Mean error of the final latents by share of tokens and context, over the stride."""
    frame = results.frame[(results.frame["task"] == task) & (results.frame["metric"] == METRIC)]
    means = frame.groupby("label")["value"].mean()
    lines: dict[str, Line] = {}
    for label, (cell, *_) in results.settings(task).items():
        budgets = getattr(cell.method, "budgets", ())
        if len(budgets) == 2 and cell.method.fractions and label in means:
            share = cell.method.fractions[-1]
            tokens = "all tokens" if share == 1 else f"{share:.0%} of tokens"
            context = getattr(cell.method, "context", "synchronised")
            name = tokens if share == 1 else f"{tokens}, {context} K/V"
            lines.setdefault(name, {})[budgets[0] // budgets[1]] = means[label]
    return lines


def _nothing() -> Figure:
    return empty("no video of method=euler_error is stored")
