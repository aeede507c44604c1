"""Speed against the peers, at equal steps with the loss beside it: one command, everything in one run, interleaved and repeated.

    make bench                                             # builds .venv-peers, then runs this; about two hours on two cores
    python benchmarks/bench.py --only train_step harvest   # some of train_step, harvest, sweep, growth, profile, table, start
    python benchmarks/bench.py --shape 768 12288 32        # one shape; --quick for a look at a tiny one

Rule, written before the first run: every system trains a TopK SAE on the same planted activations for the same number of
steps at the learning rate that is best for it on the common grid (held-out NMSE); then speeds are taken in rounds, one process
after another, and the median over rounds counts. `ratio_to_ours` is tokens/s over ours in the same run, at equal steps: read it
with the NMSE beside it, or loss against wall time in the figure. A second, wider shape takes every system's rate from the first,
and fp32 arms of peers that of their autocast twins. The sweep's rates are searched the same way at a fifth of its tokens.

Changed after a first run, in which ours ended at a higher loss than the peers: ours and plain PyTorch start decoder and encoder
at norm 0.1, as SAELens does; "ours, unit start" is the start of before, the authors' and TSAEConfig's default. And 5e-4 joined
the grid for all, as one peer's best rate was its lower edge.
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

import matplotlib.pyplot as plt
import pandas as pd
import torch
from matplotlib.ticker import LogLocator, NullFormatter
from safetensors.torch import save_file
from torch.nn import functional as F
from tqdm.auto import tqdm

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / part) for part in ("notebooks", "benchmarks")]

from worker import START  # noqa: E402

PEERS = str(ROOT / ".venv-peers" / "bin" / "python")
LRS = (5e-4, 1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2)
PLANTED = 2  # version of `planted`: what an earlier one made is not taken
SYSTEMS = {  # name: (worker, autocast, environment)
    "ours": ("ours", False, sys.executable),
    "sparsify": ("sparsify", False, PEERS),
    "sparsify, autocast": ("sparsify", True, PEERS),
    "saelens": ("saelens", False, PEERS),
    "saelens, autocast": ("saelens", True, PEERS),
    "dense pytorch, autocast": ("dense", True, sys.executable),
    "encoder product alone, bf16": ("encoder-product", False, sys.executable),
    "ours, unit start": ("ours, unit start", False, sys.executable),
    "ours+table": ("ours+table", False, sys.executable),
    "ours+table by rows": ("ours+table by rows", False, sys.executable),
}
TWIN = {"sparsify": "sparsify, autocast", "saelens": "saelens, autocast"}  # fp32 takes its twin's rate: it is slow
PRODUCT = "encoder product alone, bf16"
HARVEST = {"ours": sys.executable, "raw": sys.executable, "transformerlens": PEERS, "transformerlens-stopped": PEERS}
SWEEP = {"ours": ("ours", False, sys.executable), "saelens, autocast": ("saelens", True, PEERS), "saelens": ("saelens", False, PEERS),
         "sparsify, autocast": ("sparsify", True, PEERS), "sparsify": ("sparsify", False, PEERS)}
COLUMNS = ["work", "system", "d_in", "d_sae", "k", "batch", "tokens_per_s", "step_ms", "peak_gib", "nmse", "ratio_to_ours",
           "lr", "rounds", "step_ms_min", "step_ms_max"]
GROWTH = {  # what grows: (values, the worker's arguments, systems)
    "d_sae": ([2**i for i in range(11, 18)], lambda v: ["--d-sae", v], ["ours"]),
    "k": ([8, 16, 32, 64, 128, 256], lambda v: ["--k", v], ["ours"]),
    "vocabulary": ([1_000, 8_000, 50_000, 250_000], lambda v: ["--vocab", v], ["ours", "ours+table", "ours+table by rows"]),
    "SAEs": ([1, 2, 4, 8], lambda v: ["--saes", v], ["ours"]),
}
WORK = ["harvest", "train_step", "sweep", "growth", "profile", "table", "start"]
COLORS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000"]


def planted(path: Path, d_in: int, tokens: int, features: int = 256, active: int = 24, vocab: int = 50257, seed: int = 1_000_003) -> Path:
    """Activations x = mean + vector of the token + sum of sparse features + a little noise, in fp16, made once.

    Features and tokens have power-law frequencies, token vectors hold about a fifth of the variance, and features are few enough
    to be learned from 100,000 tokens at all. The seed is none that an SAE starts from: an SAE drawn from the same numbers would
    start at the planted features.
    """
    if not path.exists():
        g = torch.Generator().manual_seed(seed)
        directions = F.normalize(torch.randn(features, d_in, generator=g), dim=-1)
        common, mean = torch.arange(1, features + 1).float() ** -0.7, 0.5 * torch.randn(d_in, generator=g)
        table, zipf = 0.16 * torch.randn(vocab, d_in, generator=g) * (768 / d_in) ** 0.5, 1 / (torch.arange(vocab) + 10.0)

        def draw(n: int) -> tuple[torch.Tensor, torch.Tensor]:
            parts, tokens = [], torch.multinomial(zipf, n, replacement=True, generator=g)
            for t in tokens.split(4096):
                at = torch.multinomial(common.expand(len(t), -1), active, generator=g)
                size = 1 + torch.randn(len(t), active, generator=g).abs()
                x = F.embedding_bag(at, directions, mode="sum", per_sample_weights=size)
                parts.append((x + table[t] + mean + 0.02 * torch.randn(len(t), d_in, generator=g)).half())
            return torch.cat(parts), tokens.int()

        path.parent.mkdir(parents=True, exist_ok=True)
        (train, train_tokens), (heldout, heldout_tokens) = draw(tokens), draw(8192)
        save_file({"train": train, "train_tokens": train_tokens, "heldout": heldout, "heldout_tokens": heldout_tokens}, path)
    return path


def testbed_rows(path: Path, tokens: int) -> Path:
    """Rows of the testbed's text, training and held-out, made once."""
    if not path.exists():
        from lab import Lab

        bench, g = Lab("bench", "record"), torch.Generator().manual_seed(0)
        rows = bench.rows("sae", tokens)
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file({"train": rows[torch.randperm(len(rows), generator=g)], "heldout": bench.rows("heldout", 8192)}, path)
    return path


