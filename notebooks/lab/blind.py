"""Which features the blind study shows, in which order; nobody reads the table before scoring."""

from __future__ import annotations

import numpy as np
import pandas as pd

SCALES = ("interpretability", "complexity")
RATERS = ("a", "b")
FEATURES = 30  # of each SAE


def draw_items(table: pd.DataFrame, n_features: int = FEATURES, seed: int = 0) -> pd.DataFrame:
    """Items in the order of the kit: item, system, feature.

    `table` has a row for each sampled feature: system, seed, feature. At most `n_features` of the
    first seed are drawn for each system, and equally many.
    """
    rng = np.random.default_rng(seed)
    first = table[table.seed == table.seed.min()].sort_values(["system", "feature"])
    n = min([n_features, *first.groupby("system").size()])
    parts = [part.iloc[rng.permutation(len(part))[:n]] for _, part in first.groupby("system")]
    drawn = pd.concat(parts)[["system", "feature"]]
    drawn = drawn.iloc[rng.permutation(len(drawn))].reset_index(drop=True)
    drawn.insert(0, "item", [f"item {i:02d}" for i in range(1, len(drawn) + 1)])
    return drawn
