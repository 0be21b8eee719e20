"""How alike representations are: linear CKA and cosine, between layers, models and prompts.

With X, Y ``[row, feature]`` for the same rows, and K = XXᵀ, L = YYᵀ after centring,

    CKA = HSIC(K, L) / √(HSIC(K, K) HSIC(L, L))        (Kornblith et al. 2019, section 3)

It is 1 for any rotation, scaling and shift of the same rows, and X and Y may differ in width. HSIC
is either the plain estimate tr(K L), equal to ‖XᵀY‖² of centred X and Y, which is high for few rows
whatever they are; or the unbiased one of Song et al. (2012, equation 5), 0 on average for
unrelated rows and possibly negative, which may also be averaged over minibatches (Nguyen et al.
2021, equation 3). It is an inner product too, of U-centred K and L (Székely & Rizzo 2014).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from activation_rows import EACH, REST, ActivationRows, read_rows, varies
from array_files import built, open_arrays, write_arrays
from direction_finding import check_examples
from forward_pass import InputError
from model_architecture import Architecture, Layer
from module_devices import as_tensor
from tokenization import Prompt, encode

if TYPE_CHECKING:
    import pandas as pd
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

KIND = "similarity"
VERSION = 1
"""Of the file's schema."""

METRICS = ("cka", "cosine")
BATCH_ROWS = 256
"""Rows of a minibatch of CKA: its tables of rows × rows are kept for every layer."""


# --- Formulas -------------------------------------------------------------------------------------


def linear_cka(x: Any, y: Any, *, debiased: bool = False, form: str = "auto") -> float:
    """Linear CKA of two representations of the same rows.

    Args:
        x: ``[row, feature]``.
        y: ``[row, feature]``, of any width.
        debiased: With the unbiased HSIC; may be slightly below 0.
        form: ``"features"`` goes by ‖XᵀY‖², ``"gram"`` by tables of rows × rows; the results are
            the same. ``"auto"`` takes the cheaper one.

    Returns:
        0 to 1 (1 is the same up to rotation, scale and shift); NaN where a side does not vary, but
        for rounding (`activation_rows.varies`).

    Raises:
        InputError: the rows do not correspond, are too few or not finite, or the form is not known.
    """
    a, b = (_matrix(each, debiased) for each in (x, y))
    if len(a) != len(b):
        raise InputError(f"CKA compares the same rows: {len(a)} and {len(b)} came")
    if form not in ("auto", "features", "gram"):
        raise InputError(f"form is 'auto', 'features' or 'gram'; came {form!r}")
    if form == "auto":
        form = "gram" if debiased or len(a) < max(a.shape[1], b.shape[1]) else "features"
    hsic = _hsic_of_features if form == "features" else _hsic_of_grams
    cross, own_a, own_b = (hsic(p, q, debiased) for p, q in ((a, b), (a, a), (b, b)))
    return float(_ratio(np.array(cross), np.array(own_a), np.array(own_b)))


def _matrix(values: Any, debiased: bool) -> np.ndarray:
    given = as_tensor(values).detach().cpu()
    found = given.cpu().double().numpy()
    least = 4 if debiased else 2
    if found.ndim != 2 or len(found) < least:
        raise InputError(
            f"a representation is [row, feature] with at least {least} rows; came {found.shape}"
        )
    if not np.isfinite(found).all():
        raise InputError("a representation holds NaN or infinity: leave such rows out")
    narrow = given.dtype == torch.float32
    return _centred(found.astype(np.float32) if narrow else found)


def _centred(x: np.ndarray) -> np.ndarray:
    """Rows ``[row, feature]`` less their mean, float64; zeros where they differ by rounding alone.

    Sums of them are exact: of the rows as they are a large mean would cancel digits.
    """
    exact = x.astype(np.float64)
    return exact - exact.mean(0) if varies(x) else np.zeros_like(exact)


def _hsic_of_features(x: np.ndarray, y: np.ndarray, debiased: bool) -> float:
    """Without a table of rows × rows; x and y are centred."""
    total = float(((x.T @ y) ** 2).sum())
    if not debiased:
        return total
    n = len(x)
    dx, dy = (x**2).sum(1), (y**2).sum(1)  # diagonals, to be taken out of K and L
    # of K and L without diagonals, whose rows sum to −dx and −dy as x and y are centred
    trace = total - dx @ dy
    sums = dx.sum() * dy.sum() / ((n - 1) * (n - 2))
    return float((trace + sums - 2 * (dx @ dy) / (n - 2)) / (n * (n - 3)))


