"""Training: planted truth, pairing, learning rates, and what must not depend on what."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

import tsae_utils as tu

D, V, FEATURES, ACTIVE = 48, 200, 64, 3


class PlantedStream:
    """x = table[token] + sparse features, in the place of an ActivationStream."""

    batch_size = 512

    def __init__(self, with_table: bool, seed: int = 0) -> None:
        g = torch.Generator().manual_seed(1000 + seed)
        self.table = torch.randn(V, D, generator=g) * with_table
        self.features = F.normalize(torch.randn(FEATURES, D, generator=g), dim=-1)
        self.p = torch.arange(1, V + 1) ** -0.5  # some tokens are commoner than others
        self.generator = g

    def batch(self) -> tuple[torch.Tensor, torch.Tensor]:
        tokens = torch.multinomial(
            self.p, self.batch_size, replacement=True, generator=self.generator
        )
        which = torch.rand(self.batch_size, FEATURES, generator=self.generator).topk(ACTIVE).indices
        size = 2 + torch.rand(self.batch_size, ACTIVE, generator=self.generator)
        x = (self.features[which] * size[..., None]).sum(1) + self.table[tokens]
        return x, tokens[:, None]

    def __iter__(self):
        while True:
            yield self.batch()


def recovered(sae: tu.TSAE, stream: PlantedStream) -> float:
    """Share of true features with a decoder row of cosine above 0.9."""
    return (
        ((F.normalize(sae.W_dec, dim=-1) @ stream.features.T).amax(0) > 0.9).float().mean().item()
    )


def nmses(saes: dict[str, tu.TSAE], stream: PlantedStream) -> dict[str, float]:
    """NMSE of every SAE on the same fresh activations."""
    x, t = (torch.cat(part) for part in zip(*(stream.batch() for _ in range(10)), strict=True))
    with torch.no_grad():
        return {
            name: tu.reconstruction_error(x, sae(x, t).x_hat).nmse for name, sae in saes.items()
        }


def planted_saes() -> dict[str, tu.TSAE]:
    def make(width, table):  # twice as wide as the truth: exactly as wide gets stuck
        return tu.TSAE(
            tu.TSAEConfig(d_in=D, d_sae=width, k=ACTIVE),
            tu.TokenLookup(torch.zeros(V, D)) if table else None,
        )

    return {
        "sae": make(2 * FEATURES, False),
        "size-matched": make(2 * FEATURES + V, False),
        "tsae": make(2 * FEATURES, True),
    }


@pytest.fixture(scope="module")
def planted() -> tuple[dict[str, tu.TSAE], PlantedStream]:
    stream, saes = PlantedStream(with_table=True), planted_saes()
    tu.train(
        saes, stream, tu.TrainConfig(tokens=1200 * 512, lr=3e-3, lr_lookup=5e-2), progress=False
    )
    return saes, stream


def test_planted_table_is_recovered_from_zero(planted):
    """R2 above 0.95 after centring over tokens (a constant may sit in the table or in b_dec)."""
    saes, stream = planted
    W = saes["tsae"].lookup.W.detach()
    error = (W - W.mean(0) - (stream.table - stream.table.mean(0))).square().sum()
    r2 = 1 - error / (stream.table - stream.table.mean(0)).square().sum()
    assert r2 > 0.95, f"R2 = {r2:.3f}"


def test_planted_features_are_recovered_better_with_a_table(planted):
    saes, stream = planted
    share = {name: recovered(sae, stream) for name, sae in saes.items()}
    assert share["tsae"] > 0.8, share
    assert share["tsae"] > share["sae"] + 0.1 and share["tsae"] > share["size-matched"] + 0.1, share
    errors = nmses(saes, stream)
    assert errors["tsae"] < 0.8 * min(errors["sae"], errors["size-matched"]), errors


def test_null_world_gains_nothing():
    """No table in the data: over three starts, which differ by a tenth, the TSAE is no better than the SAE; its table stays small."""
    stream, saes = PlantedStream(with_table=False), {}
    for seed in range(3):
        cfg = tu.TSAEConfig(d_in=D, d_sae=2 * FEATURES, k=ACTIVE, seed=seed)
        saes |= {
            f"sae {seed}": tu.TSAE(cfg),
            f"tsae {seed}": tu.TSAE(cfg, tu.TokenLookup(torch.zeros(V, D))),
        }
    tu.train(
        saes, stream, tu.TrainConfig(tokens=1200 * 512, lr=3e-3, lr_lookup=5e-2), progress=False
    )
    errors = nmses(saes, stream)
    mean = {
        system: sum(errors[f"{system} {seed}"] for seed in range(3)) / 3
        for system in ("sae", "tsae")
    }
    assert mean["tsae"] > 0.95 * mean["sae"], errors
    for seed in range(3):
        assert recovered(saes[f"sae {seed}"], stream) > 0.8
        W = saes[f"tsae {seed}"].lookup.W.detach()
        assert (W - W.mean(0)).norm(dim=-1).mean() < 1, "rows of a true table have a norm near 7"


def test_the_table_has_its_own_learning_rate():
    """Defect 3: outside TopK the table trained a hundred times slower."""
    for activation in tu.ACTIVATIONS:
        sae = tu.TSAE(
            tu.TSAEConfig(d_in=D, d_sae=8, k=2, activation=activation),
            tu.TokenLookup(torch.zeros(V, D)),
        )
        for by_rows in (False, True):
            opts = tu.optimisers_for(
                sae, tu.TrainConfig(lr=1e-4, lr_lookup=1e-2, lookup_by_rows=by_rows)
            )
            rates = {id(p): g["lr"] for opt in opts for g in opt.param_groups for p in g["params"]}
            assert rates[id(sae.lookup.W)] == 1e-2 and rates[id(sae.W_dec)] == 1e-4
            assert set(rates) == {id(p) for p in sae.parameters()}, "every parameter is trained"


def test_a_table_by_rows_moves_the_rows_of_the_batch_as_written():
    """SparseAdam by hand: moments of absent rows rest, Adam's go on."""
    stream = PlantedStream(True)
    batches = [stream.batch() for _ in range(3)]

    class Fixed(PlantedStream):
        def __iter__(self):
            yield from batches

    def trained(steps, by_rows):
        sae = tu.TSAE(tu.TSAEConfig(d_in=D, d_sae=0, k=0), tu.TokenLookup(torch.zeros(V, D)))
        tu.train(
            {"a": sae},
            Fixed(True),
            tu.TrainConfig(
                tokens=512 * steps, lr=0.0, lr_lookup=0.1, lr_end=1.0, lookup_by_rows=by_rows
            ),
            progress=False,
        )
        return sae.lookup.W.detach()

    b_dec, W = batches[0][0].mean(0), torch.zeros(V, D, dtype=torch.float64)
    m, v = torch.zeros_like(W), torch.zeros_like(W)
    for step, (x, tokens) in enumerate(batches, 1):
        g, t = torch.zeros_like(W), tokens[:, 0]
        g.index_add_(0, t, -2 / 512 * (x - b_dec - W[t]).double())
        rows = t.unique()
        m[rows], v[rows] = 0.9 * m[rows] + 0.1 * g[rows], 0.999 * v[rows] + 0.001 * g[rows].square()
        size = 0.1 * (1 - 0.999**step) ** 0.5 / (1 - 0.9**step)
        W[rows] -= size * m[rows] / (v[rows].sqrt() + 1e-8)
    assert torch.allclose(trained(3, True).double(), W, atol=1e-4)
    absent = [t for t in range(V) if t not in batches[2][1] and t in batches[1][1]]
    assert absent and torch.equal(trained(3, True)[absent], trained(2, True)[absent])
    assert not torch.equal(trained(3, False)[absent], trained(2, False)[absent]), (
        "Adam's momentum goes on"
    )


