"""The SAE: by hand, against a naive implementation, and by properties that hold for any weights."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import tsae_utils as tu
from conftest import random_sae
from tsae import kernels
from tsae.run import dead_features_error


def dense_batchtopk(pre: Tensor, k: int) -> Tensor:
    """Activations [B, F]: the B k largest pre-activations of the batch, then ReLU."""
    flat = pre.flatten()
    values, index = flat.topk(k * len(pre))
    return torch.zeros_like(flat).scatter(-1, index, values.relu()).view_as(pre)


def naive(sae: tu.TSAE, x: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(x_hat, dense activations, penalties) in training mode, straight from the equations."""
    projected = (x - sae.b_dec) @ sae.W_enc_FD.T
    norms = sae.W_dec.norm(dim=-1)
    table = x.new_zeros(()) if sae.lookup is None else sae.lookup.W[tokens[:, -1]]
    penalty = x.new_zeros(())
    match sae.cfg.activation:
        case "topk":
            values, index = (projected + sae.b_enc).topk(sae.cfg.k, dim=-1)
            acts = torch.zeros_like(projected).scatter(-1, index, values.relu())
        case "batchtopk":
            acts = dense_batchtopk(projected + sae.b_enc, sae.cfg.k)
        case "relu":
            acts = (projected + sae.b_enc).relu()
            penalty = (acts * norms).sum(-1).mean()
        case "gated":
            gate = projected + sae.b_gate
            acts = (projected * sae.r_mag.exp() + sae.b_mag).relu() * (gate > 0)
            frozen = gate.relu() @ sae.W_dec.detach() + sae.b_dec.detach() + table.detach()
            sparsity = (gate.relu() * norms.detach()).sum(-1).mean()
            penalty = sparsity + (x - frozen).square().sum(-1).mean()
    return acts @ sae.W_dec + sae.b_dec + table, acts, penalty


def assert_points_at_distinct_values(pre: Tensor, values: Tensor, index: Tensor, k: int) -> None:
    """`index` holds k different places per row, and `values` stand there."""
    assert torch.equal(pre.gather(1, index), values)
    assert all(len(set(row)) == k for row in index.tolist())


def test_by_hand():
    """Two features in two dimensions, k = 1, every number worked out on paper."""
    table = tu.TokenLookup(torch.tensor([[10.0, 0.0], [0.0, 20.0]]))
    sae = tu.TSAE(tu.TSAEConfig(d_in=2, d_sae=2, k=1), table)
    with torch.no_grad():
        sae.W_enc_FD.copy_(torch.tensor([[1.0, 0.0], [0.0, 2.0]]))
        sae.W_dec.copy_(torch.tensor([[3.0, 0.0], [0.0, 4.0]]))
        sae.b_enc.copy_(torch.tensor([0.5, 0.0]))
        sae.b_dec.copy_(torch.tensor([1.0, 1.0]))
    out = sae(torch.tensor([[3.0, 1.5], [1.0, 4.0]]), torch.tensor([[0], [1]]))
    # x - b_dec is (2, 0.5) and (0, 3), so the pre-activations are (2.5, 1) and (0.5, 6).
    # The first token keeps 2.5 of feature 0, the second 6 of feature 1.
    assert out.l0.tolist() == [1, 1]
    assert out.fired.tolist() == [True, True]
    assert out.sparsity == out.auxiliary == 0
    assert out.x_hat.tolist() == [[2.5 * 3 + 1 + 10, 1.0], [1.0, 6.0 * 4 + 1 + 20]]


def test_negative_pre_activations_do_not_count():
    """TopK then ReLU: with k = 2 and one negative pre-activation, one feature is active.

    The authors' code keeps negative values but does not count them.
    """
    sae = random_sae(d_in=2, d_sae=2, k=2)
    with torch.no_grad():
        sae.W_enc_FD.copy_(torch.eye(2))
        sae.b_enc.zero_()
        sae.b_dec.zero_()
    out = sae(torch.tensor([[1.0, -1.0]]), torch.zeros(1, 1, dtype=torch.long))
    assert out.l0.tolist() == [1]
    assert out.fired.tolist() == [True, False]
    assert torch.allclose(out.x_hat, sae.W_dec[:1])


