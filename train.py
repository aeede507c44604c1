"""Train one TSAE, or without --lookup one SAE, from the command line.

    python train.py --model gpt2 --corpus allenai/c4:en --layer 8 --k 32 --lookup --out my_tsae
    torchrun --standalone --nproc-per-node 4 train.py --model gpt2 --corpus ... --out my_tsae

Writes a folder that tsae_utils.load and SAELens read, and the training's history beside it as
<out>.history.csv. The same command resumes a stopped or killed run from its last checkpoint,
<out>.checkpoint.safetensors. Under torchrun every process reads its own documents, and
--batch-size counts the tokens of all processes together.
"""

from __future__ import annotations

import argparse
import csv
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path

import torch

import tsae_utils as tu


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Shows defaults, and the description as it is written."""


def arguments() -> argparse.Namespace:
    """The command line. Exits with a sentence for numbers that cannot work."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    add = parser.add_argument
    add("--model", required=True, help="hub id or local Hugging Face folder")
    add(
        "--corpus", required=True, help="text file, folder of files, or hub id (name:configuration)"
    )
    add("--text-column", default="text", help="column of the corpus that holds the text")
    add("--resume-text", action="store_true", help="go on with the text that was read before its "
        "source broke off, kept in <out>.text.safetensors")  # fmt: skip
    add("--out", required=True, type=Path, help="folder to write")
    place = parser.add_mutually_exclusive_group()
    place.add_argument("--layer", type=int, help="block whose input is modelled; default: two "
        "thirds of the way")  # fmt: skip
    place.add_argument("--hook", help="hook point by name, such as blocks.4.hook_mlp_out")
    add("--lookup", action="store_true", help="add the token table, which makes it a TSAE")
    add("--activation", choices=tu.ACTIVATIONS, default="topk")
    add("--k", type=int, default=32, help="active features per token (topk, batchtopk)")
    add("--l1", type=float, default=8.0, help="L1 coefficient (relu, gated)")
    add("--start-l0", type=float, default=64.0, help="features active per token at the start "
        "(relu, gated); 0: biases start at zero")  # fmt: skip
    add("--expansion", type=int, default=16, help="features, in multiples of the model's width")
    add("--tokens", type=float, default=2e6, help="activations to train on")
    add("--context-size", type=int, default=256, help="tokens per row, BOS included")
    add("--batch-size", type=int, default=4096, help="activations per step")
    add("--buffer-tokens", type=int, default=2**17, help="activations shuffled together")
    add("--lr", type=float, default=4e-3, help="learning rate of the features; it falls to zero")
    add("--lr-lookup", type=float, default=1e-2, help="learning rate of the table")
    add("--lookup-by-rows", action="store_true", help="update only the rows of a batch's tokens "
        "(SparseAdam), for large vocabularies")  # fmt: skip
    add("--subtract-lookup", action="store_true", help="the encoder sees activations minus their "
        "tokens' rows, which is not the paper's form")  # fmt: skip
    add("--table-start", default="auto", choices=("auto", *tu.STARTS), help="where rows start: "
        "tsae_utils.table_start")  # fmt: skip
    add("--table-scale", type=float, help="times this; the encoder starts at 1 minus it. Default: "
        "0.5, and 1 with an encoder at 1 for --subtract-lookup")  # fmt: skip
    add("--max-norm-ratio", type=float, default=10.0, help="activations above this multiple of "
        "the median norm are left out; inf: none")  # fmt: skip
    add("--decoder-init-norm", type=float, default=1.0, help="norm at which decoder rows start")
    add("--aux-k", type=int, default=0, help="dead features that model the error (AuxK); 0: none")
    add("--seed", type=int, default=0, help="of the initialisation and the order of the text")
    add("--heldout-rows", type=int, default=64, help="rows kept for the measurement at the end")
    add("--checkpoint-every", type=float, help="tokens between checkpoints; default: a fiftieth "
        "of the run, at least a million")  # fmt: skip
    add("--plot", action="store_true", help="draw the history as <out>.history.png")
    add("--device", help="cuda, mps or cpu; default: the best there is")
    args = parser.parse_args()
    if args.subtract_lookup and not args.lookup:
        parser.error("--subtract-lookup needs --lookup")
    if args.table_scale is None:
        args.table_scale = 1.0 if args.subtract_lookup else 0.5
    for name in ("tokens", "context_size", "batch_size", "expansion", "heldout_rows", "k"):
        least = 2 if name == "context_size" else 1
        if not least <= getattr(args, name) < 1e15:
            option = f"--{name.replace('_', '-')}"
            parser.error(f"{option} {getattr(args, name)} must be at least {least}")
    return args


