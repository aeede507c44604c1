"""Bad input: one clear sentence that says what is wrong, what was expected, how to mend it."""

from __future__ import annotations

import json
import shutil

import pandas as pd
import pytest
import torch
from safetensors.torch import load_file, save_file
from test_sae import random_sae

import tsae_utils as tu
from conftest import MODELS, save_model, word_tokenizer

HOOK = "blocks.1.hook_resid_pre"


def raises(kind, text):
    return pytest.raises(kind, match=text)


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"k": 11}, "k = 11 must lie between 0 and d_sae = 10"),
        ({"k": -1}, "k = -1 must lie"),
        (
            {"activation": "tanh"},
            "unknown activation 'tanh': expected one of topk, batchtopk, relu, gated",
        ),
        ({"d_in": 0}, "d_in = 0"),
        ({"l1_coefficient": -1.0}, "must not be negative"),
        ({"decoder_init_norm": 0.0}, "must be positive"),
    ],
)
def test_config(settings, text):
    with raises(ValueError, text):
        tu.TSAEConfig(**{"d_in": 6, "d_sae": 10, "k": 3, **settings})


def test_unknown_profile(monkeypatch):
    from lab import Lab

    with raises(
        ValueError, "unknown profile 'huge': TSAE_PROFILE must be one of record, mini, smoke"
    ):
        Lab("x", "huge")


def test_missing_model_folder(tmp_path):
    with raises(
        FileNotFoundError, "no model at .*nowhere: expected a Hugging Face folder with config.json"
    ):
        tu.load_lm(tmp_path / "nowhere")


def test_folder_without_weights(tmp_path):
    folder = save_model(tmp_path / "m")
    (folder / "model.safetensors").unlink()
    with raises(FileNotFoundError, "could not load the model"):
        tu.load_lm(folder)


def test_truncated_model(tmp_path):
    folder = save_model(tmp_path / "m")
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    with raises(ValueError, "the weights in .* are damaged"):
        tu.load_lm(folder)


def test_bos_beyond_the_embedding():
    tokenizer = word_tokenizer(
        bos_token="<|endoftext|>"
    )  # not in the vocabulary: gets the id after the last row
    with raises(
        ValueError,
        "BOS id 64 lies beyond the model's embedding of 64 rows: mend tokenizer_config.json",
    ):
        tu.LanguageModel(MODELS["gpt2"](), tokenizer, "m")


def test_tokenizer_of_another_model(lm):
    class Shifted:
        def __call__(self, texts, **_):
            return {"input_ids": [[100] * 30 for _ in texts]}

    other = tu.LanguageModel(lm.model, word_tokenizer(bos_token="<s>"), "m")
    other.tokenizer = Shifted()
    with raises(ValueError, "token id 100 lies beyond the embedding of 64 rows"):
        tu.token_rows(["a"], other, 8)


@pytest.mark.parametrize(
    ("hook", "text"),
    [
        (
            "blocks.1.hook_mlp_out",
            "unknown hook 'blocks.1.hook_mlp_out': expected blocks.<layer>.hook_resid_pre",
        ),
        ("transformer.h.3", "unknown hook"),
        ("blocks.3.hook_resid_pre", "is out of range: the model has 3 layers, 0 to 2"),
    ],
)
def test_hooks(lm, rows, hook, text):
    with raises(ValueError, text):
        tu.ActivationStream(lm, rows, hook, 16, 64)


def test_hook_names():
    assert [
        tu.parse_hook(f"blocks.{i}.hook_resid_{p}", 3)
        for i, p in ((0, "pre"), (2, "pre"), (2, "post"))
    ] == [0, 2, 3]


def test_empty_corpus(lm, tmp_path):
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "blank.txt").write_text("\n\n  \n")
    with raises(ValueError, "the corpus is empty or too small: 0 tokens do not fill one row of 8"):
        tu.token_rows([], lm, 8)
    with raises(ValueError, "the corpus is empty"):
        tu.token_rows(tu.read_documents(tmp_path / "blank.txt"), lm, 8)
    with raises(ValueError, "is empty"):
        tu.token_rows(tu.read_documents(tmp_path / "empty.jsonl"), lm, 8)


def test_corpus_of_another_format(tmp_path):
    (tmp_path / "a.csv").write_text("text\nhello\n")
    with raises(
        ValueError, "cannot read a.csv: expected .txt, .jsonl or .parquet with a column 'text'"
    ):
        list(tu.read_documents(tmp_path / "a.csv"))
    (tmp_path / "b.jsonl").write_text('{"body": "hello", "id": 1}\n')
    with raises(
        ValueError, "document 0 has no text under 'text'; its columns are \\['body', 'id'\\]"
    ):
        list(tu.read_documents(tmp_path / "b.jsonl"))
    (tmp_path / "only").mkdir()
    with raises(ValueError, "no text in .*only: expected .txt, .jsonl or .parquet files"):
        list(tu.read_documents(tmp_path / "only"))
    with raises(FileNotFoundError, "no corpus at .*gone.jsonl"):
        list(tu.read_documents(tmp_path / "gone.jsonl"))
    (tmp_path / "c.parquet").write_bytes(b"not parquet")
    with raises(ValueError, "cannot read .*c.parquet"):
        list(tu.read_documents(tmp_path / "c.parquet"))
    (tmp_path / "d.jsonl").write_text("this is not json\n")
    with raises(ValueError, "cannot read .*d.jsonl"):
        list(tu.read_documents(tmp_path / "d.jsonl"))


