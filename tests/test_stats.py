"""The interval of a ratio crossed over seeds and documents."""

from __future__ import annotations

import numpy as np
import pytest
from lab.stats import crossed_ratio, paired_interval


def world(rng, seeds: int, documents: int, of_seed: float, of_document: float, rest: float):
    """Sums [seeds, documents] of two systems whose totals have an expected ratio of 0.6.

    Documents differ in length and difficulty, in what the first system gains on them, seeds in
    both systems, and each (seed, document) has noise of its own.
    """
    size = rng.lognormal(4.5, 1.0, documents) * rng.lognormal(0, 0.5, documents)
    gain = np.exp(rng.normal(0, of_document, documents) - of_document**2 / 2)

    def system(level: float) -> np.ndarray:
        seed = 1 + rng.normal(0, of_seed, (seeds, 1))
        return level * size * seed * rng.gamma(1 / rest**2, rest**2, (seeds, documents))

    return 0.06 * gain * system(1.0), 0.1 * system(1.0)


@pytest.mark.parametrize(
    ("seeds", "documents", "of_seed", "of_document", "rest"),
    [
        (3, 400, 0.03, 0.0, 0.1),  # seeds decide
        (3, 400, 0.03, 0.3, 0.3),  # seeds and documents
        (5, 800, 0.02, 0.4, 0.4),
        (5, 400, 0.002, 0.3, 0.2),  # documents decide
    ],
)
def test_95_percent_of_the_intervals_hold_the_truth(seeds, documents, of_seed, of_document, rest):
    rng, hits, n = np.random.default_rng(1), 0, 2000
    for _ in range(n):
        interval = crossed_ratio(*world(rng, seeds, documents, of_seed, of_document, rest))
        hits += interval.low < 0.6 < interval.high
    assert 0.93 <= hits / n <= 0.97


def test_intervals_over_seeds_alone_miss_the_documents():
    """What the crossed interval is for: seeds share their documents."""
    rng, hits, n = np.random.default_rng(1), 0, 500
    for _ in range(n):
        ours, rival = world(rng, 3, 400, 0.01, 0.4, 0.1)
        interval = paired_interval(np.log(ours.sum(1) / rival.sum(1))).exp()
        hits += interval.low < 0.6 < interval.high
    assert hits / n < 0.85


def test_the_ratio_by_hand():
    ours, rival = np.array([[1.0, 3.0], [2.0, 2.0]]), np.array([[2.0, 6.0], [4.0, 4.0]])
    interval = crossed_ratio(ours, rival)
    assert interval.value == 0.5 and interval.low == interval.high == pytest.approx(0.5)
    assert not crossed_ratio(ours[:1], rival[:1]).is_known, "one seed"
    assert not crossed_ratio(ours[:, :1], rival[:, :1]).is_known, "one document"
    assert not crossed_ratio(-ours, rival).is_known, "no cross-entropy is added"


def test_the_order_of_seeds_and_documents_does_not_matter():
    rng = np.random.default_rng(0)
    ours, rival = world(rng, 3, 50, 0.03, 0.3, 0.3)
    rows, columns = rng.permutation(3), rng.permutation(50)
    moved = crossed_ratio(ours[rows][:, columns], rival[rows][:, columns])
    assert moved == pytest.approx(crossed_ratio(ours, rival))
    scaled = crossed_ratio(2 * ours, rival)
    assert np.divide(scaled, crossed_ratio(ours, rival)) == pytest.approx(2)
