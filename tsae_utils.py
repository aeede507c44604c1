"""Tokenized sparse autoencoders: the model, its training and its measurement, in reading order.

    lm = load_lm("testbed/model")                              # language model
    rows = token_rows(read_documents("text.jsonl"), lm, 256)   # text
    hook = "blocks.4.hook_resid_pre"
    stream = ActivationStream(lm, rows, hook)                  # activations
    table = TokenLookup(0.5 * table_start(lm, hook, rows=rows)) # lookup table
    cfg = TSAEConfig(d_in=lm.d_model, d_sae=4096, k=16, encoder_scale=0.5)
    sae = TSAE(cfg, table)                                     # 2  the SAE
    train({"tsae": sae}, stream, TrainConfig())                # 3  training
    print(Evaluator(lm, heldout_rows, hook)(sae))              # 4  metrics
    save(sae, "my_tsae"); load("my_tsae")                      # 5  files

Paper: "Tokenized SAEs: Disentangling SAE Reconstructions", Dooms and Wilhelm, arXiv 2502.17332.
Axes: R rows, L sequence, B batch (tokens), D d_in, F d_sae, V vocabulary, K active, N n-gram order.
The engine below (`tsae/`): kernels, language model, text, activations, runs, files.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tsae import distributed
from tsae.documents import read_documents
from tsae.hub import download, push_to_hub
from tsae.inputs import flat_pair, plain_sae, require_possible
from tsae.kernels import SparsePass, dense_pass, keep_freed_memory, top_k
from tsae.language_model import LanguageModel, check_replacement, hub_name, load_lm, parse_hook
from tsae.metrics import HeldoutText, check_fit, fitted, reconstruction_error, squared_error
from tsae.run import Run, batch_of, dead_features_error, start_biases_
from tsae.saelens import FILES, read_cfg, read_folder, refuse_other_files, save
from tsae.stream import ActivationStream
from tsae.tables import STARTS, TokenLookup, add_lookup, table_start, unigram_activations
from tsae.text import keep_mask, last_tokens, token_rows

# ---------- 1  Configuration ----------------------------------------------------------------------

ACTIVATIONS = ("topk", "batchtopk", "relu", "gated")  # jumprelu is read and written, not trained


@dataclass(frozen=True)
class TSAEConfig:
    """What an SAE is. Raises ValueError for settings that cannot work."""

    d_in: int  # width of the residual stream
    d_sae: int  # number of features; the paper: 16 x d_in (GPT-2), 8 x d_in (Pythia)
    activation: str = "topk"
    k: int = 16  # active features per token (topk), on average over a batch (batchtopk)
    l1_coefficient: float = 0.0  # weight of sum_f a_f ||W_dec[f]|| in the loss (relu, gated)
    subtract_lookup: bool = False  # the encoder sees x - row; the paper's form, which sees x: False
    encoder_scale: float = 1.0  # W_enc starts as this times W_dec^T; authors: 1, with a table 0.5
    decoder_init_norm: float = 1.0  # rows of W_dec start at this norm; authors: 1, SAELens: 0.1
    seed: int = 0  # of the initialisation
    model_name: str = ""
    hook_name: str = ""
    context_size: int = 0  # tokens per row, BOS included
    max_norm: float = 0.0  # longer activations were left out of training; 0: none were
    max_norm_ratio: float = 0.0  # max_norm as a multiple of their median norm

    def __post_init__(self) -> None:
        require_possible(self, ACTIVATIONS)


@dataclass(frozen=True)
class TrainConfig:
    """How an SAE is trained. Defaults are the testbed's."""

    tokens: int = 2_000_000  # activations seen; the paper: about 300M (GPT-2), 131M (Pythia)
    lr: float = 3e-3  # Adam, encoder and decoder; the authors' code: 1e-4
    lr_lookup: float = 1e-2  # Adam, table; the authors' code: 1e-2 for TopK, 1e-4 elsewhere
    lookup_by_rows: bool = False  # SparseAdam on the batch's rows: cheap for large vocabularies
    lr_end: float = 0.0  # a cosine takes lr to this share of it; the authors' code: 0.3
    l1_warmup: float = 0.05  # share of the steps over which the L1 term rises; the paper's
    start_l0: float = 0.0  # relu, gated: features active per token at the start; 0: biases at zero
    aux_k: int = 0  # AuxK: dead features that model the error (Gao et al. 2024); the authors: none
    aux_coefficient: float = 1 / 32  # AuxK: weight of its squared error (Gao et al.)
    aux_window: int = 100_000  # AuxK: a feature is dead after this many tokens of silence
    keep_biases: bool = False  # b_dec starts as it is, for an SAE that is trained further
    dead_window: int = 500_000  # in the log: a feature is dead after this many tokens of silence

    def __post_init__(self) -> None:
        if self.tokens < 1 or self.lr < 0 or self.lr_lookup < 0:
            raise ValueError(f"tokens must be positive, learning rates not negative, not {self}")


