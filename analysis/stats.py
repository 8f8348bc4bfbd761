"""Means over prompts, how sure they are, and differences at equal runtime. Pure numpy.

P counts prompts, S the seeds of each, K settings of one method. A missing value is NaN and stays
out of everything; it never becomes a number.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from analysis.pareto import front

LEVEL = 0.95
RESAMPLES = 10_000
HELD = 0.025  # of the reference's runtime: so far from a runtime a setting still counts as there


@dataclass(frozen=True)
class Estimate:
    """A mean over n prompts with its 95 % interval; the interval is NaN below two prompts.

    `spread` is the standard deviation of the seeds' own means, NaN below two seeds.
    """

    mean: float
    low: float
    high: float
    n: int
    spread: float = np.nan


NOTHING = Estimate(np.nan, np.nan, np.nan, 0)


def bootstrap(values: np.ndarray, seed: int = 0) -> Estimate:
    """Mean of the finite values (P,) or (P, S) and its percentile bootstrap interval over prompts.

    Prompts are clusters: a prompt is averaged over its seeds and resampled as a whole. Its average
    varies with the seeds already; to resample them too would count their variance twice (Davison &
    Hinkley, Bootstrap Methods and their Application, 1997, section 3.8).
    """
    values = np.asarray(values, dtype=np.float64).reshape(len(values), -1)
    known = np.isfinite(values)
    values, known = values[known.any(axis=1)], known[known.any(axis=1)]
    if not len(values):
        return NOTHING
    means = np.where(known, values, 0).sum(axis=1) / known.sum(axis=1)
    spread = _spread(values[:, known.any(axis=0)])
    if len(means) == 1:
        return Estimate(float(means[0]), np.nan, np.nan, 1, spread)
    tail = 100 * (1 - LEVEL) / 2
    low, high = np.percentile(resamples(len(means), seed) @ means, [tail, 100 - tail])
    return Estimate(float(means.mean()), float(low), float(high), len(means), spread)


def _spread(values: np.ndarray) -> float:
    """Standard deviation of the means of the columns of (P, S), over the prompts with all seeds."""
    complete = values[np.isfinite(values).all(axis=1)]
    if not len(complete) or complete.shape[1] < 2:
        return np.nan
    return float(complete.mean(axis=0).std(ddof=1))


@lru_cache(maxsize=8)
def resamples(n: int, seed: int = 0) -> np.ndarray:
    """(RESAMPLES, n): the weight of each of n values in each resample's mean."""
    picks = np.random.default_rng(seed).integers(n, size=(RESAMPLES, n))
    slots = picks + n * np.arange(RESAMPLES)[:, None]
    return np.bincount(slots.ravel(), minlength=RESAMPLES * n).reshape(RESAMPLES, n) / n


def paired(values: np.ndarray, baseline: np.ndarray, seed: int = 0) -> Estimate:
    """Mean of values - baseline, (P,) or (P, S), over the videos that have both, as `bootstrap`."""
    return bootstrap(np.asarray(values) - np.asarray(baseline), seed)


def at_runtime(
    runtime: np.ndarray,
    quality: np.ndarray,
    target: float,
    higher_is_better: bool,
    held: float = 0.0,
) -> np.ndarray:
    """A method's quality per video at a runtime between those of its settings.

    The curve runs through the settings on the method's own Pareto front of mean quality, linear
    between neighbours for every video by itself; past the last of them the best setting holds,
    since a slower setting need not be used. The same rule holds for every method, flow matching
    too.

    Args:
        runtime: (K,) measured runtime of each setting, NaN where it was not measured.
        quality: (V, K), a row per prompt and seed, NaN where a video was not scored.
        target: the runtime asked for, in the unit of `runtime`.
        held: how far outside the measured runtimes it may lie, in the same unit; the setting at
            that end counts.

    Returns:
        (V,), all NaN where `target` lies outside the measured runtimes: nothing is extrapolated.
    """
    runtime, quality = np.asarray(runtime, np.float64), np.asarray(quality, np.float64)
    known = np.isfinite(runtime) & np.isfinite(quality).any(axis=0)
    runtime, quality = runtime[known], quality[:, known]
    missing = np.full(len(quality), np.nan)
    if not len(runtime) or not runtime.min() - held <= target <= runtime.max() + held:
        return missing
    best = front(runtime, np.nanmean(quality, axis=0), higher_is_better)
    order = np.flatnonzero(best)[np.argsort(runtime[best], kind="stable")]
    return _interpolate(runtime[order], quality[:, order], target)


def _interpolate(knots: np.ndarray, quality: np.ndarray, target: float) -> np.ndarray:
    """Linear in each row of (V, K) over ascending knots (K,), held outside of them."""
    right = int(np.searchsorted(knots, target))
    if right == len(knots):
        return quality[:, -1]
    if knots[right] == target or right == 0:
        return quality[:, right]
    weight = (target - knots[right - 1]) / (knots[right] - knots[right - 1])
    return (1 - weight) * quality[:, right - 1] + weight * quality[:, right]
