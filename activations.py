"""From text to activations: a language model and its residual stream, rows of tokens, shuffled batches.

    lm = load_lm("testbed/model")                                   # 1  language model
    rows = token_rows(read_documents("text.jsonl"), lm, 256)        # 1  tokens
    stream = ActivationStream(lm, rows, "blocks.4.hook_resid_pre")  # 2  activations

Axes: R rows, L sequence, B batch (tokens), D d_in, V vocabulary, N n-gram order. Everything here is also found in tsae_utils.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import math
import os
import re
import sys
import time
from array import array
from collections.abc import Iterable, Iterator
from functools import cached_property
from itertools import islice
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm.auto import tqdm

# ---------------------------------------------------------------------------------------------
# 1  Language model and tokens
# ---------------------------------------------------------------------------------------------


def keep_freed_memory() -> None:
    """Ask glibc to keep freed memory for the next batch: on a CPU every fresh [B, F] is otherwise paid for page by page.

    For programs whose main work is training or harvesting; the process stays at its peak size. Does nothing with
    another C library.
    """
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "gnu_get_libc_version"):
        for option, value in ((-1, -1), (-2, 2**26), (-4, 0)):  # never trim, grow by 64 MiB, no mmap for large blocks
            libc.mallopt(option, value)


class _Stop(Exception):  # ends a forward pass once the last wanted layer is read
    pass


def fast_bf16(device: torch.device) -> bool:
    """Whether bf16 matrix products are the fast ones: any GPU, CPUs with the instructions."""
    if device.type != "cpu":
        return device.type == "cuda"
    capabilities = torch.cpu.get_capabilities()
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))


def parse_hook(hook_name: str, n_layers: int) -> int:
    """Layer l of "blocks.l.hook_resid_pre" (0 <= l < n_layers); "hook_resid_post" of block l is l + 1.

    Raises ValueError for any other hook name and for a layer the model does not have.
    """
    match = re.fullmatch(r"blocks\.(\d+)\.hook_resid_(pre|post)", hook_name)
    if match is None:
        raise ValueError(f"unknown hook {hook_name!r}: expected blocks.<layer>.hook_resid_pre or .hook_resid_post")
    if int(match[1]) >= n_layers:
        raise ValueError(f"hook {hook_name!r} is out of range: the model has {n_layers} layers, 0 to {n_layers - 1}")
    return int(match[1]) + (match[2] == "post")


class LanguageModel:
    """A causal language model of transformers, its tokenizer, and access to its residual stream.

    The residual stream is TransformerLens's: for LayerNorm models the raw stream minus its mean over d_model
    (`centred`; no LayerNorm sees that mean), for RMSNorm models the raw one.
    """

    def __init__(self, model: nn.Module, tokenizer, name: str, bf16: bool | None = None) -> None:
        self.model, self.tokenizer, self.name = model.eval().requires_grad_(False), tokenizer, name
        for module in model.modules():  # the tanh GELU of GPT-2, in transformers eight operations, in torch one
            for child, activation in module.named_children():
                if type(activation).__name__ == "NewGELUActivation":
                    setattr(module, child, nn.GELU(approximate="tanh"))
        self.device = next(model.parameters()).device
        self.bf16 = fast_bf16(self.device) if bf16 is None else bf16  # for harvesting, never for cross-entropy
        self.n_vocab, self.d_model = model.get_input_embeddings().weight.shape
        self.n_layers = model.config.num_hidden_layers
        lists = [m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == self.n_layers]
        self.blocks = max(lists, key=lambda m: sum(p.numel() for p in m.parameters()))
        self.centred = any(type(m).__name__.endswith("LayerNorm") for m in self.blocks.modules())  # some models have one of their own
        self.bos_id, self.bos_note = self._bos()
        eos = tokenizer.eos_token_id
        self.separator_id = self.bos_id if eos is None or eos >= self.n_vocab else eos

    def _bos(self) -> tuple[int, str]:
        for name, value in (("BOS", self.tokenizer.bos_token_id), ("EOS", self.tokenizer.eos_token_id)):
            if value is None:
                continue
            if value >= self.n_vocab:
                raise ValueError(f"{self.name}: the tokenizer's {name} id {value} lies beyond the model's embedding of "
                                 f"{self.n_vocab} rows: mend tokenizer_config.json or resize the embedding")
            return value, "" if name == "BOS" else f"{self.name} has no BOS token; EOS (id {value}) stands in for it"
        return 0, f"{self.name} has neither BOS nor EOS; token 0 ({self.tokenizer.convert_ids_to_tokens(0)!r}) stands in"

    @cached_property
    def fingerprint(self) -> str:
        """Hash of all weights, of the configuration and of BOS and separator, for records and caches."""
        shape = {k: v for k, v in self.model.config.to_dict().items() if isinstance(v, int | float | dict) and not k.startswith("_")}
        digest = hashlib.sha256(json.dumps([shape, self.bos_id, self.separator_id], sort_keys=True, default=str).encode())
        for p in self.model.parameters():
            digest.update(p.detach().float().cpu().numpy().tobytes())
        return digest.hexdigest()[:16]

    def _to_stream(self, raw: Tensor) -> Tensor:
        raw = raw.float()
        return raw - raw.mean(-1, keepdim=True) if self.centred else raw

    def _hook(self, layer: int, read_or_replace) -> torch.utils.hooks.RemovableHandle:
        """Register on the input of block `layer`, or on the output of the last block for layer n_layers."""

        def before(module, args, kwargs):
            if args:
                new = read_or_replace(args[0])
                return None if new is None else ((new, *args[1:]), kwargs)
            new = read_or_replace(kwargs["hidden_states"])
            return None if new is None else (args, {**kwargs, "hidden_states": new})

        def after(module, args, output):
            new = read_or_replace(output[0] if isinstance(output, tuple) else output)
            return new if new is None or not isinstance(output, tuple) else (new, *output[1:])

        if layer == self.n_layers:
            return self.blocks[-1].register_forward_hook(after)
        return self.blocks[layer].register_forward_pre_hook(before, with_kwargs=True)

    @torch.no_grad()
    def activations(self, ids_RL: Tensor, layers: Iterable[int], bf16: bool | None = None,
                    positions_RL: Tensor | None = None) -> dict[int, Tensor]:
        """Residual stream [R, L, D], returned in fp32, entering each of `layers`; the pass ends at the last of them.

        `positions_RL` lets tokens stand at other positions than 0, 1, 2, ...
        """
        bf16 = self.bf16 if bf16 is None else bf16
        found, layers = {}, sorted(set(layers))

        def read(layer):
            def hook(raw):
                found[layer] = self._to_stream(raw)
                if layer == layers[-1]:
                    raise _Stop

            return hook

        moved = {}
        if positions_RL is not None:  # with a mask, or a jump of positions would be taken for the start of another text
            moved = {"position_ids": positions_RL.to(self.device), "attention_mask": torch.ones_like(positions_RL, device=self.device)}
        handles = [self._hook(layer, read(layer)) for layer in layers]
        try:
            with torch.autocast(self.device.type, torch.bfloat16, enabled=bf16):
                self.model.base_model(input_ids=ids_RL.to(self.device), use_cache=False, **moved)
        except _Stop:
            pass
        finally:
            for handle in handles:
                handle.remove()
        return found

    @torch.no_grad()
    def losses(self, ids_RL: Tensor, layer: int = 0, x_RLD: Tensor | None = None) -> Tensor:
        """Cross-entropy [R, L-1] in nats (fp32) of every next token.

        With `x_RLD` the residual stream entering `layer` is replaced by it, and the blocks before are not run. The mean
        that centring took away is not put back: every LayerNorm subtracts it.
        """

        handles = [] if x_RLD is None else [self._hook(layer, lambda raw: x_RLD)]
        skipped = [] if x_RLD is None else self.blocks[:layer]
        for block in skipped:  # an attribute of the instance hides the method of its class
            block.forward = lambda *args, **kwargs: args[0] if args else kwargs["hidden_states"]
        ids_RL = ids_RL.to(self.device)
        try:
            logits = self.model(input_ids=ids_RL, use_cache=False).logits.float()
        finally:
            for handle in handles:
                handle.remove()
            for block in skipped:
                del block.forward
        targets = F.pad(ids_RL[:, 1:], (0, 1))  # the last column has no target and is cut off: no copy of the logits
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view(ids_RL.shape)[:, :-1]


def hub_name(source: str | Path) -> tuple[str, str | None]:
    """(name, revision) of "name@revision"; a local file or folder is taken as it is."""
    if Path(source).expanduser().exists():
        return str(source), None
    name, _, revision = str(source).partition("@")
    return name, revision or None


def load_lm(name_or_path: str | Path, device: str | None = None, bf16: bool | None = None) -> LanguageModel:
    """Load a model of the hub ("name" or "name@revision") or of a local Hugging Face folder, weights in fp32.

    Raises FileNotFoundError where neither exists, ValueError where the BOS id lies outside the embedding.
    """
    from huggingface_hub.errors import HTTPError
    from transformers import AutoModelForCausalLM, AutoTokenizer

    name, revision = hub_name(name_or_path)
    path = Path(name).expanduser()
    looks_local = path.exists() or path.is_absolute() or name.startswith(".") or len(path.parts) > 2
    if looks_local and not (path / "config.json").is_file():
        raise FileNotFoundError(f"no model at {path}: expected a Hugging Face folder with config.json")
    device = device or ("cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu")
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(path), revision=revision)
        model = AutoModelForCausalLM.from_pretrained(str(path), revision=revision, dtype=torch.float32)
    except SafetensorError as error:
        raise ValueError(f"the weights in {path} are damaged ({error}): fetch them again") from error
    except (OSError, HTTPError) as error:
        raise FileNotFoundError(f"could not load the model {str(name_or_path)!r}: it is neither a local folder with config, tokenizer and "
                                "weights nor a hub model that can be reached: check name and network, or give a local copy "
                                f"({str(error).partition(chr(10))[0]})") from error
    return LanguageModel(model.to(device), tokenizer, str(name_or_path), bf16)


def read_documents(source: str | Path, text_column: str = "text") -> Iterator[str]:
    """Documents of a local .txt (paragraphs), .jsonl or .parquet file, of a folder of them, or of a hub data set
    ("name", "name:configuration" or either with "@revision"; streamed, split "train").

    Raises FileNotFoundError or ValueError with what was expected.
    """
    os.environ.setdefault("HF_UPDATE_DOWNLOAD_COUNTS", "0")  # without it even a local file is reported to the hub
    from datasets import load_dataset
    from datasets.exceptions import DatasetGenerationError
    from huggingface_hub.errors import HTTPError

    kinds = {".txt": "text", ".jsonl": "json", ".json": "json", ".gz": "json", ".parquet": "parquet"}
    path = Path(source).expanduser()
    files = sorted(f for f in path.iterdir() if f.suffix in kinds) if path.is_dir() else [path] if path.is_file() else []
    if path.is_dir() and not files:
        raise ValueError(f"no text in {path}: expected .txt, .jsonl or .parquet files")
    if files and (bad := [f.name for f in files if f.suffix not in kinds]):
        raise ValueError(f"cannot read {bad[0]}: expected .txt, .jsonl or .parquet with a column {text_column!r}")
    if not files and (path.is_absolute() or path.suffix in kinds or str(source).startswith(".")):
        raise FileNotFoundError(f"no corpus at {path}: expected a .txt, .jsonl or .parquet file, a folder of them, or a hub id")
    name, revision = hub_name(source)
    kind, _, configuration = name.partition(":")
    options = {"name": configuration or None, "revision": revision}
    if files:
        kind, options = kinds[files[0].suffix], {"data_files": [str(f) for f in files]}
    if kind == "text":
        options["sample_by"] = "paragraph"
    try:
        for i, row in enumerate(load_dataset(kind, split="train", streaming=True, **options)):
            if not isinstance(row.get(text_column), str):
                raise KeyError(f"document {i} has no text under {text_column!r}; its columns are {sorted(row)}")
            if row[text_column].strip():
                yield row[text_column]
    except StopIteration:  # datasets' answer to an empty JSON file
        return
    except KeyError as error:
        raise ValueError(f"{source}: {error.args[0]}") from None
    except (ValueError, DatasetGenerationError) as error:
        raise ValueError(f"cannot read {source}: expected .txt, .jsonl or .parquet with a column {text_column!r} ({error})") from error
    except (OSError, HTTPError) as error:
        raise FileNotFoundError(f"the data set {str(source)!r} is neither a local file nor one the hub gave: check the name and the "
                                f"network, or give a local copy ({error})") from error


def token_rows(documents: Iterable[str], lm: LanguageModel, context_size: int, max_tokens: float = math.inf,
               progress: bool = False) -> Tensor:
    """Token ids [R, L] int32: documents joined by the separator and cut to the context, BOS first in every row.

    Built here and not by a tokenizer's own padding or BOS rules, which differ. At most `max_tokens` ids are kept (a
    last, incomplete row is dropped). Raises ValueError where the documents do not fill one row.
    """
    if context_size < 2:
        raise ValueError(f"context_size = {context_size} must be at least 2: BOS and one token")
    flat, documents = array("i"), iter(documents)  # four bytes a token
    total = None if max_tokens == math.inf else int(max_tokens)
    with tqdm(total=total, desc="reading text", unit="tok", unit_scale=True, disable=not progress) as bar:
        while len(flat) < max_tokens and (chunk := list(islice(documents, 512))):
            for ids in lm.tokenizer(chunk, add_special_tokens=False, verbose=False)["input_ids"]:
                flat.extend([*ids, lm.separator_id])
            bar.update(len(flat) - bar.n)
    n = int(min(len(flat), max_tokens)) // (context_size - 1)
    if n == 0:
        raise ValueError(f"the corpus is empty or too small: {len(flat)} tokens do not fill one row of {context_size}")
    ids = torch.frombuffer(flat, dtype=torch.int32)[: n * (context_size - 1)].view(n, context_size - 1)
    if int(ids.max()) >= lm.n_vocab:
        raise ValueError(f"token id {int(ids.max())} lies beyond the embedding of {lm.n_vocab} rows: is this the model's tokenizer?")
    return torch.cat([torch.full((n, 1), lm.bos_id, dtype=torch.int32), ids], dim=1)


def keep_mask(rows_RL: Tensor, lm: LanguageModel, include_bos: bool = False) -> Tensor:
    """Positions that count [R, L]: all but position 0 and separators; all of them where `include_bos` (the paper)."""
    if include_bos:
        return torch.ones_like(rows_RL, dtype=torch.bool)
    keep = (rows_RL != lm.bos_id) & (rows_RL != lm.separator_id)
    keep[:, 0] = False
    return keep


# ---------------------------------------------------------------------------------------------
# 2  Activations
# ---------------------------------------------------------------------------------------------


class ActivationStream:
    """Shuffled batches (x_BD fp32, tokens_BN int64) of one hook point, endlessly, in an order fixed by the seed.

    Rows are visited in a new random order each epoch. A preallocated buffer is filled, shuffled and drained whole
    (what does not make up a batch is dropped), so a place in the stream is two numbers, `position`: buffers drained and
    batches taken from the next. `batches(position)` goes on from there, harvesting that buffer again.
    tokens_BN holds the last N tokens up to and including the one the activation sits on (N = 1 in the paper).
    """

    def __init__(self, lm: LanguageModel, rows_RL: Tensor, hook_name: str, batch_size: int = 4096, buffer_tokens: int = 2**17,
                 seed: int = 0, order: int = 1, include_bos: bool = False, harvest_rows: int = 32) -> None:
        if batch_size > buffer_tokens:
            raise ValueError(f"batch_size = {batch_size} must not exceed buffer_tokens = {buffer_tokens}")
        self.lm, self.rows, self.hook_name, self.layer = lm, rows_RL, hook_name, parse_hook(hook_name, lm.n_layers)
        self.batch_size, self.seed, self.order, self.include_bos = batch_size, seed, order, include_bos
        self.harvest_rows, self.rows_per_buffer = harvest_rows, max(1, buffer_tokens // rows_RL.shape[1])
        size = self.rows_per_buffer * rows_RL.shape[1]
        self.x = torch.empty(size, lm.d_model, device=lm.device)
        self.tokens = torch.empty(size, order, dtype=torch.int64, device=lm.device)
        self.seconds = 0.0  # spent in the language model
        self.position = (0, 0)  # of the batch after the one given last

    @cached_property
    def digest(self) -> int:
        """Number that tells these rows from others."""
        return int.from_bytes(hashlib.sha256(memoryview(self.rows.cpu().contiguous().numpy()).cast("B")).digest()[:7])

    def _row_order(self, start: int) -> Iterator[int]:
        for epoch in range(start // len(self.rows), 2**31):
            generator = torch.Generator().manual_seed(1_000_003 * self.seed + epoch)
            order = torch.randperm(len(self.rows), generator=generator).tolist()
            yield from order[max(0, start - epoch * len(self.rows)) :]

    def _fill(self, chosen: list[int]) -> int:
        """Harvest these rows into the buffer; returns how many activations it now holds."""
        n = 0
        for i in range(0, len(chosen), self.harvest_rows):
            ids = self.rows[chosen[i : i + self.harvest_rows]].long()
            keep = keep_mask(ids, self.lm, self.include_bos)
            x = self.lm.activations(ids, [self.layer])[self.layer][keep.to(self.lm.device)]
            self.x[n : n + len(x)] = x
            self.tokens[n : n + len(x)] = last_tokens(ids, self.order, self.lm.bos_id)[keep].to(self.lm.device)
            n += len(x)
        refuse_nan(self.x[:n], self.hook_name)
        return n

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return self.batches()

    def batches(self, position: tuple[int, int] = (0, 0)) -> Iterator[tuple[Tensor, Tensor]]:
        """Batches from a place in the stream on. Raises ValueError where a buffer does not fill one batch."""
        order = self._row_order(position[0] * self.rows_per_buffer)
        for buffer in range(position[0], 2**31):
            started = time.perf_counter()
            n = self._fill(list(islice(order, self.rows_per_buffer)))
            self.seconds += time.perf_counter() - started
            if n < self.batch_size:
                raise ValueError(f"a buffer of {n} activations does not fill one batch of {self.batch_size}: raise buffer_tokens")
            generator = torch.Generator().manual_seed(2_000_003 * self.seed + buffer)
            mixed = torch.randperm(n, generator=generator).to(self.lm.device)
            for i in range(position[1] if buffer == position[0] else 0, n // self.batch_size):
                at = mixed[i * self.batch_size : (i + 1) * self.batch_size]
                self.position = (buffer, i + 1)
                yield self.x[at], self.tokens[at]


def refuse_nan(x: Tensor, hook_name: str) -> Tensor:
    """x itself. Raises ValueError where it contains NaN or infinity."""
    if not torch.isfinite(x).all():
        raise ValueError(f"activations at {hook_name} contain NaN or infinity: check the model, or load it with bf16=False")
    return x


def last_tokens(ids_RL: Tensor, order: int, pad: int) -> Tensor:
    """The last `order` tokens at each position [R, L, N], oldest first; `pad` before the row begins."""
    padded = F.pad(ids_RL.long(), (order - 1, 0), value=pad)
    return padded.unfold(1, order, 1)


def unigram_activations(lm: LanguageModel, hook_name: str, batch: int = 2048, progress: bool = False) -> Tensor:
    """A([BOS, t])_1 for every vocabulary item [V, D]: where the paper's table starts."""
    layer, found = parse_hook(hook_name, lm.n_layers), []
    for t in tqdm(torch.arange(lm.n_vocab).split(batch), desc="unigram activations", disable=not progress):
        prompts = torch.stack([torch.full_like(t, lm.bos_id), t], dim=1)
        found.append(lm.activations(prompts, [layer])[layer][:, 1].cpu())
    return refuse_nan(torch.cat(found), hook_name)
