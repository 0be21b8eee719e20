"""What steering did: every continuation, its score and its likelihood, by layer and coefficient.

`SteeringSweep` is what `steering_sweep` returns: effect and fluency of every cell, the cell that
steers best while its text stays fluent, a table, a picture and a file. `WordBalance` is the effect
that counts words of two lists.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

from array_files import built, open_arrays, write_arrays
from forward_pass import InputError

if TYPE_CHECKING:
    import pandas as pd

KIND = "steering sweep"
"""What a file of `SteeringSweep.save` says that it holds."""

VERSION = 1
"""Of that file's schema."""

FLUENT = 3.0
"""Text is called fluent up to this many times the perplexity of unsteered text."""


# --- The effect -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class WordBalance:
    """Counts the words of two lists in a text.

    Raises:
        InputError: a list is empty, holds something that is no single word, or both hold one.
    """

    positive_words: frozenset[str]
    negative_words: frozenset[str]

    @classmethod
    def of(cls, positive: Iterable[str], negative: Iterable[str]) -> WordBalance:
        """Two lists, whatever their case."""
        lists = (
            frozenset(word.lower() for word in ([words] if isinstance(words, str) else words))
            for words in (positive, negative)
        )
        return cls(*lists)

    def __post_init__(self) -> None:
        """Refuse lists that count nothing, or the same thing twice."""
        for name in ("positive_words", "negative_words"):
            wrong = [word for word in getattr(self, name) if not _WORD.fullmatch(word)]
            if wrong or not getattr(self, name):
                came = repr(wrong[0]) if wrong else "none"
                raise InputError(f"{name} holds single words of letters, at least one; came {came}")
        both = self.positive_words & self.negative_words
        if both:
            raise InputError(f"{min(both)!r} is in positive_words and in negative_words")

    def count(self, text: str) -> tuple[int, int]:
        """Positive and negative words of a text."""
        words = _WORD.findall(text.lower())
        lists = (self.positive_words, self.negative_words)
        positive, negative = (sum(word in chosen for word in words) for chosen in lists)
        return positive, negative

    def measure(self, text: str) -> tuple[float, float]:
        """Share of positive words among those counted (NaN where there are none), their number."""
        positive, negative = self.count(text)
        counted = positive + negative
        return (positive / counted if counted else float("nan")), float(counted)


_WORD = re.compile(r"[^\W\d_]+")


# --- The result -----------------------------------------------------------------------------------


class SteeringCell(NamedTuple):
    """One layer and coefficient of a sweep."""

    layer: int
    coefficient: float
    effect: float
    perplexity: float


