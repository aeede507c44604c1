"""Checkpoints and several processes: a run that is stopped anywhere ends as if it were not."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import train
import tsae_utils as tu
from conftest import ROOT
from tsae import checkpoint as checkpoints

HOOK = "blocks.2.hook_resid_pre"
CFG = tu.TrainConfig(tokens=1500, lr=1e-2, aux_window=200)
CFGS = {
    "topk": replace(CFG, aux_k=8),
    "batchtopk": replace(CFG, aux_k=8),
    "relu": replace(CFG, start_l0=8, lookup_by_rows=True),
    "gated": replace(CFG, start_l0=8),
}


def new_stream(lm, rows, seed: int = 3) -> tu.ActivationStream:
    return tu.ActivationStream(lm, rows, HOOK, batch_size=100, buffer_tokens=350, seed=seed)


def new_saes(lm) -> dict[str, tu.TSAE]:
    """One of every activation; three have a table (learned, frozen, learned by rows)."""
    torch.manual_seed(0)
    tables = {}
    for name in ("topk", "batchtopk", "relu"):
        W = torch.randn(lm.n_vocab, 32)
        tables[name] = tu.TokenLookup(W, trainable=name != "batchtopk")
    saes = {}
    for name in tu.ACTIVATIONS:
        l1 = 0.1 if name in ("relu", "gated") else 0.0
        cfg = tu.TSAEConfig(d_in=32, d_sae=64, activation=name, k=4, l1_coefficient=l1)
        saes[name] = tu.TSAE(cfg, tables.get(name))
    return saes


def state(saes) -> dict[str, torch.Tensor]:
    """Copies of all parameters and buffers."""
    tensors = {}
    for name, sae in saes.items():
        for key, tensor in (*sae.named_parameters(), *sae.named_buffers()):
            tensors[f"{name}/{key}"] = tensor.detach().clone()
    return tensors


def assert_equal_states(saes, others) -> None:
    expected, actual = state(others), state(saes)
    assert actual.keys() == expected.keys()
    for name, value in actual.items():
        assert torch.equal(value, expected[name]), name


def without_seconds(history: list[dict]) -> list[dict]:
    return [{key: value for key, value in row.items() if key != "seconds"} for row in history]


class Stop(Exception):
    pass


def stop_at(stop: int):
    """An `after_step` that raises Stop after one step."""

    def after_step(step):
        if step == stop:
            raise Stop

    return after_step


# -- one process --


@pytest.mark.parametrize("position", [(0, 0), (0, 2), (1, 0), (1, 3), (9, 1), (30, 0)])
def test_a_stream_resumes_from_any_position(lm, rows, position):
    """Over epochs too: 30 buffers are more rows than there are."""
    batches, positions = [], []
    stream = new_stream(lm, rows)
    for x, tokens in stream:
        batches.append((x.clone(), tokens.clone()))
        positions.append(stream.position)
        if stream.position[0] > 31:
            break
    first = next(i for i, p in enumerate(positions) if tuple(p) > position)
    resumed = new_stream(lm, rows).batches(position)
    for x, tokens in batches[first : first + 5]:
        resumed_x, resumed_tokens = next(resumed)
        assert torch.equal(x, resumed_x)
        assert torch.equal(tokens, resumed_tokens)


@pytest.fixture(scope="module")
def uninterrupted(lm, rows):
    saes = new_saes(lm)
    history = tu.train(saes, new_stream(lm, rows), CFGS, progress=False, log_every=4)
    return saes, without_seconds(history)


@pytest.mark.parametrize("every", [200, 300])  # within a buffer, and at its end
@pytest.mark.parametrize("stops", [[0], [4], [7, 8], [13], [14]])
def test_a_resumed_run_ends_bit_for_bit_the_same(lm, rows, uninterrupted, tmp_path, stops, every):
    """Stopped after the steps `stops`, with a checkpoint every so many tokens.

    Weights, counters, thresholds and history are those of a run that was never stopped.
    """
    path = tmp_path / "c.safetensors"
    options = {"progress": False, "log_every": 4, "checkpoint": path, "checkpoint_every": every}
    for stop in stops:
        saes, after_step = new_saes(lm), stop_at(stop)
        with pytest.raises(Stop):
            tu.train(saes, new_stream(lm, rows), CFGS, after_step=after_step, **options)
    saes = new_saes(lm)
    history = tu.train(saes, new_stream(lm, rows), CFGS, **options)
    assert_equal_states(saes, uninterrupted[0])
    assert without_seconds(history) == uninterrupted[1]
    assert [file.name for file in tmp_path.iterdir()] == [path.name], "nothing partial is left"


def test_a_finished_run_is_not_trained_again(lm, rows, tmp_path):
    options = {"progress": False, "checkpoint": tmp_path / "c.safetensors"}
    saes, again = new_saes(lm), new_saes(lm)
    history = tu.train(saes, new_stream(lm, rows), CFGS, **options)
    # A single step would raise Stop.
    same = tu.train(again, new_stream(lm, rows), CFGS, after_step=stop_at(0), **options)
    assert same == history
    assert_equal_states(again, saes)


def narrow_sae() -> tu.TSAE:
    return tu.TSAE(tu.TSAEConfig(d_in=32, d_sae=32, k=4))


def sae_with_frozen_table(lm) -> tu.TSAE:
    table = tu.TokenLookup(torch.zeros(lm.n_vocab, 32), trainable=False)
    return tu.TSAE(tu.TSAEConfig(d_in=32, d_sae=64, k=4), table)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("learning rate", "lr 0.01 there, 0.02 here"),
        ("rows", "other rows"),
        ("table", "table learned there, frozen here"),
        ("width", "d_sae 64 there, 32 here"),
        ("seed", "seed 3 there, 4 here"),
    ],
)
def test_a_checkpoint_of_another_run_is_refused(lm, rows, tmp_path, change, message):
    path = tmp_path / "c.safetensors"
    tu.train(new_saes(lm), new_stream(lm, rows), CFG, progress=False, checkpoint=path)
    saes, stream, cfg = new_saes(lm), new_stream(lm, rows), CFG
    match change:
        case "learning rate":
            cfg = replace(CFG, lr=2e-2)
        case "rows":
            stream = new_stream(lm, rows.flip(0))
        case "table":
            saes["topk"] = sae_with_frozen_table(lm)
        case "width":
            saes = {"topk": narrow_sae()}
        case "seed":
            stream = new_stream(lm, rows, seed=4)
    with pytest.raises(ValueError, match=message):
        tu.train(saes, stream, cfg, progress=False, checkpoint=path)


def test_a_damaged_checkpoint_is_refused(lm, rows, tmp_path):
    path = tmp_path / "c.safetensors"

    def run(checkpoint=path):
        tu.train(new_saes(lm), new_stream(lm, rows), CFG, progress=False, checkpoint=checkpoint)

    run()
    whole = path.read_bytes()
    for damaged in (whole[: len(whole) // 2], whole[:7], b"", b"\xff" * 100):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match="damaged"):
            run()
    save_file({"x": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match="damaged"):
        run()
    with pytest.raises(ValueError, match="not a file"):
        run(checkpoint=tmp_path)


def test_a_bad_state_or_a_full_disk_leaves_the_last_checkpoint(lm, rows, tmp_path, monkeypatch):
    path, saes = tmp_path / "c.safetensors", new_saes(lm)
    options = {"progress": False, "checkpoint": path, "checkpoint_every": 100}

    def poison(step):
        if step == 4:
            saes["topk"].W_dec.data[0, 0] = float("nan")

    with pytest.raises(FloatingPointError, match="topk/W_dec is not finite"):
        tu.train(saes, new_stream(lm, rows), CFG, after_step=poison, **options)
    kept = path.read_bytes()

    def save_on_a_full_disk(*_):
        (tmp_path / ".c.safetensors.partial" / "c.safetensors").write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoints, "save_file", save_on_a_full_disk)
    message = r"could not write the checkpoint .* the previous checkpoint is unchanged"
    with pytest.raises(OSError, match=message):
        tu.train(new_saes(lm), new_stream(lm, rows), CFG, **options)
    assert path.read_bytes() == kept
    assert [file.name for file in tmp_path.iterdir()] == ["c.safetensors"]


def test_a_stream_that_cannot_resume_is_refused(lm, tmp_path):
    class Unread:
        batch_size = 10

        def __iter__(self):
            raise AssertionError("must not be read")

    saes, path = {"a": sae_with_frozen_table(lm)}, tmp_path / "c.safetensors"
    with pytest.raises(ValueError, match="ActivationStream"):
        tu.train(saes, Unread(), CFG, progress=False, checkpoint=path)


def test_saes_that_share_a_table_resume(lm, rows, tmp_path):
    table = tu.TokenLookup(torch.randn(lm.n_vocab, 32), trainable=False)

    def pair():
        cfgs = {name: tu.TSAEConfig(d_in=32, d_sae=64, k=k) for name, k in (("a", 2), ("b", 4))}
        return {name: tu.TSAE(cfg, table) for name, cfg in cfgs.items()}

    saes, again = pair(), pair()
    options = {"progress": False, "checkpoint": tmp_path / "c.safetensors"}
    tu.train(saes, new_stream(lm, rows), CFG, checkpoint_every=300, **options)
    tu.train(again, new_stream(lm, rows), CFG, **options)
    assert_equal_states(again, saes)


# -- train.py --


def command(folder: Path, gpt2_folder: Path, *more: str) -> list[str]:
    """Arguments of a small training with train.py."""
    model = f"--device cpu --layer 2 --k 4 --lookup --expansion 2 --model {gpt2_folder}"
    text = f"--corpus {folder / 'text.jsonl'} --tokens 6e3 --context-size 16 --heldout-rows 8"
    batches = "--batch-size 100 --buffer-tokens 350"
    return ["train.py", *model.split(), *text.split(), *batches.split(), *more]


def environment(threads: int = 1) -> dict[str, str]:
    return os.environ | {"OMP_NUM_THREADS": str(threads), "CUDA_VISIBLE_DEVICES": ""}


@pytest.fixture
def text_folder(tmp_path, texts) -> Path:
    lines = [json.dumps({"text": text}) + "\n" for text in texts * 3]
    (tmp_path / "text.jsonl").write_text("".join(lines))
    return tmp_path


def weights(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(folder.glob("*.safetensors"))}


def kill_after_a_checkpoint(process: subprocess.Popen, checkpoint: Path, delay: float) -> bool:
    """Send SIGKILL `delay` seconds after the process wrote its first checkpoint.

    Returns whether the process was still running.
    """
    before = checkpoint.stat().st_mtime_ns if checkpoint.exists() else 0
    deadline = time.time() + 60
    while process.poll() is None and time.time() < deadline:
        if checkpoint.exists() and checkpoint.stat().st_mtime_ns > before:
            time.sleep(delay)
            if process.poll() is None:
                process.send_signal(signal.SIGKILL)
                return True
            return False
    return False


def test_a_run_killed_at_random_moments_ends_the_same(text_folder, gpt2_folder):
    """SIGKILL hits train.py inside steps and inside writes; its weights end byte for byte the same.

    `make test-resume` does it twenty times.
    """
    wanted = int(os.environ.get("TSAE_KILLS", 3))
    budget = ("--checkpoint-every", "100", "--tokens", str(3000 * wanted))
    run = [sys.executable, *command(text_folder, gpt2_folder, *budget)]
    whole, out = text_folder / "whole", text_folder / "killed"
    options = {"cwd": ROOT, "env": environment()}
    subprocess.run([*run, "--out", str(whole)], check=True, capture_output=True, **options)
    rng, kills = random.Random(0), 0
    silent = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    for _ in range(10 * wanted):
        process = subprocess.Popen([*run, "--out", str(out)], **options, **silent)
        if kills < wanted:
            checkpoint = text_folder / "killed.checkpoint.safetensors"
            kills += kill_after_a_checkpoint(process, checkpoint, 0.1 * rng.random())
        if process.wait(timeout=120) == 0:
            break
    print(f"killed {kills} times")
    assert kills >= 2 * wanted // 3
    assert weights(out) == weights(whole)
    assert len(weights(out)) == 2
    left = {file.name for file in text_folder.iterdir()}
    records = {"whole.history.csv", "killed.history.csv"}
    assert left == {"text.jsonl", "whole", "killed"} | records, "nothing partial, no checkpoint"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--layer 9", "out of range"),
        ("--context-size 64", "beyond the model's 32 positions"),
        ("--k 65", "k = 65"),
        ("--heldout-rows 0", "must be at least 1"),
        ("--batch-size 0", "must be at least 1"),
        ("--tokens inf", "must be at least 1"),
        ("--corpus nowhere.jsonl", "no corpus at"),
        ("--heldout-rows 9999", "none are left"),
        ("--buffer-tokens 50", "must not exceed"),
    ],
)
def test_bad_arguments_get_one_sentence(
    text_folder, gpt2_folder, options, message, monkeypatch, capsys
):
    run = command(text_folder, gpt2_folder, "--out", str(text_folder / "out"), *options.split())
    monkeypatch.setattr(sys, "argv", run)
    with pytest.raises((ValueError, OSError, SystemExit)) as error:
        train.main()
    assert message in f"{error.value} {capsys.readouterr().err}"


@pytest.mark.parametrize(
    ("file", "message"),
    [("notes.txt", "holds other files"), ("cfg.json", "holds an SAE already")],
)
def test_an_occupied_output_is_refused_before_training(text_folder, gpt2_folder, file, message):
    out = text_folder / "out"
    out.mkdir()
    (out / file).write_text("{}")
    run = [sys.executable, *command(text_folder, gpt2_folder, "--out", str(out))]
    result = subprocess.run(run, cwd=ROOT, env=environment(), capture_output=True, text=True)
    assert result.returncode
    assert message in result.stderr
    assert "Traceback" not in result.stderr
    assert "training" not in result.stderr


# -- two processes --


def torchrun(*arguments: str, fails: bool = False) -> None:
    """Run a script in two processes, and check whether it succeeds."""
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    options = {"cwd": ROOT, "env": environment() | {"PYTHONPATH": str(ROOT)}, "timeout": 300}
    result = subprocess.run([*start, *arguments], capture_output=True, text=True, **options)
    assert (result.returncode != 0) == fails, result.stderr


FIXED_BATCHES = """
import json, sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

