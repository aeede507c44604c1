"""A whole Pareto sweep, end to end, in a process of its own: five k, two SAEs each, from text rows to trained SAEs.

    python benchmarks/sweep.py ours rows.safetensors --lr 8e-3

The testbed model, layer 4, the same rows of tokens for all. ours: an SAE and a TSAE for each k, one pass of the language model.
saelens: MultiSAETrainingRunner, two SAEs for each k, one pass of its own. sparsify: its Trainer has one k, so five runs of two seeds.
Peers have no table, so theirs are two plain SAEs. All see the same rows, which come in random order. Time is wall time of the
training call, tables and shuffling included, imports and models left out; errors are of the same held-out activations,
centred over d_model as TransformerLens has them.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from worker import START, autocast, count_from_here, peak  # noqa: E402

import tsae_utils as tu  # noqa: E402

KS, LAYER = (4, 8, 16, 32, 64), 4
HOOK = f"blocks.{LAYER}.hook_resid_pre"
Reconstruct = Callable[[Tensor, Tensor], Tensor]  # of held-out activations and their tokens
Fit = Callable[[], dict[str, Reconstruct]]  # the training call, everything it needs being there


def ours(rows: Tensor, a: argparse.Namespace, lm: tu.LanguageModel) -> Fit:
    def fit() -> dict[str, Reconstruct]:
        stream = tu.ActivationStream(lm, rows, HOOK, a.batch)
        table = tu.unigram_activations(lm, HOOK)
        saes = {}
        for k in KS:
            cfg = tu.TSAEConfig(d_in=lm.d_model, d_sae=a.d_sae, k=k, decoder_init_norm=START)
            saes |= {f"sae {k}": tu.TSAE(cfg).to(lm.device), f"tsae {k}": tu.TSAE(cfg, tu.TokenLookup(0.5 * table)).to(lm.device)}
        cfgs = {n: tu.TrainConfig(tokens=a.tokens, lr=a.lr / (1 + n.startswith("tsae"))) for n in saes}  # figure 6's ratio of rates
        tu.train(saes, stream, cfgs, progress=False)
        return {n: lambda x, t, sae=sae: sae(x, t).x_hat for n, sae in saes.items()}

    return fit


def saelens(rows: Tensor, a: argparse.Namespace, lm: tu.LanguageModel) -> Fit:
    from datasets import Dataset
    from sae_lens import LoggingConfig, MultiSAETrainingRunner, MultiSAETrainingRunnerConfig, TopKTrainingSAEConfig
    from transformer_lens import HookedTransformer, HookedTransformerConfig
    from transformer_lens.pretrained.weight_conversions import convert_gpt2_weights

    c = lm.model.config
    cfg = HookedTransformerConfig(
        n_layers=c.n_layer, d_model=c.n_embd, n_ctx=c.n_positions, d_head=c.n_embd // c.n_head, n_heads=c.n_head, d_mlp=4 * c.n_embd,
        d_vocab=c.vocab_size, act_fn="gelu_new", normalization_type="LN", eps=c.layer_norm_epsilon, device=str(lm.device))
    model = HookedTransformer(cfg, tokenizer=lm.tokenizer)
    model.load_and_process_state_dict(convert_gpt2_weights(lm.model, cfg), fold_ln=False, center_writing_weights=True, center_unembed=False,
                                      fold_value_biases=False)
    saes = {f"sae {k} {i}": TopKTrainingSAEConfig(d_in=lm.d_model, d_sae=a.d_sae, k=k, device=str(lm.device)) for k in KS for i in (0, 1)}
    data = Dataset.from_dict({"input_ids": rows.tolist()})

    def fit() -> dict[str, Reconstruct]:
        cfg = MultiSAETrainingRunnerConfig(
            saes=saes, hook_names=HOOK, context_size=rows.shape[1], training_tokens=a.tokens, train_batch_size_tokens=a.batch, lr=a.lr,
            lr_scheduler_name="cosineannealing", lr_end=a.lr / 100, device=str(lm.device), autocast=a.autocast, autocast_lm=a.autocast,
            n_batches_in_buffer=32, store_batch_size_prompts=16, exclude_special_tokens=True, checkpoint_path=None, output_path=None,
            logger=LoggingConfig(log_to_wandb=False))
        runner = MultiSAETrainingRunner(cfg, override_dataset=data, override_model=model)
        return {n: lambda x, t, sae=sae: sae(x) for n, sae in runner.run().items()}

    return fit


def sparsify(rows: Tensor, a: argparse.Namespace, lm: tu.LanguageModel) -> Fit:
    """With Adam, which the step's comparison uses for all (its own default is a schedule-free signSGD); warm-up over a tenth."""
    from datasets import Dataset
    from sparsify import SparseCoderConfig, TrainConfig, Trainer

    data = Dataset.from_dict({"input_ids": rows[: a.tokens // rows.shape[1]].tolist()}).with_format("torch")

    def fit() -> dict[str, Reconstruct]:
        found = {}
        for k in KS:
            with tempfile.TemporaryDirectory() as folder:
                cfg = TrainConfig(SparseCoderConfig(num_latents=a.d_sae, k=k), batch_size=a.batch // rows.shape[1],
                                  optimizer="adam", lr=a.lr, lr_warmup_steps=a.tokens // a.batch // 10,
                                  hookpoints=[f"h.{LAYER - 1}"], init_seeds=[0, 1],
                                  exclude_tokens=[lm.bos_id], log_to_wandb=False, save_dir=folder, save_every=10**9)
                trainer = Trainer(cfg, data, lm.model)
                with autocast(a.autocast, lm.device.type):
                    trainer.fit()
            found |= {f"{n} {k}": lambda x, t, sae=sae: sae(x).sae_out for n, sae in trainer.saes.items()}
        return found

    return fit


SYSTEMS = {"ours": ours, "saelens": saelens, "sparsify": sparsify}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("system", choices=SYSTEMS)
    parser.add_argument("rows", type=Path, help="safetensors with train and heldout rows of token ids")
    for name, default in (("d-sae", 4096), ("batch", 4096), ("tokens", 200_000)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--lr", type=float, default=4e-3)
    parser.add_argument("--autocast", action="store_true")
    a = parser.parse_args()
    tu.keep_freed_memory()  # for every system
    data, lm = load_file(a.rows), tu.load_lm(ROOT / "testbed" / "model")
    heldout = data["heldout"].long()
    keep = tu.keep_mask(heldout, lm)
    centred = lm.activations(heldout, [LAYER], bf16=False)[LAYER]
    lm.centred = a.system != "sparsify"  # which reads the stream as Hugging Face has it, mean over d_model and all
    read = lm.activations(heldout, [LAYER], bf16=False)[LAYER]
    lm.centred = True
    fit = SYSTEMS[a.system](data["train"].long(), a, lm)
    start, since = count_from_here(lm.device.type), time.perf_counter()
    reconstruct = fit()
    seconds, greatest = time.perf_counter() - since, peak(start, lm.device.type)
    x, read, tokens = centred[keep], read[keep], heldout[keep][:, None].to(lm.device)
    nmse = {}
    with torch.no_grad():
        for name, f in reconstruct.items():
            x_hat = torch.cat([f(y, t) for y, t in zip(read.split(1024), tokens.split(1024), strict=True)])
            nmse[name] = tu.reconstruction_error(x, x_hat - x_hat.mean(-1, keepdim=True)).nmse
    print(json.dumps({"seconds": seconds, "peak_gib": greatest, "nmse": nmse}))


if __name__ == "__main__":
    main()
