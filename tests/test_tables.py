"""Starts of lookup tables, massive activations, and the table subtracted before encoding."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from transformer_lens.model_bridge import TransformerBridge

import tsae_utils as tu
from conftest import HOOK, MODELS, VOCAB, random_weights_sae, word_tokenizer
from tsae.attach import attach
from tsae.run import dead_features_error

SINKS = range(40, 48)  # tokens that draw attention where they come first


@pytest.fixture(scope="module")
def sinking() -> tu.LanguageModel:
    """A model with massive activations: its first block adds 3,000 to a sink at position 1."""
    torch.manual_seed(0)
    model, seen = MODELS["gpt2"](), []

    def remember(module, args):
        seen[:] = [args[0]]

    def add(block, args, out):
        x = out[0] if isinstance(out, tuple) else out
        is_sink = torch.isin(seen[0][:, 1], torch.tensor(SINKS))
        x[:, 1, 5] += 3000.0 * is_sink
        return out

    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(5)
    model.transformer.wte.register_forward_pre_hook(remember)
    model.transformer.h[0].register_forward_hook(add)
    tokenizer = word_tokenizer(bos_token="<s>", eos_token="</s>")
    return tu.LanguageModel(model, tokenizer, "sinking", bf16=False)


@pytest.fixture(scope="module")
def sinking_rows() -> Tensor:
    """Rows of random words; one in a hundred has a sink at position 1, all have sinks elsewhere."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(2, VOCAB, (400, 16), generator=generator)
    rows[:, 0] = 0
    rows[:, 1] = torch.randint(2, 40, (400,), generator=generator)
    rows[::100, 1] = 41
    return rows


def trained(lm, rows, ratio: float, table: Tensor) -> tu.TSAE:
    """A TSAE after a short training."""
    cfg = tu.TSAEConfig(d_in=32, d_sae=128, k=8, encoder_scale=0.5)
    sae = tu.TSAE(cfg, tu.TokenLookup(0.5 * table))
    stream = tu.ActivationStream(lm, rows, HOOK, 256, 2048, max_norm_ratio=ratio)
    tu.train({"s": sae}, stream, tu.TrainConfig(tokens=50_000), progress=False)
    return sae


def test_massive_activations_no_longer_spoil_a_tsae(sinking, sinking_rows):
    """With all positions and raw rows it is useless; with the defaults it is as good as can be."""
    with pytest.warns(UserWarning, match=r"8 of 64 unigram activations are massive"):
        table = tu.table_start(sinking, HOOK, "unigram")
    raw = tu.unigram_activations(sinking, HOOK)
    evaluator = tu.Evaluator(sinking, sinking_rows[300:], HOOK)
    assert evaluator.massive_share == pytest.approx(1 / (100 * 15))
    before = evaluator(trained(sinking, sinking_rows[:300], math.inf, raw))
    now = evaluator(trained(sinking, sinking_rows[:300], 10.0, table))
    assert before["nmse"] > 100
    assert now["nmse"] < 0.2
    assert now["massive_share"] == evaluator.massive_share


def test_massive_positions_are_left_alone_everywhere(sinking, sinking_rows):
    """By stream and evaluator; the share is told and more than a hundredth is warned of."""
    stream = tu.ActivationStream(sinking, sinking_rows, HOOK, 64, 1024)
    is_sink = torch.isin(sinking_rows[:, 1], torch.tensor(SINKS))
    x, tokens = [], []
    for batch, (x_BD, tokens_BN) in enumerate(stream):
        x.append(x_BD.clone())
        tokens.append(tokens_BN)
        if batch == 80:
            break
    assert torch.cat(x).norm(dim=-1).max() <= stream.max_norm < 3000
    assert stream.massive > 0
    evaluator = tu.Evaluator(sinking, sinking_rows, HOOK, max_norm=stream.max_norm)
    assert not evaluator.keep[is_sink, 1].any()
    assert evaluator.keep[~is_sink, 1].all()
    x_hat = torch.zeros(len(evaluator.x_BD), 32)
    patched = evaluator.x.clone()
    patched[evaluator.keep] = 0
    expected = sinking.losses(sinking_rows, HOOK, patched)[evaluator.predicted].mean().item()
    assert evaluator.patched_losses(x_hat).mean().item() == pytest.approx(expected, rel=1e-5)
    many = sinking_rows.clone()
    many[::5, 1] = 41
    with pytest.warns(UserWarning, match="have massive activations and are left out"):
        tu.Evaluator(sinking, many, HOOK)


