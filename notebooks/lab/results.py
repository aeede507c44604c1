"""Everything a notebook leaves behind: CSVs, records of runs, figures, pages."""

from __future__ import annotations

import json
import os
import platform
import textwrap
import time
from collections.abc import Callable
from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd
import torch

from .claims import read_table
from .context import Context
from .profiles import ROOT
from .store import code_hash


def write(folder: Path, name: str, text: str) -> Path:
    """Write a file whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    partial = folder / f".{name}.{os.getpid()}.partial"
    partial.write_text(text, encoding="utf-8")
    return partial.replace(folder / name)


def run(lab: Context, measure: Callable, suffixes: tuple[str, ...]):
    """Tables of `measure()` by way of their CSVs; a redraw only reads the CSVs."""
    if not lab.replay:
        tables = measure()
        tables = (tables,) if isinstance(tables, pd.DataFrame) else tables
        for table, suffix in zip(tables, suffixes, strict=True):
            save_csv(lab, table, suffix)
    saved = tuple(read_csv(lab, suffix) for suffix in suffixes)
    return saved[0] if len(saved) == 1 else saved


def save_csv(lab: Context, table: pd.DataFrame, suffix: str) -> None:
    """Write <id><suffix>.csv and, beside the main table, <id>.json: what was run on what."""
    text = table.to_csv(index=False, float_format="%.6g")
    write(lab.out, f"{lab.id}{suffix}.csv", text)
    if suffix:
        return
    record = {
        "id": lab.id,
        "profile": lab.p.flat(),
        "model": lab.model_name,
        "model_hash": lab.lm.fingerprint,
        "weights_sha256": lab.weights_sha256,
        "corpus_hash": lab.corpus_hash,
        "code": code_hash(),
        "torch": torch.__version__.split("+")[0],
        "device": str(lab.lm.device),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "seconds": round(time.time() - lab.started),
    }
    write(lab.out, f"{lab.id}.json", json.dumps(record, indent=1) + "\n")
    if lab.looks_at_final:
        count_look(lab)


def read_csv(lab: Context, suffix: str) -> pd.DataFrame:
    """A saved table. Raises FileNotFoundError where the notebook has not run."""
    return read_table(lab.out / f"{lab.id}{suffix}.csv")


def count_look(lab: Context) -> None:
    """Add a line to final_looks.csv: this notebook has measured on the split `final`."""
    path = lab.out / "final_looks.csv"
    lines = path.read_text().splitlines() if path.exists() else ["look,id,code,corpus_hash"]
    lines.append(f"{len(lines)},{lab.id},{code_hash()},{lab.corpus_hash}")
    write(lab.out, path.name, "\n".join(lines) + "\n")


def configs(lab: Context) -> list[str]:
    """The configurations of the rows in the notebook's tables."""
    found: dict[str, None] = {}
    for path in sorted(lab.out.glob(f"{lab.id}*.csv")):
        if path.name != f"{lab.id}.partial.csv":
            found |= dict.fromkeys(pd.read_csv(path, dtype=str).get("config", pd.Series()).dropna())
    return list(found)


def savefig(lab: Context, figure: plt.Figure, title: str, suffix: str) -> None:
    """Give the figure its title, a true sentence, and write <id><suffix>.png and .pdf.

    The PNG carries the title as its description, from which alt texts are made.
    """
    wide = round(11.5 * figure.get_figwidth())
    figure.suptitle(textwrap.fill(title, wide), ha="left", x=0.01, weight="bold", size=11)
    lab.out.mkdir(parents=True, exist_ok=True)
    path = lab.out / f"{lab.id}{suffix}"
    figure.savefig(f"{path}.png", metadata={"Software": None, "Description": title})
    figure.savefig(f"{path}.pdf", metadata={"CreationDate": None, "Title": title})


def paper_numbers(figure: str) -> pd.DataFrame:
    """The paper's values for one figure; provenance in the column `source`."""
    numbers = pd.read_csv(ROOT / "notebooks" / "paper_numbers.csv")
    numbers = numbers[numbers.figure == figure]

    def as_numbers(column: pd.Series) -> pd.Series:
        is_number = column.astype(str).str.fullmatch(r"-?[\d.]+").all()
        return pd.to_numeric(column) if is_number else column

    return numbers.apply(as_numbers)
