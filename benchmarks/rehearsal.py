"""The paper's profiles rehearsed at their models' exact shapes with random weights: memory, time, and what a full run would take.

    python benchmarks/rehearsal.py notebooks --tokenizer gpt2-tokenizer/ --text english/          # gpt2-lite, every notebook
    python benchmarks/rehearsal.py pythia                                                        # one harvest, one step, tables

Nothing is downloaded: `--tokenizer` is a folder with GPT-2's vocab.json and merges.txt, `--text` a .jsonl file or folder. A model
folder of GPT-2 small's shape is made, and published SAEs of RES-JB's shape and layout that reconstruct 0.9 x. Every notebook
then runs with TSAE_BUDGET, a share of the profile's token budgets: its numbers mean nothing, its memory and time do. A run
that was stopped goes on where it was. Written: results/<date>-<hardware>-rehearsal.csv, and -pythia.csv.
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

sys.path.insert(0, str(ROOT))

import tsae_utils as tu

HERE = Path(__file__).resolve().parent
WIDTH = 24_576  # RES-JB's


def make_model(folder: Path, tokenizer: Path) -> None:
    """A folder of GPT-2 small's shape, random weights."""
    from transformers import GPT2Config, GPT2LMHeadModel, GPT2TokenizerFast

    torch.manual_seed(0)
    GPT2LMHeadModel(GPT2Config()).save_pretrained(folder)
    vocabulary, merges = str(tokenizer / "vocab.json"), str(tokenizer / "merges.txt")
    end = dict.fromkeys(("bos_token", "eos_token", "unk_token"), "<|endoftext|>")
    GPT2TokenizerFast(vocab=vocabulary, merges=merges, **end).save_pretrained(folder)


def make_published(folder: Path, layers: tuple[int, ...], d_in: int = 768) -> None:
    """SAEs of RES-JB's width and layout: plus and minus of an orthogonal basis, the other features never fire."""
    for layer in layers:
        place = folder / f"blocks.{layer}.hook_resid_pre"
        place.mkdir(parents=True)
        g = torch.Generator().manual_seed(layer)
        basis = torch.linalg.qr(torch.randn(d_in, d_in, generator=g))[0]
        rest = torch.nn.functional.normalize(torch.randn(WIDTH - 2 * d_in, d_in, generator=g), dim=-1)
        W_dec, b_enc = torch.cat([basis, -basis, rest]), torch.zeros(WIDTH)
        b_enc[2 * d_in :] = -1e6
        weights = {"W_enc": W_dec.T.contiguous(), "b_enc": b_enc, "W_dec": 0.9 * W_dec, "b_dec": torch.zeros(d_in)}
        save_file(weights, place / "sae_weights.safetensors")
        cfg = {"model_name": "gpt2-small", "hook_point": place.name, "hook_point_layer": layer, "context_size": 128, "d_in": d_in,
               "d_sae": WIDTH, "dtype": "torch.float32", "device": "cpu"}
        (place / "cfg.json").write_text(json.dumps(cfg))


def trained(cache: Path) -> dict[str, dict]:
    """Records of the cache's SAEs by folder."""
    return {f.name: tu.read_cfg(f)["metadata"]["tokenized"]["record"] for f in (cache / "saes").glob("*") if (f / "cfg.json").exists()}


def notebooks(work: Path, tokenizer: Path, text: Path, profile: str, share: float, out: Path) -> pd.DataFrame:
    """Every notebook in a process of its own; rows as they end, written after each."""
    if not (work / "gpt2-shape" / "config.json").exists():
        make_model(work / "gpt2-shape", tokenizer)
    if not (work / "published").exists():
        make_published(work / "published", (5, 8, 11) if profile == "gpt2" else (8,))
    env = {**os.environ, "TSAE_MODEL": str(work / "gpt2-shape"), "TSAE_CORPUS": str(text), "TSAE_PUBLISHED": str(work / "published"),
           "TSAE_BUDGET": f"{share:g}", "TSAE_CACHE": str(work / "cache"), "TSAE_FIGURES": str(work / "figures")}
    kept = work / "rows.csv"  # of this rehearsal, whatever day it is
    rows = pd.read_csv(kept).to_dict("records") if kept.exists() else []
    for path in sorted((ROOT / "notebooks").glob("[0-9][0-9]_*.ipynb")):
        if path.stem in {r["notebook"] for r in rows}:
            continue
        earlier = {name for r in rows for name in str(r["folders"]).split()}
        started = time.time()
        command = [sys.executable, str(HERE / "rehearsal.py"), "one", path.stem[:2], profile]
        done = subprocess.run(command, env=env, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"{path.stem} failed: {done.stderr[-3000:]}")
        new = {name: r for name, r in trained(work / "cache").items() if name not in earlier}
        folders, new = " ".join(new), list(new.values())
        steps = [(r["step"] + 1) * 4096 for r in new]
        rows.append({
            "notebook": path.stem, "profile": profile, "share": share, "seconds": time.time() - started,
            "peak_gib": float(done.stdout.strip().splitlines()[-1]), "saes": len(new),
            "sae_mtokens_full": sum(r["tokens"] for r in new) / share / 1e6,
            "model_mtokens_full": sum(r["tokens"] / r["pass"]["saes"] for r in new) / share / 1e6,
            "sae_seconds_full": sum(r["seconds"] / n * r["tokens"] for r, n in zip(new, steps, strict=True)) / share, "folders": folders})
        table = pd.DataFrame(rows)
        table.to_csv(kept, index=False)
        table.drop(columns="folders").to_csv(out, index=False, float_format="%.5g")
        print(table.drop(columns="folders").tail(1).to_string(index=False, header=len(rows) == 1), flush=True)
    return table


