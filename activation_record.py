"""What one prompt's forward pass left behind: tensors by layer, and the tokens they belong to.

- ``LayerActivations``: a dict of tensors that finds a layer however it is spelled.
- ``ActivationRecord``: one prompt, its tokens, and the tensors recorded at any number of sites.
- ``position_rows(tensor, site)``: a recorded tensor as one float64 vector per position.

Conventions: layer ``i`` is the output of block ``i``; the sites and their axes are those of
`forward_pass.SITES`; positions are absolute and count from 0. Files are `record_files`' business,
numbers (statistics, comparison) that of `activation_statistics`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from forward_pass import LayerError, SiteError
from model_architecture import Layer, resolve_layer

if TYPE_CHECKING:
    import pandas as pd


# --- Tensors by layer -----------------------------------------------------------------------------


class LayerActivations(dict[str, Tensor]):
    """Tensors keyed by full module name, in layer order, found by any spelling of the layer.

    ``acts["transformer.h.5"]``, ``acts["h.5"]``, ``acts["5"]``, ``acts[5]`` and ``acts[-1]`` (the
    last block of the *model*, recorded or not) all work, in ``in``, ``.get`` and assignment too. A
    key that is no block's (``"embed"``) is found by its exact name and comes first.

    Attributes:
        layer_names: Full names of all blocks of the model, in order.
        keys_by_layer: The key that block ``i`` has here; None for a block that has none. The layer
            names themselves, but for attention weights the names of the attention modules.
    """

    layer_names: tuple[str, ...]
    keys_by_layer: tuple[str | None, ...]

    def __init__(
        self,
        tensors: Mapping[str, Tensor] | Iterable[tuple[str, Tensor]] = (),
        layer_names: Sequence[str] | None = None,
        keys_by_layer: Sequence[str | None] | None = None,
    ) -> None:
        """Keep ``tensors``, by reference.

        Args:
            tensors: Name to tensor, in any order and any spelling of the layer.
            layer_names: All block names of the model; None takes the keys of ``tensors``.
            keys_by_layer: The key of each block, where that is not the block's own name.

        Raises:
            ValueError: there is not one key per block.
            LayerError: a key counts a block that the model does not have.
        """
        given = dict(tensors)
        self.layer_names = tuple(given if layer_names is None else layer_names)
        self.keys_by_layer = self.layer_names if keys_by_layer is None else tuple(keys_by_layer)
        if len(self.keys_by_layer) != len(self.layer_names):
            raise ValueError(
                f"keys_by_layer must hold one key (or None) for each of the "
                f"{len(self.layer_names)} blocks; it holds {len(self.keys_by_layer)}"
            )
        ranks = _ranks(self.keys_by_layer)
        super().__init__(
            (key if key in ranks else self._new_key(key), value) for key, value in given.items()
        )
        self._sort()

    @property
    def layers(self) -> list[int]:
        """Indices of the blocks that are recorded, ascending."""
        ranks = _ranks(self.keys_by_layer)
        return [ranks[key] for key in self if key in ranks]

    def key_for(self, layer: Layer) -> str:
        """The key of a layer in any spelling, whether or not it is recorded.

        Raises:
            LayerError: the model has no such layer, or no such tensor in that layer.
        """
        if isinstance(layer, str) and (super().__contains__(layer) or layer in self.keys_by_layer):
            return layer
        if not self.layer_names:
            raise LayerError(f"no layer {layer!r}: this holds {listed(self) or 'nothing'}")
        try:
            index = resolve_layer(layer, self.layer_names)
        except LayerError:
            match = self._same_module(layer)
            if match is None:
                raise
            return match
        key = self.keys_by_layer[index]
        if key is None:
            have = [i for i, name in enumerate(self.keys_by_layer) if name is not None]
            raise LayerError(
                f"block {index} ({self.layer_names[index]!r}) has no such tensor in this model; "
                f"blocks that have one: {runs(have) or 'none'}"
            )
        return key

    def _same_module(self, layer: Layer) -> str | None:
        """The one block's key that equals ``layer`` but for leading parts; None if not one."""
        spelled = f".{layer}"
        matches = {
            key
            for key in self.keys_by_layer
            if key and (f".{key}".endswith(spelled) or spelled.endswith(f".{key}"))
        }
        return matches.pop() if layer != "" and len(matches) == 1 else None

    def _new_key(self, layer: Layer) -> str:
        """The key to store under: the block's, or an exact name that counts no block.

        Raises:
            LayerError: it counts a block that there is not.
        """
        try:
            return self.key_for(layer)
        except LayerError:
            if isinstance(layer, str) and not any(
                p.strip(" +-").isdigit() for p in layer.split(".")
            ):
                return layer
            raise

    def _sort(self) -> None:
        """Restore layer order, keys that are no block's first."""
        ranks = _ranks(self.keys_by_layer)
        order = [ranks.get(key, -1) for key in self]
        if order != sorted(order):
            items = sorted(self.items(), key=lambda item: ranks.get(item[0], -1))
            super().clear()
            super().update(items)

    def __getitem__(self, layer: Layer) -> Tensor:
        """The tensor of a layer.

        Raises:
            LayerError: no such layer, or it was not recorded: says what is, and how to get more.
        """
        key = self.key_for(layer)
        try:
            return super().__getitem__(key)
        except KeyError:
            raise LayerError(self._not_recorded(key)) from None

    def _not_recorded(self, key: str) -> str:
        index = self.keys_by_layer.index(key)
        return (
            f"layer {index} ({key!r}) was not recorded: this record holds layers "
            f"{runs(self.layers) or 'none'} of 0-{len(self.layer_names) - 1}; extract with "
            f"layer_indices=[{index}] (or with neither layer_indices nor layer_names, for all)"
        )

    def __setitem__(self, layer: Layer, value: Tensor) -> None:
        """Set the tensor of a layer; a new one takes its place in layer order."""
        super().__setitem__(self._new_key(layer), value)
        self._sort()

    def __delitem__(self, layer: Layer) -> None:
        """Drop the tensor of a layer.

        Raises:
            LayerError: it is not there.
        """
        key = self.key_for(layer)
        if not super().__contains__(key):
            raise LayerError(self._not_recorded(key))
        super().__delitem__(key)

    def __contains__(self, layer: object) -> bool:
        """Whether the layer, in any spelling, is recorded."""
        try:
            return super().__contains__(self.key_for(layer))  # type: ignore[arg-type]
        except LayerError:
            return False

    def get(self, layer: Layer, default: Any = None) -> Any:
        """The tensor of a layer, or ``default`` where it is not recorded."""
        return self[layer] if layer in self else default

    def pop(self, layer: Layer, *default: Any) -> Any:
        """Drop and return the tensor of a layer, or ``default``."""
        if default and layer not in self:
            return default[0]
        value = self[layer]
        del self[layer]
        return value

    def setdefault(self, layer: Layer, default: Tensor) -> Tensor:
        """The tensor of a layer, which is set to ``default`` first where it is not recorded."""
        if layer not in self:
            self[layer] = default
        return self[layer]

    def update(self, *others: Any, **named: Tensor) -> None:
        """Set many layers, in any spelling."""
        for layer, value in dict(*others, **named).items():
            self[layer] = value

    def __ior__(self, other: Any) -> LayerActivations:  # type: ignore[override,misc]
        """``update`` as an operator."""
        self.update(other)
        return self

    def copy(self) -> LayerActivations:
        """A shallow copy that knows the same layers."""
        return LayerActivations(dict(self), self.layer_names, self.keys_by_layer)

    def __reduce__(self) -> tuple[Any, ...]:
        """For ``copy`` and ``pickle``: built anew from its parts."""
        return LayerActivations, (dict(self), self.layer_names, self.keys_by_layer)

    def __repr__(self) -> str:
        """One line: what is recorded, and the shape if all have the same."""
        others = [key for key in self if key not in _ranks(self.keys_by_layer)]
        layers = f"layers {runs(self.layers)} of {len(self.layer_names)}" if self.layers else ""
        shapes = {tuple(value.shape) for value in self.values()}
        shape = f", each {list(*shapes)}" if len(shapes) == 1 else ""
        return f"LayerActivations({', '.join(filter(None, [*others, layers])) or 'empty'}{shape})"


