"""What the writers of a block are made of, at some tokens of one pass: heads, neurons, biases.

Attention and the MLP each end in a matrix (the output projection, the down projection) whose input
has an axis of heads or neurons. Between this matrix and the stream there may be a multiplier, or a
norm, which is linear while its scale is held. `find_writers` names the modules, `record_parts` runs
the model once and keeps what they took and gave, `find_link` says how the matrix's output becomes
what is added to the stream. Where the numbers do not bear this out, the writer stays whole.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from attention_projections import Call, affine_of
from forward_pass import (
    Hook,
    ModuleTap,
    Recording,
    Site,
    Tap,
    WithinBlock,
    attached,
    evaluate,
    recording,
    take_positions,
)
from interrupts import UndoStack, no_grad
from logit_tail import multiple_of, norm_factor
from model_architecture import Architecture
from norm_gain import SIZE, NormGain, fit_norm, noise_like

ROWS = 16
"""Vectors of noise by which a norm behind a matrix is known."""

SAMPLE = 8
"""At how many positions, at most, matrices are proven and the unembedding's output is kept."""


@dataclass(frozen=True, eq=False)
class Writer:
    """Attention or the MLP of one block, as what writes into the residual stream."""

    out: Site
    """What it adds to the stream: ``attn_out`` or ``mlp_out``."""
    scale: float
    """The block's multiplier, which is in ``out`` and not in what ``last`` gives."""
    last: str
    """Path in the block of the module whose output is added."""
    matrix: str | None = None
    """Path of the last matrix, whose input has heads or neurons; None where there is none."""
    inside: Site | None = None
    """What that matrix takes: ``head_out`` or ``mlp_neurons``."""


@dataclass(frozen=True, eq=False)
class Link:
    """How the output of a writer's matrix becomes what is added to the stream: a linear map."""

    norm: NormGain | None
    factor: Tensor
    """``[position or 1, 1]``, float64 on the CPU: all that it is multiplied by."""
    bias: Tensor | None = None
    """``[d_model]``: what the norm's own bias adds to the stream."""

    def back(self, directions: Tensor) -> Tensor:
        """Directions ``[…, d_model]`` in the stream, as directions in the matrix's output."""
        if self.norm is None:
            return directions
        return self.norm.fold_into(directions.mT).mT


@dataclass(eq=False)
class Recorded:
    """What one pass had at the chosen positions."""

    sites: Recording
    """``[1, position, …]`` by site."""
    given: dict[Site, Tensor] = field(default_factory=dict)
    """What a writer's matrix gave, ``[position, d_model]`` by the writer's site."""
    taken: dict[Site, Tensor] = field(default_factory=dict)
    """What its last module took."""
    nothing: dict[Site, Tensor] = field(default_factory=dict)
    """One vector of zeros, as the writer's matrix takes it."""
    embeddings: dict[nn.Module, Tensor] = field(default_factory=dict)
    """What embeddings outside of the blocks gave, ``[position, width]``."""
    read: Tensor | None = None
    """``[position, d_model]``: what the unembedding took."""
    unembedded: Tensor | None = None
    """``[sample, vocab]``: what the unembedding gave at `sample`."""
    logits: Tensor | None = None
    """``[position, vocab]``."""
    sample: Sequence[int] = ()
    """Entries of the position axis, few, spread over it."""

    def at(self, site: Site) -> Tensor:
        """``[position, …]`` of a site."""
        return self.sites[site][0]


def find_writers(architecture: Architecture, layer: int) -> list[Writer]:
    """The two writers of a block, or its only one; none where they were not found."""
    found = architecture.structure[layer]
    if found.attn_writer is None:
        return []
    heads = found.out_proj if found.head_parts == 1 else None
    neurons = found.down_proj if found.neuron_parts == 1 else None
    rows = [("attn_out", found.attn_writer, heads, "head_out")]
    if found.mlp_writer is not None:
        rows.append(("mlp_out", found.mlp_writer, neurons, "mlp_neurons"))
    return [
        Writer(
            Site(out, layer),
            found.scale,
            last,
            matrix,
            None if matrix is None else Site(inside, layer),
        )
        for out, last, matrix, inside in rows
    ]


@no_grad()
def record_parts(
    architecture: Architecture,
    ids: Sequence[int],
    positions: Sequence[int],
    writers: Sequence[Writer],
    sites: Sequence[Site],
) -> Recorded:
    """Run the prompt once, and keep what its parts are made of.

    Args:
        architecture: The model, with a head.
        ids: The prompt.
        positions: Absolute.
        writers: Whose matrices are watched.
        sites: What else to keep.
    """
    index = torch.tensor(positions, device="cpu")
    with UndoStack() as stack:
        evaluate(stack, architecture.model)
        found = Recorded(stack.enter_context(recording(architecture, sites, index)))
        taps = [
            *_around_matrices(architecture, writers, index, found),
            *_embedding_taps(architecture, len(ids), index, found),
            *_head_taps(architecture, index, found),
        ]
        stack.enter_context(attached(taps, last=True))
        inputs = architecture.inputs(torch.tensor([list(ids)], device="cpu"))
        logits = architecture.model(**inputs, use_cache=False).logits
        found.logits = logits[0, index.to(logits.device)]
    return found


