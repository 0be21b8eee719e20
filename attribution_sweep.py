"""What attribution patching found: a patching sweep's table, estimated, and how far to trust it.

An `AttributionSweep` is a `sweep_result.SweepResult` whose numbers are estimates. Beside them it
can hold the exact numbers of a `patching_sweep`, and the sizes that are left of each effect when
the gradient through one block at a time is dropped.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from forward_pass import InputError
from sweep_result import SweepResult

if TYPE_CHECKING:
    import pandas as pd

ORDERS = ("value", "exact", "dropped")
"""What `AttributionSweep.top` can go by."""


@dataclass(frozen=True, eq=False, repr=False)
class AttributionSweep(SweepResult):
    """To first order, the metric of every patched run. See `attribution_patching`."""

    FILE_KIND: ClassVar[str] = "attribution patching"
    TABLES: ClassVar[tuple[str, ...]] = (*SweepResult.TABLES, "exact", "dropped")
    PLAIN: ClassVar[tuple[str, ...]] = (
        *SweepResult.PLAIN, "attention_correction", "backward_passes",
    )  # fmt: skip

    exact: np.ndarray | None = None
    """The metric of every patched run, as run; like ``values``. None where it was not asked for."""
    dropped: np.ndarray | None = None
    """Mean size of the estimated *change* over backward passes that each drop a block (GradDrop).

    Like ``values``, but never negative: 0 is no change. Where it is large beside ``effects``, paths
    cancel and the plain estimate may be far too small. None where it was not asked for.
    """
    attention_correction: bool = False
    """Whether queries and keys went through the softmax again."""
    backward_passes: int = 0

    @property
    def effects(self) -> np.ndarray:
        """The estimated change: ``values`` less the number of the unpatched run."""
        return self.values - self.start

    @property
    def exact_effects(self) -> np.ndarray:
        """The change as run.

        Raises:
            InputError: exact numbers were not asked for.
        """
        if self.exact is None:
            raise InputError(
                "there are no exact numbers: pass exact=True, or a sweep of the same cells to "
                "compare(patching_sweep(...))"
            )
        return self.exact - self.start

    @property
    def pearson(self) -> float:
        """Pearson correlation of estimated and exact changes, over all cells; NaN for a constant.

        Raises:
            InputError: exact numbers were not asked for.
        """
        return _correlation(self.effects, self.exact_effects)

    @property
    def spearman(self) -> float:
        """Rank correlation of estimated and exact changes, over all cells; NaN for a constant.

        Raises:
            InputError: exact numbers were not asked for.
        """
        return _correlation(_ranks(self.effects), _ranks(self.exact_effects))

    def correlations(self) -> dict[str, float]:
        """How the estimates agree with the exact numbers, over all cells.

        Returns:
            ``pearson`` and ``spearman`` of the changes, ``size_spearman`` of their sizes, and with
            GradDrop ``dropped_spearman``, of its sizes with the exact ones.

        Raises:
            InputError: exact numbers were not asked for.
        """
        exact = np.abs(self.exact_effects)
        found = {
            "pearson": self.pearson,
            "spearman": self.spearman,
            "size_spearman": _correlation(_ranks(np.abs(self.effects)), _ranks(exact)),
        }
        if self.dropped is not None:
            found["dropped_spearman"] = _correlation(_ranks(self.dropped), _ranks(exact))
        return found

    def compare(self, exact: SweepResult) -> AttributionSweep:
        """The same result with the exact numbers of a patching sweep beside it.

        Args:
            exact: Made with the same prompts, site, axes, direction and metric.

        Raises:
            InputError: it is a sweep over something else.
        """
        names = ("site", "axes", "labels", "direction", "metric", "normalized", "answer", "foil")
        for name in (*names, "count", "tokens", "source_tokens"):
            mine, theirs = getattr(self, name), getattr(exact, name)
            if mine != theirs:
                raise InputError(
                    f"the two sweeps differ in {name}: estimated {_short(mine)}, "
                    f"exact {_short(theirs)}"
                )
        for name in ("clean", "corrupted"):
            mine, theirs = getattr(self, name), getattr(exact, name)
            both = np.isnan(mine) and np.isnan(theirs)
            if not both and not abs(mine - theirs) <= 1e-2 * (abs(mine) + abs(theirs)) + 1e-3:
                raise InputError(
                    f"the two sweeps are of other runs: the metric of the {name} run is "
                    f"{mine:.4g} here, {theirs:.4g} there"
                )
        return replace(self, exact=exact.values)

    def top(self, k: int = 10, by: str = "value") -> pd.DataFrame:
        """The ``k`` cells with the largest change.

        Args:
            k: How many.
            by: The estimate (``"value"``), the change as run (``"exact"``) or ``"dropped"``.

        Returns:
            Rows of `to_frame`, the largest first.

        Raises:
            InputError: ``k`` is below 1, or there is no such table.
        """
        if by == "value":
            return super().top(k)
        if k < 1:
            raise InputError(f"the number of cells must be at least 1; came {k}")
        if by not in ORDERS or getattr(self, by) is None:
            there = [name for name in ORDERS if name == "value" or getattr(self, name) is not None]
            raise InputError(f"cells can be ordered by {there}; came {by!r}")
        sizes = self.dropped if by == "dropped" else np.abs(self.exact_effects)
        assert sizes is not None
        order = np.argsort(-sizes.ravel(), kind="stable")[:k]
        return self.to_frame().loc[order].reset_index(drop=True)

    def to_frame(self) -> pd.DataFrame:
        """One row per cell.

        Returns:
            The columns of `SweepResult.to_frame` (``value`` is the estimate), ``effect`` (the
            estimated change), and where there are such ``exact`` and ``dropped``.
        """
        frame = super().to_frame()
        frame["effect"] = self.effects.ravel()
        for name in ("exact", "dropped"):
            if getattr(self, name) is not None:
                frame[name] = getattr(self, name).ravel()
        return frame

    def plot(self, **options: Any) -> Any:
        """Estimated and exact changes side by side, and one against the other.

        See `attribution_sweep_figures.plot_attribution_sweep`.
        """
        from attribution_sweep_figures import plot_attribution_sweep

        return plot_attribution_sweep(self, **options)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _correlation(first: np.ndarray, second: np.ndarray) -> float:
    """Pearson correlation of two tables; NaN where one is constant, has NaN, or has one cell."""
    if np.ptp(first) == 0 or np.ptp(second) == 0:
        return float("nan")  # their mean may be off by rounding
    a, b = (table.ravel() - table.mean() for table in (first, second))
    size = float(np.sqrt((a @ a) * (b @ b)))
    return float(a @ b) / size if size else float("nan")


def _ranks(table: np.ndarray) -> np.ndarray:
    """Rank of each number, equal ones sharing the mean of theirs; all NaN where there is a NaN."""
    if np.isnan(table).any():
        return np.full(table.shape, np.nan)
    _, place, count = np.unique(table, return_inverse=True, return_counts=True)
    ends = np.cumsum(count)
    return (ends - (count - 1) / 2)[place.reshape(table.shape)]
