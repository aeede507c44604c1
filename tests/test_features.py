"""Planted features get the locality they should have; n-grams are counted right."""

from __future__ import annotations

import features as ft
import ngrams as ng
import pytest
import torch
from lab import PROFILES, tu

COMMON, RARE = (
    20,
    1000,
)  # tokens 0..19 make up the text; one in twenty is instead one of a thousand others


@pytest.fixture(scope="module")
def planted() -> tuple[torch.Tensor, list[torch.Tensor], torch.Tensor]:
    """Six features on 60,000 tokens: uni-, bi- and trigram, rare bigram, long-range, random."""
    g = torch.Generator().manual_seed(0)
    ids = torch.randint(COMMON, (300, 203), generator=g)
    rare = torch.rand(ids.shape, generator=g) < 0.05
    ids = torch.where(rare, torch.randint(COMMON, COMMON + RARE, ids.shape, generator=g), ids)
    t, s, r = (
        ids[:, 3:],
        ids[:, 2:-1],
        ids[:, 1:-2],
    )  # the token, the one before it, the one before that
    memorised = (t >= COMMON) & (
        (t * 31 + s) * 2654435761 % 1000 < 300
    )  # pairs seen about once in all the text
    long_range = torch.roll(ids, 40, dims=1)[:, 3:] < 2
    chance = torch.rand(t.shape, generator=g) < 0.1
    on = torch.stack(
        [t < 2, (t < 4) & (s < 10), (t < 8) & (s < 10) & (r < 10), memorised, long_range, chance],
        -1,
    )
    acts = on * (1 + 0.1 * torch.rand(on.shape, generator=g))
    groups = [
        torch.unique(torch.stack(last, -1).view(-1, len(last)), dim=0, return_inverse=True)[1]
        for last in ([t], [s, t], [r, s, t])
    ]
    return acts.flatten(0, 1), groups, torch.arange(300).repeat_interleave(200)


def test_locality_of_planted_features(planted):
    share, coverage = ft.locality(*planted)
    uni, bi, tri, rare, far, noise = share.T
    assert (uni > 0.97).all(), "the token decides"
    assert 0.3 < bi[0] < 0.55 and (bi[1:] > 0.9).all(), "two tokens decide, one knows half"
    assert tri[0] < 0.25 and 0.3 < tri[1] < 0.55 and tri[2] > 0.8, "three tokens decide"
    assert all(-0.1 < v < 0.05 for v in [*far, *noise]), (
        "what the last tokens do not decide has no locality"
    )
    assert rare[2] < 0.5, "pairs seen once or twice are little evidence"
    assert coverage[0].min() > 0.9 and coverage[2, 3] < 0.3 and coverage[2, 2] > 0.9, (
        "and coverage says that they were not seen"
    )


def test_rare_ngrams_do_not_inflate(planted):
    """Shrinkage keeps random activations on n-grams seen once near 0; without it they fall."""
    acts, groups, document = planted
    raw = ft.locality(acts[:, 5:], groups, document, shrinkage=1e-9)[0][2]
    shrunk = ft.locality(acts[:, 5:], groups, document)[0][2]
    assert raw < shrunk - 0.05 and -0.1 < shrunk < 0.05


def test_folds_are_documents():
    """A feature that fires all through one document is not local, though its tokens repeat."""
    document = torch.arange(20).repeat_interleave(100)
    token = document * 5 + torch.arange(2000) % 5  # every document has its own five tokens
    acts = (document % 4 == 0).float().unsqueeze(-1)
    share, coverage = ft.locality(acts, [token], document)
    assert share.abs().max() < 0.05 and coverage.max() == 0


def test_last_tokens_group_positions(lm):
    ids = torch.tensor([[0, 2, 3, 2, 3]])
    keep = torch.tensor([[False, True, True, True, True]])
    text = ft.Text(ids, keep, torch.zeros(4, 1), torch.zeros(4))
    one, two = text.last(1), text.last(2)
    assert one[0] == one[2] and one[1] == one[3] and one[0] != one[1]
    assert two[1] == two[3] and two[0] != two[2], "(BOS, 2) is not (3, 2)"
    assert text.tokens.tolist() == [[2], [3], [2], [3]]


def test_common_grams_by_hand(lm):
    class Bench:
        p = PROFILES["record"]

    bench = Bench()
    bench.lm, bench.train_rows = (
        lm,
        torch.tensor([[0, 2, 3, 4, 2, 3], [0, 2, 3, 1, 3, 4]]),
    )  # 0 BOS, 1 separator
    grams, count = ft.common_grams(bench, 2, 2)
    assert grams.tolist() == [[2, 3], [3, 4]] and count.tolist() == [3, 2]
    grams, count = ft.common_grams(bench, 3, 10)
    assert sorted(map(tuple, grams.tolist())) == [
        (2, 3, 4),
        (3, 4, 2),
        (4, 2, 3),
    ] and count.tolist() == [1, 1, 1]


