"""The testbed's corpus: the documentation strings of Python and of the pinned packages.

Every machine has this text once `requirements.txt` is installed, so nothing is downloaded and
nothing is redistributed. Source files are parsed (`ast`), never imported.

A document is one docstring. A hash of its place (package, module, qualified name) decides its
split, so an edited docstring does not move. Repeated text, such as inherited docstrings and shared
boilerplate, is removed within and across splits by 8-word shingles (`drop_repeats`).

    lm       training text of the testbed language model
    sae      training text of SAEs; the language model has not seen it
    tune     for choosing learning rates only
    heldout  for metrics only
    final    for headlines only: no decision touches it, and every look is counted
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import importlib.metadata
import json
import os
import platform
import sysconfig
import warnings
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
from tqdm.auto import tqdm

# Shares of documents, before repeats are removed.
SPLITS = {"lm": 0.62, "sae": 0.30, "tune": 0.02, "heldout": 0.03, "final": 0.03}
# Import name -> distribution name. Of repeated text the first package's copy is kept.
PACKAGES = {
    "python": "",
    "torch": "torch",
    "transformers": "transformers",
    "scipy": "scipy",
    "sympy": "sympy",
    "sklearn": "scikit-learn",
    "pandas": "pandas",
    "networkx": "networkx",
    "numpy": "numpy",
    "beartype": "beartype",
    "matplotlib": "matplotlib",
    "huggingface_hub": "huggingface_hub",
    "transformer_lens": "transformer_lens",
    "datasets": "datasets",
    "fontTools": "fonttools",
    "IPython": "ipython",
    "mpmath": "mpmath",
    "accelerate": "accelerate",
    "tornado": "tornado",
    "hypothesis": "hypothesis",
    "seaborn": "seaborn",
}
# Folders that are not read; not every system ships the tests.
NOT_STDLIB = {"site-packages", "dist-packages", "test", "tests", "idle_test"}
MIN_CHARS = 48  # shorter docstrings ("Return the name.") carry no context
MAX_CHARS = 20_000  # a few module docstrings are whole manuals: only their first pages are kept
SHINGLE = 8  # words
MAX_REPEATED = 0.3  # a document is a repeat if a larger share of its shingles has occurred before
SCHEMA = 4  # raise this when extraction changes: cache key and manifest contain it


@dataclass(frozen=True)
class Document:
    """One docstring: its split, its place and its text (dedented)."""

    split: str
    package: str
    module: str
    name: str  # qualified name inside the module; "" for the docstring of the module itself
    text: str


def split_of(package: str, module: str, name: str) -> str:
    """The split of a docstring. It depends on the place of the docstring, not on its text."""
    digest = hashlib.sha256(f"{package}:{module}:{name}".encode()).digest()
    u = int.from_bytes(digest[:8], "big") / 2**64
    for split, share in SPLITS.items():
        if u < share:
            return split
        u -= share
    return "final"


def package_root(package: str) -> Path | None:
    """Folder of a package's sources, or None where it is not installed."""
    paths = sysconfig.get_paths()
    if package == "python":
        candidates = [Path(paths["stdlib"])]
    else:
        candidates = [Path(paths[kind], package) for kind in ("purelib", "platlib")]
    return next((folder for folder in candidates if folder.is_dir()), None)


def versions() -> dict[str, str]:
    """Version of every package of the corpus, or "missing"."""
    installed = {}
    for package, distribution in PACKAGES.items():
        if package == "python":
            installed[package] = platform.python_version()
        elif package_root(package) is None:
            installed[package] = "missing"
        else:
            try:
                installed[package] = importlib.metadata.version(distribution)
            except importlib.metadata.PackageNotFoundError:  # a copy, or half an uninstall
                installed[package] = "unknown"
    return installed


