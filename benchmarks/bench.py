"""Speed against the peers, at equal loss: one command, everything in one run, interleaved and repeated.

    make bench                                        # builds .venv-peers, then runs this
    python benchmarks/bench.py --shape 768 12288 32   # one shape; --quick for a look

Rule, written before the first run: every system trains a TopK SAE on the same planted activations for the same number of
steps at the learning rate that is best for it on the common grid (held-out NMSE); then speeds are taken in rounds, one process
after another, and the median over rounds counts. `ratio_to_ours` is tokens/s over ours in the same run.
"""

from __future__ import annotations

import argparse
import json
import platform
import re
import subprocess
import sys
from datetime import date
from pathlib import Path

import pandas as pd
import torch
from safetensors.torch import save_file
from torch.nn import functional as F
from tqdm.auto import tqdm

ROOT = Path(__file__).resolve().parent.parent
PEERS = ROOT / ".venv-peers" / "bin" / "python"
LRS = (5e-4, 1e-3, 2e-3, 4e-3, 8e-3)
SYSTEMS = {  # name: (worker, autocast, environment)
    "ours": ("ours", False, sys.executable),
    "sparsify": ("sparsify", False, str(PEERS)),
    "sparsify, autocast": ("sparsify", True, str(PEERS)),
    "saelens": ("saelens", False, str(PEERS)),
    "saelens, autocast": ("saelens", True, str(PEERS)),
    "dense pytorch, autocast": ("dense", True, sys.executable),
    "encoder product alone, bf16": ("encoder-product", False, sys.executable),
}
HARVEST = {"ours": sys.executable, "raw": sys.executable, "transformerlens": str(PEERS)}


def planted(path: Path, d_in: int, tokens: int, features: int = 8192, active: int = 24, seed: int = 0) -> Path:
    """Activations x = mean + sum of sparse features with power-law frequencies + a little noise, in fp16, made once."""
    if not path.exists():
        g = torch.Generator().manual_seed(seed)
        directions = F.normalize(torch.randn(features, d_in, generator=g), dim=-1)
        common, mean = torch.arange(1, features + 1).float() ** -0.7, 0.5 * torch.randn(d_in, generator=g)

        def draw(n: int) -> torch.Tensor:
            parts = []
            for m in torch.ones(n).split(4096):
                at = torch.multinomial(common.expand(len(m), -1), active, generator=g)
                size = 1 + torch.randn(len(m), active, generator=g).abs()
                x = F.embedding_bag(at, directions, mode="sum", per_sample_weights=size)
                parts.append((x + mean + 0.02 * torch.randn(len(m), d_in, generator=g)).half())
            return torch.cat(parts)

        path.parent.mkdir(parents=True, exist_ok=True)
        save_file({"train": draw(tokens), "heldout": draw(8192)}, path)
    return path


def hardware() -> str:
    if torch.cuda.is_available():
        return re.sub(r"\W+", "-", torch.cuda.get_device_name()).lower()
    return f"{platform.machine()}-{torch.get_num_threads()}-cores"


