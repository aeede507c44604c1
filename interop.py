"""At home elsewhere: TSAEs on TransformerLens models, published SAEs, the hub.

    with attach(model, tsae) as seen:            # any call of the model now runs on the reconstruction
        logits = model("The cat sat on the mat")
    with attach(model, tsae, edit=steer(123, 8.0), error_term=True):
        text = model.generate("I think that", max_new_tokens=20, use_past_kv_cache=False)
    sae = check_fit(tu.load("blocks.8.hook_resid_pre"), lm, rows)  # RES-JB, refused where it reconstructs garbage
    push_to_hub(tsae, "me/my-tsae"); from_pretrained("me/my-tsae")

Folders of SAELens, before version 6 too, are read by tsae_utils.load and written by tsae_utils.save.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import tsae_utils as tu

Edit = Callable[[Tensor], Tensor]  # feature activations [B, F] to feature activations


@dataclass
class Seen:
    """What an attached SAE saw in the model's last pass."""

    tokens: Tensor | None = None  # [R, L]
    acts: Tensor | None = None  # [R, L, F], after the edit; zero where the stream was left alone


def _check(acts_BF: Tensor, *features: int) -> None:
    for feature in features:
        if not 0 <= feature < acts_BF.shape[-1]:
            raise ValueError(f"there is no feature {feature}: the SAE has {acts_BF.shape[-1]}, from 0 on")


def ablate(*features: int) -> Edit:
    """An edit that switches features off, [B, F] to [B, F]. Its call raises ValueError for a feature that is not there."""

    def edit(acts_BF: Tensor) -> Tensor:
        _check(acts_BF, *features)
        return acts_BF.index_fill(-1, torch.tensor(features, device=acts_BF.device), 0.0)

    return edit


def steer(feature: int, by: float) -> Edit:
    """An edit that adds `by` to a feature's activation at every token, [B, F] to [B, F]. Its call raises ValueError for a
    feature that is not there."""

    def edit(acts_BF: Tensor) -> Tensor:
        _check(acts_BF, feature)
        return acts_BF + by * nn.functional.one_hot(torch.tensor(feature, device=acts_BF.device), acts_BF.shape[-1])

    return edit


@contextmanager
def attach(model: Any, sae: tu.TSAE, edit: Edit | None = None, error_term: bool = False, hook_name: str = "") -> Iterator[Seen]:
    """Run a TransformerLens model (TransformerBridge or HookedTransformer) on the reconstruction of its residual stream.

    The table gets its tokens from the model's own embedding, so strings, ids and generation all work. `edit` changes the
    features before they are decoded; with `error_term` what the SAE misses is put back, so that the edit is all that
    changes. As in training, the first position of a text and the tokenizer's BOS and EOS (token 0 where it has neither) are
    left alone, and the stream is centred over d_model for models with LayerNorm; its mean, which no LayerNorm sees, is
    put back. Gradients flow through.

    Raises ValueError where the model has no such hook point, or another width or vocabulary, and where a pass of the
    model does not embed tokens (inputs_embeds), as the table needs them.
    """
    hook_name = hook_name or sae.cfg.hook_name
    if hook_name not in model.hook_dict:
        raise ValueError(f"the model has no hook point {hook_name!r}: give hook_name, such as blocks.4.hook_resid_pre")
    if model.cfg.d_model != sae.cfg.d_in:
        raise ValueError(f"the model's d_model is {model.cfg.d_model}, the SAE's d_in {sae.cfg.d_in}: it belongs to another model")
    if sae.lookup is not None:
        sae.lookup.check_vocabulary(model.cfg.d_vocab)
    centred, seen, embedded = str(model.cfg.normalization_type).startswith("LN"), Seen(), []
    special = [i for i in (getattr(model.tokenizer, "bos_token_id", None), getattr(model.tokenizer, "eos_token_id", None)) if i is not None]

    def read_tokens(module: nn.Module, args: tuple, kwargs: dict) -> None:
        embedded.append(args[0] if args else next(iter(kwargs.values())))

    def replace(raw_RLD: Tensor, hook: Any) -> Tensor:
        if not embedded:
            raise ValueError("the model was run without embedding tokens: an attached SAE needs their ids")
        x = raw_RLD.float()
        seen.tokens = embedded.pop().expand(x.shape[:2])
        mean = x.mean(-1, keepdim=True) if centred else torch.zeros_like(x[..., :1])
        keep = ~torch.isin(seen.tokens, torch.tensor(special or [0], device=x.device, dtype=seen.tokens.dtype))
        if x.shape[1] > 1:  # a single position is a later one of a text that is being generated
            keep[:, 0] = False
        x_BD, tokens_BN = (x - mean)[keep], seen.tokens[keep].unsqueeze(-1)
        before = sae.encode(x_BD)
        acts = before if edit is None else edit(before)
        x_hat = sae.decode(acts, tokens_BN) + (x_BD - sae.decode(before, tokens_BN) if error_term else 0.0)
        seen.acts = torch.zeros(*x.shape[:2], sae.cfg.d_sae, device=x.device).index_put((keep,), acts)
        return raw_RLD.index_put((keep,), (x_hat + mean[keep]).to(raw_RLD.dtype))

    handle = model.embed.register_forward_pre_hook(read_tokens, with_kwargs=True)
    try:
        with model.hooks(fwd_hooks=[(hook_name, replace)]):
            yield seen
    finally:
        handle.remove()


