"""Run a TransformerLens model on the reconstruction of its activations.

    with attach(model, tsae) as seen:  # any call of the model now uses the reconstruction
        logits = model("The cat sat on the mat")
    with attach(model, tsae, edit=steer(123, 8.0), error_term=True):
        text = model.generate("I think that", max_new_tokens=20)

Anything that encodes and decodes as a TSAE does can be attached (`Coder`).
Axes: R rows, L sequence, D d_in, B tokens that are patched, N n-gram order, F d_sae.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import wraps
from typing import Any, Protocol
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tsae.blocks import removed_afterwards
from tsae.language_model import PLACES, real_tokens

Edit = Callable[[Tensor], Tensor]  # feature activations [B, F] to feature activations
Change = Callable[[Tensor], Tensor]
Shown = dict[str, Tensor]  # by hook point


class Coder(Protocol):
    """What an attached SAE needs; `cfg` has d_in and hook_name."""

    cfg: Any
    lookup: Any  # None, or a table with check_vocabulary(n)

    def encode(self, x_BD: Tensor) -> Tensor: ...

    def decode(self, acts_BF: Tensor, tokens_BN: Tensor) -> Tensor: ...


@dataclass
class Seen:
    """What an attached SAE saw in the model's last pass."""

    tokens: Tensor | None = None  # [R, L]
    acts: Tensor | None = None  # [R, L, F], after the edit; zero where the model was left alone


# -- edits --


def require_features(acts_BF: Tensor, *features: int) -> None:
    """Raise ValueError for a feature that the SAE does not have."""
    n = acts_BF.shape[-1]
    for feature in features:
        if not 0 <= feature < n:
            raise ValueError(f"there is no feature {feature}: the SAE has {n}, numbered from 0")


def ablate(*features: int) -> Edit:
    """An edit that switches features off. It raises ValueError for a feature that is not there."""

    def edit(acts_BF: Tensor) -> Tensor:
        require_features(acts_BF, *features)
        index = torch.tensor(features, device=acts_BF.device)
        return acts_BF.index_fill(-1, index, 0.0)

    return edit


def steer(feature: int, by: float) -> Edit:
    """An edit that adds `by` to a feature's activation at every token.

    It raises ValueError for a feature that is not there.
    """

    def edit(acts_BF: Tensor) -> Tensor:
        require_features(acts_BF, feature)
        index = torch.tensor(feature, device=acts_BF.device)
        return acts_BF + by * nn.functional.one_hot(index, acts_BF.shape[-1])

    return edit


# -- the pass: what the model was given --


@dataclass
class Pass:
    """What the model reads in its present pass. Between passes there are no tokens."""

    tokens: Tensor | None = None  # [R, L]
    mask: Tensor | None = None  # [R, cached + L], 0 at padding; None where the model has none
    has_begun: bool = False  # whether the cache holds text


def holds_text(cache: Any) -> bool:
    """Whether a cache of transformers holds earlier tokens."""
    if cache is None:
        return False
    try:
        return int(cache.get_seq_length()) > 0
    except ValueError:  # a state-space model does not count them
        return cache.has_previous_state()


@contextmanager
def read_bridge(model: Any) -> Iterator[Pass]:
    """The passes of a TransformerBridge: its inner model is called with ids, mask and cache."""
    now = Pass()

    def begin(module: nn.Module, args: tuple, kwargs: dict) -> None:
        mask = kwargs.get("attention_mask")
        now.tokens = args[0] if args else kwargs.get("input_ids")
        now.mask = mask if isinstance(mask, Tensor) and mask.ndim == 2 else None
        now.has_begun = holds_text(kwargs.get("past_key_values") or kwargs.get("cache_params"))

    def end(*_: Any) -> None:
        now.tokens = None

    inner = model.original_model
    before = inner.register_forward_pre_hook(begin, with_kwargs=True)
    after = inner.register_forward_hook(end, always_call=True)
    with removed_afterwards([before, after]):
        yield now


