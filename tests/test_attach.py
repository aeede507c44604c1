"""SAEs attached to TransformerLens models.

HookedTransformer is TransformerLens 3's: its cases run in .venv-peers and are skipped elsewhere.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F
from transformer_lens.model_bridge import TransformerBridge
from transformers import (
    AutoTokenizer,
    GPT2LMHeadModel,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

import tsae_utils as tu
from conftest import HOOK, VOCAB, random_weights_sae, save_model, word_tokenizer
from tools.scan_architectures import tiny_model
from tsae.attach import ablate, attach, steer

BOS, EOS, PAD = 0, 1, VOCAB - 1
CENTRED = {"gpt2": True, "neox": True, "hooked": True, "llama": False}


@pytest.fixture(scope="module")
def bridge_and_lm(any_folder):
    lm = tu.load_lm(any_folder, device="cpu", bf16=False)
    return TransformerBridge.boot_transformers(str(any_folder), device="cpu"), lm


def losses(logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Cross-entropy of every prediction [R, L - 1]."""
    targets = ids[:, 1:].flatten()
    flat = F.cross_entropy(logits[:, :-1].flatten(0, 1), targets, reduction="none")
    return flat.view(len(ids), -1)


def ids_with_specials() -> torch.Tensor:
    """Three rows that start with BOS; the second has a separator inside."""
    ids = torch.randint(2, VOCAB, (3, 12), generator=torch.Generator().manual_seed(1))
    ids[:, 0], ids[1, 5] = 0, 1
    return ids


@pytest.mark.parametrize("compatibility", [False, True])
def test_an_attached_tsae_patches_as_the_evaluator_does(any_folder, compatibility):
    """The cross-entropies are equal: each token gets its row, and the stream's mean is put back."""
    lm, ids = tu.load_lm(any_folder, device="cpu", bf16=False), ids_with_specials()
    sae = random_weights_sae()
    bridge = TransformerBridge.boot_transformers(str(any_folder), device="cpu")
    if compatibility:
        bridge.enable_compatibility_mode()
    keep, x = tu.keep_mask(ids, lm), lm.activations(ids, [2])[2]
    x_hat = x.clone()
    x_hat[keep] = sae(x[keep], ids[keep][:, None]).x_hat
    streams = []
    record = [(HOOK, lambda stream, hook: streams.append(stream.clone()))]
    with torch.no_grad():
        clean = bridge.run_with_hooks(ids, fwd_hooks=record)
        with attach(bridge, sae) as seen:
            patched = bridge.run_with_hooks(ids, fwd_hooks=record)
        after = bridge(ids)
    before, replaced = streams
    mean = before.mean(-1, keepdim=True) if lm.centred else 0.0
    assert torch.allclose(replaced, x_hat + mean, atol=1e-3 * before.abs().max().item())
    assert torch.allclose(losses(patched, ids), lm.losses(ids, 2, x_hat), atol=1e-3)
    assert not torch.allclose(patched, clean, atol=0.1)
    assert torch.equal(after, clean), "the SAE is detached afterwards"
    assert torch.equal(seen.tokens, ids)
    assert seen.acts.shape == (3, 12, 40)
    assert torch.allclose(seen.acts[keep], sae.encode(x[keep]), atol=1e-3)
    assert not seen.acts[~keep].any()


def test_steering_and_ablation_change_one_feature(bridge_and_lm):
    """With the error term, the stream moves along the feature's decoder row and nowhere else."""
    (bridge, lm), ids, sae = bridge_and_lm, ids_with_specials(), random_weights_sae()
    keep, x = tu.keep_mask(ids, lm), lm.activations(ids, [2])[2]
    acts = torch.zeros(3, 12, 40)
    acts[keep] = sae.encode(x[keep])
    feature = int(acts.sum((0, 1)).argmax())
    direction = sae.W_dec[feature].detach()
    edits = (
        (None, torch.zeros(())),
        (steer(feature, 5.0), 5.0 * keep),
        (ablate(feature), -acts[..., feature]),
    )
    with torch.no_grad():
        for edit, moved in edits:
            with attach(bridge, sae, edit, error_term=True) as seen:
                logits = bridge(ids)
            expected = x + moved[..., None] * direction
            assert torch.allclose(losses(logits, ids), lm.losses(ids, 2, expected), atol=1e-3)
        assert not seen.acts[..., feature].any()


