"""Gradients of a half-precision model at a size that half precision can hold.

A float16 below 6e-8 is 0 and one above 65504 infinite. The gradient of an unlikely token's
probability at the logits is as small as that probability, and would be 0 from the head on down,
without a word. Training multiplies the loss by a number against this (Micikevicius et al. 2018,
"Mixed Precision Training", section 3.2). Here each row has its own: what comes out of the float32
part of the graph is made of size 1, and the gradient is multiplied back in float32.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


def is_narrow(model: nn.Module) -> bool:
    """Whether some part of a model computes in float16, which loses small gradients."""
    kinds = {(each.device.type, each.dtype) for each in model.parameters()}
    return any(torch.float16 in (dtype, autocast_dtype(device)) for device, dtype in kinds)


def autocast_dtype(device: str) -> torch.dtype | None:
    """The type that autocast computes in on a kind of device; None where it is not on."""
    try:
        return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
    except RuntimeError:  # a kind of device without autocast, as meta
        return None


class GradientScale:
    """Logits in at least float32, and the true size of gradients from behind them.

    Args:
        model: What the logits come from. Some give float32 whatever they compute in.
        by_position: Whether each position has a size of its own; else each row. Right where a
            number whose gradient is taken is made of a single position's logits.
    """

    def __init__(self, model: nn.Module, by_position: bool = False) -> None:
        self.narrow, self.by_position = is_narrow(model), by_position
        self._sizes: Tensor | None = None

    def widen(self, logits: Tensor) -> Tensor:
        """Logits ``[row, read, vocab]`` in float32, or as they are where they are wider."""
        self._sizes = None
        wide = torch.promote_types(logits.dtype, torch.float32)
        if self.narrow:
            return _Widened.apply(logits, wide, self)
        return logits.to(wide)

    def undo(self, gradient: Tensor, slot: int = 0) -> Tensor:
        """A gradient ``[row, …]`` of the latest backward pass, as it is without any scale.

        Args:
            gradient: From behind the logits.
            slot: The entry of ``read`` that the number is made of; of no account without
                ``by_position``.

        Returns:
            Like it; of at least float32 where it was scaled.
        """
        if self._sizes is None:
            return gradient
        sizes = self._sizes[:, slot].to(gradient.device)
        wide = gradient.to(torch.promote_types(gradient.dtype, torch.float32))
        return wide * sizes.view(-1, *[1] * (gradient.dim() - 1))

    def pass_on(self, slope: Tensor, dtype: torch.dtype) -> Tensor:
        """The gradient at the logits, of size 1 (the sum of its entries' sizes), in ``dtype``."""
        sizes = slope.abs().sum(-1)
        if not self.by_position:
            sizes = sizes.sum(-1, keepdim=True).expand_as(sizes)
        self._sizes = torch.where((sizes > 0) & sizes.isfinite(), sizes, 1)
        return (slope / self._sizes[..., None]).to(dtype)


class _Widened(torch.autograd.Function):
    """To a wider type; the gradient goes back at the scale's size."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, wide: torch.dtype, scale: GradientScale) -> Tensor:
        ctx.scale, ctx.dtype = scale, logits.dtype
        return logits.to(wide, copy=True)

    @staticmethod
    def backward(ctx: Any, *slopes: Tensor) -> Any:
        (slope,) = slopes
        return ctx.scale.pass_on(slope, ctx.dtype), None, None
