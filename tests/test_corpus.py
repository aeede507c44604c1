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


def test_the_split_follows_from_the_place_alone():
    assert corpus.split_of("a", "b", "c") == corpus.split_of("a", "b", "c")
    share = dict.fromkeys(corpus.SPLITS, 0.0)
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
    kept = corpus.drop_repeats(documents)
    assert [document.name for document in kept] == ["b", "c", "d"]
    assert corpus.overlap(documents[:2]) > 0.7
    assert corpus.overlap(kept) == 0


def test_short_repeats_are_removed_too():
    documents = [Document("lm", "p", "m", str(i), "Return a copy of self.") for i in range(3)]
    assert len(corpus.drop_repeats(documents)) == 1


def test_docstrings_of_a_file(tmp_path):
    body = "A docstring that is long enough to be taken as a document."
    path = tmp_path / "x.py"
    lines = [
        f'"""{body}"""',
        "class A:",
        f'    """{body} Class."""',
        "    if True:",
        "        def f(self):",
        f'            """{body} Method."""',
        "def g():",
        '    """Short."""',
    ]
    path.write_text("\n".join(lines) + "\n")
    documents = corpus.docstrings_of_file(path, "p", "p.x")
    assert [document.name for document in documents] == ["", "A", "A.f"]
    assert documents[0].text == body
    path.write_text("def broken(:\n")
    assert corpus.docstrings_of_file(path, "p", "p.x") == []


DIGEST = """
import hashlib
from testbed import corpus
documents = corpus.drop_repeats(corpus.docstrings_of_package("tornado"))
print(len(documents), hashlib.sha256(repr(documents).encode()).hexdigest())
"""


def test_the_order_does_not_depend_on_the_run():
    """Two hash seeds of Python; the sources are read, not the cache."""
    outputs = set()
    for seed in "01":
        environment = {**os.environ, "PYTHONHASHSEED": seed}
        run = [sys.executable, "-c", DIGEST]
        options = {"cwd": ROOT, "env": environment, "check": True}
        outputs.add(subprocess.run(run, capture_output=True, text=True, **options).stdout)
    assert len(outputs) == 1
    assert int(outputs.pop().split()[0]) > 100


def test_a_missing_package_is_recorded(monkeypatch, tmp_path):
    """Where packages are missing, the corpus is made of the rest and says so.

    One package is not installed, another has no metadata.
    """
    packages = {"tornado": "tornado", "gone": "gone", "mpmath": "no-such-distribution"}
    package_root = corpus.package_root
    monkeypatch.setattr(corpus, "PACKAGES", packages)
    monkeypatch.setattr(
        corpus, "package_root", lambda name: None if name == "gone" else package_root(name)
    )
    monkeypatch.setenv("TSAE_CACHE", str(tmp_path))
    assert corpus.versions() == {"tornado": "6.6.1", "gone": "missing", "mpmath": "unknown"}
    documents, manifest = corpus.load.__wrapped__(progress=False)
    assert manifest["missing"] == ["gone"]
    assert {document.package for document in documents} == {"tornado", "mpmath"}


def test_heldout_overlap_is_low():
    assert corpus.overlap(corpus.load(progress=False)[0]) < 0.1


def test_unknown_split():
    message = "unknown split 'test': expected one of lm, sae, tune, heldout, final"
    with pytest.raises(ValueError, match=message):
        corpus.documents("test")


def test_kneser_ney_by_hand():
    """Stream 0 1 2 0 1 3 with V = 4: every number is worked out on paper.

    The trigrams 012, 120, 201 and 013 occur once each. With no count of 2, both discounts are 0.75.
    The bigram types with a left neighbour are 12, 20, 01 and 13.
    p1(w) = (types ending in w + 1) / (4 + 4) = 2 / 8, as each of 0, 1, 2, 3 ends one type.
    p2(2 | 1) = (1 - .75) / 2 + .75 * 2 / 2 * .25 = .3125, as two types start with 1 (12 and 13).
    p3(2 | 0 1) = (1 - .75) / 2 + .75 * 2 / 2 * .3125 = .359375, as 01 precedes 2 types.
    p3(0 | 3 3) = p1(0) = .25, as 33 is unseen and 3 is never a middle word.
    """
    kn = ngram.KneserNey(np.array([0, 1, 2, 0, 1, 3]), 4)

    def words(*ids):
        return np.array(ids)

    assert (kn.d3, kn.d2) == (0.75, 0.75)
    assert kn.p1(words(0, 1, 2, 3)) == pytest.approx([0.25] * 4)
    assert kn.p2(words(1), words(2)) == pytest.approx(0.3125)
    assert kn.p3(words(0), words(1), words(2)) == pytest.approx(0.359375)
    assert kn.p3(words(3), words(3), words(0)) == pytest.approx(0.25)


@pytest.mark.parametrize("context", [(0, 1), (1, 2), (3, 3), (5, 0)])
def test_kneser_ney_is_a_distribution(context):
    stream = np.random.default_rng(0).integers(0, 8, 300)
    kn, w = ngram.KneserNey(stream, 10), np.arange(10)
    u, v = (np.full(10, word) for word in context)
    assert kn.p3(u, v, w).sum() == pytest.approx(1)
    assert (kn.p3(u, v, w) > 0).all()
    assert kn.p2(v, w).sum() == pytest.approx(1)
    assert kn.p1(w).sum() == pytest.approx(1)
