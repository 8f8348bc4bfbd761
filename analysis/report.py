"""One self-contained index.html: the frontier, sortable tables, and videos that play in step."""

from __future__ import annotations

import base64
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from jinja2 import Environment, PackageLoader, StrictUndefined

from analysis.metrics.base import Metric
from analysis.tables import Table, number, percent

if TYPE_CHECKING:
    from experiments.store import Sample, Store

VIDEO_BYTES = 40_000_000  # of previews in one page; whole prompts are left out beyond it
MAX_PROMPTS = 8  # per task
TARGET = 0.25  # share of the reference runtime at which the page opens


@dataclass(frozen=True)
class Figure:
    """An image file's bytes and what stands under it."""

    svg: bytes
    caption: str


def render(
    title: str,
    subtitle: str,
    figures: Sequence[Figure],
    tables: Sequence[Table],
    details: Sequence[Table],
    videos: Sequence[Mapping[str, Any]],
    shown: Sequence[str],
) -> str:
    """The page.

    Args:
        details: tables that are folded away when the page opens.
        videos: what `videos` gives.
        shown: labels of the settings that are ticked when the page opens.
    """
    environment = Environment(
        loader=PackageLoader("analysis"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["base64"] = _base64
    environment.globals["zip"] = zip
    return environment.get_template("index.html.j2").render(
        title=title,
        subtitle=subtitle,
        figures=figures,
        tables=tables,
        details=details,
        videos=videos,
        shown=shown,
    )


def videos(
    frame: pd.DataFrame, summary: pd.DataFrame, store: Store, metrics: Sequence[Metric]
) -> list[dict[str, Any]]:
    """The previews to show with their captions and allocation, JSON-able, in plan order.

    The first prompts of each task that fit into VIDEO_BYTES, with all of their settings; the
    first seed stands for a prompt.
    """
    cells = frame.drop_duplicates(["task", "prompt_id", "label"])
    relative = summary.drop_duplicates(["task", "label"]).set_index(["task", "label"])["runtime"]
    scores = frame.set_index(["key", "metric"])["value"]
    shown = []
    for task, prompts in cells.groupby("task", sort=False):
        for sample, label in _fitting(prompts, store):
            caption = [
                f"{percent(relative[task, label])} runtime",
                *_scores(scores, sample.key, metrics),
            ]
            shown.append(_video(sample, label, caption))
    return shown


def opening(summary: pd.DataFrame, target: float = TARGET) -> list[str]:
    """The reference, and of each method the setting closest to the target runtime."""
    settings = summary.drop_duplicates("label").reset_index(drop=True)
    distance = (settings["runtime"] - target).abs().fillna(np.inf)
    closest = distance.groupby(settings["method"], sort=False).idxmin()
    chosen = settings["reference"] | settings.index.isin(closest)
    return list(settings.loc[chosen, "label"])


def _fitting(cells: pd.DataFrame, store: Store) -> Iterator[tuple[Sample, str]]:
    """Samples and labels of the first prompts whose previews fit, of one prompt in any case."""
    spent = 0
    for i, (_, prompt) in enumerate(cells.groupby("prompt_id", sort=False)):
        samples = [store.sample(key) for key in prompt["key"]]
        spent += sum(_preview(sample).stat().st_size for sample in samples)
        if i == MAX_PROMPTS or (i > 0 and spent > VIDEO_BYTES):
            return
        yield from zip(samples, prompt["label"], strict=True)


def _scores(scores: pd.Series, key: str, metrics: Sequence[Metric]) -> list[str]:
    found = ((metric, scores.get((key, metric.name), np.nan)) for metric in metrics)
    return [f"{metric.title} {number(value)}" for metric, value in found if np.isfinite(value)]


def _video(sample: Sample, label: str, caption: Sequence[str]) -> dict[str, Any]:
    request, result = sample.record["request"], sample.record["result"]
    return {
        "label": label,
        "task": request["task"],
        "prompt_id": request["prompt_id"],
        "prompt": request["prompt"],
        "caption": caption,
        "frames": result["shape"][0],
        "size": result["shape"][2:0:-1],  # width, height
        "fps": result["fps"],
        "mp4": _base64(_preview(sample).read_bytes()),
        "allocation": _allocation(sample),
    }


def _preview(sample: Sample) -> Path:
    return sample.path / "preview.mp4"


def _allocation(sample: Sample) -> dict[str, Any] | None:
    """Group of every token, 0 = full budget; None for methods that treat all tokens alike."""
    groups = sample.arrays.get("allocation")
    if groups is None:
        return None
    return {
        "shape": list(groups.shape),  # F, H, W
        "groups": int(groups.max()) + 1,
        "data": _base64(groups.astype(np.uint8).tobytes()),
    }


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode("ascii")
