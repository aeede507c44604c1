"""Fill the README's marked blocks from what is committed: headline, status, gallery, scorecard, times.

    python notebooks/readme.py            # `make readme`, after a record
    python notebooks/readme.py --check    # fails where the README differs
"""

from __future__ import annotations

import sys

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
    newest = {}  # (hardware, kind of work): rows
    for path in sorted((ROOT / "benchmarks" / "results").glob("20*.csv")):
        if "ratio_to_ours" in path.read_text().splitlines()[0] and "-quick" not in path.stem:
            for work, part in pd.read_csv(path).groupby("work", sort=False):
                newest[path.stem[11:], work] = (path, part)
    lines = ["| work | system | d_sae | tokens/s | of ours | peak GiB | held-out NMSE |", "|---|---|---|---|---|---|---|"]
    for _, part in newest.values():
        for r in part.itertuples():
            d_sae, nmse = "" if pd.isna(r.d_sae) else f"{r.d_sae:,.0f}", "" if pd.isna(r.nmse) else f"{r.nmse:.4f}"
            lines.append(f"| {r.work} | {r.system} | {d_sae} | {r.tokens_per_s:,.0f} | {r.ratio_to_ours:.2f} | {r.peak_gib:.2f} | {nmse} |")
    runs = "; ".join(f"[{name}](benchmarks/results/{name})" for name in sorted({path.name for path, _ in newest.values()}))
    return f"{runs}\n\n" + "\n".join(lines) if newest else "No run is committed yet."


BLOCKS = {"headline": headline, "status": status, "gallery": gallery, "scorecard": verdicts, "times": times, "speed": speed}


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
