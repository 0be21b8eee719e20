"""The weights of attention heads, of every projection layout, and their circuits.

    weights = head_weights(Architecture(model), layer=4)
    weights.W_Q                    # [head, d_model, d_head], as in TransformerLens: x @ W_Q[h]
    weights.ov(4).svd()            # W_V W_O of head 4, as a product of thin matrices
    weights.qk(4).norm()           # W_Q W_Kᵀ

How they are found, and proven, is told in `attention_projections`. The weights are raw: the norm
before attention is not in them (``fold_norm=True`` puts its gain in), and neither is what the model
does to queries and keys afterwards (`HeadWeights.normed`, `HeadWeights.rotated`).

Reference: Elhage et al. (2021), "A Mathematical Framework for Transformer Circuits".
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from array_files import built, open_arrays, write_arrays
from attention_projections import (
    PARTS,
    Projection,
    Reading,
    Watched,
    affine_of,
    trace_part,
    watch_attention,
    watch_reading,
)
from factored_matrix import FactoredMatrix
from forward_pass import InputError, Site, SiteError
from model_architecture import Architecture, Layer
from model_shards import require_whole
from module_devices import exact
from norm_gain import NormGain, norms_before_attention

if TYPE_CHECKING:
    import pandas as pd

KIND = "head weights"
VERSION = 1
"""Of the file's schema."""


