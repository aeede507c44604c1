"""Unblind a scored kit of the feature study: table 1, and how far the two raters agree.

    python tools/blind_study.py figures/record        # also `make unblind`

Notebook 09 makes the kit, `tab1_feature_study_kit/`, with `items.html` to read and a
`scores_<rater>.csv` for each of two raters. Both scales are the paper's (workshop manuscript):

    interpretability   1-4 no pattern, 5-7 noisy, 8-10 clear
    complexity         1-3 a single token, 4-6 a simple pattern, 7-10 a meaning

Once both have scored every item, this draws the items again from `tab1_feature_study.csv`, writes
them to `key.csv`, and prints both tables.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pandas as pd
from sklearn.metrics import cohen_kappa_score

from notebooks.lab.blind import RATERS, SCALES, draw_items
from notebooks.lab.stats import bootstrap_interval


def read_scores(kit: Path, rater: str) -> pd.DataFrame:
    """A rater's scores by item. Raises ValueError where one is missing or not between 1 and 10."""
    path = kit / f"scores_{rater}.csv"
    scores = pd.read_csv(path).set_index("item")
    for scale in SCALES:
        wrong = scores[~pd.to_numeric(scores[scale], errors="coerce").between(1, 10)]
        if len(wrong):
            what = f"{scale} of {wrong.index[0]} is {wrong.iloc[0][scale]}"
            raise ValueError(f"{path}: {what}; expected 1 to 10 ({len(wrong)} to mend)")
    return scores[list(SCALES)].astype(float)


def unblind(folder: Path) -> tuple[pd.DataFrame, pd.DataFrame]:
    """(Table 1, agreement) of the kit in a folder of figures; writes the kit's key.csv.

    Table 1 has the mean of the raters' scores with a 95 % bootstrap interval over features, by
    system and scale. Agreement is Cohen's kappa with quadratic weights, by scale. Raises ValueError
    for scores that cannot be used, or of items other than the table's.
    """
    kit = folder / "tab1_feature_study_kit"
    scores = {rater: read_scores(kit, rater) for rater in RATERS}
    items = draw_items(pd.read_csv(folder / "tab1_feature_study.csv"))
    for rater, table in scores.items():
        if sorted(table.index) != sorted(items["item"]):
            raise ValueError(
                f"scores_{rater}.csv and the record name different items: was the kit made again "
                "after scoring?"
            )
    items.to_csv(kit / "key.csv", index=False)
    mean = sum(scores.values()) / len(scores)
    system, rows = items.set_index("item").system, []
    for name, part in mean.groupby(system):
        for scale in SCALES:
            interval = bootstrap_interval(np.mean, part[scale].to_numpy())
            row = {"system": name, "scale": scale, **interval._asdict(), "features": len(part)}
            rows.append(row)
    first, second = (table.loc[items["item"]] for table in scores.values())
    kappa = {
        scale: cohen_kappa_score(
            first[scale].round(), second[scale].round(), labels=range(1, 11), weights="quadratic"
        )
        for scale in SCALES
    }
    agreement = pd.DataFrame({"scale": list(kappa), "kappa": list(kappa.values())})
    return pd.DataFrame(rows), agreement


if __name__ == "__main__":
    if len(sys.argv) != 2:
        raise SystemExit(__doc__)
    try:
        for table in unblind(Path(sys.argv[1])):
            print(table.round(2).to_string(index=False), end="\n\n")
    except (FileNotFoundError, ValueError) as error:
        raise SystemExit(str(error)) from None
