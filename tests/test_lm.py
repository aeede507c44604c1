"""Language model, tokens and activations, against TransformerLens and by hand."""

from __future__ import annotations

from itertools import islice

import pytest
import torch
from transformer_lens.model_bridge import TransformerBridge
from transformers import AutoModelForCausalLM

import tsae_utils as tu
from conftest import VOCAB, save_model, word_tokenizer


def test_activations_equal_transformer_lens(any_folder):
    """At every layer, in fp32.

    With LayerNorm it is the centred stream of compatibility mode, with RMSNorm the raw one.
    """
    lm = tu.load_lm(any_folder, device="cpu", bf16=False)
    bridge = TransformerBridge.boot_transformers(str(any_folder), device="cpu")
    ids = torch.randint(2, VOCAB, (3, 12), generator=torch.Generator().manual_seed(0))
    assert lm.centred == (any_folder.name != "llama")
    if lm.centred:
        bridge.enable_compatibility_mode()
    ours = lm.activations(ids, range(lm.n_layers + 1))
    for layer in range(lm.n_layers):
        name = f"blocks.{layer}.hook_resid_pre"
        with torch.no_grad():
            _, cache = bridge.run_with_cache(ids, names_filter=name, stop_at_layer=layer + 1)
        scale = cache[name].abs().max()
        assert (ours[layer] - cache[name]).abs().max() < 1e-4 * scale, name
    with torch.no_grad():
        _, cache = bridge.run_with_cache(ids, names_filter="blocks.2.hook_resid_post")
    assert (ours[3] - cache["blocks.2.hook_resid_post"]).abs().max() < 1e-4 * ours[3].abs().max()


def test_bf16_activations_are_close(any_folder):
    exact, fast = (tu.load_lm(any_folder, device="cpu", bf16=b) for b in (False, True))
    ids = torch.randint(2, VOCAB, (3, 12), generator=torch.Generator().manual_seed(0))
    a, b = exact.activations(ids, [2])[2], fast.activations(ids, [2])[2]
    assert b.dtype == torch.float32
    assert 0 < (a - b).norm() / a.norm() < 0.02


def test_the_faster_gelu_is_the_same_function(lm, gpt2_folder):
    plain = AutoModelForCausalLM.from_pretrained(gpt2_folder, dtype=torch.float32).eval()
    ids = torch.randint(lm.n_vocab, (2, 16), generator=torch.Generator().manual_seed(0))

    def gelus(model):
        return [module for module in model.modules() if "GELU" in type(module).__name__]

    assert {type(module).__name__ for module in gelus(plain)} == {"NewGELUActivation"}
    assert {type(module).__name__ for module in gelus(lm.model)} == {"GELU"}
    with torch.no_grad():
        assert torch.allclose(plain(ids).logits, lm.model(ids).logits, atol=1e-4)
    x = torch.linspace(-6, 6, 1001)
    slow, fast = gelus(plain)[0](x), gelus(lm.model)[0](x)
    exact = torch.nn.functional.gelu(x)
    assert torch.allclose(slow, fast, atol=1e-6)
    assert not torch.allclose(fast, exact, atol=1e-4), "the tanh form, not the exact one"


def test_the_pass_stops_at_the_hook(lm):
    calls = []
    handle = lm.blocks[2].register_forward_hook(lambda *_: calls.append(1))
    lm.activations(torch.randint(2, VOCAB, (1, 5)), [1, 2])
    assert not calls
    lm.activations(torch.randint(2, VOCAB, (1, 5)), [3])
    handle.remove()
    assert calls == [1]


def test_replacing_the_stream_by_itself_changes_nothing(any_folder):
    lm = tu.load_lm(any_folder, device="cpu", bf16=False)
    ids = torch.randint(2, VOCAB, (2, 10))
    clean = lm.losses(ids)
    for layer in range(lm.n_layers + 1):
        x = lm.activations(ids, [layer])[layer]
        assert torch.allclose(lm.losses(ids, layer, x), clean, atol=1e-3), layer
        assert not torch.allclose(lm.losses(ids, layer, 0 * x), clean, atol=1e-2), layer
    assert torch.equal(lm.losses(ids), clean), "the model is left as it was"


