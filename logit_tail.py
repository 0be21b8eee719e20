"""The way from the last block to the logits, as numbers: what a logit is a sum of.

    logit = offset + slope · (W_U · norm(stream) + b)      and where there is a soft-cap, bent by it

It is found by one small pass that runs no block: noise goes in where the last block would hand on
the stream, what reaches the unembedding shows the norm (`norm_gain.fit_norm`), and known numbers in
the place of what the unembedding gives show what the model does to these afterwards (a logit scale,
a fixed bias, a soft-cap). No family is known by name, and nothing is believed that the numbers do
not bear out.

With the norm's scale held at the value that it has at one token, the rest is linear:
`TokenRows.directions` are what a part of the stream is multiplied with.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from forward_pass import Hook, ModuleTap, SiteError, attached, resume
from interrupts import UndoStack, enable_grad, no_grad
from model_architecture import Architecture
from module_devices import exact, stored_matrix
from norm_gain import SIZE, NormGain, fit_norm, noise_like

LEVELS = (0.0, 2.0**-10, -(2.0**-10), 16.0, -16.0, 256.0, -256.0)
"""What stands in the place of the unembedding's output in the first rows of the small pass."""

ROWS = 10
"""Rows of the small pass, each one token of noise."""

FITS = 16
"""Roundings by which a recorded vector may differ from what the found formula gives."""


class TokenRows(NamedTuple):
    """The way from the stream to the logits of some tokens."""

    directions: Tensor
    """``[token, d_model]``, float32 or wider: times a part of the stream / scale = logits."""
    norm_bias: Tensor
    """``[token]``, float64 on the CPU: logits that the norm's bias adds."""
    own_bias: Tensor
    """``[token]``: what the unembedding's bias adds, and whatever the model adds besides."""


@dataclass(frozen=True, eq=False)
class LogitTail:
    """What lies between the residual stream that leaves the last block and the logits."""

    head: nn.Module
    """The unembedding."""
    norm: NormGain | None
    """None where the unembedding reads the stream itself, or a multiple of it."""
    slope: Tensor
    """``[vocab]``, float64: logits per unit of what the unembedding gives, before a soft-cap."""
    offset: Tensor
    """``[vocab]``, float64: logits where the unembedding gives 0."""
    capped: bool
    """Whether logits do not rise in proportion with what the unembedding gives (a soft-cap)."""
    nothing: Tensor
    """``[1, 1, d_model]``: zeros as the unembedding takes them, in its dtype, on its device."""

    def uncapped(self, given: Tensor, ids: Tensor) -> Tensor:
        """Logits before a soft-cap, ``[position, target]``, float64 on the CPU; 0 for the token -1.

        Args:
            given: What the unembedding gave, ``[position, vocab]``.
            ids: Tokens, ``[position, target]``.
        """
        index = ids.clamp(min=0)
        picked = exact(given.gather(1, index.to(given.device))).cpu()
        return torch.where(ids < 0, 0.0, self.slope[index] * picked + self.offset[index])

    def rows(self, ids: Sequence[int]) -> TokenRows:
        """What parts of the stream are multiplied with, and what is added, for some tokens."""
        index = list(ids)
        slope, offset = self.slope[index], self.offset[index]
        rows = _rows(self.head, ids, self.nothing)
        own = exact(self.head.forward(self.nothing)[0, 0, index]).to(slope)
        of_norm = torch.zeros_like(slope)
        if self.norm is not None:
            of_norm = slope * (exact(rows) @ self.norm.bias.to(exact(rows))).to(slope)
            rows = self.norm.fold_into(rows.mT).mT
        return TokenRows(rows * slope.to(rows)[:, None], of_norm, slope * own + offset)


@no_grad()
def find_tail(architecture: Architecture, stream: Tensor) -> LogitTail:
    """Find the way from the stream to the logits.

    Args:
        architecture: A model with a head.
        stream: ``[…, d_model]``, what leaves its last block: the noise is of its dtype.

    Raises:
        ArchitectureError: the model has no head, or reads the streams of earlier blocks too.
        SiteError: something else than a norm and a matrix lies between stream and logits.
    """
    require_one_stream(architecture)
    name, head = type(architecture.model).__name__, architecture.model.get_output_embeddings()
    noise = noise_like(stream.new_empty(ROWS, 1, stream.shape[-1]), 0, SIZE)
    levels = torch.zeros(ROWS, device="cpu")
    levels[: len(LEVELS)] = torch.tensor(LEVELS, device="cpu")
    taken: list[Tensor] = []

    def keep(value: Tensor) -> None:
        taken[:] = [value.detach().clone()]

    def feed(value: Tensor) -> Tensor:
        return levels.to(value).view(-1, 1, 1).expand_as(value)

    taps: list[tuple[ModuleTap, Hook]] = [
        (ModuleTap(head, at_input=True), keep),
        (ModuleTap(head), feed),
    ]
    inputs = architecture.inputs(torch.ones(ROWS, 1, dtype=torch.long, device="cpu"))
    with UndoStack() as stack:
        stack.enter_context(attached(taps))
        logits = resume(architecture, inputs, architecture.n_layers, noise)[:, 0]
    if not taken or taken[0].shape != noise.shape:
        raise SiteError(not_read(name))
    read = taken[0][:, 0]
    norm = None
    if multiple_of(read, noise[:, 0]) is None:
        norm = fit_norm(noise[:, 0], read)
        if norm is None:
            raise SiteError(not_read(name))
    slope, offset, capped = _bend(exact(logits).cpu(), read.dtype)
    return LogitTail(head, norm, slope, offset, capped, torch.zeros_like(taken[0][:1]))


