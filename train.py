"""Train one TSAE (or, without --lookup, one SAE) from the command line, on one process or many.

    python train.py --model gpt2 --corpus allenai/c4:en --layer 8 --k 32 --lookup --out my_tsae
    torchrun --standalone --nproc-per-node 4 train.py --model gpt2 --corpus allenai/c4:en --layer 8 --k 32 --lookup --out my_tsae

Writes a folder that tsae_utils.load and SAELens read. Stopped or killed, the same command goes on from the last checkpoint
(<out>.checkpoint.safetensors). With torchrun every process reads its own documents; --batch-size is that of all together.
"""

from __future__ import annotations

import argparse
import os
import sys
from itertools import islice
from pathlib import Path

import torch

import tsae_utils as tu


class Formatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Defaults in the help, the description as it is written."""


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=Formatter)
    add = parser.add_argument
    add("--model", required=True, help="hub id or local Hugging Face folder")
    add("--corpus", required=True, help='.txt, .jsonl or .parquet file, a folder of them, or a hub id ("name:configuration")')
    add("--out", required=True, type=Path, help="folder to write")
    add("--layer", type=int, help="block whose input is modelled; without it two thirds of the way")
    add("--lookup", action="store_true", help="add the token table: this makes it a TSAE")
    add("--activation", choices=tu.ACTIVATIONS, default="topk")
    add("--k", type=int, default=32, help="active features a token (topk, batchtopk)")
    add("--l1", type=float, default=8.0, help="L1 coefficient (relu, gated)")
    add("--start-l0", type=float, default=64.0, help="features active a token at the start (relu, gated); 0: biases start at zero")
    add("--expansion", type=int, default=16, help="features: this times the model's width")
    add("--tokens", type=float, default=2e6, help="activations to train on")
    add("--context-size", type=int, default=256, help="tokens a row, BOS included")
    add("--batch-size", type=int, default=4096, help="activations a step")
    add("--buffer-tokens", type=int, default=2**17, help="activations shuffled together, in each process")
    add("--lr", type=float, default=4e-3, help="Adam's, for the features; falls to zero over the run")
    add("--lr-lookup", type=float, default=1e-2, help="learning rate of the table")
    add("--lookup-by-rows", action="store_true", help="update only the rows of a batch's tokens (SparseAdam): for large vocabularies")
    add("--table-scale", type=float, default=0.5, help="rows start at this times the unigram activation; the encoder at 1 minus it")
    add("--decoder-init-norm", type=float, default=1.0, help="norm at which the decoder's rows start, and with them the encoder's")
    add("--aux-k", type=int, default=0, help="dead features that model the error (AuxK); 0: none")
    add("--seed", type=int, default=0, help="of initialisation and order of the text")
    add("--heldout-rows", type=int, default=64, help="rows kept for the measurement at the end")
    add("--checkpoint-every", type=float, help="tokens; without it a fiftieth of the run, at least a million")
    add("--device", help="cuda, mps or cpu; without it the best there is")
    args = parser.parse_args()
    for name, least in (("tokens", 1), ("context_size", 2), ("batch_size", 1), ("expansion", 1), ("heldout_rows", 1), ("k", 1)):
        if not least <= getattr(args, name) < 1e15:
            parser.error(f"--{name.replace('_', '-')} {getattr(args, name)} must be at least {least}")
    return args


def main() -> None:
    args = arguments()
    world, rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
    if args.batch_size % world:
        raise ValueError(f"--batch-size {args.batch_size} does not divide among {world} processes")
    if world > 1:
        cuda = args.device != "cpu" and torch.cuda.is_available()
        args.device = f"cuda:{os.environ['LOCAL_RANK']}" if cuda else "cpu"
        if cuda:
            torch.cuda.set_device(args.device)
    checkpoint = args.out.resolve().with_name(args.out.resolve().name + ".checkpoint.safetensors")
    if tu.refuse_other_files(args.out).exists() and not checkpoint.exists():
        raise FileExistsError(f"{args.out} holds an SAE already: delete it or choose another --out")
    args.out.resolve().parent.mkdir(parents=True, exist_ok=True)
    if not os.access(checkpoint.parent, os.W_OK):
        raise PermissionError(f"cannot write in {checkpoint.parent}: choose another --out")
    every = args.checkpoint_every or max(1e6, args.tokens / 50)
    tu.keep_freed_memory()
    lm = tu.load_lm(args.model, args.device)
    hook = f"blocks.{lm.n_layers * 2 // 3 if args.layer is None else args.layer}.hook_resid_pre"
    tu.parse_hook(hook, lm.n_layers)
    longest = getattr(lm.model.config, "max_position_embeddings", args.context_size)
    if args.context_size > longest:
        raise ValueError(f"--context-size {args.context_size} is beyond the model's {longest} positions")
    cfg = tu.TSAEConfig(d_in=lm.d_model, d_sae=args.expansion * lm.d_model, activation=args.activation, k=args.k, seed=args.seed,
                        l1_coefficient=args.l1 if args.activation in ("relu", "gated") else 0.0,
                        encoder_scale=1 - args.table_scale if args.lookup else 1.0, decoder_init_norm=args.decoder_init_norm,
                        model_name=args.model, hook_name=hook, context_size=args.context_size)
    how = tu.TrainConfig(tokens=int(args.tokens), lr=args.lr, lr_lookup=args.lr_lookup, aux_k=args.aux_k, start_l0=args.start_l0,
                         lookup_by_rows=args.lookup_by_rows)
    wanted = args.tokens / world + (args.heldout_rows + 2) * args.context_size
    rows = tu.token_rows(islice(tu.read_documents(args.corpus), rank, None, world), lm, args.context_size, wanted, progress=rank == 0)
    if len(rows) < args.heldout_rows + 2:
        raise ValueError(f"{args.corpus} gives {len(rows)} rows of {args.context_size} tokens to each process: "
                         f"with {args.heldout_rows} held out none are left to train on")
    heldout, rows = rows[len(rows) - args.heldout_rows :], rows[: len(rows) - args.heldout_rows - 1]  # the row between may share a document
    stream = tu.ActivationStream(lm, rows, hook, args.batch_size // world, args.buffer_tokens, args.seed)
    table = tu.TokenLookup(args.table_scale * tu.unigram_activations(lm, hook, progress=rank == 0)) if args.lookup else None
    sae = tu.TSAE(cfg, table).to(lm.device)
    if rank == 0:
        size = sum(p.numel() for p in sae.parameters())
        print(f"{args.model}, {hook}: {cfg.d_sae:,} features, {size / 1e6:.1f}M parameters, {size / 2**26:.2f} GiB with gradients and Adam")
        seen = args.tokens / world / rows.numel()
        print(f"{rows.numel():,} tokens of training text in each of {world} process(es), seen {seen:.1f} times")
        if checkpoint.exists():
            print(f"going on from {checkpoint}")
    if world > 1:  # after all imports: modules imported in a process group keep it alive, with threads that can abort the exit
        torch.distributed.init_process_group("nccl" if cuda else "gloo")
    try:
        history = tu.train({"sae": sae}, stream, how, progress=rank == 0, checkpoint=checkpoint,
                           checkpoint_every=int(every))
    except KeyboardInterrupt:
        where = f"the same command goes on from {checkpoint}" if checkpoint.exists() else "there is no checkpoint yet"
        raise SystemExit(f"stopped: {where}") from None
    if rank == 0:
        metrics = tu.Evaluator(lm, heldout, hook)(sae)
        last = {k: v for k, v in history[-1].items() if k != "system"}
        tu.save(sae, args.out, {"training": {**last, "lr": args.lr, "lr_lookup": args.lr_lookup}, "heldout": metrics})
        checkpoint.unlink(missing_ok=True)
        shown = "; ".join(f"{name} {metrics[name]:.4g}" for name in ("l0", "nmse", "fvu", "ce_added"))
        print(f"{shown}; dead {last['dead_fraction']:.1%}; saved in {args.out}")
    if world > 1:
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError, FloatingPointError) as error:  # these say what is wrong and how to mend it
        sys.exit(f"train.py: {error}")
