"""Tries hostile inputs, and compares what is not refused with slow paths of its own.

    .venv/bin/python tools/hostile_inputs.py [--cases 250] [--first 0]     # make hostile

Four kinds: folders of text, shapes, configurations of models and tokenizers, padded prompts. Each
case is made from its number. It is right (as the slow path says), refused (one sentence, where the
slow path refuses too), or a silent error. Writes benchmarks/results/hostile-inputs.csv; exits with
status 1 after a silent error.
"""

from __future__ import annotations

import argparse
import csv
import gzip
import json
import random
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
import transformers
from scan_architectures import SIZES, run, shrink, tiny_tokenizer
from torch import Tensor
from torch.nn import functional as F
from tqdm.auto import tqdm
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

import tsae_utils as tu

RESULTS = Path(__file__).resolve().parent.parent / "benchmarks" / "results" / "hostile-inputs.csv"
REFUSALS = (ValueError, OSError)
VOCAB = 64


class Wrong(Exception):
    """A silent error, or an error that is no sentence."""


def require(is_right: bool, what: str) -> None:
    if not is_right:
        raise Wrong(what)


def refused(call: Callable[[], object]) -> str | None:
    """The sentence with which a call refuses its input; None where it does not."""
    try:
        call()
    except REFUSALS as error:
        sentence = str(error)
        require(len(sentence) > 20 and "\n" not in sentence[:60], f"no sentence: {error!r}")
        return sentence
    return None


# -- folders of text --

WORDS = ["one", "two", "<|endoftext|>", "</s>", "é", "line\u2028separator", "\x00", "{", '"', "w3"]
COLUMNS = ["text", "text", "text", "content", "input_ids"]


