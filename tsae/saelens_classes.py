"""TSAEs in SAELens: after this import it loads, runs and saves them with their tables.

    from sae_lens import SAE
    from tsae.saelens_classes import tokens_from

    sae = SAE.load_from_disk("my_tsae")
    x_hat_BD = sae.decode(sae.encode(x_BD), tokens_B)
    with tokens_from(model, sae):  # HookedSAETransformer or SAETransformerBridge
        logits = model.run_with_saes(ids, saes=[sae], use_error_term=True)

SAELens hands an SAE no tokens: `tokens_from` reads them where the model embeds them. SAELens's
loaders read no third file: `register` puts ours in their place, which differ for TSAEs only.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import product
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download
from sae_lens import SAE, register_sae_class
from sae_lens.loading import pretrained_sae_loaders as loaders
from sae_lens.registry import get_sae_class
from sae_lens.util import str_to_dtype
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from tsae.saelens import (
    ARCHITECTURES,
    LOOKUP,
    SUBTRACTED,
    TOKENIZED,
    has_table,
    read_tensors,
)


class WithTable:
    """What a TSAE adds to a class of SAELens: W_lookup [V, D], one row per token.

    `hook_sae_recons` sees the reconstruction without the row, `hook_sae_output` with it.
    """

    tokens: Tensor | None = None  # [...] of the model's pass; `tokens_from` sets it

    def initialize_weights(self) -> None:
        super().initialize_weights()
        self.W_lookup = nn.Parameter(self.b_dec.new_empty(0, self.cfg.d_in))

    def process_state_dict_for_loading(self, state_dict: dict[str, Any]) -> None:
        """Take over the table's size. Raises ValueError where the loader brought no table."""
        super().process_state_dict_for_loading(state_dict)
        if "W_lookup" not in state_dict:
            message = "the table's tensor W_lookup is missing: load without a converter of your own"
            raise ValueError(message)
        self.W_lookup = nn.Parameter(torch.empty_like(state_dict["W_lookup"], device="meta"))

    def process_state_dict_for_saving(self, state_dict: dict[str, Any]) -> None:
        super().process_state_dict_for_saving(state_dict)
        del state_dict["W_lookup"]  # it has a file of its own

    def save_model(self, path: str | Path) -> tuple[Path, Path]:
        """Write the folder that tsae_utils.save would write."""
        written = super().save_model(path)
        save_file({"W_lookup": self.W_lookup.detach().contiguous()}, Path(path) / LOOKUP)
        return written

    def rows(self, shape: torch.Size, tokens: Tensor | None) -> Tensor:
        """The tokens' rows of the table [..., D] for activations of this shape without the last.

        Raises ValueError without tokens, for another shape and for a token without a row.
        """
        tokens = self.tokens if tokens is None else tokens
        if tokens is None:
            raise ValueError(
                "this SAE has a table and needs the tokens: call encode and decode with tokens, "
                "or run the model inside `with tokens_from(model, sae)`"
            )
        if tokens.shape != shape:
            raise ValueError(
                f"tokens have shape {list(tokens.shape)}, expected {list(shape)}: one for each row "
                "of activations"
            )
        n_rows = len(self.W_lookup)
        if len(wrong := tokens[(tokens < 0) | (tokens >= n_rows)]):
            raise ValueError(
                f"token {int(wrong[0])} has no row in a table of {n_rows} rows: "
                "it belongs to another vocabulary"
            )
        return F.embedding(tokens.to(self.W_lookup.device), self.W_lookup)

    def decode(self, feature_acts: Tensor, tokens: Tensor | None = None) -> Tensor:
        """Reconstruction [..., D] of feature activations [..., F] on tokens [...]."""
        row = self.rows(feature_acts.shape[:-1], tokens)
        return super().decode(feature_acts) + self.reshape_fn_out(row, self.d_head)


