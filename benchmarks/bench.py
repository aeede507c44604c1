"""Speed against other libraries, at equal steps and with the loss: everything in one run.

    make bench                                            # builds .venv-peers first
    python benchmarks/bench.py --only train_step harvest  # some kinds of work
    python benchmarks/bench.py --shape 768 12288 32       # one shape
    python benchmarks/bench.py --quick                    # a tiny shape

A run takes about two hours on two cores.

Rule, written before the first run. Every system trains a TopK SAE on the same planted activations
for the same number of steps. It uses the learning rate of the common grid that gives it the lowest
held-out NMSE. Speeds are measured in rounds, one process after another, and the median over rounds
counts. `ratio_to_ours` is tokens/s over ours in the same run, at equal steps. It should be read
together with the NMSE, or with the figure of loss against wall time. A second, wider shape takes
every system's rate from the first. Peers in fp32 take the rate of their autocast twins. The rates
of the sweep are searched in the same way on a fifth of its tokens.

Changed after a first run, in which ours ended at a higher loss than the peers: ours and plain
PyTorch start decoder and encoder at norm 0.1, as SAELens does. "ours, unit start" is the earlier
start, the default of the authors and of TSAEConfig. The rate 5e-4 joined the grid of all systems,
because one peer's best rate was its lower edge.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import subprocess
import sys
from datetime import date
from pathlib import Path
from typing import NamedTuple

import matplotlib.pyplot as plt
import pandas as pd
import torch
from matplotlib.ticker import LogLocator, NullFormatter
from safetensors.torch import save_file
from torch.nn import functional as F
from tqdm.auto import tqdm
from worker import ROOT, START

# -- what is compared --

OURS, PEERS = sys.executable, str(ROOT / ".venv-peers" / "bin" / "python")
LRS = (5e-4, 1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2)
PLANTED_VERSION = 2  # of `planted`: files of an earlier version are not used


class System(NamedTuple):
    """How one system is run."""

    worker: str  # its name in worker.py or sweep.py
    autocast: bool
    python: str  # interpreter, and with it the environment


SYSTEMS = {
    "ours": System("ours", False, OURS),
    "sparsify": System("sparsify", False, PEERS),
    "sparsify, autocast": System("sparsify", True, PEERS),
    "saelens": System("saelens", False, PEERS),
    "saelens, autocast": System("saelens", True, PEERS),
    "dense pytorch, autocast": System("dense", True, OURS),
    "encoder product alone, bf16": System("encoder-product", False, OURS),
    "ours, unit start": System("ours, unit start", False, OURS),
    "ours+table": System("ours+table", False, OURS),
    "ours+table by rows": System("ours+table by rows", False, OURS),
}
# In fp32 a peer is slow: it takes the rate of its autocast twin.
TWIN = {"sparsify": "sparsify, autocast", "saelens": "saelens, autocast"}
PRODUCT = "encoder product alone, bf16"  # it learns nothing, so no rate is searched
SWEEP = ("ours", "saelens, autocast", "saelens", "sparsify, autocast", "sparsify")
HARVEST = {
    "ours": OURS,
    "raw": OURS,
    "transformerlens": PEERS,
    "transformerlens-stopped": PEERS,
}
COLUMNS = ["work", "system", "d_in", "d_sae", "k", "batch", "tokens_per_s", "step_ms", "peak_gib"]
COLUMNS += ["nmse", "ratio_to_ours", "lr", "rounds", "step_ms_min", "step_ms_max"]
PRINTED = COLUMNS[:11]
TABLES = ("ours", "ours+table", "ours+table by rows")
GROWTH = {  # what grows: (option of the worker, values, systems)
    "d_sae": ("--d-sae", [2**i for i in range(11, 18)], ("ours",)),
    "k": ("--k", [8, 16, 32, 64, 128, 256], ("ours",)),
    "vocabulary": ("--vocab", [1_000, 8_000, 50_000, 250_000], TABLES),
    "SAEs": ("--saes", [1, 2, 4, 8], ("ours",)),
}
WORK = ("harvest", "train_step", "sweep", "growth", "profile", "table", "start")
COLORS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000"]

# -- data --


def planted(
    path: Path,
    d_in: int,
    tokens: int,
    features: int = 256,
    active: int = 24,
    vocab: int = 50257,
    seed: int = 1_000_003,
) -> Path:
    """Activations in fp16, made once: mean + vector of the token + sparse features + noise.

    Features and tokens have power-law frequencies. Token vectors hold about a fifth of the
    variance. Features are few enough to be learned from 100,000 tokens. No SAE starts from this
    seed: one that is drawn from the same numbers would start at the planted features.
    """
    if path.exists():
        return path
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    directions = F.normalize(normal(features, d_in), dim=-1)
    feature_frequency = torch.arange(1, features + 1).float() ** -0.7
    mean = 0.5 * normal(d_in)
    table = 0.16 * normal(vocab, d_in) * (768 / d_in) ** 0.5
    token_frequency = 1 / (torch.arange(vocab) + 10.0)

    def draw(n: int) -> tuple[torch.Tensor, torch.Tensor]:
        ids = torch.multinomial(token_frequency, n, replacement=True, generator=generator)
        parts = []
        for part in ids.split(4096):
            frequencies = feature_frequency.expand(len(part), -1)
            index = torch.multinomial(frequencies, active, generator=generator)
            size = 1 + normal(len(part), active).abs()
            x = F.embedding_bag(index, directions, mode="sum", per_sample_weights=size)
            x = x + table[part] + mean + 0.02 * normal(len(part), d_in)
            parts.append(x.half())
        return torch.cat(parts), ids.int()

    data = {}
    for split, n in (("train", tokens), ("heldout", 8192)):
        data[split], data[f"{split}_tokens"] = draw(n)
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(data, path)
    return path


def testbed_rows(path: Path, tokens: float) -> Path:
    """Rows of the testbed's text, training and held-out, made once."""
    if path.exists():
        return path
    from notebooks.lab import Lab

    lab, generator = Lab("benchmarks", "record"), torch.Generator().manual_seed(0)
    rows = lab.rows("sae", tokens)
    order = torch.randperm(len(rows), generator=generator)
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({"train": rows[order], "heldout": lab.rows("heldout", 8192)}, path)
    return path