def check_fit(sae: tu.TSAE, lm: tu.LanguageModel, rows_RL: Tensor, max_fvu: float = 0.5) -> tu.TSAE:
    """The SAE itself, on the model's device, if it fits the model. Raises ValueError where its FVU on the rows is above `max_fvu`.

    A published SAE on another model, layer or form of the stream (RES-JB wants the centred one) gives no error of its
    own, only garbage.
    """
    layer = tu.parse_hook(sae.cfg.hook_name, lm.n_layers)
    if sae.cfg.d_in != lm.d_model:
        raise ValueError(f"the SAE's d_in is {sae.cfg.d_in}, the model's width {lm.d_model}: it belongs to another model")
    if sae.lookup is not None:
        sae.lookup.check_vocabulary(lm.n_vocab)
    x, x_hat, sae = [], [], sae.to(lm.device)
    for ids in rows_RL.long().split(8):
        keep = tu.keep_mask(ids, lm)
        x.append(lm.activations(ids, [layer], bf16=False)[layer][keep.to(lm.device)])
        with torch.no_grad():
            x_hat.append(sae(x[-1], ids[keep].unsqueeze(-1).to(lm.device)).x_hat)
    fvu = tu.reconstruction_error(torch.cat(x), torch.cat(x_hat)).fvu
    if not fvu <= max_fvu:
        raise ValueError(f"FVU {fvu:.2f} at {sae.cfg.hook_name} of {lm.name} is above {max_fvu}: the SAE was trained on another model, "
                         "layer or form of the residual stream")
    return sae


def from_pretrained(name_or_folder: str | Path, subfolder: str = "", revision: str | None = None) -> tu.TSAE:
    """Load an SAE from a local folder or from a hub repository in SAELens layout, through the Hugging Face cache.

    RES-JB: from_pretrained("jbloom/GPT2-Small-SAEs-Reformatted", "blocks.8.hook_resid_pre"). Raises FileNotFoundError
    where neither is there, ValueError for a damaged one.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, HTTPError

    local = Path(name_or_folder).expanduser()
    if local.is_dir():
        return tu.load(local / subfolder)
    wanted = [f"{subfolder}/{f}" if subfolder else f for f in tu.FILES]
    try:
        folder = Path(snapshot_download(str(name_or_folder), revision=revision, allow_patterns=wanted))
    except (OSError, HTTPError, HFValidationError) as error:
        raise FileNotFoundError(f"{name_or_folder}: no such folder, and the hub did not give {', '.join(wanted)}: check name and network, "
                                f"or give a local copy ({type(error).__name__})") from error
    return tu.load(folder / subfolder)


def model_card(sae: tu.TSAE, folder: str | Path = "", license: str = "") -> str:
    """README of a hub repository: what the SAE is and how to load it; `folder`, a saved one, adds its held-out numbers."""
    c, table = sae.cfg, "with" if sae.lookup is not None else "without"
    facts = {"model": c.model_name, "hook point": c.hook_name, "context": c.context_size, "d_in": c.d_in, "d_sae": c.d_sae,
             "activation": c.activation, "k": c.k if "topk" in c.activation else "",
             "lookup table": "none" if sae.lookup is None else f"{len(sae.lookup.W):,} tokens"}
    if folder:
        heldout = tu.read_cfg(folder)["metadata"].get("tokenized", {}).get("heldout", {})
        facts |= {f"held-out {k}": f"{v:.4g}" for k, v in heldout.items()}
    rows = "".join(f"| {k} | {v} |\n" for k, v in facts.items() if v != "")
    return (
        f"---\n{license and f'license: {license}'}\nlibrary_name: sae_lens\ntags: [sparse-autoencoder, interpretability]\n---\n"
        f"# {'Tokenized sparse' if table == 'with' else 'Sparse'} autoencoder\n\n"
        f"Trained {table} a per-token lookup table ([Dooms and Wilhelm, 2025](https://arxiv.org/abs/2502.17332)).\n\n"
        f"| | |\n|---|---|\n{rows}\n"
        "```python\nfrom interop import from_pretrained\nsae = from_pretrained(\"this repository\")\n```\n"
        + ("SAELens loads the folder too; the table lies in `token_lookup.safetensors` and is to be added to what it reconstructs.\n"
           if table == "with" else "SAELens loads the folder too.\n"))


def push_to_hub(sae: tu.TSAE, repo_id: str, private: bool = True, metadata: dict | None = None, revision: str | None = None,
                license: str = "") -> str:
    """Upload an SAE and its model card; returns the address. Your own token must be set (`hf auth login`).

    `metadata` must be JSON; its "heldout" shows on the card. Raises huggingface_hub's errors (OSError) where the hub refuses.
    """
    from huggingface_hub import HfApi

    with tempfile.TemporaryDirectory() as temporary:
        folder = tu.save(sae, Path(temporary) / "sae", json.loads(json.dumps(metadata or {})))
        (folder / "README.md").write_text(model_card(sae, folder, license))
        api = HfApi()
        api.create_repo(repo_id, private=private, exist_ok=True)
        return str(api.upload_folder(repo_id=repo_id, folder_path=folder, revision=revision, commit_message="Add SAE"))


tu.from_pretrained, tu.check_fit, tu.push_to_hub = from_pretrained, check_fit, push_to_hub
