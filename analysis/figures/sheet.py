"""Pictures in rows, placed in inches from the top left, and what they show of a stored video."""

from __future__ import annotations

import textwrap

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from analysis.figures.base import DPI

GAP = 0.04  # inches between pictures
LINE = 0.15  # inches that a line of text takes
CHARACTERS = 20  # of text to an inch
ASCENT = 0.02  # inches that letters reach above their line


class Sheet:
    """A figure of a known size."""

    def __init__(self, width: float, height: float) -> None:
        self.width, self.height = width, height
        self.figure = Figure((width, height), dpi=DPI)

    def axes(self, left: float, top: float, width: float, height: float) -> Axes:
        bottom = self.height - top - height
        box = (left / self.width, bottom / self.height, width / self.width, height / self.height)
        return self.figure.add_axes(box)

    def picture(
        self, image: np.ndarray, left: float, top: float, width: float, height: float, **how
    ) -> None:
        """An image that fills its box, pixels as they are."""
        ax = self.axes(left, top, width, height)
        ax.imshow(image, aspect="auto", interpolation="nearest", **how)
        ax.set_xticks([])
        ax.set_yticks([])
        ax.spines[:].set_visible(False)

    def text(self, left: float, top: float, text: str, **how) -> None:
        how = {"ha": "left", "va": "top", "fontsize": 7} | how
        self.figure.text(left / self.width, 1 - (top + ASCENT) / self.height, text, **how)


def moments(latent_frames: int, frames: int, count: int) -> list[tuple[int, int]]:
    """Evenly spaced latent frames, first and last among them, each with a frame of the video.

    A video autoencoder that is causal in time decodes latent frame i to `(frames - 1) /
    (latent_frames - 1)` frames, the first to one; the last of them is shown.
    """
    chosen = np.linspace(0, latent_frames - 1, min(count, latent_frames)).round().astype(int)
    stride = (frames - 1) / max(latent_frames - 1, 1)
    return [(int(i), round(i * stride)) for i in chosen]


def wrapped(text: str, inches: float, lines: int = 1) -> str:
    """The beginning of a text, in as many lines of the sheet's letters as may be."""
    ellipsis = " \N{HORIZONTAL ELLIPSIS}"
    return textwrap.fill(text, int(inches * CHARACTERS), max_lines=lines, placeholder=ellipsis)
