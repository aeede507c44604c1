"""What surrounds the training loop: checks, clocks, history, progress, resuming.

SAEs and configurations come from tsae_utils; only their attributes are known here.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm.auto import tqdm

from tsae import distributed
from tsae.checkpoint import read_checkpoint, write_checkpoint
from tsae.inputs import flat_pair
from tsae.kernels import fast_bf16
from tsae.metrics import squared_error
from tsae.stream import ActivationStream

Optimizers = Mapping[str, list[torch.optim.Optimizer]]
STREAM_SETTINGS = (
    "batch_size",
    "seed",
    "rows_per_buffer",
    "harvest_rows",
    "order",
    "include_bos",
    "hooks",
    "limits",
)


def require_trainable(saes: Mapping[str, Any], cfgs: Mapping[str, Any], stream: Any) -> None:
    """Raise ValueError for SAEs that cannot be trained together as configured."""
    if len({cfg.tokens for cfg in cfgs.values()}) > 1:
        raise ValueError("SAEs trained together see the same tokens: give them the same `tokens`")
    for name, sae in saes.items():
        activation, cfg = sae.cfg.activation, cfgs[name]
        if activation == "jumprelu":
            raise ValueError(
                f"{name!r} is a jumprelu SAE, which is for loading: train batchtopk instead"
            )
        if cfg.aux_k and activation not in ("topk", "batchtopk"):
            raise ValueError(f"{name!r}: aux_k is for topk and batchtopk, not {activation}")
        hooks = getattr(stream, "hooks", [])
        if len(hooks) > 1 and sae.cfg.hook_name not in hooks:
            raise ValueError(
                f"{name!r} is of hook {sae.cfg.hook_name!r}, the stream of {', '.join(hooks)}: "
                "name one of these in its configuration"
            )
        if sae.lookup is None:
            continue
        if hasattr(stream, "lm"):
            sae.lookup.check_vocabulary(stream.lm.n_vocab)
        for other_name, other in saes.items():
            differs = cfg.lookup_by_rows != cfgs[other_name].lookup_by_rows
            if other.lookup is sae.lookup and differs:
                raise ValueError(
                    f"{name!r} shares its table with another SAE: give both the same lookup_by_rows"
                )


def note_max_norm_(sae: Any, stream: Any) -> None:
    """Keep in the SAE's configuration which activations the stream leaves out."""
    limits = getattr(stream, "limits", {})
    limit = limits.get(sae.cfg.hook_name, max(limits.values(), default=math.inf))
    if limit < math.inf:
        sae.cfg = replace(sae.cfg, max_norm=limit, max_norm_ratio=stream.max_norm_ratio)


def batch_of(sae: Any, x: Tensor | Mapping[str, Tensor]) -> Tensor:
    """The SAE's own batch, where a stream of several hooks gives one for each."""
    return x if isinstance(x, Tensor) else x[sae.cfg.hook_name]


@torch.no_grad()
def start_biases_(sae: Any, cfg: Any, x: Tensor, tokens: Tensor) -> None:
    """Set the biases on the first batch.

    b_dec starts at the mean of what the table leaves (not stated in the paper; the same rule for
    every system). With `start_l0` every feature's encoder bias lets it fire on an equal share of
    the batch, so that about `start_l0` features are active per token.
    """
    x, tokens = flat_pair(x, tokens, sae.cfg.d_in)
    remainder = x - sae.table_rows(tokens)
    sae.b_dec.copy_(remainder.mean(0))
    distributed.average_(sae.b_dec)
    activation = sae.cfg.activation
    if not cfg.start_l0 or activation not in ("relu", "gated"):
        return
    seen = sae.encoder_input(x, tokens)
    share = min(1.0, cfg.start_l0 / sae.cfg.d_sae)
    firings = max(1, round(len(x) * share))
    thresholds = []
    for features in torch.arange(sae.cfg.d_sae, device=x.device).split(2048):
        pre = F.linear(seen - sae.b_dec, sae.W_enc_FD[features])
        thresholds.append(pre.topk(firings, dim=0).values[-1])
    lowest = torch.cat(thresholds)
    distributed.average_(lowest)
    for bias in [sae.b_enc] if activation == "relu" else [sae.b_gate, sae.b_mag]:
        bias.copy_(-lowest)


def dead_features_error(
    sae: Any, x: Tensor, tokens: Tensor, x_hat: Tensor, k: int, window: int
) -> Tensor:
    """AuxK: squared error of modelling x - x_hat by each token's k strongest dead features.

    Dead are those silent for `window` tokens (Gao et al. 2024; the paper's authors have none).
    """
    dead = (sae.tokens_since_fired >= window).nonzero().squeeze(-1)
    if len(dead) == 0:
        return x.new_zeros(())
    seen_BD = sae.encoder_input(x, tokens).flatten(0, -2)
    pre = F.linear(seen_BD - sae.b_dec.detach(), sae.W_enc_FD[dead], sae.b_enc[dead])
    values, index = pre.topk(min(k, len(dead)), dim=-1, sorted=False)
    rows, weights = sae.W_dec[dead], values.relu()
    modelled = F.embedding_bag(index, rows, mode="sum", per_sample_weights=weights)
    return squared_error((x - x_hat.detach()).flatten(0, -2), modelled)


