"""Rules of figure 7: shares of living features that fire on some unigram above 5 %."""

from __future__ import annotations

import pandas as pd
from lab.claims import Evidence, Tables, rule
from lab.stats import paired_interval


def shares(t: Tables) -> pd.DataFrame:
    """A row per width and seed, a column per system."""
    df = t.main[(t.main.threshold == 0.05) & (t.main.system != "published")]
    return df.pivot(index=["expansion", "seed"], columns="system", values="share_any")


def up_to_32(t: Tables) -> list[int]:
    widths = sorted(t.main[t.main.system != "published"].expansion.unique())
    return [e for e in widths if e <= 32] or widths[:1]


@rule("fig7-below5")
def few_fire_on_unigrams(t: Tables) -> Evidence:
    main = t.main_width
    tsae = t.main[(t.main.system == "topk+lookup") & (t.main.expansion == main)]
    other = tsae.groupby("threshold").share_any.mean()
    values = shares(t)["topk+lookup"].loc[main]
    text = f"{{}} at {main}x (thresholds of 2.5 and 10 %: {other[0.025]:.1%}, {other[0.1]:.1%})"
    return Evidence(paired_interval(values), text, ".1%", len(values))


@rule("fig7-fewer")
def fewer_than_the_sae(t: Tables) -> Evidence:
    share = shares(t)
    mean = share.groupby("expansion").mean()
    text = "; ".join(
        f"{e}x: {r['topk']:.0%} against {r['topk+lookup']:.0%}" for e, r in mean.iterrows()
    )
    gaps = (share["topk"] - share["topk+lookup"]).groupby("expansion")
    estimates = {f"{e}x": paired_interval(gap) for e, gap in gaps}
    return Evidence(estimates, text, seeds=share.index.unique("seed").size)


@rule("fig7-growth")
def grows_with_width(t: Tables) -> Evidence:
    sae, widths = shares(t)["topk"], up_to_32(t)
    narrow, wide = sae.loc[widths[0]], sae.loc[widths[-1]]
    text = f"{narrow.mean():.0%} ({widths[0]}x) to {wide.mean():.0%} ({widths[-1]}x)"
    growth = paired_interval(wide - narrow) if len(widths) > 1 else None
    return Evidence(growth, text + "; difference {}", "+.2f", len(narrow))
