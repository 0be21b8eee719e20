"""Linear probes: what can be read from a layer by a linear map, and whether that means anything.

`train_probes` runs texts and probes the activations; `fit_probes` probes activations that are there
already (records, arrays). One probe per layer, in cross-validation:

1. The training part of a fold is standardised by its own mean and deviation (never by those of the
   test part), and scikit-learn's `LogisticRegression` or `Ridge` is fitted to it. Where there are
   fewer examples than features, that happens in the space that the examples span, in which the
   solution lies.
2. With ``groups`` no group has examples in training and test both. Phrasings of one fact are no
   independent examples: without groups a probe may know the fact, not the label.
3. The control task (Hewitt & Liang 2019, "Designing and interpreting probes with control tasks")
   gives each *type* (a group, a token) another type's label at random. Whoever scores high on it
   memorizes types. Score less control score is the selectivity, both on folds that split a type's
   examples between training and test, as in the paper. The paper draws labels independently; here
   the types' own labels are shuffled where each type has one, so that classes keep their sizes.
4. Permuted labels give the p-value (b + 1)/(m + 1) (Phipson & Smyth 2010). Where all examples of a
   group have one label, whole groups change labels; else labels change within groups (a group of
   one label keeps it then). Folds follow the permuted labels, as they do the true ones.

That a probe can read something does not say that the model uses it: compare with patching, and see
`concept_eraser`.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from tqdm import tqdm

from activation_rows import EACH, REST, ActivationRows, read_rows, rows_of, varies
from direction_finding import check_examples
from forward_pass import InputError
from model_architecture import Layer
from probe_plan import ProbePlan, Split, check_types, make_plan, numbered
from probe_result import CLASSIFICATION, REGRESSION, ProbeResult
from tokenization import Prompt

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

ITERATIONS = 10_000
"""At most, of the logistic regression's solver."""

# --- The two ways in ------------------------------------------------------------------------------


def train_probes(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    texts: Sequence[Prompt],
    labels: Any,
    layers: Layer | Sequence[Layer] | None = None,
    *,
    read: Any = "last",
    at: Sequence[str | int] | None = None,
    site: str = "resid_post",
    head: int | None = None,
    batch_size: int = 64,
    **options: Any,
) -> ProbeResult:
    """Run texts and probe what each layer holds of their labels.

    Args:
        model: The model; it needs no head.
        tokenizer: For text and chats.
        texts: One per example.
        labels: One per text; see `fit_probes`.
        layers: In any spelling; None means all that have the site.
        read: Which token of each text; see `activation_rows.read_rows`.
        at: Instead, a position or a part of the text for each text.
        site: Any site but ``attn_pattern``.
        head: One head of a site that has heads; None takes all as one vector.
        batch_size: Texts per forward pass.
        **options: ``task``, ``groups``, ``types``, ``folds``, ``penalty``, ``controls``,
            ``permutations`` and ``seed``; see `fit_probes`.

    Returns:
        A `ProbeResult`.

    Raises:
        InputError: texts, labels or groups do not fit together, or are too few.
        LayerError: there is no such layer.
        SiteError: the model has no such site.
    """
    check_examples(texts, "texts")
    _ = make_plan(labels, len(texts), **options).splits  # refuse before anything runs
    reading = {"read": read, "at": at, "site": site, "head": head, "batch_size": batch_size}
    rows = rows_of_texts(model, tokenizer, texts, layers, reading)
    return fit_probes(rows, labels, **options)


def rows_of_texts(
    model: Any, tokenizer: Any, texts: Sequence[Prompt], layers: Any, reading: Mapping[str, Any]
) -> ActivationRows:
    """One row per text; ``reading`` as for `activation_rows.read_rows`.

    Raises:
        InputError: ``read`` makes several rows of a text, or what `read_rows` refuses.
        LayerError, SiteError: as `read_rows` does.
    """
    read = reading.get("read")
    if isinstance(read, str) and read in (EACH, REST):
        raise InputError(f"read={read!r} makes several examples of a text; a text has one label")
    return read_rows(model, tokenizer, texts, layers, **reading)


