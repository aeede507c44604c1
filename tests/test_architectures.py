"""Language models of many architectures: what is put back as it is changes nothing."""

from __future__ import annotations

import features as ft
import pytest
import torch
from transformer_lens.model_bridge import TransformerBridge
from transformers import OPTConfig, OPTForCausalLM

import tsae_utils as tu
from conftest import MODELS, VOCAB, save_model, word_tokenizer
from tools.scan_architectures import (
    difference_from_hidden_states,
    hooks_of,
    tiny_model,
    tiny_tokenizer,
)
from tsae.blocks import removed_afterwards

# `make scan` tries all; these differ in what their blocks return, add, normalise or share.
ARCHITECTURES = {  # name: (centred, hook points of three blocks)
    "gpt2": (True, 13),
    "gpt_neo": (True, 13),  # blocks return tuples
    "gpt_neox": (True, 10),  # parallel
    "gpt_neox_japanese": (True, 13),
    "gptj": (True, 10),
    "bloom": (True, 13),  # sublayers add the stream themselves
    "mpt": (True, 13),
    "falcon": (True, 10),
    "opt": (True, 13),  # the MLP works on [R L, D]
    "openai-gpt": (False, 4),  # normalised after the sum
    "trocr": (False, 4),
    "ctrl": (True, 13),
    "biogpt": (True, 13),
    "bart": (False, 4),
    "phi": (True, 10),
    "cohere": (True, 10),
    "olmo": (True, 13),
    "olmo2": (False, 13),
    "llama": (False, 13),
    "diffllama": (False, 13),
    "gemma2": (False, 13),  # norms on both sides of a sublayer
    "gemma3": (False, 13),  # sizes in a nested configuration
    "gemma3_text": (False, 13),
    "qwen3": (False, 13),
    "mixtral": (False, 13),
    "gpt_oss": (False, 13),
    "deepseek_v3": (False, 13),
    "mllama": (False, 13),  # more embeddings than logits
    "mamba": (False, 4),
    "rwkv": (False, 10),
}


def language_model(model_type: str) -> tu.LanguageModel:
    return tu.LanguageModel(tiny_model(model_type), tiny_tokenizer(), model_type, bf16=False)


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_activations_put_back_change_no_loss(model_type):
    """At every hook point; zeros in their place do, and other passes are left as they are."""
    lm = language_model(model_type)
    hooks, _ = hooks_of(lm)
    assert (lm.centred, len(hooks)) == ARCHITECTURES[model_type]
    clean = lm.losses(lm.probe_ids)
    assert tu.check_replacement(lm, hooks) < 1e-5
    for hook in hooks:
        zeros = torch.zeros(*lm.probe_ids.shape, lm.d_model)
        assert not torch.allclose(lm.losses(lm.probe_ids, hook, zeros), clean, atol=1e-4), hook
    assert torch.equal(lm.losses(lm.probe_ids), clean)
    difference = difference_from_hidden_states(lm)
    assert difference is None or difference < 1e-5, "transformers returns the same states"


@pytest.mark.parametrize("model_type", ["gpt_neo", "falcon", "olmo2", "mamba"])
def test_replacement_is_what_the_model_computes_from_it(model_type):
    """Rows of other text's stream give that text's losses from the hook on."""
    lm = language_model(model_type)
    ids = lm.probe_ids[:1]
    other = ids.flip(1)
    x = lm.activations(other, [1])[1]
    targets = torch.nn.functional.pad(ids[:, 1:], (0, 1))
    expected = torch.nn.functional.cross_entropy(
        lm._logits(other).flatten(0, 1), targets.flatten(), reduction="none"
    )
    assert torch.allclose(lm.losses(ids, 1, x)[0], expected[:-1], atol=1e-5)


