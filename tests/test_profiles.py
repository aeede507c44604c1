"""The paper's own models: pinned names, published SAEs, budgets, memory, and the check of contributed figures."""

from __future__ import annotations

import json
import re
import shutil

import features as ft
import pandas as pd
import pytest
import torch
import verify
from huggingface_hub.errors import HTTPError
from lab import GPT2, LOOKUP, PROFILES, ROOT, Arm, Lab, rehearsal, tu

from conftest import good_sae, res_jb, save_model

PAPER = ("gpt2-lite", "gpt2", "pythia")


@pytest.fixture
def bench(tmp_path, texts, monkeypatch):
    """A maker of Labs at `smoke` on a tiny model with three layers."""
    save_model(tmp_path / "model")
    (tmp_path / "text.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in texts * 5))
    for name, value in {"MODEL": "model", "CORPUS": "text.jsonl", "FIGURES": "figures", "CACHE": "cache"}.items():
        monkeypatch.setenv(f"TSAE_{name}", str(tmp_path / value))

    def make(**env) -> Lab:
        for name, value in env.items():
            monkeypatch.setenv(f"TSAE_{name}", str(value))
        return Lab("fig2_unigram_mse", "smoke")

    return make


def layers(depths: tuple[float, ...], n: int) -> list[int]:
    return [int(d * n + 1e-9) for d in depths]


def test_profiles_hold_the_papers_settings():
    for name, n in (("gpt2-lite", 12), ("gpt2", 12), ("pythia", 24)):
        p = PROFILES[name]
        assert p.name == name and p.context_size == 256 and p.batch_size == 4096 and p.buffer_tokens == 2**17 and p.k in p.ks
        assert layers((p.depth,), n) == [8 if n == 12 else 16]
        pinned = [source for source in (p.model, p.corpus, p.ngram_corpus, p.published) if source]
        assert all(re.fullmatch(r"[\w./:-]+@[0-9a-f]{40}", source) for source in pinned)
        assert set(p.lrs) >= {1e-4} and p.lr_end == pytest.approx(3e-5 / 1e-4)
    assert layers(GPT2.depths, 12) == [5, 8, 11] and layers(GPT2.speedup_depths, 12) == [*range(5, 12)]
    assert layers(PROFILES["pythia"].depths, 24) == layers(PROFILES["pythia"].speedup_depths, 24) == [12, 16, 20]
    assert (GPT2.ks, GPT2.expansion, GPT2.tokens) == ((5, 10, 20, 30, 50), 16, 300_000_000)
    assert (PROFILES["pythia"].ks, PROFILES["pythia"].expansion, PROFILES["pythia"].tokens) == ((30, 50), 8, 131_000_000)
    assert (PROFILES["gpt2-lite"].ks, PROFILES["gpt2-lite"].tokens) == ((10, 30), 30_000_000)
    assert not PROFILES["pythia"].published, "RES-JB is GPT-2 small's"


def test_a_pinned_name_is_split_and_a_local_one_is_not(tmp_path):
    assert tu.hub_name("gpt2@abc") == ("gpt2", "abc") and tu.hub_name("gpt2") == ("gpt2", None)
    (tmp_path / "a@b").mkdir()
    assert tu.hub_name(tmp_path / "a@b") == (str(tmp_path / "a@b"), None)


def test_the_commit_reaches_every_download(tmp_path, monkeypatch):
    asked = {}

    def refuse(kind):
        def call(source, /, *args, revision=None, **kwargs):
            asked[kind] = (str(source), kwargs.get("name"), revision)
            raise HTTPError("no network")  # as behind a proxy that is gone: no OSError

        return call

    monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", lambda name, revision: asked.update(tokenizer=(name, None, revision)))
    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", refuse("model"))
    monkeypatch.setattr("datasets.load_dataset", refuse("corpus"))
    monkeypatch.setattr("huggingface_hub.snapshot_download", refuse("sae"))
    monkeypatch.delenv("TSAE_MODEL", raising=False)
    monkeypatch.setenv("TSAE_CACHE", str(tmp_path))
    bench = Lab("fig2_unigram_mse", "gpt2")
    told = "check name and network, or give a local copy"
    with pytest.raises(FileNotFoundError, match=f"could not load the model 'openai-community/gpt2@607a.*{told}"):
        _ = bench.lm
    with pytest.raises(FileNotFoundError, match=r"'allenai/c4:en@1588.*check the name and the network, or give a local copy"):
        next(bench.documents("sae"))
    with pytest.raises(FileNotFoundError, match=rf"hub did not give blocks\.8.*{told}"):
        bench.published(8)
    assert asked["tokenizer"] == asked["model"] == ("openai-community/gpt2", None, GPT2.model.split("@")[1])
    assert asked["corpus"] == ("allenai/c4", "en", GPT2.corpus.split("@")[1])
    with pytest.raises(FileNotFoundError, match="openwebtext:plain_text@79d9"):
        next(bench.documents("sae", bench.p.ngram_corpus))
    assert asked["corpus"] == ("Skylion007/openwebtext", "plain_text", GPT2.ngram_corpus.split("@")[1])
    assert asked["sae"][0] == "jbloom/GPT2-Small-SAEs-Reformatted" and asked["sae"][2] == GPT2.published.split("@")[1]


def test_weights_are_trained_as_far_as_the_profile_says(bench, monkeypatch):
    """`lr_end` reaches the training, and SAEs trained to another end are other SAEs."""
    lab, arm = bench(), {"a": Arm("topk", 32, 2, 1e-2)}
    first = lab.train_or_load(arm, 1, 0, 1024)["a"]
    lab.p = lab.p.__class__(**{**lab.p.__dict__, "lr_end": 0.3})
    second = lab.train_or_load(arm, 1, 0, 1024)["a"]
    assert not torch.equal(first.W_dec, second.W_dec)


def test_arms_beyond_the_memory_take_more_passes_and_come_out_the_same(bench, capsys):
    lab = bench()
    arms = {s: Arm(s, 32, 2, 1e-2, **t) for s, t in (("topk", {}), ("topk+lookup", LOOKUP), ("topk-half-encoder", {"encoder_scale": 0.5}))}
    together = lab.train_or_load(arms, 1, 0, 1024)
    assert "training 3 SAEs in 1 pass" in capsys.readouterr().out
    each = 16 * (32 * 65 + lab.lm.n_vocab * 32) / 2**30  # the TSAE's
    lab.p, lab.cache = lab.p.__class__(**{**lab.p.__dict__, "gib": 1.01 * each}), lab.cache / "other"
    assert [list(g) for g in lab._passes(arms)] == [["topk"], ["topk+lookup"], ["topk-half-encoder"]]
    apart = lab.train_or_load(arms, 1, 0, 1024)
    for name in arms:
        assert torch.equal(together[name].W_dec, apart[name].W_dec), name
    assert [list(g) for g in bench()._passes({})] == []


def test_a_rehearsal_takes_a_share_of_every_budget(bench):
    p = rehearsal(PROFILES["gpt2"], "0.001")
    assert (p.tokens, p.budgets, p.eval_tokens) == (300_000, (75_000, 300_000), 4096) and p.buffer_tokens == 2**17
    assert rehearsal(PROFILES["gpt2"], "1e-9").budgets == (4096, 8192), "budgets stay apart"
    assert bench(BUDGET="0.5").out.name == "smoke-model-x0.5"
    for share in ("0", "2"):
        with pytest.raises(ValueError, match=f"TSAE_BUDGET={share} must be a share"):
            bench(BUDGET=share)


def test_published_saes_are_measured_or_refused(tmp_path, bench):
    assert bench().published(1) == {} and bench().paper_sae == "topk"
    res_jb(tmp_path / "saes" / "blocks.1.hook_resid_pre", good_sae(32), "blocks.1.hook_resid_pre")
    random = good_sae(32) | {"W_enc": torch.randn(32, 64), "W_dec": torch.randn(64, 32)}
    res_jb(tmp_path / "saes" / "blocks.2.hook_resid_pre", random, "blocks.2.hook_resid_pre")
    lab = bench(PUBLISHED=tmp_path / "saes")
    sae = lab.published(1)["published"]
    x = lab.lm.activations(lab.rows("heldout", 500).long(), [1])[1].flatten(0, 1)
    assert lab.paper_sae == "published" and torch.allclose(sae(x, None).x_hat, 0.9 * x, atol=1e-4)
    with pytest.raises(ValueError, match=r"FVU .* is above 0.5"):
        lab.published(2)
    short = res_jb(tmp_path / "short" / "blocks.2.hook_resid_pre", good_sae(32), "blocks.2.hook_resid_pre", context_size=8)
    lab = bench(PUBLISHED=short.parent)
    assert lab.layer == 2 and lab.study_context == 8 and ft.read_text(lab, 2, 500).ids.shape[1] == 8, "no further than it was trained"


def test_counts_of_tokens_are_those_of_the_ngrams(bench):
    lab = bench()
    rows = lab.train_rows
    expected = torch.bincount(rows[tu.keep_mask(rows, lab.lm)].long(), minlength=lab.lm.n_vocab)
    assert torch.equal(ft.token_counts(lab), expected)
    lab.p = lab.p.__class__(**{**lab.p.__dict__, "ngram_tokens": 20 * lab.context_size})
    assert 0 < ft.token_counts(lab).sum() < expected.sum() and ft.token_counts(lab).sum() > ft.common_grams(lab, 2, 10**6)[1].sum()


def test_rows_of_another_corpus_are_read_once(bench, monkeypatch):
    rows = bench().rows("sae", 5000)
    again = bench()
    monkeypatch.setattr(again, "documents", lambda *_: pytest.fail("read again"))
    assert torch.equal(again.rows("sae", 5000), rows)
    with pytest.raises(pytest.fail.Exception):
        again.rows("heldout", 5000)


@pytest.fixture(scope="module")
def contributed(tmp_path_factory):
    """A copy of the committed record, as someone's contribution would come."""
    return shutil.copytree(ROOT / "figures" / "record", tmp_path_factory.mktemp("figures") / "record")


def test_the_record_is_in_order(contributed):
    assert verify.verify(contributed, "record") == []
    gone = contributed / "gone"
    assert verify.verify(gone, "record") == [f"there is no folder {gone}: run `make figures PROFILE=record` first"]


def change_json(path, **changes):
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def change_claims(path, column, value):
    table = pd.read_csv(path, dtype=str, keep_default_na=False)
    table.loc[0, column] = value
    table.to_csv(path, index=False)


@pytest.mark.parametrize(("break_it", "told"), [
    (lambda f: (f / "speedup.csv").unlink(), "speedup.csv is missing or empty"),
    (lambda f: (f / "tour.png").write_bytes(b"no picture"), "tour.png is no picture"),
    (lambda f: change_json(f / "tour.json", weights_sha256="0" * 64), "tour: the weights' SHA-256 is '000"),
    (lambda f: change_json(f / "tour.json", model_hash="other"), "model_hash differs between notebooks"),
    (lambda f: change_json(f / "tour.json", profile={"name": "mini"}), "tour: name is 'mini', profile record has 'record'"),
    (lambda f: change_claims(f / "tour_claims.csv", "rule", "anything goes"), "tour-lower: its wording or rule is not the committed one"),
    (lambda f: change_claims(f / "tour_claims.csv", "verdict", "surely"), "unknown verdict 'surely'"),
    (lambda f: change_claims(f / "claims.csv", "verdict", "effect absent"), "claims.csv is not what the notebooks' claims add up to"),
    (lambda f: (f / "tour.json").write_text("{"), "tour.json is no record of a run"),
    (lambda f: (f / "tour.csv").write_text("tokens,nmse\n"), "tour.csv has no rows"),
    (lambda f: (f / "tour_claims.csv").write_text("id,claim\na,b\n"), "tour_claims.csv lacks model"),
    (lambda f: change_json(f / "tour.json", device="/home/someone/gpu"), "tour.json names a folder of its machine"),
])
def test_what_is_not_in_order_is_told(tmp_path, contributed, break_it, told):
    folder = shutil.copytree(contributed, tmp_path / "record")
    break_it(folder)
    assert any(told in problem for problem in verify.verify(folder, "record")), verify.verify(folder, "record")
