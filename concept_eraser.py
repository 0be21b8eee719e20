"""Concept erasure: take out of a layer what a linear probe could read, and see what that changes.

`erase_concept` makes a `ConceptEraser`, a function of activations that can be put in force in the
model; `check_erasure` does so and probes again. With Σ the covariance of the activations x, and C
that of x with the labels z (one-hot, or numbers), both methods project along the columns of C:

    r(x) = x − W⁻¹ P W (x − mean),        P the orthogonal projector onto the columns of W C

===========  =====================================================================================
``leace``    W = Σ^(−½) (a pseudo-inverse): of all affine maps after which x and z are uncorrelated
             the one that changes x least (Belrose et al. 2023, "LEACE", theorem 4.3)
``mean``     W = 1: orthogonal projection along the differences of the class means (the mean
             projection of Haghighatkhah et al. 2022)
===========  =====================================================================================

After either, no linear probe with a convex loss can do better than a constant on the examples that
the eraser was fitted to (Belrose et al. 2023, theorem 3.1). A non-linear one may.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from numbers import Real
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from activation_extraction import extract_batch
from activation_rows import ActivationRows, knows_layers, rows_of, varies
from array_files import built, open_arrays, write_arrays
from direction_finding import check_examples, erasing_projection
from extraction_request import make_request
from forward_pass import InputError, Site, edit
from linear_probes import Fold, rows_of_texts
from model_architecture import Architecture, Layer
from patch_binding import ActivationPatch
from probe_plan import ProbePlan, make_plan
from tokenization import Prompt

if TYPE_CHECKING:
    import pandas as pd
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

METHODS = ("leace", "mean")
KIND, RESULT_KIND = "concept eraser", "concept erasure check"
VERSION = 1
"""Of the files' schema."""

# --- The eraser -----------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class ConceptEraser:
    """``x - left @ right @ (x - mean)``, a function of activations ``[…, feature]``.

    Raises:
        InputError: the parts do not fit together.
    """

    left: Tensor
    """``[feature, rank]``: the lines along which activations are moved, float64."""
    right: Tensor
    """``[rank, feature]``: how far, as read from the activation less the mean, float64."""
    mean: Tensor
    """``[feature]``, float64: where activations are moved to along those lines."""
    layer: int
    site: str = "resid_post"
    method: str = "leace"
    model: str = ""
    """The config's ``model_type``; ``""`` if not known."""

    def __post_init__(self) -> None:
        """Check that the shapes fit together."""
        width, rank = self.left.shape
        if tuple(self.right.shape) != (rank, width) or tuple(self.mean.shape) != (width,):
            raise InputError("an eraser is left [d, rank], right [rank, d] and mean [d]")

    def __repr__(self) -> str:
        where = f"{self.site} of layer {self.layer}"
        return f"ConceptEraser({self.method}, {where}, rank {self.rank} of {len(self.mean)})"

    @property
    def rank(self) -> int:
        """Number of dimensions that are taken away: one less than there are classes, at most."""
        return int(self.left.shape[1])

    def __call__(self, activation: Tensor) -> Tensor:
        """Erase.

        Args:
            activation: ``[…, feature]``; of a site with heads ``[…, head, d_head]``, all heads
                together being the features.

        Returns:
            A new tensor of that shape, dtype and device.

        Raises:
            InputError: the width differs.
        """
        width = len(self.mean)
        flat = activation
        if activation.shape[-1] != width:
            if activation.dim() < 2 or activation.shape[-1] * activation.shape[-2] != width:
                raise InputError(f"the eraser takes […, {width}]; came {list(activation.shape)}")
            flat = activation.flatten(-2)
        exact = torch.float64 if activation.device.type == "cpu" else torch.float32
        left, right, mean = (
            part.to(activation.device, exact) for part in (self.left, self.right, self.mean)
        )
        moved = flat.to(exact)
        moved = moved - (moved - mean) @ right.T @ left.T
        return moved.reshape(activation.shape).to(activation.dtype)

    def patch(self, positions: Any = None) -> ActivationPatch:
        """The intervention that keeps the concept erased, for `InterventionHandler` and the like.

        Args:
            positions: Which tokens; None means all.
        """
        return ActivationPatch(self.layer, positions, self, site=self.site)

    def save(self, path: str | Path) -> None:
        """Write it into one safetensors file with a JSON header, atomically.

        Raises:
            RecordFileError: the file cannot be written.
        """
        header = {name: getattr(self, name) for name in ("layer", "site", "method", "model")}
        arrays = {name: getattr(self, name).contiguous() for name in ("left", "right", "mean")}
        write_arrays(Path(path), "safetensors", KIND, VERSION, header, arrays)

    @classmethod
    def load(cls, path: str | Path) -> ConceptEraser:
        """Read what `save` wrote.

        Raises:
            RecordFileError: the file is not what `save` writes.
        """
        with open_arrays(Path(path), KIND, VERSION) as stored:
            arrays = {name: stored.read(name) for name in ("left", "right", "mean")}
            return built(cls, {**stored.content, **arrays})


