"""The testbed's corpus and its n-gram baselines."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest

from conftest import ROOT
from testbed import corpus, ngram
from testbed.corpus import Document


def test_splits_follow_from_the_place_alone():
    assert corpus.split_of("a", "b", "c") == corpus.split_of("a", "b", "c")
    share = {s: 0 for s in corpus.SPLITS}
    for i in range(20_000):
        share[corpus.split_of("package", "module", f"f{i}")] += 1 / 20_000
    for split, expected in corpus.SPLITS.items():
        assert abs(share[split] - expected) < 0.015


def test_repeats_are_removed_across_splits():
    words = [f"word{i}" for i in range(400)]
    text = " ".join(words[:60])
    near = " ".join([*words[:30], "changed", *words[31:60]])  # one word of sixty differs
    fresh = " ".join(words[100:160])
    documents = [
        Document("heldout", "p", "m", "a", near),
        Document("lm", "p", "m", "b", text),
        Document("sae", "p", "m", "c", fresh),
        Document("heldout", "p", "m", "d", " ".join(words[200:260])),
    ]
    assert [d.name for d in corpus.drop_repeats(documents)] == ["b", "c", "d"]
    assert (
        corpus.overlap(documents[:2]) > 0.7 and corpus.overlap(corpus.drop_repeats(documents)) == 0
    )


def test_short_repeats_are_removed_too():
    documents = [Document("lm", "p", "m", str(i), "Return a copy of self.") for i in range(3)]
    assert len(corpus.drop_repeats(documents)) == 1


def test_docstrings_of_a_file(tmp_path):
    body = "A docstring that is long enough to be taken as a document."
    path = tmp_path / "x.py"
    path.write_text(
        f'"""{body}"""\nclass A:\n    """{body} Class."""\n    if True:\n        def f(self):\n'
        f'            """{body} Method."""\n'
        'def g():\n    """Short."""\n'
    )
    found = corpus.docstrings_of_file(path, "p", "p.x")
    assert [d.name for d in found] == ["", "A", "A.f"] and found[0].text == body
    path.write_text("def broken(:\n")
    assert corpus.docstrings_of_file(path, "p", "p.x") == []


def test_the_order_does_not_depend_on_the_run():
    """Read from the sources, not from the cache, with different hash seeds of Python."""
    code = (
        "from testbed import corpus; import hashlib; d = corpus.drop_repeats(corpus.docstrings_of_package('tornado'));"
        "print(len(d), hashlib.sha256(repr(d).encode()).hexdigest())"
    )
    runs = {
        subprocess.run(
            [sys.executable, "-c", code],
            cwd=ROOT,
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in "01"
    }
    assert len(runs) == 1 and int(runs.pop().split()[0]) > 100


def test_a_missing_package_is_said(monkeypatch, tmp_path):
    """Another machine lacks a package, or has one without metadata: the corpus is made of the rest and says so."""
    root = corpus.package_root
    monkeypatch.setattr(
        corpus, "PACKAGES", {"tornado": "tornado", "gone": "gone", "mpmath": "no-such-distribution"}
    )
    monkeypatch.setattr(corpus, "package_root", lambda p: None if p == "gone" else root(p))
    monkeypatch.setenv("TSAE_CACHE", str(tmp_path))
    assert corpus.versions() == {"tornado": "6.6.1", "gone": "missing", "mpmath": "unknown"}
    documents, manifest = corpus.load.__wrapped__(progress=False)
    assert manifest["missing"] == ["gone"] and {d.package for d in documents} == {
        "tornado",
        "mpmath",
    }


def test_heldout_overlap_is_low():
    assert corpus.overlap(corpus.load(progress=False)[0]) < 0.1


def test_unknown_split():
    with pytest.raises(
        ValueError, match="unknown split 'test': expected one of lm, sae, tune, heldout"
    ):
        corpus.documents("test")


def test_kneser_ney_by_hand():
    """Stream 0 1 2 0 1 3, V = 4: every number worked out on paper.

    Trigrams 012 120 201 013, once each: no count of 2, so both discounts are 0.75. Bigram types vw with a left neighbour:
    12 20 01 13. p1(w) = (types ending in w + 1) / (4 + 4): each of 0, 1, 2, 3 ends one type, so 2 / 8.
    p2(2|1): N1+(.1.) = 2 (12, 13): (1 - .75) / 2 + .75 * 2 / 2 * .25 = .3125.
    p3(2|0 1): c(0 1 .) = 2, two types: (1 - .75) / 2 + .75 * 2 / 2 * .3125 = .359375.
    p3(0|3 3): context unseen, and 3 was never a middle word: p1(0) = .25.
    """
    kn = ngram.KneserNey(np.array([0, 1, 2, 0, 1, 3]), 4)
    a = lambda *i: np.array(i)  # noqa: E731
    assert (kn.d3, kn.d2) == (0.75, 0.75)
    assert kn.p1(a(0, 1, 2, 3)) == pytest.approx([0.25] * 4)
    assert kn.p2(a(1), a(2)) == pytest.approx(0.3125)
    assert kn.p3(a(0), a(1), a(2)) == pytest.approx(0.359375)
    assert kn.p3(a(3), a(3), a(0)) == pytest.approx(0.25)


@pytest.mark.parametrize("context", [(0, 1), (1, 2), (3, 3), (5, 0)])
def test_kneser_ney_is_a_distribution(context):
    stream = np.random.default_rng(0).integers(0, 8, 300)
    kn, w = ngram.KneserNey(stream, 10), np.arange(10)
    u, v = (np.full(10, c) for c in context)
    assert kn.p3(u, v, w).sum() == pytest.approx(1) and (kn.p3(u, v, w) > 0).all()
    assert kn.p2(v, w).sum() == pytest.approx(1) and kn.p1(w).sum() == pytest.approx(1)
