"""What layer attribution found: a number for every unit of a site, in every block and token."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from array_files import built, open_arrays, write_arrays
from forward_pass import InputError

if TYPE_CHECKING:
    import pandas as pd

KIND = "layer attribution"
VERSION = 1
"""Of the file's schema."""

METHODS = ("conductance", "integrated_gradients", "internal_influence")
"""Every method; `layer_attribution` says what each is."""


@dataclass(frozen=True, eq=False)
class LayerAttribution:
    """How much each unit of some blocks speaks for a prediction."""

    values: np.ndarray
    """``[layer, position, …]``, float32; then the axes that the site has per token.

    ``d_model``, neurons, ``head d_head``, or ``head key`` of a pattern. In the metric's ``unit``;
    internal influence in that per unit of activation.
    """
    layers: tuple[int, ...]
    """The block of each entry of the first axis."""
    tokens: tuple[str, ...]
    """The prompt's, one per position."""
    site: str
    """A name out of `forward_pass.SITES`."""
    method: str
    """A name out of `METHODS`."""
    metric: str
    unit: str
    """``logits``, ``nats`` or none."""
    value: float
    """The metric of the prompt."""
    baseline_value: float
    """The metric of the baseline."""
    expected: np.ndarray
    """``[layer]``, float64: what all units of a block add up to; NaN where nothing says so.

    Conductance of a site that all paths go through: ``value`` less ``baseline_value``. Integrated
    gradients: ``value`` less the metric of the prompt with the site as in the baseline.
    """
    baseline: str
    """What the prompt was compared with."""
    steps: int
    """Points of the path."""
    answer: str = ""
    """The token that the metric measures, if it is one."""
    foil: str = ""

    def __post_init__(self) -> None:
        """Check that tables and labels fit together."""
        wanted = (len(self.layers), len(self.tokens))
        if self.values.ndim < 3 or self.values.shape[:2] != wanted:
            raise InputError(f"values must be [layer, position, …], {wanted}")
        if self.expected.shape != wanted[:1] or self.method not in METHODS:
            raise InputError(f"expected must be [layer] and method one of {METHODS}")

    def __repr__(self) -> str:
        size = f"{len(self.layers)} layer × {len(self.tokens)} position"
        units = " × ".join(str(length) for length in self.values.shape[2:])
        return f"LayerAttribution({self.method} of {self.site}, {size} × {units}, {self.metric})"

    @property
    def completeness_error(self) -> np.ndarray:
        """``[layer]``: what the units add up to, less what they should; NaN where nothing says."""
        axes = tuple(range(1, self.values.ndim))
        return self.values.sum(axis=axes, dtype=np.float64) - self.expected

    def by_layer(self) -> np.ndarray:
        """``[layer]``, float64: the sum over tokens and units; of influence, its length."""
        return self._over(tuple(range(1, self.values.ndim)))

    def by_position(self) -> np.ndarray:
        """``[layer, position]``, float64: the sum over units; of influence, its length."""
        return self._over(tuple(range(2, self.values.ndim)))

    def by_head(self) -> np.ndarray:
        """``[layer, head]``, float64: the sum over tokens and a head's units.

        Raises:
            InputError: the site has no heads.
        """
        if self.values.ndim != 4:
            raise InputError(f"the site {self.site!r} has no heads; by_unit() has its units")
        return self._over((1, 3))

    def by_unit(self) -> np.ndarray:
        """``[layer, …]``, float64: the sum over tokens; of influence, its length."""
        return self._over((1,))

    def _over(self, axes: tuple[int, ...]) -> np.ndarray:
        wide = self.values.astype(np.float64)
        if self.method == "internal_influence":
            return np.sqrt((wide * wide).sum(axis=axes))
        return wide.sum(axis=axes)

    def top(self, k: int = 10, *, each_token: bool = False) -> pd.DataFrame:
        """The ``k`` units with the largest number, whatever its sign.

        Args:
            k: How many.
            each_token: A unit of one token, instead of its sum over all tokens.

        Returns:
            Columns ``layer``, ``position`` and ``token`` (with ``each_token``), ``head`` where the
            site has heads, ``unit`` and ``value``; the largest first.

        Raises:
            InputError: ``k`` is below 1.
        """
        import pandas as pd

        if k < 1:
            raise InputError(f"the number of units must be at least 1; came {k}")
        table = self.values.astype(np.float64) if each_token else self.by_unit()
        order = np.argsort(-np.abs(table), axis=None, kind="stable")[:k]
        place = list(np.unravel_index(order, table.shape))
        columns: dict[str, Any] = {"layer": np.array(self.layers)[place.pop(0)]}
        if each_token:
            columns["position"] = place.pop(0)
            columns["token"] = [self.tokens[p] for p in columns["position"]]
        if len(place) == 2:
            columns["head"] = place.pop(0)
        columns["unit"] = place.pop(0)
        columns["value"] = table.ravel()[order]
        return pd.DataFrame(columns)

    def to_frame(self) -> pd.DataFrame:
        """One row per block and token: ``layer, position, token, value`` (`by_position`)."""
        import pandas as pd

        table = self.by_position()
        layer, position = np.indices(table.shape).reshape(2, -1)
        return pd.DataFrame(
            {
                "layer": np.array(self.layers)[layer],
                "position": position,
                "token": [self.tokens[p] for p in position],
                "value": table.ravel(),
            }
        )

    def plot(self, **options: Any) -> Any:
        """A heat map of `by_position`, tokens across, blocks down. See `sweep_figures`."""
        from sweep_figures import plot_sweep

        words = self.method.replace("_", " ")
        unit = f" ({self.unit})" if self.unit else ""
        label = f"{words} of {self.metric}{unit}"
        if self.method == "internal_influence":
            label = f"length of the {words} on {self.metric}"
        shown = SimpleNamespace(
            values=self.by_position(),
            axes=("layer", "position"),
            labels=(self.layers, tuple(range(len(self.tokens)))),
            tokens=self.tokens,
            value_label=label,
        )
        title = f"{words} of {self.site}, against {self.baseline}"
        return plot_sweep(shown, **({"title": title} | options))

    def save(self, path: str | Path) -> None:
        """Write everything into one safetensors file with a JSON header, atomically.

        Raises:
            RecordFileError: the file cannot be written.
        """
        header = {name: getattr(self, name) for name in _PLAIN}
        header |= {"tokens": list(self.tokens), "layers": list(self.layers)}
        tables = {
            "values": self.values,
            "expected": self.expected,
            "runs": np.array([self.value, self.baseline_value]),
        }
        arrays = {name: torch.from_numpy(np.array(table)) for name, table in tables.items()}
        write_arrays(Path(path), "safetensors", KIND, VERSION, header, arrays)

    @classmethod
    def load(cls, path: str | Path) -> LayerAttribution:
        """Read what `save` wrote.

        Raises:
            RecordFileError: the file is not what `save` writes.
        """
        with open_arrays(Path(path), KIND, VERSION) as stored:
            header = dict(stored.content)
            header |= {name: tuple(header[name]) for name in ("tokens", "layers")}
            value, baseline_value = stored.read("runs").tolist()
            tables: Any = {name: stored.read(name).numpy() for name in ("values", "expected")}
            runs = {"value": value, "baseline_value": baseline_value}
            return built(cls, {**header, **runs, **tables})


_PLAIN = ("site", "method", "metric", "unit", "baseline", "steps", "answer", "foil")
"""Fields that go into a file's header as they are."""
