"""Which numbers of a model are a head's query, key, value and output weights: found by matching.

No table of families and no layout is known here. One forward pass of single tokens is run in which
every attention module is given noise, and what each of its parts took and gave is kept:

1. Each entry of ``value`` (and of ``query`` and ``key``, which rotary embeddings leave alone at
   position 0) is looked for among the outputs of the parts. Where it is one of a matrix's outputs,
   up to one factor for all of them, that column of the matrix is its weight. So fused,
   interleaved and grouped layouts need no description.
2. Where it is an output of a norm (query and key norms), the search goes on at the norm's input,
   and it is noted that a norm lies between. Where a matrix reads another one (multi-head latent
   attention), the two are multiplied, with the gain of a norm between them. A part is taken for a
   norm only if its numbers are those of one.
3. A matrix is believed only if it reproduces what its module gave, to rounding. The output
   projection is given noise too, so that this holds where a model's own values are 0.
4. Which stored key/value head a query head reads is seen by setting one to zero at a time.

What cannot be proven like this raises SiteError; nothing is guessed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from forward_pass import Hook, ModuleTap, Site, SiteError, attached, edit, evaluate, recording
from interrupts import UndoStack, no_grad
from model_architecture import Architecture
from module_devices import exact, stored_matrix
from norm_gain import fit_norm, noise_like, seeded

ROWS = 32
"""Tokens in the pass that is watched, each a row by itself."""

CHUNK = 256
"""Entries that are looked for at once."""

DEEPEST = 3
"""Matrices in a row that are followed."""

TF32_EPS = 2.0**-10
"""Of the products that the user allowed to be faster than float32."""

PARTS = ("query", "key", "value")
WRITTEN = ("head_out", "attn_out")


@dataclass(eq=False)
class Call:
    """What one module took and gave in one run, one row per token."""

    path: str
    module: nn.Module
    taken: Tensor
    """``[row, n_in]``."""
    given: Tensor
    """``[row, n_out]``."""
    width: int
    """Entries of the last axis of what was taken: a norm may act on several such groups a row."""
    affine: tuple[Tensor, Tensor] | None = None
    """Matrix ``[n_in, n_out]`` and bias ``[n_out]``, where it has proven to be affine."""
    tried: bool = False


@dataclass(eq=False)
class Watched:
    """What was seen in one block."""

    taken: Tensor
    """``[row, d_in]``, the noise that attention was given."""
    calls: list[Call]
    """Runs of the modules inside attention, in order of leaving."""
    parts: dict[str, Tensor]
    """By site: ``query``, ``key``, ``value``, ``head_out`` ``[row, head, d]``, ``attn_out``."""


class Projection(NamedTuple):
    """How the entries of a part follow from attention's input x: ``scale · (x W + b)``, normed."""

    weight: Tensor
    """``[d_in, n]``."""
    bias: Tensor
    """``[n]``."""
    scale: float
    """What the model multiplies by before attention sees it."""
    normed: bool
    """Whether a norm lies between this projection and attention, or inside it."""
    modules: tuple[str, ...]
    """Paths, inside the attention module, of the matrices."""


# --- Watching -------------------------------------------------------------------------------------


@no_grad()
def watch_attention(architecture: Architecture, layers: Sequence[int]) -> dict[int, Watched]:
    """Give every attention module noise in one pass of single tokens, and keep what its parts did.

    The output projection gets noise of its own, rows of very different lengths: a norm behind it
    then shows, since it brings them to one length.

    Args:
        architecture: The model.
        layers: Blocks with ``query``, ``key``, ``value`` and ``head_out``.

    Returns:
        What was seen, by block.
    """
    fed: dict[int, Tensor] = {}
    calls: dict[int, list[Call]] = {layer: [] for layer in layers}
    sites = [
        Site(name, n) for n in layers for name in PARTS + WRITTEN if _has(architecture, name, n)
    ]
    inputs = architecture.inputs(torch.ones(ROWS, 1, dtype=torch.long, device="cpu"))
    lengths = torch.logspace(-1, 1, ROWS)[torch.randperm(ROWS, generator=seeded(0), device="cpu")]

    def feed(layer: int) -> Hook:
        def hook(value: Tensor) -> Tensor:
            noise = noise_like(value, layer)
            fed[layer] = noise.reshape(ROWS, -1)
            return noise

        return hook

    def feed_output(value: Tensor) -> Tensor:
        return noise_like(value, value.shape[-1]) * lengths.to(value).view(-1, 1, 1, 1)

    with UndoStack() as stack:
        evaluate(stack, architecture.model)
        taps = [(ModuleTap(_attention(architecture, n), at_input=True), feed(n)) for n in layers]
        stack.enter_context(attached(taps))
        outputs = {Site("head_out", n): feed_output for n in layers}
        stack.enter_context(edit(architecture, outputs))
        kept = stack.enter_context(recording(architecture, sites))
        for layer in layers:
            for path, module in _modules(architecture, layer).items():
                stack.enter_context(_noting(calls[layer], path, module))
        architecture.body(**inputs, use_cache=False)
    found = {n: {site.name: kept[site][:, 0] for site in sites if site.layer == n} for n in layers}
    return {layer: Watched(fed[layer], calls[layer], found[layer]) for layer in layers}


