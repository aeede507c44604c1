"""One measurement in a process of its own, in our environment or in the peers': prints one line of JSON.

    python benchmarks/worker.py train_step ours data.safetensors --d-sae 12288 --k 32 --lr 4e-3 --steps 12
    python benchmarks/worker.py harvest ours --steps 6

train_step: every system trains a TopK SAE on the same batches in the same order, with Adam and otherwise as its library trains,
and is measured on the same held-out activations by the same formula. glibc keeps freed memory for every system, as it does in
our training; memory is what the process (on a GPU: torch there) grows by from where libraries and data are loaded. harvest:
the residual stream entering block 8 of a model of GPT-2 small's shape with random weights, for rows of random tokens; no batch is
the same as another.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import gc
import importlib
import json
import math
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import tsae_utils as tu

Reconstruct = Callable[[Tensor, Tensor], Tensor]  # of held-out activations on their tokens
Forward = Callable[[Tensor], Tensor]  # token ids to activations
Run = Callable[[Callable[[], None]], None]  # takes every step and calls back after each
TABLE = {"ours": None, "ours, unit start": None, "ours+table": False, "ours+table by rows": True}  # whether its table is updated by rows
START = 0.1  # norm at which SAELens starts decoder and encoder rows, and so do ours and plain PyTorch


def cosine(step: int, steps: int) -> float:
    """Every system's learning rate falls to zero over its run, as ours does."""
    return 0.5 * (1 + math.cos(math.pi * step / steps))


def autocast(on: bool, device: str) -> contextlib.AbstractContextManager:
    return torch.autocast(device, torch.bfloat16) if on else contextlib.nullcontext()


def ours(x: Tensor, tokens: Tensor, a: argparse.Namespace) -> tuple[Run, Reconstruct]:
    """tsae_utils.train itself on a stream of ready batches; the table, where there is one, starts at zero."""
    saes = {}
    for i in range(a.saes):
        table = None if TABLE[a.system] is None else tu.TokenLookup(torch.zeros(a.vocab, x.shape[1]))
        start = 1.0 if a.system == "ours, unit start" else START
        saes[str(i)] = tu.TSAE(tu.TSAEConfig(d_in=x.shape[1], d_sae=a.d_sae, k=a.k, seed=i, decoder_init_norm=start), table).to(x.device)
    cfg = tu.TrainConfig(tokens=a.steps * a.batch, lr=a.lr, lookup_by_rows=bool(TABLE[a.system]))

    class Ready:
        batch_size = a.batch

        def __iter__(self):
            yield from zip(x.split(a.batch), tokens.split(a.batch), strict=True)

    def reconstruct(y: Tensor, t: Tensor) -> Tensor:
        training, sae = saes["0"].training, saes["0"].eval()  # on the way too: fp32 as outside of training
        x_hat = sae(y, t).x_hat
        sae.train(training)
        return x_hat

    return lambda after: tu.train(saes, Ready(), cfg, progress=False, after_step=lambda _: after()), reconstruct


def dense(x: Tensor, tokens: Tensor, a: argparse.Namespace) -> tuple[Run, Reconstruct]:
    """The plain way in PyTorch: dense activations, fused Adam."""
    torch.manual_seed(0)
    W_dec = START * F.normalize(torch.randn(a.d_sae, x.shape[1], device=x.device), dim=-1)
    p = [W_dec.clone().requires_grad_(), torch.zeros(a.d_sae, device=x.device, requires_grad=True), W_dec.requires_grad_(),
         x[: a.batch].mean(0).clone().requires_grad_()]
    opt = torch.optim.Adam(p, lr=a.lr, fused=True)

    def forward(y: Tensor) -> Tensor:
        W_enc, b_enc, W_dec, b_dec = p
        values, index = F.linear(y - b_dec, W_enc, b_enc).topk(a.k, dim=-1)
        acts = torch.zeros(len(y), a.d_sae, device=y.device, dtype=values.dtype).scatter(-1, index, values.relu())
        return acts @ W_dec + b_dec

    def step(y: Tensor) -> None:
        with autocast(a.autocast, x.device.type):
            loss = (y - forward(y)).square().sum(-1).mean()
        opt.zero_grad()
        loss.backward()
        opt.step()

    return steps(step, x, a, [opt]), lambda y, _: forward(y)


