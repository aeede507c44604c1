"""Rules of the notebooks, and agreement of all that is committed."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import build_docs
import matplotlib.pyplot as plt
import nbformat
import pandas as pd
import pytest
from lab.claims import COLUMNS, VERDICTS, read_claims

import tsae_utils as tu
from conftest import ROOT

NOTEBOOKS = sorted((ROOT / "notebooks").glob("[0-9][0-9]_*.ipynb"))
FIGURES = [path for path in NOTEBOOKS if not path.stem.startswith("99")]
CLAIMS = [path for path in FIGURES if read_claims(path.stem[3:])]  # all but the tour
RECORD = ROOT / "figures" / "record"
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
PARETO = """model layer system k l1_coefficient lr lr_lookup l0 vectors_per_token seed tokens nmse
nmse_unsquared fvu ce_clean ce_patched ce_added ce_recovered dead_fraction d_sae decoder_vectors
seconds""".split()  # other tools read these
every_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
every_claims = pytest.mark.parametrize("path", CLAIMS, ids=lambda p: p.stem)
every_figure = pytest.mark.parametrize("path", FIGURES, ids=lambda p: p.stem)


def code_cells(path: Path) -> list[nbformat.NotebookNode]:
    cells = nbformat.read(path, as_version=4).cells
    return [cell for cell in cells if cell.cell_type == "code"]


def tags(cell: nbformat.NotebookNode) -> list[str]:
    return cell.metadata.get("tags", [])


def figure_id(path: Path) -> str:
    return path.stem[3:]


@pytest.fixture(scope="module")
def fingerprint() -> str:
    """Of the committed language model."""
    return tu.load_lm(ROOT / "testbed" / "model", device="cpu").fingerprint


def test_there_are_notebooks():
    assert [p.name[:2] for p in NOTEBOOKS] == [f"{n:02d}" for n in (*range(14), 17, 99)]


@every_notebook
def test_rules_for_a_notebook(path):
    """The title is the claim, scale lives in the profile, nothing is installed or moved to."""
    cells = nbformat.read(path, as_version=4).cells
    assert cells[0].cell_type == "markdown" and cells[0].source.startswith("# ")
    source = "\n".join(cell.source for cell in code_cells(path))
    assert source.count("TSAE_PROFILE") == 1, "the profile is read once"
    branches = r"if .*(PROFILE|p\.name|profile) *(==|in)"
    assert not re.search(branches, source), "no notebook branches on its profile"
    assert not re.search(r"^\s*[!%]|os\.chdir|pip install", source, re.M)
    assert f'Lab("{figure_id(path)}"' in source, "the figure's id is the notebook's name"


@every_claims
def test_rules_stand_before_the_run(path):
    cells = code_cells(path)
    declared = [i for i, cell in enumerate(cells) if "lab.declare(" in cell.source]
    run = [i for i, cell in enumerate(cells) if "lab.run(" in cell.source]
    judged = [i for i, cell in enumerate(cells) if "lab.judge(" in cell.source]
    assert declared and run and judged
    assert max(declared) < min(run) and max(run) < min(judged)


@every_notebook
def test_executed_notebooks(path):
    """Ran top to bottom without an error, hold no path of the machine, and stay small."""
    cells = code_cells(path)
    order = [cell.execution_count for cell in cells]
    assert order == list(range(1, len(cells) + 1)), "run `make replay` to execute it"
    outputs = [output for cell in cells for output in cell.outputs]
    assert not [output for output in outputs if output.output_type == "error"]
    text = path.read_text()
    assert "widget-view" not in text
    for place in (str(ROOT) + "/", str(Path.home()) + "/", "ipykernel_"):
        assert len(place) < 3 or place not in text, place
    assert path.stat().st_size < 500_000
    assert "profile record" in "".join(output.get("text", "") for output in outputs)


@every_figure
def test_the_answer_is_the_takeaway(path):
    """The bold answer at the top is what the last record found."""
    cells = nbformat.read(path, as_version=4).cells
    (answer,) = (cell.source for cell in cells if "answer" in tags(cell))
    takeaway = (RECORD / f"{figure_id(path)}_takeaway.md").read_text(encoding="utf-8")
    assert answer == f"**Our answer.** {takeaway.strip()}", "run `make replay`"


@every_figure
def test_committed_figure(path, fingerprint):
    """Each notebook left CSV, record, claims and both pictures, on the committed model."""
    name = figure_id(path)
    claims = ["_claims.csv"] if path in CLAIMS else []
    for suffix in (".csv", ".json", *claims, ".png", ".pdf"):
        assert (RECORD / f"{name}{suffix}").is_file(), suffix
    record = json.loads((RECORD / f"{name}.json").read_text())
    assert record["profile"]["name"] == "record" and record["model"] == "testbed"
    assert record["model_hash"] == fingerprint, "the record is of another model"


@every_claims
def test_claims_agree_with_the_notebook(path):
    """Declared and judged claims are the same, and the notebook shows the CSV's verdict."""
    name = figure_id(path)
    claims = pd.read_csv(RECORD / f"{name}_claims.csv", dtype=str, keep_default_na=False)
    assert list(claims.columns) == COLUMNS
    declared = read_claims(name)
    assert list(declared) == list(claims.id)
    outputs = [output for cell in code_cells(path) for output in cell.outputs]
    shown = "".join(output.get("data", {}).get("text/html", "") for output in outputs)
    for row in claims.to_dict("records"):
        pattern = rf">{re.escape(row['id'])}</td>(?:(?!</tr>).)*>{re.escape(row['verdict'])}</td>"
        assert re.search(pattern, shown, re.S), row["id"]
        for column in ("claim", "source", "rule", "paper"):
            assert declared[row["id"]][column] == row[column], row["id"]
        assert row["verdict"] in VERDICTS, "the testbed cannot confirm the paper's numbers"


