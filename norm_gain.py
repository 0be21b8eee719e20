"""What a norm multiplies by, found by feeding it noise: no table of norms, and nothing believed.

A norm of one vector is ``gain ⊙ (x − c·mean(x)) / scale(x) + bias`` with c = 0 (root mean square,
Zhang & Sennrich 2019) or c = 1 (Ba et al. 2016). `fit_norm` finds c, gain and bias from what a
module took and gave, and answers None where the numbers are not of this form. With its scale held
at the value that it had at one point, a norm is linear: `NormGain.frozen`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from forward_pass import Hook, ModuleTap, Site, SiteError, attached, evaluate, recording
from interrupts import UndoStack, no_grad
from model_architecture import Architecture
from module_devices import exact

ROWS = 32
"""Vectors that are fed."""

SIZE = 30.0
"""Standard deviation of their entries: beside it, the epsilon under a norm's root is nothing."""

EPSILONS = (0.0, 1e-8, 1e-6, 1e-5, 1e-3)
"""What may stand under a norm's root beside the mean square."""

FITS = 8
"""Roundings by which a norm's output may differ from the formula."""


@dataclass(frozen=True, eq=False)
class NormGain:
    """The fixed part of a norm: ``norm(x) = gain ⊙ (x − centred·mean(x)) / scale(x) + bias``."""

    gain: Tensor
    """``[d_model]``."""
    bias: Tensor
    """``[d_model]``; 0 where the norm has none."""
    centred: bool
    """Whether the mean over d_model is taken off first (layer norm), or not (RMS norm)."""

    def linear(self, vectors: Tensor) -> Tensor:
        """``[…, d_model]`` without the mean (where that is taken off), times the gain."""
        vectors = vectors.to(self.gain)
        if self.centred:
            vectors = vectors - vectors.mean(-1, keepdim=True)
        return vectors * self.gain

    def factor(self, taken: Tensor, given: Tensor) -> Tensor:
        """``1 / scale`` at points that the norm took and gave, ``[…, d_model]`` each: ``[…, 1]``.

        By least squares over d_model, so it includes whatever epsilon the norm has.
        """
        straight = exact(self.linear(taken))
        moved = given.to(straight) - self.bias.to(straight)
        length = straight.square().sum(-1, keepdim=True)
        return (moved * straight).sum(-1, keepdim=True) / length.clamp(min=1e-300)

    def fold_into(self, matrix: Tensor) -> Tensor:
        """A matrix ``[…, d_model, n]`` behind the norm, acting on ``x / scale(x)`` instead."""
        folded = self.gain.to(matrix)[:, None] * matrix
        return folded - folded.mean(-2, keepdim=True) if self.centred else folded


def fit_norm(taken: Tensor, given: Tensor, width: int | None = None) -> NormGain | None:
    """Gain and bias of a norm, from vectors before and after it.

    Args:
        taken: ``[row, d_model]``, noise, at least 8 rows; where its square is not far above the
            epsilon under the norm's root, that must be one of `EPSILONS`.
        given: The same after the norm, in the model's dtype.
        width: Entries over which the scale is taken, where a row holds several such groups (a norm
            of each head); None is all of them.

    Returns:
        None where these numbers are not those of a root-mean-square or layer norm; of the two, the
        one that fits better.
    """
    x, y = (exact(each).unflatten(-1, (-1, width or each.shape[-1])) for each in (taken, given))
    fits = [_fit(x, y, centred, least) for centred in (False, True) for least in EPSILONS]
    error, gain, bias, centred = min(fits, key=lambda fit: fit[0])
    eps = max(torch.finfo(given.dtype).eps, torch.finfo(torch.float32).eps)
    if not error <= FITS * eps:
        return None
    return NormGain(gain.flatten(), bias.flatten(), centred)


def _fit(x: Tensor, y: Tensor, centred: bool, epsilon: float) -> tuple[float, Tensor, Tensor, bool]:
    """Largest error relative to the largest ``y``, gain and bias ``[group, width]``."""
    moved = x - x.mean(-1, keepdim=True) if centred else x
    unit = moved / (moved.square().mean(-1, keepdim=True) + epsilon).sqrt().clamp(min=1e-300)
    spread = unit - unit.mean(0)
    gain = (spread * y).sum(0) / spread.square().sum(0).clamp(min=1e-300)
    bias = (y - gain * unit).mean(0)
    off = y - gain * unit - bias
    chance = off.square().mean().sqrt() * (6 / len(x) ** 0.5)
    if bool(bias.abs().max() <= chance + 1e-9 * y.abs().max()):
        bias = torch.zeros_like(bias)
    error = float(off.abs().max() / y.abs().max().clamp(min=1e-300))
    return error, gain, bias, centred


def seeded(seed: int) -> torch.Generator:
    """A generator of random numbers on the CPU."""
    return torch.Generator().manual_seed(seed)


def noise_like(value: Tensor, seed: int, size: float = 1.0) -> Tensor:
    """Normal noise of a tensor's shape, each row with a mean of its own, on its device."""
    generator = seeded(seed)
    rows = value.reshape(-1, value.shape[-1]).shape
    noise = torch.randn(rows, generator=generator, device="cpu")
    noise = noise + 0.5 * torch.randn(rows[0], 1, generator=generator, device="cpu")
    return (size * noise).view(value.shape).to(value)


