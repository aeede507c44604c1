"""Rules of figure 2."""

from __future__ import annotations

import numpy as np
import pandas as pd
from lab.claims import Evidence, Tables, rule
from lab.stats import Interval, paired_interval

IN_RANGE, BIGRAMS = ("unigram", "bigrams' range"), ("bigram", "all")


def correlations(t: Tables) -> pd.DataFrame:
    """Rank correlations of the paper's SAE: value, low, high by kind, subset, layer and seed."""
    df = t.main[(t.main.row == "correlation") & (t.main.system == t.paper_sae)]
    return df.set_index(["kind", "subset", "layer", "seed"]).sort_index()[["value", "low", "high"]]


def by_layer_and_seed(table: pd.DataFrame, text: pd.Series) -> Evidence:
    estimates = {f"layer, seed: {key}": Interval(*row) for key, row in table.iterrows()}
    words = "; ".join(f"layer {layer}: {value}" for layer, value in text.items())
    return Evidence(estimates, words, seeds=table.index.unique("seed").size)


@rule("fig2-unigrams")
def falls_with_count(t: Tables) -> Evidence:
    table = correlations(t).loc["unigram", "all"]
    return by_layer_and_seed(table, table.value.groupby("layer").mean().map("{:.2f}".format))


@rule("fig2-bigrams")
def weaker_for_bigrams(t: Tables) -> Evidence:
    """The samples are independent, so the half widths of their intervals add in squares."""
    sae = correlations(t)
    difference = sae.value[IN_RANGE] - sae.value[BIGRAMS]
    width = np.hypot(*((sae.high - sae.low)[key] / 2 for key in (IN_RANGE, BIGRAMS)))
    table = pd.concat([difference, difference - width, difference + width], axis=1)
    mean = sae.value.groupby(["kind", "subset", "layer"]).mean().map("{:.2f}".format)
    return by_layer_and_seed(table, mean[IN_RANGE] + " against " + mean[BIGRAMS])


def error_ratios(t: Tables, kind: str) -> pd.DataFrame:
    """NMSE of the TSAE over the SAE's on the commoner half of the bins, by layer and seed."""
    df = t.main[(t.main.row == "bin") & (t.main.kind == kind)]
    middle = np.sqrt(df["count"].min() * df["count"].max())
    common = df[(df["count"] >= middle) & df.system.isin(["topk", "topk+lookup"])]
    logs = common.assign(log=np.log(common.nmse))
    logs = logs.pivot_table(index=["layer", "seed"], columns="system", values="log")
    return (logs["topk+lookup"] - logs["topk"]).unstack("seed")


def by_layer(logs: pd.DataFrame) -> Evidence:
    ratios = {f"layer {i}": paired_interval(row).exp() for i, row in logs.iterrows()}
    return Evidence(ratios, "{}", ".2f", logs.shape[1])


@rule("fig2-lone")
def better_on_lone_tokens(t: Tables) -> Evidence:
    return by_layer(error_ratios(t, "unigram"))


@rule("fig2-text")
def better_in_text(t: Tables) -> Evidence:
    return by_layer(error_ratios(t, "text"))
