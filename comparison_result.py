"""What the comparison of two models found: tables by layer, and how far each weight has moved."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from array_files import built, open_arrays, write_arrays
from forward_pass import InputError

if TYPE_CHECKING:
    import pandas as pd

KIND = "model comparison"
VERSION = 1
"""Of the file's schema."""

PARTS = ("embedding", "attention", "mlp", "rest of block", "rest of model", "head")
"""Where a parameter lies, in the order of tables."""


@dataclass(frozen=True, eq=False)
class WeightChanges:
    """How far each parameter of one model has moved in another."""

    names: tuple[str, ...]
    change: np.ndarray
    """``[parameter]``: ‖W₂ − W₁‖, Frobenius norm."""
    norm: np.ndarray
    """``[parameter]``: ‖W₁‖."""
    layers: tuple[int, ...]
    """Each parameter's block; -1 where it lies in none."""
    parts: tuple[str, ...]
    """Each one's part, out of `PARTS`."""
    sizes: tuple[int, ...]
    """Numbers in each."""
    unmatched: tuple[str, ...] = ()
    """Parameters that only one model has, or that have another shape there; not compared."""

    def __post_init__(self) -> None:
        """Check that there is a number for each parameter."""
        count = len(self.names)
        for name in ("change", "norm", "layers", "parts", "sizes"):
            if len(getattr(self, name)) != count:
                raise InputError(f"{name} must have an entry for each of {count} parameters")

    def __repr__(self) -> str:
        moved = int((self.change != 0).sum())
        return (
            f"WeightChanges({moved} of {len(self.names)} parameters moved, "
            f"relative change {self.total:.3g})"
        )

    @property
    def relative(self) -> np.ndarray:
        """``[parameter]``: change over norm.

        Infinite where a parameter was 0, NaN where it holds NaN in one of the models.
        """
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.where(self.change == 0, 0.0, self.change / self.norm)

    @property
    def total(self) -> float:
        """Relative change of all parameters together."""
        return float(np.sqrt((self.change**2).sum() / (self.norm**2).sum()))

    def by_layer(self) -> pd.DataFrame:
        """Relative change of each part of each block, its parameters taken together.

        Returns:
            Rows are blocks (and -1: what lies in none), columns parts; NaN where there is none, or
            where a parameter holds NaN.
        """
        import pandas as pd

        frame = pd.DataFrame(
            {
                "layer": self.layers,
                "part": self.parts,
                "change": self.change**2,
                "norm": self.norm**2,
            }
        )
        groups = frame.groupby(["layer", "part"])[["change", "norm"]]
        sums = groups.agg(lambda column: column.to_numpy().sum())  # pandas' own sum leaves NaN out
        relative = (sums["change"] / sums["norm"].where(sums["norm"] > 0)) ** 0.5
        table = relative.unstack("part")
        return table[[part for part in PARTS if part in table.columns]]

    def to_frame(self) -> pd.DataFrame:
        """One row per parameter: ``name, layer, part, size, norm, change, relative``."""
        import pandas as pd

        return pd.DataFrame(
            {
                "name": self.names,
                "layer": self.layers,
                "part": self.parts,
                "size": self.sizes,
                "norm": self.norm,
                "change": self.change,
                "relative": self.relative,
            }
        )

    def plot(self, **options: Any) -> Any:
        """Part × layer. See `comparison_figures.plot_weights`."""
        from comparison_figures import plot_weights

        return plot_weights(self, **options)


