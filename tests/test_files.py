"""What is written to disk: by `save`, and by train.py beside the SAE."""

from __future__ import annotations

import csv
import json
import os
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import train
import tsae_utils as tu
from conftest import random_weights_sae, save_model
from tsae import saelens

FILES = {"cfg.json", "sae_weights.safetensors", "token_lookup.safetensors"}
NAN, INF = float("nan"), float("inf")


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, with its bytes."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def equal(sae: tu.TSAE, other: tu.TSAE) -> bool:
    tensors = other.state_dict()
    return all(torch.equal(tensor, tensors[name]) for name, tensor in sae.state_dict().items())


# -- save --


def with_value(value: float, name: str = "W_dec") -> tu.TSAE:
    """An SAE with this value at one place of a tensor."""
    sae = random_weights_sae()
    with torch.no_grad():
        dict(sae.named_parameters())[name].view(-1)[3] = value
    return sae


@pytest.mark.parametrize(
    ("sae", "options", "message"),
    [
        (with_value(NAN), {}, "W_dec holds values that are not finite in torch.float32"),
        (with_value(INF, "b_enc"), {}, "b_enc holds values that are not finite"),
        (with_value(NAN, "lookup.W"), {}, "W_lookup holds values that are not finite"),
        (with_value(1e5), {"dtype": torch.float16}, "not finite in torch.float16"),
        (random_weights_sae(), {"dtype": torch.int8}, "saved as one of torch.float32"),
        (random_weights_sae(), {"dtype": torch.complex64}, "saved as one of torch.float32"),
        (random_weights_sae(), {"dtype": "float16"}, "saved as one of torch.float32"),
        (random_weights_sae(), {"metadata": {"a": {1, 2}}}, "the metadata is no JSON"),
        (random_weights_sae(), {"metadata": {"a": NAN}}, "the metadata is no JSON"),
        (random_weights_sae(), {"metadata": {"a": torch.ones(2)}}, "the metadata is no JSON"),
        (random_weights_sae(), {"metadata": {(1, 2): 3}}, "the metadata is no JSON"),
        (random_weights_sae(), {"metadata": {"lookup": False}}, "may not be called 'lookup'"),
        (random_weights_sae(), {"metadata": {"config": {}}}, "may not be called 'config'"),
    ],
)
def test_what_could_not_be_loaded_is_not_saved(tmp_path, sae, options, message):
    """The old folder stays as it was, and a new one does not appear."""
    before = random_weights_sae("relu")
    tu.save(before, tmp_path / "old", {"note": "kept"})
    seen = contents(tmp_path)
    for folder in (tmp_path / "old", tmp_path / "new" / "deep"):
        with pytest.raises(ValueError, match=message):
            tu.save(sae, folder, **options)
        assert contents(tmp_path) == seen
        assert not (tmp_path / "new").exists()


def test_doubles_beyond_fp32_are_not_saved(tmp_path):
    """`load` would read infinity."""
    sae = random_weights_sae().double()
    with torch.no_grad():
        sae.b_dec[0] = 1e300
    with pytest.raises(ValueError, match="b_dec holds values that are not finite"):
        tu.save(sae, tmp_path / "s", dtype=torch.float64)


@pytest.mark.parametrize("fails_at", ["cfg.json", "sae_weights.safetensors"])
def test_a_full_disk_leaves_the_old_sae(tmp_path, monkeypatch, fails_at):
    old, folder = random_weights_sae("relu"), tmp_path / "s"
    tu.save(old, folder)
    seen = contents(tmp_path)
    write_text, save_file = Path.write_text, saelens.save_file

    def full(path: Path) -> None:
        if Path(path).name == fails_at:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", lambda p, *a, **k: full(p) or write_text(p, *a, **k))
    monkeypatch.setattr(saelens, "save_file", lambda t, p: full(p) or save_file(t, p))
    for target in (folder, tmp_path / "new"):
        with pytest.raises(OSError, match=r"could not write .*No space left.*: free some space"):
            tu.save(random_weights_sae(), target)
        assert contents(tmp_path) == seen
        assert {path.name for path in tmp_path.iterdir()} == {"s"}


