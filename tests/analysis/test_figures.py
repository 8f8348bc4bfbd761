from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure

from analysis.figures.base import save
from analysis.figures.frontier import frontier
from analysis.figures.matched import matched
from analysis.figures.sweep import sweep, sweeps
from analysis.metrics.latent_error import LatentError
from analysis.metrics.psnr import PSNR
from analysis.summary import summarise
from tests.analysis import synthetic

DRAW = "import sys; from tests.analysis.test_figures import draw; draw(sys.argv[1])"


def draw(folder: str) -> None:
    """A frontier, a sweep and methods at equal runtime, from nothing."""
    summary = summarise(synthetic.frame(("t2v",)), synthetic.runtimes(("t2v",)), synthetic.METRICS)
    save(lambda: frontier(summary, [PSNR()]), Path(folder, "frontier"))
    rows = sweeps(summary)["hsa"]
    save(lambda: sweep(rows, [PSNR()]), Path(folder, "sweep"))
    near = summary["runtime"].between(0.4, 0.6) & (summary["metric"] == "psnr")
    settings = summary[near].assign(row=summary["label"], target=0.5)
    methods = dict(zip(settings["row"], settings["method"], strict=True))
    save(lambda: matched(settings, PSNR(), methods, 0.05), Path(folder, "matched"))


@pytest.fixture(scope="module")
def summary():
    return summarise(synthetic.frame(), synthetic.runtimes(), synthetic.METRICS)


def panel(summary, metric):
    figure = frontier(summary[summary["task"] == "t2v"], [metric])
    return figure.axes[0]


def test_bytes_are_the_same_in_two_processes(tmp_path: Path) -> None:
    here, there = tmp_path / "here", tmp_path / "there"
    here.mkdir()
    there.mkdir()
    draw(str(here))
    root = Path(__file__).parents[2]
    subprocess.run([sys.executable, "-c", DRAW, str(there)], cwd=root, check=True)
    names = sorted(path.name for path in here.iterdir())
    kinds = "frontier", "matched", "sweep"
    assert names == [f"{kind}.{ending}" for kind in kinds for ending in ("png", "svg")]
    for name in names:
        assert (here / name).read_bytes() == (there / name).read_bytes(), name


def test_a_panel_for_each_metric_and_task(summary) -> None:
    figure = frontier(summary, [PSNR(), LatentError()])
    titles = [ax.get_title() for ax in figure.axes]
    assert titles == ["PSNR, T2V", "PSNR, I2V", "Latent error, T2V", "Latent error, I2V"]


def test_up_is_better(summary) -> None:
    assert not panel(summary, PSNR()).yaxis_inverted()
    assert panel(summary, LatentError()).yaxis_inverted()


def test_only_undominated_settings_are_named_and_opaque(summary) -> None:
    ax = panel(summary, PSNR())
    names = {text.get_text() for text in ax.texts}
    assert {"HSA-25", "HSA-50", "FM T=5", "FM T=30"} <= names
    assert names.isdisjoint({"TeaCache 0.2", "TeaCache 0.3", "Mask 1/4", "FM T=10"})
    points = [line for line in ax.lines if len(line.get_xdata()) == 1]
    assert len(points) == len(synthetic.SETTINGS) - 1  # the reference has no PSNR: no point
    opaque = [line for line in points if line.get_alpha() == 1]
    assert len(opaque) == len(names)


def test_bars_are_the_intervals(summary) -> None:
    ax = panel(summary, PSNR())
    view = summary[(summary["task"] == "t2v") & (summary["metric"] == "psnr")].dropna(
        subset=["mean"]
    )
    drawn = {tuple(segment[:, 1]) for c in ax.collections for segment in c.get_segments()}
    assert drawn == set(zip(view["low"], view["high"], strict=True))


def test_the_cost_axis_is_the_measured_runtime(summary) -> None:
    ax = panel(summary, PSNR())
    drawn = sorted(line.get_xdata()[0] for line in ax.lines if len(line.get_xdata()) == 1)
    shares = sorted(100 * share for *_, share, _ in synthetic.SETTINGS if share < 1)
    assert drawn == pytest.approx(shares)
    assert ax.get_xlabel() == "Runtime (% of the reference)"
    seconds = panel(summary.assign(runtime=np.nan), PSNR())
    assert seconds.get_xlabel() == "Runtime (s)"


def test_without_runtimes_the_figure_says_so(summary) -> None:
    figure = frontier(summary.assign(runtime_s=np.nan), [PSNR()])
    assert not figure.axes and "no setting has" in figure.texts[0].get_text()


def test_sweeps_are_found_by_the_one_parameter_that_varies(summary) -> None:
    found = sweeps(summary)
    assert set(found) == {"hsa", "teacache"}  # the mask has only two values, FM its steps
    rows = found["hsa"]
    assert set(rows["parameter"]) == {"thresholds"}
    assert rows["x"].drop_duplicates().tolist() == [0.1, 0.2, 0.3]
    two = summary.copy()
    two.loc[two["label"] == "HSA-25", "params"] = '{"thresholds": [0.3], "warmup_steps": 5}'
    assert "hsa" not in sweeps(two)


def test_a_sweep_shows_quality_and_runtime(summary) -> None:
    rows = sweeps(summary)["teacache"]
    figure = sweep(rows, [PSNR(), LatentError()])
    labels = [ax.get_ylabel() for ax in figure.axes[:3]]
    assert labels[0].startswith("PSNR") and labels[2] == "Runtime (s)"
    assert figure.axes[1].yaxis_inverted()
    t2v = figure.axes[2].lines[0]
    assert t2v.get_xdata() == pytest.approx([0.1, 0.2, 0.3])
    assert t2v.get_ydata() == pytest.approx([2.8, 1.68, 1.12])


def test_a_note_is_written_into_the_picture(tmp_path: Path) -> None:
    figure = Figure()
    save(lambda: figure, tmp_path / "figure", "random weights")
    assert [text.get_text() for text in figure.texts] == ["random weights"]
    save(lambda: figure, tmp_path / "figure")
    assert len(figure.texts) == 1
