"""A page that opens from disk: frontier, videos that play in step, tables that sort.

`index.html` has everything but the videos, which stand beside it in `media/` and are read when
they are shown.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle
from typing import Any

import numpy as np
import pandas as pd
from jinja2 import Environment, PackageLoader, StrictUndefined

from analysis.figures.base import MARKERS, PALETTE
from analysis.metrics.base import Metric
from analysis.tables import Table, heading

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
    metrics: Sequence[Metric],
    settings: Sequence[Mapping[str, Any]],
    videos: Sequence[Mapping[str, Any]],
    shown: Sequence[str],
) -> str:
    """The page.

    Args:
        details: tables that are folded away when the page opens.
        settings: what `report_settings.settings` gives.
        videos: what `report_media.videos` gives.
        shown: labels of the settings whose videos are ticked when the page opens.
    """
    environment = Environment(
        loader=PackageLoader("analysis"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.policies["json.dumps_kwargs"] = {}  # keys in our order
    environment.filters["base64"] = _base64
    environment.globals["zip"] = zip
    scored = {name for setting in settings for name in setting["metrics"]}
    data = {
        "settings": settings,
        "metrics": [
            {"name": m.name, "heading": heading(m), "higher": m.higher_is_better}
            for m in metrics
            if m.name in scored
        ],
        "looks": _looks(settings),
        "videos": videos,
        "shown": shown,
    }
    return environment.get_template("index.html.j2").render(
        title=title,
        subtitle=subtitle,
        figures=figures,
        tables=tables,
        details=details,
        data=data,
    )


def opening(summary: pd.DataFrame, target: float = TARGET) -> list[str]:
    """The reference, and of each method the setting closest to the target runtime."""
    settings = summary.drop_duplicates("label").reset_index(drop=True)
    distance = (settings["runtime"] - target).abs().fillna(np.inf)
    closest = distance.groupby(settings["method"], sort=False).idxmin()
    chosen = settings["reference"] | settings.index.isin(closest)
    return list(settings.loc[chosen, "label"])


def _looks(settings: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, str]]:
    """Colour and marker of each method, those of the figures."""
    methods = dict.fromkeys(setting["method"] for setting in settings)
    looks = zip(methods, cycle(PALETTE), cycle(MARKERS), strict=False)
    return {name: {"colour": colour, "marker": marker} for name, colour, marker in looks}


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode("ascii")
