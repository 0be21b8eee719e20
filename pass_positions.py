"""Which tokens the forward pass under way holds, and which of them a specification means.

Positions are absolute: they count a row's real tokens from 0, through left padding and through the
KV cache, so that the same specification means the same tokens with and without a cache. What it is
resolved against is the *prompt*: the tokens of the first pass of a sequence.

- ``None``, ``"all"``: every token; ``"prompt"``: those of the prompt; ``"generated"``: those after.
- ``-1``, ``"last"``: the last token of the prompt; other negative positions count back from there.
- ``5``, ``[0, 5]``, ``slice(2, None)``: those tokens, whether in the prompt or generated.

`SequenceClock` follows the passes of a model; `SequenceClock.select` names the columns.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from forward_pass import ArchitectureError, Clock, InputError
from interrupts import until_closed

PassPositions = str | int | slice | Sequence[int] | Tensor | np.ndarray | None
"""Which tokens: see the head of this module."""

CLASSES = ("all", "prompt", "generated", "last")
"""Positions that have a name."""


def check_spec(positions: PassPositions) -> PassPositions:
    """A specification as None, a name, an integer, a slice or a list of integers.

    Raises:
        InputError: it is none of these, an empty list, or names a token twice.
    """
    if isinstance(positions, str):
        if positions in CLASSES:
            return None if positions == "all" else -1 if positions == "last" else positions
        raise InputError(f"positions {positions!r} is none of {', '.join(CLASSES)}")
    if positions is None:
        return None
    if isinstance(positions, slice):
        return _check_slice(positions)
    if isinstance(positions, Tensor | np.ndarray):
        positions = positions.tolist()
    try:
        if hasattr(positions, "__index__"):
            return _as_integer(positions)
        asked = [_as_integer(position) for position in positions]
    except TypeError:
        raise InputError(
            f"positions is an index, a list of them, a slice, None or one of {', '.join(CLASSES)}; "
            f"came {positions!r}"
        ) from None
    if not asked or len(set(asked)) != len(asked):
        raise InputError(f"positions must name at least one token, each once; came {asked}")
    return asked


def _as_integer(value: Any) -> int:
    """An integer of any library; TypeError for all else, truth values (no mask is meant) too."""
    if isinstance(value, bool) or "bool" in str(getattr(value, "dtype", "")):
        raise TypeError("a truth value is no index")
    return operator.index(value)


def _check_slice(positions: slice) -> slice:
    try:
        parts = [
            None if part is None else _as_integer(part)
            for part in (positions.start, positions.stop, positions.step)
        ]
    except TypeError:
        raise InputError(f"a slice of positions is made of integers; came {positions}") from None
    if parts[2] is not None and parts[2] < 1:
        raise InputError(f"a slice of positions must step forwards; came {positions}")
    return slice(*parts)


class Selection(NamedTuple):
    """Some tokens of the pass under way, row by row.

    Each tensor is ``[batch, k]`` where all rows have the same number of them, else ``[1, n]``.
    """

    rows: Tensor
    """Row of each token."""
    columns: Tensor
    """Its column in the site's value."""
    order: Tensor
    """Which entry of a list of positions it is; without a list, the n-th token that is meant."""


