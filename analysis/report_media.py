"""The files beside the report: previews, differences to the reference, allocations.

They are named by the samples that they show, so the next report finds them made.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from matplotlib import colormaps

from analysis.metrics.base import Metric
from analysis.tables import number, percent
from experiments.files import replace_file

if TYPE_CHECKING:
    from experiments.store import Sample, Store

VIDEO_BYTES = 400_000_000  # of previews in one report; whole prompts are left out beyond it
MAX_PROMPTS = 8  # per task
GAIN = 4  # by which differences are brightened
OPACITY = (160, 70)  # of the full and the smallest budget over a video, of 255


def videos(
    frame: pd.DataFrame,
    summary: pd.DataFrame,
    store: Store,
    metrics: Sequence[Metric],
    folder: Path,
) -> list[dict[str, Any]]:
    """The videos to show, JSON-able, in plan order; writes their files and drops others.

    The first prompts of each task that fit into VIDEO_BYTES, with all of their settings; the
    first seed stands for a prompt. File names are relative to the folder that `folder` is in.
    """
    folder.mkdir(exist_ok=True)
    cells = frame.drop_duplicates(["task", "prompt_id", "label"])
    relative = summary.drop_duplicates(["task", "label"]).set_index(["task", "label"])["runtime"]
    scores = frame.set_index(["key", "metric"])["value"]
    shown = []
    for task, of_task in cells.groupby("task", sort=False):
        for prompt in _fitting(of_task, store):
            samples = {row.label: store.sample(row.key) for row in prompt.itertuples()}
            original = next(
                (samples[row.label] for row in prompt.itertuples() if row.reference), None
            )
            target = original and original.frames()
            for label, sample in samples.items():
                files = {"video": _preview(sample, folder), "difference": None}
                if original and sample is not original:
                    files["difference"] = _difference(sample, original, target, folder)
                caption = [
                    f"{percent(relative[task, label])} runtime",
                    *_scores(scores, sample.key, metrics),
                ]
                shown.append(
                    _about(sample, label)
                    | files
                    | {"caption": caption, "allocation": _allocation(sample, folder)}
                )
    _drop_others(folder, shown)
    return shown


def difference(frames: np.ndarray, target: np.ndarray) -> np.ndarray:
    """|frames - target|, mean over colours, GAIN times as bright: grey uint8 (F, H, W, 3)."""
    apart = [  # frame by frame: a long video four times in memory is too much
        np.abs(a.astype(np.int16) - b).mean(-1, keepdims=True)
        for a, b in zip(frames, target, strict=True)
    ]
    grey = np.clip(GAIN * np.stack(apart), 0, 255).round().astype(np.uint8)
    return np.repeat(grey, 3, axis=-1)


def allocation_strip(groups: np.ndarray, count: int) -> np.ndarray:
    """Groups (F, H, W) in `count` colours, frames below each other: RGBA uint8 (F * H, W, 4)."""
    frames, height, width = groups.shape
    return _colours(count)[groups].reshape(frames * height, width, 4)


def _colours(count: int) -> np.ndarray:
    """(count, 4) from bright, the full budget, to dark: an order in every colour vision."""
    colours = colormaps["plasma"](np.linspace(1, 0, count), bytes=True)
    colours[:, 3] = np.linspace(*OPACITY, count)
    return colours


def _fitting(cells: pd.DataFrame, store: Store) -> Iterator[pd.DataFrame]:
    """Cells of the first prompts whose previews fit, of one prompt in any case."""
    spent = 0
    for i, (_, prompt) in enumerate(cells.groupby("prompt_id", sort=False)):
        spent += sum(_stored(store.sample(key)).stat().st_size for key in prompt["key"])
        if i == MAX_PROMPTS or (i > 0 and spent > VIDEO_BYTES):
            return
        yield prompt


def _scores(scores: pd.Series, key: str, metrics: Sequence[Metric]) -> list[str]:
    found = ((metric, scores.get((key, metric.name), np.nan)) for metric in metrics)
    return [f"{metric.title} {number(value)}" for metric, value in found if np.isfinite(value)]


def _about(sample: Sample, label: str) -> dict[str, Any]:
    request, result = sample.record["request"], sample.record["result"]
    made = sample.record["provenance"]
    return {
        "label": label,
        "task": request["task"],
        "prompt_id": request["prompt_id"],
        "prompt": request["prompt"],
        "frames": result["shape"][0],
        "size": result["shape"][2:0:-1],  # width, height
        "fps": result["fps"],
        "made": {
            "key": sample.key,
            "seed": request["seed"],
            **{name: made.get(name) for name in ("started", "finished", "commit", "machine")},
        },
    }


def _stored(sample: Sample) -> Path:
    return sample.path / "preview.mp4"


def _name(sample: Sample) -> str:
    return f"{sample.key[:12]}-{sample.record['result']['frames_sha256'][:8]}"


def _preview(sample: Sample, folder: Path) -> str:
    return _file(folder / f"{_name(sample)}.mp4", _stored(sample).read_bytes)


def _difference(sample: Sample, original: Sample, target: np.ndarray, folder: Path) -> str | None:
    """None where the two are not of one shape."""
    if sample.record["result"]["shape"] != original.record["result"]["shape"]:
        return None

    def make() -> bytes:
        from experiments.video import encode_preview

        return encode_preview(difference(sample.frames(), target), sample.record["result"]["fps"])

    return _file(folder / f"{_name(sample)}-minus-{_name(original)}-x{GAIN}.mp4", make)


def _allocation(sample: Sample, folder: Path) -> dict[str, Any] | None:
    """Group of every token, 0 = full budget; None for methods that treat all tokens alike."""
    groups = sample.arrays.get("allocation")
    if groups is None:
        return None
    budgets = sample.record["method"]["params"].get("budgets")
    names = [f"{steps} steps" for steps in budgets or ()]
    names = names or [f"group {k + 1}" for k in range(int(groups.max()) + 1)]
    strip = _png(allocation_strip(groups, len(names)))
    return {
        "strip": _file(folder / f"{_name(sample)}.png", lambda: strip),
        "frames": len(groups),
        "groups": [
            {"name": name, "colour": f"#{bytes(colour[:3]).hex()}"}
            for name, colour in zip(names, _colours(len(names)), strict=True)
        ],
    }


def _png(pixels: np.ndarray) -> bytes:
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def _file(path: Path, make: Callable[[], bytes]) -> str:
    """Name of a file relative to the report, made whole where there is none."""
    if not path.is_file():
        replace_file(path, make())
    return f"{path.parent.name}/{path.name}"


def _drop_others(folder: Path, shown: Sequence[Mapping[str, Any]]) -> None:
    """Remove what an earlier report left, but not what another run is writing."""
    wanted = {video[kind] for video in shown for kind in ("video", "difference")}
    wanted |= {video["allocation"]["strip"] for video in shown if video["allocation"]}
    for path in folder.iterdir():
        if f"{folder.name}/{path.name}" not in wanted and not path.name.startswith("."):
            path.unlink(missing_ok=True)
