"""Claims: declared before the run in `notebooks/claims/<id>.toml`, judged by one rule afterwards.

Verdicts on models other than the paper's:

    holds          every estimate, with its whole interval, is on the claimed side of the threshold
    reversed       every interval excludes the null value on the other side
    does not hold  an interval lies wholly on the other side of the threshold
    undecided      otherwise: an interval includes the threshold
    not tested     there is no estimate, or one seed gives no interval

On the paper's own models and settings: reproduced, direction only, not reproduced, not tested.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from pathlib import Path

import pandas as pd

from .stats import Interval

VERDICTS = ("holds", "reversed", "does not hold", "undecided", "not tested")
PAPER_VERDICTS = ("reproduced", "direction only", "not reproduced", "not tested")
COLUMNS = ["id", "claim", "source", "rule", "paper", "ours", "n_seeds", "model", "verdict"]
COLUMNS += ["estimate", "low", "high"]
Estimate = float | Interval


def read_claims(figure_id: str) -> dict[str, dict]:
    """Claims of one notebook by id: by (paper or ours), claim, source, rule and paper."""
    path = Path(__file__).resolve().parents[1] / "claims" / f"{figure_id}.toml"
    return tomllib.loads(path.read_text(encoding="utf-8"))


def as_intervals(estimates) -> dict[str, Interval]:
    """Estimates by label; a plain number becomes an interval without width."""
    if not isinstance(estimates, Mapping):
        estimates = {"": estimates}
    return {
        label: e if isinstance(e, Interval) else Interval(float(e), float(e), float(e))
        for label, e in estimates.items()
    }


def decide(
    intervals: list[Interval],
    above: float | None = None,
    below: float | None = None,
    between: tuple[float, float] | None = None,
    null: float | None = None,
) -> str:
    """The verdict of a rule: all intervals above or below a threshold, or between two bounds.

    `null` is the value of no effect; the threshold where it is not given.
    """
    if not intervals or not all(i.is_known for i in intervals):
        return "not tested"
    if between is not None:
        lowest, highest = between
        if all(lowest < i.low and i.high < highest for i in intervals):
            return "holds"
        outside = any(i.high <= lowest or highest <= i.low for i in intervals)
        return "does not hold" if outside else "undecided"
    threshold = above if below is None else below
    null = threshold if null is None else null
    if below is not None:  # mirror the number line
        threshold, null = -threshold, -null
        intervals = [Interval(-i.value, -i.high, -i.low) for i in intervals]
    if all(i.low > threshold for i in intervals):
        return "holds"
    if all(i.high < null for i in intervals):
        return "reversed"
    if any(i.high <= threshold for i in intervals):
        return "does not hold"
    return "undecided"


def has_claimed_sign(
    intervals: list[Interval],
    above: float | None = None,
    below: float | None = None,
    between: tuple[float, float] | None = None,
    null: float | None = None,
) -> bool:
    """Whether every estimate lies on the claimed side of the null value."""
    if between is not None:
        if null is None:  # a claim of no effect has no side
            return False
        middle = sum(between) / 2
        above, below = (null, None) if middle > null else (None, null)
    null = (above if below is None else below) if null is None else null
    if below is None:
        return all(i.value > null for i in intervals)
    return all(i.value < null for i in intervals)


def as_text(intervals: Mapping[str, Interval], fmt: str) -> str:
    """Estimates in words: "k=4: +0.17 [+0.15, +0.18]; ..."."""
    parts = []
    for label, i in intervals.items():
        text = f"{i.value:{fmt}}"
        if not i.is_known:
            text += " (one seed)"
        elif i.low < i.high:
            text += f" [{i.low:{fmt}}, {i.high:{fmt}}]"
        parts.append(f"{label}: {text}" if label else text)
    return "; ".join(parts)


def weakest(intervals: list[Interval], below: float | None) -> Interval:
    """The estimate that decides: the one whose bound is nearest to failing."""
    if below is not None:
        return max(intervals, key=lambda i: i.high)
    return min(intervals, key=lambda i: i.low)


def scorecard(claims: pd.DataFrame) -> str:
    """Claims as a Markdown table."""
    columns = ["claim", "source", "paper", "ours", "n_seeds", "verdict"]
    lines = ["| claim | source | paper | ours | seeds | verdict |", "|---|---|---|---|---|---|"]
    for row in claims.astype(str)[columns].to_dict("records"):
        row["verdict"] = f"**{row['verdict']}**"
        lines.append("| " + " | ".join(v.replace("|", "/") for v in row.values()) + " |")
    return "\n".join(lines)
