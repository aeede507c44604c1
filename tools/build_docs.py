"""Fill the README's marked blocks from what is committed: headline, status, gallery, scorecard, times, benchmarks.

    python notebooks/readme.py            # `make readme`, after a record
    python notebooks/readme.py --check    # fails where the README differs
"""

from __future__ import annotations

import sys
import textwrap
from pathlib import Path

import nbformat
import pandas as pd
from lab import ROOT, scorecard

RECORD = ROOT / "figures" / "record"
NOTEBOOKS = sorted((ROOT / "notebooks").glob("[0-9][0-9]_*.ipynb"))


def headline() -> str:
    """Figure 6 in four sentences."""
    df = pd.read_csv(RECORD / "fig6_pareto.csv")
    df = df[~df.system.str.contains("relu|gated|batchtopk")].astype({"k": int})  # those have a budget of their own
    mean = df[df.k > 0].pivot_table(index="k", columns="system", values="ce_added")
    ratio = mean["topk+lookup"] / mean["topk"]
    controls = [c for c in mean if c not in ("topk", "topk+lookup")]
    below = all((mean["topk+lookup"] < mean[c]).all() for c in controls)
    ours, theirs = mean["topk+lookup"][8], mean["topk"][8]
    claims = pd.read_csv(RECORD / "fig6_pareto_claims.csv").set_index("id").ours
    others = ("BatchTopK", "ReLU", "Gated")
    needs = claims.str.extract(r"L0 x ([\d.]+)")[0]
    return "\n".join([
        f"**Headline** (testbed, layer {df.layer[0]}, {df.seed.nunique()} seeds): at k = 8 a TSAE adds",
        f"{ours:.3f} of the clean cross-entropy where a TopK SAE of the same sparsity adds {theirs:.3f}. The ratio is",
        ", ".join(f"{r:.2f} (k = {k})" for k, r in ratio.items()) + ".",
        f"The TSAE is {'below' if below else 'not below'} every control at every k ({', '.join(controls)}).",
        "For the same cross-entropy a TSAE needs " + ", ".join(f"{needs['fig6-' + a.lower()]} ({a})" for a in others),
        "of the active features of an SAE of that architecture."])


def status() -> str:
    """Which notebooks have a committed record."""
    missing = [n.stem for n in NOTEBOOKS if not (RECORD / f"{n.stem[3:]}.csv").exists() and n.stem != "99_scorecard"]
    text = "yes: `figures/record/`, three seeds where SAEs are compared"
    return text + (f"; not recorded yet: {', '.join(f'`{m}`' for m in missing)} (the tests run them at `smoke`)" if missing else "")


def gallery() -> str:
    """Every recorded figure with its notebook's title, two in a row."""
    cells = []
    for path in NOTEBOOKS:
        title = nbformat.read(path, as_version=4).cells[0].source.splitlines()[0].lstrip("# ")
        for picture in sorted(RECORD.glob(f"{path.stem[3:]}*.png")):  # its own, then what it draws beside
            beside = picture.stem.removeprefix(path.stem[3:]).replace("_", " ")
            cells.append(f"[![{picture.stem}](figures/record/{picture.name})](notebooks/{path.name}) {title}{beside and f':{beside}'}")
    cells += [""] * (len(cells) % 2)
    return "\n".join(["| | |", "|---|---|", *(f"| {a} | {b} |" for a, b in zip(cells[::2], cells[1::2], strict=True))])


def verdicts() -> str:
    """The scorecard with its sum."""
    claims = pd.read_csv(RECORD / "claims.csv", dtype=str)
    count = claims.verdict.value_counts()
    return ", ".join(f"{n} {v}" for v, n in count.items()) + f", of {len(claims)} claims.\n\n" + scorecard(claims)


def times() -> str:
    """Minutes of each notebook at mini, from a fresh clone."""
    t = pd.read_csv(RECORD / "mini_times.csv")
    each = "; ".join(f"{r.notebook[:2]} {r.seconds} s" for r in t.itertuples())
    return f"All notebooks at `mini` on a fresh clone, two CPU cores: {t.seconds.sum() / 60:.0f} minutes beside the environment ({each})."


def speed() -> str:
    """The newest side-by-side run of `make bench` on every kind of hardware."""
    latest = {}  # (hardware, kind of work): rows
    for path in sorted((ROOT / "benchmarks" / "results").glob("20*.csv")):
        if "ratio_to_ours" in path.read_text().splitlines()[0] and "-quick" not in path.stem:
            for work, part in pd.read_csv(path).groupby("work", sort=False):
                latest[path.stem[11:], work] = (path, part)
    lines = ["| work | system | d_sae | tokens/s | of ours | peak GiB | held-out NMSE |", "|---|---|---|---|---|---|---|"]
    for _, part in latest.values():
        for r in part.sort_values("d_sae", kind="stable").itertuples():
            d_sae, nmse = "" if pd.isna(r.d_sae) else f"{r.d_sae:,.0f}", "" if pd.isna(r.nmse) else f"{r.nmse:.4f}"
            lines.append(f"| {r.work} | {r.system} | {d_sae} | {r.tokens_per_s:,.0f} | {r.ratio_to_ours:.2f} | {r.peak_gib:.2f} | {nmse} |")
    runs = "; ".join(f"[{name}](benchmarks/results/{name})" for name in sorted({path.name for path, _ in latest.values()}))
    found = newest("")
    words = f"\n\n{verdict_on_speed(found[1])}" if found else ""
    return f"{runs}\n\n" + "\n".join(lines) + words if latest else "No run is committed yet."