def test_strings_and_generation_reach_the_table(bridge_and_lm):
    (bridge, _), sae = bridge_and_lm, random_weights_sae()
    options = {"verbose": False, "do_sample": False, "return_type": "tokens"}
    with torch.no_grad(), attach(bridge, sae) as seen:
        bridge("w3 w4 w5")
        assert seen.tokens[0, -3:].tolist() == [3, 4, 5]
        assert seen.acts[0, -1].any()
        cached = bridge.generate("w3 w4 w5", max_new_tokens=4, **options)
        assert seen.tokens.shape == (1, 1)
        assert seen.tokens[0, -1] == cached[0, -2], "the last token was fed alone"
        ids = cached[:, :-4]
        for _ in range(4):  # without a cache, all tokens are embedded again
            ids = torch.cat([ids, bridge(ids)[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(ids, cached)


def test_the_first_position_is_left_alone_without_a_bos_too(bridge_and_lm):
    """SAEs never see it in training."""
    (bridge, _), sae = bridge_and_lm, random_weights_sae()
    with torch.no_grad(), attach(bridge, sae) as seen:
        bridge(torch.tensor([[5, 6, 7]]))
    assert not seen.acts[0, 0].any()
    assert seen.acts[0, 1].any()


def test_a_pass_that_embeds_no_tokens_is_refused(bridge_and_lm):
    (bridge, _), sae = bridge_and_lm, random_weights_sae()
    with pytest.raises(ValueError, match="without embedding tokens"), attach(bridge, sae):
        bridge.hook_dict[HOOK](torch.zeros(1, 3, 32))


@pytest.mark.parametrize("edit", [steer(40, 1.0), ablate(3, 40), ablate(-1)])
def test_features_that_do_not_exist_are_refused(edit):
    with pytest.raises(ValueError, match="there is no feature"):
        edit(torch.zeros(2, 40))


def test_gradients_pass_and_an_error_detaches(bridge_and_lm):
    (bridge, _), sae, ids = bridge_and_lm, random_weights_sae(), ids_with_specials()

    def count_hooks():
        return sum(len(hook.fwd_hooks) for hook in bridge.hook_dict.values())

    before = count_hooks()
    with attach(bridge, sae):
        losses(bridge(ids), ids).mean().backward()
    assert sae.W_dec.grad.abs().sum() > 0
    assert sae.lookup.W.grad[ids[0, 3]].abs().sum() > 0
    with pytest.raises(ZeroDivisionError), attach(bridge, sae, edit=lambda acts: 1 / 0):
        bridge(ids)
    assert count_hooks() == before
    assert not bridge.embed._forward_pre_hooks


@pytest.mark.parametrize(
    ("changes", "hook", "message"),
    [
        ({"d_in": 16}, "", "d_in 16"),
        ({"vocab": 9}, "", "9 rows"),
        ({}, "blocks.9.hook_resid_pre", "no hook"),
    ],
)
def test_an_sae_of_another_model_is_refused(bridge_and_lm, changes, hook, message):
    sae = random_weights_sae(**changes)
    with pytest.raises(ValueError, match=message), attach(bridge_and_lm[0], sae, hook_name=hook):
        pass


# -- each token of each row, padded or in pieces --


def boot(folder: Path) -> TransformerBridge:
    return TransformerBridge.boot_transformers(str(folder), device="cpu")


def hooked_transformer(folder: Path):
    """A random model of the other class, with the tokenizer in a folder."""
    tl = pytest.importorskip("transformer_lens.HookedTransformer")
    shape = {"n_layers": 3, "d_model": 32, "n_ctx": 32, "d_head": 8, "n_heads": 4, "d_mlp": 64}
    kind = {"d_vocab": VOCAB, "act_fn": "gelu_new", "normalization_type": "LN", "seed": 0}
    cfg = tl.HookedTransformerConfig(**shape, **kind)
    model = tl.HookedTransformer(cfg, tokenizer=AutoTokenizer.from_pretrained(folder))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2)
    return model


@pytest.fixture(scope="module", params=list(CENTRED))
def kind(request) -> str:
    return request.param


@pytest.fixture(scope="module", params=["own padding", "EOS as padding"])
def model(request, kind, tmp_path_factory):
    special = {"bos_token": "<s>", "eos_token": "</s>"}
    if request.param == "own padding":
        special["pad_token"] = f"w{PAD}"
    folder = tmp_path_factory.mktemp("model") / kind
    save_model(folder, "gpt2" if kind == "hooked" else kind, **special)
    return hooked_transformer(folder) if kind == "hooked" else boot(folder)


@torch.no_grad()
def by_hand(model, is_centred: bool, ids, *pairs):
    """(Logits [L, V], activations [L, F] of each SAE) of one row without padding, by our own hooks.

    Pairs of SAE and hook point, in the order in which they change a stream.
    """
    keep = (ids[0] != BOS) & (ids[0] != EOS) & (torch.arange(ids.shape[1]) > 0)
    every = [torch.zeros(ids.shape[1], sae.cfg.d_sae) for sae, _ in pairs]

    def replacer(sae, acts):
        def replace(raw, hook):
            x = raw[0, keep].flatten(1)
            mean = x.mean(-1, keepdim=True) if is_centred else torch.zeros(1)
            acts[keep] = sae.encode(x - mean)
            x_hat = sae.decode(acts[keep], ids[0, keep, None]) + mean
            new = raw.clone()
            new[0, keep] = x_hat.view(raw[0, keep].shape)
            return new

        return replace

    hooks = [(hook, replacer(sae, acts)) for (sae, hook), acts in zip(pairs, every, strict=True)]
    return model.run_with_hooks(ids, fwd_hooks=hooks)[0], *every


def close(a: torch.Tensor, b: torch.Tensor) -> bool:
    return (a - b).abs().max().item() <= 1e-5 * max(1.0, b.abs().max().item())


PROMPTS = st.lists(
    st.lists(st.integers(2, PAD - 1), min_size=1, max_size=6), min_size=2, max_size=4
)
SIDES = st.sampled_from(["left", "right"])
FEW = settings(max_examples=8, deadline=None, derandomize=True)


def pad_rows(model, prompts, side: str):
    """(Ids [R, L], attention mask) of token lists, padded with the tokenizer's token."""
    longest = max(map(len, prompts))
    rows, masks = [], []
    for prompt in prompts:
        pads = [model.tokenizer.pad_token_id] * (longest - len(prompt))
        is_left = side == "left"
        rows.append(pads + prompt if is_left else prompt + pads)
        text, none = [1] * len(prompt), [0] * len(pads)
        masks.append(none + text if is_left else text + none)
    return torch.tensor(rows), torch.tensor(masks)


def require_rows_as_alone(model, kind, prompts, logits, acts, mask) -> None:
    """Check every row of a padded batch against the prompt alone, patched by hand."""
    for i, prompt in enumerate(prompts):
        ids, pair = torch.tensor([prompt]), (random_weights_sae(), HOOK)
        expected = by_hand(model, CENTRED[kind], ids, pair)
        is_text = mask[i].bool()
        assert close(logits[i, is_text], expected[0])
        assert close(acts[i, is_text], expected[1])
        assert not acts[i, ~is_text].any()


@FEW
@given(prompts=PROMPTS, side=SIDES, has_bos=st.booleans())
def test_padded_strings_are_patched_as_each_alone(model, kind, prompts, side, has_bos):
    strings = [" ".join(f"w{i}" for i in prompt) for prompt in prompts]
    with torch.no_grad(), attach(model, random_weights_sae()) as seen:
        logits = model(strings, padding_side=side, prepend_bos=has_bos)
    if has_bos:
        prompts = [[BOS, *prompt] for prompt in prompts]
    mask = pad_rows(model, prompts, side)[1]
    require_rows_as_alone(model, kind, prompts, logits, seen.acts, mask)


@FEW
@given(prompts=PROMPTS, with_mask=st.booleans(), side=SIDES)
def test_padded_ids_are_patched_as_each_alone(model, kind, prompts, with_mask, side):
    """Without a mask padding is told from the ids; on the right the model needs none."""
    ids, mask = pad_rows(model, prompts, side if with_mask else "right")
    with torch.no_grad(), attach(model, random_weights_sae()) as seen:
        logits = model(ids, attention_mask=mask) if with_mask else model(ids)
    assert torch.equal(seen.tokens, ids)
    require_rows_as_alone(model, kind, prompts, logits, seen.acts, mask)


def read_in_pieces(model, ids, mask, lengths):
    """Yield the logits of each piece of a prompt, read with a cache."""
    cache, start = None, 0
    if not isinstance(model, TransformerBridge):
        from transformer_lens.cache.key_value_cache import TransformerLensKeyValueCache

        cache = TransformerLensKeyValueCache.init_cache(model.cfg, "cpu", len(ids))
    for n in lengths:
        piece = slice(start, start + n)
        start += n
        if not isinstance(model, TransformerBridge):
            yield model(ids[:, piece], past_kv_cache=cache, attention_mask=mask[:, piece])
            continue
        options = {"use_cache": True, "return_type": "logits_and_cache", "past_key_values": cache}
        logits, cache = model(ids[:, piece], attention_mask=mask[:, :start], **options)
        yield logits


@FEW
@given(data=st.data(), prompts=PROMPTS, side=SIDES)
def test_a_prompt_in_pieces_is_patched_as_a_whole(model, kind, data, prompts, side):
    ids, mask = pad_rows(model, prompts, side)
    lengths, left = [], ids.shape[1]
    while left:
        lengths.append(data.draw(st.integers(1, left)))
        left -= lengths[-1]
    logits, acts = [], []
    with torch.no_grad(), attach(model, random_weights_sae()) as seen:
        for piece in read_in_pieces(model, ids, mask, lengths):
            logits.append(piece)
            acts.append(seen.acts)
    logits, acts = torch.cat(logits, 1), torch.cat(acts, 1)
    require_rows_as_alone(model, kind, prompts, logits, acts, mask)


def test_a_cache_without_a_mask_is_told_from_a_text_of_one_token(model, kind):
    if kind == "hooked":
        pytest.skip("its caches have a mask")
    with torch.no_grad(), attach(model, random_weights_sae()) as seen:
        _, cache = model(torch.tensor([[5]]), use_cache=True, return_type="logits_and_cache")
        assert not seen.acts.any(), "the first token of a text"
        model(torch.tensor([[6]]), past_key_values=cache)
        assert seen.acts.any(), "the second"
        model(torch.tensor([[6]]))
        assert not seen.acts.any()
        _, cache = model(torch.tensor([[5]]), use_cache=True, return_type="logits_and_cache")
        model(torch.tensor([[PAD, 7]]), past_key_values=cache)
        assert seen.acts[0].any(-1).all(), "inside a text the padding token is one like others"


@pytest.mark.parametrize("cached", [True, False])
def test_a_batch_generates_what_each_prompt_does(model, kind, cached):
    sae, prompts = random_weights_sae(), [[3, 4, 5, 9, 11], [5], [7, 8]]
    strings = [" ".join(f"w{i}" for i in prompt) for prompt in prompts]
    options = {"max_new_tokens": 4, "verbose": False, "do_sample": False, "return_type": "tokens"}
    options |= {"stop_at_eos": False, "use_past_kv_cache": cached, "prepend_bos": False}
    with torch.no_grad(), attach(model, sae) as seen:
        batch = model.generate(strings, **options)
        fed = 1 if cached else batch.shape[1] - 1
        assert torch.equal(seen.tokens, batch[:, -1 - fed : -1])
        alone = [model.generate(string, **options)[0] for string in strings]
    for prompt, row, one in zip(prompts, batch, alone, strict=True):
        ids = torch.tensor([prompt])
        for _ in range(4):
            logits = by_hand(model, CENTRED[kind], ids, (sae, HOOK))[0]
            ids = torch.cat([ids, logits[-1:].argmax(-1)[None]], 1)
        assert torch.equal(one[-ids.shape[1] :], ids[0])
        assert torch.equal(row[-ids.shape[1] :], ids[0])


def test_no_pass_leaves_tokens_for_the_next(model):
    ids, stream = torch.tensor([[0, 5, 6, 7]]), torch.randn(1, 4, 32)

    def stop_early():
        model(ids, stop_at_layer=1)
        model.run_with_hooks(ids, stop_at_layer=1)

    def fail():
        hooks = [("blocks.1.hook_resid_pre", lambda raw, hook: 1 / 0)]
        with pytest.raises(ZeroDivisionError):
            model.run_with_hooks(ids, fwd_hooks=hooks)

    def only_embed():
        model(ids, stop_at_layer=0)

    def finish():
        model(ids)

    def generate():
        model.generate(ids, max_new_tokens=2, verbose=False, stop_at_eos=False)

    with torch.no_grad(), attach(model, random_weights_sae()) as seen:
        for before in (stop_early, fail, only_embed, finish, generate):
            before()
            with pytest.raises(ValueError, match="without embedding tokens"):
                model.hook_dict[HOOK](stream)
            for layer in (0, 1, 2):
                for run in (model, model.run_with_hooks):
                    with pytest.raises(ValueError, match="without embedding tokens"):
                        run(stream, start_at_layer=layer)
            before()
            model(torch.tensor([[0, 8, 9]]))
            assert seen.tokens.tolist() == [[0, 8, 9]]


def test_embedded_inputs_are_refused(model, kind):
    if kind == "hooked":
        pytest.skip("it takes none")
    with pytest.raises(ValueError, match="call the model with text or ids"):  # noqa: SIM117
        with attach(model, random_weights_sae()):
            model(torch.randn(1, 4, 32))


@pytest.mark.parametrize("hook", [HOOK, "blocks.1.hook_resid_pre", "blocks.2.hook_attn_out"])
def test_two_saes_at_once(model, kind, hook):
    """Each sees the tokens, and what the other leaves; on one hook point the outer comes first."""
    first, second = random_weights_sae(), random_weights_sae("relu")
    ids, other = torch.tensor([[0, 5, 6, 7]]), torch.tensor([[0, 9, 8]])
    with torch.no_grad(), attach(model, first) as seen:
        with attach(model, second, hook_name=hook) as also_seen:
            logits = model(ids)[0]
        acts = (seen.acts[0], also_seen.acts[0])
        assert torch.equal(seen.tokens, ids) and torch.equal(also_seen.tokens, ids)
        alone = model(other)[0]
        assert torch.equal(seen.tokens, other) and torch.equal(also_seen.tokens, ids)
    expected = by_hand(model, CENTRED[kind], ids, (first, HOOK), (second, hook))
    assert close(logits, expected[0])
    assert close(acts[0], expected[1]) and close(acts[1], expected[2])
    assert close(alone, by_hand(model, CENTRED[kind], other, (first, HOOK))[0])


# -- hook points --


def ids_of_two_rows() -> torch.Tensor:
    return torch.tensor([[0, 5, 6, 7, 8], [0, 9, 1, 4, 30]])


@pytest.mark.parametrize(
    ("hook", "width"),
    [("blocks.1.attn.hook_z", 32), ("blocks.1.attn.hook_q", 32), ("blocks.1.mlp.hook_post", 64)],
)
def test_hook_points_inside_a_block(model, kind, hook, width):
    """Heads are flattened, widths are the hook point's own, and nothing is centred."""
    width = 128 if kind == "gpt2" and width == 64 else width
    sae, ids = random_weights_sae(d_in=width), ids_of_two_rows()
    with torch.no_grad(), attach(model, sae, hook_name=hook) as seen:
        logits = model(ids)
    for row in range(2):
        expected = by_hand(model, False, ids[row : row + 1], (sae, hook))
        assert close(logits[row], expected[0])
        assert close(seen.acts[row], expected[1])


@pytest.mark.parametrize(
    ("hook", "d_in", "message"),
    [
        (
            "blocks.1.attn.hook_z",
            8,
            "width at blocks.1.attn.hook_z is 32, .* d_in 8: it belongs",
        ),
        ("blocks.1.hook_mlp_out", 64, "the width at blocks.1.hook_mlp_out is 32, .* d_in 64"),
        ("blocks.1.attn.hook_pattern", 49, r"hook_pattern shows a tensor of shape .* for 2 rows"),
    ],
)
def test_hook_points_that_do_not_fit_are_refused(model, hook, d_in, message):
    sae = random_weights_sae(d_in=d_in)
    with pytest.raises(ValueError, match=message), attach(model, sae, hook_name=hook):
        pass


def test_a_hook_point_is_checked_in_every_pass(model):
    """Hooks of others can change what it shows."""
    narrow = [(HOOK, lambda raw, hook: raw[..., :16])]
    sae, ids = random_weights_sae(), ids_of_two_rows()
    with pytest.raises(ValueError, match="is 16, the SAE has d_in 32"), model.hooks(narrow):  # noqa: SIM117
        with attach(model, sae):
            model(ids)


def tiny_bridge(model_type: str, folder: Path, **special: str) -> TransformerBridge:
    """A random model of an architecture, norms and biases too, from a folder that then holds it."""
    model, generator = tiny_model(model_type), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    model.save_pretrained(folder)
    special = special or {"bos_token": "<s>", "eos_token": "</s>", "pad_token": f"w{PAD}"}
    word_tokenizer(**special).save_pretrained(folder)
    return boot(folder)


ARCHITECTURES = {  # hook points of a block, of five
    "gpt2": 5,
    "gpt_neox": 4,  # no middle
    "bloom": 5,
    "opt": 5,
    "olmo": 5,
    "openai-gpt": 1,  # see below
    "llama": 5,
    "gemma2": 5,
    "olmo2": 5,
    "mpt": 5,
    "cohere": 4,
    "mamba": 2,  # no sublayers
    "rwkv": 1,  # its first block normalises the stream
}


FOLDED = ["gpt2", "gpt_neox", "bloom", "llama"]  # weights, by enable_compatibility_mode


@pytest.mark.parametrize(
    ("model_type", "compatibility"),
    [(name, False) for name in ARCHITECTURES] + [(name, True) for name in FOLDED],
)
def test_an_sae_sees_and_does_what_our_language_model_says(tmp_path, model_type, compatibility):
    """On the stream and on what is added to it, centred or not, weights folded or not."""
    model, sae = tiny_bridge(model_type, tmp_path), random_weights_sae()
    if compatibility:
        model.enable_compatibility_mode()
    lm, ids = tu.load_lm(tmp_path, device="cpu", bf16=False), ids_of_two_rows()
    places = [
        hook
        for place in ("resid_pre", "attn_out", "resid_mid", "mlp_out", "resid_post")
        if (hook := f"blocks.1.hook_{place}") in model.hook_dict
    ]
    for hook in places[: ARCHITECTURES[model_type]]:
        x = lm.activations(ids, [hook])[hook]
        keep, x_hat = tu.keep_mask(ids, lm), x.clone()
        x_hat[keep] = sae(x[keep], ids[keep][:, None]).x_hat
        with torch.no_grad(), attach(model, sae, hook_name=hook) as seen:
            logits = model(ids)
        expected = lm.losses(ids, hook, x_hat)
        assert torch.allclose(losses(logits, ids), expected, atol=1e-4), hook
        assert not torch.allclose(expected, lm.losses(ids), atol=1e-2), hook
        assert torch.allclose(seen.acts[keep], sae.encode(x[keep]), rtol=1e-4, atol=1e-3), hook
    assert len(places) >= ARCHITECTURES[model_type]


def test_what_a_bridge_does_not_show_is_refused(tmp_path):
    """OpenAI GPT's blocks return lists, which it passes over, and normalise after the sum."""
    model, sae = tiny_bridge("openai-gpt", tmp_path), random_weights_sae()
    for place, message in (("post", "does not come by"), ("mid", "is not the stream that")):
        hook = f"blocks.1.hook_resid_{place}"
        with pytest.raises(ValueError, match=message), attach(model, sae, hook_name=hook):
            pass


def test_the_middle_of_a_block_is_the_stream(model, kind):
    """In a bridge too, whose hook point there shows the stream as it passes by."""
    hook = "blocks.1.hook_resid_mid"
    if hook not in model.hook_dict:
        pytest.skip("attention and MLP run in parallel")
    ids, sae = torch.tensor([[0, 5, 6, 7, 8]]), random_weights_sae()
    with attach(model, sae, hook_name=hook):
        logits = model(ids)
    parts = {}

    def keep_part(name):
        return lambda raw, hook: parts.__setitem__(name, raw)

    def replace(attn_out, hook):  # what attention must add for the stream to be the reconstruction
        x = parts["pre"] + attn_out
        mean = x.mean(-1, keepdim=True) if CENTRED[kind] else 0.0
        x_hat = sae(x - mean, ids).x_hat + mean
        return torch.cat([attn_out[:, :1], (x_hat - parts["pre"])[:, 1:]], 1)

    hooks = [("blocks.1.hook_resid_pre", keep_part("pre")), ("blocks.1.hook_attn_out", replace)]
    with torch.no_grad():
        assert close(logits.detach(), model.run_with_hooks(ids, fwd_hooks=hooks))
    logits.square().sum().backward()
    assert sae.W_dec.grad.abs().sum() > 0


def test_the_middle_comes_before_the_end_of_a_block(model):
    """Whichever SAE is attached first."""
    ids, first, second = ids_of_two_rows(), random_weights_sae(), random_weights_sae("relu")
    middle, end = "blocks.1.hook_resid_mid", "blocks.1.hook_resid_post"
    if middle not in model.hook_dict:
        pytest.skip("attention and MLP run in parallel")
    with torch.no_grad():
        with attach(model, first, hook_name=middle), attach(model, second, hook_name=end):
            one = model(ids)
        with attach(model, second, hook_name=end), attach(model, first, hook_name=middle):
            other = model(ids)
    assert close(one, other)


# -- centring, precision, special tokens --


def test_centring_is_found_once_and_without_dropout(any_folder, bridge_and_lm):
    lm, ids, sae = bridge_and_lm[1], ids_with_specials(), random_weights_sae()
    model, passes, acts = boot(any_folder), [], []
    model.original_model.register_forward_pre_hook(lambda *_: passes.append(1))
    for _ in range(2):
        model.train()
        with torch.no_grad(), attach(model, sae) as seen:
            found = len(passes)
            model.eval()(ids)
            passes.pop()
            acts.append(seen.acts)
    assert found == len(passes) == 3, "one for the width and two for the mean"
    keep, x = tu.keep_mask(ids, lm), lm.activations(ids, [2])[2]
    assert torch.allclose(acts[0][keep], sae.encode(x[keep]), atol=1e-3)
    assert torch.equal(*acts)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("largest", [0, 300, 3000])
def test_large_activations_do_not_hide_that_the_mean_is_ignored(tmp_path, largest, dtype):
    """As GPT-2 small has them: 3000 in a stream that starts at 0.1."""
    folder = save_model(tmp_path / "gpt2")
    model = GPT2LMHeadModel.from_pretrained(folder)
    with torch.no_grad():
        model.transformer.h[0].mlp.c_proj.bias[5] = largest
        model.transformer.wte.weight.div_(5)
        model.transformer.wpe.weight.div_(5)
    model.save_pretrained(folder)
    model = TransformerBridge.boot_transformers(str(folder), device="cpu", dtype=dtype)
    sae, ids, streams = random_weights_sae(), ids_of_two_rows(), []
    record = [(HOOK, lambda stream, hook: streams.append(stream.float()))]
    with torch.no_grad():
        model.run_with_hooks(ids, fwd_hooks=record)
        with attach(model, sae) as seen:
            model(ids)
        x = streams[0] - streams[0].mean(-1, keepdim=True)
        assert torch.allclose(seen.acts[:, 1], sae.encode(x[:, 1]), rtol=1e-4)


def test_a_mean_that_only_the_last_norm_sees(tmp_path):
    """Blocks that add nothing carry the mean to the end; RMSNorm sees it there."""
    folder = save_model(tmp_path / "llama", "llama")
    model, sae, ids = LlamaForCausalLM.from_pretrained(folder), random_weights_sae(), [[0, 5, 6]]
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
    model.save_pretrained(folder)
    bridge = boot(folder)
    with torch.no_grad(), attach(bridge, sae) as seen:
        bridge(torch.tensor(ids))
        raw = model.model.embed_tokens(torch.tensor(ids))
        assert close(seen.acts[0, 1:], sae.encode(raw)[0, 1:])


def test_finding_out_leaves_no_trace(any_folder):
    """Hooks of others do not see the passes; modes and random numbers stay."""
    model, ids, shown = boot(any_folder), torch.tensor([[0, 5, 6]]), []
    model.train()
    model.blocks[1].eval()
    parts = [*model.modules(), *model.original_model.modules()]
    modes = [part.training for part in parts]
    with attach(model, random_weights_sae(), hook_name="blocks.1.hook_resid_pre") as outer:
        model(ids)
        with model.hooks([(HOOK, lambda raw, hook: shown.append(raw))]):
            state = torch.get_rng_state()
            with attach(model, random_weights_sae()):
                assert torch.equal(torch.get_rng_state(), state)
                assert torch.equal(outer.tokens, ids)
                assert not shown
            model(ids)
            assert len(shown) == 1
    assert [part.training for part in parts] == modes
    assert not any(point._forward_hooks for point in model.hook_dict.values())
    assert not model.original_model._forward_hooks


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_reconstructions_are_computed_in_fp32(any_folder, bridge_and_lm, dtype):
    """For models of half precision, and under autocast."""
    lm, ids, sae = bridge_and_lm[1], ids_with_specials(), random_weights_sae()
    model = TransformerBridge.boot_transformers(str(any_folder), device="cpu", dtype=dtype)
    streams, keep = [], tu.keep_mask(ids, lm)
    record = [(HOOK, lambda stream, hook: streams.append(stream.clone()))]
    autocast = torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.float32)
    with torch.no_grad(), autocast:
        model.run_with_hooks(ids, fwd_hooks=record)
        with attach(model, sae) as seen:
            model.run_with_hooks(ids, fwd_hooks=record)
    before, after = streams
    assert after.dtype == before.dtype
    with torch.no_grad():
        x = before[keep].float()
        mean = x.mean(-1, keepdim=True) if lm.centred else 0.0
        expected = sae(x - mean, ids[keep][:, None]).x_hat + mean
        assert torch.allclose(after[keep], expected.to(after.dtype), rtol=0, atol=1e-5)
        assert torch.allclose(seen.acts[keep], sae.encode(x - mean), rtol=0, atol=1e-5)


class Elsewhere(torch.nn.Module):
    """A coder on a device of its own; what reaches it there, it answers from the CPU."""

    cfg, lookup = random_weights_sae().cfg, None

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1, device="meta"))

    def encode(self, x_BD):
        assert x_BD.device.type == "meta"
        return torch.ones(len(x_BD), self.cfg.d_sae)

    def decode(self, acts_BF, tokens_BN):
        assert tokens_BN.device.type == "meta"
        return torch.zeros(len(acts_BF), self.cfg.d_in)