@dataclass(frozen=True, eq=False)
class SteeringSweep:
    """Every continuation of every layer and coefficient, with its score and its likelihood."""

    layers: tuple[int, ...]
    """Block indices."""
    coefficients: tuple[float, ...]
    """Ascending; 0 (unsteered) is one of them, and the same at every layer."""
    prompts: tuple[str, ...]
    """The prompt of each continuation, one per sample."""
    scores: np.ndarray
    """``[layer, coefficient, sample]``, float64; NaN where a text says nothing."""
    weights: np.ndarray
    """``[layer, coefficient, sample]``: how much a score counts (words counted, or 1)."""
    nats: np.ndarray
    """``[layer, coefficient, sample]``: −log p of the continuation under the unsteered model."""
    n_tokens: np.ndarray
    """``[layer, coefficient, sample]``: tokens of the continuation, at least one, int64."""
    texts: np.ndarray
    """``[layer, coefficient, sample]``: the continuations, without their prompts."""
    effect_name: str = "score"
    """What the scores are, with their unit."""
    about: str = ""
    """How it was steered, in words."""

    def __post_init__(self) -> None:
        """Check that the tables have the axes that the labels say."""
        shape = (len(self.layers), len(self.coefficients), len(self.prompts))
        for name in (*_ARRAYS, "texts"):
            if getattr(self, name).shape != shape:
                raise InputError(
                    f"{name} must be [layer, coefficient, sample] = {shape}; "
                    f"it is {getattr(self, name).shape}"
                )
        if 0.0 not in self.coefficients or list(self.coefficients) != sorted(self.coefficients):
            raise InputError(f"coefficients must ascend and hold 0; they are {self.coefficients}")

    def __repr__(self) -> str:
        rows, columns, samples = self.scores.shape
        sizes = f"{rows} layers × {columns} coefficients, {samples} continuations each"
        return f"SteeringSweep({self.effect_name!r}, {sizes})"

    # --- Measures --------------------------------------------------------------------------------

    @property
    def effect(self) -> np.ndarray:
        """``[layer, coefficient]``: weighted mean of the scores; NaN where none counts.

        For word lists that is the share of positive words among all words counted in the cell.
        """
        total = self.weights.sum(-1)
        scored = (np.nan_to_num(self.scores) * self.weights).sum(-1)
        return np.divide(scored, total, out=np.full_like(total, np.nan), where=total > 0)

    @property
    def standard_error(self) -> np.ndarray:
        """``[layer, coefficient]``: of the effect, continuations being drawn independently."""
        total = self.weights.sum(-1)
        away = (np.nan_to_num(self.scores) - self.effect[..., None]) * self.weights
        spread = np.sqrt((np.nan_to_num(away) ** 2).sum(-1))
        return np.divide(spread, total, out=np.full_like(total, np.nan), where=total > 0)

    @property
    def perplexity(self) -> np.ndarray:
        """``[layer, coefficient]``: exp of the mean nats per token under the unsteered model."""
        return np.exp(self.nats.sum(-1) / self.n_tokens.sum(-1))

    @property
    def unsteered(self) -> tuple[float, float]:
        """Effect and perplexity of the model as it is."""
        column = self.coefficients.index(0.0)
        return float(self.effect[0, column]), float(self.perplexity[0, column])

    def cell(self, layer: int, coefficient: float) -> SteeringCell:
        """One layer and coefficient.

        Raises:
            InputError: it was not tried.
        """
        row, column = self._place(layer, coefficient)
        found = float(self.effect[row, column]), float(self.perplexity[row, column])
        return SteeringCell(layer, float(coefficient), *found)

    def samples(self, layer: int, coefficient: float) -> list[str]:
        """The texts of one layer and coefficient, each prompt with its continuation.

        Raises:
            InputError: it was not tried.
        """
        row, column = self._place(layer, coefficient)
        return [
            prompt + text
            for prompt, text in zip(self.prompts, self.texts[row, column], strict=True)
        ]

    def _place(self, layer: int, coefficient: float) -> tuple[int, int]:
        if layer not in self.layers or coefficient not in self.coefficients:
            raise InputError(
                f"layer {layer}, coefficient {coefficient} was not tried: layers are "
                f"{list(self.layers)}, coefficients {list(self.coefficients)}"
            )
        return self.layers.index(layer), self.coefficients.index(coefficient)

    def best(self, fluent: float = FLUENT, high: bool = True) -> SteeringCell:
        """The cell whose effect is the highest while its text stays fluent.

        Args:
            fluent: Only cells are looked at whose perplexity is at most this many times that of
                unsteered text.
            high: False looks for the lowest effect.

        Returns:
            The cell; of equal effects, that of the lowest perplexity.

        Raises:
            InputError: no steered cell is fluent.
        """
        cells = self._fluent(fluent)
        sign = 1 if high else -1
        return max(cells, key=lambda cell: (sign * cell.effect, -cell.perplexity))

    def best_layer(self, fluent: float = FLUENT) -> int:
        """The layer whose effect moves the farthest between its fluent coefficients.

        Args:
            fluent: See `best`.

        Returns:
            A block index; of layers that move equally far, the one of the lowest perplexity.

        Raises:
            InputError: no steered cell is fluent.
        """
        cells = self._fluent(fluent)
        base = self.unsteered[0]

        def reach(layer: int) -> tuple[float, float]:
            own = [cell for cell in cells if cell.layer == layer]
            effects = [base, *(cell.effect for cell in own)]
            return max(effects) - min(effects), -max(cell.perplexity for cell in own)

        return max({cell.layer for cell in cells}, key=reach)

    def _fluent(self, fluent: float) -> list[SteeringCell]:
        """Steered cells with an effect, of at most so many times the unsteered perplexity."""
        limit = fluent * self.unsteered[1]
        steered = [
            self.cell(layer, coefficient)
            for layer in self.layers
            for coefficient in self.coefficients
            if coefficient != 0
        ]
        found = [c for c in steered if c.perplexity <= limit and np.isfinite(c.effect)]
        if not found:
            lowest = min((c.perplexity for c in steered), default=float("nan"))
            raise InputError(
                f"no steered text has a perplexity of at most {fluent:g} times the unsteered "
                f"{self.unsteered[1]:.3g}; the lowest is {lowest:.3g}: try smaller coefficients, "
                "or raise fluent="
            )
        return found

    # --- Out -------------------------------------------------------------------------------------

    def to_frame(self) -> pd.DataFrame:
        """One row per continuation.

        Returns:
            Columns ``layer, coefficient, sample, prompt, continuation, score, weight, nats,
            n_tokens``.
        """
        import pandas as pd

        row, column, sample = (axis.ravel() for axis in np.indices(self.scores.shape))
        return pd.DataFrame(
            {
                "layer": np.array(self.layers)[row],
                "coefficient": np.array(self.coefficients)[column],
                "sample": sample,
                "prompt": np.array(self.prompts, dtype=object)[sample],
                "continuation": self.texts.ravel(),
                "score": self.scores.ravel(),
                "weight": self.weights.ravel(),
                "nats": self.nats.ravel(),
                "n_tokens": self.n_tokens.ravel(),
            }
        )

    def to_text(self) -> str:
        """A table to print: rows are layers, cells effect and perplexity."""
        header = "layer  " + "".join(f"{c:>+17g}" for c in self.coefficients)
        lines = [f"{self.effect_name} (perplexity), by layer and coefficient", header]
        for layer, effects, costs in zip(self.layers, self.effect, self.perplexity, strict=True):
            cells = (f"{e:>8.3f} ({p:.4g})" for e, p in zip(effects, costs, strict=True))
            lines.append(f"{layer:<7}" + "".join(f"{cell:>17}" for cell in cells))
        return "\n".join(lines)

    def plot(self, **options: Any) -> Any:
        """Effect and perplexity, and one against the other. See `steering_figure.plot_steering`."""
        from steering_figure import plot_steering

        names = [str(layer) for layer in self.layers]
        chosen = {"effect_name": self.effect_name, "unsteered": self.unsteered} | options
        return plot_steering(self.effect, self.perplexity, self.coefficients, names, **chosen)

    def save(self, path: str | Path) -> None:
        """Write everything into one safetensors file with a JSON header, atomically.

        Raises:
            RecordFileError: the file cannot be written.
        """
        header = {name: getattr(self, name) for name in ("effect_name", "about")}
        header |= {name: list(getattr(self, name)) for name in _LISTS}
        header["texts"] = self.texts.ravel().tolist()
        tensors = {
            name: torch.from_numpy(np.ascontiguousarray(getattr(self, name))) for name in _ARRAYS
        }
        write_arrays(Path(path), "safetensors", KIND, VERSION, header, tensors)

    @classmethod
    def load(cls, path: str | Path) -> SteeringSweep:
        """Read what `save` wrote.

        Raises:
            RecordFileError: the file is not what `save` writes.
        """
        with open_arrays(Path(path), KIND, VERSION) as stored:
            header = stored.content
            arrays: dict[str, Any] = {name: stored.read(name).numpy() for name in _ARRAYS}
            texts = np.array(header["texts"], dtype=object).reshape(arrays["scores"].shape)
            fields: dict[str, Any] = {name: tuple(header[name]) for name in _LISTS}
            fields |= {name: header[name] for name in ("effect_name", "about")}
            return built(cls, {**fields, **arrays, "texts": texts})


_ARRAYS = ("scores", "weights", "nats", "n_tokens")
_LISTS = ("layers", "coefficients", "prompts")
"""How a sweep lies in a file: arrays, and lists in the header."""
