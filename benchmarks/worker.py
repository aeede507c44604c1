"""One measurement in a process of its own: prints one line of JSON.

    python benchmarks/worker.py train_step ours data.safetensors --d-sae 12288 --k 32 --steps 12
    python benchmarks/worker.py harvest ours --steps 6

It runs in our environment, or in that of the peers (.venv-peers). The latter does not install this
package: bench.py, which starts the processes, puts the repository root on PYTHONPATH.

train_step: every system trains a TopK SAE on the same batches in the same order. It uses Adam and
otherwise trains as its library does. The held-out activations and the formula of the error are the
same for all. glibc keeps freed memory for every system, as it does in our training. We report peak
memory above the baseline after loading libraries and data (on a GPU: of what torch allocates).

harvest: the residual stream entering block 8 of a model of GPT-2 small's shape with random weights,
for rows of random tokens. No two batches are the same.
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

import tsae_utils as tu

ROOT = Path(__file__).resolve().parent.parent
Reconstruct = Callable[[Tensor, Tensor], Tensor]  # held-out activations and their tokens
Forward = Callable[[Tensor], Tensor]  # token ids to activations
Run = Callable[[Callable[[], None]], None]  # takes every step and calls back after each
# Our systems: None without a table, else whether only the batch's rows of the table are updated.
TABLE = {
    "ours": None,
    "ours, unit start": None,
    "ours+table": False,
    "ours+table by rows": True,
}
# SAELens starts the rows of decoder and encoder at this norm; so do ours and plain PyTorch.
START = 0.1
LAYER, CONTEXT, ROWS, VOCAB, D_MODEL = 8, 256, 16, 50257, 768  # harvest
KINDS_OF_OPERATION = 25  # the longest ones, in a profile

# -- training steps --


def cosine(step: int, steps: int) -> float:
    """Every system's learning rate falls to zero over its run, as ours does."""
    return 0.5 * (1 + math.cos(math.pi * step / steps))


def autocast(on: bool, device: str) -> contextlib.AbstractContextManager:
    return torch.autocast(device, torch.bfloat16) if on else contextlib.nullcontext()


def synchronize(x: Tensor) -> None:
    if x.is_cuda:
        torch.cuda.synchronize()


def take_steps(
    step: Callable[[Tensor], None],
    x: Tensor,
    args: argparse.Namespace,
    optimizers: list[torch.optim.Optimizer],
) -> Run:
    """All steps of a peer, each with its share of the learning rate."""

    def run(after: Callable[[], None]) -> None:
        for i, batch in enumerate(x.split(args.batch)):
            for optimizer in optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = args.lr * cosine(i, args.steps)
            step(batch)
            after()

    return run


def ours(x: Tensor, tokens: Tensor, args: argparse.Namespace) -> tuple[Run, Reconstruct]:
    """tsae_utils.train itself on a stream of ready batches; a table starts at zero."""
    by_rows, d_in, saes = TABLE[args.system], x.shape[1], {}
    for i in range(args.saes):
        table = None if by_rows is None else tu.TokenLookup(torch.zeros(args.vocab, d_in))
        norm = 1.0 if args.system == "ours, unit start" else START
        cfg = tu.TSAEConfig(d_in, args.d_sae, k=args.k, seed=i, decoder_init_norm=norm)
        saes[str(i)] = tu.TSAE(cfg, table).to(x.device)
    n_tokens = args.steps * args.batch
    train_cfg = tu.TrainConfig(tokens=n_tokens, lr=args.lr, lookup_by_rows=bool(by_rows))

    class Stream:
        batch_size = args.batch

        def __iter__(self):
            yield from zip(x.split(args.batch), tokens.split(args.batch), strict=True)

    def run(after: Callable[[], None]) -> None:
        tu.train(saes, Stream(), train_cfg, progress=False, after_step=lambda _: after())

    def reconstruct(y: Tensor, y_tokens: Tensor) -> Tensor:
        sae = saes["0"]
        was_training = sae.training
        sae.eval()  # fp32, as outside of training
        x_hat = sae(y, y_tokens).x_hat
        sae.train(was_training)
        return x_hat

    return run, reconstruct


