"""What the weights of heads say: scores by head, scores of pairs of heads, tokens and directions.

Each result is immutable, and can be tabulated, drawn and kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

import numpy as np
import torch

from array_files import built, open_arrays, write_arrays
from forward_pass import InputError
from sites import check_count
from token_labels import axis_labels

if TYPE_CHECKING:
    import pandas as pd

VERSION = 1
"""Of the files' schema."""

KINDS = ("q", "k", "v")
"""Kinds of composition: what the reader makes of it, a query, a key or a value."""

SIDES = ("reads", "writes")
SIGNS = (1, -1)


class Kept:
    """A frozen dataclass of NumPy arrays and plain values that can be written to a file."""

    KIND: ClassVar[str]

    def save(self, path: str | Path) -> None:
        """Write everything into one safetensors file with a JSON header, atomically.

        Raises:
            RecordFileError: the file cannot be written.
        """
        values = {f.name: getattr(self, f.name) for f in fields(self)}  # type: ignore[arg-type]
        arrays = {
            k: torch.from_numpy(v.copy()) for k, v in values.items() if isinstance(v, np.ndarray)
        }
        header = {k: _as_lists(v) for k, v in values.items() if k not in arrays}
        write_arrays(Path(path), "safetensors", self.KIND, VERSION, header, arrays)

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read what `save` wrote.

        Raises:
            RecordFileError: the file is not what `save` writes.
        """
        with open_arrays(Path(path), cls.KIND, VERSION) as stored:
            arrays = {name: stored.read(name).numpy() for name in stored.specs}
            return built(cls, {k: _as_tuples(v) for k, v in stored.content.items()} | arrays)


def _as_lists(value: Any) -> Any:
    return [_as_lists(each) for each in value] if isinstance(value, tuple) else value


def _as_tuples(value: Any) -> Any:
    return tuple(_as_tuples(each) for each in value) if isinstance(value, list) else value


def padded(rows: Sequence[np.ndarray]) -> np.ndarray:
    """Tables that differ on their first axis, such as layers with unlike heads, as one; NaN behind.

    Args:
        rows: ``[head, …]`` for each layer.
    """
    table = np.full((len(rows), max(map(len, rows)), *rows[0].shape[1:]), np.nan)
    for line, row in zip(table, rows, strict=True):
        line[: len(row)] = row
    return table


def head_place(head: str, layers: Sequence[int], heads: int) -> tuple[int, int]:
    """Row and column of a head (``"4.2"``) in a table of layer × head.

    Raises:
        InputError: there is no such head.
    """
    layer, _, index = str(head).partition(".")
    known = layer.isdecimal() and int(layer) in layers
    if not known or not index.isdecimal() or int(index) >= heads:
        raise InputError(
            f"no head {head!r}: write 'layer.head', with a layer out of {list(layers)} and a head "
            f"0..{heads - 1}"
        )
    return list(layers).index(int(layer)), int(index)


# --- One number per head --------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class HeadScores(Kept):
    """One number per head."""

    KIND: ClassVar[str] = "head scores"

    values: np.ndarray
    """``[layer, head]``; NaN where a layer has fewer heads."""
    layers: tuple[int, ...]
    """The block of each row."""
    name: str
    """What the numbers are, with the range or unit."""
    folded: bool = False
    """Whether norms' gains were put into the weights."""

    def __repr__(self) -> str:
        size = f"{len(self.layers)} layers × {self.values.shape[1]} heads"
        return f"HeadScores({self.name}, {size}{', folded' if self.folded else ''})"

    def to_frame(self) -> pd.DataFrame:
        """One row per head: ``head`` (``"4.2"``), ``layer``, ``index`` and ``value``."""
        import pandas as pd

        row, head = (axis.ravel() for axis in np.indices(self.values.shape))
        layer = np.array(self.layers)[row]
        names = [f"{a}.{b}" for a, b in zip(layer, head, strict=True)]
        columns = {"head": names, "layer": layer, "index": head, "value": self.values.ravel()}
        return pd.DataFrame(columns).dropna(subset="value").reset_index(drop=True)

    def top(self, k: int = 10) -> pd.DataFrame:
        """The ``k`` heads with the largest numbers: rows of `to_frame`.

        Raises:
            InputError: ``k`` is below 1.
        """
        check_count(k, "the number of heads")
        frame = self.to_frame().sort_values("value", ascending=False, kind="stable")
        return frame.head(k).reset_index(drop=True)

    def plot(self, **options: Any) -> Any:
        """The layer × head grid. See `heat_maps.plot_head_grid`."""
        from heat_maps import plot_head_grid

        chosen: dict[str, Any] = {"name": self.name}
        return plot_head_grid(self.values, [str(n) for n in self.layers], **(chosen | options))


