"""Train the testbed language model from nothing; write its folder and the model card's numbers.

    python testbed/train.py                 # about an hour on two cores; minutes on a GPU
    python testbed/train.py --tokens 1e6    # a minute, to see that it works

Writes a complete Hugging Face folder, which loads with AutoModelForCausalLM and AutoTokenizer, and
`metrics.json`.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from tokenizers import ByteLevelBPETokenizer
from torch.nn import functional as F
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from testbed import corpus, ngram

HERE = Path(__file__).resolve().parent
BOS = "<|endoftext|>"  # document separator and first token of every row, as in GPT-2
VOCAB = 8192
CONTEXT = 256
LAYERS, D_MODEL, HEADS = 6, 256, 4  # 6.9M parameters, 13.8 MB in half precision
BATCH_ROWS = 16  # 4,096 tokens
LR_MATRICES = 6e-3  # Muon, update RMS matched to AdamW's
LR_REST = 3e-3  # AdamW: embeddings, biases, LayerNorm
WARMUP = 0.02  # share of steps; then linear decay to zero
WEIGHT_DECAY = 0.1
SEED = 0


def train_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    """Byte-level BPE on the lm split, saved with its special tokens."""
    bpe = ByteLevelBPETokenizer()
    texts = (d.text for d in corpus.documents("lm"))
    bpe.train_from_iterator(texts, vocab_size=VOCAB, special_tokens=[BOS], show_progress=False)
    special = dict.fromkeys(("bos_token", "eos_token", "unk_token", "pad_token"), BOS)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe._tokenizer, model_max_length=CONTEXT, **special
    )
    tokenizer.save_pretrained(folder)
    return tokenizer


def token_stream(tokenizer: PreTrainedTokenizerFast, split: str) -> list[np.ndarray]:
    """Tokens of every document, without separators: one array per document."""
    texts = [d.text for d in corpus.documents(split)]
    encoded = tokenizer.backend_tokenizer.encode_batch(texts)
    return [np.array(e.ids, np.int32) for e in encoded]


def rows(documents: list[np.ndarray], bos: int, order: np.ndarray) -> np.ndarray:
    """Rows [R, CONTEXT] that start with BOS: the documents in this order, joined by BOS and cut."""
    flat = np.concatenate([np.concatenate([documents[i], [bos]]) for i in order])
    n = len(flat) // (CONTEXT - 1)
    cut = flat[: n * (CONTEXT - 1)].reshape(n, CONTEXT - 1)
    return np.concatenate([np.full((n, 1), bos), cut], axis=1)


def batches(documents: list[np.ndarray], bos: int, seed: int) -> Iterator[torch.Tensor]:
    """Endless batches [BATCH_ROWS, CONTEXT]; every epoch shuffles and cuts the documents anew."""
    rng = np.random.default_rng(seed)
    while True:
        epoch = rows(documents, bos, rng.permutation(len(documents)))
        epoch = epoch[rng.permutation(len(epoch))]
        for i in range(0, len(epoch) - BATCH_ROWS + 1, BATCH_ROWS):
            yield torch.from_numpy(epoch[i : i + BATCH_ROWS]).long()


def build_model(bos: int) -> GPT2LMHeadModel:
    """The untrained model: GPT-2's architecture and initialization."""
    torch.manual_seed(SEED)
    config = GPT2Config(
        vocab_size=VOCAB,
        n_positions=CONTEXT,
        n_embd=D_MODEL,
        n_layer=LAYERS,
        n_head=HEADS,
        bos_token_id=bos,
        eos_token_id=bos,
        pad_token_id=bos,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        use_cache=False,
    )
    config._attn_implementation = "sdpa"
    return GPT2LMHeadModel(config)


