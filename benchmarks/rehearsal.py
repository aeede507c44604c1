"""Rehearse the paper's profiles at their models' exact shapes with random weights.

    python benchmarks/rehearsal.py notebooks --tokenizer gpt2-tokenizer/ --text english/
    python benchmarks/rehearsal.py pythia

notebooks: every notebook at gpt2-lite. The results are memory, time and an estimate of the time of
a full run. pythia: one harvest and a few steps of an SAE and a TSAE.

Nothing is downloaded: `--tokenizer` is a folder with GPT-2's vocab.json and merges.txt, `--text` a
.jsonl file or a folder of them. The script makes a model folder of GPT-2 small's shape, and SAEs in
the shape and layout of RES-JB that reconstruct 0.9 x. Then it runs every notebook with TSAE_BUDGET,
a share of the profile's token budgets. The numbers of such a run mean nothing; its memory and time
do. The same command resumes a stopped rehearsal.

Output: results/<date>-<hardware>-rehearsal.csv and <date>-<hardware>-pythia.csv.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from datetime import date
from pathlib import Path

import pandas as pd
import torch
from bench import ROOT, hardware
from safetensors.torch import save_file

import tsae_utils as tu

HERE = Path(__file__).resolve().parent
WIDTH = 24_576  # RES-JB's
BATCH = 4096  # tokens per step

# -- models --


def make_model(folder: Path, tokenizer: Path) -> None:
    """A folder of GPT-2 small's shape with random weights."""
    from transformers import GPT2Config, GPT2LMHeadModel, GPT2TokenizerFast

    torch.manual_seed(0)
    GPT2LMHeadModel(GPT2Config()).save_pretrained(folder)
    vocabulary, merges = str(tokenizer / "vocab.json"), str(tokenizer / "merges.txt")
    special = dict.fromkeys(("bos_token", "eos_token", "unk_token"), "<|endoftext|>")
    GPT2TokenizerFast(vocab=vocabulary, merges=merges, **special).save_pretrained(folder)


def make_published(folder: Path, layers: tuple[int, ...], d_in: int = 768) -> None:
    """SAEs in the width and layout of RES-JB.

    Features are plus and minus the vectors of an orthogonal basis; the other features never fire.
    """
    for layer in layers:
        sae_folder = folder / f"blocks.{layer}.hook_resid_pre"
        sae_folder.mkdir(parents=True)
        generator = torch.Generator().manual_seed(layer)
        basis = torch.linalg.qr(torch.randn(d_in, d_in, generator=generator))[0]
        rest = torch.randn(WIDTH - 2 * d_in, d_in, generator=generator)
        rest = torch.nn.functional.normalize(rest, dim=-1)
        W_dec, b_enc = torch.cat([basis, -basis, rest]), torch.zeros(WIDTH)
        b_enc[2 * d_in :] = -1e6
        weights = {
            "W_enc": W_dec.T.contiguous(),
            "b_enc": b_enc,
            "W_dec": 0.9 * W_dec,
            "b_dec": torch.zeros(d_in),
        }
        save_file(weights, sae_folder / "sae_weights.safetensors")
        cfg = {
            "model_name": "gpt2-small",
            "hook_point": sae_folder.name,
            "hook_point_layer": layer,
            "context_size": 128,
            "d_in": d_in,
            "d_sae": WIDTH,
            "dtype": "torch.float32",
            "device": "cpu",
        }
        (sae_folder / "cfg.json").write_text(json.dumps(cfg))


# -- notebooks --


def trained_records(cache: Path) -> dict[str, dict]:
    """Records of the cache's SAEs by folder."""
    folders = [path.parent for path in (cache / "saes").glob("*/cfg.json")]
    return {f.name: tu.read_cfg(f)["metadata"]["tokenized"]["record"] for f in folders}


def as_in_full(records: list[dict], share: float) -> dict[str, float]:
    """Tokens and seconds of these trainings, extrapolated to the whole budget."""
    seconds = 0.0
    for record in records:
        measured_tokens = (record["step"] + 1) * BATCH
        seconds += record["seconds"] / measured_tokens * record["tokens"]
    model_tokens = sum(record["tokens"] / record["pass"]["saes"] for record in records)
    return {
        "sae_mtokens_full": sum(record["tokens"] for record in records) / share / 1e6,
        "model_mtokens_full": model_tokens / share / 1e6,
        "sae_seconds_full": seconds / share,
    }


def run_notebook(path: Path, profile: str, env: dict[str, str]) -> dict[str, float]:
    """Seconds and peak memory of one notebook. Raises SystemExit with the error of a failure."""
    started = time.time()
    command = [sys.executable, HERE / "rehearsal.py", "one", path.stem[:2], profile]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{path.stem} failed: {done.stderr[-3000:]}")
    peak = float(done.stdout.strip().splitlines()[-1])
    return {"seconds": time.time() - started, "peak_gib": peak}