def docstrings_of_file(path: Path, package: str, module: str) -> list[Document]:
    """The docstrings of one source file in order of appearance."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # sources with invalid escapes warn when parsed
            tree = ast.parse(path.read_text("utf-8"))
    except (SyntaxError, UnicodeDecodeError, ValueError):
        return []  # test data of the packages: broken on purpose, or templates
    collected = []

    def visit(node: ast.AST, name: str) -> None:
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = (ast.get_docstring(node) or "").strip()[:MAX_CHARS]
            if len(text) >= MIN_CHARS:
                split = split_of(package, module, name)
                collected.append(Document(split, package, module, name, text))
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                visit(child, f"{name}.{child.name}".strip("."))
            elif isinstance(child, ast.If | ast.Try | ast.With):
                visit(child, name)

    visit(tree, "")
    return collected


def docstrings_of_package(package: str) -> list[Document]:
    """All docstrings of a package, in sorted order of its files."""
    root = package_root(package)
    if root is None:
        return []
    collected = []
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        if package == "python" and NOT_STDLIB & set(parts):
            continue
        module = ".".join((package, *parts)).removesuffix(".__init__")
        collected += docstrings_of_file(path, package, module)
    return collected


def shingle_ids(texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """Hashes of all 8-word shingles: (hashes [S] uint64, indices of their documents [S])."""
    vocabulary: dict[str, int] = {}
    words = [vocabulary.setdefault(w, len(vocabulary)) for t in texts for w in t.split()]
    lengths = np.array([len(t.split()) for t in texts])
    ids = np.array(words, np.uint64)
    document = np.repeat(np.arange(len(texts)), lengths)
    n_shingles = len(ids) - SHINGLE + 1
    if n_shingles < 1:
        return np.empty(0, np.uint64), np.empty(0, np.int64)
    hashes = np.zeros(n_shingles, np.uint64)
    for i in range(SHINGLE):
        hashes = hashes * np.uint64(0x9E3779B97F4A7C15) + ids[i : n_shingles + i] + np.uint64(1)
        hashes ^= hashes >> np.uint64(29)
    first, last = document[:n_shingles], document[SHINGLE - 1 :]
    is_inside = first == last  # a shingle does not cross documents
    return hashes[is_inside], first[is_inside]


def drop_repeats(documents: list[Document]) -> list[Document]:
    """Remove documents that mostly repeat earlier ones, in the order lm, sae, tune, heldout, final.

    A shingle counts as repeated if it occurs in any earlier document. A held-out docstring that
    (nearly) repeats a training docstring is therefore removed, and one of ten inherited copies is
    kept.
    """
    order = {split: i for i, split in enumerate(SPLITS)}
    documents = sorted(documents, key=lambda d: order[d.split])  # stable: keeps the package order
    shingles, document = shingle_ids([d.text for d in documents])
    _, first, inverse = np.unique(shingles, return_index=True, return_inverse=True)
    is_repeated = document[first[inverse]] < document
    totals = np.bincount(document, minlength=len(documents))
    repeats = np.bincount(document, weights=is_repeated, minlength=len(documents))
    shares = repeats / np.maximum(totals, 1)
    kept, short_texts = [], set()
    for d, share, total in zip(documents, shares, totals, strict=True):
        if total == 0:  # fewer words than a shingle: compare the whole text
            share = float(d.text in short_texts)
            short_texts.add(d.text)
        if share <= MAX_REPEATED:
            kept.append(d)
    return kept


def overlap(
    documents: list[Document], held: str = "heldout", train: tuple[str, ...] = ("lm", "sae")
) -> float:
    """Share of the 8-word shingles of split `held` that occur in the training splits."""
    chosen = [d for d in documents if d.split == held or d.split in train]
    shingles, document = shingle_ids([d.text for d in chosen])
    is_held = np.array([d.split == held for d in chosen])[document]
    if not is_held.any():
        return 0.0
    return float(np.isin(shingles[is_held], shingles[~is_held]).mean())


def cache_folder() -> Path:
    """Folder of extracted text and trained SAEs: $TSAE_CACHE, else .cache of the repository."""
    return Path(os.environ.get("TSAE_CACHE") or Path(__file__).resolve().parent.parent / ".cache")


@lru_cache(maxsize=1)
def load(progress: bool = True) -> tuple[list[Document], dict]:
    """All documents in a deterministic order, and the manifest. Cached on disk.

    The manifest names versions and holds a hash of the text, which every record contains.
    Raises RuntimeError where Python has no documentation strings.
    """
    installed = versions()
    key = json.dumps([SCHEMA, installed], sort_keys=True)
    name = hashlib.sha256(key.encode()).hexdigest()[:16]
    path = cache_folder() / f"corpus-{name}.json"
    if path.exists():
        raw = json.loads(path.read_text("utf-8"))
        return [Document(**d) for d in raw["documents"]], raw["manifest"]
    documents = extract([p for p, v in installed.items() if v != "missing"], progress)
    all_text = "\0".join(d.split + d.text for d in documents)
    manifest = {
        "schema": SCHEMA,
        "versions": installed,
        "missing": [p for p, v in installed.items() if v == "missing"],
        "documents": len(documents),
        "characters": sum(len(d.text) for d in documents),
        "hash": hashlib.sha256(all_text.encode()).hexdigest()[:16],
    }
    content = {"manifest": manifest, "documents": [asdict(d) for d in documents]}
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(f".{os.getpid()}.partial")
    partial.write_text(json.dumps(content), "utf-8")
    partial.replace(path)  # atomic: two notebooks may extract at once
    return documents, manifest


def extract(packages: list[str], progress: bool) -> list[Document]:
    """Documents of these packages without repeats, read in parallel."""
    with ProcessPoolExecutor(max_workers=os.cpu_count()) as pool:
        parts = tqdm(
            pool.map(docstrings_of_package, packages),
            total=len(packages),
            desc="reading documentation strings",
            unit="package",
            disable=not progress,
        )
        documents = drop_repeats([d for part in parts for d in part])
    if not documents:
        raise RuntimeError(
            "no documentation strings found: is Python running with -OO, or without its sources?"
        )
    return documents


def documents(split: str) -> list[Document]:
    """The documents of one split. Raises ValueError for an unknown split."""
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}: expected one of {', '.join(SPLITS)}")
    return [d for d in load()[0] if d.split == split]


def main() -> None:
    argparse.ArgumentParser(description=__doc__.split("\n")[0]).parse_args()
    everything, manifest = load()
    print(json.dumps({k: v for k, v in manifest.items() if k != "versions"}, indent=1))
    for split in SPLITS:
        chosen = documents(split)
        millions = sum(len(d.text) for d in chosen) / 1e6
        print(f"{split:8s} {len(chosen):6d} documents {millions:6.2f} M characters")
    print(f"8-word shingles of heldout that occur in lm or sae: {overlap(everything):.1%}")


if __name__ == "__main__":
    main()
