"""Shapes, tokens, types and wrappers that an SAE is given."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import tsae_utils as tu
from conftest import HOOK, VOCAB, random_weights_sae
from tsae.run import dead_features_error

SIZES = st.sampled_from([0, 1, 2, 5, 6, 7])
SHAPES = st.lists(SIZES, min_size=0, max_size=4)
KINDS = (*tu.ACTIVATIONS, "jumprelu")


def small_sae(activation: str = "topk", vocab: int | None = 9) -> tu.TSAE:
    return random_weights_sae(activation, d_in=6, d_sae=16, vocab=vocab)


def one_at_a_time(sae: tu.TSAE, x: torch.Tensor, current: torch.Tensor) -> torch.Tensor:
    """Reconstructions by equation 2, written out for one activation after the other."""
    x_hat = torch.empty_like(x)
    for place in itertools.product(*map(range, x.shape[:-1])):
        features = sae.encode(x[place][None])[0]
        row = 0.0 if sae.lookup is None else sae.lookup.W[int(current[place])]
        x_hat[place] = features @ sae.W_dec + sae.b_dec + row
    return x_hat


def current_or_none(x: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor | None:
    """The current tokens in the shape of x without its last axis; None where they do not fit."""
    if x.ndim in (2, 3) and tokens.shape == x.shape[:-1]:
        return tokens
    if x.ndim == 2 and tokens.ndim == 2 and len(tokens) == len(x) and tokens.shape[1]:
        return tokens[:, -1]
    return None


@settings(max_examples=400, deadline=None)
@given(SHAPES, SHAPES, st.booleans(), st.booleans())
def test_any_two_shapes_are_right_or_refused(x_shape, token_shape, alike, has_table):
    """As one activation at a time, or a ValueError that names both shapes."""
    sae = small_sae(vocab=9 if has_table else None)
    x_shape = [*x_shape, 6] if alike else x_shape
    token_shape = x_shape[:-1] if alike and len(token_shape) % 2 else token_shape
    x, tokens = torch.randn(x_shape), torch.randint(9, token_shape)
    current = current_or_none(x, tokens) if x_shape[-1:] == [6] else None
    if current is None:
        with pytest.raises(ValueError, match="expected") as caught:
            sae(x, tokens)
        assert str(list(x_shape)) in str(caught.value)
        assert str(list(token_shape)) in str(caught.value)
        return
    with torch.no_grad():
        out, expected = sae(x, tokens), one_at_a_time(sae, x, current)
        decoded = sae.decode(sae.encode(x), tokens)
    assert out.x_hat.shape == x.shape
    assert out.l0.shape == x.shape[:-1]
    assert torch.allclose(out.x_hat, expected, atol=1e-5)
    assert torch.allclose(decoded, expected, atol=1e-5)


@pytest.mark.parametrize("activation", KINDS)
def test_tokens_of_one_axis_are_the_current_ones(activation):
    """They gave every activation the last token's row."""
    sae, x, tokens = small_sae(activation), torch.randn(8, 6), torch.arange(8)
    assert torch.equal(sae(x, tokens).x_hat, sae(x, tokens[:, None]).x_hat)
    assert torch.equal(sae.lookup(tokens), sae.lookup.W[:8])
    with torch.no_grad():
        assert torch.allclose(sae(x, tokens).x_hat, one_at_a_time(sae, x, tokens), atol=1e-5)


@pytest.mark.parametrize("activation", tu.ACTIVATIONS)
def test_rows_of_text_train_as_their_activations_do(activation):
    """Loss, gradients and AuxK of [R, L, D] are those of [R L, D]."""
    x, tokens = torch.randn(3, 4, 6), torch.randint(9, (3, 4))
    gradients = []
    for x_given, tokens_given in ((x, tokens), (x.flatten(0, 1), tokens.flatten())):
        sae = small_sae(activation).train()
        out = sae(x_given, tokens_given)
        loss = sae.loss(x_given, out)
        if activation == "topk":
            sae.tokens_since_fired[::2] = 100
            loss = loss + dead_features_error(sae, x_given, tokens_given, out.x_hat, 2, 50)
        loss.backward()
        silent = sae.tokens_since_fired + 12
        sae.count_firing_(out)
        assert torch.equal(sae.tokens_since_fired, torch.where(out.fired, 0, silent))
        gradients.append((loss.detach(), [p.grad for p in sae.parameters()]))
    (loss, first), (flat_loss, second) = gradients
    assert torch.allclose(loss, flat_loss)
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        (torch.tensor([0, -1, 3, 2]), "token -1 has no row in a lookup table of 9 rows"),
        (torch.tensor([0, 9, 3, 2]), "token 9 has no row"),
        (torch.tensor([0.0, 1.0, 3.0, 2.0]), "whole numbers, not torch.float32"),
        (torch.tensor([True, False, True, True]), "whole numbers, not torch.bool"),
        (None, "needs the tokens"),
    ],
)
def test_what_is_no_token_is_refused(tokens, message):
    sae = small_sae()
    for call in (lambda: sae(torch.randn(4, 6), tokens), lambda: sae.lookup(tokens)):
        with pytest.raises(ValueError, match=message):
            call()
    with pytest.raises(ValueError, match=message):
        sae.decode(torch.randn(4, 16), tokens)


