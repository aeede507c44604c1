"""The paper's own models: pinned names, published SAEs, budgets, memory, contributed figures."""

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
from lab import LOOKUP, PROFILES, Lab, SAESpec, training, tu
from lab.profiles import GPT2, rehearsal

from conftest import ROOT, good_sae, res_jb, save_model

PYTHIA = PROFILES["pythia"]


@pytest.fixture
def make_lab(tmp_path, texts, monkeypatch):
    """Makes Labs at `smoke` on a tiny model with three layers."""
    save_model(tmp_path / "model")
    lines = "".join(json.dumps({"text": text}) + "\n" for text in texts * 5)
    (tmp_path / "text.jsonl").write_text(lines)
    places = {"MODEL": "model", "CORPUS": "text.jsonl", "FIGURES": "figures", "CACHE": "cache"}
    for name, place in places.items():
        monkeypatch.setenv(f"TSAE_{name}", str(tmp_path / place))

    def make(**env) -> Lab:
        for name, value in env.items():
            monkeypatch.setenv(f"TSAE_{name}", str(value))
        return Lab("fig2_unigram_mse", "smoke")

    return make


def layers(depths: tuple[float, ...], n_layers: int) -> list[int]:
    return [int(depth * n_layers + 1e-9) for depth in depths]


# -- settings --


@pytest.mark.parametrize(
    ("name", "n_layers", "layer"), [("gpt2-lite", 12, 8), ("gpt2", 12, 8), ("pythia", 24, 16)]
)
def test_profiles_hold_the_papers_settings(name, n_layers, layer):
    p = PROFILES[name]
    assert p.name == name and p.source.context_size == 256
    assert p.recipe.batch_size == 4096 and p.recipe.buffer_tokens == 2**17
    assert p.grid.k in p.grid.ks and layers((p.grid.depth,), n_layers) == [layer]
    source = p.source
    named = [source.model, source.corpus, source.ngram_corpus, source.published]
    pinned = r"[\w./:-]+@[0-9a-f]{40}"
    assert all(re.fullmatch(pinned, name) for name in named if name)
    assert set(p.recipe.lrs) >= {1e-4} and p.recipe.lr_end == pytest.approx(3e-5 / 1e-4)


def test_grids_and_budgets_of_the_papers_models():
    assert layers(GPT2.grid.depths, 12) == [5, 8, 11]
    assert layers(GPT2.grid.speedup_depths, 12) == [5, 6, 7, 8, 9, 10, 11]
    assert layers(PYTHIA.grid.depths, 24) == [12, 16, 20]
    assert layers(PYTHIA.grid.speedup_depths, 24) == [12, 16, 20]
    assert GPT2.grid.ks == (5, 10, 20, 30, 50) and GPT2.grid.expansion == 16
    assert PYTHIA.grid.ks == (30, 50) and PYTHIA.grid.expansion == 8
    assert GPT2.budget.tokens == 300_000_000 and PYTHIA.budget.tokens == 131_000_000
    lite = PROFILES["gpt2-lite"]
    assert lite.grid.ks == (10, 30) and lite.budget.tokens == 30_000_000
    assert not PYTHIA.source.published, "RES-JB is of GPT-2 small"


def test_a_profile_may_name_its_notebooks(monkeypatch):
    """They are run where none are asked for; other profiles run all."""
    from tools import run_notebooks

    for name in ("smollm2-mini", "mini"):
        monkeypatch.setenv("TSAE_PROFILE", name)
        chosen = [path.name[:2] for path in run_notebooks.select([])]
        assert chosen == list(PROFILES[name].notebooks) or len(chosen) == 16
        assert [path.name[:2] for path in run_notebooks.select(["6"])] == ["06"]
    assert PROFILES["smollm2-mini"].notebooks == ("00", "02", "05", "06", "08", "99")


