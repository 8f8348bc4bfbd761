"""Named sets of prompts and dimensions, and the score that each may be called by.

`t2v` and `i2v` are VBench and VBench-I2V themselves. The others are cheaper: `mini` has the suite's
scores on fewer prompts, the rest a score of their own name. Tables name the preset.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

from analysis.metrics.vbench.aggregation import Number, combine, normalised_mean
from analysis.metrics.vbench.dimensions import (
    DIMENSIONS,
    I2V3,
    QUALITY6,
    QUALITY7,
    SEMANTIC9,
)

MINI = 8  # prompts per group of the suite
MLPERF6 = (  # MLPerf Inference 6.0, text-to-video: a plain mean of raw values
    "subject_consistency",
    "background_consistency",
    "motion_smoothness",
    "dynamic_degree",
    "appearance_style",
    "scene",
)


@dataclass(frozen=True)
class Preset:
    """Which dimensions, over which prompts of which suite.

    Attributes:
        suite: t2v, i2v, or None for any videos, where dimensions that need a suite's prompt are
            not defined.
        score: what the combination of all dimensions is called; None for the suite's own scores.
        per_dimension: prompts of each dimension; None for all of the suite's.
    """

    suite: str | None
    dimensions: tuple[str, ...]
    score: str | None = None
    per_dimension: int | None = None

    def scores(self, values: Mapping[str, Number]) -> dict[str, Number]:
        """The scores that have all of their dimensions, in 0..1."""
        if self.score is None:
            return combine(values, self.suite) if self.suite else {}
        complete = all(name in values for name in self.dimensions)
        return {self.score: COMBINED[self.score](values)} if complete else {}

    def expected(self, dimension: str) -> int | None:
        """How many prompts of the preset have the dimension; None where there is no suite."""
        if self.suite is None:
            return None
        if self.per_dimension:
            return self.per_dimension
        about = DIMENSIONS[dimension]
        return about.prompts if self.suite == "t2v" else about.prompts_i2v


def _mlperf(values: Mapping[str, Number]) -> Number:
    return sum(values[name] for name in MLPERF6) / len(MLPERF6)


def _i2v_without_camera(values: Mapping[str, Number]) -> Number:
    image = normalised_mean(values, I2V3[:2])
    return (image + normalised_mean(values, QUALITY6)) / 2


COMBINED = {
    "quality": lambda values: normalised_mean(values, QUALITY7),
    "custom6": lambda values: normalised_mean(values, QUALITY6),
    "mlperf6": _mlperf,
    "i2v_no_camera": _i2v_without_camera,
}
PRESETS = {
    "t2v": Preset("t2v", QUALITY7 + SEMANTIC9),
    "quality7": Preset("t2v", QUALITY7, "quality"),
    "custom6": Preset("t2v", QUALITY6, "custom6"),
    "mlperf6": Preset("t2v", MLPERF6, "mlperf6"),
    "mini": Preset("t2v", QUALITY7 + SEMANTIC9, per_dimension=MINI),
    "i2v": Preset("i2v", I2V3 + QUALITY6),
    "i2v_no_camera": Preset("i2v", I2V3[:2] + QUALITY6, "i2v_no_camera"),
    "custom": Preset(None, QUALITY7),
}


def choose(name: str) -> Preset:
    """Raises ValueError naming the choices."""
    if name not in PRESETS:
        raise ValueError(f"preset={name!r}: choose {', '.join(PRESETS)}")
    return PRESETS[name]


def select(entries: Sequence[Mapping[str, Any]], name: str) -> list[int]:
    """Indices of the suite's entries that a preset consists of, in the suite's order.

    `mini` takes from each group of entries with the same dimensions the `MINI` whose prompts have
    the smallest sha256: fixed for ever, and blind to what the prompts say.
    """
    wanted = set(choose(name).dimensions)
    chosen = [i for i, entry in enumerate(entries) if wanted & set(entry["dimension"])]
    if name != "mini":
        return chosen
    groups: dict[tuple[str, ...], list[int]] = {}
    for i in chosen:
        groups.setdefault(tuple(sorted(entries[i]["dimension"])), []).append(i)
    drawn = (sorted(group, key=lambda i: _lot(entries[i]))[:MINI] for group in groups.values())
    return sorted(chain.from_iterable(drawn))


def _lot(entry: Mapping[str, Any]) -> str:
    return hashlib.sha256(entry["prompt_en"].encode()).hexdigest()
