"""Measured rows, each under hashes of what made it, so that a stopped record resumes.

A row carries `config`, a hash of its SAE's configuration, text and measurement, and `code`, a hash
of the sources that decide its numbers. Rows of finished tables and of `<id>.partial.csv` are taken
again where both are the same; only what is missing is trained. After each SAE the partial file is
written whole. Sums over documents go the same way, in `<id>_documents.csv.gz`.
"""

from __future__ import annotations

import ast
import csv
import hashlib
import json
from collections.abc import Callable, Iterable
from functools import lru_cache
from pathlib import Path

import numpy as np
import pandas as pd

import tsae_utils as tu
from tsae.metrics import DocumentSums

from .context import Context
from .profiles import ROOT
from .training import SAESpec, passes, spec_changes, train_or_load

Rows = list[dict]
Measure = Callable[[tu.TSAE], dict | Rows]
DECIDING = (  # sources that decide what a trained SAE measures
    "tsae_utils.py",
    *(f"tsae/{name}.py" for name in ("kernels", "run", "stream", "tables", "metrics", "text")),
    *(f"tsae/{name}.py" for name in ("language_model", "blocks", "inputs")),
    "notebooks/lab/training.py",
    "notebooks/lab/data.py",
    "testbed/corpus.py",
)
DOCUMENT_COLUMNS = ["config", "document", "n", "ce_added", "positions", "squared_error", "code"]


@lru_cache(maxsize=1)
def code_hash() -> str:
    """Hash of the deciding sources; comments, docstrings and layout do not count."""
    return hash_of_code((ROOT / name).read_text(encoding="utf-8") for name in DECIDING)


@lru_cache(maxsize=8)
def measurement_hash(figure_id: str) -> str:
    """Hash of what a notebook, as saved, trains and measures: new columns are measured.

    These are its cells with constants and runs, and the modules beside it that it imports.
    """
    folder, cells = ROOT / "notebooks", []
    for path in sorted(folder.glob(f"[0-9][0-9]_{figure_id}.ipynb")):
        cells += json.loads(path.read_text(encoding="utf-8"))["cells"]
    sources = {"bootstrap": "", "parameters": "", "run": ""}
    for cell in cells:
        for tag in sources.keys() & set(cell["metadata"].get("tags", [])):
            sources[tag] += "".join(cell["source"]) + "\n"
    imports = (
        n for n in ast.walk(ast.parse(sources.pop("bootstrap"))) if isinstance(n, ast.Import)
    )
    modules = sorted(alias.name for node in imports for alias in node.names)
    beside = [folder / f"{name}.py" for name in modules if (folder / f"{name}.py").exists()]
    return hash_of_code([*sources.values(), *(path.read_text(encoding="utf-8") for path in beside)])


def hash_of_code(sources: Iterable[str]) -> str:
    """Hash of Python sources without comments, docstrings and layout."""
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    trees = []
    for source in sources:
        tree = ast.parse(source)
        for node in ast.walk(tree):
            if isinstance(node, documented) and ast.get_docstring(node, clean=False) is not None:
                node.body[0] = ast.Pass()
        trees.append(ast.unparse(tree))
    return hashlib.sha256("\n".join(trees).encode()).hexdigest()[:12]


def config_hash(lab: Context, spec: SAESpec, layer: int, seed: int, tokens: int, what: str) -> str:
    """Hash of one SAE's configuration, of its text and of the measurement `what`."""
    recipe, budget = lab.p.recipe, lab.p.budget
    key = [
        what,
        measurement_hash(lab.id),
        spec_changes(spec),
        layer,
        seed,
        tokens,
        lab.context_size,
    ]
    key += [recipe.batch_size, recipe.buffer_tokens, recipe.lr_end]
    key += [lab.lm.fingerprint, lab.lm.bf16, lab.corpus_hash, budget.tokens]
    key += [budget.eval_tokens, budget.curve_tokens, budget.curve_points]
    key += [budget.feature_tokens, budget.features, budget.ngram_tokens, budget.ngrams]
    return hashlib.sha256(json.dumps(key).encode()).hexdigest()[:12]


def parsed(text: str) -> int | float | str:
    """A cell as the number that it is."""
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def written(value: object) -> str:
    """A cell as tables write it: six digits."""
    if value is None or (isinstance(value, float) and np.isnan(value)):
        return ""
    return f"{value:.6g}" if isinstance(value, float | np.floating) else str(value)


