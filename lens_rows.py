"""How many logits a lens makes at once: chunks of positions, and rows that share a head call.

The full vocabulary's logits are the largest tensors of a lens; whatever the number of layers and
positions, no more of them are alive than fit into these bounds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor

CHUNK_VALUES = 2**24
"""Logits made at once: positions × vocabulary of one layer stay below this (64 MiB in float32)."""

CHUNK_VALUES_OF_A_GPU = 2**26
"""The same on a GPU (256 MiB), where a call costs more than what it computes."""

GROUP_VALUES = 2**20
"""On a CPU rows go through the head together up to this many logits: what is made stays in its
cache. On a GPU they do up to `CHUNK_VALUES_OF_A_GPU`."""


def position_chunks(count: int, vocabulary: int, device: torch.device) -> Iterator[slice]:
    """Slices of ``count`` positions, each of at most `CHUNK_VALUES` logits on that device."""
    size = max(1, (CHUNK_VALUES if device.type == "cpu" else CHUNK_VALUES_OF_A_GPU) // vocabulary)
    for start in range(0, count, size):
        yield slice(start, min(start + size, count))


def logits_by_row(
    streams: Mapping[str, Callable[[], Tensor]],
    known: Mapping[str, Tensor],
    to_logits: Callable[[Tensor], Tensor],
    vocabulary: int,
    device: torch.device,
) -> Iterator[tuple[str, Tensor]]:
    """Each row's logits ``[position, vocab]`` in turn; those that fit are made in one call.

    Args:
        streams: For each row what gives its stream ``[position, d_model]``.
        known: The logits of rows that are had already.
        to_logits: ``[row, position, d_model]`` to ``[row, position, vocab]``.
        vocabulary: Logits per position.
        device: Where the streams go.
    """
    missing = [row for row in streams if row not in known]
    made: dict[str, Tensor] = dict(known)
    budget = GROUP_VALUES if device.type == "cpu" else CHUNK_VALUES_OF_A_GPU
    for row in streams:
        if row not in made:
            first = streams[missing[0]]().to(device)
            size = max(1, budget // (len(first) * vocabulary))
            group, missing = missing[:size], missing[size:]
            rest = [streams[each]().to(device) for each in group[1:]]
            made.update(zip(group, to_logits(torch.stack([first, *rest])), strict=True))
        yield row, made.pop(row)