def _has(architecture: Architecture, name: str, layer: int) -> bool:
    return architecture.missing(Site(name, layer)) is None


def _attention(architecture: Architecture, layer: int) -> nn.Module:
    return architecture.blocks[layer].get_submodule(architecture.structure[layer].attention or "")


def _modules(architecture: Architecture, layer: int) -> dict[str, nn.Module]:
    """The modules inside attention, and its output projection if that lies outside."""
    inside = _attention(architecture, layer)
    found = {path: module for path, module in inside.named_modules() if path}
    path = architecture.structure[layer].out_proj
    projection = None if path is None else architecture.blocks[layer].get_submodule(path)
    if path is not None and projection not in list(found.values()):
        found[f"(block).{path}"] = projection
    return found


def _noting(calls: list[Call], path: str, module: nn.Module) -> AbstractContextManager[None]:
    """While open, each run of a module that takes and gives one vector per row is noted."""
    under_way: list[Tensor | None] = []

    def rows_of(value: Any) -> Tensor | None:
        usable = isinstance(value, Tensor) and value.is_floating_point()
        if not usable or not value.numel() or value.numel() % ROWS:
            return None
        return value.detach().reshape(ROWS, -1).clone()

    def taken(value: Tensor) -> None:
        under_way[:] = [rows_of(value)]

    def given(value: Tensor) -> None:
        before, after = under_way.pop(), rows_of(value)
        if before is not None and after is not None:
            calls.append(Call(path, module, before, after, value.shape[-1]))

    taps = [(ModuleTap(module, at_input=True), taken), (ModuleTap(module), given)]
    return attached(taps, last=True)


@dataclass(frozen=True)
class Reading:
    """How the heads of one block read what is stored."""

    kv_of_head: tuple[int, ...]
    """The stored key/value head that each query head reads."""
    rotated: bool
    """Whether queries or keys depend on the position (rotary embeddings)."""


@no_grad()
def watch_reading(architecture: Architecture, layers: Sequence[int]) -> dict[int, Reading]:
    """See which key/value head each head reads, in one pass of two tokens.

    From row 2 on values are noise, and in row 2 + i those of key/value head i are zero: the heads
    whose output is zero then read it. Rows 0 and 1 differ in their first token alone, so their
    second ones must not differ in anything.

    Args:
        architecture: The model.
        layers: As in `watch_attention`.

    Raises:
        SiteError: queries, keys or values depend on other tokens too, or no key/value head, or
            several, make a head's output.
    """
    rows = 2 + max(architecture.heads(layer)[1] for layer in layers)
    inputs = architecture.inputs(torch.ones(rows, 2, dtype=torch.long, device="cpu"))

    def feed(layer: int) -> Hook:
        def hook(value: Tensor) -> Tensor:
            pairs = noise_like(value, layer).view(rows, 2, -1).clone()
            pairs[:, 1] = pairs[0, 1]
            pairs[0, 0] = pairs[0, 1]
            return pairs.view(value.shape)

        return hook

    def without_one(value: Tensor) -> Tensor:
        count = value.shape[2]
        changed = torch.cat([value[:2], noise_like(value, count)[2:]])
        changed[torch.arange(2, 2 + count, device="cpu"), :, torch.arange(count, device="cpu")] = 0
        return changed

    sites = [Site(name, layer) for layer in layers for name in (*PARTS, "head_out")]
    with UndoStack() as stack:
        evaluate(stack, architecture.model)
        taps = [(ModuleTap(_attention(architecture, n), at_input=True), feed(n)) for n in layers]
        stack.enter_context(attached(taps))
        stack.enter_context(edit(architecture, {Site("value", n): without_one for n in layers}))
        kept = stack.enter_context(recording(architecture, sites))
        architecture.body(**inputs, use_cache=False)
    return {layer: _reading(architecture, kept, layer) for layer in layers}