def dense(x: Tensor, tokens: Tensor, args: argparse.Namespace) -> tuple[Run, Reconstruct]:
    """The plain way in PyTorch: dense activations, fused Adam."""
    torch.manual_seed(0)
    d_sae = args.d_sae
    W_dec = START * F.normalize(torch.randn(d_sae, x.shape[1], device=x.device), dim=-1)
    W_enc = W_dec.clone().requires_grad_()
    b_enc = torch.zeros(d_sae, device=x.device, requires_grad=True)
    b_dec = x[: args.batch].mean(0).clone().requires_grad_()
    W_dec.requires_grad_()
    optimizer = torch.optim.Adam([W_enc, b_enc, W_dec, b_dec], lr=args.lr, fused=True)

    def forward(y: Tensor) -> Tensor:
        values, index = F.linear(y - b_dec, W_enc, b_enc).topk(args.k, dim=-1)
        zeros = torch.zeros(len(y), d_sae, device=y.device, dtype=values.dtype)
        return zeros.scatter(-1, index, values.relu()) @ W_dec + b_dec

    def step(y: Tensor) -> None:
        with autocast(args.autocast, x.device.type):
            loss = (y - forward(y)).square().sum(-1).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return take_steps(step, x, args, [optimizer]), lambda y, _: forward(y)


def sparsify(x: Tensor, tokens: Tensor, args: argparse.Namespace) -> tuple[Run, Reconstruct]:
    """eai-sparsify's SparseCoder with the steps of its trainer: Adam, unit decoder norms.

    b_dec starts at the mean of the first batch.
    """
    from sparsify import SparseCoder, SparseCoderConfig

    torch.manual_seed(0)
    cfg = SparseCoderConfig(num_latents=args.d_sae, k=args.k)
    sae = SparseCoder(x.shape[1], cfg, device=x.device)
    sae.b_dec.data = x[: args.batch].mean(0)
    optimizer = torch.optim.Adam(sae.parameters(), lr=args.lr, fused=True)

    def step(y: Tensor) -> None:
        sae.set_decoder_norm_to_unit_norm()
        with autocast(args.autocast, x.device.type):
            loss = sae(y).fvu
        optimizer.zero_grad()
        loss.backward()
        sae.remove_gradient_parallel_to_decoder_directions()
        optimizer.step()

    return take_steps(step, x, args, [optimizer]), lambda y, _: sae(y).sae_out


def saelens(x: Tensor, tokens: Tensor, args: argparse.Namespace) -> tuple[Run, Reconstruct]:
    """SAELens's SAETrainer.step on a TopKTrainingSAE.

    In fp32 on a GPU it uses sparse activations; on a CPU their backward pass raises
    NotImplementedError.
    """
    from sae_lens import LoggingConfig, TopKTrainingSAE, TopKTrainingSAEConfig
    from sae_lens.config import SAETrainerConfig
    from sae_lens.training.sae_trainer import SAETrainer

    torch.manual_seed(0)
    sae_cfg = TopKTrainingSAEConfig(
        d_in=x.shape[1],
        d_sae=args.d_sae,
        k=args.k,
        device=str(x.device),
        dtype="float32",
        use_sparse_activations=x.is_cuda and not args.autocast,
    )
    sae = TopKTrainingSAE(sae_cfg)
    sae.b_dec.data = x[: args.batch].mean(0)
    cfg = SAETrainerConfig(
        n_checkpoints=0,
        checkpoint_path=None,
        save_final_checkpoint=False,
        total_training_samples=args.steps * args.batch,
        device=str(x.device),
        autocast=args.autocast,
        lr=args.lr,
        lr_end=args.lr / 10,
        lr_scheduler_name="constant",
        lr_warm_up_steps=0,
        adam_beta1=0.9,
        adam_beta2=0.999,
        lr_decay_steps=0,
        n_restart_cycles=1,
        train_batch_size_samples=args.batch,
        dead_feature_window=1000,
        feature_sampling_window=2000,
        logger=LoggingConfig(log_to_wandb=False),
    )
    trainer = SAETrainer(cfg=cfg, sae=sae, data_provider=iter(()))

    def step(y: Tensor) -> None:
        trainer.step(y)
        trainer.n_training_steps += 1

    return take_steps(step, x, args, [trainer.optimizer]), lambda y, _: sae(y)


