"""Totals are upstream's: the published rows come out, and nothing is made up."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest

from analysis.metrics.vbench import aggregate
from analysis.metrics.vbench.dimensions import I2V3, QUALITY6, QUALITY7, SEMANTIC9
from analysis.metrics.vbench.presets import PRESETS

ROUNDED = 0.011  # percent points: the published values have two decimals


def published() -> list:
    lines = Path(__file__).with_name("leaderboard.csv").read_text().splitlines()
    header, *rows = csv.reader(line for line in lines if not line.startswith("#"))
    return [(header, row) for row in rows]


@pytest.mark.parametrize("header, row", published(), ids=lambda row: row[1])
def test_published_scores_come_out(header, row):
    suite, _, *scores = row[:5]
    names = header[5:] if suite == "t2v" else row_names(header)
    values = {n: float(v) / 100 for n, v in zip(names, filter(None, row[5:]), strict=True)}
    found = aggregate(values, suite)
    last = "semantic" if suite == "t2v" else "i2v"
    for name, score in zip(("total", "quality", last), scores, strict=True):
        assert 100 * found[name] == pytest.approx(float(score), abs=ROUNDED), name
    assert set(found) == {"total", "quality", last}


def row_names(header: list[str]) -> list[str]:
    quality = [name for name in header[5:] if name in QUALITY6]
    return ["camera_motion", "i2v_subject", "i2v_background", *quality]


def full(value: float = 0.5) -> dict[str, float]:
    return dict.fromkeys(QUALITY7 + SEMANTIC9, value)


@pytest.mark.parametrize("missing", QUALITY7 + SEMANTIC9)
def test_a_missing_dimension_is_not_zero(missing):
    values = {name: value for name, value in full().items() if name != missing}
    with pytest.raises(ValueError, match=missing):
        aggregate(values, "t2v")
    partial = aggregate(values, "t2v", allow_partial=True)
    assert set(partial) == {"semantic" if missing in QUALITY7 else "quality"}


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 96.5, -0.1])
def test_a_value_is_a_number_in_0_to_1_and_never_taken_for_percent(value):
    with pytest.raises(ValueError, match="color"):
        aggregate(full() | {"color": value})


def test_names_and_suites_are_known():
    with pytest.raises(ValueError, match="subject consistency.*choose subject_consistency"):
        aggregate({"subject consistency": 0.5})
    with pytest.raises(ValueError, match="suite='long': choose t2v, i2v"):
        aggregate(full(), "long")
    with pytest.raises(ValueError, match="temporal_flickering"):
        aggregate(full(), "i2v")  # upstream computes it and leaves it out


def test_values_are_scaled_but_not_clipped():
    low = aggregate(full(0.0))
    assert low["quality"] < 0 and low["semantic"] < 0
    assert aggregate(full(1.0))["semantic"] > 1


def test_presets_have_scores_of_their_own():
    values = full(0.8)
    assert PRESETS["t2v"].scores(values) == aggregate(values)
    quality = {name: values[name] for name in QUALITY7}
    assert PRESETS["quality7"].scores(quality) == {"quality": aggregate(values)["quality"]}
    assert PRESETS["quality7"].scores({name: 0.8 for name in QUALITY6}) == {}
    raw = dict(zip(PRESETS["mlperf6"].dimensions, np.linspace(0.1, 0.9, 6), strict=True))
    assert PRESETS["mlperf6"].scores(raw)["mlperf6"] == pytest.approx(0.5)
    assert PRESETS["custom"].scores(quality) == {}


def test_image_to_video_without_camera_motion_is_its_two_halves():
    values = dict.fromkeys(I2V3 + QUALITY6, 0.7)
    scores = PRESETS["i2v_no_camera"].scores(values)
    image = ((0.7 - 0.1462) / 0.8538 + (0.7 - 0.2615) / 0.7385) / 2
    assert scores == {
        "i2v_no_camera": pytest.approx((image + aggregate(values, "i2v")["quality"]) / 2)
    }
