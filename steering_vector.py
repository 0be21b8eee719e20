"""A direction in the residual stream, and what may be done along it.

With h a token's activation, v the vector, v̂ = v / ‖v‖, c the coefficient, a = h·v̂:

============  =======================================================================
``add``       h + c·v
``subtract``  h − c·v
``ablate``    h − c·a·v̂: c = 1 projects the direction out, c = 2 reflects it
``clamp``     h + (c − a)·v̂: the component along v̂ becomes c, whatever it was
``rotate``    h turned by c radians towards v̂ in their plane, at most onto it; ‖h‖ stays
============  =======================================================================

With ``keep_norm`` the result is scaled to ‖h‖. All is computed in float32 or better and returned in
the activation's dtype.

References: Turner et al. (2023), Activation Addition (``add``); Arditi et al. (2024), Refusal is
mediated by a single direction (``ablate``).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from forward_pass import InputError
from model_architecture import Layer
from module_devices import as_tensor
from pass_positions import PassPositions, check_spec


def _along(h: Tensor, unit: Tensor) -> Tensor:
    """The component of each token along a unit vector, ``[…, 1]``."""
    return (h @ unit)[..., None]


def _rotated(h: Tensor, v: Tensor, c: float) -> Tensor:
    unit = v / v.norm()
    along = _along(h, unit)
    across = h - along * unit
    length, height = h.norm(dim=-1, keepdim=True), across.norm(dim=-1, keepdim=True)
    angle = (torch.atan2(height, along) - c).clamp(0, torch.pi)
    sideways = across / height.clamp(min=torch.finfo(h.dtype).tiny)
    return length * (angle.cos() * unit + angle.sin() * sideways)


OPERATIONS: dict[str, Callable[[Tensor, Tensor, float], Tensor]] = {
    "add": lambda h, v, c: h + c * v,
    "subtract": lambda h, v, c: h - c * v,
    "ablate": lambda h, v, c: h - c * _along(h, v / v.norm()) * (v / v.norm()),
    "clamp": lambda h, v, c: h + (c - _along(h, v / v.norm())) * (v / v.norm()),
    "rotate": _rotated,
}
"""By name: the activation ``[…, d]``, the vector ``[d]`` and the coefficient → the activation."""


@dataclass(frozen=True, eq=False)
class SteeringVector:
    """A vector, where it acts, and how.

    Raises:
        InputError: the vector is no finite ``[d]``, is 0 where a direction is needed, or the
            operation or the positions are of no known kind.
    """

    vector: Any
    """``[d_model]``: a tensor, an array, or an object that has one as ``.vector``."""
    layer_name: Layer
    """The block after which it acts, in any spelling."""
    coefficient: float = 1.0
    positions: PassPositions = None
    """Which tokens: None (all), ``"prompt"``, ``"generated"``, indices; see `pass_positions`."""
    operation: str = "add"
    """A name out of `OPERATIONS`."""
    keep_norm: bool = False
    """Scale each token's activation back to the norm that it had."""
    site: str = "resid_post"
    """A site that holds one vector per token."""

    def __post_init__(self) -> None:
        """Bring the vector into one form, and refuse what cannot be applied."""
        vector = as_tensor(getattr(self.vector, "vector", self.vector)).detach()
        vector = vector.to(torch.promote_types(vector.dtype, torch.float32)).squeeze()
        if vector.dim() != 1 or not bool(vector.isfinite().all()):
            raise InputError(
                f"a steering vector is [d_model], finite; came {list(vector.shape)}"
                + ("" if bool(vector.isfinite().all()) else " with NaN or infinity")
            )
        object.__setattr__(self, "vector", vector)
        if self.operation not in OPERATIONS:
            raise InputError(f"operation {self.operation!r} is none of {', '.join(OPERATIONS)}")
        if self.operation not in ("add", "subtract") and not bool(vector.any()):
            raise InputError(f"a vector of zeros has no direction to {self.operation}")
        check_spec(self.positions)

    def __repr__(self) -> str:
        what = f"{self.operation} {self.coefficient:g} × ‖{float(self.vector.norm()):.3g}‖"
        return f"SteeringVector({what}, {self.site} of layer {self.layer_name!r})"

    def apply(self, activation: Tensor) -> Tensor:
        """What becomes of an activation ``[…, d_model]``; same shape, dtype and device."""
        h = activation.to(torch.promote_types(activation.dtype, torch.float32))
        new = OPERATIONS[self.operation](h, self.vector.to(h), self.coefficient)
        if self.keep_norm:
            tiny = torch.finfo(h.dtype).tiny
            new = new * (h.norm(dim=-1, keepdim=True) / new.norm(dim=-1, keepdim=True).clamp(tiny))
        return new.to(activation)
