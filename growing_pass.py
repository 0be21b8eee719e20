"""One pass of a batch that rows join block by block, with exchanges made in single rows.

- `Edit`: an activation at some place becomes another; `edit_rows` makes edits in a batch.
- `resume_growing`: the model from the first block that is needed, from the first position that is
  needed; rows join it with residual streams of their own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from base_run import BaseRun, logits_at, prefix_cache, read_only
from forward_pass import (
    Hook,
    Site,
    attached,
    read_hidden,
    read_input,
    skip_blocks,
    write_hidden,
    write_input,
)
from interrupts import UndoStack, until_closed
from model_architecture import Architecture

WHOLE_CACHE = frozenset({"key", "value"})
"""Sites that hold every position also when only a suffix is run."""


class Edit(NamedTuple):
    """One exchange: the activation at some place of a run becomes ``value``."""

    site: Site
    value: Tensor
    """Broadcasts to what stands there: ``[…]``, or ``[position, …]`` at several positions."""
    position: int | Tensor | None = None
    """Absolute position, ascending positions ``[k]``, or None for all."""
    head: int | None = None
    neuron: int | None = None


def edit_rows(found: Sequence[tuple[int, Edit]], start: int) -> Hook:
    """A hook that makes edits in single rows of a batch that holds positions from ``start`` on.

    Args:
        found: Row and edit, all of one site.
        start: Position of the first column.
    """
    site = found[0][1].site
    offset = 0 if site.name in WHOLE_CACHE else start

    def change(value: Tensor) -> Tensor:
        new = value.clone()
        shown = new.transpose(1, 2) if site.position_axis == 2 else new
        for row, edit in found:
            put_edit(shown, row, edit, offset)
        return new

    return change


def put_edit(batch: Tensor, row: int, edit: Edit, offset: int) -> None:
    """Write an edit's value into one row of ``[row, position, …]``, in place."""
    target = batch[row]
    places: Any = slice(None) if edit.position is None else edit.position
    if isinstance(places, Tensor):
        places = (places - offset).to(target.device)
    elif edit.position is not None:
        places -= offset
    index = [places, *([] if edit.head is None else [edit.head])]
    if edit.neuron is not None:
        index += [slice(None)] * (target.dim() - 1 - len(index)) + [edit.neuron]
    target[tuple(index)] = edit.value.to(target)


def resume_growing(
    architecture: Architecture,
    base: BaseRun,
    joining: Callable[[int], Tensor | None],
    hooks: Sequence[tuple[Site, Hook]],
    prompts: Tensor,
    start: int,
    read: Sequence[int],
    grows: bool,
) -> Tensor:
    """Run a model on a batch that rows join block by block.

    Args:
        architecture: The model.
        base: What rows start from.
        joining: The streams ``[row, position - start, d_model]`` of the rows that join before a
            block (n: behind the last), or None.
        hooks: Edits in force, which see the rows that have joined so far.
        prompts: ``[row]``, the base prompt of each row, in order of joining.
        start: Only positions from here on are run; the base's cache stands for those before.
        read: Absolute positions whose logits are wanted.
        grows: Whether the model's own inputs are one row, to be broadcast, or one for each.

    Returns:
        ``[row, read, vocab]``.
    """
    n_layers = architecture.n_layers
    found = {layer: new for layer in range(n_layers + 1) if (new := joining(layer)) is not None}
    first = min(found)
    many = base.count > 1

    def rows(count: int) -> Tensor | None:
        return prompts[:count] if many else None

    ids = base.inputs["input_ids"][:, start:]
    ids = ids[:1] if grows else ids[prompts.to(ids.device)]
    with UndoStack() as stack:
        taps = [(architecture.tap(site), hook) for site, hook in hooks]
        _join(stack, architecture, found, first)
        stack.enter_context(attached(taps))
        read_only(stack, architecture, read, start)
        call: dict[str, Any] = {"use_cache": False}
        if start:
            call = {"past_key_values": prefix_cache(base, start, rows, first), "use_cache": True}
        logits = architecture.model(**architecture.inputs(ids), **call).logits
    return logits_at(logits, read, start)


def _join(
    stack: ExitStack, architecture: Architecture, found: Mapping[int, Tensor], first: int
) -> None:
    """Skip the blocks before ``first`` and let rows join before others."""
    n_layers = architecture.n_layers
    if first == n_layers:
        skip_blocks(stack, architecture, [first - 1], result=found[first])
    skip_blocks(stack, architecture, range(min(first, n_layers - 1)))
    for layer, new in found.items():
        if layer < n_layers:
            until_closed(stack, _join_before, architecture, layer, new, layer == first)
        elif first < layer:
            until_closed(stack, _join_behind, architecture, new)


def _join_before(architecture: Architecture, layer: int, new: Tensor, alone: bool) -> Any:
    block, stream = architecture.blocks[layer], architecture.stream

    def join(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        hidden = read_input(args, kwargs)
        joined = new.to(hidden) if alone else torch.cat([stream.show(hidden), new.to(hidden)])
        return write_input(args, kwargs, stream.store(joined))

    # behind the user's own hooks: the streams were recorded behind them
    return block.register_forward_pre_hook(join, with_kwargs=True)


def _join_behind(architecture: Architecture, new: Tensor) -> Any:
    stream = architecture.stream

    def join(_module: nn.Module, _args: Any, output: Any) -> Any:
        hidden = read_hidden(output)
        joined = torch.cat([stream.show(hidden), new.to(hidden)])
        return write_hidden(output, stream.store(joined))

    return architecture.blocks[-1].register_forward_hook(join)
