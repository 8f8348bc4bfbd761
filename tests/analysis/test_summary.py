from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from analysis.summary import summarise
from tests.analysis import synthetic


@pytest.fixture(scope="module")
def summary():
    made = summarise(synthetic.frame(), synthetic.runtimes(), synthetic.METRICS)
    return made.set_index(["task", "label", "metric"])


def test_a_row_for_every_setting_and_value_in_plan_order(summary) -> None:
    labels = [label for label, *_ in synthetic.SETTINGS]
    psnr = summary.xs(("t2v", "psnr"), level=("task", "metric"))
    assert list(psnr.index) == labels
    assert "prompt_adherence.colour" in summary.index.get_level_values("metric")


def test_mean_and_interval_are_over_prompts(summary) -> None:
    frame = synthetic.frame()
    rows = frame[(frame["task"] == "i2v") & (frame["label"] == "HSA-50")]
    values = rows[rows["metric"] == "psnr"]["value"]
    row = summary.loc["i2v", "HSA-50", "psnr"]
    assert row["mean"] == pytest.approx(values.mean()) and row["n"] == synthetic.PROMPTS
    assert row["low"] < row["mean"] < row["high"]


def test_seeds_are_averaged_within_a_prompt() -> None:
    frame = synthetic.frame(("t2v",))
    second = frame.assign(seed=1, value=frame["value"] + 2.0)
    both = pd.concat([frame, second])
    made = summarise(both, synthetic.runtimes(), synthetic.METRICS)
    row = made[(made["label"] == "HSA-25") & (made["metric"] == "psnr")].iloc[0]
    once = summarise(frame, synthetic.runtimes(), synthetic.METRICS)
    expected = once[(once["label"] == "HSA-25") & (once["metric"] == "psnr")].iloc[0]
    assert row["n"] == synthetic.PROMPTS and row["seeds"] == 2
    assert row["mean"] == pytest.approx(expected["mean"] + 1.0)
    assert row["spread"] == pytest.approx(np.sqrt(2)) and np.isnan(expected["spread"])
    assert row["gain"] == pytest.approx(expected["gain"])
    assert row["gain_spread"] == pytest.approx(0, abs=1e-9)


def test_gain_is_the_distance_to_the_flow_matching_line(summary) -> None:
    """FM's PSNR is linear in runtime here, so every setting's gain is known."""
    for label, _, _, _, _, share, gain in synthetic.SETTINGS:
        row = summary.loc["t2v", label, "psnr"]
        if label.startswith("FM"):
            assert np.isnan(row["gain"])
        else:
            assert row["gain"] == pytest.approx(gain, abs=0.35), label
            assert row["gain_high"] - row["gain_low"] < 0.5 < row["high"] - row["low"]
        assert row["runtime"] == pytest.approx(share)


def test_reference_has_no_fidelity_but_other_quality(summary) -> None:
    assert np.isnan(summary.loc["t2v", "FM T=40", "psnr"]["mean"])
    assert summary.loc["t2v", "FM T=40", "psnr"]["n"] == 0
    assert summary.loc["t2v", "FM T=40", "prompt_adherence"]["mean"] > 0


def test_a_setting_slower_than_all_of_flow_matching_has_no_gain() -> None:
    runtimes = synthetic.runtimes()
    runtimes.table.loc[("t2v", "HSA-50"), "runtime_s"] = 10.0
    made = summarise(synthetic.frame(), runtimes, synthetic.METRICS)
    row = made.set_index(["task", "label", "metric"]).loc["t2v", "HSA-50", "prompt_adherence"]
    assert np.isnan(row["gain"]) and row["gain_n"] == 0 and np.isfinite(row["mean"])


def test_without_timings_runtimes_and_gains_are_missing() -> None:
    from analysis.frame import Runtimes

    table = synthetic.runtimes().table.iloc[:0]
    made = summarise(synthetic.frame(("t2v",)), Runtimes(None, table), synthetic.METRICS)
    assert made[["runtime_s", "runtime", "gain"]].isna().all(axis=None)
    assert made["mean"].notna().any()
