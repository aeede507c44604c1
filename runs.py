"""A training run of several processes, and one that goes on after it was stopped: what `tsae_utils.train` needs for both.

Processes train on rows of their own and average their gradients (torch.distributed, started by torchrun). A checkpoint is
one safetensors file with everything that training changes and what the run was, so that only the same run goes on from it.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

if TYPE_CHECKING:
    from tsae_utils import TSAE, ActivationStream, TrainConfig


def processes() -> int:
    """Processes that train together (torchrun); 1 without."""
    return torch.distributed.get_world_size() if torch.distributed.is_available() and torch.distributed.is_initialized() else 1


def average_(*tensors: Tensor) -> None:
    """Replace tensors by their mean over processes."""
    if (world := processes()) > 1:
        for tensor in tensors:
            torch.distributed.all_reduce(tensor)
            tensor /= world


def average_gradient_(p: Tensor) -> None:
    """Replace a gradient, if there is one, by its mean over processes; of a sparse one only the rows travel."""
    if p.grad is not None and not p.grad.is_sparse:
        average_(p.grad)
    elif p.grad is not None and (world := processes()) > 1:
        mine = p.grad._indices(), p.grad._values() / world  # uncoalesced: a row for each token of the batch, everywhere the same number
        every = [[torch.empty_like(part) for _ in range(world)] for part in mine]
        for parts, part in zip(every, mine, strict=True):
            torch.distributed.all_gather(parts, part)
        p.grad = torch.sparse_coo_tensor(torch.cat(every[0], dim=1), torch.cat(every[1]), p.shape)


@torch.no_grad()
def same_everywhere_(saes: Mapping[str, TSAE], first: int) -> None:
    """Give every process the first one's weights. Raises ValueError where they do not start at the same step."""
    here = torch.tensor([first, -first], device=next(iter(saes.values())).W_dec.device)
    torch.distributed.all_reduce(here, torch.distributed.ReduceOp.MAX)
    if here.sum():
        raise ValueError(f"processes start at steps {-int(here[1])} to {int(here[0])}: all must see the checkpoint, in a folder they share")
    for sae in saes.values():
        for tensor in (*sae.parameters(), *sae.buffers()):
            torch.distributed.broadcast(tensor.data, 0)


def everything(saes: Mapping[str, TSAE], opts: Mapping[str, list]) -> dict[str, Tensor]:
    """Every tensor that training changes, by name: parameters, buffers, Adam's moments and step counts."""
    found = {}
    for name, sae in saes.items():
        found |= {f"{name}/{n}": t.detach() for n, t in (*sae.named_parameters(), *sae.named_buffers())}
        found |= {f"{name}/{n}/{key}": torch.as_tensor(value) for n, p in sae.named_parameters() for opt in opts[name]
                  for key, value in opt.state.get(p, {}).items()}
    return found


def identity(saes: Mapping[str, TSAE], cfgs: Mapping[str, TrainConfig], stream: ActivationStream) -> dict:
    """What two runs must share for one to go on from the other's checkpoint."""
    tables = {name: None if sae.lookup is None else "learned" if sae.lookup.W.requires_grad else "frozen" for name, sae in saes.items()}
    own = {k: getattr(stream, k) for k in ("batch_size", "seed", "rows_per_buffer", "harvest_rows", "order", "include_bos", "hook_name")}
    return {
        **{f"sae {name}": {**asdict(sae.cfg), "table": tables[name], "dtype": str(sae.W_dec.dtype)} for name, sae in saes.items()},
        **{f"training of {name}": asdict(c) for name, c in cfgs.items()},
        "stream": {**own, "model": stream.lm.fingerprint, "bf16": stream.lm.bf16, "processes": processes()}}


def save_checkpoint(path: str | Path, saes: Mapping[str, TSAE], opts: Mapping[str, list], run: Mapping,
                    stream: ActivationStream, progress: Mapping) -> None:
    """Write a checkpoint of `train`, one safetensors file; the old one stays until the new one is whole. Raises OSError
    where it cannot be written, FloatingPointError where a weight is not finite."""
    places = [torch.tensor([*stream.position, stream.digest], device=stream.lm.device)]
    if (world := processes()) > 1:
        here, places = places[0], [torch.zeros_like(places[0]) for _ in range(world)]
        torch.distributed.all_gather(places, here)
        if torch.distributed.get_rank():  # the first writes for all
            return
    tensors, seen = {}, set()
    for name, tensor in everything(saes, opts).items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise FloatingPointError(f"{name} is not finite: lower the learning rate (the checkpoint before is as it was)")
        shared = tensor.data_ptr() in seen  # a table of two SAEs
        seen.add(tensor.data_ptr())
        tensors[name] = tensor.clone() if shared else tensor.contiguous()
    state = json.dumps({**progress, "places": [p.tolist() for p in places], "run": run})
    path = Path(path)
    partial = path.with_name(f".{path.name}.partial")  # a folder, as safetensors makes files of its own on the way
    shutil.rmtree(partial, ignore_errors=True)  # of a process that was killed here
    try:
        partial.mkdir(parents=True)
        save_file({**tensors, "state": torch.frombuffer(bytearray(state.encode()), dtype=torch.uint8)}, partial / path.name)
        with open(partial / path.name, "rb+") as file:
            os.fsync(file.fileno())
        (partial / path.name).replace(path)
    except (OSError, SafetensorError) as error:
        raise OSError(f"could not write the checkpoint {path} ({error}): make room; the one before is as it was") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


@torch.no_grad()
def load_checkpoint(path: str | Path, saes: Mapping[str, TSAE], opts: Mapping[str, list], run: Mapping,
                    stream: ActivationStream) -> tuple[int, tuple[int, int], dict[str, float], list[dict]]:
    """Put a checkpoint back; returns (steps done, place in the stream, seconds, history). Raises ValueError where the
    file is damaged or of another run."""
    if not Path(path).is_file():
        raise ValueError(f"the checkpoint {path} is not a file: give another name")
    try:
        found = load_file(path, device=str(stream.lm.device))
        state = json.loads(bytes(found.pop("state").tolist()))
    except (SafetensorError, ValueError, KeyError, OSError) as error:
        raise ValueError(f"the checkpoint {path} is damaged ({error}): delete it to start again") from error
    rank = torch.distributed.get_rank() if processes() > 1 else 0
    for part in {**run, **state["run"]}:
        was, now = state["run"].get(part) or {}, run.get(part) or {}
        if what := [f"{k} {was.get(k)} there, {now.get(k)} here" for k in {**was, **now} if was.get(k) != now.get(k)]:
            raise ValueError(f"the checkpoint {path} is of another run ({part}: {'; '.join(what)}): delete it or give another file")
    if state["places"][rank][2] != stream.digest:
        raise ValueError(f"the checkpoint {path} is of another run (other rows of text): delete it or give another file")
    for name, sae in saes.items():
        for n, t in (*sae.named_parameters(), *sae.named_buffers()):
            t.copy_(found[f"{name}/{n}"])
        for n, p in sae.named_parameters():
            if f"{name}/{n}/step" in found:  # not of a frozen table
                opt = next(o for o in opts[name] if any(p is q for group in o.param_groups for q in group["params"]))
                opt.state[p] = {key: found[f"{name}/{n}/{key}"].clone() for key in ("step", "exp_avg", "exp_avg_sq")}
                if isinstance(opt, torch.optim.SparseAdam):
                    opt.state[p]["step"] = int(opt.state[p]["step"])
    return state["step"], tuple(state["places"][rank][:2]), state["seconds"], state["history"]
