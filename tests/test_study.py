"""The blind study's kit hides its sources and unblinding finds them; dashboards are right."""

from __future__ import annotations

import json
import re
import subprocess
import sys

import blind_study
import dashboard
import features as ft
import pandas as pd
import pytest
import study_kit
from lab import Lab, SAESpec

from conftest import ROOT


@pytest.fixture(scope="module")
def lab(tmp_path_factory) -> Lab:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TSAE_FIGURES", str(tmp_path_factory.mktemp("figures")))
        bench = Lab("tab1_feature_study", "smoke")
        bench.cache = tmp_path_factory.mktemp("cache")  # of the SAEs; the corpus keeps its own
        yield bench


@pytest.fixture(scope="module")
def saes(lab):
    return lab.train_or_load({s: SAESpec(s, 64, 4, 4e-3) for s in ("one", "two")}, 4, 0, 4096)


@pytest.fixture(scope="module")
def text(lab):
    return ft.read_text(lab, 4, 4000)


@pytest.fixture
def kit(lab, saes, text, tmp_path):
    return study_kit.make_kit(lab, saes, text, 3, tmp_path / "kit")


def fill(kit, value) -> None:
    key, scores = json.loads((kit / "key.json").read_text()), pd.read_csv(kit / "scores.csv")
    scores["interpretability"] = [value(key[i]["system"]) for i in scores["item"]]
    scores["complexity"] = 5
    scores.to_csv(kit / "scores.csv", index=False)


def test_the_kit_hides_its_source_and_unblinding_finds_it(kit):
    page, key = (kit / "items.html").read_text(), json.loads((kit / "key.json").read_text())
    assert re.findall("<h2>(.*?)</h2>", page) == list(key) == [f"item {i:02d}" for i in range(1, 7)]
    assert [k["system"] for k in key.values()] not in (
        ["one"] * 3 + ["two"] * 3,
        ["two"] * 3 + ["one"] * 3,
    ), "shuffled"
    assert not any(f"feature {k['feature']}" in page for k in key.values())
    fill(kit, {"one": 9, "two": 2}.get)
    table = blind_study.unblind(kit).set_index(["system", "scale"])["mean"]
    assert (
        table["one", "interpretability"] == 9
        and table["two", "interpretability"] == 2
        and table["one", "complexity"] == 5
    )


def test_scores_are_checked_and_kept(lab, saes, text, kit):
    with pytest.raises(ValueError, match="expected 1 to 10"):
        blind_study.unblind(kit)
    fill(kit, lambda system: 11)
    with pytest.raises(ValueError, match="interpretability of item 01 is 11; expected 1 to 10"):
        blind_study.unblind(kit)
    fill(kit, lambda system: 7)
    study_kit.make_kit(lab, saes, text, 3, kit)
    assert set(blind_study.unblind(kit)["mean"]) == {5.0, 7.0}, (
        "making the kit again keeps what was scored"
    )
    done = subprocess.run(
        [sys.executable, ROOT / "tools" / "blind_study.py", kit], capture_output=True, text=True
    )
    assert done.returncode == 0 and "complexity" in done.stdout
    scores = pd.read_csv(kit / "scores.csv")
    scores.iloc[1:].to_csv(kit / "scores.csv", index=False)
    with pytest.raises(ValueError, match="name different items"):
        blind_study.unblind(kit)


def test_a_dashboard_by_what_it_shows(lab, saes, text):
    sae, feature = saes["one"], int(ft.sample_features(saes["one"], text, 1)[0])
    d = ft.describe(lab, sae, feature, text, contexts=3)
    acts = ft.activations(sae, text)[:, feature]
    strongest = d[(d.row == "context") & (d.place == 0)]
    assert (
        strongest.value.iloc[0] == pytest.approx(acts.max().item())
        and strongest.value.is_monotonic_decreasing
    )
    assert d[d.row == "histogram"].value.sum() == (acts > 0).sum()
    assert d[(d.row == "number") & (d.token == "frequency")].value.iloc[0] == pytest.approx(
        (acts > 0).float().mean().item()
    )
    effect = ft.logit_directions(lab.lm) @ sae.W_dec[feature].detach()
    assert d[d.row == "boosted"].value.iloc[0] == pytest.approx(effect.max().item(), rel=1e-5)


def test_html_escapes_tokens():
    d = pd.DataFrame(
        [
            {"row": "number", "token": "frequency", "value": 0.1},
            {"row": "number", "token": "greatest", "value": 2.0},
            {"row": "context", "rank": 1, "place": 0, "token": "<script>\n", "value": 2.0},
            {"row": "boosted", "rank": 1, "token": "a&b", "value": 1.0},
        ]
    )
    page = dashboard.page({"x": d}, "t")
    assert (
        "<script>" not in page
        and "&lt;script&gt;⏎" in page
        and "a&amp;b" in page
        and "rgba(213, 94, 0, 0.85)" in page
    )
