"""The blind study's kit hides its sources and unblinding finds them; dashboards are right."""

from __future__ import annotations

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
from lab.blind import draw_items

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
def folder(lab, saes, text, tmp_path):
    """Figures with a table of sampled features and its kit of three features a side."""
    parts = []
    for system, sae in saes.items():
        sampled = ft.sample_features(sae, text, 3)
        parts.append(pd.DataFrame({"system": system, "seed": 0, "feature": sampled.numpy()}))
    table = pd.concat(parts)
    table.to_csv(tmp_path / "tab1_feature_study.csv", index=False)
    study_kit.make_kit(lab, saes, text, table, tmp_path / "tab1_feature_study_kit")
    return tmp_path


def fill(folder, rater: str, value) -> None:
    """Fill in a rater's scores; interpretability is `value(system, number of the item)`."""
    path = folder / "tab1_feature_study_kit" / f"scores_{rater}.csv"
    items = draw_items(pd.read_csv(folder / "tab1_feature_study.csv"))
    scores = pd.read_csv(path)
    scores["interpretability"] = [value(s, i) for i, s in enumerate(items.system)]
    scores["complexity"] = [4 + i % 3 for i in range(len(items))]
    scores.to_csv(path, index=False)


def test_the_kit_hides_its_source_and_unblinding_finds_it(folder):
    kit = folder / "tab1_feature_study_kit"
    files = sorted(path.name for path in kit.iterdir())
    assert files == ["items.html", "scores_a.csv", "scores_b.csv"], "no key beside the items"
    page = (kit / "items.html").read_text()
    items = draw_items(pd.read_csv(folder / "tab1_feature_study.csv"))
    assert re.findall("<h2>(.*?)</h2>", page) == list(items["item"])
    assert list(items["item"]) == [f"item {i:02d}" for i in range(1, 7)]
    assert items.system.value_counts().to_dict() == {"one": 3, "two": 3}
    assert not items.system.is_monotonic_increasing, "shuffled"
    assert not any(f"feature {feature}" in page for feature in items.feature)
    for rater in "ab":
        fill(folder, rater, lambda system, _: {"one": 9, "two": 2}[system])
    table, agreement = blind_study.unblind(folder)
    mean = table.set_index(["system", "scale"]).value
    assert mean["one", "interpretability"] == 9 and mean["two", "interpretability"] == 2
    assert (agreement.kappa == 1).all(), "equal scores"
    pd.testing.assert_frame_equal(pd.read_csv(kit / "key.csv"), items)


def test_disagreement_lowers_kappa(folder):
    fill(folder, "a", lambda _, i: 1 + i)
    fill(folder, "b", lambda _, i: 6 - i)
    kappa = blind_study.unblind(folder)[1].set_index("scale").kappa
    assert kappa["interpretability"] == pytest.approx(-1) and kappa["complexity"] == 1


def test_scores_are_checked_and_kept(lab, saes, text, folder):
    kit = folder / "tab1_feature_study_kit"
    fill(folder, "a", lambda *_: 7)
    with pytest.raises(ValueError, match=r"scores_b.csv: interpretability of item 01 is nan"):
        blind_study.unblind(folder)
    fill(folder, "b", lambda *_: 11)
    with pytest.raises(ValueError, match="interpretability of item 01 is 11; expected 1 to 10"):
        blind_study.unblind(folder)
    assert not (kit / "key.csv").exists(), "unblinded only when all is scored"
    fill(folder, "b", lambda *_: 5)
    study_kit.make_kit(lab, saes, text, pd.read_csv(folder / "tab1_feature_study.csv"), kit)
    interpretability = blind_study.unblind(folder)[0].query("scale == 'interpretability'").value
    assert set(interpretability) == {6.0}, "making the kit again keeps what was scored"
    command = [sys.executable, ROOT / "tools" / "blind_study.py", folder]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0 and "kappa" in done.stdout, done.stderr
    scores = pd.read_csv(kit / "scores_a.csv")
    scores.iloc[1:].to_csv(kit / "scores_a.csv", index=False)
    with pytest.raises(ValueError, match="name different items"):
        blind_study.unblind(folder)


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