def encoder_product(x: Tensor, tokens: Tensor, args: argparse.Namespace) -> tuple[Run, None]:
    """The encoder's matrix product alone in bf16, by torch.mm."""
    W = torch.randn(args.d_sae, x.shape[1], device=x.device).bfloat16().T
    first_batch = x[: args.batch].bfloat16()
    out = torch.empty(args.batch, args.d_sae, dtype=torch.bfloat16, device=x.device)
    return take_steps(lambda _: torch.mm(first_batch, W, out=out), x, args, []), None


IMPORTS = {"sparsify": "sparsify", "saelens": "sae_lens"}
SYSTEMS = {
    **dict.fromkeys(TABLE, ours),
    "dense": dense,
    "sparsify": sparsify,
    "saelens": saelens,
    "encoder-product": encoder_product,
}


def train_step(args: argparse.Namespace, device: str, measure: bool = True) -> dict:
    """Seconds of every step, and the held-out NMSE at the end.

    With --curve the NMSE is also measured after a few steps; the time does not include that.
    Raises ValueError where the file holds too few activations.
    """
    data = load_file(args.data)
    n = args.steps * args.batch
    if len(data["train"]) < n:
        raise ValueError(
            f"{args.data} holds {len(data['train'])} activations: "
            f"{args.steps} steps of {args.batch} need more"
        )
    x, heldout = data["train"][:n].float().to(device), data["heldout"].float().to(device)
    tokens, heldout_tokens = (
        data[f"{part}_tokens"].long().to(device).remainder(args.vocab)[:, None]
        for part in ("train", "heldout")
    )
    if args.system in IMPORTS:
        importlib.import_module(IMPORTS[args.system])
    del data
    start, times, curve = start_memory_count(device), [], []
    run, reconstruct = SYSTEMS[args.system](x, tokens[:n], args)

    @torch.no_grad()
    def error() -> float | None:
        if reconstruct is None or not measure:
            return None
        parts = zip(heldout.split(1024), heldout_tokens.split(1024), strict=True)
        x_hat = torch.cat([reconstruct(*part) for part in parts])
        return tu.reconstruction_error(heldout, x_hat).nmse

    marks = {round(args.steps ** (i / 7)) for i in range(1, 8)} if args.curve else set()
    since = time.perf_counter()

    def after() -> None:
        nonlocal since
        synchronize(x)
        times.append(time.perf_counter() - since)
        done = len(times)
        if done in marks:
            row = {"tokens": done * args.batch, "seconds": sum(times), "nmse": error()}
            curve.append(row)
        since = time.perf_counter()

    run(after)
    peak = peak_memory(start, device)
    return {"step_ms": late_median(times), "peak_gib": peak, "nmse": error(), "curve": curve}


