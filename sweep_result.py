"""What a patching sweep found: one number per cell, its axes and labels, and how sure it is.

`SweepResult` can be drawn, tabulated, searched and kept. Over several pairs of prompts `summarize`
makes the mean, its standard error and a paired bootstrap interval of every cell.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

import numpy as np
import torch

from array_files import built, open_arrays, write_arrays
from forward_pass import InputError

if TYPE_CHECKING:
    import pandas as pd

KIND = "patching sweep"
VERSION = 1
"""Of the file's schema."""

AXES = ("layer", "position", "head", "neuron")
"""Names that an axis of a sweep can have."""

RESAMPLES = 1000
"""Bootstrap samples of the pairs."""


@dataclass(frozen=True, eq=False)
class SweepResult:
    """The metric of every patched run, and of the two runs that it lies between."""

    FILE_KIND: ClassVar[str] = KIND
    TABLES: ClassVar[tuple[str, ...]] = ("values", "stderr", "low", "high")
    """Fields that lie in a file as arrays."""
    PLAIN: ClassVar[tuple[str, ...]] = (
        "site", "direction", "metric", "unit", "normalized", "answer", "foil", "count", "passes",
    )  # fmt: skip
    """Fields that go into a file's header as they are."""

    values: np.ndarray
    """One number per cell, axes as in ``axes``, float64; the mean where there are several pairs.

    Where ``normalized``, 0 is the corrupted run and 1 the clean one; else in the metric's ``unit``.
    """
    axes: tuple[str, ...]
    """Names of the axes, out of `AXES`."""
    labels: tuple[tuple[int, ...], ...]
    """For each axis: the block, the absolute position, the head or the neuron of each entry."""
    tokens: tuple[str, ...]
    """The base prompt's tokens, one per position of it; empty for several pairs of prompts."""
    source_tokens: tuple[str, ...]
    """The same of the prompt from which activations were taken."""
    site: str
    """What was exchanged: a name out of `forward_pass.SITES`."""
    direction: str
    """``denoising`` (clean into corrupted) or ``noising`` (corrupted into clean)."""
    metric: str
    unit: str
    """Of the metric, before it is normalized: ``logits``, ``nats`` or none."""
    normalized: bool
    clean: float
    """The metric of the clean run (the mean of these)."""
    corrupted: float
    answer: str = ""
    """The token that the metric measures, if it is one."""
    foil: str = ""
    count: int = 1
    """Number of pairs of prompts."""
    stderr: np.ndarray | None = None
    """Standard error of the mean over pairs, like ``values``; None for a single pair."""
    low: np.ndarray | None = None
    """Lower end of the 95 % paired bootstrap interval."""
    high: np.ndarray | None = None
    """Upper end of it."""
    passes: int = 0
    """Forward passes (whole or partial) that were needed."""

    def __post_init__(self) -> None:
        """Check that tables and labels fit together."""
        shape = tuple(len(labels) for labels in self.labels)
        if len(self.axes) != len(self.labels) or not set(self.axes) <= set(AXES):
            raise InputError(f"axes must be some of {AXES}, each with labels; came {self.axes}")
        for name in self.TABLES:
            table = getattr(self, name)
            if table is not None and table.shape != shape:
                raise InputError(f"{name} must have the shape of the labels, {shape}")

    def __repr__(self) -> str:
        size = " × ".join(f"{len(labels)} {axis}" for axis, labels in self._axes())
        pairs = f", {self.count} pairs" if self.count > 1 else ""
        what = f"{self.metric}{' normalized' if self.normalized else ''}"
        return f"{type(self).__name__}({self.site}, {size}, {what}, {self.direction}{pairs})"

    def _axes(self) -> list[tuple[str, tuple[int, ...]]]:
        return list(zip(self.axes, self.labels, strict=True))

    @property
    def value_label(self) -> str:
        """What the numbers mean, in a few words."""
        if self.normalized:
            return f"{self.metric}: 0 corrupted, 1 clean"
        return f"{self.metric} ({self.unit})" if self.unit else self.metric

    @property
    def start(self) -> float:
        """The number of the unpatched run, on the scale of ``values``."""
        denoising = self.direction == "denoising"
        if self.normalized:
            return 0.0 if denoising else 1.0
        return self.corrupted if denoising else self.clean

    def layer_effects(self) -> dict[int, float]:
        """The numbers of a sweep over layers alone, by layer.

        Raises:
            InputError: the sweep has other axes too.
        """
        if self.axes != ("layer",):
            raise InputError(f"this sweep has the axes {self.axes}, not the layer alone")
        return dict(zip(self.labels[0], self.values.tolist(), strict=True))

    def top(self, k: int = 10) -> pd.DataFrame:
        """The ``k`` cells whose number is furthest from that of the unpatched run.

        Returns:
            Rows of `to_frame`, the largest change first.

        Raises:
            InputError: ``k`` is below 1.
        """
        if k < 1:
            raise InputError(f"the number of cells must be at least 1; came {k}")
        frame = self.to_frame()
        order = (
            (frame["value"] - self.start).abs().sort_values(ascending=False, kind="stable").index
        )
        return frame.loc[order[:k]].reset_index(drop=True)

    def to_frame(self) -> pd.DataFrame:
        """One row per cell.

        Returns:
            A column per axis, ``token`` where there are positions, ``value``, and over several
            pairs ``stderr``, ``low`` and ``high``.
        """
        import pandas as pd

        index = [axis.ravel() for axis in np.indices(self.values.shape)]
        columns: dict[str, Any] = {
            axis: np.array(labels)[place]
            for (axis, labels), place in zip(self._axes(), index, strict=True)
        }
        if "position" in columns and self.tokens:
            columns["token"] = [self.tokens[p] for p in columns["position"]]
        columns["value"] = self.values.ravel()
        for name in ("stderr", "low", "high"):
            if getattr(self, name) is not None:
                columns[name] = getattr(self, name).ravel()
        return pd.DataFrame(columns)

    def plot(self, **options: Any) -> Any:
        """A heat map with the prompt's tokens, or a layer × head grid. See `sweep_figures`."""
        from sweep_figures import plot_sweep

        return plot_sweep(self, **options)

    def save(self, path: str | Path) -> None:
        """Write everything into one safetensors file with a JSON header, atomically.

        Raises:
            RecordFileError: the file cannot be written.
        """
        header = {name: getattr(self, name) for name in self.PLAIN}
        header |= {name: list(getattr(self, name)) for name in ("axes", "tokens", "source_tokens")}
        header["labels"] = [list(labels) for labels in self.labels]
        tables = {
            name: getattr(self, name) for name in self.TABLES if getattr(self, name) is not None
        }
        tables["runs"] = np.array([self.clean, self.corrupted])  # a number that JSON may not have
        arrays = {name: torch.from_numpy(np.array(table)) for name, table in tables.items()}
        write_arrays(Path(path), "safetensors", self.FILE_KIND, VERSION, header, arrays)

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read what `save` wrote.

        Raises:
            RecordFileError: the file is not what `save` writes.
        """
        with open_arrays(Path(path), cls.FILE_KIND, VERSION) as stored:
            header = dict(stored.content)
            names = ("axes", "tokens", "source_tokens")
            header |= {name: tuple(header[name]) for name in names}
            header["labels"] = tuple(tuple(labels) for labels in header["labels"])
            tables: Any = {n: stored.read(n).numpy() for n in cls.TABLES if n in stored.specs}
            clean, corrupted = stored.read("runs").tolist()
            runs = {"clean": clean, "corrupted": corrupted}
            return built(cls, {**header, **runs, **tables})


# --- Several pairs of prompts ---------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Summary:
    """Mean of every cell over pairs of prompts, and how sure it is."""

    mean: np.ndarray
    """``[cell]``."""
    stderr: np.ndarray | None
    low: np.ndarray | None
    high: np.ndarray | None


def summarize(
    values: np.ndarray,
    clean: Sequence[float] | np.ndarray,
    corrupted: Sequence[float] | np.ndarray,
    normalize: bool,
    seed: int = 0,
) -> Summary:
    """Mean, standard error and paired bootstrap interval of every cell.

    A normalized mean is the ratio of means (mean(v) − mean(corrupted)) / (mean(clean) −
    mean(corrupted)), which a single pair with a small difference cannot blow up; its standard error
    is that of a ratio estimator (Cochran 1977, section 2.11). The interval is the 2.5 and 97.5
    percentiles of `RESAMPLES` samples of the pairs, the same pairs for every cell (so cells may be
    compared), clean and corrupted runs going with their pair; it is infinite, or NaN, where samples
    are common in which the two do not differ.

    Args:
        values: The metric, ``[pair, cell]``.
        clean: Of the clean runs, ``[pair]``.
        corrupted: Of the corrupted runs, ``[pair]``.
        normalize: Whether 0 shall be the corrupted and 1 the clean run.
        seed: Of the resampling.

    Raises:
        InputError: clean and corrupted runs do not differ, so that nothing can be normalized.
    """
    high, low = np.asarray(clean, dtype=float), np.asarray(corrupted, dtype=float)
    if normalize and not high.mean() - low.mean():
        raise InputError(
            f"clean and corrupted runs have the same metric ({high.mean():g}): nothing can be "
            "normalized; pass normalize=False, or choose another metric, answer or foil"
        )

    def mean(weights: np.ndarray) -> np.ndarray:
        """Of each sample, ``[sample, pair]`` → ``[sample, cell]``."""
        found = weights @ values
        if not normalize:
            return found
        start, end = weights @ low, weights @ high
        with np.errstate(divide="ignore", invalid="ignore"):
            return (found - start[:, None]) / (end - start)[:, None]

    count = len(values)
    whole = mean(np.full((1, count), 1 / count))[0]
    if count == 1:
        return Summary(whole, None, None, None)
    if normalize:
        rest = (values - low[:, None]) - whole * (high - low)[:, None]
        stderr = rest.std(axis=0, ddof=1) / np.sqrt(count) / abs((high - low).mean())
    else:
        stderr = values.std(axis=0, ddof=1) / np.sqrt(count)
    rng = np.random.default_rng(seed)
    draws = rng.multinomial(count, np.full(count, 1 / count), size=RESAMPLES) / count
    # no interpolation: between a number and an infinity there is none
    ends = np.percentile(mean(draws), [2.5, 97.5], axis=0, method="nearest")
    return Summary(whole, stderr, ends[0], ends[1])
