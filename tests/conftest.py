"""Small models and corpora made on the spot: nothing here needs the network or the testbed's weights."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "notebooks")]
torch.set_num_threads(2)

VOCAB = 64


def word_tokenizer(**special) -> PreTrainedTokenizerFast:
    """One token a word: w1, w2, ...; id 0 is <s>, id 1 is </s>."""
    vocab = {"<s>": 0, "</s>": 1, **{f"w{i}": i for i in range(2, VOCAB)}}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="w2"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


SMALL = {"vocab_size": VOCAB, "bos_token_id": 0, "eos_token_id": 1}
MODELS = {
    "gpt2": lambda: GPT2LMHeadModel(
        GPT2Config(n_embd=32, n_layer=3, n_head=2, n_positions=32, **SMALL)
    ),
    "llama": lambda: LlamaForCausalLM(
        LlamaConfig(
            hidden_size=32,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=2,
            intermediate_size=64,
            max_position_embeddings=32,
            **SMALL,
        )
    ),
    "neox": lambda: GPTNeoXForCausalLM(
        GPTNeoXConfig(
            hidden_size=32,
            num_hidden_layers=3,
            num_attention_heads=4,
            intermediate_size=64,
            max_position_embeddings=32,
            **SMALL,
        )
    ),
}


def save_model(folder: Path, kind: str = "gpt2", **special) -> Path:
    """A random model of this architecture as a Hugging Face folder."""
    torch.manual_seed(0)
    model = MODELS[kind]()
    with torch.no_grad():  # larger than the usual initialisation: differences must be visible
        for p in model.parameters():
            if p.ndim > 1:
                p.mul_(5)
    model.save_pretrained(folder)
    word_tokenizer(**(special or {"bos_token": "<s>", "eos_token": "</s>"})).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session", params=list(MODELS))
def any_folder(request, tmp_path_factory) -> Path:
    return save_model(tmp_path_factory.mktemp("model") / request.param, request.param)


@pytest.fixture(scope="session")
def gpt2_folder(tmp_path_factory) -> Path:
    return save_model(tmp_path_factory.mktemp("model") / "gpt2")


@pytest.fixture(scope="session")
def lm(gpt2_folder):
    import tsae_utils as tu

    return tu.load_lm(gpt2_folder, device="cpu", bf16=False)


@pytest.fixture(scope="session")
def texts() -> list[str]:
    generator = torch.Generator().manual_seed(0)
    return [
        " ".join(f"w{i}" for i in torch.randint(2, VOCAB, (n,), generator=generator).tolist())
        for n in torch.randint(3, 40, (200,), generator=generator).tolist()
    ]


@pytest.fixture(scope="session")
def rows(texts, lm):
    import tsae_utils as tu

    return tu.token_rows(texts, lm, 16)


def res_jb(folder: Path, weights: dict[str, torch.Tensor], hook: str, **changes) -> Path:
    """A folder in the layout of one of jbloom/GPT2-Small-SAEs-Reformatted: W_enc, b_enc, W_dec, b_dec, SAELens before version 6."""
    folder.mkdir(parents=True)
    d_in, d_sae = weights["W_enc"].shape
    cfg = {
        "model_name": "gpt2-small",
        "hook_point": hook,
        "hook_point_layer": int(hook.split(".")[1]),
        "hook_point_head_index": None,
        "dataset_path": "Skylion007/openwebtext",
        "is_dataset_tokenized": False,
        "context_size": 128,
        "use_cached_activations": False,
        "d_in": d_in,
        "d_sae": d_sae,
        "l1_coefficient": 8e-5,
        "lr": 4e-4,
        "from_pretrained_path": None,
        "dtype": "torch.float32",
        "device": "cuda",
        **changes,
    }
    (folder / "cfg.json").write_text(json.dumps(cfg))
    save_file(
        {n: weights[n].detach().contiguous() for n in ("W_enc", "b_enc", "W_dec", "b_dec")},
        folder / "sae_weights.safetensors",
    )
    save_file({"sparsity": torch.zeros(d_sae)}, folder / "sparsity.safetensors")
    return folder


def good_sae(d_in: int, rank: int | None = None) -> dict[str, torch.Tensor]:
    """Weights of a ReLU SAE that reconstructs 0.9 x: plus and minus of an orthogonal basis (of `rank` directions)."""
    basis = torch.linalg.qr(torch.randn(d_in, d_in, generator=torch.Generator().manual_seed(0)))[0][
        : rank or d_in
    ]
    W_dec = torch.cat([basis, -basis])
    return {
        "W_enc": W_dec.T,
        "b_enc": torch.zeros(len(W_dec)),
        "W_dec": 0.9 * W_dec,
        "b_dec": torch.zeros(d_in),
    }