# -- causal locality --


def test_causal_locality_of_planted_features():
    """Features of the token, of two tokens and of the far context, and what suffixes show."""
    g = torch.Generator().manual_seed(0)
    token, before, far = (torch.rand(20_000, generator=g) < p for p in (0.1, 0.3, 0.1))
    full = torch.stack([token, token & before, far, token & far], -1).float()
    one = torch.stack([token, token, torch.zeros_like(far), token], -1).float()
    two = torch.stack([token, token & before, torch.zeros_like(far), token], -1).float()
    with_one, with_two = ft.causal_locality(full, one), ft.causal_locality(full, two)
    assert with_one[0] == with_two[0] == pytest.approx(1) and with_two[1] == pytest.approx(1)
    # With p = P(A), q = P(B): the squared correlation of A and B with A is q (1 - p) / (1 - p q).
    assert with_one[1] == pytest.approx(0.3 * 0.9 / 0.97, abs=0.03)
    assert with_one[2] == with_two[2] == 0, "silent without its context"
    assert with_two[3] == pytest.approx(0.1 * 0.9 / 0.99, abs=0.03)
    scaled = ft.causal_locality(full, 3 * one + 1)
    assert torch.allclose(scaled, with_one, atol=1e-4), "a share of variance has no unit"
    assert ft.causal_locality(full, -one)[0] == 0, "what turns round is not the same feature"


def test_suffixes_are_read_at_their_own_positions(lm, rows):
    """Against one prompt after another; the stream entering layer 0 needs no more than a token."""
    ids = rows[:3].long()
    keep = tu.keep_mask(ids, lm)
    for layer in (0, 2):
        x = lm.activations(ids, [layer], bf16=False)[layer]
        text = ft.Text(ids, keep, x[keep], torch.zeros(int(keep.sum())))
        for n in (1, 3):
            found = ft.suffix_activations(lm, text, layer, n)
            for place, (row, column) in enumerate(keep.nonzero().tolist()):
                first = max(1, column - n + 1)
                prompt = torch.cat([ids[row, :1], ids[row, first : column + 1]])[None]
                places = torch.tensor([[0, *range(first, column + 1)]])
                alone = lm.activations(prompt, [layer], positions_RL=places)[layer][0, -1]
                assert torch.allclose(found[place], alone, atol=1e-4)
            assert layer or torch.allclose(found, text.x, atol=1e-4)
    limit = found.norm(dim=-1).median().item()
    cut = ft.suffix_activations(lm, text, 2, 3, limit)
    assert 0.3 < cut.isnan().any(-1).float().mean() < 0.7, "massive ones are left out"


# -- figure 5 --


def test_each_side_is_centred_by_its_own_mean():
    """Unrelated states have cosine 0 although both share a large mean that drifts."""
    g = torch.Generator().manual_seed(0)
    rows, columns, width = 200, 4, 32
    drift = 10 * torch.randn(columns, width, generator=g)
    true = torch.randn(rows, columns, width, generator=g) + drift + 5
    other = torch.randn(rows, columns, width, generator=g) + 2 * drift - 3
    pos_P2 = torch.cartesian_prod(torch.arange(rows), torch.arange(columns))
    text = ng.HeldoutStates(torch.zeros(rows, columns), torch.ones(rows, columns), [1], [true])
    found = {
        name: text.cosines(pos_P2, [x.flatten(0, 1)])
        for name, x in (
            ("same", true),
            ("unrelated", other),
            ("half", (true - drift - 5) / 2 + other),
        )
    }
    assert found["unrelated"]["raw"].mean() > 0.4, "what the mean does to a raw cosine"
    assert abs(found["unrelated"]["mean removed"].mean()) < 0.02
    assert found["same"]["mean removed"].mean() == pytest.approx(1)
    # A state that is half the true one and an unrelated unit of noise: 0.5 / sqrt(1 + 0.25).
    assert found["half"]["mean removed"].mean() == pytest.approx(0.447, abs=0.02)


def test_positions_are_drawn_from_shared_columns():
    keep = torch.ones(6, 20, dtype=torch.bool)
    keep[2, 15] = False
    pos = ng.draw_positions(keep, 3, 5, torch.Generator().manual_seed(0))
    assert pos[:, 1].unique().numel() == 5 and pos[:, 1].min() >= 10
    for row, column in pos.tolist():
        assert keep[row, column - 2 : column + 1].all()
    assert len(pos) == 6 * 5 - sum(15 <= c < 18 for c in pos[:, 1].unique().tolist())
