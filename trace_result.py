"""What causal tracing found: where in a model restoring one activation restores the answer."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from array_files import built, open_arrays, write_arrays
from forward_pass import InputError

if TYPE_CHECKING:
    import pandas as pd

KIND = "causal trace"
VERSION = 1
"""Of the file's schema."""

TABLES = ("values", "stderr")
TUPLES = ("sites", "windows", "layers", "positions", "tokens", "subject")


@dataclass(frozen=True, eq=False, kw_only=True)
class CausalTrace:
    """The indirect effect of every site, layer and position on a prompt with a noised subject."""

    values: np.ndarray
    """``[site, layer, position]``, float64: the metric with the site restored minus the metric of
    the noised run, in the metric's ``unit``, averaged over samples of noise; NaN where a block has
    no such site."""
    stderr: np.ndarray | None
    """Like ``values``: standard error of that mean; None for a single sample."""
    sites: tuple[str, ...]
    """What was restored, one per panel: names out of `forward_pass.SITES`."""
    windows: tuple[int, ...]
    """For each site, how many layers around the one named are restored together."""
    layers: tuple[int, ...]
    """The block in the middle of each window: ``layer - window // 2`` is the first restored."""
    positions: tuple[int, ...]
    """Absolute position of each column."""
    tokens: tuple[str, ...]
    """Of the whole prompt, one per position."""
    subject: tuple[int, ...]
    """Positions whose embedding is noised."""
    metric: str
    unit: str
    clean: float
    """The metric of the clean run."""
    corrupted: float
    """The metric of the noised run, averaged over samples."""
    noise_std: float
    """Standard deviation of the noise, in units of the token embedding."""
    samples: int
    """Samples of noise."""
    answer: str = ""
    foil: str = ""
    passes: int = 0
    """Forward passes (whole or partial) that were needed."""

    def __post_init__(self) -> None:
        """Check that tables and labels fit together."""
        shape = (len(self.sites), len(self.layers), len(self.positions))
        for name in TABLES:
            table = getattr(self, name)
            if table is not None and table.shape != shape:
                raise InputError(f"{name} must be [site, layer, position] = {shape}")

    def __repr__(self) -> str:
        sites = ", ".join(self.sites)
        size = f"{len(self.layers)} layers × {len(self.positions)} positions"
        return f"CausalTrace({sites}: {size}, {self.metric}, {self.samples} samples)"

    @property
    def total_effect(self) -> float:
        """The metric of the clean run minus that of the noised one: what can be restored."""
        return self.clean - self.corrupted

    def panel(self, site: str) -> np.ndarray:
        """The table of one site, ``[layer, position]``.

        Raises:
            InputError: the site was not traced.
        """
        if site not in self.sites:
            raise InputError(f"site {site!r} was not traced; there are {', '.join(self.sites)}")
        return self.values[self.sites.index(site)]

    def top(self, k: int = 10, site: str | None = None) -> pd.DataFrame:
        """The ``k`` places with the largest effect, whichever its sign; of one site, or of all.

        Returns:
            Rows of `to_frame`.

        Raises:
            InputError: the site was not traced.
        """
        frame = self.to_frame().dropna(subset="value")
        if site is not None:
            self.panel(site)
            frame = frame[frame["site"] == site]
        order = frame["value"].abs().sort_values(ascending=False, kind="stable").index[:k]
        return frame.loc[order].reset_index(drop=True)

    def to_frame(self) -> pd.DataFrame:
        """One row per cell.

        Returns:
            Columns ``site, window, layer, position, token, in_subject, value``, and ``stderr``
            where there are several samples.
        """
        import pandas as pd

        site, layer, column = (axis.ravel() for axis in np.indices(self.values.shape))
        position = np.array(self.positions)[column]
        columns: dict[str, Any] = {
            "site": np.array(self.sites, dtype=object)[site],
            "window": np.array(self.windows)[site],
            "layer": np.array(self.layers)[layer],
            "position": position,
            "token": [self.tokens[p] for p in position],
            "in_subject": np.isin(position, self.subject),
            "value": self.values.ravel(),
        }
        if self.stderr is not None:
            columns["stderr"] = self.stderr.ravel()
        return pd.DataFrame(columns)

    def plot(self, **options: Any) -> Any:
        """Layers × positions, a panel per site; the noised tokens have a star.

        Args:
            **options: See `figures.plot_metric_panels`.

        Returns:
            The figure.
        """
        from figure_canvas import new_figure
        from figures import plot_metric_panels

        names = [
            f"{site}, " + (f"window of {window} layers" if window > 1 else "single layer")
            for site, window in zip(self.sites, self.windows, strict=True)
        ]
        marked = [self.tokens[p] + "*" * (p in self.subject) for p in self.positions]
        panels: dict[str, Any] = dict(zip(names, self.values, strict=True))
        panels |= {"input_tokens": marked, "row_labels": self.layers}
        unit = f" ({self.unit})" if self.unit else ""
        of = f" of {self.answer!r}" if self.answer else ""
        title = f"Effect of restoring on {self.metric}{of}{unit}: "
        title += f"noised {self.corrupted:.3g}, clean {self.clean:.3g}"
        if "axes" not in options:
            count, rows, columns = len(names), *self.values.shape[1:]
            width, height = min(1.8 + 0.45 * columns, 9.0), min(1.6 + 0.17 * rows, 9.0)
            figure = new_figure(options.pop("figsize", (width * count, height)))
            options["axes"] = figure.subplots(1, count, squeeze=False)
            figure.suptitle(options.pop("title", title), fontsize=11)
        return plot_metric_panels(panels, names, **options)

    def save(self, path: str | Path) -> None:
        """Write everything into one safetensors file with a JSON header, atomically.

        Raises:
            RecordFileError: the file cannot be written.
        """
        header = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in TABLES}
        header |= {name: list(header[name]) for name in TUPLES}
        tables = {name: getattr(self, name) for name in TABLES if getattr(self, name) is not None}
        arrays = {name: torch.from_numpy(np.array(table)) for name, table in tables.items()}
        write_arrays(Path(path), "safetensors", KIND, VERSION, header, arrays)

    @classmethod
    def load(cls, path: str | Path) -> CausalTrace:
        """Read what `save` wrote.

        Raises:
            RecordFileError: the file is not what `save` writes.
        """
        with open_arrays(Path(path), KIND, VERSION) as stored:
            header = dict(stored.content)
            header |= {name: tuple(header[name]) for name in TUPLES}
            tables: dict[str, Any] = {
                name: stored.read(name).numpy() if name in stored.specs else None for name in TABLES
            }
            return built(cls, {**header, **tables})
