"""Rules of figure 5. Cosines are means over positions; layers are counted after each block."""

from __future__ import annotations

import pandas as pd
from lab.claims import Evidence, Tables, rule
from lab.stats import Interval


def cosines(t: Tables, measure: str, suffix: str, n: int) -> pd.Series:
    df = t.main[(t.main.row == "mean") & (t.main.measure == measure)]
    return df[(df.suffix == suffix) & (df.n == n)].set_index("layer").cosine


def over_layers(cosine: pd.Series, where: str = "over layers") -> Evidence:
    text = f"{cosine.min():.2f} to {cosine.max():.2f} {where}"
    return Evidence(cosine.to_dict(), text)


def gaps(t: Tables, suffix: str) -> Evidence:
    df = t.main[(t.main.row == "difference") & (t.main.n == 3) & (t.main.suffix == suffix)]
    estimates = {r.layer: Interval(r.cosine, r.low, r.high) for r in df.itertuples()}
    least, most = (df.loc[at()] for at in (df.cosine.idxmin, df.cosine.idxmax))
    words = (f"{r.cosine:+.2f} [{r.low:+.2f}, {r.high:+.2f}]" for r in (least, most))
    return Evidence(estimates, " to ".join(words) + " over layers")


@rule("fig5-trigram")
def trigrams_are_adequate(t: Tables) -> Evidence:
    return over_layers(cosines(t, "raw", "true", 3))


@rule("fig5-unigram")
def unigrams_in_deep_layers(t: Tables) -> Evidence:
    cosine = cosines(t, "raw", "true", 1)
    deep = cosine[cosine.index > 2 / 3 * cosine.index.max()]
    return over_layers(deep, f"in layers {deep.index.min():g} to {deep.index.max():g}")


@rule("fig5-trigram-kept")
def trigrams_at_their_positions(t: Tables) -> Evidence:
    return over_layers(cosines(t, "raw", "positions kept", 3))


@rule("fig5-trigram-centred")
def trigrams_without_the_mean(t: Tables) -> Evidence:
    return over_layers(cosines(t, "mean removed", "true", 3))


@rule("fig5-suffix")
def true_beats_random(t: Tables) -> Evidence:
    return gaps(t, "true - random")


@rule("fig5-positions")
def kept_beats_moved(t: Tables) -> Evidence:
    return gaps(t, "positions kept - true")
