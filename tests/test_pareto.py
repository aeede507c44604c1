"""Comparisons of Pareto curves (notebooks/pareto.py) on curves whose answer is known."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pareto
import pytest

CURVE = pd.DataFrame({"ce_added": [0.1, 0.2, 0.4], "l0": [40.0, 20.0, 10.0]})


def test_half_the_l0_is_found_at_equal_cross_entropy():
    half = CURVE.assign(l0=CURVE.l0 / 2)
    assert pareto.l0_at_equal("ce_added", half, CURVE) == pytest.approx(0.5)


def test_curves_without_a_shared_range_give_no_ratio():
    elsewhere = CURVE.assign(ce_added=9.0)
    assert np.isnan(pareto.l0_at_equal("ce_added", CURVE, elsewhere))
    assert np.isnan(pareto.l0_at_equal("ce_added", CURVE, CURVE.iloc[:0]))


def test_rates_come_from_the_objective_where_it_was_measured():
    search = pd.DataFrame(
        [
            ("topk", 1.0, np.nan, 0.2, np.nan),
            ("topk", 2.0, np.nan, 0.1, np.nan),
            ("table-only", 0.0, 3.0, 0.4, np.nan),
            ("gated+lookup", 1.0, 5.0, 0.1, 8.0),
            ("gated+lookup", 2.0, 5.0, 0.3, 7.0),
            ("gated+lookup (1e-4)", 1.0, 5.0, 0.1, 6.0),
        ],
        columns=["system", "lr", "lr_lookup", "nmse", "objective"],
    )
    rates = pareto.best_rates(search)
    expected = {"topk": 2.0, "topk-k+1": 2.0, "table-only": 3.0}
    expected |= {"gated+lookup": 2.0, "gated+lookup (1e-4)": 2.0}
    assert rates == expected