def test_a_table_by_rows_is_an_ordinary_one_afterwards_and_not_half_of_a_shared_one():
    table = tu.TokenLookup(torch.zeros(V, D))
    saes = {n: tu.TSAE(tu.TSAEConfig(d_in=D, d_sae=8, k=2), table) for n in "ab"}
    cfg = tu.TrainConfig(tokens=512 * 2, lookup_by_rows=True)
    tu.train(saes, PlantedStream(True), cfg, progress=False)
    x, tokens = PlantedStream(True).batch()
    saes["a"](x, tokens).x_hat.sum().backward()
    assert not table.W.grad.is_sparse, "anyone's optimiser takes it"
    with pytest.raises(ValueError, match="shares its table with another SAE"):
        tu.train(
            saes,
            PlantedStream(True),
            {"a": cfg, "b": tu.TrainConfig(tokens=512 * 2)},
            progress=False,
        )


def test_batchtopks_threshold_does_not_lag_in_a_short_run():
    """After 120 steps as many features pass the threshold as were trained for."""
    stream = PlantedStream(True)
    sae = tu.TSAE(tu.TSAEConfig(d_in=D, d_sae=2 * FEATURES, k=ACTIVE, activation="batchtopk"))
    tu.train({"a": sae}, stream, tu.TrainConfig(tokens=120 * 512, lr=1e-2), progress=False)
    l0 = sae(*stream.batch()).l0.float().mean().item()
    assert abs(l0 - ACTIVE) < 0.03 * ACTIVE, l0


