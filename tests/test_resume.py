"""Checkpoints: a run that is stopped anywhere ends as one that is not. And training on two processes."""

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

import runs
import train
import tsae_utils as tu

ROOT = Path(__file__).resolve().parent.parent
HOOK = "blocks.2.hook_resid_pre"
L1 = {"topk": 0.0, "batchtopk": 0.0, "relu": 0.1, "gated": 0.1}


def new_stream(lm, rows) -> tu.ActivationStream:
    return tu.ActivationStream(lm, rows, HOOK, batch_size=100, buffer_tokens=350, seed=3)


def new_saes(lm) -> dict[str, tu.TSAE]:
    """One of every activation, the first three with a table (learned, frozen, learned by rows)."""
    torch.manual_seed(0)
    tables = {
        a: tu.TokenLookup(torch.randn(lm.n_vocab, 32), trainable=a != "batchtopk")
        for a in ("topk", "batchtopk", "relu")
    }
    return {
        a: tu.TSAE(
            tu.TSAEConfig(d_in=32, d_sae=64, activation=a, k=4, l1_coefficient=L1[a]), tables.get(a)
        )
        for a in tu.ACTIVATIONS
    }


CFG = tu.TrainConfig(tokens=1500, lr=1e-2, aux_window=200)
CFGS = {
    a: replace(CFG, aux_k=8)
    if "topk" in a
    else replace(CFG, start_l0=8, lookup_by_rows=a == "relu")
    for a in tu.ACTIVATIONS
}


def state(saes) -> dict[str, torch.Tensor]:
    return {
        f"{n}/{k}": t.detach().clone()
        for n, sae in saes.items()
        for k, t in (*sae.named_parameters(), *sae.named_buffers())
    }


class Stop(Exception):
    pass


def stop_at(step):
    def after(s):
        if s == step:
            raise Stop

    return after


@pytest.mark.parametrize("position", [(0, 0), (0, 2), (1, 0), (1, 3), (9, 1), (30, 0)])
def test_a_stream_goes_on_from_any_place(lm, rows, position):
    """Over epochs too: 30 buffers are more rows than there are."""
    whole, places, stream = [], [], new_stream(lm, rows)
    for x, t in stream:
        whole.append((x.clone(), t.clone()))
        places.append(stream.position)
        if stream.position[0] > 31:
            break
    later = new_stream(lm, rows).batches(position)
    first = next(
        i
        for i, p in enumerate(places)
        if p[0] > position[0] or (p[0] == position[0] and p[1] > position[1])
    )
    for x, t in whole[first : first + 5]:
        x2, t2 = next(later)
        assert torch.equal(x, x2) and torch.equal(t, t2)


@pytest.fixture(scope="module")
def uninterrupted(lm, rows):
    saes = new_saes(lm)
    history = tu.train(saes, new_stream(lm, rows), CFGS, progress=False, log_every=4)
    return state(saes), [{k: v for k, v in row.items() if k != "seconds"} for row in history]


@pytest.mark.parametrize("every", [200, 300])  # within a buffer, and at its end
@pytest.mark.parametrize("stops", [[0], [4], [7, 8], [13], [14]])
def test_a_resumed_run_ends_bit_for_bit_the_same(lm, rows, uninterrupted, tmp_path, stops, every):
    """Stopped after these steps, a checkpoint every so many tokens; weights, counters, thresholds and history are those of one run."""
    for stop in [*stops, None]:
        saes = new_saes(lm)
        try:
            history = tu.train(
                saes,
                new_stream(lm, rows),
                CFGS,
                progress=False,
                log_every=4,
                checkpoint=tmp_path / "c.safetensors",
                checkpoint_every=every,
                after_step=None if stop is None else stop_at(stop),
            )
        except Stop:
            continue
    for name, value in state(saes).items():
        assert torch.equal(value, uninterrupted[0][name]), name
    assert [{k: v for k, v in row.items() if k != "seconds"} for row in history] == uninterrupted[1]
    assert [p.name for p in tmp_path.iterdir()] == ["c.safetensors"], "nothing partial is left"


