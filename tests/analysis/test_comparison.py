from __future__ import annotations

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from analysis import comparison
from analysis.metrics.psnr import PSNR
from analysis.summary import summarise
from tests.analysis import synthetic


@pytest.fixture(scope="module")
def frame():
    return synthetic.frame(("t2v",))


@pytest.fixture(scope="module")
def summary(frame):
    return summarise(frame, synthetic.runtimes(("t2v",)), synthetic.METRICS)


def compared(frame, summary, target: float) -> comparison.Comparison:
    return next(
        c
        for c in comparison.compare(frame, summary, synthetic.METRICS)
        if c.metric == PSNR() and c.target == target
    )


@pytest.mark.parametrize(("target", "lead"), [(0.25, 2.0), (0.5, 1.0)])
def test_the_lead_over_flow_matching_is_the_built_in_gain(frame, summary, target, lead) -> None:
    found = compared(frame, summary, target)
    assert found.best == ["hsa"]
    assert found.lead["hsa"]["flow_matching"].mean == pytest.approx(lead, abs=0.3)
    assert found.lead["hsa"]["flow_matching"].low > 0
    assert found.reached["hsa"].mean == pytest.approx(
        synthetic.fm_psnr(target) + lead + _difficulty(frame), abs=0.3
    )


def test_a_method_that_does_not_reach_the_runtime_is_missing(frame, summary) -> None:
    found = compared(frame, summary, 0.25)  # TeaCache's fastest setting takes 28 %
    assert found.runtime == pytest.approx(0.25)
    assert found.reached["teacache"].n == 0 and np.isnan(found.lead["hsa"]["teacache"].mean)
    tables = comparison.tables([found], summary, [PSNR()])
    row = next(row for row in tables[1].rows if row[0].text == "teacache")
    assert row[1].text == "\N{EN DASH}" and not row[1].bold


def test_methods_are_compared_at_the_measured_runtime_of_hsa(frame) -> None:
    runtimes = synthetic.runtimes(("t2v",))
    runtimes.table.loc[("t2v", "HSA-25"), "runtime_s"] *= 1.1  # 27.5 %
    summary = summarise(frame, runtimes, synthetic.METRICS)
    found = compared(frame, summary, 0.25)
    assert found.runtime == pytest.approx(0.275)
    row = summary[(summary["label"] == "HSA-25") & (summary["metric"] == "psnr")].iloc[0]
    assert found.reached["hsa"].mean == pytest.approx(row["mean"])
    assert found.lead["hsa"]["flow_matching"].mean == pytest.approx(row["gain"])
    assert found.lead["hsa"]["static_mask"].n == synthetic.PROMPTS

    runtimes.table.loc[("t2v", "HSA-25"), "runtime_s"] *= 1.3  # 36 %: too far away
    found = compared(frame, summarise(frame, runtimes, synthetic.METRICS), 0.25)
    assert found.runtime == 0.25 and found.reached["hsa"].n == 0


def test_targets_of_the_grid_are_those_compared(frame) -> None:
    matched = frame.assign(target=np.where(frame["label"] == "HSA-75", 0.75, np.nan))
    summary = summarise(matched, synthetic.runtimes(("t2v",)), synthetic.METRICS)
    found = comparison.compare(matched, summary, [PSNR()])
    assert [(c.target, c.runtime) for c in found] == [(0.75, pytest.approx(0.75))]
    assert [list(c.reached) for c in found] == [["HSA-75"]]


def test_variants_that_were_matched_to_a_target_are_compared_each_by_itself(frame, summary) -> None:
    names = {"HSA-50": "HSA a, 0.5", "TeaCache 0.2": "TeaCache a, 0.5", "FM T=20": "FM, 0.5"}
    names |= {"HSA-75": "HSA b, 0.5", "Mask 1/2": "Mask, 0.5"}
    target = frame["label"].map(lambda label: 0.5 if label in names else np.nan)
    matched = frame.assign(target=target, label=frame["label"].replace(names))
    runtimes = synthetic.runtimes(("t2v",))
    table = runtimes.table.rename(index=names)
    summary = summarise(matched, replace(runtimes, table=table), synthetic.METRICS)
    (found,) = comparison.compare(matched, summary, [PSNR()])
    assert set(found.reached) == {"HSA a", "HSA b", "TeaCache a", "FM", "Mask"}
    assert set(found.lead) == {"HSA a", "HSA b"}
    assert set(found.lead["HSA a"]) == {"HSA b", "TeaCache a", "FM", "Mask"}
    assert found.runtime == pytest.approx(0.5) and np.isnan(found.reached["HSA b"].mean)
    titles = [t.title for t in comparison.tables([found], summary, [PSNR()])]
    assert "HSA a minus the others at 50.0 % of the runtime, T2V" in titles