def test_positions_can_be_moved(any_folder):
    """Positions 0, 1, 2, ... change nothing. A jump moves tokens but hides none before it."""
    lm = tu.load_lm(any_folder, device="cpu", bf16=False)

    def activations(ids, positions=None):
        return lm.activations(ids, [2], positions_RL=positions)[2]

    ids, other_start = torch.tensor([[0, 5, 6, 7]]), torch.tensor([[3, 5, 6, 7]])
    plain = activations(ids)
    assert torch.allclose(plain, activations(ids, torch.arange(4)[None]), atol=1e-5)
    jump = torch.tensor([[0, 8, 9, 10]])
    moved, moved_other = activations(ids, jump), activations(other_start, jump)
    assert not torch.allclose(plain, moved, atol=1e-4)
    assert not torch.allclose(moved[:, 3], moved_other[:, 3], atol=1e-5), "BOS is still seen"


def test_blocks_before_the_hook_are_not_run_again(lm):
    ids, calls = torch.randint(2, VOCAB, (1, 10)), []
    x = lm.activations(ids, [2])[2]

    def record(block):
        return block.mlp.register_forward_hook(lambda *_: calls.append(block))

    handles = [record(block) for block in lm.blocks]
    lm.losses(ids, 2, x)
    for handle in handles:
        handle.remove()
    assert calls == list(lm.blocks[2:])


def test_patching_at_a_position_leaves_earlier_predictions(lm):
    ids = torch.randint(2, VOCAB, (1, 10))
    x = lm.activations(ids, [1])[1]
    x[0, 6] = 0
    changed = (lm.losses(ids, 1, x) - lm.losses(ids)).abs()[0] > 1e-5
    assert not changed[:6].any()
    assert changed[6]


def test_token_rows(lm):
    """Rows start with BOS, documents are joined by EOS, and a last part of a row is dropped."""
    rows = tu.token_rows(["w2 w3 w4", "w5", "w6 w7 w8 w9"], lm, 4)
    assert rows.tolist() == [[0, 2, 3, 4], [0, 1, 5, 1], [0, 6, 7, 8]]
    kept = [[False, True, True, True], [False, False, True, False], [False, True, True, True]]
    assert tu.keep_mask(rows, lm).tolist() == kept
    assert tu.keep_mask(rows, lm, include_bos=True).all()
    without_bos = tu.keep_mask(torch.tensor([[5, 6]]), lm)
    assert without_bos.tolist() == [[False, True]], "position 0 never counts, whatever stands there"


PADS_LEFT = {"eos_token": "</s>", "padding_side": "left", "pad_token": "</s>"}


@pytest.mark.parametrize(
    ("special", "bos", "separator"),
    [
        ({"bos_token": "<s>", **PADS_LEFT}, 0, 1),
        ({"eos_token": "</s>"}, 1, 1),
        ({}, 0, 0),
    ],
    ids=["pads left", "no BOS", "neither"],
)
def test_rows_do_not_depend_on_the_tokenizers_habits(tmp_path, special, bos, separator):
    model = tu.load_lm(save_model(tmp_path / "m"), device="cpu").model
    lm = tu.LanguageModel(model, word_tokenizer(**special), "m")
    rows = tu.token_rows(["w2 w3", "w4 w5 w6"], lm, 4)
    assert rows.tolist() == [[bos, 2, 3, separator], [bos, 4, 5, 6]]
    assert bool(lm.bos_note) == ("bos_token" not in special), "a substitute is named"


def test_last_tokens():
    ids = torch.tensor([[9, 2, 3, 4]])
    assert tu.last_tokens(ids, 1, 0).tolist() == [[[9], [2], [3], [4]]]
    assert tu.last_tokens(ids, 3, 0).tolist() == [[[0, 0, 9], [0, 9, 2], [9, 2, 3], [2, 3, 4]]]


