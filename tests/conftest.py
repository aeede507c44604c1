"""Small random models, texts and SAEs for the tests.

Nothing here needs the network or the testbed's weights.
"""

from __future__ import annotations

import json
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

import tsae_utils as tu

ROOT = Path(__file__).resolve().parent.parent
torch.set_num_threads(2)

VOCAB = 64
HOOK = "blocks.2.hook_resid_pre"


def word_tokenizer(**special) -> PreTrainedTokenizerFast:
    """One token per word: w2, w3, ...; id 0 is <s>, id 1 is </s>."""
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
    with torch.no_grad():  # larger than the usual initialisation, so that differences show
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(5)
    model.save_pretrained(folder)
    tokenizer = word_tokenizer(**(special or {"bos_token": "<s>", "eos_token": "</s>"}))
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session", params=list(MODELS))
def any_folder(request, tmp_path_factory) -> Path:
    return save_model(tmp_path_factory.mktemp("model") / request.param, request.param)


@pytest.fixture(scope="session")
def gpt2_folder(tmp_path_factory) -> Path:
    return save_model(tmp_path_factory.mktemp("model") / "gpt2")


@pytest.fixture(scope="session")
def lm(gpt2_folder) -> tu.LanguageModel:
    return tu.load_lm(gpt2_folder, device="cpu", bf16=False)


@pytest.fixture(scope="session")
def texts() -> list[str]:
    """200 documents of 3 to 39 random words."""
    generator = torch.Generator().manual_seed(0)
    documents = []
    for n_words in torch.randint(3, 40, (200,), generator=generator).tolist():
        words = torch.randint(2, VOCAB, (n_words,), generator=generator)
        documents.append(" ".join(f"w{i}" for i in words.tolist()))
    return documents


@pytest.fixture(scope="session")
def rows(texts, lm) -> torch.Tensor:
    return tu.token_rows(texts, lm, 16)


def random_sae(d_in=6, d_sae=10, k=3, vocab=None, seed=0, **kwargs) -> tu.TSAE:
    """An SAE with random weights, in training mode; with `vocab` it has a table."""
    generator = torch.Generator().manual_seed(seed)
    table = None
    if vocab is not None:
        table = tu.TokenLookup(torch.randn(vocab, d_in, generator=generator))
    sae = tu.TSAE(tu.TSAEConfig(d_in=d_in, d_sae=d_sae, k=k, **kwargs), table)
    with torch.no_grad():
        for name, parameter in sae.named_parameters():
            if not name.startswith("lookup"):
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
        if hasattr(sae, "threshold"):
            sae.threshold.fill_(0.3)
    return sae


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


def res_jb(folder: Path, weights: dict[str, torch.Tensor], hook: str, **changes) -> Path:
    """A folder in the layout of jbloom/GPT2-Small-SAEs-Reformatted (SAELens before version 6)."""
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
    names = ("W_enc", "b_enc", "W_dec", "b_dec")
    tensors = {name: weights[name].detach().contiguous() for name in names}
    save_file(tensors, folder / "sae_weights.safetensors")
    save_file({"sparsity": torch.zeros(d_sae)}, folder / "sparsity.safetensors")
    return folder


def good_sae(d_in: int, rank: int | None = None) -> dict[str, torch.Tensor]:
    """Weights of a ReLU SAE that reconstructs 0.9 x.

    Its features are plus and minus the vectors of an orthogonal basis, or `rank` of them.
    """
    generator = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(d_in, d_in, generator=generator))[0]
    basis = basis[: rank or d_in]
    W_dec = torch.cat([basis, -basis])
    return {
        "W_enc": W_dec.T,
        "b_enc": torch.zeros(len(W_dec)),
        "W_dec": 0.9 * W_dec,
        "b_dec": torch.zeros(d_in),
    }
