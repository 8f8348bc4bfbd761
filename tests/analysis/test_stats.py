from __future__ import annotations

import numpy as np
import pytest

from analysis.stats import at_runtime, bootstrap, paired


def test_interval_covers_the_true_mean_as_often_as_it_says() -> None:
    rng = np.random.default_rng(0)
    estimates = [bootstrap(rng.normal(3.0, 2.0, 40)) for _ in range(1000)]
    covered = np.mean([e.low <= 3.0 <= e.high for e in estimates])
    assert 0.92 <= covered <= 0.97


def test_interval_has_the_width_of_the_standard_error() -> None:
    values = np.random.default_rng(1).normal(0, 1, 200)
    estimate = bootstrap(values)
    expected = 2 * 1.96 * values.std() / np.sqrt(200)
    assert estimate.high - estimate.low == pytest.approx(expected, rel=0.05)
    assert estimate.mean == pytest.approx(values.mean())


def test_bootstrap_is_seeded() -> None:
    values = np.random.default_rng(3).normal(size=20)
    assert bootstrap(values, seed=1) == bootstrap(values, seed=1)
    assert bootstrap(values, seed=1) != bootstrap(values, seed=2)


def test_missing_values_are_left_out() -> None:
    values = np.array([1.0, np.nan, 3.0])
    assert bootstrap(values) == bootstrap(np.array([1.0, 3.0]))
    assert bootstrap(values).n == 2


def test_too_few_prompts_have_no_interval() -> None:
    one, none = bootstrap(np.array([2.5])), bootstrap(np.array([np.nan]))
    assert (one.mean, one.n) == (2.5, 1) and np.isnan([one.low, one.high]).all()
    assert none.n == 0 and np.isnan([none.mean, none.low, none.high]).all()


def test_pairing_removes_what_prompts_share() -> None:
    rng = np.random.default_rng(2)
    difficulty = rng.normal(0, 10, 30)
    better = difficulty + 1.5
    estimate = paired(better, difficulty)
    assert (estimate.mean, estimate.low, estimate.high) == pytest.approx((1.5, 1.5, 1.5))
    assert paired(difficulty, difficulty).mean == 0
    assert paired(difficulty, better).mean == pytest.approx(-estimate.mean)
    assert bootstrap(better).low < 0 < estimate.low  # unpaired, the gain drowns


def test_pairs_need_both_sides() -> None:
    estimate = paired(np.array([1.0, np.nan, 5.0]), np.array([0.0, 0.0, np.nan]))
    assert (estimate.mean, estimate.n) == (1.0, 1)


def videos(rng, prompts: int, seeds: int, by_prompt=0.0, by_seed=0.0, rest=0.0) -> np.ndarray:
    """(P, S) around 3 with standard deviations of the prompts, of the seeds, and of each video."""
    shared = rng.normal(0, by_prompt, (prompts, 1)) + rng.normal(0, by_seed, (1, seeds))
    return 3 + shared + rng.normal(0, rest, (prompts, seeds))


@pytest.mark.parametrize(("by_prompt", "rest"), [(2.0, 1.0), (1.0, 4.0), (0.0, 2.0)])
def test_interval_over_several_seeds_covers_the_true_mean(by_prompt, rest) -> None:
    """Whatever share of the variance is the prompts' and whatever the seeds'."""
    rng = np.random.default_rng(4)
    made = (videos(rng, 40, 5, by_prompt, rest=rest) for _ in range(1000))
    covered = np.mean([e.low <= 3.0 <= e.high for e in map(bootstrap, made)])
    assert 0.92 <= covered <= 0.97


@pytest.mark.parametrize(("by_prompt", "rest"), [(2.0, 1.0), (1.0, 4.0), (0.0, 2.0)])
def test_interval_over_several_seeds_has_the_width_of_the_variance_components(
    by_prompt, rest
) -> None:
    """The mean's variance is by_prompt^2 / P + rest^2 / (P S); prompts are the clusters."""
    rng = np.random.default_rng(5)
    widths = [
        estimate.high - estimate.low
        for estimate in (bootstrap(videos(rng, 200, 5, by_prompt, rest=rest)) for _ in range(20))
    ]
    expected = 2 * 1.96 * np.sqrt(by_prompt**2 / 200 + rest**2 / 1000)
    assert np.mean(widths) == pytest.approx(expected, rel=0.03)


