"""What looking at attention found: patterns of one text, scores of every head, heads in order.

`AttentionPatterns` holds every head's pattern of one text. `HeadSummary` holds one number per kind
of behaviour, layer and head, over any number of texts; `KINDS` says how each is defined.
`HeadRanking` is one kind of them, best head first.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

from array_files import built, open_arrays, write_arrays
from forward_pass import InputError, LayerError

if TYPE_CHECKING:
    import pandas as pd

    from attention_view import AttentionView

VERSION = 1
"""Of the files' schema."""

KINDS: dict[str, str] = {
    "previous_token": "attention to the token before",
    "duplicate_token": "attention to earlier copies of the token itself",
    "induction": "attention to the tokens after earlier copies of the token",
    "first_token": "attention to the first token (a sink)",
    "current_token": "attention to the token itself",
    "no_token": "attention that no token gets (a learned sink)",
    "entropy": "entropy of a row, in nats",
    "distance": "mean distance looked back, in tokens",
}
"""Every kind of score and what it measures; `attention_analysis.head_summary` defines them."""

SHARES = tuple(kind for kind in KINDS if kind not in ("entropy", "distance"))
"""The kinds that lie between 0 and 1."""

SHORT_FORMS = {
    "previous": "previous_token",
    "duplicate": "duplicate_token",
    "first": "first_token",
    "sink": "first_token",
    "current": "current_token",
}


def kind_of(name: str) -> str:
    """A kind of score, however it is spelled (``"previous-token"``, ``"sink"``).

    Raises:
        InputError: there is no such kind.
    """
    word = str(name).strip().lower().replace("-", "_").replace(" ", "_")
    word = word.removesuffix("_heads").removesuffix("_head")
    word = SHORT_FORMS.get(word, word)
    if word not in KINDS:
        raise InputError(f"no kind of head {name!r}; there are {', '.join(KINDS)}")
    return word