# ---------- 2  The SAE ----------------------------------------------------------------------------


class TSAEOutput(NamedTuple):
    """What a forward pass gives; the last two are 0 outside training mode."""

    x_hat: Tensor  # [B, D] or [R, L, D] as the input, the table's row included
    l0: Tensor  # active features per token [B] or [R, L]
    fired: Tensor  # whether a feature was active on any token [F]
    sparsity: Tensor  # relu, gated: mean over tokens of sum_f a_f ||W_dec[f]||; gated: the gate's
    auxiliary: Tensor  # gated: squared error of the gate's reconstruction, decoder frozen


class TSAE(nn.Module):
    """Tokenized SAE (eq. 1 and 2); without a table the same class is the baseline.

        f(a_t)  = act(W_enc (a_t - b_dec) + b_enc)
        a_hat_t = W_dec f(a_t) + b_dec + W_lookup[t]

    With `subtract_lookup`, which is not in the paper, f sees a_t - W_lookup[t]. Gradients reach the
    row through the sum alone, as if f saw a constant.

    act: `topk` keeps the k largest, then ReLU; `batchtopk` the B k largest of a batch in training
    mode, else what exceeds a running threshold; `relu`; `gated` relu(exp(r_mag) p + b_mag) where
    p + b_gate > 0, p = W_enc (a_t - b_dec); `jumprelu` what exceeds each feature's threshold.

    Encoder and decoder store one feature per row; `W_enc` [d_in, d_sae] is the usual view. Decoder
    rows start in random directions with norm decoder_init_norm and are free afterwards, W_enc
    starts as encoder_scale * W_dec^T. b_dec starts at zero; `train` moves it to the mean.
    """

    def __init__(self, cfg: TSAEConfig, lookup: TokenLookup | None = None) -> None:
        super().__init__()
        if lookup is not None and lookup.W.shape[1] != cfg.d_in:
            width = lookup.W.shape[1]
            raise ValueError(
                f"the lookup table's rows have {width} entries, the SAE's d_in is {cfg.d_in}"
            )
        if cfg.subtract_lookup and lookup is None:
            raise ValueError("subtract_lookup needs a table: give a TokenLookup")
        self.cfg, self.lookup = cfg, lookup
        generator = torch.Generator().manual_seed(cfg.seed)
        W_dec = F.normalize(torch.randn(cfg.d_sae, cfg.d_in, generator=generator), dim=-1)
        W_dec = cfg.decoder_init_norm * W_dec
        self.W_dec = nn.Parameter(W_dec)  # [d_sae, d_in]
        self.W_enc_FD = nn.Parameter(cfg.encoder_scale * W_dec)
        self.b_dec = nn.Parameter(torch.zeros(cfg.d_in))
        for name in ("b_gate", "b_mag", "r_mag") if cfg.activation == "gated" else ("b_enc",):
            setattr(self, name, nn.Parameter(torch.zeros(cfg.d_sae)))
        if cfg.activation in ("batchtopk", "jumprelu"):
            self.register_buffer("threshold", torch.zeros(cfg.d_sae))
        self.register_buffer("tokens_since_fired", torch.zeros(cfg.d_sae).long(), persistent=False)
        self.bf16 = False  # bf16 for large products in training mode; `train` sets it
        self.threshold_rate = 0.01  # batchtopk: weight of a new batch in the running threshold

    @property
    def W_enc(self) -> Tensor:
        """[d_in, d_sae], a view."""
        return self.W_enc_FD.T

    @property
    def encoder_bias(self) -> Tensor:
        """[d_sae]: b_enc, or b_gate for gated."""
        return self.b_gate if self.cfg.activation == "gated" else self.b_enc

    def encoder_input(self, x: Tensor, tokens: Tensor | None = None) -> Tensor:
        """x, or with `subtract_lookup` x minus the tokens' rows; shapes as `forward`."""
        x_BD, tokens_BN = flat_pair(x, tokens, self.cfg.d_in)
        if not self.cfg.subtract_lookup:
            return x
        return (x_BD - self.table_rows(tokens_BN).detach()).view(x.shape)

    def pre_activations(self, x: Tensor, tokens: Tensor | None = None) -> Tensor:
        """W_enc (x - b_dec) + b_enc for every feature [..., F]; for gated with b_gate."""
        seen = self.encoder_input(x, tokens)
        return F.linear(seen - self.b_dec, self.W_enc_FD, self.encoder_bias)

    def activate(self, pre_BF: Tensor) -> Tensor:
        """Feature activations [B, F] from pre-activations, as outside training."""
        match self.cfg.activation:
            case "topk":
                values, index = pre_BF.topk(self.cfg.k, dim=-1)
                return torch.zeros_like(pre_BF).scatter_(-1, index, values.relu())
            case "relu":
                return pre_BF.relu()
            case "gated":  # exp(r_mag) (pre - b_gate) + b_mag in one pass over [B, F]
                scale = self.r_mag.exp()
                shift = self.b_mag - scale * self.b_gate
                magnitude = torch.addcmul(shift.to(pre_BF.dtype), pre_BF, scale.to(pre_BF.dtype))
                return magnitude.relu().masked_fill(pre_BF <= 0, 0.0)
        return pre_BF.relu() * (pre_BF > self.threshold)

    def encode(self, x: Tensor, tokens: Tensor | None = None) -> Tensor:
        """Feature activations [..., F], dense. Tokens are needed with `subtract_lookup` only."""
        return self.activate(self.pre_activations(x, tokens))

    def table_rows(self, tokens_BN: Tensor | None) -> Tensor | float:
        """The tokens' rows of the table [B, D]; 0 without a table."""
        return 0.0 if self.lookup is None else self.lookup(tokens_BN)

    def decode(self, acts: Tensor, tokens: Tensor | None = None) -> Tensor:
        """Reconstruction of dense activations, the tokens' rows included; shapes as `forward`."""
        acts_BF, tokens_BN = flat_pair(acts, tokens, self.cfg.d_sae)
        x_hat_BD = acts_BF @ self.W_dec + self.b_dec + self.table_rows(tokens_BN)
        return x_hat_BD.view(*acts.shape[:-1], self.cfg.d_in)

    def forward(self, x: Tensor, tokens: Tensor | None = None) -> TSAEOutput:
        """Reconstruct activations x that sit on `tokens`.

        x [B, D] has tokens [B] or [B, N], whose last column is the current token; x [R, L, D] has
        tokens [R, L]. Raises ValueError for other shapes and tokens without a row.
        """
        x_BD, tokens_BN = flat_pair(x, tokens, self.cfg.d_in)
        row_BD = self.table_rows(tokens_BN)
        if self.cfg.subtract_lookup:
            out = self._forward(x_BD - row_BD.detach(), 0.0)
            out = out._replace(x_hat=out.x_hat + row_BD)
        else:
            out = self._forward(x_BD, row_BD)
        return out._replace(x_hat=out.x_hat.view(x.shape), l0=out.l0.view(x.shape[:-1]))

    def _forward(self, x_BD: Tensor, row_BD: Tensor | float) -> TSAEOutput:
        is_top = self.cfg.activation in ("topk", "batchtopk")
        if self.cfg.d_sae == 0 or (self.cfg.k == 0 and is_top):  # the table alone
            x_hat, l0 = self.b_dec.expand_as(x_BD) + row_BD, x_BD.new_zeros(len(x_BD))
            fired = torch.zeros_like(self.tokens_since_fired, dtype=torch.bool)
            return TSAEOutput(x_hat, l0, fired, l0.sum(), l0.sum())
        if self.cfg.activation == "topk" or (is_top and self.training):
            return self._sparse(x_BD, row_BD)
        return self._dense(x_BD, row_BD)

    def _sparse(self, x_BD: Tensor, row_BD: Tensor | float) -> TSAEOutput:
        """Only active pairs are decoded and only they get gradients: see SparsePass."""
        is_batch, bf16 = self.cfg.activation == "batchtopk", self.bf16 and self.training
        weights = (self.W_enc_FD, self.b_enc, self.W_dec, self.b_dec)
        x_hat, values, feature, row = SparsePass.apply(x_BD, *weights, self.cfg.k, is_batch, bf16)
        is_active = (values > 0).float()
        l0 = torch.zeros(len(x_BD), device=x_BD.device).index_add_(0, row, is_active)
        count = torch.zeros(self.cfg.d_sae, device=x_BD.device).index_add_(0, feature, is_active)
        if is_batch and len(values):  # a running mean, as BatchNorm keeps its statistics
            lowest = values.min()
            moved = torch.lerp(self.threshold, lowest, self.threshold_rate)
            self.threshold.copy_(torch.where(self.threshold > 0, moved, lowest))
        zero = x_BD.new_zeros(())
        x_hat = x_hat + row_BD if isinstance(row_BD, Tensor) else x_hat
        return TSAEOutput(x_hat, l0, count > 0, zero, zero)

    def _dense(self, x_BD: Tensor, row_BD: Tensor | float) -> TSAEOutput:
        """Every activation is decoded: relu, gated, and batchtopk outside training."""
        is_gated = self.training and self.cfg.activation == "gated"
        weights = (self.W_enc_FD, self.encoder_bias, self.W_dec, self.b_dec)
        bf16 = self.bf16 and self.training
        decoded, gate, l0, fired = dense_pass(x_BD, *weights, self.activate, is_gated, bf16)
        x_hat = decoded[:, :-1] + self.b_dec + row_BD
        sparsity, auxiliary = x_BD.new_zeros(()), x_BD.new_zeros(())
        if self.training and self.cfg.activation in ("relu", "gated"):
            sparsity = gate[:, -1].mean()
        if is_gated:
            frozen_row = row_BD.detach() if isinstance(row_BD, Tensor) else row_BD
            gate_x_hat = gate[:, :-1] + self.b_dec.detach() + frozen_row
            auxiliary = squared_error(x_BD, gate_x_hat)
        return TSAEOutput(x_hat, l0, fired, sparsity, auxiliary)

    def loss(self, x_BD: Tensor, out: TSAEOutput, l1_scale: float = 1.0) -> Tensor:
        """Squared error + l1_scale * l1_coefficient * sparsity + auxiliary, mean over tokens."""
        sparsity = self.cfg.l1_coefficient * l1_scale * out.sparsity
        return squared_error(x_BD, out.x_hat) + sparsity + out.auxiliary

    @torch.no_grad()
    def count_firing_(self, out: TSAEOutput) -> None:
        """Update tokens_since_fired [F], counted in tokens over all processes."""
        self.tokens_since_fired += distributed.world_size() * out.l0.numel()
        self.tokens_since_fired[distributed.any_(out.fired)] = 0

    def dead_fraction(self, window: int) -> float:
        """Share of features that fired on none of the last `window` training tokens."""
        is_dead = self.tokens_since_fired >= window
        return is_dead.float().mean().item() if self.cfg.d_sae else 0.0


