"""What a block's modules take and give in one forward pass, noted while it runs.

`structure_probe` works out from it what the block is made of.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch import Tensor, nn

from attention_internals import AttentionCall
from expert_routing import Routing, find_routing
from forward_pass import ArchitectureError, read_hidden, read_input
from interrupts import until_closed

PROBE_LENGTH = 5
"""Tokens in the pass that is watched."""


@dataclass(frozen=True, eq=False)
class SeenModule:
    """One module's call inside a block, as the probe saw it."""

    path: str
    module: nn.Module
    entered: Tensor | None
    left: Tensor | None
    order: int
    """When it left, on the probe's clock."""
    routing: Routing | None = None


class BlockTrace:
    """What the probe saw in one block: its input, its output, its modules in order of leaving."""

    def __init__(self, block: nn.Module, clock: Iterator[int]) -> None:
        self.block, self.clock = block, clock
        self.pre: Tensor
        self.post: Tensor
        self.outputs = 0
        self.names: Sequence[str] = ()
        """Names of the entries of a named tuple that it returned."""
        self.handed: list[Any] = []
        """What it was called with beside the hidden state."""
        self.extras: list[Tensor] = []
        """What it returned beside the hidden state."""
        self.grown: list[tuple[Mapping[Any, Any], int]] = []
        """Mappings it was called with, and their sizes then."""
        self.runs = 0
        self.seen: list[SeenModule] = []
        """In order of leaving."""
        self.calls: list[AttentionCall] = []

    @cached_property
    def once(self) -> list[SeenModule]:
        """Those of ``seen`` that ran a single time, so that a tap on them is unambiguous."""
        counts = Counter(seen.path for seen in self.seen)
        return [seen for seen in self.seen if counts[seen.path] == 1]


def trace_block(stack: ExitStack, block: nn.Module, clock: Iterator[int]) -> BlockTrace:
    """Note everything about one block and its modules until ``stack`` closes."""
    trace = BlockTrace(block, clock)
    for path, module in block.named_modules():
        trace_module(stack, trace, path, module)
    _trace_hand_over(stack, trace)
    return trace


def _trace_hand_over(stack: ExitStack, trace: BlockTrace) -> None:
    """Note what a block is given and gives beside the hidden state (held, so that it stays)."""

    def before(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        trace.runs += 1
        given = [*args[1:], *kwargs.values()]
        nested = [each for value in given if isinstance(value, tuple | list) for each in value]
        trace.handed = [*given, *nested]
        trace.grown = [(value, len(value)) for value in given if isinstance(value, Mapping)]

    def after(_module: nn.Module, _args: Any, output: Any) -> None:
        extras = output[1:] if isinstance(output, tuple | list) else ()
        nested = [each for value in extras if isinstance(value, tuple | list) for each in value]
        trace.extras = [each for each in (*extras, *nested) if isinstance(each, Tensor)]

    until_closed(stack, trace.block.register_forward_pre_hook, before, with_kwargs=True)
    until_closed(stack, trace.block.register_forward_hook, after)


def trace_module(stack: ExitStack, trace: BlockTrace, path: str, module: nn.Module) -> None:
    """Note what a module takes and gives; ``""`` is the block itself."""
    under_way: list[Tensor | None] = []

    def before(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        try:
            hidden = read_input(args, kwargs).clone()
        except ArchitectureError:
            hidden = None
        under_way.append(hidden)
        if path == "" and hidden is not None:
            trace.pre = hidden

    def after(module: nn.Module, _args: Any, output: Any) -> None:
        hidden = read_hidden(output) if output is not None and not _is_empty(output) else None
        hidden = hidden.clone() if isinstance(hidden, Tensor) else None
        entered = under_way.pop()
        if path:
            routing = find_routing(output)
            trace.seen.append(SeenModule(path, module, entered, hidden, next(trace.clock), routing))
        elif hidden is not None:
            trace.post = hidden
            trace.outputs = len(output) if isinstance(output, tuple | list) else 0
            trace.names = getattr(output, "_fields", ())

    until_closed(stack, module.register_forward_pre_hook, before, with_kwargs=True)
    until_closed(stack, module.register_forward_hook, after)


def _is_empty(output: Any) -> bool:
    return isinstance(output, tuple | list) and not output


def running_module(stack: ExitStack, blocks: Sequence[nn.Module]) -> Any:
    """A function that names the innermost module under way inside the blocks."""
    under_way: list[nn.Module] = []
    for block in blocks:
        for module in block.modules():
            until_closed(
                stack, module.register_forward_pre_hook, lambda m, _args: under_way.append(m)
            )
            until_closed(stack, module.register_forward_hook, lambda *_: under_way.pop() and None)
    return lambda: under_way[-1] if under_way else None
