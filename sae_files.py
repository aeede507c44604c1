"""Files of saved SAEs, in SAELens's layout: what `tsae_utils.save` and `load` need to know of it.

`read_cfg` and `read_tensors` check what they read and say in one sentence what is wrong; `fold` brings SAELens's variants, before
version 6 too, to the one form of tsae_utils.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

FILES = ("cfg.json", "sae_weights.safetensors", "token_lookup.safetensors")
ARCHITECTURES = {"topk": "topk", "relu": "standard", "gated": "gated", "batchtopk": "jumprelu", "jumprelu": "jumprelu"}  # SAELens's


def names_of(architecture: str) -> tuple[str, ...]:
    """All that a SAELens file of this architecture may hold; the table has a file of its own."""
    own = {"gated": ("b_gate", "b_mag", "r_mag"), "jumprelu": ("b_enc", "threshold")}.get(architecture, ("b_enc",))
    return "W_enc", "W_dec", "b_dec", *own


def refuse_other_files(folder: str | Path) -> Path:
    """The folder itself. Raises FileExistsError where it exists and holds anything but a saved SAE."""
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or {f.name for f in folder.iterdir()} - set(FILES)):
        raise FileExistsError(f"{folder} exists and holds other files: choose a folder of its own for the SAE")
    return folder


def read_tensors(path: Path, shapes: Mapping[str, tuple]) -> dict[str, Tensor]:
    """Tensors of a file in fp32, names and shapes as expected (None: any size). Raises FileNotFoundError or ValueError."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: expected a folder written by tsae_utils.save or in SAELens layout")
    try:
        tensors = load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged or not a safetensors file ({error}): fetch or train it again") from error
    for name, shape in shapes.items():
        found = list(tensors[name].shape) if name in tensors else "nothing"
        if found == "nothing" or len(found) != len(shape) or any(want not in (None, has) for want, has in zip(shape, found, strict=True)):
            raise ValueError(f"{path}: {name} should be {list(shape)}, found {found}")
        if not tensors[name].is_floating_point() or not torch.isfinite(tensors[name].float()).all():
            raise ValueError(f"{path}: {name} should hold finite numbers, but is {tensors[name].dtype} with NaN, infinity or no fraction: "
                             "fetch or train it again")
    return {name: tensors[name].float() for name in shapes}


def _modern(cfg: dict) -> dict:
    """A flat cfg.json of SAELens before version 6 (RES-JB: no architecture, hook_point) in the present keys."""
    if "metadata" in cfg or not {"hook_point", "hook_name"} & set(cfg):
        return cfg
    meta = {new: cfg[old] for old, new in (("model_name", "model_name"), ("hook_point", "hook_name"), ("hook_name", "hook_name"),
                                           ("context_size", "context_size")) if old in cfg}
    act = cfg.get("activation_fn_str") or cfg.get("activation_fn") or "relu"
    if act not in ("relu", "topk"):
        raise ValueError(f"activation {act!r} of an old SAELens file is not supported: expected relu or topk")
    new = {"architecture": "standard", "apply_b_dec_to_input": True, **cfg, "metadata": meta}
    if act == "topk":
        kwargs = cfg.get("activation_fn_kwargs")
        new |= {"architecture": "topk", "k": kwargs.get("k") if isinstance(kwargs, dict) else None}
    if isinstance(new.get("normalize_activations"), bool):
        new["normalize_activations"] = "expected_average_only_in" if new["normalize_activations"] else "none"
    return new


def fold(cfg: Mapping, weights: dict[str, Tensor]) -> None:
    """Bring a SAELens file's weights to our form, in place: b_dec taken off the input, acts not scaled by decoder norms.

    Raises ValueError where a setting cannot be folded into the weights.
    """
    for key in ("normalize_activations", "reshape_activations", "finetuning_scaling_factor"):
        if cfg.get(key) not in ("none", None, False):
            raise ValueError(f"{key} = {cfg[key]!r} is not supported: fold it into the weights with sae_lens first")
    if not cfg.get("apply_b_dec_to_input", True):  # W x + b = W (x - b_dec) + (b + W b_dec)
        shift = weights["b_dec"] @ weights["W_enc"]
        for name in ("b_enc", "b_gate"):
            if name in weights:
                weights[name] += shift
        if "b_mag" in weights:
            weights["b_mag"] += weights["r_mag"].exp() * shift
    if cfg.get("rescale_acts_by_decoder_norm"):  # the k largest of acts times norms, decoded by unit rows
        norm = weights["W_dec"].norm(dim=-1)
        weights |= {"W_enc": weights["W_enc"] * norm, "b_enc": weights["b_enc"] * norm, "W_dec": weights["W_dec"] / norm[:, None]}


def read_cfg(folder: str | Path) -> dict:
    """cfg.json of a saved SAE, in SAELens 6's keys. Raises FileNotFoundError or ValueError with what is wrong."""
    path = Path(folder) / "cfg.json"
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: expected a folder written by tsae_utils.save or in SAELens layout")
    try:
        cfg = json.loads(path.read_text())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON ({error})") from error
    if not isinstance(cfg, dict) or not isinstance(cfg.get("metadata", {}), dict):
        raise ValueError(f"{path} is not the cfg.json of an SAE: expected the SAELens layout")
    cfg = _modern(cfg)
    missing = [k for k in ("architecture", "d_in", "d_sae") if k not in cfg] + (
        ["k"] if cfg.get("architecture") == "topk" and "k" not in cfg else [])
    if missing:
        raise ValueError(f"{path} lacks {', '.join(missing)}: expected the SAELens layout")
    if wrong := [k for k in ("d_in", "d_sae", "k") if k in cfg and type(cfg[k]) is not int]:
        raise ValueError(f"{path}: {wrong[0]} = {cfg[wrong[0]]!r} should be a whole number")
    return cfg