def choose_device(args: argparse.Namespace, world: int) -> None:
    """Under torchrun each process takes its own GPU, or the CPU."""
    if world == 1:
        return
    args.device = "cpu" if args.device == "cpu" or not torch.cuda.is_available() else "cuda"
    if args.device == "cuda":
        args.device = f"cuda:{os.environ['LOCAL_RANK']}"
        torch.cuda.set_device(args.device)


def beside(out: Path, ending: str) -> Path:
    """The path of a file beside the output folder, which may be a link or "."."""
    place = out.expanduser().resolve()
    return place.with_name(place.name + ending)


def prepare_output(out: Path) -> Path:
    """The checkpoint's path. Raises OSError where the output cannot or must not be written."""
    place, checkpoint = tu.refuse_other_files(out), beside(out, ".checkpoint.safetensors")
    if (place / "cfg.json").exists() and not checkpoint.exists():
        raise FileExistsError(f"{out} holds an SAE already: delete it or choose another --out")
    place.parent.mkdir(parents=True, exist_ok=True)
    if not os.access(place.parent, os.W_OK):
        raise PermissionError(f"cannot write in {place.parent}: choose another --out")
    return checkpoint


def choose_hook(args: argparse.Namespace, lm: tu.LanguageModel) -> str:
    """Name of the hook point. Raises ValueError for a place or context the model does not have."""
    layer = lm.n_layers * 2 // 3 if args.layer is None else args.layer
    hook = args.hook or f"blocks.{layer}.hook_resid_pre"
    lm.require_hook(hook)
    if lm.max_context and args.context_size > lm.max_context:
        raise ValueError(
            f"--context-size {args.context_size} is beyond the model's {lm.max_context} positions"
        )
    return hook


def configurations(
    args: argparse.Namespace, lm: tu.LanguageModel, hook: str
) -> tuple[tu.TSAEConfig, tu.TrainConfig]:
    """What is trained, and how."""
    is_penalised = args.activation in ("relu", "gated")
    sae = tu.TSAEConfig(
        d_in=lm.d_model,
        d_sae=args.expansion * lm.d_model,
        activation=args.activation,
        k=args.k,
        seed=args.seed,
        l1_coefficient=args.l1 if is_penalised else 0.0,
        subtract_lookup=args.subtract_lookup,
        encoder_scale=1 - args.table_scale if args.lookup and not args.subtract_lookup else 1.0,
        decoder_init_norm=args.decoder_init_norm,
        model_name=args.model,
        hook_name=hook,
        context_size=args.context_size,
    )
    training = tu.TrainConfig(
        tokens=int(args.tokens),
        lr=args.lr,
        lr_lookup=args.lr_lookup,
        aux_k=args.aux_k,
        start_l0=args.start_l0,
        lookup_by_rows=args.lookup_by_rows,
    )
    return sae, training