def fit_probes(
    activations: Any,
    labels: Any,
    layers: Any = None,
    *,
    read: Any = "last",
    site: str = "resid_post",
    head: int | None = None,
    task: str = "auto",
    groups: Any = None,
    types: Any = None,
    folds: int = 5,
    penalty: float = 1.0,
    controls: int = 3,
    permutations: int = 0,
    seed: int = 0,
) -> ProbeResult:
    """Probe activations that are there already, one linear probe per layer.

    Args:
        activations: `ActivationRows`, records (one example each), or an array ``[example, layer,
            feature]`` or ``[example, feature]``.
        labels: One per example: strings, integers or truth values are classes, floating-point
            numbers are predicted as numbers.
        layers: See `activation_rows.rows_of`.
        read: Of records: which token.
        site: What the activations are, or which site of the records.
        head: One head of a record's site.
        task: ``"classification"`` or ``"regression"`` instead of going by the labels' type.
        groups: One name per example: examples of one group stay on one side of a split.
        types: One name per example, for the control task; ``"token"`` takes the token that was
            read; None the groups, or each example by itself (which nothing can memorize: such a
            control scores what chance does).
        folds: Parts of the cross-validation; each class needs an example, or a group, in two.
        penalty: Of L2, on standardised activations: ``alpha`` of Ridge, ``1 / C`` of the logistic
            regression.
        controls: Control tasks that are averaged; 0 runs none.
        permutations: Of the labels, for the p-value; each takes as long as the probes themselves.
        seed: Of folds, control labels and permutations.

    Returns:
        A `ProbeResult`.

    Raises:
        InputError: labels, groups or types do not fit the examples, or are too few.
    """
    rows = rows_of(activations, layers, read=read, site=site, head=head)
    plan = make_plan(
        labels, len(rows.values), task=task, groups=groups, types=types, folds=folds,
        penalty=penalty, controls=controls, permutations=permutations, seed=seed,
    )  # fmt: skip
    return _Study(rows, plan).result()


# --- One fold -------------------------------------------------------------------------------------


class Fold:
    """Standardised examples of one layer and one split, ready to be fitted to any labels.

    Args:
        x: Activations ``[example, feature]``, float64, as exact as float32. Those that differ by no
            more than rounding (`activation_rows.varies`) count as equal.
        split: Indices of the training and the test examples.
    """

    def __init__(self, x: np.ndarray, split: Split) -> None:
        self.train, self.test = split
        part = x[self.train]
        self._mean, deviation = part.mean(0), part.std(0)
        tiny = 1e-9 * np.abs(part).max(0)  # rounding of a feature that does not vary
        varied = (deviation > tiny) & varies(part.astype(np.float32))
        self._scale = np.where(varied, deviation, 1.0)
        known = np.where(varied, (part - self._mean) / self._scale, 0.0)
        asked = np.where(varied, (x[self.test] - self._mean) / self._scale, 0.0)
        self._back: np.ndarray | None = None
        if known.shape[1] > len(known):
            u, s, self._back = np.linalg.svd(known, full_matrices=False)
            known, asked = u * s, asked @ self._back.T
        self._known, self._asked = known, asked

    def predict(self, labels: np.ndarray, task: str, penalty: float) -> np.ndarray:
        """Fit to the training examples' labels (``[example]``, of all); ``[test]`` predictions."""
        wanted = labels[self.train]
        if task == CLASSIFICATION and (wanted == wanted[0]).all():
            return np.full(len(self.test), wanted[0])
        return _estimator(task, penalty).fit(self._known, wanted).predict(self._asked)

    def probe(self, labels: np.ndarray, task: str, penalty: float) -> tuple[np.ndarray, np.ndarray]:
        """Weights ``[class, feature]`` and intercepts ``[class]`` for activations as they are."""
        fitted = _estimator(task, penalty).fit(self._known, labels[self.train])
        weights, intercepts = np.atleast_2d(fitted.coef_), np.atleast_1d(fitted.intercept_)
        if task == CLASSIFICATION and len(weights) == 1:  # of two classes only the difference
            weights = np.concatenate([-weights, weights]) / 2
            intercepts = np.concatenate([-intercepts, intercepts]) / 2
        weights = (weights if self._back is None else weights @ self._back) / self._scale
        return weights, intercepts - weights @ self._mean


def _estimator(task: str, penalty: float) -> Any:
    from sklearn.linear_model import LogisticRegression, Ridge

    if task == REGRESSION:
        return Ridge(alpha=penalty)
    return LogisticRegression(C=1 / penalty, max_iter=ITERATIONS)


