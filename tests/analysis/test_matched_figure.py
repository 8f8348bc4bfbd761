"""Methods at equal runtime: who stands where, and what is said of those that have no setting."""

from __future__ import annotations

from dataclasses import replace

import matplotlib.colors
import numpy as np
import pytest

from analysis.figures.base import Results
from analysis.figures.matched import OWN, Matched, matched, planned
from analysis.frame import runtimes, tidy, untargeted
from analysis.metrics.latent_error import LatentError
from analysis.metrics.psnr import PSNR
from analysis.summary import summarise
from experiments.config import Config
from experiments.errors import UserError
from experiments.plan import Plan

TARGETS = {  # label of the stored videos -> label and target of the run
    "FM T=20": ("FM, 0.5", 0.5),
    "FM T=10": ("FM, 0.25", 0.25),
    "HSA 0.1": ("HSA, 0.75", 0.75),
    "HSA 0.2": ("HSA, 0.5", 0.5),
    "HSA 0.3": ("HSA, 0.25", 0.25),  # takes 30 %
    "TeaCache 0.2": ("teacache target=0.5", 0.5),  # takes 40 %
}


@pytest.fixture(scope="module")
def run(results):
    """Results of the stored run with targets, without TeaCache in I2V."""
    plan, store = results
    cells = [
        replace(cell, label=label, config=Config(target=target))
        for cell in plan.cells
        for label, target in [TARGETS.get(cell.label, (cell.label, None))]
        if (cell.task, label) != ("i2v", "teacache target=0.5")
    ]
    plan, metrics = Plan(tuple(cells)), [PSNR(), LatentError()]
    frame = tidy(plan, store, metrics)
    summary = summarise(frame, runtimes(plan, store), metrics)
    return Results(plan, store, frame, summary, metrics, metrics)


def drawn(run, name, **settings):
    drawings = {drawing.name: drawing for drawing in Matched(**settings).drawings(run)}
    return drawings[name].draw()


def names(figure):
    return [tick.get_text() for tick in figure.axes[0].get_yticklabels()]


def points(ax):
    """Row -> x, fill and edge of its point."""
    return {
        int(line.get_ydata()[0]): (
            line.get_xdata()[0],
            line.get_markerfacecolor(),
            matplotlib.colors.to_hex(line.get_color()).upper(),
        )
        for line in ax.lines
        if len(line.get_xdata()) == 1
    }


def test_a_row_is_what_a_label_says_before_its_target():
    assert untargeted("HSA fractions, 0.5", 0.5) == "HSA fractions"
    assert untargeted("teacache target=0.25", 0.25) == "teacache"
    assert untargeted("teacache threshold=0.5 target=0.25", 0.25) == "teacache threshold=0.5"
    assert untargeted("no target at the end", 0.5) == "no target at the end"


def test_only_settings_with_a_target_have_a_row(run):
    found = planned(run)
    assert set(found["row"]) == {"FM", "HSA", "teacache"}
    assert "FM T=40" not in set(found["label"])


def test_a_picture_for_each_metric_and_task(run):
    first = [drawing.name for drawing in Matched().drawings(run)]
    assert first == ["matched_psnr_t2v", "matched_psnr_i2v"]
    both = [drawing.name for drawing in Matched(metrics=["latent_error", "psnr"]).drawings(run)]
    assert both == [*first, "matched_latent_error_t2v", "matched_latent_error_i2v"]
    with pytest.raises(UserError, match=r"metrics=\['vmaf'\]: choose psnr, latent_error"):
        list(Matched(metrics=["vmaf"]).drawings(run))


def test_panels_from_the_slowest_target_and_rows_by_the_middle_one(run):
    figure = drawn(run, "matched_psnr_t2v")
    titles = [ax.get_title(loc="left") for ax in figure.axes]
    assert titles == [f"{share} % of the runtime" for share in (75, 50, 25)]
    middle = points(figure.axes[1])
    x = [middle[y][0] for y in range(3)]
    assert x == sorted(x, reverse=True)
    assert [ax.get_xlabel() for ax in figure.axes] == 3 * ["PSNR (dB) \N{UPWARDS ARROW}"]
    assert names(figure)[-1] == "teacache"  # the noisiest at the middle target


def test_right_is_better(run):
    error = drawn(run, "matched_latent_error_t2v", metrics=["latent_error"])
    assert all(ax.xaxis_inverted() for ax in error.axes)
    x = [points(error.axes[1])[y][0] for y in range(3)]
    assert x == sorted(x)


