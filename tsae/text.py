"""From documents to token rows. Axes: R rows, L sequence."""

from __future__ import annotations

import math
import os
from array import array
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm.auto import tqdm

from tsae.language_model import LanguageModel, hub_name, real_tokens

KINDS = {".txt": "text", ".jsonl": "json", ".json": "json", ".gz": "json", ".parquet": "parquet"}


def local_files(source: str | Path, text_column: str) -> list[Path]:
    """The files of a local corpus; none for the name of a hub data set.

    Raises ValueError for files of another kind, FileNotFoundError for a path where nothing is.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        files = sorted(f for f in path.iterdir() if f.suffix in KINDS)
        if not files:
            raise ValueError(f"no text in {path}: expected .txt, .jsonl or .parquet files")
        return files
    if path.is_file():
        if path.suffix not in KINDS:
            raise ValueError(
                f"cannot read {path.name}: expected .txt, .jsonl or .parquet "
                f"with a column {text_column!r}"
            )
        return [path]
    if path.is_absolute() or path.suffix in KINDS or str(source).startswith("."):
        raise FileNotFoundError(
            f"no corpus at {path}: expected a .txt, .jsonl or .parquet file, a folder of them, "
            "or a hub id"
        )
    return []


def dataset_arguments(source: str | Path, files: list[Path]) -> tuple[str, dict]:
    """What datasets.load_dataset needs to read these files or that hub data set."""
    if files:
        kind = KINDS[files[0].suffix]
        sampling = {"sample_by": "paragraph"} if kind == "text" else {}
        return kind, {"data_files": [str(f) for f in files], **sampling}
    name, revision = hub_name(source)
    name, _, configuration = name.partition(":")
    return name, {"name": configuration or None, "revision": revision}


def read_documents(source: str | Path, text_column: str = "text") -> Iterator[str]:
    """Documents of a local file, of a folder of files, or of a hub data set.

    Local files are .txt (a document per paragraph), .jsonl or .parquet. A hub data set is "name" or
    "name:configuration", either with "@revision"; its split "train" is streamed. Raises
    FileNotFoundError or ValueError with what was expected.
    """
    # Without this even reading a local file is reported to the hub.
    os.environ.setdefault("HF_UPDATE_DOWNLOAD_COUNTS", "0")
    from datasets import load_dataset
    from datasets.exceptions import DatasetGenerationError
    from huggingface_hub.errors import HTTPError

    name, options = dataset_arguments(source, local_files(source, text_column))
    try:
        rows = load_dataset(name, split="train", streaming=True, **options)
        for position, row in enumerate(rows):
            text = row.get(text_column)
            if not isinstance(text, str):
                raise KeyError(
                    f"document {position} has no text under {text_column!r}; "
                    f"its columns are {sorted(row)}"
                )
            if text.strip():
                yield text
    except StopIteration:  # how datasets answers an empty JSON file
        return
    except KeyError as error:
        raise ValueError(f"{source}: {error.args[0]}") from None
    except (ValueError, DatasetGenerationError) as error:
        raise ValueError(
            f"cannot read {source}: expected .txt, .jsonl or .parquet "
            f"with a column {text_column!r} ({error})"
        ) from error
    except (OSError, HTTPError) as error:
        raise FileNotFoundError(
            f"the data set {str(source)!r} is neither a local file nor one the hub gave: check the "
            f"name and the network, or give a local copy ({error})"
        ) from error


def token_rows(
    documents: Iterable[str],
    lm: LanguageModel,
    context_size: int,
    max_tokens: float = math.inf,
    progress: bool = False,
) -> Tensor:
    """Token ids [R, L] int32: documents joined by the separator, cut to the context, BOS first.

    Rows are built here because tokenizers differ in their padding and BOS rules. At most
    `max_tokens` ids are kept, and an incomplete last row is dropped. Raises ValueError where the
    documents do not fill one row.
    """
    if context_size < 2:
        raise ValueError(f"context_size = {context_size} must be at least 2: BOS and one token")
    ids = tokenize(documents, lm, max_tokens, progress)
    length = context_size - 1
    n = int(min(len(ids), max_tokens)) // length
    if n == 0:
        raise ValueError(
            f"the corpus is empty or too small: {len(ids)} tokens do not fill one row "
            f"of {context_size}"
        )
    text = torch.frombuffer(ids, dtype=torch.int32)[: n * length].view(n, length)
    largest = int(text.max())
    if largest >= lm.n_vocab:
        raise ValueError(
            f"token id {largest} lies beyond the embedding of {lm.n_vocab} rows: "
            "is this the model's tokenizer?"
        )
    bos = torch.full((n, 1), lm.bos_id, dtype=torch.int32)
    return torch.cat([bos, text], dim=1)


def tokenize(
    documents: Iterable[str], lm: LanguageModel, max_tokens: float, progress: bool
) -> array:
    """Ids of the documents, each followed by the separator, until there are `max_tokens`."""
    ids, documents = array("i"), iter(documents)  # four bytes per token
    total = None if max_tokens == math.inf else int(max_tokens)
    with tqdm(
        total=total, desc="reading text", unit="tok", unit_scale=True, disable=not progress
    ) as bar:
        while len(ids) < max_tokens and (batch := list(islice(documents, 512))):
            encoded = lm.tokenizer(batch, add_special_tokens=False, verbose=False)
            for document in encoded["input_ids"]:
                ids.extend([*document, lm.separator_id])
            bar.update(len(ids) - bar.n)
    return ids


def keep_mask(rows_RL: Tensor, lm: LanguageModel, include_bos: bool = False) -> Tensor:
    """Positions that count [R, L]: all but each row's first token, separators and padding.

    With `include_bos` all positions but padding count, as in the paper.
    """
    real = real_tokens(rows_RL, lm.pad_id, lm.bos_id, lm.separator_id)
    if include_bos:
        return real
    is_first = real & (real.cumsum(-1) == 1)
    return real & ~is_first & (rows_RL != lm.bos_id) & (rows_RL != lm.separator_id)


def last_tokens(ids_RL: Tensor, order: int, pad: int) -> Tensor:
    """The last N = `order` tokens at each position [R, L, N], oldest first.

    `pad` stands in before the row begins.
    """
    padded = F.pad(ids_RL.long(), (order - 1, 0), value=pad)
    return padded.unfold(1, order, 1)