@dataclass(frozen=True, eq=False)
class HeadWeights:
    """The weights of one block's heads, in float32 or wider.

    With x the input of attention, head h has queries ``scale · (x @ W_Q[h] + b_Q[h])``, and keys
    and values likewise of its key/value head. The sum over heads of ``z[h] @ W_O[h]``, plus
    ``b_O``, is what the output projection gives.
    """

    layer: int
    """Index of the block."""
    W_Q: Tensor
    """``[head, d_model, d_head]``."""
    W_K: Tensor
    """``[kv_head, d_model, d_head]``: once per stored head."""
    W_V: Tensor
    """``[kv_head, d_model, d_value]``; d_value is d_head but for latent attention."""
    W_O: Tensor
    """``[head, d_value, d_model]``."""
    b_Q: Tensor
    """``[head, d_head]``; 0 where there is none, as the other biases."""
    b_K: Tensor
    """``[kv_head, d_head]``."""
    b_V: Tensor
    """``[kv_head, d_value]``."""
    b_O: Tensor
    """``[d_model]``."""
    kv_of_head: tuple[int, ...]
    """The key/value head that each query head reads."""
    scales: tuple[float, float, float]
    """What the model multiplies query, key and value by beside their weights."""
    normed: tuple[str, ...] = ()
    """Those of query, key and value that a norm acts on; its scale depends on the token.

    Where two matrices follow each other with a norm between (latent attention), its gain is in
    their product; the gain of a query or key norm behind the weights is not.
    """
    rotated: bool = False
    """Whether queries and keys are rotated by position: ``qk`` is what they are at distance 0."""
    gated: bool = False
    """Whether something (a gate, a norm) changes z between attention and ``W_O``."""
    output_normed: bool = False
    """Whether a norm lies between the output projection and the stream (Gemma 2, OLMo 2).

    Also where it cannot be seen what attention adds: blocks that return a norm of the sum.
    """
    folded: bool = False
    """Whether the norm before attention is in the weights: they then act on ``x / scale(x)``."""
    modules: tuple[str, ...] = ()
    """Paths of the modules that the weights were found in, inside the attention module."""

    def __repr__(self) -> str:
        heads, d_model, d_head = self.W_Q.shape
        stored = len(self.W_K)
        shared = "" if stored == heads else f", {stored} key/value heads"
        notes = [
            name for name in ("rotated", "gated", "output_normed", "folded") if getattr(self, name)
        ]
        notes += [f"{part} normed" for part in self.normed]
        about = f"{heads} heads{shared}, {d_model} × {d_head}"
        return f"HeadWeights(layer {self.layer}, {', '.join([about, *notes])})"

    @property
    def n_heads(self) -> int:
        """Number of query heads."""
        return len(self.W_Q)

    def expanded(self) -> HeadWeights:
        """The same with keys and values once per query head, as if none were shared."""
        index = list(self.kv_of_head)
        shared = {name: getattr(self, name)[index] for name in ("W_K", "W_V", "b_K", "b_V")}
        return replace(self, **shared, kv_of_head=tuple(range(self.n_heads)))

    def qk(self, head: int | None = None) -> FactoredMatrix:
        """``W_Q W_Kᵀ [d_model, d_model]``: row the reading token's, column the token read.

        Scores are ``x_query @ qk @ x_key`` times `scales` and the model's own factor, less biases,
        norms and rotation.

        Args:
            head: Which; None is all, as a stack.

        Raises:
            InputError: there is no such head.
        """
        index = self._index(head)
        keys = self.W_K[[self.kv_of_head[h] for h in index]]
        return _one_or_all(FactoredMatrix(self.W_Q[index], keys.mT), head)

    def ov(self, head: int | None = None) -> FactoredMatrix:
        """``W_V W_O [d_model, d_model]``: what a head moves, from the token read to its output.

        Less biases, gates and norms, and what the model multiplies values (`scales`) or attention's
        output by.

        Args:
            head: Which; None is all, as a stack.

        Raises:
            InputError: there is no such head.
        """
        index = self._index(head)
        values = self.W_V[[self.kv_of_head[h] for h in index]]
        return _one_or_all(FactoredMatrix(values, self.W_O[index]), head)

    def _index(self, head: int | None) -> list[int]:
        if head is None:
            return list(range(self.n_heads))
        if isinstance(head, bool) or head not in range(-self.n_heads, self.n_heads):
            raise InputError(
                f"layer {self.layer} has {self.n_heads} heads, 0..{self.n_heads - 1}; came {head!r}"
            )
        return [int(head) % self.n_heads]

    def to_frame(self) -> pd.DataFrame:
        """One row per head.

        Returns:
            Columns ``layer, head, kv_head`` and the Frobenius norms ``W_Q, W_K, W_V, W_O, qk, ov``.
        """
        import pandas as pd

        all_heads = self.expanded()
        norms = {name: getattr(all_heads, name).flatten(1).norm(dim=1) for name in MATRICES}
        norms |= {"qk": self.qk().norm(), "ov": self.ov().norm()}
        columns = {"layer": self.layer, "head": range(self.n_heads), "kv_head": self.kv_of_head}
        return pd.DataFrame(columns | {name: norm.cpu().numpy() for name, norm in norms.items()})

    def plot(self, **options: Any) -> Any:
        """Frobenius norms, a row per matrix and a column per head. See `heat_maps.plot_heatmap`."""
        from heat_maps import plot_heatmap

        frame = self.to_frame().iloc[:, 3:]
        chosen: dict[str, Any] = {
            "x_name": "head",
            "value_label": "Frobenius norm",
            "signed": False,
        }
        chosen |= {"title": f"Weights of the heads of layer {self.layer}"}
        return plot_heatmap(frame.to_numpy().T, None, list(frame.columns), **(chosen | options))

    def save(self, path: str | Path) -> None:
        """Write everything into one safetensors file with a JSON header, atomically.

        Raises:
            RecordFileError: the file cannot be written.
        """
        header = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in TENSORS}
        header = {key: list(v) if isinstance(v, tuple) else v for key, v in header.items()}
        arrays = {name: getattr(self, name).contiguous().cpu() for name in TENSORS}
        write_arrays(Path(path), "safetensors", KIND, VERSION, header, arrays)

    @classmethod
    def load(cls, path: str | Path) -> HeadWeights:
        """Read what `save` wrote; the tensors are on the CPU.

        Raises:
            RecordFileError: the file is not what `save` writes.
        """
        with open_arrays(Path(path), KIND, VERSION) as stored:
            header: dict[str, Any] = {
                k: tuple(v) if isinstance(v, list) else v for k, v in stored.content.items()
            }
            tensors: Any = {name: stored.read(name) for name in TENSORS}
            return built(cls, header | tensors)


MATRICES = ("W_Q", "W_K", "W_V", "W_O")
TENSORS = (*MATRICES, "b_Q", "b_K", "b_V", "b_O")


