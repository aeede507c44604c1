"""Metrics by hand, and the positions they leave out."""

from __future__ import annotations

import math

import pytest
import torch

import tsae_utils as tu
from conftest import random_sae
from testbed import corpus

HOOK = "blocks.1.hook_resid_pre"


@pytest.fixture(scope="module")
def evaluator(lm, rows):
    return tu.Evaluator(lm, rows[:20], HOOK)


class Fixed(tu.TSAE):
    """An SAE whose reconstruction is a given function of x."""

    def __init__(self, function):
        super().__init__(tu.TSAEConfig(d_in=32, d_sae=4, k=1))
        self.function = function

    def forward(self, x, tokens):
        zero, fired = torch.zeros(()), torch.ones(1, dtype=torch.bool)
        return tu.TSAEOutput(self.function(x), torch.ones(len(x)), fired, zero, zero)


def test_reconstruction_error_by_hand():
    x, x_hat = torch.tensor([[3.0, 4.0], [0.0, 2.0]]), torch.tensor([[3.0, 0.0], [0.0, 1.0]])
    error = tu.reconstruction_error(x, x_hat)
    assert error.nmse == pytest.approx((16 / 25 + 1 / 4) / 2)
    assert error.nmse_unsquared == pytest.approx((4 / 5 + 1 / 2) / 2)
    # The mean is (1.5, 3), so the centred vectors are (1.5, 1) and (-1.5, -1).
    assert error.fvu == pytest.approx(17 / (2 * 1.5**2 + 2 * 1**2))


def test_perfect_and_zero_reconstruction(evaluator):
    perfect, zero = evaluator(Fixed(lambda x: x)), evaluator(Fixed(torch.zeros_like))
    assert perfect["nmse"] == 0
    assert perfect["ce_added"] == pytest.approx(0, abs=1e-4)
    assert perfect["ce_recovered"] == pytest.approx(1, abs=1e-4)
    assert zero["nmse"] == 1
    assert zero["ce_recovered"] == pytest.approx(0, abs=1e-6)
    added = (evaluator.ce_zero - evaluator.ce_clean) / evaluator.ce_clean
    assert zero["ce_added"] == pytest.approx(added)


def test_fvu_of_the_mean_is_one(evaluator):
    mean = evaluator.x_BD.mean(0)
    assert evaluator(Fixed(lambda x: mean.expand_as(x)))["fvu"] == pytest.approx(1, abs=1e-5)


def test_l0_and_vectors_per_token(evaluator):
    sae = random_sae(d_in=32, d_sae=40, k=5)
    plain = evaluator(sae)
    sae.lookup = tu.TokenLookup(torch.zeros(64, 32))
    tokenized = evaluator(sae)
    assert 0 < plain["l0"] <= 5
    assert plain["vectors_per_token"] == plain["l0"]
    # The table's row is a decoder vector too.
    assert tokenized["vectors_per_token"] == tokenized["l0"] + 1
    assert tokenized["ce_added"] == plain["ce_added"]


def test_bos_and_separators_are_left_out(lm, rows):
    """Neither their reconstruction nor predictions made at BOS or of separators count.

    The authors' code counts BOS.
    """
    evaluator = tu.Evaluator(lm, rows[:20], HOOK)
    ids = rows[:20].long()
    assert evaluator.keep.sum() == (ids > 1).sum()
    assert len(evaluator.x_BD) == evaluator.keep.sum()
    losses = lm.losses(ids)
    is_text = (ids[:, :-1] > 1) & (ids[:, 1:] > 1)
    by_hand = losses[is_text].tolist()
    assert evaluator.ce_clean == pytest.approx(sum(by_hand) / len(by_hand), rel=1e-5)
    paper = tu.Evaluator(lm, rows[:20], HOOK, include_bos=True)
    assert len(paper.x_BD) == ids.numel()
    assert paper.ce_clean == pytest.approx(losses.mean().item(), rel=1e-5)


def test_cross_entropy_by_hand(lm):
    ids = torch.tensor([[0, 5, 9]])
    logits = lm.model(ids).logits[0].double()
    log_probs = [logits[i] - logits[i].logsumexp(0) for i in range(2)]
    by_hand = [-log_probs[i][ids[0, i + 1]].item() for i in range(2)]
    assert lm.losses(ids)[0].tolist() == pytest.approx(by_hand, rel=1e-4)
    assert lm.losses(ids).dtype == torch.float32
    assert not math.isnan(by_hand[0])


@pytest.mark.parametrize("row", [[0, 5, 0, 0], [0, 1, 1, 1], [1, 1, 1, 1]])
def test_rows_without_text_are_refused(lm, row):
    """They gave NaN, or an error of division."""
    with pytest.raises(ValueError, match="nothing can be measured on 2 rows of 4 tokens"):
        tu.Evaluator(lm, torch.tensor([row, row]), HOOK)