@no_grad()
def norm_gains(architecture: Architecture, norms: Sequence[nn.Module]) -> list[NormGain | None]:
    """Gain and bias of several norms of a model, by one forward pass in which they get noise.

    Args:
        architecture: The model.
        norms: Modules that run once in a pass, on ``[batch, position, d_model]``.

    Returns:
        One per module, in float64; None where it is no norm, or did not run.
    """
    seen: dict[nn.Module, tuple[Tensor, Tensor]] = {}
    fed: dict[nn.Module, Tensor] = {}

    def feed(norm: nn.Module, seed: int) -> Hook:
        def hook(value: Tensor) -> Tensor:
            fed[norm] = noise_like(value, seed, SIZE)
            return fed[norm]

        return hook

    def keep(norm: nn.Module) -> Hook:
        def hook(value: Tensor) -> None:
            seen[norm] = (fed[norm].flatten(0, -2), value.detach().flatten(0, -2).clone())

        return hook

    inputs = architecture.inputs(torch.ones(ROWS, 1, dtype=torch.long, device="cpu"))
    with UndoStack() as stack:
        evaluate(stack, architecture.model)
        stack.enter_context(
            attached([(ModuleTap(m, at_input=True), feed(m, i)) for i, m in enumerate(norms)])
        )
        stack.enter_context(attached([(ModuleTap(m), keep(m)) for m in norms], last=True))
        architecture.body(**inputs, use_cache=False)
    return [fit_norm(*seen[norm]) if norm in seen else None for norm in norms]


# --- The norms of a model -------------------------------------------------------------------------


@no_grad()
def norms_before_attention(
    architecture: Architecture, layers: Sequence[int]
) -> dict[int, NormGain | None]:
    """The norm between the residual stream and each block's attention.

    Args:
        architecture: The model.
        layers: Blocks with attention.

    Returns:
        By block; None where attention reads the stream as it is.

    Raises:
        SiteError: something else than one norm lies between.
    """
    found: dict[int, nn.Module] = {}
    for layer, (stream, read, runs) in _what_attention_reads(architecture, layers).items():
        if torch.equal(read, stream):
            continue
        between = [run for run in runs if torch.equal(run.taken, stream)]
        norm = next((run.module for run in between if torch.equal(run.given, read)), None)
        if norm is None:
            raise SiteError(_no_norm(architecture, layer))
        found[layer] = norm
    gains = dict(zip(found, norm_gains(architecture, list(found.values())), strict=True))
    for layer, gain in gains.items():
        if gain is None:
            raise SiteError(_no_norm(architecture, layer))
    return {layer: gains.get(layer) for layer in layers}


def _no_norm(architecture: Architecture, layer: int) -> str:
    return (
        f"what lies between the residual stream and attention in layer {layer} of "
        f"{type(architecture.model).__name__} is not one norm; pass fold_norm=False"
    )


class _Run(NamedTuple):
    """What a module took and gave, ``[row, d_model]`` each."""

    module: nn.Module
    taken: Tensor
    given: Tensor


def _what_attention_reads(
    architecture: Architecture, layers: Sequence[int]
) -> dict[int, tuple[Tensor, Tensor, list[_Run]]]:
    """The stream, what attention takes, and the runs of the block's other parts, on some tokens."""
    read: dict[int, Tensor] = {}
    runs: dict[int, list[_Run]] = {layer: [] for layer in layers}
    sites = [Site("resid_pre", layer) for layer in layers]
    with UndoStack() as stack:
        evaluate(stack, architecture.model)
        kept = stack.enter_context(recording(architecture, sites))
        for layer in layers:
            block, path = architecture.blocks[layer], architecture.structure[layer].attention
            attention = block.get_submodule(path or "")
            taps: list[tuple[ModuleTap, Hook]] = [
                (ModuleTap(attention, at_input=True), _keeping(read, layer))
            ]
            inside = set(attention.modules())
            for module in block.modules():
                if module not in inside and next(module.children(), None) is None:
                    taps += _noting(runs[layer], module)
            stack.enter_context(attached(taps, last=True))
        ids = torch.arange(1, ROWS + 1, device="cpu").remainder(architecture.config.vocab_size)
        architecture.body(**architecture.inputs(ids[:, None]), use_cache=False)
    streams = {layer: kept[Site("resid_pre", layer)].flatten(0, -2) for layer in layers}
    return {layer: (streams[layer], read[layer], runs[layer]) for layer in layers}


def _keeping(read: dict[int, Tensor], layer: int) -> Hook:
    def hook(value: Tensor) -> None:
        read[layer] = value.detach().flatten(0, -2).clone()

    return hook


def _noting(runs: list[_Run], module: nn.Module) -> list[tuple[ModuleTap, Hook]]:
    """Taps that note each run in which a module gives a vector for a vector."""
    under_way: list[Tensor] = []

    def taken(value: Tensor) -> None:
        under_way[:] = [value.detach().clone()]

    def given(value: Tensor) -> None:
        before = under_way.pop()
        if value.shape == before.shape and value.dim() >= 2:
            runs.append(_Run(module, before.flatten(0, -2), value.detach().flatten(0, -2).clone()))

    return [(ModuleTap(module, at_input=True), taken), (ModuleTap(module), given)]


@no_grad()
def final_norm_gain(architecture: Architecture) -> NormGain | None:
    """The norm before the head; None where there is none.

    Raises:
        SiteError: it is neither a root-mean-square nor a layer norm.
    """
    norm = architecture.final_norm
    if norm is None:
        return None
    (gain,) = norm_gains(architecture, [norm])
    if gain is None:
        raise SiteError(
            f"the final norm of {type(architecture.model).__name__} is neither a root-mean-square "
            "nor a layer norm, so nothing can be read through it with its scale held"
        )
    return gain
