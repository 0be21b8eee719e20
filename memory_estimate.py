"""How much memory an extraction will need, said before it is run.

    estimate_memory     of an extraction from these prompts by this model
    estimate            the same from sizes alone: nothing is run, no model is needed
    measure_sizes       the sizes of a model and of what its sites hold, by two short passes

What comes back is known to the byte. What a pass computes with in between is estimated: its peak is
measured on a row of `PROBES` tokens, and continued as a·tokens + b·tokens². Workspaces inside of
kernels, and what an allocator holds back, are not seen.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass
from torch.utils._pytree import tree_map_only

from extraction_request import Request, make_request
from forward_pass import InputError, Recording, Site, record
from memory_limits import free_bytes, in_words
from model_architecture import Architecture, Layer
from sites import check_batch_size
from tokenization import Positions, Prompt, check_ids, context_length, encode, resolve_positions

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PROBES = (16, 32)
"""Tokens of the two passes that show what a token, and what a pair of tokens, takes."""


@dataclass(frozen=True)
class SiteSize:
    """What a site holds of one prompt: bytes that grow with kept positions."""

    site: Site
    per_position: int
    """Bytes per kept position; of a pattern, per kept query and key."""

    def nbytes(self, kept: int, length: int) -> int:
        """Of ``kept`` positions of a prompt of ``length`` tokens."""
        keys = length if self.site.name == "attn_pattern" else 1
        return self.per_position * kept * keys


@dataclass(frozen=True)
class ModelSizes:
    """The numbers that memory depends on, in bytes."""

    weights: int
    """Parameters and buffers."""
    per_token: float
    """What a pass computes with at its peak grows by this with every token of a row,"""
    per_pair: float
    """and by this with every pair of tokens (attention that forms its pattern or a mask)."""
    logits: int = 0
    """A token's logits, if they are asked for; else 0."""
    sites: tuple[SiteSize, ...] = ()
    """What is kept."""


@dataclass(frozen=True)
class MemoryEstimate:
    """What an extraction needs, in bytes."""

    weights: int
    """The model, which is there already."""
    results: int
    """All records together: exact."""
    captured: int
    """What the largest batch has captured before it is cut into records; less than exact."""
    working: int
    """What the largest batch's pass computes with, at its peak: estimated."""
    free: float
    """Bytes that the model's device has left."""

    @property
    def needed(self) -> int:
        """Beside the model, at the peak."""
        return self.results + self.captured + self.working

    @property
    def fits(self) -> bool:
        """Whether that much is free."""
        return self.needed <= self.free

    def __repr__(self) -> str:
        parts = f"results {in_words(self.results)}, captured {in_words(self.captured)}, "
        parts += f"working {in_words(self.working)}"
        verdict = "fits" if self.fits else "does not fit"
        about = f"{in_words(self.needed)} beside {in_words(self.weights)} of weights: {parts}; "
        return f"MemoryEstimate({about}{in_words(self.free)} free, {verdict})"


def estimate(
    sizes: ModelSizes,
    lengths: Sequence[int],
    kept: Sequence[int],
    batch_size: int,
    free: float = float("inf"),
) -> MemoryEstimate:
    """What an extraction needs, from sizes alone.

    Args:
        sizes: Of the model and of what is kept; see `measure_sizes`.
        lengths: Tokens of each prompt.
        kept: Positions kept of each prompt.
        batch_size: Prompts per pass.
        free: Bytes that are there.
    """
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], kept[i]))
    captured = working = 0
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size]
        wide, whole = lengths[rows[0]], len({kept[i] for i in rows}) > 1
        held = max(kept[i] for i in rows)
        held = wide if whole else held
        captured = max(captured, len(rows) * _kept_bytes(sizes, held, wide))
        working = max(working, _working(sizes, len(rows), wide))
    results = sum(_kept_bytes(sizes, k, n) for n, k in zip(lengths, kept, strict=True))
    if batch_size == 1 or len(lengths) == 1:
        captured = 0  # handed out as it was captured
    return MemoryEstimate(sizes.weights, results, captured, working, free)


def _kept_bytes(sizes: ModelSizes, kept: int, length: int) -> int:
    return kept * sizes.logits + sum(site.nbytes(kept, length) for site in sizes.sites)


def _working(sizes: ModelSizes, rows: int, length: int) -> int:
    per_row = sizes.per_token * length + sizes.per_pair * length**2
    return rows * int(max(per_row, sizes.logits * length))