def test_infinite_activations_are_an_error_not_a_massive_one(lm, rows, monkeypatch):
    """They would otherwise be left out without a word."""
    whole = lm.activations

    def with_infinity(*args, **kwargs):
        found = whole(*args, **kwargs)
        for x in found.values():
            x[0, -1, 0] = math.inf
        return found

    stream = tu.ActivationStream(lm, rows, HOOK, 64, 1024)
    monkeypatch.setattr(lm, "activations", with_infinity)
    with pytest.raises(ValueError, match="contain NaN or infinity"):
        next(iter(stream))


def test_the_limit_is_saved_and_attached(sinking, sinking_rows, tmp_path):
    """With the ratio, in cfg.json."""
    cfg = tu.TSAEConfig(d_in=32, d_sae=40, k=6, hook_name=HOOK)
    sae = tu.TSAE(cfg, tu.TokenLookup(torch.randn(VOCAB, 32)))
    stream = tu.ActivationStream(sinking, sinking_rows, HOOK, 64, 1024)
    tu.train({"s": sae}, stream, tu.TrainConfig(tokens=640), progress=False)
    again = tu.load(tu.save(sae, tmp_path / "s"))
    assert again.cfg == sae.cfg
    assert (again.cfg.max_norm, again.cfg.max_norm_ratio) == (stream.max_norm, 10.0)


def test_an_attached_sae_leaves_massive_positions_alone(gpt2_folder):
    """The limit is put at the median, so that half of the positions are left alone."""
    bridge = TransformerBridge.boot_transformers(str(gpt2_folder), device="cpu")
    lm, sae = tu.load_lm(gpt2_folder, "cpu", bf16=False), random_weights_sae()
    ids = torch.randint(2, VOCAB, (3, 12), generator=torch.Generator().manual_seed(1))
    norms = lm.activations(ids, [HOOK])[HOOK].norm(dim=-1)
    sae.cfg = replace(sae.cfg, max_norm=norms.median().item())
    with torch.no_grad(), attach(bridge, sae) as seen:
        bridge(ids)
    patched = norms <= sae.cfg.max_norm
    patched[:, 0] = False
    assert torch.equal(seen.acts.any(-1), patched)


def test_the_testbed_is_as_before():
    """No activation there is massive: the same batches and numbers to the bit."""
    from testbed import corpus

    lm = tu.load_lm("testbed/model", device="cpu", bf16=False)
    documents = [document.text for document in corpus.documents("sae")][:60]
    rows, hook = tu.token_rows(documents, lm, 128, 20_000), "blocks.4.hook_resid_pre"
    limited, free = (
        tu.ActivationStream(lm, rows, hook, 512, 8192, max_norm_ratio=r) for r in (10.0, math.inf)
    )
    for _, (a, b) in zip(range(20), zip(limited, free, strict=False), strict=False):
        assert torch.equal(a[0], b[0])
        assert torch.equal(a[1], b[1])
    assert limited.massive == 0
    sae = random_weights_sae(d_in=lm.d_model, d_sae=512, vocab=lm.n_vocab)
    numbers = [tu.Evaluator(lm, rows[:4], hook, max_norm=m)(sae) for m in (None, math.inf)]
    assert numbers[0] == numbers[1]
    assert numbers[0]["massive_share"] == 0


# -- starts --


