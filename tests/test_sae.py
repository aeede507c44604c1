"""The SAE: by hand, against a naive oracle, and by properties that must hold for any weights."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

import tsae_utils as tu


def random_sae(d_in=6, d_sae=10, k=3, vocab=None, seed=0, **kwargs) -> tu.TSAE:
    generator = torch.Generator().manual_seed(seed)
    table = None if vocab is None else tu.TokenLookup(torch.randn(vocab, d_in, generator=generator))
    sae = tu.TSAE(tu.TSAEConfig(d_in=d_in, d_sae=d_sae, k=k, **kwargs), table)
    with torch.no_grad():
        for p in (sae.W_enc_FD, sae.W_dec, sae.b_enc, sae.b_dec):
            p.copy_(torch.randn(p.shape, generator=generator))
    return sae


def naive(sae: tu.TSAE, x: torch.Tensor, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(x_hat, dense activations) by the equations, dense and differentiable."""
    pre = (x - sae.b_dec) @ sae.W_enc_FD.T + sae.b_enc
    values, index = pre.topk(sae.cfg.k, dim=-1)
    acts = torch.zeros_like(pre).scatter(-1, index, values.relu())
    x_hat = acts @ sae.W_dec + sae.b_dec
    return (x_hat if sae.lookup is None else x_hat + sae.lookup.W[tokens[:, -1]]), acts


def test_by_hand():
    """Two features in two dimensions, k = 1, every number worked out on paper."""
    sae = tu.TSAE(tu.TSAEConfig(d_in=2, d_sae=2, k=1), tu.TokenLookup(torch.tensor([[10.0, 0.0], [0.0, 20.0]])))
    with torch.no_grad():
        sae.W_enc_FD.copy_(torch.tensor([[1.0, 0.0], [0.0, 2.0]]))
        sae.W_dec.copy_(torch.tensor([[3.0, 0.0], [0.0, 4.0]]))
        sae.b_enc.copy_(torch.tensor([0.5, 0.0]))
        sae.b_dec.copy_(torch.tensor([1.0, 1.0]))
    out = sae(torch.tensor([[3.0, 1.5], [1.0, 4.0]]), torch.tensor([[0], [1]]))
    # x - b_dec = (2, .5), (0, 3); pre = (2.5, 1), (.5, 6); kept 2.5 of feature 0, 6 of feature 1
    assert out.values.flatten().tolist() == [2.5, 6.0] and out.index.flatten().tolist() == [0, 1]
    assert out.x_hat.tolist() == [[2.5 * 3 + 1 + 10, 1.0], [1.0, 6.0 * 4 + 1 + 20]]


def test_negative_pre_activations_do_not_count():
    """TopK then ReLU: k = 2 but one pre-activation is negative, so one feature is active (defect 8 of the ancestors)."""
    sae = random_sae(d_in=2, d_sae=2, k=2)
    with torch.no_grad():
        sae.W_enc_FD.copy_(torch.eye(2))
        sae.b_enc.zero_()
        sae.b_dec.zero_()
    out = sae(torch.tensor([[1.0, -1.0]]), torch.zeros(1, 1, dtype=torch.long))
    assert (out.values > 0).sum() == 1
    assert torch.allclose(out.x_hat, sae.W_dec[:1])


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 9), st.integers(1, 12), st.integers(1, 8), st.data())
def test_fast_path_equals_the_naive_one(d_in, d_sae, batch, data):
    """Forward and every gradient in fp64, k from 1 to d_sae, with and without a table."""
    k, seed, vocab = data.draw(st.integers(1, d_sae)), data.draw(st.integers(0, 1000)), data.draw(st.sampled_from([None, 5]))
    sae = random_sae(d_in, d_sae, k, vocab, seed).double()
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, d_in, generator=generator, dtype=torch.float64).requires_grad_()
    tokens = torch.randint(5, (batch, 1), generator=generator)
    weights = torch.randn(batch, d_in, generator=generator, dtype=torch.float64)
    parameters = [x, *sae.parameters()]
    with pytest.MonkeyPatch.context() as patch:  # a few rows at a time, as at real widths
        patch.setattr(tu, "CPU_CHUNK", data.draw(st.integers(1, 40)))
        out = sae(x, tokens)
    fast = torch.autograd.grad((out.x_hat * weights).sum() + out.values.square().sum(), parameters)
    x_hat, acts = naive(sae, x, tokens)
    slow = torch.autograd.grad((x_hat * weights).sum() + acts.square().sum(), parameters)
    assert torch.allclose(out.x_hat, x_hat)
    for name, a, b in zip(["x", *dict(sae.named_parameters())], fast, slow, strict=True):
        assert torch.allclose(a, b), name