def test_a_slowest_setting_that_is_hardly_faster_still_counts(frame) -> None:
    runtimes = synthetic.runtimes(("t2v",))
    rows = runtimes.table.index.get_level_values("label").str.startswith("TeaCache")
    runtimes.table.loc[rows, "runtime_s"] *= 0.49 / 0.7  # the slowest of three
    found = compared(frame, summarise(frame, runtimes, synthetic.METRICS), 0.5)
    slowest = frame[(frame["label"] == "TeaCache 0.1") & (frame["metric"] == "psnr")]
    assert found.reached["teacache"].mean == pytest.approx(slowest["value"].mean())


def test_methods_that_are_equally_good_are_all_the_best(frame, summary) -> None:
    same = frame.assign(value=1.0)
    found = compared(same, summarise(same, synthetic.runtimes(("t2v",)), synthetic.METRICS), 0.5)
    assert set(found.best) == {"hsa", "teacache", "flow_matching", "static_mask"}
    winners = comparison.tables([found], summary, [PSNR()])[0]
    assert winners.rows[0][1].text == "4 alike"


def test_the_second_that_reaches_a_runtime_is_underlined(frame, summary) -> None:
    found = compared(frame, summary, 0.5)
    table = comparison.tables([found], summary, [PSNR()])[1]
    means = sorted((e.mean, name) for name, e in found.reached.items())
    marks = {row[0].text: (row[1].bold, row[1].underlined) for row in table.rows}
    assert [name for name, (bold, _) in marks.items() if bold] == [means[-1][1]]
    assert [name for name, (_, second) in marks.items() if second] == [means[-2][1]]


def test_seeds_are_paired_and_their_spread_is_told(frame) -> None:
    """The second seed is 2 dB better for all methods: a spread of the values, none of the lead."""
    frame = frame[frame["metric"] == "psnr"]
    both = pd.concat([frame, frame.assign(seed=1, value=frame["value"] + 2.0)])
    once, twice = (
        compared(f, summarise(f, synthetic.runtimes(("t2v",)), [PSNR()]), 0.5)
        for f in (frame, both)
    )
    for name, reached in twice.reached.items():
        assert reached.mean == pytest.approx(once.reached[name].mean + 1.0)
        assert reached.high - reached.low == pytest.approx(
            once.reached[name].high - once.reached[name].low
        )
        assert reached.spread == pytest.approx(np.sqrt(2))
    for name, lead in twice.lead["hsa"].items():
        assert lead.mean == pytest.approx(once.lead["hsa"][name].mean)
        assert lead.spread == pytest.approx(0, abs=1e-9)


def test_without_hsa_there_is_no_lead(frame) -> None:
    others = frame[frame["method"] != "hsa"]
    summary = summarise(others, synthetic.runtimes(("t2v",)), synthetic.METRICS)
    found = compared(others, summary, 0.5)
    assert not found.lead and found.best == ["flow_matching"]
    titles = [t.title for t in comparison.tables([found], summary, [PSNR()])]
    assert titles and not any("HSA minus" in title for title in titles)


def test_areas_rank_methods_by_their_fronts(summary) -> None:
    areas = comparison.areas(summary, "t2v", PSNR())
    assert areas["hsa"] > areas["teacache"] > 0
    assert areas["hsa"] > areas["static_mask"] > 0


def test_areas_need_runtimes(summary) -> None:
    assert comparison.areas(summary.assign(runtime=np.nan), "t2v", PSNR()) == {}


def _difficulty(frame) -> float:
    """Mean over prompts of what is added to every setting."""
    rows = frame[(frame["label"] == "FM T=10") & (frame["metric"] == "psnr")]
    return float(rows["value"].mean() - synthetic.fm_psnr(0.25))
