"""A record resumes from its committed rows: only what is missing is trained."""

from __future__ import annotations

import json
import shutil

import pandas as pd
import pytest
import torch
from lab import LOOKUP, Lab, SAESpec, claims, store, training, tu, with_documents
from lab.recipes import search_recipe
from test_lab import use_small_model

SPECS = {
    "topk": SAESpec("topk", 32, 2, 1e-2),
    "topk+lookup": SAESpec("topk+lookup", 32, 2, 1e-2, **LOOKUP),
    "wide": SAESpec("topk", 48, 2, 1e-2),
}


class Stopped(Exception):
    pass


@pytest.fixture
def machine(tmp_path, texts, monkeypatch):
    """`machine("name")`: a new machine with an empty cache, on which figures/ is cloned."""
    use_small_model(tmp_path, texts, monkeypatch)
    monkeypatch.setattr(training, "MOST_IN_A_PASS", 1)
    monkeypatch.setattr(claims, "rules_of", lambda _: {"a": lambda tables: claims.Evidence(1.0)})

    def start(name: str) -> Lab:
        monkeypatch.setenv("TSAE_CACHE", str(tmp_path / name))
        return Lab("fig6_pareto", "smoke")

    return start


@pytest.fixture
def trained(monkeypatch):
    """Names of the SAEs that were trained, in order."""
    names, train = [], tu.train

    def counted(saes, *args, **kwargs):
        names.extend(saes)
        return train(saes, *args, **kwargs)

    monkeypatch.setattr(tu, "train", counted)
    return names


def record(lab: Lab, stop_after: int = 99) -> pd.DataFrame:
    """Two seeds of three SAEs; an interrupt after some measurements."""
    lab.claims, left = {"a": dict.fromkeys(("claim", "source", "rule", "paper"), "-")}, [stop_after]
    lab.claims["a"]["above"] = 0
    evaluate = with_documents(tu.Evaluator(lab.lm, lab.rows("heldout", 500), lab.hook(1)))

    def measure(name: str, sae: tu.TSAE) -> dict:
        if not left[0]:
            raise Stopped
        left[0] -= 1
        system = {"system": name, "seed": sae.cfg.seed, "tokens": sae.record["tokens"]}
        return system | evaluate(sae)

    def rows() -> pd.DataFrame:
        parts = [lab.measured(SPECS, 1, seed, 1024, measure) for seed in (0, 1)]
        return pd.DataFrame([row for part in parts for row in part])

    df = lab.run(rows)
    lab.judge()
    return df


def files(lab: Lab) -> dict[str, bytes]:
    names = ("fig6_pareto.csv", "fig6_pareto_documents.csv.gz")
    return {name: (lab.out / name).read_bytes() for name in names}


def test_a_stopped_record_resumes_on_another_machine(machine, trained):
    """Nothing is trained twice, and the tables are those of a run without a break."""
    whole = machine("a")
    record(whole)
    expected = files(whole)
    assert trained == [*SPECS, *SPECS]
    shutil.rmtree(whole.out)
    trained.clear()
    with pytest.raises(Stopped):
        record(machine("b"), stop_after=4)
    assert trained == ["topk", "topk+lookup", "wide", "topk", "topk+lookup"]
    assert not (whole.out / "fig6_pareto.csv").exists(), "no table of half a record"
    trained.clear()
    again = machine("c")  # a fresh clone: the rows are there, the cache is not
    record(again)
    assert trained == ["topk+lookup", "wide"], "four of six rows are taken"
    assert files(again) == expected
    assert not list(again.out.glob("*partial*")) and not list(again.out.glob("*.writing"))
    trained.clear()
    record(machine("d"))
    assert not trained and files(again) == expected, "a finished record trains nothing"


def test_rows_of_other_code_are_made_again(machine, trained, monkeypatch):
    record(machine("a"))
    trained.clear()
    monkeypatch.setattr(store, "code_hash", lambda: "another")
    df = record(machine("b"))
    assert trained == [*SPECS, *SPECS] and set(df.code) == {"another"}


