"""Attribution to tokens by gradients at one point or several, and by taking tokens out.

Saliency, gradient × input, integrated gradients and SmoothGrad are one computation: gradients at
some points of embedding space, added up with weights, then multiplied by (embedding − baseline) or
measured by their length. A `GradientPlan` says which points and weights; `weighted_gradients` runs
it, many points to a pass. `occlusion` takes one token out at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from embedding_pass import EmbeddingPass, Measure, memory_needed, rows_per_pass
from interrupts import no_grad
from memory_limits import in_batches

Progress = Callable[[int], Any]
"""Is called with the number of steps done since the last call."""


@dataclass(frozen=True, eq=False)
class GradientPlan:
    """Where gradients are taken, and what is made of them."""

    points: Callable[[Sequence[int]], Tensor]
    """Embeddings ``[row, position, d]`` of some points, by number."""
    weights: Tensor
    """``[point]``, float64: gradients are added up with these."""
    factor: Tensor | None
    """``[position, d]``: what their sum is multiplied by; None takes its length, ‖·‖₂."""


def _wide(tensor: Tensor) -> Tensor:
    """At least float32."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def at_input(opened: EmbeddingPass, baseline: Tensor | None) -> GradientPlan:
    """The gradient at the prompt itself: its length, or times (embedding − baseline)."""
    factor = None if baseline is None else _wide(opened.embedding) - _wide(baseline)
    return GradientPlan(
        lambda numbers: opened.embedding.expand(len(numbers), -1, -1),
        torch.ones(1, dtype=torch.float64, device="cpu"),
        factor,
    )


def along_path(opened: EmbeddingPass, baseline: Tensor, n_steps: int) -> GradientPlan:
    """Gradients at Gauss-Legendre nodes of the straight line from the baseline to the prompt.

    Sundararajan et al. 2017, "Axiomatic Attribution for Deep Networks", equation 1.

    Args:
        opened: The prompt.
        baseline: ``[position, d]``.
        n_steps: Number of nodes; a polynomial of degree below twice that is integrated exactly.
    """
    nodes, weights = np.polynomial.legendre.leggauss(n_steps)
    start, end = _wide(baseline), _wide(opened.embedding)
    shares = torch.from_numpy((1 + nodes) / 2).to(end)

    def points(numbers: Sequence[int]) -> Tensor:
        share = shares[list(numbers)][:, None, None]
        return (start + share * (end - start)).to(opened.embedding.dtype)

    return GradientPlan(points, torch.from_numpy(weights / 2), end - start)


def around_input(
    opened: EmbeddingPass, baseline: Tensor, n_samples: int, noise: float, seed: int
) -> GradientPlan:
    """The mean gradient over noisy copies of the prompt, for gradient × input.

    Smilkov et al. 2017, "SmoothGrad: removing noise by adding noise", section 3.

    Args:
        opened: The prompt.
        baseline: ``[position, d]``.
        n_samples: Number of copies.
        noise: Standard deviation, as a share of the range of the prompt's embeddings (max − min).
        seed: Of the noise; a copy's noise does not depend on how many go into a pass.
    """
    center = _wide(opened.embedding)
    scale = noise * float(center.max() - center.min())

    def one(number: int) -> Tensor:
        (state,) = np.random.SeedSequence([seed, number]).generate_state(1, np.uint64)
        generator = torch.Generator().manual_seed(int(state >> np.uint64(1)))
        return torch.randn(center.shape, generator=generator, device="cpu").to(center)

    def points(numbers: Sequence[int]) -> Tensor:
        noisy = [center + scale * one(number) for number in numbers]
        return torch.stack(noisy).to(opened.embedding.dtype)

    weights = torch.full((n_samples,), 1 / n_samples, dtype=torch.float64, device="cpu")
    return GradientPlan(points, weights, center - _wide(baseline))