@pytest.mark.parametrize(("trainable", "moves"), [(True, True), (False, False)])
def test_the_table_is_trained_unless_frozen(trainable, moves):
    """Defect 1: frozen by a constructor default."""
    sae = tu.TSAE(
        tu.TSAEConfig(d_in=D, d_sae=8, k=2), tu.TokenLookup(torch.zeros(V, D), trainable=trainable)
    )
    tu.train({"a": sae}, PlantedStream(True), tu.TrainConfig(tokens=512 * 3), progress=False)
    assert bool(sae.lookup.W.abs().sum() > 0) == moves
    assert isinstance(sae.train(), tu.TSAE), "nn.Module.train is not shadowed (defect 7)"


@pytest.mark.parametrize("activation", tu.ACTIVATIONS)
def test_training_together_equals_training_alone(activation):
    """SAEs on one stream do not influence each other."""

    def make(seed):
        return tu.TSAE(
            tu.TSAEConfig(
                d_in=D, d_sae=16, k=2, seed=seed, activation=activation, l1_coefficient=0.1
            )
        )

    together, alone = {"a": make(0), "b": make(1)}, {"b": make(1)}
    cfg = tu.TrainConfig(tokens=512 * 20)
    tu.train(together, PlantedStream(True), cfg, progress=False)
    tu.train(alone, PlantedStream(True), cfg, progress=False)
    assert torch.equal(together["b"].W_dec, alone["b"].W_dec)
    assert not any(sae.training for sae in together.values()), "trained SAEs are in evaluation mode"


def test_l1_raises_sparsity():
    def l0(coefficient):
        sae = tu.TSAE(
            tu.TSAEConfig(d_in=D, d_sae=64, k=0, activation="relu", l1_coefficient=coefficient)
        )
        return tu.train(
            {"a": sae}, PlantedStream(False), tu.TrainConfig(tokens=512 * 150), progress=False
        )[-1]["l0"]

    assert l0(3.0) < 0.7 * l0(0.01)


def test_history_and_learning_rate():
    stream = PlantedStream(True)
    saes = planted_saes()
    history = tu.train(saes, stream, tu.TrainConfig(tokens=512 * 45), log_every=20, progress=False)
    assert [r["step"] for r in history if r["system"] == "sae"] == [0, 20, 40, 44]
    assert {r["system"] for r in history} == set(saes) and all(
        r["tokens"] == (r["step"] + 1) * 512 for r in history
    )
    first, last = ([r for r in history if r["system"] == "tsae"][i] for i in (0, -1))
    assert last["loss"] < first["loss"] and last["seconds"] > first["seconds"]


def test_a_run_is_reproducible(lm, rows):
    """Defect 6: seeds. The same seeds give the same weights, bit for bit; another stream seed does not."""

    def run(seed):
        sae = tu.TSAE(
            tu.TSAEConfig(d_in=32, d_sae=64, k=4),
            tu.TokenLookup(tu.unigram_activations(lm, "blocks.1.hook_resid_pre")),
        )
        stream = tu.ActivationStream(lm, rows, "blocks.1.hook_resid_pre", 64, 512, seed)
        tu.train({"a": sae}, stream, tu.TrainConfig(tokens=64 * 12), progress=False)
        return sae.W_dec.detach()

    assert torch.equal(run(0), run(0)) and not torch.equal(run(0), run(1))


@pytest.mark.parametrize("activation", ["relu", "gated"])
@pytest.mark.parametrize("table", [False, True])
def test_biases_start_where_asked(activation, table):
    """`start_l0`: every feature fires on an equal share of the first batch, whatever the table leaves for b_dec."""
    g = torch.Generator().manual_seed(0)
    x, tokens = torch.randn(1000, 8, generator=g) + 3, torch.randint(5, (1000, 1), generator=g)
    lookup = tu.TokenLookup(torch.randn(5, 8, generator=g)) if table else None
    sae = tu.TSAE(tu.TSAEConfig(d_in=8, d_sae=40, activation=activation), lookup)
    tu._start_(sae, tu.TrainConfig(start_l0=4), x, tokens)
    sae.bf16 = False
    out, acts = sae(x, tokens), sae.encode(x)
    assert (
        out.l0.float().mean() == pytest.approx(4, abs=0.1)
        and ((acts > 0).sum(0) - 100).abs().max() <= 1
    )  # the lowest sits at zero
    tu._start_(sae, tu.TrainConfig(start_l0=1000), x, tokens)
    assert (sae.encode(x) > 0).float().mean() > 0.99, "more than there are: all of them"
