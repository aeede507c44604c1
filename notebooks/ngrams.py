"""Common n-grams with the features that respond to them, and hidden states of n-grams alone.

Used by figures 4 and 5. Axes: G n-grams, n tokens per n-gram, R rows of text, L tokens per row,
P positions of text, D d_in, F d_sae, C chosen features, T n-grams kept per feature.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from features import Text, encoded
from lab import Interval, bootstrap_interval, tu
from torch import Tensor
from torch.nn import functional as F


class Ngrams(NamedTuple):
    """The commonest n-grams of one order, commonest first."""

    tokens: Tensor  # [G, n]
    counts: np.ndarray  # [G], occurrences in the training text
    x: Tensor  # [G, D], the residual stream at the last token of [BOS, n-gram]


class Responses(NamedTuple):
    """How the features of an SAE respond to the n-grams of one order."""

    feature: Tensor  # [G], the feature of each n-gram
    predicted: Tensor  # [T, F], the n-grams that activate a feature most; -1 where too few do
    fires: Tensor  # [F], the number of n-grams on which a feature fires

    @property
    def sharers(self) -> np.ndarray:
        """How many n-grams have the feature of each n-gram, itself included [G]."""
        return torch.bincount(self.feature)[self.feature].numpy()


@torch.no_grad()
def responses(sae: tu.TSAE, ngrams: Ngrams, top: int = 5) -> Responses:
    """Responses to n-grams.

    The feature of an n-gram is the one whose activation most exceeds its mean over all n-grams.
    """
    last = ngrams.tokens[:, -1]
    total_F = sum(acts.sum(0) for acts in encoded(sae, ngrams.x, last, 2048))
    mean_F = total_F.cpu() / len(last)
    feature, fires_F = [], torch.zeros(sae.cfg.d_sae)
    best_TF = torch.zeros(top, sae.cfg.d_sae)
    predicted_TF = torch.full((top, sae.cfg.d_sae), -1)
    for i, acts in enumerate(encoded(sae, ngrams.x, last, 2048)):
        acts = acts.cpu()
        feature.append((acts - mean_F).argmax(-1))
        fires_F += (acts > 0).sum(0)
        # the best n-grams of this part compete with the best so far
        values, places = acts.topk(min(top, len(acts)), dim=0)
        best_TF, order = torch.cat([best_TF, values]).topk(top, dim=0)
        predicted_TF = torch.cat([predicted_TF, places + 2048 * i]).gather(0, order)
    predicted_TF = torch.where(best_TF > 0, predicted_TF, -1)
    return Responses(torch.cat(feature), predicted_TF, fires_F)


@torch.no_grad()
def observed(
    sae: tu.TSAE, text: Text, tokens_Gn: Tensor, bos_id: int, chosen_C: Tensor, top: int = 5
) -> Tensor:
    """The n-grams of the text on which a feature's activations have the largest sum [T, C].

    They are given as row numbers of `tokens_Gn`; -1 stands for an n-gram that is not in it.
    """
    tokens_Pn = tu.last_tokens(text.ids, tokens_Gn.shape[1], bos_id)[text.keep]
    kinds, kind = torch.unique(torch.cat([tokens_Gn, tokens_Pn]), dim=0, return_inverse=True)
    kind_G, kind_P = kind[: len(tokens_Gn)], kind[len(tokens_Gn) :]
    common = torch.full((len(kinds),), -1)
    common.scatter_(0, kind_G, torch.arange(len(tokens_Gn)))
    parts = []
    for features in chosen_C.split(1024):  # sums of all n-grams and features would not fit
        total = torch.zeros(len(kinds), len(features))
        parts_of_text = encoded(sae, text.x, text.tokens)
        for acts, k in zip(parts_of_text, kind_P.split(4096), strict=True):
            total.index_add_(0, k, acts[:, features.to(acts.device)].cpu())
        values, places = total.topk(min(top, len(kinds)), dim=0)
        parts.append(torch.where(values > 0, common[places], -1))
    return torch.cat(parts, 1)


def matching_shares(
    sae: tu.TSAE,
    text: Text,
    tokens_Gn: Tensor,
    bos_id: int,
    alive_F: Tensor,
    answer: Responses,
    as_many: int,
) -> dict[str, float]:
    """Shares of the living features that respond to common n-grams of one order.

    fired: fire on one or more. reconstructs: are the feature of one of the `as_many` commonest.
    For unigrams and bigrams, where the paper's matches stop, also shares of the features fired:
    top: the first predicted n-gram is the first observed. any: one or more are in both lists.
    """
    living = torch.nonzero(alive_F).squeeze(-1)
    shares = {
        "fired": (answer.fires[alive_F] > 0).float().mean().item(),
        "reconstructs": torch.isin(living, answer.feature[:as_many]).float().mean().item(),
    }
    if tokens_Gn.shape[1] <= 2:
        fired_C = torch.nonzero(alive_F & (answer.fires > 0)).squeeze(-1)
        observed_TC = observed(sae, text, tokens_Gn, bos_id, fired_C)
        predicted_TC = answer.predicted[:, fired_C]
        is_same = (observed_TC[:, None] == predicted_TC[None]) & (observed_TC[:, None] >= 0)
        shares["top"] = (observed_TC[0] == predicted_TC[0]).float().mean().item()
        shares["any"] = is_same.flatten(0, 1).any(0).float().mean().item()
    return shares


def unit_embeddings(lm: tu.LanguageModel, tokens_G1: Tensor) -> Tensor:
    """Embeddings of unigrams without the vocabulary's mean, at length 1 [G, D]."""
    embedding = lm.model.get_input_embeddings().weight.detach().float().cpu()
    return F.normalize(embedding[tokens_G1[:, 0]] - embedding.mean(0), dim=-1)