def worker(python: str, *arguments: object) -> dict:
    """One line of JSON from benchmarks/worker.py in an environment. Raises RuntimeError with its error."""
    done = subprocess.run([python, str(ROOT / "benchmarks" / "worker.py"), *map(str, arguments)], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(map(str, arguments))} failed: {done.stderr[-2000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def measure(system: str, data: Path, d_sae: int, k: int, batch: int, steps: int, lr: float) -> dict:
    name, half, python = SYSTEMS[system]
    return worker(python, "train_step", name, data, "--d-sae", d_sae, "--k", k, "--batch", batch, "--steps", steps, "--lr", lr,
                  *(["--autocast"] if half else []))


def timings(part: pd.DataFrame, tokens: int) -> dict:
    """Columns that every kind of work has, from its rounds."""
    ms = part.step_ms
    return {"tokens_per_s": 1000 * tokens / ms.median(), "step_ms": ms.median(), "peak_gib": part.peak_gib.median(), "rounds": len(part),
            "step_ms_min": ms.min(), "step_ms_max": ms.max()}


def harvest(rounds: int, steps: int) -> pd.DataFrame:
    """Activations entering block 8 of GPT-2 small's shape, 16 rows of 256 a step."""
    runs = []
    for _ in tqdm(range(rounds), desc="harvest, rounds"):
        runs += [{"system": s, **worker(python, "harvest", s, "--steps", steps)} for s, python in HARVEST.items()]
    by_system = pd.DataFrame(runs).groupby("system", sort=False)
    return against_ours([{"work": "harvest", "system": s, "d_in": 768, "batch": 4096, **timings(part, 4096)} for s, part in by_system])


def against_ours(rows: list[dict]) -> pd.DataFrame:
    table = pd.DataFrame(rows)
    return table.assign(ratio_to_ours=table.tokens_per_s / table.tokens_per_s[table.system == "ours"].item())


def train_step(d_in: int, d_sae: int, k: int, batch: int, search_steps: int, rounds: int) -> pd.DataFrame:
    data = planted(ROOT / ".cache" / "bench" / f"planted-{d_in}-{search_steps * batch}.safetensors", d_in, search_steps * batch)
    best = {"encoder product alone, bf16": (4e-3, None)}
    for system in tqdm([s for s in SYSTEMS if s not in best], desc=f"learning rates, {d_in} x {d_sae}"):
        twin = {"sparsify": "sparsify, autocast", "saelens": "saelens, autocast"}.get(system)  # fp32 takes its twin's rate: it is slow
        if twin is None:
            found = {lr: measure(system, data, d_sae, k, batch, search_steps, lr)["nmse"] for lr in LRS}
            best[system] = min(found.items(), key=lambda item: item[1])
    for system, twin in (("sparsify", "sparsify, autocast"), ("saelens", "saelens, autocast")):
        best[system] = (best[twin][0], None)
    short, runs = min(12, search_steps), []
    for _ in tqdm(range(rounds), desc="rounds"):
        runs += [{"system": s, **measure(s, data, d_sae, k, batch, short, best[s][0])} for s in SYSTEMS]
    rows = []
    for system, part in pd.DataFrame(runs).groupby("system", sort=False):
        rows.append({"work": "train_step", "system": system, "d_in": d_in, "d_sae": d_sae, "k": k, "batch": batch, **timings(part, batch),
                     "nmse": best[system][1], "lr": best[system][0]})
    return against_ours(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", type=int, nargs=3, action="append", metavar=("D_IN", "D_SAE", "K"),
                        help="default: 768 12288 32 and 768 24576 32")
    parser.add_argument("--batch", type=int, default=4096)
    parser.add_argument("--search-steps", type=int, default=60)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="a tiny shape, to see that everything runs")
    args = parser.parse_args()
    if not PEERS.exists():
        raise SystemExit(f"the peers' environment {PEERS.parent.parent} is missing: run `make bench`, which builds it")
    shapes = args.shape or [(768, 12288, 32), (768, 24576, 32)]
    if args.quick:
        shapes, args.batch, args.search_steps, args.rounds = [(64, 512, 8)], 256, 16, 2
    parts = [harvest(args.rounds, 3 if args.quick else 8)]
    table = pd.concat(parts + [train_step(*shape[:2], shape[2], args.batch, args.search_steps, args.rounds) for shape in shapes])
    columns = "work system d_in d_sae k batch tokens_per_s step_ms peak_gib nmse ratio_to_ours lr rounds step_ms_min step_ms_max".split()
    path = ROOT / "benchmarks" / "results" / f"{date.today()}-{hardware()}{'-quick' * args.quick}.csv"
    path.parent.mkdir(parents=True, exist_ok=True)
    table[columns].to_csv(path, index=False, float_format="%.5g")
    print(table[columns[:11]].round(3).to_string(index=False, na_rep=""))
    print(f"written to {path.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