def test_an_sae_on_another_device_gets_its_inputs_there(bridge_and_lm):
    with torch.no_grad(), attach(bridge_and_lm[0], Elsewhere()) as seen:
        bridge_and_lm[0](torch.tensor([[0, 5, 6]]))
    assert seen.acts.device.type == "cpu"
    assert seen.acts[0, 1:].all()


def test_a_model_without_a_tokenizer(any_folder):
    """Token 0 stands in for BOS, and nothing is padding."""
    model, sae = boot(any_folder), random_weights_sae()
    model.tokenizer = None
    with torch.no_grad(), attach(model, sae) as seen:
        model(torch.tensor([[5, 6, 0, 1]]))
    assert seen.acts[0].any(-1).tolist() == [False, True, False, True]


def test_a_name_that_only_means_an_unknown_word_is_no_special_token(tmp_path):
    """TransformerLens calls EOS <|endoftext|> where there is none; here w2 is the unknown word."""
    model = tiny_bridge("gpt2", tmp_path, bos_token="<s>", unk_token="w2")
    assert model.tokenizer.eos_token_id == 2
    with torch.no_grad(), attach(model, random_weights_sae()) as seen:
        model(torch.tensor([[0, 2, 6, 2]]))
    assert seen.acts[0].any(-1).tolist() == [False, True, True, True]


def test_models_with_an_encoder_are_refused(tmp_path):
    shape = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4}
    config = T5Config(vocab_size=VOCAB, decoder_start_token_id=0, **shape)
    T5ForConditionalGeneration(config).save_pretrained(tmp_path)
    word_tokenizer(eos_token="</s>", pad_token="<s>").save_pretrained(tmp_path)
    hook = "decoder_blocks.1.hook_resid_pre"
    with (
        pytest.raises(ValueError, match="can only be attached to a causal language model"),
        attach(boot(tmp_path), random_weights_sae(), hook_name=hook),
    ):
        pass