@every_claims
def test_claims_are_sentences(path):
    for id, claim in read_claims(figure_id(path)).items():
        assert claim["by"] in ("paper", "ours"), id
        assert re.fullmatch(r"[A-Z].*\.", claim["claim"]), f"{id} is not a sentence"
        assert len(claim["rule"]) > 10 and claim["source"], id


def test_pareto_is_complete():
    df = pd.read_csv(RECORD / "fig6_pareto.csv")
    assert list(df.columns)[: len(PARETO)] == PARETO, "new columns go last"
    with_k = {"topk", "topk+lookup", "topk-size-matched", "topk-k+1"}
    with_k |= {"topk+shuffled-lookup", "topk-half-encoder", "batchtopk", "batchtopk+lookup"}
    penalised = {"relu", "relu+lookup", "gated", "gated+lookup", "gated+lookup (1e-4)"}
    assert set(df.system) == with_k | penalised | {"table-only"} and df.seed.nunique() == 3
    curves = df[df.system.isin(penalised)].groupby("system")
    assert (curves.l1_coefficient.nunique() == 3).all() and (curves.size() == 9).all()
    assert (df.k.isna() == df.system.isin(penalised)).all()
    grid = df[df.system.isin(with_k)].groupby("system")
    assert (grid.k.nunique() == 5).all() and (grid.size() == 15).all()
    assert df.drop(columns=["k", "l1_coefficient", "lr_lookup"]).notna().all().all()


def test_the_scorecard_is_every_claim():
    def read(path: Path) -> pd.DataFrame:
        return pd.read_csv(path, dtype=str, keep_default_na=False)

    parts = [read(path) for path in sorted(RECORD.glob("*_claims.csv"))]
    together = pd.concat(parts, ignore_index=True)
    pd.testing.assert_frame_equal(read(RECORD / "claims.csv"), together)


@pytest.mark.parametrize("name", build_docs.DOCUMENTS)
def test_documents_show_the_record(name):
    text = (ROOT / name).read_text(encoding="utf-8")
    assert build_docs.fill(name) == text, "run `make docs`"


def test_the_readme_shows_the_testbeds_numbers():
    text = (ROOT / "README.md").read_text()
    df = pd.read_csv(RECORD / "fig6_pareto.csv")
    mean = df[df.k == 8].groupby("system").ce_added.mean()
    for system in ("topk", "topk+lookup"):
        assert f"{mean[system]:.3f}" in text
    metrics = json.loads((ROOT / "testbed" / "model" / "metrics.json").read_text())
    for value in (metrics["model"]["cross_entropy"], metrics["ngrams"]["kneser_ney_trigram"]):
        assert f"{value:.2f}" in text


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda p: p.name)
def test_links_and_commands_exist(path):
    text = path.read_text(encoding="utf-8")
    for link in re.findall(r"\]\(([^)#]+?)(?:#[^)]*)?\)", text):
        assert link.startswith("http") or (path.parent / link).exists(), link
    makefile = (ROOT / "Makefile").read_text()
    for target in set(re.findall(r"(?:`|^    )make ([a-z-]+)\b", text, re.M)):
        is_figure = target.startswith("fig") and "fig%:" in makefile
        assert re.search(rf"^{target}:", makefile, re.M) or is_figure, target


