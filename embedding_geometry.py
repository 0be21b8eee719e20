"""The geometry of embeddings and activations: nearest tokens, neighbourhoods, anisotropy.

- `nearest_tokens`: the vocabulary's tokens nearest to any vector (a direction, an embedding, what a
  head writes); `token_neighbors`: those nearest to tokens.
- `measure_geometry`: how much of the space activations use, by layer: mean cosine of two of them
  (Ethayarajh 2019, section 3.4), participation ratio, share of the first principal component.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from activation_rows import EACH, read_rows, rows_of, varies
from array_files import built, open_arrays, write_arrays
from forward_pass import ArchitectureError, InputError
from head_circuits import token_ids_of
from model_architecture import Architecture, Layer
from model_inspection import weight_of
from module_devices import as_tensor
from sites import is_count
from steering_direction import Direction
from tokenization import Prompt, as_ids, token_strings

if TYPE_CHECKING:
    import pandas as pd
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

TOKENS_KIND, GEOMETRY_KIND = "nearest tokens", "geometry of activations"
VERSION = 1
"""Of the files' schema."""

CHUNK_VALUES = 2**22
"""Numbers of a matrix that are made float32 at once: 16 MiB."""


# --- Nearest tokens -------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class NearestTokens:
    """The tokens nearest to each of some vectors, best first."""

    ids: np.ndarray
    """``[vector, k]``, int64."""
    scores: np.ndarray
    """``[vector, k]``, float32: cosine, or dot product."""
    tokens: tuple[str, ...]
    """Their texts, vector by vector, ``ids.size`` of them."""
    labels: tuple[str, ...]
    """What each vector is called."""
    metric: str
    """``cosine`` or ``dot``."""
    matrix: str
    """``input`` or ``output``: the embedding that was searched."""

    def __post_init__(self) -> None:
        """Check that the tables fit together."""
        shape = self.ids.shape
        if self.scores.shape != shape or len(self.tokens) != self.ids.size:
            raise InputError("ids, scores and tokens must be [vector, k] alike")
        if len(self.labels) != len(self.ids):
            raise InputError(f"{len(self.labels)} labels for {len(self.ids)} vectors")

    def __repr__(self) -> str:
        best = ", ".join(map(repr, self.of(0)[:3]))
        size = f"{len(self.ids)} × {self.ids.shape[1]}"
        return f"NearestTokens({size}, {self.metric}, {self.matrix}: {self.labels[0]!r} → {best}…)"

    def of(self, vector: int = 0) -> list[str]:
        """The tokens nearest to one of the vectors, best first."""
        k = self.ids.shape[1]
        start = range(len(self.ids))[vector] * k
        return list(self.tokens[start : start + k])

    def to_frame(self) -> pd.DataFrame:
        """One row per vector and token: columns ``vector, rank, token, id, score``."""
        import pandas as pd

        rows, ranks = np.indices(self.ids.shape).reshape(2, -1)
        return pd.DataFrame(
            {
                "vector": np.array(self.labels, dtype=object)[rows],
                "rank": ranks,
                "token": list(self.tokens),
                "id": self.ids.ravel(),
                "score": self.scores.ravel(),
            }
        )

    def plot(self, **options: Any) -> Any:
        """A table of tokens, coloured by score. See `comparison_figures.plot_nearest`."""
        from comparison_figures import plot_nearest

        return plot_nearest(self, **options)

    def save(self, path: str | Path) -> None:
        """Write everything into one safetensors file with a JSON header, atomically.

        Raises:
            RecordFileError: the file cannot be written.
        """
        header = {"tokens": list(self.tokens), "labels": list(self.labels)}
        plain = {"metric": self.metric, "matrix": self.matrix}
        arrays = {name: torch.from_numpy(getattr(self, name).copy()) for name in ("ids", "scores")}
        write_arrays(Path(path), "safetensors", TOKENS_KIND, VERSION, header | plain, arrays)

    @classmethod
    def load(cls, path: str | Path) -> NearestTokens:
        """Read what `save` wrote.

        Raises:
            RecordFileError: the file is not what `save` writes.
        """
        with open_arrays(Path(path), TOKENS_KIND, VERSION) as stored:
            fields = dict(stored.content)
            fields |= {name: tuple(fields[name]) for name in ("tokens", "labels")}
            fields |= {name: stored.read(name).numpy() for name in ("ids", "scores")}
            return built(cls, fields)


