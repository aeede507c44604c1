"""The notebooks' bench: cached training, splits of another corpus, claims, and the command line."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from lab import GPT2, HALF, LOOKUP, PROFILES, Arm, Lab, bootstrap_interval, paired_interval, scorecard, tu

from conftest import ROOT, save_model


@pytest.fixture
def lab(tmp_path, texts, monkeypatch) -> Lab:
    save_model(tmp_path / "model")
    (tmp_path / "text.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in texts * 5))
    for name, value in {"MODEL": "model", "CORPUS": "text.jsonl", "FIGURES": "figures", "CACHE": "cache"}.items():
        monkeypatch.setenv(f"TSAE_{name}", str(tmp_path / value))
    return Lab("fig6_pareto", "smoke")


def test_training_is_cached_by_configuration(lab, monkeypatch):
    arm = Arm("topk+lookup", 32, 2, 1e-2, **LOOKUP)
    first = lab.train_or_load({"a": arm}, 1, 0, 1024)["a"]
    trained = []
    monkeypatch.setattr(tu, "train", lambda saes, *_, **__: trained.append(list(saes)) or [{"system": n} for n in saes])
    again = lab.train_or_load({"a": arm}, 1, 0, 1024)["a"]
    assert not trained and torch.equal(first.W_dec, again.W_dec) and torch.equal(first.lookup.W, again.lookup.W)
    assert again.record["tokens"] == 1024 and again.record["arm"]["lr"] == 1e-2
    other = {"a": arm, "b": Arm("topk", 32, 2, 1e-2)}
    lab.train_or_load(other, 1, 0, 1024)
    lab.train_or_load({"a": arm}, 1, 1, 1024)
    assert trained == [["b"], ["a"]], "only what is new is trained: another arm, another seed"


def test_measurements_on_the_way(lab):
    """Before the first step, then at logarithmically spaced ones; the last is the trained SAE; only of the arms that ask."""
    asked, other = Arm("topk+lookup", 32, 2, 1e-2, curve=500, **LOOKUP), Arm("topk", 32, 2, 1e-2)
    saes = lab.train_or_load({"a": asked, "b": other}, 1, 0, 4096)
    curve = saes["a"].record["curve"]
    assert [c["tokens"] for c in curve] == [0, 512, 1536, 4096] and saes["b"].record["curve"] == []
    assert curve[0]["table_cosine"] == pytest.approx(1) and curve[-1]["table_cosine"] < 0.999
    evaluator = tu.Evaluator(lab.lm, lab.rows("heldout", 500), lab.hook(1))
    assert evaluator(saes["a"])["nmse"] == pytest.approx(curve[-1]["nmse"], rel=1e-5)
    assert [h["step"] for h in saes["b"].record["history"]] == [0, 7]


def test_mean_activation_of_a_token(lab):
    means, ids = lab.token_means(1), lab.train_rows.long()
    keep = tu.keep_mask(ids, lab.lm)
    x = lab.lm.activations(ids, [1])[1]
    token = int(ids[keep][0])
    assert torch.allclose(means[token], x[keep & (ids == token)].mean(0), atol=1e-4)
    unseen = int((torch.bincount(ids[keep], minlength=lab.lm.n_vocab) == 0).nonzero()[0])
    assert torch.allclose(means[unseen], x[keep].mean(0), atol=1e-4)


def test_tables_of_the_arms(lab):
    unigrams = lab.unigrams(1)
    starts = {"start": "zero"}, LOOKUP, {"start": "shuffled", **HALF}, {}
    zero, half, shuffled, plain = (lab._new_sae(Arm("x", 32, 2, 1e-2, **start), 1, 0) for start in starts)
    assert zero.lookup.W.abs().sum() == 0 and plain.lookup is None
    frozen = lab._new_sae(Arm("x", 32, 2, 1e-2, frozen=True, **LOOKUP), 1, 0)
    assert half.lookup.W.requires_grad and not frozen.lookup.W.requires_grad
    assert torch.equal(half.lookup.W, unigrams / 2) and torch.equal(half.W_enc, half.W_dec.T / 2)
    assert torch.equal(plain.W_enc, plain.W_dec.T)
    rows = shuffled.lookup.W
    assert not torch.equal(rows, half.lookup.W)
    assert torch.equal(rows.sort(0).values, half.lookup.W.sort(0).values), "the same rows, elsewhere"


def test_splits_of_another_corpus_are_disjoint(lab):
    numbered = [f"w{i % 60 + 2} document {i}" for i in range(1000)]
    with open(lab.p.corpus, "w") as f:
        f.writelines(json.dumps({"text": t}) + "\n" for t in numbered)
    parts = {s: list(lab.documents(s)) for s in ("sae", "tune", "heldout")}
    assert sorted(t for part in parts.values() for t in part) == sorted(numbered)
    assert len(parts["sae"]) > 700 and len(parts["heldout"]) > 100 and len(parts["tune"]) > 20


def test_output_does_not_touch_the_record(lab):
    assert lab.out.name == "smoke-model" and not (lab.out / "x").exists()
    with pytest.raises(FileNotFoundError, match="run this notebook once before redrawing"):
        lab.read_csv()


def test_claims_must_be_judged(lab):
    lab.declare("a", "claim", "source", "a rule that is stated", "1")
    with pytest.raises(RuntimeError, match="declared but not judged: a"):
        lab.save_claims()
    with pytest.raises(KeyError):
        lab.verdict("undeclared", "1", True)
    assert lab.verdict("a", "1", True) == "effect present" and lab.verdict("a", "1", False) == "effect absent"
    assert lab.verdict("a", "1", None) == "not tested"
    assert "| claim | source | 1 | 1 | 1 | **not tested** |" in scorecard(lab.save_claims())


def test_only_the_papers_models_can_reproduce(lab):
    lab.declare("a", "claim", "source", "rule", "1")
    lab.model_name = "gpt2"
    for name, changes, why in (("smoke", {"model": GPT2.model, "corpus": GPT2.corpus}, "another budget"),
                               ("gpt2-lite", {}, "a tenth of the budget"), ("gpt2", {"corpus": "text.jsonl"}, "another corpus"),
                               ("gpt2", {"model": "gpt2-medium"}, "another model"), ("gpt2", {"tokens": 300_000}, "a rehearsal")):
        lab.p = replace(PROFILES[name], **changes)
        assert lab.verdict("a", "1", True) == "effect present" and lab.verdict("a", "1", False) == "effect absent", why
    lab.p = replace(GPT2, gib=4.0)
    assert [lab.verdict("a", "1", h, direction=d) for h, d in ((True, False), (False, True), (False, False))] == [
        "reproduced", "direction only", "not reproduced"]


def test_intervals():
    mean, low, high = paired_interval([1.0, 2.0, 3.0])
    assert mean == 2 and low == pytest.approx(2 - 4.3027 / np.sqrt(3), rel=1e-3) and high == pytest.approx(4 - low)
    assert paired_interval([1.0]) == (1.0, -np.inf, np.inf), "one seed decides nothing"
    value, low, high = bootstrap_interval(np.mean, np.random.default_rng(0).normal(5, 1, 400))
    assert low < 5.1 < 5.2 and low < value < high and high - low == pytest.approx(4 * 1 / 20, rel=0.2)


@pytest.mark.parametrize(("arguments", "env", "text"), [
    (["77"], {}, "no notebook number '77': there are 00, 01"),
    (["--record"], {"TSAE_MODEL": "x"}, "--record is for the testbed: unset TSAE_MODEL"),
    (["--record", "--profile", "mini"], {}, "--record keeps notebooks executed at profile record"),
    ([], {"TSAE_PROFILE": "huge"}, "unknown profile 'huge'"),
    (["1", "--profile", "huge"], {}, "unknown profile 'huge': TSAE_PROFILE must be one of"),
    (["5", "--profile", "smoke"], {"TSAE_MODEL": "./gone"}, "no model at .*gone: expected a Hugging Face folder"),
    (["1", "--profile", "smoke"], {"TSAE_CORPUS": "./gone.jsonl"}, "no corpus at .*gone.jsonl: expected"),
])
def test_command_line_errors(tmp_path, arguments, env, text):
    done = subprocess.run([sys.executable, str(ROOT / "notebooks" / "run.py"), *arguments], cwd=tmp_path, capture_output=True, text=True,
                          env={**os.environ, "TSAE_FIGURES": str(tmp_path / "figures"), **env})
    assert done.returncode != 0 and re.search(text, done.stderr), done.stderr[-800:]
    assert "Cell In" not in done.stderr, "a sentence, not the notebook's traceback"


def test_rows_are_a_sample_of_the_whole_split(lab):
    """Documents come sorted by package: the first tokens of a split are no sample of it."""
    few, every = lab.rows("sae", 100 * 31), lab.rows("sae", 1e9)
    assert len(few) == 100 and len(every) > 300
    assert torch.equal(few[0], every[0]) and torch.equal(few[-1], every[-1])
