"""Tensors and a JSON dict in one safetensors file, and back."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

STATE = "state"  # the JSON dict, as bytes


def write_checkpoint(path: str | Path, tensors: Mapping[str, Tensor], state: Mapping) -> None:
    """Write a checkpoint; the previous one stays until the new one is whole.

    Raises FloatingPointError for a tensor that is not finite, OSError where the file cannot be
    written. Tensors that share memory are stored once each.
    """
    stored, seen = {}, set()
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise FloatingPointError(
                f"{name} is not finite: lower the learning rate (the last checkpoint is unchanged)"
            )
        is_shared = tensor.data_ptr() in seen
        seen.add(tensor.data_ptr())
        stored[name] = tensor.clone() if is_shared else tensor.contiguous()
    encoded = bytearray(json.dumps(state).encode())
    stored[STATE] = torch.frombuffer(encoded, dtype=torch.uint8)
    path = Path(path)
    # Unfinished files go into a folder: safetensors makes temporary files of its own.
    partial = path.with_name(f".{path.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)  # left by a process that was killed
    try:
        partial.mkdir(parents=True)
        save_file(stored, partial / path.name)
        with open(partial / path.name, "rb+") as file:
            os.fsync(file.fileno())
        (partial / path.name).replace(path)
    except (OSError, SafetensorError) as error:
        raise OSError(
            f"could not write the checkpoint {path} ({error}): free some space and run again; "
            "the previous checkpoint is unchanged"
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def read_checkpoint(path: str | Path, device: str | torch.device) -> tuple[dict[str, Tensor], dict]:
    """(Tensors, state) of a checkpoint. Raises ValueError where it is damaged or no file."""
    if not Path(path).is_file():
        raise ValueError(f"the checkpoint {path} is not a file: give another name")
    try:
        tensors = load_file(path, device=str(device))
        state = json.loads(bytes(tensors.pop(STATE).tolist()))
    except (SafetensorError, ValueError, KeyError, OSError) as error:
        raise ValueError(
            f"the checkpoint {path} is damaged ({error}): delete it to start again"
        ) from error
    return tensors, state
