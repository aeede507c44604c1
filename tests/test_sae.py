"""The SAE: by hand, against a naive oracle, and by properties that must hold for any weights."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import tsae_utils as tu


def random_sae(d_in=6, d_sae=10, k=3, vocab=None, seed=0, **kwargs) -> tu.TSAE:
    generator = torch.Generator().manual_seed(seed)
    table = None if vocab is None else tu.TokenLookup(torch.randn(vocab, d_in, generator=generator))
    sae = tu.TSAE(tu.TSAEConfig(d_in=d_in, d_sae=d_sae, k=k, **kwargs), table)
    with torch.no_grad():
        for name, p in sae.named_parameters():
            if not name.startswith("lookup"):
                p.copy_(torch.randn(p.shape, generator=generator))
        if hasattr(sae, "threshold"):
            sae.threshold.fill_(0.3)
    return sae


def naive(
    sae: tu.TSAE, x: torch.Tensor, tokens: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(x_hat, dense activations, penalties) by the equations, dense and differentiable, as in training."""
    projected, norms, penalty = (
        (x - sae.b_dec) @ sae.W_enc_FD.T,
        sae.W_dec.norm(dim=-1),
        x.new_zeros(()),
    )
    table = 0 if sae.lookup is None else sae.lookup.W[tokens[:, -1]]
    match sae.cfg.activation:
        case "topk":
            values, index = (projected + sae.b_enc).topk(sae.cfg.k, dim=-1)
            acts = torch.zeros_like(projected).scatter(-1, index, values.relu())
        case "batchtopk":
            values, index = (projected + sae.b_enc).flatten().topk(sae.cfg.k * len(x))
            acts = (
                torch.zeros_like(projected)
                .flatten()
                .scatter(-1, index, values.relu())
                .view_as(projected)
            )
        case "relu":
            acts = (projected + sae.b_enc).relu()
            penalty = (acts * norms).sum(-1).mean()
        case "gated":
            gate = projected + sae.b_gate
            acts = (projected * sae.r_mag.exp() + sae.b_mag).relu() * (gate > 0)
            frozen = (
                gate.relu() @ sae.W_dec.detach()
                + sae.b_dec.detach()
                + (table if sae.lookup is None else table.detach())
            )
            penalty = (gate.relu() * norms.detach()).sum(-1).mean() + (x - frozen).square().sum(
                -1
            ).mean()
    return acts @ sae.W_dec + sae.b_dec + table, acts, penalty


def test_by_hand():
    """Two features in two dimensions, k = 1, every number worked out on paper."""
    sae = tu.TSAE(
        tu.TSAEConfig(d_in=2, d_sae=2, k=1),
        tu.TokenLookup(torch.tensor([[10.0, 0.0], [0.0, 20.0]])),
    )
    with torch.no_grad():
        sae.W_enc_FD.copy_(torch.tensor([[1.0, 0.0], [0.0, 2.0]]))
        sae.W_dec.copy_(torch.tensor([[3.0, 0.0], [0.0, 4.0]]))
        sae.b_enc.copy_(torch.tensor([0.5, 0.0]))
        sae.b_dec.copy_(torch.tensor([1.0, 1.0]))
    out = sae(torch.tensor([[3.0, 1.5], [1.0, 4.0]]), torch.tensor([[0], [1]]))
    # x - b_dec = (2, .5), (0, 3); pre = (2.5, 1), (.5, 6); kept 2.5 of feature 0, 6 of feature 1
    assert (
        out.l0.tolist() == [1, 1]
        and out.fired.tolist() == [True, True]
        and out.sparsity == out.auxiliary == 0
    )
    assert out.x_hat.tolist() == [[2.5 * 3 + 1 + 10, 1.0], [1.0, 6.0 * 4 + 1 + 20]]


def test_negative_pre_activations_do_not_count():
    """TopK then ReLU: k = 2 but one pre-activation is negative, so one feature is active (defect 8 of the ancestors)."""
    sae = random_sae(d_in=2, d_sae=2, k=2)
    with torch.no_grad():
        sae.W_enc_FD.copy_(torch.eye(2))
        sae.b_enc.zero_()
        sae.b_dec.zero_()
    out = sae(torch.tensor([[1.0, -1.0]]), torch.zeros(1, 1, dtype=torch.long))
    assert out.l0.tolist() == [1] and out.fired.tolist() == [True, False]
    assert torch.allclose(out.x_hat, sae.W_dec[:1])