# ---------- 3  Training ---------------------------------------------------------------------------


def optimizers_for(sae: TSAE, cfg: TrainConfig) -> list[torch.optim.Optimizer]:
    """Adam (0.9, 0.999) for the SAE at `lr` and for the table at `lr_lookup`.

    With `lookup_by_rows` the table has SparseAdam: it skips rows of absent tokens; Adam moves them.
    """
    table = None if sae.lookup is None else sae.lookup.W
    weights = [p for p in sae.parameters() if p is not table]
    group = {"params": weights, "lr": cfg.lr, "base_lr": cfg.lr}
    adam = torch.optim.Adam([group], fused=sae.W_dec.device.type != "mps")
    if table is None or not table.requires_grad:
        return [adam]
    group = {"params": [table], "lr": cfg.lr_lookup, "base_lr": cfg.lr_lookup}
    if cfg.lookup_by_rows:
        return [adam, torch.optim.SparseAdam([group])]
    adam.add_param_group(group)
    return [adam]


def train(
    saes: Mapping[str, TSAE],
    stream: ActivationStream,
    cfg: TrainConfig | Mapping[str, TrainConfig],
    *,
    log_every: int = 20,
    progress: bool = True,
    after_step: Callable[[int], None] | None = None,
    checkpoint: str | Path | None = None,
    checkpoint_every: int = 1_000_000,
    history: list[dict] | None = None,
) -> list[dict]:
    """Train every SAE in place on the same batches; the language model runs once for all of them.

    `cfg` is one TrainConfig or one per name (equal `tokens`). Returns the history: per SAE a row
    every `log_every` steps and at the last (system, step, tokens, loss, nmse, l0, dead_fraction,
    seconds), where seconds is the time spent on that SAE alone (on a GPU, on the one that waits).
    Rows go into `history` where a list is given, which keeps them in case of an error. After every
    step `after_step(step)` is called. Afterwards the SAEs are in evaluation mode.

    With `checkpoint`, a file, everything is saved every `checkpoint_every` tokens and at the end. A
    run that finds the file resumes; on the same CPU and threads it ends bit for bit as without a
    break. Under torchrun each process trains the first one's SAEs on rows of its own.

    Raises ValueError for an SAE that cannot be trained as configured and for a checkpoint of
    another run, FloatingPointError naming an SAE that diverged, OSError for a full disk.
    """
    callables, saes = saes, {name: plain_sae(sae) for name, sae in saes.items()}
    cfgs = {name: cfg if isinstance(cfg, TrainConfig) else cfg[name] for name in saes}
    optimizers = {name: optimizers_for(sae, cfgs[name]) for name, sae in saes.items()}
    options = (log_every, progress, checkpoint, checkpoint_every, history)
    with Run(saes, cfgs, optimizers, stream, *options) as run:
        for step, (batch, tokens) in run.batches():
            for name, sae in saes.items():
                x = batch_of(sae, batch)
                with run.timed(name):
                    if step == 0 and not cfgs[name].keep_biases:
                        start_biases_(sae, cfgs[name], x, tokens)
                    sae.threshold_rate = max(0.01, 10 / (step + 10))  # a short run must not lag
                    done = step / run.steps
                    part = (callables[name], optimizers[name], cfgs[name])
                    loss, out = train_step_(*part, x, tokens, done)
                run.log(name, step, x, loss, out)
            run.finish_step(step)
            if after_step is not None:
                after_step(step)
    return run.history


