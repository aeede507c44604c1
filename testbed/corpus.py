"""The testbed's corpus: the documentation strings of Python and of the pinned packages.

Every machine has this text once `requirements.txt` is installed, so nothing is downloaded and
nothing is redistributed. Source files are parsed (`ast`), never imported.

A document is one docstring. Its split follows from a hash of *where* it stands (package, module,
qualified name), so an edited docstring does not move. Repeated text (inherited docstrings, shared
boilerplate) is removed within and across splits by 8-word shingles, see `drop_repeats`.

    lm       the testbed language model was trained on it
    sae      no language model has seen it: SAEs train here
    tune     learning rates are chosen here, and nothing else
    heldout  every metric is measured here, and nothing else
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

SPLITS = {"lm": 0.62, "sae": 0.30, "tune": 0.02, "heldout": 0.06}  # shares of documents before removal
# import name -> distribution name, in the order in which repeated text is kept
PACKAGES = {
    "python": "", "torch": "torch", "transformers": "transformers", "scipy": "scipy", "sympy": "sympy",
    "sklearn": "scikit-learn", "pandas": "pandas", "networkx": "networkx", "numpy": "numpy",
    "beartype": "beartype", "matplotlib": "matplotlib", "huggingface_hub": "huggingface_hub",
    "transformer_lens": "transformer_lens", "datasets": "datasets", "fontTools": "fonttools",
    "IPython": "ipython", "mpmath": "mpmath", "accelerate": "accelerate", "tornado": "tornado",
    "hypothesis": "hypothesis", "seaborn": "seaborn",
}
NOT_STDLIB = {"site-packages", "dist-packages", "test", "tests", "idle_test"}  # some systems leave tests out
MIN_CHARS = 48  # shorter docstrings ("Return the name.") carry no context
MAX_CHARS = 20_000  # a few module docstrings are whole manuals; the first pages are enough
SHINGLE = 8  # words
MAX_REPEATED = 0.3  # a document with more of its shingles seen before is a repeat
SCHEMA = 3  # raise when extraction changes: it is part of the cache key and of the manifest


@dataclass(frozen=True)
class Document:
    """One docstring: where it stands, in which split, and its text (dedented)."""

    split: str
    package: str
    module: str
    name: str  # qualified name inside the module; "" is the module's own docstring
    text: str


def split_of(package: str, module: str, name: str) -> str:
    """The split of a docstring, from where it stands and never from what it says."""
    digest = hashlib.sha256(f"{package}:{module}:{name}".encode()).digest()
    u = int.from_bytes(digest[:8], "big") / 2**64
    for split, share in SPLITS.items():
        if u < share:
            return split
        u -= share
    return "heldout"


def package_root(package: str) -> Path | None:
    """Folder of a package's sources, or None where it is not installed."""
    paths = sysconfig.get_paths()
    roots = [paths["stdlib"]] if package == "python" else [paths["purelib"] + f"/{package}", paths["platlib"] + f"/{package}"]
    return next((Path(r) for r in roots if Path(r).is_dir()), None)


def versions() -> dict[str, str]:
    """Version of every package of the corpus; "missing" where there is none."""
    found = {}
    for package, dist in PACKAGES.items():
        if package == "python":
            found[package] = platform.python_version()
        elif package_root(package) is None:
            found[package] = "missing"
        else:
            try:
                found[package] = importlib.metadata.version(dist)
            except importlib.metadata.PackageNotFoundError:  # a folder without metadata: a copy, or half an uninstall
                found[package] = "unknown"
    return found