def test_starts_by_hand(lm, rows):
    x = lm.activations(rows, [HOOK])[HOOK]
    keep = tu.keep_mask(rows, lm)
    mean = x[keep].mean(0)
    table = tu.table_start(lm, HOOK, "mean", rows)
    for token in (2, 17, 40):
        here = x[keep & (rows == token)]
        expected = (here.sum(0) + 5 * mean) / (len(here) + 5)
        assert torch.allclose(table[token], expected, atol=1e-4)
    assert torch.allclose(table[0], mean, atol=1e-4), "BOS never counts: the mean of all"
    assert not tu.table_start(lm, HOOK, "zero").any()
    assert torch.equal(tu.table_start(lm, HOOK, "unigram"), tu.unigram_activations(lm, HOOK))
    assert torch.equal(tu.table_start(lm, HOOK), tu.unigram_activations(lm, HOOK))


def test_hashed_rows_know_nothing_of_their_tokens(lm, rows):
    """As many bins with as many activations each, but of random positions."""
    mean, hashed = (tu.table_start(lm, HOOK, kind, rows) for kind in ("mean", "hashed"))
    keep = tu.keep_mask(rows, lm)
    x, tokens = lm.activations(rows, [HOOK])[HOOK][keep], rows[keep].long()
    centre = x.mean(0)

    def explained(table: Tensor) -> float:
        error = (x - table[tokens]).square().sum()
        return 1 - (error / (x - centre).square().sum()).item()

    assert explained(mean) > 0.3
    assert explained(hashed) < 0.05
    spread = (mean - centre).norm(), (hashed - centre).norm()
    assert spread[1] < spread[0]
    assert torch.equal(hashed, tu.table_start(lm, HOOK, "hashed", rows))
    assert not torch.equal(hashed, tu.table_start(lm, HOOK, "hashed", rows, seed=1))


def test_the_default_start_is_the_mean_where_unigrams_are_massive(sinking, sinking_rows):
    with pytest.warns(UserWarning, match="8 of 64 unigram activations are massive"):
        table = tu.table_start(sinking, HOOK, rows=sinking_rows)
    assert torch.equal(table, tu.table_start(sinking, HOOK, "mean", sinking_rows))
    with pytest.warns(UserWarning), pytest.raises(ValueError, match="give rows of training text"):
        tu.table_start(sinking, HOOK)
    with pytest.warns(UserWarning):
        unigrams = tu.table_start(sinking, HOOK, "unigram")
    raw = tu.unigram_activations(sinking, HOOK)
    others = [i for i in range(VOCAB) if i not in SINKS]
    assert torch.equal(unigrams[others], raw[others])
    assert torch.allclose(unigrams[list(SINKS)], raw[others].mean(0), atol=1e-4)


@pytest.mark.parametrize("kind", ["unigram", "mean", "hashed", "zero"])
def test_tables_limited_to_the_commonest_tokens(lm, rows, kind):
    limited = tu.table_start(lm, HOOK, kind, rows, commonest=10)
    whole = tu.table_start(lm, HOOK, kind, rows)
    count = torch.bincount(rows[tu.keep_mask(rows, lm)].long(), minlength=VOCAB)
    common = count.argsort(descending=True, stable=True)[:10]
    rare = [i for i in range(VOCAB) if i not in common]
    assert torch.equal(limited[common], whole[common])
    assert (limited[rare] == limited[rare[0]]).all()


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("median", {}, "unknown start 'median': expected auto, unigram"),
        ("mean", {}, "need rows"),
        ("hashed", {}, "need rows"),
        ("zero", {"commonest": 3}, "need rows"),
    ],
)
def test_starts_that_cannot_be_made_are_refused(lm, kind, options, message):
    with pytest.raises(ValueError, match=message):
        tu.table_start(lm, HOOK, kind, **options)


# -- the table subtracted before encoding --


def subtracting(activation: str = "topk", **options) -> tu.TSAE:
    """Random weights, and an encoder that sees x minus the row."""
    plain = random_weights_sae(activation)
    cfg = replace(plain.cfg, subtract_lookup=True, **options)
    sae = tu.TSAE(cfg, tu.TokenLookup(plain.lookup.W))
    sae.load_state_dict(plain.state_dict())
    return sae.eval()


def without_table(sae: tu.TSAE) -> tu.TSAE:
    plain = tu.TSAE(replace(sae.cfg, subtract_lookup=False))
    plain.load_state_dict({n: t for n, t in sae.state_dict().items() if "lookup" not in n})
    return plain.train(sae.training)


