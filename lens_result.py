"""What a lens reads and what it saw there, as values.

`row_sites` says which site each row of a lens reads; row labels are ``"embed"`` (the input of block
0), then block indices as text. `LensResult` holds the best tokens and the metrics of every cell.
From it come depths (when was the prediction decided, when was it right), a tidy frame, a text, a
picture and a file.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from array_files import built, open_arrays, write_arrays
from forward_pass import InputError, RecordFileError, Site, SiteError
from model_architecture import Architecture, Layer

if TYPE_CHECKING:
    import pandas as pd

EMBED = "embed"
"""Label of the row that is the input of block 0."""

LENS_SITES = ("resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out", "head_out")
"""Sites that lie in the residual stream, or are added to it."""

TUNED_SITES = ("resid_pre", "resid_post")
"""Those that a tuned lens has translators for: the stream between blocks."""

KIND = "lens result"
"""What a file of `LensResult.save` says that it holds."""

VERSION = 1
"""Of that file's schema."""

IN_NATS = frozenset({"kl_divergence", "entropy", "cross_entropy", "js_divergence"})
"""Metrics measured in nats; the others have no unit."""


# --- Rows -----------------------------------------------------------------------------------------


def resolve_layers(architecture: Architecture, layers: Layer | Sequence[Layer] | None) -> list[int]:
    """Block indices in any spelling, each once; None means all.

    Raises:
        InputError: the list is empty.
        LayerError: there is no such layer.
    """
    if layers is None:
        return list(range(architecture.n_layers))
    asked = (
        list(layers) if isinstance(layers, Iterable) and not isinstance(layers, str) else [layers]
    )
    if not asked:
        raise InputError("layer_indices is empty; None means all layers")
    return list(dict.fromkeys(architecture.resolve(layer) for layer in asked))


def row_sites(
    architecture: Architecture,
    site: str,
    layers: Layer | Sequence[Layer] | None = None,
    head: int | None = None,
) -> dict[str, Site]:
    """What each row of a lens reads, by the row's label.

    Args:
        architecture: The model.
        site: One of `LENS_SITES`.
        layers: Blocks in any spelling. None means all that have the site, and for ``resid_post``
            the embedding before them.
        head: Which head, for ``head_out`` and only there.

    Raises:
        InputError: there is no such head.
        LayerError: there is no such layer.
        SiteError: no layer has such a site, or one that was named has not.
    """
    if site not in LENS_SITES:
        raise SiteError(
            f"a lens reads the residual stream, or what is added to it "
            f"({', '.join(LENS_SITES)}), not {site!r}"
        )
    rows = {str(i): Site(site, i) for i in resolve_layers(architecture, layers)}
    why = {row: architecture.missing(where) for row, where in rows.items()}
    reasons = [reason for reason in why.values() if reason]
    if reasons and (layers is not None or len(reasons) == len(rows)):
        raise SiteError(reasons[0])
    rows = {row: where for row, where in rows.items() if not why[row]}
    if site != "head_out" and head is not None:
        raise InputError(f"head={head} goes with site='head_out', not with {site!r}")
    if site == "head_out":
        heads = min(architecture.heads(where.layer)[0] for where in rows.values())
        if head is None or not -heads <= head < heads:
            raise InputError(f"site='head_out' needs head=0..{heads - 1}; came {head}")
    if site == "resid_post" and layers is None:
        return {EMBED: Site("resid_pre", 0), **rows}
    return rows


def previous_row(row: str) -> str:
    """Label of the row whose output is what this block reads."""
    return EMBED if row == "0" else str(int(row) - 1)


def shown_rows(labels: Sequence[str], step: int) -> list[int]:
    """Every ``step``-th row counted from the first block; the embedding and the last row always.

    Raises:
        InputError: ``step`` is below 1.
    """
    if step < 1:
        raise InputError(f"layer_step must be at least 1; came {step}")
    first = 1 if labels and labels[0] == EMBED else 0
    return sorted({*range(first), *range(first, len(labels), step), len(labels) - 1})