def _reading(architecture: Architecture, kept: Mapping[Site, Tensor], layer: int) -> Reading:
    parts = {name: kept[Site(name, layer)] for name in (*PARTS, "head_out")}
    model, rotated = type(architecture.model).__name__, False
    for name in PARTS:
        pair = parts[name][:2]
        if not _close(pair[0, 1], pair[1, 1]):
            raise SiteError(
                f"the {name} in layer {layer} of {model} depends on earlier tokens too, so it is "
                "no matrix times attention's input"
            )
        rotated |= not _close(pair[0, 0], pair[0, 1])
    count = parts["value"].shape[2]
    silent = (parts["head_out"][2 : 2 + count, 0] == 0).all(-1)
    if not bool((silent.sum(0) == 1).all()):
        raise SiteError(
            f"in layer {layer} of {model} it could not be seen which of the {count} stored values "
            "each head reads"
        )
    return Reading(tuple(silent.long().argmax(0).tolist()), rotated)


def _close(a: Tensor, b: Tensor) -> bool:
    return bool((a - b).abs().max() <= _tolerance(a.dtype) * a.abs().max())


# --- Matrices -------------------------------------------------------------------------------------


def affine_of(call: Call) -> tuple[Tensor, Tensor] | None:
    """Matrix and bias of a module, proven on what it took and gave; None where it is not affine."""
    if not call.tried:
        call.tried = True
        call.affine = next(filter(None, (_proven(call, *pair) for pair in _candidates(call))), None)
    return call.affine


def _proven(call: Call, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor] | None:
    """A matrix and a bias, in float32 or wider, if they reproduce what the module gave."""
    wide = torch.promote_types(call.given.dtype, torch.float32)
    taken, given, weight, bias = (
        each.to(call.given.device, wide) for each in (call.taken, call.given, weight, bias)
    )
    off = (taken @ weight + bias - given).abs()
    typical = (taken.square() @ weight.square()).sqrt() + bias.abs() + given.abs()
    largest = taken.abs() @ weight.abs() + bias.abs() + given.abs()
    allowed = _tolerance(call.given.dtype) / 2 * typical + _tolerance(torch.float32) * largest
    return (weight, bias) if bool((off <= allowed).all()) else None


def _candidates(call: Call) -> Iterator[tuple[Tensor, Tensor]]:
    """What a module's matrix may be: its weight, either way up, or how it answers a basis."""
    n_in, n_out = call.taken.shape[1], call.given.shape[1]
    weight, bias = stored_matrix(call.module), getattr(call.module, "bias", None)
    if not isinstance(bias, Tensor) or bias.shape != (n_out,):
        bias = call.given.new_zeros(n_out)
    if weight is not None and weight.shape == (n_out, n_in):
        yield weight.mT, bias.detach()
    if weight is not None and weight.shape == (n_in, n_out):
        yield weight, bias.detach()
    hidden = getattr(call.module, "weight", None) if weight is None else None
    shape = tuple(getattr(hidden, "shape", ()))
    if hasattr(call.module, "in_features") or shape in ((n_in, n_out), (n_out, n_in)):
        yield _answers(call, n_in)  # adapters, and weights that are packed or offloaded


def _answers(call: Call, n_in: int) -> tuple[Tensor, Tensor]:
    """How a module answers the unit vectors, less how it answers zero; and the latter."""
    basis = torch.eye(n_in, device=call.taken.device, dtype=call.taken.dtype)[:, None]
    with no_grad():
        bias = call.module.forward(torch.zeros_like(basis[:1])).reshape(-1)
        rows = [call.module.forward(chunk).reshape(len(chunk), -1) for chunk in basis.split(CHUNK)]
    return torch.cat(rows) - bias, bias


def _tolerance(dtype: torch.dtype) -> float:
    """Relative rounding that is allowed: sums in a model's dtype, some of them long."""
    highest = torch.get_float32_matmul_precision() == "highest"
    least = torch.finfo(torch.float32).eps if highest else TF32_EPS
    return 16 * max(torch.finfo(dtype).eps, least)


# --- Matching -------------------------------------------------------------------------------------


def find_columns(wanted: Tensor, pool: Tensor) -> Tensor:
    """Where each column of one table stands in another.

    Args:
        wanted: ``[row, n]``.
        pool: ``[row, m]``.

    Returns:
        ``[n]``, the index of the nearest column; -1 where none is the same to rounding.
    """
    allowed = _tolerance(wanted.dtype)
    pool = exact(pool.to(wanted.device))
    lengths = pool.square().sum(0)
    found = []
    for chunk in exact(wanted).split(CHUNK, dim=1):
        products = lengths - 2 * chunk.mT @ pool
        nearest = products.argmin(1)
        off = (chunk - pool[:, nearest]).abs().amax(0)
        found.append(torch.where(off <= allowed * chunk.abs().amax(0), nearest, -1))
    return torch.cat(found).to(wanted.device)