def test_bf16_encoder_is_close():
    """bf16 touches the encoder's product alone: 8 bits of the values, and the choice among near-ties (their sum hardly moves)."""
    sae, g = random_sae(64, 128, 8, 5), torch.Generator().manual_seed(0)
    x, tokens = torch.randn(200, 64, generator=g), torch.randint(5, (200, 1), generator=g)
    exact = sae(x, tokens)
    sae.bf16 = True
    rough = sae(x, tokens)
    assert rough.x_hat.dtype == rough.values.dtype == torch.float32
    assert not torch.equal(rough.values, exact.values)
    assert torch.allclose(rough.values.sum(-1), exact.values.sum(-1), rtol=0.02)


def test_ties_keep_exactly_k():
    sae = random_sae(d_in=4, d_sae=8, k=3)
    with torch.no_grad():
        sae.W_enc_FD.copy_(torch.ones(8, 4))
        sae.b_enc.zero_()
        sae.b_dec.zero_()
    out = sae(torch.ones(5, 4), torch.zeros(5, 1, dtype=torch.long))
    assert (out.values > 0).sum(-1).tolist() == [3] * 5
    assert all(len(set(row)) == 3 for row in out.index.tolist()), "a feature is taken once"


@pytest.mark.parametrize("activation", ["topk", "relu"])
def test_zero_table_is_the_baseline(activation):
    """Equal weights and an all-zero table: the same output, bit for bit."""
    plain, tokenized = random_sae(activation=activation), random_sae(activation=activation)
    tokenized.lookup = tu.TokenLookup(torch.zeros(7, 6))
    x, tokens = torch.randn(20, 6), torch.randint(7, (20, 1))
    assert torch.equal(plain(x, tokens).x_hat, tokenized(x, tokens).x_hat)


@pytest.mark.parametrize("activation", ["topk", "relu"])
def test_permuting_a_batch_permutes_the_output(activation):
    sae = random_sae(vocab=7, activation=activation)
    x, tokens, p = torch.randn(20, 6), torch.randint(7, (20, 1)), torch.randperm(20)
    assert torch.allclose(sae(x, tokens).x_hat[p], sae(x[p], tokens[p]).x_hat, atol=1e-5)


@pytest.mark.parametrize("activation", ["topk", "relu"])
def test_encode_and_decode_agree_with_forward(activation):
    sae = random_sae(vocab=7, activation=activation)
    x, tokens = torch.randn(20, 6), torch.randint(7, (20, 1))
    assert torch.allclose(sae.decode(sae.encode(x), tokens), sae(x, tokens).x_hat, atol=1e-5)


def test_the_encoder_does_not_see_the_table():
    a, b = random_sae(vocab=7), random_sae(vocab=7)
    with torch.no_grad():
        b.lookup.W.mul_(3)
    x, tokens = torch.randn(20, 6), torch.randint(7, (20, 1))
    assert torch.equal(a(x, tokens).values, b(x, tokens).values)
    difference = b(x, tokens).x_hat - a(x, tokens).x_hat
    assert torch.allclose(difference, 2 * a.lookup.W[tokens[:, 0]], atol=1e-4)