def read_rows(
    args: argparse.Namespace, lm: tu.LanguageModel, rank: int, world: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """(Training rows, held-out rows) of this process. Raises ValueError for too little text."""
    wanted = args.tokens / world + (args.heldout_rows + 2) * args.context_size
    documents = tu.read_documents(args.corpus, args.text_column)
    part = "" if world == 1 else f".{rank}"
    rows = tu.token_rows(
        islice(documents, rank, None, world),
        lm,
        args.context_size,
        wanted,
        progress=rank == 0,
        partial=beside(args.out, f".text{part}.safetensors"),
        resume=args.resume_text,
    )
    n = len(rows) - args.heldout_rows
    if n < 2:
        raise ValueError(
            f"{args.corpus} gives {len(rows)} rows of {args.context_size} tokens to each process: "
            f"with {args.heldout_rows} held out none are left to train on"
        )
    return rows[: n - 1], rows[n:]  # the row between may share a document with both


def describe(
    args: argparse.Namespace, sae: tu.TSAE, rows: torch.Tensor, world: int, checkpoint: Path
) -> None:
    """Print sizes before anything expensive starts."""
    size = sum(p.numel() for p in sae.parameters())
    print(
        f"{args.model}, {sae.cfg.hook_name}: {sae.cfg.d_sae:,} features, {size / 1e6:.1f}M "
        f"parameters, {size / 2**26:.2f} GiB with gradients and Adam"
    )
    epochs = args.tokens / world / rows.numel()
    text = f"{rows.numel():,} tokens of training text"
    print(f"{text} in each of {world} process(es), seen {epochs:.1f} times")
    if checkpoint.exists():
        print(f"resuming from {checkpoint}")


@contextmanager
def recorded(args: argparse.Namespace, rank: int) -> Iterator[list[dict]]:
    """A list for the training's history, which is written when the training ends or breaks off."""
    history: list[dict] = []
    try:
        yield history
    finally:
        if rank == 0 and history:
            with open(beside(args.out, ".history.csv"), "w", newline="") as file:
                writer = csv.DictWriter(file, list(history[0]), lineterminator="\n")
                writer.writeheader()
                writer.writerows(history)
            if args.plot:
                plot(history, beside(args.out, ".history.png"))


def plot(history: list[dict], path: Path) -> None:
    """Loss, NMSE, L0 and dead features over the tokens seen."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    labels = {
        "loss": "loss (log scale)",
        "nmse": "NMSE (log scale)",
        "l0": "active features per token",
        "dead_fraction": "share of dead features",
    }
    for axes, (name, label) in zip(figure.subplots(2, 2).flat, labels.items(), strict=True):
        axes.plot([row["tokens"] / 1e6 for row in history], [row[name] for row in history])
        axes.set(xlabel="million tokens seen", title=label)
        if "log" in label:
            axes.set_yscale("log")
            axes.yaxis.set_major_formatter("{x:g}")
            axes.yaxis.set_minor_formatter(lambda y, _: f"{y:g}" if f"{y:e}"[0] in "25" else "")
        else:
            axes.set_ylim(bottom=0)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)


def save_and_measure(
    args: argparse.Namespace, sae: tu.TSAE, evaluator: tu.Evaluator, last: dict
) -> None:
    """Write the folder, then its held-out numbers, and print them."""
    training = {key: value for key, value in last.items() if key != "system"}
    training |= {"lr": args.lr, "lr_lookup": args.lr_lookup}
    tu.save(sae, args.out, {"training": training})
    try:
        metrics = evaluator(sae)
        tu.save(sae, args.out, {"training": training, "heldout": metrics})
    except Exception:
        print(
            f"{args.out} holds the trained SAE, but its measurement failed; the same command "
            "measures it again",
            file=sys.stderr,
        )
        raise
    shown = "; ".join(f"{name} {metrics[name]:.4g}" for name in ("l0", "nmse", "fvu", "ce_added"))
    print(f"{shown}; dead {last['dead_fraction']:.1%}; saved in {args.out}")


def main() -> None:
    args = arguments()
    world, rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
    if args.batch_size % world:
        raise ValueError(
            f"--batch-size {args.batch_size} must be a multiple of the {world} processes"
        )
    choose_device(args, world)
    checkpoint = prepare_output(args.out)
    tu.keep_freed_memory()
    lm = tu.load_lm(args.model, args.device)
    hook = choose_hook(args, lm)
    cfg, training = configurations(args, lm, hook)
    rows, heldout = read_rows(args, lm, rank, world)
    batch_size = args.batch_size // world
    sizes = (batch_size, args.buffer_tokens, args.seed)
    stream = tu.ActivationStream(lm, rows, hook, *sizes, max_norm_ratio=args.max_norm_ratio)
    table = None
    if args.lookup:
        options = {"max_norm": stream.max_norm, "seed": args.seed, "progress": rank == 0}
        start = tu.table_start(lm, hook, args.table_start, rows, **options)
        table = tu.TokenLookup(args.table_scale * start)
    sae = tu.TSAE(cfg, table).to(lm.device)
    if rank == 0:
        describe(args, sae, rows, world, checkpoint)
    if world > 1:  # after all imports: those made later would keep the group's threads alive
        backend = "nccl" if lm.device.type == "cuda" else "gloo"
        torch.distributed.init_process_group(backend)
    # Built before the training, so that a model that cannot be measured costs no time.
    limit = stream.max_norm
    evaluator = tu.Evaluator(lm, heldout, hook, max_norm=limit) if rank == 0 else None
    every = int(args.checkpoint_every or max(1e6, args.tokens / 50))
    options = {"progress": rank == 0, "checkpoint": checkpoint, "checkpoint_every": every}
    try:
        with recorded(args, rank) as history:
            tu.train({"sae": sae}, stream, training, **options, history=history)
    except KeyboardInterrupt:
        resume = f"the same command resumes from {checkpoint}"
        outcome = resume if checkpoint.exists() else "there is no checkpoint yet"
        raise SystemExit(f"stopped: {outcome}") from None
    if evaluator is not None:
        save_and_measure(args, sae, evaluator, history[-1])
        checkpoint.unlink(missing_ok=True)
    if world > 1:
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError, FloatingPointError) as error:  # these say how to mend it
        notes = " ".join(getattr(error, "__notes__", []))
        sys.exit(f"train.py: {error} {notes}".replace("resume=True", "--resume-text").strip())
    except KeyboardInterrupt as error:  # before the training, which keeps a checkpoint
        notes = " ".join(getattr(error, "__notes__", ["nothing was trained yet"]))
        sys.exit(f"stopped: {notes}".replace("resume=True", "--resume-text"))
