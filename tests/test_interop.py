"""Attaching to TransformerLens models, foreign files, the hub's folders."""

from __future__ import annotations

import json
import random
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional as F
from transformer_lens.model_bridge import TransformerBridge

import interop
import tsae_utils as tu
from conftest import VOCAB, good_sae, res_jb

HOOK = "blocks.2.hook_resid_pre"


def some_sae(
    activation: str = "topk", d_in: int = 32, d_sae: int = 40, vocab: int | None = VOCAB
) -> tu.TSAE:
    """Random weights, every tensor of them."""
    g = torch.Generator().manual_seed(0)
    cfg = tu.TSAEConfig(
        d_in=d_in,
        d_sae=d_sae,
        activation=activation,
        k=6,
        hook_name=HOOK,
        model_name="tiny",
        context_size=16,
    )
    sae = tu.TSAE(
        cfg, None if vocab is None else tu.TokenLookup(torch.randn(vocab, d_in, generator=g))
    )
    with torch.no_grad():
        for t in (*sae.parameters(), *sae.buffers()):
            if t.is_floating_point():
                t.add_(0.3 * torch.randn(t.shape, generator=g))
        if hasattr(sae, "threshold"):
            sae.threshold.abs_()
    return sae.eval()


@pytest.fixture(scope="module")
def bridge_and_lm(any_folder):
    lm = tu.load_lm(any_folder, device="cpu", bf16=False)
    return TransformerBridge.boot_transformers(str(any_folder), device="cpu"), lm