def test_a_save_killed_halfway_is_no_sae_and_the_next_one_mends_it(tmp_path, monkeypatch):
    """Killed between two renames: neither old nor new is taken for whole."""
    folder, replace = tu.save(random_weights_sae("relu", vocab=None), tmp_path / "s"), Path.replace

    def dies(path: Path, target: Path) -> Path:
        if path.name == "cfg.json":
            os._exit(9)
        return replace(path, target)

    child = os.fork()
    if child == 0:
        monkeypatch.setattr(Path, "replace", dies)
        tu.save(random_weights_sae(), folder)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 9 << 8
    with pytest.raises(FileNotFoundError, match=r"cfg.json is missing"):
        tu.load(folder)
    sae = random_weights_sae("gated")
    assert equal(tu.load(tu.save(sae, folder)), sae)
    assert {path.name for path in folder.iterdir()} == FILES


def test_links_and_odd_folders(tmp_path, monkeypatch):
    """A linked folder keeps its link; ".", "~", empty folders and links to nothing work."""
    sae, real = random_weights_sae(), tmp_path / "real"
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    real.mkdir()
    (tmp_path / "link").symlink_to(real)
    (tmp_path / "dangling").symlink_to(tmp_path / "later")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    inode = (tmp_path / "here").stat().st_ino
    targets = ("../link", "../dangling", ".", "~/mine", "../new [1]/*")
    for _ in range(2):  # anew, and over a saved SAE
        for target in targets:
            tu.save(sae, target)
            assert equal(tu.load(target), sae)
            assert equal(tu.from_pretrained(target), sae)
    assert (tmp_path / "link").is_symlink()
    assert {path.name for path in real.iterdir()} == FILES
    assert {path.name for path in (tmp_path / "later").iterdir()} == FILES
    assert (tmp_path / "here").stat().st_ino == inode
    assert (tmp_path / "home" / "mine" / "cfg.json").exists()


TEXTS = st.text(st.characters(blacklist_categories=["Cs"]), max_size=5)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | TEXTS | st.binary(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3),
    max_leaves=6,
)


def is_json(value: object) -> bool:
    try:
        json.dumps(value, allow_nan=False)
    except (TypeError, ValueError):
        return False
    return True


@settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.dictionaries(TEXTS, VALUES, max_size=3))
def test_any_metadata_comes_back_or_is_refused(tmp_path, metadata):
    sae, folder = random_weights_sae(d_in=2, d_sae=6, vocab=3), tmp_path / "s"
    if {"lookup", "config"} & set(metadata) or not is_json(metadata):
        with pytest.raises(ValueError, match="metadata"):
            tu.save(sae, folder, metadata)
        return
    tu.save(sae, folder, metadata)
    saved = tu.read_cfg(folder)["metadata"]["tokenized"]
    assert {key: saved[key] for key in metadata} == metadata
    assert equal(tu.load(folder), sae)


# -- train.py --


@pytest.fixture
def run(tmp_path, texts, gpt2_folder, monkeypatch):
    """Call train.py in this process with these further options; returns the output folder."""
    lines = [json.dumps({"story": text}) + "\n" for text in texts * 3]
    (tmp_path / "text.jsonl").write_text("".join(lines))
    out = tmp_path / "out"
    fixed = f"--device cpu --k 4 --lookup --expansion 2 --model {gpt2_folder} --text-column story"
    sizes = "--tokens 3e3 --context-size 16 --heldout-rows 8 --batch-size 100 --buffer-tokens 350"

    def call(*more: str, tu_out: Path = out) -> Path:
        files = ["--corpus", str(tmp_path / "text.jsonl"), "--out", str(tu_out)]
        monkeypatch.setattr(
            sys, "argv", ["train.py", *fixed.split(), *sizes.split(), *files, *more]
        )
        train.main()
        return tu_out

    return call


def heldout(folder: Path) -> dict:
    return tu.read_cfg(folder)["metadata"]["tokenized"]["heldout"]