def common_scale(wanted: Tensor, pool: Tensor) -> float | None:
    """The factor c with ``wanted = c · (columns of pool)``, from the column that fits best.

    Returns:
        None where no column of the pool is parallel to one of those wanted.
    """
    table, columns = exact(pool.to(wanted.device)), exact(wanted)
    varied = (columns - columns.mean(0)).norm(dim=0)
    column = columns[:, varied.argmax()]
    cosines = (column @ table) / (table.norm(dim=0) * column.norm()).clamp(min=1e-300)
    best = int(cosines.abs().argmax())
    if 1 - float(cosines[best].abs()) > _tolerance(wanted.dtype):
        return None
    return float(column @ table[:, best] / table[:, best].square().sum())


@dataclass
class _Trace:
    """The way from some entries back to attention's input."""

    watched: Watched
    modules: dict[str, None] = field(default_factory=dict)
    normed: bool = False

    def follow(self, wanted: Tensor, depth: int = 0) -> tuple[Tensor, Tensor] | None:
        """Matrix ``[d_in, n]`` and bias ``[n]`` that make ``wanted [row, n]``; None if none do."""
        taken = self.watched.taken
        wide = torch.promote_types(wanted.dtype, torch.float32)
        same = find_columns(wanted, taken)
        if bool((same >= 0).all()):
            eye = torch.eye(taken.shape[1], device=wanted.device, dtype=wide)
            return eye[:, same], wanted.new_zeros(wanted.shape[1], dtype=wide)
        if depth > DEEPEST:
            return None
        weight = torch.zeros(taken.shape[1], wanted.shape[1], device=wanted.device, dtype=wide)
        bias = torch.zeros(wanted.shape[1], device=wanted.device, dtype=wide)
        missing = (wanted != 0).any(0)
        for through in (self._through_matrix, self._through_norm):
            for call in self.watched.calls:
                if not bool(missing.any()):
                    break
                places = torch.nonzero(missing).flatten()
                columns = find_columns(wanted[:, places], call.given)
                here = columns >= 0
                found = through(call, columns[here], depth) if bool(here.any()) else None
                if found is not None:
                    weight[:, places[here]], bias[places[here]] = found
                    missing[places[here]] = False
        return None if bool(missing.any()) else (weight, bias)

    def _through_matrix(
        self, call: Call, columns: Tensor, depth: int
    ) -> tuple[Tensor, Tensor] | None:
        affine = affine_of(call)
        if affine is None:
            return None
        weight, bias = affine[0][:, columns], affine[1][columns]
        if torch.equal(call.taken, self.watched.taken):
            self.modules[call.path] = None
            return weight, bias
        before = self.follow(call.taken, depth + 1)
        if before is None:
            return None
        self.modules[call.path] = None
        return before[0] @ weight, before[1] @ weight + bias

    def _through_norm(
        self, call: Call, columns: Tensor, depth: int
    ) -> tuple[Tensor, Tensor] | None:
        gain = fit_norm(call.taken, call.given, call.width) if _is_shaped(call) else None
        before = None if gain is None else self.follow(call.taken[:, columns], depth + 1)
        if gain is None or before is None:
            return None
        self.normed = True
        if depth == 0:
            return before
        if gain.centred or not call.width == len(columns) == call.taken.shape[1]:
            return None
        scaling = gain.gain.to(before[0])[columns]
        return before[0] * scaling, before[1] * scaling + gain.bias.to(before[0])[columns]


def _is_shaped(call: Call) -> bool:
    """Whether a call could be that of a norm."""
    return call.taken.shape == call.given.shape and call.taken.shape[1] % call.width == 0


def trace_part(watched: Watched, part: str) -> Projection | None:
    """The projection that makes a part of attention from its input; None if it is not found.

    Args:
        watched: What was seen in the block.
        part: ``query``, ``key`` or ``value``.
    """
    wanted = watched.parts[part].flatten(1)
    trace = _Trace(watched)
    found, scale = trace.follow(wanted), 1.0
    if found is None:
        pool = [call.given.to(wanted) for call in watched.calls]
        factor = common_scale(wanted, torch.cat(pool, 1)) if pool else None
        if factor is None or factor <= 0:
            return None
        trace, scale = _Trace(watched), factor
        found = trace.follow(wanted / factor)
    if found is None:
        return None
    return Projection(*found, scale, trace.normed, tuple(trace.modules))