@dataclass(frozen=True, eq=False)
class ModelComparison:
    """Two models on the same tokens; row 0 is the embedding, row ``i + 1`` block i's output."""

    distance: np.ndarray
    """``[row]``: √(Σ‖x₂ − x₁‖² / Σ‖x₁‖²) over all tokens."""
    cosine: np.ndarray
    """``[row]``: mean cosine of a token's two activations."""
    cka: np.ndarray
    """``[row]``: debiased linear CKA, tokens being the rows; NaN for fewer than 4 tokens, or where
    these do not vary."""
    lens_kl: np.ndarray
    """``[row]``: mean KL(first ‖ second), nats, each model's stream through its own final norm and
    head; the last row is that of the models' predictions. NaN without heads."""
    agreement: np.ndarray
    """``[row]``: share of tokens where the best next token is the same in both lenses."""
    row_labels: tuple[str, ...]
    """``"embed"``, then block indices as text."""
    models: tuple[str, ...]
    """The names of the two."""
    texts: int
    tokens: int
    """How many each number is an average of."""
    weights: WeightChanges | None = None

    def __post_init__(self) -> None:
        """Check that there is a number for each row."""
        if any(getattr(self, name).shape != (len(self.row_labels),) for name in _TABLES):
            raise InputError(f"every table needs {len(self.row_labels)} numbers, one per row")

    def __repr__(self) -> str:
        size = f"{len(self.row_labels) - 1} layers, {self.tokens} tokens"
        found = f"final KL {self.final_kl:.3g} nats, distance {self.distance[-1]:.3g}"
        return f"ModelComparison({size}, {found}, top token alike {self.agreement[-1]:.1%})"

    @property
    def final_kl(self) -> float:
        """Mean KL(first ‖ second) of the next token's distribution, nats."""
        return float(self.lens_kl[-1])

    def to_frame(self) -> pd.DataFrame:
        """One row per layer: ``layer, distance, cosine, cka, lens_kl_nats, agreement``."""
        import pandas as pd

        tables = {("lens_kl_nats" if n == "lens_kl" else n): getattr(self, n) for n in _TABLES}
        return pd.DataFrame({"layer": self.row_labels, **tables})

    def plot(self, **options: Any) -> Any:
        """Tables by layer, and the weights. See `comparison_figures.plot_comparison`."""
        from comparison_figures import plot_comparison

        return plot_comparison(self, **options)

    def save(self, path: str | Path) -> None:
        """Write everything into one safetensors file with a JSON header, atomically.

        Raises:
            RecordFileError: the file cannot be written.
        """
        header: dict[str, Any] = {"texts": self.texts, "tokens": self.tokens}
        header |= {name: list(getattr(self, name)) for name in ("row_labels", "models")}
        arrays = {name: torch.from_numpy(np.array(getattr(self, name))) for name in _TABLES}
        if self.weights is not None:
            header["weights"] = {n: list(getattr(self.weights, n)) for n in _WEIGHT_LISTS}
            arrays |= {
                f"weights.{name}": torch.from_numpy(np.array(getattr(self.weights, name)))
                for name in _WEIGHT_TABLES
            }
        write_arrays(Path(path), "safetensors", KIND, VERSION, header, arrays)

    @classmethod
    def load(cls, path: str | Path) -> ModelComparison:
        """Read what `save` wrote.

        Raises:
            RecordFileError: the file is not what `save` writes.
        """
        with open_arrays(Path(path), KIND, VERSION) as stored:
            fields: dict[str, Any] = dict(stored.content)
            lists: Mapping[str, Any] | None = fields.pop("weights", None)
            fields |= {name: tuple(fields[name]) for name in ("row_labels", "models")}
            fields |= {name: stored.read(name).numpy() for name in _TABLES}
            if lists is not None:
                own: dict[str, Any] = {name: tuple(lists[name]) for name in _WEIGHT_LISTS}
                own |= {name: stored.read(f"weights.{name}").numpy() for name in _WEIGHT_TABLES}
                fields["weights"] = built(WeightChanges, own)
            return built(cls, fields)


_TABLES = ("distance", "cosine", "cka", "lens_kl", "agreement")
_WEIGHT_TABLES = ("change", "norm")
_WEIGHT_LISTS = ("names", "layers", "parts", "sizes", "unmatched")
"""How a result lies in a file."""
