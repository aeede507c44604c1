"""Bad input gets one clear sentence: what is wrong, what was expected, how to mend it."""

from __future__ import annotations

import json
import shutil

import pandas as pd
import pytest
import torch
from lab import Lab
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedTokenizerFast

import tsae_utils as tu
from conftest import MODELS, random_sae, save_model, word_tokenizer

HOOK = "blocks.1.hook_resid_pre"


def raises(kind, message):
    return pytest.raises(kind, match=message)


def stream(lm, rows, batch_size: int = 16, buffer_tokens: int = 64) -> tu.ActivationStream:
    return tu.ActivationStream(lm, rows, HOOK, batch_size, buffer_tokens)


@pytest.mark.parametrize(
    ("settings", "message"),
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
def test_config(settings, message):
    with raises(ValueError, message):
        tu.TSAEConfig(**{"d_in": 6, "d_sae": 10, "k": 3, **settings})


def test_unknown_profile():
    message = "unknown profile 'huge': TSAE_PROFILE must be one of record, mini, smoke"
    with raises(ValueError, message):
        Lab("x", "huge")


def test_missing_model_folder(tmp_path):
    message = "no model at .*nowhere: expected a Hugging Face folder with config.json"
    with raises(FileNotFoundError, message):
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
    # This token is not in the vocabulary, so it gets the id after the last row.
    tokenizer = word_tokenizer(bos_token="<|endoftext|>")
    message = "BOS id 64 lies beyond the model's embedding of 64 rows: mend tokenizer_config.json"
    with raises(ValueError, message):
        tu.LanguageModel(MODELS["gpt2"](), tokenizer, "m")


def test_tokenizer_of_another_model(lm):
    foreign = Tokenizer(WordLevel({"<s>": 0, "w": 100}, unk_token="<s>"))
    foreign.pre_tokenizer = WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=foreign, bos_token="<s>")
    other = tu.LanguageModel(lm.model, tokenizer, "m")
    with raises(ValueError, "token id 100 lies beyond the embedding of 64 rows"):
        tu.token_rows(["w " * 30], other, 8)


@pytest.mark.parametrize(
    ("hook", "message"),
    [
        (
            "blocks.1.hook_mlp_in",
            "unknown hook 'blocks.1.hook_mlp_in': expected blocks.<layer> with one of "
            ".hook_resid_pre",
        ),
        ("transformer.h.3", "unknown hook"),
        ("blocks.3.hook_resid_pre", "is out of range: the model has 3 layers, 0 to 2"),
    ],
)
def test_hooks(lm, rows, hook, message):
    with raises(ValueError, message):
        tu.ActivationStream(lm, rows, hook, 16, 64)


def test_hook_names():
    names = ("blocks.0.hook_resid_pre", "blocks.2.hook_resid_pre", "blocks.2.hook_resid_post")
    assert [tu.parse_hook(name, 3) for name in names] == [0, 2, 3]


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
    message = "cannot read .*a.csv: expected a .txt, .jsonl or .parquet file, by its name"
    with raises(ValueError, message):
        list(tu.read_documents(tmp_path / "a.csv"))
    (tmp_path / "b.jsonl").write_text('{"body": "hello", "id": 1}\n')
    message = (
        r"b.jsonl, line 1 has no text under 'text' and no 'input_ids'; "
        r"its columns are \['body', 'id'\]"
    )
    with raises(ValueError, message):
        list(tu.read_documents(tmp_path / "b.jsonl"))
    (tmp_path / "only").mkdir()
    with raises(ValueError, "no text in .*only: expected .txt, .jsonl or .parquet files"):
        list(tu.read_documents(tmp_path / "only"))
    with raises(FileNotFoundError, "no corpus at .*gone.jsonl"):
        list(tu.read_documents(tmp_path / "gone.jsonl"))
    (tmp_path / "c.parquet").write_bytes(b"not parquet")
    with raises(ValueError, "c.parquet is damaged or cut short .*expected a whole parquet file"):
        list(tu.read_documents(tmp_path / "c.parquet"))
    (tmp_path / "d.jsonl").write_text("this is not json\n")
    with raises(ValueError, "d.jsonl, line 1 is not JSON .*expected one object per line"):
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
    message = "activations at blocks.1.hook_resid_pre contain NaN or infinity"
    with raises(ValueError, message):
        next(iter(stream(lm, rows, buffer_tokens=256)))
    with raises(ValueError, message):
        tu.Evaluator(lm, rows, HOOK)
    with raises(ValueError, message):
        tu.unigram_activations(lm, HOOK)