def measure_sizes(architecture: Architecture, request: Request) -> ModelSizes:
    """The sizes of a model and of the sites asked for, by passes of at most `PROBES` tokens."""
    model = architecture.model
    len(architecture.structure)  # the probe's own pass is none of what is measured
    context = context_length(architecture.config) or PROBES[1]
    short, long = min(PROBES[0], max(context // 2, 1)), min(PROBES[1], context)
    found, few = _peak(architecture, request, short)
    _, many = _peak(architecture, request, long) if long > short else (found, few)
    per_pair = max(0.0, (many / long - few / short) / max(long - short, 1))
    tensors = {id(t): t for t in (*model.parameters(), *model.buffers())}.values()
    itemsize = next(model.parameters()).element_size()
    return ModelSizes(
        weights=sum(tensor.nbytes for tensor in tensors),
        per_token=max(many / long - per_pair * long, 0.0),
        per_pair=per_pair,
        logits=architecture.config.vocab_size * itemsize * request.logits,
        sites=tuple(_site_size(site, value) for site, value in found.items()),
    )


def _peak(architecture: Architecture, request: Request, length: int) -> tuple[Recording, int]:
    """What a pass over one row keeps of its last token, and the bytes alive at its peak."""
    ids = torch.zeros(1, length, dtype=torch.long, device="cpu")
    padded = (torch.arange(length, device="cpu") > 0).long()[None]  # as batches are
    mask = padded if length > 1 else None
    sites = request.sites or (Site("resid_post", architecture.n_layers - 1),)
    model = architecture.model
    owned = (*model.parameters(), *model.buffers())
    known = {p.untyped_storage().data_ptr() for tensor in owned for p in _plain(tensor)}
    with _LiveBytes(known) as live:
        inputs = architecture.inputs(ids, mask)
        found = record(
            architecture, inputs, sites, positions=torch.tensor([length - 1], device="cpu")
        )
    if not request.sites:
        found.clear()
    for site in found:
        if site.name == "attn_pattern":  # of one query and one key
            found[site] = found[site][..., :1]
    return found, live.most


class _LiveBytes(TorchDispatchMode):
    """Counts the bytes of tensors that are alive, but for those ``known`` by address."""

    def __init__(self, known: set[int]) -> None:
        super().__init__()
        self.known, self.now, self.most = set(known), 0, 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        found = func(*args, **(kwargs or {}))
        tree_map_only(torch.Tensor, self._see, found)
        return found

    def _see(self, tensor: torch.Tensor) -> None:
        for part in _plain(tensor):
            self._count(part)

    def _count(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        address, nbytes = storage.data_ptr(), storage.nbytes()
        if address in self.known:
            return
        self.known.add(address)
        self.now += nbytes
        self.most = max(self.most, self.now)
        weakref.finalize(storage, self._forget, address, nbytes)

    def _forget(self, address: int, nbytes: int) -> None:
        self.known.discard(address)
        self.now -= nbytes


def _plain(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    """The tensors that hold a tensor's bytes: itself, or the parts of a quantized one."""
    if not is_traceable_wrapper_subclass(tensor):
        yield tensor
        return
    for name in tensor.__tensor_flatten__()[0]:
        yield from _plain(getattr(tensor, name))


def _site_size(site: Site, value: torch.Tensor) -> SiteSize:
    shape = list(value.shape)
    shape[site.position_axis] = 1
    if site.name == "attn_pattern":
        shape[3] = 1
    return SiteSize(site, prod(shape) * value.element_size())


def describe_need(architecture: Architecture, request: Request, length: int, kept: int) -> str:
    """What one prompt needs, in words, for an error."""
    device = architecture.input_device
    found = estimate(measure_sizes(architecture, request), [length], [kept], 1, free_bytes(device))
    return (
        f"a prompt of {length} tokens needs about {in_words(found.needed)} beside the model's "
        f"{in_words(found.weights)}, and {in_words(found.free)} are free"
    )


def estimate_memory(
    architecture: Architecture,
    tokenizer: PreTrainedTokenizerBase | None,
    prompts: Iterable[Prompt],
    layer_names: Sequence[Layer] | None = None,
    layer_indices: Sequence[Layer] | None = None,
    include_attention: bool = False,
    batch_size: int = 64,
    return_logits: bool = False,
    positions: Positions = None,
    sites: Sequence[str] = ("resid_post",),
) -> MemoryEstimate:
    """What an extraction of these prompts will need, before it is run.

    Args:
        architecture: The model.
        tokenizer: For text.
        prompts: As for the extraction. For a plan, rows of token ids will do: ``[[0] * 512] * 64``.
        layer_names: As in `extraction_request.make_request`, and so are ``layer_indices``,
            ``include_attention``, ``return_logits`` and ``sites``.
        layer_indices: See there.
        include_attention: See there.
        batch_size: Prompts per forward pass.
        return_logits: See there.
        positions: Which tokens are kept.
        sites: See there.

    Returns:
        Bytes by part. Results lie on the model's device.

    Raises:
        InputError: a prompt, the positions or the batch size cannot be used.
        LayerError: there is no such layer.
        SiteError: the model has no such site.
    """
    if isinstance(prompts, str):
        raise InputError(f"prompts is a list of prompts; came the text {prompts!r:.40}")
    check_batch_size(batch_size)
    request = make_request(
        architecture, layer_names, layer_indices, include_attention, return_logits, sites
    )
    rows = [encode(tokenizer, prompt) for prompt in prompts]
    for ids in rows:
        check_ids(ids, architecture.config)
    lengths = [len(ids) for ids in rows]
    kept = [len(resolve_positions(positions, length)) for length in lengths]
    sizes = measure_sizes(architecture, request)
    return estimate(sizes, lengths, kept, batch_size, free_bytes(architecture.input_device))
