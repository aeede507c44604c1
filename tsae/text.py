"""From documents to token rows. Axes: R rows, L sequence."""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from array import array
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain, pairwise
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F
from tqdm.auto import tqdm

from tsae.documents import Document, is_broken_connection
from tsae.language_model import LanguageModel, real_tokens

BATCH_DOCUMENTS, BATCH_CHARACTERS = 512, 2**22  # tokenized together, whichever is reached first


def token_rows(
    documents: Iterable[Document],
    lm: LanguageModel,
    context_size: int,
    max_tokens: float = math.inf,
    progress: bool = False,
    partial: str | Path | None = None,
    resume: bool = False,
) -> Tensor:
    """Token ids [R, L] int32: documents joined by the separator, cut to the context, BOS first.

    Rows are built here because tokenizers differ in their padding and BOS rules. Special tokens
    that a text writes out are ordinary text. Documents of ids lose their BOS and padding. At most
    `max_tokens` ids are kept, and an incomplete last row is dropped.

    Where reading breaks off, the file `partial` keeps what was read. With `resume` the ids in that
    file are the corpus, and nothing more is read; without it, or without the file, reading begins
    at the start. A whole reading deletes the file.

    Raises ValueError where the documents do not fill one row and for ids that the model does not
    have, ConnectionError where the documents break off.
    """
    if context_size < 2:
        raise ValueError(f"context_size = {context_size} must be at least 2: BOS and one token")
    if resume and partial is None:
        raise ValueError("resume=True needs the file of an earlier reading: give partial=...")
    if resume and Path(partial).exists():
        ids = load_partial(Path(partial), lm)
        print(f"the corpus is the {len(ids):,} tokens in {partial}, kept when the text broke off")
    else:
        ids = read_ids(documents, lm, max_tokens, progress, partial and Path(partial))
    length = context_size - 1
    n_tokens = int(min(len(ids), max_tokens))
    n = n_tokens // length
    if n == 0:
        raise ValueError(
            f"the corpus is empty or too small: {n_tokens} tokens do not fill one row "
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


def read_ids(
    documents: Iterable[Document],
    lm: LanguageModel,
    max_tokens: float,
    progress: bool,
    partial: Path | None,
) -> array:
    """Ids of the documents; where these break off, `partial` keeps the ids and the error says so.

    Raises ConnectionError for a broken connection, and any other error as it is.
    """
    ids = array("i")  # four bytes per token
    try:
        tokenize(documents, lm, max_tokens, progress, ids)
    except BaseException as error:
        if partial is None or not ids:
            raise
        save_partial(partial, ids, lm)
        kept = (
            f"the {len(ids):,} tokens that were read are kept in {partial}: resume=True takes them "
            "as the whole corpus; without it, or without the file, the text is read again"
        )
        if is_broken_connection(error):
            raise ConnectionError(f"the text broke off ({error}); {kept}") from error
        error.add_note(kept)
        raise
    if partial is not None:
        partial.unlink(missing_ok=True)
    return ids


def tokenize(
    documents: Iterable[Document],
    lm: LanguageModel,
    max_tokens: float,
    progress: bool,
    ids: array,
) -> None:
    """Append the documents' ids, each followed by the separator, until there are `max_tokens`."""
    total = None if max_tokens == math.inf else int(max_tokens)
    encode = PlainText(lm.tokenizer)
    with tqdm(
        total=total, desc="reading text", unit="tok", unit_scale=True, disable=not progress
    ) as bar:
        for batch in batches(documents):
            ids.extend(joined_ids(batch, encode, lm))
            bar.update(len(ids) - bar.n)
            if len(ids) >= max_tokens:
                break


def batches(documents: Iterable[Document]) -> Iterator[list[Document]]:
    """Documents to tokenize together, those before an error included."""
    batch, size = [], 0
    try:
        for document in documents:
            batch.append(document)
            size += len(document)
            if len(batch) >= BATCH_DOCUMENTS or size >= BATCH_CHARACTERS:
                yield batch
                batch, size = [], 0
    except (Exception, KeyboardInterrupt):
        yield batch
        raise
    yield batch


class PlainText:
    """Tokenizes texts without BOS, EOS and other special tokens, also where a text names one."""

    def __init__(self, tokenizer) -> None:
        self.tokenizer = tokenizer
        added = tokenizer.added_tokens_decoder.items()
        self.special = {*tokenizer.all_special_ids, *(i for i, token in added if token.special)}
        names = map(re.escape, tokenizer.convert_ids_to_tokens(sorted(self.special)))
        self.name = re.compile(f"(?={'|'.join(names)})")
        # Slow tokenizers would split their ordinary added tokens as well.
        self.options = {"split_special_tokens": True} if tokenizer.is_fast else {}

    def __call__(self, texts: list[str]) -> list[list[int]]:
        documents = self.encode(texts)
        for i, ids in enumerate(documents):
            if not self.special.isdisjoint(ids) and len(pieces := self.pieces(texts[i])) > 1:
                documents[i] = list(chain.from_iterable(self.encode(pieces)))
        return documents

    def encode(self, texts: list[str]) -> list[list[int]]:
        options = {"add_special_tokens": False, "verbose": False, **self.options}
        return self.tokenizer(texts, **options)["input_ids"] if texts else []

    def pieces(self, text: str) -> list[str]:
        """The text cut after the first character of every special token's name."""
        cuts = (match.start() + 1 for match in self.name.finditer(text))
        return [text[a:b] for a, b in pairwise([0, *cuts, len(text)]) if a < b]


def joined_ids(documents: list[Document], encode: PlainText, lm: LanguageModel) -> array:
    """Ids of the documents, each followed by one separator."""
    texts = iter(encode([document for document in documents if isinstance(document, str)]))
    joined = array("i")
    for document in documents:
        if isinstance(document, str):
            joined.extend([*next(texts), lm.separator_id])
        elif ids := bare_ids(document, lm):
            joined.extend(ids if ids[-1] == lm.separator_id else [*ids, lm.separator_id])
    return joined


def bare_ids(document: Sequence[int], lm: LanguageModel) -> list[int]:
    """A document's ids without padding and BOS. Raises ValueError for ids that are not the model's.

    Token 0, which stands in where a tokenizer has neither BOS nor EOS, is text and stays.
    """
    ids = torch.tensor(document, dtype=torch.long)
    if ids.numel() and getattr(document, "padded", True):
        ids = ids[real_tokens(ids[None], lm.pad_id, lm.bos_id, lm.separator_id)[0]]
    limit = min(len(lm.tokenizer), lm.n_vocab)
    if wrong := ids[(ids < 0) | (ids >= limit)].tolist():
        raise ValueError(
            f"{getattr(document, 'place', 'a document')} holds the token id {wrong[0]}; those of "
            f"{lm.name} are 0 to {limit - 1}: was it tokenized for another model?"
        )
    has_bos = lm.bos_id in (lm.tokenizer.bos_token_id, lm.tokenizer.eos_token_id)
    start = int(has_bos and ids[:1].tolist() == [lm.bos_id])
    return ids[start:].tolist()


# -- what was read before a text broke off --


def vocabulary_hash(lm: LanguageModel) -> str:
    """SHA-256 of the tokenizer's vocabulary."""
    vocabulary = json.dumps(sorted(lm.tokenizer.get_vocab().items()))
    return hashlib.sha256(vocabulary.encode()).hexdigest()


def save_partial(path: Path, ids: array, lm: LanguageModel) -> None:
    """Write ids [n] int32 and the hash of their vocabulary, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.partial")
    tensors = {"ids": torch.frombuffer(ids, dtype=torch.int32)}
    save_file(tensors, temporary, {"vocabulary": vocabulary_hash(lm)})
    temporary.replace(path)


def load_partial(path: Path, lm: LanguageModel) -> array:
    """Ids that `save_partial` wrote. Raises ValueError for another vocabulary or another file."""
    try:
        with safe_open(path, "pt") as file:
            vocabulary = (file.metadata() or {}).get("vocabulary")
            ids = file.get_tensor("ids")
    except SafetensorError as error:
        raise ValueError(
            f"{path} holds no kept tokens ({error}): delete it to read the text from the start"
        ) from error
    if vocabulary != vocabulary_hash(lm):
        raise ValueError(
            f"the tokens in {path} are of another tokenizer than {lm.name}'s: delete the file to "
            "read the text from the start"
        )
    return array("i", ids.numpy().tobytes())


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