def sparsify(x: Tensor, tokens: Tensor, a: argparse.Namespace) -> tuple[Run, Reconstruct]:
    """eai-sparsify's SparseCoder with the steps of its trainer (Adam; unit decoder norms), b_dec at the first batch's mean."""
    from sparsify import SparseCoder, SparseCoderConfig

    torch.manual_seed(0)
    sae = SparseCoder(x.shape[1], SparseCoderConfig(num_latents=a.d_sae, k=a.k), device=x.device)
    sae.b_dec.data = x[: a.batch].mean(0)
    opt = torch.optim.Adam(sae.parameters(), lr=a.lr, fused=True)

    def step(y: Tensor) -> None:
        sae.set_decoder_norm_to_unit_norm()
        with autocast(a.autocast, x.device.type):
            loss = sae(y).fvu
        opt.zero_grad()
        loss.backward()
        sae.remove_gradient_parallel_to_decoder_directions()
        opt.step()

    return steps(step, x, a, [opt]), lambda y, _: sae(y).sae_out


def saelens(x: Tensor, tokens: Tensor, a: argparse.Namespace) -> tuple[Run, Reconstruct]:
    """SAELens's SAETrainer.step on a TopKTrainingSAE; in fp32 on a GPU with its sparse activations (on a CPU they raise
    NotImplementedError in the backward pass)."""
    from sae_lens import LoggingConfig, TopKTrainingSAE, TopKTrainingSAEConfig
    from sae_lens.config import SAETrainerConfig
    from sae_lens.training.sae_trainer import SAETrainer

    torch.manual_seed(0)
    sae = TopKTrainingSAE(TopKTrainingSAEConfig(d_in=x.shape[1], d_sae=a.d_sae, k=a.k, device=str(x.device), dtype="float32",
                                                 use_sparse_activations=x.is_cuda and not a.autocast))
    sae.b_dec.data = x[: a.batch].mean(0)
    cfg = SAETrainerConfig(
        n_checkpoints=0, checkpoint_path=None, save_final_checkpoint=False, total_training_samples=a.steps * a.batch, device=str(x.device),
        autocast=a.autocast, lr=a.lr, lr_end=a.lr / 10, lr_scheduler_name="constant", lr_warm_up_steps=0, adam_beta1=0.9, adam_beta2=0.999,
        lr_decay_steps=0, n_restart_cycles=1, train_batch_size_samples=a.batch, dead_feature_window=1000, feature_sampling_window=2000,
        logger=LoggingConfig(log_to_wandb=False))
    trainer = SAETrainer(cfg=cfg, sae=sae, data_provider=iter(()))

    def step(y: Tensor) -> None:
        trainer.step(y)
        trainer.n_training_steps += 1

    return steps(step, x, a, [trainer.optimizer]), lambda y, _: sae(y)


def product(x: Tensor, tokens: Tensor, a: argparse.Namespace) -> tuple[Run, None]:
    """The encoder's matrix product alone in bf16, as torch.mm does it."""
    W, y = torch.randn(a.d_sae, x.shape[1], device=x.device).bfloat16().T, x[: a.batch].bfloat16()
    out = torch.empty(a.batch, a.d_sae, dtype=torch.bfloat16, device=x.device)
    return steps(lambda _: torch.mm(y, W, out=out), x, a, []), None


def synchronise(x: Tensor) -> None:
    if x.is_cuda:
        torch.cuda.synchronize()


