"""What features respond to: their activations on text and on n-grams, locality, categories.

Used by the notebooks on features (04, 07, 08, 09, 11). Axes as in tsae_utils; P positions that count, G groups.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from lab import Lab, tu
from torch import Tensor
from tqdm.auto import tqdm

SHRINKAGE = 4.0  # an n-gram's mean counts as much as its occurrences, the lower order's as much as this many


@dataclass
class Text:
    """Held-out text at one layer: activations [P, D], the positions they sit on, and their documents."""

    ids: Tensor  # [R, L]
    keep: Tensor  # [R, L], the positions that count
    x: Tensor  # [P, D]
    document: Tensor  # [P]

    @property
    def tokens(self) -> Tensor:
        """[P, 1], as an SAE takes them."""
        return self.ids[self.keep].unsqueeze(-1)

    def last(self, n: int) -> Tensor:
        """Group number [P] of the last n tokens at each position; a BOS or separator may be among them."""
        return torch.unique(
            tu.last_tokens(self.ids, n, int(self.ids[0, 0]))[self.keep], dim=0, return_inverse=True
        )[1]


def read_text(lab: Lab, layer: int, tokens: int, split: str = "heldout") -> Text:
    """At most the first `study_context` positions of each row, so that every SAE knows them."""
    ids = lab.rows(split, tokens)[:, : lab.study_context].long()
    keep = tu.keep_mask(ids, lab.lm)
    x = torch.cat(
        [
            lab.lm.activations(part, [layer])[layer][k.to(lab.lm.device)]
            for part, k in zip(ids.split(32), keep.split(32), strict=True)
        ]
    )
    document = (ids == lab.lm.separator_id).flatten().cumsum(0).view_as(ids)
    return Text(ids, keep, x, document[keep])


@torch.no_grad()
def activations(sae: tu.TSAE, x: Tensor, features: Tensor | slice = slice(None)) -> Tensor:
    """Activations of some features [P, len(features)], fp32, on the CPU."""
    return torch.cat([sae.encode(part)[:, features].cpu() for part in x.split(4096)])


@torch.no_grad()
def firing(sae: tu.TSAE, x: Tensor) -> Tensor:
    """How many of the activations each feature fires on [F]."""
    return sum((sae.encode(part) > 0).sum(0) for part in x.split(4096)).cpu()


def locality(
    acts_PF: Tensor,
    groups: list[Tensor],
    document: Tensor,
    folds: int = 5,
    shrinkage: float = SHRINKAGE,
) -> tuple[Tensor, Tensor]:
    """Share of each feature's activation variance that the last n tokens predict, n = 1..len(groups) [n, F], and coverage [n, F].

    The prediction for a position is the mean activation over the other folds' positions with the same last n tokens,
    shrunk towards the prediction of order n - 1 by `shrinkage` occurrences (order 0: the mean): a rare n-gram
    predicts little by itself and cannot inflate the share. Folds are documents. Coverage is the share of the squared
    activation that sits on n-grams seen in the other folds. Not in the paper: our measure beside its human scores.
    """
    acts = acts_PF.float()
    of_fold = document.unique(return_inverse=True)[1] % folds
    error = torch.zeros(len(groups) + 1, acts.shape[1])
    seen = torch.zeros(len(groups), acts.shape[1])
    for fold in range(folds):
        test = of_fold == fold
        a = acts[test]
        prediction = acts[~test].mean(0).expand_as(a)
        error[0] += (a - prediction).square().sum(0)
        for n, group in enumerate(groups, 1):
            size = int(group.max()) + 1
            total = torch.zeros(size, acts.shape[1]).index_add_(0, group[~test], acts[~test])
            count = torch.bincount(group[~test], minlength=size)[group[test]].unsqueeze(-1)
            prediction = (total[group[test]] + shrinkage * prediction) / (count + shrinkage)
            error[n] += (a - prediction).square().sum(0)
            seen[n - 1] += (a.square() * (count > 0)).sum(0)
    return 1 - error[1:] / error[0].clamp(min=1e-12), seen / acts.square().sum(0).clamp(min=1e-12)


def feature_table(sae: tu.TSAE, text: Text, features: Tensor, orders: int = 3) -> pd.DataFrame:
    """A row for each feature: firing frequency, mean and greatest activation, locality_n and coverage_n."""
    groups = [text.last(n) for n in range(1, orders + 1)]
    rows = []
    for part in tqdm(features.split(256), desc="locality"):
        acts = activations(sae, text.x, part.to(sae.W_dec.device))
        share, coverage = locality(acts, groups, text.document)
        rows.append(
            pd.DataFrame(
                {
                    "feature": part.numpy(),
                    "frequency": (acts > 0).float().mean(0).numpy(),
                    "mass": acts.square().sum(0).numpy(),
                    "greatest": acts.amax(0).numpy(),
                    **{f"locality_{n}": share[n - 1].numpy() for n in range(1, orders + 1)},
                    **{f"coverage_{n}": coverage[n - 1].numpy() for n in range(1, orders + 1)},
                }
            )
        )
    return pd.concat(rows, ignore_index=True)


def sample_features(sae: tu.TSAE, text: Text, n: int, seed: int = 0, least: int = 10) -> Tensor:
    """At most n features, drawn evenly from those that fire on at least `least` positions."""
    alive = torch.nonzero(firing(sae, text.x) >= least).squeeze(-1)
    return (
        alive[torch.randperm(len(alive), generator=torch.Generator().manual_seed(seed))[:n]]
        .sort()
        .values
    )


def prompts(lab: Lab, grams: Tensor) -> Tensor:
    """[BOS, t1, ..., tn] for n-grams [G, n]."""
    return torch.cat([torch.full((len(grams), 1), lab.lm.bos_id), grams.long()], dim=1)


@torch.no_grad()
def gram_activations(lab: Lab, grams: Tensor, layer: int) -> Tensor:
    """The residual stream at the last token of each n-gram's prompt [G, D]."""
    return torch.cat(
        [
            lab.lm.activations(part, [layer])[layer][:, -1]
            for part in prompts(lab, grams).split(1024)
        ]
    )


