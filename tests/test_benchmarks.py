"""What the speed comparison rests on: the data, the clock, the memory, the ratios."""

from __future__ import annotations

import argparse
import math
import subprocess
import sys
import time
from types import SimpleNamespace

import bench
import pandas as pd
import pytest
import torch
import worker
from safetensors.torch import load_file
from torch.nn import functional as F

import tsae_utils as tu
from conftest import ROOT


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "planted-32-25600.safetensors"
    return bench.planted(path, 32, 25_600, features=64, active=4, vocab=50)


def arguments(data, **changes) -> argparse.Namespace:
    """The command line of a worker for the planted data."""
    defaults = {
        "data": data,
        "system": "ours",
        "d_sae": 128,
        "k": 8,
        "batch": 256,
        "steps": 100,
        "vocab": 50,
        "saes": 1,
        "lr": 1e-2,
        "autocast": False,
        "curve": True,
    }
    return argparse.Namespace(**{**defaults, **changes})


# -- data --


def test_planted_activations_are_sparse_features_and_token_vectors(data):
    planted = load_file(data)
    x, tokens = planted["train"].float(), planted["train_tokens"].long()
    counts = torch.bincount(tokens, minlength=50)
    assert counts[0] > 2 * counts[40] > 0, "tokens have power-law frequencies"
    means = torch.zeros(50, 32).index_add_(0, tokens, x) / counts[:, None]
    residual = (x - means[tokens]).square().sum() / (x - x.mean(0)).square().sum()
    assert 0.1 < 1 - residual < 0.7, "a token's vector holds a part of the variance"


def test_nobody_starts_at_the_planted_features(data):
    """An SAE drawn from the same random numbers would start at the planted dictionary."""
    planted = load_file(data)
    x, mean = planted["heldout"].float(), planted["train"].float().mean(0)

    def untrained_error(W_dec: torch.Tensor) -> float:
        values, index = ((x - mean) @ W_dec.T).topk(4)
        acts = torch.zeros(len(x), len(W_dec)).scatter(1, index, values)
        return tu.reconstruction_error(x, mean + acts @ W_dec).nmse

    torch.manual_seed(0)  # as the peers are started
    peer = untrained_error(F.normalize(torch.randn(128, 32), dim=-1))
    ours = []
    for seed in range(20):
        sae = tu.TSAE(tu.TSAEConfig(d_in=32, d_sae=128, k=4, seed=seed))
        ours.append(untrained_error(sae.W_dec.detach()))
    assert [peer, *ours] == pytest.approx([sum(ours) / len(ours)] * 21, rel=0.1)


def test_too_little_data_is_refused(data):
    message = "holds 25600 activations: 101 steps of 256 need more"
    with pytest.raises(ValueError, match=message):
        worker.train_step(arguments(data, steps=101), "cpu")


# -- training --


def test_systems_are_compared_at_the_loss_they_reach(data):
    """Ours and plain PyTorch learn the same from the same batches.

    The table, which alone sees tokens, learns more.
    """
    results = {}
    for system in ("ours", "dense", "ours+table", "ours+table by rows"):
        results[system] = worker.train_step(arguments(data, system=system), "cpu")
    nmse = {system: result["nmse"] for system, result in results.items()}
    assert nmse["ours"] == pytest.approx(nmse["dense"], rel=0.1)
    unit = worker.train_step(arguments(data, system="ours, unit start"), "cpu")
    assert unit["nmse"] != nmse["ours"], "another start"
    assert nmse["ours+table"] < 0.95 * nmse["ours"]
    assert nmse["ours+table by rows"] < 0.95 * nmse["ours"]
    for result in results.values():
        curve = pd.DataFrame(result["curve"])
        assert curve.tokens.iloc[-1] == 25_600 and curve.seconds.is_monotonic_increasing
        assert curve.nmse.iloc[-1] == result["nmse"] < 0.8 * curve.nmse.iloc[0]
        assert 0 < result["step_ms"] < 1000 * curve.seconds.iloc[-1]


def test_every_peer_follows_the_same_cosine(data):
    optimizer = torch.optim.Adam([torch.zeros(1, requires_grad=True)], lr=1.0)
    seen = []

    def step(batch: torch.Tensor) -> None:
        seen.append(optimizer.param_groups[0]["lr"])

    args = arguments(data, steps=4, lr=2.0)
    worker.take_steps(step, torch.zeros(1024, 2), args, [optimizer])(lambda: None)
    assert seen == pytest.approx([2.0, 1 + 0.5**0.5, 1.0, 1 - 0.5**0.5])


def test_the_best_rate_is_searched_once(monkeypatch):
    """Every system gets the whole grid; systems of a known search are not searched again."""
    asked = []

    def measure(system, data, d_sae, k, batch, steps, lr, *more):
        asked.append((system, lr))
        nmse = abs(lr - 4e-3)
        return {"nmse": nmse, "curve": [{"tokens": 1, "seconds": 1.0, "nmse": nmse}]}

    monkeypatch.setattr(bench, "measure", measure)
    best, curves = bench.search("data", 128, 8, 256, 4, None)
    searched = {system for system, _ in asked}
    assert searched == set(bench.SYSTEMS) - set(bench.TWIN) - {bench.PRODUCT}
    assert len(asked) == len(bench.LRS) * len(searched)
    assert all(best[system] == 4e-3 for system in {*searched, *bench.TWIN})
    assert curves[curves.best].lr.eq(4e-3).all()
    asked.clear()
    again, all_curves = bench.search("data", 128, 8, 256, 4, curves[curves.system != "ours"])
    assert again == best and {system for system, _ in asked} == {"ours"}
    assert len(all_curves) == len(curves)