def fit_eraser(
    activations: Any,
    labels: Any,
    layer: int | None = None,
    *,
    method: str = "leace",
    shrinkage: float = 0.0,
    task: str = "auto",
    site: str = "resid_post",
) -> ConceptEraser:
    """The eraser of what tells labels apart in activations that are there already.

    Args:
        activations: ``[example, feature]``, or `ActivationRows` or records of one layer.
        labels: One per example; classes, or (floating point) numbers.
        layer: The block that it is for; needed for an array.
        method: ``"leace"`` or ``"mean"``.
        shrinkage: Of ``leace``: 0 to 1, how far the covariance is drawn towards a multiple of 1.
            With fewer examples than a few per feature, some generalizes better; at 1 it is
            ``mean``. The examples' own labels are erased whatever it is.
        task: See `linear_probes.fit_probes`.
        site: What the activations are.

    Raises:
        InputError: they do not fit together, or the labels make no difference.
    """
    _check_method(method, shrinkage)
    rows = rows_of(activations, None if layer is None else [layer], site=site)
    if rows.values.shape[1] != 1:
        raise InputError(f"an eraser is for one layer; came the layers {rows.layers}")
    if layer is None and not knows_layers(activations):
        raise InputError("say which block the array is of: layer=")
    if rows.head is not None:
        raise InputError(f"an eraser takes all heads of {rows.site} together; leave out head=")
    plan = make_plan(labels, len(rows.values), task=task, folds=2, controls=0)
    return _fit(rows, 0, plan, np.arange(len(rows.values)), method, shrinkage)


def _check_method(method: str, shrinkage: float) -> None:
    if method not in METHODS:
        raise InputError(f"method is one of {', '.join(METHODS)}; came {method!r}")
    if not isinstance(shrinkage, Real) or not 0 <= shrinkage <= 1:
        raise InputError(f"shrinkage must lie in 0..1; came {shrinkage!r}")


def _check_reading(texts: Any, reading: Mapping[str, Any]) -> None:
    check_examples(texts, "texts")
    if reading.get("head") is not None:
        raise InputError("an eraser takes all heads of a site together; leave out head=")


def _fit(
    rows: ActivationRows,
    place: int,
    plan: ProbePlan,
    chosen: np.ndarray,
    method: str,
    shrinkage: float,
) -> ConceptEraser:
    """The eraser fitted to some examples of one layer."""
    if not varies(rows.values[chosen, place]):
        raise InputError("these activations differ by rounding alone: nothing to erase")
    x = torch.from_numpy(rows.values[chosen, place].astype(np.float64))
    labels = plan.labels[chosen]
    z = np.eye(len(plan.classes))[labels] if plan.classes else labels[:, None]
    left, right, mean = erasing_projection(
        x, torch.from_numpy(z), 1.0 if method == "mean" else shrinkage
    )
    return ConceptEraser(left, right, mean, rows.layers[place], rows.site, method, rows.model)