def test_a_finished_run_is_not_trained_again(lm, rows, tmp_path):
    path, saes = tmp_path / "c.safetensors", new_saes(lm)
    history = tu.train(saes, new_stream(lm, rows), CFGS, progress=False, checkpoint=path)
    again = new_saes(lm)
    assert (
        tu.train(
            again,
            new_stream(lm, rows),
            CFGS,
            progress=False,
            checkpoint=path,
            after_step=stop_at(0),
        )
        == history
    )
    assert all(
        torch.equal(a, b) for a, b in zip(state(saes).values(), state(again).values(), strict=True)
    )


def frozen(lm) -> tu.TSAE:
    return tu.TSAE(
        tu.TSAEConfig(d_in=32, d_sae=64, k=4),
        tu.TokenLookup(torch.zeros(lm.n_vocab, 32), trainable=False),
    )


@pytest.mark.parametrize(
    "change, told",
    [
        (
            lambda lm, rows: (new_saes(lm), new_stream(lm, rows), replace(CFG, lr=2e-2)),
            "lr 0.01 there, 0.02 here",
        ),
        (lambda lm, rows: (new_saes(lm), new_stream(lm, rows.flip(0)), CFG), "other rows"),
        (
            lambda lm, rows: (new_saes(lm) | {"topk": frozen(lm)}, new_stream(lm, rows), CFG),
            "table learned there, frozen here",
        ),
        (
            lambda lm, rows: (
                {"topk": tu.TSAE(tu.TSAEConfig(d_in=32, d_sae=32, k=4))},
                new_stream(lm, rows),
                CFG,
            ),
            "d_sae 64 there, 32 here",
        ),
        (
            lambda lm, rows: (
                new_saes(lm),
                tu.ActivationStream(lm, rows, HOOK, 100, 350, seed=4),
                CFG,
            ),
            "seed 3 there, 4 here",
        ),
    ],
)
def test_a_checkpoint_of_another_run_is_refused(lm, rows, tmp_path, change, told):
    path = tmp_path / "c.safetensors"
    tu.train(new_saes(lm), new_stream(lm, rows), CFG, progress=False, checkpoint=path)
    saes, stream, cfg = change(lm, rows)
    with pytest.raises(ValueError, match=told):
        tu.train(saes, stream, cfg, progress=False, checkpoint=path)


