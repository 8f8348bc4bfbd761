"""The paper's figures show what is stored, and nothing else."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from matplotlib.colors import to_hex

from analysis.figures.base import PAGE, Results, save
from analysis.figures.first_last import FirstLast
from analysis.figures.qkv_change import QKVChangeMaps
from analysis.figures.sheet import moments
from analysis.figures.tokens import Allocation, VelocityChange
from analysis.figures.vbench_profile import VBenchProfile, assigned, relative, vbench_profile
from analysis.frame import runtimes, tidy
from analysis.metrics.vbench import VBench
from analysis.summary import summarise
from experiments.cell import content_key
from experiments.errors import UserError
from tests.analysis import stored

DRAW = "import sys; from tests.analysis.test_paper_figures import draw; draw(*sys.argv[1:])"
PROFILE = pd.DataFrame(  # percent
    {"FM": [98.0, np.nan, 101.0], "HSA": [99.5, np.nan, 97.0], "TeaCache": [90.0, np.nan, 92.0]},
    index=["subject_consistency", "color", "scene"],
)
PANELS = {0.25: ["FM", "HSA"], 0.5: ["TeaCache"]}
METHODS = {"FM": "flow_matching", "HSA": "hsa", "TeaCache": "teacache"}
SHOWN = PROFILE, "FM T=100", PANELS, METHODS, "runtime"


def results_of(folder: Path) -> Results:
    """Videos of all settings, and two that recorded how Q, K and V change."""
    plan, store = stored.fill(folder, ("t2v",), prompts=2)
    cells = [cell for cell in plan.cells if cell.label == "FM T=40"]
    probes = [_probed(store, cell, seed) for seed, cell in enumerate(cells)]
    plan = replace(plan, cells=(*plan.cells, *probes))
    frame = tidy(plan, store, stored.METRICS)
    summary = summarise(frame, runtimes(plan, store), stored.METRICS)
    return Results(plan, store, frame, summary, stored.METRICS, stored.METRICS)


def _probed(store, cell, seed):
    inputs = {**cell.inputs, "probe": seed}
    sample = store.sample(cell.key)
    arrays = {"qkv_change": qkv(seed)}
    store.write_sample(inputs, sample.frames(), arrays, 8, {**sample.record["result"]}, {})
    key = content_key(inputs)
    return replace(cell, key=key, reference_key=key, inputs=inputs, label="probe")


def qkv(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).uniform(0.01, 1, (3, 4, 7)).astype(np.float32)


def draw(folder: str, out: str) -> None:
    """Every kind of picture, from what is stored in a folder that may be empty."""
    results = results_of(Path(folder))
    for plot in (Allocation(), VelocityChange(), FirstLast(prompts=2), QKVChangeMaps()):
        for drawing in plot.drawings(results):
            save(drawing.draw, Path(out, drawing.name))
    save(lambda: vbench_profile(*SHOWN), Path(out, "vbench_profile"))


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> Results:
    return results_of(tmp_path_factory.mktemp("store"))


def only(plot, results):
    (drawing,) = plot.drawings(results)
    return drawing


def images(figure) -> list[np.ndarray]:
    return [np.asarray(image.get_array()) for ax in figure.axes for image in ax.images]


def words(figure) -> str:
    return " ".join(text.get_text() for text in figure.texts)


def test_bytes_are_the_same_in_two_processes(tmp_path: Path) -> None:
    here, there = tmp_path / "here", tmp_path / "there"
    here.mkdir()
    there.mkdir()
    draw(str(tmp_path / "store"), str(here))
    root, again = Path(__file__).parents[2], tmp_path / "again"
    subprocess.run([sys.executable, "-c", DRAW, again, there], cwd=root, check=True)
    names = sorted(path.name for path in here.iterdir())
    assert len(names) == 10
    for name in names:
        assert (here / name).read_bytes() == (there / name).read_bytes(), name


@pytest.mark.parametrize(
    ("latent_frames", "frames", "count", "expected"),
    [
        (21, 81, 3, [(0, 0), (10, 40), (20, 80)]),  # four frames to a latent one, the first has one
        (9, 9, 4, [(0, 0), (3, 3), (5, 5), (8, 8)]),
        (3, 9, 7, [(0, 0), (1, 4), (2, 8)]),
        (1, 1, 7, [(0, 0)]),
    ],
)
def test_moments_by_hand(latent_frames, frames, count, expected) -> None:
    assert moments(latent_frames, frames, count) == expected


@pytest.mark.parametrize("plot", [Allocation(), VelocityChange()])
def test_maps_are_the_stored_arrays_below_their_frames(results, plot) -> None:
    plot = replace(plot, label="HSA 0.2", frames=4)
    drawing = only(plot, results)
    figure = drawing.draw()
    assert figure.get_figwidth() == PAGE and drawing.name == plot.array
    samples = [results.sample(cell) for cell in results.settings("t2v")["HSA 0.2"]]
    expected = [
        shown
        for sample in samples
        for i in (0, 3, 5, 8)
        for shown in (sample.frames()[i], sample.arrays[plot.array][i])
    ]
    found = images(figure)
    assert len(found) == len(expected) == 16
    for image, array in zip(found, expected, strict=True):
        np.testing.assert_array_equal(image, array)
    for sample in samples:
        assert sample.record["request"]["prompt"] in words(figure)


def test_the_legend_says_how_many_tokens_take_how_many_steps(results) -> None:
    figure = only(Allocation(label="HSA 0.1", prompts=1), results).draw()
    (cell, *_) = results.settings("t2v")["HSA 0.1"]
    few = results.sample(cell).arrays["allocation"].mean()
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == [
        f"40 steps: {100 * (1 - few):.0f} % of tokens",
        f"10 steps: {100 * few:.0f} % of tokens",
    ]


def test_the_first_setting_that_recorded_is_shown_and_another_refused(results) -> None:
    assert "HSA 0.1" in only(Allocation(), results).caption
    with pytest.raises(UserError, match="figure.allocation.label='nobody': choose FM T=40, "):
        only(Allocation(label="nobody"), results)
    nothing = only(Allocation(label="FM T=10"), results).draw()
    assert not nothing.axes and "no stored video has recorded allocation" in words(nothing)


def test_qkv_maps_are_the_mean_over_videos_on_one_scale(results) -> None:
    figure = only(QKVChangeMaps(), results).draw()
    maps = [ax.images[0].get_array() for ax in figure.axes[:3]]
    np.testing.assert_allclose(maps, (qkv(0) + qkv(1)) / 2, rtol=1e-6)
    axes = figure.axes[:3]
    assert [ax.get_title() for ax in axes] == ["Query", "Key", "Value"]
    assert len({ax.images[0].norm for ax in axes}) == 1
    assert axes[0].images[0].get_extent() == [1.5, 8.5, 4.5, 0.5]  # steps 2 to 8, block 1 on top


def test_first_and_last_frames_of_every_setting_and_prompt(results) -> None:
    timed = replace(results, summary=results.summary[results.summary["label"] != "probe"])
    figure = only(FirstLast(prompts=2), timed).draw()
    settings = results.settings("t2v")
    del settings["probe"]
    expected = [
        results.sample(cell).frames()[moment]
        for cells in settings.values()
        for cell in cells[:2]
        for moment in (0, -1)
    ]
    found = images(figure)
    assert len(found) == len(expected) == 4 * len(settings)
    for image, frame in zip(found, expected, strict=True):
        np.testing.assert_array_equal(image, frame)
    assert "TeaCache 0.2\n40 %" in words(figure)


def test_a_profile_is_relative_to_its_baseline_by_hand() -> None:
    values = pd.DataFrame(
        {"FM T=100": [0.8, 0.0, 0.5], "HSA": [0.6, 0.1, np.nan]}, index=["scene", "color", "style"]
    )
    found = relative(values, "FM T=100")
    np.testing.assert_allclose(found["FM T=100"], [100, np.nan, 100])
    np.testing.assert_allclose(found["HSA"], [75, np.nan, np.nan])


def test_settings_stand_in_the_panel_of_their_cost() -> None:
    cost = {"FM T=40": 1.0, "FM T=10": 0.26, "HSA": 0.34, "TeaCache": 0.46, "dear": 0.62}
    assert assigned(cost, (0.25, 0.5, 0.75), 0.1) == {
        0.25: ["FM T=10", "HSA"],
        0.5: ["TeaCache"],
        0.75: [],
    }


def test_a_profile_shows_each_value_and_what_is_missing() -> None:
    figure = vbench_profile(*SHOWN)
    axes = figure.axes
    assert [ax.get_title(loc="left") for ax in axes] == [
        "25 % of the runtime",
        "50 % of the runtime",
    ]
    assert axes[1].get_ylabel() == "Percent of FM T=100"
    drawn = {line.get_label(): line.get_ydata() for ax in axes for line in ax.lines}
    for label in PROFILE:
        np.testing.assert_array_equal(drawn[label], PROFILE[label])
    colours = {tick.get_text(): to_hex(tick.get_color()) for tick in axes[-1].get_xticklabels()}
    assert colours == {"subject consistency": "#000000", "color": "#999999", "scene": "#000000"}


def test_without_a_scorer_there_is_a_message_and_no_value(results, tmp_path) -> None:
    profile = VBenchProfile(baseline="FM T=40")
    absent = replace(results, configured=[VBench(python=str(tmp_path / "python"))])
    without = [only(profile, absent), only(profile, results)]
    messages = "VBench can score nothing", "vbench is not among the metrics"
    for drawing, message in zip(without, messages, strict=True):
        figure = drawing.draw()
        assert not figure.axes and message in words(figure) and message in drawing.caption
    with pytest.raises(UserError, match="figure.vbench_profile.baseline='FM T=100': choose FM T"):
        only(VBenchProfile(), results)


def test_cost_is_the_runtime_or_the_forwards(results) -> None:
    measure, cost = results.cost("t2v")
    assert measure == "forwards"  # the probe is not timed
    timed = results.summary[results.summary["label"] != "probe"]
    measure, cost = replace(results, summary=timed).cost("t2v")
    assert measure == "runtime" and cost["FM T=10"] == pytest.approx(0.25)
