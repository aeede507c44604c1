"""Figure 6 without its training: columns, chosen rates, comparisons of curves, and their drawing.

Tables have a row per SAE. Its size is what a curve varies: k, or an L1 coefficient.
"""

from __future__ import annotations

from collections.abc import Callable

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
from lab import SYSTEMS, Interval, SAESpec, label_lines, paired_interval, plain_log, style, tu

Measure = Callable[[tu.TSAE], dict]  # metrics of an SAE
SEARCH_COLUMNS = ["system", "model", "layer", "k", "lr", "lr_lookup", "tokens", "nmse"]
SEARCH_COLUMNS += ["l1_coefficient", "objective", "config", "code"]
COLUMNS = ["model", "layer", "system", "k", "l1_coefficient", "lr", "lr_lookup", "l0"]
COLUMNS += ["vectors_per_token", "seed", "tokens", "nmse", "nmse_unsquared", "fvu", "ce_clean"]
COLUMNS += ["ce_patched", "ce_added", "ce_recovered", "dead_fraction", "d_sae", "decoder_vectors"]
COLUMNS += ["seconds", "massive_share", "ce_recovered_mean", "kl", "config", "code"]
NAMES = {
    "topk": "SAE",
    "topk+lookup": "TSAE",
    "topk-k+1": "SAE, k + 1",
    "topk-size-matched": "SAE, size-matched",
    "topk+shuffled-lookup": "TSAE, shuffled rows",
    "topk-half-encoder": "SAE, half encoder",
}
AXES = {
    "l0": "L0 (active features per token)",
    "vectors_per_token": "decoder vectors per token, with the table's row",
    "ce_added": "cross-entropy added (share of clean)",
    "nmse": "NMSE",
}

# ---------- SAEs ----------------------------------------------------------------------------------


def describe(spec: SAESpec, size: float, sae: tu.TSAE) -> dict:
    """The columns of a trained SAE that no measurement gives."""
    return {
        "model": sae.cfg.model_name,
        "layer": int(sae.cfg.hook_name.split(".")[1]),
        "system": spec.system,
        "k": None if spec.l1_coefficient else size,
        "l1_coefficient": spec.l1_coefficient or None,
        "lr": spec.lr,
        "lr_lookup": spec.lr_lookup if spec.has_table else None,
        "seed": sae.cfg.seed,
        "d_sae": sae.cfg.d_sae,
        "decoder_vectors": sae.cfg.d_sae + (len(sae.lookup.W) if spec.has_table else 0),
        **{name: sae.record[name] for name in ("tokens", "dead_fraction", "seconds")},
    }


def with_objective(text: tu.Evaluator) -> Measure:
    """A measurement that adds what training minimises, mean over the tokens of the text.

    The objective is that of training, where batchtopk has k active features per token on average.
    """

    @torch.no_grad()
    def measure(sae: tu.TSAE) -> dict:
        metrics, total = text(sae), 0.0
        sae.train()
        for x, tokens in zip(text.x_BD.split(4096), text.tokens_BN.split(4096), strict=True):
            total += len(x) * sae.loss(x, sae(x, tokens)).item()
        sae.eval()
        return metrics | {"objective": total / len(text.x_BD)}

    return measure


def best_rates(search: pd.DataFrame) -> dict[str, float]:
    """The learning rate of the lowest error on the tuning split, by system.

    `table-only` has only the table's rate. The error is the training objective where the search
    measured it, else the NMSE.
    """
    rate = search.lr.where(search.system != "table-only", search.lr_lookup)
    error = search.objective.fillna(search.nmse)
    best = error.groupby(search.system).idxmin()
    rates = {system: rate[row] for system, row in best.items()}
    rates["topk-k+1"] = rates["topk"]
    rates["gated+lookup (1e-4)"] = rates["gated+lookup"]  # they differ in the table's rate alone
    return rates


# ---------- Comparisons ---------------------------------------------------------------------------


def paired_differences(table: pd.DataFrame, rival: str, metric: str) -> dict[str, Interval]:
    """The rival's metric minus that of topk+lookup, paired over seeds, at every k."""
    theirs, intervals = table[table.system == rival], {}
    for k, ours in table[table.system == "topk+lookup"].groupby("k"):
        same_k = theirs if rival == "table-only" else theirs[theirs.k == k]
        difference = same_k.set_index("seed")[metric] - ours.set_index("seed")[metric]
        intervals[f"k={k:g}"] = paired_interval(difference)
    return intervals


def summary(table: pd.DataFrame, metric: str = "ce_added") -> pd.DataFrame:
    """The SAE, the TSAE and the best control at every k, and the control's share of the gain."""
    mean = table[table.k > 0].pivot_table(index="k", columns="system", values=metric)
    sae, tsae = mean["topk"], mean["topk+lookup"]
    control = mean.drop(columns=["topk", "topk+lookup"]).min(axis=1)
    share = (sae - control) / (sae - tsae)
    return pd.DataFrame({"sae": sae, "tsae": tsae, "control": control, "share": share})


