"""Train the SAEs of a notebook, or load them where they have been trained before."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import numpy as np
import torch
from filelock import FileLock

import tsae_utils as tu

from .context import Context

CACHE_VERSION = {"batchtopk": 4}  # 3 for the others; raise it when training changes the weights

MOST_IN_A_PASS = 16  # SAEs: a record that is stopped in a pass loses that pass
# Table and encoder start at half scale, as in the authors' revised code: their sum starts at x.
HALF = {"table_scale": 0.5, "encoder_scale": 0.5}
LOOKUP = {"start": "unigram", **HALF}


@dataclass(frozen=True)
class SAESpec:
    """One SAE to train: everything that decides its weights, so that a hash finds it again."""

    system: str  # its name in tables and figures
    d_sae: int
    k: int
    lr: float
    activation: str = "topk"
    l1_coefficient: float = 0.0
    start: str = ""  # of the table: "" (no table), unigram, shuffled, mean or zero
    table_scale: float = 1.0  # rows start at this times `start`
    encoder_scale: float = 1.0  # W_enc starts at this times W_dec^T
    lr_lookup: float = 1e-2  # the authors' value for TopK
    frozen: bool = False  # the table is not trained
    aux_k: int = 0  # dead features that model the error (AuxK)
    start_l0: float = 0.0  # relu, gated: features active per token at the start
    subtract_lookup: bool = False  # the encoder sees x minus the token's row
    decoder_init_norm: float = 1.0  # norm at which decoder rows start
    kaiming: bool = False  # the encoder starts Kaiming-normal, as in the workshop manuscript
    curve: int = 0  # held-out tokens for measurements during training

    @property
    def has_table(self) -> bool:
        """Whether this is a tokenized SAE."""
        return bool(self.start)


def spec_changes(spec: SAESpec) -> dict:
    """Fields of a specification that differ from their defaults: a new field changes no key."""
    return {
        f.name: getattr(spec, f.name) for f in fields(SAESpec) if getattr(spec, f.name) != f.default
    }


def new_sae(lab: Context, spec: SAESpec, layer: int, seed: int) -> tu.TSAE:
    """The SAE before training, with its table at its start."""
    cfg = tu.TSAEConfig(
        d_in=lab.lm.d_model,
        d_sae=spec.d_sae,
        activation=spec.activation,
        k=spec.k,
        seed=seed,
        l1_coefficient=spec.l1_coefficient,
        encoder_scale=spec.encoder_scale,
        decoder_init_norm=spec.decoder_init_norm,
        subtract_lookup=spec.subtract_lookup,
        model_name=lab.model_name,
        hook_name=lab.hook(layer),
        context_size=lab.context_size,
    )
    lookup = None
    if spec.has_table:
        lookup = tu.TokenLookup(table_of(lab, spec, layer, seed), trainable=not spec.frozen)
    sae = tu.TSAE(cfg, lookup)
    if spec.kaiming:
        generator = torch.Generator().manual_seed(10**6 + seed)  # not the decoder's numbers
        torch.nn.init.kaiming_normal_(sae.W_enc_FD.data, generator=generator)
    return sae.to(lab.lm.device)


def table_of(lab: Context, spec: SAESpec, layer: int, seed: int) -> torch.Tensor:
    """Rows of the table before training [V, D]."""
    table = lab.table_start("mean" if spec.start == "mean" else "unigram", layer)
    if spec.start == "shuffled":
        order = torch.randperm(len(table), generator=torch.Generator().manual_seed(seed))
        table = table[order.to(table.device)]
    return (0.0 if spec.start == "zero" else spec.table_scale) * table


def train_config(lab: Context, spec: SAESpec, tokens: int) -> tu.TrainConfig:
    """How a specification is trained on a budget."""
    window = dead_window(tokens)
    return tu.TrainConfig(
        tokens=tokens,
        lr=spec.lr,
        lr_lookup=spec.lr_lookup,
        lr_end=lab.p.recipe.lr_end,
        start_l0=spec.start_l0,
        aux_k=spec.aux_k,
        aux_window=window // 5,
        dead_window=window,
    )


def dead_window(tokens: int) -> int:
    """Tokens of silence after which a feature counts as dead."""
    return min(tu.TrainConfig().dead_window, tokens // 4)


def cache_folder(lab: Context, spec: SAESpec, layer: int, seed: int, tokens: int) -> Path:
    """Where this SAE is kept once it is trained."""
    recipe = lab.p.recipe
    key = [CACHE_VERSION.get(spec.activation, 3), spec_changes(spec), layer, seed, tokens]
    key += [recipe.batch_size, recipe.buffer_tokens, lab.lm.fingerprint, lab.lm.bf16]
    key += [hashlib.sha256(lab.train_rows.numpy().tobytes()).hexdigest()]
    if recipe.lr_end > 0:
        key.append(recipe.lr_end)
    name = hashlib.sha256(json.dumps(key).encode()).hexdigest()[:20]
    return lab.cache / "saes" / name


def train_or_load(
    lab: Context, specs: dict[str, SAESpec], layer: int, seed: int, tokens: int
) -> dict[str, tu.TSAE]:
    """Trained SAEs by name, each with its training `record`.

    Whatever the cache lacks is trained in one pass of the language model, or in several where
    the profile's memory limit asks for it.
    """
    if lab.replay:
        raise RuntimeError("a redraw trains nothing: call this inside a function given to lab.run")
    folders = {name: cache_folder(lab, s, layer, seed, tokens) for name, s in specs.items()}
    lock = lab.cache / "saes" / f"{lab.model_name}-{layer}-{seed}.lock"
    lock.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(lock):  # a second process waits, then loads
        missing = {name: s for name, s in specs.items() if not folders[name].exists()}
        groups = passes(lab, missing)
        if groups:
            most = max(sum(gib(lab, spec) for spec in group.values()) for group in groups)
            print(
                f"training {len(missing)} SAEs in {len(groups)} pass(es) of the language model, "
                f"{most:.2f} GiB with Adam and gradients"
            )
        for group in groups:
            train_group(lab, group, folders, layer, seed, tokens)
    saes = {}
    for name, folder in folders.items():
        saes[name] = tu.load(folder, lab.lm.device)
        saes[name].record = tu.read_cfg(folder)["metadata"]["tokenized"]["record"]
    return saes


def train_group(
    lab: Context,
    specs: dict[str, SAESpec],
    folders: dict[str, Path],
    layer: int,
    seed: int,
    tokens: int,
) -> None:
    """Train these SAEs on the same batches and save them with their records."""
    recipe = lab.p.recipe
    saes = {name: new_sae(lab, spec, layer, seed) for name, spec in specs.items()}
    cfgs = {name: train_config(lab, spec, tokens) for name, spec in specs.items()}
    stream = tu.ActivationStream(
        lab.lm, lab.train_rows, lab.hook(layer), recipe.batch_size, recipe.buffer_tokens, seed
    )
    curves, after_step = measure_during_training(lab, specs, saes, layer, tokens)
    history = tu.train(saes, stream, cfgs, after_step=after_step)
    for name, sae in saes.items():
        rows = [
            {key: value for key, value in row.items() if key != "system"}
            for row in history
            if row["system"] == name
        ]
        record = {
            **rows[-1],
            "dead_window": dead_window(tokens),
            "spec": asdict(specs[name]),
            "history": rows,
            "curve": curves[name],
            "pass": {"saes": len(specs), "seconds_in_model": stream.seconds},
        }
        tu.save(sae, folders[name], {"record": record})


def passes(lab: Context, specs: dict[str, SAESpec]) -> list[dict[str, SAESpec]]:
    """Specifications in groups that fit into the profile's memory limit, at least one each."""
    groups, free = [], 0.0
    for name, spec in specs.items():
        needed = gib(lab, spec)
        if not groups or needed > free or len(groups[-1]) == MOST_IN_A_PASS:
            groups.append({})
            free = lab.p.recipe.gib
        groups[-1][name] = spec
        free -= needed
    return groups


