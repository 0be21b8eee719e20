"""The vocabulary of the toolkit: places in the network, and what can be wrong with a request.

- `SITES`: the name of every place and the axes of what is found there (TransformerLens' names).
- `Site`: a name and a layer. Layer 0 is the first block; the embedding is a site of its own.
- `Hook`: a function that sees a site's value and may put another in its place.
- The errors; each is a ValueError or RuntimeError too.
- `check_count`: whether a number counts something.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor

SITES: dict[str, str] = {
    "embed": "batch position d_model: what enters block 0 (tokens, positions, norm and multiplier)",
    "resid_pre": "batch position d_model: the residual stream that enters block i",
    "resid_mid": "batch position d_model: between attention and MLP (not in parallel blocks)",
    "resid_post": "batch position d_model: the residual stream that leaves block i",
    "attn_out": "batch position d_model: what attention adds to the residual stream",
    "mlp_out": "batch position d_model: what the MLP adds to the residual stream",
    "head_out": "batch position head d_head: z, the input of attention's output projection",
    "mlp_neurons": "batch position d_mlp: the input of the MLP's down projection",
    "query": "batch position head d_head: after rotary embedding and query norm",
    "key": "batch position kv_head d_head: after rotary embedding and key norm, as stored",
    "value": "batch position kv_head d_head: as stored",
    "attn_pattern": "batch head query key: attention probabilities",
    "router_logits": "batch position expert: what a mixture's router gives each expert (read only)",
    "router_probs": "batch position expert: softmax or sigmoid of these (read only)",
    "expert_weights": "batch position expert: weight of each expert's output, 0 if not chosen",
}
"""Every site and its axes.

Only ``attn_pattern`` has its (query) position on axis 2, all others on 1.
"""

READ_ONLY = ("router_logits", "router_probs")
"""Sites that can be recorded, not edited."""


def read_only_message(name: str) -> str:
    """Why a site of `READ_ONLY` cannot be edited, and what to edit instead."""
    return f"{name!r} can only be recorded; edit 'expert_weights' instead"


class LayerError(KeyError, ValueError):
    """A layer that the model, or the record, does not have."""

    def __str__(self) -> str:
        """The message as written (a KeyError would quote it)."""
        return str(self.args[0]) if self.args else ""


class SiteError(ValueError):
    """A site that does not exist or that this model does not have, or a value that does not fit."""


class ArchitectureError(RuntimeError):
    """A model whose structure could not be understood, or failed its numeric check."""


class InputError(ValueError):
    """A prompt, token list or position that cannot be run."""


class RecordFileError(ValueError):
    """A file that cannot be written, or cannot be read as what it should be."""


class Site(NamedTuple):
    """A place in the network: a name out of `SITES`, and its block (0 is the first)."""

    name: str
    layer: int

    @property
    def position_axis(self) -> int:
        """The axis that counts tokens (the query's tokens, for a pattern)."""
        return 2 if self.name == "attn_pattern" else 1


Hook = Callable[[Tensor], Tensor | None]
"""Sees a site's value; returns what shall stand in its place, or None to leave it."""


# --- Numbers that count something -----------------------------------------------------------------


def is_count(number: Any, most: float = math.inf) -> bool:
    """Whether it is one integer, of any library, from 1 to ``most``; a truth value is none."""
    try:
        whole = operator.index(number)
    except TypeError:
        return False
    return not isinstance(number, bool) and 1 <= whole <= most


def check_count(number: Any, name: str) -> None:
    """Refuse what is no number of things.

    Args:
        number: What came.
        name: What it counts, for the message.

    Raises:
        InputError: it is no integer (a truth value is none), or below 1.
    """
    if not is_count(number):
        raise InputError(f"{name} must be at least 1; came {number!r} (a whole number is wanted)")


def check_batch_size(batch_size: Any) -> None:
    """The same for a number of rows per pass.

    Raises:
        InputError: see `check_count`.
    """
    check_count(batch_size, "batch_size")
