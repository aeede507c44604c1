"""Rules of the ablation: ratios of held-out NMSE."""

from __future__ import annotations

import pandas as pd
from lab.claims import Evidence, Tables, rule


def ends(t: Tables) -> pd.DataFrame:
    return t.main[t.main.row == "end"]


def means(t: Tables) -> pd.Series:
    return ends(t).groupby("arm").nmse.mean()


def arm(t: Tables, name: str) -> pd.DataFrame:
    return ends(t)[ends(t).arm == name].drop_duplicates("seed")


def compare(t: Tables, better: str, *others: str) -> Evidence:
    """The NMSE of the others over that of `better`."""
    mean = means(t)
    ratios = {name: t.ratio(arm(t, name), arm(t, better), "nmse") for name in others}
    words = ", ".join(f"{mean[name]:.4f} ({name})" for name in others)
    text = f"{words} against {mean[better]:.4f} ({better}); ratio {{}}"
    return Evidence(
        ratios if len(others) > 1 else ratios[others[0]], text, ".2f", len(arm(t, better))
    )


@rule("ablation-start")
def unigram_beats_zero(t: Tables) -> Evidence:
    """At each scale of the encoder: choosing the best scale on the same numbers would flatter."""
    mean, ratios = means(t), {}
    for encoder in ("0.25", "0.5", "1"):
        zero, unigram = (f"table {scale}, encoder {encoder}" for scale in ("0", "0.5"))
        words = f"encoder {encoder}, {mean[zero]:.4f} against {mean[unigram]:.4f}"
        ratios[words] = t.ratio(arm(t, zero), arm(t, unigram), "nmse")
    return Evidence(ratios, "{}", ".2f", len(arm(t, unigram)))


@rule("ablation-mean")
def unigram_equals_mean(t: Tables) -> Evidence:
    return compare(t, "mean", "unigram")


@rule("ablation-learned")
def learned_beats_frozen(t: Tables) -> Evidence:
    mean = means(t)
    learned = mean[["learned", "table 1, encoder 0.5"]].idxmin()
    return compare(t, learned, mean[["frozen", "frozen, full scale"]].idxmin())


@rule("ablation-balance")
def half_beats_full(t: Tables) -> Evidence:
    return compare(t, "table 0.5, encoder 0.5", "table 1, encoder 1")


@rule("ablation-workshop")
def half_beats_the_workshops_start(t: Tables) -> Evidence:
    return compare(t, "unigram", "workshop")


@rule("ablation-sum")
def half_beats_less(t: Tables) -> Evidence:
    return compare(t, "0.5", "0", "0.25")


@rule("ablation-rate")
def faster_beats_slower(t: Tables) -> Evidence:
    return compare(t, "0.01", "0.005", "0.001")