def ratio_to_baseline(table: pd.DataFrame, metric: str = "ce_added") -> pd.DataFrame:
    """The metric of topk+lookup over that of topk: a row per k, a column per seed."""
    values = table[table.k > 0].pivot(index=["k", "seed"], columns="system", values=metric)
    return (values["topk+lookup"] / values["topk"]).unstack()


def log_curve(curve: pd.DataFrame, metric: str) -> np.ndarray:
    """Logarithms of the metric and of L0 [2, points], by increasing metric."""
    positive = curve[(curve[metric] > 0) & (curve.l0 > 0)].sort_values(metric)
    return np.log(positive[[metric, "l0"]].to_numpy().T)


def l0_at_equal(metric: str, curve: pd.DataFrame, reference: pd.DataFrame) -> float:
    """L0 of a curve over that of a reference at an equal metric.

    Both are interpolated on log axes. The ratio is a geometric mean over the range of the metric
    that both cover, NaN where that range is below a factor of 1.2.
    """
    (metric_a, l0_a), (metric_b, l0_b) = log_curve(curve, metric), log_curve(reference, metric)
    if len(metric_a) == 0 or len(metric_b) == 0:
        return np.nan
    low, high = max(metric_a[0], metric_b[0]), min(metric_a[-1], metric_b[-1])
    if high - low < np.log(1.2):
        return np.nan
    grid = np.linspace(low, high, 50)
    difference = np.interp(grid, metric_a, l0_a) - np.interp(grid, metric_b, l0_b)
    return float(np.exp(difference.mean()))


def l0_ratios(
    table: pd.DataFrame, system: str, reference: str, metric: str = "ce_added"
) -> np.ndarray:
    """`l0_at_equal` of two systems, for every seed."""
    ratios = []
    for _, part in table.groupby("seed"):
        curves = (part[part.system == name] for name in (system, reference))
        ratios.append(l0_at_equal(metric, *curves))
    return np.array(ratios)


def l0_interval(table: pd.DataFrame, system: str, reference: str, metric: str) -> Interval:
    """The geometric mean of `l0_ratios` with its 95 % interval."""
    return paired_interval(np.log(l0_ratios(table, system, reference, metric))).exp()


# ---------- Drawing -------------------------------------------------------------------------------


def draw_curves(ax: plt.Axes, table: pd.DataFrame, x: str, y: str, paper: pd.DataFrame) -> None:
    """A curve per system through the means over seeds, and a dot per seed.

    The paper's points are hollow. They are given by L0; a table adds one vector per token.
    """
    table = table.assign(size=table.k.fillna(table.l1_coefficient))
    for system, part in table.groupby("system"):
        look = SYSTEMS[system]
        mean = part.groupby("size")[[x, y]].mean().sort_values(x)
        ax.plot(mean[x], mean[y], label=system, **look)
        ax.plot(part[x], part[y], ".", markersize=3, color=look["color"])
        points = paper[(paper.system == system) & (paper.y_name == y)]
        table_row = 1 if x == "vectors_per_token" and "lookup" in system else 0
        ax.plot(points.x + table_row, points.y, marker=look["marker"], **style.PAPER)
    ax.set(xscale="log", yscale="log", xlabel=AXES[x], ylabel=AXES[y])
    plain_log(ax)


def draw_panels(table: pd.DataFrame, panels: dict[str, str], paper: pd.DataFrame) -> plt.Figure:
    """Panels below each other, with the given axes {x: y}."""
    fig, axes = plt.subplots(len(panels), 1, figsize=(6.5, 0.5 + 3.5 * len(panels)), squeeze=False)
    for ax, (x, y) in zip(axes.flat, panels.items(), strict=True):
        draw_curves(ax, table, x, y, paper)
        ax.text(0.02, 0.03, "hollow: the paper, GPT-2", transform=ax.transAxes, color="0.4", size=9)
        label_lines(ax, NAMES)
    return fig


def draw_families(table: pd.DataFrame, names: dict[str, str], paper: pd.DataFrame) -> plt.Figure:
    """A panel per family of architectures, with and without the table."""
    fig, axes = plt.subplots(1, len(names), sharex=True, sharey=True)
    for ax, (family, name) in zip(axes, names.items(), strict=True):
        draw_curves(ax, table[table.system.str.match(family)], "l0", "ce_added", paper)
        ax.set(title=name, xlabel="", ylabel="")
    axes[len(names) // 2].set_xlabel(AXES["l0"])
    axes[0].set_ylabel(AXES["ce_added"])
    looks = {"SAE": "gated", "TSAE": "gated+lookup", "TSAE, rate 1e-4": "gated+lookup (1e-4)"}
    legend = [plt.Line2D([], [], label=name, **SYSTEMS[look]) for name, look in looks.items()]
    legend.append(plt.Line2D([], [], marker="h", label="paper, GPT-2", **style.PAPER))
    fig.legend(handles=legend, loc="outside lower center", ncols=4)
    return fig