def test_the_history_is_kept_whole_and_drawn(tmp_path, run):
    run("--plot")
    with open(tmp_path / "out.history.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0])[:4] == ["system", "step", "tokens", "loss"]
    assert [int(row["tokens"]) for row in rows] == [100, 2100, 3000]
    assert float(rows[-1]["loss"]) < float(rows[0]["loss"])
    training = tu.read_cfg(tmp_path / "out")["metadata"]["tokenized"]["training"]
    assert training["nmse"] == float(rows[-1]["nmse"])
    assert (tmp_path / "out.history.png").read_bytes().startswith(b"\x89PNG")


def test_an_interrupted_or_diverged_run_keeps_its_history(tmp_path, run, monkeypatch):
    finish = tu.Run.finish_step

    def stop(self, step):
        finish(self, step)
        if step == 25:
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(tu.Run, "finish_step", stop)
        with pytest.raises(SystemExit, match="stopped"):
            run()
    history = tmp_path / "out.history.csv"
    assert len(history.read_text().splitlines()) == 3
    history.unlink()
    with pytest.raises(FloatingPointError):
        run("--lr", "1e30")
    assert history.read_text().count("\n") >= 2


def test_a_failed_measurement_costs_the_numbers_and_not_the_sae(tmp_path, run, monkeypatch, capsys):
    def fails(self, sae):
        raise RuntimeError("out of memory")

    with monkeypatch.context() as patched:
        patched.setattr(tu.Evaluator, "__call__", fails)
        with pytest.raises(RuntimeError, match="out of memory"):
            run()
    assert "holds the trained SAE, but its measurement failed" in capsys.readouterr().err
    trained = tu.load(tmp_path / "out")
    assert "heldout" not in tu.read_cfg(tmp_path / "out")["metadata"]["tokenized"]
    run()  # measures it again, and trains nothing
    assert equal(tu.load(tmp_path / "out"), trained)
    assert heldout(tmp_path / "out")["nmse"] > 0
    assert not list(tmp_path.glob("*.checkpoint.*"))


def test_a_model_that_cannot_be_measured_is_refused_before_training(tmp_path, run, monkeypatch):
    monkeypatch.setattr("tsae.metrics.check_replacement", lambda *_: raises_value_error())
    with pytest.raises(ValueError, match="nothing can be measured"):
        run()
    assert not list(tmp_path.glob("out*"))


def raises_value_error() -> None:
    raise ValueError("nothing can be measured")


@pytest.mark.parametrize("place", ["empty", "link", "."])
def test_out_may_be_empty_a_link_or_here(tmp_path, run, monkeypatch, place):
    work = tmp_path / "work" / "here"
    work.mkdir(parents=True)
    monkeypatch.chdir(work)
    Path("empty").mkdir()
    Path("link").symlink_to(tmp_path / "work" / "elsewhere")
    if place == ".":
        Path("empty").rmdir()
        Path("link").unlink()
    run(tu_out=Path(place))
    assert heldout(Path(place))["nmse"] > 0
    assert place != "link" or Path("link").is_symlink()


def test_a_sublayer_is_trained_on_by_its_hook(tmp_path, run):
    out = run("--hook", "blocks.1.hook_mlp_out")
    assert tu.load(out).cfg.hook_name == "blocks.1.hook_mlp_out"
    with pytest.raises(ValueError, match=r"unknown hook 'blocks\.1\.mlp'"):
        run("--hook", "blocks.1.mlp", tu_out=tmp_path / "other")


def test_a_column_that_is_not_there_is_named(tmp_path, run):
    with pytest.raises(ValueError, match="story"):
        run("--text-column", "title")


def test_a_home_of_ones_own(tmp_path, run, monkeypatch):
    """`~` in every path of train.py."""
    monkeypatch.setenv("HOME", str(tmp_path))
    save_model(tmp_path / "model")
    run("--model", "~/model", "--corpus", "~/text.jsonl", tu_out=Path("~/mine"))
    assert heldout(tmp_path / "mine")["nmse"] > 0
    assert (tmp_path / "mine.history.csv").exists()