PEERS = "sparsify|saelens"


def verdict_on_speed(run: pd.DataFrame) -> str:
    """The ratios of one run in words: speed against the fastest peer, SAELens, the bare product; loss against the best peer."""
    told = []
    for width, part in run[run.work == "train_step"].groupby("d_sae"):
        t = part.set_index("system")
        ms, speed, gib, nmse = t.step_ms, t.tokens_per_s, t.peak_gib, t.nmse
        peers, saelens = t.index.str.contains(PEERS), t.index.str.contains("saelens")
        worse = nmse["ours"] / nmse[peers].min() - 1
        fastest = speed[peers].idxmax()
        told += [
            f"A step at {width:,.0f} features takes {ms['ours']:.0f} ms ({span(t, 'ours')} over the rounds):",
            f"{speed['ours'] / speed[fastest]:.2f} times the tokens/s of the fastest peer ({fastest}, {span(t, fastest)} ms; aim: 2),",
            f"{speed['ours'] / speed[saelens].max():.1f} times SAELens's best (aim: 7),",
            f"{ms['ours'] / ms['encoder product alone, bf16']:.2f} times the time of the encoder's bf16 product alone (aim: 2);",
            f"memory {gib['ours']:.2f} GiB (leanest peer: {gib[peers].min():.2f} GiB). After these few steps its NMSE is",
            f"{worse:+.1%} beside the best peer's (rule: at most +1 %: {'met' if worse <= 0.01 else 'missed'})."]
    speed = run[run.work == "harvest"].set_index("system").tokens_per_s
    if len(speed):
        told += [f"Activations: {speed['ours'] / speed['transformerlens']:.1f} times TransformerLens's cached forward (aim: 5),",
                 f"{speed['ours'] / speed['raw']:.2f} of the raw module (aim: 0.9)."]
    t = run[run.work == "sweep"].set_index("system")
    if len(t):
        peers = t[t.index.str.contains(PEERS)]
        fastest, alike = peers.tokens_per_s.idxmax(), peers[peers.nmse <= 1.01 * peers.nmse.min()].tokens_per_s.idxmax()
        speed = t.tokens_per_s["ours"] / t.tokens_per_s
        told += [
            f"The sweep ends at NMSE {t.nmse['ours']:.4f}, {speed[alike]:.1f} times as fast as the fastest peer that ends within 1 %",
            f"of the best ({alike}, {t.nmse[alike]:.4f}), {speed[fastest]:.1f} times the fastest ({fastest}, {t.nmse[fastest]:.4f});",
            f"memory {t.peak_gib['ours']:.2f} GiB (leanest peer: {peers.peak_gib.min():.2f} GiB)."]
    return paragraph(*told)


def span(by_system: pd.DataFrame, system: str) -> str:
    """Fastest and slowest round of a system in ms."""
    return f"{by_system.step_ms_min[system]:.0f} to {by_system.step_ms_max[system]:.0f}"


def profiles() -> str:
    """Where the time of a step and of a harvest goes: the five operations that take most, of every profiled way."""
    found = newest("-profile")
    if found is None:
        return "Not profiled yet."
    lines = ["| work | system | d_sae | ms under the profiler | of it, in ms |", "|---|---|---|---|---|"]
    for (work, d_sae, system), part in found[1].groupby(["work", "d_sae", "system"], sort=False, dropna=False):
        most = part.nlargest(5, "ms_per_step").set_index("operation").ms_per_step
        where = ", ".join(f"{name.split('::')[-1].lstrip('_')} {ms:.0f}" for name, ms in most.items())
        lines.append(f"| {work} | {system} | {'' if pd.isna(d_sae) else f'{d_sae:,.0f}'} | {part.ms_per_step.sum():,.0f} | {where} |")
    name = f"[{found[0].name}](benchmarks/results/{found[0].name})"
    return "\n".join([*lines, "", paragraph(
        "Start and first steps are in it, and the profiler costs time: for times see the table above.", f"The rest: {name}.")])


def paragraph(*parts: str) -> str:
    """Sentences as lines of the README."""
    return textwrap.fill(" ".join(parts), 140, break_on_hyphens=False, break_long_words=False)


def newest(kind: str) -> tuple[Path, pd.DataFrame] | None:
    """The newest benchmarks/results/<date>-<hardware><kind>.csv of a CPU, None where there is none."""
    paths = sorted((ROOT / "benchmarks" / "results").glob(f"20*-cores{kind}.csv"))
    return (paths[-1], pd.read_csv(paths[-1])) if paths else None