def steps(step: Callable[[Tensor], None], x: Tensor, a: argparse.Namespace, opts: list[torch.optim.Optimizer]) -> Run:
    """All steps of a peer, each with its share of the learning rate."""

    def run(after: Callable[[], None]) -> None:
        for i, y in enumerate(x.split(a.batch)):
            for group in (g for o in opts for g in o.param_groups):
                group["lr"] = a.lr * cosine(i, a.steps)
            step(y)
            after()

    return run


def train_step(a: argparse.Namespace, device: str, measure: bool = True) -> dict:
    """Seconds of every step; held-out NMSE at the end and, with --curve, at a few steps on the way, outside of the time."""
    data = load_file(a.data)
    n = a.steps * a.batch
    if len(data["train"]) < n:
        raise ValueError(f"{a.data} holds {len(data['train'])} activations: {a.steps} steps of {a.batch} need more")
    x, heldout = data["train"][:n].float().to(device), data["heldout"].float().to(device)
    tokens, heldout_tokens = (data[f"{part}_tokens"].long().to(device).remainder(a.vocab)[:, None] for part in ("train", "heldout"))
    if a.system in IMPORTS:
        importlib.import_module(IMPORTS[a.system])
    del data
    start, times, curve = count_from_here(device), [], []
    run, reconstruct = SYSTEMS[a.system](x, tokens[:n], a)

    @torch.no_grad()
    def error() -> float | None:
        if reconstruct is None or not measure:
            return None
        parts = zip(heldout.split(1024), heldout_tokens.split(1024), strict=True)
        return tu.reconstruction_error(heldout, torch.cat([reconstruct(*part) for part in parts])).nmse

    marks = {round(a.steps ** (i / 7)) for i in range(1, 8)} if a.curve else set()
    since = time.perf_counter()

    def after() -> None:
        nonlocal since
        synchronise(x)
        times.append(time.perf_counter() - since)
        if len(times) in marks:
            curve.append({"tokens": len(times) * a.batch, "seconds": sum(times), "nmse": error()})
        since = time.perf_counter()

    run(after)
    return {"step_ms": late(times), "peak_gib": peak(start, device), "nmse": error(), "curve": curve}