def some_x() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(64, 32, generator=generator)
    return x, torch.randint(VOCAB, (64,), generator=generator)


@pytest.mark.parametrize("activation", [*tu.ACTIVATIONS, "jumprelu"])
def test_the_encoder_sees_what_the_table_leaves(activation):
    (x, tokens), sae = some_x(), subtracting(activation)
    row = sae.lookup.W[tokens]
    plain = without_table(sae)
    with torch.no_grad():
        expected = plain(x - row).x_hat + row
        assert torch.allclose(sae(x, tokens).x_hat, expected, atol=1e-5)
        assert torch.allclose(sae.encode(x, tokens), plain.encode(x - row), atol=1e-5)
        decoded = sae.decode(sae.encode(x, tokens), tokens)
        assert torch.allclose(decoded, expected, atol=1e-5)
        shaped = sae(x.view(4, 16, 32), tokens.view(4, 16)).x_hat
        assert torch.allclose(shaped.view(64, 32), expected, atol=1e-5)
    for call in (lambda: sae.encode(x), lambda: sae(x), lambda: sae.pre_activations(x)):
        with pytest.raises(ValueError, match="needs the tokens"):
            call()


class Residuals:
    """A stream of x - row without tokens."""

    def __init__(self, stream: tu.ActivationStream, W: Tensor) -> None:
        self.stream, self.W, self.batch_size = stream, W, stream.batch_size
        self.limits, self.max_norm_ratio = stream.limits, stream.max_norm_ratio

    def __iter__(self):
        for x, tokens in self.stream:
            yield x - self.W[tokens[:, -1]], tokens


@pytest.mark.parametrize("activation", tu.ACTIVATIONS)
def test_frozen_it_trains_as_a_plain_sae_on_the_residual(lm, rows, activation, monkeypatch):
    """To 1e-6, with AuxK and with biases that start on the first batch."""
    monkeypatch.setattr("tsae.run.fast_bf16", lambda device: False)  # it would magnify rounding
    options = {"d_in": 32, "d_sae": 48, "k": 4, "activation": activation, "l1_coefficient": 0.1}
    W = tu.table_start(lm, HOOK, "mean", rows)
    cfg = tu.TSAEConfig(**options, subtract_lookup=True)
    sae = tu.TSAE(cfg, tu.TokenLookup(W, trainable=False))
    plain = tu.TSAE(replace(cfg, subtract_lookup=False))
    has_top_k = "topk" in activation
    training = tu.TrainConfig(
        tokens=64 * 30, start_l0=5.0, aux_k=8 * has_top_k, aux_window=200, lr=1e-3
    )
    stream = tu.ActivationStream(lm, rows, HOOK, 64, 1024)
    tu.train({"s": sae}, stream, training, progress=False)
    tu.train({"s": plain}, Residuals(stream, W), training, progress=False)
    for name, tensor in plain.state_dict().items():
        assert torch.allclose(sae.state_dict()[name], tensor, atol=1e-6), name
    assert torch.equal(sae.lookup.W, W)


@pytest.mark.parametrize("activation", tu.ACTIVATIONS)
def test_gradients_of_a_learned_table_against_the_oracle(activation):
    """The row's gradient comes through the sum alone; the features' as if it were a constant."""
    x, tokens = some_x()
    sae = subtracting(activation, l1_coefficient=0.3).train()
    out = sae(x, tokens)
    loss = sae.loss(x, out)
    if activation == "topk":
        sae.tokens_since_fired[::2] = 100
        loss = loss + 0.1 * dead_features_error(sae, x, tokens, out.x_hat, 3, 50)
    loss.backward()
    again = subtracting(activation, l1_coefficient=0.3).train()
    plain = without_table(again)
    row = again.lookup.W[tokens]
    seen = x - row.detach()
    features = plain(seen)
    expected = plain.loss(seen, features._replace(x_hat=features.x_hat + row - row.detach()))
    if activation == "topk":
        plain.tokens_since_fired[::2] = 100
        expected = expected + 0.1 * dead_features_error(plain, seen, None, features.x_hat, 3, 50)
    expected.backward()
    assert torch.allclose(loss, expected)
    assert torch.allclose(sae.lookup.W.grad, again.lookup.W.grad, atol=1e-5)
    for name, parameter in plain.named_parameters():
        assert torch.allclose(dict(sae.named_parameters())[name].grad, parameter.grad, atol=1e-5)
    by_hand = torch.zeros(VOCAB, 32).index_add_(0, tokens, 2 * (out.x_hat - x).detach() / len(x))
    assert torch.allclose(sae.lookup.W.grad, by_hand, atol=1e-5)


