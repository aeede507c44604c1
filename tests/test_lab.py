"""What the notebooks share: cached training, splits, claims, redraws, labels, command line."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from itertools import pairwise

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lab import (
    HALF,
    LOOKUP,
    PROFILES,
    SYSTEMS,
    Interval,
    Lab,
    SAESpec,
    bootstrap_interval,
    label_lines,
    paired_interval,
    training,
    tu,
)
from lab import claims as lab_claims
from lab.claims import (
    COLUMNS,
    PAPER_VERDICTS,
    VERDICTS,
    Evidence,
    decide,
    read_claims,
    scorecard,
)
from lab.profiles import GPT2
from lab.style import spread

from conftest import ROOT, save_model

ONE_SEED = Interval(0.5, -np.inf, np.inf)


def use_small_model(folder, texts, monkeypatch) -> None:
    """A tiny model and corpus, and output and cache in `folder`."""
    save_model(folder / "model")
    lines = "".join(json.dumps({"text": text}) + "\n" for text in texts * 5)
    (folder / "text.jsonl").write_text(lines)
    places = {"MODEL": "model", "CORPUS": "text.jsonl", "FIGURES": "figures", "CACHE": "cache"}
    for name, place in places.items():
        monkeypatch.setenv(f"TSAE_{name}", str(folder / place))


@pytest.fixture
def lab(tmp_path, texts, monkeypatch) -> Lab:
    use_small_model(tmp_path, texts, monkeypatch)
    return Lab("fig6_pareto", "smoke")


# -- training --


def test_training_is_cached_by_configuration(lab, monkeypatch):
    spec = SAESpec("topk+lookup", 32, 2, 1e-2, **LOOKUP)
    first = lab.train_or_load({"a": spec}, 1, 0, 1024)["a"]
    trained = []

    def train(saes, *_, **__):
        trained.append(list(saes))
        return [{"system": name} for name in saes]

    monkeypatch.setattr(tu, "train", train)
    again = lab.train_or_load({"a": spec}, 1, 0, 1024)["a"]
    assert not trained
    assert torch.equal(first.W_dec, again.W_dec) and torch.equal(first.lookup.W, again.lookup.W)
    assert again.record["tokens"] == 1024 and again.record["spec"]["lr"] == 1e-2
    lab.train_or_load({"a": spec, "b": SAESpec("topk", 32, 2, 1e-2)}, 1, 0, 1024)
    lab.train_or_load({"a": spec}, 1, 1, 1024)
    assert trained == [["b"], ["a"]], "only another specification and another seed are trained"


def test_measurements_during_training(lab):
    """Only specifications that ask for a curve are measured.

    The first measurement precedes the first step, the last one is of the trained SAE.
    """
    with_curve = SAESpec("topk+lookup", 32, 2, 1e-2, curve=500, **LOOKUP)
    specs = {"a": with_curve, "b": SAESpec("topk", 32, 2, 1e-2)}
    saes = lab.train_or_load(specs, 1, 0, 4096)
    curve = saes["a"].record["curve"]
    assert [row["tokens"] for row in curve] == [0, 512, 1536, 4096]
    assert saes["b"].record["curve"] == []
    assert curve[0]["table_cosine"] == pytest.approx(1) and curve[-1]["table_cosine"] < 0.999
    evaluator = tu.Evaluator(lab.lm, lab.rows("heldout", 500), lab.hook(1))
    assert evaluator(saes["a"])["nmse"] == pytest.approx(curve[-1]["nmse"], rel=1e-5)
    assert [row["step"] for row in saes["b"].record["history"]] == [0, 7]


def test_mean_activation_of_a_token(lab):
    means, ids = lab.table_start("mean", 1), lab.train_rows.long()
    keep = tu.keep_mask(ids, lab.lm)
    x = lab.lm.activations(ids, [1])[1]
    token = int(ids[keep][0])
    here = x[keep & (ids == token)]
    expected = (here.sum(0) + 5 * x[keep].mean(0)) / (len(here) + 5)
    assert torch.allclose(means[token], expected, atol=1e-4)
    counts = torch.bincount(ids[keep], minlength=lab.lm.n_vocab)
    unseen = int((counts == 0).nonzero()[0])
    assert torch.allclose(means[unseen], x[keep].mean(0), atol=1e-4)


def test_tables_of_the_specifications(lab):
    def new_sae(**start) -> tu.TSAE:
        return training.new_sae(lab, SAESpec("x", 32, 2, 1e-2, **start), 1, 0)

    zero, half, plain = new_sae(start="zero"), new_sae(**LOOKUP), new_sae()
    shuffled, frozen = new_sae(start="shuffled", **HALF), new_sae(frozen=True, **LOOKUP)
    assert zero.lookup.W.abs().sum() == 0 and plain.lookup is None
    assert half.lookup.W.requires_grad and not frozen.lookup.W.requires_grad
    assert torch.equal(half.lookup.W, lab.unigrams(1) / 2)
    assert torch.equal(half.W_enc, half.W_dec.T / 2)
    assert torch.equal(plain.W_enc, plain.W_dec.T)
    assert not torch.equal(shuffled.lookup.W, half.lookup.W)
    same_rows = torch.equal(shuffled.lookup.W.sort(0).values, half.lookup.W.sort(0).values)
    assert same_rows, "the same rows in another order"


# -- text --


def test_splits_of_another_corpus_are_disjoint(lab):
    numbered = [f"w{i % 60 + 2} document {i}" for i in range(1000)]
    with open(lab.p.source.corpus, "w") as file:
        file.writelines(json.dumps({"text": text}) + "\n" for text in numbered)
    parts = {split: list(lab.documents(split)) for split in ("sae", "tune", "heldout", "final")}
    assert sorted(text for part in parts.values() for text in part) == sorted(numbered)
    assert (
        len(parts["sae"]) > 700
        and min(len(parts["heldout"]), len(parts["final"])) > 40
        and len(parts["tune"]) > 20
    )


def test_rows_are_a_sample_of_the_whole_split(lab):
    """Documents are sorted by package, so the first tokens of a split are no sample."""
    few, every = lab.rows("sae", 100 * 31), lab.rows("sae", 1e9)
    assert len(few) == 100 and len(every) > 300
    assert torch.equal(few[0], every[0]) and torch.equal(few[-1], every[-1])


# -- results --


def test_output_does_not_touch_the_record(lab):
    assert lab.out.name == "smoke-model" and not (lab.out / "x").exists()
    with pytest.raises(FileNotFoundError, match="run this notebook once before redrawing"):
        lab.read_csv()


def test_a_run_returns_what_its_files_hold(lab):
    """Six digits, and "None" and "nan" stay tokens."""
    table = pd.DataFrame({"token": ["None", "nan", "a"], "x": [1 / 3, np.nan, 2.0]})
    rates = pd.DataFrame({"lr": [1e-3]})
    df, lr = lab.run(lambda: (table, rates), "", "_lr")
    assert list(df.token) == ["None", "nan", "a"]
    assert df.x[0] == 0.333333 and np.isnan(df.x[1])
    pd.testing.assert_frame_equal(lr, rates)
    record = json.loads((lab.out / "fig6_pareto.json").read_text())
    assert record["profile"]["name"] == "smoke" and record["model"] == "model"
    assert not (lab.out / "fig6_pareto_lr.json").exists(), "one record per notebook"
    with pytest.raises(ValueError):
        lab.run(lambda: (table, rates), "", "_lr", "_third")


def test_a_redraw_reads_and_trains_nothing(lab, monkeypatch):
    first = lab.run(lambda: pd.DataFrame({"x": [1.5, 2.5]}))
    monkeypatch.setenv("TSAE_REPLAY", "1")
    redraw = Lab("fig6_pareto", "smoke")
    again = redraw.run(lambda: pytest.fail("measured in a redraw"))
    pd.testing.assert_frame_equal(again, first)
    with pytest.raises(RuntimeError, match="a redraw trains nothing"):
        redraw.train_or_load({"a": SAESpec("topk", 32, 2, 1e-2)}, 1, 0, 1024)
    with pytest.raises(FileNotFoundError, match=r"fig6_pareto_lr\.csv is not in"):
        redraw.run(lambda: pytest.fail("measured in a redraw"), "_lr")
    assert "lm" not in vars(redraw), "the language model is not loaded"


# -- intervals --


def test_intervals():
    mean, low, high = paired_interval([1.0, 2.0, 3.0])
    assert mean == 2 and low == pytest.approx(2 - 4.3027 / np.sqrt(3), rel=1e-3)
    assert high == pytest.approx(4 - low)
    assert paired_interval([1.0]) == (1.0, -np.inf, np.inf), "one seed decides nothing"
    sample = np.random.default_rng(0).normal(5, 1, 400)
    value, low, high = bootstrap_interval(np.mean, sample)
    assert low < 5.1 < 5.2 and low < value < high
    assert high - low == pytest.approx(4 * 1 / 20, rel=0.2)


def test_the_interval_of_a_ratio():
    ratio = paired_interval(np.log([2.0, 2.0, 2.0])).exp()
    assert ratio == pytest.approx((2, 2, 2)) and ratio.is_known
    assert not ONE_SEED.is_known


# -- verdicts --


@pytest.mark.parametrize(
    ("bounds", "verdict"),
    [
        ([(1, 2)], "holds"),
        ([(1, 2), (0.1, 3)], "holds"),
        ([(0, 2)], "undecided"),  # it touches the threshold
        ([(-1, 1)], "undecided"),
        ([(1, 2), (-1, 1)], "undecided"),
        ([(1, 2), (-2, -1)], "does not hold"),
        ([(-1, 1), (-2, -1)], "does not hold"),
        ([(-1, 0)], "does not hold"),
        ([(-2, -1)], "reversed"),
        ([(-2, -1), (-3, -0.1)], "reversed"),
        ([], "not tested"),
        ([(1, 2), (-np.inf, np.inf)], "not tested"),
    ],
)
def test_verdicts_by_example(bounds, verdict):
    intervals = [Interval((low + high) / 2, low, high) for low, high in bounds]
    mirrored = [Interval(-i.value, -i.high, -i.low) for i in intervals]
    assert decide(intervals, above=0) == decide(mirrored, below=0) == verdict


def test_no_effect_may_differ_from_the_threshold():
    """A ratio must be below 0.8: at 0.9 the claim fails, and only above 1 is it reversed."""
    verdicts = {}
    for low in (0.7, 0.75, 0.8, 0.95, 1.05):
        verdicts[low] = decide([Interval(low + 0.04, low, low + 0.08)], below=0.8, null=1)
    assert list(verdicts.values()) == [
        "holds",
        "undecided",
        "does not hold",
        "does not hold",
        "reversed",
    ]


def test_verdicts_of_an_equivalence_margin():
    inside, across, outside = (Interval(v, v - 0.1, v + 0.1) for v in (0.0, 0.2, 0.5))
    assert decide([inside], between=(-0.2, 0.2)) == "holds"
    assert decide([inside, across], between=(-0.2, 0.2)) == "undecided"
    assert decide([inside, across, outside], between=(-0.2, 0.2)) == "does not hold"
    assert decide([inside, ONE_SEED], between=(-0.2, 0.2)) == "not tested"


numbers = st.integers(-6, 6).map(float)  # few values, so that bounds often meet thresholds
triples = st.tuples(numbers, numbers, numbers).map(sorted)
intervals = st.lists(triples.map(lambda t: Interval(t[1], t[0], t[2])), min_size=1, max_size=4)


@given(intervals=intervals, threshold=numbers, gap=st.integers(0, 4), is_above=st.booleans())
def test_exactly_one_verdict(intervals, threshold, gap, is_above):
    """The definitions, written down again for every number line, give the verdict of `decide`.

    No effect lies on the threshold or behind it, as seen from the claimed side.
    """
    if is_above:
        null = threshold - gap
        hold = [i.low > threshold for i in intervals]
        miss = [i.high <= threshold for i in intervals]
        reverse = [i.high < null for i in intervals]
        verdict = decide(intervals, above=threshold, null=null)
    else:
        null = threshold + gap
        hold = [i.high < threshold for i in intervals]
        miss = [i.low >= threshold for i in intervals]
        reverse = [i.low > null for i in intervals]
        verdict = decide(intervals, below=threshold, null=null)
    conditions = {
        "holds": all(hold),
        "reversed": all(reverse),
        "does not hold": any(miss) and not all(reverse),
        "undecided": not any(miss) and not all(hold),
    }
    assert [name for name, is_met in conditions.items() if is_met] == [verdict]
    assert not (all(hold) and any(reverse)), "nothing holds and is reversed"


@given(intervals=intervals, first=numbers, second=numbers)
def test_exactly_one_verdict_of_a_margin(intervals, first, second):
    lowest, highest = min(first, second), max(first, second)
    conditions = {
        "holds": all(lowest < i.low and i.high < highest for i in intervals),
        "does not hold": any(i.high <= lowest or i.low >= highest for i in intervals),
    }
    conditions["undecided"] = not any(conditions.values())
    verdict = decide(intervals, between=(lowest, highest))
    assert [name for name, is_met in conditions.items() if is_met] == [verdict]


@given(intervals=intervals, threshold=numbers)
def test_opposite_claims_do_not_both_hold(intervals, threshold):
    above, below = decide(intervals, above=threshold), decide(intervals, below=threshold)
    assert (above == "holds") == (below == "reversed")
    assert (above == "reversed") == (below == "holds")
    assert "not tested" not in (above, below) and {above, below} <= set(VERDICTS)


@given(intervals=intervals, threshold=numbers, place=st.integers(0, 4))
def test_one_seed_decides_nothing(intervals, threshold, place):
    one_seed = [*intervals[:place], ONE_SEED, *intervals[place:]]
    for rule in ({"above": threshold}, {"below": threshold}, {"between": (threshold, 9)}):
        assert decide(one_seed, **rule) == "not tested"


# -- claims --


@pytest.fixture
def claims(lab, monkeypatch):
    """A lab with two claims declared, whose rules find what is given: `claims(a=1.0, b=None)`.

    Returns the saved table by claim. Thresholds are above 0.
    """
    declared = {"claim": "A claim.", "source": "paper", "rule": "a stated rule", "paper": "1"}
    lab.run(lambda: pd.DataFrame({"x": [1.0]}))

    def judge(threshold: dict = {"above": 0}, **found) -> pd.DataFrame:  # noqa: B006
        lab.claims = {id: declared | threshold for id in found}
        evidence = {k: v if isinstance(v, Evidence) else Evidence(v) for k, v in found.items()}
        rules = {id: lambda tables, e=e: e for id, e in evidence.items()}
        monkeypatch.setattr(lab_claims, "rules_of", lambda figure_id: rules)
        judge.shown = lab.judge().to_html()
        path = lab.out / "fig6_pareto_claims.csv"
        types = {"ours": str}
        return pd.read_csv(path, dtype=types, keep_default_na=False, na_values=[""]).set_index("id")

    judge.lab = lab
    return judge


def test_claims_are_declared_from_their_file(lab):
    shown = lab.declare().to_html()
    assert lab.claims == read_claims("fig6_pareto") and lab.claims
    assert all(id in shown for id in lab.claims)


def test_every_declared_claim_is_judged(claims):
    saved = claims(a=1.0, b=None)
    assert ">holds</td>" in claims.shown and ">not tested</td>" in claims.shown
    assert list(saved.reset_index().columns) == COLUMNS
    assert list(saved.verdict) == ["holds", "not tested"]
    assert "| A claim. | paper | 1 | +1.000 | 1 | **holds** |" in scorecard(saved.fillna(""))


def test_a_claim_without_a_rule_is_an_error(claims, monkeypatch):
    claims(a=1.0)
    monkeypatch.setattr(lab_claims, "rules_of", lambda figure_id: {})
    with pytest.raises(KeyError, match="a"):
        claims.lab.judge()


def test_estimates_in_words(claims):
    def words(estimates, text="{}", **options) -> str:
        ours = claims(a=Evidence(estimates, text, **options)).ours["a"]
        return "" if pd.isna(ours) else ours

    interval = Interval(0.25, 0.125, 0.375)
    assert words(0.25) == "+0.250"
    assert words(interval) == "+0.250 [+0.125, +0.375]"
    assert words(interval, fmt=".1f") == "0.2 [0.1, 0.4]"
    assert words(ONE_SEED) == "+0.500 (one seed)"
    assert words({"k=4": interval, "k=8": 1.0}) == "k=4: +0.250 [+0.125, +0.375]; k=8: +1.000"
    assert words(interval, "mean {}, paired") == "mean +0.250 [+0.125, +0.375], paired"
    assert words({"seed 0": 1.0}, "a text of its own") == "a text of its own"
    assert words(None, "nothing to measure") == "nothing to measure" and words(None) == ""


def test_claims_hold_the_estimate_that_decides(claims):
    strong, weak = Interval(3.0, 2.0, 4.0), Interval(2.5, 0.5, 4.5)
    both = Evidence({"k=4": strong, "k=8": weak}, seeds=3)
    for threshold in ({"above": 0}, {"below": 0}):
        saved = claims(threshold, a=both)
        assert saved[["estimate", "low", "high"]].values.tolist() == [[2.5, 0.5, 4.5]]
    assert set(saved.n_seeds) == {3} and set(saved.model) == {"model"}
    for estimates in (1.0, ONE_SEED, None, {"a": 1.0, "b": ONE_SEED}):  # nothing has an interval
        saved = claims(a=estimates, b=both)
        assert saved.loc["a", ["estimate", "low", "high"]].isna().all() and saved.estimate.b == 2.5


def test_only_the_papers_models_can_reproduce(claims):
    source = GPT2.source
    for name, changes, reason in (
        ("smoke", {"model": source.model, "corpus": source.corpus}, "another budget"),
        ("gpt2-lite", {}, "a tenth of the budget"),
        ("gpt2", {"corpus": "text.jsonl"}, "another corpus"),
        ("gpt2", {"model": "gpt2-medium"}, "another model"),
        ("gpt2", {"tokens": 300_000}, "a rehearsal"),
    ):
        claims.lab.p = PROFILES[name].with_changes(name, **changes)
        verdicts = list(claims(a=1.0, b=-1.0).verdict)
        assert verdicts == ["holds", "reversed"], reason


@pytest.mark.parametrize(
    ("estimates", "verdict"),
    [
        (Interval(1, 0.5, 1.5), "reproduced"),
        (Interval(1, -0.5, 2.5), "direction only"),
        ({"k=4": Interval(1, 0.5, 1.5), "k=8": Interval(1, -0.5, 2.5)}, "direction only"),
        ({"k=4": Interval(1, 0.5, 1.5), "k=8": Interval(-1, -2.5, 0.5)}, "not reproduced"),
        (Interval(-1, -2.5, 0.5), "not reproduced"),
        (Interval(-1, -1.5, -0.5), "not reproduced"),
        (ONE_SEED, "not tested"),
        (None, "not tested"),
    ],
)
def test_verdicts_on_the_papers_models(claims, estimates, verdict):
    claims.lab.p = GPT2.with_changes("gpt2", gib=4.0)  # the memory limit changes no number
    assert verdict in PAPER_VERDICTS
    assert claims(a=estimates).verdict["a"] == verdict


def test_the_direction_is_seen_from_no_effect(claims):
    """A ratio that should be below 0.8 has the paper's direction below 1."""
    claims.lab.p = GPT2
    found = claims({"below": 0.8, "null": 1}, a=0.7, b=0.9, c=1.1)
    assert list(found.verdict) == ["reproduced", "direction only", "not reproduced"]
    found = claims({"between": [-1, 1]}, a=0.0, b=2.0)
    assert list(found.verdict) == ["reproduced", "not reproduced"], "a margin has no direction"