def late_median(times: list[float]) -> float:
    """Median in ms without the first quarter, which warms up."""
    late = sorted(times[len(times) // 4 :])
    return 1000 * late[len(late) // 2]


# -- harvest --


def gpt2_shape() -> torch.nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config()).eval().requires_grad_(False)


def harvest_ours(device: str) -> Forward:
    """LanguageModel.activations: the whole model, ended by a hook."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(ROOT / "testbed" / "model")
    lm = tu.LanguageModel(gpt2_shape().to(device), tokenizer, "gpt2-shape")
    return lambda ids: lm.activations(ids, [LAYER])[LAYER]


def harvest_raw(device: str) -> Forward:
    """The same model of transformers, cut to its first blocks, in bf16 and without hooks."""
    model = gpt2_shape().to(device).transformer
    model.h, model.ln_f = model.h[:LAYER], torch.nn.Identity()

    def forward(ids: Tensor) -> Tensor:
        with autocast(True, torch.device(device).type):
            return model(input_ids=ids, use_cache=False).last_hidden_state

    return forward


def hooked_transformer(device: str) -> torch.nn.Module:
    from transformer_lens import HookedTransformer, HookedTransformerConfig

    cfg = HookedTransformerConfig(
        n_layers=12,
        d_model=D_MODEL,
        n_ctx=1024,
        d_head=64,
        n_heads=12,
        d_mlp=3072,
        d_vocab=VOCAB,
        act_fn="gelu_new",
        normalization_type="LN",
        device=device,
        seed=0,
    )
    return HookedTransformer(cfg)


def harvest_cached(device: str) -> Forward:
    """TransformerLens's cached forward pass, ended one block after the hook; fp32, its default."""
    model, name = hooked_transformer(device), f"blocks.{LAYER}.hook_resid_pre"
    options = {"names_filter": name, "stop_at_layer": LAYER + 1, "return_cache_object": False}
    return lambda ids: model.run_with_cache(ids, **options)[1][name]


def harvest_stopped(device: str) -> Forward:
    """TransformerLens's forward pass that ends before the block and returns its input.

    Under autocast, this is its fastest way.
    """
    model = hooked_transformer(device)

    def forward(ids: Tensor) -> Tensor:
        with autocast(True, torch.device(device).type):
            return model(ids, stop_at_layer=LAYER)

    return forward


HARVEST = {
    "ours": harvest_ours,
    "raw": harvest_raw,
    "transformerlens": harvest_cached,
    "transformerlens-stopped": harvest_stopped,
}


def harvest(args: argparse.Namespace, device: str) -> dict:
    """Seconds of every pass. Raises RuntimeError for activations that cannot be right."""
    forward = HARVEST[args.system](device)
    times, start = [], start_memory_count(device)
    for i in range(args.steps):
        generator = torch.Generator().manual_seed(i)
        ids = torch.randint(VOCAB, (ROWS, CONTEXT), generator=generator).to(device)
        started = time.perf_counter()
        with torch.no_grad():
            activations = forward(ids)
        synchronize(activations)
        times.append(time.perf_counter() - started)
    expected = (ROWS, CONTEXT, D_MODEL)
    if activations.shape != expected or not torch.isfinite(activations).all():
        raise RuntimeError(f"{args.system} gave {list(activations.shape)}")
    return {"step_ms": late_median(times), "peak_gib": peak_memory(start, device)}


# -- profile --


def profile(args: argparse.Namespace, device: str) -> dict:
    """ms per step of every kind of operation, without the operations that it calls."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as profiler

    activities = [ProfilerActivity.CPU]
    if device == "cuda":
        activities.append(ProfilerActivity.CUDA)
    with profiler(activities=activities) as seen:
        if args.data:
            train_step(args, device, measure=False)
        else:
            harvest(args, device)
    name = "self_device_time_total" if device == "cuda" else "self_cpu_time_total"
    ms = {
        event.key: getattr(event, name) / 1000 / args.steps
        for event in seen.key_averages()
        if not event.key.startswith("ProfilerStep")
    }
    longest = sorted(ms.items(), key=lambda item: -item[1])[:KINDS_OF_OPERATION]
    return {"ms": dict(longest)}


# -- memory --


def resident_gib(field: str) -> float:
    """Resident memory of this process by Linux's account: VmRSS now, VmHWM at its peak.

    NaN on other systems, where it is not measured.
    """
    if sys.platform != "linux":
        return math.nan
    status = Path("/proc/self/status").read_text()
    return int(re.search(rf"{field}:\s+(\d+) kB", status)[1]) / 2**20


def start_memory_count(device: str) -> float:
    """Return freed memory to the system and forget the peak so far; the memory now, in GiB."""
    gc.collect()
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated() / 2**30
    if sys.platform == "linux":
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
    return resident_gib("VmRSS")


def peak_memory(start: float, device: str) -> float:
    """Peak since `start_memory_count`, above what it returned, in GiB."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated() / 2**30 - start
    return resident_gib("VmHWM") - start


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("work", choices=["train_step", "harvest", "profile"])
    add("system", choices=sorted({*SYSTEMS, *HARVEST}))
    add("data", type=Path, nargs="?", help="safetensors: train, heldout and their tokens")
    add("--d-sae", type=int, default=12288)
    add("--k", type=int, default=32)
    add("--batch", type=int, default=4096)
    add("--steps", type=int, default=12)
    add("--threads", type=int, default=0)
    add("--vocab", type=int, default=VOCAB)
    add("--saes", type=int, default=1)
    add("--lr", type=float, default=4e-3)
    add("--autocast", action="store_true")
    add("--curve", action="store_true")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    tu.keep_freed_memory()
    work = {"train_step": train_step, "harvest": harvest, "profile": profile}[args.work]
    result = work(args, "cuda" if torch.cuda.is_available() else "cpu")
    print(json.dumps({**result, "torch": torch.__version__}))


if __name__ == "__main__":
    main()
