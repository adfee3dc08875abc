"""How far a mean over few samples can be trusted."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import numpy as np
from numpy.typing import NDArray


def bootstrap_interval(
    values: Sequence[float],
    groups: Sequence[Hashable] | None = None,
    level: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> tuple[float, float]:
    """Percentile bootstrap interval of the mean.

    Args:
        values: N >= 1 numbers.
        groups: N labels, such as prompts. Values of one label are alike, so groups are drawn; default: each value.
        level: share of the resampled means inside the interval, in (0, 1).

    Returns:
        (low, high); the same arguments give the same interval. One group alone gives (mean, mean).
    """
    return percentile_interval(resampled_means(values, groups, resamples=resamples, seed=seed), level)


def resampled_means(
    values: Sequence[float],
    groups: Sequence[Hashable] | None = None,
    weights: Sequence[float] | None = None,
    resamples: int = 2000,
    seed: int = 0,
) -> NDArray[np.float64]:
    """The mean of each resample, [resamples]; the same groups and seed are resampled alike whatever the values.

    Args:
        values, groups: as for :func:`bootstrap_interval`.
        weights: N numbers >= 0; a resample of weight 0 gives NaN.
    """
    numbers = np.asarray(values, dtype=np.float64)
    weight = np.ones(len(numbers)) if weights is None else np.asarray(weights, dtype=np.float64)
    member = group_members(range(len(numbers)) if groups is None else groups)
    sums = np.bincount(member, weights=weight * numbers)
    totals = np.bincount(member, weights=weight)
    drawn = resampled_groups(len(sums), resamples, seed)
    total = totals[drawn].sum(axis=1)
    return sums[drawn].sum(axis=1) / np.where(total > 0, total, np.nan)


def group_members(groups: Sequence[Hashable]) -> NDArray[np.int64]:
    """The position of each value's group among the distinct groups, [N]."""
    distinct = {label: position for position, label in enumerate(dict.fromkeys(groups))}
    return np.array([distinct[label] for label in groups], dtype=np.int64)


def resampled_groups(count: int, resamples: int, seed: int = 0) -> NDArray[np.int64]:
    """Which of ``count`` groups each resample draws, with replacement, [resamples, count]."""
    return np.random.default_rng(seed).integers(count, size=(resamples, count))


def percentile_interval(statistics: NDArray[np.float64], level: float = 0.95) -> tuple[float, float]:
    """The middle ``level`` of resampled statistics; NaN, a resample that has none, does not count."""
    low, high = np.nanquantile(statistics, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)