@contextmanager
def read_hooked_transformer(model: Any) -> Iterator[Pass]:
    """The passes of a HookedTransformer: its embedding sees the ids, its blocks mask and cache.

    `generate` embeds outside of passes: the prompt first, then token by token what it sampled.
    """
    now, text, is_read = Pass(), None, True
    hidden = {name: vars(model).get(name) for name in ("forward", "generate")}

    def embed(module: nn.Module, args: tuple) -> None:
        nonlocal text, is_read
        is_continued = text is not None and args[0].shape == (len(text), 1)
        text = torch.cat([text, args[0]], 1) if is_continued else args[0]
        is_read = False

    def begin(block: nn.Module, args: tuple, kwargs: dict) -> None:
        nonlocal is_read
        now.tokens = None if is_read else text[:, -args[0].shape[1] :]
        now.mask, cache = kwargs["attention_mask"], kwargs["past_kv_cache_entry"]
        now.has_begun = cache is not None and cache.past_keys.shape[1] > 0
        is_read = True

    def forgetting(call: Callable) -> Callable:
        @wraps(call)
        def run(*args: Any, **kwargs: Any) -> Any:
            nonlocal is_read
            try:
                return call(*args, **kwargs)
            finally:
                now.tokens, is_read = None, True

        return run

    for name in hidden:  # generate calls model.forward, which hooks of the module do not see
        setattr(model, name, forgetting(getattr(model, name)))
    handles = [
        model.embed.register_forward_pre_hook(embed),
        model.blocks[0].register_forward_pre_hook(begin, with_kwargs=True),
    ]
    try:
        with removed_afterwards(handles):
            yield now
    finally:
        for name, before in hidden.items():
            delattr(model, name)  # an attribute of the instance hides the method
            if before is not None:
                setattr(model, name, before)


def passes(model: Any) -> Any:
    """A context that keeps a `Pass` up to date, for either class of model."""
    read = read_bridge if hasattr(model, "original_model") else read_hooked_transformer
    return read(model)


def token_id(tokenizer: Any, name: str) -> int | None:
    """Id of BOS, EOS or padding (bos, eos, pad); None where there is none.

    Where there is no EOS, TransformerLens names one that may only be known as an unknown word.
    """
    found = getattr(tokenizer, f"{name}_token_id", None)
    if found is None:
        return None
    token = getattr(tokenizer, f"{name}_token")
    return found if tokenizer.convert_ids_to_tokens(found) == token else None


def patched_positions(now: Pass, tokenizer: Any) -> Tensor:
    """Where an SAE belongs [R, L]: as in training, not at padding, first and special tokens.

    Padding is where the model's mask says so, else leading and trailing runs (`real_tokens`).
    """
    ids, begins = now.tokens, not now.has_begun
    bos, eos, pad = (token_id(tokenizer, name) for name in ("bos", "eos", "pad"))
    special = [i for i in (bos, eos) if i is not None] or [0]
    if now.mask is not None:
        mask = now.mask.to(ids.device) != 0
        is_real, earlier = mask[:, -ids.shape[1] :], mask[:, : -ids.shape[1]]
        begins = ~earlier.any(-1, keepdim=True) if earlier.numel() else begins
    else:  # a column of text stands for the cache
        row = F.pad(ids, (1, 0), value=-1) if now.has_begun else ids
        is_real = real_tokens(row, pad, special[0], special[-1])[:, -ids.shape[1] :]
    is_first = is_real & (is_real.cumsum(-1) == 1) & begins
    return is_real & ~is_first & ~torch.isin(ids, torch.tensor(special).to(ids))


# -- the hook point: what the model shows there --

PROBE_ROWS = 2
FACTS: WeakKeyDictionary[Any, dict] = WeakKeyDictionary()  # what was found out about each model


def remembered(model: Any, key: Any, find: Callable[[], Any]) -> Any:
    """What `find` says about a model, asked once."""
    facts = FACTS.setdefault(model, {})
    if key not in facts:
        facts[key] = find()
    return facts[key]


def probe_ids(model: Any) -> Tensor:
    """A few rows of ordinary tokens, of a length that is not the number of heads."""
    length = 8 if getattr(model.cfg, "n_heads", None) == 7 else 7
    special = set(getattr(model.tokenizer, "all_special_ids", ()))
    ordinary = [i for i in range(min(model.cfg.d_vocab, 1000)) if i not in special] or [0]
    generator = torch.Generator().manual_seed(0)
    chosen = torch.randint(len(ordinary), (PROBE_ROWS, length), generator=generator)
    return torch.tensor(ordinary)[chosen].to(next(model.parameters()).device)


def probe(model: Any, names: Iterable[str], changes: dict[str, Change] | None = None) -> Shown:
    """What hook points show in a tiny pass, and its "logits"; those not reached are left out.

    The pass is one of evaluation and without gradients, and hooks of others do not see it.
    """
    shown: Shown = {}

    def reader(name: str) -> Callable:
        return lambda raw, hook: shown.__setitem__(name, raw.clone())

    def changer(change: Change) -> Callable:
        return lambda raw, hook: change(raw)

    hooks = [(name, changer(change)) for name, change in (changes or {}).items()]
    hooks += [(name, reader(name)) for name in names if name in model.hook_dict]
    ids = probe_ids(model)
    tables = [point._forward_hooks for point in set(model.hook_dict.values())]
    others = [dict(table) for table in tables]
    parts = {*model.modules(), *getattr(model, "original_model", model).modules()}
    training = [module for module in parts if module.training]
    try:
        for table in tables:
            table.clear()
        for module in training:
            module.training = False
        autocast = torch.autocast(ids.device.type, enabled=False)
        with torch.no_grad(), autocast, model.hooks(fwd_hooks=hooks):
            return {"logits": model(ids, return_type="logits"), **shown}
    finally:
        for table, hidden in zip(tables, others, strict=True):
            table.update(hidden)
        for module in training:
            module.training = True