def erase_concept(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    texts: Sequence[Prompt],
    labels: Any,
    layer: Layer,
    *,
    method: str = "leace",
    shrinkage: float = 0.0,
    task: str = "auto",
    **reading: Any,
) -> ConceptEraser:
    """Run texts, and make the eraser of what tells their labels apart at one layer.

    Args:
        model: The model; it needs no head.
        tokenizer: For text and chats.
        texts: One per example.
        labels: One per text.
        layer: In any spelling.
        method: See `fit_eraser`, as for ``shrinkage`` and ``task``.
        shrinkage: See there.
        task: See there.
        **reading: ``read``, ``at``, ``site``, ``batch_size``; see `activation_rows.read_rows`.

    Raises:
        InputError: texts and labels do not fit together, or make no difference.
        LayerError: there is no such layer.
        SiteError: the model has no such site.
    """
    _check_method(method, shrinkage)
    _check_reading(texts, reading)
    make_plan(labels, len(texts), task=task, folds=2, controls=0)  # refuse before anything runs
    rows = rows_of_texts(model, tokenizer, texts, [layer], reading)
    return fit_eraser(rows, labels, method=method, shrinkage=shrinkage, task=task)


# --- The check ------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class ErasureResult:
    """How well a concept is read at a layer and after it, with and without its erasure there."""

    before: np.ndarray
    """``[layer]``: score (accuracy or R²) of probes on the model as it is, on held-out examples."""
    after: np.ndarray
    """``[layer]``: of probes fitted anew, the eraser being in force at the first of these layers.

    In each fold eraser and probes know the training examples alone. What remains of a probe then is
    the class most frequent among these, which with groups may be rare among those held out: a
    score below the baseline is that constant's, and no finding.
    """
    layers: tuple[int, ...]
    """From the layer of the erasure on."""
    task: str
    baseline: float
    """Score without looking: the share of the largest class, or 0."""
    chance: float
    """Accuracy of guessing among the classes; NaN for a regression."""
    site: str
    method: str
    rank: int
    """Dimensions that were taken away."""
    kl: float = float("nan")
    """Mean KL(as it is ‖ erased) of the next token's distribution, nats; NaN without a head."""
    agreement: float = float("nan")
    """Share of texts after which the best next token stays the same."""

    _tables: ClassVar[tuple[str, ...]] = ("before", "after")
    _numbers: ClassVar[tuple[str, ...]] = ("baseline", "chance", "kl", "agreement")

    def __post_init__(self) -> None:
        """Check that the tables have an entry per layer."""
        if not self.before.shape == self.after.shape == (len(self.layers),):
            raise InputError(f"before and after must hold {len(self.layers)} layers")

    def __repr__(self) -> str:
        start, end = float(self.before[0]), float(self.after[0])
        what = f"{self.method}, rank {self.rank}, {self.site} of layer {self.layers[0]}"
        return f"ErasureResult({what}: {start:.3f} → {end:.3f}, baseline {self.baseline:.3f})"

    def to_frame(self) -> pd.DataFrame:
        """One row per layer: columns ``layer, before, after, baseline, chance``."""
        import pandas as pd

        tables = {name: getattr(self, name) for name in ("before", "after", "baseline", "chance")}
        return pd.DataFrame({"layer": self.layers, **tables})

    def plot(self, **options: Any) -> Any:
        """Both scores by layer. See `probe_figures.plot_erasure`."""
        from probe_figures import plot_erasure

        return plot_erasure(self, **options)

    def save(self, path: str | Path) -> None:
        """Write everything into one safetensors file with a JSON header, atomically.

        Raises:
            RecordFileError: the file cannot be written.
        """
        header = {name: getattr(self, name) for name in ("task", "site", "method", "rank")}
        header["layers"] = list(self.layers)
        arrays = {name: torch.from_numpy(np.array(getattr(self, name))) for name in self._tables}
        numbers = [float(getattr(self, name)) for name in self._numbers]
        arrays["numbers"] = torch.tensor(numbers, dtype=torch.float64, device="cpu")
        write_arrays(Path(path), "safetensors", RESULT_KIND, VERSION, header, arrays)

    @classmethod
    def load(cls, path: str | Path) -> ErasureResult:
        """Read what `save` wrote.

        Raises:
            RecordFileError: the file is not what `save` writes.
        """
        with open_arrays(Path(path), RESULT_KIND, VERSION) as stored:
            fields = {**stored.content, "layers": tuple(stored.content["layers"])}
            fields |= {name: stored.read(name).numpy() for name in cls._tables}
            fields |= zip(cls._numbers, stored.read("numbers").tolist(), strict=True)
            return built(cls, fields)