@settings(max_examples=120, deadline=None)
@given(
    activation=st.sampled_from(tu.ACTIVATIONS),
    d_in=st.integers(1, 9),
    d_sae=st.integers(1, 12),
    batch=st.integers(1, 8),
    data=st.data(),
)
def test_every_activation_equals_the_naive_one(activation, d_in, d_sae, batch, data):
    """Forward pass, penalties and every gradient in fp64, for k from 1 to d_sae."""
    k = data.draw(st.integers(1, d_sae))
    seed = data.draw(st.integers(0, 1000))
    vocab = data.draw(st.sampled_from([None, 5]))
    sae = random_sae(d_in, d_sae, k, vocab, seed, activation=activation).double()
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, d_in, generator=generator, dtype=torch.float64).requires_grad_()
    tokens = torch.randint(5, (batch, 1), generator=generator)
    weights = torch.randn(batch, d_in, generator=generator, dtype=torch.float64)
    parameters = [x, *sae.parameters()]
    with pytest.MonkeyPatch.context() as patch:
        # A few tokens are encoded together, so that a batch comes in parts as at real widths.
        patch.setattr(kernels, "CPU_ROWS", data.draw(st.integers(1, 8)))
        out = sae(x, tokens)
    fast_loss = (out.x_hat * weights).sum() + out.sparsity + out.auxiliary
    fast = torch.autograd.grad(fast_loss, parameters)
    x_hat, acts, penalty = naive(sae, x, tokens)
    slow = torch.autograd.grad((x_hat * weights).sum() + penalty, parameters)
    assert torch.allclose(out.x_hat, x_hat)
    assert torch.allclose(out.sparsity + out.auxiliary, penalty)
    assert torch.equal(out.l0.long(), (acts > 0).sum(-1))
    assert torch.equal(out.fired, (acts > 0).any(0))
    names = ["x", *dict(sae.named_parameters())]
    for name, fast_gradient, slow_gradient in zip(names, fast, slow, strict=True):
        assert torch.allclose(fast_gradient, slow_gradient), name


@settings(max_examples=100, deadline=None)
@given(
    batch=st.integers(1, 5),
    width=st.integers(1, 1500),
    k=st.integers(1, 40),
    levels=st.sampled_from([3, 100]),
    seed=st.integers(0, 1000),
    data=st.data(),
)
def test_top_k_in_groups_is_exact(batch, width, k, levels, seed, data):
    """The values equal torch.topk's. With few levels there are ties, at the k-th value too."""
    width *= data.draw(st.sampled_from([1, 8, 64]))
    k = min(k, width)
    generator = torch.Generator().manual_seed(seed)
    pre = torch.randint(levels, (batch, width), generator=generator).float()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "WIDE", 0)
        values, index = tu.top_k(pre, k)
    assert torch.equal(values.sort(descending=True).values, pre.topk(k).values)
    assert_points_at_distinct_values(pre, values, index, k)


@settings(max_examples=100, deadline=None)
@given(
    batch=st.integers(1, 4),
    width=st.sampled_from([40, 1000, 2048, 4096]),
    k=st.integers(1, 40),
    shift=st.floats(-3, 3),
    seed=st.integers(0, 1000),
)
def test_bf16_is_sorted_by_its_bits(batch, width, k, shift, seed):
    """After a ReLU the result is that of torch.topk.

    The rows have many, few or no positive values, zeros of both signs and an infinity.
    """
    generator = torch.Generator().manual_seed(seed)
    pre = (torch.randn(batch, width, generator=generator) + shift).bfloat16()
    pre[:, 0] = 0.0
    pre[:, 1] = -0.0
    pre[0, 2] = float("inf")
    values, index = kernels.largest_positive(pre, k)
    assert torch.equal(values.relu().sort(descending=True).values, pre.topk(k).values.relu())
    assert_points_at_distinct_values(pre, values, index, k)


def test_a_batch_without_an_active_feature_has_gradients():
    """BatchTopK keeps only positive pre-activations, and here there are none."""
    sae = random_sae(6, 20, 4, activation="batchtopk").train()
    with torch.no_grad():
        sae.b_enc.fill_(-100.0)
    x, tokens = torch.randn(5, 6), torch.zeros(5, 1, dtype=torch.long)
    out = sae(x, tokens)
    out.x_hat.sum().backward()
    assert out.l0.tolist() == [0] * 5
    assert torch.equal(out.x_hat, sae.b_dec.expand(5, 6))
    assert torch.equal(sae.b_dec.grad, torch.full((6,), 5.0))
    assert not any(weight.grad.any() for weight in (sae.W_dec, sae.W_enc_FD, sae.b_enc))


