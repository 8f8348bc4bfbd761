"""What an ablation shows: settings minus the one that each is held against."""

import matplotlib.colors
import pytest

from analysis.figures.base import PALETTE, Results
from analysis.figures.differences import Differences, differences, draw_differences
from analysis.frame import runtimes, tidy
from analysis.metrics.latent_error import LatentError
from analysis.metrics.psnr import PSNR
from analysis.summary import summarise
from experiments.errors import UserError
from tests.analysis import synthetic

AGAINST = {"FM": "FM T=20", "HSA": "FM T=10", "HSA-25": "FM T=8"}


@pytest.fixture(scope="module")
def frame():
    return synthetic.frame(("t2v",))


def values(frame, label):
    mine = frame[(frame["label"] == label) & (frame["metric"] == "psnr")]
    return dict(zip(mine["prompt_id"], mine["value"], strict=True))


def test_each_setting_minus_its_own_base(frame):
    found = differences(frame, PSNR(), AGAINST)
    assert {base: set(minus) for base, minus in found.items()} == {
        "FM T=20": {"FM T=30", "FM T=15", "FM T=10", "FM T=8", "FM T=5"},  # T=40 has no PSNR
        "FM T=10": {"HSA-50", "HSA-75"},
        "FM T=8": {"HSA-25"},
    }
    for base, minus in found.items():
        for label, estimate in minus.items():
            mine, theirs = values(frame, label), values(frame, base)
            each = [mine[prompt] - theirs[prompt] for prompt in mine]
            assert estimate.mean == pytest.approx(sum(each) / len(each))
            assert min(each) <= estimate.low <= estimate.mean <= estimate.high <= max(each)


def test_only_videos_that_both_have_count(frame):
    some = frame[(frame["label"] != "HSA-25") | (frame["prompt_id"] < "p3")]
    assert differences(some, PSNR(), AGAINST)["FM T=8"]["HSA-25"].n == len(values(some, "HSA-25"))


def test_right_is_better_and_every_number_is_written(frame):
    metrics = PSNR(), LatentError()
    found = {metric: differences(frame, metric, AGAINST) for metric in metrics}
    figure = draw_differences(found)
    psnr, error = figure.axes
    assert not psnr.xaxis_inverted() and error.xaxis_inverted()
    names = [label.get_text() for label in psnr.get_yticklabels()]
    for ax, rows in zip(figure.axes, found.values(), strict=True):
        points = {
            (line.get_ydata()[0], line.get_xdata()[0]): line.get_color()
            for line in ax.lines
            if len(line.get_xdata()) == 1
        }
        expected = {
            (names.index(label), estimate.mean): colour
            for colour, minus in zip(PALETTE[1:], rows.values(), strict=False)
            for label, estimate in minus.items()
        }
        assert {at: matplotlib.colors.to_hex(c).upper() for at, c in points.items()} == expected
        assert len(ax.texts) == len(expected)


def test_a_label_that_no_setting_has_is_refused_with_the_choices(results):
    (plan, store), metrics = results, [PSNR()]
    frame = tidy(plan, store, metrics)
    summary = summarise(frame, runtimes(plan, store), metrics)
    shown = Results(plan, store, frame, summary, metrics, metrics)
    with pytest.raises(UserError, match=r"against=\['FM T=50'\]: choose FM T=40, FM T=20"):
        list(Differences(against={"HSA": "FM T=50"}).drawings(shown))