# --- Patterns of one text -------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class AttentionPatterns:
    """The attention patterns of one text: ``patterns[4]`` of a layer, ``patterns[4, 1]`` a head's.

    A row says how a token (the query) shares its attention among the tokens up to itself (the
    keys). Rows sum to 1, or to less where the model has a learned sink.
    """

    patterns: tuple[np.ndarray, ...]
    """``[head, query, key]`` for each of ``layers``, float32."""
    layers: tuple[int, ...]
    """The block of each entry."""
    tokens: tuple[str, ...]
    """One per position."""
    token_ids: tuple[int, ...]
    """One per position."""

    def __post_init__(self) -> None:
        """Check that patterns, layers and tokens fit together."""
        length = len(self.tokens)
        if len(self.patterns) != len(self.layers) or len(self.token_ids) != length:
            raise InputError("there must be one layer per pattern and one id per token")
        for pattern in self.patterns:
            if pattern.ndim != 3 or pattern.shape[1:] != (length, length):
                raise InputError(
                    f"a layer's patterns are [head, query, key] of {length} tokens; "
                    f"came {pattern.shape}"
                )

    def __repr__(self) -> str:
        heads = sum(len(pattern) for pattern in self.patterns)
        size = f"{len(self.layers)} layers, {heads} heads, {len(self.tokens)} tokens"
        return f"AttentionPatterns({size})"

    def __getitem__(self, place: int | tuple[int, int]) -> np.ndarray:
        """``[head, query, key]`` of a layer, ``[query, key]`` of a layer and head.

        Raises:
            LayerError: this layer is not among ``layers``.
            InputError: the layer has no such head.
        """
        layer, head = place if isinstance(place, tuple) else (place, None)
        if layer not in self.layers:
            raise LayerError(f"no patterns of layer {layer}; there are those of {self.layers}")
        pattern = self.patterns[self.layers.index(layer)]
        if head is None:
            return pattern
        if not -len(pattern) <= head < len(pattern):
            raise InputError(f"layer {layer} has the heads 0..{len(pattern) - 1}; came {head}")
        return pattern[head]

    def to_frame(self) -> pd.DataFrame:
        """One row per layer, head, query and key up to the query.

        Returns:
            Columns ``layer, head, query, key, query_token, key_token, attention``.
        """
        import pandas as pd

        tokens = np.array(self.tokens, dtype=object)
        query, key = np.tril_indices(len(tokens))
        parts = [
            pd.DataFrame(
                {
                    "layer": layer,
                    "head": head,
                    "query": query,
                    "key": key,
                    "query_token": tokens[query],
                    "key_token": tokens[key],
                    "attention": table[query, key],
                }
            )
            for layer, pattern in zip(self.layers, self.patterns, strict=True)
            for head, table in enumerate(pattern)
        ]
        return pd.concat(parts, ignore_index=True)

    def plot(self, layer: int | None = None, head: int | None = None, **options: Any) -> Any:
        """One head's pattern with its tokens, or all heads of a layer, or of all layers, small.

        Args:
            layer: Which layer; None means all.
            head: Which head of it; None means all.
            **options: For `attention_figures.plot_pattern` or `attention_figures.plot_all_heads`.

        Returns:
            The figure.

        Raises:
            InputError: a head without its layer.
        """
        from attention_figures import plot_all_heads, plot_pattern

        if layer is None and head is not None:
            raise InputError(f"head {head} of which layer? Give layer= too")
        if layer is not None and head is not None:
            chosen = {"title": f"head {layer}.{head}"} | options
            return plot_pattern(self[layer, head], self.tokens, **chosen)
        layers = self.layers if layer is None else (layer,)
        return plot_all_heads([self[each] for each in layers], layers, **options)

    def view(self, title: str = "") -> AttentionView:
        """A page for a browser: every token's attention under the pointer, without any network.

        See `attention_view.attention_view`; ``.view().save(path)`` writes the page.

        Raises:
            InputError: the title is no text.
        """
        if not isinstance(title, str):
            raise InputError(
                f"title is a text; came {title!r}. To write the page: .view().save({str(title)!r})"
            )
        from attention_view import attention_view

        return attention_view(self.patterns, self.layers, self.tokens, title)

    def save(self, path: str | Path) -> None:
        """Write everything into one safetensors file with a JSON header, atomically.

        Raises:
            RecordFileError: the file cannot be written.
        """
        names = ("layers", "tokens", "token_ids")
        header = {name: list(getattr(self, name)) for name in names}
        arrays = {
            f"layer {layer}": torch.from_numpy(np.array(pattern))
            for layer, pattern in zip(self.layers, self.patterns, strict=True)
        }
        write_arrays(Path(path), "safetensors", "attention patterns", VERSION, header, arrays)

    @classmethod
    def load(cls, path: str | Path) -> AttentionPatterns:
        """Read what `save` wrote.

        Raises:
            RecordFileError: the file is not what `save` writes.
        """
        with open_arrays(Path(path), "attention patterns", VERSION) as stored:
            header = {name: tuple(value) for name, value in stored.content.items()}
            patterns = tuple(stored.read(f"layer {each}").numpy() for each in header["layers"])
            return built(cls, {**header, "patterns": patterns})


# --- Scores of every head -------------------------------------------------------------------------


class HeadScore(NamedTuple):
    """A head and its score."""

    layer: int
    head: int
    score: float

    @property
    def label(self) -> str:
        """``"4.1"``: head 1 of block 4."""
        return f"{self.layer}.{self.head}"