def test_the_stream_keeps_activations_with_their_tokens(lm, rows):
    """At layer 0 an activation follows from token and position, so a wrong pairing shows."""
    hook = "blocks.0.hook_resid_pre"
    stream = tu.ActivationStream(lm, rows, hook, batch_size=64, buffer_tokens=512, order=2)
    E, P = lm.model.transformer.wte.weight, lm.model.transformer.wpe.weight
    states = E[:, None] + P[None, :16]
    states = states - states.mean(-1, keepdim=True)  # [V, L, D]
    for x, tokens in islice(stream, 20):
        distance = (states[tokens[:, -1]] - x[:, None]).abs().amax(-1).amin(-1)
        assert distance.max() < 1e-4
        assert (tokens[:, -1] > 1).all(), "neither BOS nor separators"


def test_the_stream_is_fixed_by_its_seed_and_covers_the_rows(lm, rows):
    def first_tokens(seed):
        stream = tu.ActivationStream(lm, rows, "blocks.1.hook_resid_pre", 32, 256, seed)
        return [tokens for _, tokens in islice(stream, 30)]

    def equal(batches, others):
        return all(torch.equal(a, b) for a, b in zip(batches, others, strict=True))

    assert equal(first_tokens(0), first_tokens(0))
    assert not equal(first_tokens(0), first_tokens(1))
    seen = torch.cat(first_tokens(0)).flatten().bincount(minlength=VOCAB)
    assert (seen[2:] > 0).all()


def test_the_buffer_follows_the_configured_context(lm, rows):
    """The authors' code sizes the buffer from the model's context."""
    hook = "blocks.1.hook_resid_pre"
    stream = tu.ActivationStream(lm, rows, hook, batch_size=32, buffer_tokens=256)
    assert stream.rows_per_buffer == 256 // 16
    assert len(stream.x[hook]) == 256


def test_unigram_activations(lm):
    table = tu.unigram_activations(lm, "blocks.2.hook_resid_pre", batch=7)
    assert table.shape == (VOCAB, 32)
    alone = lm.activations(torch.tensor([[0, 5]]), [2])[2][0, 1]
    assert torch.allclose(table[5], alone, atol=1e-5)


def test_several_hooks_from_one_pass(lm, rows):
    """The same batches as one stream for each; every SAE trains on those of its hook."""
    hooks = ["blocks.1.hook_resid_pre", "blocks.2.hook_mlp_out"]
    options = {"batch_size": 64, "buffer_tokens": 512, "seed": 3}
    several = tu.ActivationStream(lm, rows, hooks, **options)
    alone = [tu.ActivationStream(lm, rows, hook, **options) for hook in hooks]
    for (x, tokens), *singles in zip(several, *alone, strict=False):
        for hook, (expected, expected_tokens) in zip(hooks, singles, strict=True):
            assert torch.allclose(x[hook], expected, atol=1e-5)
            assert torch.equal(tokens, expected_tokens)
        if several.position[0] == 2:
            break
    passes, whole = [], lm.activations
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lm, "activations", lambda *a, **k: passes.append(1) or whole(*a, **k))
        shape = {"d_in": 32, "d_sae": 40, "k": 4}
        saes = {hook: tu.TSAE(tu.TSAEConfig(**shape, hook_name=hook)) for hook in hooks}
        tu.train(saes, several, tu.TrainConfig(tokens=640), progress=False)
    assert len(passes) == 640 // 512 + 1
    for hook, stream in zip(hooks, alone, strict=True):
        sae = tu.TSAE(tu.TSAEConfig(**shape, hook_name=hook))
        tu.train({"s": sae}, stream, tu.TrainConfig(tokens=640), progress=False)
        assert torch.allclose(sae.W_dec, saes[hook].W_dec, atol=1e-4)
        assert saes[hook].cfg.max_norm == pytest.approx(stream.max_norm)
    with pytest.raises(ValueError, match=r"is of hook '', the stream of blocks.1"):
        tu.train({"s": tu.TSAE(tu.TSAEConfig(**shape))}, several, tu.TrainConfig(tokens=640))
