"""Every notebook on models, tokenizers and text that did not come with the package."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch
from torch.nn import functional as F

from conftest import MODELS, ROOT, VOCAB, good_sae, res_jb, word_tokenizer

WITH_PUBLISHED_SAES = (
    "fig2_unigram_mse",
    "fig4_feature_sharing",
    "fig7_feature_width",
    "tab1_feature_study",
    "tab1_feature_study_first21",
)


def markov_texts(n: int) -> list[str]:
    """Documents in which each word has four likely successors: something for a model to learn."""
    generator = torch.Generator().manual_seed(0)
    successors = torch.randint(2, VOCAB, (VOCAB, 4), generator=generator)
    words, columns = torch.randint(2, VOCAB, (n,), generator=generator), []
    for _ in range(60):
        columns.append(words)
        jumps = torch.rand(n, generator=generator) < 0.1
        likely = successors[words, torch.randint(4, (n,), generator=generator)]
        words = torch.where(jumps, torch.randint(2, VOCAB, (n,), generator=generator), likely)
    return [" ".join(f"w{i}" for i in row) for row in torch.stack(columns, 1).tolist()]


def train_language_model(
    kind: str, texts: list[str], tokenizer, steps: int = 300
) -> tuple[torch.nn.Module, float]:
    """(Model, its last loss in nats) after a few hundred steps of Adam."""
    torch.manual_seed(0)
    model, generator = MODELS[kind](), torch.Generator().manual_seed(1)
    ids = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    first = tokenizer.bos_token_id
    if first is None:
        first = tokenizer.eos_token_id
    rows = torch.cat([torch.full((len(ids), 1), first), torch.tensor(ids)], 1)[:, :32]
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(steps):
        batch = rows[torch.randint(len(rows), (32,), generator=generator)]
        logits = model(batch).logits[:, :-1]
        loss = F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model, loss.item()


def save_published_saes(folder: Path) -> None:
    """SAEs of every layer in RES-JB's layout."""
    for layer in range(3):
        hook = f"blocks.{layer}.hook_resid_pre"
        res_jb(folder / hook, good_sae(32), hook)


TOKENIZERS = {
    # Grouped queries and RMSNorm; pads left.
    "llama": {
        "bos_token": "<s>",
        "eos_token": "</s>",
        "pad_token": "</s>",
        "padding_side": "left",
    },
    # Parallel blocks, no BOS; published SAEs are given too.
    "neox": {"eos_token": "</s>"},
}


def prepare(folder: Path, kind: str) -> None:
    """Write a trained model, its tokenizer and a text into the folder."""
    texts, tokenizer = markov_texts(1500), word_tokenizer(**TOKENIZERS[kind])
    model, loss = train_language_model(kind, texts, tokenizer)
    # A uniform guess costs 4.13 nats, and the entropy of the successors is about 2.
    assert loss < 3.2, "it learned the successors"
    model.save_pretrained(folder / kind)
    tokenizer.save_pretrained(folder / kind)
    lines = [json.dumps({"text": text}) + "\n" for text in texts]
    (folder / "text.jsonl").write_text("".join(lines))
    if kind == "neox":
        save_published_saes(folder / "saes")


def start_notebooks(folder: Path, kind: str) -> subprocess.Popen:
    """Run every notebook at profile smoke in a folder that holds model and text."""
    environment = {
        **os.environ,
        "TSAE_MODEL": kind,
        "TSAE_CORPUS": "text.jsonl",
        "TSAE_FIGURES": "figures",
        "TSAE_CACHE": "cache",
        "OMP_NUM_THREADS": "1",  # one core for each kind of model
    }
    if (folder / "saes").exists():
        environment["TSAE_PUBLISHED"] = "saes"
    command = [sys.executable, str(ROOT / "tools" / "run_notebooks.py"), "--profile", "smoke"]
    with open(folder / "log.txt", "w") as log:
        return subprocess.Popen(command, cwd=folder, env=environment, stdout=log, stderr=log)


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    """A folder for each kind of model in which all notebooks have run, side by side."""
    folders = {kind: tmp_path_factory.mktemp(kind) for kind in TOKENIZERS}
    for kind, folder in folders.items():
        prepare(folder, kind)
    processes = {kind: start_notebooks(folder, kind) for kind, folder in folders.items()}
    for kind, process in processes.items():
        assert process.wait() == 0, (folders[kind] / "log.txt").read_text()[-3000:]
    return folders


def check_tables(out: Path, kind: str) -> None:
    """The tables name the model, hold published SAEs where there are some, and are sane."""
    claims = pd.read_csv(out / "claims.csv", dtype=str)
    assert (claims.model == kind).all()
    assert len(claims) > 10
    is_published = kind == "neox"
    for id in WITH_PUBLISHED_SAES:
        systems = set(pd.read_csv(out / f"{id}.csv").system)
        assert ("published" in systems) == is_published, id
    widths = pd.read_csv(out / "fig3_unigram_activations.csv").d_sae
    assert (widths == (64 if is_published else 32)).all()
    cosine = pd.read_csv(out / "fig5_ngram_patching.csv")
    cosine = cosine.query("row == 'mean' and measure == 'mean removed' and layer == 3 and n == 3")
    by_suffix = cosine.set_index("suffix").cosine
    margin = by_suffix["true"] - by_suffix["random"]
    assert margin > 0.2, "in a Markov chain the last words decide"


def check_pareto(out: Path) -> None:
    """Systems of a short training are sane, and the tokens of the table matter."""
    pareto = pd.read_csv(out / "fig6_pareto.csv").groupby("system").mean(numeric_only=True)
    assert (pareto.ce_clean < 3.6).all()
    assert (pareto.nmse > 0).all()
    # An SAE with an L1 term is not sane after eight steps.
    has_l1 = pareto.index.str.contains("relu|gated")
    assert pareto.nmse[~has_l1].between(0, 2).all()
    assert pareto.nmse["topk+lookup"] < pareto.nmse["topk+shuffled-lookup"]


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_every_notebook_on_another_model(folders, kind):
    out = folders[kind] / "figures" / f"smoke-{kind}"
    check_tables(out, kind)
    check_pareto(out)
