"""Shuffled activations of a language model.

Axes: R rows, L sequence, B batch (tokens), D d_model, V vocabulary, N n-gram order.
"""

from __future__ import annotations

import hashlib
import math
import time
import warnings
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from itertools import islice

import torch
from torch import Tensor

from tsae.language_model import LanguageModel
from tsae.text import keep_mask, last_tokens

ENDLESS = 2**31
Batch = tuple[Tensor | dict[str, Tensor], Tensor]
MAX_NORM_RATIO = 10.0  # activations above this multiple of the median norm are massive
SAMPLE = 16_384  # activations whose median norm is taken


def norm_limit(norms: Tensor, ratio: float = MAX_NORM_RATIO) -> float:
    """`ratio` times the median of the first 16,384 norms."""
    return ratio * norms[:SAMPLE].float().median().item()


def max_norms_of(
    lm: LanguageModel, rows_RL: Tensor, hooks: Iterable[str], ratio: float = MAX_NORM_RATIO
) -> dict[str, float]:
    """The limit at each hook for rows of text, in their order; infinity where nothing counts."""
    norms: dict[str, list[Tensor]] = {hook: [] for hook in hooks}
    for ids in rows_RL.split(32) if ratio < math.inf else ():
        keep = keep_mask(ids, lm).to(lm.device)
        for hook, x in lm.activations(ids, norms).items():
            norms[hook].append(require_finite(x[keep], hook).norm(dim=-1))
        if sum(map(len, norms[hook])) >= SAMPLE:
            break
    every = {hook: torch.cat(parts) if parts else torch.empty(0) for hook, parts in norms.items()}
    return {hook: norm_limit(n, ratio) if len(n) else math.inf for hook, n in every.items()}


def max_norm_of(
    lm: LanguageModel, rows_RL: Tensor, hook_name: str, ratio: float = MAX_NORM_RATIO
) -> float:
    """The limit at one hook."""
    return max_norms_of(lm, rows_RL, [hook_name], ratio)[hook_name]


def warn_of_massive(share: float, hook_name: str) -> None:
    """Warn where more than a hundredth of the positions are left out."""
    if share > 0.01:
        warnings.warn(
            f"{share:.1%} of the positions at {hook_name} have massive activations and are left "
            "out: another layer may suit better",
            stacklevel=3,
        )


