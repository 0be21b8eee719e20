"""Numbers about recorded activations: statistics of one layer, comparison of two prompts.

- ``get_activation_statistics(record, layer)``: mean, std, norm, … of one layer.
- ``compare_activations(record1, record2, layer, metric)``: one number for two prompts.
- ``METRICS``: the metrics by name, as functions of two ``[position, feature]`` tensors.

Everything is computed in float64, whatever the tensors' dtype: a mean of many bfloat16 values that
is taken in bfloat16 is wrong in the second digit.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from activation_record import ActivationRecord, position_rows, runs
from model_architecture import Layer

NEAR_ZERO = 1e-6
"""Below this magnitude a value counts as zero in ``sparsity``."""


def get_activation_statistics(
    record: ActivationRecord, layer: Layer, site: str = "resid_post"
) -> dict[str, float]:
    """Summary of one layer's activations, over all recorded positions.

    Values that are NaN or infinite are counted and left out of everything else (of a norm, as if
    they were 0); where nothing is left, the numbers are NaN.

    Args:
        record: Where the activations are.
        layer: The block, in any spelling.
        site: Which site of that block.

    Returns:
        ``mean``, ``std`` (population), ``min``, ``max`` and ``median`` (the mean of the middle two
        of an even number) of the single values; ``norm``, the L2 norm of a position's vector,
        averaged over positions; ``norm_total``, the L2 norm of all values together; ``sparsity``,
        the share of values closer to 0 than `NEAR_ZERO`; ``nan_count`` and ``inf_count``.

    Raises:
        LayerError, SiteError: it was not recorded.
        ValueError: the record holds shapes only.
    """
    rows = position_rows(record.at(site, layer), site)
    finite = rows.isfinite()
    values = rows[finite].numpy()
    norms = torch.linalg.vector_norm(rows.where(finite, rows.new_zeros(())), dim=1)
    counts = {"nan_count": int(rows.isnan().sum()), "inf_count": int(rows.isinf().sum())}
    names = ("mean", "std", "min", "max", "median", "norm", "norm_total", "sparsity")
    if values.size == 0:
        return dict.fromkeys(names, float("nan")) | counts
    numbers = (
        values.mean(),
        values.std(),
        values.min(),
        values.max(),
        np.median(values),
        norms.mean(),
        torch.linalg.vector_norm(norms),
        (np.abs(values) < NEAR_ZERO).mean(),
    )
    return {name: float(value) for name, value in zip(names, numbers, strict=True)} | counts


# --- Metrics: [position, feature] twice -> [position] ---------------------------------------------


def _norms(x: Tensor) -> Tensor:
    norms: Tensor = torch.linalg.vector_norm(x, dim=-1)
    return norms


def _cosine(x: Tensor, y: Tensor) -> Tensor:
    lengths = _norms(x) * _norms(y)
    cosine = ((x * y).sum(-1) / lengths).clamp(-1, 1)
    return cosine.where(lengths != 0, torch.zeros_like(cosine))


def _centred(x: Tensor) -> Tensor:
    """Less the mean; exactly 0 where all features are equal, which rounding would not give."""
    constant = x.amax(-1, keepdim=True) == x.amin(-1, keepdim=True)
    return (x - x.mean(-1, keepdim=True)).where(~constant, torch.zeros_like(x))


def _relative_l2(x: Tensor, y: Tensor) -> Tensor:
    distance = _norms(x - y)
    return (distance / _norms(x)).where(distance != 0, torch.zeros_like(distance))


METRICS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "cosine": _cosine,
    "correlation": lambda x, y: _cosine(_centred(x), _centred(y)),
    "dot": lambda x, y: (x * y).sum(-1),
    "l2": lambda x, y: _norms(x - y),
    "l1": lambda x, y: (x - y).abs().sum(-1),
    "linf": lambda x, y: (x - y).abs().amax(-1),
    "mse": lambda x, y: (x - y).square().mean(-1),
    "relative_l2": _relative_l2,
}
"""``[position, feature]`` twice ``-> [position]``; `compare_activations` says what each one is."""

_ALIASES = {"euclidean": "l2", "manhattan": "l1", "pearson": "correlation"}


# --- Comparison -----------------------------------------------------------------------------------


def compare_activations(
    rec1: ActivationRecord,
    rec2: ActivationRecord,
    layer: Layer,
    metric: str = "cosine",
    position: int | tuple[int, int] | None = None,
    pool: Literal["mean", "max", "last"] | None = None,
    site: str = "resid_post",
) -> float:
    """One number for how alike, or how far apart, two prompts are at one layer.

    Which tokens are compared: records that hold the *same positions* (prompts of equal length) are
    compared position by position, and the value returned is the mean over positions; not the metric
    of the flattened tensors, which a few large positions would dominate. Records that do not
    (prompts of different length) are compared at the *last* recorded token of each. ``position`` or
    ``pool`` says otherwise.

    Args:
        rec1: The first record; the reference of ``"relative_l2"``.
        rec2: The second record; may come from another model of the same width.
        layer: The block, in any spelling.
        metric: ``"cosine"`` (similarity, -1 to 1; 0 if either vector is zero), ``"correlation"``
            (Pearson over features; 0 if either vector is constant), ``"dot"``, ``"l2"``, ``"l1"``,
            ``"linf"`` (distances), ``"mse"`` (mean squared difference), ``"relative_l2"``
            (``‖x1 - x2‖ / ‖x1‖``; 0 if both are zero).
        position: Absolute token position to compare, negative from the end of each prompt's
            tokens; a pair gives each record its own.
        pool: Reduce each record to one vector first: ``"mean"`` or ``"max"`` over its positions
            (feature by feature), or its ``"last"`` one.
        site: Which site; axes after the position (heads) are taken together as one vector.

    Returns:
        The value, computed in float64. NaN and infinity propagate.

    Raises:
        LayerError, SiteError: the layer or site was not recorded.
        ValueError: unknown metric or pool, unequal width, or a position that was not recorded.
    """
    function = METRICS.get(_ALIASES.get(metric, metric))
    if function is None:
        raise ValueError(
            f"no metric {metric!r}; expected one of {', '.join([*METRICS, *_ALIASES])}"
        )
    x, y = (position_rows(rec.at(site, layer), site) for rec in (rec1, rec2))
    if x.shape[1] != y.shape[1]:
        raise ValueError(
            f"cannot compare {site!r} of layer {layer!r}: the first record has {x.shape[1]} "
            f"features per position, the second {y.shape[1]}; both must have the same number"
        )
    if not x.numel() or not y.numel():
        raise ValueError(f"nothing to compare: {list(x.shape)} and {list(y.shape)} values")
    if position is not None and pool is not None:
        raise ValueError(f"give position={position!r} or pool={pool!r}, not both")
    if pool is not None:
        x, y = _pooled(x, pool), _pooled(y, pool)
    else:
        rows1, rows2 = _corresponding(rec1, rec2, position)
        x, y = x[rows1], y[rows2]
    return float(function(x, y).mean())


def _pooled(rows: Tensor, pool: str) -> Tensor:
    """``[position, feature] -> [1, feature]``.

    Raises:
        ValueError: there is no such pooling.
    """
    if pool == "mean":
        return rows.mean(0, keepdim=True)
    if pool == "max":
        return rows.amax(0, keepdim=True)
    if pool == "last":
        return rows[-1:]
    raise ValueError(f"no pool {pool!r}; expected 'mean', 'max' or 'last'")


def _corresponding(
    rec1: ActivationRecord, rec2: ActivationRecord, position: int | tuple[int, int] | None
) -> tuple[slice, slice]:
    """The rows to compare: those of one position, or all, or the last ones.

    Raises:
        ValueError: what was recorded does not correspond.
    """
    if position is not None:
        first, second = position if isinstance(position, tuple) else (position, position)
        return _row_of(rec1, first), _row_of(rec2, second)
    if rec1.positions == rec2.positions:
        return slice(None), slice(None)
    if len(rec1.tokens) - rec1.positions[-1] != len(rec2.tokens) - rec2.positions[-1]:
        held = [f"{runs(rec.positions)} of {len(rec.tokens)} tokens" for rec in (rec1, rec2)]
        raise ValueError(
            "the last recorded tokens do not correspond: the first record holds positions "
            f"{held[0]}, the second {held[1]}; give position= or pool="
        )
    return slice(-1, None), slice(-1, None)


def _row_of(record: ActivationRecord, position: int) -> slice:
    """Where an absolute position (negative: from the prompt's end) lies on the position axis.

    Raises:
        ValueError: it was not recorded.
    """
    absolute = position + len(record.tokens) if position < 0 else position
    if absolute not in record.positions:
        raise ValueError(
            f"position {position} is not held by {record!r}: it holds {runs(record.positions)} "
            f"of {len(record.tokens)} tokens"
        )
    row = record.positions.index(absolute)
    return slice(row, row + 1)