def test_gradients_can_be_taken_twice():
    sae = random_sae(6, 20, 4)
    out = sae(torch.randn(5, 6), torch.zeros(5, 1, dtype=torch.long)).x_hat.square().sum()
    parameters = list(sae.parameters())
    first = torch.autograd.grad(out, parameters, retain_graph=True)
    second = torch.autograd.grad(out, parameters, retain_graph=True)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize(
    ("width", "k", "sorted_widths"),
    [
        (kernels.WIDE - 16, 8, [kernels.WIDE - 16]),
        (kernels.WIDE, 8, [64, 128]),
        (12288, 16, [192, 128, 128]),
    ],
)
def test_a_wide_sae_takes_its_top_in_groups(width, k, sorted_widths, monkeypatch):
    """torch.topk sorts only the maxima of the groups, then the members of the best groups."""
    sae = random_sae(4, width, k).double()
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(6, 4, generator=generator, dtype=torch.float64)
    tokens = torch.zeros(6, 1, dtype=torch.long)
    original_topk, widths = torch.Tensor.topk, []

    def recording_topk(tensor, *args, **kwargs):
        widths.append(tensor.shape[-1])
        return original_topk(tensor, *args, **kwargs)

    monkeypatch.setattr(torch.Tensor, "topk", recording_topk)
    out = sae(x, tokens)
    assert widths == sorted_widths
    monkeypatch.undo()
    assert torch.allclose(out.x_hat, naive(sae, x, tokens)[0])


@pytest.mark.parametrize("width", [48, 1024])
def test_the_packed_encoder_gives_the_plain_product(width):
    """In bf16 a sum in fp32 is rounded once, for any number of rows."""
    generator = torch.Generator().manual_seed(0)
    W = torch.randn(width, 32, generator=generator).bfloat16()
    b = torch.randn(width, generator=generator).bfloat16()
    encode = kernels.make_encoder(W, b)
    for n_rows in (1, 7, kernels.CPU_ROWS):
        x = torch.randn(n_rows, 32, generator=generator).bfloat16()
        exact = x.double() @ W.double().T + b.double()
        assert torch.allclose(encode(x).double(), exact, rtol=2**-8, atol=1e-5)


@pytest.mark.parametrize("activation", tu.ACTIVATIONS)
def test_bf16_is_close_and_for_training_only(activation):
    """Only large products are in bf16: values have 8 bits, near-ties may be broken otherwise."""
    sae = random_sae(64, 128, 8, 5, activation=activation)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(200, 64, generator=generator)
    tokens = torch.randint(5, (200, 1), generator=generator)
    exact = sae(x, tokens)
    inference = sae.eval()(x, tokens)
    sae.bf16 = True
    rough = sae.train()(x, tokens)
    assert rough.x_hat.dtype == torch.float32
    assert not torch.equal(rough.x_hat, exact.x_hat)
    tolerance = 0.15 if "topk" in activation else 0.03
    assert (rough.x_hat - exact.x_hat).norm() < tolerance * exact.x_hat.norm()
    assert torch.allclose(rough.sparsity, exact.sparsity, rtol=0.02)
    assert torch.allclose(rough.auxiliary, exact.auxiliary, rtol=0.02)
    assert activation == "batchtopk" or torch.equal(sae.eval()(x, tokens).x_hat, inference.x_hat)


def test_batchtopk_spends_k_on_average_and_thresholds_afterwards():
    sae = random_sae(16, 64, 4, activation="batchtopk")
    sae.threshold.zero_()
    x = torch.randn(500, 16, generator=torch.Generator().manual_seed(0))
    tokens = torch.zeros(500, 1, dtype=torch.long)
    out = sae(x, tokens)
    assert out.l0.sum() == 4 * 500
    assert out.l0.unique().numel() > 3, "k features per token on average, not for every token"
    assert torch.allclose(sae.threshold, sae.pre_activations(x).flatten().topk(2000).values[-1])
    assert abs(sae.eval()(x, tokens).l0.float().mean() - 4) < 0.1
    before = sae.threshold.clone()
    sae.train()(10 * x, tokens)
    lowest = sae.pre_activations(10 * x).flatten().topk(2000).values[-1]
    moved = 0.99 * before + 0.01 * lowest
    assert torch.allclose(sae.threshold, moved), "one batch moves it by a hundredth"


def test_batchtopk_with_fewer_positive_values_than_k():
    sae = random_sae(d_in=4, d_sae=8, k=7, activation="batchtopk")
    x, tokens = torch.randn(6, 4), torch.zeros(6, 1, dtype=torch.long)
    assert torch.equal(sae(x, tokens).l0, (sae.pre_activations(x) > 0).sum(-1).float())


