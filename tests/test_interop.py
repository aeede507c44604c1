"""Foreign and damaged files, folders of the hub."""

from __future__ import annotations

import json
import random
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import tsae_utils as tu
from conftest import HOOK, good_sae, random_weights_sae, res_jb
from tsae.hub import model_card


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
