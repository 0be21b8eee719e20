"""Proof that a model was understood: a few numeric checks to run on any model of your own.

`check_architecture` runs one short forward pass and compares what the toolkit says with what the
model does. Every check states the largest difference it saw and the difference it allows:

- *finite*: no recorded value is NaN or infinite.
- *resume*: running on from each recorded ``resid_pre``, and from the last ``resid_post``, gives the
  logits.
- *parts*: ``resid_pre + attn_out + mlp_out == resid_post`` in every block that has two writers
  (``resid_pre + attn_out`` where it has one).
- *heads*: each head's z through its slice of the output projection, summed with the bias, gives the
  output of that projection (Elhage et al. 2021, "A Mathematical Framework for Transformer
  Circuits").
- *pattern*: attention rows are probabilities: not negative, summing to 1, or to less where the
  model has an attention sink.
- *pattern and value*: the pattern times the values gives z (in models without a gate on z).
- *causal*: another last token changes nothing at earlier positions.
- *identity*: an edit that returns a copy of every site leaves the logits as they are.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from expert_routing import ROUTING
from forward_pass import (
    READ_ONLY,
    ArchitectureError,
    Recording,
    Site,
    edit,
    evaluate,
    record,
    resume,
)
from interrupts import UndoStack, no_grad
from model_architecture import Architecture
from module_devices import exact

CHECK_LENGTH = 7
"""Tokens in the pass that is checked."""


@dataclass(frozen=True)
class Proof:
    """One thing that was checked."""

    name: str
    difference: float | None
    """Largest absolute difference seen; None where the model has nothing to check."""
    allowed: float
    """Difference up to which it counts as rounding."""
    note: str = ""

    @property
    def passed(self) -> bool | None:
        """None where there was nothing to check."""
        return None if self.difference is None else self.difference <= self.allowed


@dataclass(frozen=True)
class ArchitectureReport:
    """What was found in a model, and how far its numbers bear it out."""

    model_class: str
    n_layers: int
    proofs: tuple[Proof, ...]
    missing: tuple[str, ...]
    """Sentences: which sites are not available, where, and why."""
    found: tuple[str, ...] = ()
    """Sentences: which modules are what."""

    @property
    def passed(self) -> bool:
        """Whether no proof failed."""
        return all(proof.passed is not False for proof in self.proofs)

    def __repr__(self) -> str:
        failed = sum(proof.passed is False for proof in self.proofs)
        verdict = "passed" if self.passed else f"{failed} FAILED"
        proofs = f"{len(self.proofs)} proofs: {verdict}"
        return f"ArchitectureReport({self.model_class}, {self.n_layers} layers, {proofs})"

    def __str__(self) -> str:
        rows = [f"{self.model_class}, {self.n_layers} layers"]
        rows += [f"  found: {sentence}" for sentence in self.found]
        words = {True: "passed", False: "FAILED", None: "not applicable"}
        for proof in self.proofs:
            difference = (
                ""
                if proof.difference is None
                else f"{proof.difference:.1e} (allowed {proof.allowed:.1e})"
            )
            rows.append(
                f"  {proof.name:<18} {words[proof.passed]:<15}{difference} {proof.note}".rstrip()
            )
        return "\n".join([*rows, *(f"  not available: {sentence}" for sentence in self.missing)])

    def raise_if_failed(self) -> None:
        """Raise ArchitectureError, with the whole report as its message, if a proof failed."""
        if not self.passed:
            raise ArchitectureError(f"the model does not behave as its structure says:\n{self}")


@no_grad()
def check_architecture(architecture: Architecture) -> ArchitectureReport:
    """Prove by numbers that the structure found in a model is the right one.

    Args:
        architecture: The model to check, with or without a head (without one, nothing is resumed).

    Returns:
        The proofs with their largest differences; ``print`` it, or call ``raise_if_failed``.
    """
    vocabulary = architecture.config.vocab_size
    ids = torch.arange(3, 3 + 2 * CHECK_LENGTH, 2, device="cpu").remainder(vocabulary)[None]
    inputs = architecture.inputs(ids)
    names = [
        (name, layer)
        for layer in range(architecture.n_layers)
        for name in architecture.available_sites(layer)
    ]
    sites = [Site(name, layer) for name, layer in names]
    inner = [site for site in sites if site.name != "attn_pattern"]
    kept = record(architecture, inputs, inner, logits=architecture.has_head)
    eager = record(architecture, inputs, sites)
    checks: list[Callable[..., Proof]] = [_check_parts, _check_heads, _check_pattern, _check_values]
    proofs = [_check_finite(kept)]
    proofs += [
        check(architecture, eager if check in (_check_pattern, _check_values) else kept)
        for check in checks
    ]
    if architecture.has_head:
        proofs.insert(1, _check_resume(architecture, kept, inputs))
        proofs.append(_check_identity(architecture, kept, inputs, inner))
    proofs.append(_check_causal(architecture, kept, inputs))
    return ArchitectureReport(
        type(architecture.model).__name__,
        architecture.n_layers,
        tuple(proofs),
        _missing_sites(architecture),
        _findings(architecture),
    )


def _check_finite(kept: Recording) -> Proof:
    """NaN and infinity would make every comparison below meaningless."""
    values = [*kept.values(), *([] if kept.logits is None else [kept.logits])]
    spoiled = sum(int((~torch.isfinite(value)).sum()) for value in values)
    return Proof("finite", float(spoiled), 0.0, "values that are NaN or infinite")


def _allowed(*tensors: Tensor) -> float:
    """Rounding of a few operations on the largest of these values.

    Many models compute parts in float32.
    """
    single = torch.finfo(torch.float32).eps
    return max(32 * max(torch.finfo(t.dtype).eps, single) * float(t.abs().max()) for t in tensors)


def _difference(a: Tensor, b: Tensor) -> float:
    return float((exact(a) - exact(b)).abs().max())


def _worst(name: str, pairs: list[tuple[Tensor, Tensor]], note: str = "") -> Proof:
    if not pairs:
        return Proof(name, None, 0.0, note)
    return Proof(
        name,
        max(_difference(*pair) for pair in pairs),
        max(_allowed(*pair) for pair in pairs),
        note,
    )


def _check_resume(architecture: Architecture, kept: Recording, inputs: dict[str, Tensor]) -> Proof:
    """Bit for bit: the resumed part of the pass is the same computation."""
    logits = kept.logits
    assert logits is not None
    streams = [kept[Site("resid_pre", layer)] for layer in range(architecture.n_layers)]
    streams.append(kept[Site("resid_post", architecture.n_layers - 1)])
    resumed = [resume(architecture, inputs, layer, stream) for layer, stream in enumerate(streams)]
    return Proof(
        "resume", max(_difference(r, logits) for r in resumed), 0.0, "at every layer and at the end"
    )


def _check_parts(architecture: Architecture, kept: Recording) -> Proof:
    pairs = []
    for layer in range(architecture.n_layers):
        if Site("attn_out", layer) not in kept:
            continue
        total = kept[Site("resid_pre", layer)] + kept[Site("attn_out", layer)]
        if Site("mlp_out", layer) in kept:
            total = total + kept[Site("mlp_out", layer)]
        pairs.append((total, kept[Site("resid_post", layer)]))
    return _worst("parts", pairs, "resid_pre + attn_out + mlp_out = resid_post")


def _check_heads(architecture: Architecture, kept: Recording) -> Proof:
    pairs = []
    for layer, found in enumerate(architecture.structure):
        if Site("head_out", layer) not in kept or found.out_proj is None:
            continue
        projection = architecture.output_projection(layer)
        z = kept[Site("head_out", layer)]
        whole = projection(z.flatten(-2))
        bias = projection(torch.zeros_like(z.flatten(-2)))
        masks = torch.eye(found.n_heads, device=z.device, dtype=z.dtype)[:, None, None, :, None]
        pairs.append(((projection((z * masks).flatten(-2)) - bias).sum(0) + bias, whole))
    return _worst("heads", pairs, "z by head through the output projection")


def _check_pattern(_architecture: Architecture, kept: Recording) -> Proof:
    patterns = [value for site, value in kept.items() if site.name == "attn_pattern"]
    if not patterns:
        return Proof("pattern", None, 0.0)
    sums = torch.cat([exact(pattern).sum(-1).flatten() for pattern in patterns])
    allowed = 32 * max(torch.finfo(patterns[0].dtype).eps, torch.finfo(torch.float32).eps)
    negative = max(0.0, -min(float(pattern.min()) for pattern in patterns))
    sink = bool((sums < 1 - allowed).any())
    over = max(0.0, float((sums - 1).max())) if sink else float((sums - 1).abs().max())
    note = "rows sum to less than 1: an attention sink" if sink else "rows sum to 1"
    return Proof("pattern", max(negative, over), allowed, note)


def _check_values(architecture: Architecture, kept: Recording) -> Proof:
    pairs, note = [], "pattern @ value = z"
    for layer in range(architecture.n_layers):
        if architecture.structure[layer].gated:
            continue
        if Site("attn_pattern", layer) in kept and Site("head_out", layer) in kept:
            pattern, value = kept[Site("attn_pattern", layer)], kept[Site("value", layer)]
            value = value.repeat_interleave(pattern.shape[1] // value.shape[2], dim=2)
            mixed = torch.einsum("bhqk,bkhd->bqhd", pattern, value)
            z = kept[Site("head_out", layer)]
            if mixed.shape == z.shape:
                if _difference(mixed, z) > _allowed(mixed, z):
                    mixed, note = (
                        _sunk(mixed, z),
                        "pattern @ value = z, scaled by a sink outside it",
                    )
                pairs.append((mixed, z))
    return _worst("pattern and value", pairs, note)


def _sunk(mixed: Tensor, z: Tensor) -> Tensor:
    """Mixed values, each head's scaled by what an attention sink outside the pattern leaves."""
    share = (mixed * z).sum(-1, keepdim=True) / (mixed * mixed).sum(-1, keepdim=True)
    return mixed * share.clamp(0, 1)


