"""Fast paths: exact top-k, the sparse forward and backward pass, bf16 products, memory reuse.

Every private operator of torch is called here, each with a plain fallback.
Axes: B batch (tokens), D d_in, F d_sae, K active per token, P active pairs of a batch.
"""

from __future__ import annotations

import ctypes
import math
import sys
from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

CPU_ROWS = 512  # tokens encoded together on a CPU: a whole batch of a wide SAE would be a gigabyte
WIDE = 1024  # pre-activations per token from which top_k is faster than torch.topk


def fast_bf16(device: torch.device) -> bool:
    """Whether bf16 matrix products are fast: on CUDA, and on CPUs with instructions for them."""
    if device.type != "cpu":
        return device.type == "cuda"
    capabilities = torch.cpu.get_capabilities()
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))


def keep_freed_memory() -> None:
    """Ask glibc to keep freed memory for the next batch instead of returning it to the system.

    On a CPU every fresh [B, F] is otherwise paid for page by page. Meant for programs whose main
    work is training or harvesting: the process stays at its peak size. Other C libraries ignore it.
    """
    if sys.platform != "linux":
        return
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "gnu_get_libc_version"):
        return
    trim_threshold, top_pad, mmap_max = -1, -2, -4  # names in malloc.h: M_TRIM_THRESHOLD, ...
    libc.mallopt(trim_threshold, -1)  # never trim
    libc.mallopt(top_pad, 2**26)  # grow by 64 MiB
    libc.mallopt(mmap_max, 0)  # no mmap for large blocks


def rows_per_part(x_BD: Tensor) -> int:
    """Tokens to encode together: all of them on a GPU."""
    return len(x_BD) if x_BD.is_cuda else CPU_ROWS


def make_encoder(W_FD: Tensor, b_F: Tensor) -> Callable[[Tensor], Tensor]:
    """A function x [B, D] -> x W^T + b [B, F] for repeated use, without gradient.

    For bf16 on a CPU the weights are laid out for the product once, as torch.compile does it.
    """
    on_cpu = W_FD.device.type == "cpu" and torch.backends.mkldnn.is_available()
    if on_cpu and W_FD.dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported():
        packed = torch.ops.mkldnn._reorder_linear_weight(W_FD, CPU_ROWS)
        return lambda x: torch.ops.mkldnn._linear_pointwise(x, packed, b_F, "none", [], "")
    return lambda x: F.linear(x, W_FD, b_F)


# -- top-k --