def harvest(run: pd.DataFrame) -> float:
    """Tokens/s of our activations."""
    return run[(run.work == "harvest") & (run.system == "ours")].tokens_per_s.item()


def nodes() -> str:
    """What 300M tokens of GPT-2 small cost on one machine of the benchmark's kind and on several, from the measured speeds."""
    found = newest("")
    speeds = found[1].set_index(["work", "system", "d_sae"]).tokens_per_s if found else {}
    if ("train_step", "ours+table", 12_288) not in speeds:
        return "Not measured yet."
    model, step, rows = harvest(found[1]), *(speeds["train_step", f"ours+table{how}", 12_288] for how in ("", " by rows"))
    compute, steps = 1 / model + 1 / step, 300e6 / 4096  # seconds a token
    hours = f"{300e6 * compute / 3600:.0f}"
    weights, table = 4 * (2 * 768 * 12_288 + 12_288 + 768), 4 * 50_257 * 768  # bytes of gradients
    sent = 2 * (weights + table)  # a ring's all-reduce sends nearly twice what it adds up
    return paragraph(
        f"300M tokens of GPT-2 small for one TSAE (16x, k = 32) take {hours} hours on two CPU cores:",
        f"{300e6 / model / 3600:.0f} in the language model ({model:,.0f} tokens/s), {300e6 / step / 3600:.1f} in the SAE ({step:,.0f};",
        f"updating the table by rows {rows:,.0f}). N such machines take {hours} / N hours and send gradients of",
        f"{weights / 2**20:.0f} MiB for the SAE and {table / 2**20:.0f} MiB for a whole table in each of {steps:,.0f} steps,",
        f"{sent * steps / 2**40:.0f} TiB in all from each machine: {8 * sent / 1e9:.1f} s a step at 1 Gbit/s, where a step of 8 machines",
        f"computes for {4096 * compute / 8:.2f} s. With `--lookup-by-rows` only a batch's rows of the table travel; larger steps",
        "(`--batch-size`) or 10 Gbit/s do the rest. Worked out from the speeds, not run.")


def rehearsal() -> str:
    """Memory and time of every notebook at gpt2-lite, from the rehearsal, and of Pythia's shape."""
    lite, pythia, speeds = newest("-rehearsal"), newest("-pythia"), newest("")
    if lite is None or pythia is None or speeds is None:
        return "Not rehearsed yet."
    t, p = lite[1], pythia[1].set_index("what")
    hours = (t.sae_seconds_full + t.model_mtokens_full * 1e6 / harvest(speeds[1])) / 3600
    columns = ["notebook at `gpt2-lite`", "peak GiB", "SAEs", "M tokens through SAEs", "M tokens through GPT-2", "hours of training"]
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for r, h in zip(t.itertuples(), hours, strict=True):
        through = f"{r.sae_mtokens_full:,.0f} | {r.model_mtokens_full:,.0f} | {h:.1f}" if r.saes else " | |"
        lines.append(f"| {r.notebook} | {r.peak_gib:.1f} | {r.saes} | {through} |")
    through = f"{t.sae_mtokens_full.sum():,.0f} | {t.model_mtokens_full.sum():,.0f} | {hours.sum():.0f}"
    lines.append(f"| all | {t.peak_gib.max():.1f} | {t.saes.sum()} | {through} |")
    names = "; ".join(f"[{path.name}](benchmarks/results/{path.name})" for path in (lite[0], pythia[0]))
    return "\n".join([*lines, "", paragraph(
        "Two CPU cores, without a GPU. Tokens are the rehearsal's, which takes whole batches, times a thousand. Hours come from one to",
        "seven steps of each SAE, the slow first one included: an upper bound. Pythia-1.4B's shape on the same machine:",
        f"{p.tokens_per_s['harvest 2, layer 16']:,.0f} tokens/s through 16 of 24 layers; a step of 4,096 tokens",
        f"{p.seconds['topk, later steps']:.1f} s (SAE, 8x) and {p.seconds['topk+lookup, later steps']:.1f} s (TSAE); peak memory",
        f"{p.peak_gib.max():.1f} GiB ({names}).")])


BLOCKS = {"headline": headline, "status": status, "gallery": gallery, "scorecard": verdicts, "times": times,
          "rehearsal": rehearsal, "nodes": nodes, "speed": speed, "profiles": profiles}


def fill(text: str) -> str:
    """The README with its blocks made again."""
    for name, block in BLOCKS.items():
        start, end = f"<!-- {name} -->", f"<!-- /{name} -->"
        if text.count(start) != 1 or text.count(end) != 1:
            raise SystemExit(f"README.md needs one block {start} ... {end}")
        head, tail = text.split(start)[0], text.split(end)[1]
        body = block() if name == "status" else f"\n{block()}\n"  # the status stands in a table's cell
        text = head + start + body + end + tail
    return text


if __name__ == "__main__":
    readme = ROOT / "README.md"
    filled = fill(readme.read_text())
    if "--check" in sys.argv and filled != readme.read_text():
        raise SystemExit("README.md differs from the record: run `make readme`")
    readme.write_text(filled)