@settings(max_examples=120, deadline=None)
@given(
    st.sampled_from(tu.ACTIVATIONS),
    st.integers(1, 9),
    st.integers(1, 12),
    st.integers(1, 8),
    st.data(),
)
def test_every_activation_equals_the_naive_one(activation, d_in, d_sae, batch, data):
    """Forward, penalties and every gradient in fp64, k from 1 to d_sae, with and without a table."""
    k, seed, vocab = (
        data.draw(st.integers(1, d_sae)),
        data.draw(st.integers(0, 1000)),
        data.draw(st.sampled_from([None, 5])),
    )
    sae = random_sae(d_in, d_sae, k, vocab, seed, activation=activation).double()
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, d_in, generator=generator, dtype=torch.float64).requires_grad_()
    tokens = torch.randint(5, (batch, 1), generator=generator)
    weights = torch.randn(batch, d_in, generator=generator, dtype=torch.float64)
    parameters = [x, *sae.parameters()]
    with pytest.MonkeyPatch.context() as patch:  # a few rows at a time, as at real widths
        patch.setattr(tu, "CPU_ROWS", data.draw(st.integers(1, 8)))
        out = sae(x, tokens)
    fast = torch.autograd.grad(
        (out.x_hat * weights).sum() + out.sparsity + out.auxiliary, parameters
    )
    x_hat, acts, penalty = naive(sae, x, tokens)
    slow = torch.autograd.grad((x_hat * weights).sum() + penalty, parameters)
    assert torch.allclose(out.x_hat, x_hat) and torch.allclose(
        out.sparsity + out.auxiliary, penalty
    )
    assert torch.equal(out.l0.long(), (acts > 0).sum(-1)) and torch.equal(
        out.fired, (acts > 0).any(0)
    )
    for name, a, b in zip(["x", *dict(sae.named_parameters())], fast, slow, strict=True):
        assert torch.allclose(a, b), name


@settings(max_examples=100, deadline=None)
@given(
    st.integers(1, 5),
    st.integers(1, 1500),
    st.integers(1, 40),
    st.sampled_from([3, 100]),
    st.integers(0, 1000),
    st.data(),
)
def test_top_k_in_groups_is_exact(batch, width, k, levels, seed, data):
    """Values equal torch.topk's, indices are distinct and point at them; few levels make ties, also at the edge."""
    width *= data.draw(st.sampled_from([1, 8, 64]))
    k = min(k, width)
    pre = torch.randint(
        levels, (batch, width), generator=torch.Generator().manual_seed(seed)
    ).float()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tu, "WIDE", 0)
        values, index = tu.top_k(pre, k)
    assert torch.equal(values.sort(descending=True).values, pre.topk(k).values)
    assert torch.equal(pre.gather(1, index), values) and all(
        len(set(row)) == k for row in index.tolist()
    )


@settings(max_examples=100, deadline=None)
@given(
    st.integers(1, 4),
    st.sampled_from([40, 1000, 2048, 4096]),
    st.integers(1, 40),
    st.floats(-3, 3),
    st.integers(0, 1000),
)
def test_bf16_is_sorted_by_its_bits(batch, width, k, shift, seed):
    """What ReLU leaves is what it leaves of torch.topk: few positive ones, none, zeros of both signs, infinity."""
    g = torch.Generator().manual_seed(seed)
    pre = (torch.randn(batch, width, generator=g) + shift).bfloat16()
    pre[:, 0], pre[:, 1], pre[0, 2] = 0.0, -0.0, float("inf")
    values, index = tu._largest_positive(pre, k)
    assert torch.equal(values.relu().sort(descending=True).values, pre.topk(k).values.relu())
    assert torch.equal(pre.gather(1, index), values) and all(
        len(set(row)) == k for row in index.tolist()
    )


def test_a_batch_without_an_active_feature_has_its_gradients():
    """BatchTopK keeps positive pre-activations alone: here there is no pair at all."""
    sae = random_sae(6, 20, 4, activation="batchtopk").train()
    with torch.no_grad():
        sae.b_enc.fill_(-100.0)
    x, tokens = torch.randn(5, 6), torch.zeros(5, 1, dtype=torch.long)
    out = sae(x, tokens)
    out.x_hat.sum().backward()
    assert out.l0.tolist() == [0] * 5 and torch.equal(out.x_hat, sae.b_dec.expand(5, 6))
    assert torch.equal(sae.b_dec.grad, torch.full((6,), 5.0)) and not any(
        p.grad.any() for p in (sae.W_dec, sae.W_enc_FD, sae.b_enc)
    )


