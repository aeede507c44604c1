"""Rules of figure 6."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pareto
from lab.claims import Evidence, Tables, rule
from lab.stats import paired_interval


def at(t: Tables, system: str, k: float) -> pd.DataFrame:
    return t.main[(t.main.system == system) & (t.main.k == k)]


def ks(t: Tables) -> list[float]:
    return sorted(t.main[t.main.system == "topk+lookup"].k.unique())


def seeds(t: Tables) -> int:
    return t.main.seed.nunique()


def ratios(t: Tables, rival: str, metric: str) -> Evidence:
    """The TSAE's metric over the rival's at every k."""
    found = {f"k={k:g}": t.ratio(at(t, "topk+lookup", k), at(t, rival, k), metric) for k in ks(t)}
    return Evidence(found, "{}", ".2f", seeds(t))


def register_ratio(id: str, rival: str, metric: str) -> None:
    rule(id)(lambda t: ratios(t, rival, metric))


register_ratio("fig6-ce", "topk", "ce_added")
register_ratio("fig6-nmse", "topk", "nmse")
for rival in ("topk-k+1", "topk-size-matched", "topk-half-encoder"):
    register_ratio(f"fig6-{rival}", rival, "ce_added")


@rule("fig6-size")
def a_fifth_near_8(t: Tables) -> Evidence:
    k = min(ks(t), key=lambda k: abs(k - 8))
    if not 4 <= k <= 16:
        return Evidence(None, f"no k near 8: the nearest is {k:g}", seeds=seeds(t))
    ratio = t.ratio(at(t, "topk+lookup", k), at(t, "topk", k), "ce_added")
    return Evidence(ratio, f"{{}} at k={k:g}", ".2f", seeds(t))


@rule("fig6-sparse")
def more_at_small_k(t: Tables) -> Evidence:
    """The ratio at the smallest k over the one at the largest, paired over seeds."""
    ratio = pareto.ratio_to_baseline(t.main[t.main.system.isin(["topk", "topk+lookup"])])
    if len(ratio) < 2:
        return Evidence(None, "one k", seeds=seeds(t))
    ends = ratio.iloc[[0, -1]]
    text = ", ".join(f"{r:.2f} (k={k:g})" for k, r in ends.mean(axis=1).items())
    change = paired_interval(np.log(ends.iloc[0]) - np.log(ends.iloc[1])).exp()
    return Evidence(change, f"{text}; ratio of the two {{}}", ".2f", seeds(t))


def register_l0(id: str, system: str, reference: str, metric: str = "ce_added") -> None:
    """The L0 of a system over that of a reference at an equal metric."""

    def judge(t: Tables) -> Evidence:
        interval = pareto.l0_interval(t.main, system, reference, metric)
        text = (
            "{} times the L0" if interval.is_known else "one seed, or curves that share too little"
        )
        return Evidence(interval, text, ".2f", seeds(t))

    rule(id)(judge)


register_l0("fig6-relu", "relu+lookup", "relu")
register_l0("fig6-relu-nmse", "relu+lookup", "relu", "nmse")
register_l0("fig6-relu-25", "relu+lookup", "relu")
register_l0("fig6-gated-null", "gated+lookup (1e-4)", "gated")
register_l0("fig6-gated-rate", "gated+lookup", "gated+lookup (1e-4)")
register_l0("fig6-gated", "gated+lookup", "gated")
register_l0("fig6-batchtopk", "batchtopk+lookup", "batchtopk")