def late(times: list[float]) -> float:
    """Median in ms; the first quarter warms up."""
    rest = sorted(times[len(times) // 4 :])
    return 1000 * rest[len(rest) // 2]


IMPORTS = {"sparsify": "sparsify", "saelens": "sae_lens"}
SYSTEMS = {**dict.fromkeys(TABLE, ours), "dense": dense, "sparsify": sparsify, "saelens": saelens, "encoder-product": product}
LAYER, CONTEXT, ROWS = 8, 256, 16


def gpt2_shape() -> torch.nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config()).eval().requires_grad_(False)


def harvest_ours(device: str) -> Forward:
    """LanguageModel.activations: the whole model, ended by a hook."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(Path(__file__).resolve().parent.parent / "testbed" / "model")
    lm = tu.LanguageModel(gpt2_shape().to(device), tokenizer, "gpt2-shape")
    return lambda ids: lm.activations(ids, [LAYER])[LAYER]


def harvest_raw(device: str) -> Forward:
    """The same model as transformers has it, cut to its first blocks, bf16, nothing hooked."""
    model = gpt2_shape().to(device).transformer
    model.h, model.ln_f = model.h[:LAYER], torch.nn.Identity()
    half = torch.device(device).type

    def forward(ids: Tensor) -> Tensor:
        with torch.autocast(half, torch.bfloat16):
            return model(input_ids=ids, use_cache=False).last_hidden_state

    return forward


def hooked_transformer(device: str) -> torch.nn.Module:
    from transformer_lens import HookedTransformer, HookedTransformerConfig

    cfg = HookedTransformerConfig(n_layers=12, d_model=768, n_ctx=1024, d_head=64, n_heads=12, d_mlp=3072, d_vocab=50257, act_fn="gelu_new",
                                  normalization_type="LN", device=device, seed=0)
    return HookedTransformer(cfg)


def harvest_cached(device: str) -> Forward:
    """TransformerLens's cached forward, ended one past the hook; fp32, as it is used."""
    model, name = hooked_transformer(device), f"blocks.{LAYER}.hook_resid_pre"
    return lambda ids: model.run_with_cache(ids, names_filter=name, stop_at_layer=LAYER + 1, return_cache_object=False)[1][name]


def harvest_stopped(device: str) -> Forward:
    """TransformerLens's forward that ends before the block and returns its input, under autocast: its fastest way."""
    model = hooked_transformer(device)

    def forward(ids: Tensor) -> Tensor:
        with autocast(True, torch.device(device).type):
            return model(ids, stop_at_layer=LAYER)

    return forward


HARVEST = {"ours": harvest_ours, "raw": harvest_raw, "transformerlens": harvest_cached, "transformerlens-stopped": harvest_stopped}


def harvest(a: argparse.Namespace, device: str) -> dict:
    forward, times, start = HARVEST[a.system](device), [], count_from_here(device)
    for i in range(a.steps):
        ids = torch.randint(50257, (ROWS, CONTEXT), generator=torch.Generator().manual_seed(i)).to(device)
        started = time.perf_counter()
        with torch.no_grad():
            found = forward(ids)
        synchronise(found)
        times.append(time.perf_counter() - started)
    if found.shape != (ROWS, CONTEXT, 768) or not torch.isfinite(found).all():
        raise RuntimeError(f"{a.system} gave {list(found.shape)}")
    return {"step_ms": late(times), "peak_gib": peak(start, device)}


def profile(a: argparse.Namespace, device: str) -> dict:
    """Where the time of a step goes: ms a step of every kind of operation, the operations it calls left out."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as profiler

    activities = [ProfilerActivity.CPU, *[ProfilerActivity.CUDA] * (device == "cuda")]
    with profiler(activities=activities) as seen:
        if a.data:
            train_step(a, device, measure=False)
        else:
            harvest(a, device)
    name = "self_device_time_total" if device == "cuda" else "self_cpu_time_total"
    total = {e.key: getattr(e, name) / 1000 / a.steps for e in seen.key_averages() if not e.key.startswith("ProfilerStep")}
    return {"ms": dict(sorted(total.items(), key=lambda item: -item[1])[:25])}


def size(what: str) -> float:
    """Resident memory of this process in GiB, as Linux tells it: VmRSS now, VmHWM at its greatest. NaN elsewhere: not measured."""
    if sys.platform != "linux":
        return math.nan
    return int(re.search(rf"{what}:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) / 2**20


def count_from_here(device: str) -> float:
    """Give freed memory back to the system and forget the greatest size so far; the size now, in GiB, for `peak`."""
    gc.collect()
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated() / 2**30
    if sys.platform == "linux":
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
    return size("VmRSS")


def peak(start: float, device: str) -> float:
    """GiB beyond `start` at the greatest since; on a GPU of what torch holds there."""
    return (torch.cuda.max_memory_allocated() / 2**30 if device == "cuda" else size("VmHWM")) - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", choices=["train_step", "harvest", "profile"])
    parser.add_argument("system", choices=sorted({*SYSTEMS, *HARVEST}))
    parser.add_argument("data", type=Path, nargs="?", help="safetensors with train, heldout and their tokens (train_step)")
    for name, default in (("d-sae", 12288), ("k", 32), ("batch", 4096), ("steps", 12), ("threads", 0), ("vocab", 50257), ("saes", 1)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--lr", type=float, default=4e-3)
    parser.add_argument("--autocast", action="store_true")
    parser.add_argument("--curve", action="store_true")
    a = parser.parse_args()
    if a.threads:
        torch.set_num_threads(a.threads)
    tu.keep_freed_memory()
    found = {"train_step": train_step, "harvest": harvest, "profile": profile}[a.work](a, "cuda" if torch.cuda.is_available() else "cpu")
    print(json.dumps({**found, "torch": torch.__version__}))


if __name__ == "__main__":
    main()