def test_gradients_can_be_taken_twice():
    sae = random_sae(6, 20, 4)
    out = sae(torch.randn(5, 6), torch.zeros(5, 1, dtype=torch.long)).x_hat.square().sum()
    once, again = (
        torch.autograd.grad(out, list(sae.parameters()), retain_graph=True) for _ in range(2)
    )
    assert all(torch.equal(a, b) for a, b in zip(once, again, strict=True))


@pytest.mark.parametrize(
    "width, k, still",
    [(tu.WIDE - 16, 8, [tu.WIDE - 16]), (tu.WIDE, 8, [64, 128]), (12288, 16, [192, 128, 128])],
)
def test_a_wide_sae_takes_its_top_in_groups(width, k, still, monkeypatch):
    """What torch.topk still has to sort: the maxima of the groups, then their members; against the naive one in fp64."""
    sae, g, widths = random_sae(4, width, k).double(), torch.Generator().manual_seed(0), []
    x, tokens = (
        torch.randn(6, 4, generator=g, dtype=torch.float64),
        torch.zeros(6, 1, dtype=torch.long),
    )
    plain = torch.Tensor.topk
    monkeypatch.setattr(
        torch.Tensor, "topk", lambda t, *a, **k: (widths.append(t.shape[-1]), plain(t, *a, **k))[1]
    )
    out = sae(x, tokens)
    assert widths == still
    monkeypatch.undo()
    assert torch.allclose(out.x_hat, naive(sae, x, tokens)[0])


@pytest.mark.parametrize("width", [48, 1024])
def test_the_encoder_laid_out_once_gives_the_plain_product(width):
    """bf16: one rounding of the sum in fp32, whatever the number of rows."""
    g = torch.Generator().manual_seed(0)
    W, b = (
        torch.randn(width, 32, generator=g).bfloat16(),
        torch.randn(width, generator=g).bfloat16(),
    )
    encode = tu._encoder(W, b)
    for rows in (1, 7, tu.CPU_ROWS):
        x = torch.randn(rows, 32, generator=g).bfloat16()
        exact = x.double() @ W.double().T + b.double()
        assert torch.allclose(encode(x).double(), exact, rtol=2**-8, atol=1e-5)


@pytest.mark.parametrize("activation", tu.ACTIVATIONS)
def test_bf16_is_close_and_for_training_only(activation):
    """bf16 touches the big products alone: 8 bits of the values, and the choice among near-ties."""
    sae, g = random_sae(64, 128, 8, 5, activation=activation), torch.Generator().manual_seed(0)
    x, tokens = torch.randn(200, 64, generator=g), torch.randint(5, (200, 1), generator=g)
    exact, inference = sae(x, tokens), sae.eval()(x, tokens)
    sae.bf16 = True
    rough = sae.train()(x, tokens)
    assert rough.x_hat.dtype == torch.float32 and not torch.equal(rough.x_hat, exact.x_hat)
    assert (rough.x_hat - exact.x_hat).norm() < (
        0.15 if "topk" in activation else 0.03
    ) * exact.x_hat.norm()
    assert torch.allclose(rough.sparsity, exact.sparsity, rtol=0.02) and torch.allclose(
        rough.auxiliary, exact.auxiliary, rtol=0.02
    )
    assert activation == "batchtopk" or torch.equal(sae.eval()(x, tokens).x_hat, inference.x_hat)


def test_batchtopk_spends_k_on_average_and_thresholds_afterwards():
    sae, g = random_sae(16, 64, 4, activation="batchtopk"), torch.Generator().manual_seed(0)
    sae.threshold.zero_()
    x, tokens = torch.randn(500, 16, generator=g), torch.zeros(500, 1, dtype=torch.long)
    out = sae(x, tokens)
    assert out.l0.sum() == 4 * 500 and out.l0.unique().numel() > 3, (
        "k a token on average, not for each"
    )
    assert torch.allclose(sae.threshold, sae.pre_activations(x).flatten().topk(2000).values[-1])
    assert abs(sae.eval()(x, tokens).l0.float().mean() - 4) < 0.1
    before = sae.threshold.clone()
    sae.train()(10 * x, tokens)
    lowest = sae.pre_activations(10 * x).flatten().topk(2000).values[-1]
    assert torch.allclose(sae.threshold, 0.99 * before + 0.01 * lowest), (
        "one batch moves it by a hundredth"
    )


def test_batchtopk_with_fewer_positive_values_than_k():
    sae = random_sae(d_in=4, d_sae=8, k=7, activation="batchtopk")
    x, tokens = torch.randn(6, 4), torch.zeros(6, 1, dtype=torch.long)
    assert torch.equal(sae(x, tokens).l0, (sae.pre_activations(x) > 0).sum(-1).float())


