"""SAEs attached to TransformerLens models, foreign and damaged files, folders of the hub."""

from __future__ import annotations

import json
import random
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional as F
from transformer_lens.model_bridge import TransformerBridge

import tsae_utils as tu
from conftest import VOCAB, good_sae, res_jb
from tsae.attach import ablate, attach, steer
from tsae.hub import model_card

HOOK = "blocks.2.hook_resid_pre"


def random_weights_sae(
    activation: str = "topk", d_in: int = 32, d_sae: int = 40, vocab: int | None = VOCAB
) -> tu.TSAE:
    """An SAE in evaluation mode whose tensors are all random, and none zero."""
    generator = torch.Generator().manual_seed(0)
    shape = {"d_in": d_in, "d_sae": d_sae, "k": 6}
    origin = {"hook_name": HOOK, "model_name": "tiny", "context_size": 16}
    table = None
    if vocab is not None:
        table = tu.TokenLookup(torch.randn(vocab, d_in, generator=generator))
    sae = tu.TSAE(tu.TSAEConfig(activation=activation, **shape, **origin), table)
    with torch.no_grad():
        for tensor in (*sae.parameters(), *sae.buffers()):
            if tensor.is_floating_point():
                tensor.add_(0.3 * torch.randn(tensor.shape, generator=generator))
        if hasattr(sae, "threshold"):
            sae.threshold.abs_()
    return sae.eval()


# -- attaching --


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


# -- files and the hub --


def rewrite_cfg(folder: Path, **changes: Any) -> None:
    """Change keys of a saved SAE's cfg.json."""
    cfg = json.loads((folder / "cfg.json").read_text())
    (folder / "cfg.json").write_text(json.dumps({**cfg, **changes}))


def random_activations() -> torch.Tensor:
    return torch.randn(20, 32, generator=torch.Generator().manual_seed(2))


def test_res_jb_is_read_and_refused_where_it_does_not_fit(tmp_path, lm, rows):
    x, good = lm.activations(rows[:8].long(), [2])[2].flatten(0, 1), good_sae(32, 20)
    good["b_dec"] = x.mean(0)
    sae = tu.from_pretrained(res_jb(tmp_path / "good", good, HOOK))
    sae = tu.check_fit(sae, lm, rows[:8])
    assert sae.cfg.activation == "relu"
    assert sae.cfg.hook_name == HOOK
    assert sae.cfg.context_size == 128
    assert sae.cfg.model_name == "gpt2-small"
    assert torch.allclose(sae.encode(x), ((x - good["b_dec"]) @ good["W_enc"]).relu(), atol=1e-5)
    bad = good | {"W_enc": torch.randn(32, 40), "W_dec": torch.randn(40, 32)}
    misfit = tu.load(res_jb(tmp_path / "bad", bad, HOOK))
    with pytest.raises(ValueError, match=r"FVU .* is above 0.5: the SAE was trained on another"):
        tu.check_fit(misfit, lm, rows[:8])


def test_old_files_with_topk_are_read(tmp_path):
    topk = {"activation_fn_str": "topk", "activation_fn_kwargs": {"k": 3}}
    sae = tu.load(res_jb(tmp_path / "topk", good_sae(32, 20), HOOK, **topk))
    assert sae.cfg.activation == "topk"
    assert sae.cfg.k == 3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"activation_fn_str": "tanh-relu"}, "expected relu or topk"),
        ({"normalize_activations": True}, "fold it into"),
    ],
)
def test_old_files_that_cannot_be_folded_are_refused(tmp_path, changes, message):
    folder = res_jb(tmp_path / "sae", good_sae(32, 20), HOOK, **changes)
    with pytest.raises(ValueError, match=message):
        tu.load(folder)


@pytest.mark.parametrize("activation", ["relu", "topk", "jumprelu", "gated"])
def test_b_dec_left_on_the_input_is_folded(tmp_path, activation):
    """With apply_b_dec_to_input false, SAELens encodes x itself."""
    sae, x = random_weights_sae(activation, vocab=None), random_activations()
    folder = tu.save(sae, tmp_path / "s")
    rewrite_cfg(folder, apply_b_dec_to_input=False)
    assert torch.allclose(tu.load(folder).encode(x), sae.encode(x + sae.b_dec), atol=1e-5)


def test_decoder_norms_are_folded(tmp_path):
    sae, x = random_weights_sae(vocab=None), random_activations()
    folder = tu.save(sae, tmp_path / "s")
    rewrite_cfg(folder, rescale_acts_by_decoder_norm=True)
    norm = sae.W_dec.norm(dim=-1)
    values, index = (sae.pre_activations(x) * norm).topk(6)
    acts = torch.zeros(20, 40).scatter(1, index, values.relu())
    again = tu.load(folder)
    assert torch.allclose(again.encode(x), acts, atol=1e-5)
    x_hat = (acts / norm) @ sae.W_dec + sae.b_dec
    assert torch.allclose(again.decode(again.encode(x), None), x_hat, atol=1e-4)


def test_what_is_pushed_to_the_hub_loads_again(tmp_path, monkeypatch):
    sae, uploads = random_weights_sae(), {}

    class Api:
        def create_repo(self, repo_id, private, exist_ok):
            uploads["private"] = private

        def upload_folder(self, repo_id, folder_path, revision, commit_message):
            for file in Path(folder_path).iterdir():
                (tmp_path / file.name).write_bytes(file.read_bytes())
            return f"https://huggingface.co/{repo_id}"

    monkeypatch.setattr("huggingface_hub.HfApi", Api)
    address = tu.push_to_hub(sae, "me/mine", metadata={"heldout": {"nmse": 0.05}})
    assert address.endswith("me/mine")
    assert uploads["private"]
    card = (tmp_path / "README.md").read_text()
    assert "| held-out nmse | 0.05 |" in card
    assert "64 tokens" in card
    assert "license" not in card
    assert "license: mit" in model_card(sae, license="mit")
    expected, loaded = sae.state_dict(), tu.from_pretrained(tmp_path).state_dict()
    assert all(torch.equal(a, b) for a, b in zip(loaded.values(), expected.values(), strict=True))