def require_one_stream(architecture: Architecture) -> None:
    """Refuse a model whose logits do not come from one residual stream through a head.

    Raises:
        ArchitectureError: it has no head, or what follows its blocks reads earlier streams too.
        SiteError: it has several streams.
    """
    architecture.require_head("what is added to a logit")
    architecture.require_stream("what is added to a logit")
    streams = architecture.stream.streams
    if streams > 1:
        raise SiteError(
            f"{type(architecture.model).__name__} carries {streams} residual streams that it mixes "
            "before the logits, so no logit is a sum over its parts; patching_sweep and ablate "
            "measure their effects instead"
        )


def not_read(name: str) -> str:
    """Why a model's logits cannot be split."""
    return (
        f"what the unembedding of {name} takes is neither the stream that leaves the last block "
        "nor a root-mean-square or layer norm of it, so its logits are not split over its parts; "
        "patching_sweep and ablate measure effects of parts instead"
    )


def _bend(logits: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, bool]:
    """Slope and offset ``[vocab]`` of logits over what the unembedding gives, and if it is bent."""
    eps = max(torch.finfo(dtype).eps, torch.finfo(torch.float32).eps)
    levels = torch.tensor(LEVELS, dtype=logits.dtype, device="cpu")[:, None]
    rows, offset = logits[: len(LEVELS)], logits[0]
    slope = (rows[-2] - rows[-1]) / (2 * levels[-2])
    off = rows - (offset + slope * levels)
    allowed = FITS * eps * (offset.abs() + slope.abs() * levels.abs())
    capped = bool((off.abs() > allowed).any())
    if capped:
        slope = (rows[1] - rows[2]) / (2 * levels[1])
    return torch.where(offset.isfinite(), slope, 0.0), offset, capped


def _rows(head: Any, ids: Sequence[int], nothing: Tensor) -> Tensor:
    """Rows of the unembedding, ``[token, d_model]``, float32 or wider.

    Where its weight is packed, or lies elsewhere until it is used, they are read as gradients.
    """
    index, weight = list(ids), stored_matrix(head)
    wide = torch.promote_types(nothing.dtype, torch.float32)
    if weight is not None and weight.shape[1:] == nothing.shape[2:]:
        return weight[index].to(wide)
    with enable_grad():
        start = nothing.clone().requires_grad_()
        given = head.forward(start)[0, 0]
        found = [torch.autograd.grad(given[i], start, retain_graph=True)[0][0, 0] for i in index]
    return torch.stack(found).to(wide)


# --- Points of a pass -----------------------------------------------------------------------------


def norm_factor(norm: NormGain | None, taken: Tensor, given: Tensor) -> Tensor | None:
    """``1 / scale`` of a norm at points of a pass, ``[position, 1]``, float64 on the CPU.

    Args:
        norm: None where ``given`` is a multiple of ``taken``.
        taken: ``[position, d_model]``.
        given: ``[position, d_model]``.

    Returns:
        None where the norm with that factor does not give what was given, to rounding.
    """
    eps = max(torch.finfo(given.dtype).eps, torch.finfo(torch.float32).eps)
    x, y = exact(taken).cpu(), exact(given).cpu()
    largest = y.abs().amax(-1)
    if norm is not None:
        x, y = norm.linear(x.to(norm.gain)).cpu(), y - norm.bias.cpu()
    factor = (x * y).sum(-1, keepdim=True) / x.square().sum(-1, keepdim=True).clamp(min=1e-300)
    off = (y - factor * x).abs().amax(-1)
    return factor if bool((off <= FITS * eps * largest).all()) else None


def multiple_of(made: Tensor, source: Tensor) -> float | None:
    """The number k with ``made = k · source`` to rounding; None where there is none."""
    if made.shape != source.shape:
        return None
    eps = max(torch.finfo(made.dtype).eps, torch.finfo(torch.float32).eps)
    y = exact(made).cpu()
    x = exact(source).cpu()
    factor = float((x * y).sum() / x.square().sum().clamp(min=1e-300))
    off = float((y - factor * x).abs().max())
    return factor if off <= FITS * eps * float(y.abs().max()) else None