def _one_or_all(stack: FactoredMatrix, head: int | None) -> FactoredMatrix:
    return stack if head is None else stack[0]


class OutputWeights(NamedTuple):
    """What is known of how one block's heads write."""

    W_O: Tensor
    """``[head, d_value, d_model]``."""
    b_O: Tensor
    """``[d_model]``."""
    kv_of_head: tuple[int, ...]
    normed: bool
    """Whether a norm lies between the output projection and the stream."""


# --- Finding them ---------------------------------------------------------------------------------


def head_weights(
    architecture: Architecture, layer: Layer, *, fold_norm: bool = False
) -> HeadWeights:
    """The weights of one block's heads.

    Args:
        architecture: The model.
        layer: The block, in any spelling.
        fold_norm: Put the gain of the norm before attention into W_Q, W_K and W_V (and its bias
            into theirs; behind a layer norm they also take off the mean), so that they act on
            the stream divided by the norm's scale.

    Raises:
        LayerError: there is no such block.
        SiteError: the block has no heads, or its weights could not be proven.
    """
    return all_head_weights(architecture, [layer], fold_norm=fold_norm)[0]


def all_head_weights(
    architecture: Architecture,
    layers: Sequence[Layer] | Layer | None = None,
    *,
    fold_norm: bool = False,
) -> list[HeadWeights]:
    """The weights of several blocks' heads, found together.

    Args:
        architecture: The model.
        layers: Blocks, in any spelling; None is all that have heads.
        fold_norm: See `head_weights`.

    Returns:
        One per block, in the order asked for; copies, four matrices of float32 or wider each.

    Raises:
        LayerError: there is no such block.
        SiteError: a block has no heads, or its weights could not be proven.
    """
    return list(each_head_weights(architecture, layers, fold_norm=fold_norm))


def each_head_weights(
    architecture: Architecture,
    layers: Sequence[Layer] | Layer | None = None,
    *,
    fold_norm: bool = False,
) -> Iterator[HeadWeights]:
    """As `all_head_weights`, one block after the other: those of one exist at a time.

    Args:
        architecture: The model.
        layers: Blocks, in any spelling; None is all that have heads.
        fold_norm: See `head_weights`.

    Raises:
        LayerError: there is no such block.
        SiteError: a block has no heads, or its weights could not be proven.
    """
    chosen = layers_with_heads(architecture, layers)
    watched = watch_attention(architecture, chosen)
    readings = watch_reading(architecture, chosen)
    norms = norms_before_attention(architecture, chosen) if fold_norm else dict.fromkeys(chosen)
    for layer in chosen:
        raw = _assemble(architecture, layer, watched.pop(layer), readings[layer])
        norm = norms[layer]
        raw = raw if norm is None else _folded(raw, norm)
        yield replace(raw, folded=fold_norm)


def output_weights(architecture: Architecture, layers: Sequence[int]) -> dict[int, OutputWeights]:
    """W_O of several blocks, also where queries, keys or values come from elsewhere.

    Args:
        architecture: The model.
        layers: Blocks that have heads (see `layers_with_heads`).

    Raises:
        SiteError: it could not be proven.
    """
    watched = watch_attention(architecture, layers)
    readings = watch_reading(architecture, layers)
    model = type(architecture.model).__name__
    found = {}
    for layer in layers:
        out, bias, normed = _output(model, layer, watched.pop(layer))
        found[layer] = OutputWeights(out, bias, readings[layer].kv_of_head, normed)
    return found


def layers_with_heads(
    architecture: Architecture, layers: Sequence[Layer] | Layer | None
) -> list[int]:
    """Blocks whose heads are asked for, checked before anything is run on them.

    Args:
        architecture: The model.
        layers: One or several, in any spelling; None is all that have heads.

    Raises:
        LayerError: there is no such block.
        SiteError: a block has no heads, or none was asked for.
        ArchitectureError: the model is split over several processes.
    """
    require_whole(architecture.model, "reading the weights of heads")
    if layers is not None:
        one = isinstance(layers, str) or not hasattr(layers, "__len__")
        several: Any = [layers] if one else layers
        chosen = [architecture.resolve(layer) for layer in several]
        if not chosen:
            raise SiteError("there is no layer in an empty list; None means all that have heads")
        for layer in chosen:
            why = _no_heads(architecture, layer)
            if why:
                raise SiteError(why)
        return list(dict.fromkeys(chosen))
    reasons = [_no_heads(architecture, layer) for layer in range(architecture.n_layers)]
    chosen = [layer for layer, why in enumerate(reasons) if why is None]
    if not chosen:
        raise SiteError(reasons[0])
    return chosen


