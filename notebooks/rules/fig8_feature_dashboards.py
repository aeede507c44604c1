"""Rules of figures 8 to 10."""

from __future__ import annotations

import numpy as np
from lab.claims import Evidence, Tables, rule
from lab.stats import Interval

LEAST = 0.3  # share of variance


@rule("fig8-context")
def more_features_need_context(t: Tables) -> Evidence:
    """Shares of features whose activation the last three tokens alone hardly give."""
    scores = t["_features"]
    hardly = {s: (part.causal_3 < LEAST) for s, part in scores.groupby("system")}
    sae, tsae = hardly["topk"], hardly["topk+lookup"]
    width = 1.96 * np.sqrt(sum(h.var(ddof=1) / len(h) for h in (sae, tsae)))
    difference = tsae.mean() - sae.mean()
    text = f"{tsae.mean():.0%} of {len(tsae)} against {sae.mean():.0%} of {len(sae)}; "
    interval = Interval(difference, difference - width, difference + width)
    return Evidence(interval, text + "difference {}", "+.2f")


@rule("fig8-end")
def the_end_of_a_sentence(t: Tables) -> Evidence:
    scores = t["_features"]
    return Evidence(scores[scores.system == "topk+lookup"].sentence_end.max(), fmt=".2f")


for id in ("fig8-hazard", "fig8-object"):
    rule(id)(lambda t: Evidence(None, "not decided by a rule"))