def test_every_local_format_gives_the_same_documents(tmp_path):
    texts = ["first document", "second\nwith a line break"]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    pd.DataFrame({"text": texts}).to_parquet(tmp_path / "a.parquet")
    (tmp_path / "a.txt").write_text("\n\n".join(texts))
    for kind in ("jsonl", "parquet", "txt"):
        assert list(tu.read_documents(tmp_path / f"a.{kind}")) == texts, kind
    folder = tmp_path / "two"
    folder.mkdir()
    for name in ("x.jsonl", "y.jsonl"):
        shutil.copy(tmp_path / "a.jsonl", folder / name)
    assert list(tu.read_documents(folder)) == texts + texts


def test_nan_activations(gpt2_folder, rows):
    lm = tu.load_lm(gpt2_folder, device="cpu", bf16=False)
    with torch.no_grad():
        lm.model.transformer.wte.weight[5, 0] = float("nan")
    stream = tu.ActivationStream(lm, rows, HOOK, 16, 256)
    for use in (
        lambda: next(iter(stream)),
        lambda: tu.Evaluator(lm, rows, HOOK),
        lambda: tu.unigram_activations(lm, HOOK),
    ):
        with raises(ValueError, "activations at blocks.1.hook_resid_pre contain NaN or infinity"):
            use()


def test_nan_loss_names_the_sae(lm, rows):
    good, bad = random_sae(d_in=32), random_sae(d_in=32)
    with torch.no_grad():
        bad.W_dec[0] = float("inf")
    with raises(FloatingPointError, "the loss of 'bad' is"):
        tu.train(
            {"good": good, "bad": bad},
            tu.ActivationStream(lm, rows, HOOK, 16, 256),
            tu.TrainConfig(tokens=160),
            progress=False,
        )


@pytest.mark.parametrize("where", ["W_enc_FD", "b_enc"])
def test_a_weight_that_is_nan_is_not_trained_on(lm, rows, where):
    """Sorted by its bits a NaN may lie below all others, so that no loss shows it."""
    sae = random_sae(d_in=32, d_sae=64)
    with torch.no_grad():
        getattr(sae, where)[0] = -float("nan")
    with raises(FloatingPointError, "'only' is"):
        tu.train(
            {"only": sae},
            tu.ActivationStream(lm, rows, HOOK, 16, 256),
            tu.TrainConfig(tokens=160),
            progress=False,
        )


def test_batch_larger_than_buffer(lm, rows):
    with raises(ValueError, "batch_size = 512 must not exceed buffer_tokens = 64"):
        tu.ActivationStream(lm, rows, HOOK, 512, 64)
    with raises(ValueError, "does not fill one batch of 60: raise buffer_tokens"):
        next(iter(tu.ActivationStream(lm, rows, HOOK, 60, 64)))


def test_unequal_token_budgets(lm, rows):
    cfgs = {"a": tu.TrainConfig(tokens=100), "b": tu.TrainConfig(tokens=200)}
    with raises(ValueError, "SAEs trained together see the same tokens"):
        tu.train(
            {"a": random_sae(d_in=32), "b": random_sae(d_in=32)},
            tu.ActivationStream(lm, rows, HOOK, 16, 64),
            cfgs,
        )


def test_table_of_another_vocabulary(lm, rows):
    evaluator = tu.Evaluator(lm, rows[:4], HOOK)
    with raises(
        ValueError,
        "token 9 has no row in a lookup table of 7 rows: the table belongs to another vocabulary",
    ):
        random_sae(vocab=7)(torch.randn(1, 6), torch.tensor([[9]]))
    with raises(
        ValueError,
        "the lookup table has 99 rows, the model 64 tokens: it belongs to another vocabulary",
    ):
        evaluator(random_sae(d_in=32, vocab=99))
    with raises(ValueError, "the lookup table has 99 rows"):
        tu.train(
            {"a": random_sae(d_in=32, vocab=99)},
            tu.ActivationStream(lm, rows, HOOK, 16, 64),
            tu.TrainConfig(tokens=16),
        )
    with raises(ValueError, "the lookup table's rows have 5 entries, the SAE's d_in is 6"):
        tu.TSAE(tu.TSAEConfig(d_in=6, d_sae=4, k=1), tu.TokenLookup(torch.zeros(7, 5)))


# -- saved SAEs --


@pytest.fixture
def saved(tmp_path):
    return tu.save(
        random_sae(vocab=7, hook_name=HOOK, context_size=16), tmp_path / "sae", {"note": "kept"}
    )