def top_k(pre_BF: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Values and indices [B, K] of the k largest of each row, exact and in no order.

    Features are put into groups. The k largest lie in the k groups with the largest maxima: every
    element of another group is at most its group's maximum, and k maxima are at least as large.
    Both steps are top_k again. Among equal values any may be chosen.
    """
    batch, width = pre_BF.shape
    group = 8 if k >= 16 else 16
    if width < WIDE or 2 * group * k > width or width % group:
        return pre_BF.topk(k, dim=-1, sorted=False)
    n_groups = width // group
    members = pre_BF.view(batch, group, n_groups)  # strided, so that the maximum vectorises
    best = top_k(members.amax(1), k)[1]
    candidates = members.gather(2, best.unsqueeze(1).expand(batch, group, k)).flatten(1)
    values, index = top_k(candidates, k)
    return values, index // k * n_groups + best.gather(1, index % k)


def largest_positive(pre_BF: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """`top_k` before a ReLU; bf16 is compared by its bits as whole numbers, which is faster.

    Positive values keep their order and stand above all others, whose order the ReLU makes
    irrelevant. NaN may be passed over; `train` looks for it in the weights.
    """
    if pre_BF.dtype != torch.bfloat16:
        return top_k(pre_BF, k)
    bits, index = top_k(pre_BF.view(torch.int16), k)
    return bits.view(torch.bfloat16), index


class Pairs(NamedTuple):
    """The P active (token, feature) pairs of a batch, sorted by token."""

    values: Tensor  # [P]
    feature: Tensor  # [P]
    row: Tensor  # [P], the token's place in the batch


def top_of_tokens(parts: Iterable[Tensor], k: int) -> Pairs:
    """The k largest pre-activations of every token, for a ReLU; the batch comes in parts."""
    values, index = zip(*(largest_positive(part, k) for part in parts), strict=True)
    values, index = torch.cat(values), torch.cat(index)
    row = torch.arange(len(index), device=index.device).repeat_interleave(k)
    return Pairs(values.flatten(), index.flatten(), row)


def top_of_batch(pre_BF: Tensor, k: int) -> Pairs:
    """The B k largest positive pre-activations of a batch (BatchTopK, Bussmann et al. 2024)."""
    flat, wanted = pre_BF.flatten(), len(pre_BF) * k
    # A threshold guessed from a sample saves sorting everything.
    sample = flat[:: max(1, len(flat) // 2**17)]
    expected = math.ceil(1.2 * wanted * len(sample) / len(flat))
    guess = sample.topk(min(len(sample), expected)).values[-1].clamp(min=0)
    position = (flat > guess).nonzero().squeeze(-1)
    if len(position) < wanted:  # the guess was too high
        position = (flat > 0).nonzero().squeeze(-1)
    largest = flat[position].topk(min(wanted, len(position)), sorted=False).indices
    position = position[largest].sort().values
    width = pre_BF.shape[1]
    return Pairs(flat[position], position % width, position // width)


# -- the sparse pass --


class SparsePass(torch.autograd.Function):
    """Encode, select and decode: (reconstruction [B, D] without table, *Pairs).

    Only the pre-activations are dense. Values, decoder and both weight gradients touch active pairs
    alone. With pairs sorted by feature a weight gradient is a bag sum over rows of x or of the
    output gradient g, and the gradient of a pair's value is g[row] . W_dec[feature].
    """

    @staticmethod
    def forward(ctx, x, W_enc, b_enc, W_dec, b_dec, k, of_batch, bf16):
        centred = x - b_dec
        dtype = torch.bfloat16 if bf16 else x.dtype
        encode = make_encoder(W_enc.to(dtype), b_enc.to(dtype))
        parts = map(encode, centred.to(dtype).split(rows_per_part(x)))
        if of_batch:
            values, feature, row = top_of_batch(torch.cat(list(parts)), k)
        else:
            values, feature, row = top_of_tokens(parts, k)
        values = values.to(x.dtype).relu_()  # as SAELens; the authors' code keeps negative values
        bags = torch.searchsorted(row, torch.arange(len(x), device=x.device))
        x_hat = bag_sum(feature, W_dec.detach(), bags, values) + b_dec
        ctx.save_for_backward(centred, W_enc, W_dec, values, feature, row, bags)
        ctx.mark_non_differentiable(values, feature, row)
        return x_hat, values, feature, row

    @staticmethod
    @once_differentiable
    def backward(ctx, g, *_):
        centred, W_enc, W_dec, values, feature, row, bags = ctx.saved_tensors
        by_feature, order = feature.sort(stable=True)
        starts = torch.searchsorted(by_feature, torch.arange(len(W_enc), device=g.device))
        rows = row[order]
        # The bag sum that is W_dec's gradient also knows, by its own backward, that of the values.
        with torch.enable_grad():
            sorted_values = values[order].requires_grad_()
            d_W_dec = bag_sum(rows, g, starts, sorted_values)
        d_values = torch.autograd.grad(d_W_dec, sorted_values, W_dec)[0]
        d_values = d_values * (sorted_values > 0)  # the ReLU's gradient
        d_W_enc = bag_sum(rows, centred, starts, d_values)
        d_b_enc = torch.zeros(len(W_enc), device=g.device, dtype=g.dtype)
        d_b_enc.index_add_(0, by_feature, d_values)
        d_b_dec = g.sum(0) - d_b_enc @ W_enc
        d_x = None
        if ctx.needs_input_grad[0]:
            by_row = torch.empty_like(d_values).scatter_(0, order, d_values)
            d_x = bag_sum(feature, W_enc, bags, by_row)
        return d_x, d_W_enc, d_b_enc, d_W_dec.detach(), d_b_dec, None, None, None


def bag_sum(index_P: Tensor, W: Tensor, starts: Tensor, weights_P: Tensor) -> Tensor:
    """Weighted sums of rows of W; bag i begins at starts[i] of the pairs."""
    return F.embedding_bag(index_P, W, starts, mode="sum", per_sample_weights=weights_P)


# -- the dense pass --


def dense_pass(
    x: Tensor,
    W_enc: Tensor,
    bias: Tensor,
    W_dec: Tensor,
    b_dec: Tensor,
    activate: Callable[[Tensor], Tensor],
    decode_gate: bool,
    bf16: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(Decoded, gate decoded [B, D + 1], active features [B], fired [F]), b_dec not added.

    The last column is sum_f a_f ||W_dec[f]||. The gate's own activations relu(pre) pass through a
    frozen decoder; without `decode_gate` the second result is the first.
    """
    # Adding zero like this gives b_dec the encoder's gradient without one for x.
    bias = bias + W_enc @ (b_dec.detach() - b_dec)
    W_dec = torch.cat([W_dec, W_dec.norm(dim=-1, keepdim=True)], dim=-1)
    parts = []
    with torch.autocast(x.device.type, torch.bfloat16, enabled=bf16):
        for centred in (x - b_dec.detach()).split(rows_per_part(x)):
            pre = F.linear(centred, W_enc, bias)
            acts = activate(pre)
            decoded = gate = (acts @ W_dec).to(centred.dtype)
            if decode_gate:
                gate = (pre.relu() @ W_dec.detach()).to(centred.dtype)
            acts = acts.detach()
            parts.append((decoded, gate, (acts > 0).sum(-1), acts.amax(0, keepdim=True) > 0))
    decoded, gate, l0, fired = (torch.cat(part) for part in zip(*parts, strict=True))
    return decoded, gate, l0, fired.any(0)


def uncoalesced_parts(sparse: Tensor) -> tuple[Tensor, Tensor]:
    """Indices and values of a sparse gradient as it is: one row per token of the batch."""
    return sparse._indices(), sparse._values()
