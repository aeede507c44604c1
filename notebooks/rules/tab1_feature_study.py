"""Rules of tables 1 and 3."""

from __future__ import annotations

import pandas as pd
from lab.claims import Evidence, Tables, rule
from lab.stats import bootstrap_interval, paired_interval

NO_SCORES = "no human scores come with the package: the kit is there to make them"
for id in ("tab1-human", "tab1-interpretable"):
    rule(id)(lambda t: Evidence(None, NO_SCORES, seeds=0))


def register_matched(id: str, measure: str) -> None:
    """A measure at matched firing frequency, the SAE's minus the TSAE's, paired over seeds."""

    def judge(t: Tables) -> Evidence:
        table = t["_matched"]
        pairs = table[table.measure == measure].set_index("seed")
        gap = paired_interval(pairs["topk"] - pairs["topk+lookup"])
        text = f"{pairs['topk'].mean():.3f} against {pairs['topk+lookup'].mean():.3f}; "
        return Evidence(gap, text + "difference {}", seeds=len(pairs))

    rule(id)(judge)


register_matched("tab1-local1", "locality_1")
register_matched("tab1-local3", "locality_3")
register_matched("tab1-causal1", "causal_1")
register_matched("tab1-causal3", "causal_3")


def per_sae(t: Tables) -> pd.DataFrame:
    """For each SAE: the number of its living features that need more than three tokens, and the
    share of its squared activation that three tokens do not explain."""

    def summary(part: pd.DataFrame) -> pd.Series:
        number = (part.causal_3 < 0.5).mean() * part.living.iloc[0]
        mass = (part.mass * (1 - part.causal_3)).sum() / part.mass.sum()
        return pd.Series({"count": number, "mass": mass})

    saes = t.main[t.main.system.isin(["topk", "topk+lookup"])].groupby(["seed", "system"])
    return saes[["causal_3", "living", "mass"]].apply(summary).unstack("system")


def register_longer(id: str, column: str, fmt: str) -> None:
    """A column of `per_sae`, the TSAE's minus the SAE's, paired over seeds."""

    def judge(t: Tables) -> Evidence:
        table = per_sae(t)[column]
        ours, rival = table["topk+lookup"], table["topk"]
        text = f"{ours.mean():{fmt}} against {rival.mean():{fmt}}; difference {{}}"
        return Evidence(paired_interval(ours - rival), text, f"+{fmt}", len(table))

    rule(id)(judge)


register_longer("tab1-count", "count", ".0f")
register_longer("tab1-mass", "mass", ".2f")


@rule("tab3-ngrams")
def most_are_about_short_ngrams(t: Tables) -> Evidence:
    """Of all sampled features of the paper's SAE, by seed, resampled over features."""
    of_sae = t.main[t.main.system == t.paper_sae]
    is_short = of_sae.category.str.contains("unigram|bigram")
    estimates = {
        f"seed {seed}": bootstrap_interval(lambda x: x.mean(), part.to_numpy(float))
        for seed, part in is_short.groupby(of_sae.seed)
    }
    return Evidence(estimates, f"{{}}; {len(of_sae):,} features", ".2f", len(estimates))
