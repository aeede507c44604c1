"""Run a TransformerLens model on the reconstruction of its residual stream.

    with attach(model, tsae) as seen:  # any call of the model now uses the reconstruction
        logits = model("The cat sat on the mat")
    with attach(model, tsae, edit=steer(123, 8.0), error_term=True):
        text = model.generate("I think that", max_new_tokens=20, use_past_kv_cache=False)

Anything that encodes and decodes as a TSAE does can be attached (`Coder`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

Edit = Callable[[Tensor], Tensor]  # feature activations [B, F] to feature activations


class Coder(Protocol):
    """What an attached SAE needs; `cfg` has d_in, d_sae and hook_name."""

    cfg: Any
    lookup: Any  # None, or a table with check_vocabulary(n)

    def encode(self, x_BD: Tensor) -> Tensor: ...

    def decode(self, acts_BF: Tensor, tokens_BN: Tensor) -> Tensor: ...


@dataclass
class Seen:
    """What an attached SAE saw in the model's last pass."""

    tokens: Tensor | None = None  # [R, L]
    acts: Tensor | None = None  # [R, L, F], after the edit; zero where the stream was left alone


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


def require_fit(model: Any, sae: Coder, hook_name: str) -> None:
    """Raise ValueError where hook point, width or vocabulary do not belong to the model."""
    if hook_name not in model.hook_dict:
        raise ValueError(
            f"the model has no hook point {hook_name!r}: "
            "give hook_name, such as blocks.4.hook_resid_pre"
        )
    if model.cfg.d_model != sae.cfg.d_in:
        raise ValueError(
            f"the model's d_model is {model.cfg.d_model}, the SAE's d_in {sae.cfg.d_in}: "
            "it belongs to another model"
        )
    if sae.lookup is not None:
        sae.lookup.check_vocabulary(model.cfg.d_vocab)


def special_ids(tokenizer: Any) -> list[int]:
    """BOS and EOS of a tokenizer; token 0 where it has neither."""
    ids = [getattr(tokenizer, f"{name}_token_id", None) for name in ("bos", "eos")]
    return [i for i in ids if i is not None] or [0]


@contextmanager
def attach(
    model: Any,
    sae: Coder,
    edit: Edit | None = None,
    error_term: bool = False,
    hook_name: str = "",
) -> Iterator[Seen]:
    """Let a model (TransformerBridge or HookedTransformer) run on the SAE's reconstruction.

    The table takes its tokens from the model's own embedding, so strings, ids and generation all
    work. `edit` changes features before they are decoded. With `error_term` the SAE's error is
    added back, so that the edit is all that changes. Gradients flow through.

    As in training, the first position of a text and special tokens are left alone. For models with
    LayerNorm the stream is centred over d_model, and its mean is put back.

    Raises ValueError where the model has no such hook point, or another width or vocabulary, and
    where a pass does not embed tokens (inputs_embeds), as the table needs them.
    """
    hook_name = hook_name or sae.cfg.hook_name
    require_fit(model, sae, hook_name)
    is_centred = str(model.cfg.normalization_type).startswith("LN")
    special = special_ids(model.tokenizer)
    seen, embedded = Seen(), []

    def read_tokens(module: nn.Module, args: tuple, kwargs: dict) -> None:
        embedded.append(args[0] if args else next(iter(kwargs.values())))

    def replace(raw_RLD: Tensor, hook: Any) -> Tensor:
        if not embedded:
            raise ValueError(
                "the model was run without embedding tokens: an attached SAE needs their ids"
            )
        x = raw_RLD.float()
        seen.tokens = embedded.pop().expand(x.shape[:2])
        mean = x.mean(-1, keepdim=True) if is_centred else torch.zeros_like(x[..., :1])
        keep = ~torch.isin(seen.tokens, torch.tensor(special).to(seen.tokens))
        if x.shape[1] > 1:  # a single position is a later one of a text being generated
            keep[:, 0] = False
        x_BD, tokens_BN = (x - mean)[keep], seen.tokens[keep].unsqueeze(-1)
        before = sae.encode(x_BD)
        acts = before if edit is None else edit(before)
        x_hat = sae.decode(acts, tokens_BN)
        if error_term:
            x_hat = x_hat + (x_BD - sae.decode(before, tokens_BN))
        blank = torch.zeros(*x.shape[:2], sae.cfg.d_sae, device=x.device)
        seen.acts = blank.index_put((keep,), acts)
        return raw_RLD.index_put((keep,), (x_hat + mean[keep]).to(raw_RLD.dtype))

    handle = model.embed.register_forward_pre_hook(read_tokens, with_kwargs=True)
    try:
        with model.hooks(fwd_hooks=[(hook_name, replace)]):
            yield seen
    finally:
        handle.remove()
