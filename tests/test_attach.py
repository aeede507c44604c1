"""SAEs attached to TransformerLens models."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F
from transformer_lens.model_bridge import TransformerBridge

import tsae_utils as tu
from conftest import HOOK, VOCAB, random_weights_sae
from tsae.attach import ablate, attach, steer


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