def test_the_current_token_is_the_last_column():
    table = tu.TokenLookup(torch.arange(5.0)[:, None].expand(5, 3))
    assert table(torch.tensor([[4, 1], [0, 3]])).tolist() == [[1.0] * 3, [3.0] * 3]


def test_k_zero_is_the_table_alone():
    sae = tu.TSAE(tu.TSAEConfig(d_in=3, d_sae=0, k=0), tu.TokenLookup(torch.randn(5, 3)))
    out = sae(torch.randn(4, 3), torch.tensor([[0], [1], [2], [3]]))
    assert torch.equal(out.x_hat, sae.lookup.W[:4] + sae.b_dec) and out.values.shape == (4, 0)


def test_the_table_gets_a_gradient():
    """Defect 1 of the ancestors: the table was never trained."""
    sae = random_sae(vocab=7)
    out = sae(torch.randn(3, 6), torch.tensor([[1], [1], [4]]))
    out.x_hat.sum().backward()
    assert sae.lookup.W.grad[[1, 4]].abs().sum(-1).gt(0).all()
    assert sae.lookup.W.grad[[0, 2, 3, 5, 6]].abs().sum() == 0


def test_initialisation():
    """Decoder rows (not columns) have unit norm, W_enc is a multiple of W_dec^T (defect 4), and the seed decides."""
    sae = tu.TSAE(tu.TSAEConfig(d_in=6, d_sae=10, k=2, encoder_scale=0.5))
    assert torch.allclose(sae.W_dec.norm(dim=-1), torch.ones(10))
    assert torch.allclose(sae.W_enc, 0.5 * sae.W_dec.T) and sae.W_enc.shape == (6, 10)
    same, other = (tu.TSAE(tu.TSAEConfig(d_in=6, d_sae=10, k=2, seed=s)) for s in (0, 1))
    assert torch.equal(same.W_dec, sae.W_dec) and not torch.equal(other.W_dec, sae.W_dec)


def test_firing_is_counted_in_tokens_and_travels_with_the_module():
    """Defect 7: counters were no buffers and counted steps."""
    sae = random_sae(d_in=2, d_sae=4, k=1)
    assert "tokens_since_fired" in dict(sae.named_buffers())
    out = tu.TSAEOutput(torch.zeros(3, 2), torch.tensor([[1.0], [0.0], [2.0]]), torch.tensor([[0], [1], [3]]))
    sae.count_firing_(out)
    sae.count_firing_(out)
    assert sae.tokens_since_fired.tolist() == [0, 6, 6, 0], "a zero value is not firing"
    assert sae.dead_fraction(6) == 0.5 and sae.dead_fraction(7) == 0.0


def test_relu_loss_uses_the_coefficient_and_decoder_norms():
    """Defect 8: the sparsity coefficient was unused in one loss."""
    sae = random_sae(d_in=3, d_sae=5, k=0, activation="relu", l1_coefficient=0.7)
    x, tokens = torch.randn(4, 3), torch.zeros(4, 1, dtype=torch.long)
    out = sae(x, tokens)
    mse, l1 = tu.loss_terms(sae, x, out)
    assert torch.allclose(mse, (x - out.x_hat).pow(2).sum(1).mean())
    assert torch.allclose(l1, (out.values * sae.W_dec.norm(dim=1)).sum(1).mean()) and l1 > 0


def test_relu_gradients():
    sae = random_sae(d_in=3, d_sae=5, k=0, vocab=4, activation="relu")
    x, tokens = torch.randn(4, 3), torch.randint(4, (4, 1))
    acts = F.relu((x - sae.b_dec) @ sae.W_enc + sae.b_enc)
    x_hat = acts @ sae.W_dec + sae.b_dec + sae.lookup.W[tokens[:, 0]]
    assert torch.allclose(sae(x, tokens).x_hat, x_hat, atol=1e-5)
