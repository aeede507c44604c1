"""The recipe of one arm at one sparsity, by the same staged search for every arm."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import tsae_utils as tu
from tsae.search import search

from .training import SAESpec

OPEN_ENDED = ("lr", "decoder_init_norm", "lr_lookup", "table_scale", "encoder_scale")
RATES = (4e-3, 8e-3, 1.6e-2)
TrainAndMeasure = Callable[[dict[str, SAESpec], Callable], list[dict]]


def stages(arm: SAESpec, d_in: int) -> list[dict[str, tuple]]:
    """What is varied, one or two settings at a time; a table adds its rate, scale and start."""
    found = [
        {"lr": RATES, "decoder_init_norm": (0.1, 0.3, 1.0)},
        {"aux_k": (0, d_in // 2), "encoder_scale": (0.25, 0.5, 1.0)},
    ]
    if arm.has_table:
        found.append({"lr_lookup": (3e-3, 1e-2, 3e-2), "table_scale": (0.5, 1.0)})
        found.append({"start": ("unigram", "mean"), "frozen": (False, True)})
    return [*found, {"lr": RATES}]


def search_recipe(
    arm: SAESpec,
    d_in: int,
    train_and_measure: TrainAndMeasure,
    tune: tu.Evaluator,
    metric: str = "ce_added",
    most: int = 40,
) -> tuple[SAESpec, list[dict]]:
    """(The arm with its best recipe, a row for every recipe tried), by `metric` on `tune`.

    `train_and_measure(specs, measure)` gives a row of `measure(name, sae)` for each specification.
    """
    varied = dict.fromkeys(name for stage in stages(arm, d_in) for name in stage)

    def run(recipes: list[dict]) -> list[dict]:
        specs = {str(recipe): replace(arm, **recipe) for recipe in recipes}
        return train_and_measure(specs, lambda name, sae: tune(sae))

    start = {name: getattr(arm, name) for name in varied}
    best, rows = search(run, start, stages(arm, d_in), OPEN_ENDED, metric, most)
    return replace(arm, **best), rows