def test_snippets_of_the_documents_run(tmp_path, monkeypatch):
    """Every Python block of the README and of docs/interop.md, on the testbed, in a new folder.

    SAELens's block runs in `make test-saelens`.
    """
    shutil.copytree(ROOT / "testbed" / "model", tmp_path / "testbed" / "model")
    words = [f"word{i} of the text and its number {i}" for i in range(3000)]
    documents = (" ".join(words[i : i + 100]) for i in range(0, 3000, 100))
    lines = "".join(json.dumps({"text": text}) + "\n" for text in documents)
    (tmp_path / "text.jsonl").write_text(lines)
    monkeypatch.chdir(tmp_path)
    for name in ("README.md", "docs/interop.md"):
        blocks = re.findall(r"```python\n(.*?)```", (ROOT / name).read_text(), re.S)
        assert blocks
        for block in blocks:
            if "from sae_lens" not in block:
                exec(compile(block, name, "exec"), {})


def test_the_repository_is_light(fingerprint):
    weights = (ROOT / "testbed" / "model").glob("*.safetensors")
    assert sum(file.stat().st_size for file in weights) <= 16 * 2**20
    saes = ROOT / "testbed" / "saes"
    assert sum(file.stat().st_size for file in saes.rglob("*") if file.is_file()) <= 16 * 2**20
    for folder in ("topk", "topk+lookup"):
        metadata = tu.read_cfg(saes / folder)["metadata"]
        assert metadata["tokenized"]["model_hash"] == fingerprint


def test_the_model_card_agrees_with_the_metrics():
    card = (ROOT / "testbed" / "README.md").read_text()
    metrics = json.loads((ROOT / "testbed" / "model" / "metrics.json").read_text())
    model, ngrams = metrics["model"], metrics["ngrams"]
    for value in (model["cross_entropy"], *ngrams.values(), *model["by_position"].values()):
        assert f"{value:.2f}" in card
    assert f"{metrics['overlap_8gram']:.1%}" in card and metrics["corpus"]["hash"] in card
    margin = ngrams["kneser_ney_trigram"] - model["cross_entropy"]
    assert margin > 0.4, "the model knows more than n-grams"


def test_the_testbed_folder_loads_by_the_path_of_any_model():
    """Special-token ids are set: without them a second BOS beyond the embedding appears."""
    folder = ROOT / "testbed" / "model"
    lm = tu.load_lm(folder, device="cpu")
    config = json.loads((folder / "config.json").read_text())
    assert (folder / "tokenizer_config.json").is_file()
    assert lm.bos_id == config["bos_token_id"] == lm.separator_id < lm.n_vocab
    assert len(lm.tokenizer) == lm.n_vocab and not lm.bos_note


def test_redraw_draws_what_has_a_csv_and_nothing_else(tmp_path):
    """From a copy of two notebooks' CSVs, their pictures and verdicts come back."""
    (tmp_path / "record").mkdir()
    names = ("fig1_ngram_imbalance", "dead_features")
    for name in names:
        for ending in (".csv", ".csv.gz", ".json"):
            for file in RECORD.glob(f"{name}*{ending}"):
                shutil.copy(file, tmp_path / "record")
        (tmp_path / "record" / f"{name}_claims.csv").unlink()
    command = [sys.executable, ROOT / "tools" / "run_notebooks.py", "--redraw"]
    env = {**os.environ, "TSAE_FIGURES": str(tmp_path)}
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0 and "3 of 3 notebooks" in done.stdout, done.stderr[-2000:]
    for name in names:
        again, committed = (
            plt.imread(folder / f"{name}.png") for folder in (tmp_path / "record", RECORD)
        )
        assert again.shape == committed.shape and abs(again - committed).mean() < 0.01
        claims = f"{name}_claims.csv"
        assert (tmp_path / "record" / claims).read_bytes() == (RECORD / claims).read_bytes()
