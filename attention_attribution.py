"""Attribution to tokens by attention alone, and by attention weighted with gradients.

Both follow attention from block to block; neither is faithful by construction, which is why they
stand beside the gradient methods for comparison.

    attention_rollout     Abnar and Zuidema 2020, "Quantifying Attention Flow in Transformers", §3
    gradient_attention    Chefer et al. 2021, "Generic Attention-model Explainability", eq. 5 and 6
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from embedding_pass import EmbeddingPass, Measure, differentiable
from forward_pass import Site, SiteError, record
from gradient_scale import GradientScale
from interrupts import enable_grad
from model_architecture import Architecture
from module_devices import exact


def pattern_sites(architecture: Architecture, method: str) -> list[Site]:
    """The attention pattern of every block.

    Raises:
        SiteError: a block has none (a state space, a recurrent layer): tokens also mix elsewhere.
    """
    sites = [Site("attn_pattern", layer) for layer in range(architecture.n_layers)]
    for site in sites:
        why = architecture.missing(site)
        if why:
            raise SiteError(
                f"{method} follows attention through every block, and this model mixes tokens "
                f"otherwise too: {why}. Use method='integrated_gradients' or 'occlusion'"
            )
    return sites


def attention_rollout(
    architecture: Architecture, ids: Sequence[int], positions: Sequence[int]
) -> np.ndarray:
    """Attention, averaged over heads, with half of each row for the residual stream, multiplied up.

    ``R = Ā(n−1) … Ā(0)`` with ``Ā = ½ (mean over heads of A) + ½ I``, rows made to sum to 1.

    Args:
        architecture: The model, with or without a head.
        ids: The prompt.
        positions: Whose rows are wanted.

    Returns:
        ``[target, position]``, float64: shares that sum to 1, the target's own token included.

    Raises:
        SiteError: a block has no attention pattern.
    """
    sites = pattern_sites(architecture, "attention rollout")
    kept = record(architecture, architecture.inputs(torch.tensor([list(ids)], device="cpu")), sites)
    rolled = torch.eye(len(ids), dtype=torch.float64, device="cpu")
    for site in sites:
        pattern = _square(kept[site], len(ids))[0].cpu().double().mean(0)
        mixed = (pattern + torch.eye(len(ids), dtype=torch.float64, device="cpu")) / 2
        rolled = mixed / mixed.sum(-1, keepdim=True) @ rolled
    return rolled[list(positions)].numpy()


def _square(pattern: Tensor, length: int) -> Tensor:
    """A pattern ``[batch, head, query, key]`` over the prompt's tokens alone.

    Raises:
        SiteError: it is over something else.
    """
    if pattern.shape[-2:] != (length, length):
        raise SiteError(
            f"attention of {length} tokens has the shape {tuple(pattern.shape)}; following it "
            "needs a row and a column for each token"
        )
    return pattern


def gradient_attention(
    opened: EmbeddingPass, measure: Measure, positions: Sequence[int]
) -> np.ndarray:
    """Attention weighted with the gradient of the target, its positive part added up by block.

    ``R ← R + mean over heads of (∂y/∂A ∘ A)⁺ R`` from ``R = I``, block by block; what is returned
    is the target position's row of ``R − I``.

    Args:
        opened: The prompt, opened with the sites that `pattern_sites` names.
        measure: The targets ``y``.
        positions: One per target.

    Returns:
        ``[target, position]``, float64, not negative, in no unit.

    Raises:
        SiteError: a block's pattern is over something else than the prompt's tokens.
        ArchitectureError: the model has no gradient.
    """
    rows, scale = [], GradientScale(opened.architecture.model)
    with enable_grad(), differentiable(opened.name):
        leaf = opened.embedding.detach()[None].requires_grad_()
        values = measure(scale.widen(opened.logits(leaf)))
        patterns = [_square(each, opened.length) for each in opened.kept.values()]
        for target, position in enumerate(positions):
            keep = target < len(positions) - 1
            slopes = torch.autograd.grad(values[:, target].sum(), patterns, retain_graph=keep)
            sized = [scale.undo(slope) for slope in slopes]
            rows.append(_relevance(patterns, sized)[position])
    return torch.stack(rows).numpy()


def _relevance(patterns: Sequence[Tensor], slopes: Sequence[Tensor]) -> Tensor:
    """``R − I`` of one target, ``[query, key]``, float64."""
    unit = torch.eye(patterns[0].shape[-1], dtype=torch.float64, device="cpu")
    found = torch.zeros_like(unit)
    for pattern, slope in zip(patterns, slopes, strict=True):
        weighted = (exact(pattern.detach()) * exact(slope)).clamp(min=0)[0].mean(0).cpu()
        found = found + weighted @ (unit + found)
    return found
