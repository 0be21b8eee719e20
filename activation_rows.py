"""Activations as a table, one row per prompt (or token): what probes and similarities are fed.

- `read_rows` runs prompts and keeps one vector per prompt and layer: the last token's, that of a
  named part of the prompt, the mean over tokens; or one per token.
- `rows_of` takes the same from records, or from an array, that are there already.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from activation_extraction import DEFAULT_BATCH, extract_batch
from activation_record import ActivationRecord, position_rows
from causal_tracing import subject_positions
from direction_finding import check_examples
from extraction_request import make_request
from forward_pass import InputError, LayerError, SiteError
from model_architecture import Architecture, Layer
from module_devices import as_tensor
from sites import check_batch_size
from tokenization import Positions, Prompt, check_ids, encode, resolve_positions, token_strings

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

EACH, REST, MEAN = "each", "rest", "mean"
"""Readings beside those of `tokenization.Positions`: every token a row; every token but the first;
the mean over tokens."""

TYPICAL, LARGEST = 64, 4096
"""Roundings, of a typical entry, by which equal vectors may differ: in most features, in any."""


def varies(x: np.ndarray) -> bool:
    """Whether rows differ by more than rounding.

    A token after the same tokens (the first of every text) has the same vector, but for the order
    in which batches of other shapes add up. What is left of such rows beside their mean is that
    order, which tells long texts from short ones and nothing else.

    Args:
        x: ``[row, feature]``, in the dtype that the numbers were made in.
    """
    sizes = np.abs(x[x != 0])
    if not sizes.size:
        return False
    exact = x.astype(np.float64)
    spread = (exact - exact.mean(0)).std(0)
    rounding = float(np.finfo(np.promote_types(x.dtype, np.float16)).eps * np.median(sizes))
    return bool(np.median(spread) > TYPICAL * rounding or spread.max() > LARGEST * rounding)


@dataclass(frozen=True, eq=False)
class ActivationRows:
    """Vectors read from some layers of a model, one per row.

    Raises:
        InputError: the parts do not fit together, or a value is not finite.
    """

    values: np.ndarray
    """``[row, layer, feature]``, float32."""
    layers: tuple[int, ...]
    """The block of each entry of the layer axis."""
    prompts: tuple[int, ...] = ()
    """Which prompt each row was read from."""
    tokens: tuple[str, ...] = ()
    """The token that each row was read at; ``""`` for a mean over several."""
    site: str = "resid_post"
    head: int | None = None
    """Which head, for a site with a head axis; None takes all of them as one vector."""
    model: str = ""
    """The config's ``model_type``; ``""`` if not known."""

    def __post_init__(self) -> None:
        """Check that shapes and labels fit together."""
        if self.values.ndim != 3 or not self.values.size:
            raise InputError(
                f"activations are [row, layer, feature], not empty; came {list(self.values.shape)}"
            )
        if len(self.layers) != self.values.shape[1]:
            raise InputError(
                f"{len(self.layers)} layers for a layer axis of {self.values.shape[1]}"
            )
        if not np.isfinite(self.values).all():
            raise InputError("the activations hold NaN or infinity: leave such examples out")

    def __repr__(self) -> str:
        rows, layers, width = self.values.shape
        return f"ActivationRows({rows} rows × {layers} layers × {width}, {self.site})"

    def at_layers(self, layers: int | Sequence[int]) -> ActivationRows:
        """The rows of some of the layers, in the order asked for.

        Raises:
            LayerError: one of them is not there.
        """
        asked = [layers] if isinstance(layers, int | str) else list(layers)
        for layer in asked:
            if isinstance(layer, bool) or layer not in self.layers:
                raise LayerError(f"there are no rows of layer {layer!r}; there are {self.layers}")
        places = [self.layers.index(layer) for layer in asked]
        return replace(self, values=self.values[:, places], layers=tuple(asked))


# --- From a model ---------------------------------------------------------------------------------


