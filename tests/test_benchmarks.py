"""What the speed comparison rests on: the data, the clock, the ratios."""

from __future__ import annotations

import argparse
import math
import sys

import pandas as pd
import pytest
import torch
from safetensors.torch import load_file

import tsae_utils as tu
from conftest import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))
import bench
import worker


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    path = tmp_path_factory.mktemp("bench") / "planted-32-25600.safetensors"
    return bench.planted(path, 32, 25_600, features=64, active=4, vocab=50)


def arguments(data, **changes) -> argparse.Namespace:
    return argparse.Namespace(**{"data": data, "d_sae": 128, "k": 8, "batch": 256, "steps": 100, "vocab": 50, "saes": 1, "lr": 1e-2,
                                 "autocast": False, "curve": True, "system": "ours"} | changes)


def test_planted_activations_are_sparse_features_and_token_vectors(data):
    d = load_file(data)
    x, tokens = d["train"].float(), d["train_tokens"].long()
    counts = torch.bincount(tokens, minlength=50)
    assert counts[0] > 2 * counts[40] > 0, "tokens have power-law frequencies"
    means = torch.zeros(50, 32).index_add_(0, tokens, x) / counts[:, None]
    explained = 1 - (x - means[tokens]).square().sum() / (x - x.mean(0)).square().sum()
    assert 0.1 < explained < 0.7, "a token's vector holds a part of the norm"


def test_nobody_starts_at_the_planted_features(data):
    """A planted dictionary drawn from the numbers that an SAE is drawn from would be handed to it."""
    d = load_file(data)
    x, mean = d["heldout"].float(), d["train"].float().mean(0)

    def untrained(W_dec: torch.Tensor) -> float:
        values, index = ((x - mean) @ W_dec.T).topk(4)
        return tu.reconstruction_error(x, mean + torch.zeros(len(x), len(W_dec)).scatter(1, index, values) @ W_dec).nmse

    torch.manual_seed(0)  # as the peers are started
    peer = untrained(torch.nn.functional.normalize(torch.randn(128, 32), dim=-1))
    ours = [untrained(tu.TSAE(tu.TSAEConfig(d_in=32, d_sae=128, k=4, seed=seed)).W_dec.detach()) for seed in range(20)]
    assert [peer, *ours] == pytest.approx([sum(ours) / len(ours)] * 21, rel=0.1)


def test_systems_are_compared_at_the_loss_they_reach(data):
    """Ours and plain PyTorch learn the same thing from the same batches; the table, which alone sees tokens, learns more."""
    found = {s: worker.train_step(arguments(data, system=s), "cpu") for s in ("ours", "dense", "ours+table", "ours+table by rows")}
    assert found["ours"]["nmse"] == pytest.approx(found["dense"]["nmse"], rel=0.1)
    unit = worker.train_step(arguments(data, system="ours, unit start"), "cpu")
    assert unit["nmse"] != found["ours"]["nmse"], "another start"
    assert found["ours+table"]["nmse"] < 0.95 * found["ours"]["nmse"] and found["ours+table by rows"]["nmse"] < 0.95 * found["ours"]["nmse"]
    for result in found.values():
        curve = pd.DataFrame(result["curve"])
        assert curve.tokens.iloc[-1] == 25_600 and curve.seconds.is_monotonic_increasing and curve.nmse.iloc[-1] == result["nmse"]
        assert curve.nmse.iloc[-1] < 0.8 * curve.nmse.iloc[0]
        assert 0 < result["step_ms"] < 1000 * curve.seconds.iloc[-1]


def test_the_clock_leaves_the_measurement_out(data, monkeypatch):
    plain, slow = tu.reconstruction_error, []

    def error(*args):
        slow.append(1)
        torch.randn(600, 600) @ torch.randn(600, 600)
        worker.time.sleep(0.5)
        return plain(*args)

    monkeypatch.setattr(tu, "reconstruction_error", error)
    result = worker.train_step(arguments(data, steps=8), "cpu")
    assert len(slow) >= 4 and result["curve"][-1]["seconds"] < 0.5


@pytest.mark.skipif(sys.platform != "linux", reason="the benchmarks read memory where Linux tells it")
def test_memory_counts_what_a_step_adds_and_nothing_before_it(data):
    big = torch.ones(2**27)  # half a GiB that is gone when the counting starts
    del big
    start = worker.count_from_here("cpu")
    assert worker.peak(start, "cpu") < 0.05
    held = torch.ones(2**26)
    del held
    assert 0.24 < worker.peak(start, "cpu") < 0.3, "the greatest size counts, not what is left"
    adam = 4 * 4 * 2 * 32 * 2**15 / 2**30  # encoder and decoder, each with gradient and two moments
    assert adam < worker.train_step(arguments(data, d_sae=2**15, steps=8), "cpu")["peak_gib"] < 8 * adam


def test_memory_is_not_measured_where_linux_does_not_tell_it(monkeypatch):
    monkeypatch.setattr(sys, "platform", "darwin")
    start = worker.count_from_here("cpu")
    assert math.isnan(start) and math.isnan(worker.peak(start, "cpu"))


def test_too_little_data_is_refused(data):
    with pytest.raises(ValueError, match="holds 25600 activations: 101 steps of 256 need more"):
        worker.train_step(arguments(data, steps=101), "cpu")


def test_every_peer_follows_the_same_cosine(data):
    opt, seen = torch.optim.Adam([torch.zeros(1, requires_grad=True)], lr=1.0), []
    x = torch.zeros(1024, 2)
    worker.steps(lambda y: seen.append(opt.param_groups[0]["lr"]), x, arguments(data, steps=4, lr=2.0), [opt])(lambda: None)
    assert seen == pytest.approx([2.0, 1 + 0.5**0.5, 1.0, 1 - 0.5**0.5])


def test_ratios_are_tokens_over_ours():
    table = bench.against_ours([{"system": "ours", "tokens_per_s": 200.0}, {"system": "peer", "tokens_per_s": 50.0}])
    assert table.ratio_to_ours.tolist() == [1.0, 0.25]


def test_profile_names_where_the_time_goes(data):
    found = worker.profile(arguments(data, steps=4), "cpu")["ms"]
    assert any("mm" in op or "linear" in op for op in found) and sum(found.values()) > 0


def test_the_best_rate_is_searched_once(monkeypatch):
    """Every system gets the whole grid; a known search is taken over, and a system that it lacks is searched."""
    asked = []

    def measure(system, data, d_sae, k, batch, steps, lr, *more):
        asked.append((system, lr))
        return {"nmse": abs(lr - 4e-3), "curve": [{"tokens": 1, "seconds": 1.0, "nmse": abs(lr - 4e-3)}]}

    monkeypatch.setattr(bench, "measure", measure)
    best, curves = bench.search("data", 128, 8, 256, 4, None)
    searched = {system for system, _ in asked}
    assert searched == set(bench.SYSTEMS) - set(bench.TWIN) - {bench.PRODUCT} and len(asked) == len(bench.LRS) * len(searched)
    assert all(best[s] == 4e-3 for s in {*searched, *bench.TWIN}) and curves[curves.best].lr.eq(4e-3).all()
    asked.clear()
    again, all_curves = bench.search("data", 128, 8, 256, 4, curves[curves.system != "ours"])
    assert again == best and {system for system, _ in asked} == {"ours"} and len(all_curves) == len(curves)
