"""The unmodified run that edited ones start from: residual streams, keys and values, logits.

`run_base` records one forward pass of some prompts of one length; `prefix_cache` hands its keys and
values of earlier positions to passes that run only later ones; `read_only` lets only the positions
whose logits are read into the head.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from forward_pass import (
    Hook,
    Recording,
    Site,
    attached,
    evaluate,
    read_input,
    recording,
    take_positions,
    write_input,
)
from interrupts import UndoStack, until_closed
from model_architecture import Architecture
from tokenization import resolve_positions


@dataclass(frozen=True, eq=False)
class BaseRun:
    """The unmodified forward passes of some prompts of one length."""

    inputs: Mapping[str, Tensor]
    """What the model's ``forward`` took: ``input_ids [prompt, position]``."""
    streams: tuple[Tensor, ...]
    """``[prompt, position, d_model]`` each: what enters block ``i``; last, what leaves n-1."""
    cache: tuple[tuple[Tensor, Tensor] | None, ...]
    """Keys and values of each block, ``[prompt, kv_head, position, d_head]``; empty: not kept."""
    sites: Recording
    """Other sites that were asked for, at all positions."""
    logits: Tensor
    """``[prompt, read, vocab]`` at the positions read."""
    read: tuple[int, ...]
    """Absolute positions of which logits are made, ascending."""

    @property
    def length(self) -> int:
        """Tokens of a prompt."""
        return int(self.inputs["input_ids"].shape[1])

    @property
    def count(self) -> int:
        """Number of prompts."""
        return int(self.inputs["input_ids"].shape[0])


def run_base(
    architecture: Architecture,
    ids: Tensor,
    sites: Sequence[Site] = (),
    read: Sequence[int] = (-1,),
    *,
    cached: bool,
    edits: Sequence[tuple[Site, Hook]] = (),
) -> BaseRun:
    """Run prompts unmodified and keep what runs that edit them start from.

    Args:
        architecture: The model, with a head.
        ids: ``[prompt, position]``, without padding.
        sites: More sites to keep, of all positions.
        read: Positions whose logits are wanted, negative from the end.
        cached: Keep keys and values too (`edited_runs.abilities` says whether they are of use).
        edits: Functions in force during this pass (a corruption that belongs to the base).

    Returns:
        The base run; everything is detached.

    Raises:
        InputError: a position that is read is none of the prompts'.
    """
    length, n_layers = ids.shape[1], architecture.n_layers
    wanted = sorted({resolve_positions([position], length)[0] for position in read})
    streams = [Site("resid_pre", layer) for layer in range(n_layers)]
    streams.append(Site("resid_post", n_layers - 1))
    inputs = architecture.inputs(ids)
    cache = _new_cache(None) if cached else None
    with UndoStack() as stack:
        stack.enter_context(torch.no_grad())
        evaluate(stack, architecture.model)
        taps = [(architecture.tap(site), hook) for site, hook in edits]
        kept = stack.enter_context(recording(architecture, [*dict.fromkeys([*streams, *sites])]))
        stack.enter_context(attached(taps))
        read_only(stack, architecture, wanted)
        call: dict[str, Any] = {"past_key_values": cache} if cached else {}
        logits = architecture.model(**inputs, use_cache=cached, **call).logits
    return BaseRun(
        inputs=inputs,
        streams=tuple(kept[site] for site in streams),
        cache=_held(cache, n_layers) if cached else (),
        sites=kept,
        logits=logits_at(logits, wanted),
        read=tuple(wanted),
    )


def logits_at(logits: Tensor, positions: Sequence[int], offset: int = 0) -> Tensor:
    """The logits of some positions, ``[row, read, vocab]``; they may be cut to these already.

    Args:
        logits: ``[row, position - offset, vocab]``, or of the positions alone.
        positions: Absolute positions.
        offset: Position of the first column.
    """
    if logits.shape[1] == len(positions):
        return logits.clone()
    return take_positions(logits, torch.tensor([p - offset for p in positions], device="cpu"), 1)


def read_only(
    stack: ExitStack, architecture: Architecture, positions: Sequence[int], offset: int = 0
) -> None:
    """Let only some absolute positions into the head until ``stack`` closes.

    ``offset`` is the position of the first column of the pass.
    """
    head: Any = architecture.model.get_output_embeddings()
    index = torch.tensor([position - offset for position in positions], device="cpu")

    def cut(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        hidden = read_input(args, kwargs)
        if hidden.dim() != 3 or hidden.shape[1] <= len(index):
            return None
        return write_input(args, kwargs, hidden.index_select(1, index.to(hidden.device)))

    until_closed(stack, head.register_forward_pre_hook, cut, with_kwargs=True)


# --- Keys and values of earlier positions ---------------------------------------------------------


@lru_cache(maxsize=1)
def _cache_class() -> type:
    from transformers import DynamicCache

    class PrefixCache(DynamicCache):
        """Hands out a fixed prefix before whatever a pass computes, and keeps nothing of it."""

        rows: Callable[[int], Tensor | None] | None = None
        """Prompt of each of the first so many rows; None where there is one prompt."""

        def update(
            self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kw: Any
        ) -> tuple[Tensor, Tensor]:
            """Keys and values of prefix and pass, ``[row, kv_head, position, d_head]``."""
            if self.rows is None:
                return super().update(key_states, value_states, layer_idx, *args, **kw)
            held: Any = self.layers[layer_idx]
            count = len(key_states)
            chosen = self.rows(count)
            joined = []
            for prefix, new in ((held.keys, key_states), (held.values, value_states)):
                many = prefix.expand(count, -1, -1, -1) if chosen is None else prefix[chosen]
                joined.append(torch.cat([many, new], dim=2))
            return joined[0], joined[1]

    return PrefixCache


def _new_cache(rows: Callable[[int], Tensor | None] | None) -> Any:
    cache = _cache_class()()
    cache.rows = rows
    return cache


def _held(cache: Any, n_layers: int) -> tuple[tuple[Tensor, Tensor] | None, ...]:
    layers = [cache.layers[i] if i < len(cache.layers) else None for i in range(n_layers)]
    return tuple(
        (layer.keys, layer.values) if layer is not None and layer.is_initialized else None
        for layer in layers
    )


def prefix_cache(
    base: BaseRun, length: int, rows: Callable[[int], Tensor | None], first: int
) -> Any:
    """A cache that holds the first positions of the base run and keeps nothing new.

    Args:
        base: The base run, with its keys and values.
        length: How many positions.
        rows: Given a number of rows, the base prompt of each; None where there is one prompt.
        first: The first block that will ask for it.
    """
    cache = _new_cache(None)
    for layer, held in enumerate(base.cache):
        if held is not None:
            part = tuple(each[:, :, :length] for each in held)
            # blocks that are skipped only need the length
            small = part if layer >= first else tuple(each[:1, :1] for each in part)
            cache.update(*small, layer)
    cache.rows = rows
    return cache