def read_rows(
    model: PreTrainedModel | Architecture,
    tokenizer: PreTrainedTokenizerBase | None,
    prompts: Sequence[Prompt],
    layers: Layer | Sequence[Layer] | None = None,
    *,
    read: Positions = "last",
    at: Sequence[str | int] | None = None,
    site: str = "resid_post",
    head: int | None = None,
    batch_size: int = DEFAULT_BATCH,
) -> ActivationRows:
    """Run prompts in batches and keep one vector per prompt and layer, or one per token.

    Args:
        model: The model; it needs no head.
        tokenizer: For text and chats.
        prompts: Texts, chats or lists of token ids, at least one.
        layers: In any spelling; None means all that have the site.
        read: ``"last"`` or an index: that token; ``"mean"``: the mean over all tokens but special
            ones; a list or slice: the mean over those; ``"each"``: every token becomes a row;
            ``"rest"``: every token but the first, which is an attention sink in many models.
        at: Instead, one entry per prompt: a position, or a part of the prompt that occurs in it
            once, whose last token is read.
        site: Any site but ``attn_pattern``; a head axis becomes a part of the vector.
        head: One head of such a site.
        batch_size: Prompts per forward pass.

    Returns:
        The rows, in the order of the prompts.

    Raises:
        InputError: a list is empty or no list, or a prompt, position or part cannot be used.
        LayerError: there is no such layer.
        SiteError: the model has no such site, or no such head.
    """
    check_examples(prompts, "texts")
    check_batch_size(batch_size)
    arch = model if isinstance(model, Architecture) else Architecture(model)
    if site == "attn_pattern":
        raise SiteError(
            "attn_pattern has as many entries as the prompt has tokens; read query, key, head_out …"
        )
    request = make_request(arch, layer_indices=_one_or_more(layers), sites=(site,))
    rows = [_encoded(arch, tokenizer, prompt, i) for i, prompt in enumerate(prompts)]
    places = _places(tokenizer, prompts, rows, read, at)
    order = sorted(range(len(rows)), key=lambda row: -len(rows[row]))
    each_token = at is None and (_is(read, EACH) or _is(read, REST))
    kept: dict[int, np.ndarray] = {}
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        records = extract_batch(
            arch, None, [rows[i] for i in chosen], request, batch_size=batch_size,
            show_progress=False,
        )  # fmt: skip
        for i, record in zip(chosen, records, strict=True):
            kept[i] = _vectors(record, request.sites, places[i], head, each_token)
    each = [kept[i] for i in range(len(rows))]
    read_at = [[ids[p] for p in where] for ids, where in zip(rows, places, strict=True)]
    strings = [
        token_strings(tokenizer, ids) if each_token or len(ids) == 1 else [""] for ids in read_at
    ]
    return ActivationRows(
        np.concatenate(each),
        tuple(where.layer for where in request.sites),
        tuple(i for i, part in enumerate(each) for _ in range(len(part))),
        tuple(token for row in strings for token in row),
        site,
        head,
        str(getattr(arch.model.config, "model_type", "")),
    )


def _is(read: Any, name: str) -> bool:
    return isinstance(read, str) and read == name


def _one_or_more(layers: Any) -> Any:
    return [layers] if isinstance(layers, str | int) else layers


def _encoded(arch: Architecture, tokenizer: Any, prompt: Prompt, number: int) -> list[int]:
    try:
        ids = encode(tokenizer, prompt)
        check_ids(ids, arch.config)
    except InputError as error:
        raise InputError(f"texts[{number}]: {error}") from error
    return ids


def _places(
    tokenizer: Any, prompts: Sequence[Prompt], rows: list[list[int]], read: Any, at: Any
) -> list[list[int]]:
    """The positions of each prompt that are read."""
    if at is not None and (isinstance(at, str) or len(at) != len(rows)):
        raise InputError(
            f"at holds one position or part for each of the {len(rows)} texts; came {at!r:.60}"
        )
    special = set(getattr(tokenizer, "all_special_ids", ()))
    found = []
    for i, ids in enumerate(rows):
        try:
            if at is not None:
                found.append(subject_positions(tokenizer, prompts[i], ids, at[i])[-1:])
            elif _is(read, EACH) or _is(read, REST):
                found.append(list(range(int(_is(read, REST)), len(ids))))
            elif _is(read, MEAN):
                found.append([p for p, token in enumerate(ids) if token not in special])
            else:
                found.append(resolve_positions(read, len(ids)))
        except InputError as error:
            raise InputError(f"texts[{i}]: {error}") from error
        if not found[-1]:
            raise InputError(f"texts[{i}]: read={read!r} leaves out the only tokens that it has")
    return found


def _vectors(
    record: ActivationRecord, sites: Sequence[Any], places: list[int], head: int | None, each: bool
) -> np.ndarray:
    """``[row, layer, feature]`` of one prompt, float32."""
    values = [_of_head(record.at(s.name, s.layer), s.name, head)[places] for s in sites]
    if len({value.shape for value in values}) > 1:
        widths = {where.layer: value.shape[1] for where, value in zip(sites, values, strict=True)}
        raise SiteError(f"the layers differ in width, take some of them by layers=: {widths}")
    stacked = torch.stack(values, 1)
    return (stacked if each else stacked.mean(0, keepdim=True)).float().numpy()


