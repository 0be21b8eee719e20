"""What exchanging or removing parts of a model did: one number per part, with how sure it is.

`PathEffects` is what path patching found, `AblationEffects` an ablation study. Both can be drawn
(layers × heads, with a column for the MLPs), tabulated, searched and kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

import numpy as np
import torch

from array_files import built, open_arrays, write_arrays
from circuit_nodes import Group, Node, group_label
from forward_pass import InputError

if TYPE_CHECKING:
    import pandas as pd

VERSION = 1
"""Of the files' schema."""

TABLES = ("values", "stderr", "low", "high")
"""Fields that lie in a file as arrays."""

TUPLES = ("tokens", "source_tokens")

WHOLE = ("attn", "mlp", "block")
"""Parts of a block that get a column of their own behind the heads'."""


@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class NodeEffects:
    """A number per part of a model; see `PathEffects` and `AblationEffects`."""

    KIND: ClassVar[str] = "node effects"
    NAME: ClassVar[str] = "effect on"

    values: np.ndarray
    """``[entry]``, float64, in the metric's ``unit``; the mean where there are several prompts."""
    groups: tuple[Group, ...]
    """For each entry the parts that were exchanged or removed together, mostly one."""
    metric: str
    unit: str
    """``logits``, ``nats`` or none."""
    base: float
    """The metric of the unmodified run (the mean of these)."""
    tokens: tuple[str, ...]
    """Of the prompt that was run, one per position; empty for several prompts."""
    answer: str = ""
    """The token that the metric measures, if it is one and the same."""
    foil: str = ""
    count: int = 1
    """Number of prompts, or pairs of them."""
    stderr: np.ndarray | None = None
    """``[entry]``, standard error of the mean over prompts; None for a single one."""
    low: np.ndarray | None = None
    """``[entry]``, lower end of the 95 % bootstrap interval."""
    high: np.ndarray | None = None
    """``[entry]``, upper end of it."""
    passes: int = 0
    """Forward passes (whole or partial) that were needed."""

    def __post_init__(self) -> None:
        """Check that numbers and parts fit together."""
        for name in TABLES:
            table = getattr(self, name)
            if table is not None and table.shape != (len(self.groups),):
                raise InputError(f"{name} must hold one number for each of {len(self.groups)}")

    def __repr__(self) -> str:
        prompts = f", {self.count} prompts" if self.count > 1 else ""
        return f"{type(self).__name__}({self._about()}, {self.metric}{prompts})"

    def _about(self) -> str:
        return f"{len(self.groups)} entries"

    @property
    def labels(self) -> tuple[str, ...]:
        """How each entry is written: ``"9.6"``, ``"mlp 3"``, ``"9.6 + 9.9"``."""
        return tuple(map(group_label, self.groups))

    @property
    def value_label(self) -> str:
        """What the numbers mean, in a few words."""
        unit = f" ({self.unit})" if self.unit else ""
        return f"{self.NAME} {self.metric}{unit}"

    def __getitem__(self, label: str) -> float:
        """The number of one entry, by its label.

        Raises:
            InputError: there is no such entry.
        """
        if label not in self.labels:
            few = ", ".join(self.labels[:6])
            raise InputError(f"no entry {label!r}; there are {len(self.labels)}: {few}, …")
        return float(self.values[self.labels.index(label)])

    def top(self, k: int = 10) -> pd.DataFrame:
        """The ``k`` entries with the largest number, whichever its sign: rows of `to_frame`."""
        order = np.argsort(-np.abs(self.values), kind="stable")[:k]
        return self.to_frame().loc[order].reset_index(drop=True)

    def to_frame(self) -> pd.DataFrame:
        """One row per entry.

        Returns:
            Columns ``node, kind, layer, head`` (the last three missing where an entry has several
            parts, ``head`` where it is no head), ``value``, and over several prompts ``stderr``,
            ``low`` and ``high``.
        """
        import pandas as pd

        single = [group[0] if len(group) == 1 else Node("") for group in self.groups]
        columns: dict[str, Any] = {
            "node": self.labels,
            "kind": [node.kind for node in single],
            "layer": pd.array([n.layer if n.layer >= 0 else None for n in single], dtype="Int64"),
            "head": pd.array([n.head if n.head >= 0 else None for n in single], dtype="Int64"),
            "value": self.values,
        }
        for name in TABLES[1:]:
            if getattr(self, name) is not None:
                columns[name] = getattr(self, name)
        return pd.DataFrame(columns)

    def grid(self) -> tuple[np.ndarray, tuple[str, ...], tuple[str, ...]]:
        """The numbers as a table: a row per block, a column per head, then ``attn``, ``mlp``, ….

        Returns:
            ``[row, column]`` (NaN where there is no such entry), row labels and column labels; one
            column where an entry has several parts.
        """
        if any(len(group) > 1 for group in self.groups):
            return self.values[:, None], self.labels, (self.NAME.split()[0],)
        nodes = [group[0] for group in self.groups]
        layers = sorted({node.layer for node in nodes if node.layer >= 0})
        embeds = [node for node in nodes if node.kind == "embed"]
        heads = range(1 + max((node.head for node in nodes), default=-1))
        kinds = [k for k in (*WHOLE, "embed") if any(n.kind == k for n in nodes)]
        rows = [*(["embed"] if embeds else []), *map(str, layers)]
        columns = [*map(str, heads), *kinds]
        table = np.full((len(rows), len(columns)), np.nan)
        for node, value in zip(nodes, self.values, strict=True):
            row = "embed" if node.kind == "embed" else str(node.layer)
            column = str(node.head) if node.kind == "head" else node.kind
            table[rows.index(row), columns.index(column)] = value
        return table, tuple(rows), tuple(columns)

    def plot(self, **options: Any) -> Any:
        """A heat map of `grid`. See `heat_maps.plot_heatmap`."""
        from figures import plot_heatmap

        table, rows, columns = self.grid()
        chosen = {"x_name": "head, or part of the block", "y_name": "layer"}
        if table.shape[1] == 1:
            chosen = {"x_name": "", "y_name": ""}
        chosen |= {"value_label": self.value_label, "title": self._about()}
        return plot_heatmap(table, columns, rows, **(chosen | options))

    # --- Files -----------------------------------------------------------------------------------

    def save(self, path: str | Path) -> None:
        """Write everything into one safetensors file with a JSON header, atomically.

        Raises:
            RecordFileError: the file cannot be written.
        """
        plain = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in TABLES}
        header = {name: _as_json(value) for name, value in plain.items()}
        tables = {name: getattr(self, name) for name in TABLES if getattr(self, name) is not None}
        arrays = {name: torch.from_numpy(np.array(table)) for name, table in tables.items()}
        write_arrays(Path(path), "safetensors", self.KIND, VERSION, header, arrays)

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read what `save` wrote.

        Raises:
            RecordFileError: the file is not what `save` writes.
        """
        with open_arrays(Path(path), cls.KIND, VERSION) as stored:
            header: dict[str, Any] = dict(stored.content)
            header["groups"] = tuple(_nodes(group) for group in header["groups"])
            if "receivers" in header:
                header["receivers"] = _nodes(header["receivers"])
            header |= {name: tuple(header[name]) for name in TUPLES if name in header}
            found = [name for name in TABLES if name in stored.specs]
            header |= {name: stored.read(name).numpy() for name in found}
            return built(cls, header)


def _as_json(value: Any) -> Any:
    return [_as_json(each) for each in value] if isinstance(value, tuple) else value


def _nodes(entries: Sequence[Any]) -> Group:
    return tuple(Node(*entry) for entry in entries)


@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class PathEffects(NodeEffects):
    """What the paths from each sender to the receivers carry.

    ``values`` are the metric of the patched run minus that of the unmodified one: 0 where no path
    leads from sender to receivers.
    """

    KIND: ClassVar[str] = "path effects"

    receivers: Group
    """Where the paths end; all at once."""
    direction: str
    """``noising``: the clean run, with senders from the corrupted one; ``denoising``: inverse."""
    other: float
    """The metric of the run that senders are taken from (the mean of these)."""
    source_tokens: tuple[str, ...]
    """Of that run's prompt; empty for several pairs."""
    through_mlps: bool = False
    """Whether MLPs between sender and receivers belong to the paths."""

    def _about(self) -> str:
        ends = [node.label for node in self.receivers]
        text = ", ".join(ends) if len(ends) <= 3 else f"{len(ends)} receivers"
        through = " through MLPs" if self.through_mlps else ""
        return f"{len(self.groups)} senders → {text}{through}, {self.direction}"


@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class AblationEffects(NodeEffects):
    """How far the metric drops where parts of a model are ablated.

    ``values`` are the metric of the unmodified run minus that of the ablated one.
    """

    KIND: ClassVar[str] = "ablation effects"
    NAME: ClassVar[str] = "drop in"

    method: str
    """``zero``, ``mean`` or ``resample``."""
    references: int = 0
    """Prompts that the mean was taken over, or that activations were drawn from."""
    samples: int = 1
    """Runs per entry and prompt, over which the drop is averaged."""

    def _about(self) -> str:
        return f"{self.method} ablation of {len(self.groups)}"
