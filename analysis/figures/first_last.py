"""First and last frame of every setting's video of the same prompts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from matplotlib.figure import Figure

from analysis.figures.base import PAGE, Drawing, Plot, Results, by_task
from analysis.figures.sheet import GAP, LINE, Sheet, wrapped
from experiments.store import Sample

LEFT = 0.95  # inches for the names of the settings
HEAD = 3 * LINE  # for the prompt, and which frame it is


@dataclass(frozen=True)
class FirstLast(Plot):
    """A row for each setting, a pair of columns for each of the first `prompts` prompts."""

    prompts: int = 3

    def drawings(self, results: Results) -> Iterator[Drawing]:
        for task in results.tasks:
            measure, cost = results.cost(task)
            rows = {
                f"{wrapped(label, LEFT, lines=3)}\n{100 * cost[label]:.0f} %": [
                    results.sample(cell) for cell in cells[: self.prompts]
                ]
                for label, cells in results.settings(task).items()
                if label in cost
            }
            caption = (
                f"First and last frame, {task.upper()}. Below each name: its share of the "
                f"reference's {measure}."
            )
            name = by_task(results, "first_last", task)
            yield Drawing(name, caption, partial(first_last, rows))


def first_last(rows: Mapping[str, Sequence[Sample | None]]) -> Figure:
    """The frames by the name of their row; a video that is not stored stays white."""
    stored = [sample for samples in rows.values() for sample in samples if sample]
    _, tall, wide, _ = stored[0].record["result"]["shape"]
    pairs = max(map(len, rows.values()))
    width = (PAGE - LEFT - (3 * pairs - 2) * GAP) / (2 * pairs)  # twice the gap between pairs
    height = width * tall / wide
    sheet = Sheet(PAGE, HEAD + len(rows) * (height + GAP))
    starts = [LEFT + i * (2 * width + 3 * GAP) for i in range(pairs)]
    for i, left in enumerate(starts):
        sample = next(samples[i] for samples in rows.values() if samples[i])
        prompt = wrapped(sample.record["request"]["prompt"], 2 * width, lines=2)
        sheet.text(left, 0, prompt, style="italic")
        for x, when in ((left, "first"), (left + width + GAP, "last")):
            sheet.text(x + width / 2, 2 * LINE, when, ha="center")
    for row, (name, samples) in enumerate(rows.items()):
        top = HEAD + row * (height + GAP)
        sheet.text(LEFT - 0.08, top + height / 2, name, ha="right", va="center")
        for left, sample in zip(starts, samples, strict=True):
            if sample:
                frames = sample.frames()
                sheet.picture(frames[0], left, top, width, height)
                sheet.picture(frames[-1], left + width + GAP, top, width, height)
    return sheet.figure