def _of_head(value: Tensor, site: str, head: int | None) -> Tensor:
    """``[position, feature]``, of one head where one is asked for."""
    if head is not None:
        if value.dim() != 4:
            raise SiteError(f"{site} has no head axis; leave out head={head}")
        if isinstance(head, bool) or head not in range(value.shape[2]):
            raise SiteError(f"{site} has the heads 0..{value.shape[2] - 1}; came {head!r}")
        value = value[:, :, head]
    return position_rows(value, site)


# --- From what is there ---------------------------------------------------------------------------


def rows_of(
    activations: Any,
    layers: Sequence[Layer] | None = None,
    *,
    read: Positions = "last",
    site: str = "resid_post",
    head: int | None = None,
) -> ActivationRows:
    """Rows of records, or of an array.

    Args:
        activations: `ActivationRows`; records (one row each); or an array ``[row, layer, feature]``
            or ``[row, feature]``.
        layers: Of rows: which, as numbers. Of records: which, in any spelling. None means all that
            are there. Of an array: the block of each entry of its layer axis; None counts from 0.
        read: Of records: which of the recorded tokens; several are averaged, for ``"mean"`` all
            that were recorded, special ones too.
        site: What it is, or which site of the records.
        head: One head of a record's site.

    Raises:
        InputError: it is nothing of the kind.
        LayerError, SiteError: it was not recorded.
    """
    if isinstance(activations, ActivationRows):
        return activations if layers is None else activations.at_layers(_one_or_more(layers))
    if isinstance(activations, ActivationRecord):
        activations = [activations]
    if knows_layers(activations):
        return _of_records(activations, layers, read, site, head)
    try:
        values = _numbers_of(activations).numpy()
    except (TypeError, ValueError, RuntimeError):
        raise InputError(
            "activations are records, or an array of numbers [row, layer, feature] or "
            f"[row, feature]; came {type(activations).__name__}"
        ) from None
    if values.ndim == 2:
        values = values[:, None]
    if values.ndim != 3:
        raise InputError(f"an array is [row, layer, feature] or [row, feature]; {values.shape}")
    names = range(values.shape[1]) if layers is None else _block_numbers(layers)
    return ActivationRows(values, tuple(names), tuple(range(len(values))), (), site, head)


def _numbers_of(activations: Any) -> Tensor:
    """An array as a tensor on the CPU, float32."""
    given = np.asarray(activations) if isinstance(activations, list | tuple) else activations
    return as_tensor(given).detach().float().cpu()


def _block_numbers(layers: Any) -> list[int]:
    """Blocks that an array is said to be of: there is no model to look names up in.

    Raises:
        InputError: they are no numbers, or one is given twice.
    """
    asked = [layers] if isinstance(layers, str | int) else layers
    try:
        found = [int(x) if isinstance(x, str) else operator.index(x) for x in asked]
    except (TypeError, ValueError):
        found = []
    bad = any(isinstance(x, bool) for x in asked) if found else True
    if bad or min(found) < 0 or len(set(found)) < len(found):
        raise InputError(f"layers of an array are the numbers of its blocks; came {layers!r}")
    return found


def knows_layers(activations: Any) -> bool:
    """Whether they are rows or records, not a bare array, so that they say of which blocks."""
    if isinstance(activations, ActivationRows | ActivationRecord):
        return True
    several = isinstance(activations, list | tuple) and len(activations) > 0
    return several and all(isinstance(each, ActivationRecord) for each in activations)


def _of_records(
    records: Sequence[ActivationRecord], layers: Any, read: Any, site: str, head: int | None
) -> ActivationRows:
    group = records[0].at_site(site)
    asked = group.layers if layers is None else _one_or_more(layers)
    keys = [group.key_for(layer) for layer in asked]
    known = {key: layer for layer, key in enumerate(group.keys_by_layer)}
    for key in keys:
        if key not in known:
            raise LayerError(f"{key!r} is no block's, so it has no place among layers")
    found = [known[key] for key in keys]
    vectors, tokens = [], []
    for record in records:
        wanted = None if _is(read, MEAN) else read
        places = resolve_positions(wanted, len(record.positions))
        values = [_of_head(record.at_site(site)[key], site, head)[places].mean(0) for key in keys]
        vectors.append(torch.stack(values).float().numpy())
        tokens.append(record.tokens[record.positions[places[0]]] if len(places) == 1 else "")
    return ActivationRows(
        np.stack(vectors), tuple(found), tuple(range(len(records))), tuple(tokens), site, head
    )
