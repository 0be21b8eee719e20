"""Products of two thin matrices, such as the circuits of a head, never written out.

A head's QK circuit ``W_Q W_Kᵀ`` and OV circuit ``W_V W_O`` are ``[d_model, d_model]`` matrices of
rank d_head; through embedding and unembedding they are ``[vocab, vocab]``. A `FactoredMatrix` keeps
the two factors ``left [m, r]`` and ``right [r, n]``, and answers by numbers of size r:

- the norm from the r × r Gram matrices of the factors,
- the non-zero eigenvalues of ``left @ right`` as those of ``right @ left``,
- the singular value decomposition by QR of each factor and an r × r decomposition,
- the largest entries by walking over chunks of rows.

Everything but `FactoredMatrix.top_entries` also works on stacks ``[…, m, r]`` and ``[…, r, n]``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from module_devices import exact
from sites import InputError

CHUNK_ENTRIES = 2**24
"""Entries of the product that exist at once while the largest are searched."""


class SingularVectors(NamedTuple):
    """``left @ diag(values) @ right``: the thin singular value decomposition.

    There are r values, or as many as the matrix has rows or columns where these are fewer.
    """

    left: Tensor
    """``[…, m, r]``, orthonormal columns."""
    values: Tensor
    """``[…, r]``, the largest first."""
    right: Tensor
    """``[…, r, n]``, orthonormal rows."""


class TopEntries(NamedTuple):
    """The largest entries of a matrix."""

    values: Tensor
    """``[k]``, the largest first."""
    rows: Tensor
    """``[k]``, the row of each."""
    columns: Tensor
    """``[k]``, the column of each."""


@dataclass(frozen=True, eq=False)
class FactoredMatrix:
    """The matrix ``left @ right``, kept as its two factors.

    Raises:
        InputError: the factors do not fit together.
    """

    left: Tensor
    """``[…, m, r]``, floating point, float32 or wider (half precision is widened)."""
    right: Tensor
    """``[…, r, n]``."""

    def __post_init__(self) -> None:
        """Bring both factors to one dtype, and refuse what is no product."""
        for name in ("left", "right"):
            factor = getattr(self, name)
            if not isinstance(factor, Tensor) or factor.dim() < 2:
                came = list(factor.shape) if isinstance(factor, Tensor) else type(factor).__name__
                raise InputError(f"{name} is a matrix [..., rows, columns]; came {came}")
        if self.left.shape[-1] != self.right.shape[-2]:
            raise InputError(
                f"left [..., m, r] and right [..., r, n] share r; "
                f"came {list(self.left.shape)} and {list(self.right.shape)}"
            )
        wide = torch.promote_types(self.left.dtype, self.right.dtype)
        wide = torch.promote_types(wide, torch.float32)
        object.__setattr__(self, "left", self.left.detach().to(wide))
        object.__setattr__(self, "right", self.right.detach().to(self.left.device, wide))

    def __repr__(self) -> str:
        return f"FactoredMatrix({list(self.shape)}, rank {self.rank} or less)"

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the product: ``[…, m, n]``."""
        stack = torch.broadcast_shapes(self.left.shape[:-2], self.right.shape[:-2])
        return (*stack, self.left.shape[-2], self.right.shape[-1])

    @property
    def rank(self) -> int:
        """The inner size r, which the product's rank cannot exceed."""
        return self.left.shape[-1]

    @property
    def mT(self) -> FactoredMatrix:
        """The transpose ``[…, n, m]``."""
        return FactoredMatrix(self.right.mT, self.left.mT)

    def __getitem__(self, index: Any) -> FactoredMatrix:
        """Some matrices of a stack.

        Raises:
            InputError: this is a single matrix.
        """
        stack = self.shape[:-2]
        if not stack:
            raise InputError("this is one matrix, not a stack; use .left[rows], or .full()")
        left, right = (
            each.expand(*stack, *each.shape[-2:])[index] for each in (self.left, self.right)
        )
        return FactoredMatrix(left, right)

    # --- Products --------------------------------------------------------------------------------

    def __matmul__(self, other: Tensor | FactoredMatrix) -> FactoredMatrix:
        """The product with a matrix ``[…, n, k]`` on the right; the inner size stays small."""
        if not isinstance(other, FactoredMatrix):
            return FactoredMatrix(self.left, self.right @ other.to(self.right))
        inner = self.right @ other.left.to(self.right)
        if inner.shape[-1] < inner.shape[-2]:
            return FactoredMatrix(self.left @ inner, other.right)
        return FactoredMatrix(self.left, inner @ other.right.to(inner))

    def __rmatmul__(self, other: Tensor) -> FactoredMatrix:
        """The product with a matrix ``[…, k, m]`` on the left."""
        return FactoredMatrix(other.to(self.left) @ self.left, self.right)

    def apply(self, vectors: Tensor) -> Tensor:
        """Row vectors through the matrix: ``[…, m]`` to ``[…, n]``."""
        return (vectors.to(self.left) @ self.left) @ self.right

    def full(self) -> Tensor:
        """The whole matrix ``[…, m, n]``: m·n numbers, however many that are."""
        return self.left @ self.right

    # --- Numbers ---------------------------------------------------------------------------------

    def norm(self) -> Tensor:
        """Frobenius norm, ``[…]``: the root of the sum of all squared entries."""
        inner = _triangle(self.left) @ _triangle(self.right.mT).mT
        return inner.flatten(-2).norm(dim=-1).to(self.left.dtype)

    def trace(self) -> Tensor:
        """Sum of the diagonal, ``[…]``.

        Raises:
            InputError: the matrix is not square.
        """
        self._require_square("a trace")
        return (self.left * self.right.mT).sum((-2, -1))

    def eigenvalues(self) -> Tensor:
        """The r eigenvalues that need not be 0, ``[…, r]``, complex, the largest modulus first.

        Those of ``left @ right`` are those of the r × r matrix ``right @ left``, and zeros.

        Raises:
            InputError: the matrix is not square.
        """
        self._require_square("eigenvalues")
        inner = exact(self.right) @ exact(self.left)
        found = torch.linalg.eigvals(inner)
        order = found.abs().argsort(dim=-1, descending=True)
        return found.gather(-1, order)

    def svd(self) -> SingularVectors:
        """Singular values and vectors; the cost is (m + n)·r², not m·n·min(m, n).

        A pair of vectors may be multiplied by −1 together; here the entry of the left one that is
        largest in size is positive, so that every computer gives the same signs.
        """
        q_left, r_left = torch.linalg.qr(self.left)
        q_right, r_right = torch.linalg.qr(self.right.mT)
        u, values, vh = torch.linalg.svd(r_left @ r_right.mT, full_matrices=False)
        left, right = q_left @ u, vh @ q_right.mT
        largest = left.gather(-2, left.abs().argmax(-2, keepdim=True))
        sign = torch.where(largest < 0, -1, 1).to(left)
        return SingularVectors(left * sign, values, right * sign.mT)

    def top_entries(self, k: int = 10, *, largest: bool = True) -> TopEntries:
        """The ``k`` largest (or smallest) entries, without more than a chunk of the matrix.

        Args:
            k: How many.
            largest: With False the smallest, most negative entries.

        Raises:
            InputError: this is a stack, or has fewer than ``k`` entries.
        """
        if len(self.shape) != 2:
            raise InputError(f"the largest entries are those of one matrix; came {self.shape}")
        rows, columns = self.shape
        if not 1 <= k <= rows * columns:
            raise InputError(f"k is 1 to {rows * columns} entries; came {k}")
        step = max(1, CHUNK_ENTRIES // columns)
        sign = 1 if largest else -1
        values = self.left.new_empty(0)
        places = torch.empty(0, dtype=torch.long, device=self.left.device)
        for start in range(0, rows, step):
            chunk = (sign * (self.left[start : start + step] @ self.right)).flatten()
            found = chunk.topk(min(k, len(chunk)))
            values = torch.cat([values, found.values])
            places = torch.cat([places, found.indices + start * columns])
            kept = values.topk(min(k, len(values))).indices
            values, places = values[kept], places[kept]
        return TopEntries(sign * values, places // columns, places % columns)

    def _require_square(self, what: str) -> None:
        if self.shape[-2] != self.shape[-1]:
            raise InputError(f"{what} needs a square matrix; this one is {list(self.shape)}")


def _triangle(tall: Tensor) -> Tensor:
    """``R`` with ``Rᵀ R = tallᵀ tall``, in double: what is left of a factor when lengths count."""
    return torch.linalg.qr(exact(tall), mode="r").R
