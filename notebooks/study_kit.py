"""A blind study of features as a kit of files. `tools/blind_study.py` unblinds what was scored.

A kit is a folder with `items.html` to read, `scores.csv` to fill in, and `key.json`, which nobody
opens before scoring. The scales are those of the paper's table 1 (workshop manuscript). They
measure different things: a clear unigram feature has interpretability 9 and complexity 1.
"""

from __future__ import annotations

import json
from pathlib import Path

import dashboard
import features as ft
import numpy as np
import pandas as pd
from lab import Lab, tu

SCALES = ("interpretability", "complexity")
INSTRUCTIONS = (
    "Score every item in scores.csv, 1 to 10 on both scales. "
    "Interpretability: 1-4 no pattern, 5-7 noisy, 8-10 clear. "
    "Complexity: 1-3 a single token, 4-6 a simple pattern, 7-10 a meaning."
)


def make_kit(
    lab: Lab, saes: dict[str, tu.TSAE], text: ft.Text, n_features: int, folder: Path, seed: int = 0
) -> Path:
    """Write a kit into `folder`, which is returned.

    It shows `n_features` random living features of every SAE, in random order and without their
    source. Scores that are already filled in stay.
    """
    features = []  # (system, feature, its activations [P])
    for system, sae in saes.items():
        sampled = ft.sample_features(sae, text, n_features, seed)
        acts_PF = ft.activations(sae, text, sampled.to(text.x.device))
        features += [(system, int(f), acts) for f, acts in zip(sampled, acts_PF.T, strict=True)]
    order = np.random.default_rng(seed).permutation(len(features))
    key, parts = {}, {}
    for number, i in enumerate(order, 1):
        item = f"item {number:02d}"
        system, feature, acts = features[i]
        key[item] = {"system": system, "feature": feature}
        parts[item] = ft.describe(lab, saes[system], feature, text, acts=acts)
    write_kit(folder, key, parts)
    return folder


def write_kit(folder: Path, key: dict[str, dict], parts: dict[str, pd.DataFrame]) -> None:
    """Write the files of a kit from its key and its dashboards, both by item."""
    folder.mkdir(parents=True, exist_ok=True)
    page = dashboard.page(parts, "Blind feature study")
    page = page.replace("</h1>", f"</h1><p>{INSTRUCTIONS}</p>")
    (folder / "items.html").write_text(page, encoding="utf-8")
    (folder / "key.json").write_text(json.dumps(key, indent=1) + "\n", encoding="utf-8")
    if not (folder / "scores.csv").exists():
        scores = pd.DataFrame({"item": list(key), **dict.fromkeys(SCALES, "")})
        scores.to_csv(folder / "scores.csv", index=False)
