"""Where to write the names of points so that they don't cover each other. Pure numpy, in pixels."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

DIRECTIONS = [(1, 0), (1, 1), (-1, 1), (1, -1), (-1, -1), (0, 1), (0, -1), (-1, 0)]
DISTANCES = (5.0, 12.0, 20.0, 30.0)
OUTSIDE = 4.0  # a pixel outside of the axes is this much worse than one over another label
FAR = 2.0  # square pixels of overlap that a pixel of distance is worth


@dataclass(frozen=True)
class Box:
    """Left, bottom, right, top."""

    x0: float
    y0: float
    x1: float
    y1: float

    def overlap(self, other: Box) -> float:
        """Common area."""
        width = min(self.x1, other.x1) - max(self.x0, other.x0)
        height = min(self.y1, other.y1) - max(self.y0, other.y0)
        return max(width, 0.0) * max(height, 0.0)

    @property
    def area(self) -> float:
        return (self.x1 - self.x0) * (self.y1 - self.y0)


def place(
    points: np.ndarray, sizes: np.ndarray, bounds: Box, obstacles: list[Box], scale: float = 1.0
) -> list[Box]:
    """A box for each label, chosen greedily in the order given.

    Args:
        points: (K, 2) the points to name.
        sizes: (K, 2) width and height of each label.
        bounds: the axes.
        obstacles: boxes better left free, such as all markers.
        scale: pixels per point of the output, which the distances are multiplied by.
    """
    taken = list(obstacles)
    boxes = []
    for point, size in zip(points, sizes, strict=True):
        candidates = [
            (_beside(point, size, direction, scale * distance), scale * distance)
            for distance in DISTANCES
            for direction in DIRECTIONS
        ]
        box, _ = min(candidates, key=lambda candidate: _cost(*candidate, bounds, taken))
        boxes.append(box)
        taken.append(box)
    return boxes


def _beside(point: np.ndarray, size: np.ndarray, direction: tuple[int, int], gap: float) -> Box:
    dx, dy = np.array(direction) * gap / np.hypot(*direction)
    x0 = point[0] + dx - (1 - direction[0]) / 2 * size[0]
    y0 = point[1] + dy - (1 - direction[1]) / 2 * size[1]
    return Box(x0, y0, x0 + size[0], y0 + size[1])


def _cost(box: Box, gap: float, bounds: Box, taken: list[Box]) -> float:
    outside = box.area - box.overlap(bounds)
    return sum(box.overlap(other) for other in taken) + OUTSIDE * outside + FAR * gap
