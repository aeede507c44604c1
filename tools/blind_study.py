"""A blind study of features as a kit: hidden, shuffled dashboards to score, and the step that unblinds the scores.

    python notebooks/blind_study.py figures/record/tab1_feature_study_kit      # table 1 of the scores filled in

The kit's folder holds `items.html` to read, `scores.csv` to fill in, and `key.json`, which nobody opens before scoring.
Scales are the paper's (workshop manuscript): interpretability 1-10 (1-4 no pattern, 5-7 noisy, 8-10 clear) and complexity
1-10 (1-3 unigram, 4-6 simple pattern, 6-10 semantic). They are different things: a clear unigram feature is 9 and 1.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import dashboard
import features as ft
import numpy as np
import pandas as pd
from lab import Lab, bootstrap_interval, tu

SCALES = ("interpretability", "complexity")
INSTRUCTIONS = ("Score every item in scores.csv, 1 to 10 on both scales. Interpretability: 1-4 no pattern, 5-7 noisy, 8-10 clear. "
                "Complexity: 1-3 a single token, 4-6 a simple pattern, 7-10 a meaning.")


def make_kit(lab: Lab, saes: dict[str, tu.TSAE], text: ft.Text, each: int, folder: Path, seed: int = 0) -> Path:
    """Write the kit: `each` random living features of every SAE, in random order, without their source."""
    items = []
    for system, sae in saes.items():
        features = ft.sample_features(sae, text, each, seed)
        acts = ft.activations(sae, text.x, features.to(text.x.device))
        items += [(system, int(f), a) for f, a in zip(features, acts.T, strict=True)]
    order = np.random.default_rng(seed).permutation(len(items))
    key, parts = {}, {}
    for number, i in enumerate(order, 1):
        system, feature, acts = items[i]
        key[f"item {number:02d}"] = {"system": system, "feature": feature}
        parts[f"item {number:02d}"] = ft.describe(lab, saes[system], feature, text, acts=acts)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "items.html").write_text(dashboard.page(parts, "Blind feature study").replace("</h1>", f"</h1><p>{INSTRUCTIONS}</p>"))
    (folder / "key.json").write_text(json.dumps(key, indent=1) + "\n")
    if not (folder / "scores.csv").exists():  # scores already filled in are not lost
        pd.DataFrame({"item": list(key), **{scale: "" for scale in SCALES}}).to_csv(folder / "scores.csv", index=False)
    return folder


def unblind(folder: Path) -> pd.DataFrame:
    """Table 1: mean and 95 % bootstrap interval of both scales for every system.

    Raises ValueError where a score is missing or not between 1 and 10, or the items are not the key's.
    """
    scores, key = pd.read_csv(folder / "scores.csv"), json.loads((folder / "key.json").read_text())
    if sorted(scores["item"]) != sorted(key):
        raise ValueError(f"{folder / 'scores.csv'} and key.json name different items: was the kit made again after scoring?")
    for scale in SCALES:
        wrong = scores[~pd.to_numeric(scores[scale], errors="coerce").between(1, 10)]
        if len(wrong):
            first = wrong.iloc[0]
            what = f"{scale} of {first['item']} is {first[scale]}; expected 1 to 10 ({len(wrong)} to mend)"
            raise ValueError(f"{folder / 'scores.csv'}: {what}")
    scores["system"] = [key[i]["system"] for i in scores["item"]]
    rows = []
    for system, part in scores.groupby("system"):
        for scale in SCALES:
            mean, low, high = bootstrap_interval(np.mean, part[scale].to_numpy(float))
            rows.append({"system": system, "scale": scale, "mean": mean, "low": low, "high": high, "features": len(part)})
    return pd.DataFrame(rows)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        raise SystemExit(__doc__)
    try:
        print(unblind(Path(sys.argv[1])).round(2).to_string(index=False))
    except (FileNotFoundError, ValueError) as error:
        raise SystemExit(str(error)) from None
