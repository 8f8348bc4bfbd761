from __future__ import annotations

import numpy as np
import pytest

from analysis.pareto import area, front


def beaten(i: int, cost: list[float], quality: list[float], higher: bool) -> bool:
    sign = 1 if higher else -1
    return any(
        cost[j] <= cost[i]
        and sign * quality[j] >= sign * quality[i]
        and (cost[j], quality[j]) != (cost[i], quality[i])
        for j in range(len(cost))
    )


@pytest.mark.parametrize("higher", [True, False])
@pytest.mark.parametrize("seed", range(20))
def test_front_is_what_no_point_beats(seed: int, higher: bool) -> None:
    rng = np.random.default_rng(seed)
    cost, quality = rng.integers(0, 8, (2, 25)).astype(float)  # with ties and doubles
    expected = [not beaten(i, list(cost), list(quality), higher) for i in range(25)]
    assert front(cost, quality, higher).tolist() == expected


def test_front_leaves_missing_points_out() -> None:
    cost, quality = np.array([1.0, np.nan, 2.0, 0.5]), np.array([1.0, 9.0, 2.0, np.nan])
    assert front(cost, quality).tolist() == [True, False, True, False]


@pytest.mark.parametrize("higher", [True, False])
@pytest.mark.parametrize("seed", range(5))
def test_area_is_the_integral_of_the_best_quality_reachable(seed: int, higher: bool) -> None:
    rng = np.random.default_rng(seed)
    cost, gain = rng.uniform(0, 1.2, 12), rng.uniform(-0.2, 1, 12)
    quality = 5 + gain if higher else 5 - gain
    budgets = (np.arange(200_000) + 0.5) / 200_000
    reachable = [np.where(c <= budgets, max(g, 0), 0) for c, g in zip(cost, gain, strict=True)]
    integral = np.max(reachable, axis=0).mean()
    assert area(cost, quality, 1.0, 5.0, higher) == pytest.approx(integral, abs=1e-4)


def test_area_without_points_is_zero() -> None:
    assert area(np.array([]), np.array([]), 1.0, 0.0) == 0
    assert area(np.array([2.0, np.nan]), np.array([3.0, 3.0]), 1.0, 0.0) == 0