@pytest.mark.parametrize("model_type", ["gpt2", "gpt_neox", "llama", "gemma2", "gemma3", "cohere"])
def test_logit_directions_are_the_models(model_type):
    """A direction across the stream changes the logits as the whole model says.

    Gemma's norms multiply by one plus their weight.
    """
    lm = language_model(model_type)
    with torch.no_grad():
        for parameter in lm.model.parameters():
            if parameter.ndim == 1:
                parameter.copy_(torch.rand(parameter.shape) - 0.3)
    generator = torch.Generator().manual_seed(0)
    x, d = torch.randn(2, lm.d_model, generator=generator).double()
    centred = lm._to_stream(x.float()).double()
    d -= (d @ centred) / (centred @ centred) * centred  # the norm's scale does not change
    seen = []

    def read(module, args, output):
        seen.append(output[:, 0].double())

    ids = lm.probe_ids[:1, :1].expand(2, 2)
    moved = torch.stack([x + 0.01 * d, x - 0.01 * d])[:, None].expand(-1, 2, -1).float()
    with removed_afterwards([lm.model.get_output_embeddings().register_forward_hook(read)]):
        lm.losses(ids, lm.n_layers, lm._to_stream(moved))
    change = (seen[0][0] - seen[0][1]) / 0.02 * centred.square().mean().sqrt()
    expected = ft.logit_directions(lm).double() @ d
    assert torch.allclose(change, expected, atol=1e-3 * expected.abs().max().item())