def hardware() -> str:
    """Name of the machine's kind, for a file's name."""
    if torch.cuda.is_available():
        return re.sub(r"\W+", "-", torch.cuda.get_device_name()).lower()
    return f"{platform.machine()}-{torch.get_num_threads()}-cores"


def run(python: str, script: str, *arguments: object) -> dict:
    """One line of JSON from a script of benchmarks/ in an environment. Raises RuntimeError with its error."""
    done = subprocess.run([python, str(ROOT / "benchmarks" / script), *map(str, arguments)], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{script} {' '.join(map(str, arguments))} failed: {done.stderr[-2000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def measure(system: str, data: Path, d_sae: int, k: int, batch: int, steps: int, lr: float, *more: str) -> dict:
    name, half, python = SYSTEMS[system]
    return run(python, "worker.py", "train_step", name, data, "--d-sae", d_sae, "--k", k, "--batch", batch, "--steps", steps, "--lr", lr,
               *["--autocast"] * half, *more)


def timings(part: pd.DataFrame, tokens: int) -> dict:
    """Columns that every kind of work has, from its rounds."""
    ms = part.step_ms
    return {"tokens_per_s": 1000 * tokens / ms.median(), "step_ms": ms.median(), "peak_gib": part.peak_gib.median(), "rounds": len(part),
            "step_ms_min": ms.min(), "step_ms_max": ms.max()}


def against_ours(rows: list[dict]) -> pd.DataFrame:
    table = pd.DataFrame(rows)
    return table.assign(ratio_to_ours=table.tokens_per_s / table.tokens_per_s[table.system == "ours"].item())


def harvest(rounds: int, steps: int) -> pd.DataFrame:
    """Activations entering block 8 of GPT-2 small's shape, 16 rows of 256 a step."""
    runs = []
    for _ in tqdm(range(rounds), desc="harvest, rounds"):
        runs += [{"system": s, **run(python, "worker.py", "harvest", s, "--steps", steps)} for s, python in HARVEST.items()]
    by_system = pd.DataFrame(runs).groupby("system", sort=False)
    return against_ours([{"work": "harvest", "system": s, "d_in": 768, "batch": 4096, **timings(part, 4096)} for s, part in by_system])


def search(data: Path, d_sae: int, k: int, batch: int, steps: int, known: pd.DataFrame | None) -> tuple[dict[str, float], pd.DataFrame]:
    """Each system's best rate on the grid, and loss against wall time at all of them; the last row of a run is its end.

    Systems that an earlier search has are not searched again.
    """
    known = pd.DataFrame(columns=["system", "best", "lr"]) if known is None else known
    best, curves = {PRODUCT: LRS[0], **known[known.best.astype(bool)].groupby("system").lr.first()}, known.to_dict("records")
    for system in tqdm([s for s in SYSTEMS if s not in TWIN and s not in best], desc=f"learning rates at d_sae {d_sae}"):
        found = {lr: measure(system, data, d_sae, k, batch, steps, lr, "--curve") for lr in LRS}
        best[system] = min(found, key=lambda lr: found[lr]["nmse"])
        for lr in LRS:
            curves += [{"system": system, "d_sae": d_sae, "lr": lr, "best": lr == best[system], **row} for row in found[lr]["curve"]]
    return best | {system: best[twin] for system, twin in TWIN.items()}, pd.DataFrame(curves)


def train_step(data: Path, d_sae: int, k: int, batch: int, steps: int, rounds: int, lrs: dict[str, float],
               curves: pd.DataFrame) -> pd.DataFrame:
    """Held-out NMSE after `steps` at each system's rate (of the search, where it was at this width), then the rounds of timings."""
    d_in, known = int(data.stem.split("-")[1]), curves[curves.best & (curves.d_sae == d_sae)].groupby("system").nmse.last().to_dict()
    rated = [s for s in SYSTEMS if s not in TWIN and s != PRODUCT and s not in known]
    nmse = known | {s: measure(s, data, d_sae, k, batch, steps, lrs[s])["nmse"] for s in tqdm(rated, desc=f"loss at d_sae {d_sae}")}
    runs = []
    for _ in tqdm(range(rounds), desc="rounds"):
        runs += [{"system": s, **measure(s, data, d_sae, k, batch, min(8, steps), lrs[s])} for s in SYSTEMS]
    return against_ours([
        {"work": "train_step", "system": system, "d_in": d_in, "d_sae": d_sae, "k": k, "batch": batch, **timings(part, batch),
         "nmse": nmse.get(system), "lr": lrs[system]} for system, part in pd.DataFrame(runs).groupby("system", sort=False)])


def sweep(rows: Path, tokens: int, d_sae: int) -> pd.DataFrame:
    """Five k, two SAEs each, end to end: wall time and error of each system at its best rate."""
    def plain(nmse: dict[str, float]) -> float:
        """Mean error of the SAEs without a table, which the peers do not have."""
        return pd.Series({n: e for n, e in nmse.items() if not n.startswith("tsae")}).mean()

    table, best = [], {}
    for system in tqdm(SWEEP, desc="sweep"):
        name, half, python = SWEEP[system]
        arguments = [name, rows, "--d-sae", d_sae, *["--autocast"] * half]
        if TWIN.get(system) not in best:
            found = {lr: plain(run(python, "sweep.py", *arguments, "--tokens", tokens // 5, "--lr", lr)["nmse"]) for lr in LRS}
            best[system] = min(found, key=found.get)
        lr = best[system] if system in best else best[TWIN[system]]
        done = run(python, "sweep.py", *arguments, "--tokens", tokens, "--lr", lr)
        table.append({"work": "sweep", "system": system, "d_in": 256, "d_sae": d_sae, "batch": 4096, "peak_gib": done["peak_gib"],
                      "nmse": plain(done["nmse"]), "lr": lr, "rounds": 1, "tokens_per_s": tokens / done["seconds"],
                      "step_ms": 1000 * done["seconds"] / (tokens / 4096)})
    return against_ours(table)


def on_testbed(tokens: int, quick: bool, arms: dict[tuple, tuple[dict, float | None, dict]]) -> pd.DataFrame:
    """Held-out quality on the testbed of arms that see the same batches; {(name, rate): (TSAEConfig, scale of the table, TrainConfig)}."""
    from lab import Lab, tu

    lab, rows = Lab("bench", "smoke" if quick else "record"), []
    hook, table = lab.hook(lab.layer), lab.unigrams(lab.layer)
    evaluate = tu.Evaluator(lab.lm, lab.rows("heldout", lab.p.eval_tokens), hook)
    for seed in range(1 if quick else 3):
        saes, cfgs = {}, {}
        for arm, (sae, scale, training) in arms.items():
            cfg = tu.TSAEConfig(d_in=lab.lm.d_model, d_sae=lab.d_sae, k=lab.p.k, seed=seed, **sae)
            saes[arm] = tu.TSAE(cfg, None if scale is None else tu.TokenLookup(scale * table)).to(lab.lm.device)
            cfgs[arm] = tu.TrainConfig(tokens=tokens, **training)
        stream = tu.ActivationStream(lab.lm, lab.train_rows, hook, lab.p.batch_size, lab.p.buffer_tokens, seed)
        history = tu.train(saes, stream, cfgs)
        for (name, rate), sae in saes.items():
            found, end = evaluate(sae), [h for h in history if h["system"] == (name, rate)][-1]
            rows.append({"name": name, "rate": rate, "seed": seed, "tokens": tokens, "nmse": found["nmse"], "ce_added": found["ce_added"],
                         "dead_fraction": end["dead_fraction"]})
    return pd.DataFrame(rows)


def table_updates(quick: bool) -> pd.DataFrame:
    """Adam on all of the table against SparseAdam on the batch's rows, each over the same rates."""
    from lab import PROFILES

    lr, kinds = PROFILES["record"].tsae_lr, {"whole (Adam)": False, "by rows (SparseAdam)": True}
    arms = {(name, rate): ({"encoder_scale": 0.5}, 0.5, {"lr": lr, "lr_lookup": rate, "lookup_by_rows": by_rows})
            for name, by_rows in kinds.items() for rate in (1e-3, 3e-3, 1e-2, 3e-2)}
    return on_testbed(8192 if quick else 1_000_000, quick, arms).rename(columns={"name": "table", "rate": "lr_lookup"})


def starts(quick: bool) -> pd.DataFrame:
    """The authors' start, decoder rows at norm 1 (beside a table the encoder at half of that), against SAELens's at 0.1."""
    kinds = {("sae", 1.0): ({}, None), ("sae", START): ({"decoder_init_norm": START}, None),
             ("tsae", 1.0): ({"encoder_scale": 0.5}, 0.5), ("tsae", START): ({"decoder_init_norm": START}, 0.5)}
    arms = {(name, rate): (*how, {"lr": rate}) for name, how in kinds.items() for rate in (4e-3, 8e-3, 1.6e-2)}
    found = on_testbed(8192 if quick else 2_000_000, quick, arms)
    names = pd.DataFrame(found.pop("name").tolist(), columns=["system", "decoder_init_norm"], index=found.index)
    return pd.concat([names, found.rename(columns={"rate": "lr"})], axis=1)


def growth(data: Path, d_sae: int, k: int, batch: int, steps: int, shrink: int = 1) -> pd.DataFrame:
    """ms a step and peak memory against width, k, vocabulary and number of SAEs, the rest held."""
    rows, held = [], ["--d-sae", d_sae, "--k", k, "--batch", batch, "--steps", steps]
    for what, (values, arguments, systems) in GROWTH.items():
        values = [v // shrink for v in values] if what in ("d_sae", "vocabulary") else [v for v in values if what != "k" or v <= d_sae]
        for value in tqdm(values, desc=f"growth with {what}"):
            for system in systems:
                done = run(sys.executable, "worker.py", "train_step", system, data, *held, *arguments(value))
                rows.append({"grows": what, "value": value, "system": system, "step_ms": done["step_ms"], "peak_gib": done["peak_gib"]})
    return pd.DataFrame(rows)


def profile(data: Path, widths: list[int], k: int, batch: int, steps: int) -> pd.DataFrame:
    """Where the time of one step and of one harvest goes: the plain way, the fastest peer's and ours."""
    shape, rows = ["--k", k, "--batch", batch], []
    works = [("train_step", d_sae, system) for d_sae in widths for system in ("dense pytorch, autocast", "sparsify, autocast", "ours")]
    for work, d_sae, system in tqdm([*works, ("harvest", None, "transformerlens"), ("harvest", None, "ours")], desc="profile"):
        name, half, python = SYSTEMS[system] if work == "train_step" else (system, False, HARVEST[system])
        of_step = [data, "--d-sae", d_sae, *shape, *["--autocast"] * half] if work == "train_step" else []
        ms = run(python, "worker.py", "profile", name, *of_step, "--steps", steps if of_step else 12)["ms"]
        whole, about = sum(ms.values()), {"work": work, "d_sae": d_sae, "system": system}
        rows += [{**about, "operation": operation, "ms_per_step": t, "share": t / whole} for operation, t in ms.items()]
    return pd.DataFrame(rows).astype({"d_sae": "Int64"})


def draw_loss(curves: pd.DataFrame, path: Path) -> None:
    """Held-out NMSE against wall time, every system at its best rate."""
    fig, ax = plt.subplots(figsize=(6.5, 4))
    for color, (system, part) in zip(COLORS, curves[curves.best].groupby("system", sort=False), strict=False):
        ax.plot(part.seconds, part.nmse, "o-", color=color, label=system, markersize=4)
    where = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{torch.get_num_threads()} CPU cores"
    ends = curves[curves.best].groupby("system").last()
    peer = ends[ends.index.isin([s for s, (worker, *_) in SYSTEMS.items() if worker in ("sparsify", "saelens")])].nmse.idxmin()
    told = [f"{s} {ends.nmse[s]:.4f} in {ends.seconds[s]:.0f} s" for s in ("ours", peer)]
    ax.set(xscale="log", yscale="log", xlabel=f"seconds of training, {where}, d_sae {curves.d_sae.iloc[0]:,}", ylabel="held-out NMSE",
           title=f"{told[0]}; best peer, {told[1]}")
    for axis in (ax.xaxis, ax.yaxis):
        axis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5)))
        axis.set_major_formatter("{x:g}")
        axis.set_minor_formatter(NullFormatter())
    ax.legend(fontsize=8)
    fig.savefig(path)


def draw_growth(table: pd.DataFrame, path: Path) -> None:
    """ms a step against each thing that grows."""
    fig, axes = plt.subplots(1, len(GROWTH), figsize=(13, 3.4), sharey=True)
    for ax, (what, part) in zip(axes, table.groupby("grows", sort=False), strict=True):
        for color, (system, rows) in zip(COLORS, part.groupby("system", sort=False), strict=False):
            ax.plot(rows.value, rows.step_ms, "o-", color=color, label=system)
        ax.set(xscale="log", yscale="log", xlabel=what)
        values = sorted(part.value.unique())[:: 2 if part.value.nunique() > 6 else 1]
        ax.set_xticks(values, [f"{v / 1000:.0f}K" if v >= 1000 else f"{v:g}" for v in values], minor=False)
        ax.set_xticks([], minor=True)
        several = part.system.nunique() > 1
        if several:
            ax.legend(fontsize=8)
        least, most = rows.iloc[0], rows.iloc[-1]  # of the system drawn last
        more, dearer = most.value / least.value, most.step_ms / least.step_ms
        ax.set_title(f"{more:.0f}x takes about {dearer:.0f}x the time{', by rows' * several}", fontsize=9)
    axes[0].set_ylabel("ms a step")
    fig.suptitle("What a step costs, against what grows (the rest held)")
    fig.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=WORK)
    parser.add_argument("--shape", type=int, nargs=3, action="append", metavar=("D_IN", "D_SAE", "K"),
                        help="default: 768 12288 32 and 768 24576 32")
    parser.add_argument("--batch", type=int, default=4096)
    parser.add_argument("--search-steps", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--sweep-tokens", type=int, default=200_000)
    parser.add_argument("--again", action="store_true", help="time once more: rates and losses are those of today's -loss.csv")
    parser.add_argument("--quick", action="store_true", help="a tiny shape, to see that everything runs")
    args = parser.parse_args()
    if not Path(PEERS).exists():
        raise SystemExit(f"the peers' environment {Path(PEERS).parent.parent} is missing: run `make bench`, which builds it")
    wanted = args.only or WORK
    shapes = args.shape or [(768, 12288, 32), (768, 24576, 32)]
    if args.quick:
        shapes, args.batch, args.search_steps, args.rounds, args.sweep_tokens = [(64, 512, 8)], 256, 16, 2, 20_480
    d_in, d_sae, k = shapes[0]
    if {shape[0] for shape in shapes} != {d_in}:
        raise SystemExit(f"shapes of one run share d_in: {sorted({shape[0] for shape in shapes})} need a run each")
    cache = ROOT / ".cache" / "bench"
    data = planted(cache / f"planted-{d_in}-{args.search_steps * args.batch}-v{PLANTED}.safetensors", d_in, args.search_steps * args.batch)
    out = ROOT / "benchmarks" / "results" / f"{date.today()}-{hardware()}{'-quick' * args.quick}"
    out.parent.mkdir(parents=True, exist_ok=True)
    plt.style.use(ROOT / "figures" / "tsae.mplstyle")
    done = pd.read_csv(f"{out}.csv") if Path(f"{out}.csv").exists() else pd.DataFrame(columns=COLUMNS)

    def keep(part: pd.DataFrame) -> None:
        """Written after each kind of work: an interrupt loses nothing."""
        nonlocal done
        again = (done.work == part.work.iloc[0]) & (done.d_sae.isin(part.d_sae) if "d_sae" in part else True)
        done = pd.DataFrame([*done[~again].to_dict("records"), *part.to_dict("records")], columns=COLUMNS)
        done.to_csv(f"{out}.csv", index=False, float_format="%.5g")
        print(part[[c for c in COLUMNS[:11] if c in part]].round(4).to_string(index=False, na_rep=""))

    if "harvest" in wanted:
        keep(harvest(args.rounds, 3 if args.quick else 8))
    if "train_step" in wanted:
        lrs, curves = search(data, d_sae, k, args.batch, args.search_steps, pd.read_csv(f"{out}-loss.csv") if args.again else None)
        curves.to_csv(f"{out}-loss.csv", index=False, float_format="%.5g")
        draw_loss(curves, Path(f"{out}-loss.png"))
        for _, width, at in shapes:
            keep(train_step(data, width, at, args.batch, args.search_steps, args.rounds, lrs, curves))
    if "sweep" in wanted:
        rows = testbed_rows(cache / f"rows-{args.sweep_tokens}.safetensors", 1.2 * args.sweep_tokens)
        keep(sweep(rows, args.sweep_tokens, 512 if args.quick else 4096))
    if "growth" in wanted:
        shrink = 64 if args.quick else 1
        table = growth(data, 8192 // shrink, k, args.batch, 6, shrink)
        table.to_csv(f"{out}-growth.csv", index=False, float_format="%.5g")
        draw_growth(table, Path(f"{out}-growth.png"))
    if "profile" in wanted:
        table = profile(data, [shape[1] for shape in shapes], k, args.batch, args.search_steps)
        table.to_csv(f"{out}-profile.csv", index=False, float_format="%.4g")
    for what, study in {"table": table_updates, "start": starts}.items():
        if what in wanted:
            table = study(args.quick)
            table.to_csv(f"{out}-{what}.csv", index=False, float_format="%.5g")
            kinds = [c for c in table if c not in ("nmse", "ce_added", "dead_fraction", "seed")]
            print(table.groupby(kinds)[["nmse", "ce_added", "dead_fraction"]].mean().round(4).to_string())
    print(f"written to {out.parent.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