def test_batchtopk_recovers_from_a_first_guess_that_is_too_high():
    """The sample sees only the large values, of which there are too few."""
    pre = torch.ones(64, 4096)
    pre.view(-1)[::2] = 2.0
    values, feature, row = kernels.top_of_batch(pre, 3000)
    assert len(values) == 64 * 3000
    assert (values == 2).sum() == 64 * 2048
    assert torch.equal(values, pre[row, feature])
    assert (row.diff() >= 0).all()


def test_jumprelu_uses_each_features_threshold():
    sae = random_sae(activation="jumprelu")
    sae.threshold[:5] = 1.0
    x = torch.randn(20, 6)
    pre = sae.pre_activations(x)
    assert torch.equal(sae.encode(x), torch.where(pre > sae.threshold, pre, 0.0))


def test_dead_features_model_the_error():
    """AuxK by hand: the strongest aux_k dead features model the error.

    A feature is dead once it was silent for the window. x_hat gets no gradient.
    """
    dead, alive = [1, 4, 6], [0, 2, 3, 5, 7]
    sae, x = random_sae(d_in=4, d_sae=8, k=2), torch.randn(5, 4)
    x_hat = sae(x, torch.zeros(5, 1, dtype=torch.long)).x_hat
    assert dead_features_error(sae, x, None, x_hat, 2, 100) == 0, "nothing is dead"
    sae.tokens_since_fired[dead] = 100
    values, index = sae.pre_activations(x)[:, dead].topk(2)
    rows = sae.W_dec[dead][index]  # [B, 2, D]
    modelled = (values.relu()[..., None] * rows).sum(1)
    error = dead_features_error(sae, x, None, x_hat, 2, 100)
    assert torch.allclose(error, (x - x_hat - modelled).square().sum(-1).mean())
    error.backward()
    assert sae.b_dec.grad is None
    assert sae.W_dec.grad[alive].abs().sum() == 0
    assert sae.W_dec.grad[dead].abs().sum() > 0


def test_ties_keep_exactly_k():
    sae = random_sae(d_in=4, d_sae=8, k=3)
    with torch.no_grad():
        sae.W_enc_FD.copy_(torch.ones(8, 4))
        sae.b_enc.zero_()
        sae.b_dec.zero_()
    out = sae(torch.ones(5, 4), torch.zeros(5, 1, dtype=torch.long))
    assert out.l0.tolist() == [3] * 5
    assert out.fired.sum() >= 3, "a feature is taken once"


@pytest.mark.parametrize("activation", tu.ACTIVATIONS)
def test_a_zero_table_is_the_baseline(activation):
    """Equal weights and a table of zeros give the same output, bit for bit."""
    plain, tokenized = random_sae(activation=activation), random_sae(activation=activation)
    tokenized.lookup = tu.TokenLookup(torch.zeros(7, 6))
    x, tokens = torch.randn(20, 6), torch.randint(7, (20, 1))
    assert torch.equal(plain(x, tokens).x_hat, tokenized(x, tokens).x_hat)


@pytest.mark.parametrize("activation", tu.ACTIVATIONS)
def test_permuting_a_batch_permutes_the_output(activation):
    sae = random_sae(vocab=7, activation=activation)
    x, tokens = torch.randn(20, 6), torch.randint(7, (20, 1))
    order = torch.randperm(20)
    permuted = sae(x[order], tokens[order]).x_hat
    assert torch.allclose(sae(x, tokens).x_hat[order], permuted, atol=1e-5)


@pytest.mark.parametrize("activation", tu.ACTIVATIONS)
def test_encode_and_decode_agree_with_forward(activation):
    sae = random_sae(vocab=7, activation=activation)
    x, tokens = torch.randn(20, 6), torch.randint(7, (20, 1))
    sae.eval()
    assert torch.allclose(sae.decode(sae.encode(x), tokens), sae(x, tokens).x_hat, atol=1e-5)


def test_the_encoder_does_not_see_the_table():
    sae, tripled = random_sae(vocab=7), random_sae(vocab=7)
    with torch.no_grad():
        tripled.lookup.W.mul_(3)
    x, tokens = torch.randn(20, 6), torch.randint(7, (20, 1))
    assert torch.equal(sae.encode(x), tripled.encode(x))
    assert torch.equal(sae(x, tokens).fired, tripled(x, tokens).fired)
    difference = tripled(x, tokens).x_hat - sae(x, tokens).x_hat
    assert torch.allclose(difference, 2 * sae.lookup.W[tokens[:, 0]], atol=1e-4)