def likeness(unit_GD: Tensor, feature_G: Tensor) -> np.ndarray:
    """Mean cosine within each group of n-grams that share a feature [groups].

    `unit_GD` holds unit vectors. An n-gram that shares its feature with no other is left out.
    """
    cosines = []
    for feature in torch.unique(feature_G):
        group = unit_GD[feature_G == feature]
        size = len(group)
        if size > 1:
            cosines.append(((group @ group.T).sum() - size).item() / (size * (size - 1)))
    return np.array(cosines)


def compare_likeness(unit_GD: Tensor, feature_G: Tensor, seed: int) -> pd.DataFrame:
    """Likeness of n-grams that share a feature, of shuffled groups, and the difference.

    One row each: group, groups (their number), cosine, low, high. Empty where none share.
    """
    order = torch.randperm(len(feature_G), generator=torch.Generator().manual_seed(seed))
    sharing = likeness(unit_GD, feature_G)
    shuffled = likeness(unit_GD, feature_G[order])  # the groups keep their sizes
    if not len(sharing):
        return pd.DataFrame()
    rng = np.random.default_rng(seed)
    gaps = [
        rng.choice(sharing, len(sharing)).mean() - rng.choice(shuffled, len(shuffled)).mean()
        for _ in range(1000)
    ]
    low, high = np.percentile(gaps, [2.5, 97.5])
    intervals = {
        "sharing": bootstrap_interval(np.mean, sharing),
        "shuffled": bootstrap_interval(np.mean, shuffled),
        "difference": Interval(sharing.mean() - shuffled.mean(), low, high),
    }
    table = pd.DataFrame(intervals.values()).rename(columns={"value": "cosine"})
    table = table.assign(group=list(intervals), groups=len(sharing))
    return table[["group", "groups", "cosine", "low", "high"]]


def logistic_slope(x: np.ndarray, y: np.ndarray) -> float:
    """Slope of the logit of y (0 or 1) on x, by Newton's method with a ridge of 1e-6."""
    inputs, b = np.column_stack([np.ones_like(x), x]), np.zeros(2)
    for _ in range(25):
        p = 1 / (1 + np.exp(-np.clip(inputs @ b, -30, 30)))
        curvature = (inputs * (p * (1 - p))[:, None]).T @ inputs + 1e-6 * np.eye(2)
        b += np.linalg.solve(curvature, inputs.T @ (y - p) - 1e-6 * b)
    return b[1]


def owning_by_count(owners: pd.DataFrame) -> tuple[pd.DataFrame, pd.DataFrame]:
    """How owning a feature depends on an n-gram's count, for each system, seed and order n.

    `owners` has a row per n-gram: system, seed, n, count, sharers (n-grams with its feature).
    Returns logistic slopes on log10 of the count, and shares that own in bins of powers of two.
    """
    owners = owners.assign(owns=(owners.sharers == 1).astype(int))
    slopes = []
    for (system, seed, n), part in owners.groupby(["system", "seed", "n"]):
        log_count, owns = np.log10(part["count"].to_numpy(float)), part.owns.to_numpy(float)
        slope, low, high = bootstrap_interval(logistic_slope, log_count, owns, n=200)
        key = {"row": "slope", "system": system, "seed": seed, "n": n}
        slopes.append({**key, "slope": slope, "low": low, "high": high})
    bin_centre = np.exp2(np.round(np.log2(owners["count"].astype(float))))
    bins = owners.assign(count=bin_centre).groupby(["system", "seed", "n", "count"])
    bins = bins.agg(owns=("owns", "mean"), sharers=("sharers", "median"), grams=("owns", "size"))
    return pd.DataFrame(slopes), bins.reset_index().assign(row="bin")


