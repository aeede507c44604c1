"""Lookup tables: the class, where its rows start, and a table for an SAE that has none.

Axes: V vocabulary, D d_in, B batch (tokens), R rows, L sequence, N n-gram order.
"""

from __future__ import annotations

import warnings
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm.auto import tqdm

from tsae.inputs import current_tokens, plain_sae
from tsae.language_model import LanguageModel
from tsae.stream import MAX_NORM_RATIO, max_norm_of, require_finite
from tsae.text import keep_mask

STARTS = ("unigram", "mean", "hashed", "zero")
SHRINKAGE = 5.0  # occurrences of a token that weigh as much as the mean of all


class TokenLookup(nn.Module):
    """W_lookup [V, D]: row t is added to the reconstruction of activations on token t (eq. 2).

    Trained by default, at its own learning rate.
    """

    def __init__(self, W: Tensor, trainable: bool = True) -> None:
        super().__init__()
        if W.ndim != 2:
            raise ValueError(f"a lookup table has shape [V, d_in], not {list(W.shape)}")
        self.W = nn.Parameter(W.detach().float().clone(), requires_grad=trainable)
        self.by_rows = False  # sparse gradients, for the rows that were used; `train` sets it

    def check_vocabulary(self, n_vocab: int) -> None:
        """Raise ValueError unless the table has a row for each of `n_vocab` tokens."""
        if len(self.W) != n_vocab:
            raise ValueError(
                f"the lookup table has {len(self.W)} rows, the model {n_vocab} tokens: "
                "it belongs to another vocabulary"
            )

    def forward(self, tokens: Tensor | None) -> Tensor:
        """Rows [B, D] of tokens [B], or of the last ones of [B, N].

        Raises ValueError for another shape and for a token without a row.
        """
        return F.embedding(current_tokens(tokens, len(self.W)), self.W, sparse=self.by_rows)


# -- starts --


def unigram_activations(
    lm: LanguageModel, hook_name: str, batch: int = 2048, progress: bool = False
) -> Tensor:
    """A([BOS, t])_1 for every vocabulary item t [V, D], where the paper's table starts."""
    parts = []
    batches = torch.arange(lm.n_vocab).split(batch)
    with tqdm(
        total=lm.n_vocab, desc="unigram activations", unit="tok", disable=not progress
    ) as bar:
        for tokens in batches:
            prompts = torch.stack([torch.full_like(tokens, lm.bos_id), tokens], dim=1)
            parts.append(lm.activations(prompts, [hook_name])[hook_name][:, 1].cpu())
            bar.update(len(tokens))
    return require_finite(torch.cat(parts), hook_name)


def token_means(
    lm: LanguageModel,
    hook_name: str,
    rows_RL: Tensor,
    max_norm: float,
    shuffle: int | None = None,
    progress: bool = False,
) -> Tensor:
    """Each token's mean over the rows' positions that count [V, D], shrunk towards that of all.

    Activations longer than `max_norm` are left out. With `shuffle`, a seed, every activation goes
    to a random token's bin.
    """
    total, count = torch.zeros(lm.n_vocab, lm.d_model), torch.zeros(lm.n_vocab)
    tokens_P = rows_RL[keep_mask(rows_RL, lm)].long()
    if shuffle is not None:
        order = torch.randperm(len(tokens_P), generator=torch.Generator().manual_seed(shuffle))
        tokens_P = tokens_P[order]
    done = 0
    for ids in tqdm(rows_RL.split(32), desc="token means", disable=not progress):
        keep = keep_mask(ids, lm)
        x = lm.activations(ids, [hook_name])[hook_name][keep.to(lm.device)].cpu()
        tokens, done = tokens_P[done : done + len(x)], done + len(x)
        is_kept = require_finite(x, hook_name).norm(dim=-1) <= max_norm
        total.index_add_(0, tokens[is_kept], x[is_kept])
        count += torch.bincount(tokens[is_kept], minlength=lm.n_vocab)
    mean = total.sum(0) / count.sum().clamp(min=1)
    return (total + SHRINKAGE * mean) / (count + SHRINKAGE)[:, None]