# -- labels --


@given(
    positions=st.lists(st.floats(-1000, 1000), max_size=8).map(sorted), least=st.floats(0.1, 100)
)
def test_labels_are_moved_apart_in_order(positions, least):
    placed = spread(positions, least)
    assert len(placed) == len(positions)
    assert all(b - a >= least - 1e-6 for a, b in pairwise(placed))
    if all(b - a >= least for a, b in pairwise(positions)):
        assert placed == positions, "labels with room stay where they are"
    if positions:
        assert np.mean(placed) == pytest.approx(np.mean(positions), abs=1e-6)


def test_labels_of_lines_do_not_overlap():
    fig, ax = plt.subplots()
    names = ("topk", "topk+lookup", "topk-k+1", "relu", "gated")
    for i, name in enumerate(names):
        ax.plot([1, 2, 3], [1, 2, 1 + 0.001 * i], label=name, color=SYSTEMS[name]["color"])
    ax.plot([1, 3], [0, 10])  # without a label
    label_lines(ax, {"topk-k+1": "one more"})
    fig.canvas.draw()
    texts = {text.get_text(): text for text in ax.texts}
    assert list(texts) == ["topk", "topk+lookup", "one more", "relu", "gated"], "bottom to top"
    boxes = [text.get_window_extent() for text in ax.texts]
    assert all(a.y1 <= b.y0 for a, b in pairwise(boxes))
    assert texts["relu"].get_color() == SYSTEMS["relu"]["color"]
    plt.close(fig)


