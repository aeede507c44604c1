"""Rules of figure 3."""

from __future__ import annotations

from lab.claims import Evidence, Tables, rule
from lab.stats import Interval


@rule("fig3-top")
def one_feature_above_all(t: Tables) -> Evidence:
    share = t.main.pivot(index=["layer", "seed"], columns="kind", values="share_50")
    mean = share.groupby("layer").mean()
    text = "; ".join(f"layer {i}: {r.unigram:.0%} against {r.text:.0%}" for i, r in mean.iterrows())
    return Evidence((share.unigram - share.text).to_dict(), text, seeds=t.main.seed.nunique())


@rule("fig3-sparser")
def fewer_than_in_text(t: Tables) -> Evidence:
    table = t.main[t.main.kind == "unigram"]
    estimates = {
        f"layer {r.layer}, seed {r.seed}": Interval(r.less_than_text, r.low, r.high)
        for r in table.itertuples()
    }
    mean = table.groupby("layer").less_than_text.mean()
    text = "; ".join(f"layer {layer}: {value:+.0f}" for layer, value in mean.items())
    return Evidence(estimates, text, seeds=t.main.seed.nunique())