# -- clock and memory --


def test_the_clock_leaves_the_measurement_out(data, monkeypatch):
    """On a clock on which every measurement takes an hour, training takes seconds."""
    error, hours = tu.reconstruction_error, []

    def slow_error(*args):
        hours.append(3600.0)
        return error(*args)

    clock = SimpleNamespace(perf_counter=lambda: time.perf_counter() + sum(hours))
    monkeypatch.setattr(tu, "reconstruction_error", slow_error)
    monkeypatch.setattr(worker, "time", clock)
    result = worker.train_step(arguments(data, steps=8), "cpu")
    assert len(hours) >= 4 and 0 < result["curve"][-1]["seconds"] < 3600


@pytest.mark.skipif(sys.platform != "linux", reason="memory is measured on Linux only")
def test_memory_counts_what_a_step_adds_and_nothing_before_it(data):
    big = torch.ones(2**27)  # half a GiB, which is gone when the count starts
    del big
    start = worker.start_memory_count("cpu")
    assert worker.peak_memory(start, "cpu") < 0.05
    held = torch.ones(2**26)
    del held
    assert 0.24 < worker.peak_memory(start, "cpu") < 0.3, "the peak counts, not what remains"
    # Encoder and decoder, each with its gradient and two moments.
    adam = 4 * 4 * 2 * 32 * 2**15 / 2**30
    result = worker.train_step(arguments(data, d_sae=2**15, steps=8), "cpu")
    assert adam < result["peak_gib"] < 8 * adam


def test_memory_is_not_measured_elsewhere_than_on_linux(monkeypatch):
    monkeypatch.setattr(sys, "platform", "darwin")
    start = worker.start_memory_count("cpu")
    assert math.isnan(start) and math.isnan(worker.peak_memory(start, "cpu"))


# -- tables --


def test_ratios_are_tokens_over_ours():
    rows = [{"system": "ours", "tokens_per_s": 200.0}, {"system": "peer", "tokens_per_s": 50.0}]
    assert bench.against_ours(rows).ratio_to_ours.tolist() == [1.0, 0.25]


def test_profile_names_where_the_time_goes(data):
    ms = worker.profile(arguments(data, steps=4), "cpu")["ms"]
    assert any("mm" in operation or "linear" in operation for operation in ms)
    assert sum(ms.values()) > 0


def test_results_replace_earlier_ones_of_the_same_work_and_width(tmp_path, monkeypatch):
    (tmp_path / "benchmarks").mkdir()
    monkeypatch.setattr(bench, "ROOT", tmp_path)

    def rows(work: str, tokens_per_s: float, **shape) -> pd.DataFrame:
        return pd.DataFrame(
            [{"work": work, "system": "ours", "tokens_per_s": tokens_per_s, **shape}]
        )

    for part in (
        rows("harvest", 1.0),
        rows("train_step", 2.0, d_sae=64),
        rows("train_step", 3.0, d_sae=128),
        rows("harvest", 4.0),
        rows("train_step", 5.0, d_sae=64),
    ):
        bench.Results(quick=True).add(part)  # read back from the file every time
    results = bench.Results(quick=True)
    assert results.file(".csv").name.endswith("-quick.csv")
    assert list(results.main.columns) == bench.COLUMNS
    assert results.main.tokens_per_s.tolist() == [3.0, 4.0, 5.0]


# -- environments --


def test_workers_need_no_installation_of_this_package(data, monkeypatch):
    """The peers' environment lacks our editable install: PYTHONPATH names the repository."""
    environments = []

    def fake_run(command, env, **options):
        environments.append(env)
        return subprocess.CompletedProcess(command, 0, stdout='a warning\n{"step_ms": 1.0}\n')

    monkeypatch.setenv("PYTHONPATH", "elsewhere")
    monkeypatch.setattr(bench.subprocess, "run", fake_run)
    assert bench.run("python", "worker.py", "train_step", "ours", data) == {"step_ms": 1.0}
    assert environments[0]["PYTHONPATH"].split(bench.os.pathsep) == [str(ROOT), "elsewhere"]


def test_a_worker_prints_its_measurement(data):
    options = ["--d-sae", 64, "--k", 4, "--batch", 256, "--steps", 4, "--vocab", 50]
    result = bench.run(sys.executable, "worker.py", "train_step", "ours", data, *options)
    assert set(result) == {"step_ms", "peak_gib", "nmse", "curve", "torch"}
    assert result["curve"] == [] and 0 < result["nmse"] < 2
    with pytest.raises(RuntimeError, match=r"(?s)worker\.py train_step ours .* need more"):
        bench.run(sys.executable, "worker.py", "train_step", "ours", data, "--steps", 10**6)
