"""How fast activations are harvested, and what the bare matrix products alone would take.

    .venv/bin/python benchmarks/harvest.py      # writes benchmarks/results/harvest.csv

Three models: the testbed, GPT-2's shape with random weights, and SmolLM2-135M where it is at hand.
The bound is the time of the blocks' products in bf16, with weights laid out once, and nothing else:
no attention, norm, activation function or copy. Attention is timed alone, too.
"""

from __future__ import annotations

import csv
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F
from transformers import GPT2Config, GPT2LMHeadModel
from transformers.pytorch_utils import Conv1D

import tsae_utils as tu
from testbed import corpus, smollm2
from tsae.kernels import make_encoder

ROOT = Path(__file__).resolve().parent
ROWS, CONTEXT = 32, 256


def seconds(run: Callable[[], object], repeats: int = 3) -> float:
    """The shortest of some runs, after one that warms up."""
    run()
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        run()
        times.append(time.perf_counter() - started)
    return min(times)


def product_seconds(lm: tu.LanguageModel, layer: int) -> float:
    """Time of the linear maps of the blocks below a layer, on as many tokens."""
    total, timed = 0.0, {}
    for block in lm.blocks[:layer]:
        for module in block.modules():
            if not isinstance(module, nn.Linear | Conv1D):
                continue
            W = module.weight.T if isinstance(module, Conv1D) else module.weight
            shape = tuple(W.shape)
            if shape not in timed:
                W, b = W.to(torch.bfloat16).contiguous(), torch.zeros(shape[0]).bfloat16()
                encode, x = make_encoder(W, b), torch.randn(ROWS * CONTEXT, shape[1]).bfloat16()
                timed[shape] = seconds(lambda encode=encode, x=x: encode(x))
            total += timed[shape]
    return total


def attention_seconds(lm: tu.LanguageModel, layer: int) -> float:
    """Time of torch's causal attention in bf16 in as many blocks."""
    heads = lm.config.num_attention_heads
    shape = (3, ROWS, heads, CONTEXT, lm.d_model // heads)
    q, k, v = torch.randn(shape).bfloat16()
    return layer * seconds(lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True))


def measure(name: str, lm: tu.LanguageModel, layer: int) -> dict:
    """One row of the table."""
    ids = torch.randint(2, lm.n_vocab, (ROWS, CONTEXT), generator=torch.Generator().manual_seed(0))
    harvest = seconds(lambda: lm.activations(ids, [layer], bf16=True))
    fp32 = seconds(lambda: lm.activations(ids, [layer], bf16=False), 1)
    products, attention = product_seconds(lm, layer), attention_seconds(lm, layer)
    row = {
        "model": name,
        "layer": layer,
        "tokens_per_second": round(ids.numel() / harvest),
        "fp32_tokens_per_second": round(ids.numel() / fp32),
        "bound_tokens_per_second": round(ids.numel() / products),
        "share_of_products": round(products / harvest, 3),
        "share_of_attention": round(attention / harvest, 3),
    }
    print(row, flush=True)
    return row


def main() -> None:
    tu.keep_freed_memory()
    testbed = tu.load_lm(ROOT.parent / "testbed" / "model", "cpu")
    rows = [measure("testbed", testbed, 4)]
    gpt2 = GPT2LMHeadModel(GPT2Config())
    rows.append(measure("GPT-2's shape", tu.LanguageModel(gpt2, testbed.tokenizer, "gpt2"), 8))
    if (corpus.cache_folder() / "models" / smollm2.NAME).exists():
        rows.append(measure(smollm2.NAME, tu.load_lm(smollm2.folder(), "cpu"), 20))
    with open(ROOT / "results" / "harvest.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    main()
