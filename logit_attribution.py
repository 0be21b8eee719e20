"""What a logit is a sum of, kept: one number per part, position and token.

`direct_attribution` makes it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from forward_pass import InputError
from head_circuit_result import Kept
from sites import check_count

if TYPE_CHECKING:
    import pandas as pd

KINDS = {
    "embed": "embed",
    "position": "position",
    "head": "{layer}.{index}",
    "attn": "attn {layer}",
    "attn_bias": "attn bias {layer}",
    "mixer": "mixer {layer}",
    "mlp": "mlp {layer}",
    "neuron": "neuron {layer}.{index}",
    "mlp_bias": "mlp bias {layer}",
    "block": "block {layer}",
    "other": "other {layer}",
    "norm_bias": "final norm bias",
    "unembed_bias": "unembedding bias",
    "soft_cap": "soft-cap",
}
"""Kinds of parts, and how a part is written (as `circuit_nodes` does)."""

NAMES = tuple(KINDS)
ENDS = ("norm_bias", "unembed_bias", "soft_cap")
"""Kinds that come after the last block."""


@dataclass(frozen=True, eq=False)
class LogitAttribution(Kept):
    """A logit, or the difference of two, as a sum over the parts of the model.

    Kinds of parts: ``embed`` (what enters block 0; without positions where these are added apart,
    as ``position``), ``head``, ``attn`` (all heads, where they cannot be split), ``attn_bias``,
    ``mixer`` (what stands in attention's place, such as a state space, or is a block's only
    writer), ``mlp``, ``neuron``, ``mlp_bias``, ``block`` (all that a block adds, where its writers
    were not found), ``other`` (what a block adds beyond its writers, or what is added between
    blocks), ``norm_bias``, ``unembed_bias`` (with whatever the model adds to logits besides) and
    ``soft_cap`` (capped less uncapped). The biases of values are in ``head``.
    """

    KIND: ClassVar[str] = "logit attribution"

    values: np.ndarray
    """``[part, position, target]``, float64, in logits: what each part adds."""
    kinds: np.ndarray
    """``[part]``: place in `NAMES`."""
    layers: np.ndarray
    """``[part]``: the block; -1 where a part belongs to none."""
    indices: np.ndarray
    """``[part]``: the head or neuron; -1 where a part is not about a single one."""
    logits: np.ndarray
    """``[position, target]``: the model's own logit, or difference."""
    target_ids: np.ndarray
    """``[position, target]``: the tokens that are asked about."""
    against_ids: np.ndarray
    """``[position, target]``: the tokens whose logit is taken off; -1 where none is."""
    targets: tuple[tuple[str, ...], ...]
    """``target_ids`` as text."""
    against: tuple[tuple[str, ...], ...]
    """``against_ids`` as text; "" where there is none."""
    positions: tuple[int, ...]
    """Absolute, of the token after which the target would come; one per entry of the axis."""
    tokens: tuple[str, ...]
    """The whole prompt's."""
    n_layers: int

    def __post_init__(self) -> None:
        """Check that the tables fit together.

        Raises:
            InputError: they do not.
        """
        parts = self.values.shape[:1]
        cells = (len(self.positions), *self.target_ids.shape[1:])
        fits = self.values.ndim == 3 and self.values.shape[1:] == cells
        fits &= all(t.shape == parts for t in (self.kinds, self.layers, self.indices))
        fits &= all(t.shape == cells for t in (self.logits, self.target_ids, self.against_ids))
        texts = (self.targets, self.against)
        fits &= all(len(t) == cells[0] and {len(row) for row in t} == {cells[1]} for t in texts)
        whole = all(t.dtype.kind == "i" for t in (self.kinds, self.layers, self.indices))
        known = np.isin(self.kinds, range(len(NAMES))).all()
        known &= ((self.layers >= -1) & (self.layers < self.n_layers)).all()
        if not (fits and whole and known):
            raise InputError("the parts, positions and targets of a logit attribution must agree")
        if not all(0 <= p < len(self.tokens) for p in self.positions):
            raise InputError(f"positions must lie within the {len(self.tokens)} tokens")

    def __repr__(self) -> str:
        parts, positions, _ = self.values.shape
        texts = list(dict.fromkeys(self.target_text(*at) for at in np.ndindex(self.logits.shape)))
        shown = ", ".join(texts[:2]) + (", …" if len(texts) > 2 else "")
        places = f"position {self.positions[0]}" if positions == 1 else f"{positions} positions"
        return f"LogitAttribution({shown} at {places}, {parts} parts, error {self.error:.1e})"

    # Sums -------------------------------------------------------------------------------------

    @property
    def total(self) -> np.ndarray:
        """``[position, target]``: the sum over all parts; `logits` to rounding."""
        return self.values.sum(0)

    @property
    def error(self) -> float:
        """The largest difference between `total` and `logits`."""
        return float(np.abs(self.total - self.logits).max())

    @property
    def labels(self) -> tuple[str, ...]:
        """How each part is written: ``embed``, ``4.2`` (a head), ``mlp 3``, ``neuron 3.17``."""
        rows = zip(self.kinds, self.layers, self.indices, strict=True)
        return tuple(
            KINDS[NAMES[kind]].format(layer=layer, index=index) for kind, layer, index in rows
        )

    def part(self, label: str) -> np.ndarray:
        """``[position, target]``: one part's numbers; the sum of those that are written alike.

        Args:
            label: Out of `labels`.

        Raises:
            InputError: there is no such part.
        """
        labels = self.labels
        if label not in labels:
            some = ", ".join(repr(each) for each in labels[:3])
            raise InputError(f"no part {label!r}; parts are written {some}, … (see .labels)")
        return self.values[[each == label for each in labels]].sum(0)

    def of_kind(self, *kinds: str) -> np.ndarray:
        """Which parts are of some kinds, ``[part]``.

        Raises:
            InputError: there is no such kind.
        """
        wrong = [kind for kind in kinds if kind not in KINDS]
        if wrong:
            raise InputError(f"no kind {wrong[0]!r}; kinds are {', '.join(KINDS)}")
        return np.isin(self.kinds, [NAMES.index(kind) for kind in kinds])

    def by_layer(self) -> np.ndarray:
        """``[2 + n_layers, position, target]``: what each block adds.

        Row 0 is the embedding, the last row the biases behind the blocks and the soft-cap. The sum
        over rows is `total`.
        """
        end = self.of_kind(*ENDS)
        rows = np.where(end, self.n_layers + 1, self.layers + 1)
        sums = np.zeros((self.n_layers + 2, *self.values.shape[1:]))
        np.add.at(sums, rows, self.values)
        return sums

    def cumulative(self) -> np.ndarray:
        """``[1 + n_layers, position, target]``: the logit lens with the final norm's scale held.

        Row 0 reads the embedding, row ``1 + i`` the stream that leaves block ``i``, biases behind
        the blocks included, a soft-cap not: the last row is the logit before it.
        """
        ends = self.values[self.of_kind("norm_bias", "unembed_bias")].sum(0)
        return self.by_layer()[:-1].cumsum(0) + ends

    # Tables -----------------------------------------------------------------------------------

    def top(self, k: int = 10, position: int | None = None, target: int = 0) -> pd.DataFrame:
        """The ``k`` parts with the largest numbers, whichever their sign.

        Args:
            k: How many.
            position: Absolute; None is the last of `positions`.
            target: Which of the targets.

        Returns:
            Rows of `to_frame`, the largest first.

        Raises:
            InputError: ``k`` is below 1, or there is no such position or target.
        """
        check_count(k, "the number of parts")
        row, column = self.cell(position, target)
        order = np.argsort(-np.abs(self.values[:, row, column]), kind="stable")[:k]
        cells = np.full(len(order), row), np.full(len(order), column)
        return self._frame(order, *cells)

    def to_frame(self) -> pd.DataFrame:
        """One row per part, position and target.

        Returns:
            Columns ``part, kind, layer, index, position, token, target, against, value``; layer and
            index are -1 where a part has none.
        """
        return self._frame(*(axis.ravel() for axis in np.indices(self.values.shape)))

    def _frame(self, part: np.ndarray, row: np.ndarray, column: np.ndarray) -> pd.DataFrame:
        import pandas as pd

        labels, names = np.array(self.labels, dtype=object), np.array(NAMES, dtype=object)
        tokens = np.array([self.tokens[p] for p in self.positions], dtype=object)
        columns: dict[str, Any] = {
            "part": labels[part],
            "kind": names[self.kinds[part]],
            "layer": self.layers[part],
            "index": self.indices[part],
            "position": np.array(self.positions)[row],
            "token": tokens[row],
            "target": np.array(self.targets, dtype=object)[row, column],
            "against": np.array(self.against, dtype=object)[row, column],
            "value": self.values[part, row, column],
        }
        return pd.DataFrame(columns)

    def cell(self, position: int | None, target: int) -> tuple[int, int]:
        """Places of a position and a target on the axes.

        Args:
            position: Absolute, negative from the prompt's end; None is the last of `positions`.
            target: Which of the targets.

        Raises:
            InputError: there is no such position or target.
        """
        row = len(self.positions) - 1
        if position is not None:
            whole = hasattr(position, "__index__") and not isinstance(position, bool)
            place = position + len(self.tokens) * (position < 0) if whole else -1
            if place not in self.positions:
                raise InputError(
                    f"position {position!r} was not attributed; "
                    f"positions are {list(self.positions)}"
                )
            row = self.positions.index(place)
        count = self.values.shape[2]
        if isinstance(target, bool) or target not in range(-count, count):
            raise InputError(f"target is 0..{count - 1}; came {target!r}")
        return row, target % count

    def target_text(self, row: int, column: int) -> str:
        """What is split in one cell: ``' Paris'``, or ``' Paris' − ' Rome'``."""
        text, foil = repr(self.targets[row][column]), self.against[row][column]
        return f"{text} − {foil!r}" if self.against_ids[row, column] >= 0 else text

    def plot(self, kind: str = "bar", **options: Any) -> Any:
        """A picture. See `logit_attribution_figures.plot_attribution`.

        Args:
            kind: ``bar`` (the largest parts), ``waterfall`` (block by block up to the logit), or
                ``heatmap`` (layer × head for one position, layer × position for several).
            **options: See there.
        """
        from logit_attribution_figures import plot_attribution

        return plot_attribution(self, kind, **options)