def test_a_damaged_checkpoint_is_refused(lm, rows, tmp_path):
    path = tmp_path / "c.safetensors"
    tu.train(new_saes(lm), new_stream(lm, rows), CFG, progress=False, checkpoint=path)
    whole = path.read_bytes()
    for damaged in (whole[: len(whole) // 2], whole[:7], b"", b"\xff" * 100):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match="damaged"):
            tu.train(new_saes(lm), new_stream(lm, rows), CFG, progress=False, checkpoint=path)
    save_file({"x": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match="damaged"):
        tu.train(new_saes(lm), new_stream(lm, rows), CFG, progress=False, checkpoint=path)
    with pytest.raises(ValueError, match="not a file"):
        tu.train(new_saes(lm), new_stream(lm, rows), CFG, progress=False, checkpoint=tmp_path)


def test_a_bad_state_or_a_full_disk_leaves_the_last_checkpoint(lm, rows, tmp_path, monkeypatch):
    path, saes = tmp_path / "c.safetensors", new_saes(lm)

    def poison(step):
        if step == 4:
            saes["topk"].W_dec.data[0, 0] = float("nan")

    with pytest.raises(FloatingPointError, match="topk/W_dec is not finite"):
        tu.train(
            saes,
            new_stream(lm, rows),
            CFG,
            progress=False,
            checkpoint=path,
            checkpoint_every=100,
            after_step=poison,
        )
    kept = path.read_bytes()

    def full(*_):
        (tmp_path / ".c.safetensors.partial" / "c.safetensors").write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(runs, "save_file", full)
    with pytest.raises(
        OSError, match=r"could not write the checkpoint .* the one before is as it was"
    ):
        tu.train(
            new_saes(lm),
            new_stream(lm, rows),
            CFG,
            progress=False,
            checkpoint=path,
            checkpoint_every=100,
        )
    assert path.read_bytes() == kept and [f.name for f in tmp_path.iterdir()] == ["c.safetensors"]


def test_what_cannot_be_gone_on_with_is_refused_before_training(lm, tmp_path):
    class Endless:
        batch_size = 10

        def __iter__(self):
            raise AssertionError("must not be read")

    with pytest.raises(ValueError, match="ActivationStream"):
        tu.train(
            {"a": frozen(lm)}, Endless(), CFG, progress=False, checkpoint=tmp_path / "c.safetensors"
        )


def test_two_saes_may_share_a_table(lm, rows, tmp_path):
    table = tu.TokenLookup(torch.randn(lm.n_vocab, 32), trainable=False)

    def two():
        return {
            n: tu.TSAE(tu.TSAEConfig(d_in=32, d_sae=64, k=k), table)
            for n, k in (("a", 2), ("b", 4))
        }

    saes, again = two(), two()
    tu.train(
        saes,
        new_stream(lm, rows),
        CFG,
        progress=False,
        checkpoint=tmp_path / "c.safetensors",
        checkpoint_every=300,
    )
    tu.train(
        again, new_stream(lm, rows), CFG, progress=False, checkpoint=tmp_path / "c.safetensors"
    )
    assert all(
        torch.equal(a, b) for a, b in zip(state(saes).values(), state(again).values(), strict=True)
    )


def command(folder: Path, gpt2_folder: Path, *more: str) -> list[str]:
    small = "--layer 2 --k 4 --lookup --tokens 6e3 --expansion 2 --context-size 16 --batch-size 100 --buffer-tokens 350 --heldout-rows 8"
    return [
        "train.py",
        "--device",
        "cpu",
        "--model",
        str(gpt2_folder),
        "--corpus",
        str(folder / "text.jsonl"),
        *small.split(),
        *more,
    ]


@pytest.fixture
def text_folder(tmp_path, texts) -> Path:
    (tmp_path / "text.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in texts * 3))
    return tmp_path


def weights(folder: Path) -> dict[str, bytes]:
    return {f.name: f.read_bytes() for f in sorted(folder.glob("*.safetensors"))}


def test_killed_at_random_moments(text_folder, gpt2_folder):
    """train.py under SIGKILL, inside steps and inside writes; the weights are those of a run left alone, byte for byte.

    `make kill` does it twenty times.
    """
    wanted = int(os.environ.get("TSAE_KILLS", 3))
    env = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    run = [
        sys.executable,
        *command(
            text_folder, gpt2_folder, "--checkpoint-every", "100", "--tokens", str(3000 * wanted)
        ),
    ]
    subprocess.run(
        [*run, "--out", str(text_folder / "whole")],
        cwd=ROOT,
        env=env,
        check=True,
        capture_output=True,
    )
    rng, kills, out = random.Random(0), 0, text_folder / "killed"
    for _ in range(10 * wanted):
        process = subprocess.Popen(
            [*run, "--out", str(out)],
            cwd=ROOT,
            env=env,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        checkpoint = text_folder / "killed.checkpoint.safetensors"
        before, deadline = (
            checkpoint.stat().st_mtime_ns if checkpoint.exists() else 0,
            time.time() + 60,
        )
        while (
            kills < wanted and process.poll() is None and time.time() < deadline
        ):  # from its first checkpoint on
            if checkpoint.exists() and checkpoint.stat().st_mtime_ns > before:
                time.sleep(0.1 * rng.random())
                if process.poll() is None:
                    process.send_signal(signal.SIGKILL)
                    kills += 1
                break
        if process.wait(timeout=120) == 0:
            break
    print(f"killed {kills} times")
    assert (
        kills >= 2 * wanted // 3
        and weights(out) == weights(text_folder / "whole")
        and len(weights(out)) == 2
    )
    left = {f.name for f in text_folder.iterdir()}
    assert left == {"text.jsonl", "whole", "killed"}, (
        "a finished run leaves no checkpoint and nothing partial"
    )


ONE_STEP = """
import json, sys
from pathlib import Path
import torch
from safetensors.torch import load_file, save_file
folder = Path(sys.argv[1])
import tsae_utils as tu
torch.distributed.init_process_group("gloo")
rank, data = torch.distributed.get_rank(), load_file(folder / "data.safetensors")
x, t = data["x"], data["t"]
class Half:
    batch_size = 32
    def __iter__(self):
        for a, b in zip(x.split(64), t.split(64)):
            yield a.chunk(2)[rank], b.chunk(2)[rank]
exec((folder / "setup.py").read_text())
history = tu.train(saes, Half(), cfgs, progress=False)
if rank == 0:
    every = {f"{n}/{k}": v.clone() for n, s in saes.items() for k, v in (*s.named_parameters(), *s.named_buffers())}
    save_file(every, folder / "out.safetensors")
    (folder / "history.json").write_text(json.dumps(history))
torch.distributed.destroy_process_group()
"""
SETUP = """
torch.manual_seed(0)
table, l1 = torch.randn(50, 16, dtype=torch.float64), {"topk": 0.0, "relu": 0.1, "gated": 0.1}
cfg = {a: tu.TSAEConfig(d_in=16, d_sae=48, activation=a, k=4, l1_coefficient=c) for a, c in l1.items()}
saes = {a: tu.TSAE(c, tu.TokenLookup(table)).double() for a, c in cfg.items()}
cfgs = {a: tu.TrainConfig(tokens=len(x), lr=1e-2, l1_warmup=0.0, aux_k=8 * (a == "topk"), aux_window=64, lookup_by_rows=a == "relu")
        for a in saes}
"""


def torchrun(*arguments: str, fails: bool = False) -> None:
    env = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*start, *arguments], cwd=ROOT, env=env, capture_output=True, text=True, timeout=300
    )
    assert (done.returncode != 0) == fails, done.stderr


def test_two_processes_step_as_one_on_the_union(tmp_path):
    """Three steps in fp64 on fixed activations: weights, table rows, counters and log equal those of a single process."""
    g = torch.Generator().manual_seed(0)
    x, t = (
        torch.randn(192, 16, generator=g, dtype=torch.float64),
        torch.randint(50, (192, 1), generator=g),
    )
    save_file({"x": x, "t": t}, tmp_path / "data.safetensors")
    (tmp_path / "step.py").write_text(ONE_STEP)
    (tmp_path / "setup.py").write_text(SETUP)
    torchrun(str(tmp_path / "step.py"), str(tmp_path))
    theirs, their_history = (
        load_file(tmp_path / "out.safetensors"),
        json.loads((tmp_path / "history.json").read_text()),
    )

    class Whole:
        batch_size = 64

        def __iter__(self):
            yield from zip(x.split(64), t.split(64), strict=True)

    scope = {"torch": torch, "tu": tu, "x": x}
    exec(SETUP, scope)
    history = tu.train(scope["saes"], Whole(), scope["cfgs"], progress=False)
    for name, sae in scope["saes"].items():
        assert not torch.allclose(sae.lookup.W, scope["table"].float().double()), (
            "the table has moved"
        )
        for key, value in (*sae.named_parameters(), *sae.named_buffers()):
            assert torch.allclose(theirs[f"{name}/{key}"], value, rtol=1e-9, atol=1e-12), (
                name,
                key,
            )
    for a, b in zip(their_history, history, strict=True):
        assert all(
            a[k] == pytest.approx(b[k], rel=1e-6) for k in a if k not in ("system", "seconds")
        ), "the log is of the union too"


ENDS = """
import sys
from pathlib import Path
sys.argv = sys.argv[1:]
import train
train.main()
left = [f.read_text().strip() for f in Path("/proc/self/task").glob("*/comm")]
assert not any("gloo" in name for name in left), f"the process group outlives its end: {left}"
"""


def test_train_py_on_two_processes_trains_as_well(text_folder, gpt2_folder):
    env = os.environ | {"OMP_NUM_THREADS": "2", "CUDA_VISIBLE_DEVICES": ""}
    one = command(text_folder, gpt2_folder, "--out", str(text_folder / "one"))
    said = subprocess.run(
        [sys.executable, *one], cwd=ROOT, env=env, check=True, capture_output=True, text=True
    )
    assert "tok/s" in said.stderr and "loss=" in said.stderr and "nmse" in said.stdout
    (text_folder / "ends.py").write_text(
        ENDS
    )  # a worker thread of gloo left at exit aborts the process now and then
    torchrun(
        str(text_folder / "ends.py"),
        *command(text_folder, gpt2_folder, "--out", str(text_folder / "two")),
    )
    errors = {
        n: tu.read_cfg(text_folder / n)["metadata"]["tokenized"]["heldout"]["nmse"]
        for n in ("one", "two")
    }
    assert errors["two"] == pytest.approx(errors["one"], rel=0.1) and errors["one"] < 0.8
    assert load_file(text_folder / "two" / "token_lookup.safetensors")["W_lookup"].shape == (64, 32)


STOPPED = """
import sys
sys.argv = sys.argv[1:]
import train, tsae_utils as tu
whole = tu.train
def stop(step):
    if step == 30:
        raise SystemExit(3)
tu.train = lambda *a, **k: whole(*a, **k, after_step=stop)
train.main()
"""


def test_two_processes_go_on_from_two_places(text_folder, gpt2_folder):
    """Stopped at step 30, gone on with: byte for byte the run of two processes without a break."""
    documents = (text_folder / "text.jsonl").read_text().splitlines()
    short = [
        json.dumps({"text": json.loads(d)["text"][:30]}) for d in documents
    ]  # the second's: more ends, fewer activations a row
    (text_folder / "text.jsonl").write_text(
        "".join(f"{a}\n{b}\n" for a, b in zip(documents, short, strict=True))
    )
    run = command(
        text_folder,
        gpt2_folder,
        "--checkpoint-every",
        "700",
        "--heldout-rows",
        "2",
        "--lookup-by-rows",
    )
    torchrun(*run, "--out", str(text_folder / "whole"))
    (text_folder / "stopped.py").write_text(STOPPED)
    torchrun(
        str(text_folder / "stopped.py"), *run, "--out", str(text_folder / "stopped"), fails=True
    )
    assert not (text_folder / "stopped").exists()
    left = json.loads(
        bytes(load_file(text_folder / "stopped.checkpoint.safetensors")["state"].tolist())
    )
    assert left["places"][0][:2] != left["places"][1][:2], (
        "or the two could be mistaken for each other"
    )
    torchrun(*run, "--out", str(text_folder / "stopped"))
    assert weights(text_folder / "stopped") == weights(text_folder / "whole")


@pytest.mark.parametrize(
    "more, told",
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
def test_bad_arguments_get_one_sentence(text_folder, gpt2_folder, more, told, monkeypatch, capsys):
    monkeypatch.setattr(
        sys,
        "argv",
        [*command(text_folder, gpt2_folder, "--out", str(text_folder / "out")), *more.split()],
    )
    with pytest.raises((ValueError, OSError, SystemExit)) as error:
        train.main()
    assert told in f"{error.value} {capsys.readouterr().err}"


def test_what_stands_in_the_way_is_found_before_training(text_folder, gpt2_folder):
    for name, told in (("other", "holds other files"), ("done", "holds an SAE already")):
        (text_folder / name).mkdir()
        (text_folder / name / ("cfg.json" if name == "done" else "notes.txt")).write_text("{}")
        run = [sys.executable, *command(text_folder, gpt2_folder, "--out", str(text_folder / name))]
        done = subprocess.run(
            run, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True
        )
        assert (
            done.returncode
            and told in done.stderr
            and "Traceback" not in done.stderr
            and "training" not in done.stderr
        )
