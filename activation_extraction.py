"""Extraction: any site, layer and token of one prompt or of ten thousand; the model is not changed.

`extract` runs one prompt, `extract_batch` many (sorted by length, padded on the left with the right
positions; results in the order given, equal to one by one). Both return `ActivationRecord`s that
hold what was asked for and nothing else: blocks after the last one asked for are not run, nor is
the head unless logits are wanted; a record's tensors own exactly their bytes.

`ActivationExtractor` is the same as a class bound to a model and a tokenizer. What is asked for is
resolved in `extraction_request`; records, statistics, comparison and files live in
`activation_record`, `activation_statistics` and `record_files` and are re-exported here.
"""

from __future__ import annotations

import copy
import gc
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from tqdm import tqdm

from activation_record import ActivationRecord, LayerActivations
from activation_statistics import compare_activations, get_activation_statistics
from extraction_request import Request, make_request
from forward_pass import InputError, Recording, Site, record
from memory_estimate import describe_need
from memory_limits import in_batches
from model_architecture import Architecture, Layer
from record_files import DEFAULT_FORMAT, load_activations, save_activations
from sites import check_batch_size
from tokenization import (
    Positions,
    Prompt,
    check_ids,
    encode,
    encode_texts,
    pad_left,
    resolve_positions,
    token_strings,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = [
    "ActivationExtractor",
    "ActivationRecord",
    "LayerActivations",
    "Request",
    "compare_activations",
    "extract",
    "extract_batch",
    "get_activation_statistics",
    "load_activations",
    "make_request",
    "save_activations",
]

DEFAULT_BATCH = 64
"""Prompts per forward pass in `extract_batch`."""


# --- One prompt, many prompts ---------------------------------------------------------------------


def extract(
    architecture: Architecture,
    tokenizer: PreTrainedTokenizerBase | None,
    prompt: Prompt,
    request: Request,
    positions: Positions = None,
    metadata: Mapping[str, Any] | None = None,
) -> ActivationRecord:
    """Run one prompt once and keep what the request names.

    Args:
        architecture: The model.
        tokenizer: For text, and for readable tokens.
        prompt: Text, a chat, or token ids.
        request: Made by `make_request`.
        positions: Which tokens to keep: ``"last"``, an index, a slice, a list, None for all.
        metadata: Put into the record's metadata beside the manifest.

    Returns:
        The record; its tensors are on the model's device, detached, in storage of their own.

    Raises:
        InputError: the prompt or the positions cannot be used.
    """
    (one,) = extract_batch(
        architecture, tokenizer, [prompt], request, positions, show_progress=False
    )
    one.metadata.update(metadata or {})
    return one


def extract_batch(
    architecture: Architecture,
    tokenizer: PreTrainedTokenizerBase | None,
    prompts: Iterable[Prompt],
    request: Request,
    positions: Positions = None,
    *,
    batch_size: int = DEFAULT_BATCH,
    show_progress: bool = True,
) -> list[ActivationRecord]:
    """Run many prompts in batches; one record per prompt, in the order given, padding gone.

    Args:
        architecture: The model.
        tokenizer: For text, and for readable tokens.
        prompts: Texts, chats or lists of token ids.
        request: Made by `make_request`.
        positions: Which tokens to keep of each prompt (see `extract`).
        batch_size: Prompts per forward pass.
        show_progress: A progress bar, where there is a terminal to show it.

    Raises:
        InputError: ``prompts`` is one text, a prompt or position cannot be used; says which prompt.
        NotEnoughMemoryError: one prompt alone does not fit into memory. (A batch that does not is
            halved, with a `memory_limits.SmallerBatchWarning`; the records are the same.)
    """
    if isinstance(prompts, str):
        raise InputError(
            "prompts is a list of prompts; put a single text into a list, "
            "or use extract_activations"
        )
    check_batch_size(batch_size)
    prompts = list(prompts)
    texts = encode_texts(tokenizer, prompts)
    items = [
        _prepare(i, prompt, ids, len(prompts), architecture, tokenizer, positions)
        for i, (prompt, ids) in enumerate(zip(prompts, texts, strict=True))
    ]
    records: list[ActivationRecord | None] = [None] * len(items)
    manifest = make_manifest(architecture)
    if "attn_pattern" in request.names:
        manifest["attn_implementation"] = "eager"  # no other forms a pattern
    hidden = not show_progress or not sys.stderr.isatty()

    def run(group: Sequence[_Item]) -> list[ActivationRecord]:
        padded = _padded(group)
        kept, whole = _run(architecture, padded, request)
        return _make_records(architecture, tokenizer, padded, request, kept, whole, manifest)

    def needs(group: Sequence[_Item]) -> str:
        return describe_need(architecture, request, len(group[0].ids), len(group[0].positions))

    with tqdm(total=len(items), desc="extract", unit="prompt", disable=hidden) as bar:
        batches = _batches(items, batch_size)
        for group, made in in_batches(batches, run, unit="prompts", cost=_tokens, needs=needs):
            for item, record in zip(group, made, strict=True):
                records[item.index] = record
            bar.update(len(group))
    return [found for found in records if found is not None]


@dataclass(frozen=True)
class _Item:
    """One prompt on its way through a batch."""

    index: int
    prompt: Prompt
    ids: list[int]
    positions: list[int]
    pad: int = 0


def _prepare(
    index: int,
    prompt: Prompt,
    ids: list[int] | None,
    count: int,
    architecture: Architecture,
    tokenizer: PreTrainedTokenizerBase | None,
    positions: Positions,
) -> _Item:
    try:
        ids = ids or encode(tokenizer, prompt)
        check_ids(ids, architecture.config)
        return _Item(index, prompt, ids, resolve_positions(positions, len(ids)))
    except InputError as err:
        if count == 1:
            raise
        raise InputError(f"prompt {index} of {count}: {err}") from err


def _batches(items: Sequence[_Item], size: int) -> Iterator[list[_Item]]:
    """Items of like length together; longest first: memory fails early."""
    ordered = sorted(items, key=lambda item: (-len(item.ids), len(item.positions)))
    for start in range(0, len(ordered), size):
        yield ordered[start : start + size]


def _padded(group: Sequence[_Item]) -> list[_Item]:
    """The items of a batch with their padding, the longest first."""
    width = len(group[0].ids)
    return [_Item(i.index, i.prompt, i.ids, i.positions, width - len(i.ids)) for i in group]


def _tokens(group: Sequence[_Item]) -> int:
    return len(group) * len(group[0].ids)


def _run(
    architecture: Architecture, group: Sequence[_Item], request: Request
) -> tuple[Recording, bool]:
    """One forward pass over a batch, keeping the positions asked for of each row.

    Returns:
        What was kept, and whether it still holds all positions (rows want different numbers).
    """
    ids, mask = pad_left([item.ids for item in group])
    inputs = architecture.inputs(ids, mask)
    shifted = [[item.pad + position for position in item.positions] for item in group]
    whole = len({len(row) for row in shifted}) > 1 or all(
        row == list(range(ids.shape[1])) for row in shifted
    )
    index = None if whole else torch.tensor(shifted, device="cpu")
    if index is not None and bool((index == index[0]).all()):
        index = index[0]
    kept = record(architecture, inputs, request.sites, positions=index, logits=request.logits)
    return kept, whole


def _make_records(
    architecture: Architecture,
    tokenizer: PreTrainedTokenizerBase | None,
    group: Sequence[_Item],
    request: Request,
    kept: Recording,
    whole: bool,
    manifest: Mapping[str, Any],
) -> list[ActivationRecord]:
    """The record of each prompt of a batch; empties ``kept``."""
    collecting = gc.isenabled()
    try:
        gc.disable()  # thousands of small objects and none to collect: it would take a third of it
        rows = {
            site: _own_rows(kept.pop(site), group, site.position_axis, whole)
            for site in request.sites
        }
        none: list[Tensor | None] = [None] * len(group)
        logits = none if kept.logits is None else _own_rows(kept.logits, group, 1, whole)
        return [
            assemble_record(
                architecture, tokenizer, item.prompt, item.ids, item.positions,
                {site: tensors[row] for site, tensors in rows.items()}, logits[row], manifest,
            )
            for row, item in enumerate(group)
        ]  # fmt: skip
    finally:
        if collecting:
            gc.enable()


def _own_rows(value: Tensor, group: Sequence[_Item], axis: int, whole: bool) -> Sequence[Tensor]:
    """Each prompt's part of a batch's tensor, ``[1, …]``, padding gone, in storage of its own."""
    wanted = [[item.pad + position for position in item.positions] for item in group]
    everything = list(range(value.shape[axis]))
    cut = axis == 2 and any(item.pad for item in group)
    if not cut and not (whole and any(each != everything for each in wanted)):
        # one call for all of them: a batch of short prompts has more tensors than work
        own: Any = torch.split_copy  # a function that its stub says gives None
        return [value] if len(value) == 1 else list(own(value, 1))
    parts = []
    for row, item in enumerate(group):
        part = value[row : row + 1]
        if whole:
            part = _some(part, axis, wanted[row])
        part = part[..., item.pad :] if axis == 2 else part
        parts.append(part.clone(memory_format=torch.contiguous_format))
    return parts


def _some(value: Tensor, axis: int, wanted: list[int]) -> Tensor:
    """Some places of an axis; a view where they lie side by side."""
    first, count = wanted[0], len(wanted)
    if wanted == list(range(first, first + count)):
        return value.narrow(axis, first, count)
    return value.index_select(axis, torch.tensor(wanted, device=value.device))


def assemble_record(
    architecture: Architecture,
    tokenizer: PreTrainedTokenizerBase | None,
    prompt: Prompt,
    ids: Sequence[int],
    positions: Sequence[int],
    tensors: Mapping[Site, Tensor],
    logits: Tensor | None,
    manifest: Mapping[str, Any],
) -> ActivationRecord:
    """Put tensors by site into the record's fields.

    Args:
        architecture: The model.
        tokenizer: For readable tokens.
        prompt: As the user gave it.
        ids: All token ids.
        positions: What the position axes hold.
        tensors: By site, ``[1, position, …]`` (``[1, head, query, key]`` for patterns).
        logits: ``[1, position, vocab]`` or None.
        manifest: Where the record comes from; see `make_manifest`.
    """
    names = tuple(architecture.layer_names)
    groups: dict[str, LayerActivations] = {}
    for name in dict.fromkeys(site.name for site in tensors):
        of_name = {site.layer: value for site, value in tensors.items() if site.name == name}
        keys = _keys(architecture, name)
        groups[name] = LayerActivations(
            {
                "embed" if name == "embed" else str(keys[layer]): value
                for layer, value in of_name.items()
            },
            names,
            keys,
        )
    residual = groups.pop("resid_post") if "resid_post" in groups else LayerActivations({}, names)
    return ActivationRecord(
        prompt=prompt if isinstance(prompt, str) else _as_text(tokenizer, ids),
        tokens=token_strings(tokenizer, ids),
        token_ids=list(ids),
        layer_activations=residual,
        attention_weights=groups.pop("attn_pattern", None),
        site_activations=groups,
        logits=logits,
        positions=list(positions),
        metadata={
            key: copy.deepcopy(value) if isinstance(value, dict | list) else value
            for key, value in manifest.items()
        },
    )


def _keys(architecture: Architecture, site: str) -> tuple[str | None, ...]:
    """The key of each block in a record: its own name, or its attention module's."""
    if site != "attn_pattern":
        return tuple(architecture.layer_names)
    return tuple(
        architecture.part_name(layer, "attention") for layer in range(architecture.n_layers)
    )


def _as_text(tokenizer: PreTrainedTokenizerBase | None, ids: Sequence[int]) -> str:
    return " ".join(map(str, ids)) if tokenizer is None else str(tokenizer.decode(list(ids)))


def make_manifest(architecture: Architecture) -> dict[str, Any]:
    """Where a record comes from: model, revision, dtype, attention implementation, versions."""
    config = architecture.model.config
    return {
        "model": str(architecture.model.name_or_path or type(architecture.model).__name__),
        "model_class": type(architecture.model).__name__,
        "revision": getattr(config, "_commit_hash", None),
        "dtype": str(architecture.model.dtype).removeprefix("torch."),
        "attn_implementation": getattr(architecture.config, "_attn_implementation", None),
        "n_layers": architecture.n_layers,
        "versions": dict(_versions()),
    }


@lru_cache(maxsize=1)
def _versions() -> tuple[tuple[str, str], ...]:
    return tuple((name, version(name)) for name in ("torch", "transformers"))


# --- The same, bound to a model -------------------------------------------------------------------


class ActivationExtractor:
    """Extracts activations from one model; see `extract` and `extract_batch`.

    Args:
        model: A causal language model, or a base model without a head (``AutoModel``).
        tokenizer: For prompts given as text.

    Raises:
        ArchitectureError: no list of blocks is found in the model.
    """

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None = None
    ) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.architecture = Architecture(model)

    def __repr__(self) -> str:
        return f"ActivationExtractor({self.architecture!r})"

    def extract_activations(
        self,
        prompt: Prompt,
        layer_names: Sequence[Layer] | None = None,
        layer_indices: Sequence[Layer] | None = None,
        include_attention: bool = False,
        return_logits: bool = False,
        metadata: Mapping[str, Any] | None = None,
        positions: Positions = None,
        sites: Sequence[str] = ("resid_post",),
    ) -> ActivationRecord:
        """Run one prompt and keep what was asked for.

        Args:
            prompt: Text, a chat (list of messages), or token ids.
            layer_names: Layers to keep, by any spelling; neither names nor indices means all.
            layer_indices: The same by index.
            include_attention: Also ``attention_weights`` ``[1, head, query, key]``; the pass then
                runs with eager attention, which differs from SDPA by rounding.
            return_logits: Also ``logits`` ``[1, position, vocab]``.
            metadata: Kept in the record's metadata.
            positions: ``"last"``, an index, a slice or a list: the position axis holds just those.
            sites: Names out of `forward_pass.SITES`; ``resid_post`` is block ``i``'s output.

        Returns:
            An `ActivationRecord`.

        Raises:
            LayerError: there is no such layer.
            SiteError: there is no such site in this model.
            InputError: the prompt or the positions cannot be used.
            ArchitectureError: logits are wanted and there is no head.
        """
        request = make_request(
            self.architecture, layer_names, layer_indices, include_attention, return_logits, sites
        )
        return extract(self.architecture, self.tokenizer, prompt, request, positions, metadata)

    def extract_batch_activations(
        self,
        prompts: Sequence[Prompt],
        layer_names: Sequence[Layer] | None = None,
        layer_indices: Sequence[Layer] | None = None,
        include_attention: bool = False,
        show_progress: bool = True,
        batch_size: int = DEFAULT_BATCH,
        return_logits: bool = False,
        positions: Positions = None,
        sites: Sequence[str] = ("resid_post",),
    ) -> list[ActivationRecord]:
        """Run many prompts in batches; equal to extracting one by one.

        Arguments as in `extract_activations`, and ``batch_size`` prompts per forward pass, with a
        progress bar where there is a terminal and ``show_progress`` is not False.

        Returns:
            One record per prompt, in the order given.

        Raises:
            LayerError: there is no such layer.
            SiteError: there is no such site in this model.
            InputError: a prompt or the positions cannot be used.
        """
        request = make_request(
            self.architecture, layer_names, layer_indices, include_attention, return_logits, sites
        )
        return extract_batch(
            self.architecture,
            self.tokenizer,
            prompts,
            request,
            positions,
            batch_size=batch_size,
            show_progress=show_progress,
        )

    def save_activations(
        self,
        record_or_records: ActivationRecord | Sequence[ActivationRecord],
        output_path: str | Path,
        format: str = DEFAULT_FORMAT,
    ) -> Path:
        """Save one record or a list. See `record_files.save_activations`."""
        return save_activations(record_or_records, output_path, format)

    @staticmethod
    def load_activations(path: str | Path) -> ActivationRecord | list[ActivationRecord]:
        """Load what `save_activations` wrote. See `record_files.load_activations`."""
        return load_activations(path)