def weighted_gradients(
    opened: EmbeddingPass,
    measure: Measure,
    plan: GradientPlan,
    *,
    per_dimension: bool = False,
    batch_size: int | None = None,
    progress: Progress | None = None,
) -> tuple[np.ndarray, np.ndarray | None]:
    """Run a plan for all targets: one forward pass, and one product per target, for many points.

    Args:
        opened: The prompt.
        measure: The targets.
        plan: Where gradients are taken, and what is made of them.
        per_dimension: Also return what each entry of the embedding contributes.
        batch_size: Points per pass; None is what memory and processor like.
        progress: Called with the number of points done.

    Returns:
        ``[target, position]`` and, if asked for, ``[target, position, d]``; both float64.

    Raises:
        ArchitectureError: the model has no gradient.
        NotEnoughMemoryError: one point does not fit into memory.
    """
    whole = per_dimension or plan.factor is None
    axes = "rpd,r->pd" if whole else "rpd,r,pd->p"
    shape = (measure.count, *opened.embedding.shape[: 2 if whole else 1])

    def run(numbers: Sequence[int]) -> Tensor:
        part = torch.zeros(shape, dtype=torch.float64, device="cpu")

        def take(target: int, gradient: Tensor) -> None:
            wide = _wide(gradient)
            weights = plan.weights[list(numbers)].to(wide)
            factors = [] if whole or plan.factor is None else [plan.factor.to(wide)]
            part[target] = torch.einsum(axes, wide, weights, *factors).cpu().double()

        opened.gradients(plan.points(numbers), measure, take)
        return part

    total = torch.zeros(shape, dtype=torch.float64, device="cpu")
    size = batch_size or rows_per_pass(opened, graph=True)
    batches = in_batches(
        _chunks(len(plan.weights), size),
        run,
        unit="steps",
        needs=lambda rows: memory_needed(opened, len(rows), graph=True),
    )
    for numbers, part in batches:
        total += part
        if progress is not None:
            progress(len(numbers))
    if not whole:
        return total.numpy(), None
    if plan.factor is None:
        return total.norm(dim=-1).numpy(), total.numpy() if per_dimension else None
    total *= plan.factor.cpu().double()
    return total.sum(-1).numpy(), total.numpy()


def _chunks(count: int, size: int) -> Iterator[range]:
    for start in range(0, count, size):
        yield range(start, min(start + size, count))


@no_grad()
def occlusion(
    opened: EmbeddingPass,
    measure: Measure,
    baseline: Tensor,
    *,
    batch_size: int | None = None,
    progress: Progress | None = None,
) -> np.ndarray:
    """What each target loses when one token's embedding is replaced by the baseline's.

    Zeiler and Fergus 2014, section 4.2, for tokens. Every pass holds the unchanged prompt too, so
    that what a token does not reach is exactly 0.

    Args:
        opened: The prompt.
        measure: The targets.
        baseline: ``[position, d]``.
        batch_size: Changed prompts per pass; None is what memory and processor like.
        progress: Called with the number of positions done.

    Returns:
        ``[target, position]``, float64: the target's value less the one without the token.

    Raises:
        NotEnoughMemoryError: one changed prompt does not fit into memory.
    """
    standing = baseline.to(opened.embedding)

    def run(numbers: Sequence[int]) -> Tensor:
        points = opened.embedding.repeat(len(numbers) + 1, 1, 1)
        for row, position in enumerate(numbers, 1):
            points[row, position] = standing[position]
        values = measure(opened.logits(points)).cpu().double()
        return values[:1] - values[1:]

    size = batch_size or rows_per_pass(opened, graph=False)
    lost = []
    batches = in_batches(
        _chunks(opened.length, size),
        run,
        unit="positions",
        needs=lambda rows: memory_needed(opened, len(rows) + 1, graph=False),
    )
    for numbers, part in batches:
        lost.append(part)
        if progress is not None:
            progress(len(numbers))
    return torch.cat(lost).T.numpy().copy()


def values_at(opened: EmbeddingPass, measure: Measure, baseline: Tensor) -> np.ndarray:
    """The targets' values where every token has its baseline, ``[target]``, float64."""
    with no_grad():
        logits = opened.logits(baseline.to(opened.embedding)[None])
        return measure(logits)[0].cpu().double().numpy()