def test_nan_loss_names_the_sae(lm, rows):
    good, bad = random_sae(d_in=32), random_sae(d_in=32)
    with torch.no_grad():
        bad.W_dec[0] = float("inf")
    saes, batches = {"good": good, "bad": bad}, stream(lm, rows, buffer_tokens=256)
    with raises(FloatingPointError, "the loss of 'bad' is"):
        tu.train(saes, batches, tu.TrainConfig(tokens=160), progress=False)


@pytest.mark.parametrize("weight", ["W_enc_FD", "b_enc"])
def test_training_stops_at_a_weight_that_is_nan(lm, rows, weight):
    """Sorted by its bits, a NaN may lie below all other values, so that no loss shows it."""
    sae = random_sae(d_in=32, d_sae=64)
    with torch.no_grad():
        getattr(sae, weight)[0] = -float("nan")
    batches = stream(lm, rows, buffer_tokens=256)
    with raises(FloatingPointError, "'only' is"):
        tu.train({"only": sae}, batches, tu.TrainConfig(tokens=160), progress=False)


def test_batch_larger_than_buffer(lm, rows):
    with raises(ValueError, "batch_size = 512 must not exceed buffer_tokens = 64"):
        stream(lm, rows, batch_size=512)
    with raises(ValueError, "does not fill one batch of 60: raise buffer_tokens"):
        next(iter(stream(lm, rows, batch_size=60)))


def test_unequal_token_budgets(lm, rows):
    cfgs = {"a": tu.TrainConfig(tokens=100), "b": tu.TrainConfig(tokens=200)}
    saes = {name: random_sae(d_in=32) for name in cfgs}
    with raises(ValueError, "SAEs trained together see the same tokens"):
        tu.train(saes, stream(lm, rows), cfgs)


def test_table_of_another_vocabulary(lm, rows):
    message = "token 9 has no row in a lookup table of 7 rows: the table belongs to another"
    with raises(ValueError, f"{message} vocabulary"):
        random_sae(vocab=7)(torch.randn(1, 6), torch.tensor([[9]]))
    evaluator, foreign = tu.Evaluator(lm, rows[:4], HOOK), random_sae(d_in=32, vocab=99)
    message = "the lookup table has 99 rows, the model 64 tokens: it belongs to another vocabulary"
    with raises(ValueError, message):
        evaluator(foreign)
    with raises(ValueError, "the lookup table has 99 rows"):
        tu.train({"a": foreign}, stream(lm, rows), tu.TrainConfig(tokens=16))
    with raises(ValueError, "the lookup table's rows have 5 entries, the SAE's d_in is 6"):
        tu.TSAE(tu.TSAEConfig(d_in=6, d_sae=4, k=1), tu.TokenLookup(torch.zeros(7, 5)))


# -- saved SAEs --


@pytest.fixture
def saved(tmp_path):
    sae = random_sae(vocab=7, hook_name=HOOK, context_size=16)
    return tu.save(sae, tmp_path / "sae", {"note": "kept"})


