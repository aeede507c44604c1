"""What an SAE is given: a configuration, activations with their tokens; an SAE in a wrapper.

Axes: R rows, L sequence, B activations, D width, N n-gram order, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor


def require_possible(cfg: Any, activations: Iterable[str]) -> None:
    """Raise ValueError for a TSAEConfig that cannot work."""
    k, d_sae, norm = cfg.k, cfg.d_sae, cfg.decoder_init_norm
    if cfg.activation not in (*activations, "jumprelu"):
        expected = ", ".join(activations)
        raise ValueError(f"unknown activation {cfg.activation!r}: expected one of {expected}")
    if cfg.d_in < 1 or d_sae < 0:
        raise ValueError(f"d_in = {cfg.d_in} and d_sae = {d_sae} must be positive")
    if cfg.activation in ("topk", "batchtopk") and not 0 <= k <= d_sae:
        advice = "lower k or widen the SAE"
        raise ValueError(f"k = {k} must lie between 0 and d_sae = {d_sae}: {advice}")
    if cfg.l1_coefficient < 0:
        raise ValueError(f"l1_coefficient = {cfg.l1_coefficient} must not be negative")
    if not 0 < norm < math.inf:
        raise ValueError(f"decoder_init_norm = {norm} must be positive and finite")


def require_width(x: Tensor, width: int) -> None:
    """Raise ValueError unless x is [..., width] with one axis or more before."""
    if x.ndim < 2 or x.shape[-1] != width:
        raise ValueError(
            f"activations have shape {list(x.shape)}, expected [B, {width}] or [R, L, {width}]"
        )


def flat_pair(x: Tensor, tokens: Tensor | None, width: int) -> tuple[Tensor, Tensor | None]:
    """Activations as [B, width], and the tokens they sit on as [B, N].

    x [B, width] has tokens [B] or [B, N], whose last column is the current token; x [R, L, width]
    has tokens [R, L]. Raises ValueError for anything else.
    """
    if tokens is None:
        require_width(x, width)
        return x.flatten(0, -2), None
    is_paired = x.ndim in (2, 3) and x.shape[-1] == width and tokens.shape == x.shape[:-1]
    is_ngram = x.ndim == 2 and tokens.ndim == 2 and len(tokens) == len(x) and tokens.shape[1] > 0
    if x.shape[-1:] != (width,) or not (is_paired or is_ngram):
        raise ValueError(
            f"activations of shape {list(x.shape)} do not fit tokens of shape "
            f"{list(tokens.shape)}: expected [B, {width}] with [B] or [B, N], "
            f"or [R, L, {width}] with [R, L]"
        )
    return x.flatten(0, -2), tokens.flatten()[:, None] if is_paired else tokens


@torch.compiler.disable  # reads numbers, at which a compiled graph ends in any case
def current_tokens(tokens: Tensor | None, n_rows: int) -> Tensor:
    """The rows of a table [B] that tokens [B], or the last ones of [B, N], name.

    Raises ValueError for other shapes and for tokens without a row. A GPU is waited for once.
    """
    if tokens is None:
        raise ValueError("an SAE with a lookup table needs the tokens of its activations")
    if tokens.ndim not in (1, 2) or tokens.shape[1:] == (0,):
        raise ValueError(f"tokens have shape {list(tokens.shape)}, expected [B] or [B, N]")
    if tokens.is_floating_point() or tokens.is_complex() or tokens.dtype == torch.bool:
        raise ValueError(f"tokens are whole numbers, not {tokens.dtype}")
    current = tokens.long() if tokens.ndim == 1 else tokens[:, -1].long()
    if current.numel():
        lowest, highest = torch.stack(current.aminmax()).tolist()
        if lowest < 0 or highest >= n_rows:
            raise ValueError(
                f"token {lowest if lowest < 0 else highest} has no row in a lookup table of "
                f"{n_rows} rows: the table belongs to another vocabulary, or these are no token ids"
            )
    return current


def plain_sae(sae: Any) -> Any:
    """The SAE itself, without the wrapper of torch.compile.

    Raises ValueError for other wrappers and for what is no SAE.
    """
    sae = getattr(sae, "_orig_mod", sae)
    if not (hasattr(sae, "cfg") and hasattr(sae, "lookup")):
        raise ValueError(
            f"expected a TSAE, not {type(sae).__name__}: give a wrapper's .module; several GPUs "
            "train through torchrun (docs/training.md)"
        )
    return sae
