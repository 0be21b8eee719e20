"""A direction in the residual stream as a value: where it was found, its algebra, and its files.

    happy = find_direction(model, tokenizer, positive, negative, layer=6)     # direction_finding
    mixed = 0.5 * happy - formal
    with steer(model, mixed, coefficient=2.0):                                 # steering
        model.generate(...)

A `Direction` is immutable; every operation returns another. Directions of several layers are a dict
``{layer: Direction}``, which is what `save_directions` writes and `control_vectors` exchanges with
repeng and llama.cpp.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from numbers import Real
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from array_files import open_arrays, write_arrays
from forward_pass import InputError, RecordFileError
from module_devices import as_tensor
from steering_vector import SteeringVector

KIND = "steering directions"
"""What a file of `save_directions` says that it holds."""

VERSION = 1
"""Of that file's schema."""

ABOUT = ("layer", "site", "method", "label", "model")
"""Fields of a `Direction` beside its vector."""


@dataclass(frozen=True, eq=False)
class Direction:
    """One vector, and the place in a model that it belongs to.

    ``a + b``, ``a - b``, ``-a``, ``2 * a`` and ``a / 2`` are directions of the same place.

    Raises:
        InputError: the vector is not ``[d]`` with finite entries, or the layer is no index.
    """

    vector: Tensor
    """``[d_model]``, floating point; not scaled to 1, in the stream's own unit."""
    layer: int
    """Index of the block; 0 is the first, and the vector belongs to what leaves it."""
    site: str = "resid_post"
    """A name out of `forward_pass.SITES` that holds one vector per token."""
    method: str = ""
    """How it was found: a name out of `direction_finding.METHODS`, or a function's."""
    label: str = ""
    """What it stands for, for people."""
    model: str = ""
    """The config's ``model_type`` of the model that it was found in; ``""`` if not known."""

    __array_ufunc__: ClassVar[None] = None  # numpy's numbers leave the multiplication to us

    def __post_init__(self) -> None:
        """Bring the vector into a copy of its own, and refuse what is none."""
        vector = as_tensor(self.vector).detach()
        if vector.dim() != 1 or not vector.numel() or not bool(vector.isfinite().all()):
            why = "" if bool(vector.isfinite().all()) else " with NaN or infinity"
            raise InputError(f"a direction is [d_model], finite; came {list(vector.shape)}{why}")
        if not vector.is_floating_point():
            vector = vector.float()
        if isinstance(self.layer, bool) or not hasattr(self.layer, "__index__") or self.layer < 0:
            raise InputError(f"a direction's layer is an index from 0; came {self.layer!r}")
        object.__setattr__(self, "vector", vector.clone())
        object.__setattr__(self, "layer", int(self.layer.__index__()))

    def __repr__(self) -> str:
        name = f"{self.label!r}, " if self.label else ""
        how = f"{self.method}, " if self.method else ""
        where = f"{self.site} of layer {self.layer}"
        return f"Direction({name}{how}{where}, ‖{self.norm:.3g}‖, d={len(self.vector)})"

    # --- Measures --------------------------------------------------------------------------------

    @property
    def norm(self) -> float:
        """Euclidean length, in the stream's unit."""
        return float(self._exact().norm())

    def cosine(self, other: Direction) -> float:
        """Cosine of the angle to another direction, -1 to 1; the layers may differ.

        Raises:
            InputError: one of them is 0, or their widths differ.
        """
        self._check_width(other)
        lengths = self.norm * other.norm
        if lengths == 0:
            raise InputError("a direction of zeros has no angle to another")
        return float((self._exact() @ other._exact()) / lengths)

    def _exact(self) -> Tensor:
        return self.vector.cpu().double()

    def _check_width(self, other: Direction) -> None:
        if len(self.vector) != len(other.vector):
            raise InputError(
                f"the widths differ: {len(self.vector)} ({self!r}) and {len(other.vector)} "
                f"({other!r}); they are of different models"
            )

    # --- Algebra ---------------------------------------------------------------------------------

    def __add__(self, other: Direction) -> Direction:
        return self._sum(other, 1, "+")

    def __sub__(self, other: Direction) -> Direction:
        return self._sum(other, -1, "−")

    def _sum(self, other: Any, sign: int, symbol: str) -> Direction:
        if not isinstance(other, Direction):
            return NotImplemented
        self._check_width(other)
        if (self.layer, self.site) != (other.layer, other.site):
            raise InputError(
                f"directions of different places have no sum: {self!r} and {other!r}; "
                "steer with both instead, or say where it belongs: "
                "Direction(a.vector + b.vector, layer)"
            )
        return replace(
            self,
            vector=self.vector + sign * other.vector.to(self.vector),
            method=self.method if self.method == other.method else "",
            label=f"{self.label} {symbol} {other.label}" if self.label and other.label else "",
            model=self.model if self.model == other.model else "",
        )

    def __mul__(self, factor: float) -> Direction:
        if not isinstance(factor, Real) or isinstance(factor, bool):
            return NotImplemented
        label = f"{float(factor):g} × ({self.label})" if self.label else ""
        return replace(self, vector=self.vector * float(factor), label=label)

    __rmul__ = __mul__

    def __truediv__(self, divisor: float) -> Direction:
        if not isinstance(divisor, Real) or isinstance(divisor, bool):
            return NotImplemented
        return self * (1 / float(divisor))

    def __neg__(self) -> Direction:
        return self * -1

    def unit(self) -> Direction:
        """The same direction with length 1.

        Raises:
            InputError: it is 0.
        """
        if self.norm == 0:
            raise InputError("a direction of zeros cannot be scaled to length 1")
        return replace(self, vector=(self._exact() / self.norm).to(self.vector))

    # --- Out -------------------------------------------------------------------------------------

    def to(
        self, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> Direction:
        """A copy on another device, or of another floating dtype."""
        return replace(self, vector=self.vector.to(device=device, dtype=dtype))

    def steering(self, coefficient: float = 1.0, **options: Any) -> SteeringVector:
        """The intervention that acts along this direction, at its place.

        Args:
            coefficient: See `steering_vector`.
            **options: ``positions``, ``operation``, ``keep_norm``; ``layer_name`` to act elsewhere.
        """
        place: dict[str, Any] = {"layer_name": self.layer, "site": self.site}
        return SteeringVector(self.vector, coefficient=coefficient, **(place | options))

    def save(self, path: str | Path) -> None:
        """Write it into one safetensors file with a JSON header, atomically.

        Raises:
            RecordFileError: the file cannot be written.
        """
        save_directions({self.layer: self}, path)

    @classmethod
    def load(cls, path: str | Path) -> Direction:
        """Read what `save` wrote.

        Raises:
            RecordFileError: the file is not what `save` writes, or holds several directions.
        """
        found = load_directions(path)
        if len(found) != 1:
            raise RecordFileError(
                f"{path} holds directions of layers {', '.join(map(str, found))}: "
                "read it by load_directions"
            )
        return next(iter(found.values()))


# --- Directions of several layers -----------------------------------------------------------------


def by_layer(directions: Direction | Mapping[int, Direction]) -> dict[int, Direction]:
    """One direction, or several by layer, as a dict in the order of the layers.

    Raises:
        InputError: it is something else, empty, or a key is not its direction's layer.
    """
    if isinstance(directions, Direction):
        return {directions.layer: directions}
    if not isinstance(directions, Mapping) or not directions:
        raise InputError(
            "directions are a Direction, or {layer: Direction} with at least one; "
            f"came {type(directions).__name__}"
        )
    for layer, direction in directions.items():
        if not isinstance(direction, Direction) or layer != direction.layer:
            raise InputError(f"the key {layer!r} must be the layer of its Direction; {direction!r}")
    return dict(sorted(directions.items()))


def save_directions(directions: Direction | Mapping[int, Direction], path: str | Path) -> None:
    """Write directions by layer into one safetensors file with a JSON header, atomically.

    Raises:
        InputError: there is none, or a key is not its direction's layer.
        RecordFileError: the file cannot be written.
    """
    found = by_layer(directions)
    about = {str(n): {name: getattr(d, name) for name in ABOUT} for n, d in found.items()}
    arrays = {str(layer): direction.vector for layer, direction in found.items()}
    write_arrays(Path(path), "safetensors", KIND, VERSION, about, arrays)


def load_directions(path: str | Path) -> dict[int, Direction]:
    """Read what `save_directions` (or `Direction.save`) wrote.

    Returns:
        By layer; the vectors are on the CPU, in the dtype that they had.

    Raises:
        RecordFileError: the file is not what those write.
    """
    with open_arrays(Path(path), KIND, VERSION) as stored:
        found = [
            Direction(stored.read(name), **{key: about[key] for key in ABOUT})
            for name, about in stored.content.items()
        ]
        return by_layer({direction.layer: direction for direction in found})