def _check_identity(
    architecture: Architecture, kept: Recording, inputs: dict[str, Tensor], sites: list[Site]
) -> Proof:
    assert kept.logits is not None
    with UndoStack() as stack:
        evaluate(stack, architecture.model)
        sites = [site for site in sites if site.name not in READ_ONLY]
        stack.enter_context(edit(architecture, [(site, torch.clone) for site in sites]))
        logits = architecture.model(**inputs, use_cache=False).logits
    return Proof(
        "identity", _difference(logits, kept.logits), 0.0, f"{len(sites)} edits that change nothing"
    )


def _check_causal(architecture: Architecture, kept: Recording, inputs: dict[str, Tensor]) -> Proof:
    last = Site("resid_post", architecture.n_layers - 1)
    ids = inputs["input_ids"].clone()
    ids[:, -1] = ids[:, 0]
    other = record(architecture, {**inputs, "input_ids": ids}, [last])
    pairs = [(other[last][:, :-1], kept[last][:, :-1])]
    return _worst("causal", pairs, "another last token changes nothing before it")


def _findings(architecture: Architecture) -> tuple[str, ...]:
    """What the blocks are, and the parts of each kind of block with the layers that have it."""
    path, norm = architecture.blocks_path, architecture.final_norm
    names = {id(module): name for name, module in architecture.body.named_modules()}
    ends = "no norm behind them" if norm is None else f"then the norm {names[id(norm)]!r}"
    head = "a head" if architecture.has_head else "no head"
    kinds: dict[str, list[int]] = {}
    for layer in range(architecture.n_layers):
        kinds.setdefault(_parts(architecture, layer), []).append(layer)
    every = len(kinds) == 1
    return (
        f"{architecture.n_layers} blocks at {path!r}, {ends}, {head}",
        *(
            f"{'all layers' if every else f'layers {layers}'}: {kind}"
            for kind, layers in kinds.items()
        ),
        *_split(architecture),
    )