def make_file(rng: random.Random, folder: Path) -> tuple[str, list[str] | None]:
    """Write one file; returns (kind, its documents or None where it must be refused)."""
    kind = rng.choice(["txt", "jsonl", "json", "jsonl.gz", "txt.gz", "parquet", "md"])
    documents = [
        " ".join(rng.choices(WORDS, k=rng.randint(1, 6))) for _ in range(rng.randint(0, 5))
    ]
    path = folder / f"{rng.choice('ab[c*')}{rng.randint(0, 99)}.{kind}"
    column = "text"
    rows: list[dict] = [{column: text} for text in documents]
    is_bad = False
    if kind.startswith("json") or kind == "parquet":
        for row in rows:
            odd = rng.random()
            if odd < 0.05:
                row[column] = None
            elif odd < 0.1:
                row[column] = "  \n"
            elif odd < 0.12 and kind != "parquet":
                row[column] = rng.choice([3, 2.5, True, ["x"], {"a": 1}])
                is_bad = True
    if kind.startswith("txt"):
        data = "\n\n".join(text.replace("\n", " ") for text in documents).encode()
    elif kind.startswith("jsonl"):
        data = "".join(
            json.dumps(row, ensure_ascii=rng.random() < 0.5) + "\n" for row in rows
        ).encode()
    elif kind == "json":
        data = json.dumps(rows).encode()
    elif kind == "parquet":
        import pyarrow as pa
        from pyarrow import parquet

        table = pa.table({column: pa.array([row[column] for row in rows], pa.string())})
        parquet.write_table(table, path)
        data = path.read_bytes()
    else:
        data = b"# not a corpus"
    if rng.random() < 0.1 and not kind.endswith("gz") and kind != "parquet":
        data = b"\xef\xbb\xbf" + data  # a byte order mark
    if kind.endswith("gz"):
        data = gzip.compress(data)
    if rng.random() < 0.06 and kind != "md":
        is_cut = kind == "parquet" or (kind.endswith("gz") and rng.random() < 0.5)
        data, is_bad = data[: len(data) // 2] if is_cut else b"\xff\xfe" + data, True
    path.write_bytes(data)
    texts = [row[column] for row in rows]
    kept = [text for text in texts if isinstance(text, str) and text.strip()]
    return kind.removesuffix(".gz"), None if is_bad else kept


def try_text(rng: random.Random) -> str:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / rng.choice(["plain", "with [brackets]", "a*b", "c?d"])
        folder.mkdir()
        made = {}
        for _ in range(rng.randint(1, 3)):
            before = set(folder.iterdir())
            kind, documents = make_file(rng, folder)
            for path in set(folder.iterdir()) - before or {max(folder.iterdir())}:
                made[path] = (kind, documents)
        if rng.random() < 0.3:
            (folder / ".DS_Store").write_bytes(b"\x00\x01")
        source = rng.choice([folder, str(folder), rng.choice(list(made))])
        paths = [Path(source)] if Path(source).is_file() else sorted(made)
        texts = [made[p] for p in paths if made[p][0] != "md"]
        kinds = {"json" if kind.startswith("json") else kind for kind, _ in texts}
        must_refuse = len(kinds) != 1 or any(documents is None for _, documents in texts)
        found: list = []
        said = refused(lambda: found.extend(tu.read_documents(source)))
        if must_refuse:
            require(said is not None, f"read what is no corpus: {[p.name for p in paths]}")
            return "refused"
        require(said is None, f"refused {[p.name for p in paths]}: {said}")
        expected = [text for _, documents in texts for text in documents]
        require(found == expected, f"{found} instead of {expected}")
        return "right"


# -- shapes --


def small_sae(rng: random.Random) -> tu.TSAE:
    """An SAE with random weights."""
    activation = rng.choice([*tu.ACTIVATIONS, "jumprelu"])
    table = tu.TokenLookup(torch.randn(9, 6)) if rng.random() < 0.7 else None
    sae = tu.TSAE(
        tu.TSAEConfig(d_in=6, d_sae=16, k=rng.randint(1, 16), activation=activation), table
    )
    with torch.no_grad():
        for tensor in (*sae.parameters(), *sae.buffers()):
            if tensor.is_floating_point():
                tensor.add_(0.3 * torch.randn(tensor.shape))
    return sae.eval()


def try_shapes(rng: random.Random) -> str:
    """Equation 2 for one activation after the other, where a current token can be told."""
    sae = small_sae(rng)
    lead = [rng.choice([1, 2, 3, 6]) for _ in range(rng.choice([0, 1, 1, 2, 2, 3]))]
    x = torch.randn(*lead, 6 if rng.random() < 0.8 else rng.choice([5, 1]))
    shapes = [lead, lead, lead, [*lead, 3], lead[::-1], lead[:1], [*lead, 0], [1], [2, 3]]
    tokens = torch.randint(9, rng.choice(shapes))
    if rng.random() < 0.2 and tokens.numel():
        tokens.view(-1)[-1] = rng.choice([-1, 9, -(2**40), 2**40])
    if rng.random() < 0.1:
        tokens = tokens.to(rng.choice([torch.float32, torch.bool, torch.int32, torch.uint8]))
    current = None
    if x.ndim in (2, 3) and x.shape[-1] == 6:
        if tokens.shape == x.shape[:-1]:
            current = tokens
        elif x.ndim == tokens.ndim == 2 and len(tokens) == len(x) and tokens.shape[1]:
            current = tokens[:, -1]
    is_named = current is not None and (
        sae.lookup is None
        or (
            not tokens.is_floating_point()
            and tokens.dtype != torch.bool
            and all(0 <= int(t) < 9 for t in current.flatten())
        )
    )
    out: list = []
    said = refused(lambda: out.append(sae(x, tokens).x_hat.detach()))
    if not is_named:
        require(said is not None, f"took x {list(x.shape)} with tokens {tokens}")
        return "refused"
    require(said is None, f"refused x {list(x.shape)} with tokens {list(tokens.shape)}: {said}")
    flat, flat_tokens = x.reshape(-1, 6), current.flatten()
    rows = [slow_reconstruction(sae, v, int(t)) for v, t in zip(flat, flat_tokens, strict=True)]
    expected = torch.stack(rows).view(x.shape)
    require(torch.allclose(out[0], expected, atol=1e-4), f"{sae.cfg.activation} {list(x.shape)}")
    return "right"


@torch.no_grad()
def slow_reconstruction(sae: tu.TSAE, x: Tensor, token: int) -> Tensor:
    """Equations 1 and 2, one feature after the other."""
    cfg, pre = sae.cfg, []
    for f in range(cfg.d_sae):
        pre.append(float(sum(sae.W_enc[i, f] * (x[i] - sae.b_dec[i]) for i in range(6))))
    values = []
    bias = sae.encoder_bias
    kth = sorted((p + float(b) for p, b in zip(pre, bias, strict=True)), reverse=True)[cfg.k - 1]
    for f, p in enumerate(pre):
        total = p + float(bias[f])
        match cfg.activation:
            case "topk":
                values.append(max(total, 0.0) if total >= kth else 0.0)
            case "relu":
                values.append(max(total, 0.0))
            case "gated":
                magnitude = float(sae.r_mag[f].exp()) * p + float(sae.b_mag[f])
                values.append(max(magnitude, 0.0) if total > 0 else 0.0)
            case _:
                values.append(total if total > max(float(sae.threshold[f]), 0.0) else 0.0)
    x_hat = sae.b_dec.clone()
    for f, value in enumerate(values):
        x_hat += value * sae.W_dec[f]
    return x_hat if sae.lookup is None else x_hat + sae.lookup.W[token]


# -- configurations --

ARCHITECTURES = (
    "gpt2 gpt_neo gpt_neox gptj bloom mpt falcon opt openai-gpt phi ctrl cohere olmo olmo2 llama "
    "mistral gemma gemma2 gemma3_text qwen2 qwen3 mixtral stablelm starcoder2 granite glm mamba "
    "biogpt xglm bert t5gemma"
).split()
OPTIONS = {
    "tie_word_embeddings": [True, False],
    "do_layer_norm_before": [True, False],
    "word_embed_proj_dim": [16, 32],
    "scale_embedding": [True, False],
    "use_parallel_residual": [True, False],
    "parallel_attn": [True, False],
    "new_decoder_architecture": [True, False],
    "alibi": [True, False],
    "num_hidden_layers": [1, 2, 3],
    "n_layer": [1, 2, 3],
    "num_layers": [2],
    "attention_types": [[[["global", "local"], 1]]],
    "max_position_embeddings": [16, 64],
    "n_positions": [16, 64],
    "logit_scale": [0.0625, 3.0],
    "final_logit_softcapping": [None, 5.0],
    "sliding_window": [None, 4],
    "residual_multiplier": [1.0, 0.3],
    "apply_residual_connection_post_layernorm": [True, False],
    "use_qk_norm": [True, False],
}


def random_language_model(rng: random.Random) -> tu.LanguageModel:
    """A tiny random model whose options and special tokens are drawn. Raises what it raises."""
    config = CONFIG_MAPPING[rng.choice(ARCHITECTURES)]()
    sizes = dict(SIZES)
    for key, values in OPTIONS.items():
        if rng.random() < 0.5:
            sizes[key] = rng.choice(values)
    shrink(config, sizes)
    torch.manual_seed(rng.randrange(10**6))
    model = AutoModelForCausalLM.from_config(config).float().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(5 if parameter.ndim > 1 else 1)
            if parameter.ndim == 1:
                parameter.add_(0.2 * torch.randn(parameter.shape))
    run(model, torch.arange(2, 14).view(2, 6))
    tokenizer = tiny_tokenizer()
    for name in ("bos_token", "eos_token", "pad_token"):
        setattr(tokenizer, name, rng.choice([None, "<s>", "</s>", "w63"]))
    return model, tokenizer, config.model_type


def try_configuration(rng: random.Random) -> str:
    """The losses of rows alone, without padding; a text's stream put under another text."""
    try:
        model, tokenizer, name = random_language_model(rng)
    except Exception:  # transformers does not build this one: no case of ours
        return "not built"
    with torch.no_grad():
        probe = torch.arange(5, 17).view(2, 6)
        later = probe.clone()
        later[:, -1] = 3
        before, after = (run(model, ids).logits[:, :-1] for ids in (probe, later))
    is_causal = torch.allclose(before, after, atol=1e-4 * before.abs().max().item())
    made: list = []
    said = refused(lambda: made.append(tu.LanguageModel(model, tokenizer, name, bf16=False)))
    if said is not None:
        return "refused"
    require(is_causal, f"{name} reads later tokens")
    lm = made[0]
    ids = torch.randint(2, VOCAB - 1, (2, rng.choice([3, 9, 16, 40, 70])))
    if rng.random() < 0.2:
        ids[0, rng.randrange(ids.shape[1])] = rng.choice([-1, VOCAB, 10**6])
    bad_ids = bool(((ids < 0) | (ids >= VOCAB)).any())
    layer = rng.randint(0, lm.n_layers)
    out: list = []
    said = refused(lambda: out.append(lm.losses(ids)))
    if bad_ids or said is not None:
        if not bad_ids:  # only too long a row may be refused
            require(bool(lm.max_context) and ids.shape[1] > lm.max_context, f"{name}: {said}")
        require(said is not None, f"{name} took {ids}")
        return "refused"
    x = lm.activations(ids, [layer])[layer]
    with torch.no_grad():
        logits = run(model, ids).logits
        other = ids.flip(0)
        from_other = run(model, other).logits
    expected, moved = (slow_losses(given, ids) for given in (logits, from_other))
    tolerance = 1e-4 * max(1.0, expected.max().item())
    require(torch.allclose(out[0], expected, atol=tolerance), f"{name}: losses")
    back = lm.losses(ids, layer, x)
    require(torch.allclose(back, expected, atol=tolerance), f"{name}: put back at {layer}")
    if lm._can_skip:  # else the model has other ways for a text than its stream
        mixed = lm.losses(ids, layer, lm.activations(other, [layer])[layer])
        require(torch.allclose(mixed, moved, atol=tolerance), f"{name}: another text at {layer}")
    return "right"


def slow_losses(logits: Tensor, ids: Tensor) -> Tensor:
    """Minus the log of the probability of each next token, one after the other."""
    rows = []
    for row, line in zip(logits.double(), ids, strict=True):
        chances = [F.log_softmax(row[i], -1)[int(line[i + 1])] for i in range(len(line) - 1)]
        rows.append(-torch.stack(chances))
    return torch.stack(rows).float()


# -- padded prompts --

MODELS: dict[str, transformers.PreTrainedModel] = {}


def small_model(name: str) -> transformers.PreTrainedModel:
    """A tiny random model, made once."""
    if name not in MODELS:
        config = CONFIG_MAPPING[name]()
        shrink(config, SIZES)
        torch.manual_seed(0)
        MODELS[name] = AutoModelForCausalLM.from_config(config).float().eval()
        with torch.no_grad():
            for parameter in MODELS[name].parameters():
                parameter.mul_(5 if parameter.ndim > 1 else 1)
    return MODELS[name]


def try_prompts(rng: random.Random) -> str:
    """Padded rows through Evaluator and ActivationStream against every text alone."""
    tokenizer = tiny_tokenizer()
    pad = rng.choice(["</s>", "w63", "<s>"])
    tokenizer.pad_token = pad
    pad_id = tokenizer.pad_token_id
    model = small_model(rng.choice(["gpt2", "llama", "gpt_neox", "opt", "gemma2", "bloom"]))
    lm = tu.LanguageModel(model, tokenizer, "tiny", bf16=False)
    texts = []
    for _ in range(rng.randint(1, 4)):
        length = rng.randint(1, 9)
        texts.append([0, *(rng.randint(2, VOCAB - 2) for _ in range(length - 1))])
    width = max(map(len, texts)) + rng.randint(0, 3)
    rows = torch.full((len(texts), max(2, width)), pad_id)
    for row, text in zip(rows, texts, strict=True):
        start = 0 if rng.random() < 0.5 else len(row) - len(text)
        row[start : start + len(text)] = torch.tensor(text)
    hook = f"blocks.1.hook_{rng.choice(['resid_pre', 'resid_post', 'mlp_out', 'attn_out'])}"
    sae = tu.TSAE(tu.TSAEConfig(d_in=32, d_sae=48, k=4), tu.TokenLookup(torch.randn(VOCAB, 32)))
    sae.eval()
    squares, losses, patched, alone = [], [], [], []
    for text in texts:
        ids = torch.tensor([text])
        if len(text) < 2:
            continue
        x = lm.activations(ids, [hook])[hook]
        x_hat = x.clone()
        x_hat[:, 1:] = sae(x[0, 1:], ids[0, 1:]).x_hat
        squares.append(((x - x_hat)[0, 1:].square().sum(-1) / x[0, 1:].square().sum(-1)).detach())
        losses.append(lm.losses(ids)[0, 1:])
        patched.append(lm.losses(ids, hook, x_hat.detach())[0, 1:])
        alone.append(x[0, 1:])
    found: list = []
    said = refused(lambda: found.append(tu.Evaluator(lm, rows, hook)(sae)))
    if not squares or not sum(map(len, losses)):
        require(said is not None, f"measured nothing in {rows.tolist()}: {found}")
        return "refused"
    require(said is None, f"refused {rows.tolist()}: {said}")
    numbers = (("nmse", squares), ("ce_clean", losses), ("ce_patched", patched))
    for name, expected in numbers:
        value = torch.cat(expected).mean().item()
        require(
            abs(found[0][name] - value) < 1e-3 * max(1, abs(value)), f"{name} of {rows.tolist()}"
        )
    n = len(torch.cat(alone))
    stream = tu.ActivationStream(lm, rows, hook, n, rows.numel(), harvest_rows=3)
    x, tokens = next(iter(stream))
    along = torch.randn(lm.d_model)  # puts activations into an order
    order, expected_order = ((v @ along).argsort() for v in (x, torch.cat(alone)))
    error = (x[order] - torch.cat(alone)[expected_order]).abs().max().item()
    require(error < 1e-4 * x.abs().max().item(), f"activations off by {error}")
    kept = sorted(t for text in texts for t in text[1:])
    require(sorted(tokens[:, 0].tolist()) == kept, "tokens")
    return "right"


KINDS = {
    "text folders": try_text,
    "shapes": try_shapes,
    "configurations": try_configuration,
    "padded prompts": try_prompts,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--cases", type=int, default=250, help="of each kind")
    parser.add_argument("--first", type=int, default=0, help="number of the first case")
    parser.add_argument("--kind", choices=KINDS, help="default: all")
    args = parser.parse_args()
    transformers.logging.set_verbosity_error()
    warnings.filterwarnings("ignore")
    rows, silent = [], []
    for kind in [args.kind] if args.kind else KINDS:
        counts: dict[str, int] = {}
        for case in tqdm(range(args.first, args.first + args.cases), desc=kind):
            torch.manual_seed(case)
            try:
                outcome = KINDS[kind](random.Random(case))
            except Exception as error:
                outcome = "silent error" if isinstance(error, Wrong) else "no sentence"
                silent.append(f"{kind}, case {case}: {type(error).__name__}: {error}"[:500])
            counts[outcome] = counts.get(outcome, 0) + 1
        columns = ("right", "refused", "not built", "silent error", "no sentence")
        rows.append({"kind": kind, "tried": args.cases} | {c: counts.get(c, 0) for c in columns})
        print(rows[-1])
    print("\n".join(silent))
    if not args.kind and args.first == 0:
        with open(RESULTS, "w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
    sys.exit(bool(silent))


if __name__ == "__main__":
    main()