def embedding_matrix(model: PreTrainedModel, matrix: str) -> Tensor:
    """The weight of the input or output embedding, ``[vocab, d]``, as it is in the model.

    Raises:
        InputError: ``matrix`` is neither ``"input"`` nor ``"output"``.
        ArchitectureError: the model has no such matrix.
    """
    if matrix not in ("input", "output"):
        raise InputError(f"matrix is 'input' or 'output'; came {matrix!r}")
    module = model.get_input_embeddings() if matrix == "input" else model.get_output_embeddings()
    weight = weight_of(module)
    if not isinstance(weight, Tensor) or weight.dim() != 2 or not weight.is_floating_point():
        raise ArchitectureError(
            f"{type(model).__name__} has no {matrix} embedding that is a matrix of numbers"
        )
    return weight


def nearest_tokens(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    vectors: Any,
    k: int = 10,
    *,
    metric: str = "cosine",
    matrix: str = "output",
    labels: Sequence[str] | None = None,
    exclude: Iterable[int] = (),
) -> NearestTokens:
    """The tokens whose embedding is nearest to each vector.

    The vocabulary is gone through in parts: no table of all scores is held. The final norm is not
    applied; the logit lens is that.

    Args:
        model: The model.
        tokenizer: For readable tokens.
        vectors: ``[d]``, ``[vector, d]`` or a `Direction`.
        k: How many.
        metric: ``"cosine"``, or ``"dot"``, which prefers tokens with long embeddings.
        matrix: ``"output"`` (what the vector says, if it reaches the head) or ``"input"`` (which
            word it is like).
        labels: What the vectors are called; None counts.
        exclude: Token ids to leave out.

    Returns:
        A `NearestTokens`.

    Raises:
        InputError: a vector has another width or is zero, or an argument is not known.
        ArchitectureError: the model has no such matrix.
    """
    weight = embedding_matrix(model, matrix)
    wanted = _vectors(vectors, weight.shape[1])
    left_out = _left_out(exclude, len(weight))
    if metric not in ("cosine", "dot"):
        raise InputError(f"metric is 'cosine' or 'dot'; came {metric!r}")
    if not is_count(k, len(weight) - len(left_out)):
        raise InputError(f"k must lie in 1..{len(weight) - len(left_out)}; came {k!r}")
    if metric == "cosine" and not bool(wanted.norm(dim=1).all()):
        raise InputError("a vector of zeros has no nearest token by cosine")
    scores, ids = _best(weight, wanted, k, metric, left_out)
    names = [str(i) for i in range(len(wanted))] if labels is None else [str(x) for x in labels]
    if labels is None and isinstance(vectors, Direction) and vectors.label:
        names = [vectors.label]
    texts = token_strings(tokenizer, ids.ravel().tolist())
    return NearestTokens(ids, scores, tuple(texts), tuple(names), metric, matrix)


def _left_out(exclude: Any, size: int) -> list[int]:
    """Token ids in order, each once."""
    try:
        found = sorted(set(as_ids([] if isinstance(exclude, str) else list(exclude))))
        known = not isinstance(exclude, str) and all(0 <= token < size for token in found)
    except (InputError, TypeError):
        known = False
    if not known:
        raise InputError(f"exclude holds token ids, 0..{size - 1}; came {exclude!r:.60}")
    return found


def _vectors(vectors: Any, width: int) -> Tensor:
    try:
        given = vectors.vector if isinstance(vectors, Direction) else as_tensor(vectors)
    except (TypeError, ValueError, RuntimeError):
        raise InputError(f"vectors are [d] or [vector, d]; came {vectors!r:.60}") from None
    found = given.detach().float()
    found = found[None] if found.dim() == 1 else found
    if found.dim() != 2 or found.shape[1] != width or not len(found):
        raise InputError(
            f"vectors are [d] or [vector, d] with d = {width}; came {list(given.shape)}"
        )
    if not bool(found.isfinite().all()):
        raise InputError("a vector holds NaN or infinity")
    return found


