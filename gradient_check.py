"""Whether what autograd calls a model's gradient is the slope of its output.

A layer whose kernel has no backward pass (quantized weights, a custom operation) may cut the graph
without an error: the residual stream goes around it, and gradients come out, silently wrong.
`check_gradient` finds that: along a short line through a probe's embeddings, what the output
changes by must be the integral of the gradient.
"""

from __future__ import annotations

from collections.abc import Sequence
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor, nn

from embedding_pass import EmbeddingPass, Measure, embedding_pass
from forward_pass import ArchitectureError
from model_architecture import Architecture
from tokenization import context_length
from weighted_gradients import GradientPlan, weighted_gradients

PROBE_TOKENS = 6

NODES = 4

LINES = ((0.0, 1e-2), (0.5, 1e-3), (0.5, 1e-2), (1.0, 1e-3), (1.0, 1e-2))
"""Where each line lies: how far from the probe's embeddings, and how long, against their own
length. They are tried until one agrees: on some, a mixture of experts jumps from one to another."""

HALF_LINES = ((0.0, 0.1), (0.0, 0.3), (0.5, 0.1), (0.5, 0.3), (1.0, 0.1))

ALLOWED, HALF_ALLOWED = 0.03, 0.5
"""Relative difference; half precision rounds too much for a close look."""

_CHECKED: WeakKeyDictionary[nn.Module, tuple[int, float]] = WeakKeyDictionary()


def check_gradient(architecture: Architecture) -> float:
    """Compare a model's gradient with its slope on a few tokens, once per model.

    Args:
        architecture: The model, with a head.

    Returns:
        The relative difference.

    Raises:
        ArchitectureError: the model has no gradient, or one that is not its slope.
    """
    model = architecture.model
    kind = getattr(architecture.config, "_attn_implementation", None), model.dtype
    fingerprint = hash((kind, *(id(module) for module in model.modules())))
    known = _CHECKED.get(model)
    if known is None or known[0] != fingerprint:
        known = (fingerprint, _difference(architecture))
        _CHECKED[model] = known
    allowed = HALF_ALLOWED if _is_half(model.dtype) else ALLOWED
    if known[1] > allowed:
        raise ArchitectureError(
            f"the gradient of {type(model).__name__} is not the slope of its output: they differ "
            f"by {known[1]:.0%} on a probe (allowed: {allowed:.0%}). A layer cuts the graph "
            "(quantized weights, a kernel without a backward pass). method='occlusion' needs no "
            "gradient; check_gradients=False goes on regardless"
        )
    return known[1]


def _difference(architecture: Architecture) -> float:
    room = context_length(architecture.config) or PROBE_TOKENS
    length = min(PROBE_TOKENS, room)
    ids = torch.arange(3, 3 + length).remainder(architecture.config.vocab_size).tolist()
    half = _is_half(architecture.model.dtype)
    found = []
    with embedding_pass(architecture, ids, range(length)) as opened:
        for number, (away, step) in enumerate(HALF_LINES if half else LINES):
            found.append(_along_line(opened, away, step, number))
            if found[-1] <= (HALF_ALLOWED if half else ALLOWED):
                break
    return min(found)


def _is_half(dtype: torch.dtype) -> bool:
    return torch.finfo(dtype).bits < 32


def _along_line(opened: EmbeddingPass, away: float, step: float, seed: int) -> float:
    """Relative difference between change and integrated gradient of some logits."""
    measure = _some_logits(opened)
    center = opened.embedding.to(torch.promote_types(opened.embedding.dtype, torch.float32))
    generator = torch.Generator().manual_seed(seed)
    draws = torch.randn(2, *center.shape, generator=generator).to(center)
    aside, line = (each * center.norm() / each.norm() for each in draws)
    center, line = center + away * aside, step * line
    nodes, weights = np.polynomial.legendre.leggauss(NODES)

    def points(numbers: Sequence[int]) -> Tensor:
        shares = torch.tensor([nodes[number] for number in numbers]).to(center)
        return (center + shares[:, None, None] * line).to(opened.embedding.dtype)

    plan = GradientPlan(points, torch.from_numpy(weights), line)
    slopes, _ = weighted_gradients(opened, measure, plan)
    with torch.no_grad():
        ends = torch.stack([center - line, center + line]).to(opened.embedding.dtype)
        values = measure(opened.logits(ends)).double().cpu().numpy()
    change, integral = values[1] - values[0], slopes.sum(-1)
    size = float(np.linalg.norm(change))
    apart = float(np.linalg.norm(change - integral))
    if not np.isfinite(apart):
        return float("inf")
    return apart / size if size else apart


def _some_logits(opened: EmbeddingPass) -> Measure:
    """A few logits at a few positions."""
    last, vocabulary = opened.length - 1, opened.base.shape[-1]
    slots = torch.tensor([last // 2, last, last, last])
    tokens = torch.arange(1, 5).mul(vocabulary // 5)

    def values(logits: Tensor) -> Tensor:
        return logits[:, slots.to(logits.device), tokens.to(logits.device)]

    return Measure(values, tuple(slots.tolist()))