def train_step_(
    sae: TSAE,
    optimizers: list[torch.optim.Optimizer],
    cfg: TrainConfig,
    x: Tensor,
    tokens: Tensor,
    done: float,
) -> tuple[Tensor, TSAEOutput]:
    """One optimizer step; `done` is the share of the steps already taken."""
    cosine = 0.5 * (1 + math.cos(math.pi * done))
    for group in (g for optimizer in optimizers for g in optimizer.param_groups):
        group["lr"] = group["base_lr"] * (cfg.lr_end + (1 - cfg.lr_end) * cosine)
    out = sae(x, tokens)
    loss = sae.loss(x, out, min(1.0, done / cfg.l1_warmup if cfg.l1_warmup else 1.0))
    if cfg.aux_k:
        error = dead_features_error(sae, x, tokens, out.x_hat, cfg.aux_k, cfg.aux_window)
        loss = loss + cfg.aux_coefficient * error
    loss.backward()
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                distributed.average_gradient_(parameter)
        optimizer.step()
        optimizer.zero_grad()  # here, so that only one of many SAEs holds gradients
    if sae.cfg.activation == "batchtopk":
        distributed.average_(sae.threshold)
    sae.count_firing_(out)
    return loss.detach(), out


# ---------- 4  Metrics ---------------------------------------------------------------------------


