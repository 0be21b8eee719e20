"""What linear probes found: how well each layer can be read, against what chance would give.

`ProbeResult` holds scores by layer, the controls that they must be compared with, the predictions
for every held-out example, and the probes themselves, as directions in the activations' own unit.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from array_files import built, open_arrays, write_arrays
from forward_pass import InputError, LayerError
from module_devices import as_tensor
from steering_direction import Direction
from tagged_json import decode, encode

if TYPE_CHECKING:
    import pandas as pd

KIND = "linear probes"
VERSION = 1
"""Of the file's schema."""

CLASSIFICATION, REGRESSION = "classification", "regression"

Label = str | int | float | bool
"""What a class may be called."""


@dataclass(frozen=True, eq=False)
class ProbeResult:
    """Scores of one linear probe per layer, measured on examples that it was not trained on.

    A score is an accuracy (0 to 1), or R² where numbers were predicted (1 is perfect, 0 is what the
    mean of the training examples gives; it may be negative).
    """

    scores: np.ndarray
    """``[layer]``: over all held-out examples together."""
    fold_scores: np.ndarray
    """``[layer, fold]``: of each fold; these share training examples, so are not independent."""
    shared_scores: np.ndarray
    """``[layer]``: the score when examples of one group may lie in training and test both.

    Equal to ``scores`` where no groups were given; what is above them is leakage.
    """
    control: np.ndarray
    """``[layer]``: the control task's score on those same folds, NaN where none was run."""
    null: np.ndarray
    """``[layer, permutation]``: scores after the labels were permuted; the same permutations for
    every layer."""
    predictions: np.ndarray
    """``[layer, example]``: for each example, by the probe that did not see it; an index into
    ``classes``, or a number."""
    labels: np.ndarray
    """``[example]``: the same of the truth."""
    weights: np.ndarray
    """``[layer, class, feature]``, per unit of activation (not standardised), of a probe fitted to
    all examples: ``softmax(weights @ x + intercepts)`` are the classes' probabilities; of a
    regression one row, whose product is the number."""
    intercepts: np.ndarray
    """``[layer, class]``."""
    means: np.ndarray
    """``[layer, class, feature]``: each class's mean activation (of a regression, of all)."""
    layers: tuple[int, ...]
    classes: tuple[Label, ...]
    """The labels that occur, in order; empty for a regression."""
    task: str
    """``classification`` or ``regression``."""
    site: str = "resid_post"
    head: int | None = None
    n_groups: int = 0
    """Groups that were kept whole; 0 where none were given."""
    n_types: int = 0
    """Types to which the control task gave labels at random."""
    penalty: float = 1.0
    """Strength of the L2 penalty, on standardised activations."""
    seed: int = 0
    model: str = ""

    def __post_init__(self) -> None:
        """Check that the tables have the axes that the labels say."""
        layers, examples = len(self.layers), len(self.labels)
        rows = len(self.classes) if self.task == CLASSIFICATION else 1
        width = self.weights.shape[-1]
        shapes = {
            "scores": (layers,),
            "shared_scores": (layers,),
            "control": (layers,),
            "predictions": (layers, examples),
            "weights": (layers, rows, width),
            "intercepts": (layers, rows),
            "means": (layers, rows, width),
        }
        for name, shape in shapes.items():
            if getattr(self, name).shape != shape:
                raise InputError(f"{name} must be {shape}; it is {getattr(self, name).shape}")

    def __repr__(self) -> str:
        best = self.best_layer
        what = f"{len(self.classes)} classes" if self.classes else "a number"
        score = f"{self.score_name} {self.score(best):.3f} at layer {best}"
        size = f"{len(self.layers)} layers, {len(self.labels)} examples"
        return f"ProbeResult({what}, {self.site}, {size}, {score}, baseline {self.baseline:.3f})"

    # --- Scores ----------------------------------------------------------------------------------

    @property
    def score_name(self) -> str:
        """``accuracy`` or ``R²``."""
        return "accuracy" if self.task == CLASSIFICATION else "R²"

    @property
    def chance(self) -> float:
        """Accuracy of guessing among the classes; NaN for a regression."""
        return 1 / len(self.classes) if self.classes else float("nan")

    @cached_property
    def baseline(self) -> float:
        """Score without looking: the share of the largest class; 0 for a regression."""
        if not self.classes:
            return 0.0
        return float(np.bincount(self.labels.astype(int)).max() / len(self.labels))

    @property
    def selectivity(self) -> np.ndarray:
        """``[layer]``: score less control score, both on the same folds (Hewitt & Liang 2019)."""
        return self.shared_scores - self.control

    @property
    def stderr(self) -> np.ndarray:
        """``[layer]``: spread of the folds' scores over √folds; only a rough guide, see there."""
        return self.fold_scores.std(1, ddof=1) / np.sqrt(self.fold_scores.shape[1])

    @property
    def p_values(self) -> np.ndarray:
        """``[layer]``: (b + 1)/(m + 1), b of m permutations scoring no less (Phipson & Smyth 2010).

        NaN where no permutations were run. Each layer by itself.
        """
        return self._p(self.null)

    @property
    def p_values_any(self) -> np.ndarray:
        """The same against the best layer of each permutation: corrected for looking at all layers.

        This is the single-step maxT of Westfall & Young (1993).
        """
        if not self.null.shape[1]:
            return self._p(self.null)
        return self._p(np.broadcast_to(self.null.max(0), self.null.shape))

    def _p(self, null: np.ndarray) -> np.ndarray:
        count = null.shape[1]
        if not count:
            return np.full(len(self.layers), np.nan)
        return ((null >= self.scores[:, None] - 1e-12).sum(1) + 1) / (count + 1)

    @property
    def best_layer(self) -> int:
        """The layer with the highest score, the first of equals."""
        return self.layers[int(self.scores.argmax())]

    def score(self, layer: int) -> float:
        """The score of one layer.

        Raises:
            LayerError: it was not probed.
        """
        return float(self.scores[self._row(layer)])

    def confusion(self, layer: int) -> pd.DataFrame:
        """How often each class (rows) was taken for each (columns) by the probe of a layer.

        Raises:
            LayerError: it was not probed.
            InputError: numbers were predicted, not classes.
        """
        import pandas as pd

        if not self.classes:
            raise InputError("a regression has no classes; compare .predictions with .labels")
        size = len(self.classes)
        pairs = self.labels.astype(int) * size + self.predictions[self._row(layer)].astype(int)
        table = np.bincount(pairs, minlength=size * size).reshape(size, size)
        return pd.DataFrame(table, list(self.classes), list(self.classes)).rename_axis("label")

    def _row(self, layer: int) -> int:
        if isinstance(layer, bool) or layer not in self.layers:
            raise LayerError(f"layer {layer!r} was not probed; there are {self.layers}")
        return self.layers.index(layer)

    # --- The probes ------------------------------------------------------------------------------

    def direction(self, layer: int, label: Any = None, length: str = "unit") -> Direction:
        """The line along which a layer's probe reads a class (or a number), in activation space.

        It is ``w / σ`` of the standardised probe, so that ``x @ direction`` orders activations as
        the probe does. It is a filter: it also cancels noise that correlates with the label (Haufe
        et al. 2014), so steering along it may be weaker than along the difference of means.

        Args:
            layer: A layer that was probed.
            label: A class, against all others; with two classes the second one if None.
            length: ``"unit"``: 1. ``"score"``: the probe's weights as they are; their length is the
                change of the score (logits, or the number) per unit along the direction. ``"gap"``:
                as long as the means of the class and of the rest are apart along it, so that a
                steering coefficient of 1 moves one to the other.

        Raises:
            LayerError: the layer was not probed.
            InputError: no such class or length, or the site holds more than one vector per token.
        """
        row, place = self._row(layer), self._class(label)
        if self.head is not None or self.site in _WITH_HEADS:
            raise InputError(f"{self.site} has a head axis; a steering direction has none")
        line, gap = self.weights[row, place], 0.0
        if self.classes:
            others = [i for i in range(len(self.classes)) if i != place]
            line = line - self.weights[row, others].mean(0)
            counts = np.bincount(self.labels.astype(int), minlength=len(self.classes))[others]
            rest = np.average(self.means[row, others], axis=0, weights=counts)
            gap = float((self.means[row, place] - rest) @ line)
        size = float(np.linalg.norm(line))
        lengths = {"unit": 1.0, "score": size, "gap": gap / size if size else 0.0}
        if length not in lengths or (length == "gap" and not self.classes):
            raise InputError(f"length is 'unit', 'score' or (of classes) 'gap'; came {length!r}")
        if not size:
            raise InputError(f"the probe of layer {layer} found nothing: its weights are 0")
        return Direction(
            torch.from_numpy(line * (lengths[length] / size)).float(),
            layer,
            self.site,
            "probe",
            str(self.classes[place]) if self.classes else "",
            self.model,
        )

    def _class(self, label: Any) -> int:
        if not self.classes:
            if label is not None:
                raise InputError(f"a regression has one direction; leave out label={label!r}")
            return 0
        if label is None and len(self.classes) == 2:
            return 1
        if label not in self.classes:
            raise InputError(f"say which class: one of {self.classes}; came {label!r}")
        return self.classes.index(label)

    def score_scale(self, layer: int, label: Any = None) -> float:
        """Change of the probe's score (logits, or the number) per unit along `direction`.

        Raises:
            LayerError, InputError: as `direction` does.
        """
        return self.direction(layer, label, "score").norm

    def predict(self, activations: Any, layer: int) -> np.ndarray:
        """What the probe of a layer (fitted to all examples) says of activations ``[…, feature]``.

        Returns:
            ``[…]``: classes, or numbers.

        Raises:
            LayerError: the layer was not probed.
            InputError: the width differs, or a number is not finite.
        """
        row = self._row(layer)
        x = as_tensor(activations).detach().cpu().double().numpy()
        if x.shape[-1:] != self.weights.shape[-1:]:
            raise InputError(f"activations are […, {self.weights.shape[-1]}]; came {x.shape}")
        if not np.isfinite(x).all():
            raise InputError("the activations hold NaN or infinity, of which a probe says nothing")
        found = x @ self.weights[row].T + self.intercepts[row]
        if not self.classes:
            return found[..., 0]
        names = np.empty(len(self.classes), dtype=object)
        names[:] = self.classes
        return names[found.argmax(-1)]

    # --- Out -------------------------------------------------------------------------------------

    def to_frame(self) -> pd.DataFrame:
        """One row per layer.

        Returns:
            Columns ``layer, score, stderr, shared_score, control, selectivity, p, p_any, chance,
            baseline``.
        """
        import pandas as pd

        return pd.DataFrame(
            {
                "layer": self.layers,
                "score": self.scores,
                "stderr": self.stderr,
                "shared_score": self.shared_scores,
                "control": self.control,
                "selectivity": self.selectivity,
                "p": self.p_values,
                "p_any": self.p_values_any,
                "chance": self.chance,
                "baseline": self.baseline,
            }
        )

    def plot(self, **options: Any) -> Any:
        """Score by layer with its baselines. See `probe_figures.plot_probes`."""
        from probe_figures import plot_probes

        return plot_probes(self, **options)

    def save(self, path: str | Path) -> None:
        """Write everything into one safetensors file with a JSON header, atomically.

        Raises:
            RecordFileError: the file cannot be written, or a class has no exact form in one.
        """
        header = {name: encode(getattr(self, name), name) for name in _PLAIN}
        arrays = {n: torch.from_numpy(np.ascontiguousarray(getattr(self, n))) for n in _ARRAYS}
        write_arrays(Path(path), "safetensors", KIND, VERSION, header, arrays)

    @classmethod
    def load(cls, path: str | Path) -> ProbeResult:
        """Read what `save` wrote.

        Raises:
            RecordFileError: the file is not what `save` writes.
        """
        with open_arrays(Path(path), KIND, VERSION) as stored:
            header = {name: decode(stored.content[name]) for name in _PLAIN}
            arrays: Any = {name: stored.read(name).numpy() for name in _ARRAYS}
            return built(cls, {**header, **arrays})


_WITH_HEADS = ("head_out", "query", "key", "value")

_ARRAYS = (
    *("scores", "fold_scores", "shared_scores", "control", "null", "predictions", "labels"),
    *("weights", "intercepts", "means"),
)
_PLAIN = (
    *("layers", "classes", "task", "site", "head", "n_groups", "n_types", "penalty", "seed"),
    "model",
)
"""How a result lies in a file: arrays, and what goes into the header."""