class ActivationStream:
    """Endless shuffled batches (x_BD fp32, tokens_BN int64) of one hook point; the seed fixes them.

    Any hook point of LanguageModel.activations will do; padding in the rows is left out. With a
    list of hooks x is a dict of batches by hook, all of one pass of the model, and `train` gives
    every SAE those of its cfg.hook_name.

    Rows are visited in a new random order each epoch. A preallocated buffer is filled, shuffled and
    drained; activations that do not fill a batch are dropped. A place in the stream is therefore
    two numbers, `position`: buffers drained, and batches taken from the next. `batches(position)`
    resumes there by harvesting that buffer again.

    Massive activations, longer than `max_norm` (`max_norm_ratio` times the median norm of the first
    16,384 in the order of the rows; inf: no limit), are left out: attention sinks of modern models,
    whose squared error would drown all others. With `include_bos` there is no limit. `limits` has
    max_norm by hook; with several hooks a position must keep below all of them.

    tokens_BN holds the last N tokens up to the one the activation sits on (N = 1 in the paper).
    Raises ValueError for a batch larger than the buffer and for an unknown hook.
    """

    def __init__(
        self,
        lm: LanguageModel,
        rows_RL: Tensor,
        hook_name: str | Sequence[str],
        batch_size: int = 4096,
        buffer_tokens: int = 2**17,
        seed: int = 0,
        order: int = 1,
        include_bos: bool = False,
        harvest_rows: int = 32,
        max_norm_ratio: float = MAX_NORM_RATIO,
    ) -> None:
        if batch_size > buffer_tokens:
            raise ValueError(
                f"batch_size = {batch_size} must not exceed buffer_tokens = {buffer_tokens}"
            )
        self.hooks = [hook_name] if isinstance(hook_name, str) else list(hook_name)
        for hook in self.hooks:
            lm.require_hook(hook)
        lm.require_rows(rows_RL)
        self.lm, self.rows, self.hook_name = lm, rows_RL, hook_name
        self.batch_size, self.seed = batch_size, seed
        self.order, self.include_bos = order, include_bos
        self.harvest_rows = harvest_rows  # rows per pass of the language model
        self.rows_per_buffer = max(1, buffer_tokens // rows_RL.shape[1])
        size = self.rows_per_buffer * rows_RL.shape[1]
        self.x = {hook: torch.empty(size, lm.d_model, device=lm.device) for hook in self.hooks}
        self.tokens = torch.empty(size, order, dtype=torch.int64, device=lm.device)
        self.seconds = 0.0  # spent in the language model
        self.position = (0, 0)  # of the batch that comes next
        self.max_norm_ratio = math.inf if include_bos else max_norm_ratio
        self.seen, self.massive = 0, 0  # activations harvested, and left out among them
        self.limits = max_norms_of(lm, rows_RL, self.hooks, self.max_norm_ratio)

    @property
    def max_norm(self) -> float:
        """The norm above which activations are left out. Raises ValueError with several hooks."""
        if len(self.limits) > 1:
            raise ValueError("there is a limit for each hook: see `limits`")
        return next(iter(self.limits.values()))

    @cached_property
    def digest(self) -> int:
        """A number that tells these rows from others."""
        raw = memoryview(self.rows.cpu().contiguous().numpy()).cast("B")
        return int.from_bytes(hashlib.sha256(raw).digest()[:7])

    def _row_order(self, start: int) -> Iterator[int]:
        """Row numbers in the order of visits, from the `start`-th visit on."""
        n = len(self.rows)
        for epoch in range(start // n, ENDLESS):
            generator = torch.Generator().manual_seed(1_000_003 * self.seed + epoch)
            order = torch.randperm(n, generator=generator).tolist()
            yield from order[max(0, start - epoch * n) :]

    def _fill(self, row_numbers: list[int]) -> int:
        """Harvest these rows into the buffer; returns how many activations it holds."""
        n = 0
        for i in range(0, len(row_numbers), self.harvest_rows):
            ids = self.rows[row_numbers[i : i + self.harvest_rows]].long()
            keep = keep_mask(ids, self.lm, self.include_bos)
            found = self.lm.activations(ids, self.hooks)
            here = keep.to(self.lm.device)
            for hook, x in found.items():
                norms = x.norm(dim=-1)
                # infinity is an error, below
                here = here & (~(norms > self.limits[hook]) | norms.isinf())
            tokens = last_tokens(ids, self.order, self.lm.bos_id).to(self.lm.device)[here]
            n_seen = int(keep.sum())
            self.seen += n_seen
            self.massive += n_seen - len(tokens)
            for hook, x in found.items():
                self.x[hook][n : n + len(tokens)] = x[here]
            self.tokens[n : n + len(tokens)] = tokens
            n += len(tokens)
        for hook, x in self.x.items():
            require_finite(x[:n], hook)
        warn_of_massive(self.massive / max(1, self.seen), ", ".join(self.hooks))
        return n

    def __iter__(self) -> Iterator[Batch]:
        return self.batches()

    def batches(self, position: tuple[int, int] = (0, 0)) -> Iterator[Batch]:
        """Batches from a place in the stream onwards.

        Raises ValueError where a buffer does not fill one batch.
        """
        first_buffer, first_batch = position
        row_order = self._row_order(first_buffer * self.rows_per_buffer)
        for buffer in range(first_buffer, ENDLESS):
            started = time.perf_counter()
            n = self._fill(list(islice(row_order, self.rows_per_buffer)))
            self.seconds += time.perf_counter() - started
            if n < self.batch_size:
                raise ValueError(
                    f"a buffer of {n} activations does not fill one batch of {self.batch_size}: "
                    "raise buffer_tokens"
                )
            generator = torch.Generator().manual_seed(2_000_003 * self.seed + buffer)
            shuffled = torch.randperm(n, generator=generator).to(self.lm.device)
            begin = first_batch if buffer == first_buffer else 0
            for i in range(begin, n // self.batch_size):
                batch = shuffled[i * self.batch_size : (i + 1) * self.batch_size]
                self.position = (buffer, i + 1)
                x = {hook: buffered[batch] for hook, buffered in self.x.items()}
                yield x if len(x) > 1 else x[self.hooks[0]], self.tokens[batch]


def require_finite(x: Tensor, hook_name: str) -> Tensor:
    """x itself. Raises ValueError where it contains NaN or infinity."""
    if not torch.isfinite(x).all():
        raise ValueError(
            f"activations at {hook_name} contain NaN or infinity: check the model, "
            "or load it with bf16=False"
        )
    return x