def _split(architecture: Architecture) -> tuple[str, ...]:
    """What other processes hold a part of, and that sites show it whole."""
    structure = architecture.structure
    counts = {
        "heads": max(found.head_parts for found in structure),
        "key/value heads": max(found.kv_head_parts for found in structure),
        "neurons": max(found.neuron_parts for found in structure),
    }
    split = [name for name, count in counts.items() if count > 1]
    if not split:
        return ()
    processes = f"{max(counts.values())} processes"
    return (f"{', '.join(split)} are split over {processes}, and gathered for every site",)


def _parts(architecture: Architecture, layer: int) -> str:
    """A block's parts in words."""
    found = architecture.structure[layer]
    heads = f"{found.n_heads} heads"
    if found.n_kv_heads != found.n_heads:
        heads += f", {found.n_kv_heads} of keys and values"
    attention = f"attention {found.attention!r} ({heads})" if found.attention else "no attention"
    mlp = "no MLP" if found.mlp is None else f"MLP {found.mlp!r}"
    writers = [repr(each) for each in (found.attn_writer, found.mlp_writer) if each is not None]
    added = " and ".join(writers) if writers else "nothing that was found"
    scale = "" if found.scale == 1.0 else f", times {found.scale}"
    return f"{attention}, {mlp}; {added} added to the stream{scale}"


def _missing_sites(architecture: Architecture) -> tuple[str, ...]:
    """One sentence per missing site, with the layers that lack it."""
    reasons: dict[str, list[int]] = {}
    names = ["resid_mid", "attn_out", "mlp_out", "head_out", "mlp_neurons", "attn_pattern"]
    if any(found.router is not None for found in architecture.structure):
        names += ROUTING
    for name in names:
        for layer in range(architecture.n_layers):
            why = architecture.missing(Site(name, layer))
            if why:
                reasons.setdefault(f"{name}: {why.split(': ', 1)[1]}", []).append(layer)
    every = list(range(architecture.n_layers))
    return tuple(
        f"{reason} ({'all layers' if layers == every else f'layers {layers}'})"
        for reason, layers in reasons.items()
    )