def _no_heads(architecture: Architecture, layer: int) -> str | None:
    needed = (*PARTS, "head_out")
    reasons = (architecture.missing(Site(name, layer)) for name in needed)
    return next((why for why in reasons if why), None)


def _assemble(
    architecture: Architecture, layer: int, watched: Watched, reading: Reading
) -> HeadWeights:
    model, d_model = type(architecture.model).__name__, architecture.d_model
    if watched.taken.shape[1] != d_model:
        raise SiteError(
            f"attention in layer {layer} of {model} takes {watched.taken.shape[1]} numbers per "
            f"token, not the {d_model} of the residual stream"
        )
    traced = {part: _traced(model, layer, watched, part) for part in PARTS}
    by_part: dict[str, Any] = {}
    for part, projection in traced.items():
        heads, size = watched.parts[part].shape[1:]
        by_head = projection.weight.unflatten(1, (heads, size)).movedim(1, 0)
        by_part[f"W_{part[0].upper()}"] = by_head.contiguous()
        by_part[f"b_{part[0].upper()}"] = projection.bias.view(heads, size)
    out, b_out, normed = _output(model, layer, watched)
    found = architecture.structure[layer]
    modules = dict.fromkeys(path for each in traced.values() for path in each.modules)
    return HeadWeights(
        layer,
        **by_part,
        W_O=out.clone(),
        b_O=b_out.clone(),
        kv_of_head=reading.kv_of_head,
        scales=(traced["query"].scale, traced["key"].scale, traced["value"].scale),
        normed=tuple(part for part in PARTS if traced[part].normed),
        rotated=reading.rotated,
        gated=found.gated,
        output_normed=normed,
        modules=tuple(modules),
    )


def _traced(model: str, layer: int, watched: Watched, part: str) -> Projection:
    projection = trace_part(watched, part)
    if projection is None:
        raise SiteError(
            f"no matrix was found in layer {layer} of {model} that makes the {part} from "
            "attention's input: it comes from another layer, or something is between that is no "
            "norm; the site can still be recorded and edited"
        )
    return projection


def _output(model: str, layer: int, watched: Watched) -> tuple[Tensor, Tensor, bool]:
    """``W_O [head, d_value, d_model]``, its bias, and whether a norm follows."""
    z = watched.parts["head_out"]
    for call in watched.calls:
        pair = affine_of(call) if torch.equal(call.taken, z.flatten(1)) else None
        if pair is not None:
            written = watched.parts.get("attn_out")
            normed = written is None or not _parallel(call.given, written.reshape(call.given.shape))
            return pair[0].unflatten(0, z.shape[1:]), pair[1], normed
    raise SiteError(f"the output projection in layer {layer} of {model} is no plain matrix")


def _parallel(given: Tensor, written: Tensor) -> bool:
    """Whether one is a multiple of the other (a residual multiplier), to rounding."""
    a, b = exact(given), exact(written)
    factor = (a * b).sum() / a.square().sum().clamp(min=1e-300)
    rounding = max(torch.finfo(given.dtype).eps, torch.finfo(torch.float32).eps)
    return bool((b - factor * a).abs().max() <= 8 * rounding * b.abs().max())


def _folded(raw: HeadWeights, norm: NormGain) -> HeadWeights:
    changed: dict[str, Any] = {}
    for name in ("Q", "K", "V"):
        weight, bias = getattr(raw, f"W_{name}"), getattr(raw, f"b_{name}")
        changed[f"W_{name}"] = norm.fold_into(weight)
        changed[f"b_{name}"] = bias + norm.bias.to(weight) @ weight
    return replace(raw, **changed)
