"""Rules of figure 1."""

from __future__ import annotations

import numpy as np
from lab.claims import Evidence, Tables, rule


@rule("fig1-tail")
def counts_fall(t: Tables) -> Evidence:
    """Steps of the counts at the lowest threshold, each with the claimed sign as positive."""
    bars = t.main[t.main.kind == "bar"]
    lowest = bars[bars.min_count == bars.min_count.min()].sort_values("n")
    steps = np.diff(lowest["count"]) * np.array([1, -1, -1, -1, -1])
    numbers = ", ".join(f"{count:.0f}" for count in lowest["count"])
    return Evidence({n: float(step) for n, step in enumerate(steps, 1)}, numbers)
