"""Claims: declared before the run in `notebooks/claims/<id>.toml`, judged by one rule afterwards.

A declaration holds the claim, the rule in words, and the threshold: `above`, `below` or `between`,
with `null` where the value of no effect is not the threshold. `notebooks/rules/<id>.py` holds a
function for each claim, from the committed tables to the estimates that the threshold judges. A
verdict depends on nothing else, so anybody can judge the tables again, and no two verdicts hold.

Verdicts on models other than the paper's:

    holds          every estimate, with its whole interval, is on the claimed side of the threshold
    reversed       every interval excludes the null value on the other side
    does not hold  an interval lies wholly on the other side of the threshold
    undecided      otherwise: an interval includes the threshold
    not tested     there is no estimate, or one seed gives no interval

On the paper's own models and settings: reproduced, direction only, not reproduced, not tested.
"""

from __future__ import annotations

import importlib
import json
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import pandas as pd

from .stats import Interval, crossed_ratio, paired_interval

VERDICTS = ("holds", "reversed", "does not hold", "undecided", "not tested")
PAPER_VERDICTS = ("reproduced", "direction only", "not reproduced", "not tested")
COLUMNS = ["id", "claim", "source", "rule", "paper", "ours", "n_seeds", "model", "verdict"]
COLUMNS += ["estimate", "low", "high"]
Estimate = float | Interval
THRESHOLDS = ("above", "below", "between", "null")


@dataclass(frozen=True)
class Evidence:
    """What a rule finds in the tables."""

    estimates: Estimate | Mapping[object, Estimate] | None  # by label; None: nothing to test
    text: str = "{}"  # what came out, with {} for the estimates
    fmt: str = "+.3f"
    seeds: int = 1


Rule = Callable[["Tables"], Evidence]
RULES: dict[str, Rule] = {}


def rule(id: str) -> Callable[[Rule], Rule]:
    """Register the rule of a claim."""

    def register(function: Rule) -> Rule:
        RULES[id] = function
        return function

    return register


def rules_of(figure_id: str) -> dict[str, Rule]:
    """The rules of a notebook's claims, by id, from notebooks/rules/<figure_id>.py."""
    importlib.import_module(f"rules.{figure_id}")
    return {id: RULES[id] for id in read_claims(figure_id)}


class Tables:
    """The tables of one notebook, as its rules see them: `tables.main`, `tables["_lr"]`."""

    def __init__(self, folder: Path, figure_id: str) -> None:
        self.folder, self.id = folder, figure_id
        self.read: dict[str, pd.DataFrame] = {}
        self.is_over_seeds_only = False  # whether a ratio was asked for that lacked documents

    def __getitem__(self, suffix: str) -> pd.DataFrame:
        if suffix not in self.read:
            self.read[suffix] = read_table(self.folder / f"{self.id}{suffix}.csv")
        return self.read[suffix]

    @property
    def main(self) -> pd.DataFrame:
        return self[""]

    @cached_property
    def profile(self) -> dict:
        """The profile's fields, from <id>.json."""
        return json.loads((self.folder / f"{self.id}.json").read_text())["profile"]

    @property
    def paper_sae(self) -> str:
        """The system that stands for the paper's SAE."""
        return "published" if self.profile["published"] else "topk"

    @property
    def main_width(self) -> int:
        """The expansion in the main table that is nearest the profile's."""
        return min(self.main.expansion.unique(), key=lambda e: abs(e - self.profile["expansion"]))

    @cached_property
    def documents(self) -> pd.DataFrame | None:
        """Sums over documents by (config, code); None where the tables come without."""
        path = self.folder / f"{self.id}_documents.csv.gz"
        if not path.exists():
            return None
        return pd.read_csv(path).set_index(["config", "code"]).sort_index()

    def ratio(self, ours: pd.DataFrame, rival: pd.DataFrame, metric: str) -> Interval:
        """`metric` (ce_added or nmse) of `ours` over that of `rival`, a row per seed in both.

        Crossed over seeds and documents; over seeds alone where no sums over documents exist.
        """
        ours, rival = (table.sort_values("seed") for table in (ours, rival))
        if list(ours.seed) != list(rival.seed) or ours.seed.duplicated().any() or ours.empty:
            raise ValueError(f"{self.id}: a ratio needs one row for each seed on both sides")
        sums = [self._sums(table, metric) for table in (ours, rival)]
        if any(part is None for part in sums):
            self.is_over_seeds_only = True
            logs = np.log(ours[metric].to_numpy()) - np.log(rival[metric].to_numpy())
            return paired_interval(logs).exp()
        first, second = sums
        if not first.columns.equals(second.columns):
            raise ValueError(f"{self.id}: a ratio needs the same documents on both sides")
        return crossed_ratio(first.to_numpy(), second.to_numpy())

    def _sums(self, table: pd.DataFrame, metric: str) -> pd.DataFrame | None:
        """Sums of a metric, a row per SAE, a column per document; None where one has none."""
        documents = self.documents
        if documents is None or not {"config", "code"} <= set(table):
            return None
        wanted = list(zip(table.config, table.code, strict=True))
        if not set(wanted) <= set(documents.index):
            return None
        size, column = {"ce_added": ("n", "ce_added"), "nmse": ("positions", "squared_error")}[
            metric
        ]
        rows = [documents.loc[[key]].set_index(["document", size])[column] for key in wanted]
        return pd.concat(rows, axis=1).T  # documents of other sizes would leave gaps


