"""Training: recovery of planted structure, learning rates, reproducibility, independence."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

import tsae_utils as tu
from tsae.run import start_biases_

D, V = 48, 200
FEATURES, ACTIVE = 64, 3  # true features, and how many of them are active per token
PLANTED = tu.TrainConfig(tokens=1200 * 512, lr=3e-3, lr_lookup=5e-2)


def zero_table(trainable: bool = True) -> tu.TokenLookup:
    return tu.TokenLookup(torch.zeros(V, D), trainable=trainable)


class PlantedStream:
    """x = table[token] + sparse features; stands in for an ActivationStream."""

    batch_size = 512

    def __init__(self, with_table: bool, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(1000 + seed)
        self.table = torch.randn(V, D, generator=generator) * with_table
        self.features = F.normalize(torch.randn(FEATURES, D, generator=generator), dim=-1)
        self.p = torch.arange(1, V + 1) ** -0.5  # some tokens are more common than others
        self.generator = generator

    def batch(self) -> tuple[torch.Tensor, torch.Tensor]:
        n, generator = self.batch_size, self.generator
        tokens = torch.multinomial(self.p, n, replacement=True, generator=generator)
        active = torch.rand(n, FEATURES, generator=generator).topk(ACTIVE).indices
        size = 2 + torch.rand(n, ACTIVE, generator=generator)
        x = (self.features[active] * size[..., None]).sum(1) + self.table[tokens]
        return x, tokens[:, None]

    def __iter__(self):
        while True:
            yield self.batch()


def recovered(sae: tu.TSAE, stream: PlantedStream) -> float:
    """Share of true features with a decoder row of cosine above 0.9."""
    cosines = F.normalize(sae.W_dec, dim=-1) @ stream.features.T
    return (cosines.amax(0) > 0.9).float().mean().item()


def nmses(saes: dict[str, tu.TSAE], stream: PlantedStream) -> dict[str, float]:
    """NMSE of every SAE on the same fresh activations."""
    batches = [stream.batch() for _ in range(10)]
    x, tokens = (torch.cat(part) for part in zip(*batches, strict=True))
    with torch.no_grad():
        reconstructions = {name: sae(x, tokens).x_hat for name, sae in saes.items()}
    return {name: tu.reconstruction_error(x, x_hat).nmse for name, x_hat in reconstructions.items()}


def planted_saes() -> dict[str, tu.TSAE]:
    """Twice as wide as the truth: SAEs exactly as wide get stuck."""
    narrow = tu.TSAEConfig(d_in=D, d_sae=2 * FEATURES, k=ACTIVE)
    wide = tu.TSAEConfig(d_in=D, d_sae=2 * FEATURES + V, k=ACTIVE)
    return {
        "sae": tu.TSAE(narrow),
        "size-matched": tu.TSAE(wide),
        "tsae": tu.TSAE(narrow, zero_table()),
    }


@pytest.fixture(scope="module")
def planted() -> tuple[dict[str, tu.TSAE], PlantedStream]:
    stream, saes = PlantedStream(with_table=True), planted_saes()
    tu.train(saes, stream, PLANTED, progress=False)
    return saes, stream


def test_a_planted_table_is_recovered_from_zero(planted):
    """R2 is above 0.95 after centring, as a constant may sit in the table or in b_dec."""
    saes, stream = planted
    W = saes["tsae"].lookup.W.detach()
    truth = stream.table - stream.table.mean(0)
    r2 = 1 - (W - W.mean(0) - truth).square().sum() / truth.square().sum()
    assert r2 > 0.95, f"R2 = {r2:.3f}"


def test_planted_features_are_recovered_better_with_a_table(planted):
    saes, stream = planted
    share = {name: recovered(sae, stream) for name, sae in saes.items()}
    assert share["tsae"] > 0.8, share
    assert share["tsae"] > share["sae"] + 0.1, share
    assert share["tsae"] > share["size-matched"] + 0.1, share
    errors = nmses(saes, stream)
    assert errors["tsae"] < 0.8 * min(errors["sae"], errors["size-matched"]), errors


def test_without_a_table_in_the_data_the_tsae_gains_nothing():
    """Over three starts, which differ by a tenth, the TSAE is no better; its table stays small."""
    stream, saes = PlantedStream(with_table=False), {}
    for seed in range(3):
        cfg = tu.TSAEConfig(d_in=D, d_sae=2 * FEATURES, k=ACTIVE, seed=seed)
        saes[f"sae {seed}"] = tu.TSAE(cfg)
        saes[f"tsae {seed}"] = tu.TSAE(cfg, zero_table())
    tu.train(saes, stream, PLANTED, progress=False)
    errors = nmses(saes, stream)
    mean_sae = sum(errors[f"sae {seed}"] for seed in range(3)) / 3
    mean_tsae = sum(errors[f"tsae {seed}"] for seed in range(3)) / 3
    assert mean_tsae > 0.95 * mean_sae, errors
    for seed in range(3):
        assert recovered(saes[f"sae {seed}"], stream) > 0.8
        W = saes[f"tsae {seed}"].lookup.W.detach()
        assert (W - W.mean(0)).norm(dim=-1).mean() < 1, "rows of a true table have a norm near 7"


@pytest.mark.parametrize("by_rows", [False, True])
@pytest.mark.parametrize("activation", tu.ACTIVATIONS)
def test_the_table_has_a_learning_rate_of_its_own(activation, by_rows):
    """Outside TopK, the authors' code trains the table a hundred times more slowly."""
    sae = tu.TSAE(tu.TSAEConfig(d_in=D, d_sae=8, k=2, activation=activation), zero_table())
    cfg = tu.TrainConfig(lr=1e-4, lr_lookup=1e-2, lookup_by_rows=by_rows)
    rates = {}
    for optimizer in tu.optimizers_for(sae, cfg):
        for group in optimizer.param_groups:
            rates |= {id(parameter): group["lr"] for parameter in group["params"]}
    assert rates[id(sae.lookup.W)] == 1e-2
    assert rates[id(sae.W_dec)] == 1e-4
    assert set(rates) == {id(p) for p in sae.parameters()}, "every parameter is trained"