@lru_cache(maxsize=256)
def _ranks(keys: tuple[str | None, ...]) -> dict[str, int]:
    """Block index of each key."""
    return {key: index for index, key in enumerate(keys) if key is not None}


def runs(indices: Sequence[int]) -> str:
    """Ascending integers for a message: ``[0, 1, 2, 5]`` as ``"0-2, 5"``."""
    known = set(indices)
    starts = [i for i in indices if i - 1 not in known]
    ends = [i for i in indices if i + 1 not in known]
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in zip(starts, ends, strict=True))


def listed(names: Iterable[str]) -> str:
    """Names for a message: ``"'a', 'b'"``."""
    return ", ".join(repr(name) for name in names)


# --- One prompt -----------------------------------------------------------------------------------


class _EveryPosition(list[int]):
    """Stands for "all positions" until the number of tokens is known."""


@dataclass(eq=False, repr=False)
class ActivationRecord:
    """One prompt, its tokens, and what the model did with them.

    Plain dicts of tensors are accepted for the tensor fields; their keys are then the layer names.

    Raises:
        ValueError: fields that do not fit together (at construction).
    """

    prompt: str
    """The text as it was given."""
    tokens: list[str]
    """One string per token of the whole prompt; strings repeat, never use them as keys."""
    token_ids: list[int]
    """The same tokens as ids."""
    layer_activations: LayerActivations
    """Site ``resid_post``, the output of each recorded block: ``[1, position, d_model]``."""
    attention_weights: LayerActivations | None = None
    """Site ``attn_pattern``: ``[1, head, query, key]``, positions being the queries; or None."""
    metadata: dict[str, Any] = field(default_factory=dict)
    """The user's own, and where the record comes from (model, revision, dtype, versions)."""
    logits: Tensor | None = None
    """``[1, position, vocab]``; or None."""
    site_activations: dict[str, LayerActivations] = field(default_factory=dict)
    """Every other site by name, ``[1, position, …]`` each (`forward_pass.SITES` has the axes)."""
    positions: list[int] = field(default_factory=_EveryPosition)
    """Absolute token positions that the position axis of every tensor holds; by default all."""

    def __post_init__(self) -> None:
        """Bring the fields into their types and check that they fit together."""
        self.tokens = list(self.tokens)
        self.token_ids = [int(i) for i in self.token_ids]
        every = isinstance(self.positions, _EveryPosition)
        self.positions = [int(p) for p in (range(len(self.tokens)) if every else self.positions)]
        self.layer_activations = _by_layer(self.layer_activations)
        if self.attention_weights is not None:
            self.attention_weights = _by_layer(self.attention_weights)
        self.site_activations = {k: _by_layer(v) for k, v in self.site_activations.items()}
        self._check_tokens()
        for name, key, tensor in self.tensors():
            self._check_shape(name, key, tensor)

    def _check_tokens(self) -> None:
        count = len(self.tokens)
        if len(self.token_ids) != count:
            raise ValueError(
                f"tokens and token_ids must have one entry per token; got {count} tokens and "
                f"{len(self.token_ids)} ids"
            )
        outside = [p for p in self.positions if not 0 <= p < count]
        if outside:
            raise ValueError(f"positions must lie in 0..{count - 1}, absolute; got {outside}")
        misplaced = _NOT_SITES.keys() & self.site_activations.keys()
        for name in sorted(misplaced):
            raise ValueError(
                f"{name!r} in site_activations belongs in the field {_NOT_SITES[name]}"
            )

    def _check_shape(self, name: str, key: str, tensor: Tensor) -> None:
        axes, n_axes, axis = _AXES.get(name, ("[1, position, …]", 0, 1))
        shape = tensor.shape
        fits = len(shape) == n_axes or (n_axes == 0 and len(shape) >= 2)
        if not fits or shape[0] != 1 or shape[axis] != len(self.positions):
            raise ValueError(
                f"{name} {key!r} must be {axes} with {len(self.positions)} on the position axis; "
                f"got {list(shape)}"
            )

    def tensors(self) -> Iterator[tuple[str, str, Tensor]]:
        """Every tensor, after the name of its field (or site) and its key ("" for the logits)."""
        groups: list[tuple[str, LayerActivations | None]] = [
            ("layer_activations", self.layer_activations),
            ("attention_weights", self.attention_weights),
            *self.site_activations.items(),
        ]
        for name, group in groups:
            if group:
                yield from ((name, key, tensor) for key, tensor in group.items())
        if self.logits is not None:
            yield "logits", "", self.logits

    @property
    def num_layers(self) -> int:
        """Number of blocks whose output was recorded."""
        return len(self.layer_activations.layers)

    @property
    def nbytes(self) -> int:
        """Bytes of memory that the tensors keep alive: their whole storages, shared ones once."""
        storages = [t.untyped_storage() for _, _, t in self.tensors() if not t.is_meta]
        return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())

    @property
    def sites(self) -> list[str]:
        """Names of the sites that were recorded."""
        groups = {
            "resid_post": self.layer_activations,
            "attn_pattern": self.attention_weights,
            **self.site_activations,
        }
        return [site for site, tensors in groups.items() if tensors]

    def at(self, site: str, layer: Layer | None = None) -> Tensor:
        """The tensor of one site and layer.

        Args:
            site: A name out of `forward_pass.SITES`, such as ``"resid_post"``.
            layer: The block in any spelling; may be left out where the site holds one tensor.

        Returns:
            The recorded tensor itself, not a copy: ``[1, position, …]``, for ``"attn_pattern"``
            ``[1, head, query, key]``.

        Raises:
            SiteError: the site was not recorded.
            LayerError: the layer does not exist, was not recorded, or must be given.
        """
        tensors = self.at_site(site)
        if layer is not None:
            return tensors[layer]
        if len(tensors) == 1:
            return next(iter(tensors.values()))
        raise LayerError(f"say which layer of {site!r}: this record holds {listed(tensors)}")

    def at_site(self, site: str) -> LayerActivations:
        """All tensors of one site.

        Raises:
            SiteError: the site was not recorded.
        """
        found = self.site_activations.get(site)
        if site == "resid_post":
            found = self.layer_activations
        elif site == "attn_pattern":
            found = self.attention_weights
        if found is None:
            how = "include_attention=True" if site == "attn_pattern" else f"sites=({site!r},)"
            raise SiteError(
                f"the site {site!r} was not recorded: this record holds "
                f"{listed(self.sites) or 'none'}; extract with {how}"
            )
        return found

    def to_frame(self, site: str = "resid_post") -> pd.DataFrame:
        """One row per recorded layer and position.

        Args:
            site: Which site to summarise.

        Returns:
            Columns ``layer`` (block index; the key itself where it is no block), ``position``
            (absolute), ``token``, ``norm`` (L2), ``mean`` and ``std`` (population), each over all
            other axes, in float64. NaN and infinity propagate.
        """
        import pandas as pd

        group = self.at_site(site)
        ranks = _ranks(group.keys_by_layer)
        tokens = [self.tokens[p] for p in self.positions]
        frames = [pd.DataFrame(columns=["layer", "position", "token", "norm", "mean", "std"])]
        for key, tensor in group.items():
            rows = position_rows(tensor, site).numpy()
            labels = {"layer": ranks.get(key, key), "position": self.positions, "token": tokens}
            norm = np.linalg.norm(rows, axis=1)
            numbers = {"norm": norm, "mean": rows.mean(axis=1), "std": rows.std(axis=1)}
            frames.append(pd.DataFrame({**labels, **numbers}))
        return pd.concat(frames[1:] or frames, ignore_index=True)

    def __repr__(self) -> str:
        """One line: prompt, number of tokens, what is held, how much memory."""
        prompt = self.prompt if len(self.prompt) <= 32 else f"{self.prompt[:31]}…"
        all_kept = len(self.positions) == len(self.tokens)
        tokens = f"{len(self.tokens)} tokens" + (
            "" if all_kept else f" ({len(self.positions)} kept)"
        )
        layers = f"{self.num_layers} of {len(self.layer_activations.layer_names)} layers"
        others = [site for site in self.sites if site != "resid_post"]
        others += ["logits"] if self.logits is not None else []
        parts = [repr(prompt), tokens, layers, *others, f"{self.nbytes / 1e6:.3g} MB"]
        return f"ActivationRecord({', '.join(parts)})"