def test_rows_of_another_configuration_are_made_again(machine, trained):
    lab = machine("a")
    record(lab)
    trained.clear()
    lab = machine("b")
    lab.p = lab.p.with_changes("smoke", eval_tokens=2 * lab.p.budget.eval_tokens)
    record(lab)
    assert trained == [*SPECS, *SPECS], "measured on other rows"


def test_verdicts_see_the_documents_of_their_own_run(machine, monkeypatch):
    """The sums are in place before a claim is judged: an interval over seeds alone says so."""
    seen = []
    monkeypatch.setattr(claims, "rules_of", lambda _: {"a": lambda t: seen.append(t.documents)})
    monkeypatch.setattr(claims, "find", lambda rule, t: rule(t) or claims.Evidence(1.0))
    record(machine("a"))
    assert seen[0] is not None and seen[0].index.unique("config").size == 6


def test_documents_sum_to_the_metrics(machine):
    lab = machine("a")
    df = record(lab).set_index("config")
    documents = pd.read_csv(lab.out / "fig6_pareto_documents.csv.gz")
    sums = documents.groupby("config").sum()
    assert set(sums.index) == set(df.index) and documents.groupby("config").size().min() > 3
    added = sums.ce_added / sums.n / df.ce_clean
    assert added.loc[df.index].to_numpy() == pytest.approx(df.ce_added.to_numpy(), rel=1e-3)
    nmse = sums.squared_error / sums.positions
    assert nmse.loc[df.index].to_numpy() == pytest.approx(df.nmse.to_numpy(), rel=1e-3)


def test_the_record_names_the_code_of_its_rows(machine):
    lab = machine("a")
    df = record(lab)
    saved = pd.read_json(lab.out / "fig6_pareto.json", typ="series")
    assert set(df.code) == {saved["code"]} == {store.code_hash()}


def test_prose_changes_no_code_hash():
    first = ['"""One."""\ndef f(x):\n    """Two."""\n    return x + 1\n']
    same = ['"""Other."""\n\n\ndef f(x):  # a comment\n    """Words."""\n    return x+1\n']
    other = ['"""One."""\ndef f(x):\n    """Two."""\n    return x + 2\n']
    assert store.hash_of_code(first) == store.hash_of_code(same) != store.hash_of_code(other)
    branches = (f"def f(x):\n    if x:\n        y = {word!r}\n    return y\n" for word in "ab")
    assert len({store.hash_of_code([branch]) for branch in branches}) == 2, "no docstring"


def test_a_measurement_covers_its_constants_and_modules(tmp_path, monkeypatch):
    """Constants beside the parameters and modules that the notebook imports decide its rows."""

    def hashed(constant: str = "1", module: str = "1", figure: str = "1") -> str:
        sources = {"bootstrap": "import beside", "parameters": f"A = {constant}"}
        sources |= {"run": "def measure():\n    return A", "figure": f"draw({figure})"}
        cells = [{"source": [s], "metadata": {"tags": [tag]}} for tag, s in sources.items()]
        (tmp_path / "notebooks").mkdir(exist_ok=True)
        (tmp_path / "notebooks" / "beside.py").write_text(f"B = {module}")
        (tmp_path / "notebooks" / "01_x.ipynb").write_text(json.dumps({"cells": cells}))
        store.measurement_hash.cache_clear()
        return store.measurement_hash("x")

    monkeypatch.setattr(store, "ROOT", tmp_path)
    try:
        first, drawn = hashed(), hashed(figure="2")
        assert first == drawn and len({first, hashed(constant="2"), hashed(module="2")}) == 3
    finally:
        store.measurement_hash.cache_clear()


def test_lost_documents_are_measured_again(machine, trained):
    lab = machine("a")
    record(lab)
    expected, path = files(lab), lab.out / "fig6_pareto_documents.csv.gz"
    documents = pd.read_csv(path)
    documents[documents.config != documents.config[0]].to_csv(path, index=False)
    trained.clear()
    again = machine("b")
    record(again)
    assert trained == ["topk"] and files(again) == expected


