"""Unblind a scored kit of the feature study: table 1 with the scores filled in.

    python tools/blind_study.py figures/record/tab1_feature_study_kit

Notebook 09 makes the kit. Its folder holds `items.html` to read, `scores.csv` to fill in, and
`key.json`, which nobody opens before scoring. Both scales are the paper's (workshop manuscript):

    interpretability   1-4 no pattern, 5-7 noisy, 8-10 clear
    complexity         1-3 a single token, 4-6 a simple pattern, 7-10 a meaning
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pandas as pd

from notebooks.lab.stats import bootstrap_interval

SCALES = ("interpretability", "complexity")


def unblind(folder: Path) -> pd.DataFrame:
    """Table 1: the mean of both scales with its 95 % bootstrap interval, for every system.

    Raises ValueError where a score is missing or not between 1 and 10, or where the scored items
    are not those of the key.
    """
    scores = pd.read_csv(folder / "scores.csv")
    key = json.loads((folder / "key.json").read_text(encoding="utf-8"))
    check_scores(scores, key, folder / "scores.csv")
    scores["system"] = [key[item]["system"] for item in scores["item"]]
    rows = []
    for system, part in scores.groupby("system"):
        for scale in SCALES:
            mean, low, high = bootstrap_interval(np.mean, part[scale].to_numpy(float))
            row = {"system": system, "scale": scale, "mean": mean, "low": low, "high": high}
            rows.append(row | {"features": len(part)})
    return pd.DataFrame(rows)


def check_scores(scores: pd.DataFrame, key: dict[str, dict], path: Path) -> None:
    """Raise ValueError, with a sentence that says what to mend, for scores that cannot be used."""
    if sorted(scores["item"]) != sorted(key):
        raise ValueError(
            f"{path} and key.json name different items: was the kit made again after scoring?"
        )
    for scale in SCALES:
        wrong = scores[~pd.to_numeric(scores[scale], errors="coerce").between(1, 10)]
        if len(wrong):
            first = wrong.iloc[0]
            what = f"{scale} of {first['item']} is {first[scale]}"
            raise ValueError(f"{path}: {what}; expected 1 to 10 ({len(wrong)} to mend)")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        raise SystemExit(__doc__)
    try:
        print(unblind(Path(sys.argv[1])).round(2).to_string(index=False))
    except (FileNotFoundError, ValueError) as error:
        raise SystemExit(str(error)) from None