def opt(**changes) -> OPTForCausalLM:
    shape = {"hidden_size": 32, "ffn_dim": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    shape |= {"vocab_size": VOCAB, "max_position_embeddings": 32, "word_embed_proj_dim": 32}
    torch.manual_seed(0)
    return OPTForCausalLM(OPTConfig(**{**shape, **changes}, pad_token_id=1))


def test_norms_after_the_sum_see_the_mean():
    """OPT with norms behind the sum is not centred, though its norms are LayerNorms."""
    tokenizer = word_tokenizer(bos_token="<s>")
    before, after = (
        tu.LanguageModel(opt(do_layer_norm_before=b), tokenizer, "opt", bf16=False)
        for b in (True, False)
    )
    assert before.centred
    assert not after.centred
    assert tu.check_replacement(after) < 1e-5


@pytest.mark.parametrize("largest", [300.0, 3000.0, 30_000.0])
@pytest.mark.parametrize("divisor", [1, 5, 50])
def test_large_activations_do_not_hide_that_the_mean_is_ignored(largest, divisor):
    """GPT-2 small has 3,000 in a stream that starts at 0.1."""
    torch.manual_seed(0)
    model = MODELS["gpt2"]()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(5 if parameter.ndim > 1 else 1)
        model.transformer.h[0].mlp.c_proj.bias[5] = largest
        model.transformer.wte.weight.div_(divisor)
        model.transformer.wpe.weight.div_(divisor)
    lm = tu.LanguageModel(model, word_tokenizer(bos_token="<s>"), "large", bf16=False)
    assert lm.centred
    assert tu.check_replacement(lm) < 1e-4


def test_the_width_is_that_of_the_stream():
    """OPT-350m's embeddings are narrower than its stream."""
    model = opt(word_embed_proj_dim=16)
    lm = tu.LanguageModel(model, word_tokenizer(bos_token="<s>"), "opt", bf16=False)
    assert lm.d_model == 32
    assert lm.activations(lm.probe_ids, [1])[1].shape[-1] == 32


@pytest.mark.parametrize(
    ("model_type", "reason"),
    [
        ("xlm", "not causal, as a later token changes earlier predictions"),
        ("cpmant", "do not hand on one residual stream"),
        ("hrm_text", "runs a block more than once"),
    ],
)
def test_what_cannot_be_measured_is_refused(model_type, reason):
    with pytest.raises(ValueError, match=rf"{model_type} \(\w+\) is not supported: .*{reason}"):
        language_model(model_type)


def test_a_wrong_replacement_is_noticed(lm, monkeypatch):
    monkeypatch.setattr(lm, "centred", True)
    rms = language_model("llama")
    rms.centred = True  # a mean that RMSNorm sees is lost
    with pytest.raises(ValueError, match="at 0 back changes next-token losses by up to"):
        tu.check_replacement(rms)
    ids = torch.randint(2, VOCAB, (4, 12))
    with pytest.raises(ValueError, match="hook_resid_pre' back changes next-token losses"):
        tu.Evaluator(rms, ids, "blocks.1.hook_resid_pre")


def test_hook_points_are_transformer_lenss(any_folder):
    """Attention's and MLP's results, and the stream between them, of the centred model."""
    lm = tu.load_lm(any_folder, device="cpu", bf16=False)
    bridge = TransformerBridge.boot_transformers(str(any_folder), device="cpu")
    ids = torch.randint(2, VOCAB, (3, 12), generator=torch.Generator().manual_seed(0))
    places = ["attn_out", "mlp_out"] + ["resid_mid"] * (any_folder.name != "neox")
    for layer in range(lm.n_layers):
        names = [f"blocks.{layer}.hook_{place}" for place in places]
        ours = lm.activations(ids, names)
        with torch.no_grad():
            _, cache = bridge.run_with_cache(ids, names_filter=names)
        for name in names:
            theirs = cache[name]
            theirs = theirs - theirs.mean(-1, keepdim=True) if lm.centred else theirs
            assert (ours[name] - theirs).abs().max() < 1e-4 * theirs.abs().max(), name


def test_parallel_blocks_have_no_middle():
    lm = language_model("gpt_neox")
    with pytest.raises(ValueError, match="run attention and MLP in parallel"):
        lm.activations(lm.probe_ids, ["blocks.1.hook_resid_mid"])
    whole = language_model("mamba")
    with pytest.raises(ValueError, match="does not add the results of an attention and of an MLP"):
        tu.ActivationStream(whole, whole.probe_ids, "blocks.1.hook_mlp_out", 4, 8)


@pytest.mark.parametrize("hook", ["blocks.1.hook_mlp_out", "blocks.2.hook_resid_mid"])
def test_training_and_measuring_at_other_hooks(lm, rows, hook):
    """An SAE of every direction and its opposite reconstructs all and changes no loss."""
    stream = tu.ActivationStream(lm, rows, hook, 64, 512)
    x, _ = next(iter(stream))
    expected = lm.activations(rows.long(), [hook])[hook].flatten(0, 1)
    assert torch.cdist(x, expected).amin(1).max() < 1e-2
    sae = tu.TSAE(tu.TSAEConfig(d_in=32, d_sae=64, k=64, hook_name=hook))
    with torch.no_grad():
        basis = torch.cat([torch.eye(32), -torch.eye(32)])
        sae.W_dec.copy_(basis)
        sae.W_enc_FD.copy_(basis)
    metrics = tu.Evaluator(lm, rows[:8], hook)(sae)
    assert metrics["nmse"] < 1e-9
    assert abs(metrics["ce_added"]) < 1e-5
    assert metrics["ce_recovered"] == pytest.approx(1, abs=1e-4)


# -- rows --


@pytest.fixture(scope="module", params=["gpt2", "llama", "bloom", "mamba"])
def padded(request) -> tu.LanguageModel:
    """A model whose padding token has an id of its own."""
    tokenizer = word_tokenizer(bos_token="<s>", eos_token="</s>", pad_token=f"w{VOCAB - 1}")
    return tu.LanguageModel(tiny_model(request.param), tokenizer, request.param, bf16=False)


@pytest.mark.parametrize("left", [0, 3, 5])
def test_padding_changes_nothing(padded, left):
    """Activations and losses of a padded row are those of the text alone."""
    text = torch.tensor([[0, 5, 9, 12, 7]])
    pad = torch.full((1, 8), VOCAB - 1)
    row = torch.cat([pad[:, :left], text, pad[:, : 5 - left]], 1)
    alone, there = padded.activations(text, [2])[2], padded.activations(row, [2])[2]
    close = {"rtol": 1e-5, "atol": 1e-5 * alone.abs().max().item()}
    assert torch.allclose(there[:, left : left + 5], alone, **close)
    expected = padded.losses(text)
    for losses in (padded.losses(row), padded.losses(row, 2, there)):
        assert torch.allclose(losses[:, left : left + 4], expected, atol=1e-5)
    keep = tu.keep_mask(row, padded)
    assert keep[0].nonzero().flatten().tolist() == list(range(left + 1, left + 5))


def test_padding_is_not_measured(padded):
    text = torch.randint(2, VOCAB - 1, (4, 9), generator=torch.Generator().manual_seed(0))
    pads = torch.full((4, 3), VOCAB - 1)
    sae = tu.TSAE(tu.TSAEConfig(d_in=32, d_sae=40, k=4))
    hook = "blocks.1.hook_resid_pre"
    alone = tu.Evaluator(padded, text, hook)(sae)
    for row in (torch.cat([pads, text], 1), torch.cat([text, pads], 1)):
        assert tu.Evaluator(padded, row, hook)(sae) == pytest.approx(alone, rel=1e-4)
        everything = tu.Evaluator(padded, row, hook, include_bos=True)
        assert len(everything.x_BD) == text.numel()
    stream = tu.ActivationStream(padded, torch.cat([pads, text], 1), hook, 16, 48)
    _, tokens = next(iter(stream))
    assert (tokens < VOCAB - 1).all()


@pytest.mark.parametrize(
    ("row", "pad", "bos", "separator", "real"),
    [
        ([9, 9, 0, 5, 9], 9, 0, 1, [0, 0, 1, 1, 0]),
        ([0, 0, 0, 5, 6], 0, 0, 1, [0, 0, 1, 1, 1]),  # padding is BOS: the last one of the run
        ([0, 5, 6, 1, 1], 1, 0, 1, [1, 1, 1, 1, 0]),  # padding is EOS: the first one of the run
        ([0, 0, 0, 0, 0], 0, 0, 0, [0, 0, 0, 0, 1]),
        ([9, 9, 9, 9, 9], 9, 0, 1, [0, 0, 0, 0, 0]),
        ([5, 9, 6, 9, 7], 9, 0, 1, [1, 1, 1, 1, 1]),
        ([9, 9, 5, 6, 7], None, 0, 1, [1, 1, 1, 1, 1]),
    ],
)
def test_real_tokens(row, pad, bos, separator, real):
    from tsae.language_model import real_tokens

    mask = real_tokens(torch.tensor([row]), pad, bos, separator)
    assert mask[0].int().tolist() == real


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (torch.zeros(1, 33, dtype=torch.long), "rows of 33 tokens are longer than .* 32 positions"),
        (torch.tensor([[0, 64]]), "token id 64 is none of .*, which are 0 to 63"),
        (torch.tensor([[0, -1]]), "token id -1 is none"),
        (torch.tensor([0, 1]), r"of shape \[R, L\], not torch.int64 of shape \[2\]"),
        (torch.zeros(1, 4), r"not torch.float32 of shape \[1, 4\]"),
    ],
)
def test_rows_that_the_model_cannot_read_are_refused(lm, ids, message):
    calls = []
    handle = lm.model.register_forward_pre_hook(lambda *_: calls.append(1))
    for read in (lm.losses, lambda ids: lm.activations(ids, [1])):
        with pytest.raises(ValueError, match=message):
            read(ids)
    handle.remove()
    assert not calls, "before the model runs"


def test_models_that_predict_nan_are_refused(tmp_path):
    lm = tu.load_lm(save_model(tmp_path / "m"), device="cpu")
    with torch.no_grad():
        lm.model.transformer.ln_f.weight[0] = float("nan")
    with pytest.raises(ValueError, match="predicts NaN or infinity: check its weights"):
        tu.LanguageModel(lm.model, lm.tokenizer, "m")