def _best(
    weight: Tensor, wanted: Tensor, k: int, metric: str, left_out: Sequence[int]
) -> tuple[np.ndarray, np.ndarray]:
    """The k best scores and their ids, ``[vector, k]``, the vocabulary a part at a time."""
    wanted = wanted.to(weight.device)
    if metric == "cosine":
        wanted = torch.nn.functional.normalize(wanted, dim=1)
    scores = torch.empty(len(wanted), 0, device=weight.device)
    ids = torch.empty(len(wanted), 0, dtype=torch.long, device=weight.device)
    gone = torch.tensor(left_out, dtype=torch.long, device=weight.device)
    step = max(CHUNK_VALUES // (weight.shape[1] + len(wanted)), 1)
    for start in range(0, len(weight), step):
        part = weight[start : start + step].float()
        if metric == "cosine":
            part = torch.nn.functional.normalize(part, dim=1)
        here = gone[(gone >= start) & (gone < start + len(part))] - start
        found = wanted @ part.T
        found[:, here] = -torch.inf
        names = torch.arange(start, start + len(part), device=weight.device)
        scores = torch.cat([scores, found], 1)
        ids = torch.cat([ids, names.expand(len(wanted), -1)], 1)
        scores, places = scores.topk(min(k, scores.shape[1]))
        ids = ids.gather(1, places)
    return scores.cpu().numpy(), ids.cpu().numpy()


def token_neighbors(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    tokens: str | int | Sequence[str | int],
    k: int = 10,
    *,
    metric: str = "cosine",
    matrix: str = "input",
) -> NearestTokens:
    """The tokens whose embeddings are nearest to those of given tokens, themselves left out.

    Args:
        model: The model.
        tokenizer: For tokens given as text, and for readable ones.
        tokens: One or several: text that is exactly one token (mind the leading space), or ids.
        k: How many neighbours of each.
        metric: ``"cosine"`` or ``"dot"``.
        matrix: ``"input"`` or ``"output"``.

    Returns:
        A `NearestTokens`, one row per token.

    Raises:
        InputError: something is not one token, or an argument is not known.
        ArchitectureError: the model has no such matrix.
    """
    own = token_ids_of(Architecture(model), tokenizer, tokens)
    weight = embedding_matrix(model, matrix)
    if not is_count(k, len(weight) - 1):
        raise InputError(f"k must lie in 1..{len(weight) - 1}; came {k!r}")
    found = nearest_tokens(
        model, tokenizer, weight[own], k + 1, metric=metric, matrix=matrix,
        labels=token_strings(tokenizer, own),
    )  # fmt: skip
    # itself is the best by cosine only; and where it is not among them, the last one goes
    places = [_without(row, token)[:k] for row, token in zip(found.ids, own, strict=True)]
    ids = np.stack([row[p] for row, p in zip(found.ids, places, strict=True)])
    scores = np.stack([row[p] for row, p in zip(found.scores, places, strict=True)])
    texts = tuple(token_strings(tokenizer, ids.ravel().tolist()))
    return NearestTokens(ids, scores, texts, found.labels, metric, matrix)


def _without(ids: np.ndarray, token: int) -> np.ndarray:
    """Places of all ids but one, all rows being equally long afterwards."""
    kept = np.flatnonzero(ids != token)
    return kept[: len(ids) - 1]


# --- Anisotropy -----------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class GeometryResult:
    """How much of the space a set of vectors uses, by layer."""

    mean_cosine: np.ndarray
    """``[layer]``: mean cosine of two different vectors; 0 if they point everywhere alike, 1 if
    they all point one way."""
    participation_ratio: np.ndarray
    """``[layer]``: (Σλ)² / Σλ², λ the variances along principal components: how many dimensions
    the variance is spread over, 1 to the width; NaN where there is none (`activation_rows.varies`).
    """
    first_component: np.ndarray
    """``[layer]``: share of the variance along the first principal component; NaN likewise."""
    mean_norm: np.ndarray
    """``[layer]``: mean length of the vectors."""
    layers: tuple[str, ...]
    """What each entry of the layer axis is called."""
    count: int
    """Number of vectors."""
    width: int
    """Their number of dimensions; no participation ratio is larger, nor than ``count - 1``."""
    site: str = "resid_post"

    def __post_init__(self) -> None:
        """Check that there is a number for each layer."""
        if any(getattr(self, name).shape != (len(self.layers),) for name in _MEASURES):
            raise InputError(f"every measure needs {len(self.layers)} numbers, one per layer")

    def __repr__(self) -> str:
        low, high = self.mean_cosine.min(), self.mean_cosine.max()
        size = f"{self.count} vectors of {self.width}, {len(self.layers)} layers"
        return f"GeometryResult({self.site}, {size}, mean cosine {low:.2f} to {high:.2f})"

    def to_frame(self) -> pd.DataFrame:
        """One row per layer: columns ``layer`` and the four measures."""
        import pandas as pd

        measures = {name: getattr(self, name) for name in _MEASURES}
        return pd.DataFrame({"layer": self.layers, **measures})

    def plot(self, **options: Any) -> Any:
        """Mean cosine and participation ratio by layer. See `comparison_figures.plot_geometry`."""
        from comparison_figures import plot_geometry

        return plot_geometry(self, **options)

    def save(self, path: str | Path) -> None:
        """Write everything into one safetensors file with a JSON header, atomically.

        Raises:
            RecordFileError: the file cannot be written.
        """
        header = {name: getattr(self, name) for name in ("count", "width", "site")}
        header["layers"] = list(self.layers)
        arrays = {name: torch.from_numpy(getattr(self, name).copy()) for name in _MEASURES}
        write_arrays(Path(path), "safetensors", GEOMETRY_KIND, VERSION, header, arrays)

    @classmethod
    def load(cls, path: str | Path) -> GeometryResult:
        """Read what `save` wrote.

        Raises:
            RecordFileError: the file is not what `save` writes.
        """
        with open_arrays(Path(path), GEOMETRY_KIND, VERSION) as stored:
            fields = {**stored.content, "layers": tuple(stored.content["layers"])}
            return built(cls, fields | {name: stored.read(name).numpy() for name in _MEASURES})


_MEASURES = ("mean_cosine", "participation_ratio", "first_component", "mean_norm")


def measure_geometry(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    texts: Sequence[Prompt],
    layers: Layer | Sequence[Layer] | None = None,
    *,
    read: Any = EACH,
    site: str = "resid_post",
    batch_size: int = 64,
) -> GeometryResult:
    """How much of the space the activations of texts use, layer by layer.

    Args:
        model: The model.
        tokenizer: For text.
        texts: Their tokens are the vectors; hundreds of tokens at least.
        layers: In any spelling; None means all.
        read: Which tokens; ``"each"`` takes all, ``"rest"`` all but the first, which in many
            models is an attention sink, long enough to make up most of the variance.
        site: Which site.
        batch_size: Texts per forward pass.

    Returns:
        A `GeometryResult`.

    Raises:
        InputError: there are fewer than two vectors, or a text cannot be used.
        LayerError: there is no such layer.
        SiteError: the model has no such site.
    """
    rows = read_rows(model, tokenizer, texts, layers, read=read, site=site, batch_size=batch_size)
    return geometry_of(rows)


def geometry_of(activations: Any, layers: Sequence[Layer] | None = None) -> GeometryResult:
    """The same of vectors that are there already.

    Args:
        activations: `ActivationRows`, records or an array; see `activation_rows.rows_of`.
        layers: See there.

    Raises:
        InputError: there are fewer than two vectors.
    """
    rows = rows_of(activations, layers)
    names = tuple(map(str, rows.layers))
    count, _, width = rows.values.shape
    if count < 2:
        raise InputError("the geometry of one vector has no meaning; give at least two")
    each = [_measures(rows.values[:, i].astype(np.float64)) for i in range(len(names))]
    return _geometry(each, names, (count, width), rows.site)


def _geometry(
    each: Sequence[tuple[float, ...]], names: tuple[str, ...], size: tuple[int, int], site: str
) -> GeometryResult:
    columns = dict(zip(_MEASURES, np.array(each).T, strict=True))
    return GeometryResult(**columns, layers=names, count=size[0], width=size[1], site=site)


def _measures(x: np.ndarray) -> tuple[float, float, float, float]:
    """The four measures of ``[row, feature]``."""
    centred = x - x.mean(0) if varies(x.astype(np.float32)) else np.zeros_like(x)
    table = centred.T @ centred if len(x) > x.shape[1] else centred @ centred.T
    variances = np.linalg.eigvalsh(table).clip(0)[::-1]
    total = variances.sum()
    ratio = total**2 / (variances**2).sum() if total else float("nan")
    first = variances[0] / total if total else float("nan")
    return mean_cosine(x), float(ratio), float(first), float(np.linalg.norm(x, axis=1).mean())


def mean_cosine(x: np.ndarray) -> float:
    """Mean cosine over *all* pairs of different rows of ``[row, feature]``.

    With u the rows scaled to length 1 it is (‖Σu‖² − n) / (n² − n): exact, so no pairs need be
    drawn at random. Rows of zeros are left out.
    """
    length = np.linalg.norm(x, axis=1, keepdims=True)
    units = (x / np.where(length > 0, length, 1.0))[length[:, 0] > 0]
    n = len(units)
    if n < 2:
        return float("nan")
    return float(((units.sum(0) ** 2).sum() - n) / (n * (n - 1)))


def embedding_geometry(model: PreTrainedModel, matrix: str = "input") -> GeometryResult:
    """The same of the vocabulary's embeddings.

    Args:
        model: The model.
        matrix: ``"input"`` or ``"output"``.

    Raises:
        InputError: there is no such matrix.
        ArchitectureError: the model has none.
    """
    weight = embedding_matrix(model, matrix).float().cpu().numpy()
    size = len(weight), weight.shape[1]
    return _geometry(
        [_measures(weight.astype(np.float64))], (f"{matrix} embedding",), size, "weights"
    )
