"""Tokenized sparse autoencoders: the model, its training, its measurement, in reading order.

    lm = load_lm("testbed/model")                                   # language model, tokens, activations: activations.py
    rows = token_rows(read_documents("text.jsonl"), lm, 256)
    stream = ActivationStream(lm, rows, "blocks.4.hook_resid_pre")
    table = TokenLookup(unigram_activations(lm, stream.hook_name))  # 2  lookup table
    sae = TSAE(TSAEConfig(d_in=lm.d_model, d_sae=4096, k=16), table)  # 3  the SAE
    train({"tsae": sae}, stream, TrainConfig(tokens=2_000_000))     # 4  training
    print(Evaluator(lm, heldout_rows, stream.hook_name)(sae))       # 5  metrics
    save(sae, "my_tsae"); load("my_tsae")                           # 6  save and load

Paper: "Tokenized SAEs: Disentangling SAE Reconstructions", Dooms and Wilhelm, arXiv 2502.17332.
Axes: R rows, L sequence, B batch (tokens), D d_in, F d_sae, V vocabulary, K active, N n-gram order.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from tqdm.auto import tqdm

import runs
from activations import (
    ActivationStream,
    LanguageModel,
    fast_bf16,
    hub_name,
    keep_freed_memory,
    keep_mask,
    last_tokens,
    load_lm,
    parse_hook,
    read_documents,
    refuse_nan,
    token_rows,
    unigram_activations,
)
from sae_files import ARCHITECTURES, FILES, fold, names_of, read_cfg, read_tensors, refuse_other_files

__all__ = [  # with what activations.py and sae_files.py give
    "ACTIVATIONS", "FILES", "TSAE", "ActivationStream", "Evaluator", "LanguageModel", "ReconstructionError", "TSAEConfig", "TSAEOutput",
    "TokenLookup", "TrainConfig", "hub_name", "keep_freed_memory", "keep_mask", "last_tokens", "load", "load_lm", "optimisers_for",
    "parse_hook", "read_cfg", "read_documents", "reconstruction_error", "refuse_other_files", "save", "squared_error", "token_rows",
    "top_k", "train", "unigram_activations",
]

# ---------------------------------------------------------------------------------------------
# 1  Configuration
# ---------------------------------------------------------------------------------------------

ACTIVATIONS = ("topk", "batchtopk", "relu", "gated")  # and jumprelu, which is read and written but not trained


@dataclass(frozen=True)
class TSAEConfig:
    """What an SAE is. Raises ValueError with one sentence for settings that cannot work."""

    d_in: int  # width of the residual stream
    d_sae: int  # number of features; the paper: 16 x d_in (GPT-2), 8 x d_in (Pythia)
    activation: str = "topk"  # one of ACTIVATIONS
    k: int = 16  # active features a token (topk), on average over a batch (batchtopk)
    l1_coefficient: float = 0.0  # weight of sum_f a_f ||W_dec[f]|| beside the squared error (relu, gated)
    encoder_scale: float = 1.0  # W_enc starts as this times W_dec^T; the authors' code: 1, with a table 0.5
    decoder_init_norm: float = 1.0  # norm at which rows of W_dec start; the authors' code: 1, SAELens: 0.1
    seed: int = 0  # of the initialisation
    model_name: str = ""
    hook_name: str = ""
    context_size: int = 0  # tokens a row, BOS included

    def __post_init__(self) -> None:
        if self.activation not in (*ACTIVATIONS, "jumprelu"):
            raise ValueError(f"unknown activation {self.activation!r}: expected one of {', '.join(ACTIVATIONS)}")
        if self.d_in < 1 or self.d_sae < 0:
            raise ValueError(f"d_in = {self.d_in} and d_sae = {self.d_sae} must be positive")
        if self.activation in ("topk", "batchtopk") and not 0 <= self.k <= self.d_sae:
            raise ValueError(f"k = {self.k} must lie between 0 and d_sae = {self.d_sae}: lower k or widen the SAE")
        if self.l1_coefficient < 0:
            raise ValueError(f"l1_coefficient = {self.l1_coefficient} must not be negative")
        if not 0 < self.decoder_init_norm < math.inf:
            raise ValueError(f"decoder_init_norm = {self.decoder_init_norm} must be positive and finite")


@dataclass(frozen=True)
class TrainConfig:
    """How an SAE is trained. Defaults are the testbed's; the paper's are given beside them."""

    tokens: int = 2_000_000  # activations seen; the paper: about 300M (GPT-2), 131M (Pythia)
    lr: float = 3e-3  # Adam, for encoder and decoder; the authors' code: 1e-4
    lr_lookup: float = 1e-2  # Adam, for the table; the authors' code: 1e-2 (TopK only, 1e-4 elsewhere)
    lookup_by_rows: bool = False  # touch only the rows of the batch's tokens: another optimiser (SparseAdam), cheap for large vocabularies
    lr_end: float = 0.0  # cosine from lr to this share of it; the authors' code: 0.3
    l1_warmup: float = 0.05  # share of the steps over which the L1 coefficient rises (relu, gated); the paper: 5 %
    start_l0: float = 0.0  # relu, gated: biases start where about so many features of a token are active; 0: at zero, the authors' start
    aux_k: int = 0  # dead features that model the error (AuxK of Gao et al. 2024); the authors: none
    aux_coefficient: float = 1 / 32  # weight of that second squared error (Gao et al.)
    aux_window: int = 100_000  # dead for AuxK: fired on none of the last so many tokens
    dead_window: int = 500_000  # a feature is dead when it fired on none of the last so many tokens

    def __post_init__(self) -> None:
        if self.tokens < 1 or self.lr < 0 or self.lr_lookup < 0:
            raise ValueError(f"tokens must be positive, learning rates not negative, not {self}")


# ---------------------------------------------------------------------------------------------
# 2  Lookup tables
# ---------------------------------------------------------------------------------------------


class TokenLookup(nn.Module):
    """W_lookup [V, D]: its row t is added to the reconstruction of an activation that sits on token t (eq. 2).

    The encoder neither sees nor subtracts it. Trained by default, with a learning rate of its own.
    """

    def __init__(self, W: Tensor, trainable: bool = True) -> None:
        super().__init__()
        if W.ndim != 2:
            raise ValueError(f"a lookup table has shape [V, d_in], not {list(W.shape)}")
        self.W = nn.Parameter(W.detach().float().clone(), requires_grad=trainable)
        self.by_rows = False  # gradients of the rows that were used alone; `train` sets it

    def check_vocabulary(self, n_vocab: int) -> None:
        """Raise ValueError where the table has not one row for each of `n_vocab` tokens."""
        if len(self.W) != n_vocab:
            raise ValueError(f"the lookup table has {len(self.W)} rows, the model {n_vocab} tokens: it belongs to another vocabulary")

    def forward(self, tokens_BN: Tensor) -> Tensor:
        """Rows [B, D] of the last tokens. Raises ValueError for a token the table has no row for."""
        current = tokens_BN[..., -1]
        if current.numel() and int(current.max()) >= len(self.W):
            raise ValueError(f"token {int(current.max())} has no row in a lookup table of {len(self.W)} rows: "
                             "the table belongs to another vocabulary")
        return F.embedding(current, self.W, sparse=self.by_rows)


# ---------------------------------------------------------------------------------------------
# 3  The SAE
# ---------------------------------------------------------------------------------------------


CPU_ROWS = 512  # tokens whose pre-activations are computed at once on a CPU: all of a batch would be a gigabyte of a wide SAE


def _rows_at_once(x_BD: Tensor) -> int:
    """A GPU takes the whole batch."""
    return len(x_BD) if x_BD.is_cuda else CPU_ROWS


def _encoder(W_FD: Tensor, b_F: Tensor) -> Callable[[Tensor], Tensor]:
    """x [B, D] -> x W^T + b [B, F], without gradient, for many x: in bf16 on a CPU the weights are laid out for the product once."""
    one_dnn = W_FD.device.type == "cpu" and torch.backends.mkldnn.is_available()
    if one_dnn and W_FD.dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported():
        packed = torch.ops.mkldnn._reorder_linear_weight(W_FD, CPU_ROWS)  # what torch.compile uses for nn.Linear
        return lambda x: torch.ops.mkldnn._linear_pointwise(x, packed, b_F, "none", [], "")
    return lambda x: F.linear(x, W_FD, b_F)


WIDE = 1024  # from how many pre-activations on top_k is faster than torch.topk


def top_k(pre_BF: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Values and indices [B, k] of the k largest of each row, in no order: exact, with fewer to sort than torch.topk.

    The k largest lie in the k groups with the largest maxima: every element of another group is at most its group's
    maximum, and k maxima are at least as large. Among equal values any may be chosen. Both steps are top_k again.
    """
    (B, F_), group = pre_BF.shape, 8 if k >= 16 else 16
    if F_ < WIDE or 2 * group * k > F_ or F_ % group:
        return pre_BF.topk(k, dim=-1, sorted=False)
    groups = pre_BF.view(B, group, F_ // group)  # the members of a group stand F / group apart: one vectorised maximum
    best = top_k(groups.amax(1), k)[1]
    values, at = top_k(groups.gather(2, best.unsqueeze(1).expand(B, group, k)).flatten(1), k)
    return values, at // k * (F_ // group) + best.gather(1, at % k)


def _largest_positive(pre_BF: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """top_k before a ReLU: bits of bf16 are compared as whole numbers, which is faster.

    Positive values keep their order and stand above all others, whose order ReLU makes irrelevant. NaN may be passed
    over; `train` looks for it in the weights.
    """
    if pre_BF.dtype != torch.bfloat16:
        return top_k(pre_BF, k)
    bits, index = top_k(pre_BF.view(torch.int16), k)
    return bits.view(torch.bfloat16), index


def _top_of_tokens(pre: Iterable[Tensor], k: int) -> tuple[Tensor, Tensor, Tensor]:
    """Pairs (value, feature, row) of the k largest pre-activations of every token, for a ReLU; `pre` comes in parts."""
    values, index = (torch.cat(t) for t in zip(*(_largest_positive(part, k) for part in pre), strict=True))
    return values.flatten(), index.flatten(), torch.arange(len(index), device=index.device).repeat_interleave(k)


def _top_of_batch(pre_BF: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """Pairs (value, feature, row) of the B k largest positive pre-activations of the batch, by row (Bussmann et al. 2024)."""
    flat, n = pre_BF.flatten(), len(pre_BF) * k
    sample = flat[:: max(1, len(flat) // 2**17)]  # a first guess at the threshold saves sorting all of them
    guess = sample.topk(min(len(sample), math.ceil(1.2 * n * len(sample) / len(flat)))).values[-1].clamp(min=0)
    at = (flat > guess).nonzero().squeeze(-1)
    if len(at) < n:
        at = (flat > 0).nonzero().squeeze(-1)
    at = at[flat[at].topk(min(n, len(at)), sorted=False).indices].sort().values
    return flat[at], at % pre_BF.shape[1], at // pre_BF.shape[1]


class _Sparse(torch.autograd.Function):
    """(x_hat without table [B, D], values, feature and row of the P active pairs) of a TopK or BatchTopK SAE.

    Only the pre-activations are dense. Values, decoder and both weight gradients touch the active pairs alone: with
    pairs sorted by feature, a weight gradient is a bag sum over rows of x or of the output gradient, and the gradient
    of a pair's value, g[row] . W_dec[feature], is that of the second sum's weights.
    """

    @staticmethod
    def forward(ctx, x, W_enc, b_enc, W_dec, b_dec, k, of_batch, bf16):
        x_c = x - b_dec
        dtype = torch.bfloat16 if bf16 else x.dtype
        pre = map(_encoder(W_enc.to(dtype), b_enc.to(dtype)), x_c.to(dtype).split(_rows_at_once(x)))
        values, feature, row = _top_of_batch(torch.cat(list(pre)), k) if of_batch else _top_of_tokens(pre, k)
        values = values.to(x.dtype).relu_()  # SAELens: top k, then ReLU; the authors' code keeps negative ones
        bags = torch.searchsorted(row, torch.arange(len(x), device=x.device))
        x_hat = F.embedding_bag(feature, W_dec.detach(), bags, mode="sum", per_sample_weights=values) + b_dec
        ctx.save_for_backward(x_c, W_enc, W_dec, values, feature, row, bags)
        ctx.mark_non_differentiable(values, feature, row)
        return x_hat, values, feature, row

    @staticmethod
    @once_differentiable
    def backward(ctx, g, *_):
        x_c, W_enc, W_dec, values, feature, row, bags = ctx.saved_tensors
        by_feature, order = feature.sort(stable=True)
        starts, rows = torch.searchsorted(by_feature, torch.arange(len(W_enc), device=g.device)), row[order]
        with torch.enable_grad():
            sorted_values = values[order].requires_grad_()
            d_W_dec = F.embedding_bag(rows, g, starts, mode="sum", per_sample_weights=sorted_values)
        d_values = torch.autograd.grad(d_W_dec, sorted_values, W_dec)[0] * (sorted_values > 0)
        d_W_enc = F.embedding_bag(rows, x_c, starts, mode="sum", per_sample_weights=d_values)
        d_b_enc = torch.zeros(len(W_enc), device=g.device, dtype=g.dtype).index_add_(0, by_feature, d_values)
        d_b_dec = g.sum(0) - d_b_enc @ W_enc
        d_x = None
        if ctx.needs_input_grad[0]:
            by_row = torch.empty_like(d_values).scatter_(0, order, d_values)
            d_x = F.embedding_bag(feature, W_enc, bags, mode="sum", per_sample_weights=by_row)
        return d_x, d_W_enc, d_b_enc, d_W_dec.detach(), d_b_dec, None, None, None


class TSAEOutput(NamedTuple):
    """What a forward pass gives. The last two are computed in training mode only, else 0."""

    x_hat: Tensor  # [B, D], the table's row included
    l0: Tensor  # active features of each token [B]
    fired: Tensor  # whether a feature was active on any token [F]
    sparsity: Tensor  # mean over tokens of sum_f a_f ||W_dec[f]||; gated: a the gate's, decoder frozen; 0 for topk, batchtopk
    auxiliary: Tensor  # gated: squared error of the gate's own reconstruction, decoder and table frozen; else 0


def squared_error(x_BD: Tensor, x_hat_BD: Tensor) -> Tensor:
    """||x - x_hat||^2, mean over the batch (the authors' loss)."""
    return F.mse_loss(x_hat_BD, x_BD, reduction="sum") / len(x_BD)


class TSAE(nn.Module):
    """Tokenized SAE (eq. 1 and 2); without a table the same class is the baseline.

        f(a_t)  = act(W_enc (a_t - b_dec) + b_enc)
        a_hat_t = W_dec f(a_t) + b_dec + W_lookup[t]

    act: `topk` the k largest, then ReLU; `batchtopk` the k B largest of a batch in training mode, above a running
    threshold otherwise; `relu`; `gated` relu(exp(r_mag) p + b_mag) where p + b_gate > 0, p = W_enc (a_t - b_dec);
    `jumprelu` what lies above each feature's threshold.

    Encoder and decoder are stored with a feature a row; `W_enc` [d_in, d_sae] shows the usual view.
    Decoder rows start in random directions with norm decoder_init_norm and are free afterwards; W_enc starts as
    encoder_scale * W_dec^T. b_dec starts at zero; `train` moves it to the mean of what is left for the SAE.
    """

    def __init__(self, cfg: TSAEConfig, lookup: TokenLookup | None = None) -> None:
        super().__init__()
        if lookup is not None and lookup.W.shape[1] != cfg.d_in:
            raise ValueError(f"the lookup table's rows have {lookup.W.shape[1]} entries, the SAE's d_in is {cfg.d_in}")
        self.cfg, self.lookup = cfg, lookup
        generator = torch.Generator().manual_seed(cfg.seed)
        W_dec = cfg.decoder_init_norm * F.normalize(torch.randn(cfg.d_sae, cfg.d_in, generator=generator), dim=-1)
        self.W_dec = nn.Parameter(W_dec)  # [d_sae, d_in]
        self.W_enc_FD = nn.Parameter(cfg.encoder_scale * W_dec)
        self.b_dec = nn.Parameter(torch.zeros(cfg.d_in))
        for name in ("b_gate", "b_mag", "r_mag") if cfg.activation == "gated" else ("b_enc",):
            setattr(self, name, nn.Parameter(torch.zeros(cfg.d_sae)))
        if cfg.activation in ("batchtopk", "jumprelu"):
            self.register_buffer("threshold", torch.zeros(cfg.d_sae))
        self.register_buffer("tokens_since_fired", torch.zeros(cfg.d_sae, dtype=torch.int64), persistent=False)
        self.bf16 = False  # bf16 for the big products in training mode; `train` turns it on where it is fast
        self.threshold_rate = 0.01  # batchtopk: weight of a new batch in the running threshold; `train` sets it at every step

    @property
    def W_enc(self) -> Tensor:
        """[d_in, d_sae], a view."""
        return self.W_enc_FD.T

    @property
    def encoder_bias(self) -> Tensor:
        """[d_sae]: b_enc, for gated b_gate."""
        return self.b_gate if self.cfg.activation == "gated" else self.b_enc

    def pre_activations(self, x_BD: Tensor) -> Tensor:
        """W_enc (x - b_dec) + b_enc for every feature [B, F]; b_gate in the place of b_enc for gated."""
        return F.linear(x_BD - self.b_dec, self.W_enc_FD, self.encoder_bias)

    def activate(self, pre_BF: Tensor) -> Tensor:
        """Feature activations [B, F] of pre-activations, as outside training."""
        match self.cfg.activation:
            case "topk":
                values, index = pre_BF.topk(self.cfg.k, dim=-1)
                return torch.zeros_like(pre_BF).scatter_(-1, index, values.relu())
            case "relu":
                return pre_BF.relu()
            case "gated":
                scale = self.r_mag.exp()
                shift = self.b_mag - scale * self.b_gate  # exp(r_mag) (pre - b_gate) + b_mag, in one pass
                return torch.addcmul(shift.to(pre_BF.dtype), pre_BF, scale.to(pre_BF.dtype)).relu().masked_fill(pre_BF <= 0, 0.0)
        return pre_BF.relu() * (pre_BF > self.threshold)

    def encode(self, x_BD: Tensor) -> Tensor:
        """Feature activations [B, F], dense."""
        return self.activate(self.pre_activations(x_BD))

    def decode(self, acts_BF: Tensor, tokens_BN: Tensor) -> Tensor:
        """Reconstruction [B, D] of dense activations, the tokens' rows included."""
        x_hat = acts_BF @ self.W_dec + self.b_dec
        return x_hat if self.lookup is None else x_hat + self.lookup(tokens_BN)

    def forward(self, x_BD: Tensor, tokens_BN: Tensor) -> TSAEOutput:
        """Reconstruct activations x_BD that sit on tokens_BN (last column: the current token)."""
        row_BD = 0.0 if self.lookup is None else self.lookup(tokens_BN)
        if self.cfg.d_sae == 0 or (self.cfg.k == 0 and self.cfg.activation in ("topk", "batchtopk")):  # the table alone
            none, zero = torch.zeros(self.cfg.d_sae, dtype=torch.bool, device=x_BD.device), x_BD.new_zeros(())
            return TSAEOutput(self.b_dec.expand_as(x_BD) + row_BD, x_BD.new_zeros(len(x_BD)), none, zero, zero)
        if self.cfg.activation == "topk" or (self.cfg.activation == "batchtopk" and self.training):
            return self._sparse(x_BD, row_BD)
        return self._dense(x_BD, row_BD)

    def _sparse(self, x_BD: Tensor, row_BD: Tensor | float) -> TSAEOutput:
        of_batch = self.cfg.activation == "batchtopk"
        x_hat, values, feature, row = _Sparse.apply(x_BD, self.W_enc_FD, self.b_enc, self.W_dec, self.b_dec, self.cfg.k, of_batch,
                                                    self.bf16 and self.training)
        active = values > 0
        l0 = torch.zeros(len(x_BD), device=x_BD.device).index_add_(0, row, active.float())
        fired = torch.zeros(self.cfg.d_sae, device=x_BD.device).index_add_(0, feature, active.float()) > 0
        if of_batch and len(values):  # running mean of the smallest active value, as BatchNorm keeps its statistics
            lowest = values.min()
            self.threshold.copy_(torch.where(self.threshold > 0, torch.lerp(self.threshold, lowest, self.threshold_rate), lowest))
        zero = x_BD.new_zeros(())
        return TSAEOutput(x_hat if self.lookup is None else x_hat + row_BD, l0, fired, zero, zero)

    def _dense(self, x_BD: Tensor, row_BD: Tensor | float) -> TSAEOutput:
        bias = self.encoder_bias + self.W_enc_FD @ (self.b_dec.detach() - self.b_dec)  # zero: gives b_dec its gradient without one for x
        W_dec = torch.cat([self.W_dec, self.W_dec.norm(dim=-1, keepdim=True)], dim=-1)  # the last column sums a_f ||W_dec[f]||
        with torch.autocast(x_BD.device.type, torch.bfloat16, enabled=self.bf16 and self.training):
            some = (x_BD - self.b_dec.detach()).split(_rows_at_once(x_BD))
            parts = [self._dense_part(part, bias, W_dec) for part in some]
        decoded, of_gate, l0, fired = (torch.cat(part) for part in zip(*parts, strict=True))
        x_hat, sparsity, auxiliary = decoded[:, :-1] + self.b_dec + row_BD, *x_BD.new_zeros(2)
        if self.training and self.cfg.activation in ("relu", "gated"):
            sparsity = of_gate[:, -1].mean()
        if self.training and self.cfg.activation == "gated":
            row_BD = 0.0 if self.lookup is None else row_BD.detach()
            auxiliary = squared_error(x_BD, of_gate[:, :-1] + self.b_dec.detach() + row_BD)
        return TSAEOutput(x_hat, l0, fired.any(0), sparsity, auxiliary)

    def _dense_part(self, x_BD: Tensor, bias_F: Tensor, W_dec: Tensor) -> tuple[Tensor, ...]:
        """Of some rows less b_dec: activations and the gate's own through W_dec [B, D + 1] each, l0 [B], fired [1, F]."""
        pre = F.linear(x_BD, self.W_enc_FD, bias_F)
        acts = self.activate(pre)
        decoded = of_gate = (acts @ W_dec).to(x_BD.dtype)
        if self.cfg.activation == "gated" and self.training:
            of_gate = (pre.relu() @ W_dec.detach()).to(x_BD.dtype)
        return decoded, of_gate, (acts.detach() > 0).sum(-1), acts.detach().amax(0, keepdim=True) > 0

    def dead_features_error(self, x_BD: Tensor, x_hat_BD: Tensor, aux_k: int, window: int) -> Tensor:
        """Squared error of modelling x - x_hat by the aux_k strongest dead features of each token (AuxK); 0 where none is dead."""
        dead = (self.tokens_since_fired >= window).nonzero().squeeze(-1)
        if len(dead) == 0:
            return x_BD.new_zeros(())
        pre = F.linear(x_BD - self.b_dec.detach(), self.W_enc_FD[dead], self.b_enc[dead])
        values, index = pre.topk(min(aux_k, len(dead)), dim=-1, sorted=False)
        modelled = F.embedding_bag(index, self.W_dec[dead], mode="sum", per_sample_weights=values.relu())
        return squared_error(x_BD - x_hat_BD.detach(), modelled)

    @torch.no_grad()
    def count_firing_(self, out: TSAEOutput) -> None:
        """Update tokens_since_fired [F], counted in tokens."""
        fired = out.fired.to(torch.uint8)
        if (world := runs.processes()) > 1:
            torch.distributed.all_reduce(fired, torch.distributed.ReduceOp.MAX)
        self.tokens_since_fired += world * len(out.x_hat)
        self.tokens_since_fired[fired > 0] = 0

    def dead_fraction(self, window: int) -> float:
        """Share of features that fired on none of the last `window` training tokens."""
        return (self.tokens_since_fired >= window).float().mean().item() if self.cfg.d_sae else 0.0


# ---------------------------------------------------------------------------------------------
# 4  Training
# ---------------------------------------------------------------------------------------------


def optimisers_for(sae: TSAE, cfg: TrainConfig) -> list[torch.optim.Optimizer]:
    """Adam (0.9, 0.999) for the SAE at `lr` and for the table at `lr_lookup`.

    With `lookup_by_rows` the table has SparseAdam: a row's moments rest while its token is absent, where Adam's decay
    and go on moving it.
    """
    own = [p for name, p in sae.named_parameters() if not name.startswith("lookup.")]
    optimisers = [torch.optim.Adam([{"params": own, "lr": cfg.lr, "base_lr": cfg.lr}], fused=sae.W_dec.device.type != "mps")]
    if sae.lookup is not None and sae.lookup.W.requires_grad:
        table = {"params": [sae.lookup.W], "lr": cfg.lr_lookup, "base_lr": cfg.lr_lookup}
        if cfg.lookup_by_rows:
            optimisers.append(torch.optim.SparseAdam([table]))
        else:
            optimisers[0].add_param_group(table)
    return optimisers


def train(saes: Mapping[str, TSAE], stream: ActivationStream, cfg: TrainConfig | Mapping[str, TrainConfig], *,
          log_every: int = 20, progress: bool = True, after_step: Callable[[int], None] | None = None,
          checkpoint: str | Path | None = None, checkpoint_every: int = 1_000_000) -> list[dict]:
    """Train every SAE in place on the same batches; the language model runs once for all of them.

    `cfg` is one TrainConfig or one for each name (equal `tokens`). Returns the history: a row for each SAE every
    `log_every` steps and at the last (`system, step, tokens, loss, nmse, l0, dead_fraction, seconds`), seconds being
    the time spent on that SAE alone (on a CPU; a GPU's work is billed to whoever waits for it). `after_step(step)` is
    called after every step that this call takes, to measure or save on the way.

    With `checkpoint`, a file, everything is written there every `checkpoint_every` tokens and at the end, and a run
    that finds the file goes on from it: on the same CPU and number of threads it ends bit for bit as without a break.
    Under torchrun each process trains the first one's SAEs on a stream of its own rows; gradients are averaged, tokens
    counted over all. Afterwards the SAEs are in evaluation mode. Raises ValueError for an SAE that cannot be trained as
    configured, a stream that cannot be gone on with or a checkpoint of another run, FloatingPointError naming the SAE
    whose loss is not finite, OSError where a checkpoint cannot be written (the one before stays).
    """
    cfgs = {name: cfg if isinstance(cfg, TrainConfig) else cfg[name] for name in saes}
    if len({c.tokens for c in cfgs.values()}) > 1:
        raise ValueError("SAEs trained together see the same tokens: give them the same `tokens`")
    for name, sae in saes.items():
        if sae.cfg.activation not in ACTIVATIONS:
            raise ValueError(f"{name!r} is a {sae.cfg.activation} SAE, which is for loading: train batchtopk instead")
        if cfgs[name].aux_k and sae.cfg.activation not in ("topk", "batchtopk"):
            raise ValueError(f"{name!r}: aux_k is for topk and batchtopk, not {sae.cfg.activation}")
        if sae.lookup is not None and hasattr(stream, "lm"):
            sae.lookup.check_vocabulary(stream.lm.n_vocab)
        if any(sae.lookup is other.lookup is not None and cfgs[name].lookup_by_rows != cfgs[n].lookup_by_rows for n, other in saes.items()):
            raise ValueError(f"{name!r} shares its table with another SAE: give both the same lookup_by_rows")
    batch = stream.batch_size * runs.processes()
    steps = max(1, next(iter(cfgs.values())).tokens // batch)
    opts = {name: optimisers_for(sae, cfgs[name]) for name, sae in saes.items()}
    first, position, seconds, history, run = 0, (0, 0), dict.fromkeys(saes, 0.0), [], {}
    if checkpoint is not None:
        if not isinstance(stream, ActivationStream):
            raise ValueError("a checkpoint needs a stream that can go on from a place: an ActivationStream")
        run = runs.identity(saes, cfgs, stream)
        if Path(checkpoint).exists():
            first, position, seconds, history = runs.load_checkpoint(checkpoint, saes, opts, run, stream)
    if runs.processes() > 1:
        runs.same_everywhere_(saes, first)
    batches = stream.batches(position) if first else iter(stream)
    each = max(1, checkpoint_every // batch)
    bar = tqdm(total=steps * batch, initial=first * batch, desc=f"training {len(saes)} SAEs" if len(saes) > 1 else "training", unit="tok",
               unit_scale=True, disable=not progress)
    for name, sae in saes.items():
        sae.train().zero_grad()
        sae.bf16 = sae.W_dec.dtype == torch.float32 and fast_bf16(sae.W_dec.device)
        if sae.lookup is not None:
            sae.lookup.by_rows = cfgs[name].lookup_by_rows
    try:
        for step, (x, tokens) in enumerate(islice(batches, steps - first), first):
            log = step % log_every == 0 or step == steps - 1
            for name, sae in saes.items():
                started = time.perf_counter()
                if step == 0:
                    _start_(sae, cfgs[name], x, tokens)
                sae.threshold_rate = max(0.01, 10 / (step + 10))  # a tenth of the steps so far: in a short run 0.01 would lag behind
                row = _step_(sae, opts[name], cfgs[name], x, tokens, step / steps, log)
                seconds[name] += time.perf_counter() - started
                if log and not math.isfinite(row["loss"]):
                    raise FloatingPointError(f"the loss of {name!r} is {row['loss']} at step {step}: lower its learning rate")
                if log and not math.isfinite(sum(p.detach().sum().item() for p in sae.parameters())):
                    raise FloatingPointError(f"a weight of {name!r} is not finite after step {step}: lower its learning rate")
                if log:
                    history.append({"system": name, "step": step, "tokens": (step + 1) * batch, **row, "seconds": seconds[name]})
                if log and len(saes) == 1:
                    bar.set_postfix(loss=f"{row['loss']:.4g}", l0=f"{row['l0']:.1f}", dead=f"{row['dead_fraction']:.0%}", refresh=False)
            bar.update(batch)
            if checkpoint is not None and ((step + 1) % each == 0 or step == steps - 1):
                runs.save_checkpoint(checkpoint, saes, opts, run, stream, {"step": step + 1, "seconds": seconds, "history": history})
            if after_step is not None:
                after_step(step)
    finally:  # an interrupted SAE is as usable as a finished one
        bar.close()
        for sae in saes.values():
            sae.eval()
            if sae.lookup is not None:
                sae.lookup.by_rows = False
    return history


@torch.no_grad()
def _start_(sae: TSAE, cfg: TrainConfig, x: Tensor, tokens: Tensor) -> None:
    """b_dec starts at the mean of what the table leaves (not stated in the paper; the same rule for every system). With
    `start_l0` every feature's bias is set on the first batch so that it fires on an equal share of it."""
    sae.b_dec.copy_((x if sae.lookup is None else x - sae.lookup(tokens)).mean(0))
    runs.average_(sae.b_dec)
    if cfg.start_l0 and sae.cfg.activation in ("relu", "gated"):
        n = max(1, round(len(x) * min(1.0, cfg.start_l0 / sae.cfg.d_sae)))
        some = torch.arange(sae.cfg.d_sae, device=x.device).split(2048)
        lowest = torch.cat([F.linear(x - sae.b_dec, sae.W_enc_FD[f]).topk(n, dim=0).values[-1] for f in some])
        runs.average_(lowest)
        for bias in [sae.b_enc] if sae.cfg.activation == "relu" else [sae.b_gate, sae.b_mag]:
            bias.copy_(-lowest)


def _step_(sae: TSAE, opts: list[torch.optim.Optimizer], cfg: TrainConfig, x: Tensor, tokens: Tensor, done: float, log: bool) -> dict:
    """One optimiser step; `done` is the share of the steps already taken."""
    for group in (g for opt in opts for g in opt.param_groups):
        group["lr"] = group["base_lr"] * (cfg.lr_end + (1 - cfg.lr_end) * 0.5 * (1 + math.cos(math.pi * done)))
    out = sae(x, tokens)
    warm = min(1.0, done / cfg.l1_warmup if cfg.l1_warmup else 1.0)
    loss = squared_error(x, out.x_hat) + sae.cfg.l1_coefficient * warm * out.sparsity + out.auxiliary
    if cfg.aux_k:
        loss = loss + cfg.aux_coefficient * sae.dead_features_error(x, out.x_hat, cfg.aux_k, cfg.aux_window)
    loss.backward()
    for opt in opts:
        for p in (p for group in opt.param_groups for p in group["params"]):
            runs.average_gradient_(p)
        opt.step()
        opt.zero_grad()  # at once: of many SAEs only one holds gradients
    if sae.cfg.activation == "batchtopk":
        runs.average_(sae.threshold)
    sae.count_firing_(out)
    if not log:
        return {}
    with torch.no_grad():
        nmse = ((x - out.x_hat).square().sum(-1) / x.square().sum(-1)).mean()
        row = torch.stack([loss.detach(), nmse, out.l0.to(nmse.dtype).mean()])
        runs.average_(row)
    loss_, nmse, l0 = row.tolist()
    return {"loss": loss_, "nmse": nmse, "l0": l0, "dead_fraction": sae.dead_fraction(cfg.dead_window)}


# ---------------------------------------------------------------------------------------------
# 5  Metrics
# ---------------------------------------------------------------------------------------------


class ReconstructionError(NamedTuple):
    nmse: float  # mean over tokens of ||x - x_hat||^2 / ||x||^2, uncentred (the authors' code)
    nmse_unsquared: float  # mean over tokens of ||x - x_hat|| / ||x|| (the manuscript's formula)
    fvu: float  # sum ||x - x_hat||^2 / sum ||x - mean(x)||^2


def reconstruction_error(x_BD: Tensor, x_hat_BD: Tensor) -> ReconstructionError:
    """The three errors of a reconstruction, as numbers without unit (0 is perfect)."""
    error, norm = (x_BD - x_hat_BD).square().sum(-1), x_BD.square().sum(-1)
    variance = (x_BD - x_BD.mean(0)).square().sum()
    return ReconstructionError((error / norm).mean().item(), (error / norm).sqrt().mean().item(), (error.sum() / variance).item())


class Evaluator:
    """Measures SAEs on held-out rows: `Evaluator(lm, rows, hook_name)(sae)` returns a dict of metrics.

    nmse, nmse_unsquared, fvu: see ReconstructionError. l0: active features a token; vectors_per_token: decoder
    vectors summed a token, the table's row included. ce_clean, ce_patched: cross-entropy in nats, without and with
    the reconstruction in place. ce_added = (ce_patched - ce_clean) / ce_clean (eq. 3).
    ce_recovered = 1 - (ce_patched - ce_clean) / (ce_zero - ce_clean), ce_zero with zeros in its place.

    Left out unless `include_bos` (the paper): position 0, separators, the prediction made at BOS; BOS is never
    patched. Activations and reconstructions are fp32 here, whatever they were in training.
    """

    def __init__(self, lm: LanguageModel, rows_RL: Tensor, hook_name: str, include_bos: bool = False, batch_rows: int = 16) -> None:
        self.lm, self.rows, self.layer = lm, rows_RL.long(), parse_hook(hook_name, lm.n_layers)
        self.keep = keep_mask(self.rows, lm, include_bos)
        is_text = (self.rows != lm.separator_id) & (self.rows != lm.bos_id)
        self.predicted = self.keep[:, :-1] & (is_text[:, 1:] if not include_bos else True)
        self.batches = list(torch.arange(len(self.rows)).split(batch_rows))
        x = [lm.activations(self.rows[b], [self.layer], bf16=False)[self.layer] for b in self.batches]
        self.x = refuse_nan(torch.cat(x), hook_name)
        self.ce_clean = self._cross_entropy(None)
        self.ce_zero = self._cross_entropy(self.x.masked_fill(self.keep.to(self.x.device).unsqueeze(-1), 0.0))

    @property
    def x_BD(self) -> Tensor:
        """The activations that count [B, D]."""
        return self.x[self.keep.to(self.x.device)]

    @property
    def tokens_BN(self) -> Tensor:
        """The tokens they sit on [B, 1]."""
        return self.rows[self.keep].unsqueeze(-1).to(self.x.device)

    def _cross_entropy(self, x_hat_RLD: Tensor | None) -> float:
        losses = [self.lm.losses(self.rows[b], self.layer, None if x_hat_RLD is None else x_hat_RLD[b]) for b in self.batches]
        return torch.cat(losses)[self.predicted.to(self.x.device)].mean().item()

    @torch.no_grad()
    def __call__(self, sae: TSAE) -> dict[str, float]:
        if sae.lookup is not None:
            sae.lookup.check_vocabulary(self.lm.n_vocab)
        x_BD, tokens_BN, where = self.x_BD, self.tokens_BN, self.keep.to(self.x.device)
        parts, active, was_training = [], 0, sae.training
        sae.eval()
        for x, t in zip(x_BD.split(4096), tokens_BN.split(4096), strict=True):
            out = sae(x, t)
            parts.append(out.x_hat)
            active += int(out.l0.sum())
        sae.train(was_training)
        x_hat_BD, x_hat = torch.cat(parts), self.x.clone()
        x_hat[where] = x_hat_BD
        ce_patched, l0 = self._cross_entropy(x_hat), active / len(x_BD)
        return {
            "l0": l0, "vectors_per_token": l0 + (sae.lookup is not None), **reconstruction_error(x_BD, x_hat_BD)._asdict(),
            "ce_clean": self.ce_clean, "ce_patched": ce_patched, "ce_added": (ce_patched - self.ce_clean) / self.ce_clean,
            "ce_recovered": 1 - (ce_patched - self.ce_clean) / (self.ce_zero - self.ce_clean),
        }


# ---------------------------------------------------------------------------------------------
# 6  Save and load
# ---------------------------------------------------------------------------------------------


def save(sae: TSAE, folder: str | Path, metadata: Mapping | None = None, dtype: torch.dtype = torch.float32) -> Path:
    """Write `cfg.json`, `sae_weights.safetensors` (SAELens layout) and `token_lookup.safetensors` into `folder`.

    The folder appears whole; a saved SAE of the same name is replaced. `metadata` must be JSON. Raises
    FileExistsError where the folder holds anything else.
    """
    folder = refuse_other_files(folder)
    partial = folder.with_name(f".{folder.name}.{os.getpid()}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    cfg = {
        "architecture": ARCHITECTURES[sae.cfg.activation], "d_in": sae.cfg.d_in, "d_sae": sae.cfg.d_sae,
        "dtype": str(dtype).removeprefix("torch."), "device": "cpu", "apply_b_dec_to_input": True,
        "normalize_activations": "none", "reshape_activations": "none",
        **({"k": sae.cfg.k, "rescale_acts_by_decoder_norm": False} if sae.cfg.activation == "topk" else {}),
        "metadata": {
            "model_name": sae.cfg.model_name, "hook_name": sae.cfg.hook_name, "context_size": sae.cfg.context_size,
            "prepend_bos": True, "sae_lens_version": "6.54.12",  # the layout's version: without it files are read as pre-6
            "tokenized": {"lookup": sae.lookup is not None, "config": asdict(sae.cfg), **(metadata or {})},
        },
    }
    (partial / "cfg.json").write_text(json.dumps(cfg, indent=1))
    weights = {n: getattr(sae, n).detach().to("cpu", dtype).contiguous() for n in names_of(cfg["architecture"])}
    save_file(weights, partial / "sae_weights.safetensors")
    if sae.lookup is not None:
        save_file({"W_lookup": sae.lookup.W.detach().to("cpu", dtype).contiguous()}, partial / "token_lookup.safetensors")
    old = partial.with_suffix(".old")
    if folder.exists():
        folder.rename(old)
    partial.replace(folder)
    shutil.rmtree(old, ignore_errors=True)
    return folder


def load(folder: str | Path, device: str | torch.device = "cpu") -> TSAE:
    """Load an SAE or TSAE saved here or by SAELens (also before version 6, as RES-JB), weights as fp32.

    Raises FileNotFoundError or ValueError with what is wrong.
    """
    folder, raw = Path(folder), read_cfg(folder)
    known = {theirs: ours for ours, theirs in ARCHITECTURES.items()}  # of two that share a name the last: jumprelu
    if raw["architecture"] not in [*known]:
        raise ValueError(f"{folder}/cfg.json: architecture {raw['architecture']!r} is not one of {', '.join(known)}")
    meta = raw.get("metadata", {})
    tokenized = meta["tokenized"] if isinstance(meta.get("tokenized"), dict) else {}
    saved = tokenized["config"] if isinstance(tokenized.get("config"), dict) else {}
    number, text, whole = (int, float), (str,), (int,)
    kinds = {"model_name": text, "hook_name": text, "context_size": whole, "l1_coefficient": number, "encoder_scale": number,
             "decoder_init_norm": number, "seed": whole}
    own = {name: value for name, value in {**meta, **saved}.items() if type(value) in kinds.get(name, ())}
    activation, k = known[raw["architecture"]], raw.get("k", 0)
    if activation == "jumprelu" and saved.get("activation") == "batchtopk":
        activation, k = "batchtopk", saved.get("k")
        if type(k) is not int:
            raise ValueError(f"{folder}/cfg.json: k = {k!r} of a batchtopk SAE should be a whole number")
    cfg = TSAEConfig(d_in=raw["d_in"], d_sae=raw["d_sae"], activation=activation, k=k, **own)
    sizes = {"W_enc": (cfg.d_in, cfg.d_sae), "W_dec": (cfg.d_sae, cfg.d_in), "b_dec": (cfg.d_in,)}
    shapes = {name: sizes.get(name, (cfg.d_sae,)) for name in names_of(raw["architecture"])}
    weights, lookup, table = read_tensors(folder / "sae_weights.safetensors", shapes), None, folder / "token_lookup.safetensors"
    fold(raw, weights)
    if tokenized.get("lookup", table.exists()):
        lookup = TokenLookup(read_tensors(table, {"W_lookup": (None, cfg.d_in)})["W_lookup"])
    sae = TSAE(cfg, lookup)
    with torch.no_grad():
        for name in shapes:
            getattr(sae, name).copy_(weights[name])
    return sae.to(device).eval()