def test_small_integers_are_tokens():
    sae, x, tokens = small_sae(), torch.randn(8, 6), torch.arange(8)
    for dtype in (torch.int32, torch.int16, torch.uint8):
        assert torch.equal(sae(x, tokens.to(dtype)).x_hat, sae(x, tokens).x_hat)


def test_an_sae_without_a_table_needs_no_tokens():
    sae, x = small_sae(vocab=None), torch.randn(2, 4, 6)
    assert torch.equal(sae(x).x_hat, sae(x, torch.zeros(2, 4).long()).x_hat)
    with pytest.raises(ValueError, match=r"shape \[2, 4\], expected \[B, 6\]"):
        sae.encode(torch.randn(2, 4))


def test_errors_of_different_shapes_are_refused():
    """A broadcast gave a number."""
    with pytest.raises(ValueError, match="does not fit activations of shape"):
        tu.reconstruction_error(torch.randn(4, 6), torch.randn(1, 6))
    x, x_hat = torch.randn(2, 3, 6), torch.randn(2, 3, 6)
    flat = tu.reconstruction_error(x.flatten(0, 1), x_hat.flatten(0, 1))
    assert tu.reconstruction_error(x, x_hat) == flat


# -- types and wrappers --


@pytest.fixture(scope="module")
def evaluator(lm, rows):
    return tu.Evaluator(lm, rows[:4], HOOK)


@pytest.mark.parametrize("activation", KINDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_types_are_measured_in_fp32(evaluator, activation, dtype):
    """As the same values in fp32, and the SAE stays as it was."""
    sae = random_weights_sae(activation).to(dtype).train()
    same = random_weights_sae(activation)
    same.load_state_dict({name: t.float() for name, t in sae.state_dict().items()})
    before = {name: tensor.clone() for name, tensor in sae.state_dict().items()}
    assert evaluator(sae) == evaluator(same)
    assert sae.training
    assert all(t.dtype == dtype and torch.equal(t, before[n]) for n, t in sae.state_dict().items())


def test_an_sae_in_training_is_measured_without_a_copy(evaluator, monkeypatch):
    """Curves are measured during training, where a copy would double the memory."""
    sae = random_weights_sae().train()
    monkeypatch.setattr("copy.deepcopy", lambda *_: pytest.fail("copied"))
    evaluator(sae)
    assert sae.training


def test_check_fit_takes_other_types(lm, rows):
    sae = random_weights_sae().to(torch.bfloat16)
    assert tu.check_fit(sae, lm, rows[:4], max_fvu=1e9) is sae


def test_an_sae_of_another_width_is_refused(evaluator):
    with pytest.raises(ValueError, match="d_in is 6, the width of the activations 32"):
        evaluator(small_sae())


@pytest.mark.parametrize("activation", ["topk", "gated"])
def test_a_compiled_sae_runs_trains_and_saves(tmp_path, lm, rows, evaluator, activation):
    """As the SAE itself; the table keeps its own learning rate."""
    x, tokens = torch.randn(64, 32), torch.randint(VOCAB, (64,))
    cfg = tu.TrainConfig(tokens=64 * 6, lr=1e-2, lr_lookup=1e-1)
    saved = []
    for compiles in (False, True):
        sae = random_weights_sae(activation)
        called = torch.compile(sae, backend="eager") if compiles else sae
        with torch.no_grad():
            assert torch.allclose(called(x, tokens).x_hat, sae(x, tokens).x_hat, atol=1e-5)
            with pytest.raises(ValueError, match="token 64 has no row"):
                called(x, tokens + VOCAB - tokens.max())
        stream = tu.ActivationStream(lm, rows, HOOK, 64, 256)
        tu.train({"s": called}, stream, cfg, progress=False, checkpoint=tmp_path / f"{compiles}.c")
        saved.append(tu.load(tu.save(called, tmp_path / str(compiles))).state_dict())
        assert evaluator(called) == evaluator(sae)
    assert all(torch.allclose(t, saved[1][name], atol=1e-4) for name, t in saved[0].items())


def test_other_wrappers_get_one_sentence(tmp_path, lm, rows, evaluator):
    wrapped = nn.DataParallel(random_weights_sae())
    stream = tu.ActivationStream(lm, rows, HOOK, 64, 256)
    calls = (
        lambda: evaluator(wrapped),
        lambda: tu.train({"s": wrapped}, stream, tu.TrainConfig(), progress=False),
        lambda: tu.save(wrapped, tmp_path / "s"),
        lambda: tu.check_fit(wrapped, lm, rows),
    )
    for call in calls:
        with pytest.raises(ValueError, match=r"expected a TSAE, not DataParallel: .*torchrun"):
            call()
    assert not (tmp_path / "s").exists()