def test_spread_is_that_of_the_seeds_whatever_the_prompts_are() -> None:
    """The variance of a seed's mean is by_seed^2 + rest^2 / P."""
    rng = np.random.default_rng(6)
    made = (videos(rng, 50, 5, by_prompt=30.0, by_seed=0.5, rest=2.0) for _ in range(500))
    variance = np.mean([bootstrap(values).spread ** 2 for values in made])
    assert variance == pytest.approx(0.5**2 + 2.0**2 / 50, rel=0.1)


def test_spread_compares_seeds_on_the_same_prompts() -> None:
    values = np.array([[1.0, 3.0], [11.0, 13.0], [90.0, np.nan]])
    assert bootstrap(values).spread == pytest.approx(np.sqrt(2))
    assert bootstrap(values).mean == pytest.approx((2 + 12 + 90) / 3)
    assert bootstrap(np.column_stack([values, [np.nan] * 3])) == bootstrap(values)  # not made yet
    assert np.isnan(bootstrap(values[:, :1]).spread) and np.isnan(bootstrap(values[2:]).spread)


def test_one_seed_is_a_column() -> None:
    values = np.random.default_rng(7).normal(size=9)
    assert repr(bootstrap(values)) == repr(bootstrap(values[:, None]))


def test_pairs_share_prompt_and_seed() -> None:
    """What both sides have in common goes, and a seed that one side lacks does not tilt them."""
    rng = np.random.default_rng(8)
    common = videos(rng, 30, 4, by_prompt=5.0, by_seed=5.0, rest=5.0)
    better = common + 1.5
    better[3, 2] = common[7, 0] = np.nan
    found = paired(better, common)
    assert (found.mean, found.low, found.high, found.n) == pytest.approx((1.5, 1.5, 1.5, 30))
    assert found.spread == pytest.approx(0, abs=1e-12)


RUNTIME = np.array([1.0, 2.0, 4.0])
QUALITY = np.array([[10.0, 20.0, 30.0], [0.0, 8.0, 16.0]])  # (P, K)


@pytest.mark.parametrize(
    ("target", "expected"),
    [(1.0, (10, 0)), (1.5, (15, 4)), (2.0, (20, 8)), (3.5, (27.5, 14)), (4.0, (30, 16))],
)
def test_quality_is_interpolated_for_each_prompt(target: float, expected: tuple) -> None:
    assert at_runtime(RUNTIME, QUALITY, target, True) == pytest.approx(expected)
    assert at_runtime(RUNTIME, -QUALITY, target, False) == pytest.approx(-np.array(expected))
    shuffled = [2, 0, 1]
    assert at_runtime(RUNTIME[shuffled], QUALITY[:, shuffled], target, True) == pytest.approx(
        expected
    )


@pytest.mark.parametrize("target", [0.5, 4.5, np.nan])
def test_nothing_is_extrapolated(target: float) -> None:
    assert np.isnan(at_runtime(RUNTIME, QUALITY, target, True)).all()


def test_the_settings_at_the_ends_count_a_little_further_where_asked() -> None:
    assert at_runtime(RUNTIME, QUALITY, 4.2, True, held=0.25) == pytest.approx([30, 16])
    assert at_runtime(RUNTIME, QUALITY, 0.8, True, held=0.25) == pytest.approx([10, 0])
    for target in (0.7, 4.3):
        assert np.isnan(at_runtime(RUNTIME, QUALITY, target, True, held=0.25)).all()


def test_settings_that_others_of_the_method_beat_are_not_used() -> None:
    runtime = np.array([1.0, 2.0, 3.0, 4.0])
    quality = np.array([[10.0, 20.0, 5.0, 15.0]])
    assert at_runtime(runtime, quality, 3.0, True) == pytest.approx([20])
    assert at_runtime(runtime, quality, 4.0, True) == pytest.approx([20])


def test_missing_prompts_and_settings_stay_missing() -> None:
    quality = np.array([[10.0, 20.0, np.nan], [0.0, np.nan, np.nan]])
    assert at_runtime(RUNTIME, quality, 1.5, True) == pytest.approx([15, np.nan], nan_ok=True)
    assert np.isnan(at_runtime(RUNTIME, quality, 3.0, True)).all()  # the slowest was not scored
    unknown = np.array([1.0, np.nan, 4.0])
    assert at_runtime(unknown, QUALITY, 2.5, True) == pytest.approx([20, 8])
