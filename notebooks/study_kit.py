"""A blind study of features as a kit of files; `make unblind` evaluates what was scored.

A kit is a folder with `items.html` to read and a `scores_<rater>.csv` for each of two raters to
fill in. Which item is which feature stands nowhere beside them: `tools/blind_study.py` draws the
items again from the committed table. The scales are those of the paper's table 1 (workshop
manuscript). They measure different things: a clear unigram feature has interpretability 9 and
complexity 1.
"""

from __future__ import annotations

from pathlib import Path

import dashboard
import features as ft
import pandas as pd
import torch
from lab import Lab, tu
from lab.blind import RATERS, SCALES, draw_items

INSTRUCTIONS = (
    "Score every item in your scores file, 1 to 10 on both scales, without talking to the other "
    "rater. Interpretability: 1-4 no pattern, 5-7 noisy, 8-10 clear. "
    "Complexity: 1-3 a single token, 4-6 a simple pattern, 7-10 a meaning."
)


def make_kit(
    lab: Lab, saes: dict[str, tu.TSAE], text: ft.Text, table: pd.DataFrame, folder: Path
) -> Path:
    """Write a kit into `folder`, which is returned. Scores that are already filled in stay."""
    items, parts = draw_items(table), {}
    for system, part in items.groupby("system"):
        chosen = torch.tensor(part.feature.to_numpy(), device=text.x.device)
        acts_PF = ft.activations(saes[system], text, chosen)  # once: encoding the text is slow
        for row, acts in zip(part.itertuples(), acts_PF.T, strict=True):
            parts[row.item] = ft.describe(lab, saes[system], row.feature, text, acts=acts)
    parts = {item: parts[item] for item in items["item"]}
    folder.mkdir(parents=True, exist_ok=True)
    page = dashboard.page(parts, "Blind feature study")
    page = page.replace("</h1>", f"</h1><p>{INSTRUCTIONS}</p>")
    (folder / "items.html").write_text(page, encoding="utf-8")
    scores = pd.DataFrame({"item": items["item"], **dict.fromkeys(SCALES, "")})
    for rater in RATERS:
        path = folder / f"scores_{rater}.csv"
        if not path.exists():
            scores.to_csv(path, index=False)
    return folder