def common_grams(lab: Lab, n: int, limit: int) -> tuple[Tensor, np.ndarray]:
    """The commonest n-grams [G, n] of the training rows and their counts, commonest first, within documents.

    Counted on at most the profile's `ngram_tokens`, evenly spaced.
    """
    ids, wanted = lab.train_rows, max(1, lab.p.budget.ngram_tokens // lab.train_rows.shape[1])
    ids = (
        ids if wanted >= len(ids) else ids[torch.linspace(0, len(ids) - 1, wanted).long()]
    ).long()
    whole = tu.keep_mask(ids, lab.lm).unfold(1, n, 1).all(-1)
    grams = ids.unfold(1, n, 1)[whole]
    key = torch.zeros(len(grams), dtype=torch.int64)
    for column in grams.T:  # the number of each n-gram among those that occur, column by column
        key = torch.unique(key * lab.lm.n_vocab + column, return_inverse=True)[1]
    count = torch.bincount(key)
    first = torch.full((len(count),), len(grams)).scatter_reduce_(
        0, key, torch.arange(len(grams)), "amin"
    )
    top = count.topk(min(limit, len(count))).indices
    return grams[first[top]], count[top].numpy()


def token_counts(lab: Lab) -> Tensor:
    """How often each token occurs [V], on the rows of `common_grams`."""
    grams, count = common_grams(lab, 1, lab.lm.n_vocab)
    return torch.zeros(lab.lm.n_vocab, dtype=torch.int64).index_put(
        (grams[:, 0],), torch.from_numpy(count)
    )


def logit_directions(lm: tu.LanguageModel) -> Tensor:
    """W_U [V, D] behind the final norm's gain: a direction of the stream times this is its direct effect on the logits."""
    gains = [
        m.weight
        for m in lm.model.base_model.children()
        if getattr(m, "weight", None) is not None and m.weight.shape == (lm.d_model,)
    ]
    W_U = lm.model.get_output_embeddings().weight.detach().float()
    W_U = W_U * gains[-1].detach().float() if gains else W_U
    return W_U - W_U.mean(-1, keepdim=True) if lm.centred else W_U


@torch.no_grad()
def describe(
    lab: Lab,
    sae: tu.TSAE,
    feature: int,
    text: Text,
    contexts: int = 8,
    window: int = 10,
    top: int = 8,
    acts: Tensor | None = None,
) -> pd.DataFrame:
    """Everything a dashboard shows of one feature, a row each: `row, rank, place, token, value`.

    row is context (a token of a strong context, with the activation on it; place 0 is the strongest token), histogram
    (value: positions; place: the bin's lower edge), boosted or suppressed (logit per unit of activation), table
    (cosine of the decoder row with a row of unigram activations, means removed) or number (a statistic). `acts` are the
    feature's activations [P] where they are known: encoding the text is the slow part.
    """

    def word(token: int) -> str:
        return lab.lm.tokenizer.decode([token])

    if acts is None:
        acts = activations(sae, text.x, torch.tensor([feature], device=text.x.device))[:, 0]
    grid = torch.zeros(text.ids.shape)
    grid[text.keep] = acts
    numbers = {
        "frequency": (acts > 0).float().mean(),
        "greatest": acts.max(),
        "decoder norm": sae.W_dec[feature].norm(),
    }
    rows = [
        {"row": "number", "token": name, "value": value.item()} for name, value in numbers.items()
    ]
    place, used, rank = text.keep.nonzero(), set(), 0
    for at in acts.argsort(descending=True).tolist():
        r, c = place[at].tolist()
        if rank == contexts or acts[at] <= 0:
            break
        document, wording = (
            int(text.document[at]),
            tuple(text.ids[r, max(0, c - 2) : c + 1].tolist()),
        )
        if document in used or wording in used:
            continue  # one context for each document and each wording
        used |= {document, wording}
        rank += 1
        for i in range(max(1, c - window), min(text.ids.shape[1], c + window // 2 + 1)):
            rows.append(
                {
                    "row": "context",
                    "rank": rank,
                    "place": i - c,
                    "token": word(int(text.ids[r, i])),
                    "value": grid[r, i].item(),
                }
            )
    fired = acts[acts > 0].numpy()
    if len(fired):
        count, edges = np.histogram(fired, bins=24, range=(0, fired.max()))
        rows += [
            {"row": "histogram", "rank": i, "place": edges[i], "value": float(n)}
            for i, n in enumerate(count)
        ]
    direction = sae.W_dec[feature]
    effect = logit_directions(lab.lm) @ direction
    table = lab.unigrams(tu.parse_hook(sae.cfg.hook_name, lab.lm.n_layers))
    cosine = torch.cosine_similarity(table - table.mean(0), direction, dim=-1)
    for name, values, largest in (
        ("boosted", effect, True),
        ("suppressed", effect, False),
        ("table", cosine, True),
    ):
        v, i = values.topk(top, largest=largest)
        rows += [
            {"row": name, "rank": n + 1, "token": word(int(i[n])), "value": v[n].item()}
            for n in range(len(v))
        ]
    return pd.DataFrame(rows).assign(feature=feature)
