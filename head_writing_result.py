"""What heads write on a prompt, kept: value-weighted patterns and direct effects.

See `head_writing`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from forward_pass import InputError
from head_circuit_result import Kept, head_place
from sites import check_count
from token_labels import can_draw, readable_token

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True, eq=False)
class WeightedPatterns(Kept):
    """Attention patterns, and the length of what each token would give to each head."""

    KIND: ClassVar[str] = "value-weighted patterns"

    patterns: np.ndarray
    """``[layer, head, query, key]``, attention probabilities; NaN where there is no such head."""
    lengths: np.ndarray
    """``[layer, head, key]``: ‖v W_O‖ of each token's value, biases of the output left out."""
    layers: tuple[int, ...]
    tokens: tuple[str, ...]
    """The prompt's, one per position."""

    def __repr__(self) -> str:
        layers, heads, length = self.lengths.shape
        return f"WeightedPatterns({layers} layers × {heads} heads, {length} tokens)"

    @property
    def weighted(self) -> np.ndarray:
        """``[layer, head, query, key]``: the length of what each head takes from each token.

        A gate, a norm, or a multiplier behind attention is not in it; without these, it is the
        length of what is added to the stream.
        """
        return self.patterns * self.lengths[:, :, None]

    def of(self, head: str, weighted: bool = True) -> np.ndarray:
        """One head's ``[query, key]``.

        Args:
            head: ``"4.2"``.
            weighted: With False the plain pattern.

        Raises:
            InputError: there is no such head.
        """
        place = head_place(head, self.layers, self.patterns.shape[1])
        return self.patterns[place] * (self.lengths[place] if weighted else 1)

    def to_frame(self) -> pd.DataFrame:
        """One row per head, query and key (not after it): with ``pattern`` and ``weighted``."""
        import pandas as pd

        seen = ~np.isnan(self.patterns) & np.tri(len(self.tokens), dtype=bool)
        layer, head, query, key = np.nonzero(seen)
        numbers = np.array(self.layers)[layer]
        columns = {
            "head": [f"{a}.{b}" for a, b in zip(numbers, head, strict=True)],
            "query": query,
            "query_token": [self.tokens[i] for i in query],
            "key": key,
            "key_token": [self.tokens[i] for i in key],
            "pattern": self.patterns[seen],
            "weighted": self.weighted[seen],
        }
        return pd.DataFrame(columns)

    def plot(self, head: str, weighted: bool = True, **options: Any) -> Any:
        """One head: query tokens down, key tokens across.

        Args:
            head: ``"4.2"``.
            weighted: With False the plain pattern.
            **options: For `attention_figures.plot_pattern`.

        Raises:
            InputError: there is no such head.
        """
        from attention_figures import plot_pattern

        what = "length of what is moved" if weighted else "attention"
        chosen: dict[str, Any] = {"title": f"Head {head}: {what}", "name": what}
        return plot_pattern(self.of(head, weighted), self.tokens, **(chosen | options))


@dataclass(frozen=True, eq=False)
class HeadWrites(Kept):
    """What each head adds to the logits of one position, directly."""

    KIND: ClassVar[str] = "head writes"

    values: np.ndarray
    """``[layer, head, target]``: logits added to each target, later blocks' use of it left out."""
    lengths: np.ndarray
    """``[layer, head]``, of the vector that the head adds to the residual stream."""
    top_values: np.ndarray
    """``[layer, head, sign, rank]``: logits added to the tokens that it raises, and lowers, most.

    Relative to the mean over the vocabulary.
    """
    top_ids: np.ndarray
    """``[layer, head, sign, rank]``, these tokens; -1 where there is no such head."""
    top_tokens: tuple[tuple[tuple[tuple[str, ...], ...], ...], ...]
    """``top_ids`` as text."""
    targets: tuple[str, ...]
    logits: tuple[float, ...]
    """Of the targets, as the model gives them."""
    layers: tuple[int, ...]
    tokens: tuple[str, ...]
    """The prompt's, one per position."""
    position: int
    before_cap: bool = False
    """Whether the model bends its logits (a soft-cap): the values are of the logits before that."""

    def __repr__(self) -> str:
        layers, heads, _ = self.values.shape
        names = ", ".join(map(repr, self.targets))
        return f"HeadWrites({layers} layers × {heads} heads, {names} at position {self.position})"

    def to_frame(self) -> pd.DataFrame:
        """One row per head and target: ``head, target, value, length, raises, lowers``."""
        import pandas as pd

        layer, head, target = np.nonzero(~np.isnan(self.values))
        numbers = np.array(self.layers)[layer]
        best = [self.top_tokens[i][j] for i, j in zip(layer, head, strict=True)]
        columns = {
            "head": [f"{a}.{b}" for a, b in zip(numbers, head, strict=True)],
            "target": [self.targets[i] for i in target],
            "value": self.values[layer, head, target],
            "length": self.lengths[layer, head],
            "raises": [signs[0] for signs in best],
            "lowers": [signs[1] for signs in best],
        }
        return pd.DataFrame(columns)

    def top(self, k: int = 10) -> pd.DataFrame:
        """The ``k`` rows of `to_frame` with the largest values, whichever their sign.

        Raises:
            InputError: ``k`` is below 1.
        """
        check_count(k, "the number of rows")
        frame = self.to_frame()
        order = frame["value"].abs().sort_values(ascending=False, kind="stable").index
        return frame.loc[order[:k]].reset_index(drop=True)

    def plot(self, target: int = 0, **options: Any) -> Any:
        """The layer × head grid of one target. See `heat_maps.plot_head_grid`.

        Args:
            target: Which of ``targets``.
            **options: For `heat_maps.plot_heatmap`.

        Raises:
            InputError: there is no such target.
        """
        from heat_maps import plot_head_grid

        count = len(self.targets)
        if isinstance(target, bool) or target not in range(-count, count):
            raise InputError(f"target is 0..{count - 1}; came {target!r}")
        what = "direct effect on the logit" + (" before its cap" if self.before_cap else "")
        chosen: dict[str, Any] = {
            "name": what,
            "title": f"Heads that write {readable_token(self.targets[target], 24, can_draw)}",
        }
        rows = [str(layer) for layer in self.layers]
        return plot_head_grid(self.values[..., target], rows, **(chosen | options))
