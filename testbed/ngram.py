"""Unigram, bigram and Kneser-Ney trigram language models, with which the testbed is compared."""

from __future__ import annotations

import numpy as np

# Pseudo-count of the baselines' unigrams: no held-out token has probability zero.
PSEUDO_COUNT = 1.0

Counts = tuple[np.ndarray, np.ndarray]  # sorted keys and the count of each


def _counts(keys: np.ndarray) -> Counts:
    return np.unique(keys, return_counts=True)


def _lookup(table: Counts, keys: np.ndarray) -> np.ndarray:
    """Count of each key, 0 for unseen keys."""
    values, counts = table
    positions = np.minimum(np.searchsorted(values, keys), len(values) - 1)
    return np.where(values[positions] == keys, counts[positions], 0)


def _discount(counts: np.ndarray) -> float:
    """Ney's estimate n1 / (n1 + 2 n2) of the absolute discount; 0.75 if n1 or n2 is zero."""
    n1, n2 = int((counts == 1).sum()), int((counts == 2).sum())
    return n1 / (n1 + 2 * n2) if n1 and n2 else 0.75


def _group(keys: np.ndarray, weights: np.ndarray) -> Counts:
    """Sum of weights by key, for sorted keys."""
    values, start = np.unique(keys, return_index=True)
    return values, np.add.reduceat(weights, start)


class KneserNey:
    """Interpolated Kneser-Ney of order 3 with one discount per order.

    p3(w|uv) = max(c(uvw) - D3, 0) / c(uv.) + D3 N1+(uv.) / c(uv.) * p2(w|v)
    p2(w|v)  = max(N1+(.vw) - D2, 0) / N1+(.v.) + D2 N1+(v.) / N1+(.v.) * p1(w)
    p1(w)    = (N1+(.w) + 1) / (N1+(..) + V)

    Kneser and Ney 1995; Chen and Goodman 1999.
    """

    def __init__(self, stream: np.ndarray, n_vocab: int) -> None:
        """`stream`: [T] token ids, documents joined by BOS."""
        self.n_vocab = n_vocab
        s = stream.astype(np.int64)
        self.trigrams = _counts((s[:-2] * n_vocab + s[1:-1]) * n_vocab + s[2:])
        keys, counts = self.trigrams
        u_v, v_w = keys // n_vocab, keys % n_vocab**2
        self.trigram_contexts = _group(u_v, counts)
        self.trigram_types = _counts(u_v)
        self.bigrams = _counts(v_w)  # N1+(.vw): the number of different u before vw
        keys, counts = self.bigrams
        self.bigram_contexts = _group(keys // n_vocab, counts)
        self.bigram_types = _counts(keys // n_vocab)
        self.unigrams = _counts(keys % n_vocab)  # N1+(.w)
        self.d3, self.d2 = _discount(self.trigrams[1]), _discount(self.bigrams[1])

    def p1(self, w: np.ndarray) -> np.ndarray:
        return (_lookup(self.unigrams, w) + 1) / (self.unigrams[1].sum() + self.n_vocab)

    def p2(self, v: np.ndarray, w: np.ndarray) -> np.ndarray:
        total = _lookup(self.bigram_contexts, v)
        high = np.maximum(_lookup(self.bigrams, v * self.n_vocab + w) - self.d2, 0)
        back = self.d2 * _lookup(self.bigram_types, v)
        low = self.p1(w)
        return np.where(total > 0, (high + back * low) / np.maximum(total, 1), low)

    def p3(self, u: np.ndarray, v: np.ndarray, w: np.ndarray) -> np.ndarray:
        uv = u * self.n_vocab + v
        total = _lookup(self.trigram_contexts, uv)
        high = np.maximum(_lookup(self.trigrams, uv * self.n_vocab + w) - self.d3, 0)
        back = self.d3 * _lookup(self.trigram_types, uv)
        low = self.p2(v, w)
        return np.where(total > 0, (high + back * low) / np.maximum(total, 1), low)


def evaluate(
    documents: list[np.ndarray], heldout: np.ndarray, bos: int, n_vocab: int
) -> dict[str, float]:
    """Cross-entropy in nats on held-out rows [R, L].

    The prediction made at BOS and predictions of separators are left out.
    """
    stream = np.concatenate([np.concatenate([[bos], d]) for d in documents]).astype(np.int64)
    kneser_ney = KneserNey(stream, n_vocab)
    rows = heldout.astype(np.int64)
    keep = rows[:, 2:] != bos
    u, v, w = (x[keep] for x in (rows[:, :-2], rows[:, 1:-1], rows[:, 2:]))
    token_counts = np.bincount(stream, minlength=n_vocab)
    unigram = (token_counts + PSEUDO_COUNT) / (len(stream) + PSEUDO_COUNT * n_vocab)
    bigrams = _counts(stream[:-1] * n_vocab + stream[1:])
    contexts = np.bincount(stream[:-1], minlength=n_vocab)
    types = np.bincount(bigrams[0] // n_vocab, minlength=n_vocab)
    discount = _discount(bigrams[1])
    high = np.maximum(_lookup(bigrams, v * n_vocab + w) - discount, 0)
    interpolated = (high + discount * types[v] * unigram[w]) / np.maximum(contexts[v], 1)
    probabilities = {
        "unigram": unigram[w],
        "bigram": np.where(contexts[v] > 0, interpolated, unigram[w]),
        "kneser_ney_trigram": kneser_ney.p3(u, v, w),
    }
    return {name: float(-np.log(p).mean()) for name, p in probabilities.items()}