def table_start(
    lm: LanguageModel,
    hook_name: str,
    kind: str = "auto",
    rows: Tensor | None = None,
    *,
    max_norm: float | None = None,
    commonest: int | None = None,
    seed: int = 0,
    progress: bool = False,
) -> Tensor:
    """Rows [V, D] where a lookup table may start; scale them as you like.

    unigram   A([BOS, t])_1, the paper's; rows with massive norms become the mean of the others
    mean      each token's mean over the training rows [R, L], shrunk towards the mean of all
    hashed    the same with every activation in a random token's bin: a control without tokens
    zero      zeros
    auto      unigram, or mean where more than one in a hundred unigram rows is massive

    Massive is what exceeds `max_norm` (ActivationStream.max_norm); unless given, ten times the
    median norm of the rows of text, or without text of the unigram rows. With `commonest`, tokens
    beyond that many of the commonest in `rows` share the mean of all. Warns of massive rows.
    Raises ValueError for an unknown kind and for a kind that needs rows where none are given.
    """
    if kind not in (*STARTS, "auto"):
        raise ValueError(f"unknown start {kind!r}: expected auto, {', '.join(STARTS)}")
    if rows is None and (kind in ("mean", "hashed") or commonest is not None):
        raise ValueError("means over text, and the commonest tokens, need rows: give rows=...")
    W = torch.zeros(lm.n_vocab, lm.d_model)
    if rows is not None and max_norm is None and kind != "zero":
        max_norm = max_norm_of(lm, rows, hook_name)
    if kind in ("unigram", "auto"):
        W, share = without_massive(unigram_activations(lm, hook_name, progress=progress), max_norm)
        if share > 0.01 and kind == "auto":
            if rows is None:
                raise ValueError(
                    f"{share:.1%} of the unigram activations at {hook_name} are massive: give "
                    "rows of training text, whose token means are a better start"
                )
            kind = "mean"
    if kind in ("mean", "hashed"):
        shuffle = seed if kind == "hashed" else None
        W = token_means(lm, hook_name, rows, max_norm, shuffle, progress)
    if commonest is not None:
        count = torch.bincount(rows[keep_mask(rows, lm)].long(), minlength=lm.n_vocab)
        rare = count.argsort(descending=True, stable=True)[commonest:]
        W[rare] = W.mean(0) if kind == "zero" else (W * count[:, None]).sum(0) / count.sum()
    return W


def without_massive(W: Tensor, max_norm: float | None = None) -> tuple[Tensor, float]:
    """(Rows with massive ones replaced by the mean of the others, their share). Warns of them."""
    norms = W.norm(dim=-1)
    limit = MAX_NORM_RATIO * norms.median().item() if max_norm is None else max_norm
    is_massive = norms > limit
    if not is_massive.any():
        return W, 0.0
    n, largest = int(is_massive.sum()), norms.max().item()
    warnings.warn(
        f"{n:,} of {len(W):,} unigram activations are massive (norms up to {largest:,.0f}, limit "
        f"{limit:,.0f}): their rows start at the mean of the others",
        stacklevel=3,
    )
    return torch.where(is_massive[:, None], W[~is_massive].mean(0), W), n / len(W)


# -- a table for an SAE that has none --


@torch.no_grad()
def add_lookup(sae: Any, rows: Tensor, subtract: bool = False, trainable: bool = True) -> Any:
    """A copy of an SAE, of SAELens too once it is loaded, with a table of these rows [V, D].

    `subtract` chooses the form (see TSAE). The mean over the rows is taken from them first, so that
    b_dec fits as before. Train it further with TrainConfig(keep_biases=True). Raises ValueError for
    an SAE that has a table, and for rows of another width.
    """
    sae = plain_sae(sae)
    if sae.lookup is not None:
        raise ValueError("the SAE has a lookup table: change sae.lookup.W instead")
    table = TokenLookup(rows - rows.mean(0), trainable)
    new = type(sae)(replace(sae.cfg, subtract_lookup=subtract), table)
    new.load_state_dict(sae.state_dict(), strict=False)
    return new.to(sae.W_dec.device, sae.W_dec.dtype).train(sae.training)
