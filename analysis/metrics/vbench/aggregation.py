"""From dimension values to VBench's scores, by upstream's formula and nothing else.

A dimension is scaled to its range, n = (x - low) / (high - low), without clipping; a group's score
is the weighted mean of its dimensions; the total is (4 quality + semantic) / 5 for text-to-video,
(i2v + quality) / 2 for image-to-video, whose quality leaves temporal flickering out
(`cal_final_score.py`, `cal_i2v_final_score.py` of github.com/Vchitect/VBench at 45e79ec). Upstream
counts a missing dimension as 0; here it is missing.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TypeVar

import numpy as np

from analysis.metrics.vbench.dimensions import DIMENSIONS, SUITES

Number = TypeVar("Number", float, np.ndarray)


def aggregate(
    values: Mapping[str, float], suite: str = "t2v", *, allow_partial: bool = False
) -> dict[str, float]:
    """VBench's scores in 0..1.

    Args:
        values: raw dimension values in 0..1, by upstream's names.
        suite: t2v or i2v.
        allow_partial: leave out the scores that lack a dimension, instead of refusing.

    Returns:
        total, quality and semantic (t2v) or i2v (i2v); each only from all of its dimensions.

    Raises:
        ValueError: unknown suite or dimension, a value that is no number in 0..1, or a dimension
            is missing.
    """
    if suite not in SUITES:
        raise ValueError(f"suite={suite!r}: choose {', '.join(SUITES)}")
    wanted = [name for names, _ in SUITES[suite].values() for name in names]
    for name, value in values.items():
        if name not in wanted:
            raise ValueError(f"{name!r} is no dimension of {suite}: choose {', '.join(wanted)}")
        if not (math.isfinite(value) and 0 <= value <= 1):
            raise ValueError(f"{name}={value}: not a raw value in 0..1")
    missing = [name for name in wanted if name not in values]
    if missing and not allow_partial:
        raise ValueError(f"no {suite} total without {', '.join(missing)}")
    return combine({name: float(value) for name, value in values.items()}, suite)


def combine(values: Mapping[str, Number], suite: str) -> dict[str, Number]:
    """The suite's scores that have all of their dimensions; numbers or arrays of draws."""
    scores = {
        score: normalised_mean(values, names)
        for score, (names, _) in SUITES[suite].items()
        if all(name in values for name in names)
    }
    if len(scores) < len(SUITES[suite]):
        return scores
    shares = {score: share for score, (_, share) in SUITES[suite].items()}
    return {"total": sum(shares[score] * value for score, value in scores.items())} | scores


def normalised_mean(values: Mapping[str, Number], names: Sequence[str]) -> Number:
    """Weighted mean of the dimensions, each scaled to its range."""
    chosen = [(DIMENSIONS[name], values[name]) for name in names]
    total = sum(d.weight * (value - d.low) / (d.high - d.low) for d, value in chosen)
    return total / sum(d.weight for d, _ in chosen)