def held_out(
    folds: Sequence[Fold], labels: np.ndarray, task: str, penalty: float
) -> tuple[np.ndarray, np.ndarray, float]:
    """Predict every example by the probe that did not see it.

    Args:
        folds: Of one layer; their test parts are all examples, each once.
        labels: ``[example]``.
        task: ``classification`` or ``regression``.
        penalty: See `fit_probes`.

    Returns:
        Predictions ``[example]``, the score of each fold, and the score over all.
    """
    found = np.empty(len(labels))
    lost, spread = np.empty(len(labels)), np.empty(len(labels))
    for fold in folds:
        test = fold.test
        found[test] = fold.predict(labels, task, penalty)
        if task == CLASSIFICATION:
            lost[test], spread[test] = found[test] != labels[test], 1.0
        else:
            lost[test] = (found[test] - labels[test]) ** 2
            spread[test] = (labels[fold.train].mean() - labels[test]) ** 2
    each = [1 - lost[fold.test].sum() / max(spread[fold.test].sum(), 1e-300) for fold in folds]
    return found, np.array(each), float(1 - lost.sum() / spread.sum())


# --- The study ------------------------------------------------------------------------------------


def _types(rows: ActivationRows, plan: ProbePlan) -> np.ndarray:
    """``[example]``: the type of each, for the control task."""
    if plan.types is not None:
        return plan.types
    if "" in rows.tokens or len(rows.tokens) != len(rows.values):
        raise InputError("types='token' needs one token per example: give names instead")
    found = numbered(list(rows.tokens))[0]
    if plan.controls:
        check_types(found)
    return found


class _Study:
    """Probes every layer, with its controls."""

    def __init__(self, rows: ActivationRows, plan: ProbePlan) -> None:
        self.rows, self.plan = rows, plan
        self.rng = np.random.default_rng(plan.seed)
        self.types = _types(rows, plan)

    def result(self) -> ProbeResult:
        """Run everything, layer by layer."""
        plan, rows = self.plan, self.rows
        controls = [plan.control_labels(self.types, self.rng) for _ in range(plan.controls)]
        permuted = [plan.permuted(self.rng) for _ in range(plan.permutations)]
        parts: dict[str, list[Any]] = {}
        hidden = not sys.stderr.isatty()
        for place in tqdm(range(len(rows.layers)), desc="probe", unit="layer", disable=hidden):
            x = rows.values[:, place].astype(np.float64)
            for name, value in self._layer(x, controls, permuted).items():
                parts.setdefault(name, []).append(value)
        arrays: Any = {name: np.array(values) for name, values in parts.items()}
        return ProbeResult(
            **arrays, labels=plan.labels.astype(float), layers=rows.layers, classes=plan.classes,
            task=plan.task, site=rows.site, head=rows.head,
            n_groups=0 if plan.groups is None else len(set(plan.groups)),
            n_types=len(set(self.types)), penalty=plan.penalty, seed=plan.seed, model=rows.model,
        )  # fmt: skip

    def _layer(
        self,
        x: np.ndarray,
        control_labels: list[np.ndarray],
        permuted: list[tuple[np.ndarray, list[Split]]],
    ) -> dict[str, Any]:
        plan = self.plan
        how: Any = (plan.task, plan.penalty)
        folds = [Fold(x, split) for split in plan.splits]
        shared = folds
        if plan.groups is not None:
            shared = [Fold(x, split) for split in plan.shared_splits]
        predictions, each, score = held_out(folds, plan.labels, *how)
        controls = [held_out(shared, labels, *how)[2] for labels in control_labels]
        null = []
        for labels, splits in permuted:
            anew = folds if splits is plan.splits else [Fold(x, split) for split in splits]
            null.append(held_out(anew, labels, *how)[2])
        everything = np.arange(len(x))
        weights, intercepts = Fold(x, (everything, everything)).probe(plan.labels, *how)
        return {
            "scores": score,
            "fold_scores": each,
            "shared_scores": score if shared is folds else held_out(shared, plan.labels, *how)[2],
            "control": np.mean(controls) if controls else np.nan,
            "null": np.array(null),
            "predictions": predictions,
            "weights": weights,
            "intercepts": intercepts,
            "means": self._means(x),
        }

    def _means(self, x: np.ndarray) -> np.ndarray:
        if not self.plan.classes:
            return x.mean(0, keepdims=True)
        labels = self.plan.labels
        return np.stack([x[labels == place].mean(0) for place in range(len(self.plan.classes))])