@pytest.mark.parametrize("entry", [tu.Evaluator, tu.ActivationStream])
@pytest.mark.parametrize("rows", [torch.rand(2, 8), torch.arange(8), torch.zeros(2, 64).long()])
def test_what_is_no_row_is_refused(lm, entry, rows):
    """Fractions were cut off."""
    with pytest.raises(ValueError, match=r"token rows are whole numbers|32 positions"):
        entry(lm, rows, HOOK)


def test_heldout_is_not_training_text():
    """In the authors' code, validation rows are also training rows."""
    documents, _ = corpus.load(progress=False)
    split = {(d.package, d.module, d.name): d.split for d in documents}
    assert set(split.values()) == set(corpus.SPLITS)
    texts = {name: {d.text for d in corpus.documents(name)} for name in corpus.SPLITS}
    assert not texts["heldout"] & (texts["lm"] | texts["sae"] | texts["tune"])
    assert not texts["tune"] & (texts["lm"] | texts["sae"])


def test_saes_are_measured_in_evaluation_mode(evaluator):
    """BatchTopK is measured by its threshold in either mode, and the mode stays as it was."""
    sae = tu.TSAE(tu.TSAEConfig(d_in=32, d_sae=64, k=4, activation="batchtopk", seed=1))
    sae.threshold.fill_(0.5)
    expected = (sae.pre_activations(evaluator.x_BD) > 0.5).sum(-1).float().mean().item()
    assert evaluator(sae)["l0"] == pytest.approx(expected)
    assert sae.training
    assert evaluator(sae.eval())["l0"] == pytest.approx(expected)
    assert not sae.training


def test_sums_over_documents_by_hand(lm, rows):
    """Each prediction and each position counts once, in the document that it stands in."""
    evaluator, sae = tu.Evaluator(lm, rows[:6], HOOK), random_sae(d_in=32, d_sae=40, k=5)
    metrics, sums = evaluator.measure(sae)
    ids, separator = rows[:6].long(), lm.separator_id
    expected, document = {}, -1
    with torch.no_grad():
        x_hat = sae(evaluator.x.flatten(0, 1), ids.flatten()).x_hat.view_as(evaluator.x)
    patched = torch.where(evaluator.keep[..., None], x_hat, evaluator.x)
    losses = lm.losses(ids, HOOK, patched)
    for row, tokens in enumerate(ids.tolist()):
        document += 1  # a row starts one
        for place, token in enumerate(tokens):
            document += place > 0 and token == separator
            entry = expected.setdefault(document, [0, 0.0, 0, 0.0])
            if evaluator.keep[row, place]:
                x, error = evaluator.x[row, place], evaluator.x[row, place] - x_hat[row, place]
                entry[2] += 1
                entry[3] += float(error.square().sum() / x.square().sum())
            if place + 1 < len(tokens) and evaluator.predicted[row, place]:
                entry[0] += 1
                entry[1] += losses[row, place].item()
    for i, name in enumerate(("predictions", "ce_patched", "positions", "squared_error")):
        by_hand = torch.tensor([float(entry[i]) for entry in expected.values()])
        assert torch.allclose(getattr(sums, name).float(), by_hand, atol=1e-3), name
    assert len(expected) > 6, "rows hold several documents"
    mean = sums.squared_error.sum() / sums.positions.sum()
    assert metrics["nmse"] == pytest.approx(mean.item(), rel=1e-5)
    total = sums.ce_patched.sum() / sums.predictions.sum()
    assert metrics["ce_patched"] == pytest.approx(total.item(), rel=1e-6)


def test_divergence_and_mean_ablation_by_hand(lm, rows):
    evaluator, sae = tu.Evaluator(lm, rows[:6], HOOK), random_sae(d_in=32, d_sae=40, k=5)
    metrics = evaluator(sae)
    with torch.no_grad():
        x_hat = sae(evaluator.x_BD, evaluator.tokens_BN).x_hat

        def log_probabilities(x):
            _, handles, _, _ = lm._replacing(evaluator.rows, HOOK, x)
            try:
                return lm._logits(evaluator.rows).log_softmax(-1)[:, :-1]
            finally:
                for handle in handles:
                    handle.remove()

        p, q = log_probabilities(evaluator.x), log_probabilities(evaluator.patched(x_hat))
    by_hand = (p.exp() * (p - q)).sum(-1)[evaluator.predicted].mean()
    assert metrics["kl"] == pytest.approx(by_hand.item(), rel=1e-4)
    assert evaluator(Fixed(lambda x: x))["kl"] == pytest.approx(0, abs=1e-6)
    mean = evaluator.x_BD.mean(0)
    at_mean = evaluator(Fixed(lambda x: mean.expand_as(x)))
    assert at_mean["ce_recovered_mean"] == pytest.approx(0, abs=1e-4)
    assert at_mean["ce_recovered"] != pytest.approx(0, abs=1e-3)