def test_changes_of_a_profile_name_its_fields():
    changed = GPT2.with_changes("x", k=7, tokens=5, gib=2.0, corpus="c")
    assert changed.name == "x" and changed.grid.k == 7 and changed.budget.tokens == 5
    assert changed.recipe.gib == 2 and changed.source.corpus == "c"
    assert changed.grid.ks == GPT2.grid.ks and changed.source.model == GPT2.source.model
    with pytest.raises(TypeError, match="a profile has no field layer"):
        GPT2.with_changes("x", layer=3)


def test_records_of_a_profile_name_no_folder(make_lab):
    p = make_lab().p
    assert p.flat()["model"] == "model" and p.flat()["corpus"] == "text.jsonl"
    assert p.flat()["name"] == "smoke" and p.flat()["batch_size"] == 512


def test_a_rehearsal_takes_a_share_of_every_budget(make_lab):
    p = rehearsal(GPT2, "0.001")
    assert p.budget.tokens == 300_000 and p.budget.budgets == (75_000, 300_000)
    assert p.budget.eval_tokens == 4096, "at least one batch"
    assert p.recipe.buffer_tokens == 2**17, "the buffer is no budget"
    assert rehearsal(GPT2, "1e-9").budget.budgets == (4096, 8192), "budgets remain different"
    assert make_lab(BUDGET="0.5").out.name == "smoke-model-x0.5"
    for share in ("0", "2"):
        with pytest.raises(ValueError, match=f"TSAE_BUDGET={share} must be a share"):
            make_lab(BUDGET=share)


# -- downloads --


def test_a_pinned_name_is_split_and_a_local_one_is_not(tmp_path):
    assert tu.hub_name("gpt2@abc") == ("gpt2", "abc") and tu.hub_name("gpt2") == ("gpt2", None)
    (tmp_path / "a@b").mkdir()
    assert tu.hub_name(tmp_path / "a@b") == (str(tmp_path / "a@b"), None)


@pytest.fixture
def asked(monkeypatch) -> dict[str, tuple]:
    """(Name, configuration, commit) that was asked of the hub, which refuses everything."""
    requests = {}

    def refuse(kind):
        def call(source, /, *args, revision=None, **kwargs):
            requests[kind] = (str(source), kwargs.get("name"), revision)
            raise HTTPError("no network")  # as behind a proxy that is down: no OSError

        return call

    def tokenizer(name, revision):
        requests["tokenizer"] = (name, None, revision)

    monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", tokenizer)
    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", refuse("model"))
    monkeypatch.setattr("datasets.load_dataset", refuse("corpus"))
    monkeypatch.setattr("huggingface_hub.snapshot_download", refuse("sae"))
    return requests


def test_the_commit_reaches_every_download(tmp_path, monkeypatch, asked):
    def commit(source: str) -> str:
        return source.split("@")[1]

    monkeypatch.delenv("TSAE_MODEL", raising=False)
    monkeypatch.setenv("TSAE_CACHE", str(tmp_path))
    lab = Lab("fig2_unigram_mse", "gpt2")
    advice = "check (the )?name and (the )?network, or give a local copy"
    model = "could not load the model 'openai-community/gpt2@607a"
    with pytest.raises(FileNotFoundError, match=f"{model}.*{advice}"):
        _ = lab.lm
    with pytest.raises(FileNotFoundError, match=f"'allenai/c4:en@1588.*{advice}"):
        next(lab.documents("sae"))
    with pytest.raises(FileNotFoundError, match=rf"hub did not give blocks\.8.*{advice}"):
        lab.published(8)
    source = GPT2.source
    assert asked["model"] == ("openai-community/gpt2", None, commit(source.model))
    assert asked["tokenizer"] == asked["model"]
    assert asked["corpus"] == ("allenai/c4", "en", commit(source.corpus))
    with pytest.raises(FileNotFoundError, match="openwebtext:plain_text@79d9"):
        next(lab.documents("sae", lab.p.source.ngram_corpus))
    openwebtext = ("Skylion007/openwebtext", "plain_text", commit(source.ngram_corpus))
    assert asked["corpus"] == openwebtext
    name, _, revision = asked["sae"]
    assert name == "jbloom/GPT2-Small-SAEs-Reformatted" and revision == commit(source.published)