# --- Pairs of heads -------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class CompositionScores(Kept):
    """How strongly the weights of each head read what each earlier head writes."""

    KIND: ClassVar[str] = "composition scores"

    values: np.ndarray
    """``[kind, writer layer, writer head, reader layer, reader head]``, 0 to 1.

    NaN where the writer is not in an earlier block, or there is no such head.
    """
    kinds: tuple[str, ...]
    """Out of `KINDS`."""
    layers: tuple[int, ...]
    """The block of each entry of both layer axes."""
    chance: float
    """Root mean square for heads that are turned at random against each other: 1/√d_model."""
    folded: bool = False
    """Whether norms' gains were put into the weights of the reader."""

    def __repr__(self) -> str:
        heads = self.values.shape[2]
        size = f"{len(self.layers)} layers × {heads} heads, by chance {self.chance:.3g}"
        return f"CompositionScores({', '.join(self.kinds)}, {size})"

    def of(self, kind: str, reader: str | None = None) -> np.ndarray:
        """The scores of one kind.

        Args:
            kind: ``"q"``, ``"k"`` or ``"v"``.
            reader: A head (``"4.2"``), to have those of its possible writers alone.

        Returns:
            ``[writer layer, writer head, reader layer, reader head]``, or the first two.

        Raises:
            InputError: there is no such kind, or no such head.
        """
        self._require(kind)
        values = self.values[self.kinds.index(kind)]
        if reader is None:
            return values
        row, head = head_place(reader, self.layers, self.values.shape[2])
        return values[:, :, row, head]

    def _require(self, kind: str) -> None:
        if kind not in self.kinds:
            raise InputError(f"no composition {kind!r}; there are {', '.join(self.kinds)}")

    def to_frame(self) -> pd.DataFrame:
        """One row per kind and pair: ``kind, writer, reader, value, above_chance``."""
        import pandas as pd

        kind, *axes = np.nonzero(~np.isnan(self.values))
        layers = np.array(self.layers)
        names = [
            [f"{a}.{b}" for a, b in zip(layers[axes[i]], axes[i + 1], strict=True)] for i in (0, 2)
        ]
        values = self.values[(kind, *axes)]
        columns = {"kind": np.array(self.kinds, dtype=object)[kind], "writer": names[0]}
        columns |= {"reader": names[1], "value": values, "above_chance": values - self.chance}
        return pd.DataFrame(columns)

    def top(self, k: int = 10, kind: str | None = None) -> pd.DataFrame:
        """The ``k`` pairs with the largest scores, of one kind or of all: rows of `to_frame`.

        Raises:
            InputError: there is no such kind, or ``k`` is below 1.
        """
        check_count(k, "the number of pairs")
        frame = self.to_frame()
        if kind is not None:
            self._require(kind)
            frame = frame[frame["kind"] == kind]
        frame = frame.sort_values("value", ascending=False, kind="stable")
        return frame.head(k).reset_index(drop=True)

    def plot(self, kind: str = "k", reader: str | None = None, **options: Any) -> Any:
        """Writers down and readers across; with ``reader`` the grid of its writers.

        White is `chance`, red above it.

        Args:
            kind: ``"q"``, ``"k"`` or ``"v"``.
            reader: A head, such as ``"4.2"``.
            **options: See `heat_maps.plot_heatmap`.

        Raises:
            InputError: there is no such kind, or no such head.
        """
        from heat_maps import plot_head_grid, plot_heatmap

        values: np.ndarray = np.asarray(self.of(kind, reader) - self.chance)
        rows, name = [str(layer) for layer in self.layers], f"{kind.upper()}-composition − chance"
        title = f"What heads read of earlier ones (chance is {self.chance:.2g})"
        chosen: dict[str, Any] = {"signed": True, "title": title}
        if reader is not None:
            earlier = ~np.isnan(values).all(axis=1)
            shown = [row for row, kept in zip(rows, earlier, strict=True) if kept]
            chosen |= {"title": f"What head {reader} reads (chance is {self.chance:.2g})"}
            chosen["name"] = name
            return plot_head_grid(values[earlier], shown, **(chosen | options))
        heads = self.values.shape[2]
        labels = [f"{layer}.{head}" for layer in self.layers for head in range(heads)]
        table = values.reshape(len(labels), len(labels))
        down, across = ~np.isnan(table).all(axis=1), ~np.isnan(table).all(axis=0)
        x_labels, y_labels = (
            [label for label, kept in zip(labels, chosen_ones, strict=True) if kept]
            for chosen_ones in (across, down)
        )
        chosen |= {"x_name": "reader", "y_name": "writer", "value_label": name}
        return plot_heatmap(table[down][:, across], x_labels, y_labels, **(chosen | options))