def gib(lab: Context, spec: SAESpec) -> float:
    """Memory of an SAE in training."""
    table = lab.lm.n_vocab * lab.lm.d_model if spec.has_table else 0
    parameters = spec.d_sae * (2 * lab.lm.d_model + 1) + table
    needed = 16 * parameters  # bytes: fp32 weights, gradients and Adam's two moments
    if spec.curve:
        needed += 4 * table  # a curve compares the table with its start
    return needed / 2**30


def measure_during_training(
    lab: Context, specs: dict[str, SAESpec], saes: dict[str, tu.TSAE], layer: int, tokens: int
) -> tuple[dict[str, list[dict]], Callable[[int], None] | None]:
    """(Rows by SAE, callback for `train`): held-out measurements of specifications with a curve.

    They are spaced logarithmically, the first one before the first step.
    """
    curves = {name: [] for name in specs}
    wanted = [name for name, spec in specs.items() if spec.curve]
    if not wanted:
        return curves, None
    batch = lab.p.recipe.batch_size
    last = max(1, tokens // batch)
    steps = {int(s) for s in np.geomspace(1, last, lab.p.budget.curve_points).round()}
    rows = lab.rows("heldout", max(specs[name].curve for name in wanted))
    evaluator = tu.Evaluator(lab.lm, rows, lab.hook(layer))
    starts = {
        name: saes[name].lookup.W.detach().clone() for name in wanted if specs[name].has_table
    }

    def measure(step: int) -> None:
        for name in wanted:
            row = {"step": step, "tokens": step * batch, **evaluator(saes[name])}
            if name in starts:  # mean over the vocabulary
                table = saes[name].lookup.W.detach()
                cosine = torch.cosine_similarity(table, starts[name], dim=-1)
                row["table_cosine"] = cosine.mean().item()
            curves[name].append(row)

    measure(0)  # the start may already win
    return curves, lambda step: measure(step + 1) if step + 1 in steps else None