class WithSubtractedTable(WithTable):
    """The form whose encoder sees the activation without its token's row."""

    def encode(self, x: Tensor, tokens: Tensor | None = None) -> Tensor:
        """Feature activations [..., F] of activations [..., D] on tokens [...]."""
        return super().encode(x - self.rows(x.shape[:-1], tokens))


@contextmanager
def tokens_from(model: Any, *saes: SAE) -> Iterator[None]:
    """Give TSAEs of SAELens the tokens that the model embeds in each of its passes.

    Raises ValueError where a table belongs to another vocabulary.
    """
    saes, n_vocab = [sae for sae in saes if isinstance(sae, WithTable)], model.cfg.d_vocab
    if wrong := [len(sae.W_lookup) for sae in saes if len(sae.W_lookup) != n_vocab]:
        raise ValueError(
            f"the table has {wrong[0]} rows, the model {n_vocab} tokens: "
            "it belongs to another vocabulary"
        )

    def set_tokens(tokens: Tensor | None) -> None:
        for sae in saes:
            sae.tokens = tokens

    def embeds(module: nn.Module, args: tuple, kwargs: dict) -> None:
        set_tokens(args[0] if args else next(iter(kwargs.values())))

    handles = [
        # a pass that starts above the embedding must not see the tokens of the one before
        model.register_forward_pre_hook(lambda *_: set_tokens(None)),
        model.embed.register_forward_pre_hook(embeds, with_kwargs=True),
    ]
    try:
        yield
    finally:
        set_tokens(None)
        for handle in handles:
            handle.remove()


def add_table_(layout: dict, weights: dict[str, Tensor], file: str | Path) -> None:
    """Add a TSAE's W_lookup to its weights; old folders have an architecture without the prefix."""
    if layout["architecture"] in ARCHITECTURES.values():
        layout["architecture"] = TOKENIZED + layout["architecture"]
    table = read_tensors(Path(file), {"W_lookup": (None, layout["d_in"])})["W_lookup"]
    weights["W_lookup"] = table.to(layout["device"], str_to_dtype(layout["dtype"]))


def disk_loader(path: str | Path, device: str = "cpu", cfg_overrides: dict | None = None) -> tuple:
    """(cfg.json, weights) of a folder, the table included."""
    layout, weights = loaders.sae_lens_disk_loader(path, device, cfg_overrides)
    file = Path(path) / LOOKUP
    if has_table(layout, file.exists()):
        add_table_(layout, weights, file)
    return layout, weights


def hub_loader(
    repo_id: str,
    folder_name: str,
    device: str = "cpu",
    force_download: bool = False,
    cfg_overrides: dict | None = None,
) -> tuple:
    """(cfg.json, weights, sparsity) of a folder in a hub repository, the table included."""
    origin = (repo_id, folder_name, device, force_download, cfg_overrides)
    layout, weights, sparsity = loaders.sae_lens_huggingface_loader(*origin)
    if has_table(layout, False):
        file = f"{folder_name}/{LOOKUP}"
        add_table_(layout, weights, hf_hub_download(repo_id, file, force_download=force_download))
    return layout, weights, sparsity


def register() -> None:
    """Let SAELens know a class with a table beside each of its own that tsae_utils.save names."""
    forms = {TOKENIZED: WithTable, SUBTRACTED: WithSubtractedTable}
    for plain, prefix in product(sorted(set(ARCHITECTURES.values())), forms):
        sae_class, config_class = get_sae_class(plain)
        name = prefix + plain
        title = prefix[:-1].title()
        named = {"architecture": classmethod(lambda cls, name=name: name)}
        config = type(f"{title}{config_class.__name__}", (config_class,), named)
        sae = type(f"{title}{sae_class.__name__}", (forms[prefix], sae_class), {})
        register_sae_class(name, sae, config)
    loaders.NAMED_PRETRAINED_SAE_LOADERS["sae_lens"] = hub_loader
    load, theirs = SAE.load_from_disk.__func__, loaders.sae_lens_disk_loader
    load.__defaults__ = tuple(disk_loader if d is theirs else d for d in load.__defaults__)


register()
