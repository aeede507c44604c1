"""Tries LanguageModel on a tiny random model of every causal architecture of transformers.

    .venv/bin/python tools/scan_architectures.py [model types]     # make scan

Each model is supported, refused with a sentence, or could not be built tiny. For supported ones the
largest change of a loss is given when activations are put back as they are, and the largest
difference from the hidden states that transformers itself returns. Writes
benchmarks/results/architectures.csv when all are tried.
"""

from __future__ import annotations

import argparse
import csv
import warnings
from inspect import signature
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    PretrainedConfig,
    PreTrainedTokenizerFast,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

import tsae_utils as tu

RESULTS = Path(__file__).resolve().parent.parent / "benchmarks" / "results" / "architectures.csv"
VOCAB, LAYERS, MOST_PARAMETERS = 64, 3, 20_000_000
SIZES = {
    "vocab_size": VOCAB,
    "vocab_size_per_layer_input": VOCAB,
    "hidden_size": 32,
    "d_model": 32,
    "n_embd": 32,
    "dim": 32,
    "embedding_size": 32,
    "word_embed_proj_dim": 32,
    "n_layer": LAYERS,
    "n_layers": LAYERS,
    "num_layers": LAYERS,
    "num_hidden_layers": LAYERS,
    "num_decoder_layers": LAYERS,
    "decoder_layers": LAYERS,
    "encoder_layers": 2,
    "num_attention_heads": 4,
    "n_head": 4,
    "n_heads": 4,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "intermediate_size": 64,
    "ffn_dim": 64,
    "n_inner": 64,
    "d_ff": 64,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "max_position_embeddings": 64,
    "n_positions": 64,
    "n_ctx": 64,
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": VOCAB - 1,
    "is_decoder": True,
}
LATENT = {"num_key_value_heads": 4}  # multi-head latent attention has no grouped queries
PADS_FIRST = {"pad_token_id": 2}  # positions are counted from the padding's id
CHANGES: dict[str, dict] = {  # what some architectures need beside SIZES
    "axk1": LATENT,
    "axk2": LATENT,
    "deepseek_v2": LATENT,
    "deepseek_v3": LATENT,
    "deepseek_v32": LATENT,
    "glm4_moe_lite": LATENT,
    "glm_moe_dsa": LATENT,
    "hy_v4": LATENT,
    "minicpm3": LATENT,
    "youtu": LATENT,
    "roberta": PADS_FIRST,
    "camembert": PADS_FIRST,
    "data2vec-text": PADS_FIRST,
    "roberta-prelayernorm": PADS_FIRST,
    "xlm-roberta": PADS_FIRST,
    "xlm-roberta-xl": PADS_FIRST,
    "xmod": {**PADS_FIRST, "default_language": "en_XX"},
    "dots1": {"n_shared_experts": 1},
    "lfm2_moe": {"rope_theta": 10_000.0},
    "mamba2": {"num_heads": 8},
    "bamba": {"mamba_n_heads": 8, "mamba_d_head": 8},
    "gemma3n_text": {"num_kv_shared_layers": 1, "num_hidden_layers": 5},
    "gptj": {"rotary_dim": 8},
    "codegen": {"rotary_dim": 8},
}


def shrink(config: PretrainedConfig, sizes: dict) -> None:
    """Set every size that the configuration or one inside it has."""
    for key, value in sizes.items():
        attribute = getattr(type(config), key, None)
        is_fixed = isinstance(attribute, property) and attribute.fset is None
        is_size = isinstance(vars(config).get(key, value), int | list | None)
        if hasattr(config, key) and is_size and not is_fixed:
            setattr(config, key, value)
    for value in list(vars(config).values()):
        if isinstance(value, PretrainedConfig):
            shrink(value, sizes)
    if isinstance(vars(config).get("layer_types"), list) and "layer_types" not in sizes:
        config.layer_types = config.layer_types[: config.num_hidden_layers]


def run(model: nn.Module, ids_RL: torch.Tensor, **options: bool) -> Any:
    """What the model returns for token ids, without a cache."""
    if "use_cache" in signature(model.forward).parameters:
        options["use_cache"] = False
    with torch.no_grad():
        return model(input_ids=ids_RL, **options)


