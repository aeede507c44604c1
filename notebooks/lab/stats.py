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


def crossed_ratio(ours_SD: np.ndarray, rival_SD: np.ndarray) -> Interval:
    """Ratio of two totals with a 95 % interval crossed over seeds and documents.

    Both hold sums of seeds S x documents D, of the same documents; row s of both has one seed. The
    logarithm of the ratio is linearised, so that each (seed, document) has an influence on it.
    Their variance has parts for seeds, documents and the rest, as in a two-way analysis of
    variance; Student's t has the degrees of freedom of Satterthwaite. A bootstrap over three seeds
    would give too narrow an interval. Infinite for one seed, one document or a total that is not
    positive.
    """
    ours, rival = np.asarray(ours_SD, float), np.asarray(rival_SD, float)
    seeds, documents = ours.shape
    if ours.sum() <= 0 or rival.sum() <= 0:
        return Interval(np.nan, -np.inf, np.inf)
    value = ours.sum() / rival.sum()
    if seeds < 2 or documents < 2:
        return Interval(value, -np.inf, np.inf)
    influence = seeds * documents * (ours / ours.sum() - rival / rival.sum())  # mean 0
    of_seeds, of_documents = influence.mean(1), influence.mean(0)
    rest = influence - of_seeds[:, None] - of_documents
    free = np.array([seeds - 1, documents - 1, (seeds - 1) * (documents - 1)])
    squares = np.array(
        [
            documents * (of_seeds**2).sum(),
            seeds * (of_documents**2).sum(),
            (rest**2).sum(),
        ]
    )
    parts = squares / free / (seeds * documents)  # variances of the mean
    variance = max(parts[0] + parts[1] - parts[2], parts[0], parts[1])
    freedom = max(seeds - 1, variance**2 / (parts**2 / free).sum()) if variance else 1
    half_width = stats.t.ppf(0.975, freedom) * np.sqrt(variance)
    return Interval(*(np.log(value) + half_width * np.array([0, -1, 1]))).exp()


def bootstrap_interval(
    statistic: Callable, *columns: np.ndarray, n: int = 1000, seed: int = 0
) -> Interval:
    """`statistic(*columns)` with a 95 % interval by resampling rows of the columns together.

    Infinite for one row. Raises ValueError for columns of different lengths.
    """
    rng = np.random.default_rng(seed)
    columns = [np.asarray(c) for c in columns]
    if len({len(column) for column in columns}) > 1:
        raise ValueError(f"columns of {[len(c) for c in columns]} rows: expected equal lengths")
    if len(columns[0]) < 2:
        return Interval(float(statistic(*columns)), -np.inf, np.inf)
    resamples = rng.integers(len(columns[0]), size=(n, len(columns[0])))
    draws = [statistic(*(c[rows] for c in columns)) for rows in resamples]
    low, high = np.percentile(draws, [2.5, 97.5])
    return Interval(float(statistic(*columns)), float(low), float(high))