def test_an_sae_that_is_nowhere_gets_one_sentence(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    message = "nobody/nothing: no such folder, and the hub did not give cfg.json"
    with pytest.raises(FileNotFoundError, match=message):
        tu.from_pretrained("nobody/nothing")


@pytest.mark.parametrize("k", [None, "6", 6.0])
def test_a_batchtopk_file_without_a_whole_k_is_refused(tmp_path, k):
    folder = tu.save(random_weights_sae("batchtopk"), tmp_path / "s")
    cfg = json.loads((folder / "cfg.json").read_text())
    cfg["metadata"]["tokenized"]["config"]["k"] = k
    (folder / "cfg.json").write_text(json.dumps(cfg))
    with pytest.raises(ValueError, match="of a batchtopk SAE should be a whole number"):
        tu.load(folder)


# -- damaged folders --

NAN = float("nan")
STRANGE = [None, True, -1, 0, 1.5, 10**12, "x", "../../etc/passwd", [], {}, [1] * 50, NAN]
OLD_KEYS = (
    "activation_fn_str",
    "activation_fn_kwargs",
    "hook_point",
    "finetuning_scaling_factor",
)


class Damage:
    """Damages the files of a saved SAE in one of six ways, at random."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.rng = folder, random.Random(0)
        self.files = {file.name: file.read_bytes() for file in folder.iterdir()}
        self.weights = load_file(folder / "sae_weights.safetensors")
        self.cfg = json.loads(self.files["cfg.json"])
        self.ways = (
            self.truncate,
            self.flip_bits,
            self.change_a_key,
            self.change_the_metadata,
            self.change_a_tensor,
            self.change_the_header,
        )

    def apply(self, i: int) -> None:
        """Restore all files, then damage one of them in the i-th way."""
        for name, data in self.files.items():
            (self.folder / name).write_bytes(data)
        name = self.rng.choice(list(self.files))
        position = self.rng.randrange(len(self.files[name]))
        self.ways[i % len(self.ways)](name, position)

    def truncate(self, name: str, position: int) -> None:
        (self.folder / name).write_bytes(self.files[name][:position])

    def flip_bits(self, name: str, position: int) -> None:
        data, rng = bytearray(self.files[name]), self.rng
        for _ in range(rng.randrange(1, 20)):
            data[rng.randrange(min(len(data), 400))] ^= 1 << rng.randrange(8)
        (self.folder / name).write_bytes(data)

    def change_a_key(self, name: str, position: int) -> None:
        key = self.rng.choice([*self.cfg, *OLD_KEYS])
        damaged = {**self.cfg, "activation_fn_str": "topk", key: self.rng.choice(STRANGE)}
        (self.folder / "cfg.json").write_text(json.dumps(damaged))

    def change_the_metadata(self, name: str, position: int) -> None:
        rng = self.rng
        metadata = json.loads(json.dumps(self.cfg.get("metadata", {})))
        tokenized = metadata.get("tokenized", {})
        holders = [metadata, tokenized or metadata, tokenized.get("config", metadata)]
        holder = rng.choice(holders)
        holder[rng.choice([*holder, "k"])] = rng.choice(STRANGE)
        damaged = {**self.cfg, "metadata": rng.choice([rng.choice(STRANGE), metadata, metadata])}
        (self.folder / "cfg.json").write_text(json.dumps(damaged))

    def change_a_tensor(self, name: str, position: int) -> None:
        key = self.rng.choice(list(self.weights))
        tensor = self.weights[key]
        damaged = [
            tensor.long(),
            tensor.bool(),
            tensor[:-1].contiguous(),
            tensor[None],
            torch.full_like(tensor, NAN),
            tensor.to(torch.complex64),
        ]
        weights = {**self.weights, key: self.rng.choice(damaged)}
        save_file(weights, self.folder / "sae_weights.safetensors")

    def change_the_header(self, name: str, position: int) -> None:
        size = self.rng.choice([2**63, 2**40, len(self.files[name]) + 1, 0, 2])
        rest = self.files["sae_weights.safetensors"][8:]
        (self.folder / "sae_weights.safetensors").write_bytes(struct.pack("<Q", size) + rest)


@pytest.mark.parametrize("kind", ["topk", "batchtopk", "gated", "relu"])
def test_damaged_folders_get_one_sentence(tmp_path, kind):
    """150 folders are truncated or have flipped bits, wrong types, shapes, values or headers.

    Each is refused, or the SAE is sound. `relu` has a cfg.json from before SAELens 6.
    """
    folder = tu.save(random_weights_sae(kind), tmp_path / "s")
    if kind == "relu":
        old = res_jb(tmp_path / "old", good_sae(32, 20), HOOK)
        (folder / "cfg.json").write_bytes((old / "cfg.json").read_bytes())
    damage, refused = Damage(folder), 0
    for i in range(150):
        damage.apply(i)
        try:
            sae = tu.load(folder)
        except (ValueError, FileNotFoundError) as error:
            refused += 1
            assert len(str(error).splitlines()) == 1 or "safetensors" in str(error), error
        else:
            assert all(torch.isfinite(parameter).all() for parameter in sae.parameters())
    assert refused > 60