@pytest.mark.parametrize("activation", tu.ACTIVATIONS)
@pytest.mark.parametrize("vocab", [None, 7])
def test_round_trip(tmp_path, activation, vocab):
    sae = random_sae(
        vocab=vocab,
        activation=activation,
        hook_name=HOOK,
        model_name="m",
        context_size=16,
        l1_coefficient=2,
        decoder_init_norm=0.1,
    )
    again = tu.load(tu.save(sae, tmp_path / "s"))
    x, tokens = torch.randn(9, 6), torch.randint(7, (9, 1))
    assert torch.equal(again(x, tokens).x_hat, sae.eval()(x, tokens).x_hat)
    assert (again.cfg.hook_name, again.cfg.l1_coefficient, again.cfg.model_name) == (
        HOOK,
        2,
        "m",
    ), "an int, as people write it"
    assert again.cfg.decoder_init_norm == 0.1
    assert again.cfg.activation == activation and not again.training


def test_layout_is_saelens(saved):
    """Four tensors and no more in the weights file, the table beside it, ours under metadata; no pickle."""
    assert sorted(f.name for f in saved.iterdir()) == [
        "cfg.json",
        "sae_weights.safetensors",
        "token_lookup.safetensors",
    ]
    weights, cfg = (
        load_file(saved / "sae_weights.safetensors"),
        json.loads((saved / "cfg.json").read_text()),
    )
    assert {k: list(v.shape) for k, v in weights.items()} == {
        "W_enc": [6, 10],
        "b_enc": [10],
        "W_dec": [10, 6],
        "b_dec": [6],
    }
    known = {
        "d_in",
        "d_sae",
        "dtype",
        "device",
        "apply_b_dec_to_input",
        "normalize_activations",
        "reshape_activations",
        "architecture",
        "metadata",
        "k",
        "rescale_acts_by_decoder_norm",
    }
    assert (
        set(cfg) == known
        and cfg["metadata"]["tokenized"]["note"] == "kept"
        and cfg["metadata"]["sae_lens_version"].startswith("6.")
    )


def test_half_precision(tmp_path):
    sae = random_sae(vocab=7)
    again = tu.load(tu.save(sae, tmp_path / "s", dtype=torch.float16))
    assert again.W_dec.dtype == torch.float32 and torch.allclose(again.W_dec, sae.W_dec, atol=1e-2)


def test_saving_replaces_an_sae_and_nothing_else(saved):
    tu.save(random_sae(), saved)
    assert not (saved / "token_lookup.safetensors").exists() and not list(saved.parent.glob(".*"))
    (saved / "thesis.tex").write_text("years of work")
    with raises(FileExistsError, "exists and holds other files: choose a folder of its own"):
        tu.save(random_sae(), saved)
    assert (saved / "thesis.tex").exists()


@pytest.mark.parametrize("key", ["architecture", "d_in", "d_sae", "k"])
def test_cfg_with_a_missing_key(saved, key):
    cfg = json.loads((saved / "cfg.json").read_text())
    del cfg[key]
    (saved / "cfg.json").write_text(json.dumps(cfg))
    with raises(ValueError, f"cfg.json lacks {key}: expected the SAELens layout"):
        tu.load(saved)


def test_damaged_files(saved):
    whole = (saved / "sae_weights.safetensors").read_bytes()
    (saved / "sae_weights.safetensors").write_bytes(whole[: len(whole) // 2])
    with raises(ValueError, "sae_weights.safetensors is damaged or not a safetensors file"):
        tu.load(saved)
    (saved / "sae_weights.safetensors").unlink()
    with raises(FileNotFoundError, "sae_weights.safetensors is missing"):
        tu.load(saved)
    (saved / "cfg.json").write_text("{")
    with raises(ValueError, "cfg.json is not JSON"):
        tu.load(saved)
    with raises(FileNotFoundError, "cfg.json is missing"):
        tu.load(saved.parent / "nowhere")


def test_wrong_contents(saved):
    weights = load_file(saved / "sae_weights.safetensors")
    save_file({**weights, "W_enc": torch.zeros(3, 3)}, saved / "sae_weights.safetensors")
    with raises(ValueError, r"W_enc should be \[6, 10\], found \[3, 3\]"):
        tu.load(saved)
    save_file({k: v for k, v in weights.items() if k != "b_dec"}, saved / "sae_weights.safetensors")
    with raises(ValueError, r"b_dec should be \[6\], found nothing"):
        tu.load(saved)
    save_file(weights, saved / "sae_weights.safetensors")
    save_file({"W": torch.zeros(7, 6)}, saved / "token_lookup.safetensors")
    with raises(ValueError, r"W_lookup should be \[None, 6\], found nothing"):
        tu.load(saved)
    (saved / "token_lookup.safetensors").unlink()
    with raises(FileNotFoundError, "token_lookup.safetensors is missing"):
        tu.load(saved)
    cfg = json.loads((saved / "cfg.json").read_text())
    (saved / "cfg.json").write_text(json.dumps({**cfg, "architecture": "transcoder"}))
    with raises(ValueError, "architecture 'transcoder' is not one of topk, standard"):
        tu.load(saved)