# -- training --


def test_weights_are_trained_as_far_as_the_profile_says(make_lab):
    """`lr_end` reaches the training, and SAEs trained to another end are other SAEs."""
    lab, specs = make_lab(), {"a": SAESpec("topk", 32, 2, 1e-2)}
    first = lab.train_or_load(specs, 1, 0, 1024)["a"]
    lab.p = lab.p.with_changes("smoke", lr_end=0.3)
    second = lab.train_or_load(specs, 1, 0, 1024)["a"]
    assert not torch.equal(first.W_dec, second.W_dec)


def test_more_passes_give_the_same_saes(make_lab, capsys):
    """Specifications beyond the memory limit are trained in further passes of the model."""
    lab = make_lab()
    starts = {"topk": {}, "topk+lookup": LOOKUP, "topk-half-encoder": {"encoder_scale": 0.5}}
    specs = {system: SAESpec(system, 32, 2, 1e-2, **start) for system, start in starts.items()}
    together = lab.train_or_load(specs, 1, 0, 1024)
    assert "training 3 SAEs in 1 pass" in capsys.readouterr().out
    size_of_tsae = 16 * (32 * 65 + lab.lm.n_vocab * 32) / 2**30
    lab.p = lab.p.with_changes("smoke", gib=1.01 * size_of_tsae)
    lab.cache = lab.cache / "other"
    groups = training.passes(lab, specs)
    assert [list(group) for group in groups] == [[name] for name in starts]
    apart = lab.train_or_load(specs, 1, 0, 1024)
    for name in specs:
        assert torch.equal(together[name].W_dec, apart[name].W_dec), name
    assert training.passes(make_lab(), {}) == []


def test_published_saes_are_measured_or_refused(tmp_path, make_lab):
    lab = make_lab()
    assert lab.published(1) == {} and lab.paper_sae == "topk"
    folder, hooks = tmp_path / "saes", {layer: f"blocks.{layer}.hook_resid_pre" for layer in (1, 2)}
    res_jb(folder / hooks[1], good_sae(32), hooks[1])
    random = {"W_enc": torch.randn(32, 64), "W_dec": torch.randn(64, 32)}
    res_jb(folder / hooks[2], good_sae(32) | random, hooks[2])
    lab = make_lab(PUBLISHED=folder)
    sae = lab.published(1)["published"]
    x = lab.lm.activations(lab.rows("heldout", 500).long(), [1])[1].flatten(0, 1)
    assert lab.paper_sae == "published"
    assert torch.allclose(sae(x, None).x_hat, 0.9 * x, atol=1e-4)
    with pytest.raises(ValueError, match=r"FVU .* is above 0.5"):
        lab.published(2)


def test_a_published_sae_is_studied_as_far_as_it_was_trained(tmp_path, make_lab):
    hook = "blocks.2.hook_resid_pre"
    short = res_jb(tmp_path / "short" / hook, good_sae(32), hook, context_size=8)
    lab = make_lab(PUBLISHED=short.parent)
    assert lab.layer == 2 and lab.study_context == 8
    assert ft.read_text(lab, 2, 500).ids.shape[1] == 8


# -- text --


def test_counts_of_tokens_are_those_of_the_ngrams(make_lab):
    lab = make_lab()
    rows = lab.train_rows
    tokens = rows[tu.keep_mask(rows, lab.lm)].long()
    expected = torch.bincount(tokens, minlength=lab.lm.n_vocab)
    assert torch.equal(ft.token_counts(lab), expected)
    lab.p = lab.p.with_changes("smoke", ngram_tokens=20 * lab.context_size)
    fewer = ft.token_counts(lab).sum()
    assert 0 < fewer < expected.sum()
    assert fewer > ft.common_grams(lab, 2, 10**6)[1].sum()