class HeldoutStates(NamedTuple):
    """Held-out text with its hidden states after each block."""

    ids: Tensor  # [R, L]
    keep: Tensor  # [R, L], the positions that count
    layers: list[int]  # 1 to the last; layer 0, the embedding, is left out
    states: list[Tensor]  # [R, L, D] per layer

    def cosines(self, pos_P2: Tensor, states: list[Tensor]) -> dict[str, np.ndarray]:
        """Cosines [layers, P] of `states` with the true ones, raw and with means removed.

        Each side is centred by its own mean over the rows at each position of a row, so that
        states of unrelated text have a cosine near 0.
        """
        raw, centred = [], []
        column = pos_P2[:, 1].unique(return_inverse=True)[1]
        for true, state in zip(self.states, states, strict=True):
            true = true[pos_P2[:, 0], pos_P2[:, 1]]
            raw.append(F.cosine_similarity(true, state))
            centred.append(F.cosine_similarity(*(less_mean(x, column) for x in (true, state))))
        both = {"raw": torch.stack(raw), "mean removed": torch.stack(centred)}
        return {name: cosine.cpu().numpy() for name, cosine in both.items()}


def less_mean(x_PD: Tensor, group_P: Tensor) -> Tensor:
    """Vectors without the mean of their group."""
    group_P = group_P.to(x_PD.device)
    sums = torch.zeros(int(group_P.max()) + 1, x_PD.shape[1], device=x_PD.device)
    sums.index_add_(0, group_P, x_PD)
    return x_PD - (sums / torch.bincount(group_P)[:, None])[group_P]


def read_states(lm: tu.LanguageModel, ids_RL: Tensor) -> HeldoutStates:
    """The hidden states of every position after every block."""
    layers = list(range(1, lm.n_layers + 1))
    parts = [lm.activations(part, layers) for part in ids_RL.split(16)]
    states = [torch.cat([part[layer] for part in parts]) for layer in layers]
    return HeldoutStates(ids_RL, tu.keep_mask(ids_RL, lm), layers, states)


def draw_positions(keep_RL: Tensor, n: int, per_row: int, generator: torch.Generator) -> Tensor:
    """Rows and columns [P, 2] of positions in second halves of rows whose last n tokens count.

    All rows share the drawn columns, at most `per_row`, so that each has a mean over rows.
    """
    is_text = keep_RL.clone()
    for shift in range(1, n):
        is_text[:, shift:] &= keep_RL[:, :-shift]
    half = keep_RL.shape[1] // 2
    order = torch.randperm(keep_RL.shape[1] - half, generator=generator)
    columns = half + order[:per_row].sort().values
    drawn = torch.zeros_like(is_text)
    drawn[:, columns] = is_text[:, columns]
    return drawn.nonzero()


def swapped(pos_P2: Tensor, generator: torch.Generator) -> Tensor:
    """The same positions in another order, such that none keeps its place [P, 2]."""
    order, others = torch.randperm(len(pos_P2), generator=generator), pos_P2.clone()
    others[order] = pos_P2[order.roll(1)]
    return others


def longest_passage(keep_RL: Tensor, n: int, longest: int = 24) -> Tensor:
    """Rows and columns [P, 2] of a stretch of text, at every place of which n tokens count."""
    for length in range(min(longest, keep_RL.shape[1] - n + 1), 0, -1):
        window = length + n - 1
        starts = torch.nonzero(keep_RL.long().unfold(1, window, 1).sum(-1) == window)
        if len(starts):
            break
    row, start = starts[len(starts) // 3].tolist()
    return torch.tensor([[row, start + n - 1 + i] for i in range(length)])


def suffix_states(
    lm: tu.LanguageModel, text: HeldoutStates, pos_P2: Tensor, n: int, keep_positions: bool = False
) -> list[Tensor]:
    """Hidden states [P, D] per layer of the prompts [BOS, last n tokens].

    Their tokens stand at positions 1 to n, or with `keep_positions` where the text has them.
    """
    row, column = pos_P2.T
    columns = column[:, None] + torch.arange(1 - n, 1)
    bos = torch.full((len(row), 1), lm.bos_id)
    prompts = torch.cat([bos, text.ids[row[:, None], columns]], 1)
    positions = torch.cat([torch.zeros_like(bos), columns], 1)
    parts = []
    for i in range(0, len(row), 512):
        batch = slice(i, i + 512)
        batch_positions = positions[batch] if keep_positions else None
        parts.append(lm.activations(prompts[batch], text.layers, positions_RL=batch_positions))
    return [torch.cat([part[layer][:, -1] for part in parts]) for layer in text.layers]