def tiny_model(model_type: str) -> nn.Module:
    """A random model of an architecture; weights are large, so that differences show."""
    config = CONFIG_MAPPING[model_type]()
    shrink(config, {**SIZES, **CHANGES.get(model_type, {})})
    with torch.device("meta"):
        size = sum(p.numel() for p in AutoModelForCausalLM.from_config(config).parameters())
    if size > MOST_PARAMETERS:
        raise ValueError(f"{size / 1e6:.0f}M parameters: some sizes have names of their own")
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).float().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(5)
    run(model, torch.arange(2, 14).view(2, 6))
    return model


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """One token per word; BOS is 0 and EOS 1, as in the models."""
    vocab = {"<s>": 0, "</s>": 1, **{f"w{i}": i for i in range(2, VOCAB)}}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="w2"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


def hooks_of(lm: tu.LanguageModel) -> tuple[list[int | str], str]:
    """(Every hook point that the model has, what its blocks are made of)."""
    hooks: list[int | str] = list(range(lm.n_layers + 1))
    kinds = set()
    for layer in range(lm.n_layers):
        names = [f"blocks.{layer}.hook_{place}" for place in ("attn_out", "mlp_out", "resid_mid")]
        found = []
        for name in names:
            try:
                lm.require_hook(name)
            except ValueError:  # the model says that it does not have this one
                continue
            found.append(name)
        hooks += found
        kinds.add({0: "whole", 2: "parallel", 3: "sequential"}[len(found)])
    return hooks, " and ".join(sorted(kinds))


@torch.no_grad()
def difference_from_hidden_states(lm: tu.LanguageModel) -> float | None:
    """Largest difference from the states that transformers returns, relative to the largest state.

    Some models return the states that enter the blocks, others those that leave them; the last one
    may be normalised and is left out. None where as many states are not returned.
    """
    states = getattr(run(lm.model, lm.probe_ids, output_hidden_states=True), "hidden_states", None)
    if states is None or len(states) != lm.n_layers + 1:
        return None
    ours = lm.activations(lm.probe_ids, range(lm.n_layers + 1), bf16=False)

    def difference(first: int) -> float:
        differences = []
        for layer, state in enumerate(states[: lm.n_layers - first], first):
            state = state - state.mean(-1, keepdim=True) if lm.centred else state
            differences.append(((ours[layer] - state).abs().max() / state.abs().max()).item())
        return max(differences)

    return min(difference(first) for first in (0, 1))


def try_architecture(model_type: str) -> dict:
    """One row of the table."""
    row = {"architecture": model_type, "outcome": "not built"}
    try:
        model = tiny_model(model_type)
    except Exception as error:  # a scan goes on; the reason stands in the table
        return {**row, "reason": f"{type(error).__name__}: {error}"}
    row |= {"class": type(model).__name__, "outcome": "refused"}
    try:
        lm = tu.LanguageModel(model, tiny_tokenizer(), model_type, bf16=False)
        hooks, kind = hooks_of(lm)
        change = tu.check_replacement(lm, hooks)
    except ValueError as error:
        return {**row, "reason": str(error)}
    states = difference_from_hidden_states(lm)
    numbers = {
        "largest_loss_change": f"{change:.1e}",
        "hidden_states_difference": "" if states is None else f"{states:.1e}",
    }
    form = {"centred": lm.centred, "blocks": kind, "hook_points": len(hooks)}
    return {**row, "outcome": "supported", **form, **numbers}


COLUMNS = (
    "architecture",
    "class",
    "outcome",
    "centred",
    "blocks",
    "hook_points",
    "largest_loss_change",
    "hidden_states_difference",
    "reason",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("architectures", nargs="*", help="model types; default: all")
    chosen = parser.parse_args().architectures
    transformers.logging.set_verbosity_error()
    warnings.filterwarnings("ignore")
    rows = []
    for model_type in chosen or MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        row = try_architecture(model_type)
        row["reason"] = " ".join(row.get("reason", "").split())[:200]
        rows.append(row)
        print(" ".join(str(row.get(column, "")) for column in COLUMNS), flush=True)
    outcomes = [row["outcome"] for row in rows]
    print({outcome: outcomes.count(outcome) for outcome in sorted(set(outcomes))})
    if not chosen:
        with open(RESULTS, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)


if __name__ == "__main__":
    main()