def _around_matrices(
    architecture: Architecture, writers: Sequence[Writer], index: Tensor, found: Recorded
) -> list[tuple[Tap, Hook]]:
    taps: list[tuple[Tap, Hook]] = []
    for writer in writers:
        if writer.matrix is not None:
            path = writer.matrix
            taps.append((_tap(architecture, writer, path), _keeping(found.given, writer, index)))
            shape = _keeping_shape(found.nothing, writer)
            taps.append((_tap(architecture, writer, path, at_input=True), shape))
            if writer.last != path and writer.last != "":
                tap = _tap(architecture, writer, writer.last, at_input=True)
                taps.append((tap, _keeping(found.taken, writer, index)))
    return taps


def _tap(architecture: Architecture, writer: Writer, path: str, at_input: bool = False) -> Tap:
    layer = writer.out.layer
    block, flat = architecture.blocks[layer], path in architecture.structure[layer].flattened
    module = block.get_submodule(path)
    return WithinBlock(ModuleTap(module, at_input, block=block if flat else None), block)


def _keeping(kept: dict[Site, Tensor], writer: Writer, index: Tensor) -> Callable[[Tensor], None]:
    def hook(value: Tensor) -> None:
        kept[writer.out] = take_positions(value.detach(), index, 1)[0]

    return hook


def _keeping_shape(kept: dict[Site, Tensor], writer: Writer) -> Callable[[Tensor], None]:
    def hook(value: Tensor) -> None:
        kept[writer.out] = torch.zeros_like(value.flatten(0, -2)[:1]).view(
            *(1,) * (value.dim() - 1), -1
        )

    return hook


def _embedding_taps(
    architecture: Architecture, length: int, index: Tensor, found: Recorded
) -> list[tuple[Tap, Hook]]:
    """Taps on the embeddings that the body has outside of its blocks."""
    inner = {id(module) for block in architecture.blocks for module in block.modules()}

    def keep(module: nn.Module) -> Hook:
        def hook(value: Tensor) -> None:
            rows = value[None] if value.dim() == 2 else value
            if rows.dim() == 3 and rows.shape[:2] == (1, length):
                found.embeddings[module] = take_positions(rows.detach(), index, 1)[0]

        return hook

    modules = [m for m in architecture.body.modules() if isinstance(m, nn.Embedding)]
    return [(ModuleTap(module), keep(module)) for module in modules if id(module) not in inner]


def _head_taps(
    architecture: Architecture, index: Tensor, found: Recorded
) -> list[tuple[Tap, Hook]]:
    """Taps on what the unembedding takes, and on what it gives at some of the positions."""
    found.sample = range(0, len(index), -(-len(index) // SAMPLE))

    def read(value: Tensor) -> None:
        found.read = take_positions(value.detach(), index, 1)[0]

    def unembedded(value: Tensor) -> None:
        found.unembedded = take_positions(value.detach(), index[list(found.sample)], 1)[0]

    head = architecture.model.get_output_embeddings()
    return [(ModuleTap(head, at_input=True), read), (ModuleTap(head), unembedded)]


# --- From a matrix to the stream ------------------------------------------------------------------


@no_grad()
def find_link(architecture: Architecture, writer: Writer, found: Recorded) -> Link | None:
    """How the output of a writer's matrix becomes what is added; None if it is not understood."""
    given = found.given.get(writer.out)
    if given is None:
        return None
    through = _through_norm(architecture, writer, found, given)
    if through is not None:
        return through
    times = multiple_of(found.at(writer.out), given)
    if times is None:
        return None
    return Link(None, torch.full((1, 1), times, dtype=torch.float64, device="cpu"))


def _through_norm(
    architecture: Architecture, writer: Writer, found: Recorded, given: Tensor
) -> Link | None:
    """The link through the writer's last module, if that is a norm of what the matrix gave.

    It is tried first: in half precision what a norm with like gains gives is nearly a multiple.
    """
    written, taken = found.at(writer.out), found.taken.get(writer.out)
    times = None if taken is None else multiple_of(taken, given)
    if taken is None or times is None:
        return None
    last = architecture.blocks[writer.out.layer].get_submodule(writer.last)
    noise = noise_like(taken.new_empty(ROWS, 1, taken.shape[-1]), writer.out.layer, SIZE)
    with UndoStack() as stack:
        evaluate(stack, architecture.model)
        answer = last.forward(noise)
    norm = fit_norm(noise[:, 0], answer[:, 0])
    factor = None if norm is None else norm_factor(norm, taken, written / writer.scale)
    if norm is None or factor is None:
        return None
    return Link(norm, factor * (times * writer.scale), writer.scale * norm.bias)


@no_grad()
def find_matrix(
    architecture: Architecture, writer: Writer, found: Recorded
) -> tuple[Tensor, Tensor] | None:
    """Matrix ``[n_in, d_model]`` and bias of a writer, proven at some of the points, or None."""
    if writer.matrix is None or writer.inside is None:
        return None
    module = architecture.blocks[writer.out.layer].get_submodule(writer.matrix)
    rows = list(found.sample)
    taken, given = found.at(writer.inside)[rows].flatten(1), found.given[writer.out][rows]
    return affine_of(Call(writer.matrix, module, taken, given, taken.shape[1]))


@no_grad()
def matrix_bias(architecture: Architecture, writer: Writer, found: Recorded) -> Tensor:
    """``[d_model]``: what a writer's matrix gives for zeros."""
    assert writer.matrix is not None
    module = architecture.blocks[writer.out.layer].get_submodule(writer.matrix)
    return module.forward(found.nothing[writer.out]).flatten()
