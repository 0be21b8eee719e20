"""Seeing and changing what a module takes or gives: the hooks of the engine.

A *tap* reaches one site of one model. `ModuleTap` is a tap on the input or output of a module;
`attention_internals` has the others. Hooks run in turn whatever the order in which contexts were
opened: what is upstream first, recorders after edits, and all of them behind the user's own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from enum import IntEnum
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from interrupts import until_closed
from sites import ArchitectureError, Hook, SiteError


class Tap(Protocol):
    """A way to see and change one site of one model."""

    @property
    def module(self) -> nn.Module:
        """The part of the model that it looks at."""

    def attach(self, stack: ExitStack, hook: Hook, last: bool = False) -> None:
        """Attach ``hook``, ``last`` behind all that are not; closing ``stack`` detaches it."""


# --- Reading and writing what modules take and give -----------------------------------------------


def read_hidden(output: Any) -> Tensor:
    """The hidden state in a module's output: the tensor itself, or the first entry of the tuple."""
    return output[0] if isinstance(output, tuple | list) else output


def write_hidden(output: Any, hidden: Tensor) -> Any:
    """``output`` with its hidden state replaced; a new object, the old one is left as it was."""
    if not isinstance(output, tuple | list):
        return hidden
    replaced = (hidden, *output[1:])
    return list(replaced) if isinstance(output, list) else replaced