class SequenceClock(Clock):
    """A `Clock` that also knows where the prompt ended and where each row's padding lies.

    A pass from position 0 begins a new sequence, unless it was called with ``use_cache=False`` and
    reads the sequence so far and one token more: so generates a model without a cache.
    """

    def __init__(self) -> None:
        super().__init__()
        self.passes = 0
        """Passes since the clock was attached."""
        self.generated = False
        """Whether a pass since then held tokens that are not of a prompt."""
        self.prompt_lengths = torch.zeros(0, dtype=torch.long, device="cpu")
        """Real tokens of each row's prompt, ``[batch]``."""
        self._numbers = torch.zeros(0, 0, dtype=torch.long, device="cpu")
        """Absolute position of each of the prompt's columns, -1 at padding, ``[batch, column]``."""
        self._prompt: Tensor | None = None
        self._listeners: list[Any] = []
        self._selected: dict[tuple[str, int | None], Selection] = {}
        """What specifications mean in the pass under way; several sites ask for the same."""

    @property
    def batch(self) -> int:
        """Rows of the pass under way."""
        return len(self.prompt_lengths)

    def attach(self, stack: ExitStack, body: nn.Module) -> None:
        """Follow every call of ``body`` until ``stack`` closes."""
        super().attach(stack, body)
        until_closed(stack, body.register_forward_pre_hook, self._announce, with_kwargs=True)

    def announce_to(self, listener: Any) -> None:
        """Call ``listener()`` before the blocks of every pass run."""
        self._listeners.append(listener)

    def _announce(self, _module: nn.Module, _args: Any, _kwargs: Any) -> None:
        for listener in self._listeners:
            listener()

    def _tick(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        before = self.offset, self.length
        self._selected.clear()
        super()._tick(module, args, kwargs)
        given: tuple[Any, ...] = (*args[:1], kwargs.get("input_ids"), kwargs.get("inputs_embeds"))
        tokens: Tensor = next(each for each in given if isinstance(each, Tensor))
        self.passes += 1
        if self.offset == 0:
            uncached = kwargs.get("use_cache") is False
            if not (uncached and self._continues(tokens, before)):
                self._start(tokens, kwargs.get("attention_mask"))
                return
        elif self.batch != tokens.shape[0]:
            self._repeat_rows(tokens.shape[0])
        self.generated = True

    def _continues(self, tokens: Tensor, before: tuple[int, int]) -> bool:
        """Whether an uncached pass reads the same prompt again and one token more."""
        prompt = self._prompt
        return (
            prompt is not None
            and tokens.dim() == 2
            and before[0] == 0
            and tokens.shape == (prompt.shape[0], before[1] + 1)
            and bool((tokens[:, : prompt.shape[1]] == prompt).all())
        )

    def _start(self, tokens: Tensor, mask: Any) -> None:
        batch, columns = tokens.shape[:2]
        self._prompt = tokens.detach().clone() if tokens.dim() == 2 else None
        real = torch.ones(batch, columns, dtype=torch.bool, device="cpu")
        if isinstance(mask, Tensor) and mask.dim() == 2:
            real = mask[:, :columns].bool().cpu()
        elif mask is not None and batch > 1:
            raise ArchitectureError(
                "padding cannot be seen in an attention mask that is not [batch, position]: "
                "pass the 2-D mask of the tokenizer"
            )
        self.prompt_lengths = real.sum(1)
        self._numbers = torch.where(real, real.long().cumsum(1) - 1, -1)

    def _repeat_rows(self, batch: int) -> None:
        if not self.batch:
            raise InputError(
                "the sequence began before the interventions were in force, so that nothing is "
                "known of its prompt: open the handler before the first pass"
            )
        if batch % self.batch:
            raise ArchitectureError(
                f"the batch changed from {self.batch} rows to {batch} in a sequence"
            )
        times = batch // self.batch
        self.prompt_lengths = self.prompt_lengths.repeat_interleave(times)
        self._numbers = self._numbers.repeat_interleave(times, dim=0)

    # --- What a specification means in this pass -------------------------------------------------

    def select(self, positions: PassPositions, first: int | None = None) -> Selection:
        """The tokens of the pass under way that a checked specification means; maybe none.

        Args:
            positions: As `check_spec` returns it.
            first: Column of the sequence that comes first in the site's value (keys and values of
                a cache begin earlier than the pass); None is the first of the pass.

        Raises:
            InputError: a negative position lies before the start of a row's prompt.
        """
        key = repr(positions), first
        if key not in self._selected:
            self._selected[key] = self._select(positions, first)
        return self._selected[key]

    def _select(self, positions: PassPositions, first: int | None) -> Selection:
        end = self.offset + self.length
        lengths = self.prompt_lengths[:, None]
        later = lengths + torch.arange(max(end - self._numbers.shape[1], 0), device="cpu")
        absolute = torch.cat([self._numbers, later], 1)  # [batch, column of the sequence]
        absolute = absolute[:, self.offset if first is None else first : end]
        order = _order(positions, absolute, lengths)
        wanted = (order >= 0) & (absolute >= 0)
        counts = wanted.sum(1)
        ragged = bool((counts != counts[0]).any())
        shape = (1, -1) if ragged else (len(counts), int(counts[0]))
        rows, local = wanted.nonzero(as_tuple=True)
        place = order[rows, local].reshape(shape)
        return Selection(rows.reshape(shape), local.reshape(shape), place)


def _order(positions: Any, absolute: Tensor, lengths: Tensor) -> Tensor:
    """For each column, which of the tokens meant it is; negative where it is none of them."""
    if positions is None:
        return absolute
    if positions == "prompt":
        return torch.where(absolute < lengths, absolute, -1)
    if positions == "generated":
        return absolute - lengths
    if isinstance(positions, slice):
        return _order_in_slice(positions, absolute, lengths)
    asked = positions if isinstance(positions, list) else [positions]
    order = torch.full_like(absolute, -1)
    for place, position in enumerate(asked):
        counted = _absolute(position, lengths)
        if bool((counted < 0).any()):
            row = int((counted < 0).flatten().nonzero()[0])
            raise InputError(
                f"position {position} lies before the start of row {row}, whose prompt has "
                f"{int(lengths[row])} tokens"
            )
        order = torch.where(absolute == counted, place, order)
    return order


def _absolute(position: int, lengths: Tensor) -> Tensor:
    return lengths + position if position < 0 else torch.full_like(lengths, position)


def _order_in_slice(positions: slice, absolute: Tensor, lengths: Tensor) -> Tensor:
    step = positions.step or 1
    start = _absolute(positions.start or 0, lengths).clamp(min=0)
    inside = (absolute >= start) & ((absolute - start) % step == 0)
    if positions.stop is not None:
        inside &= absolute < _absolute(positions.stop, lengths)
    return torch.where(inside, (absolute - start) // step, -1)