# -- processes --


def hardware() -> str:
    """The kind of this machine, for the name of a file."""
    if torch.cuda.is_available():
        return re.sub(r"\W+", "-", torch.cuda.get_device_name()).lower()
    return f"{platform.machine()}-{torch.get_num_threads()}-cores"


def run(python: str, script: str, *arguments: object) -> dict:
    """What a script of benchmarks/ measures in an environment: its line of JSON.

    PYTHONPATH gives the script the repository root, which the peers' environment does not install.
    Raises RuntimeError with the error of the script.
    """
    words = [str(argument) for argument in arguments]
    paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    command = [python, str(ROOT / "benchmarks" / script), *words]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{script} {' '.join(words)} failed: {done.stderr[-2000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def measure(
    name: str, data: Path, d_sae: int, k: int, batch: int, steps: int, lr: float, *more: str
) -> dict:
    """One training of a system by worker.py."""
    system = SYSTEMS[name]
    shape = ["--d-sae", d_sae, "--k", k, "--batch", batch, "--steps", steps, "--lr", lr]
    if system.autocast:
        more = ("--autocast", *more)
    return run(system.python, "worker.py", "train_step", system.worker, data, *shape, *more)


def timings(rounds: pd.DataFrame, tokens: int) -> dict:
    """Columns that every kind of work has, from its rounds."""
    ms = rounds.step_ms
    return {
        "tokens_per_s": 1000 * tokens / ms.median(),
        "step_ms": ms.median(),
        "peak_gib": rounds.peak_gib.median(),
        "rounds": len(rounds),
        "step_ms_min": ms.min(),
        "step_ms_max": ms.max(),
    }


def against_ours(rows: list[dict]) -> pd.DataFrame:
    table = pd.DataFrame(rows)
    speed_of_ours = table.tokens_per_s[table.system == "ours"].item()
    return table.assign(ratio_to_ours=table.tokens_per_s / speed_of_ours)


# -- kinds of work --


def harvest(rounds: int, steps: int) -> pd.DataFrame:
    """Activations entering block 8 of GPT-2 small's shape, 16 rows of 256 tokens per step."""
    runs = []
    for _ in tqdm(range(rounds), desc="harvest, rounds"):
        for system, python in HARVEST.items():
            result = run(python, "worker.py", "harvest", system, "--steps", steps)
            runs.append({"system": system, **result})
    rows = []
    for system, part in pd.DataFrame(runs).groupby("system", sort=False):
        row = {"work": "harvest", "system": system, "d_in": 768, "batch": 4096}
        rows.append({**row, **timings(part, 4096)})
    return against_ours(rows)


def search(
    data: Path, d_sae: int, k: int, batch: int, steps: int, known: pd.DataFrame | None
) -> tuple[dict[str, float], pd.DataFrame]:
    """Each system's best rate on the grid, and loss against wall time at every rate.

    The last row of a run is its end. Systems in `known`, an earlier search, are not searched again.
    """
    if known is None:
        known = pd.DataFrame(columns=["system", "best", "lr"])
    best = {PRODUCT: LRS[0], **known[known.best.astype(bool)].groupby("system").lr.first()}
    curves = known.to_dict("records")
    unknown = [system for system in SYSTEMS if system not in TWIN and system not in best]
    for system in tqdm(unknown, desc=f"learning rates at d_sae {d_sae}"):
        results = {lr: measure(system, data, d_sae, k, batch, steps, lr, "--curve") for lr in LRS}
        best[system] = min(LRS, key=lambda lr: results[lr]["nmse"])
        for lr, result in results.items():
            about = {"system": system, "d_sae": d_sae, "lr": lr, "best": lr == best[system]}
            curves += [{**about, **row} for row in result["curve"]]
    best |= {system: best[twin] for system, twin in TWIN.items()}
    return best, pd.DataFrame(curves)


def train_step(
    data: Path,
    d_sae: int,
    k: int,
    batch: int,
    steps: int,
    rounds: int,
    lrs: dict[str, float],
    curves: pd.DataFrame,
) -> pd.DataFrame:
    """Held-out NMSE after `steps` at each system's rate, then the rounds of timings.

    At the width of the search the NMSE is that of the search.
    """
    d_in = int(data.stem.split("-")[1])
    at_this_width = curves[curves.best & (curves.d_sae == d_sae)]
    nmse = at_this_width.groupby("system").nmse.last().to_dict()
    unmeasured = [s for s in SYSTEMS if s not in TWIN and s != PRODUCT and s not in nmse]
    for system in tqdm(unmeasured, desc=f"loss at d_sae {d_sae}"):
        nmse[system] = measure(system, data, d_sae, k, batch, steps, lrs[system])["nmse"]
    runs = []
    for _ in tqdm(range(rounds), desc="rounds"):
        for system in SYSTEMS:
            result = measure(system, data, d_sae, k, batch, min(8, steps), lrs[system])
            runs.append({"system": system, **result})
    rows = []
    for system, part in pd.DataFrame(runs).groupby("system", sort=False):
        row = {"work": "train_step", "system": system, "d_in": d_in, "d_sae": d_sae, "k": k}
        row |= {"batch": batch, **timings(part, batch)}
        rows.append({**row, "nmse": nmse.get(system), "lr": lrs[system]})
    return against_ours(rows)


def sweep_once(name: str, rows: Path, tokens: int, d_sae: int, lr: float) -> dict:
    """One sweep of a system by sweep.py, with the mean error of its SAEs without a table."""
    system = SYSTEMS[name]
    options = ["--d-sae", d_sae, "--tokens", tokens, "--lr", lr]
    if system.autocast:
        options.append("--autocast")
    result = run(system.python, "sweep.py", system.worker, rows, *options)
    # The peers have no table, so SAEs with one are left out.
    plain = [nmse for sae, nmse in result["nmse"].items() if not sae.startswith("tsae")]
    return {**result, "nmse": pd.Series(plain).mean()}


def sweep(rows: Path, tokens: int, d_sae: int) -> pd.DataFrame:
    """Five k, two SAEs each: wall time and error of each system at its best rate."""
    table, best = [], {}
    for name in tqdm(SWEEP, desc="sweep"):
        if TWIN.get(name) in best:
            lr = best[TWIN[name]]
        else:
            nmse = {lr: sweep_once(name, rows, tokens // 5, d_sae, lr)["nmse"] for lr in LRS}
            lr = best[name] = min(nmse, key=nmse.get)
        result = sweep_once(name, rows, tokens, d_sae, lr)
        row = {"work": "sweep", "system": name, "d_in": 256, "d_sae": d_sae, "batch": 4096}
        row |= {"peak_gib": result["peak_gib"], "nmse": result["nmse"], "lr": lr, "rounds": 1}
        row["tokens_per_s"] = tokens / result["seconds"]
        row["step_ms"] = 1000 * result["seconds"] / (tokens / 4096)
        table.append(row)
    return against_ours(table)


def growth(data: Path, d_sae: int, k: int, batch: int, steps: int, shrink: int = 1) -> pd.DataFrame:
    """ms per step and peak memory against width, k, vocabulary and number of SAEs.

    One of them grows, the others are fixed. `shrink` divides widths and vocabularies.
    """
    rows, fixed = [], ["--d-sae", d_sae, "--k", k, "--batch", batch, "--steps", steps]
    for what, (option, values, systems) in GROWTH.items():
        if what in ("d_sae", "vocabulary"):
            values = [value // shrink for value in values]
        if what == "k":
            values = [value for value in values if value <= d_sae]
        for value in tqdm(values, desc=f"growth with {what}"):
            for system in systems:
                arguments = [system, data, *fixed, option, value]
                result = run(OURS, "worker.py", "train_step", *arguments)
                row = {"grows": what, "value": value, "system": system}
                rows.append({**row, "step_ms": result["step_ms"], "peak_gib": result["peak_gib"]})
    return pd.DataFrame(rows)


def profile(data: Path, widths: list[int], k: int, batch: int, steps: int) -> pd.DataFrame:
    """Where the time of a step and of a harvest goes: plain PyTorch, the fastest peer and ours."""
    rows = []

    def add(work: str, d_sae: int | None, system: str, ms: dict[str, float]) -> None:
        whole = sum(ms.values())
        about = {"work": work, "d_sae": d_sae, "system": system}
        for operation, t in ms.items():
            rows.append({**about, "operation": operation, "ms_per_step": t, "share": t / whole})

    steps_of = ("dense pytorch, autocast", "sparsify, autocast", "ours")
    works = [("train_step", d_sae, system) for d_sae in widths for system in steps_of]
    works += [("harvest", None, "transformerlens"), ("harvest", None, "ours")]
    for work, d_sae, name in tqdm(works, desc="profile"):
        if work == "harvest":
            result = run(HARVEST[name], "worker.py", "profile", name, "--steps", 12)
        else:
            system = SYSTEMS[name]
            arguments = [system.worker, data, "--d-sae", d_sae, "--k", k, "--batch", batch]
            arguments += ["--steps", steps]
            if system.autocast:
                arguments.append("--autocast")
            result = run(system.python, "worker.py", "profile", *arguments)
        add(work, d_sae, name, result["ms"])
    return pd.DataFrame(rows).astype({"d_sae": "Int64"})


# -- choices measured on the testbed --


class Spec(NamedTuple):
    """An SAE to train: fields of TSAEConfig, scale of its table (None: none), of TrainConfig."""

    sae: dict
    table_scale: float | None
    training: dict


def quality_on_testbed(
    tokens: int, quick: bool, specs: dict[tuple[object, float], Spec]
) -> pd.DataFrame:
    """Held-out quality on the testbed of SAEs that see the same batches, by (name, rate)."""
    from notebooks.lab import Lab, tu

    lab, rows = Lab("benchmarks", "smoke" if quick else "record"), []
    p, hook, table = lab.p, lab.hook(lab.layer), lab.unigrams(lab.layer)
    evaluate = tu.Evaluator(lab.lm, lab.rows("heldout", p.budget.eval_tokens), hook)
    for seed in range(1 if quick else 3):
        saes, cfgs = {}, {}
        for key, spec in specs.items():
            cfg = tu.TSAEConfig(lab.lm.d_model, lab.d_sae, k=p.grid.k, seed=seed, **spec.sae)
            lookup = None
            if spec.table_scale is not None:
                lookup = tu.TokenLookup(spec.table_scale * table)
            saes[key] = tu.TSAE(cfg, lookup).to(lab.lm.device)
            cfgs[key] = tu.TrainConfig(tokens=tokens, **spec.training)
        stream = tu.ActivationStream(
            lab.lm, lab.train_rows, hook, p.recipe.batch_size, p.recipe.buffer_tokens, seed
        )
        history = tu.train(saes, stream, cfgs)
        for (name, rate), sae in saes.items():
            quality = evaluate(sae)
            end = [row for row in history if row["system"] == (name, rate)][-1]
            row = {"name": name, "rate": rate, "seed": seed, "tokens": tokens}
            row |= {key: quality[key] for key in ("nmse", "ce_added")}
            rows.append({**row, "dead_fraction": end["dead_fraction"]})
    return pd.DataFrame(rows)


def table_updates(quick: bool) -> pd.DataFrame:
    """Adam on the whole table against SparseAdam on the batch's rows, over the same rates."""
    from notebooks.lab import PROFILES

    lr, specs = PROFILES["record"].recipe.tsae_lr, {}
    for name, by_rows in (("whole (Adam)", False), ("by rows (SparseAdam)", True)):
        for rate in (1e-3, 3e-3, 1e-2, 3e-2):
            training = {"lr": lr, "lr_lookup": rate, "lookup_by_rows": by_rows}
            specs[name, rate] = Spec({"encoder_scale": 0.5}, 0.5, training)
    table = quality_on_testbed(8192 if quick else 1_000_000, quick, specs)
    return table.rename(columns={"name": "table", "rate": "lr_lookup"})


def starts(quick: bool) -> pd.DataFrame:
    """The authors' start, decoder rows at norm 1, against SAELens's at 0.1.

    With a table the authors' encoder starts at half of that.
    """
    kinds = {
        ("sae", 1.0): ({}, None),
        ("sae", START): ({"decoder_init_norm": START}, None),
        ("tsae", 1.0): ({"encoder_scale": 0.5}, 0.5),
        ("tsae", START): ({"decoder_init_norm": START}, 0.5),
    }
    specs = {
        (name, rate): Spec(sae, table_scale, {"lr": rate})
        for name, (sae, table_scale) in kinds.items()
        for rate in (4e-3, 8e-3, 1.6e-2)
    }
    table = quality_on_testbed(8192 if quick else 2_000_000, quick, specs)
    columns = ["system", "decoder_init_norm"]
    names = pd.DataFrame(table.pop("name").tolist(), columns=columns, index=table.index)
    return pd.concat([names, table.rename(columns={"rate": "lr"})], axis=1)


# -- figures --


def draw_loss(curves: pd.DataFrame, path: Path) -> None:
    """Held-out NMSE against wall time, every system at its best rate."""
    fig, ax = plt.subplots(figsize=(6.5, 4))
    best = curves[curves.best].groupby("system", sort=False)
    for color, (system, part) in zip(COLORS, best, strict=False):
        ax.plot(part.seconds, part.nmse, "o-", color=color, label=system, markersize=4)
    ends = curves[curves.best].groupby("system").last()
    peers = [name for name, s in SYSTEMS.items() if s.worker in ("sparsify", "saelens")]
    best_peer = ends[ends.index.isin(peers)].nmse.idxmin()
    ours, peer = (
        f"{name} {ends.nmse[name]:.4f} in {ends.seconds[name]:.0f} s"
        for name in ("ours", best_peer)
    )
    machine = f"{torch.get_num_threads()} CPU cores"
    if torch.cuda.is_available():
        machine = torch.cuda.get_device_name()
    ax.set(
        xscale="log",
        yscale="log",
        xlabel=f"seconds of training, {machine}, d_sae {curves.d_sae.iloc[0]:,}",
        ylabel="held-out NMSE",
        title=f"{ours}; best peer, {peer}",
    )
    for axis in (ax.xaxis, ax.yaxis):
        axis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5)))
        axis.set_major_formatter("{x:g}")
        axis.set_minor_formatter(NullFormatter())
    ax.legend(fontsize=8)
    fig.savefig(path)


def draw_growth(table: pd.DataFrame, path: Path) -> None:
    """ms per step against everything that grows."""
    fig, axes = plt.subplots(1, len(GROWTH), figsize=(13, 3.4), sharey=True)
    for ax, (what, part) in zip(axes, table.groupby("grows", sort=False), strict=True):
        by_system = part.groupby("system", sort=False)
        for color, (system, rows) in zip(COLORS, by_system, strict=False):
            ax.plot(rows.value, rows.step_ms, "o-", color=color, label=system)
        ax.set(xscale="log", yscale="log", xlabel=what)
        values = sorted(part.value.unique())
        if len(values) > 6:
            values = values[::2]
        names = [f"{v / 1000:.0f}K" if v >= 1000 else f"{v:g}" for v in values]
        ax.set_xticks(values, names, minor=False)
        ax.set_xticks([], minor=True)
        first, last = rows.iloc[0], rows.iloc[-1]  # of the system drawn last
        more, dearer = last.value / first.value, last.step_ms / first.step_ms
        title = f"{more:.0f}x takes about {dearer:.0f}x the time"
        if part.system.nunique() > 1:
            ax.legend(fontsize=8)
            title += ", by rows"
        ax.set_title(title, fontsize=9)
    axes[0].set_ylabel("ms per step")
    fig.suptitle("Time of a step against width, k, vocabulary and number of SAEs")
    fig.savefig(path)


# -- command line --


class Results:
    """The tables of one day and machine, written after each kind of work."""

    def __init__(self, quick: bool) -> None:
        name = f"{date.today()}-{hardware()}{'-quick' if quick else ''}"
        self.path = ROOT / "benchmarks" / "results" / name
        self.path.parent.mkdir(parents=True, exist_ok=True)
        main = self.file(".csv")
        self.main = pd.read_csv(main) if main.exists() else pd.DataFrame(columns=COLUMNS)

    def file(self, ending: str) -> Path:
        return self.path.with_name(self.path.name + ending)

    def save(self, table: pd.DataFrame, ending: str, digits: int = 5) -> None:
        table.to_csv(self.file(ending), index=False, float_format=f"%.{digits}g")

    def add(self, part: pd.DataFrame) -> None:
        """Add rows to the main table in place of earlier ones of the same work and width."""
        is_replaced = self.main.work == part.work.iloc[0]
        if "d_sae" in part:
            is_replaced &= self.main.d_sae.isin(part.d_sae)
        rows = [*self.main[~is_replaced].to_dict("records"), *part.to_dict("records")]
        self.main = pd.DataFrame(rows, columns=COLUMNS)
        self.save(self.main, ".csv")
        printed = part[[column for column in PRINTED if column in part]]
        print(printed.round(4).to_string(index=False, na_rep=""))


def arguments() -> argparse.Namespace:
    """The command line, checked. Raises SystemExit with a sentence for what cannot be run."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--only", nargs="+", choices=WORK, default=WORK, help="default: all kinds of work")
    add(
        "--shape",
        dest="shapes",
        type=int,
        nargs=3,
        action="append",
        metavar=("D_IN", "D_SAE", "K"),
        help="default: 768 12288 32 and 768 24576 32",
    )
    add("--batch", type=int, default=4096)
    add("--search-steps", type=int, default=32)
    add("--rounds", type=int, default=3)
    add("--sweep-tokens", type=int, default=200_000)
    add("--again", action="store_true", help="repeat timings; rates and losses of today's search")
    add("--quick", action="store_true", help="a tiny shape, to see that everything runs")
    args = parser.parse_args()
    if not Path(PEERS).exists():
        folder = Path(PEERS).parent.parent
        raise SystemExit(
            f"the peers' environment {folder} is missing: run `make bench`, which builds it"
        )
    args.shapes = args.shapes or [(768, 12288, 32), (768, 24576, 32)]
    if args.quick:
        args.shapes, args.batch, args.search_steps = [(64, 512, 8)], 256, 16
        args.rounds, args.sweep_tokens = 2, 20_480
    widths_in = {d_in for d_in, _, _ in args.shapes}
    if len(widths_in) > 1:
        raise SystemExit(f"shapes of one run share d_in: {sorted(widths_in)} need a run each")
    return args


def run_train_step(args: argparse.Namespace, data: Path, results: Results) -> None:
    """Search of the rates, loss against time, timings at every shape."""
    _, d_sae, k = args.shapes[0]
    known = pd.read_csv(results.file("-loss.csv")) if args.again else None
    lrs, curves = search(data, d_sae, k, args.batch, args.search_steps, known)
    results.save(curves, "-loss.csv")
    draw_loss(curves, results.file("-loss.png"))
    for _, d_sae, k in args.shapes:
        steps, rounds = args.search_steps, args.rounds
        results.add(train_step(data, d_sae, k, args.batch, steps, rounds, lrs, curves))


def run_on_testbed(args: argparse.Namespace, results: Results) -> None:
    """The choices of our training: how the table is updated, and the start."""
    measured = ["nmse", "ce_added", "dead_fraction"]
    for name, study in {"table": table_updates, "start": starts}.items():
        if name in args.only:
            table = study(args.quick)
            results.save(table, f"-{name}.csv")
            compared = [column for column in table if column not in (*measured, "seed")]
            print(table.groupby(compared)[measured].mean().round(4).to_string())


def main() -> None:
    args = arguments()
    d_in, _, k = args.shapes[0]
    cache, n_tokens = ROOT / ".cache" / "bench", args.search_steps * args.batch
    data = planted(
        cache / f"planted-{d_in}-{n_tokens}-v{PLANTED_VERSION}.safetensors", d_in, n_tokens
    )
    results = Results(args.quick)
    plt.style.use(ROOT / "figures" / "tsae.mplstyle")
    if "harvest" in args.only:
        results.add(harvest(args.rounds, 3 if args.quick else 8))
    if "train_step" in args.only:
        run_train_step(args, data, results)
    if "sweep" in args.only:
        tokens = args.sweep_tokens
        rows = testbed_rows(cache / f"rows-{tokens}.safetensors", 1.2 * tokens)
        results.add(sweep(rows, tokens, 512 if args.quick else 4096))
    if "growth" in args.only:
        shrink = 64 if args.quick else 1
        table = growth(data, 8192 // shrink, k, args.batch, 6, shrink)
        results.save(table, "-growth.csv")
        draw_growth(table, results.file("-growth.png"))
    if "profile" in args.only:
        widths = [d_sae for _, d_sae, _ in args.shapes]
        table = profile(data, widths, k, args.batch, args.search_steps)
        results.save(table, "-profile.csv", digits=4)
    run_on_testbed(args, results)
    print(f"written to {results.path.parent.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
