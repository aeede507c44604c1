"""Estimates with their intervals."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from scipy import stats


class Interval(NamedTuple):
    """An estimate and its 95 % interval; infinite bounds where these are not known."""

    value: float
    low: float
    high: float

    @property
    def is_known(self) -> bool:
        """Whether the interval is finite."""
        return bool(np.isfinite([self.low, self.high]).all())

    def exp(self) -> Interval:
        """The interval of a ratio from that of its logarithm."""
        return Interval(*(float(v) for v in np.exp(self)))


def paired_interval(differences: Sequence[float]) -> Interval:
    """Mean of paired differences with a 95 % interval by Student's t; infinite for one pair."""
    d = np.asarray(differences, float)
    mean = float(d.mean())
    if len(d) < 2:
        return Interval(mean, -np.inf, np.inf)
    half_width = stats.t.ppf(0.975, len(d) - 1) * d.std(ddof=1) / np.sqrt(len(d))
    return Interval(mean, float(mean - half_width), float(mean + half_width))


def bootstrap_interval(
    statistic: Callable, *columns: np.ndarray, n: int = 1000, seed: int = 0
) -> Interval:
    """`statistic(*columns)` with a 95 % interval by resampling rows of the columns together."""
    rng = np.random.default_rng(seed)
    columns = [np.asarray(c) for c in columns]
    resamples = rng.integers(len(columns[0]), size=(n, len(columns[0])))
    draws = [statistic(*(c[rows] for c in columns)) for rows in resamples]
    low, high = np.percentile(draws, [2.5, 97.5])
    return Interval(float(statistic(*columns)), float(low), float(high))