def test_the_current_token_is_the_last_column():
    table = tu.TokenLookup(torch.arange(5.0)[:, None].expand(5, 3))
    assert table(torch.tensor([[4, 1], [0, 3]])).tolist() == [[1.0] * 3, [3.0] * 3]


@pytest.mark.parametrize(("activation", "d_sae"), [("topk", 0), ("topk", 4), ("batchtopk", 4)])
def test_k_zero_is_the_table_alone(activation, d_sae):
    cfg = tu.TSAEConfig(d_in=3, d_sae=d_sae, k=0, activation=activation)
    sae = tu.TSAE(cfg, tu.TokenLookup(torch.randn(5, 3)))
    out = sae(torch.randn(4, 3), torch.tensor([[0], [1], [2], [3]]))
    assert torch.equal(out.x_hat, sae.lookup.W[:4] + sae.b_dec)
    assert out.l0.tolist() == [0] * 4


def test_the_table_gets_a_gradient():
    """The authors' simplified code never trains the table."""
    sae = random_sae(vocab=7)
    out = sae(torch.randn(3, 6), torch.tensor([[1], [1], [4]]))
    out.x_hat.sum().backward()
    assert sae.lookup.W.grad[[1, 4]].abs().sum(-1).gt(0).all()
    assert sae.lookup.W.grad[[0, 2, 3, 5, 6]].abs().sum() == 0


def test_initialisation():
    """Decoder rows have unit norm by default, and W_enc is a multiple of W_dec^T.

    The authors' constrained optimizer normalizes the other axis in two of its SAEs.
    """
    cfg = tu.TSAEConfig(d_in=6, d_sae=10, k=2, encoder_scale=0.5)
    sae = tu.TSAE(cfg)
    assert torch.allclose(sae.W_dec.norm(dim=-1), torch.ones(10))
    assert torch.allclose(sae.W_enc, 0.5 * sae.W_dec.T)
    assert sae.W_enc.shape == (6, 10)
    same, other = (tu.TSAE(tu.TSAEConfig(d_in=6, d_sae=10, k=2, seed=s)) for s in (0, 1))
    assert torch.equal(same.W_dec, sae.W_dec)
    assert not torch.equal(other.W_dec, sae.W_dec)
    small = tu.TSAE(replace(cfg, decoder_init_norm=0.1))
    assert torch.allclose(small.W_dec, 0.1 * sae.W_dec)
    assert torch.allclose(small.W_enc, 0.1 * sae.W_enc)


def test_firing_is_counted_in_tokens_and_travels_with_the_module():
    """The authors' counters are no buffers and count steps."""
    sae = random_sae(d_in=2, d_sae=4, k=1)
    assert "tokens_since_fired" in dict(sae.named_buffers())
    with torch.no_grad():
        sae.W_enc_FD.copy_(torch.tensor([[1.0, 0], [-1, -1], [0, 0], [0, 1]]))
        for bias in (sae.b_enc, sae.b_dec):
            bias.zero_()
    out = sae(torch.tensor([[1.0, 0], [0, 2], [0, 3]]), torch.zeros(3, 1, dtype=torch.long))
    sae.count_firing_(out)
    sae.count_firing_(out)
    assert sae.tokens_since_fired.tolist() == [0, 6, 6, 0], "a zero value is not firing"
    assert sae.dead_fraction(6) == 0.5
    assert sae.dead_fraction(7) == 0.0


def test_relu_loss_uses_the_coefficient_and_decoder_norms():
    """The authors' code ignores the sparsity coefficient in one of its losses."""
    sae = random_sae(d_in=3, d_sae=5, k=0, activation="relu", l1_coefficient=0.7)
    x, tokens = torch.randn(4, 3), torch.zeros(4, 1, dtype=torch.long)
    out = sae(x, tokens)
    acts = sae.encode(x)
    assert torch.allclose(out.sparsity, (acts * sae.W_dec.norm(dim=1)).sum(1).mean())
    assert out.sparsity > 0
    cfg = tu.TrainConfig(lr=0.0, l1_warmup=0.5)
    loss, _ = tu.train_step_(sae, tu.optimizers_for(sae, cfg), cfg, x, tokens, done=0.25)
    expected = (x - out.x_hat).square().sum(1).mean() + 0.7 * 0.5 * out.sparsity
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5), "half of the warm-up is over"