def sparse_adam_by_hand(batches) -> torch.Tensor:
    """A table after one step per batch, at learning rate 0.1: only rows of the batch move."""
    b_dec, W = batches[0][0].mean(0), torch.zeros(V, D, dtype=torch.float64)
    first, second = torch.zeros_like(W), torch.zeros_like(W)  # moments
    for step, (x, tokens_BN) in enumerate(batches, 1):
        tokens, gradient = tokens_BN[:, 0], torch.zeros_like(W)
        gradient.index_add_(0, tokens, -2 / 512 * (x - b_dec - W[tokens]).double())
        rows = tokens.unique()
        first[rows] = 0.9 * first[rows] + 0.1 * gradient[rows]
        second[rows] = 0.999 * second[rows] + 0.001 * gradient[rows].square()
        size = 0.1 * (1 - 0.999**step) ** 0.5 / (1 - 0.9**step)
        W[rows] -= size * first[rows] / (second[rows].sqrt() + 1e-8)
    return W


def test_a_table_trained_by_rows_moves_only_the_rows_of_the_batch():
    """SparseAdam leaves absent rows alone; Adam's momentum keeps moving them."""
    stream = PlantedStream(True)
    batches = [stream.batch() for _ in range(3)]

    class Fixed(PlantedStream):
        def __iter__(self):
            yield from batches

    def trained(steps, by_rows):
        sae = tu.TSAE(tu.TSAEConfig(d_in=D, d_sae=0, k=0), zero_table())
        rates = {"lr": 0.0, "lr_lookup": 0.1, "lr_end": 1.0}
        cfg = tu.TrainConfig(tokens=512 * steps, lookup_by_rows=by_rows, **rates)
        tu.train({"a": sae}, Fixed(True), cfg, progress=False)
        return sae.lookup.W.detach()

    assert torch.allclose(trained(3, True).double(), sparse_adam_by_hand(batches), atol=1e-4)
    absent = [t for t in range(V) if t not in batches[2][1] and t in batches[1][1]]
    assert absent
    assert torch.equal(trained(3, True)[absent], trained(2, True)[absent])
    assert not torch.equal(trained(3, False)[absent], trained(2, False)[absent]), "Adam moves them"


def test_a_shared_table_trained_by_rows_is_ordinary_afterwards():
    table = zero_table()
    saes = {name: tu.TSAE(tu.TSAEConfig(d_in=D, d_sae=8, k=2), table) for name in "ab"}
    cfg = tu.TrainConfig(tokens=512 * 2, lookup_by_rows=True)
    tu.train(saes, PlantedStream(True), cfg, progress=False)
    x, tokens = PlantedStream(True).batch()
    saes["a"](x, tokens).x_hat.sum().backward()
    assert not table.W.grad.is_sparse, "any optimizer takes its gradient"
    cfgs = {"a": cfg, "b": tu.TrainConfig(tokens=512 * 2)}
    with pytest.raises(ValueError, match="shares its table with another SAE"):
        tu.train(saes, PlantedStream(True), cfgs, progress=False)


def test_the_threshold_of_batchtopk_does_not_lag_in_a_short_run():
    """After 120 steps, k features per token pass the threshold."""
    stream = PlantedStream(True)
    sae = tu.TSAE(tu.TSAEConfig(d_in=D, d_sae=2 * FEATURES, k=ACTIVE, activation="batchtopk"))
    tu.train({"a": sae}, stream, tu.TrainConfig(tokens=120 * 512, lr=1e-2), progress=False)
    l0s = [sae(*stream.batch()).l0.float().mean().item() for _ in range(40)]  # one batch is noisy
    l0 = sum(l0s) / len(l0s)
    assert abs(l0 - ACTIVE) < 0.03 * ACTIVE, l0


