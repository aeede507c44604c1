"""Rules of the notebooks, and agreement of what is committed: notebooks, CSVs, figures, README."""

from __future__ import annotations

import ast
import builtins
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import nbformat
import pandas as pd
import pytest
import readme
from run import REDRAW_TAGS

import tsae_utils as tu
from conftest import ROOT

NOTEBOOKS = sorted((ROOT / "notebooks").glob("[0-9][0-9]_*.ipynb"))
RECORD = ROOT / "figures" / "record"
PARETO = ("model layer system k l1_coefficient lr lr_lookup l0 vectors_per_token seed tokens nmse nmse_unsquared fvu ce_clean ce_patched "
          "ce_added ce_recovered dead_fraction d_sae decoder_vectors seconds").split()
# Notebooks whose record is committed. The others are not executed yet, and the README says so; the list only grows.
RECORDED = [p for p in NOTEBOOKS if (RECORD / f"{p.stem[3:]}.csv").is_file()]
by_record = pytest.mark.parametrize("path", RECORDED, ids=lambda p: p.stem)
by_name = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)


def read(path: Path) -> nbformat.NotebookNode:
    return nbformat.read(path, as_version=4)


def code(path: Path) -> str:
    return "\n".join(c.source for c in read(path).cells if c.cell_type == "code")


def figure_id(path: Path) -> str:
    return path.stem[3:]


def test_what_is_not_recorded_is_said():
    """A notebook without a committed record shows no outputs, and the README names it."""
    text = (ROOT / "README.md").read_text()
    assert ROOT / "notebooks" / "06_fig6_pareto.ipynb" in RECORDED
    for path in NOTEBOOKS:
        if path not in RECORDED and figure_id(path) != "scorecard":
            assert not [o for c in read(path).cells if c.cell_type == "code" for o in c.outputs], path.stem
            assert re.search(rf"not recorded yet:.*`{path.stem}`", text), f"{path.stem} has no record: the README must say so"


def test_there_are_notebooks():
    assert [p.name[:2] for p in NOTEBOOKS] == [f"{n:02d}" for n in (*range(14), 17, 99)]


@by_name
def test_rules_for_a_notebook(path):
    """The title is the claim, scale lives in the profile, cells are short, nothing is installed or moved to."""
    cells = read(path).cells
    assert cells[0].cell_type == "markdown" and cells[0].source.startswith("# ")
    tagged = {t: i for i, c in enumerate(cells) for t in c.metadata.get("tags", [])}
    assert "parameters" in tagged and "TSAE_PROFILE" in cells[tagged["parameters"]].source
    source = code(path)
    assert source.count("TSAE_PROFILE") == 1, "the profile is read once"
    assert not re.search(r"if .*(PROFILE|p\.name|profile) *(==|in)", source), "no notebook branches on its profile"
    assert not re.search(r"^\s*[!%]|os\.chdir|pip install", source, re.M)
    assert all(len(c.source.splitlines()) <= 30 for c in cells if c.cell_type == "code"), "cells are short"
    assert f'Lab("{figure_id(path)}"' in source, "the figure's id is the middle of the notebook's name"