def _hsic_of_grams(x: np.ndarray, y: np.ndarray, debiased: bool) -> float:
    n = len(x)
    k, l_ = (centred_gram(each, debiased) for each in (x, y))
    return float((k * l_).sum() / (n * (n - 3) if debiased else 1))


def centred_gram(x: np.ndarray, debiased: bool) -> np.ndarray:
    """``x xᵀ`` centred: double-centred, or U-centred (Székely & Rizzo 2014, definition 2).

    Args:
        x: ``[row, feature]``.
        debiased: U-centred, with a diagonal of zeros.

    Returns:
        ``[row, row]``; the sum of the products of two of them is HSIC, for U-centred ones times
        n (n − 3).
    """
    gram = x @ x.T
    n = len(gram)
    if not debiased:
        rows = gram.mean(0)
        return gram - rows - rows[:, None] + rows.mean()
    np.fill_diagonal(gram, 0.0)
    rows = gram.sum(0)
    gram = gram - (rows + rows[:, None]) / (n - 2) + rows.sum() / ((n - 1) * (n - 2))
    np.fill_diagonal(gram, 0.0)
    return gram


def _ratio(cross: np.ndarray, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    with np.errstate(divide="ignore", invalid="ignore"):
        scale = np.sqrt(np.clip(a, 0, None) * np.clip(b, 0, None))
        return np.where(scale > 0, cross / scale, np.nan)


class CKAMeter:
    """CKA of every layer with every layer, a minibatch of rows at a time.

    Args:
        debiased: Average the unbiased HSIC over minibatches (Nguyen et al. 2021). Without it
            ``add`` may be called only once.
    """

    def __init__(self, debiased: bool = True) -> None:
        self._debiased, self._batches, self.rows = debiased, 0, 0

    def add(self, x: np.ndarray, y: np.ndarray | None = None) -> None:
        """Take in some rows.

        Args:
            x: ``[row, layer, feature]``.
            y: The same rows in another model, or ``x`` itself if None.

        Raises:
            InputError: the rows do not correspond, are too few, or come in parts without
                ``debiased``.
        """
        if len(x) < (4 if self._debiased else 2):
            raise InputError(f"CKA needs at least {4 if self._debiased else 2} rows; came {len(x)}")
        if y is not None and len(x) != len(y):
            raise InputError(f"CKA compares the same rows: {len(x)} and {len(y)} came")
        if self._batches and not self._debiased:
            raise InputError("the plain HSIC of minibatches has no meaning: use debiased=True")
        a = self._flat(x)
        b = a if y is None else self._flat(y)
        n = len(x)
        share = 1 / (n * (n - 3)) if self._debiased else 1.0
        parts = share * (a @ b.T), share * (a**2).sum(1), share * (b**2).sum(1)
        if not self._batches:
            self._sums = parts
        else:
            self._sums = tuple(old + new for old, new in zip(self._sums, parts, strict=True))
        self._batches, self.rows = self._batches + 1, self.rows + n

    def _flat(self, x: np.ndarray) -> np.ndarray:
        layers = range(x.shape[1])
        return np.stack([centred_gram(_centred(x[:, i]), self._debiased).ravel() for i in layers])

    @property
    def values(self) -> np.ndarray:
        """``[layer of x, layer of y]``; NaN where one does not vary, but for rounding.

        Raises:
            InputError: there were no rows.
        """
        if not self._batches:
            raise InputError("no rows were added")
        cross, a, b = self._sums
        return _ratio(cross, a[:, None], b[None])


def minibatches(count: int, size: int, seed: int = 0) -> list[np.ndarray]:
    """Indices in random order, in parts of about equal size, at most ``size`` each."""
    order = np.random.default_rng(seed).permutation(count)
    return [np.sort(part) for part in np.array_split(order, -(-count // size))]


def cosine_table(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Cosine of each vector of one list with each of another, averaged over rows.

    Args:
        x: ``[row, a, feature]``.
        y: ``[row, b, feature]``.

    Returns:
        ``[a, b]``; a vector of zeros has the cosine 0.
    """
    units = []
    for values in (x, y):
        exact = values.astype(np.float64)
        length = np.linalg.norm(exact, axis=-1, keepdims=True)
        units.append(exact / np.where(length > 0, length, 1.0))
    return np.einsum("nad,nbd->ab", *units, optimize=True) / len(x)


# --- The result -----------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class SimilarityResult:
    """How alike each two entries are: layers of one model, layers of two models, or prompts."""

    values: np.ndarray
    """``[row, column]``, float64; at most 1."""
    row_labels: tuple[str, ...]
    column_labels: tuple[str, ...]
    between: str
    """``layers``, ``models`` or ``prompts``."""
    metric: str
    """``cka``, ``debiased cka`` or ``cosine``."""
    site: str
    count: int
    """Vectors that each number goes by."""
    layer: int | None = None
    """Where prompts were compared."""

    def __post_init__(self) -> None:
        """Check that the table has the axes that the labels say."""
        if self.values.shape != (len(self.row_labels), len(self.column_labels)):
            raise InputError(f"the table is {self.values.shape}, not as its labels say")

    def __repr__(self) -> str:
        size = " × ".join(map(str, self.values.shape))
        where = f"{self.site}{'' if self.layer is None else f' of layer {self.layer}'}"
        return f"SimilarityResult({self.between}, {size}, {self.metric}, {where}, n={self.count})"

    def to_frame(self) -> pd.DataFrame:
        """One row per cell: columns ``row, column, value`` (labels as text)."""
        import pandas as pd

        rows, columns = np.indices(self.values.shape).reshape(2, -1)
        return pd.DataFrame(
            {
                "row": np.array(self.row_labels, dtype=object)[rows],
                "column": np.array(self.column_labels, dtype=object)[columns],
                "value": self.values.ravel(),
            }
        )

    def plot(self, **options: Any) -> Any:
        """A heat map. See `comparison_figures.plot_similarities`."""
        from comparison_figures import plot_similarities

        return plot_similarities(self, **options)

    def save(self, path: str | Path) -> None:
        """Write everything into one safetensors file with a JSON header, atomically.

        Raises:
            RecordFileError: the file cannot be written.
        """
        header = {name: getattr(self, name) for name in _PLAIN}
        header |= {name: list(getattr(self, name)) for name in _LISTS}
        arrays = {"values": torch.from_numpy(np.ascontiguousarray(self.values))}
        write_arrays(Path(path), "safetensors", KIND, VERSION, header, arrays)

    @classmethod
    def load(cls, path: str | Path) -> SimilarityResult:
        """Read what `save` wrote.

        Raises:
            RecordFileError: the file is not what `save` writes.
        """
        with open_arrays(Path(path), KIND, VERSION) as stored:
            fields = {**stored.content, "values": stored.read("values").numpy()}
            return built(cls, {**fields, **{name: tuple(fields[name]) for name in _LISTS}})


_PLAIN = ("between", "metric", "site", "count", "layer")
_LISTS = ("row_labels", "column_labels")


# --- Measuring ------------------------------------------------------------------------------------


def layer_similarity(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    texts: Sequence[Prompt],
    other: Any = None,
    *,
    metric: str = "cka",
    debiased: bool = True,
    layers: Layer | Sequence[Layer] | None = None,
    read: Any = EACH,
    site: str = "resid_post",
    seed: int = 0,
    batch_size: int = 64,
) -> SimilarityResult:
    """Compare every layer with every layer: of one model, or of two models on the same texts.

    Args:
        model: The rows of the table.
        tokenizer: For text; with another model, texts are tokenized by it for both.
        texts: As many as can be had; CKA of few rows says little.
        other: The columns of the table: a model or a `ModelAnalyzer`; None is the model itself.
        metric: ``"cka"``, or ``"cosine"`` (mean over rows; the widths must agree. Between models
            it means something only if one was made from the other).
        debiased: CKA with the unbiased HSIC, averaged over minibatches of `BATCH_ROWS` rows.
        layers: In any spelling, of both models; None means all.
        read: Which tokens are rows; ``"each"`` takes every token of every text, ``"rest"`` all
            but the first, which in many models is an attention sink that outweighs all others.
        site: Which site.
        seed: Of the minibatches.
        batch_size: Texts per forward pass.

    Returns:
        ``[layer of model, layer of other]``.

    Raises:
        InputError: too few rows, unequal widths, an unknown metric, or no model.
        LayerError: there is no such layer.
        SiteError: the model has no such site.
    """
    if metric not in METRICS:
        raise InputError(f"metric is one of {', '.join(METRICS)}; came {metric!r}")
    how: dict[str, Any] = {"read": read, "site": site, "batch_size": batch_size}
    one = read_rows(model, tokenizer, texts, layers, **how)
    if hasattr(other, "architecture"):
        other = other.model
    if other is not None and not hasattr(other, "config"):
        raise InputError(f"other is a loaded model, an analyzer or None; came {other!r:.60}")
    two = one if other is None else read_rows(other, tokenizer, texts, layers, **how)
    if metric == "cosine":
        _check_widths(one, two)
        values, name = cosine_table(one.values, two.values), metric
    else:
        values = cka_table(one.values, None if two is one else two.values, debiased, seed)
        name = "debiased cka" if debiased else "cka"
    labels = tuple(map(str, one.layers)), tuple(map(str, two.layers))
    between = "layers" if other is None else "models"
    return SimilarityResult(values, *labels, between, name, site, len(one.values))


def cka_table(
    x: np.ndarray, y: np.ndarray | None = None, debiased: bool = True, seed: int = 0
) -> np.ndarray:
    """CKA of every layer with every layer.

    Args:
        x: ``[row, layer, feature]``.
        y: The same rows of another model; None takes ``x``.
        debiased: Average the unbiased HSIC over minibatches of `BATCH_ROWS` rows.
        seed: Of the minibatches.

    Returns:
        ``[layer of x, layer of y]``.

    Raises:
        InputError: there are too few rows, or they do not correspond.
    """
    meter = CKAMeter(debiased)
    whole = [np.arange(len(x))]
    for part in minibatches(len(x), BATCH_ROWS, seed) if debiased else whole:
        meter.add(x[part], None if y is None else y[part])
    return meter.values


def _check_widths(one: ActivationRows, two: ActivationRows) -> None:
    widths = one.values.shape[2], two.values.shape[2]
    if widths[0] != widths[1]:
        raise InputError(f"a cosine needs equal widths; {widths[0]} and {widths[1]} came: use CKA")


def _check_lengths(counts: Sequence[int]) -> None:
    if len(set(counts)) > 1 or counts[0] < 2:
        raise InputError(
            "CKA of prompts needs as many tokens in each, two at least; they have "
            f"{', '.join(map(str, counts))}: compare by metric='cosine'"
        )


def prompt_similarity(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    texts: Sequence[Prompt],
    layer: Layer,
    *,
    metric: str = "cosine",
    centred: bool = False,
    read: Any = "last",
    at: Sequence[str | int] | None = None,
    site: str = "resid_post",
    batch_size: int = 64,
) -> SimilarityResult:
    """Compare every prompt with every prompt, at one layer.

    Args:
        model: The model.
        tokenizer: For text.
        texts: At least two.
        layer: In any spelling.
        metric: ``"cosine"`` of one vector per prompt; ``"cka"`` of the prompts' tables of tokens,
            which must have as many tokens each (rows are positions; plain, not debiased).
        centred: Take the mean over prompts away before the cosine. Where activations all point
            one way (see `embedding_geometry`) cosines are near 1 without it, whatever the prompts.
            It needs three texts; those of n unrelated ones are −1/(n − 1) on the average.
        read: Which token; see `read_rows`. Of CKA it is always each.
        at: A position or part for each text; see `read_rows`.
        site: Which site.
        batch_size: Texts per forward pass.

    Returns:
        ``[prompt, prompt]``.

    Raises:
        InputError: fewer than two texts (three if centred), unequal lengths for CKA, or an unknown
            metric.
        LayerError: there is no such layer.
        SiteError: the model has no such site.
    """
    if metric not in METRICS:
        raise InputError(f"metric is one of {', '.join(METRICS)}; came {metric!r}")
    check_examples(texts, "texts")
    if len(texts) < 2:
        raise InputError("give at least two texts to compare")
    if centred and metric == "cosine" and len(texts) == 2:
        raise InputError("of two texts less their mean the cosine is -1 always: give three or more")
    if metric == "cka":
        read, at = EACH, None
        _check_lengths([len(encode(tokenizer, text)) for text in texts])
    elif at is None and isinstance(read, str) and read in (EACH, REST):
        raise InputError(
            f"read={read!r} makes several vectors of a text; a cosine needs one of each"
        )
    arch = Architecture(model)
    how: dict[str, Any] = {"read": read, "at": at, "site": site, "batch_size": batch_size}
    rows = read_rows(arch, tokenizer, texts, [arch.resolve(layer)], **how)
    x = rows.values[:, 0]
    if metric == "cka":
        by_text = x.reshape(len(texts), -1, x.shape[-1])
        values = cka_table(by_text.swapaxes(0, 1), debiased=False)
    else:
        x = x - x.mean(0) if centred else x
        values = cosine_table(x[None], x[None])
    labels = tuple(text if isinstance(text, str) else f"text {i}" for i, text in enumerate(texts))
    name = "centred cosine" if centred and metric == "cosine" else metric
    count = int(len(rows.values) / len(texts))
    return SimilarityResult(values, labels, labels, "prompts", name, site, count, rows.layers[0])