def differ(a: Tensor, b: Tensor, rounding: float | Tensor = 0.0) -> bool:
    """Whether two tensors differ by more than rounding in their type."""
    tolerance = torch.finfo(a.dtype).eps ** 0.5 * b.float().abs().max() + rounding
    return not (a.float() - b.float()).abs().max() <= tolerance


def ignores_the_mean(model: Any) -> bool:
    """Whether nothing in the model sees the stream's mean over its width, as with LayerNorm.

    As in `LanguageModel`: a constant that is added before the first block must arrive behind the
    last one and leave the logits as they are.
    """

    def add(raw: Tensor) -> Tensor:
        added = torch.rand(raw.shape[:2], generator=torch.Generator().manual_seed(1))
        return raw + raw.std(-1, keepdim=True) * (1 + added[..., None].to(raw))

    first, last = "blocks.0.hook_resid_pre", f"blocks.{len(model.blocks) - 1}.hook_resid_"
    names = (first, f"{last}pre", f"{last}post")
    clean, moved = probe(model, names), probe(model, names, {first: add})
    end = next(name for name in reversed(names) if name in clean)
    shift, arrived = (moved[name].float() - clean[name].float() for name in (first, end))
    # some streams grow large behind the first block, and their sums are rounded accordingly
    rounding = 16 * torch.finfo(clean[end].dtype).eps * clean[end].float().abs().max()
    is_carried = not differ(arrived, shift, rounding)
    return is_carried and not differ(moved["logits"], clean["logits"])


def passes_by(model: Any, layer: int) -> bool:
    """Whether a block's stream passes by hook_resid_mid: what hooks return is only read there.

    So it is in a TransformerBridge, where the MLP reads it and is added to the stream as it was.
    Raises ValueError where the block does not add the MLP's result to the stream.
    """
    names = [f"blocks.{layer}.hook_{place}" for place in ("resid_mid", "mlp_out", "resid_post")]
    mid, mlp, post = names
    clean = probe(model, names)
    if not set(names) <= clean.keys() or differ(clean[mid] + clean[mlp], clean[post]):
        raise ValueError(
            f"{mid} is not the stream that this model's block adds its MLP's result to: "
            "use hook_resid_pre or hook_resid_post"
        )
    shift = clean[mid].flip(1)
    changes = {mid: lambda raw: raw + shift, mlp: lambda raw: clean[mlp]}
    return differ(probe(model, names, changes)[post], clean[post] + shift)


def place_of(model: Any, hook_name: str) -> tuple[int, str] | None:
    """(Block, place) of a hook point on the stream or of what is added to it, under any name."""
    points = model.hook_dict
    for layer in range(len(model.blocks)):
        for place in (*PLACES, "resid_post"):
            if points.get(f"blocks.{layer}.hook_{place}") is points[hook_name]:
                return layer, place
    return None


def require_shape(shape: torch.Size, rows: torch.Size, d_in: int, hook_name: str) -> None:
    """Raise ValueError where a hook point does not show a vector of d_in for each token [R, L]."""
    if len(shape) < 3 or shape[:2] != rows:
        raise ValueError(
            f"{hook_name} shows a tensor of shape {list(shape)} for {rows[0]} rows of {rows[1]} "
            "tokens, not [rows, tokens, width]: choose a hook point with a vector for each token"
        )
    width = shape[2:].numel()
    if width != d_in:
        raise ValueError(
            f"the width at {hook_name} is {width}, the SAE has d_in {d_in}: "
            "it belongs to another hook point or model"
        )


def require_fit(model: Any, sae: Coder, hook_name: str) -> None:
    """Raise ValueError where hook point, width or vocabulary do not belong to the model."""
    if hook_name not in model.hook_dict:
        raise ValueError(
            f"the model has no hook point {hook_name!r}: "
            "give hook_name, such as blocks.4.hook_resid_pre"
        )
    if not hasattr(model, "blocks"):
        raise ValueError(
            f"{type(model).__name__} of {model.cfg.model_name} has no single stack of blocks: "
            "an SAE can only be attached to a causal language model"
        )
    if sae.lookup is not None:
        sae.lookup.check_vocabulary(model.cfg.d_vocab)
    d_in = sae.cfg.d_in
    remembered(model, (hook_name, d_in), lambda: require_width(model, d_in, hook_name))


