"""Fill the generated parts of README.md and docs/ from what is committed.

    python tools/build_docs.py            # `make docs`, after a record or a benchmark
    python tools/build_docs.py --check    # fails where a document is out of date

A generated part stands between <!-- name --> and <!-- /name -->.
"""

from __future__ import annotations

import sys
import textwrap
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import nbformat
import pandas as pd
from PIL import Image

import tsae_utils as tu
from notebooks.lab.claims import VERDICTS, read_claims, scorecard
from notebooks.lab.profiles import PROFILES, ROOT, Profile

RECORD = ROOT / "figures" / "record"
BENCHMARKS = ROOT / "benchmarks" / "results"
NOTEBOOKS = sorted((ROOT / "notebooks").glob("[0-9][0-9]_*.ipynb"))
TABLE_2 = RECORD / "tab2_hyperparameters.csv"
PEERS = "sparsify|saelens"


def paragraph(*sentences: str) -> str:
    """Sentences as lines of a document."""
    return textwrap.fill(" ".join(sentences), 100, break_on_hyphens=False, break_long_words=False)


def table(columns: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


# -- the record --


def claims_by_origin() -> dict[str, pd.DataFrame]:
    """The committed claims, the paper's and our own apart."""
    claims = pd.read_csv(RECORD / "claims.csv", dtype=str, keep_default_na=False)
    origin = {
        id: claim["by"]
        for path in (ROOT / "notebooks" / "claims").glob("*.toml")
        for id, claim in read_claims(path.stem).items()
    }
    by = claims.id.map(origin)
    return {name: claims[by == name] for name in ("paper", "ours")}


def count_verdicts(claims: pd.DataFrame) -> str:
    """Verdicts in words: "31 hold, 2 are reversed, ..."."""
    words = {  # for one, for several
        "holds": ("holds", "hold"),
        "reversed": ("is reversed", "are reversed"),
        "does not hold": ("does not hold", "do not hold"),
        "undecided": ("is undecided", "are undecided"),
        "not tested": ("is not tested", "are not tested"),
    }
    count = claims.verdict.value_counts()
    return ", ".join(f"{count[v]} {words[v][int(count[v] > 1)]}" for v in VERDICTS if v in count)


def headline() -> str:
    """Figure 6 and the scorecard in a few sentences."""
    df = pd.read_csv(RECORD / "fig6_pareto.csv")
    df = df[df.system.str.startswith("topk") & (df.k > 0)].astype({"k": int})
    mean = df.pivot_table(index="k", columns="system", values="ce_added")
    to_baseline = mean["topk+lookup"] / mean["topk"]
    controls = mean.drop(columns=["topk", "topk+lookup"])
    to_best = mean["topk+lookup"] / controls.join(mean["topk"]).min(axis=1)
    origins = claims_by_origin()

    def ratios(values: pd.Series) -> str:
        return ", ".join(f"{r:.2f}" for r in values)

    return paragraph(
        f"**Result on the testbed** (layer {df.layer.iloc[0]}, {df.seed.nunique()} seeds). A TSAE",
        f"adds {mean['topk+lookup'][8]:.3f} of the clean cross-entropy at k = 8, where a TopK SAE",
        f"of the same sparsity adds {mean['topk'][8]:.3f}.",
        f"At k = {', '.join(map(str, mean.index))} the TSAE adds {ratios(to_baseline)} times as",
        "much as that baseline, which is the paper's. It adds",
        f"{ratios(to_best)} times as much as the best control at each k. These controls had no",
        "search of their own for the start of the encoder, so a stronger baseline may exist.",
        f"Of the paper's {len(origins['paper'])} claims, {count_verdicts(origins['paper'])}.",
        f"Of our own {len(origins['ours'])} claims, mostly controls,",
        count_verdicts(origins["ours"]),
        "([scorecard](docs/results.md)).",
    )


def gallery() -> str:
    """Every recorded figure with its title as alt text, two in a row."""
    cells = []
    for path in NOTEBOOKS:
        title = nbformat.read(path, as_version=4).cells[0].source.splitlines()[0].lstrip("# ")
        picture = RECORD / f"{path.stem[3:]}.png"
        if picture.exists():
            image = f"![{alt_text(picture)}](../figures/record/{picture.name})"
            cells.append(f"[{image}](../notebooks/{path.name}) {title}")
    cells += [""] * (len(cells) % 2)
    pairs = [list(pair) for pair in zip(cells[::2], cells[1::2], strict=True)]
    return table(["", ""], pairs)


def alt_text(picture: Path) -> str:
    """The sentence that a figure's title says, from its metadata."""
    text = Image.open(picture).text.get("Description", "")
    return text.rstrip(".") + "." if text else picture.stem


def answers() -> str:
    """The takeaway of every notebook."""
    parts = []
    for path in NOTEBOOKS:
        takeaway = RECORD / f"{path.stem[3:]}_takeaway.md"
        if takeaway.exists():
            title = nbformat.read(path, as_version=4).cells[0].source.splitlines()[0]
            link = f"[{title.lstrip('# ')}](../notebooks/{path.name})"
            parts.append(f"* **{link}** {takeaway.read_text(encoding='utf-8').strip()}")
    return "\n".join(parts)


def verdicts() -> str:
    """The scorecard, the paper's claims and our own apart."""
    titles = {"paper": "The paper's claims", "ours": "Our own controls and questions"}
    parts = []
    for origin, claims in claims_by_origin().items():
        summary = f"{len(claims)} claims: {count_verdicts(claims)}."
        parts.append(f"### {titles[origin]}\n\n{summary}\n\n{scorecard(claims)}")
    return "\n\n".join(parts)


def hyperparameters() -> pd.DataFrame:
    """Table 2: the paper's settings, those of the authors' code, and ours by profile."""
    table = pd.read_csv(ROOT / "notebooks" / "paper_hyperparameters.csv")
    for name in ("record", "gpt2", "pythia"):
        values = settings_of(PROFILES[name])
        table[name] = [values[setting] for setting in table.ours]
    return table.drop(columns="ours")


def settings_of(p: Profile) -> dict[str, str]:
    """A profile's hyperparameters in words."""
    train, sae = tu.TrainConfig(), tu.TSAEConfig(d_in=1, d_sae=1, k=1)
    shown = {
        name: value
        for group in (p.source, p.grid, p.recipe, p.budget)
        for name, value in vars(group).items()
    }

    def listed(values: tuple) -> str:
        return ", ".join(f"{value:g}" for value in values)

    words = {name: f"{v:,}" if isinstance(v, int) else str(v) for name, v in shown.items()}
    words |= {name: listed(shown[name]) for name in ("ks", "l1s")}
    words |= {
        "model": tu.hub_name(p.source.model)[0],
        "corpus": tu.hub_name(p.source.corpus)[0],
        "layers": ", ".join(str(Fraction(d).limit_denominator(24)) for d in p.grid.depths)
        + f" of the depth; mainly {Fraction(p.grid.depth).limit_denominator(24)}",
        "optimiser": "Adam (0.9, 0.999)",
        "lrs": f"best of {listed(p.recipe.lrs)}" if len(p.recipe.lrs) > 1 else listed(p.recipe.lrs),
        "lr_lookup": f"{train.lr_lookup:g}",
        "lr_end": f"cosine to {p.recipe.lr_end:g} of the rate",
        "l1_warmup": f"first {train.l1_warmup:.0%} of steps",
        "table_start": "0.5 A([BOS, t])_1",
        "encoder_start": "0.5 W_dec^T with a table; W_dec^T without",
        "decoder_init_norm": f"{sae.decoder_init_norm:g} at the start, free afterwards",
        "seeds": str(len(p.grid.seeds)),
        "aux_k": "none; notebook 13 tries it",
    }
    return words


def table_2() -> str:
    """Table 2 in Markdown."""
    rows = hyperparameters()
    heads = ["setting", "paper (W)", "authors' code", *(f"`{n}`" for n in rows.columns[3:])]
    return table(heads, rows.astype(str).to_numpy().tolist())


def histories() -> str:
    """What first attempts taught, by notebook."""
    files = sorted((ROOT / "docs" / "histories").glob("*.md"))
    return "\n\n".join(path.read_text(encoding="utf-8").strip() for path in files)


def times() -> str:
    """Minutes of the notebooks at profile mini."""
    seconds = pd.read_csv(RECORD / "mini_times.csv").seconds
    return paragraph(
        f"All notebooks at `mini` take {seconds.sum() / 60:.0f} minutes on two CPU cores; the",
        f"longest takes {seconds.max() / 60:.0f}. Setting up the environment takes extra time.",
    )


# -- benchmarks --


def newest(kind: str) -> tuple[Path, pd.DataFrame]:
    """The newest CPU run of a kind: benchmarks/results/<date>-<hardware><kind>.csv."""
    path = sorted(BENCHMARKS.glob(f"20*-cores{kind}.csv"))[-1]
    return path, pd.read_csv(path)


def link(path: Path) -> str:
    """A link to a benchmark's CSV from docs/."""
    return f"[{path.name}](../benchmarks/results/{path.name})"


def number(value: float, fmt: str) -> str:
    """A formatted number, empty where there is none."""
    return "" if pd.isna(value) else f"{value:{fmt}}"


def speed_table() -> str:
    """Every system of the newest side-by-side run."""
    path, run = newest("")
    rows = [
        [
            r.work,
            r.system,
            number(r.d_sae, ",.0f"),
            f"{r.tokens_per_s:,.0f}",
            f"{r.ratio_to_ours:.2f}",
            f"{r.peak_gib:.2f}",
            number(r.nmse, ".4f"),
        ]
        for _, part in run.groupby("work", sort=False)
        for r in part.sort_values("d_sae", kind="stable").itertuples()
    ]
    columns = ["work", "system", "d_sae", "tokens/s", "of ours", "peak GiB", "held-out NMSE"]
    return f"{table(columns, rows)}\n\nRun: {link(path)}."


def speed_summary() -> str:
    """The ratios of the newest run in words, with the aims they were measured against."""
    run = newest("")[1]
    parts = [step_summary(*group) for group in run[run.work == "train_step"].groupby("d_sae")]
    harvest = run[run.work == "harvest"].set_index("system").tokens_per_s
    parts.append(
        paragraph(
            "* Harvesting activations is",
            f"{harvest['ours'] / harvest['transformerlens']:.1f} times as fast as",
            "TransformerLens's cached forward pass (aim: 5) and",
            f"{harvest['ours'] / harvest['raw']:.2f} times as fast as the raw module.",
        )
    )
    return "\n".join([*parts, sweep_summary(run[run.work == "sweep"].set_index("system"))])


def step_summary(width: float, part: pd.DataFrame) -> str:
    """A training step at one width against the other systems."""
    by_system = part.set_index("system")
    ms, speed, nmse = by_system.step_ms, by_system.tokens_per_s, by_system.nmse
    peers = by_system.index.str.contains(PEERS)
    saelens = by_system.index.str.contains("saelens")
    fastest = speed[peers].idxmax()
    slowest_round = by_system.step_ms_max["ours"]
    worse = nmse["ours"] / nmse[peers].min() - 1
    product = ms["ours"] / ms["encoder product alone, bf16"]
    return paragraph(
        f"* A training step at {width:,.0f} features takes {ms['ours']:.0f} ms (at most",
        f"{slowest_round:.0f}).",
        f"That is {speed['ours'] / speed[fastest]:.2f} times as fast as the fastest peer",
        f"({fastest}; aim: 2) and {speed['ours'] / speed[saelens].max():.1f} times as fast as",
        f"SAELens's best (aim: 7). The encoder's bf16 product alone takes {1 / product:.0%} of the",
        f"step. The NMSE differs from the best peer's by {worse:+.1%}.",
    )


def sweep_summary(by_system: pd.DataFrame) -> str:
    """A whole sweep against the other systems."""
    peers = by_system[by_system.index.str.contains(PEERS)]
    fastest = peers.tokens_per_s.idxmax()
    as_good = peers[peers.nmse <= 1.01 * peers.nmse.min()].tokens_per_s.idxmax()
    ratio = by_system.tokens_per_s["ours"] / by_system.tokens_per_s
    return paragraph(
        f"* The sweep ends at NMSE {by_system.nmse['ours']:.4f}. It is {ratio[as_good]:.1f} times",
        f"as fast as the fastest peer within 1 % of the best peer's loss ({as_good},",
        f"{by_system.nmse[as_good]:.4f}) and {ratio[fastest]:.1f} times as fast as the fastest",
        f"({fastest}, {by_system.nmse[fastest]:.4f}). Memory is",
        f"{by_system.peak_gib['ours']:.2f} GiB, against {peers.peak_gib.min():.2f} GiB for the",
        "leanest peer.",
    )


def profile_table() -> str:
    """The five operations that take most time, for every profiled system."""
    path, run = newest("-profile")
    rows = []
    keys = ["work", "d_sae", "system"]
    for (work, d_sae, system), part in run.groupby(keys, sort=False, dropna=False):
        largest = part.nlargest(5, "ms_per_step")
        operations = ", ".join(
            f"{r.operation.split('::')[-1].lstrip('_')} {r.ms_per_step:.0f}"
            for r in largest.itertuples()
        )
        total = f"{part.ms_per_step.sum():,.0f}"
        rows.append([work, system, number(d_sae, ",.0f"), total, operations])
    columns = ["work", "system", "d_sae", "ms under the profiler", "largest parts, ms"]
    return f"{table(columns, rows)}\n\nAll operations: {link(path)}."


def rehearsal() -> str:
    """Memory and time of every notebook at gpt2-lite, from the rehearsal."""
    (path, run), (_, speeds) = newest("-rehearsal"), newest("")
    ours = (speeds.work == "harvest") & (speeds.system == "ours")
    tokens_per_s = speeds[ours].tokens_per_s.item()
    seconds = run.sae_seconds_full + run.model_mtokens_full * 1e6 / tokens_per_s
    rows = [
        [r.notebook, f"{r.peak_gib:.1f}", str(r.saes), f"{hours:.1f}" if r.saes else ""]
        for r, hours in zip(run.itertuples(), seconds / 3600, strict=True)
    ]
    rows.append(
        ["all", f"{run.peak_gib.max():.1f}", str(run.saes.sum()), f"{seconds.sum() / 3600:.0f}"]
    )
    columns = ["notebook at `gpt2-lite`", "peak GiB", "SAEs", "hours of training"]
    return f"{table(columns, rows)}\n\nRun: {link(path)}."


DOCUMENTS: dict[str, dict[str, Callable[[], str]]] = {
    "README.md": {"headline": headline},
    "docs/results.md": {
        "answers": answers,
        "gallery": gallery,
        "verdicts": verdicts,
        "table 2": table_2,
        "histories": histories,
    },
    "docs/speed.md": {"summary": speed_summary, "table": speed_table, "profile": profile_table},
    "docs/real_models.md": {"times": times, "rehearsal": rehearsal},
}


def fill(name: str) -> str:
    """A document with its generated parts made again.

    Raises SystemExit where a part's marks are missing.
    """
    text = (ROOT / name).read_text(encoding="utf-8")
    for block, make in DOCUMENTS[name].items():
        start, end = f"<!-- {block} -->", f"<!-- /{block} -->"
        if text.count(start) != 1 or text.count(end) != 1:
            raise SystemExit(f"{name} needs one block {start} ... {end}")
        head, rest = text.split(start)
        tail = rest.split(end)[1]
        text = f"{head}{start}\n{make()}\n{end}{tail}"
    return text


def main() -> None:
    csv = hyperparameters().to_csv(index=False)
    stale = [name for name in DOCUMENTS if fill(name) != (ROOT / name).read_text(encoding="utf-8")]
    if not TABLE_2.exists() or TABLE_2.read_text(encoding="utf-8") != csv:
        stale.append(TABLE_2.name)
    if "--check" in sys.argv:
        if stale:
            raise SystemExit(f"out of date: {', '.join(stale)}; run `make docs`")
        return
    TABLE_2.write_text(csv, encoding="utf-8")
    for name in set(stale) & set(DOCUMENTS):
        (ROOT / name).write_text(fill(name), encoding="utf-8")
        print(f"updated {name}")


if __name__ == "__main__":
    main()
