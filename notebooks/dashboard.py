"""Feature dashboards from the tables of `features.describe`: HTML without scripts, or a figure.

In the functions below, `d` is such a table: the rows of one feature.
"""

from __future__ import annotations

from html import escape

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd

# A backslash at the end of a line joins it with the next one.
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 980px; margin: 2rem auto; \
padding: 0 1rem; color: #222; background: #fff }
h2 { margin: 2.2rem 0 .3rem; border-top: 1px solid #ddd; padding-top: 1rem }
table { border-collapse: collapse; font-size: 13px }
th { text-align: left; font-weight: 600 }
td { padding-right: .7rem }
td + td { text-align: right; color: #555 }
code { white-space: pre; display: inline-block; max-width: 10rem; overflow: hidden; \
text-overflow: ellipsis; vertical-align: bottom }
"""
CONTEXT_STYLE = (
    "font: 13px/1.7 ui-monospace, monospace; white-space: pre-wrap; "
    "overflow-wrap: anywhere; margin: .15rem 0"
)
GRID_STYLE = (
    "display: grid; grid-template-columns: repeat(auto-fit, minmax(210px, 1fr)); "
    "gap: 1.2rem; margin-top: .8rem"
)
LISTS = {"boosted": "boosts", "suppressed": "suppresses", "table": "closest table rows"}


def visible(token: str) -> str:
    """A token with visible line breaks and tabs."""
    return token.replace("\n", "⏎").replace("\t", "⇥")


def contexts(d: pd.DataFrame) -> str:
    """Strong contexts, one per line, with tokens shaded by activation."""
    rows = d[d.row == "context"]
    greatest = max(rows.value.max(), 1e-9)
    lines = []
    for _, line in rows.groupby("rank"):
        spans = ""
        for token, value in zip(line.token, line.value, strict=True):
            shade = 0.85 * max(value, 0.0) / greatest
            style = f"background: rgba(213, 94, 0, {shade:.2f})"
            spans += f"<span title='{value:.2f}' style='{style}'>{escape(visible(token))}</span>"
        lines.append(f"<div style='{CONTEXT_STYLE}'>{spans}</div>")
    return "".join(lines)


def histogram(d: pd.DataFrame) -> str:
    """Activations above zero, one bar per bin, with heights on a log scale."""
    counts = d[d.row == "histogram"].value.to_numpy()
    heights = 70 * np.log1p(counts) / np.log1p(counts.max()) if len(counts) else []
    bars = "".join(
        f"<rect x='{8 * i}' y='{70 - h:.1f}' width='7' height='{h:.1f}' fill='#0072B2'/>"
        for i, h in enumerate(heights)
    )
    greatest = d[(d.row == "number") & (d.token == "greatest")].value.iloc[0]
    ends = "<text x='0' y='85' font-size='11'>0</text>"
    ends += f"<text x='192' y='85' font-size='11' text-anchor='end'>{greatest:.1f}</text>"
    size = "width='200' height='88' role='img' aria-label='histogram'"
    return f"<div><b>activation</b> (log count)<br><svg {size}>{bars}{ends}</svg></div>"


def ranking(d: pd.DataFrame, name: str) -> str:
    """One list of tokens with their numbers; `name` is a key of LISTS."""
    cells = ""
    for row in d[d.row == name].itertuples():
        token = f"<td><code>{escape(visible(row.token))}</code></td>"
        cells += f"<tr>{token}<td>{row.value:+.2f}</td></tr>"
    return f"<table><tr><th colspan='2'>{LISTS[name]}</th></tr>{cells}</table>"


def feature(heading: str, d: pd.DataFrame) -> str:
    """One dashboard: numbers, contexts, histogram, logits, closest table rows."""
    d = d.assign(token=d.token.fillna("").astype(str))
    number = d[d.row == "number"].set_index("token").value
    frequency, greatest = number["frequency"], number["greatest"]
    summary = f"fires on {frequency:.2%} of positions; greatest activation {greatest:.2f}"
    lists = "".join(ranking(d, name) for name in LISTS)
    grid = f"<div style='{GRID_STYLE}'>{histogram(d)}{lists}</div>"
    return f"<h2>{escape(heading)}</h2><div>{summary}</div>{contexts(d)}{grid}"


def page(parts: dict[str, pd.DataFrame], title: str) -> str:
    """A self-contained page of dashboards from {heading: table of `features.describe`}."""
    head = "<meta charset='utf-8'><meta name='viewport' content='width=device-width'>"
    head += f"<title>{escape(title)}</title><style>{STYLE}</style>"
    body = f"<h1>{escape(title)}</h1>"
    body += "".join(feature(heading, d) for heading, d in parts.items())
    return f"<!doctype html><html lang='en'><head>{head}</head><body>{body}</body></html>"


def draw_contexts(ax: plt.Axes, rows: pd.DataFrame, color: str) -> None:
    """Draw contexts below one another, with the strongest token of each at x = 0.

    Tokens are shaded by activation. Columns have the width of a letter.
    """
    letter_style = {"family": "monospace", "fontsize": 9.5, "ha": "center", "va": "center"}
    letter_style |= {"parse_math": False, "clip_on": True}
    for rank, line in rows.groupby("rank"):
        words = line.token.map(visible)
        ends = words.str.len().cumsum()
        starts = ends - words.str.len()
        starts -= starts[line.place == 0].iloc[0]
        for start, word, value in zip(starts, words, line.value, strict=True):
            alpha = 0.85 * max(value, 0) / rows.value.max()
            box = plt.Rectangle((start, -rank - 0.45), len(word), 0.9, lw=0)
            ax.add_patch(box).set(color=color, alpha=alpha)
            for i, letter in enumerate(word):
                ax.text(start + i + 0.5, -rank, letter, **letter_style)
    ax.set(xlim=(-42, 34), ylim=(-rows["rank"].max() - 0.6, -0.4))
    ax.axis("off")