def require_width(model: Any, d_in: int, hook_name: str) -> None:
    """Raise ValueError where a tiny pass shows no vector of d_in for each token."""
    shown = probe(model, [hook_name])
    if hook_name not in shown:
        raise ValueError(
            f"the model does not come by {hook_name} when it reads tokens: "
            "choose another hook point"
        )
    require_shape(shown[hook_name].shape, probe_ids(model).shape, d_in, hook_name)


# -- attaching --


def reconstruct(
    sae: Coder, x_BD: Tensor, tokens_BN: Tensor, edit: Edit | None, error_term: bool
) -> tuple[Tensor, Tensor]:
    """(Reconstruction [B, D], features after the edit [B, F]), computed where the SAE is."""
    weight = next(sae.parameters(), x_BD) if isinstance(sae, nn.Module) else x_BD
    x, tokens = x_BD.to(weight), tokens_BN.to(weight.device)
    with torch.autocast(x_BD.device.type, enabled=False):
        subtracts = getattr(sae.cfg, "subtract_lookup", False)
        before = sae.encode(x, tokens) if subtracts else sae.encode(x)
        acts = before if edit is None else edit(before)
        x_hat = sae.decode(acts, tokens)
        if error_term:
            x_hat = x_hat + (x - sae.decode(before, tokens))
    return x_hat.to(x_BD.device), acts.to(x_BD.device)


@contextmanager
def carrying(model: Any, place: tuple[int, str] | None) -> Iterator[list[Tensor] | None]:
    """A list for the change of a stream that passes by, which the block's end adds; else None."""
    layer, name = place or (0, "")
    if name != "resid_mid" or not remembered(model, place, lambda: passes_by(model, layer)):
        yield None
        return
    change: list[Tensor] = []

    def add(point: nn.Module, args: tuple, raw: Tensor) -> Tensor:
        return raw + change.pop() if change else raw

    end = model.hook_dict[f"blocks.{layer}.hook_resid_post"]
    with removed_afterwards([end.register_forward_hook(add, prepend=True)]):
        yield change


@contextmanager
def attach(
    model: Any,
    sae: Coder,
    edit: Edit | None = None,
    error_term: bool = False,
    hook_name: str = "",
) -> Iterator[Seen]:
    """Let a model (TransformerBridge or HookedTransformer) run on the SAE's reconstruction.

    The table takes its tokens from the model's own call, so strings, ids, padding, caches and
    generation all work. `edit` changes features before they are decoded. With `error_term` the
    SAE's error is added back, so that the edit is all that changes. Gradients flow through.

    As in training, padding, the first token of a text, special tokens and massive activations
    (longer than cfg.max_norm, where it is not 0) are left alone. Where nothing in the model sees
    the mean of the residual stream over its width, as with LayerNorm, the stream and what is added
    to it are centred, and their mean is put back.

    Raises ValueError where the model has no such hook point, or another width or vocabulary, and
    for a pass that does not start from token ids (inputs_embeds), as the table needs them.
    """
    hook_name = hook_name or sae.cfg.hook_name
    require_fit(model, sae, hook_name)
    place, seen = place_of(model, hook_name), Seen()
    centred = place is not None and remembered(model, "centred", lambda: ignores_the_mean(model))
    max_norm = getattr(sae.cfg, "max_norm", 0.0)

    def replace(raw: Tensor, hook: Any) -> Tensor:
        if now.tokens is None:
            raise ValueError(
                f"the model came to {hook_name} without embedding tokens: an attached SAE needs "
                "their ids, so call the model with text or ids and attach inside its blocks"
            )
        require_shape(raw.shape, now.tokens.shape, sae.cfg.d_in, hook_name)
        keep = patched_positions(now, model.tokenizer).to(raw.device)
        seen.tokens = now.tokens.to(raw.device)
        flat = raw.flatten(2)
        if max_norm:
            x = flat.detach().float()
            keep &= (x - x.mean(-1, keepdim=True) * centred).norm(dim=-1) <= max_norm
        x_BD, tokens_BN = flat[keep].float(), seen.tokens[keep].unsqueeze(-1)
        mean = x_BD.mean(-1, keepdim=True) if centred else 0.0
        x_hat, acts = reconstruct(sae, x_BD - mean, tokens_BN, edit, error_term)
        seen.acts = acts.new_zeros(*keep.shape, acts.shape[-1]).index_put((keep,), acts)
        new = flat.index_put((keep,), (x_hat + mean).to(raw.dtype)).view(raw.shape)
        if change is not None:
            change[:] = [new - raw]
        return new

    hooks = [(hook_name, replace)]
    with passes(model) as now, carrying(model, place) as change, model.hooks(fwd_hooks=hooks):
        yield seen
