"""Finds a model's blocks, and what they add to the residual stream, by running the model.

Names of classes and attributes differ between architectures; what passes through does not.
Axes: R rows, L sequence, D d_model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import contextmanager
from itertools import combinations
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

ReadOrReplace = Callable[[Tensor], Tensor | None]  # gets a tensor; returns a new one, or None
Slot = int | str | None  # position or name; None: the value itself
TOLERANCE = 1e-4  # relative; rounding in fp32 stays below, a real difference above


class StopForward(Exception):
    """Ends a forward pass once everything wanted is read."""


class Site(NamedTuple):
    """One tensor [R, L, D] among the arguments or the results of a module."""

    module: nn.Module
    slot: Slot
    is_input: bool = False


class Block(NamedTuple):
    """A transformer block: where the stream enters and leaves, and the form of its result."""

    module: nn.Module
    input: Site
    output: Site
    form: Any  # the result without the stream
    width: int  # d_model

    @property
    def hands_on_the_stream_alone(self) -> bool:
        """Whether the block returns nothing else."""
        return self.form is None or all(item is None for item in self.form)

    def result(self, x_RLD: Tensor) -> Any:
        """What the block returns when it hands on this stream."""
        return replace_item(self.form, self.output.slot, x_RLD)


class Sublayers(NamedTuple):
    """Where a block's attention and MLP hand over what is added to the stream."""

    attn: Site
    mlp: Site
    is_parallel: bool  # the MLP does not see the attention's result


def replace_item(values: Any, slot: Slot, new: Any) -> Any:
    """A copy of a tuple, list or dict with another item at `slot`; for None `new` itself."""
    if slot is None:
        return new
    if isinstance(values, Mapping):
        return {**values, slot: new}
    items = list(values)
    items[slot] = new
    return items if isinstance(values, list) else tuple(items)


def find_slot(values: Any, fits: Callable[[Tensor], bool]) -> tuple[bool, Slot]:
    """(Whether there is one, slot) of the first floating-point tensor that fits."""

    def is_fitting(value: Any) -> bool:
        return isinstance(value, Tensor) and value.is_floating_point() and fits(value)

    if is_fitting(values):
        return True, None
    if isinstance(values, Mapping):
        items = values.items()
    else:
        items = enumerate(values) if isinstance(values, tuple | list) else ()
    return next(((True, slot) for slot, value in items if is_fitting(value)), (False, None))


def visit(site: Site, read_or_replace: ReadOrReplace) -> RemovableHandle:
    """Show a site's tensor to a function in every pass, and put what it returns in its place."""
    module, slot, is_input = site

    def before(module: nn.Module, args: tuple, kwargs: dict) -> tuple | None:
        is_named = isinstance(slot, str)
        new = read_or_replace((kwargs if is_named else args)[slot])
        if new is None:
            return None
        if is_named:
            return args, replace_item(kwargs, slot, new)
        return replace_item(args, slot, new), kwargs

    def after(module: nn.Module, args: tuple, output: Any) -> Any:
        new = read_or_replace(output if slot is None else output[slot])
        return None if new is None else replace_item(output, slot, new)

    if is_input:
        return module.register_forward_pre_hook(before, with_kwargs=True)
    return module.register_forward_hook(after)


@contextmanager
def removed_afterwards(handles: Iterable[RemovableHandle]):
    """Remove hooks at the end, whatever happens."""
    handles = list(handles)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def describe_call(
    module: nn.Module, args: tuple, kwargs: dict, output: Any, shape: tuple[int, int]
) -> Block | None:
    """Where the stream passes in this call of a module; None where it does not."""

    def is_stream(x: Tensor) -> bool:
        return x.ndim == 3 and x.shape[:2] == shape

    is_there, slot = find_slot(args, is_stream)
    values = args if is_there else kwargs
    if not is_there:
        is_there, slot = find_slot(kwargs, is_stream)
    if not is_there:
        return None
    width = values[slot].shape[-1]
    is_there, result = find_slot(output, lambda x: x.shape == (*shape, width))
    if not is_there:
        return None
    form = replace_item(output, result, None)
    return Block(module, Site(module, slot, True), Site(module, result), form, width)


