"""How much Q, K and V of each block change from step to step (arXiv 2605.06892, figure 2)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from analysis.figures.base import (
    COLOURS,
    DPI,
    PAGE,
    Drawing,
    Plot,
    Results,
    by_task,
    empty,
)

NAME = "qkv_change"
PANELS = ("Query", "Key", "Value")
HEIGHT = 2.1


@dataclass(frozen=True)
class QKVChangeMaps(Plot):
    """A map for each of Q, K and V, blocks by steps, of the setting that recorded them."""

    def drawings(self, results: Results) -> Iterator[Drawing]:
        for task in results.tasks:
            recorded = results.recorded(NAME, task)
            caption = (
                "Relative L1 change of the queries, keys and values of each block's self-attention "
                "from one step to the next, conditional branch, mean over tokens and "
                f"{len(recorded)} videos, {task.upper()}. Grey: another expert took over."
            )
            draw = partial(qkv_change, np.mean(recorded, 0)) if recorded else _nothing
            yield Drawing(by_task(results, NAME, task), caption, draw)


def qkv_change(change: np.ndarray) -> Figure:
    """Maps of (3, L, T - 1) with one logarithmic scale; column i is the change to step i + 1."""
    figure = Figure((PAGE, HEIGHT), layout="constrained", dpi=DPI)
    axes = figure.subplots(1, 3, sharey=True)
    known = change[np.isfinite(change) & (change > 0)]
    norm = LogNorm(known.min(), known.max())
    blocks, steps = change.shape[1:]
    extent = (1.5, steps + 1.5, blocks + 0.5, 0.5)  # steps and blocks counted from 1
    for ax, title, values in zip(axes, PANELS, change, strict=True):
        image = ax.imshow(
            values, COLOURS, norm, aspect="auto", interpolation="nearest", extent=extent
        )
        ax.set_facecolor("#bbbbbb")
        ax.set_title(title)
        ax.set_xlabel("Step")
        ax.grid(False)
        ax.xaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10], integer=True))
        ax.yaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes[0].set_ylabel("Block")
    figure.colorbar(image, ax=axes, label="Relative L1 change", pad=0.01, aspect=14)
    return figure


def _nothing() -> Figure:
    return empty("no video of method=qkv_change is stored")