def test_ratios_pair_the_same_documents(machine):
    lab = machine("a")
    df = record(lab)
    tables = claims.Tables(lab.out, lab.id)
    ours, rival = (df[df.system == system] for system in ("topk+lookup", "topk"))
    interval = tables.ratio(ours, rival, "nmse")
    assert interval.value == pytest.approx(ours.nmse.sum() / rival.nmse.sum(), rel=1e-3)
    assert interval.is_known and not tables.is_over_seeds_only
    moved = tables.documents.copy()
    chosen = moved.index.get_level_values("config").isin(rival.config)
    moved.loc[chosen, "document"] += 1
    tables.documents = moved
    with pytest.raises(ValueError, match="the same documents on both sides"):
        tables.ratio(ours, rival, "nmse")
    tables.documents = moved[~chosen]
    assert tables.ratio(ours, rival, "nmse").is_known and tables.is_over_seeds_only


def test_rows_of_another_measurement_are_made_again(machine, trained, monkeypatch):
    """A notebook whose cells measure something else does not take the old rows."""
    record(machine("a"))
    assert store.measurement_hash("fig6_pareto") != store.measurement_hash("expansion")
    trained.clear()
    monkeypatch.setattr(store, "measurement_hash", lambda figure_id: "other cells")
    record(machine("b"))
    assert trained == [*SPECS, *SPECS]


def test_the_workshops_start(machine):
    """Table at scale 1, Kaiming-normal encoder: deviation sqrt(2 / d_in), not tied to W_dec."""
    lab = machine("a")
    spec = SAESpec("x", 4000, 2, 1e-2, start="unigram", table_scale=1.0, kaiming=True)
    sae, again = (training.new_sae(lab, spec, 1, 3) for _ in range(2))
    assert torch.equal(sae.W_enc, again.W_enc)
    assert sae.W_enc.std().item() == pytest.approx((2 / lab.lm.d_model) ** 0.5, rel=0.02)
    assert torch.cosine_similarity(sae.W_enc.T, sae.W_dec, dim=-1).mean().abs() < 0.02
    assert torch.equal(sae.lookup.W, lab.unigrams(1))


def test_looks_at_the_final_split_are_counted(machine):
    lab = machine("a")
    lab.run(lambda: pd.DataFrame({"x": [1]}))
    assert not (lab.out / "final_looks.csv").exists()
    final, heldout = lab.rows("final", 500), lab.rows("heldout", 500)
    assert not {tuple(row) for row in final.tolist()} & {tuple(row) for row in heldout.tolist()}
    for _ in range(2):
        lab.run(lambda: pd.DataFrame({"x": [1]}))
    looks = pd.read_csv(lab.out / "final_looks.csv")
    assert list(looks.look) == [1, 2] and set(looks.id) == {"fig6_pareto"}


def test_the_search_of_an_arm_resumes(machine, trained):
    """It never does worse than it began, and a second run trains nothing."""
    lab = machine("a")
    tune = tu.Evaluator(lab.lm, lab.rows("tune", 500), lab.hook(1))

    def train_and_measure(specs, measure):
        return lab.measured(specs, 1, 0, 1024, measure, "search")

    arm = SPECS["topk+lookup"]
    best, rows = search_recipe(arm, lab.lm.d_model, train_and_measure, tune, "nmse", most=14)
    assert len(rows) == len(trained) == 14
    assert best.system == arm.system and best.d_sae == arm.d_sae and best.k == arm.k
    least = min(rows, key=lambda row: row["nmse"])
    assert (best.lr, best.decoder_init_norm) == (least["lr"], least["decoder_init_norm"])
    lab.run(lambda: pd.DataFrame(rows))
    trained.clear()
    lab = machine("b")
    tune = tu.Evaluator(lab.lm, lab.rows("tune", 500), lab.hook(1))
    again, _ = search_recipe(arm, lab.lm.d_model, train_and_measure, tune, "nmse", most=14)
    assert again == best and not trained