def read_input(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
    """The hidden state that a module was called with, positionally or by keyword."""
    if args and isinstance(args[0], Tensor):
        return args[0]
    return kwargs[_hidden_keyword(kwargs)]


def write_input(
    args: tuple[Any, ...], kwargs: Mapping[str, Any], hidden: Tensor
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The same call with its hidden state replaced."""
    if args and isinstance(args[0], Tensor):
        return (hidden, *args[1:]), dict(kwargs)
    return args, {**kwargs, _hidden_keyword(kwargs): hidden}


def _hidden_keyword(kwargs: Mapping[str, Any]) -> str:
    if "hidden_states" in kwargs:
        return "hidden_states"
    for name, value in kwargs.items():
        if isinstance(value, Tensor):
            return name
    raise ArchitectureError("a module was called without any tensor, so it has no hidden state")


def replaced(hook: Hook, value: Tensor) -> Tensor:
    """What a hook makes of a value: the same object if nothing changes, else a copy of its answer.

    The copy lies on the value's device in its dtype; it is one because some models add to what
    they are given in place, and the hook's own tensor must not change.

    Raises:
        SiteError: the answer has another shape, or the hook wrote into the value it was shown.
    """
    version = None if value.is_inference() else value._version
    new = hook(value)
    if version is not None and value._version != version:
        raise SiteError("an edit must not write into the value it is shown: change value.clone()")
    if new is None or new is value:
        return value
    return _checked_replacement(new, value)


def _checked_replacement(new: Tensor, old: Tensor) -> Tensor:
    if not isinstance(new, Tensor) or new.shape != old.shape:
        came = tuple(new.shape) if isinstance(new, Tensor) else type(new).__name__
        raise SiteError(
            f"an edit must return a tensor of shape {tuple(old.shape)} or None; it returned {came}"
        )
    return new.to(device=old.device, dtype=old.dtype, copy=True)


# --- The shape of the residual stream -------------------------------------------------------------


@dataclass(frozen=True)
class StreamShape:
    """How blocks hand the residual stream on, against ``[batch, position, d_model]`` of a site.

    Some models carry several streams side by side: ``[stream, batch, position, d]`` (AltUp, in
    Gemma 3n) or ``[batch, position, stream, d]`` (hyper-connections). A site then has
    ``stream·d`` entries on its last axis.
    """

    streams: int = 1
    first: bool = False
    """Whether the axis of streams comes first; else it is the last but one."""

    def show(self, hidden: Tensor) -> Tensor:
        """What blocks take and give, as ``[batch, position, d_model]``."""
        if self.streams == 1:
            return hidden
        return (hidden.permute(1, 2, 0, 3) if self.first else hidden).flatten(-2)

    def store(self, value: Tensor) -> Tensor:
        """The inverse of `show`."""
        if self.streams == 1:
            return value
        split = value.unflatten(-1, (self.streams, -1))
        return split.permute(2, 0, 1, 3).contiguous() if self.first else split


PLAIN = StreamShape()
"""One stream, ``[batch, position, d_model]``."""


# --- Taps on modules ------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class ModuleTap:
    """The input or output of a module, seen as a site.

    The site's value is ``scale * hidden``, plus the input of ``block`` where ``adds_block_input``
    says so (that is ``resid_mid``), with the last axis split into ``heads`` where a number is
    given. A module that sees ``[batch·position, d]`` needs its ``block`` too, to know the batch.
    """

    module: nn.Module
    at_input: bool = False
    heads: int | None = None
    scale: float = 1.0
    block: nn.Module | None = None
    adds_block_input: bool = False
    stream: StreamShape = PLAIN
    """Of a tap on a block: how the stream that it takes and gives is shaped."""

    def attach(self, stack: ExitStack, hook: Hook, last: bool = False) -> None:
        """Attach ``hook`` to the module; closing ``stack`` detaches it."""
        block_input: list[Tensor] = []
        if self.block is not None:

            def remember(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
                block_input[:] = [read_input(args, kwargs)]

            stack.callback(block_input.clear)
            hook_in_turn(stack, self.block, remember, Turn.REMEMBER, before=True)
        turn = Turn.of(last, self.adds_block_input)
        if self.at_input:

            def before(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
                hidden = read_input(args, kwargs)
                new = self._apply(hook, hidden, block_input)
                return None if new is hidden else write_input(args, kwargs, new)

            hook_in_turn(stack, self.module, before, turn, before=True)
        else:

            def after(_module: nn.Module, _args: tuple[Any, ...], output: Any) -> Any:
                hidden = read_hidden(output)
                new = self._apply(hook, hidden, block_input)
                return None if new is hidden else write_hidden(output, new)

            hook_in_turn(stack, self.module, after, turn, before=False)

    def _apply(self, hook: Hook, hidden: Tensor, block_input: list[Tensor]) -> Tensor:
        """What shall stand in the place of ``hidden``; the same object if nothing changes."""
        if self.stream.streams > 1:
            shown = self.stream.show(hidden)
            new = replaced(hook, shown)
            return hidden if new is shown else self.stream.store(new)
        value = hidden
        if self.block is not None and hidden.dim() == 2:
            value = value.view(*block_input[0].shape[:-1], -1)
        if self.scale != 1.0:
            value = value * self.scale
        if self.adds_block_input:
            value = block_input[0] + value
        if self.heads is not None:
            value = value.unflatten(-1, (self.heads, -1))
        new = replaced(hook, value)
        if new is value:
            return hidden
        if not self.adds_block_input and self.scale == 1.0:
            return new.reshape(hidden.shape)
        if value.requires_grad:  # the new value alone must carry the gradient
            base = block_input[0] if self.adds_block_input else torch.zeros_like(new)
            return ((new - base) / self.scale).view_as(hidden)
        return hidden + ((new - value) / self.scale).view_as(hidden)


@dataclass(frozen=True, eq=False)
class WithinBlock:
    """A tap on a module that several blocks share, in force while one of them runs."""

    tap: Tap
    block: nn.Module

    @property
    def module(self) -> nn.Module:
        """The module that is shared."""
        return self.tap.module

    def attach(self, stack: ExitStack, hook: Hook, last: bool = False) -> None:
        """Attach ``hook``; closing ``stack`` detaches it."""
        running = [False]

        def enter(*_: Any) -> None:
            running[0] = True

        def leave(*_: Any) -> None:
            running[0] = False

        def guarded(value: Tensor) -> Tensor | None:
            return hook(value) if running[0] else None

        until_closed(stack, self.block.register_forward_pre_hook, enter)
        until_closed(stack, self.block.register_forward_hook, leave, always_call=True)
        self.tap.attach(stack, guarded, last)


class Turn(IntEnum):
    """When hooks of this file on one module run: what is upstream first, recorders after edits."""

    EDIT = 0
    RECORD = 1
    EDIT_SUM = 2
    RECORD_SUM = 3
    REMEMBER = 4

    @classmethod
    def of(cls, last: bool, adds_block_input: bool) -> Turn:
        """The turn of an edit or a recorder (``last``), of a writer or of the sum it makes."""
        return cls(2 * adds_block_input + last)


_TURN = "_forward_pass_turn"


def hook_in_turn(
    stack: ExitStack, module: nn.Module, hook: Callable[..., Any], turn: Turn, *, before: bool
) -> None:
    """Attach a hook and put all hooks of this file on that module in turn, behind everyone else's.

    So the order does not depend on which context was opened first.
    """
    setattr(hook, _TURN, turn)
    if before:
        until_closed(stack, module.register_forward_pre_hook, hook, with_kwargs=True)
        table: dict[int, Any] = module._forward_pre_hooks
    else:
        until_closed(stack, module.register_forward_hook, hook)
        table = module._forward_hooks
    ours = [number for number, each in table.items() if hasattr(each, _TURN)]
    for number in sorted(ours, key=lambda number: getattr(table[number], _TURN)):
        table[number] = table.pop(number)
