"""A whole Pareto sweep in a process of its own: five k, two SAEs each, from text to trained SAEs.

    python benchmarks/sweep.py ours rows.safetensors --lr 8e-3

All systems read layer 4 of the testbed model on the same rows of tokens, which come in random
order.

    ours      an SAE and a TSAE for each k, in one pass of the language model
    saelens   MultiSAETrainingRunner: two SAEs for each k, in one pass of its model
    sparsify  its Trainer has one k: five runs of two seeds

Peers have no table, so theirs are two plain SAEs. Time is wall time of the training call, with
tables and shuffling, without imports and loading of models. Errors are measured on the same
held-out activations, centred over d_model as in TransformerLens. As with worker.py, bench.py puts
the repository root on PYTHONPATH.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor
from worker import ROOT, START, autocast, peak_memory, start_memory_count

import tsae_utils as tu

KS, LAYER = (4, 8, 16, 32, 64), 4
HOOK = f"blocks.{LAYER}.hook_resid_pre"
Reconstruct = Callable[[Tensor, Tensor], Tensor]  # held-out activations and their tokens
Fit = Callable[[], dict[str, Reconstruct]]  # the training call, with everything it needs loaded


def ours(rows: Tensor, args: argparse.Namespace, lm: tu.LanguageModel) -> Fit:
    def fit() -> dict[str, Reconstruct]:
        stream = tu.ActivationStream(lm, rows, HOOK, args.batch)
        table = tu.unigram_activations(lm, HOOK)
        saes, cfgs = {}, {}
        for k in KS:
            cfg = tu.TSAEConfig(lm.d_model, args.d_sae, k=k, decoder_init_norm=START)
            saes[f"sae {k}"] = tu.TSAE(cfg).to(lm.device)
            cfgs[f"sae {k}"] = tu.TrainConfig(tokens=args.tokens, lr=args.lr)
            saes[f"tsae {k}"] = tu.TSAE(cfg, tu.TokenLookup(0.5 * table)).to(lm.device)
            # As in figure 6, the rate of a TSAE is half that of an SAE.
            cfgs[f"tsae {k}"] = tu.TrainConfig(tokens=args.tokens, lr=args.lr / 2)
        tu.train(saes, stream, cfgs, progress=False)
        return {n: lambda x, tokens, sae=sae: sae(x, tokens).x_hat for n, sae in saes.items()}

    return fit


def hooked_transformer(lm: tu.LanguageModel) -> torch.nn.Module:
    """The testbed model in TransformerLens."""
    from transformer_lens import HookedTransformer, HookedTransformerConfig
    from transformer_lens.pretrained.weight_conversions import convert_gpt2_weights

    c = lm.model.config
    cfg = HookedTransformerConfig(
        n_layers=c.n_layer,
        d_model=c.n_embd,
        n_ctx=c.n_positions,
        d_head=c.n_embd // c.n_head,
        n_heads=c.n_head,
        d_mlp=4 * c.n_embd,
        d_vocab=c.vocab_size,
        act_fn="gelu_new",
        normalization_type="LN",
        eps=c.layer_norm_epsilon,
        device=str(lm.device),
    )
    model = HookedTransformer(cfg, tokenizer=lm.tokenizer)
    model.load_and_process_state_dict(
        convert_gpt2_weights(lm.model, cfg),
        fold_ln=False,
        center_writing_weights=True,
        center_unembed=False,
        fold_value_biases=False,
    )
    return model


def saelens(rows: Tensor, args: argparse.Namespace, lm: tu.LanguageModel) -> Fit:
    from datasets import Dataset
    from sae_lens import (
        LoggingConfig,
        MultiSAETrainingRunner,
        MultiSAETrainingRunnerConfig,
        TopKTrainingSAEConfig,
    )

    model, device = hooked_transformer(lm), str(lm.device)
    saes = {}
    for k in KS:
        for i in (0, 1):
            cfg = TopKTrainingSAEConfig(d_in=lm.d_model, d_sae=args.d_sae, k=k, device=device)
            saes[f"sae {k} {i}"] = cfg
    data = Dataset.from_dict({"input_ids": rows.tolist()})

    def fit() -> dict[str, Reconstruct]:
        cfg = MultiSAETrainingRunnerConfig(
            saes=saes,
            hook_names=HOOK,
            context_size=rows.shape[1],
            training_tokens=args.tokens,
            train_batch_size_tokens=args.batch,
            lr=args.lr,
            lr_scheduler_name="cosineannealing",
            lr_end=args.lr / 100,
            device=device,
            autocast=args.autocast,
            autocast_lm=args.autocast,
            n_batches_in_buffer=32,
            store_batch_size_prompts=16,
            exclude_special_tokens=True,
            checkpoint_path=None,
            output_path=None,
            logger=LoggingConfig(log_to_wandb=False),
        )
        runner = MultiSAETrainingRunner(cfg, override_dataset=data, override_model=model)
        return {name: lambda x, _, sae=sae: sae(x) for name, sae in runner.run().items()}

    return fit


def sparsify(rows: Tensor, args: argparse.Namespace, lm: tu.LanguageModel) -> Fit:
    """With Adam, as all systems of the comparison of steps; warm-up over a tenth of the run.

    Its own default is a schedule-free signSGD.
    """
    from datasets import Dataset
    from sparsify import SparseCoderConfig, TrainConfig, Trainer

    used = rows[: args.tokens // rows.shape[1]]
    data = Dataset.from_dict({"input_ids": used.tolist()}).with_format("torch")

    def train(k: int, folder: str) -> dict[str, torch.nn.Module]:
        cfg = TrainConfig(
            SparseCoderConfig(num_latents=args.d_sae, k=k),
            batch_size=args.batch // rows.shape[1],
            optimizer="adam",
            lr=args.lr,
            lr_warmup_steps=args.tokens // args.batch // 10,
            hookpoints=[f"h.{LAYER - 1}"],
            init_seeds=[0, 1],
            exclude_tokens=[lm.bos_id],
            log_to_wandb=False,
            save_dir=folder,
            save_every=10**9,
        )
        trainer = Trainer(cfg, data, lm.model)
        with autocast(args.autocast, lm.device.type):
            trainer.fit()
        return trainer.saes

    def fit() -> dict[str, Reconstruct]:
        reconstruct = {}
        for k in KS:
            with tempfile.TemporaryDirectory() as folder:
                saes = train(k, folder)
            for name, sae in saes.items():
                reconstruct[f"{name} {k}"] = lambda x, _, sae=sae: sae(x).sae_out
        return reconstruct

    return fit


SYSTEMS = {"ours": ours, "saelens": saelens, "sparsify": sparsify}


@torch.no_grad()
def heldout_errors(
    reconstruct: dict[str, Reconstruct], centred: Tensor, read: Tensor, tokens: Tensor
) -> dict[str, float]:
    """NMSE of every SAE, which reads `read`, against the centred activations."""
    nmse = {}
    for name, function in reconstruct.items():
        batches = zip(read.split(1024), tokens.split(1024), strict=True)
        x_hat = torch.cat([function(x, x_tokens) for x, x_tokens in batches])
        x_hat = x_hat - x_hat.mean(-1, keepdim=True)
        nmse[name] = tu.reconstruction_error(centred, x_hat).nmse
    return nmse


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("system", choices=SYSTEMS)
    add("rows", type=Path, help="safetensors with train and heldout rows of token ids")
    add("--d-sae", type=int, default=4096)
    add("--batch", type=int, default=4096)
    add("--tokens", type=int, default=200_000)
    add("--lr", type=float, default=4e-3)
    add("--autocast", action="store_true")
    args = parser.parse_args()
    tu.keep_freed_memory()  # for every system
    data, lm = load_file(args.rows), tu.load_lm(ROOT / "testbed" / "model")
    heldout = data["heldout"].long()
    keep = tu.keep_mask(heldout, lm)
    centred = lm.activations(heldout, [LAYER], bf16=False)[LAYER]
    # sparsify reads the stream of Hugging Face, which is not centred over d_model.
    lm.centred = args.system != "sparsify"
    read = lm.activations(heldout, [LAYER], bf16=False)[LAYER]
    lm.centred = True
    fit = SYSTEMS[args.system](data["train"].long(), args, lm)
    start, since = start_memory_count(lm.device.type), time.perf_counter()
    reconstruct = fit()
    seconds = time.perf_counter() - since
    peak = peak_memory(start, lm.device.type)
    tokens = heldout[keep][:, None].to(lm.device)
    nmse = heldout_errors(reconstruct, centred[keep], read[keep], tokens)
    print(json.dumps({"seconds": seconds, "peak_gib": peak, "nmse": nmse}))


if __name__ == "__main__":
    main()
