"""Statistics over prompts: expected best-of-N, bootstrap intervals, paired differences.

P prompts, R samples per prompt. NaN is a value that is not known: it is left out, never counted as 0.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import numpy as np

T = TypeVar("T")
RESAMPLES = 2000
LEVEL = 0.95
NORMAL = 1.959964  # half the width of the 95% interval of a normal distribution, in standard errors
JACKKNIFE_GROUPS = 100  # a standard error from so many groups is itself known to about 7%
BEST_OF = (1, 2, 4, 8, 16)  # the N of best-of-N in reports


class Interval(NamedTuple):
    """An estimate with its bootstrap interval over prompts; all NaN when no prompt is known."""

    value: float
    low: float
    high: float
    prompts: int


def best_of_weights(selection_PR: np.ndarray, n: int) -> np.ndarray:
    """Probability of each sample to have the highest selection score among n drawn without replacement.

    Samples of unknown score are never drawn (weight 0); equal scores share the probability. With m known scores, c of them at or
    below s, the best of n is at or below s with probability C(c, n) / C(m, n); differences of that over the distinct scores give the
    probability of each score. The mean of a metric with these weights is its exact mean over all subsets of size n.

    Args:
      selection_PR: scores float64 [P, R], NaN where unknown.
      n: samples to choose from, 1 to R; 1 gives the plain mean.

    Returns:
      Weights [P, R]; rows sum to 1, or are NaN where fewer than n scores are known.
    """
    weights_PR = np.full(selection_PR.shape, np.nan)
    for scores_R, weights_R in zip(selection_PR, weights_PR):
        known = np.isfinite(scores_R)
        m = int(known.sum())
        if m < n:
            continue
        weights_R[:] = 0.0
        below = 0
        for score in np.unique(scores_R[known]):
            here = known & (scores_R == score)
            count = int(here.sum())
            weights_R[here] = (math.comb(below + count, n) - math.comb(below, n)) / math.comb(m, n) / count
            below += count
    return weights_PR


def weighted_rows(metric_PR: np.ndarray, weights_PR: np.ndarray) -> np.ndarray:
    """Weighted mean over the samples of each prompt [P], of a metric [P, R] with weights [P, R]; unknown entries are left out.

    NaN where the weights are NaN, or where no sample of positive weight has a known metric.
    """
    used_PR = np.where(np.isfinite(metric_PR), weights_PR, 0.0)
    total_P = used_PR.sum(-1)
    value_P = (used_PR * np.nan_to_num(metric_PR)).sum(-1)
    return np.divide(value_P, total_P, out=np.full(len(metric_PR), np.nan), where=total_P > 0)


def bootstrap_mean(value_P: np.ndarray, seed: int = 0) -> Interval:
    """Mean over prompts with a percentile bootstrap interval. Resamples prompts, since the samples of one prompt are not independent."""
    known = value_P[np.isfinite(value_P)]
    if not known.size:
        return Interval(math.nan, math.nan, math.nan, 0)
    means = known[_resample(known.size, seed)].mean(-1)
    return Interval(float(known.mean()), *_percentiles(means), known.size)


def paired_difference(a_P: np.ndarray, b_P: np.ndarray, seed: int = 0) -> Interval:
    """Mean of a - b over the prompts where both are known, with its interval."""
    return bootstrap_mean(a_P - b_P, seed)


def paired_ratio(a_P: np.ndarray, b_P: np.ndarray, seed: int = 0) -> Interval:
    """mean(a) / mean(b) over the prompts where both are known, with its interval; NaN when the mean of b is 0."""
    both = np.isfinite(a_P) & np.isfinite(b_P)
    a, b = a_P[both], b_P[both]
    if not a.size or b.mean() == 0:
        return Interval(math.nan, math.nan, math.nan, int(a.size))
    rows = _resample(a.size, seed)
    top, bottom = a[rows].mean(-1), b[rows].mean(-1)
    # A resample without any success in b has an infinite ratio; it belongs to the upper end.
    ratios = np.divide(top, bottom, out=np.full(len(top), np.inf), where=bottom > 0)
    return Interval(float(a.mean() / b.mean()), *_percentiles(ratios), int(a.size))


def jackknife_error(clusters: Sequence[Sequence[T]], statistic: Callable[[list[T]], float | None]) -> float:
    """Standard error of any smooth statistic of independent clusters, by the grouped jackknife: it is computed again without each group.

    Every cluster is a group of its own up to `JACKKNIFE_GROUPS`; more clusters are shuffled into so many groups.

    Args:
      clusters: what is kept or left out together, such as the questions about one image.
      statistic: of the members of several clusters, in the order of `clusters`; None where it is not defined.

    Returns:
      NaN for fewer than two clusters, or where the statistic is not defined without one of the groups.
    """
    groups = min(len(clusters), JACKKNIFE_GROUPS)
    if groups < 2:
        return math.nan
    group_of = np.random.default_rng(0).permutation(len(clusters)) % groups
    without = [statistic([x for cluster, g in zip(clusters, group_of) if g != group for x in cluster]) for group in range(groups)]
    values = np.array([math.nan if value is None else value for value in without], np.float64)
    return float(np.sqrt((groups - 1) / groups * ((values - values.mean()) ** 2).sum()))


def held_up_to(single: float, best: Mapping[int, float]) -> int:
    """The largest N such that one sample of mean `single` scores above the best of N and of every smaller N; 0: not even above one.

    Args:
      best: N -> mean of the best of N, by rising N; NaN where unknown.
    """
    held = 0
    for n, value in best.items():
        if not single > value:
            break
        held = n
    return held


def number(value: float) -> float | None:
    """A value for JSON: None in place of NaN and infinity."""
    return float(value) if math.isfinite(value) else None


def bounds(interval: Interval) -> list[float | None] | None:
    """[low, high], or None when nothing was measured."""
    return None if math.isnan(interval.value) else [number(interval.low), number(interval.high)]


def with_bounds(interval: Interval) -> dict[str, Any]:
    """A value with its interval."""
    return {"value": number(interval.value), "ci95": bounds(interval)}


def _resample(n: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(n, size=(RESAMPLES, n))


def _percentiles(values: np.ndarray) -> tuple[float, float]:
    # "lower"/"higher" never interpolate, which matters where a value is infinite.
    tail = (1 - LEVEL) / 2
    return float(np.quantile(values, tail, method="lower")), float(np.quantile(values, 1 - tail, method="higher"))
