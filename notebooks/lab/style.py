"""One look for every system in every figure.

Systems without a table are blue, those with one orange. Shade and marker tell architectures and
controls apart. Blue and orange differ in lightness too, so that figures read in greyscale and with
colour blindness.
"""

from __future__ import annotations

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib import ticker

BLUE, LIGHT_BLUE, DARK_BLUE = "#0072B2", "#56B4E9", "#00436B"
ORANGE, LIGHT_ORANGE, DARK_ORANGE = "#E69F00", "#F3C766", "#A65E00"
PAPER = {"linestyle": "", "markerfacecolor": "none", "markeredgecolor": "0.45", "markersize": 8}

SYSTEMS = {
    "topk": {"color": BLUE, "marker": "o", "linestyle": "-"},
    "topk-k+1": {"color": LIGHT_BLUE, "marker": "v", "linestyle": "--"},
    "topk-size-matched": {"color": DARK_BLUE, "marker": "^", "linestyle": "--"},
    "topk-half-encoder": {"color": LIGHT_BLUE, "marker": "<", "linestyle": ":"},
    "topk+lookup": {"color": ORANGE, "marker": "s", "linestyle": "-"},
    "topk+shuffled-lookup": {"color": DARK_ORANGE, "marker": "X", "linestyle": ":"},
    "topk+lookup (zero start)": {"color": DARK_ORANGE, "marker": "D", "linestyle": "--"},
    "table-only": {"color": LIGHT_ORANGE, "marker": "P", "linestyle": ":"},
    "untrained table": {"color": LIGHT_ORANGE, "marker": "x", "linestyle": ":"},
    "relu": {"color": BLUE, "marker": "D", "linestyle": "-"},
    "relu+lookup": {"color": ORANGE, "marker": "d", "linestyle": "-"},
    "batchtopk": {"color": BLUE, "marker": "p", "linestyle": "-"},
    "batchtopk+lookup": {"color": ORANGE, "marker": "*", "linestyle": "-"},
    "gated": {"color": BLUE, "marker": "h", "linestyle": "-"},
    "gated+lookup": {"color": ORANGE, "marker": "H", "linestyle": "-"},
    "gated+lookup (1e-4)": {"color": DARK_ORANGE, "marker": "8", "linestyle": ":"},
    "untrained": {"color": "0.5", "marker": "x", "linestyle": ":"},
    "published": {"color": DARK_BLUE, "marker": "D", "linestyle": "-."},
}
PALETTE = {name: look["color"] for name, look in SYSTEMS.items()}


def lines(ax: plt.Axes, table: pd.DataFrame, x: str, y: str, group: str = "system") -> None:
    """A line per system: the mean over seeds, a band for their range, a mark per point."""
    for name, part in table.groupby(group, sort=False):
        look = SYSTEMS[name]
        sns.lineplot(part, x=x, y=y, ax=ax, errorbar=("pi", 100), label=name, legend=False, **look)


def label_lines(ax: plt.Axes, names: dict[str, str] | None = None, size: float = 9) -> None:
    """Write each line's label at its right end, in its colour, instead of a legend.

    `names` replaces labels by shorter ones; labels that would overlap are moved apart.
    """
    named = [line for line in ax.get_lines() if not line.get_label().startswith("_")]
    drawn = [line for line in named if np.isfinite(np.asarray(line.get_ydata(), float)).any()]
    ends = []
    for line in drawn:
        x, y = line.get_data()
        last = np.argmax(np.where(np.isfinite(np.asarray(y, float)), np.asarray(x, float), -np.inf))
        ends.append(ax.transData.transform((x[last], y[last])))
    height = 1.45 * size * ax.figure.dpi / 72
    order = np.argsort([end[1] for end in ends])
    placed = spread([ends[i][1] for i in order], height)
    for position, i in zip(placed, order, strict=True):
        line, end = drawn[i], ends[i]
        name = (names or {}).get(line.get_label(), line.get_label())
        shift = (7, (position - end[1]) * 72 / ax.figure.dpi)
        ax.annotate(
            name,
            ax.transData.inverted().transform(end),
            xytext=shift,
            textcoords="offset points",
            color=line.get_color(),
            fontsize=size,
            va="center",
            annotation_clip=False,
        )


def spread(positions: list[float], least: float) -> list[float]:
    """Sorted positions moved apart to `least` distance, as little as possible on the whole."""
    groups = []  # [first position, members]
    for position in positions:
        groups.append([position, [position]])
        while len(groups) > 1 and groups[-1][0] < groups[-2][0] + least * len(groups[-2][1]):
            members = groups[-2][1] + groups.pop()[1]
            centre = sum(members) / len(members)
            groups[-1] = [centre - least * (len(members) - 1) / 2, members]
    return [first + least * i for first, members in groups for i in range(len(members))]


def plain_number(value: float, _: int = 0) -> str:
    """0.02, 5, 2,000 as 2K, 1,000,000 as 1M."""
    for size, letter in ((1e6, "M"), (1e3, "K")):
        if value >= size:
            return f"{value / size:g}{letter}"
    return f"{value:g}" if value > 1e-4 else f"{value:.0e}"


def plain_log(*axes: plt.Axes) -> None:
    """Log axes with plain numbers at 1, 2 and 5, without a crowd of minor labels."""
    for ax in axes:
        for axis, scale in ((ax.xaxis, ax.get_xscale()), (ax.yaxis, ax.get_yscale())):
            if scale != "log":
                continue
            low, high = axis.get_view_interval()
            steps = (1, 2, 5) if high < 200 * low else (1,)
            axis.set_major_locator(ticker.LogLocator(subs=steps))
            axis.set_major_formatter(ticker.FuncFormatter(plain_number))
            axis.set_minor_formatter(ticker.NullFormatter())
