"""Several processes train as one: world size, means over processes, equal starts.

Processes are started by torchrun. Each trains on rows of its own and averages its gradients.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from tsae.kernels import uncoalesced_parts


def world_size() -> int:
    """Processes that train together; 1 without torchrun."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_world_size()
    return 1


def rank() -> int:
    """This process's number, from 0."""
    return torch.distributed.get_rank() if world_size() > 1 else 0


def average_(tensor: Tensor) -> None:
    """Replace a tensor by its mean over processes."""
    if world_size() > 1:
        torch.distributed.all_reduce(tensor)
        tensor /= world_size()


def any_(mask: Tensor) -> Tensor:
    """Whether an entry is true in any process."""
    if world_size() == 1:
        return mask
    flags = mask.to(torch.uint8)
    torch.distributed.all_reduce(flags, torch.distributed.ReduceOp.MAX)
    return flags > 0


def average_gradient_(parameter: Tensor) -> None:
    """Replace a gradient, if there is one, by its mean over processes.

    Of a sparse gradient only the rows travel: one per token, the same number in every process.
    """
    if parameter.grad is None or world_size() == 1:
        return
    if not parameter.grad.is_sparse:
        average_(parameter.grad)
        return
    indices, values = uncoalesced_parts(parameter.grad)
    all_indices = torch.cat(gather(indices), dim=1)
    all_values = torch.cat(gather(values / world_size()))
    parameter.grad = torch.sparse_coo_tensor(all_indices, all_values, parameter.shape)


def gather(tensor: Tensor) -> list[Tensor]:
    """The tensor of every process, in order."""
    if world_size() == 1:
        return [tensor]
    parts = [torch.empty_like(tensor) for _ in range(world_size())]
    torch.distributed.all_gather(parts, tensor)
    return parts


@torch.no_grad()
def broadcast_(tensors: Iterable[Tensor]) -> None:
    """Give every process the first one's tensors."""
    if world_size() > 1:
        for tensor in tensors:
            torch.distributed.broadcast(tensor.data, 0)


def require_equal_starts(step: int, device: torch.device) -> None:
    """Raise ValueError where processes would start at different steps."""
    if world_size() == 1:
        return
    extremes = torch.tensor([step, -step], device=device)
    torch.distributed.all_reduce(extremes, torch.distributed.ReduceOp.MAX)
    if extremes.sum():
        first, last = -int(extremes[1]), int(extremes[0])
        raise ValueError(
            f"processes start at steps {first} to {last}: all must see the checkpoint, "
            "so put it in a folder that they share"
        )