@torch.no_grad()
def step_metrics(sae: Any, cfg: Any, x: Tensor, loss: Tensor, out: Any) -> dict[str, float]:
    """Loss, nmse, l0 and dead_fraction of one batch, averaged over processes."""
    nmse = ((x - out.x_hat).square().sum(-1) / x.square().sum(-1)).mean()
    values = torch.stack([loss, nmse, out.l0.to(nmse.dtype).mean()])
    distributed.average_(values)
    metrics = dict(zip(("loss", "nmse", "l0"), values.tolist(), strict=True))
    return metrics | {"dead_fraction": sae.dead_fraction(cfg.dead_window)}


def all_tensors(saes: Mapping[str, Any], optimizers: Optimizers) -> dict[str, Tensor]:
    """Every tensor that training changes: parameters, buffers, Adam's moments and step counts."""
    tensors = {}
    for name, sae in saes.items():
        for key, tensor in (*sae.named_parameters(), *sae.named_buffers()):
            tensors[f"{name}/{key}"] = tensor.detach()
        for key, parameter in sae.named_parameters():
            for optimizer in optimizers[name]:
                for moment, value in optimizer.state.get(parameter, {}).items():
                    tensors[f"{name}/{key}/{moment}"] = torch.as_tensor(value)
    return tensors


@torch.no_grad()
def restore_tensors_(
    saes: Mapping[str, Any], optimizers: Optimizers, tensors: Mapping[str, Tensor]
) -> None:
    """Put back what `all_tensors` gave."""
    for name, sae in saes.items():
        for key, tensor in (*sae.named_parameters(), *sae.named_buffers()):
            tensor.copy_(tensors[f"{name}/{key}"])
        for optimizer in optimizers[name]:
            parameters = {p for group in optimizer.param_groups for p in group["params"]}
            for key, parameter in sae.named_parameters():
                if parameter not in parameters or f"{name}/{key}/step" not in tensors:
                    continue
                moments = ("step", "exp_avg", "exp_avg_sq")
                state = {m: tensors[f"{name}/{key}/{m}"].clone() for m in moments}
                if isinstance(optimizer, torch.optim.SparseAdam):
                    state["step"] = int(state["step"])
                optimizer.state[parameter] = state


def run_fingerprint(
    saes: Mapping[str, Any], cfgs: Mapping[str, Any], stream: ActivationStream
) -> dict[str, dict]:
    """What two runs must share for one to resume from the other's checkpoint."""
    parts = {}
    for name, sae in saes.items():
        table = None
        if sae.lookup is not None:
            table = "learned" if sae.lookup.W.requires_grad else "frozen"
        parts[f"sae {name}"] = {**asdict(sae.cfg), "table": table, "dtype": str(sae.W_dec.dtype)}
    for name, cfg in cfgs.items():
        parts[f"training of {name}"] = asdict(cfg)
    parts["stream"] = {key: getattr(stream, key) for key in STREAM_SETTINGS} | {
        "model": stream.lm.fingerprint,
        "bf16": stream.lm.bf16,
        "processes": distributed.world_size(),
    }
    return parts


def require_same_run(path: str | Path, saved: Mapping, here: Mapping) -> None:
    """Raise ValueError naming the settings in which a checkpoint's run differs from this one."""
    for part in {**here, **saved}:
        theirs, ours = saved.get(part) or {}, here.get(part) or {}
        differences = [
            f"{key} {theirs.get(key)} there, {ours.get(key)} here"
            for key in {**theirs, **ours}
            if theirs.get(key) != ours.get(key)
        ]
        if differences:
            raise ValueError(
                f"the checkpoint {path} is of another run ({part}: {'; '.join(differences)}): "
                "delete it or give another file"
            )


