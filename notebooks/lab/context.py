"""What the parts of the lab need of a notebook's `Lab`, so that they need not import it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

import torch

import tsae_utils as tu
from tsae.documents import Document

from .profiles import Profile


class Context(Protocol):
    """The state of a notebook, and the data that one part takes from another."""

    id: str  # of the figure
    p: Profile
    out: Path  # folder of figures and CSVs
    cache: Path
    replay: bool  # read committed CSVs instead of training
    started: float  # seconds since the epoch
    lm: tu.LanguageModel
    model_name: str
    context_size: int
    weights_sha256: str
    corpus_hash: str
    looks_at_final: bool  # whether the split `final` was read
    train_rows: torch.Tensor  # [R, L]

    def hook(self, layer: int) -> str: ...

    def documents(self, split: str, corpus: str = "") -> Iterator[Document]: ...

    def rows(self, split: str, tokens: float, corpus: str = "") -> torch.Tensor: ...

    def unigrams(self, layer: int) -> torch.Tensor: ...

    def table_start(self, kind: str, layer: int) -> torch.Tensor: ...

    def max_norm(self, layer: int) -> float: ...
