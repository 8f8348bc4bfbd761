"""The figure of cached updates: its sum by hand, and the same bytes from the same data."""

import numpy as np

from analysis.figures.base import save
from analysis.figures.euler_error import euler_errors, summed

LOCAL = np.array([[0, 0, 0, 0], [0.1, 0.2, 0.4, np.nan], [0.3, 0.7, np.nan, np.nan]])


def test_sum_over_the_updates_of_a_run():
    # m = 2: steps 0 and 2, m = 3: steps 0 and 3, of which the last has one step left
    assert {m: round(float(error), 9) for m, error in summed(LOCAL).items()} == {
        1: 0,
        2: 0.5,
        3: 0.3,
    }


def test_figure_is_the_same_twice_and_shows_every_line(tmp_path):
    accumulated = {"all tokens": {2: 0.3, 4: 0.6}, "50% of tokens, fresh K/V": {2: 0.2}}

    def draw():
        return euler_errors(LOCAL, accumulated, shown=(2, 3))

    first = [path.read_bytes() for path in save(draw, tmp_path / "a")]
    assert [path.read_bytes() for path in save(draw, tmp_path / "b")] == first
    left, right = draw().axes
    assert [line.get_label() for line in left.lines] == ["m = 2", "m = 3"]
    lines = {line.get_label(): line.get_xydata().tolist() for line in right.lines}
    assert lines["all tokens"] == [[2, 0.3], [4, 0.6]]
    assert len(lines["sum of local errors"]) == 2  # an update by one step has no error
    assert set(lines) == {"sum of local errors", *accumulated}