@dataclass(frozen=True, eq=False)
class HeadSummary:
    """What every head does on the average: ``summary["induction"]`` is ``[layer, head]``.

    `attention_analysis.head_summary` says how each kind of score is defined.
    """

    values: np.ndarray
    """``[kind, layer, head]``, float64; NaN where a layer has no such head, or no token was there
    to measure it on. Shares of attention, but for ``entropy`` (nats) and ``distance`` (tokens)."""
    kinds: tuple[str, ...]
    """What each entry of the first axis measures: the keys of `KINDS`."""
    layers: tuple[int, ...]
    """The block of each entry of the second axis: those that were asked for and attend."""
    queries: tuple[int, ...]
    """For each kind, how many tokens it was averaged over."""
    texts: int
    """Number of texts."""
    tokens: int
    """Number of tokens of all texts together."""
    source: str
    """What the texts were: ``prompts``, or ``repeated random tokens``."""

    def __post_init__(self) -> None:
        """Check that numbers and labels fit together."""
        expected = (len(self.kinds), len(self.layers))
        if self.values.ndim != 3 or self.values.shape[:2] != expected:
            raise InputError(f"values must be [kind, layer, head], {expected} and the heads")
        if len(self.queries) != len(self.kinds):
            raise InputError("queries must hold one number per kind")

    def __repr__(self) -> str:
        size = f"{len(self.layers)} layers × {self.values.shape[2]} heads"
        return f"HeadSummary({size}, {self.texts} texts, {self.tokens} tokens, {self.source})"

    def __getitem__(self, kind: str) -> np.ndarray:
        """``[layer, head]`` of one kind, in any spelling.

        Raises:
            InputError: there is no such kind.
        """
        return self.values[self.kinds.index(kind_of(kind))]

    def rank(self, kind: str, *, lowest: bool = False) -> HeadRanking:
        """The heads in order of one score, the highest first, or the lowest.

        Raises:
            InputError: there is no such kind, or no token in the texts to measure it on.
        """
        kind = kind_of(kind)
        table = self[kind]
        if not np.isfinite(table).any():
            raise InputError(
                f"{kind} cannot be measured on these texts: no token in them counts for it "
                "(a token must occur twice); give other prompts, or prompts=None"
            )
        flat = table.ravel()
        order = np.argsort(flat if lowest else -flat, kind="stable")
        rows, heads = np.unravel_index(order[np.isfinite(flat[order])], table.shape)
        found = tuple(
            HeadScore(self.layers[row], int(head), float(table[row, head]))
            for row, head in zip(rows, heads, strict=True)
        )
        return HeadRanking(kind, found, self)

    def to_frame(self) -> pd.DataFrame:
        """One row per head: ``layer, head`` and a column per kind."""
        import pandas as pd

        shape = self.values.shape[1:]
        row, head = (place.ravel() for place in np.indices(shape))
        columns: dict[str, Any] = {"layer": np.array(self.layers)[row], "head": head}
        columns |= {k: self.values[i].ravel() for i, k in enumerate(self.kinds)}
        frame = pd.DataFrame(columns)
        return frame[frame["entropy"].notna()].reset_index(drop=True)

    def plot(self, *kinds: str, **options: Any) -> Any:
        """Layer × head grids, one per kind; if none is named, all that are not 0 everywhere.

        See `attention_figures.plot_head_scores`.

        Raises:
            InputError: there is no such kind.
        """
        from attention_figures import plot_head_scores

        chosen = [kind_of(kind) for kind in kinds]
        chosen = chosen or [k for k in self.kinds if np.nanmax(np.abs(self[k]), initial=0) > 1e-5]
        tables = {kind: self[kind] for kind in chosen}
        return plot_head_scores(tables, self.layers, **options)

    def save(self, path: str | Path) -> None:
        """Write everything into one safetensors file with a JSON header, atomically.

        Raises:
            RecordFileError: the file cannot be written.
        """
        header = {name: list(getattr(self, name)) for name in ("kinds", "layers", "queries")}
        header |= {name: getattr(self, name) for name in ("texts", "tokens", "source")}
        arrays = {"values": torch.from_numpy(np.array(self.values))}
        write_arrays(Path(path), "safetensors", "head summary", VERSION, header, arrays)

    @classmethod
    def load(cls, path: str | Path) -> HeadSummary:
        """Read what `save` wrote.

        Raises:
            RecordFileError: the file is not what `save` writes.
        """
        with open_arrays(Path(path), "head summary", VERSION) as stored:
            header: dict[str, Any] = dict(stored.content)
            header |= {name: tuple(header[name]) for name in ("kinds", "layers", "queries")}
            return built(cls, {**header, "values": stored.read("values").numpy()})


@dataclass(frozen=True, eq=False)
class HeadRanking:
    """Heads in order of one score: ``ranking[0]`` is the first, iterate for the rest."""

    kind: str
    """What they are ranked by, a key of `KINDS`."""
    heads: tuple[HeadScore, ...]
    """Every head that could be measured, ``(layer, head, score)``, the best first."""
    summary: HeadSummary
    """All scores of all heads, from the same texts."""

    def __repr__(self) -> str:
        best = ", ".join(f"{each.label} {each.score:.2f}" for each in self.heads[:3])
        more = ", …" if len(self.heads) > 3 else ""
        return f"HeadRanking({self.kind}: {best}{more})"

    def __len__(self) -> int:
        return len(self.heads)

    def __iter__(self) -> Iterator[HeadScore]:
        return iter(self.heads)

    def __getitem__(self, place: int) -> HeadScore:
        return self.heads[place]

    def to_frame(self) -> pd.DataFrame:
        """One row per head, the best first: ``layer, head, score``."""
        import pandas as pd

        return pd.DataFrame(list(self.heads), columns=list(HeadScore._fields))

    def plot(self, **options: Any) -> Any:
        """The layer × head grid of this score. See `attention_figures.plot_head_scores`."""
        return self.summary.plot(self.kind, **options)