@pytest.mark.parametrize(("trainable", "moves"), [(True, True), (False, False)])
def test_the_table_is_trained_unless_frozen(trainable, moves):
    """In the authors' simplified code a default of the constructor freezes it."""
    sae = tu.TSAE(tu.TSAEConfig(d_in=D, d_sae=8, k=2), zero_table(trainable))
    tu.train({"a": sae}, PlantedStream(True), tu.TrainConfig(tokens=512 * 3), progress=False)
    assert bool(sae.lookup.W.abs().sum() > 0) == moves
    assert isinstance(sae.train(), tu.TSAE), "nn.Module.train is not shadowed"


@pytest.mark.parametrize("activation", tu.ACTIVATIONS)
def test_training_together_equals_training_alone(activation):
    """SAEs on one stream do not influence each other."""
    shape = {"d_in": D, "d_sae": 16, "k": 2}

    def make(seed):
        cfg = tu.TSAEConfig(**shape, seed=seed, activation=activation, l1_coefficient=0.1)
        return tu.TSAE(cfg)

    together, alone = {"a": make(0), "b": make(1)}, {"b": make(1)}
    cfg = tu.TrainConfig(tokens=512 * 20)
    tu.train(together, PlantedStream(True), cfg, progress=False)
    tu.train(alone, PlantedStream(True), cfg, progress=False)
    assert torch.equal(together["b"].W_dec, alone["b"].W_dec)
    assert not any(sae.training for sae in together.values()), "trained SAEs are in evaluation mode"


def test_l1_raises_sparsity():
    def l0(coefficient):
        cfg = tu.TSAEConfig(d_in=D, d_sae=64, k=0, activation="relu", l1_coefficient=coefficient)
        budget = tu.TrainConfig(tokens=512 * 150)
        history = tu.train({"a": tu.TSAE(cfg)}, PlantedStream(False), budget, progress=False)
        return history[-1]["l0"]

    assert l0(3.0) < 0.7 * l0(0.01)


def test_history():
    saes, cfg = planted_saes(), tu.TrainConfig(tokens=512 * 45)
    history = tu.train(saes, PlantedStream(True), cfg, log_every=20, progress=False)
    assert [row["step"] for row in history if row["system"] == "sae"] == [0, 20, 40, 44]
    assert {row["system"] for row in history} == set(saes)
    assert all(row["tokens"] == (row["step"] + 1) * 512 for row in history)
    of_tsae = [row for row in history if row["system"] == "tsae"]
    assert of_tsae[-1]["loss"] < of_tsae[0]["loss"]
    assert of_tsae[-1]["seconds"] > of_tsae[0]["seconds"]


def test_a_run_is_reproducible(lm, rows):
    """Equal seeds give equal weights, bit for bit; another seed of the stream does not."""
    hook = "blocks.1.hook_resid_pre"

    def run(seed):
        table = tu.TokenLookup(tu.unigram_activations(lm, hook))
        sae = tu.TSAE(tu.TSAEConfig(d_in=32, d_sae=64, k=4), table)
        stream = tu.ActivationStream(lm, rows, hook, 64, 512, seed)
        tu.train({"a": sae}, stream, tu.TrainConfig(tokens=64 * 12), progress=False)
        return sae.W_dec.detach()

    assert torch.equal(run(0), run(0))
    assert not torch.equal(run(0), run(1))


@pytest.mark.parametrize("activation", ["relu", "gated"])
@pytest.mark.parametrize("table", [False, True])
def test_biases_start_at_the_wanted_l0(activation, table):
    """Every feature fires on an equal share of the first batch, with and without a table."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1000, 8, generator=generator) + 3
    tokens = torch.randint(5, (1000, 1), generator=generator)
    lookup = tu.TokenLookup(torch.randn(5, 8, generator=generator)) if table else None
    sae = tu.TSAE(tu.TSAEConfig(d_in=8, d_sae=40, activation=activation), lookup)
    start_biases_(sae, tu.TrainConfig(start_l0=4), x, tokens)
    sae.bf16 = False
    out, acts = sae(x, tokens), sae.encode(x)
    assert out.l0.float().mean() == pytest.approx(4, abs=0.1)
    # The lowest of a feature's 100 activations is zero, so 99 may count.
    assert ((acts > 0).sum(0) - 100).abs().max() <= 1
    start_biases_(sae, tu.TrainConfig(start_l0=1000), x, tokens)
    assert (sae.encode(x) > 0).float().mean() > 0.99, "more than there are: all of them"