def test_batchtopk_finds_the_top_when_its_first_guess_is_too_high():
    """The sampled positions hold the large values and are fewer than wanted."""
    pre = torch.ones(64, 4096)
    pre.view(-1)[::2] = 2.0
    values, feature, row = tu._top_of_batch(pre, 3000)
    assert len(values) == 64 * 3000 and (values == 2).sum() == 64 * 2048
    assert torch.equal(values, pre[row, feature]) and (row.diff() >= 0).all()


def test_jumprelu_uses_each_features_threshold():
    sae = random_sae(activation="jumprelu")
    sae.threshold[:5] = 1.0
    x = torch.randn(20, 6)
    pre = sae.pre_activations(x)
    assert torch.equal(sae.encode(x), torch.where(pre > sae.threshold, pre, 0.0))


def test_dead_features_model_the_error():
    """AuxK by hand: only features silent for the window take part, the strongest aux_k of them, and x_hat gets no gradient."""
    sae, x = random_sae(d_in=4, d_sae=8, k=2), torch.randn(5, 4)
    x_hat = sae(x, torch.zeros(5, 1, dtype=torch.long)).x_hat
    assert sae.dead_features_error(x, x_hat, 2, 100) == 0, "nothing is dead"
    sae.tokens_since_fired[[1, 4, 6]] = 100
    values, index = sae.pre_activations(x)[:, [1, 4, 6]].topk(2)
    modelled = torch.stack(
        [
            (v.relu()[:, None] * sae.W_dec[[1, 4, 6]][i]).sum(0)
            for v, i in zip(values, index, strict=True)
        ]
    )
    error = sae.dead_features_error(x, x_hat, 2, 100)
    assert torch.allclose(error, (x - x_hat - modelled).square().sum(-1).mean())
    error.backward()
    assert (
        sae.b_dec.grad is None
        and sae.W_dec.grad[[0, 2, 3, 5, 7]].abs().sum() == 0
        and sae.W_dec.grad[[1, 4, 6]].abs().sum() > 0
    )


def test_ties_keep_exactly_k():
    sae = random_sae(d_in=4, d_sae=8, k=3)
    with torch.no_grad():
        sae.W_enc_FD.copy_(torch.ones(8, 4))
        sae.b_enc.zero_()
        sae.b_dec.zero_()
    out = sae(torch.ones(5, 4), torch.zeros(5, 1, dtype=torch.long))
    assert out.l0.tolist() == [3] * 5 and out.fired.sum() >= 3, "a feature is taken once"


@pytest.mark.parametrize("activation", tu.ACTIVATIONS)
def test_zero_table_is_the_baseline(activation):
    """Equal weights and an all-zero table: the same output, bit for bit."""
    plain, tokenized = random_sae(activation=activation), random_sae(activation=activation)
    tokenized.lookup = tu.TokenLookup(torch.zeros(7, 6))
    x, tokens = torch.randn(20, 6), torch.randint(7, (20, 1))
    assert torch.equal(plain(x, tokens).x_hat, tokenized(x, tokens).x_hat)


@pytest.mark.parametrize("activation", tu.ACTIVATIONS)
def test_permuting_a_batch_permutes_the_output(activation):
    sae = random_sae(vocab=7, activation=activation)
    x, tokens, p = torch.randn(20, 6), torch.randint(7, (20, 1)), torch.randperm(20)
    assert torch.allclose(sae(x, tokens).x_hat[p], sae(x[p], tokens[p]).x_hat, atol=1e-5)


@pytest.mark.parametrize("activation", tu.ACTIVATIONS)
def test_encode_and_decode_agree_with_forward(activation):
    sae = random_sae(vocab=7, activation=activation)
    x, tokens = torch.randn(20, 6), torch.randint(7, (20, 1))
    sae.eval()
    assert torch.allclose(sae.decode(sae.encode(x), tokens), sae(x, tokens).x_hat, atol=1e-5)


def test_the_encoder_does_not_see_the_table():
    a, b = random_sae(vocab=7), random_sae(vocab=7)
    with torch.no_grad():
        b.lookup.W.mul_(3)
    x, tokens = torch.randn(20, 6), torch.randint(7, (20, 1))
    assert torch.equal(a.encode(x), b.encode(x)) and torch.equal(
        a(x, tokens).fired, b(x, tokens).fired
    )
    difference = b(x, tokens).x_hat - a(x, tokens).x_hat
    assert torch.allclose(difference, 2 * a.lookup.W[tokens[:, 0]], atol=1e-4)


