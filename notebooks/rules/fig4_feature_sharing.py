"""Rules of figure 4."""

from __future__ import annotations

import pandas as pd
from lab.claims import Evidence, Tables, rule
from lab.stats import Interval


def of_the_sae(t: Tables, row: str) -> pd.DataFrame:
    return t.main[(t.main.system == t.paper_sae) & (t.main.row == row)]


def by_seed(table: pd.DataFrame, column: str, fmt: str) -> Evidence:
    """Intervals of one column, a row per seed; nothing to test where there is no row."""
    rows = table[["seed", column, "low", "high"]].to_numpy()
    estimates = {int(seed): Interval(*row) for seed, *row in rows}
    text = "; ".join(f"{i.value:{fmt}} [{i.low:{fmt}}, {i.high:{fmt}}]" for i in estimates.values())
    return Evidence(estimates or None, text or "none shares", seeds=len(table))


@rule("fig4-own")
def common_unigrams_own(t: Tables) -> Evidence:
    slopes = of_the_sae(t, "slope")
    return by_seed(slopes[slopes.n == 1], "slope", "+.2f")


@rule("fig4-alike")
def more_alike_than_by_chance(t: Tables) -> Evidence:
    """The gap to shuffled groups, minus the same gap of an untrained SAE.

    Half widths add in squares.
    """
    gaps = t.main[(t.main.row == "alike") & (t.main.group == "difference")].set_index("seed")
    trained, untrained = (gaps[gaps.system == s] for s in (t.paper_sae, "untrained"))
    seeds = trained.index.intersection(untrained.index)
    table = trained.loc[seeds, ["cosine"]] - untrained.loc[seeds, ["cosine"]]
    widths = [(g.loc[seeds].high - g.loc[seeds].low) / 2 for g in (trained, untrained)]
    width = sum(w**2 for w in widths) ** 0.5
    table = table.assign(low=table.cosine - width, high=table.cosine + width)
    return by_seed(table.reset_index(), "cosine", "+.3f")


def shares(t: Tables, column: str, n: int) -> pd.Series:
    matching = of_the_sae(t, "matching")
    return matching[matching.n == n].set_index("seed")[column]


def share(t: Tables, column: str) -> Evidence:
    values = shares(t, column, 1)
    return Evidence(values.to_dict(), f"{values.mean():.0%}", seeds=len(values))


@rule("fig4-top")
def first_is_first(t: Tables) -> Evidence:
    return share(t, "top")


@rule("fig4-any")
def one_is_among_them(t: Tables) -> Evidence:
    return share(t, "any")


@rule("fig4-unigrams")
def reconstruct_a_unigram(t: Tables) -> Evidence:
    return share(t, "reconstructs")


@rule("fig4-none")
def silent_on_all(t: Tables) -> Evidence:
    silent = of_the_sae(t, "silent").set_index("seed").share
    return Evidence(silent.to_dict(), f"{silent.mean():.1%}", seeds=len(silent))


@rule("fig4-bigrams")
def more_for_bigrams(t: Tables) -> Evidence:
    bi, uni = (shares(t, "reconstructs", n) for n in (2, 1))
    text = f"{bi.mean():.0%} against {uni.mean():.0%}"
    return Evidence((bi - uni).to_dict(), text, seeds=len(bi))
