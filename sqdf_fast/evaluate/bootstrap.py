"""How far a mean over few samples can be trusted."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import numpy as np


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
        groups: N labels, such as prompts. Values of one label are alike, so whole groups are drawn; without
            labels every value is drawn on its own.
        level: share of the resampled means inside the interval, in (0, 1).

    Returns:
        (low, high); the same arguments give the same interval. One group alone gives (mean, mean).
    """
    numbers = np.asarray(values, dtype=np.float64)
    labels = list(range(len(numbers))) if groups is None else list(groups)
    distinct = {label: position for position, label in enumerate(dict.fromkeys(labels))}
    member = np.array([distinct[label] for label in labels])
    sums = np.bincount(member, weights=numbers)
    counts = np.bincount(member)
    drawn = np.random.default_rng(seed).integers(len(sums), size=(resamples, len(sums)))
    means = sums[drawn].sum(axis=1) / counts[drawn].sum(axis=1)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)