import tsae_utils as tu

folder = Path(sys.argv[1])
torch.distributed.init_process_group("gloo")
rank, data = torch.distributed.get_rank(), load_file(folder / "data.safetensors")
x, tokens = data["x"], data["tokens"]


class Half:
    batch_size = 32

    def __iter__(self):
        for x_part, tokens_part in zip(x.split(64), tokens.split(64)):
            yield x_part.chunk(2)[rank], tokens_part.chunk(2)[rank]


exec((folder / "setup.py").read_text())
history = tu.train(saes, Half(), cfgs, progress=False)
if rank == 0:
    tensors = {}
    for name, sae in saes.items():
        for key, tensor in (*sae.named_parameters(), *sae.named_buffers()):
            tensors[f"{name}/{key}"] = tensor.clone()
    save_file(tensors, folder / "out.safetensors")
    (folder / "history.json").write_text(json.dumps(history))
torch.distributed.destroy_process_group()
"""
SETUP = """
torch.manual_seed(0)
table = torch.randn(50, 16, dtype=torch.float64)
saes, cfgs = {}, {}
for name, l1 in (("topk", 0.0), ("relu", 0.1), ("gated", 0.1)):
    cfg = tu.TSAEConfig(d_in=16, d_sae=48, activation=name, k=4, l1_coefficient=l1)
    saes[name] = tu.TSAE(cfg, tu.TokenLookup(table)).double()
    special = {"aux_k": 8 * (name == "topk"), "aux_window": 64, "lookup_by_rows": name == "relu"}
    cfgs[name] = tu.TrainConfig(tokens=len(x), lr=1e-2, l1_warmup=0.0, **special)
