"""What a token method decides for each token, below the frames that the tokens became."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import matplotlib
import numpy as np
from matplotlib.cm import ScalarMappable
from matplotlib.colors import ListedColormap, Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from analysis.figures.base import COLOURS, PAGE, Drawing, Plot, Results, by_task, empty
from analysis.figures.sheet import GAP, LINE, Sheet, moments, wrapped
from experiments.errors import UserError
from experiments.store import Sample

LEFT = 0.5  # inches for the names of the rows
FOOT = 0.38  # inches for the legend
BAR = 0.48 * PAGE  # where the scale of colours begins


@dataclass(frozen=True)
class TokenMaps(Plot):
    """Frames of the first videos of one setting, a recorded map of tokens below each.

    Attributes:
        label: of the setting; None: the first one that recorded the array.
        prompts, frames: how many videos, and how many moments of each.
    """

    array: ClassVar[str]  # recorded, (F, h, w)

    label: str | None = None
    prompts: int = 2
    frames: int = 7

    def drawings(self, results: Results) -> Iterator[Drawing]:
        for task in results.tasks:
            label, samples = self._samples(results, task)
            samples = samples[: self.prompts]
            draw = partial(self.draw, samples) if samples else self._nothing
            caption = f"{label}, {task.upper()}. {self.explained()}"
            yield Drawing(by_task(results, self.array, task), caption, draw)

    @abstractmethod
    def explained(self) -> str:
        """What the maps show, in words."""

    @abstractmethod
    def draw(self, samples: Sequence[Sample]) -> Figure:
        """The sheet of these videos."""

    def _samples(self, results: Results, task: str) -> tuple[str, list[Sample]]:
        """The setting, and its stored videos that have the array."""
        settings = results.settings(task)
        if self.label is not None and self.label not in settings:
            raise UserError(
                f"figure.{self.array}.label={self.label!r}: choose {', '.join(settings)}"
            )
        for label in settings if self.label is None else [self.label]:
            found = filter(None, map(results.sample, settings[label]))
            if samples := [sample for sample in found if self.array in sample.arrays]:
                return label, samples
        return self.label or "", []

    def _nothing(self) -> Figure:
        return empty(f"no stored video has recorded {self.array}")

    def _sheet(self, samples: Sequence[Sample], row: str, **how: Any) -> Sheet:
        """Frames and maps; `how` the maps are coloured."""
        count = min(self.frames, min(len(sample.arrays[self.array]) for sample in samples))
        width = (PAGE - LEFT - (count - 1) * GAP) / count
        heights = [width * height / across for height, across in map(_size, samples)]
        height = sum(LINE + 2 * h + 2 * GAP for h in heights) + (len(samples) - 1) * LINE / 2
        sheet, top = Sheet(PAGE, LINE + height + FOOT), LINE
        for sample, tall in zip(samples, heights, strict=True):
            frames, maps = sample.frames(), sample.arrays[self.array]
            prompt = sample.record["request"]["prompt"]
            sheet.text(LEFT, top, wrapped(prompt, PAGE - LEFT), style="italic")
            top += LINE
            for line, name in enumerate(("video", row)):
                middle = top + line * (tall + GAP) + tall / 2
                sheet.text(LEFT - 0.08, middle, name, ha="right", va="center")
            for i, (latent, frame) in enumerate(moments(len(maps), len(frames), count)):
                left = LEFT + i * (width + GAP)
                if sample is samples[0]:
                    sheet.text(left + width / 2, 0, f"frame {frame + 1}", ha="center")
                sheet.picture(frames[frame], left, top, width, tall)
                sheet.picture(maps[latent], left, top + tall + GAP, width, tall, **how)
            top += 2 * tall + 2 * GAP + LINE / 2
        return sheet


@dataclass(frozen=True)
class Allocation(TokenMaps):
    """Which token got how many steps."""

    array: ClassVar[str] = "allocation"

    def explained(self) -> str:
        return "Steps that each token takes, below the frames that the tokens became."

    def draw(self, samples: Sequence[Sample]) -> Figure:
        budgets = samples[0].record["method"]["params"]["budgets"]
        # the more steps, the brighter, as the velocity change that earns them
        shades = matplotlib.colormaps[COLOURS](np.linspace(1, 0, len(budgets)))
        norm = Normalize(-0.5, len(budgets) - 0.5)
        sheet = self._sheet(samples, "steps", cmap=ListedColormap(shades), norm=norm)
        tokens = np.concatenate([sample.arrays[self.array].ravel() for sample in samples])
        shares = [100 * np.mean(tokens == group) for group in range(len(budgets))]
        handles = [
            Patch(color=shade, label=f"{budget} steps: {share:.0f} % of tokens")
            for budget, shade, share in zip(budgets, shades, shares, strict=True)
        ]
        sheet.figure.legend(handles=handles, loc="lower center", ncols=len(handles))
        return sheet.figure


@dataclass(frozen=True)
class VelocityChange(TokenMaps):
    """How much the velocity of each token changed while it was measured."""

    array: ClassVar[str] = "velocity_change"

    def explained(self) -> str:
        return (
            "Relative L1 change of each token's velocity, mean over the measured steps, below the "
            "frames that the tokens became."
        )

    def draw(self, samples: Sequence[Sample]) -> Figure:
        change = np.concatenate([sample.arrays[self.array].ravel() for sample in samples])
        norm = Normalize(*np.percentile(change, [0, 99]))
        sheet = self._sheet(samples, "change", cmap=COLOURS, norm=norm)
        bar = sheet.axes(BAR, sheet.height - 0.3, PAGE / 3, 0.08)
        sheet.figure.colorbar(
            ScalarMappable(norm, COLOURS), cax=bar, orientation="horizontal", extend="max"
        )
        bar.tick_params(labelsize=6, pad=1)
        name = "relative L1 change of the velocity"
        sheet.text(BAR - 0.1, sheet.height - 0.26, name, ha="right", va="center")
        return sheet.figure


def _size(sample: Sample) -> tuple[int, int]:
    """Height and width in pixels."""
    _, height, width, _ = sample.record["result"]["shape"]
    return height, width
