"""Quality-runtime fronts. Pure numpy."""

from __future__ import annotations

import numpy as np


def front(cost: np.ndarray, quality: np.ndarray, higher_is_better: bool = True) -> np.ndarray:
    """Which points no other point beats: bool (K,).

    A point is beaten by one that costs no more and is no worse, and is better in one of the two.
    Points with a missing (NaN) coordinate are never on the front and beat nobody.
    """
    cost, gain = _oriented(cost, quality, higher_is_better)
    finite = np.isfinite(cost) & np.isfinite(gain)
    no_worse = (cost[:, None] <= cost) & (gain[:, None] >= gain)  # (K, K): row against column
    better = (cost[:, None] < cost) | (gain[:, None] > gain)
    beaten = (no_worse & better & finite[:, None]).any(axis=0)
    return finite & ~beaten


def area(
    cost: np.ndarray,
    quality: np.ndarray,
    limit: float,
    worst: float,
    higher_is_better: bool = True,
) -> float:
    """Area between the front and `worst`, over costs from 0 to `limit` (2-D hypervolume).

    The front is a staircase: at every cost it has the best quality reachable for no more. Points
    beyond `limit` or no better than `worst` add nothing; without any point the area is 0.
    """
    cost, gain = _oriented(cost, quality, higher_is_better)
    gain = gain - (worst if higher_is_better else -worst)
    useful = front(cost, gain) & (cost < limit) & (gain > 0)
    order = np.argsort(cost[useful], kind="stable")
    steps = np.append(cost[useful][order], limit)
    return float((np.diff(steps) * gain[useful][order]).sum())


def _oriented(
    cost: np.ndarray, quality: np.ndarray, higher_is_better: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Both as float64, quality turned so that more is better."""
    quality = np.asarray(quality, np.float64)
    return np.asarray(cost, np.float64), quality if higher_is_better else -quality