def one(number: str, profile: str) -> None:
    """A notebook, and the greatest memory of its kernel in GiB as the last line."""
    done = subprocess.run([sys.executable, str(ROOT / "notebooks" / "run.py"), number, "--profile", profile], stdout=sys.stderr)
    print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20)
    sys.exit(done.returncode)


def pythia(out: Path) -> pd.DataFrame:
    """At Pythia-1.4B's shape: the harvest of 4,096 tokens at layer 16, and steps of an SAE and a TSAE of 8x; peak memory after each."""
    from transformers import AutoTokenizer, GPTNeoXConfig, GPTNeoXForCausalLM

    rows = []

    def note(what: str, seconds: float) -> None:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        rows.append({"what": what, "seconds": seconds, "tokens_per_s": 4096 / seconds, "peak_gib": peak})
        pd.DataFrame(rows).to_csv(out, index=False, float_format="%.4g")
        print(rows[-1], flush=True)

    torch.manual_seed(0)
    shape = GPTNeoXConfig(hidden_size=2048, num_hidden_layers=24, num_attention_heads=16, intermediate_size=8192, vocab_size=50304,
                          max_position_embeddings=2048, rotary_pct=0.25)
    with torch.device("meta"):
        model = GPTNeoXForCausalLM(shape)
    model = model.to_empty(device="cpu")
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.02)
    model.gpt_neox.rotary_emb = type(model.gpt_neox.rotary_emb)(shape)  # buffers that to_empty left empty
    lm = tu.LanguageModel(model, AutoTokenizer.from_pretrained(ROOT / "testbed" / "model"), "pythia-shape")
    layer, ids = 16, torch.randint(2, 8000, (16, 256))
    for i in range(2):
        started = time.time()
        x = lm.activations(ids, [layer])[layer].flatten(0, 1)
        note(f"harvest {i + 1}, layer {layer}", time.time() - started)
    tokens = ids.flatten()[:, None]

    class Ready:
        batch_size = 4096

        def __iter__(self):
            while True:
                yield x, tokens

    for name in ("topk", "topk+lookup"):
        cfg = tu.TSAEConfig(d_in=2048, d_sae=16_384, k=50)
        sae = tu.TSAE(cfg, tu.TokenLookup(torch.zeros(shape.vocab_size, 2048)) if "lookup" in name else None)
        times, since = [], time.time()

        def after(_, times=times) -> None:
            nonlocal since
            times.append(time.time() - since)
            since = time.time()

        tu.train({name: sae}, Ready(), tu.TrainConfig(tokens=4 * 4096), progress=False, after_step=after)
        note(f"{name}, step 1", times[0])
        note(f"{name}, later steps", min(times[1:]))
    return pd.DataFrame(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["notebooks", "pythia", "one"])
    parser.add_argument("rest", nargs="*", help=argparse.SUPPRESS)
    parser.add_argument("--tokenizer", type=Path)
    parser.add_argument("--text", type=Path)
    parser.add_argument("--profile", default="gpt2-lite")
    parser.add_argument("--share", type=float, default=0.001)
    parser.add_argument("--work", type=Path, default=ROOT / ".cache" / "rehearsal")
    args = parser.parse_args()
    tu.keep_freed_memory()
    out = HERE / "results" / f"{date.today()}-{hardware()}-{'pythia' if args.what == 'pythia' else 'rehearsal'}.csv"
    if args.what == "one":
        one(*args.rest)
    elif args.what == "pythia":
        pythia(out)
    elif args.tokenizer is None or args.text is None:
        parser.error("notebooks needs --tokenizer and --text")
    else:
        notebooks(args.work, args.tokenizer.resolve(), args.text.resolve(), args.profile, args.share, out)


if __name__ == "__main__":
    main()