def losses(logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(
        logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="none"
    ).view(len(ids), -1)


def ids_with_specials() -> torch.Tensor:
    ids = torch.randint(2, VOCAB, (3, 12), generator=torch.Generator().manual_seed(1))
    ids[:, 0], ids[1, 5] = 0, 1
    return ids


@pytest.mark.parametrize("compatibility", [False, True])
def test_an_attached_tsae_is_the_evaluators(any_folder, compatibility):
    """The same cross-entropies as our own patching, by the right rows of the table; the mean of the stream is put back."""
    lm, ids, sae = tu.load_lm(any_folder, device="cpu", bf16=False), ids_with_specials(), some_sae()
    bridge = TransformerBridge.boot_transformers(str(any_folder), device="cpu")
    if compatibility:
        bridge.enable_compatibility_mode()
    keep, x = tu.keep_mask(ids, lm), lm.activations(ids, [2])[2]
    x_hat = x.clone()
    x_hat[keep] = sae(x[keep], ids[keep][:, None]).x_hat
    raw = []
    grab = [(HOOK, lambda stream, hook: raw.append(stream.clone()))]
    with torch.no_grad():
        clean = bridge.run_with_hooks(ids, fwd_hooks=grab)
        with interop.attach(bridge, sae) as seen:
            patched = bridge.run_with_hooks(ids, fwd_hooks=grab)
        after = bridge(ids)
    mean = raw[0].mean(-1, keepdim=True) if lm.centred else 0.0
    assert torch.allclose(raw[1], x_hat + mean, atol=1e-3 * raw[0].abs().max().item())
    assert torch.allclose(losses(patched, ids), lm.losses(ids, 2, x_hat), atol=1e-3)
    assert not torch.allclose(patched, clean, atol=0.1) and torch.equal(after, clean), (
        "and it is gone afterwards"
    )
    assert torch.equal(seen.tokens, ids) and seen.acts.shape == (3, 12, 40)
    assert (
        torch.allclose(seen.acts[keep], sae.encode(x[keep]), atol=1e-3)
        and not seen.acts[~keep].any()
    )


def test_steering_and_ablation_change_one_feature(bridge_and_lm):
    """With the error term the stream moves along the feature's decoder row and nowhere else."""
    (bridge, lm), ids, sae = bridge_and_lm, ids_with_specials(), some_sae()
    keep, x = tu.keep_mask(ids, lm), lm.activations(ids, [2])[2]
    acts = torch.zeros(3, 12, 40)
    acts[keep] = sae.encode(x[keep])
    feature = int(acts.sum((0, 1)).argmax())
    direction = sae.W_dec[feature].detach()
    with torch.no_grad():
        for edit, moved in (
            (None, 0.0),
            (interop.steer(feature, 5.0), 5.0 * keep),
            (interop.ablate(feature), -acts[..., feature]),
        ):
            with interop.attach(bridge, sae, edit, error_term=True) as seen:
                logits = bridge(ids)
            expected = x + torch.as_tensor(moved)[..., None] * direction
            assert torch.allclose(losses(logits, ids), lm.losses(ids, 2, expected), atol=1e-3)
        assert not seen.acts[..., feature].any()


def test_strings_and_generation_reach_the_table(bridge_and_lm):
    (bridge, _), sae = bridge_and_lm, some_sae()
    with torch.no_grad(), interop.attach(bridge, sae) as seen:
        bridge("w3 w4 w5")
        assert seen.tokens[0, -3:].tolist() == [3, 4, 5] and seen.acts[0, -1].any()
        cached = bridge.generate(
            "w3 w4 w5", max_new_tokens=4, verbose=False, do_sample=False, return_type="tokens"
        )
        assert seen.tokens.shape == (1, 1) and seen.tokens[0, -1] == cached[0, -2], (
            "the last token fed, alone"
        )
        ids = cached[:, :-4]
        for _ in range(4):  # without a cache, every row of the table again
            ids = torch.cat([ids, bridge(ids)[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(ids, cached)


def test_the_first_position_is_left_alone_without_a_bos_too(bridge_and_lm):
    """SAEs never see it in training."""
    (bridge, _), sae = bridge_and_lm, some_sae()
    with torch.no_grad(), interop.attach(bridge, sae) as seen:
        bridge(torch.tensor([[5, 6, 7]]))
    assert not seen.acts[0, 0].any() and seen.acts[0, 1].any()
    with pytest.raises(ValueError, match="without embedding tokens"), interop.attach(bridge, sae):
        bridge.hook_dict[HOOK](torch.zeros(1, 3, 32))


def test_features_that_are_not_there(bridge_and_lm):
    for edit in (interop.steer(40, 1.0), interop.ablate(3, 40), interop.ablate(-1)):
        with pytest.raises(ValueError, match="there is no feature"):
            edit(torch.zeros(2, 40))


def test_gradients_pass_and_an_error_detaches(bridge_and_lm):
    (bridge, _), sae, ids = bridge_and_lm, some_sae(), ids_with_specials()
    before = sum(len(h.fwd_hooks) for h in bridge.hook_dict.values())
    with interop.attach(bridge, sae):
        losses(bridge(ids), ids).mean().backward()
    assert sae.W_dec.grad.abs().sum() > 0 and sae.lookup.W.grad[ids[0, 3]].abs().sum() > 0
    with pytest.raises(ZeroDivisionError), interop.attach(bridge, sae, edit=lambda a: 1 / 0):
        bridge(ids)
    assert (
        sum(len(h.fwd_hooks) for h in bridge.hook_dict.values()) == before
        and not bridge.embed._forward_pre_hooks
    )


def test_what_does_not_belong_is_refused(bridge_and_lm):
    bridge = bridge_and_lm[0]
    narrow, foreign, elsewhere = some_sae(d_in=16), some_sae(vocab=9), "blocks.9.hook_resid_pre"
    for sae, hook, told in (
        (narrow, "", "d_in 16"),
        (foreign, "", "9 rows"),
        (some_sae(), elsewhere, "no hook"),
    ):
        with pytest.raises(ValueError, match=told), interop.attach(bridge, sae, hook_name=hook):
            pass


def test_res_jb_is_read_and_refused_where_it_does_not_fit(tmp_path, lm, rows):
    x, good = lm.activations(rows[:8].long(), [2])[2].flatten(0, 1), good_sae(32, 20)
    good["b_dec"] = x.mean(0)
    sae = interop.check_fit(
        interop.from_pretrained(res_jb(tmp_path / "good", good, HOOK)), lm, rows[:8]
    )
    assert (
        sae.cfg.activation == "relu"
        and sae.cfg.hook_name == HOOK
        and sae.cfg.context_size == 128
        and sae.cfg.model_name == "gpt2-small"
    )
    assert torch.allclose(sae.encode(x), ((x - good["b_dec"]) @ good["W_enc"]).relu(), atol=1e-5)
    bad = good | {"W_enc": torch.randn(32, 40), "W_dec": torch.randn(40, 32)}
    with pytest.raises(ValueError, match=r"FVU .* is above 0.5: the SAE was trained on another"):
        interop.check_fit(tu.load(res_jb(tmp_path / "bad", bad, HOOK)), lm, rows[:8])
    topk = tu.load(
        res_jb(
            tmp_path / "topk", good, HOOK, activation_fn_str="topk", activation_fn_kwargs={"k": 3}
        )
    )
    assert topk.cfg.activation == "topk" and topk.cfg.k == 3
    for key, value, told in (
        ("activation_fn_str", "tanh-relu", "expected relu or topk"),
        ("normalize_activations", True, "fold it into"),
    ):
        with pytest.raises(ValueError, match=told):
            tu.load(res_jb(tmp_path / f"{key}", good, HOOK, **{key: value}))


@pytest.mark.parametrize("activation", ["relu", "topk", "jumprelu", "gated"])
def test_b_dec_that_stays_on_the_input_is_folded(tmp_path, activation):
    """SAELens with apply_b_dec_to_input false encodes x itself."""
    sae, x = (
        some_sae(activation, vocab=None),
        torch.randn(20, 32, generator=torch.Generator().manual_seed(2)),
    )
    folder = tu.save(sae, tmp_path / "s")
    cfg = json.loads((folder / "cfg.json").read_text())
    (folder / "cfg.json").write_text(json.dumps({**cfg, "apply_b_dec_to_input": False}))
    assert torch.allclose(tu.load(folder).encode(x), sae.encode(x + sae.b_dec), atol=1e-5)


def test_decoder_norms_are_folded(tmp_path):
    sae, x = some_sae(vocab=None), torch.randn(20, 32, generator=torch.Generator().manual_seed(2))
    folder = tu.save(sae, tmp_path / "s")
    cfg = json.loads((folder / "cfg.json").read_text())
    (folder / "cfg.json").write_text(json.dumps({**cfg, "rescale_acts_by_decoder_norm": True}))
    norm = sae.W_dec.norm(dim=-1)
    values, index = (sae.pre_activations(x) * norm).topk(6)
    acts = torch.zeros(20, 40).scatter(1, index, values.relu())
    again = tu.load(folder)
    assert torch.allclose(again.encode(x), acts, atol=1e-5)
    assert torch.allclose(
        again.decode(again.encode(x), None), (acts / norm) @ sae.W_dec + sae.b_dec, atol=1e-4
    )


def test_the_hub_is_a_folder_and_its_absence_a_sentence(tmp_path, monkeypatch):
    sae = some_sae()
    uploads = {}

    class Api:
        def create_repo(self, repo_id, private, exist_ok):
            uploads["private"] = private

        def upload_folder(self, repo_id, folder_path, revision, commit_message):
            for f in Path(folder_path).iterdir():
                (tmp_path / f.name).write_bytes(f.read_bytes())
            return f"https://huggingface.co/{repo_id}"

    monkeypatch.setattr("huggingface_hub.HfApi", Api)
    assert (
        interop.push_to_hub(sae, "me/mine", metadata={"heldout": {"nmse": 0.05}}).endswith(
            "me/mine"
        )
        and uploads["private"]
    )
    card = (tmp_path / "README.md").read_text()
    assert "| held-out nmse | 0.05 |" in card and "64 tokens" in card and "license" not in card
    assert "license: mit" in interop.model_card(sae, license="mit")
    again = interop.from_pretrained(tmp_path)
    assert all(
        torch.equal(a, b)
        for a, b in zip(again.state_dict().values(), sae.state_dict().values(), strict=True)
    )
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(
        FileNotFoundError,
        match=r"nobody/nothing: no such folder, and the hub did not give cfg.json",
    ):
        interop.from_pretrained("nobody/nothing")


@pytest.mark.parametrize("k", [None, "6", 6.0])
def test_a_batchtopk_file_without_a_whole_k_is_refused(tmp_path, k):
    folder = tu.save(some_sae("batchtopk"), tmp_path / "s")
    cfg = json.loads((folder / "cfg.json").read_text())
    cfg["metadata"]["tokenized"]["config"]["k"] = k
    (folder / "cfg.json").write_text(json.dumps(cfg))
    with pytest.raises(ValueError, match="of a batchtopk SAE should be a whole number"):
        tu.load(folder)


@pytest.mark.parametrize("kind", ["topk", "batchtopk", "gated", "relu"])
def test_a_hundred_and_fifty_damaged_folders_give_one_sentence_each(tmp_path, kind):
    """Truncated, bits flipped, wrong types, shapes, NaN, paths in cfg, a huge header: refused, or the SAE is sound.

    relu: with a cfg.json from before SAELens 6.
    """
    folder, rng = tu.save(some_sae(kind), tmp_path / "s"), random.Random(0)
    if kind == "relu":
        (folder / "cfg.json").write_bytes(
            (res_jb(tmp_path / "old", good_sae(32, 20), HOOK) / "cfg.json").read_bytes()
        )
    whole = {f.name: f.read_bytes() for f in folder.iterdir()}
    weights, cfg = load_file(folder / "sae_weights.safetensors"), json.loads(whole["cfg.json"])
    strange = [
        None,
        True,
        -1,
        0,
        1.5,
        10**12,
        "x",
        "../../etc/passwd",
        [],
        {},
        [1] * 50,
        float("nan"),
    ]

    def damage(i: int) -> None:
        name = rng.choice(list(whole))
        data, at = bytearray(whole[name]), rng.randrange(len(whole[name]))
        match i % 6:
            case 0:
                (folder / name).write_bytes(data[:at])
            case 1:
                for _ in range(rng.randrange(1, 20)):
                    data[rng.randrange(min(len(data), 400))] ^= 1 << rng.randrange(8)
                (folder / name).write_bytes(data)
            case 2:
                key = rng.choice(
                    [
                        *cfg,
                        "activation_fn_str",
                        "activation_fn_kwargs",
                        "hook_point",
                        "finetuning_scaling_factor",
                    ]
                )
                (folder / "cfg.json").write_text(
                    json.dumps({**cfg, "activation_fn_str": "topk", key: rng.choice(strange)})
                )
            case 3:
                meta = json.loads(json.dumps(cfg.get("metadata", {})))
                holder = rng.choice(
                    [
                        meta,
                        meta.get("tokenized", meta),
                        meta.get("tokenized", {}).get("config", meta),
                    ]
                )
                holder[rng.choice([*holder, "k"])] = rng.choice(strange)
                (folder / "cfg.json").write_text(
                    json.dumps({**cfg, "metadata": rng.choice([rng.choice(strange), meta, meta])})
                )
            case 4:
                key = rng.choice(list(weights))
                t = weights[key]
                bad = [
                    t.long(),
                    t.bool(),
                    t[:-1].contiguous(),
                    t[None],
                    torch.full_like(t, float("nan")),
                    t.to(torch.complex64),
                ]
                save_file({**weights, key: rng.choice(bad)}, folder / "sae_weights.safetensors")
            case 5:
                size = rng.choice([2**63, 2**40, len(data) + 1, 0, 2])
                (folder / "sae_weights.safetensors").write_bytes(
                    struct.pack("<Q", size) + whole["sae_weights.safetensors"][8:]
                )

    refused = 0
    for i in range(150):
        for name, data in whole.items():
            (folder / name).write_bytes(data)
        damage(i)
        try:
            sae = tu.load(folder)
        except (ValueError, FileNotFoundError) as error:
            refused += 1
            assert len(str(error).splitlines()) == 1 or "safetensors" in str(error), error
        else:
            assert all(torch.isfinite(t).all() for t in sae.parameters())
    assert refused > 60