def read_table(path: Path) -> pd.DataFrame:
    """A saved table; "None" is a token. Raises FileNotFoundError where the notebook has not run."""
    if not path.exists():
        raise FileNotFoundError(
            f"{path.name} is not in {path.parent}: run this notebook once before redrawing"
        )
    return pd.read_csv(path, keep_default_na=False, na_values=[""])


def read_claims(figure_id: str) -> dict[str, dict]:
    """Claims of one notebook by id: by (paper or ours), claim, source, rule, paper, threshold.

    Empty for a notebook that claims nothing.
    """
    path = Path(__file__).resolve().parents[1] / "claims" / f"{figure_id}.toml"
    if not path.exists():
        return {}
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


def find(rule: Rule, tables: Tables) -> Evidence:
    """The evidence of a rule; its text says where intervals lack the documents."""
    tables.is_over_seeds_only = False
    evidence = rule(tables)
    if tables.is_over_seeds_only:
        evidence = replace(evidence, text=evidence.text + "; intervals over seeds only")
    return evidence


def threshold_of(claim: Mapping) -> dict:
    """The threshold of a declared claim, as `decide` takes it."""
    return {name: claim[name] for name in THRESHOLDS if name in claim}


def judged(claim: Mapping, evidence: Evidence, on_the_papers_setting: bool) -> dict:
    """What the evidence says about a claim: ours, n_seeds, verdict, estimate, low and high."""
    threshold = threshold_of(claim)
    intervals = {} if evidence.estimates is None else as_intervals(evidence.estimates)
    estimated = list(intervals.values())
    verdict = decide(estimated, **threshold)
    if on_the_papers_setting and verdict != "not tested":
        signed = has_claimed_sign(estimated, **threshold)
        failed = "direction only" if signed else "not reproduced"
        verdict = "reproduced" if verdict == "holds" else failed
    shown = weakest(estimated, threshold.get("below")) if estimated else None
    has_interval = shown is not None and shown.is_known and shown.low < shown.high
    return {
        "ours": evidence.text.replace("{}", as_text(intervals, evidence.fmt)),
        "n_seeds": evidence.seeds,
        "verdict": verdict,
        "estimate": shown.value if has_interval else None,
        "low": shown.low if has_interval else None,
        "high": shown.high if has_interval else None,
    }


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
