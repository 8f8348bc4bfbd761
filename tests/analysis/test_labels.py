from __future__ import annotations

from itertools import combinations

import numpy as np

from analysis.labels import Box, place

AXES = Box(0, 0, 600, 400)


def test_overlap_is_the_common_area() -> None:
    box = Box(0, 0, 10, 10)
    assert box.overlap(Box(5, 5, 20, 20)) == 25
    assert box.overlap(box) == box.area == 100
    assert box.overlap(Box(10, 0, 20, 10)) == 0


def test_a_crowd_is_told_apart() -> None:
    """Twelve points in a corner of 60 x 60 pixels, labels of 50 x 10: they fit, so none overlap."""
    points = np.random.default_rng(0).uniform(270, 330, (12, 2))
    sizes = np.full((12, 2), (50.0, 10.0))
    markers = [Box(x - 3, y - 3, x + 3, y + 3) for x, y in points]
    boxes = place(points, sizes, AXES, markers, scale=2.0)
    overlaps = [a.overlap(b) for a, b in combinations(boxes, 2)]
    assert sum(overlaps) < 0.02 * sum(box.area for box in boxes)


def test_labels_stay_inside_and_near() -> None:
    points = np.array([[1.0, 1.0], [599.0, 399.0], [599.0, 1.0], [300.0, 200.0]])
    sizes = np.full((4, 2), (60.0, 12.0))
    for box, point in zip(place(points, sizes, AXES, []), points, strict=True):
        assert box.overlap(AXES) == box.area
        nearest = np.clip(point, (box.x0, box.y0), (box.x1, box.y1))
        assert np.hypot(*(nearest - point)) <= 8


def test_a_lonely_label_stands_right_of_its_point() -> None:
    (box,) = place(np.array([[100.0, 100.0]]), np.array([[40.0, 10.0]]), AXES, [])
    assert (box.x0, box.y0, box.x1, box.y1) == (105, 95, 145, 105)