"""


def test_two_processes_step_as_one_on_the_union(tmp_path):
    """Three steps in fp64 on fixed activations, once in two processes and once in one.

    Weights, rows of the table, counters and the history are equal.
    """
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(192, 16, generator=generator, dtype=torch.float64)
    tokens = torch.randint(50, (192, 1), generator=generator)
    save_file({"x": x, "tokens": tokens}, tmp_path / "data.safetensors")
    (tmp_path / "step.py").write_text(FIXED_BATCHES)
    (tmp_path / "setup.py").write_text(SETUP)
    torchrun(str(tmp_path / "step.py"), str(tmp_path))
    theirs = load_file(tmp_path / "out.safetensors")
    their_history = json.loads((tmp_path / "history.json").read_text())

    class Whole:
        batch_size = 64

        def __iter__(self):
            yield from zip(x.split(64), tokens.split(64), strict=True)

    scope = {"torch": torch, "tu": tu, "x": x}
    exec(SETUP, scope)
    history = tu.train(scope["saes"], Whole(), scope["cfgs"], progress=False)
    start = scope["table"].float().double()
    for name, sae in scope["saes"].items():
        assert not torch.allclose(sae.lookup.W, start), "the table has moved"
        for key, value in (*sae.named_parameters(), *sae.named_buffers()):
            their_value = theirs[f"{name}/{key}"]
            assert torch.allclose(their_value, value, rtol=1e-9, atol=1e-12), (name, key)
    for their_row, row in zip(their_history, history, strict=True):
        for key in their_row.keys() - {"system", "seconds"}:
            assert their_row[key] == pytest.approx(row[key], rel=1e-6), "the log is of the union"


NO_THREAD_LEFT = """
import sys
from pathlib import Path