class Store:
    """The measured rows of one notebook."""

    def __init__(self, folder: Path, figure_id: str) -> None:
        self.folder, self.id, self.code = folder, figure_id, code_hash()
        self.partial = folder / f"{figure_id}.partial.csv"
        self.documents_partial = folder / f"{figure_id}_documents.partial.csv.gz"
        self.documents_file = folder / f"{figure_id}_documents.csv.gz"
        self.rows: dict[str, Rows] = {}
        tables = [folder / f"{figure_id}.csv", *sorted(folder.glob(f"{figure_id}_*.csv"))]
        for path in (*tables, self.partial):
            self._read(path)
        parts = [
            pd.read_csv(path)
            for path in (self.documents_file, self.documents_partial)
            if path.exists()
        ]
        self.documents = {
            config: part
            for table in parts
            for (config, code), part in table.groupby(["config", "code"], sort=False)
            if config in self.rows and code == self.code
        }

    def _read(self, path: Path) -> None:
        if not path.exists():
            return
        with path.open(encoding="utf-8", newline="") as file:
            reader = csv.DictReader(file)
            if not {"config", "code"} <= set(reader.fieldnames or ()):
                return
            found: dict[str, Rows] = {}
            for cells in reader:
                if cells["code"] == self.code:
                    hashes = {name: cells.pop(name) for name in ("config", "code")}
                    row = {name: parsed(text) for name, text in cells.items() if text}
                    found.setdefault(hashes["config"], []).append(row | hashes)
        for config, rows in found.items():  # a partial row is in no finished table, or the same
            self.rows.setdefault(config, rows)

    def add(self, config: str, rows: Rows, sums: DocumentSums | None) -> Rows:
        """Keep the rows of one SAE, on the disk too; returns them with their hashes."""
        rows = [row | {"config": config, "code": self.code} for row in rows]
        self.rows[config] = rows
        self.folder.mkdir(parents=True, exist_ok=True)
        if sums is not None:
            self.documents[config] = document_table(config, sums)
            self._write_documents(self.documents_partial, self.documents)
        names = dict.fromkeys(name for part in self.rows.values() for row in part for name in row)
        partial = self.partial.with_suffix(".writing")
        with partial.open("w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(names)
            for row in (row for part in self.rows.values() for row in part):
                writer.writerow([written(row.get(name)) for name in names])
        partial.replace(self.partial)
        return rows

    def finish(self, used: Iterable[str]) -> None:
        """The tables are written: keep the documents of their rows, and no partial file."""
        kept = {config: self.documents[config] for config in used if config in self.documents}
        done = [self.partial, self.documents_partial]
        if kept:
            self._write_documents(self.documents_file, kept)
        else:
            done.append(self.documents_file)  # of a former run
        for path in done:
            path.unlink(missing_ok=True)

    @staticmethod
    def _write_documents(path: Path, tables: dict[str, pd.DataFrame]) -> None:
        partial = path.with_suffix(".writing")
        pd.concat(tables.values()).to_csv(
            partial,
            index=False,
            float_format="%.5g",
            compression={"method": "gzip", "mtime": 0},  # the same bytes for the same rows
        )
        partial.replace(path)


def document_table(config: str, sums: DocumentSums) -> pd.DataFrame:
    """The sums of one SAE, a row for each document that holds a prediction."""
    table = pd.DataFrame(
        {
            "config": config,
            "document": range(len(sums.positions)),
            "n": sums.predictions.numpy(),
            "ce_added": (sums.ce_patched - sums.ce_clean).numpy(),  # nats
            "positions": sums.positions.numpy(),
            "squared_error": sums.squared_error.numpy(),
            "code": code_hash(),
        }
    )
    return table[table.positions > 0][DOCUMENT_COLUMNS]


def with_documents(evaluator: tu.Evaluator) -> Measure:
    """The evaluator's metrics, with the sums over documents that intervals need."""

    def measure(sae: tu.TSAE) -> dict:
        metrics, sums = evaluator.measure(sae)
        return metrics | {"documents": sums}

    return measure


def measured(
    lab: Context,
    store: Store,
    specs: dict[str, SAESpec],
    layer: int,
    seed: int,
    tokens: int,
    measure: Callable[[str, tu.TSAE], dict | Rows],
    what: str,
) -> Rows:
    """Rows of `measure(name, sae)` for every SAE; those that the store lacks are trained first."""
    configs = {
        name: config_hash(lab, spec, layer, seed, tokens, f"{what} {name}")
        for name, spec in specs.items()
    }
    known = {config for config in configs.values() if config in store.rows}
    if known & store.documents.keys():  # a measurement with documents; some may have been lost
        known &= store.documents.keys()
    missing = {name: spec for name, spec in specs.items() if configs[name] not in known}
    if len(missing) < len(specs):
        taken = f"{len(specs) - len(missing)} of {len(specs)} SAEs"
        print(f"{taken} were measured before: their rows are taken again")
    for group in passes(lab, missing):
        for name, sae in train_or_load(lab, group, layer, seed, tokens).items():
            rows = measure(name, sae)
            rows = [dict(row) for row in ([rows] if isinstance(rows, dict) else rows)]
            sums = [row.pop("documents", None) for row in rows]
            store.add(configs[name], rows, next((s for s in sums if s is not None), None))
    return [row for name in specs for row in store.rows[configs[name]]]
