"""A staged search for the recipe of one SAE: the same for every arm of a comparison.

    best, rows = search(run, start, stages)

A stage varies one or two settings in a grid around the best recipe so far. Settings on a
logarithmic axis (learning rates, norms, scales) are extended until the best lies inside.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import product
from typing import Any

Recipe = Mapping[str, Any]
Run = Callable[[list[dict[str, Any]]], list[dict[str, Any]]]
MOST_EXTENSIONS = 4  # of one stage


def search(
    run: Run,
    start: Recipe,
    stages: Sequence[Mapping[str, Sequence]],
    open_ended: Sequence[str] = (),
    score: str = "score",
    most: int = 40,
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """(The best recipe, a row for every recipe tried), lower scores being better.

    `run` trains a list of recipes, in one pass of the language model where it can, and returns a
    row with the `score` of each. A stage maps settings to their values; those in `open_ended` are
    numbers that go on by the grid's factor while the best is at an end. Rows gain `stage` and the
    recipe's settings. No recipe runs twice, and at most `most` run in all: a stage that does not
    fit is cut from its end. A score that is not finite never wins.

    Raises ValueError where no recipe has a finite score.
    """
    best, rows, tried = dict(start), [], {}

    def attempt(recipes: list[dict], stage: int) -> None:
        new = [r for r in recipes if key(r) not in tried][: most - len(tried)]
        for recipe, row in zip(new, run(new) if new else [], strict=True):
            value = float(row[score])
            tried[key(recipe)] = value if math.isfinite(value) else math.inf
            rows.append({"stage": stage, **recipe, **row})

    for number, stage in enumerate(stages, 1):
        axes = {name: list(values) for name, values in stage.items()}
        for _ in range(1 + MOST_EXTENSIONS):
            grid = [
                best | dict(zip(axes, values, strict=True)) for values in product(*axes.values())
            ]
            attempt(grid, number)
            known = [recipe for recipe in grid if key(recipe) in tried]
            winner = min([best, *known], key=lambda recipe: tried.get(key(recipe), math.inf))
            if not extended(axes, winner, open_ended) or len(tried) >= most:
                break
        best = winner
    if not math.isfinite(tried.get(key(best), math.inf)):
        raise ValueError(f"no recipe of {len(tried)} has a finite {score}: every run diverged")
    return best, rows


def key(recipe: Recipe) -> tuple:
    """What tells one recipe from another."""
    return tuple(sorted(recipe.items()))


def extended(axes: dict[str, list], winner: Recipe, open_ended: Sequence[str]) -> bool:
    """Whether an axis went on, since the winner is at its end; it then has one value more."""
    went_on = False
    for name in set(axes) & set(open_ended):
        values = sorted({*axes[name], winner[name]})  # the winner may stem from an earlier stage
        ends = {values[0]: values[:2], values[-1]: values[:-3:-1]}  # the end and its neighbour
        if len(values) > 1 and values[0] > 0 and winner[name] in ends:
            end, neighbour = ends[winner[name]]
            axes[name].append(end * end / neighbour)
            went_on = True
    return went_on


def edges(rows: Sequence[Mapping], best: Recipe, open_ended: Sequence[str]) -> list[str]:
    """Settings whose best value is the smallest or largest that was tried."""
    found = []
    for name in open_ended:
        values = {row[name] for row in rows if name in row}
        if len(values) > 1 and best.get(name) in (min(values), max(values)):
            found.append(name)
    return found
