"""Every notebook on models, tokenizers and text that did not come with the package."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pandas as pd
import pytest
import torch
from torch.nn import functional as F

from conftest import MODELS, ROOT, VOCAB, good_sae, res_jb, word_tokenizer


def markov_texts(n: int) -> list[str]:
    """Documents in which each word has four likely successors: something for a model to learn."""
    g = torch.Generator().manual_seed(0)
    successors = torch.randint(2, VOCAB, (VOCAB, 4), generator=g)
    state, columns = torch.randint(2, VOCAB, (n,), generator=g), []
    for _ in range(60):
        columns.append(state)
        jump = torch.rand(n, generator=g) < 0.1
        follow = successors[state, torch.randint(4, (n,), generator=g)]
        state = torch.where(jump, torch.randint(2, VOCAB, (n,), generator=g), follow)
    return [" ".join(f"w{i}" for i in row) for row in torch.stack(columns, 1).tolist()]


def train(
    kind: str, texts: list[str], tokenizer, steps: int = 300
) -> tuple[torch.nn.Module, float]:
    """A few hundred steps of Adam; returns the model and its last loss in nats."""
    torch.manual_seed(0)
    model, g = MODELS[kind](), torch.Generator().manual_seed(1)
    ids = torch.tensor([tokenizer(t, add_special_tokens=False)["input_ids"] for t in texts])
    bos = torch.full(
        (len(ids), 1),
        tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id,
    )
    ids = torch.cat([bos, ids], 1)[:, :32]
    optimiser = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(steps):
        batch = ids[torch.randint(len(ids), (32,), generator=g)]
        loss = F.cross_entropy(model(batch).logits[:, :-1].flatten(0, 1), batch[:, 1:].flatten())
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    return model, loss.item()


@pytest.mark.parametrize(
    ("kind", "special"),
    [
        (
            "llama",
            {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "</s>", "padding_side": "left"},
        ),  # grouped queries, RMSNorm
        ("neox", {"eos_token": "</s>"}),  # parallel blocks, no BOS
    ],
    ids=["llama, pads left", "neox, no BOS"],
)
def test_every_notebook_on_another_model(tmp_path, kind, special):
    texts, tokenizer = markov_texts(1500), word_tokenizer(**special)
    model, loss = train(kind, texts, tokenizer)
    assert loss < 3.2, "it learned the successors (uniform: 4.13 nats; their entropy: about 2)"
    model.save_pretrained(tmp_path / kind)
    tokenizer.save_pretrained(tmp_path / kind)
    (tmp_path / "text.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    env = {
        **os.environ,
        "TSAE_MODEL": kind,
        "TSAE_CORPUS": "text.jsonl",
        "TSAE_FIGURES": "figures",
        "TSAE_CACHE": "cache",
    }
    if kind == "neox":  # and with published SAEs of its layers, in RES-JB's layout
        for layer in range(3):
            res_jb(
                tmp_path / "saes" / f"blocks.{layer}.hook_resid_pre",
                good_sae(32),
                f"blocks.{layer}.hook_resid_pre",
            )
        env["TSAE_PUBLISHED"] = "saes"
    command = [sys.executable, str(ROOT / "notebooks" / "run.py"), "--profile", "smoke"]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    out = tmp_path / "figures" / f"smoke-{kind}"
    claims = pd.read_csv(out / "claims.csv", dtype=str)
    assert (claims.model == kind).all() and len(claims) > 10
    for id in (
        "fig2_unigram_mse",
        "fig4_feature_sharing",
        "fig7_feature_width",
        "tab1_feature_study",
        "tab1_feature_study_first21",
    ):
        assert ("published" in set(pd.read_csv(out / f"{id}.csv").system)) == (kind == "neox"), id
    assert (
        pd.read_csv(out / "fig3_unigram_activations.csv").d_sae == (64 if kind == "neox" else 32)
    ).all()
    cosine = pd.read_csv(out / "fig5_ngram_patching.csv").query(
        "row == 'mean' and measure == 'mean removed' and layer == 3"
    )
    by_suffix = cosine[cosine.n == 3].set_index("suffix").cosine
    assert by_suffix["true"] > by_suffix["random"] + 0.2, "in a Markov chain the last words decide"
    pareto = pd.read_csv(out / "fig6_pareto.csv").groupby("system").mean(numeric_only=True)
    assert (pareto.ce_clean < 3.6).all() and (pareto.nmse > 0).all()
    assert pareto.nmse[~pareto.index.str.contains("relu|gated")].between(0, 2).all(), (
        "an L1 SAE of eight steps is not sane yet"
    )
    assert pareto.nmse["topk+lookup"] < pareto.nmse["topk+shuffled-lookup"], (
        "a table over the wrong tokens is worse"
    )