# --- The result -----------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class LensResult:
    """The lens at every row (the embedding and the layers) and position of one text."""

    text: str
    tokens: tuple[str, ...]
    """One per position; strings repeat, never use them as keys."""
    token_ids: tuple[int, ...]
    positions: tuple[int, ...]
    """Absolute position of each column."""
    row_labels: tuple[str, ...]
    """``"embed"``, then block indices as text; row order is depth."""
    site: str
    """What was read: a name out of `forward_pass.SITES`."""
    top_tokens: np.ndarray
    """``[row, position, k]``, text, best first."""
    top_ids: np.ndarray
    """``[row, position, k]``, token ids."""
    top_probs: np.ndarray
    """``[row, position, k]``, probabilities, float32."""
    top_logits: np.ndarray
    """``[row, position, k]``, logits, float32."""
    metrics: dict[str, np.ndarray]
    """``[row, position]`` each, NaN where one does not apply; names and units in `lens_metrics`."""

    def __post_init__(self) -> None:
        """Check that the tables have the axes that the labels say."""
        shape = (len(self.row_labels), len(self.positions))
        for name, table in self.metrics.items():
            if table.shape != shape:
                raise InputError(
                    f"metric {name!r} must be [row, position] = {shape}; it is {table.shape}"
                )
        for name in ("top_tokens", "top_ids", "top_probs", "top_logits"):
            table = getattr(self, name)
            if table.ndim != 3 or table.shape != (*shape, table.shape[-1]):
                raise InputError(
                    f"{name} must be [row, position, k] with {shape}; it is {table.shape}"
                )
        for name in ("tokens", "token_ids"):
            if len(getattr(self, name)) != len(self.positions):
                raise InputError(f"{name} must have one entry per position")

    def __repr__(self) -> str:
        text = self.text if len(self.text) <= 32 else f"{self.text[:31]}…"
        rows, columns, k = self.top_ids.shape
        return f"LensResult({text!r}, {rows} rows × {columns} positions, top {k}, {self.site})"

    # --- Depths ----------------------------------------------------------------------------------

    def decision_depth(self) -> np.ndarray:
        """The first row from which on the best token stays the final one, per position.

        Returns:
            ``[position]``, indices into ``row_labels``; -1 where even the last row has another (a
            component, or a result without the last layer). Needs ``top1_match``.

        Raises:
            InputError: ``top1_match`` was not measured.
        """
        match = self._metric("top1_match") > 0.5
        steady = np.flip(np.logical_and.accumulate(np.flip(match, 0), 0), 0)
        return np.where(match[-1], steady.argmax(0), -1)

    def first_correct_layer(self, token: int | None = None) -> np.ndarray:
        """The first row whose best token is the true next token, per position.

        Args:
            token: A token id to look for instead of the true next token.

        Returns:
            ``[position]``, indices into ``row_labels``, -1 where no row has it (or nothing
            follows).

        Raises:
            InputError: the true next token's rank was not measured.
        """
        if token is None:
            rank = self._metric("next_token_rank")
            right = np.nan_to_num(rank, nan=1.0) == 0
        else:
            right = self.top_ids[:, :, 0] == token
        return np.where(right.any(0), right.argmax(0), -1)

    def _metric(self, name: str) -> np.ndarray:
        if name not in self.metrics:
            held = ", ".join(self.metrics) or "no metrics"
            raise InputError(f"this result holds {held}; run the lens with metrics=({name!r},)")
        return self.metrics[name]

    # --- Out -------------------------------------------------------------------------------------

    def to_frame(self) -> pd.DataFrame:
        """One row per cell and rank.

        Returns:
            Columns ``row, layer, position, token, rank, predicted, probability, logit``, then every
            metric (the same at every rank of a cell), with ``_nats`` after the name of one that is
            measured in nats.
        """
        import pandas as pd

        row, column, rank = (axis.ravel() for axis in np.indices(self.top_ids.shape))
        frame = pd.DataFrame(
            {
                "row": row,
                "layer": np.array(self.row_labels, dtype=object)[row],
                "position": np.array(self.positions)[column],
                "token": np.array(self.tokens, dtype=object)[column],
                "rank": rank,
                "predicted": self.top_tokens.ravel(),
                "probability": self.top_probs.ravel(),
                "logit": self.top_logits.ravel(),
            }
        )
        for name, table in self.metrics.items():
            frame[f"{name}_nats" if name in IN_NATS else name] = table[row, column]
        return frame

    def to_text(self, layer_step: int = 1, max_tokens: int = 10) -> str:
        """A table to print: rows are layers, columns tokens, cells the best next token.

        Args:
            layer_step: Show every so many layers; the embedding and the last layer always.
            max_tokens: Show at most this many positions.

        Returns:
            The lines. Where ``kl_divergence`` was measured it ends each, at the last position.

        Raises:
            InputError: ``layer_step`` or ``max_tokens`` is below 1.
        """
        if max_tokens < 1:
            raise InputError(f"max_tokens must be at least 1; came {max_tokens}")
        shown = slice(max_tokens)
        divergence = self.metrics.get("kl_divergence")
        header = "layer   " + "".join(map(_cell, self.tokens[shown]))
        if divergence is not None:
            header += " KL(final‖layer) at the last token, nats"
        lines = [header]
        for row in shown_rows(self.row_labels, layer_step):
            line = f"{self.row_labels[row]:<8}" + "".join(
                map(_cell, self.top_tokens[row, shown, 0])
            )
            lines.append(line if divergence is None else f"{line} {divergence[row, -1]:.3f}")
        return "\n".join(line.rstrip() for line in lines)

    def plot(self, **options: Any) -> Any:
        """The canonical heat map. See `figures.plot_lens_heatmap`."""
        from figures import plot_lens_heatmap

        return plot_lens_heatmap(self, **options)

    def save(self, path: str | Path) -> None:
        """Write everything into one safetensors file with a JSON header, atomically.

        Raises:
            RecordFileError: the file cannot be written.
        """
        arrays = {name: getattr(self, name) for name in _ARRAYS}
        arrays |= {f"{_METRIC}{name}": table for name, table in self.metrics.items()}
        header: dict[str, Any] = {name: list(getattr(self, name)) for name in _LISTS}
        header |= {"text": self.text, "site": self.site}
        header["top_tokens"] = self.top_tokens.ravel().tolist()
        tensors = {
            name: torch.from_numpy(np.ascontiguousarray(table)) for name, table in arrays.items()
        }
        write_arrays(Path(path), "safetensors", KIND, VERSION, header, tensors)

    @classmethod
    def load(cls, path: str | Path) -> LensResult:
        """Read what `save` wrote.

        Raises:
            RecordFileError: the file is not what `save` writes.
        """
        with open_arrays(Path(path), KIND, VERSION) as stored:
            header = stored.content
            names = [name for name in stored.specs if name.startswith(_METRIC)]
            fields: dict[str, Any] = {name: tuple(header[name]) for name in _LISTS}
            fields |= {name: header[name] for name in ("text", "site")}
            fields |= {name: stored.read(name).numpy() for name in _ARRAYS}
            tokens = np.array(header["top_tokens"], dtype=object)
            fields["top_tokens"] = tokens.reshape(fields["top_ids"].shape)
            tables = {n.removeprefix(_METRIC): stored.read(n).numpy() for n in names}
            _check_shapes(fields, tables)
            return built(cls, {**fields, "metrics": tables})


def _check_shapes(fields: Mapping[str, Any], metrics: Mapping[str, np.ndarray]) -> None:
    """Refuse with RecordFileError what does not fit the labels that came with it."""
    columns = {len(fields[name]) for name in ("tokens", "token_ids", "positions")}
    cells = {table.shape for table in metrics.values()}
    cells |= {fields[name].shape[:2] for name in _ARRAYS}
    kept = {fields[name].shape for name in _ARRAYS}
    if cells != {(len(fields["row_labels"]), *columns)} or len(kept) != 1:
        raise RecordFileError(
            f"it has {len(fields['row_labels'])} rows and columns {columns}, tables {cells}, {kept}"
        )


_ARRAYS = ("top_ids", "top_probs", "top_logits")
_LISTS = ("tokens", "token_ids", "positions", "row_labels")
_METRIC = "metrics."
"""How a result lies in a file: arrays, lists in the header, and what a metric's array is called."""

_CELL = 11
"""Characters of a cell of `LensResult.to_text`."""


def _cell(token: str) -> str:
    """A token in the width of a cell, white space and the like escaped."""
    shown = repr(token)[1:-1]
    return f"{shown if len(shown) < _CELL else shown[: _CELL - 2] + '…':<{_CELL}}"
