"""Rules of the speed-up."""

from __future__ import annotations

import numpy as np
import pandas as pd
from lab.claims import Evidence, Tables, rule
from lab.stats import Interval, paired_interval


def speedups(t: Tables, metric: str) -> pd.DataFrame:
    df = t.main[(t.main.row == "speedup") & (t.main.metric == metric)]
    return df.assign(bound=df.bound.astype(object).fillna(""))  # "", ">" or "<"


def at_the_end(t: Tables, metric: str) -> pd.DataFrame:
    df = speedups(t, metric)
    return df[df.budget == df.budget.max()]


def mean_over_layers(df: pd.DataFrame) -> Interval:
    """Geometric mean over layers, with its interval over seeds."""
    logs = np.log(df.speedup).groupby(df.seed).mean()
    return paired_interval(logs).exp()


def register_speedup(id: str, metric: str) -> None:
    """Where the TSAE never gets there ("<") the speed-up is at most 1, which fails the claim."""

    def judge(t: Tables) -> Evidence:
        df = at_the_end(t, metric)
        by_layer = np.exp(np.log(df.speedup).groupby(df.layer).mean())
        bounds = df.groupby("layer").bound.agg(lambda b: "".join(sorted(set(b))))
        words = "; ".join(f"layer {i:g}: {bounds[i]}{r:.2f}" for i, r in by_layer.items())
        fails = (by_layer <= 1) | bounds.str.contains("<")
        failing = {f"layer {i:g}": min(r, 1.0) for i, r in by_layer[fails].items()}
        mean = mean_over_layers(df)
        low, high = (f"{value:.2f}" for value in mean[1:])
        text = f"{mean.value:.2f} [{low}, {high}] ({words})"
        return Evidence({"mean": mean, **failing}, text, seeds=df.seed.nunique())

    rule(id)(judge)


register_speedup("speedup-ce", "ce_added")
register_speedup("speedup-nmse", "nmse")


@rule("speedup-8x")
def about_eight(t: Tables) -> Evidence:
    """A bound decides only where it lies outside: above 13 from below, below 6 from above."""
    df = at_the_end(t, "ce_added")
    mean, bounds = mean_over_layers(df), set(df.bound) - {""}
    decides = (bounds <= {">"} and mean.low > 13) or (bounds <= {"<"} and mean.high < 6)
    if bounds and not decides:
        return Evidence(None, "some crossings are bounds", seeds=df.seed.nunique())
    return Evidence(mean, "".join(bounds) + "{}", ".2f", df.seed.nunique())


@rule("speedup-lasting")
def equal_at_both_budgets(t: Tables) -> Evidence:
    df = speedups(t, "ce_added")
    logs = df.assign(log=np.log(df.speedup)).pivot_table(
        index="seed", columns="budget", values="log"
    )
    text = "; ".join(f"{b:,.0f} tokens: {np.exp(log):.2f}" for b, log in logs.mean().items())
    if (df.bound != "").any():
        return Evidence(None, text + "; some crossings are bounds", seeds=len(logs))
    change = paired_interval(logs[logs.columns.max()] - logs[logs.columns.min()]).exp()
    return Evidence(change, text + "; ratio {}", ".2f", len(logs))


@rule("speedup-ends")
def small_budget_beats_large(t: Tables) -> Evidence:
    curve = t.main[(t.main.row == "curve") & (t.main.tokens > 0)].sort_values("tokens")
    runs = curve.groupby(["layer", "budget", "seed", "system"])
    final = runs.ce_added.last().unstack(["system", "budget"])
    small, large = curve.budget.min(), curve.budget.max()
    sae, tsae = final["topk", large], final["topk+lookup", small]
    text = f"{sae.mean():.4f} (SAE, {large:,.0f}) against {tsae.mean():.4f} (TSAE, {small:,.0f})"
    gap = paired_interval((sae - tsae).groupby("seed").mean())
    return Evidence(gap, text + "; difference {}", "+.4f", curve.seed.nunique())


rule("speedup-scale")(lambda t: Evidence(None, "one model", seeds=t.main.seed.nunique()))