def test_points_and_intervals_are_those_of_the_summary(run):
    figure = drawn(run, "matched_psnr_t2v")
    chosen = run.summary.query("task == 't2v' and metric == 'psnr'").set_index("label")
    at = names(figure).index("HSA")
    for ax, label in zip(figure.axes, ("HSA, 0.75", "HSA, 0.5", "HSA, 0.25"), strict=True):
        row = chosen.loc[label]
        assert points(ax)[at][0] == row["mean"]
        bars = {
            tuple(segment[:, 0])
            for bar in ax.collections
            for segment in bar.get_segments()
            if segment[0, 1] == at
        }
        assert bars == {(row["low"], row["high"])}


def test_the_line_and_band_are_flow_matching_at_the_target(run):
    figure = drawn(run, "matched_psnr_t2v")
    chosen = run.summary.query("task == 't2v' and metric == 'psnr'").set_index("label")
    for ax, label in zip(figure.axes, (None, "FM, 0.5", "FM, 0.25"), strict=True):
        lines = [line.get_xdata()[0] for line in ax.lines if len(line.get_xdata()) == 2]
        assert lines == ([chosen.loc[label, "mean"]] if label else [])
        bands = [x for band in ax.patches for x in (band.get_x(), band.get_x() + band.get_width())]
        assert bands == pytest.approx(list(chosen.loc[label, ["low", "high"]]) if label else [])


def test_measured_shares_stand_beside_and_a_missed_target_is_hollow(run):
    figure = drawn(run, "matched_psnr_t2v")
    shares = {
        names(figure)[int(text.get_position()[1])]: text.get_text()
        for text in figure.axes[1].texts
        if text.get_text() != "measured"
    }
    assert shares == {"FM": "50 %", "HSA": "50 %", "teacache": "40 %"}
    hollow = {
        names(figure)[y] for y, (_, fill, _) in points(figure.axes[1]).items() if fill == "white"
    }
    assert hollow == {"teacache"}
    wide = drawn(run, "matched_psnr_t2v", tolerance=0.11)
    assert "white" not in {fill for _, fill, _ in points(wide.axes[1]).values()}


def test_who_has_no_setting_keeps_its_row_with_a_dash(run):
    figure = drawn(run, "matched_psnr_i2v")
    assert sorted(names(figure)) == ["FM", "HSA", "teacache"]
    assert names(figure)[-1] == "teacache"
    for ax in figure.axes:
        texts = [text.get_text() for text in ax.texts if text.get_position()[1] == 2]
        assert texts == ["\N{EN DASH}"] and 2 not in points(ax)


def test_what_is_planned_but_not_made_has_no_dash(run):
    settings = planned(run).query("task == 't2v'").assign(mean=1.0, low=0.5, high=1.5, runtime=0.5)
    settings.loc[settings["row"] == "teacache", ["mean", "low", "high", "runtime"]] = np.nan
    figure = matched(settings, PSNR(), {"FM": "flow_matching", "teacache": "teacache"}, 0.05)
    assert names(figure) == ["FM", "teacache"]
    assert not [text for text in figure.axes[1].texts if text.get_position()[1] == 1]


def test_our_rows_stand_out(run):
    figure = drawn(run, "matched_psnr_t2v")
    bold = {
        tick.get_text(): tick.get_color()
        for tick in figure.axes[0].get_yticklabels()
        if tick.get_weight() == "bold"
    }
    assert bold == {"HSA": OWN}
    colours = {names(figure)[y]: edge for y, (_, _, edge) in points(figure.axes[1]).items()}
    assert colours["HSA"] == OWN and len(set(colours.values())) == 3


def test_without_a_score_or_a_target_the_figure_says_so(run):
    bare = replace(run, plan=Plan(tuple(c for c in run.plan.cells if c.label == "FM T=40")))
    for drawing in Matched().drawings(bare):
        assert "no setting with a target" in drawing.draw().texts[0].get_text()
        assert drawing.caption == "No setting has a target runtime."


def test_one_prompt_has_no_interval(run):
    settings = planned(run).query("task == 't2v'")
    settings = settings.assign(mean=1.0, low=np.nan, high=np.nan, runtime=np.nan)
    figure = matched(settings, PSNR(), {"FM": "flow_matching", "HSA": "hsa"}, 0.05)
    for ax in figure.axes:
        assert not ax.collections and not ax.patches
        assert [text.get_text() for text in ax.texts if text.get_text().endswith("%")] == []