# --- Tokens ---------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class CircuitTokens(Kept):
    """The largest entries of a head's circuit, from token to token."""

    KIND: ClassVar[str] = "circuit tokens"

    values: np.ndarray
    """``[source, rank]``: by how much the source raises the target's logit (``ov``), or the score
    of the source's query for the target's key (``qk``); before any norm's division.
    """
    source_ids: np.ndarray
    """``[source, rank]``, the token at the input of each entry (at the query's end, for ``qk``)."""
    target_ids: np.ndarray
    """``[source, rank]``, the token at its output."""
    sources: tuple[tuple[str, ...], ...]
    """``source_ids`` as text."""
    targets: tuple[tuple[str, ...], ...]
    """``target_ids`` as text."""
    head: str
    """``"4.2"``."""
    circuit: str
    """``ov`` or ``qk``."""
    folded: bool = False

    def __repr__(self) -> str:
        count, k = self.values.shape
        best = f"{self.sources[0][0]!r} → {self.targets[0][0]!r}"
        return f"CircuitTokens({self.circuit} of {self.head}, {count} × {k}, first {best})"

    def to_frame(self) -> pd.DataFrame:
        """One row per entry: ``source, rank, target, value, source_id, target_id``."""
        import pandas as pd

        columns = {
            "source": [token for row in self.sources for token in row],
            "rank": np.indices(self.values.shape)[1].ravel(),
            "target": [token for row in self.targets for token in row],
            "value": self.values.ravel(),
            "source_id": self.source_ids.ravel(),
            "target_id": self.target_ids.ravel(),
        }
        return pd.DataFrame(columns)

    def copies(self) -> float:
        """Share of the sources whose first target is the source itself."""
        return float((self.source_ids[:, 0] == self.target_ids[:, 0]).mean())

    def plot(self, **options: Any) -> Any:
        """The targets of each source, best first. See `heat_maps.plot_heatmap`."""
        from heat_maps import plot_heatmap
        from token_labels import can_draw

        name = {"ov": "logit", "qk": "score"}[self.circuit]
        ranks = [str(rank) for rank in range(self.values.shape[1])]
        rows = axis_labels([row[0] for row in self.sources], drawable=can_draw)
        texts = np.array(self.targets, dtype=object)
        chosen: dict[str, Any] = {"value_label": name, "x_name": "rank", "y_name": "source"}
        chosen |= {"title": f"{self.circuit.upper()} circuit of head {self.head}"}
        if len({row[0] for row in self.sources}) == 1 < len(set(self.sources[0])):
            pairs = zip(self.sources[0], self.targets[0], strict=True)
            texts = np.array([[f"{a}→{b}" for a, b in pairs]], dtype=object)
            chosen["y_name"] = ""
        return plot_heatmap(self.values, ranks, rows, texts, **(chosen | options))


@dataclass(frozen=True, eq=False)
class HeadDirections(Kept):
    """The singular directions of a head's circuit, and the tokens that they stand for."""

    KIND: ClassVar[str] = "head directions"

    singular_values: np.ndarray
    """``[direction]``, the largest first."""
    share: np.ndarray
    """``[direction]``, part of the circuit's squared norm."""
    read: np.ndarray
    """``[direction, d_model]``, unit vectors of the side that is read (the query's, for ``qk``)."""
    written: np.ndarray
    """``[direction, d_model]``, of the side that is written (the key's, for ``qk``)."""
    values: np.ndarray
    """``[direction, sign, side, rank]``: the token's own vector times the direction.

    Signs as in `SIGNS`: a direction read with one sign is written with the same. Sides are what is
    read (through the embedding) and what is written (through the unembedding; for ``qk`` the
    embedding).
    """
    token_ids: np.ndarray
    """``[direction, sign, side, rank]``."""
    tokens: tuple[tuple[tuple[tuple[str, ...], ...], ...], ...]
    """``token_ids`` as text."""
    head: str
    circuit: str
    folded: bool = False

    def __repr__(self) -> str:
        count = len(self.singular_values)
        return (
            f"HeadDirections({self.circuit} of {self.head}, {count} directions, "
            f"{self.share.sum():.0%} of its square)"
        )

    def to_frame(self) -> pd.DataFrame:
        """One row per direction, sign, side and rank, with the token and its value."""
        import pandas as pd

        direction, sign, side, rank = (a.ravel() for a in np.indices(self.values.shape))
        texts = np.array(self.tokens, dtype=object).reshape(-1)
        columns = {
            "direction": direction,
            "singular_value": self.singular_values[direction],
            "sign": np.array(SIGNS)[sign],
            "side": np.array(SIDES, dtype=object)[side],
            "rank": rank,
            "token": texts,
            "value": self.values.ravel(),
        }
        return pd.DataFrame(columns)

    def plot(self, **options: Any) -> Any:
        """A row per direction, sign and side, its tokens in order. See `heat_maps.plot_heatmap`."""
        from heat_maps import plot_heatmap

        count, *_, k = self.values.shape
        marks = {1: "+", -1: "−"}
        rows = [
            f"{i}{marks[sign]} {side}" for i in range(count) for sign in SIGNS for side in SIDES
        ]
        texts = np.array(self.tokens, dtype=object).reshape(len(rows), k)
        title = f"Singular directions of the {self.circuit.upper()} circuit of head {self.head}"
        chosen: dict[str, Any] = {"title": title, "x_name": "rank", "value_label": "product"}
        table = self.values.reshape(len(rows), k)
        ranks = [str(rank) for rank in range(k)]
        return plot_heatmap(table, ranks, rows, texts, **(chosen | options))