@pytest.mark.parametrize("activation", tu.ACTIVATIONS)
@pytest.mark.parametrize("vocab", [None, 7])
def test_round_trip(tmp_path, activation, vocab):
    sae = random_sae(
        vocab=vocab,
        activation=activation,
        hook_name=HOOK,
        model_name="m",
        context_size=16,
        l1_coefficient=2,  # an int, as people write it
        decoder_init_norm=0.1,
    )
    again = tu.load(tu.save(sae, tmp_path / "s"))
    x, tokens = torch.randn(9, 6), torch.randint(7, (9, 1))
    assert torch.equal(again(x, tokens).x_hat, sae.eval()(x, tokens).x_hat)
    assert again.cfg.hook_name == HOOK
    assert again.cfg.l1_coefficient == 2
    assert again.cfg.model_name == "m"
    assert again.cfg.decoder_init_norm == 0.1
    assert again.cfg.activation == activation
    assert not again.training


def test_the_layout_is_that_of_saelens(saved):
    """The weight file has four tensors, the table a file of its own; ours is under metadata."""
    files = sorted(file.name for file in saved.iterdir())
    assert files == ["cfg.json", "sae_weights.safetensors", "token_lookup.safetensors"]
    weights = load_file(saved / "sae_weights.safetensors")
    shapes = {name: list(tensor.shape) for name, tensor in weights.items()}
    assert shapes == {"W_enc": [6, 10], "b_enc": [10], "W_dec": [10, 6], "b_dec": [6]}
    cfg = json.loads((saved / "cfg.json").read_text())
    sizes = {"d_in", "d_sae", "k"}
    folds = {"apply_b_dec_to_input", "normalize_activations", "reshape_activations"}
    folds |= {"rescale_acts_by_decoder_norm"}
    assert set(cfg) == sizes | folds | {"architecture", "dtype", "device", "metadata"}
    assert cfg["metadata"]["tokenized"]["note"] == "kept"
    assert cfg["metadata"]["sae_lens_version"].startswith("6.")


def test_half_precision(tmp_path):
    sae = random_sae(vocab=7)
    again = tu.load(tu.save(sae, tmp_path / "s", dtype=torch.float16))
    assert again.W_dec.dtype == torch.float32
    assert torch.allclose(again.W_dec, sae.W_dec, atol=1e-2)


def test_saving_replaces_an_sae_and_nothing_else(saved):
    tu.save(random_sae(), saved)
    assert not (saved / "token_lookup.safetensors").exists()
    assert not list(saved.parent.glob(".*"))
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
    weight_file = saved / "sae_weights.safetensors"
    whole = weight_file.read_bytes()
    weight_file.write_bytes(whole[: len(whole) // 2])
    with raises(ValueError, "sae_weights.safetensors is damaged or not a safetensors file"):
        tu.load(saved)
    weight_file.unlink()
    with raises(FileNotFoundError, "sae_weights.safetensors is missing"):
        tu.load(saved)
    (saved / "cfg.json").write_text("{")
    with raises(ValueError, "cfg.json is not JSON"):
        tu.load(saved)
    with raises(FileNotFoundError, "cfg.json is missing"):
        tu.load(saved.parent / "nowhere")


def test_wrong_contents(saved):
    weight_file, table_file = saved / "sae_weights.safetensors", saved / "token_lookup.safetensors"
    weights = load_file(weight_file)
    save_file({**weights, "W_enc": torch.zeros(3, 3)}, weight_file)
    with raises(ValueError, r"W_enc should be \[6, 10\], found \[3, 3\]"):
        tu.load(saved)
    save_file({name: weights[name] for name in weights if name != "b_dec"}, weight_file)
    with raises(ValueError, r"b_dec should be \[6\], found nothing"):
        tu.load(saved)
    save_file(weights, weight_file)
    save_file({"W": torch.zeros(7, 6)}, table_file)
    with raises(ValueError, r"W_lookup should be \[None, 6\], found nothing"):
        tu.load(saved)
    table_file.unlink()
    with raises(FileNotFoundError, "token_lookup.safetensors is missing"):
        tu.load(saved)
    cfg = json.loads((saved / "cfg.json").read_text())
    (saved / "cfg.json").write_text(json.dumps({**cfg, "architecture": "transcoder"}))
    with raises(ValueError, "architecture 'transcoder' is not one of topk, standard"):
        tu.load(saved)
