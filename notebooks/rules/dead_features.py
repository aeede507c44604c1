"""Rules of the dead features."""

from __future__ import annotations

import numpy as np
import pandas as pd
from lab.claims import Evidence, Tables, rule
from lab.stats import paired_interval

AUXK = " + AuxK"


def ends(t: Tables) -> pd.DataFrame:
    return t.main[t.main.row == "held out"]


def by_arm(t: Tables, column: str) -> pd.DataFrame:
    """A row per seed, a column per arm."""
    return ends(t).pivot(index="seed", columns="arm", values=column)


def difference(first: pd.Series, second: pd.Series, text: str) -> Evidence:
    return Evidence(paired_interval(first - second), text + "; difference {}", seeds=len(first))


@rule("dead-more")
def more_die_with_a_table(t: Tables) -> Evidence:
    dead = by_arm(t, "dead_fraction")
    text = f"{dead['topk+lookup'].mean():.0%} against {dead['topk'].mean():.0%}"
    return difference(dead["topk+lookup"], dead["topk"], text)


@rule("dead-start")
def the_table_kills_them(t: Tables) -> Evidence:
    """What the smaller start does not make of the TSAE's excess, less half of that excess."""
    dead = by_arm(t, "dead_fraction")
    names = ("topk", "topk-half-encoder", "topk+lookup")
    sae, start, tsae = (dead[name] for name in names)
    text = ", ".join(f"{dead[name].mean():.0%} ({name})" for name in names)
    return difference(tsae - start, 0.5 * (tsae - sae), text)


@rule("dead-auxk")
def auxk_revives(t: Tables) -> Evidence:
    dead = by_arm(t, "dead_fraction")
    without, with_auxk = dead["topk+lookup"], dead["topk+lookup" + AUXK]
    return difference(
        without, with_auxk, f"{without.mean():.0%} without, {with_auxk.mean():.0%} with"
    )


@rule("dead-gain")
def auxk_gains_more(t: Tables) -> Evidence:
    nmse = by_arm(t, "nmse")
    gain = {s: np.log(nmse[s] / nmse[s + AUXK]) for s in ("topk", "topk+lookup")}
    text = "; ".join(f"{s}: NMSE x {np.exp(-g.mean()):.3f} with AuxK" for s, g in gain.items())
    return difference(gain["topk+lookup"], gain["topk"], text)


@rule("dead-still")
def still_better_with_auxk(t: Tables) -> Evidence:
    end = ends(t)
    ours, rival = (end[end.arm == s + AUXK] for s in ("topk+lookup", "topk"))
    text = f"{ours.nmse.mean():.4f} against {rival.nmse.mean():.4f}; ratio {{}}"
    return Evidence(t.ratio(ours, rival, "nmse"), text, ".2f", len(ours))