def optimizers_for(
    model: GPT2LMHeadModel, lr_matrices: float, lr_rest: float
) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the blocks, AdamW for embeddings, biases and LayerNorm."""
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and ".h." in n]
    chosen = {id(p) for p in matrices}
    rest = [p for p in model.parameters() if id(p) not in chosen]
    muon = torch.optim.Muon(
        matrices, lr=lr_matrices, weight_decay=WEIGHT_DECAY, adjust_lr_fn="match_rms_adamw"
    )
    adamw = torch.optim.AdamW(rest, lr=lr_rest, betas=(0.9, 0.98), weight_decay=0.0, fused=True)
    return [muon, adamw]


def next_token_loss(model: GPT2LMHeadModel, ids: torch.Tensor) -> torch.Tensor:
    """Cross-entropy in nats of every next token: [rows, CONTEXT - 1], fp32."""
    logits = model(ids).logits[:, :-1].float()
    losses = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
    return losses.view(len(ids), -1)


def train(
    model: GPT2LMHeadModel, documents: list[np.ndarray], bos: int, args: argparse.Namespace
) -> list[dict]:
    """Train in place; returns the loss curve. Saves to args.out every `--save-every` seconds."""
    device = next(model.parameters()).device
    n_tokens = BATCH_ROWS * CONTEXT  # per step
    steps = int(args.tokens // n_tokens)
    optimizers = optimizers_for(model, args.lr_matrices, args.lr_rest)
    first_lrs = [[group["lr"] for group in o.param_groups] for o in optimizers]
    forward = torch.compile(next_token_loss) if args.compile else next_token_loss
    source, curve, saved = batches(documents, bos, SEED), [], time.time()
    bar = tqdm(range(steps), desc="training the testbed model", unit="step", mininterval=5)
    for step in bar:
        scale = min(1.0, (step + 1) / max(1, WARMUP * steps)) * (1 - step / steps)
        for optimizer, lrs in zip(optimizers, first_lrs, strict=True):
            for group, lr in zip(optimizer.param_groups, lrs, strict=True):
                group["lr"] = lr * scale
        with torch.autocast(device.type, torch.bfloat16):
            loss = forward(model, next(source).to(device)).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        if step % 20 == 0:
            curve.append({"step": step, "tokens": step * n_tokens, "loss": round(loss.item(), 4)})
            bar.set_postfix(loss=f"{curve[-1]['loss']:.3f}")
        if time.time() - saved > args.save_every:
            save(model, args.out)
            saved = time.time()
    return curve


def save(model: GPT2LMHeadModel, folder: Path) -> None:
    """Half-precision copy of the model as a Hugging Face folder."""
    copy = GPT2LMHeadModel(model.config)
    copy.load_state_dict(model.state_dict())
    copy.half().save_pretrained(folder)


@torch.no_grad()
def evaluate(folder: Path, heldout: np.ndarray, bos: int) -> dict:
    """Held-out cross-entropy of the saved folder, overall and by position.

    Predictions of separators are left out.
    """
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    parts = np.array_split(heldout, max(1, len(heldout) // 16))
    losses = torch.cat([next_token_loss(model, torch.from_numpy(part).long()) for part in parts])
    keep = torch.from_numpy(heldout[:, 1:] != bos)
    keep[:, 0] = False  # the prediction made at BOS
    by_position = {}
    for first in (1, 2, 4, 8, 16, 32, 64, 128):
        end = min(2 * first, CONTEXT - 1)
        in_range = losses[:, first:end][keep[:, first:end]]
        by_position[f"{first}-{end - 1}"] = in_range.mean().item()
    return {
        "cross_entropy": losses[keep].mean().item(),
        "by_position": by_position,
        "predictions": int(keep.sum()),
    }


@torch.no_grad()
def samples(folder: Path, tokenizer: PreTrainedTokenizerFast, n: int = 3) -> list[str]:
    """Texts generated from BOS at temperature 0.8."""
    torch.manual_seed(SEED)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    start = torch.full((n, 1), tokenizer.bos_token_id)
    generated = model.generate(
        start,
        attention_mask=torch.ones_like(start),
        do_sample=True,
        temperature=0.8,
        top_k=0,
        max_new_tokens=100,
        pad_token_id=tokenizer.pad_token_id,
    )
    return [tokenizer.decode(row[1:], skip_special_tokens=True) for row in generated]


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--out", type=Path, default=HERE / "model", help="model folder (default: testbed/model)")
    add("--tokens", type=float, default=20e6, help="training tokens (default: 20e6)")
    add("--lr-matrices", type=float, default=LR_MATRICES)
    add("--lr-rest", type=float, default=LR_REST)
    add("--save-every", type=float, default=600, help="seconds between saves of the running model")
    add("--no-compile", dest="compile", action="store_false", help="if there is no C++ compiler")
    return parser.parse_args()


def main() -> None:
    args = arguments()
    started, final = time.time(), args.out
    args.out = final.with_name(
        f"{final.name}.partial"
    )  # an interrupt leaves the old model as it is
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokenizer = train_tokenizer(args.out)
    bos = tokenizer.bos_token_id
    documents = token_stream(tokenizer, "lm")
    n_tokens = sum(map(len, documents))
    what = f"lm split: {len(documents)} documents, {n_tokens:,} tokens"
    print(f"{what}; {device}, {os.cpu_count()} cores", flush=True)
    model = build_model(bos).to(device)
    curve = train(model, documents, bos, args)
    save(model.cpu(), args.out)
    heldout_documents = token_stream(tokenizer, "heldout")
    heldout = rows(heldout_documents, bos, np.arange(len(heldout_documents)))
    metrics = {
        "parameters": sum(x.numel() for x in model.parameters()),
        "tokens": int(args.tokens),
        "lm_split_tokens": n_tokens,
        "epochs": args.tokens / n_tokens,
        "seconds": round(time.time() - started),
        "device": device,
        "cores": os.cpu_count(),
        "machine": platform.machine(),
        "corpus": corpus.load()[1],
        "overlap_8gram": corpus.overlap(corpus.load()[0]),
        "model": evaluate(args.out, heldout, bos),
        "ngrams": ngram.evaluate(documents, heldout, bos, VOCAB),
        "uniform": math.log(VOCAB),
        "samples": samples(args.out, tokenizer),
        "curve": curve[:: max(1, len(curve) // 60)],
    }
    (args.out / "metrics.json").write_text(json.dumps(metrics, indent=1))
    shutil.rmtree(final, ignore_errors=True)
    args.out.replace(final)
    print(json.dumps({k: metrics[k] for k in ("model", "ngrams", "seconds")}, indent=1))


if __name__ == "__main__":
    main()
