"""Where to write the names of points so that they don't cover anything. Pure numpy, in pixels.

A box is a row of left, bottom, right and top.
"""

from __future__ import annotations

import numpy as np

DIRECTIONS = ((1, 0), (1, 1), (-1, 1), (1, -1), (-1, -1), (0, 1), (0, -1), (-1, 0))
DISTANCES = (5.0, 12.0, 20.0, 30.0)
OUTSIDE = 4.0  # a pixel outside of the axes is this much worse than one over something else
FAR = 2.0  # square pixels of overlap that a pixel of distance is worth


def place(
    points: np.ndarray,
    sizes: np.ndarray,
    bounds: np.ndarray,
    obstacles: np.ndarray,
    scale: float = 1.0,
) -> np.ndarray:
    """A box for each label, chosen greedily in the order given: (K, 4).

    Args:
        points: (K, 2) what to name.
        sizes: (K, 2) width and height of each label.
        bounds: (4,) the axes.
        obstacles: (M, 4) boxes better left free, such as all markers.
        scale: pixels per unit of DISTANCES.
    """
    taken = obstacles.reshape(-1, 4)
    for point, size in zip(points, sizes, strict=True):
        gaps = scale * np.repeat(DISTANCES, len(DIRECTIONS))
        candidates = _beside(point, size, np.tile(DIRECTIONS, (len(DISTANCES), 1)), gaps)
        covered = overlap(candidates[:, None], taken).sum(axis=1)
        outside = size.prod() - overlap(candidates, bounds)
        best = np.argmin(covered + OUTSIDE * outside + FAR * gaps)
        taken = np.vstack([taken, candidates[best]])
    return taken[len(taken) - len(points) :]


def overlap(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Common area of boxes (..., 4), broadcast."""
    size = np.minimum(a[..., 2:], b[..., 2:]) - np.maximum(a[..., :2], b[..., :2])
    return np.maximum(size, 0).prod(axis=-1)


def around(points: np.ndarray, reach: float) -> np.ndarray:
    """Squares (..., 4) with the points (..., 2) in their middle."""
    return np.concatenate([points - reach, points + reach], axis=-1)


def _beside(
    point: np.ndarray, size: np.ndarray, directions: np.ndarray, gaps: np.ndarray
) -> np.ndarray:
    """Boxes (C, 4) of a size, each its gap away from the point in its direction."""
    unit = directions / np.linalg.norm(directions, axis=1, keepdims=True)
    corner = point + unit * gaps[:, None] - (1 - directions) / 2 * size
    return np.concatenate([corner, corner + size], axis=1)
