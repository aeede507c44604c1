"""The staged search finds planted optima, extends its grids, and never wins by a diverged run."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tsae.search import edges, search

START = {"lr": 4e-3, "norm": 1.0, "aux_k": 0}
STAGES = [{"lr": (2e-3, 4e-3, 8e-3), "norm": (0.1, 1.0)}, {"aux_k": (0, 32)}, {"lr": (4e-3, 8e-3)}]


def bowl(lr: float, norm: float, aux_k: int):
    """A run whose score is smallest at these settings; counts what it is given."""
    batches = []

    def run(recipes: list[dict]) -> list[dict]:
        batches.append(recipes)
        return [
            {
                "score": math.log(r["lr"] / lr) ** 2
                + math.log(r["norm"] / norm) ** 2
                + 0.1 * (r["aux_k"] != aux_k)
            }
            for r in recipes
        ]

    return run, batches


def test_a_planted_optimum_is_found_beyond_the_grid():
    run, batches = bowl(3.2e-2, 0.1, 32)
    best, rows = search(run, START, STAGES, open_ended=("lr", "norm"))
    assert best == {"lr": pytest.approx(3.2e-2), "norm": 0.1, "aux_k": 32}
    assert not edges(rows, best, ("lr", "norm")), "the best lies inside"
    assert max(row["lr"] for row in rows) > 3.2e-2 and min(row["norm"] for row in rows) < 0.1
    assert len(batches[0]) == 6, "a stage's grid is one batch"
    assert [row["stage"] for row in rows] == sorted(row["stage"] for row in rows)


def test_nothing_runs_twice_and_no_more_than_allowed():
    run, batches = bowl(1.0, 1e-3, 32)
    _, rows = search(run, START, STAGES, open_ended=("lr", "norm"), most=11)
    tried = [tuple(sorted(r.items())) for batch in batches for r in batch]
    assert len(tried) == len(set(tried)) == len(rows) == 11


def test_a_later_grid_goes_on_from_the_best_and_not_from_its_own_end():
    """The best rate lies above a later stage's grid: nothing below that grid is tried."""
    run, _ = bowl(3.2e-2, 1.0, 0)
    stages = [{"lr": (1.6e-2, 3.2e-2, 6.4e-2)}, {"lr": (4e-3, 8e-3)}]
    best, rows = search(run, START, stages, open_ended=("lr",))
    assert best["lr"] == 3.2e-2 and min(row["lr"] for row in rows) == 4e-3


def test_an_edge_is_named():
    run, _ = bowl(1.0, 1.0, 0)
    best, rows = search(run, START, [{"lr": (1e-3, 2e-3)}])
    assert edges(rows, best, ("lr",)) == ["lr"], "a closed grid ends there"


def test_a_diverged_run_never_wins():
    def run(recipes):
        return [{"score": math.nan if r["lr"] > 4e-3 else r["lr"]} for r in recipes]

    best, rows = search(run, START, STAGES)
    assert best["lr"] == 2e-3 and any(math.isnan(row["score"]) for row in rows)
    with pytest.raises(ValueError, match="no recipe of 6 has a finite score"):
        search(lambda rs: [{"score": math.inf}] * len(rs), START, STAGES[:1])


@given(lr=st.floats(1e-4, 1.0), norm=st.floats(0.02, 5.0), aux_k=st.sampled_from((0, 32)))
def test_the_result_is_the_best_of_what_was_tried(lr, norm, aux_k):
    run, _ = bowl(lr, norm, aux_k)
    best, rows = search(run, START, STAGES, open_ended=("lr", "norm"))
    least = min(rows, key=lambda row: row["score"])
    assert all(least[name] == best[name] for name in START)
