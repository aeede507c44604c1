"""The same small model through every entry gives the same numbers.

The entries: train.py, Evaluator, attach on TransformerLens, and the notebooks' TSAE_MODEL.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from lab import HALF, Lab, SAESpec
from torch.nn import functional as F
from transformer_lens.model_bridge import TransformerBridge

import train
import tsae_utils as tu
from conftest import save_model
from tools.scan_architectures import tiny_model, tiny_tokenizer
from tsae.attach import attach

SMALL = ("gpt2", "llama", "neox")
MODERN = ("gemma2", "gemma3_text", "qwen3", "olmo2")
PLACES = ("resid_pre", "mlp_out")


class Trained(NamedTuple):
    """What train.py wrote, and what it was given."""

    model: Path
    corpus: Path
    out: Path


def save_any(folder: Path, kind: str) -> Path:
    if kind in SMALL:
        return save_model(folder, kind)
    tiny_model(kind).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module", params=[(k, p) for k in (*SMALL, *MODERN) for p in PLACES], ids=str)
def trained(request, tmp_path_factory, texts) -> Trained:
    """An SAE with a table that train.py trained on a small model."""
    kind, place = request.param
    folder = tmp_path_factory.mktemp(kind)
    model, corpus, out = save_any(folder / "model", kind), folder / "text.jsonl", folder / "out"
    corpus.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts * 3))
    options = f"--device cpu --k 4 --lookup --expansion 2 --hook blocks.1.hook_{place}"
    sizes = "--tokens 2e3 --context-size 16 --heldout-rows 8 --batch-size 100 --buffer-tokens 350"
    files = ["--model", str(model), "--corpus", str(corpus), "--out", str(out)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["train.py", *files, *options.split(), *sizes.split()])
        train.main()
    return Trained(model, corpus, out)


def heldout_rows(trained: Trained, lm: tu.LanguageModel) -> torch.Tensor:
    """The rows that train.py measured: the last eight of its budget."""
    documents = tu.read_documents(trained.corpus)
    return tu.token_rows(documents, lm, 16, 2e3 + 10 * 16)[-8:]


def test_every_entry_gives_the_same_numbers(trained, monkeypatch, tmp_path):
    said = tu.read_cfg(trained.out)["metadata"]["tokenized"]["heldout"]
    sae, lm = tu.load(trained.out), tu.load_lm(trained.model, "cpu", bf16=False)
    rows = heldout_rows(trained, lm)
    evaluator = tu.Evaluator(lm, rows, sae.cfg.hook_name)
    assert evaluator(sae) == pytest.approx(said, rel=1e-5)

    # by hand: every activation alone, every row alone
    errors = []
    for ids, keep in zip(rows.long(), evaluator.keep, strict=True):
        x = lm.activations(ids[None], [sae.cfg.hook_name], bf16=False)[sae.cfg.hook_name][0][keep]
        error = (x - sae(x, ids[keep]).x_hat).square().sum(-1) / x.square().sum(-1)
        errors.append(error.detach())
    assert torch.cat(errors).mean().item() == pytest.approx(said["nmse"], rel=1e-4)

    # attached in TransformerLens
    bridge = TransformerBridge.boot_transformers(str(trained.model), device="cpu")
    with torch.no_grad(), attach(bridge, sae):
        logits = bridge(rows.long())
    losses = F.cross_entropy(logits[:, :-1].mT, rows[:, 1:].long(), reduction="none")
    attached = losses[evaluator.predicted].mean().item()
    assert attached == pytest.approx(said["ce_patched"], rel=1e-4)

    # the notebooks' bench
    monkeypatch.setenv("TSAE_MODEL", str(trained.model))
    monkeypatch.setenv("TSAE_CORPUS", str(trained.corpus))
    monkeypatch.setenv("TSAE_FIGURES", str(tmp_path / "figures"))
    monkeypatch.setenv("TSAE_CACHE", str(tmp_path / "cache"))
    lab = Lab("17_your_own_model", "smoke")
    lab.lm.bf16 = False
    assert tu.Evaluator(lab.lm, rows, sae.cfg.hook_name)(sae) == pytest.approx(said, rel=1e-5)
    if sae.cfg.hook_name.endswith("resid_pre"):
        check_training_in_the_notebooks(lab, lm)


def check_training_in_the_notebooks(lab: Lab, lm: tu.LanguageModel) -> None:
    """`lab.train_or_load` gives the SAE that `tu.train` gives on the bench's rows."""
    hook, tokens = lab.hook(1), 40 * lab.p.recipe.batch_size
    spec = SAESpec("topk+lookup", 64, 4, 4e-3, start="unigram", **HALF)
    ours = lab.train_or_load({"s": spec}, 1, 0, tokens)["s"]
    table = tu.TokenLookup(0.5 * tu.unigram_activations(lm, hook))
    sae = tu.TSAE(tu.TSAEConfig(d_in=lm.d_model, d_sae=64, k=4, encoder_scale=0.5), table)
    recipe = lab.p.recipe
    stream = tu.ActivationStream(
        lm, lab.train_rows, hook, recipe.batch_size, recipe.buffer_tokens, seed=0
    )
    cfg = tu.TrainConfig(tokens=tokens, lr=4e-3, lr_end=recipe.lr_end)
    tu.train({"s": sae}, stream, cfg, progress=False)
    evaluator = tu.Evaluator(lm, lab.rows("heldout", 500), hook)
    assert evaluator(ours) == pytest.approx(evaluator(sae), rel=1e-3)