def check_erasure(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    texts: Sequence[Prompt],
    labels: Any,
    layer: Layer,
    *,
    method: str = "leace",
    shrinkage: float = 0.0,
    task: str = "auto",
    groups: Any = None,
    folds: int = 5,
    penalty: float = 1.0,
    seed: int = 0,
    site: str = "resid_post",
    **reading: Any,
) -> ErasureResult:
    """Erase a concept in the model, at every token, and probe for it again, there and later.

    In each fold an eraser is fitted to the training examples and put in force, all texts are run,
    and new probes are fitted to the training examples. At the layer itself these can do no better
    than the baseline; what they find later the model has fetched from elsewhere (or a non-linear
    step has made linear).

    Args:
        model: The model.
        tokenizer: For text and chats.
        texts: One per example.
        labels: One per text.
        layer: Where it is erased, in any spelling.
        method: See `fit_eraser`.
        shrinkage: See `fit_eraser`.
        task: See `linear_probes.fit_probes`, as for the rest.
        groups: See there.
        folds: See there.
        penalty: See there.
        seed: See there.
        site: What is erased and probed.
        **reading: ``read``, ``at``, ``batch_size``; see `activation_rows.read_rows`.

    Returns:
        An `ErasureResult`.

    Raises:
        InputError: texts, labels or groups do not fit together, or are too few.
        LayerError: there is no such layer.
        SiteError: the model has no such site.
    """
    _check_method(method, shrinkage)
    _check_reading(texts, reading)
    arch = Architecture(model)
    first = arch.resolve(layer)
    plan = make_plan(
        labels, len(texts), task=task, groups=groups, folds=folds, penalty=penalty, controls=0,
        seed=seed,
    )  # fmt: skip
    splits = plan.splits
    reading = {**reading, "site": site}
    later = [x for x in range(first, arch.n_layers) if not arch.missing(Site(site, x))]
    rows = rows_of_texts(arch, tokenizer, texts, later if first in later else [first], reading)
    before, after = (np.zeros((len(plan.labels), len(rows.layers))) for _ in range(2))
    for split in splits:
        eraser = _fit(rows, 0, plan, split[0], method, shrinkage)
        with edit(arch, {Site(site, first): eraser}):
            erased = rows_of_texts(arch, tokenizer, texts, rows.layers, reading)
        for found, source in ((before, rows), (after, erased)):
            for place in range(len(rows.layers)):
                fold = Fold(source.values[:, place].astype(np.float64), split)
                found[split[1], place] = fold.predict(plan.labels, plan.task, plan.penalty)
    eraser = _fit(rows, 0, plan, np.arange(len(plan.labels)), method, shrinkage)
    kl, agreement = _effect(arch, tokenizer, texts, eraser)
    return ErasureResult(
        plan.score(before), plan.score(after), rows.layers, plan.task, plan.baseline,
        1 / len(plan.classes) if plan.classes else float("nan"), site, method, eraser.rank, kl,
        agreement,
    )  # fmt: skip


def _effect(
    arch: Architecture, tokenizer: Any, texts: Sequence[Prompt], eraser: ConceptEraser
) -> tuple[float, float]:
    """Mean KL of the next token's distribution, and the share whose best token stays."""
    if not arch.has_head:
        return float("nan"), float("nan")
    request = make_request(arch, layer_indices=[], sites=(), return_logits=True)
    found = []
    for context in (nullcontext(), edit(arch, {Site(eraser.site, eraser.layer): eraser})):
        with context:
            records = extract_batch(arch, tokenizer, texts, request, "last", show_progress=False)
        logits = [record.logits for record in records]
        found.append(torch.cat([x[0] for x in logits if x is not None]).float().log_softmax(-1))
    clean, other = found
    kl = (clean.exp() * (clean - other)).sum(-1).mean()
    return float(kl), float((clean.argmax(-1) == other.argmax(-1)).float().mean())
