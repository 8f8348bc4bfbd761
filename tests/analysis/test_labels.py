from __future__ import annotations

from itertools import combinations

import numpy as np

from analysis.labels import around, overlap, place

AXES = np.array([0.0, 0.0, 600.0, 400.0])
NOTHING = np.empty((0, 4))


def test_overlap_is_the_common_area() -> None:
    box = np.array([0, 0, 10, 10])
    others = np.array([[5, 5, 20, 20], [0, 0, 10, 10], [10, 0, 20, 10], [2, 2, 4, 5]])
    assert overlap(box, others).tolist() == [25, 100, 0, 6]


def test_a_crowd_is_told_apart() -> None:
    """Twelve points within 60 x 60 pixels, labels of 50 x 10: there is room around them."""
    points = np.random.default_rng(0).uniform(270, 330, (12, 2))
    sizes = np.full((12, 2), (50.0, 10.0))
    boxes = place(points, sizes, AXES, around(points, 3.0), scale=2.0)
    overlaps = sum(overlap(a, b) for a, b in combinations(boxes, 2))
    assert overlaps < 0.02 * sizes.prod(axis=1).sum()


def test_labels_stay_inside_and_near() -> None:
    points = np.array([[1.0, 1.0], [599.0, 399.0], [599.0, 1.0], [300.0, 200.0]])
    sizes = np.full((4, 2), (60.0, 12.0))
    for box, point in zip(place(points, sizes, AXES, NOTHING), points, strict=True):
        assert overlap(box, AXES) == 60 * 12
        nearest = np.clip(point, box[:2], box[2:])
        assert np.hypot(*(nearest - point)) <= 8


def test_a_lonely_label_stands_right_of_its_point() -> None:
    (box,) = place(np.array([[100.0, 100.0]]), np.array([[40.0, 10.0]]), AXES, NOTHING)
    assert box.tolist() == [105, 95, 145, 105]


def test_nothing_to_name() -> None:
    none = np.empty((0, 2))
    assert place(none, none, AXES, around(np.array([[1.0, 1.0]]), 2.0)).shape == (0, 4)