# -- command line --


@pytest.mark.parametrize(
    ("arguments", "env", "message"),
    [
        (["77"], {}, "no notebook number '77': there are 00, 01"),
        (["--record"], {"TSAE_MODEL": "x"}, "--record is for the testbed: unset TSAE_MODEL"),
        (
            ["--record", "--profile", "mini"],
            {},
            "--record keeps notebooks executed at profile record",
        ),
        ([], {"TSAE_PROFILE": "huge"}, "unknown profile 'huge'"),
        (
            ["1", "--profile", "huge"],
            {},
            "unknown profile 'huge': TSAE_PROFILE must be one of",
        ),
        (
            ["5", "--profile", "smoke"],
            {"TSAE_MODEL": "./gone"},
            "no model at .*gone: expected a Hugging Face folder",
        ),
        (
            ["1", "--profile", "smoke"],
            {"TSAE_CORPUS": "./gone.jsonl"},
            "no corpus at .*gone.jsonl: expected",
        ),
    ],
)
def test_command_line_errors(tmp_path, arguments, env, message):
    done = subprocess.run(
        [sys.executable, ROOT / "tools" / "run_notebooks.py", *arguments],
        cwd=tmp_path,
        env={**os.environ, "TSAE_FIGURES": str(tmp_path / "figures"), **env},
        capture_output=True,
        text=True,
    )
    assert done.returncode != 0 and re.search(message, done.stderr), done.stderr[-800:]
    assert "Cell In" not in done.stderr, "a sentence, not the notebook's traceback"


def test_the_start_of_a_table_is_made_once(lab, monkeypatch):
    """Means cost a pass of the model, which every SAE and every dashboard used to repeat."""
    start = lab.table_start("mean", 1)
    monkeypatch.setattr(lab.lm, "activations", lambda *_, **__: pytest.fail("a second pass"))
    assert lab.table_start("mean", 1) is start