def notebooks(
    work: Path, tokenizer: Path, text: Path, profile: str, share: float, out: Path
) -> None:
    """Every notebook in a process of its own; the table is written after each of them."""
    model, published, cache = work / "gpt2-shape", work / "published", work / "cache"
    if not (model / "config.json").exists():
        make_model(model, tokenizer)
    if not published.exists():
        make_published(published, (5, 8, 11) if profile == "gpt2" else (8,))
    env = {
        **os.environ,
        "TSAE_MODEL": str(model),
        "TSAE_CORPUS": str(text),
        "TSAE_PUBLISHED": str(published),
        "TSAE_BUDGET": f"{share:g}",
        "TSAE_CACHE": str(cache),
        "TSAE_FIGURES": str(work / "figures"),
    }
    kept = work / "rows.csv"  # has no date in its name: a rehearsal may take more than a day
    rows = pd.read_csv(kept).to_dict("records") if kept.exists() else []
    for path in sorted((ROOT / "notebooks").glob("[0-9][0-9]_*.ipynb")):
        if path.stem in {row["notebook"] for row in rows}:
            continue
        earlier = {name for row in rows for name in str(row["folders"]).split()}
        used = run_notebook(path, profile, env)
        new = {n: record for n, record in trained_records(cache).items() if n not in earlier}
        row = {"notebook": path.stem, "profile": profile, "share": share, **used, "saes": len(new)}
        row |= as_in_full(list(new.values()), share)
        rows.append({**row, "folders": " ".join(new)})
        table = pd.DataFrame(rows)
        table.to_csv(kept, index=False)
        table = table.drop(columns="folders")
        table.to_csv(out, index=False, float_format="%.5g")
        print(table.tail(1).to_string(index=False, header=len(rows) == 1), flush=True)


def one(number: str, profile: str) -> None:
    """Run a notebook; the last line printed is the peak memory of its kernel in GiB."""
    command = [sys.executable, ROOT / "tools" / "run_notebooks.py", number, "--profile", profile]
    done = subprocess.run(command, stdout=sys.stderr)
    print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20)
    sys.exit(done.returncode)


# -- Pythia --


def pythia_shape() -> tu.LanguageModel:
    """A model of Pythia-1.4B's shape with random weights and the testbed's tokenizer."""
    from transformers import AutoTokenizer, GPTNeoXConfig, GPTNeoXForCausalLM

    torch.manual_seed(0)
    config = GPTNeoXConfig(
        hidden_size=2048,
        num_hidden_layers=24,
        num_attention_heads=16,
        intermediate_size=8192,
        vocab_size=50304,
        max_position_embeddings=2048,
        rotary_pct=0.25,
    )
    with torch.device("meta"):
        model = GPTNeoXForCausalLM(config)
    model = model.to_empty(device="cpu")
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.02)
    # to_empty leaves buffers without values.
    model.gpt_neox.rotary_emb = type(model.gpt_neox.rotary_emb)(config)
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "testbed" / "model")
    return tu.LanguageModel(model, tokenizer, "pythia-shape")


def step_times(sae: tu.TSAE, x: torch.Tensor, tokens: torch.Tensor) -> list[float]:
    """Seconds of four training steps on the same batch."""

    class Stream:
        batch_size = BATCH

        def __iter__(self):
            while True:
                yield x, tokens

    times, since = [], time.time()

    def after_step(_: int) -> None:
        nonlocal since
        times.append(time.time() - since)
        since = time.time()

    cfg = tu.TrainConfig(tokens=4 * BATCH)
    tu.train({"sae": sae}, Stream(), cfg, progress=False, after_step=after_step)
    return times


def pythia(out: Path) -> None:
    """At Pythia-1.4B's shape: harvest of one batch at layer 16, steps of an SAE and a TSAE of 8x.

    Peak memory is measured after each.
    """
    rows = []

    def note(what: str, seconds: float) -> None:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        speed = BATCH / seconds
        rows.append({"what": what, "seconds": seconds, "tokens_per_s": speed, "peak_gib": peak})
        pd.DataFrame(rows).to_csv(out, index=False, float_format="%.4g")
        print(rows[-1], flush=True)

    lm, layer = pythia_shape(), 16
    ids = torch.randint(2, 8000, (16, 256))
    for i in range(2):
        started = time.time()
        x = lm.activations(ids, [layer])[layer].flatten(0, 1)
        note(f"harvest {i + 1}, layer {layer}", time.time() - started)
    tokens = ids.flatten()[:, None]
    for name in ("topk", "topk+lookup"):
        cfg = tu.TSAEConfig(d_in=lm.d_model, d_sae=8 * lm.d_model, k=50)
        has_table = name == "topk+lookup"
        table = tu.TokenLookup(torch.zeros(lm.n_vocab, lm.d_model)) if has_table else None
        times = step_times(tu.TSAE(cfg, table), x, tokens)
        note(f"{name}, step 1", times[0])
        note(f"{name}, later steps", min(times[1:]))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("what", choices=["notebooks", "pythia", "one"])
    add("rest", nargs="*", help=argparse.SUPPRESS)
    add("--tokenizer", type=Path, help="folder with vocab.json and merges.txt of GPT-2")
    add("--text", type=Path, help=".jsonl file or folder")
    add("--profile", default="gpt2-lite")
    add("--share", type=float, default=0.001, help="of the profile's token budgets")
    add("--work", type=Path, default=ROOT / ".cache" / "rehearsal", help="folder of models, cache")
    args = parser.parse_args()
    tu.keep_freed_memory()
    kind = "pythia" if args.what == "pythia" else "rehearsal"
    out = HERE / "results" / f"{date.today()}-{hardware()}-{kind}.csv"
    if args.what == "one":
        one(*args.rest)
    elif args.what == "pythia":
        pythia(out)
    elif args.tokenizer is None or args.text is None:
        parser.error("notebooks needs --tokenizer and --text")
    else:
        tokenizer, text = args.tokenizer.resolve(), args.text.resolve()
        notebooks(args.work, tokenizer, text, args.profile, args.share, out)


if __name__ == "__main__":
    main()
