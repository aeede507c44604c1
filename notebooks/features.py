"""What features respond to: their activations on text and on n-grams, locality, dashboards.

Used by notebooks 02, 03, 04, 07, 08, 09, 11 and 17. Axes: P positions that count, R rows, L length,
D d_in, F features, V vocabulary, G n-grams.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field

import numpy as np
import pandas as pd
import torch
from lab import Lab, tu
from torch import Tensor, nn
from tqdm.auto import tqdm

from tsae.blocks import StopForward, removed_afterwards

SHRINKAGE = 4.0  # occurrences of an n-gram that weigh as much as the prediction of the lower order
HISTOGRAM_BINS = 24

# ---------------------------------------------------------------------------------------------
# Text
# ---------------------------------------------------------------------------------------------


@dataclass
class Text:
    """Held-out text at one layer: activations, with their positions and documents."""

    ids: Tensor  # [R, L]
    keep: Tensor  # [R, L], True at positions that count
    x: Tensor  # [P, D]
    document: Tensor  # [P]
    suffixes: list[Tensor] = field(default_factory=list)  # [P, D], see `suffix_activations`

    @property
    def tokens(self) -> Tensor:
        """The current token of each position [P, 1], as an SAE takes it."""
        return self.ids[self.keep].unsqueeze(-1)

    def last(self, n: int) -> Tensor:
        """A number [P] for the last n tokens of each position, equal where the tokens are equal.

        A BOS or a separator may be among the tokens.
        """
        bos_id = int(self.ids[0, 0])
        grams = tu.last_tokens(self.ids, n, bos_id)[self.keep]
        return torch.unique(grams, dim=0, return_inverse=True)[1]


def read_text(lab: Lab, layer: int, tokens: int, split: str = "heldout", suffixes: int = 0) -> Text:
    """About `tokens` tokens of a split, with the residual stream entering `layer`.

    Only the first `study_context` positions of each row are read: every SAE was trained on them.
    With `suffixes` = N the stream is also read with only the last 1 to N tokens in view.
    """
    ids = lab.rows(split, tokens)[:, : lab.study_context].long()
    keep = tu.keep_mask(ids, lab.lm)
    parts = []
    for i in range(0, len(ids), 32):
        x = lab.lm.activations(ids[i : i + 32], [layer])[layer]
        keep[i : i + 32] &= ~(x.norm(dim=-1) > lab.max_norm(layer)).cpu()  # as in training
        parts.append(x[keep[i : i + 32].to(x.device)])
    document = (ids == lab.lm.separator_id).flatten().cumsum(0).view_as(ids)
    text = Text(ids, keep, torch.cat(parts), document[keep])
    for n in range(1, suffixes + 1):
        text.suffixes.append(suffix_activations(lab.lm, text, layer, n, lab.max_norm(layer)))
    return text


def suffix_activations(
    lm: tu.LanguageModel, text: Text, layer: int, n: int, max_norm: float = np.inf
) -> Tensor:
    """The stream [P, D] entering `layer` when BOS and the last n tokens are all that is in view.

    The tokens keep their positions in the row. Near its front there are fewer than n. Activations
    above `max_norm` (a lone token can become an attention sink) are NaN.
    """
    row, column = text.keep.nonzero().T
    x = torch.empty_like(text.x)
    for seen in range(1, n + 1):
        chosen = torch.nonzero(column.clamp(max=n) == seen).squeeze(-1)
        for part in chosen.split(2048):
            columns = column[part, None] + torch.arange(1 - seen, 1)
            bos = torch.zeros_like(columns[:, :1])
            places = torch.cat([bos, columns], 1)
            ids = text.ids[row[part, None], places]
            last = lm.activations(ids, [layer], positions_RL=places)[layer][:, -1]
            x[part.to(x.device)] = last
    x[x.norm(dim=-1) > max_norm] = torch.nan
    return x


# ---------------------------------------------------------------------------------------------
# Activations and locality
# ---------------------------------------------------------------------------------------------


@torch.no_grad()
def encoded(sae: tu.TSAE, x: Tensor, tokens: Tensor, part: int = 4096) -> Iterator[Tensor]:
    """Activations of all features on x [P, D] at tokens [P] or [P, 1], part by part."""
    pairs = zip(x.split(part), tokens.to(x.device).split(part), strict=True)
    return (sae.encode(*pair) for pair in pairs)


@torch.no_grad()
def activations(sae: tu.TSAE, text: Text, features: Tensor | slice = slice(None)) -> Tensor:
    """Activations of the chosen features on a text: [P, len(features)], fp32, on the CPU."""
    return torch.cat([acts[:, features].cpu() for acts in encoded(sae, text.x, text.tokens)])


@torch.no_grad()
def firing(sae: tu.TSAE, text: Text) -> Tensor:
    """Number of positions of a text on which each feature fires [F]."""
    return sum((acts > 0).sum(0) for acts in encoded(sae, text.x, text.tokens)).cpu()


def locality(
    acts_PF: Tensor,
    groups: list[Tensor],
    document: Tensor,
    folds: int = 5,
    shrinkage: float = SHRINKAGE,
) -> tuple[Tensor, Tensor]:
    """(Locality [N, F], coverage [N, F]) for the last n = 1..N tokens, N = len(groups).

    Locality is the share of a feature's activation variance that the last n tokens predict. The
    prediction is the mean activation over positions of the other folds with the same n tokens,
    shrunk towards the prediction of order n - 1 by `shrinkage` occurrences (order 0: the mean).
    A rare n-gram therefore predicts little by itself and cannot inflate the share. Folds are made
    of whole documents. Coverage is the share of squared activation on n-grams that occur in the
    other folds. This measure is ours; the paper has human scores instead.
    """
    acts_PF = acts_PF.float()
    fold_of = document.unique(return_inverse=True)[1] % folds
    n_features = acts_PF.shape[1]
    error = torch.zeros(len(groups) + 1, n_features)
    seen = torch.zeros(len(groups), n_features)
    for fold in range(folds):
        test = fold_of == fold
        test_acts, other_acts = acts_PF[test], acts_PF[~test]
        prediction = other_acts.mean(0).expand_as(test_acts)
        error[0] += (test_acts - prediction).square().sum(0)
        for n, group in enumerate(groups, 1):
            test_group, other_group = group[test], group[~test]
            size = int(group.max()) + 1
            total = torch.zeros(size, n_features).index_add_(0, other_group, other_acts)
            count = torch.bincount(other_group, minlength=size)[test_group].unsqueeze(-1)
            prediction = (total[test_group] + shrinkage * prediction) / (count + shrinkage)
            error[n] += (test_acts - prediction).square().sum(0)
            seen[n - 1] += (test_acts.square() * (count > 0)).sum(0)
    mass = acts_PF.square().sum(0)
    return 1 - error[1:] / error[0].clamp(min=1e-12), seen / mass.clamp(min=1e-12)


def causal_locality(acts_PF: Tensor, suffix_acts_PF: Tensor) -> Tensor:
    """Share of a feature's variance that its activation on a suffix alone gives linearly [F].

    It is the squared correlation of the activation in full context with the one where only the
    last tokens are in view; 0 where the two do not go together. Nothing is fitted across texts, so
    a trigram that occurs once counts like any other. This measure is ours.
    """
    shares = []
    for parts in zip(acts_PF.split(64, 1), suffix_acts_PF.split(64, 1), strict=True):
        a, b = (acts.double() - acts.double().mean(0) for acts in parts)  # sums over many positions
        r = (a * b).sum(0) / (a.norm(dim=0) * b.norm(dim=0)).clamp(min=1e-9)
        shares.append(r.clamp(min=0).square().float())
    return torch.cat(shares)


@torch.no_grad()
def causal_table(
    sae: tu.TSAE, text: Text, features: Tensor, acts_PF: Tensor
) -> dict[str, np.ndarray]:
    """Columns causal_n for each suffix of the text."""
    columns = {}
    for n, x in enumerate(text.suffixes, 1):
        seen = ~x.isnan().any(-1)
        parts = encoded(sae, x[seen], text.tokens[seen.cpu()])
        suffix_acts = torch.cat([acts[:, features].cpu() for acts in parts])
        columns[f"causal_{n}"] = causal_locality(acts_PF[seen.cpu()], suffix_acts).numpy()
    return columns


def feature_table(sae: tu.TSAE, text: Text, features: Tensor, orders: int = 3) -> pd.DataFrame:
    """One row per feature: frequency, mass, greatest activation, locality_n and coverage_n.

    Frequency is the share of positions on which it fires, mass its summed squared activation. A
    text with suffixes adds causal_n.
    """
    groups = [text.last(n) for n in range(1, orders + 1)]
    tables = []
    for part in tqdm(features.split(512), desc="locality"):
        chosen = part.to(sae.W_dec.device)
        acts = activations(sae, text, chosen)
        share, coverage = locality(acts, groups, text.document)
        columns = {
            "feature": part,
            "frequency": (acts > 0).float().mean(0),
            "mass": acts.square().sum(0),
            "greatest": acts.amax(0),
        }
        columns |= {f"locality_{n}": share[n - 1] for n in range(1, orders + 1)}
        columns |= {f"coverage_{n}": coverage[n - 1] for n in range(1, orders + 1)}
        columns = {name: column.numpy() for name, column in columns.items()}
        tables.append(pd.DataFrame(columns | causal_table(sae, text, chosen, acts)))
    return pd.concat(tables, ignore_index=True)


def sample_features(sae: tu.TSAE, text: Text, n: int, seed: int = 0, least: int = 10) -> Tensor:
    """At most n features [n], drawn from those that fire on at least `least` positions."""
    alive = torch.nonzero(firing(sae, text) >= least).squeeze(-1)
    order = torch.randperm(len(alive), generator=torch.Generator().manual_seed(seed))
    return alive[order[:n]].sort().values


# ---------------------------------------------------------------------------------------------
# n-grams
# ---------------------------------------------------------------------------------------------


def prompts(lab: Lab, grams: Tensor) -> Tensor:
    """[BOS, t1, ..., tn] for n-grams [G, n]: [G, n + 1]."""
    bos = torch.full((len(grams), 1), lab.lm.bos_id)
    return torch.cat([bos, grams.long()], dim=1)


@torch.no_grad()
def gram_activations(lab: Lab, grams: Tensor, layer: int) -> Tensor:
    """The residual stream at the last token of the prompt of each n-gram [G, n]: [G, D]."""
    parts = prompts(lab, grams).split(1024)
    return torch.cat([lab.lm.activations(part, [layer])[layer][:, -1] for part in parts])


def counted_rows(lab: Lab) -> Tensor:
    """Training rows [R, L], evenly spaced, of at most the profile's `ngram_tokens` tokens."""
    ids = lab.train_rows
    wanted = max(1, lab.p.budget.ngram_tokens // ids.shape[1])
    if wanted < len(ids):
        ids = ids[torch.linspace(0, len(ids) - 1, wanted).long()]
    return ids.long()


def common_grams(lab: Lab, n: int, limit: int) -> tuple[Tensor, np.ndarray]:
    """The `limit` commonest n-grams [G, n] of the training rows and their counts [G].

    The commonest comes first. An n-gram lies within one document.
    """
    ids = counted_rows(lab)
    is_whole = tu.keep_mask(ids, lab.lm).unfold(1, n, 1).all(-1)
    grams = ids.unfold(1, n, 1)[is_whole]
    # Number the n-grams that occur. Renumbering after each column keeps the products small.
    key = torch.zeros(len(grams), dtype=torch.int64)
    for column in grams.T:
        key = torch.unique(key * lab.lm.n_vocab + column, return_inverse=True)[1]
    count = torch.bincount(key)
    # The first occurrence of each number gives its tokens.
    first = torch.full((len(count),), len(grams))
    first.scatter_reduce_(0, key, torch.arange(len(grams)), "amin")
    top = count.topk(min(limit, len(count))).indices
    return grams[first[top]], count[top].numpy()


def token_counts(lab: Lab) -> Tensor:
    """Occurrences of each token [V] in the rows of `common_grams`."""
    grams, count = common_grams(lab, 1, lab.lm.n_vocab)
    counts = torch.zeros(lab.lm.n_vocab, dtype=torch.int64)
    counts[grams[:, 0]] = torch.from_numpy(count)
    return counts


# ---------------------------------------------------------------------------------------------
# Dashboards
# ---------------------------------------------------------------------------------------------


@torch.no_grad()
def logit_directions(lm: tu.LanguageModel) -> Tensor:
    """What each direction of the stream adds to the logits [V, D], the final norm's scale apart.

    Whatever gain the norm has and whatever follows it is found by running it on the axes of the
    stream and their opposites; biases drop out.
    """
    head, seen = lm.model.get_output_embeddings(), []

    def read(module: nn.Module, args: tuple) -> None:
        seen.append(args[0][:, 0].float())
        raise StopForward

    axes = 100 * lm.d_model**0.5 * torch.eye(lm.d_model, device=lm.device)  # far above epsilons
    ids = lm.probe_ids[:1, :1].expand(2 * lm.d_model, 1)
    with removed_afterwards([head.register_forward_pre_hook(read)]), suppress(StopForward):
        lm.losses(ids, lm.n_layers, torch.cat([axes, -axes])[:, None])
    centred = axes - axes.mean(-1, keepdim=True) if lm.centred else axes
    size = centred.square().mean(-1, keepdim=True).sqrt() / axes.diagonal()[:, None]
    plus, minus = seen[0].chunk(2)
    return head.weight.float() @ ((plus - minus) / 2 * size).T


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
    """Everything that a dashboard shows of one feature: `row, token, value, rank, place, feature`.

    The column `row` tells what a row is:

        number       a statistic
        context      a token of a strong context with its activation; place 0 is the strongest token
        histogram    a bin of positive activations: value positions above the lower edge place
        boosted      a token whose logit the feature raises most, per unit of activation
        suppressed   a token whose logit it lowers most
        table        a token whose row of the table's start, mean removed, is closest by cosine

    `acts` are the feature's activations [P] where they are known: encoding the text is slow.
    """
    if acts is None:
        chosen = torch.tensor([feature], device=text.x.device)
        acts = activations(sae, text, chosen)[:, 0]
    direction_D = sae.W_dec[feature]
    numbers = {
        "frequency": (acts > 0).float().mean(),
        "greatest": acts.max(),
        "decoder norm": direction_D.norm(),
    }
    rows = [{"row": "number", "token": name, "value": v.item()} for name, v in numbers.items()]
    rows += context_rows(lab, text, acts, contexts, window)
    rows += histogram_rows(acts)
    effect_V = logit_directions(lab.lm) @ direction_D
    layer = tu.parse_hook(sae.cfg.hook_name, lab.lm.n_layers)
    table_VD = lab.table_start("unigram", layer)  # without massive rows
    cosine_V = torch.cosine_similarity(table_VD - table_VD.mean(0), direction_D, dim=-1)
    rows += ranking_rows(lab, "boosted", effect_V, top)
    rows += ranking_rows(lab, "suppressed", effect_V, top, largest=False)
    rows += ranking_rows(lab, "table", cosine_V, top)
    return pd.DataFrame(rows).assign(feature=feature)


def word(lab: Lab, token: int) -> str:
    """A token as text."""
    return lab.lm.tokenizer.decode([token])


def strongest_positions(text: Text, acts: Tensor, limit: int) -> list[tuple[int, int]]:
    """(Row, column) of the strongest activations [P], one per document and per wording."""
    row_column, used, chosen = text.keep.nonzero(), set(), []
    for position in acts.argsort(descending=True).tolist():
        if len(chosen) == limit or acts[position] <= 0:
            break
        row, column = row_column[position].tolist()
        document = int(text.document[position])
        wording = tuple(text.ids[row, max(0, column - 2) : column + 1].tolist())
        if document in used or wording in used:
            continue
        used |= {document, wording}
        chosen.append((row, column))
    return chosen


def context_rows(
    lab: Lab, text: Text, acts: Tensor, contexts: int, window: int
) -> list[dict[str, object]]:
    """Strong contexts, one row per token: `window` tokens before and half as many after."""
    acts_RL = torch.zeros(text.ids.shape)
    acts_RL[text.keep] = acts
    rows = []
    for rank, (row, column) in enumerate(strongest_positions(text, acts, contexts), 1):
        start = max(1, column - window)
        stop = min(text.ids.shape[1], column + window // 2 + 1)
        for i in range(start, stop):
            token = word(lab, int(text.ids[row, i]))
            activation = acts_RL[row, i].item()
            key = {"row": "context", "rank": rank, "place": i - column}
            rows.append(key | {"token": token, "value": activation})
    return rows


def histogram_rows(acts: Tensor) -> list[dict[str, object]]:
    """Counts of positive activations [P] in equal bins up to the greatest."""
    positive = acts[acts > 0].numpy()
    if not len(positive):
        return []
    count, edges = np.histogram(positive, bins=HISTOGRAM_BINS, range=(0, positive.max()))
    return [
        {"row": "histogram", "rank": i, "place": edges[i], "value": float(n)}
        for i, n in enumerate(count)
    ]


def ranking_rows(
    lab: Lab, name: str, values: Tensor, top: int, largest: bool = True
) -> list[dict[str, object]]:
    """The `top` tokens by a value for every token [V]."""
    best, tokens = values.topk(top, largest=largest)
    return [
        {"row": name, "rank": rank, "token": word(lab, int(token)), "value": value.item()}
        for rank, (token, value) in enumerate(zip(tokens, best, strict=True), 1)
    ]
