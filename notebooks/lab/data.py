"""Corpora, token rows and activations of a profile, cached on disk where they are expensive."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from huggingface_hub import try_to_load_from_cache
from safetensors.torch import load_file, save_file

import tsae_utils as tu
from testbed import corpus as testbed_corpus
from testbed import smollm2
from tsae.documents import Document, local_files
from tsae.tables import without_massive
from tsae.text import vocabulary_hash

from .context import Context
from .profiles import ROOT

TEXT_VERSION = 3  # part of the cache's key: raise it when the same text gives other rows


def save_atomically(tensors: dict[str, torch.Tensor], path: Path) -> None:
    """Write a safetensors file whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(f".{os.getpid()}.partial")
    save_file(tensors, partial)
    partial.replace(path)


def load_language_model(source: str) -> tu.LanguageModel:
    """The profile's model; says so when a token stands in for a missing BOS."""
    local = {"testbed": lambda: ROOT / "testbed" / "model", "smollm2": smollm2.folder}
    lm = tu.load_lm(local[source]() if source in local else source)
    if lm.bos_note:
        print(lm.bos_note)
    return lm


def weights_sha256(lm: tu.LanguageModel) -> str:
    """SHA-256 of the model's weight file, to compare with the hub's; empty for several files."""
    name, revision = tu.hub_name(lm.name)
    file = "model.safetensors"
    is_local = Path(name).is_dir()
    file_path = (
        Path(name, file) if is_local else try_to_load_from_cache(name, file, revision=revision)
    )
    if not isinstance(file_path, str | Path) or not Path(file_path).exists():
        return ""
    with open(file_path, "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def corpus_key(corpus: str) -> str:
    """Tells one state of a corpus from another.

    Hashes names, sizes and times of the local files that are read, or the pinned name of a hub data
    set.
    """
    states = [(file.name, file.stat()) for file in local_files(corpus)]
    seen = [(name, state.st_size, state.st_mtime_ns) for name, state in states]
    return hashlib.sha256(json.dumps([corpus, seen]).encode()).hexdigest()[:16]


def corpus_hash(corpus: str, figure_id: str) -> str:
    """Hash of the corpus for the record; one printed line where it is not the record's."""
    if corpus != "testbed":
        return corpus_key(corpus)
    manifest = testbed_corpus.load()[1]
    if manifest["missing"]:
        print(f"corpus without {', '.join(manifest['missing'])}: not installed here")
    record = ROOT / "figures" / "record" / f"{figure_id}.json"
    if record.exists() and json.loads(record.read_text())["corpus_hash"] != manifest["hash"]:
        print(
            "note: the documentation installed here differs from the committed record's "
            "(other versions), so numbers will differ a little"
        )
    return manifest["hash"]


def split_of(position: int) -> str:
    """The split of a document of another corpus than the testbed's, by its position."""
    digest = hashlib.sha256(str(position).encode()).digest()
    u = int.from_bytes(digest[:4], "big") / 2**32
    shares = {"sae": 0.8, "tune": 0.85, "heldout": 0.925}
    return next((split for split, end in shares.items() if u < end), "final")


def documents(corpus: str, split: str) -> Iterator[Document]:
    """Texts, or their ids, of one split: lm (testbed only), sae, tune, heldout, final."""
    if corpus == "testbed":
        yield from (d.text for d in testbed_corpus.documents(split))
        return
    for position, document in enumerate(tu.read_documents(corpus)):
        if split_of(position) == split:
            yield document


def rows(lab: Context, split: str, tokens: float, corpus: str) -> torch.Tensor:
    """Token rows [R, L] of a split, evenly spaced over what is read, about `tokens` tokens in all.

    Documents may come in the order of their packages, so the beginning is not a fair sample. Up
    to eight times as much is read from a local corpus; from the hub only what is wanted is read.
    Rows of another corpus than the testbed's are cached. Where the hub breaks off, what was read is
    kept, and TSAE_RESUME_TEXT=1 takes it for the split.
    """
    if corpus == "testbed":
        return read_rows(lab, split, tokens, corpus, np.inf)
    key = [corpus_key(corpus), split, int(tokens), lab.context_size, vocabulary_hash(lab.lm)]
    key += [lab.lm.bos_id, lab.lm.separator_id, TEXT_VERSION]
    name = hashlib.sha256(json.dumps(key).encode()).hexdigest()[:20]
    path = lab.cache / f"rows-{name}.safetensors"
    if path.exists():
        return load_file(path)["rows"]
    if Path(corpus).expanduser().exists():
        read = read_rows(lab, split, tokens, corpus, 8 * tokens)
    else:
        partial = lab.cache / f"text-{name}.safetensors"
        read = read_rows(lab, split, tokens, corpus, tokens, partial)
        if partial.exists():  # the rows of a text that broke off are not those of the corpus
            return read
    save_atomically({"rows": read}, path)
    return read


def read_rows(
    lab: Context,
    split: str,
    tokens: float,
    corpus: str,
    limit: float,
    partial: Path | None = None,
) -> torch.Tensor:
    """Token rows of at most `limit` tokens, thinned evenly to about `tokens`."""
    resume = partial is not None and os.environ.get("TSAE_RESUME_TEXT") == "1"
    try:
        every = tu.token_rows(
            lab.documents(split, corpus),
            lab.lm,
            lab.context_size,
            max(limit, 2 * lab.context_size),
            progress=corpus != "testbed" and tokens > 10**6,
            partial=partial,
            resume=resume,
        )
    except ValueError as error:
        raise ValueError(f"split {split!r} of {corpus}: {error}") from error
    except ConnectionError as error:
        hint = "in notebooks TSAE_RESUME_TEXT=1 stands for resume=True"
        raise ConnectionError(f"split {split!r} of {corpus}: {error} ({hint})") from error
    wanted = max(2, int(tokens) // (lab.context_size - 1))
    if wanted >= len(every):
        return every
    return every[torch.linspace(0, len(every) - 1, wanted).long()]


def unigrams(lab: Context, layer: int) -> torch.Tensor:
    """A([BOS, t])_1 of every token [V, D], cached."""
    precision = "" if lab.lm.bf16 else "-fp32"
    path = lab.cache / f"unigrams-{lab.lm.fingerprint}-{layer}{precision}.safetensors"
    if not path.exists():
        table = tu.unigram_activations(lab.lm, lab.hook(layer), progress=True)
        save_atomically({"unigrams": table}, path)
    return load_file(path)["unigrams"].to(lab.lm.device)


def table_start(lab: Context, kind: str, layer: int) -> torch.Tensor:
    """Rows [V, D] where tables start: "mean" over a million training tokens, or "unigram".

    Means replace the unigram activations of a model where more than a hundredth is massive.
    """
    if kind == "unigram":
        table, share = without_massive(lab.unigrams(layer), lab.max_norm(layer))
        if share <= 0.01:
            return table
    wanted = min(len(lab.train_rows), max(2, 10**6 // lab.context_size))
    rows = lab.train_rows[torch.linspace(0, len(lab.train_rows) - 1, wanted).long()]
    limit = lab.max_norm(layer)
    return tu.table_start(lab.lm, lab.hook(layer), "mean", rows, max_norm=limit).to(lab.lm.device)