sys.argv = sys.argv[1:]
import train

train.main()
threads = [file.read_text().strip() for file in Path("/proc/self/task").glob("*/comm")]
left = [name for name in threads if "gloo" in name]
assert not left, f"the process group outlives its end: {threads}"
"""


def test_train_py_learns_as_well_on_two_processes(text_folder, gpt2_folder):
    one, two = text_folder / "one", text_folder / "two"
    run = [sys.executable, *command(text_folder, gpt2_folder, "--out", str(one))]
    options = {"cwd": ROOT, "env": environment(threads=2), "check": True}
    result = subprocess.run(run, capture_output=True, text=True, **options)
    assert "tok/s" in result.stderr
    assert "loss=" in result.stderr
    assert "nmse" in result.stdout
    # A worker thread of gloo that is left at exit aborts the process now and then.
    script = text_folder / "no_thread_left.py"
    script.write_text(NO_THREAD_LEFT)
    torchrun(str(script), *command(text_folder, gpt2_folder, "--out", str(two)))
    nmse_of_one, nmse_of_two = (
        tu.read_cfg(folder)["metadata"]["tokenized"]["heldout"]["nmse"] for folder in (one, two)
    )
    assert nmse_of_two == pytest.approx(nmse_of_one, rel=0.1)
    assert nmse_of_one < 0.8
    assert load_file(two / "token_lookup.safetensors")["W_lookup"].shape == (64, 32)


STOPPED_AT_STEP_30 = """
import sys