def test_the_current_token_is_the_last_column():
    table = tu.TokenLookup(torch.arange(5.0)[:, None].expand(5, 3))
    assert table(torch.tensor([[4, 1], [0, 3]])).tolist() == [[1.0] * 3, [3.0] * 3]


@pytest.mark.parametrize(("activation", "d_sae"), [("topk", 0), ("topk", 4), ("batchtopk", 4)])
def test_k_zero_is_the_table_alone(activation, d_sae):
    sae = tu.TSAE(
        tu.TSAEConfig(d_in=3, d_sae=d_sae, k=0, activation=activation),
        tu.TokenLookup(torch.randn(5, 3)),
    )
    out = sae(torch.randn(4, 3), torch.tensor([[0], [1], [2], [3]]))
    assert torch.equal(out.x_hat, sae.lookup.W[:4] + sae.b_dec) and out.l0.tolist() == [0] * 4


def test_the_table_gets_a_gradient():
    """Defect 1 of the ancestors: the table was never trained."""
    sae = random_sae(vocab=7)
    out = sae(torch.randn(3, 6), torch.tensor([[1], [1], [4]]))
    out.x_hat.sum().backward()
    assert sae.lookup.W.grad[[1, 4]].abs().sum(-1).gt(0).all()
    assert sae.lookup.W.grad[[0, 2, 3, 5, 6]].abs().sum() == 0


def test_initialisation():
    """Decoder rows (not columns) have unit norm by default, W_enc is a multiple of W_dec^T (defect 4), and the seed decides."""
    sae = tu.TSAE(tu.TSAEConfig(d_in=6, d_sae=10, k=2, encoder_scale=0.5))
    assert torch.allclose(sae.W_dec.norm(dim=-1), torch.ones(10))
    assert torch.allclose(sae.W_enc, 0.5 * sae.W_dec.T) and sae.W_enc.shape == (6, 10)
    same, other = (tu.TSAE(tu.TSAEConfig(d_in=6, d_sae=10, k=2, seed=s)) for s in (0, 1))
    assert torch.equal(same.W_dec, sae.W_dec) and not torch.equal(other.W_dec, sae.W_dec)
    small = tu.TSAE(tu.TSAEConfig(d_in=6, d_sae=10, k=2, encoder_scale=0.5, decoder_init_norm=0.1))
    assert torch.allclose(small.W_dec, 0.1 * sae.W_dec) and torch.allclose(
        small.W_enc, 0.1 * sae.W_enc
    )


def test_firing_is_counted_in_tokens_and_travels_with_the_module():
    """Defect 7: counters were no buffers and counted steps."""
    sae = random_sae(d_in=2, d_sae=4, k=1)
    assert "tokens_since_fired" in dict(sae.named_buffers())
    with torch.no_grad():
        sae.W_enc_FD.copy_(torch.tensor([[1.0, 0], [-1, -1], [0, 0], [0, 1]]))
        for p in (sae.b_enc, sae.b_dec):
            p.zero_()
    out = sae(torch.tensor([[1.0, 0], [0, 2], [0, 3]]), torch.zeros(3, 1, dtype=torch.long))
    sae.count_firing_(out)
    sae.count_firing_(out)
    assert sae.tokens_since_fired.tolist() == [0, 6, 6, 0], "a zero value is not firing"
    assert sae.dead_fraction(6) == 0.5 and sae.dead_fraction(7) == 0.0


def test_relu_loss_uses_the_coefficient_and_decoder_norms():
    """Defect 8: the sparsity coefficient was unused in one loss."""
    sae = random_sae(d_in=3, d_sae=5, k=0, activation="relu", l1_coefficient=0.7)
    x, tokens = torch.randn(4, 3), torch.zeros(4, 1, dtype=torch.long)
    out = sae(x, tokens)
    acts = sae.encode(x)
    assert (
        torch.allclose(out.sparsity, (acts * sae.W_dec.norm(dim=1)).sum(1).mean())
        and out.sparsity > 0
    )
    cfg = tu.TrainConfig(lr=0.0, l1_warmup=0.5)
    row = tu._step_(sae, tu.optimisers_for(sae, cfg), cfg, x, tokens, 0.25, True)
    expected = (x - out.x_hat).square().sum(1).mean() + 0.7 * 0.5 * out.sparsity
    assert row["loss"] == pytest.approx(expected.item(), rel=1e-5), "half warmed up"