class Run:
    """One call of `train`: where it is, how long each SAE took, what was logged and saved.

    Inside `with`, the SAEs are in training mode; afterwards, interrupted or not, in evaluation
    mode. Raises ValueError where they cannot be trained, or cannot resume, as asked.
    """

    def __init__(
        self,
        saes: Mapping[str, Any],
        cfgs: Mapping[str, Any],
        optimizers: Optimizers,
        stream: ActivationStream,
        log_every: int,
        progress: bool,
        checkpoint: str | Path | None,
        checkpoint_every: int,
        history: list[dict] | None = None,
    ) -> None:
        require_trainable(saes, cfgs, stream)
        self.saes, self.cfgs, self.stream = saes, cfgs, stream
        if distributed.world_size() > 1 and hasattr(stream, "limits"):
            limits = torch.tensor(list(stream.limits.values()), device=stream.lm.device)
            distributed.broadcast_([limits])  # each process has rows of its own
            stream.limits = dict(zip(stream.limits, limits.tolist(), strict=True))
        for sae in saes.values():
            note_max_norm_(sae, stream)
        self.optimizers = optimizers
        self.log_every = log_every
        self.checkpoint = None if checkpoint is None else Path(checkpoint).expanduser()
        self.batch = stream.batch_size * distributed.world_size()
        self.steps = max(1, next(iter(cfgs.values())).tokens // self.batch)
        self.checkpoint_steps = max(1, checkpoint_every // self.batch)
        self.first, self.position = 0, (0, 0)
        self.seconds = dict.fromkeys(saes, 0.0)
        self.history: list[dict] = [] if history is None else history
        self.fingerprint: dict[str, dict] = {}
        if checkpoint is not None:
            if not isinstance(stream, ActivationStream):
                raise ValueError(
                    "a checkpoint needs a stream that can resume: give an ActivationStream"
                )
            self.fingerprint = run_fingerprint(saes, cfgs, stream)
            if self.checkpoint.exists():
                self._restore()
        distributed.require_equal_starts(self.first, next(iter(saes.values())).W_dec.device)
        for sae in saes.values():
            distributed.broadcast_((*sae.parameters(), *sae.buffers()))
        self.bar = tqdm(
            total=self.steps * self.batch,
            initial=self.first * self.batch,
            desc="training" if len(saes) == 1 else f"training {len(saes)} SAEs",
            unit="tok",
            unit_scale=True,
            disable=not progress,
        )

    def __enter__(self) -> Run:
        for name, sae in self.saes.items():
            sae.train().zero_grad()
            sae.bf16 = sae.W_dec.dtype == torch.float32 and fast_bf16(sae.W_dec.device)
            if sae.lookup is not None:
                sae.lookup.by_rows = self.cfgs[name].lookup_by_rows
        return self

    def __exit__(self, *error: Any) -> None:
        self.bar.close()
        for sae in self.saes.values():
            sae.eval()
            if sae.lookup is not None:
                sae.lookup.by_rows = False

    def batches(self) -> Iterator[tuple[int, tuple[Tensor, Tensor]]]:
        """(Step, batch) for the steps that are left."""
        batches = self.stream.batches(self.position) if self.first else iter(self.stream)
        return enumerate(islice(batches, self.steps - self.first), self.first)

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """Count the time spent inside for this SAE."""
        started = time.perf_counter()
        yield
        self.seconds[name] += time.perf_counter() - started

    def log(self, name: str, step: int, x: Tensor, loss: Tensor, out: Any) -> None:
        """Add a row to the history every `log_every` steps and at the last.

        Raises FloatingPointError naming the SAE whose loss or weights are not finite.
        """
        if step % self.log_every and step < self.steps - 1:
            return
        sae = self.saes[name]
        with self.timed(name):
            metrics = step_metrics(sae, self.cfgs[name], x, loss, out)
        advice = "lower its learning rate"
        if not math.isfinite(metrics["loss"]):
            value = metrics["loss"]
            raise FloatingPointError(f"the loss of {name!r} is {value} at step {step}: {advice}")
        if not math.isfinite(sum(p.detach().sum().item() for p in sae.parameters())):
            raise FloatingPointError(
                f"a weight of {name!r} is not finite after step {step}: {advice}"
            )
        place = {"system": name, "step": step, "tokens": (step + 1) * self.batch}
        self.history.append({**place, **metrics, "seconds": self.seconds[name]})
        if len(self.saes) == 1:
            self.bar.set_postfix(
                loss=f"{metrics['loss']:.4g}",
                l0=f"{metrics['l0']:.1f}",
                dead=f"{metrics['dead_fraction']:.0%}",
                refresh=False,
            )

    def finish_step(self, step: int) -> None:
        """Advance the progress bar, and write a checkpoint where one is due."""
        self.bar.update(self.batch)
        is_due = (step + 1) % self.checkpoint_steps == 0 or step == self.steps - 1
        if self.checkpoint is not None and is_due:
            self._save(step + 1)

    def _save(self, steps_done: int) -> None:
        """Write a checkpoint; the first process writes for all."""
        stream = self.stream
        place = torch.tensor([*stream.position, stream.digest], device=stream.lm.device)
        places = [p.tolist() for p in distributed.gather(place)]
        if distributed.rank() > 0:
            return
        progress = {"step": steps_done, "seconds": self.seconds, "history": self.history}
        state = {**progress, "places": places, "run": self.fingerprint}
        write_checkpoint(self.checkpoint, all_tensors(self.saes, self.optimizers), state)

    def _restore(self) -> None:
        tensors, state = read_checkpoint(self.checkpoint, self.stream.lm.device)
        require_same_run(self.checkpoint, state["run"], self.fingerprint)
        *position, digest = state["places"][distributed.rank()]
        if digest != self.stream.digest:
            raise ValueError(
                f"the checkpoint {self.checkpoint} is of another run (other rows of text): "
                "delete it or give another file"
            )
        restore_tensors_(self.saes, self.optimizers, tensors)
        self.first, self.position = state["step"], tuple(position)
        self.seconds = state["seconds"]
        self.history[:] = state["history"]