sys.argv = sys.argv[1:]
import train
import tsae_utils as tu

original_train = tu.train


def stop(step):
    if step == 30:
        raise SystemExit(3)


tu.train = lambda *args, **options: original_train(*args, **options, after_step=stop)
train.main()
"""


def test_two_processes_resume_from_two_positions(text_folder, gpt2_folder):
    """Stopped at step 30 and resumed, two processes end byte for byte as without a break."""
    # Every second document, those of the second process, is short: with more separators its rows
    # give fewer activations.
    text = text_folder / "text.jsonl"
    lines = []
    for line in text.read_text().splitlines():
        short = json.dumps({"text": json.loads(line)["text"][:30]})
        lines += [f"{line}\n", f"{short}\n"]
    text.write_text("".join(lines))
    whole, stopped = text_folder / "whole", text_folder / "stopped"
    more = "--checkpoint-every 700 --heldout-rows 2 --lookup-by-rows"
    run = command(text_folder, gpt2_folder, *more.split())
    torchrun(*run, "--out", str(whole))
    script = text_folder / "stopped.py"
    script.write_text(STOPPED_AT_STEP_30)
    torchrun(str(script), *run, "--out", str(stopped), fails=True)
    assert not stopped.exists()
    tensors = load_file(text_folder / "stopped.checkpoint.safetensors")
    first, second = json.loads(bytes(tensors["state"].tolist()))["places"]
    assert first[:2] != second[:2], "or the two could be mistaken for each other"
    torchrun(*run, "--out", str(stopped))
    assert weights(stopped) == weights(whole)