def docstrings_of_file(path: Path, package: str, module: str) -> list[Document]:
    """The docstrings of one source file in order of appearance."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # sources with invalid escapes warn when parsed
            tree = ast.parse(path.read_text("utf-8"))
    except (SyntaxError, UnicodeDecodeError, ValueError):
        return []  # test data of the packages: broken on purpose, or templates
    found = []

    def visit(node: ast.AST, name: str) -> None:
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = (ast.get_docstring(node) or "").strip()[:MAX_CHARS]
            if len(text) >= MIN_CHARS:
                found.append(Document(split_of(package, module, name), package, module, name, text))
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                visit(child, f"{name}.{child.name}".strip("."))
            elif isinstance(child, ast.If | ast.Try | ast.With):
                visit(child, name)

    visit(tree, "")
    return found


def docstrings_of_package(package: str) -> list[Document]:
    """All docstrings of a package, files in sorted order."""
    root = package_root(package)
    if root is None:
        return []
    found = []
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        if package == "python" and NOT_STDLIB & set(parts):
            continue
        module = ".".join((package, *parts)).removesuffix(".__init__")
        found += docstrings_of_file(path, package, module)
    return found


def shingle_ids(texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """Hashes of all 8-word shingles: (hash [S] uint64, index of the document it stands in [S])."""
    vocabulary: dict[str, int] = {}
    words = [vocabulary.setdefault(w, len(vocabulary)) for t in texts for w in t.split()]
    lengths = np.array([len(t.split()) for t in texts])
    ids, doc = np.array(words, np.uint64), np.repeat(np.arange(len(texts)), lengths)
    if len(ids) < SHINGLE:
        return np.empty(0, np.uint64), np.empty(0, np.int64)
    mixed = np.zeros(len(ids) - SHINGLE + 1, np.uint64)
    for i in range(SHINGLE):
        mixed = mixed * np.uint64(0x9E3779B97F4A7C15) + ids[i : len(ids) - SHINGLE + 1 + i] + np.uint64(1)
        mixed ^= mixed >> np.uint64(29)
    inside = doc[: len(mixed)] == doc[SHINGLE - 1 :]  # a shingle does not cross documents
    return mixed[inside], doc[: len(mixed)][inside]


def drop_repeats(documents: list[Document]) -> list[Document]:
    """Remove documents whose text was mostly seen before, in the order lm, sae, tune, heldout.

    A shingle counts as seen before where it occurs in any earlier document. So a held-out docstring that a
    training docstring repeats (or nearly so) goes out of held-out, and of ten inherited copies one is kept.
    """
    order = {s: i for i, s in enumerate(SPLITS)}
    documents = sorted(documents, key=lambda d: order[d.split])  # stable: the package order stays
    shingles, doc = shingle_ids([d.text for d in documents])
    _, first, inverse = np.unique(shingles, return_index=True, return_inverse=True)
    repeated = doc[first[inverse]] < doc
    total = np.bincount(doc, minlength=len(documents))
    share = np.bincount(doc, weights=repeated, minlength=len(documents)) / np.maximum(total, 1)
    kept, short = [], set()
    for d, s, n in zip(documents, share, total, strict=True):
        if n == 0:  # fewer words than a shingle: compare whole
            s = float(d.text in short)
            short.add(d.text)
        if s <= MAX_REPEATED:
            kept.append(d)
    return kept


def overlap(documents: list[Document], held: str = "heldout", train: tuple[str, ...] = ("lm", "sae")) -> float:
    """Share of the 8-word shingles of split `held` that occur in the training splits."""
    chosen = [d for d in documents if d.split == held or d.split in train]
    shingles, doc = shingle_ids([d.text for d in chosen])
    is_held = np.array([d.split == held for d in chosen])[doc]
    return float(np.isin(shingles[is_held], shingles[~is_held]).mean()) if is_held.any() else 0.0


def cache_folder() -> Path:
    """Where extracted text and trained SAEs are kept: $TSAE_CACHE, else .cache beside the module."""
    return Path(os.environ.get("TSAE_CACHE") or Path(__file__).resolve().parent.parent / ".cache")


@lru_cache(maxsize=1)
def load(progress: bool = True) -> tuple[list[Document], dict]:
    """All documents (lm, sae, tune, heldout; deterministic order) and the manifest. Cached on disk.

    The manifest names versions and holds a hash of the text, which goes into every record.
    """
    found = versions()
    key = hashlib.sha256(json.dumps([SCHEMA, found], sort_keys=True).encode()).hexdigest()[:16]
    path = cache_folder() / f"corpus-{key}.json"
    if path.exists():
        raw = json.loads(path.read_text("utf-8"))
        return [Document(**d) for d in raw["documents"]], raw["manifest"]
    present = [p for p, v in found.items() if v != "missing"]
    with ProcessPoolExecutor(max_workers=os.cpu_count()) as pool:
        parts = list(tqdm(pool.map(docstrings_of_package, present), total=len(present),
                          desc="reading documentation strings", unit="package", disable=not progress))
    documents = drop_repeats([d for part in parts for d in part])
    if not documents:
        raise RuntimeError("no documentation strings found: is Python running with -OO, or without its sources?")
    text_hash = hashlib.sha256("\0".join(d.split + d.text for d in documents).encode()).hexdigest()[:16]
    manifest = {"schema": SCHEMA, "versions": found, "missing": [p for p in found if p not in present],
                "documents": len(documents), "characters": sum(len(d.text) for d in documents), "hash": text_hash}
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(f".{os.getpid()}.partial")
    partial.write_text(json.dumps({"manifest": manifest, "documents": [asdict(d) for d in documents]}), "utf-8")
    partial.replace(path)  # atomic: two notebooks may extract at once
    return documents, manifest


def documents(split: str) -> list[Document]:
    """The documents of one split. Raises ValueError for an unknown split."""
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}: expected one of {', '.join(SPLITS)}")
    return [d for d in load()[0] if d.split == split]


def main() -> None:
    argparse.ArgumentParser(description=__doc__.split("\n")[0]).parse_args()
    docs, manifest = load()
    print(json.dumps({k: v for k, v in manifest.items() if k != "versions"}, indent=1))
    for split in SPLITS:
        chosen = [d for d in docs if d.split == split]
        print(f"{split:8s} {len(chosen):6d} documents {sum(len(d.text) for d in chosen) / 1e6:6.2f} M characters")
    print(f"8-word shingles of heldout that occur in lm or sae: {overlap(docs):.1%}")


if __name__ == "__main__":
    main()
