"""Rules of the expansion sweep."""

from __future__ import annotations

import numpy as np
import pandas as pd
from lab.claims import Evidence, Tables, rule


def at(t: Tables, system: str, expansion: int) -> pd.DataFrame:
    return t.main[(t.main.system == system) & (t.main.expansion == expansion)]


def register_ratio(id: str, rival: str) -> None:
    """The cross-entropy that the TSAE adds over the rival's, at every width."""

    def judge(t: Tables) -> Evidence:
        ratios = {
            f"{e}x": t.ratio(at(t, "topk+lookup", e), at(t, rival, e), "ce_added")
            for e in sorted(t.main.expansion.unique())
        }
        return Evidence(ratios, "{}", ".2f", t.main.seed.nunique())

    rule(id)(judge)


register_ratio("expansion-width", "topk")
register_ratio("expansion-vectors", "topk-size-matched")


@rule("expansion-never")
def no_sae_catches_up(t: Tables) -> Evidence:
    """Against the SAE of the sweep that is best in the mean over seeds."""
    rivals = t.main[t.main.system != "topk+lookup"]
    system, width = rivals.groupby(["system", "expansion"]).ce_added.mean().idxmin()
    ours, rival = at(t, "topk+lookup", t.main_width), at(t, system, width)
    text = f"{ours.ce_added.mean():.4f} against {rival.ce_added.mean():.4f} ({system}, {width}x)"
    ratio = t.ratio(ours, rival, "ce_added")
    return Evidence(ratio, text + "; ratio {}", ".2f", t.main.seed.nunique())


@rule("expansion-25")
def a_fifth_fewer_features(t: Tables) -> Evidence:
    """The TSAE's width over the SAE's of equal ce_added; "<" or ">" where it is only a bound."""
    estimates, words = {}, []
    for seed, ours in at(t, "topk+lookup", t.main_width).set_index("seed").iterrows():
        sae = t.main[(t.main.system == "topk") & (t.main.seed == seed)].sort_values("d_sae")
        lowest = np.minimum.accumulate(sae.ce_added)  # the best SAE up to each width
        log_width = np.interp(-np.log(ours.ce_added), -np.log(lowest), np.log(sae.d_sae))
        is_bound = {"<": ours.ce_added < lowest.min(), ">": ours.ce_added > lowest.max()}
        estimates[seed] = ours.d_sae / np.exp(log_width)
        bound = next((sign for sign, holds in is_bound.items() if holds), "")
        words.append(f"{bound}{estimates[seed]:.2f}")
    undecided = any(  # a bound on the wrong side of 0.8 says nothing
        (word[0] == "<" and ratio >= 0.8) or (word[0] == ">" and ratio < 0.8)
        for word, ratio in zip(words, estimates.values(), strict=True)
    )
    return Evidence(None if undecided else estimates, "; ".join(words), seeds=len(estimates))