def test_rows_of_another_corpus_are_read_once(make_lab, monkeypatch):
    rows = make_lab().rows("sae", 5000)
    again = make_lab()
    monkeypatch.setattr(again, "documents", lambda *_: pytest.fail("read again"))
    assert torch.equal(again.rows("sae", 5000), rows)
    with pytest.raises(pytest.fail.Exception):
        again.rows("heldout", 5000)


# -- the check of contributed figures --


@pytest.fixture(scope="module")
def contributed(tmp_path_factory):
    """A copy of the committed record, as a contributor would send it."""
    folder = tmp_path_factory.mktemp("figures") / "record"
    return shutil.copytree(ROOT / "figures" / "record", folder)


def test_the_record_is_in_order(contributed):
    problems = verify.verify(contributed, "record")
    # Some notebooks were recorded before the split `final` was taken from `heldout`.
    assert [p for p in problems if not p.startswith("corpus_hash differs between")] == []
    gone = contributed / "gone"
    advice = "run `make figures PROFILE=record` first"
    assert verify.verify(gone, "record") == [f"there is no folder {gone}: {advice}"]


def change_json(path, **changes):
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def change_claims(path, column, value):
    table = pd.read_csv(path, dtype=str, keep_default_na=False)
    table.loc[0, column] = value
    table.to_csv(path, index=False)


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (
            lambda folder: (folder / "speedup.csv").unlink(),
            "speedup.csv is missing or empty",
        ),
        (
            lambda folder: (folder / "tour.png").write_bytes(b"no picture"),
            "tour.png is no picture",
        ),
        (
            lambda folder: change_json(folder / "tour.json", weights_sha256="0" * 64),
            "tour: the SHA-256 of the weights is '000",
        ),
        (
            lambda folder: change_json(folder / "tour.json", model_hash="other"),
            "model_hash differs between notebooks",
        ),
        (
            lambda folder: change_json(folder / "tour.json", profile={"name": "mini"}),
            "tour: name is 'mini', but 'record' in profile record",
        ),
        (
            lambda folder: change_claims(folder / "expansion_claims.csv", "rule", "anything"),
            "expansion-width: its wording or rule is not the committed one",
        ),
        (
            lambda folder: change_claims(folder / "expansion_claims.csv", "claim", "It is best."),
            "expansion-width: its wording or rule is not the committed one",
        ),
        (
            lambda folder: change_claims(folder / "expansion_claims.csv", "id", "expansion-better"),
            "claims missing or unknown: expansion-better, expansion-width",
        ),
        (
            lambda folder: change_claims(folder / "expansion_claims.csv", "verdict", "surely"),
            "unknown verdict 'surely'",
        ),
        (
            lambda folder: change_claims(folder / "claims.csv", "verdict", "undecided"),
            "claims.csv does not gather the notebooks' claims",
        ),
        (
            lambda folder: (folder / "tour.json").write_text("{"),
            "tour.json is no record of a run",
        ),
        (
            lambda folder: (folder / "tour.csv").write_text("tokens,nmse\n"),
            "tour.csv has no rows",
        ),
        (
            lambda folder: (folder / "expansion_claims.csv").write_text("id,claim\na,b\n"),
            "expansion_claims.csv lacks estimate, high, low, model",
        ),
        (
            lambda folder: change_json(folder / "tour.json", device="/home/someone/gpu"),
            "tour.json names a folder of its machine",
        ),
    ],
)
def test_problems_are_reported(tmp_path, contributed, break_it, message):
    folder = shutil.copytree(contributed, tmp_path / "record")
    break_it(folder)
    problems = verify.verify(folder, "record")
    assert any(message in problem for problem in problems), problems