class Evaluator(HeldoutText):
    """Measures SAEs on held-out rows: `Evaluator(lm, rows_RL, hook_name)(sae)` gives a dict.

    nmse, nmse_unsquared, fvu: see ReconstructionError. l0: active features per token.
    vectors_per_token: decoder vectors added per token, the table's row included. ce_clean,
    ce_patched: cross-entropy in nats without and with the reconstruction in place.
    ce_added = (ce_patched - ce_clean) / ce_clean (eq. 3).
    ce_recovered = 1 - (ce_patched - ce_clean) / (ce_zero - ce_clean), ce_zero with zeros in place;
    ce_recovered_mean: the same with the mean activation in place. kl: mean KL(p || q) in nats of
    the next token, p without and q with the reconstruction in place.

    Position 0, separators and the prediction made at BOS are left out, and BOS is never patched; so
    are positions with massive activations (`massive_share` of the others), longer than `max_norm`,
    which is ten times the rows' median norm unless given. `include_bos` includes them all, as the
    paper did. An SAE of any type and device is measured in fp32 on the model's device, and left as
    it was.
    """

    def __call__(self, sae: TSAE) -> dict[str, float]:
        return self.measure(sae)[0]

    @torch.no_grad()
    def measure(self, sae: TSAE) -> tuple[dict[str, float], NamedTuple]:
        """(Metrics, the DocumentSums of `tsae.metrics`), for intervals over documents."""
        x_BD = self.x_BD
        parts = zip(x_BD.split(4096), self.tokens_BN.split(4096), strict=True)
        with fitted(sae, self.lm, self.x) as measured:
            outputs = [measured(x, tokens) for x, tokens in parts]
        x_hat_BD = torch.cat([out.x_hat for out in outputs])
        l0 = sum(int(out.l0.sum()) for out in outputs) / len(x_BD)
        sums = self.by_document(x_hat_BD)
        n = sums.predictions.sum()
        ce_patched, kl = (float(part.sum() / n) for part in (sums.ce_patched, sums.kl))
        added = ce_patched - self.ce_clean
        metrics = {
            "l0": l0,
            "vectors_per_token": l0 + (measured.lookup is not None),
            **reconstruction_error(x_BD, x_hat_BD)._asdict(),
            "ce_clean": self.ce_clean,
            "ce_patched": ce_patched,
            "ce_added": added / self.ce_clean,
            "ce_recovered": 1 - added / (self.ce_zero - self.ce_clean),
            "massive_share": self.massive_share,
            "ce_recovered_mean": 1 - added / (self.ce_mean - self.ce_clean),
            "kl": kl,
        }
        return metrics, sums


# ---------- 5  Files -----------------------------------------------------------------------------


@torch.no_grad()
def load(folder: str | Path, device: str | torch.device = "cpu") -> TSAE:
    """Load an SAE or TSAE saved here or by SAELens (before version 6 too), weights as fp32.

    Raises FileNotFoundError or ValueError with what is wrong.
    """
    config, weights, table = read_folder(folder)
    sae = TSAE(TSAEConfig(**config), None if table is None else TokenLookup(table))
    for name, tensor in weights.items():
        getattr(sae, name).copy_(tensor)
    return sae.to(device).eval()


def from_pretrained(source: str | Path, subfolder: str = "", revision: str | None = None) -> TSAE:
    """Load an SAE from a folder or from a hub repository in SAELens's layout.

    RES-JB: from_pretrained("jbloom/GPT2-Small-SAEs-Reformatted", "blocks.8.hook_resid_pre").
    Raises FileNotFoundError where neither is there, ValueError for a damaged one.
    """
    return load(download(source, subfolder, revision))