@pytest.mark.parametrize("activation", [*tu.ACTIVATIONS, "jumprelu"])
def test_the_form_is_saved_under_a_name_of_its_own(tmp_path, activation):
    (x, tokens), sae = some_x(), subtracting(activation)
    folder = tu.save(sae, tmp_path / "s")
    assert tu.read_cfg(folder)["architecture"].startswith("subtracted_")
    again = tu.load(folder)
    assert replace(again.cfg, k=6) == sae.cfg
    assert torch.equal(again(x, tokens).x_hat, sae(x, tokens).x_hat)


def test_it_is_attached_and_measured_as_it_is(gpt2_folder):
    """Losses of an attached SAE are those of its reconstruction put in place."""
    bridge = TransformerBridge.boot_transformers(str(gpt2_folder), device="cpu")
    lm, sae = tu.load_lm(gpt2_folder, "cpu", bf16=False), subtracting()
    ids = torch.randint(2, VOCAB, (3, 12), generator=torch.Generator().manual_seed(1))
    ids[:, 0] = 0
    evaluator = tu.Evaluator(lm, ids, HOOK, max_norm=math.inf)
    with torch.no_grad(), attach(bridge, sae):
        logits = bridge(ids)
    losses = F.cross_entropy(logits[:, :-1].mT, ids[:, 1:], reduction="none")
    attached = losses[evaluator.predicted].mean().item()
    assert attached == pytest.approx(evaluator(sae)["ce_patched"], rel=1e-4)


def test_the_form_needs_a_table():
    with pytest.raises(ValueError, match="subtract_lookup needs a table"):
        tu.TSAE(tu.TSAEConfig(d_in=4, d_sae=8, k=2, subtract_lookup=True))


# -- a table for an SAE that has none --


@pytest.mark.parametrize("subtract", [False, True])
def test_a_loaded_sae_gets_a_table_and_trains_further(lm, rows, tmp_path, subtract):
    plain = tu.TSAE(tu.TSAEConfig(d_in=32, d_sae=64, k=4, hook_name=HOOK))
    stream = tu.ActivationStream(lm, rows, HOOK, 64, 1024)
    tu.train({"s": plain}, stream, tu.TrainConfig(tokens=6400), progress=False)
    loaded = tu.load(tu.save(plain, tmp_path / "s"))
    rows_VD = tu.table_start(lm, HOOK, "mean", rows)
    sae = tu.add_lookup(loaded, rows_VD, subtract)
    assert sae.cfg.subtract_lookup == subtract
    assert torch.equal(sae.b_dec, loaded.b_dec)
    assert torch.allclose(sae.lookup.W.mean(0), torch.zeros(32), atol=1e-4)
    evaluator = tu.Evaluator(lm, rows[:20], HOOK)
    before, start = evaluator(loaded)["nmse"], evaluator(sae)["nmse"]
    further = tu.TrainConfig(tokens=64, lr=0.0, lr_lookup=0.0, keep_biases=True)
    tu.train({"s": sae}, stream, further, progress=False)
    assert evaluator(sae)["nmse"] == pytest.approx(start), "nothing moved, b_dec included"
    further = replace(further, tokens=6400, lr=1e-3, lr_lookup=1e-2)
    tu.train({"s": sae}, stream, further, progress=False)
    assert evaluator(sae)["nmse"] < 0.8 * before
    with pytest.raises(ValueError, match="has a lookup table"):
        tu.add_lookup(sae, rows_VD)