@by_name
def test_figures_are_drawn_from_what_redraw_runs(path):
    """`make redraw` runs bootstrap, parameters and figure cells only: no figure may lean on another cell."""
    cells = [c for c in read(path).cells if c.cell_type == "code" and REDRAW_TAGS & set(c.metadata.get("tags", []))]
    names = [n for c in cells for n in ast.walk(ast.parse(c.source))]
    bound = {n.id for n in names if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
    bound |= {n.arg for n in names if isinstance(n, ast.arg)} | {n.name for n in names if isinstance(n, ast.FunctionDef)}
    bound |= {(a.asname or a.name).split(".")[0] for n in names if isinstance(n, ast.Import | ast.ImportFrom) for a in n.names}
    bound |= set(dir(builtins))
    assert {n.id for n in names if isinstance(n, ast.Name)} <= bound, sorted({n.id for n in names if isinstance(n, ast.Name)} - bound)


@by_name
def test_the_rule_stands_before_the_run(path):
    cells = [c for c in read(path).cells if c.cell_type == "code"]
    declared = [i for i, c in enumerate(cells) if "lab.declare(" in c.source]
    run = [i for i, c in enumerate(cells) if "run" in c.metadata.get("tags", [])]
    judged = [i for i, c in enumerate(cells) if "lab.verdict(" in c.source]
    if figure_id(path) != "scorecard":
        assert declared and run and judged and max(declared) < min(run) and max(run) < min(judged)


@by_record
def test_executed_notebooks(path):
    """Ran top to bottom without an error, hold no path of the machine, and stay small."""
    cells = [c for c in read(path).cells if c.cell_type == "code"]
    assert [c.execution_count for c in cells] == list(range(1, len(cells) + 1)), "run `make record` to execute it"
    outputs = [o for c in cells for o in c.outputs]
    assert not [o for o in outputs if o.output_type == "error"]
    text = path.read_text()
    assert "widget-view" not in text
    for place in (str(ROOT) + "/", str(Path.home()) + "/", "ipykernel_"):
        assert len(place) < 3 or place not in text, place
    assert path.stat().st_size < 500_000
    printed = "".join(o.get("text", "") for o in outputs)
    assert "profile record" in printed


@by_record
def test_committed_figure(path):
    """Each notebook left a CSV, its record, its claims and both pictures, on the committed model."""
    name = figure_id(path)
    for suffix in (".csv", ".json", "_claims.csv", ".png", ".pdf"):
        assert (RECORD / f"{name}{suffix}").is_file(), suffix
    record = json.loads((RECORD / f"{name}.json").read_text())
    assert record["profile"]["name"] == "record" and record["model"] == "testbed"
    assert record["model_hash"] == tu.load_lm(ROOT / "testbed" / "model", device="cpu").fingerprint, "the record is of another model"


@by_record
def test_claims_agree_with_the_notebook(path):
    """Every declared claim is in the CSV with the rule the notebook states, and the notebook shows the CSV's verdict."""
    name = figure_id(path)
    claims = pd.read_csv(RECORD / f"{name}_claims.csv", dtype=str)
    shown = "".join(o.get("data", {}).get("text/html", "") for c in read(path).cells if c.cell_type == "code" for o in c.outputs)
    declared = {}

    class Bench:  # collects what the cell tagged `claims` declares
        def declare(self, id, claim, source, rule, paper):
            declared[id] = (claim, source, rule, paper)

    cell, = (c for c in read(path).cells if "claims" in c.metadata.get("tags", []))
    exec(cell.source, {"lab": Bench()})
    assert list(declared) == list(claims.id)
    for row in claims.itertuples():
        assert re.search(rf">{re.escape(row.id)}</td>(?:(?!</tr>).)*>{re.escape(row.verdict)}</td>", shown, re.S), row.id
        assert declared[row.id] == (row.claim, row.source, row.rule, row.paper), row.id
        assert row.verdict in {"effect present", "effect absent", "not tested"}, "the testbed cannot confirm the paper's numbers"


def test_pareto_is_complete():
    df = pd.read_csv(RECORD / "fig6_pareto.csv")
    assert list(df.columns) == PARETO
    systems = {"topk", "topk+lookup", "topk-size-matched", "topk-k+1", "table-only", "topk+shuffled-lookup", "topk-half-encoder"}
    penalised = {"relu", "relu+lookup", "gated", "gated+lookup", "gated+lookup (1e-4)"}
    assert set(df.system) == systems | penalised | {"batchtopk", "batchtopk+lookup"} and df.seed.nunique() == 3
    curves = df[df.system.isin(penalised)].groupby("system")
    assert (curves.l1_coefficient.nunique() == 3).all() and (curves.size() == 9).all() and (df.k.isna() == df.system.isin(penalised)).all()
    grid = df[df.system.isin(systems - {"table-only"})].groupby("system")
    assert (grid.k.nunique() == 5).all() and (grid.size() == 15).all()
    assert (df[df.system.str.startswith("batchtopk")].groupby("system").size() == 15).all()
    assert df.drop(columns=["k", "l1_coefficient", "lr_lookup"]).notna().all().all()


def test_the_scorecard_is_every_claim():
    claims = pd.read_csv(RECORD / "claims.csv", dtype=str)
    parts = pd.concat([pd.read_csv(f, dtype=str) for f in sorted(RECORD.glob("*_claims.csv"))], ignore_index=True)
    pd.testing.assert_frame_equal(claims, parts)


def test_the_readme_shows_the_record():
    """Headline, status, gallery, scorecard and times, made again from the committed CSVs."""
    text = (ROOT / "README.md").read_text()
    assert readme.fill(text) == text, "run `make readme`"
    df = pd.read_csv(RECORD / "fig6_pareto.csv")
    mean = df[df.k == 8].groupby("system").ce_added.mean()
    assert f"{mean['topk+lookup']:.3f} of the clean" in text and f"adds {mean['topk']:.3f}." in text
    model = json.loads((ROOT / "testbed" / "model" / "metrics.json").read_text())
    assert f"{model['model']['cross_entropy']:.2f} nats" in text and f"{model['ngrams']['kneser_ney_trigram']:.2f}" in text


def test_readme_links_and_commands_exist():
    text = (ROOT / "README.md").read_text()
    for target in re.findall(r"\]\(([^)#]+)\)|src=\"([^\"]+)\"", text):
        link = target[0] or target[1]
        assert link.startswith("http") or (ROOT / link).exists(), link
    makefile = (ROOT / "Makefile").read_text()
    for target in set(re.findall(r"(?:`|^    )make ([a-z]+)\b", text, re.M)):
        assert re.search(rf"^{target}:", makefile, re.M) or (target.startswith("fig") and "fig%:" in makefile), target


def test_readme_snippets_run(tmp_path, monkeypatch):
    """Every Python block of the README, on the testbed, in a folder of its own."""
    shutil.copytree(ROOT / "testbed" / "model", tmp_path / "testbed" / "model")
    words = [f"word{i} of the text and its number {i}" for i in range(3000)]
    (tmp_path / "text.jsonl").write_text("".join(json.dumps({"text": " ".join(words[i : i + 100])}) + "\n" for i in range(0, 3000, 100)))
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    assert blocks
    for block in blocks:
        exec(compile(block, "README.md", "exec"), {})


def test_the_repository_is_light():
    assert sum(f.stat().st_size for f in (ROOT / "testbed" / "model").glob("*.safetensors")) <= 16 * 2**20
    saes = ROOT / "testbed" / "saes"
    assert sum(f.stat().st_size for f in saes.rglob("*") if f.is_file()) <= 16 * 2**20
    for folder in ("topk", "topk+lookup"):
        assert tu.read_cfg(saes / folder)["metadata"]["tokenized"]["model_hash"] == tu.load_lm(ROOT / "testbed" / "model").fingerprint


def test_the_model_card_agrees_with_the_metrics():
    card, m = (ROOT / "testbed" / "README.md").read_text(), json.loads((ROOT / "testbed" / "model" / "metrics.json").read_text())
    for value in (m["model"]["cross_entropy"], *m["ngrams"].values(), *m["model"]["by_position"].values()):
        assert f"{value:.2f}" in card
    assert f"{m['overlap_8gram']:.1%}" in card and m["corpus"]["hash"] in card
    assert m["model"]["cross_entropy"] < m["ngrams"]["kneser_ney_trigram"] - 0.4, "the model knows more than n-grams"


def test_the_testbed_folder_loads_by_the_path_of_any_model():
    """Special-token ids are set: without them a second BOS beyond the embedding appears."""
    lm = tu.load_lm(ROOT / "testbed" / "model", device="cpu")
    config = json.loads((ROOT / "testbed" / "model" / "config.json").read_text())
    assert (ROOT / "testbed" / "model" / "tokenizer_config.json").is_file()
    assert lm.bos_id == config["bos_token_id"] == lm.separator_id < lm.n_vocab and len(lm.tokenizer) == lm.n_vocab and not lm.bos_note


def test_redraw_draws_what_has_a_csv_and_nothing_else(tmp_path):
    """From a copy of the record with two notebooks' CSVs, their pictures come back."""
    (tmp_path / "record").mkdir()
    for name in ("fig1_ngram_imbalance", "fig4_feature_sharing"):
        for file in RECORD.glob(f"{name}*.csv"):
            shutil.copy(file, tmp_path / "record")
    command = [sys.executable, ROOT / "notebooks" / "run.py", "--redraw"]
    done = subprocess.run(command, env={**os.environ, "TSAE_FIGURES": str(tmp_path)}, capture_output=True, text=True)
    assert done.returncode == 0 and "2 of 2 notebooks" in done.stdout, done.stderr[-2000:]
    for name in ("fig1_ngram_imbalance", "fig4_feature_sharing"):
        again, committed = (plt.imread(folder / f"{name}.png") for folder in (tmp_path / "record", RECORD))
        assert again.shape == committed.shape and abs(again - committed).mean() < 0.01