def find_blocks(model: nn.Module, run: Callable[[], Any], shape: tuple[int, int]) -> list[Block]:
    """The model's blocks in order: of the lists of modules that run, the one with most parameters.

    `run` runs the model on token ids of this shape [R, L]. Raises ValueError where there is no such
    list, and where its modules do not hand on a stream [R, L, D] once each.
    """
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    calls: dict[nn.Module, list[Block | None]] = {}

    def record(module: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
        calls.setdefault(module, []).append(describe_call(module, args, kwargs, output, shape))

    members = {module for modules in lists for module in modules}
    with removed_afterwards(m.register_forward_hook(record, with_kwargs=True) for m in members):
        run()
    lists = [modules for modules in lists if any(module in calls for module in modules)]
    if not lists:
        raise ValueError("the model has no list of blocks that run one after the other")
    biggest = max(lists, key=lambda modules: sum(p.numel() for p in modules.parameters()))
    blocks = [calls[module] for module in biggest if module in calls]
    if any(len(of_block) > 1 for of_block in blocks):
        raise ValueError("the model runs a block more than once per pass")
    if any(of_block[0] is None for of_block in blocks):
        raise ValueError(
            "the model's blocks do not hand on one residual stream of shape [rows, tokens, width]"
        )
    return [of_block[0] for of_block in blocks]


def record_results(block: Block, run: Callable[[], Any], shape: torch.Size) -> dict[Site, Tensor]:
    """Results [R, L, D] of all modules inside a block in the order in which they end.

    Some modules give them as [R L, D].
    """
    results: dict[Site, list[Tensor]] = {}

    def record(module: nn.Module, args: tuple, output: Any) -> None:
        is_there, slot = find_slot(
            output, lambda x: x.shape[-1:] == shape[-1:] and x.numel() == shape.numel()
        )
        if is_there:  # a copy: what is added to it in place is no part of it
            result = (output if slot is None else output[slot]).clone().view(shape)
            results.setdefault(Site(module, slot), []).append(result)

    inside = [module for module in block.module.modules() if module is not block.module]
    with removed_afterwards(module.register_forward_hook(record) for module in inside):
        run()
    return {site: tensors[0] for site, tensors in results.items() if len(tensors) == 1}


def differ(a: Tensor, b: Tensor, rounding: float = 0.0) -> bool:
    """Whether two tensors differ by more than rounding, NaN included."""
    return not (a - b).abs().max() <= TOLERANCE * b.abs().max() + rounding


def find_sublayers(block: Block, run: Callable[[], Any]) -> Sublayers | None:
    """A block's attention and MLP: two modules inside whose results the block adds to its input.

    Attention is the one of them that mixes positions. None where there are no two such modules.
    """
    stream: dict[str, Tensor] = {}
    save_input, save_output = (
        visit(site, lambda x, key=key: stream.__setitem__(key, x))
        for key, site in (("input", block.input), ("output", block.output))
    )
    with removed_afterwards([save_input, save_output]):
        run()
    x = stream["input"]
    added = stream["output"] - x
    results = record_results(block, run, x.shape)
    parts = [site for site in results if differ(results[site], added)]  # one is not the whole
    pairs = reversed(list(combinations(parts, 2)))  # outer modules end last
    pair = next((p for p in pairs if not differ(results[p[0]] + results[p[1]], added)), None)
    if pair is None:
        return None

    def results_with(site: Site, replacement: Tensor) -> dict[Site, Tensor]:
        with removed_afterwards([visit(site, lambda _: replacement)]):
            return record_results(block, run, x.shape)

    moved = torch.cat([x[:, :1].roll(1, -1), x[:, 1:]], 1)  # another vector at position 0
    seen = results_with(block.input, moved)
    mixes = [differ(seen[site][:, -1], results[site][:, -1]) for site in pair]
    if not any(mixes):
        return None
    first, second = pair
    attn, mlp = pair if mixes[0] else (second, first)
    seen = results_with(first, results[first].roll(1, -1))
    return Sublayers(attn, mlp, is_parallel=not differ(seen[second], results[second]))
