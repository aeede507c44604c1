"""Errors of a reconstruction, and held-out text on which they are measured.

Axes: R rows, L sequence, B positions that count, D d_in.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from tsae.inputs import plain_sae
from tsae.language_model import LanguageModel, check_replacement, real_tokens
from tsae.stream import norm_limit, require_finite, warn_of_massive
from tsae.text import keep_mask

CHECKED_ROWS, CHECKED_TOKENS = 2, 32  # on which activations are put back as they are


class ReconstructionError(NamedTuple):
    """Errors without unit; 0 is perfect."""

    nmse: float  # mean over tokens of ||x - x_hat||^2 / ||x||^2, uncentred (the authors' code)
    nmse_unsquared: float  # mean over tokens of ||x - x_hat|| / ||x|| (the manuscript, eq. 4)
    fvu: float  # sum ||x - x_hat||^2 / sum ||x - mean(x)||^2


def squared_error(x_BD: Tensor, x_hat_BD: Tensor) -> Tensor:
    """||x - x_hat||^2, mean over all axes but the last (the authors' loss)."""
    return F.mse_loss(x_hat_BD, x_BD, reduction="sum") / x_BD[..., 0].numel()


def reconstruction_error(x_BD: Tensor, x_hat_BD: Tensor) -> ReconstructionError:
    """The three errors of a reconstruction [B, D] or [R, L, D].

    Raises ValueError where the two shapes differ.
    """
    if x_BD.shape != x_hat_BD.shape or x_BD.ndim < 2:
        raise ValueError(
            f"a reconstruction of shape {list(x_hat_BD.shape)} does not fit activations of shape "
            f"{list(x_BD.shape)}: expected the same shape, [B, D] or [R, L, D]"
        )
    x_BD, x_hat_BD = x_BD.flatten(0, -2), x_hat_BD.flatten(0, -2)
    error = (x_BD - x_hat_BD).square().sum(-1)
    ratio = error / x_BD.square().sum(-1)
    variance = (x_BD - x_BD.mean(0)).square().sum()
    fvu = error.sum() / variance
    return ReconstructionError(ratio.mean().item(), ratio.sqrt().mean().item(), fvu.item())


class DocumentSums(NamedTuple):
    """Sums over the positions of each document that count, fp64 [documents]."""

    predictions: Tensor  # their number
    ce_clean: Tensor  # cross-entropy in nats without
    ce_patched: Tensor  # and with the reconstruction in place
    kl: Tensor  # KL divergence in nats of the prediction with it from the one without
    positions: Tensor  # number of reconstructed positions
    squared_error: Tensor  # ||x - x_hat||^2 / ||x||^2


class HeldoutText:
    """Token rows with their activations at one layer, and the cross-entropy when these change.

    ce_clean, ce_zero, ce_mean: cross-entropy in nats as it is, with zeros, and with the mean
    activation at positions that count. A document runs between separators; a row starts one, too.
    Raises ValueError for an unknown hook, for rows without text, for activations that are not
    finite, and where putting these back as they are changes the losses (`check_replacement`).
    """

    def __init__(
        self,
        lm: LanguageModel,
        rows_RL: Tensor,
        hook_name: str,
        include_bos: bool = False,
        batch_rows: int = 16,
        max_norm: float | None = None,
    ) -> None:
        lm.require_rows(rows_RL)
        self.lm, self.rows, self.hook_name = lm, rows_RL.long(), hook_name
        lm.require_hook(hook_name)
        self.batches = list(torch.arange(len(self.rows)).split(batch_rows))
        x = [
            lm.activations(self.rows[batch], [hook_name], bf16=False)[hook_name]
            for batch in self.batches
        ]
        self.x = require_finite(torch.cat(x), hook_name)  # [R, L, D]
        keep = keep_mask(self.rows, lm, include_bos)
        self.max_norm = math.inf if include_bos else max_norm
        massive = self._massive(keep)
        self.massive_share = (massive.sum() / keep.sum().clamp(min=1)).item()
        warn_of_massive(self.massive_share, hook_name)
        self.keep = keep & ~massive
        real = real_tokens(self.rows, lm.pad_id, lm.bos_id, lm.separator_id)
        is_text = real & (self.rows != lm.separator_id) & (self.rows != lm.bos_id)
        # Predictions that count: made at a position that counts, of a token that is text.
        self.predicted = self.keep[:, :-1] & (real if include_bos else is_text)[:, 1:]
        if not self.predicted.any():
            raise ValueError(
                f"nothing can be measured on {len(rows_RL)} rows of {rows_RL.shape[-1]} tokens: "
                "expected a row with two tokens of text after BOS, separators and padding left out"
            )
        check_replacement(lm, [hook_name], self.rows[:CHECKED_ROWS, :CHECKED_TOKENS])
        starts = self.rows == lm.separator_id
        starts[:, 0] = True
        self.document = starts.flatten().cumsum(0).view_as(self.rows) - 1  # [R, L]
        self.losses_clean = self.losses()
        self.ce_clean = self.losses_clean.mean().item()
        self.ce_zero = self.patched_losses(torch.zeros(())).mean().item()
        self.ce_mean = self.patched_losses(self.x_BD.mean(0)).mean().item()

    def _massive(self, keep: Tensor) -> Tensor:
        """Positions [R, L] with massive activations among those that would count."""
        norms = self.x.norm(dim=-1).cpu()
        if self.max_norm is None:
            self.max_norm = norm_limit(norms[keep]) if keep.any() else math.inf
        return keep & (norms > self.max_norm)

    @property
    def keep_here(self) -> Tensor:
        """The mask of positions that count [R, L], on the activations' device."""
        return self.keep.to(self.x.device)

    @property
    def x_BD(self) -> Tensor:
        """The activations that count."""
        return self.x[self.keep_here]

    @property
    def tokens_BN(self) -> Tensor:
        """The tokens they sit on [B, 1]."""
        return self.rows[self.keep].unsqueeze(-1).to(self.x.device)

    def losses(self, x_RLD: Tensor | None = None) -> Tensor:
        """Nats (fp64) of each prediction that counts, with these activations in place."""
        losses = [
            self.lm.losses(self.rows[b], self.hook_name, None if x_RLD is None else x_RLD[b])
            for b in self.batches
        ]
        return torch.cat(losses)[self.predicted.to(self.x.device)].double()

    def patched(self, x_hat_BD: Tensor) -> Tensor:
        """The activations [R, L, D] with a reconstruction at the positions that count."""
        x = self.x.clone()
        x[self.keep_here] = x_hat_BD
        return x

    def patched_losses(self, x_hat_BD: Tensor) -> Tensor:
        """Nats of each prediction that counts, with a reconstruction in place."""
        return self.losses(self.patched(x_hat_BD))

    def by_document(self, x_hat_BD: Tensor) -> DocumentSums:
        """What a reconstruction costs in every document."""
        y, hook = self.patched(x_hat_BD), self.hook_name
        parts = [
            self.lm.losses_and_divergence(self.rows[b], hook, self.x[b], y[b]) for b in self.batches
        ]
        counts = self.predicted.to(self.x.device)
        ce_patched, kl = (torch.cat(part)[counts] for part in zip(*parts, strict=True))
        x_BD = self.x_BD
        error = (x_BD - x_hat_BD).square().sum(-1) / x_BD.square().sum(-1)
        n = int(self.document[-1, -1]) + 1

        def summed(document: Tensor, values: Tensor) -> Tensor:
            return torch.bincount(document, weights=values.double().cpu(), minlength=n)

        made_at, stands_at = self.document[:, :-1][self.predicted], self.document[self.keep]
        predictions, positions = (torch.bincount(d, minlength=n) for d in (made_at, stands_at))
        costs = [summed(made_at, values) for values in (self.losses_clean, ce_patched, kl)]
        return DocumentSums(predictions, *costs, positions, summed(stands_at, error))


@contextmanager
def fitted(sae: Any, lm: LanguageModel, x: Tensor) -> Iterator[Any]:
    """The SAE in fp32, on the device of activations x [..., D], in evaluation mode meanwhile.

    It is a copy where the SAE has another type or device. Raises ValueError for an SAE of another
    width or vocabulary, and for an object that is no SAE.
    """
    sae = plain_sae(sae)
    if sae.cfg.d_in != x.shape[-1]:
        raise ValueError(
            f"the SAE's d_in is {sae.cfg.d_in}, the width of the activations {x.shape[-1]}: "
            "it belongs to another model or hook point"
        )
    if sae.lookup is not None:
        sae.lookup.check_vocabulary(lm.n_vocab)
    tensors = [*sae.parameters(), *sae.buffers()]
    is_as_wanted = {t.dtype for t in tensors} <= {torch.float32, torch.int64}
    if not is_as_wanted or {t.device for t in tensors} != {x.device}:
        sae = copy.deepcopy(sae).to(x.device, torch.float32)
    was_training = sae.training
    sae.eval()
    try:
        yield sae
    finally:
        sae.train(was_training)


def check_fit(sae: Any, lm: LanguageModel, rows_RL: Tensor, max_fvu: float = 0.5) -> Any:
    """The SAE itself, on the model's device.

    Raises ValueError where it does not fit the model: another width or vocabulary, or an FVU above
    `max_fvu` on the rows. A published SAE on another model, layer or form of the stream (RES-JB
    wants the centred one) gives no error of its own, only garbage.
    """
    hook, x = plain_sae(sae).cfg.hook_name, []
    lm.require_hook(hook)
    for ids in rows_RL.long().split(8):
        keep = keep_mask(ids, lm).to(lm.device)
        x.append(lm.activations(ids, [hook], bf16=False)[hook][keep])
    x_BD, tokens = torch.cat(x), rows_RL[keep_mask(rows_RL, lm)].to(lm.device)
    norms = x_BD.norm(dim=-1)
    is_kept = norms <= norm_limit(norms)  # massive activations would drown all others
    x_BD, tokens = x_BD[is_kept], tokens[is_kept]
    with torch.no_grad(), fitted(sae, lm, x_BD) as measured:
        pairs = zip(x_BD.split(4096), tokens.split(4096), strict=True)
        x_hat = [measured(*pair).x_hat for pair in pairs]
    fvu = reconstruction_error(x_BD, torch.cat(x_hat)).fvu
    if not fvu <= max_fvu:
        raise ValueError(
            f"FVU {fvu:.2f} at {hook} of {lm.name} is above {max_fvu}: the SAE was "
            "trained on another model, layer or form of the residual stream"
        )
    return sae.to(lm.device)
