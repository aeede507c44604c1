"""Unigram, bigram and Kneser-Ney trigram language models: what the testbed model is compared with."""

from __future__ import annotations

import numpy as np

ADD = 1.0  # pseudo-count of the unigram and bigram baselines' unigram (no held-out token has probability zero)


def _counts(keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return np.unique(keys, return_counts=True)


def _lookup(table: tuple[np.ndarray, np.ndarray], keys: np.ndarray) -> np.ndarray:
    """Count of each key, 0 where unseen."""
    values, counts = table
    at = np.minimum(np.searchsorted(values, keys), len(values) - 1)
    return np.where(values[at] == keys, counts[at], 0)


def _discount(counts: np.ndarray) -> float:
    """Ney's estimate n1 / (n1 + 2 n2) of the absolute discount; 0.75 where there are too few singletons."""
    n1, n2 = int((counts == 1).sum()), int((counts == 2).sum())
    return n1 / (n1 + 2 * n2) if n1 and n2 else 0.75


class KneserNey:
    """Interpolated Kneser-Ney of order 3 with one discount per order (Kneser and Ney 1995; Chen and Goodman 1999).

    p3(w|uv) = max(c(uvw) - D3, 0) / c(uv.) + D3 N1+(uv.) / c(uv.) * p2(w|v)
    p2(w|v)  = max(N1+(.vw) - D2, 0) / N1+(.v.) + D2 N1+(v.) / N1+(.v.) * p1(w)
    p1(w)    = (N1+(.w) + 1) / (N1+(..) + V)
    """

    def __init__(self, stream: np.ndarray, vocab: int) -> None:
        """`stream`: [T] token ids, documents joined by BOS."""
        self.V = vocab
        s = stream.astype(np.int64)
        self.tri = _counts((s[:-2] * vocab + s[1:-1]) * vocab + s[2:])
        u_v, v_w = self.tri[0] // vocab, self.tri[0] % vocab**2
        self.tri_context = _group(u_v, self.tri[1])
        self.tri_types = _counts(u_v)
        self.bi = _counts(v_w)  # N1+(.vw): the number of different u before vw
        self.bi_context = _group(self.bi[0] // vocab, self.bi[1])
        self.bi_types = _counts(self.bi[0] // vocab)
        self.uni = _counts(self.bi[0] % vocab)  # N1+(.w)
        self.d3, self.d2 = _discount(self.tri[1]), _discount(self.bi[1])

    def p1(self, w: np.ndarray) -> np.ndarray:
        return (_lookup(self.uni, w) + 1) / (self.uni[1].sum() + self.V)

    def p2(self, v: np.ndarray, w: np.ndarray) -> np.ndarray:
        total = _lookup(self.bi_context, v)
        high = np.maximum(_lookup(self.bi, v * self.V + w) - self.d2, 0)
        back = self.d2 * _lookup(self.bi_types, v)
        return np.where(total > 0, (high + back * self.p1(w)) / np.maximum(total, 1), self.p1(w))

    def p3(self, u: np.ndarray, v: np.ndarray, w: np.ndarray) -> np.ndarray:
        uv = u * self.V + v
        total = _lookup(self.tri_context, uv)
        high = np.maximum(_lookup(self.tri, uv * self.V + w) - self.d3, 0)
        back, low = self.d3 * _lookup(self.tri_types, uv), self.p2(v, w)
        return np.where(total > 0, (high + back * low) / np.maximum(total, 1), low)


def _group(keys: np.ndarray, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Sum of weights by key, for keys already sorted."""
    values, start = np.unique(keys, return_index=True)
    return values, np.add.reduceat(weights, start)


def evaluate(docs: list[np.ndarray], held: np.ndarray, bos: int, vocab: int) -> dict[str, float]:
    """Cross-entropy in nats on held-out rows [R, L]; the prediction at BOS and of separators is left out."""
    stream = np.concatenate([np.concatenate([[bos], d]) for d in docs]).astype(np.int64)
    kn = KneserNey(stream, vocab)
    rows = held.astype(np.int64)
    keep = rows[:, 2:] != bos
    u, v, w = (x[keep] for x in (rows[:, :-2], rows[:, 1:-1], rows[:, 2:]))
    unigram = (np.bincount(stream, minlength=vocab) + ADD) / (len(stream) + ADD * vocab)
    bi, context = _counts(stream[:-1] * vocab + stream[1:]), np.bincount(stream[:-1], minlength=vocab)
    types = np.bincount(bi[0] // vocab, minlength=vocab)
    d = _discount(bi[1])
    high = np.maximum(_lookup(bi, v * vocab + w) - d, 0)
    bigram = np.where(context[v] > 0, (high + d * types[v] * unigram[w]) / np.maximum(context[v], 1), unigram[w])
    nll = {"unigram": unigram[w], "bigram": bigram, "kneser_ney_trigram": kn.p3(u, v, w)}
    return {name: float(-np.log(p).mean()) for name, p in nll.items()}