_AXES = {
    "layer_activations": ("[1, position, d_model]", 3, 1),
    "attention_weights": ("[1, head, query, key]", 4, 2),
    "logits": ("[1, position, vocab]", 3, 1),
}
"""Axes of a field's tensors, how many there are, and which is the position; of a site it is 1."""


_NOT_SITES = {name: name for name in _AXES} | {
    "resid_post": "layer_activations",
    "attn_pattern": "attention_weights",
}
"""Names that ``site_activations`` may not have, and the field that what they mean belongs in."""


def _by_layer(tensors: Mapping[str, Tensor]) -> LayerActivations:
    """A plain dict as LayerActivations whose layers are its keys."""
    return tensors if isinstance(tensors, LayerActivations) else LayerActivations(tensors)


def position_rows(tensor: Tensor, site: str) -> Tensor:
    """A recorded tensor as one vector per position.

    Args:
        tensor: ``[1, position, …]``; ``[1, head, query, key]`` where ``site`` is ``attn_pattern``.
        site: The site it was recorded at.

    Returns:
        ``[position, everything else]``, float64, on the CPU.

    Raises:
        ValueError: the tensor has no values (a record loaded from json), or is complex.
    """
    if tensor.is_meta:
        raise ValueError(
            "this record holds shapes only, no values (it was loaded from a json file): "
            "load a file saved as safetensors, npz, pt or pickle"
        )
    if tensor.is_complex():
        raise ValueError(f"expected real numbers, got {tensor.dtype}; take .real or .abs() first")
    rows = tensor.detach()[0].movedim(1 if site == "attn_pattern" else 0, 0)
    return rows.reshape(rows.shape[0], int(np.prod(rows.shape[1:]))).cpu().double()
