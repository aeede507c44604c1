"""SAELens's layout of saved SAEs, read and written; the table has a file of its own.

An SAE without a table has SAELens's own architecture. With a table it has a name of its own, so
that SAELens cannot leave the table out unnoticed; `tsae.saelens_classes` makes SAELens know it.

Files may come from SAELens before version 6, as those of RES-JB do. Variants are folded into one
form: b_dec is subtracted from the input, and activations are not scaled by decoder norms.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from tsae.inputs import plain_sae

CONFIG, WEIGHTS, LOOKUP = FILES = (
    "cfg.json",
    "sae_weights.safetensors",
    "token_lookup.safetensors",
)
ARCHITECTURES = {  # our activation: SAELens's architecture
    "topk": "topk",
    "relu": "standard",
    "gated": "gated",
    "batchtopk": "jumprelu",
    "jumprelu": "jumprelu",
}
DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
PARTIAL = ".partial-"  # begins the name of a folder of unfinished files, inside the SAE's own
TOKENIZED = "tokenized_"  # before the architecture of an SAE with a table
SUBTRACTED = "subtracted_"  # instead, where the encoder sees x minus the table's row
ACTIVATIONS = {theirs: ours for ours, theirs in ARCHITECTURES.items()}
LAYOUT_VERSION = "6.54.12"  # files without a version are read as older than 6
EXPECTED = "expected a folder written by tsae_utils.save or in SAELens layout"


def plain_architecture(name: Any) -> str:
    """SAELens's own architecture below one with a table."""
    return str(name).removeprefix(TOKENIZED).removeprefix(SUBTRACTED)


def weight_names(architecture: str) -> tuple[str, ...]:
    """Tensors in the weight file of an architecture, with or without a table."""
    extra = {"gated": ("b_gate", "b_mag", "r_mag"), "jumprelu": ("b_enc", "threshold")}
    plain = plain_architecture(architecture)
    return "W_enc", "W_dec", "b_dec", *extra.get(plain, ("b_enc",))


def has_table(layout: Mapping, default: bool) -> bool:
    """Whether a cfg.json tells of a table; `default` where it says nothing.

    Folders with a plain architecture may tell of one in their metadata.
    """
    if str(layout.get("architecture")).startswith((TOKENIZED, SUBTRACTED)):
        return True
    metadata = layout.get("metadata")
    tokenized = metadata.get("tokenized") if isinstance(metadata, dict) else None
    return bool(tokenized.get("lookup", default)) if isinstance(tokenized, dict) else default


# -- writing --


def refuse_other_files(folder: str | Path) -> Path:
    """The folder itself, links followed. Raises FileExistsError where it holds other files."""
    given, folder = folder, Path(folder).expanduser().resolve()
    if not folder.exists():
        return folder
    if not folder.is_dir() or any(
        f.name not in FILES and not f.name.startswith(PARTIAL) for f in folder.iterdir()
    ):
        raise FileExistsError(
            f"{given} exists and holds other files: choose a folder of its own for the SAE"
        )
    return folder


def config_to_write(config: Mapping, has_lookup: bool, metadata: Mapping, dtype: str) -> dict:
    """cfg.json of an SAE whose TSAEConfig has these fields."""
    form = SUBTRACTED if config["subtract_lookup"] else TOKENIZED * has_lookup
    layout = {
        "architecture": form + ARCHITECTURES[config["activation"]],
        "d_in": config["d_in"],
        "d_sae": config["d_sae"],
        "dtype": dtype,
        "device": "cpu",
        "apply_b_dec_to_input": True,
        "normalize_activations": "none",
        "reshape_activations": "none",
    }
    if config["activation"] == "topk":
        layout |= {"k": config["k"], "rescale_acts_by_decoder_norm": False}
    layout["metadata"] = {
        "model_name": config["model_name"],
        "hook_name": config["hook_name"],
        "context_size": config["context_size"],
        "prepend_bos": True,
        "sae_lens_version": LAYOUT_VERSION,
        "tokenized": {**metadata, "lookup": has_lookup, "config": dict(config)},
    }
    return layout


def layout_text(sae: Any, metadata: Mapping, dtype: torch.dtype) -> str:
    """cfg.json. Raises ValueError for another type of number and for metadata that is no JSON."""
    if dtype not in DTYPES:
        names = ", ".join(str(d) for d in DTYPES)
        raise ValueError(f"an SAE is saved as one of {names}, not as {dtype}")
    if taken := {"lookup", "config"} & set(metadata):
        raise ValueError(f"metadata may not be called {taken.pop()!r}: choose another name")
    type_name = str(dtype).removeprefix("torch.")
    layout = config_to_write(asdict(sae.cfg), sae.lookup is not None, metadata, type_name)
    try:
        return json.dumps(layout, indent=1, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(
            f"the metadata is no JSON ({error}): expected texts, finite numbers, lists and dicts"
        ) from error


def tensors_to_write(sae: Any, dtype: torch.dtype) -> dict[str, dict[str, Tensor]]:
    """Tensors by file and name. Raises ValueError for values that the type cannot hold."""
    names = weight_names(ARCHITECTURES[sae.cfg.activation])
    files = {WEIGHTS: {name: getattr(sae, name) for name in names}}
    if sae.lookup is not None:
        files[LOOKUP] = {"W_lookup": sae.lookup.W}
    for tensors in files.values():
        for name, tensor in tensors.items():
            tensors[name] = stored = tensor.detach().to("cpu", dtype).contiguous()
            if not torch.isfinite(stored.float()).all():  # `load` reads fp32
                raise ValueError(
                    f"{name} holds values that are not finite in {dtype}: nothing was saved; "
                    "choose float32, or train with a lower learning rate"
                )
    return files


def save(
    sae: Any,
    folder: str | Path,
    metadata: Mapping | None = None,
    dtype: torch.dtype = torch.float32,
) -> Path:
    """Write a TSAE into `folder` in SAELens's layout, the table in a file of its own.

    A saved SAE in the folder is replaced when the new one is whole; cfg.json comes last. `metadata`
    must be JSON. Raises FileExistsError where the folder holds anything else, ValueError for what
    could not be loaded again; the folder is then as it was.
    """
    target, sae = refuse_other_files(folder), plain_sae(sae)
    text, files = layout_text(sae, metadata or {}, dtype), tensors_to_write(sae, dtype)
    new_folders = [p for p in (target, *target.parents) if not p.exists()]
    partial = target / f"{PARTIAL}{os.getpid()}"
    try:
        partial.mkdir(parents=True, exist_ok=True)
        for file, tensors in files.items():
            save_file(tensors, partial / file)
        (partial / CONFIG).write_text(text)
        (target / CONFIG).unlink(missing_ok=True)  # a folder without it is not loaded
        (target / LOOKUP).unlink(missing_ok=True)
        for file in (*files, CONFIG):
            (partial / file).replace(target / file)
    except (OSError, SafetensorError) as error:
        raise OSError(
            f"could not write {folder} ({error}): free some space or choose another"
        ) from error
    finally:
        for left in target.glob(f"{PARTIAL}*"):
            shutil.rmtree(left, ignore_errors=True)
        for empty in new_folders:  # where nothing was written
            with suppress(OSError):
                empty.rmdir()
    return Path(folder)


# -- reading --


def read_cfg(folder: str | Path) -> dict:
    """cfg.json in SAELens 6's keys. Raises FileNotFoundError or ValueError with what is wrong."""
    path = Path(folder).expanduser() / CONFIG
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: {EXPECTED}")
    try:
        layout = json.loads(path.read_text())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON ({error})") from error
    if not isinstance(layout, dict) or not isinstance(layout.get("metadata", {}), dict):
        raise ValueError(f"{path} is not the cfg.json of an SAE: expected the SAELens layout")
    layout = modern_keys(layout)
    required = ["architecture", "d_in", "d_sae"]
    if plain_architecture(layout.get("architecture")) == "topk":
        required.append("k")
    if missing := [key for key in required if key not in layout]:
        raise ValueError(f"{path} lacks {', '.join(missing)}: expected the SAELens layout")
    for key in ("d_in", "d_sae", "k"):
        if key in layout and type(layout[key]) is not int:
            raise ValueError(f"{path}: {key} = {layout[key]!r} should be a whole number")
    return layout


def modern_keys(layout: dict) -> dict:
    """A flat cfg.json of SAELens before version 6 in the present keys; others as they are."""
    if "metadata" in layout or not {"hook_point", "hook_name"} & set(layout):
        return layout
    activation = layout.get("activation_fn_str") or layout.get("activation_fn") or "relu"
    if activation not in ("relu", "topk"):
        raise ValueError(
            f"activation {activation!r} of an old SAELens file is not supported: "
            "expected relu or topk"
        )
    renamed = {"hook_point": "hook_name"}
    kept = ("model_name", "hook_point", "hook_name", "context_size")
    metadata = {renamed.get(key, key): layout[key] for key in kept if key in layout}
    modern = {"architecture": "standard", "apply_b_dec_to_input": True, **layout}
    modern["metadata"] = metadata
    if activation == "topk":
        arguments = layout.get("activation_fn_kwargs")
        k = arguments.get("k") if isinstance(arguments, dict) else None
        modern |= {"architecture": "topk", "k": k}
    if isinstance(modern.get("normalize_activations"), bool):
        was_normalized = modern["normalize_activations"]
        modern["normalize_activations"] = "expected_average_only_in" if was_normalized else "none"
    return modern


def read_tensors(path: Path, shapes: Mapping[str, tuple]) -> dict[str, Tensor]:
    """Tensors of a file in fp32, with these names and shapes (None: any size).

    Raises FileNotFoundError or ValueError with what is wrong.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: {EXPECTED}")
    try:
        tensors = load_file(path)
    except SafetensorError as error:
        raise ValueError(
            f"{path} is damaged or not a safetensors file ({error}): fetch or train it again"
        ) from error
    for name, shape in shapes.items():
        if name not in tensors:
            raise ValueError(f"{path}: {name} should be {list(shape)}, found nothing")
        tensor = tensors[name]
        fits = len(shape) == tensor.ndim and all(
            wanted in (None, size) for wanted, size in zip(shape, tensor.shape, strict=True)
        )
        if not fits:
            raise ValueError(f"{path}: {name} should be {list(shape)}, found {list(tensor.shape)}")
        if not tensor.is_floating_point() or not torch.isfinite(tensor.float()).all():
            raise ValueError(
                f"{path}: {name} should hold finite numbers, but is {tensor.dtype} with NaN, "
                "infinity or no fraction: fetch or train it again"
            )
    return {name: tensors[name].float() for name in shapes}


def fold_(layout: Mapping, weights: dict[str, Tensor]) -> None:
    """Bring weights to our form in place.

    Raises ValueError for a setting that cannot be folded into the weights.
    """
    for key in ("normalize_activations", "reshape_activations", "finetuning_scaling_factor"):
        if layout.get(key) not in ("none", None, False):
            raise ValueError(
                f"{key} = {layout[key]!r} is not supported: "
                "fold it into the weights with sae_lens first"
            )
    if not layout.get("apply_b_dec_to_input", True):
        # W x + b = W (x - b_dec) + (b + W b_dec)
        shift = weights["b_dec"] @ weights["W_enc"]
        for name in ("b_enc", "b_gate"):
            if name in weights:
                weights[name] += shift
        if "b_mag" in weights:
            weights["b_mag"] += weights["r_mag"].exp() * shift
    if layout.get("rescale_acts_by_decoder_norm"):
        # the k largest of activations times norms, decoded by unit rows
        norm = weights["W_dec"].norm(dim=-1)
        weights["W_enc"] = weights["W_enc"] * norm
        weights["b_enc"] = weights["b_enc"] * norm
        weights["W_dec"] = weights["W_dec"] / norm[:, None]


def our_config(path: Path, layout: Mapping) -> dict:
    """Fields of a TSAEConfig from cfg.json; fields of the wrong type keep their defaults."""
    metadata = layout.get("metadata", {})
    tokenized = metadata.get("tokenized")
    saved = tokenized.get("config") if isinstance(tokenized, dict) else None
    saved = saved if isinstance(saved, dict) else {}
    types = {
        "model_name": (str,),
        "hook_name": (str,),
        "context_size": (int,),
        "l1_coefficient": (int, float),
        "encoder_scale": (int, float),
        "decoder_init_norm": (int, float),
        "seed": (int,),
        "max_norm": (int, float),
        "max_norm_ratio": (int, float),
    }
    known = {
        key: value
        for key, value in {**metadata, **saved}.items()
        if type(value) in types.get(key, ())
    }
    activation, k = ACTIVATIONS[plain_architecture(layout["architecture"])], layout.get("k", 0)
    if activation == "jumprelu" and saved.get("activation") == "batchtopk":
        activation, k = "batchtopk", saved.get("k")
        if type(k) is not int:
            raise ValueError(f"{path}: k = {k!r} of a batchtopk SAE should be a whole number")
    sizes = {"d_in": layout["d_in"], "d_sae": layout["d_sae"]}
    subtracts = layout["architecture"].startswith(SUBTRACTED)
    form = {"activation": activation, "k": k, "subtract_lookup": subtracts}
    return {**sizes, **form, **known}


def read_folder(folder: str | Path) -> tuple[dict, dict[str, Tensor], Tensor | None]:
    """(Fields of a TSAEConfig, weights by name, lookup table or None) of a saved SAE.

    Raises FileNotFoundError or ValueError with what is wrong.
    """
    folder, layout = Path(folder).expanduser(), read_cfg(folder)
    if plain_architecture(layout["architecture"]) not in ACTIVATIONS:
        raise ValueError(
            f"{folder}/{CONFIG}: architecture {layout['architecture']!r} is not one of "
            f"{', '.join(ACTIVATIONS)}, alone or with {TOKENIZED!r} or {SUBTRACTED!r} before it"
        )
    config = our_config(folder / CONFIG, layout)
    d_in, d_sae = config["d_in"], config["d_sae"]
    sizes = {"W_enc": (d_in, d_sae), "W_dec": (d_sae, d_in), "b_dec": (d_in,)}
    names = weight_names(layout["architecture"])
    shapes = {name: sizes.get(name, (d_sae,)) for name in names}
    weights = read_tensors(folder / WEIGHTS, shapes)
    fold_(layout, weights)
    lookup = None
    if has_table(layout, (folder / LOOKUP).exists()):
        lookup = read_tensors(folder / LOOKUP, {"W_lookup": (None, d_in)})["W_lookup"]
    return config, weights, lookup
