"""What a study of probes is asked for: labels, groups, types and folds, checked before it runs.

`make_plan` brings labels into numbers and refuses what cannot be measured; `ProbePlan` holds them,
with what follows from them: the folds, the labels of control tasks, and permuted labels.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Set
from dataclasses import dataclass
from functools import cached_property
from numbers import Real
from typing import Any

import numpy as np

from forward_pass import InputError
from probe_result import CLASSIFICATION, REGRESSION

Split = tuple[np.ndarray, np.ndarray]
"""Indices of training and test examples."""


@dataclass(frozen=True, eq=False)
class ProbePlan:
    """What a study is asked for, checked (`make_plan`)."""

    task: str
    labels: np.ndarray
    """``[example]``: indices into ``classes``, or numbers."""
    classes: tuple[Any, ...]
    groups: np.ndarray | None
    """``[example]``, indices."""
    types: np.ndarray | None
    """``[example]``, indices; None where the tokens are to be taken."""
    folds: int
    penalty: float
    controls: int
    permutations: int
    seed: int

    @property
    def baseline(self) -> float:
        """Score without looking: the share of the largest class; 0 for a regression."""
        return float(np.bincount(self.labels).max() / len(self.labels)) if self.classes else 0.0

    def score(self, predictions: np.ndarray) -> np.ndarray:
        """Accuracy, or R², of held-out predictions ``[example, …]``, one per entry: ``[…]``."""
        labels = self.labels.reshape(-1, *[1] * (predictions.ndim - 1))
        if self.classes:
            return (predictions == labels).mean(0)
        rest = np.concatenate([self.labels[b] - self.labels[a].mean() for a, b in self.splits])
        return 1 - ((predictions - labels) ** 2).sum(0) / (rest**2).sum()

    @cached_property
    def splits(self) -> list[Split]:
        """The folds, groups kept whole; each training part knows every class.

        Raises:
            InputError: it cannot be had.
        """
        found = self._split(self.groups, self.labels)
        for train, test in found:
            lost = sorted(set(self.labels[test]) - set(self.labels[train])) if self.classes else []
            if lost or not len(test):
                what = f"class {self.classes[int(lost[0])]!r}" if lost else "a fold"
                raise InputError(
                    f"with {self.folds} folds {what} would be tested without training examples: "
                    "give more groups of each class, or another number of folds"
                )
        return found

    @cached_property
    def shared_splits(self) -> list[Split]:
        """The folds without regard to groups."""
        return self.splits if self.groups is None else self._split(None, self.labels)

    def control_labels(self, types: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """``[example]``: labels at random, the same for all examples of a type.

        Where each type has one label these are shuffled among types, so that classes keep their
        number of types; else each type gets that of an example drawn at random. Of classes there
        are at least two.
        """
        first, place = np.unique(types, return_index=True, return_inverse=True)[1:]
        own = self.labels[first]
        while True:
            pure = bool((own[place] == self.labels).all())
            given = rng.permutation(own if pure else self.labels)[: len(first)]
            if not self.classes or np.ptp(given):
                return given[place]

    def permuted(self, rng: np.random.Generator) -> tuple[np.ndarray, list[Split]]:
        """Labels as likely as the true ones if activations say nothing of them, and their folds.

        Folds are stratified by the labels, so they go with them. Without groups, classes change
        places within each fold, which leaves it as it is. With groups of one label each, whole
        groups change labels and new folds are made; else labels change within groups.
        """
        labels = self.labels
        if self.groups is None and not self.classes:
            return rng.permutation(labels), self.splits
        units = self.groups
        if units is None:
            units = np.empty(len(labels), dtype=int)
            for number, (_, test) in enumerate(self.splits):
                units[test] = number
        first, place = np.unique(units, return_index=True, return_inverse=True)[1:]
        if self.groups is not None and (labels[first][place] == labels).all():
            found = rng.permutation(labels[first])[place]
            return found, self._split(self.groups, found)
        found = labels.copy()
        for unit in range(len(first)):
            found[place == unit] = rng.permutation(labels[place == unit])
        return found, self.splits

    def _split(self, groups: np.ndarray | None, labels: np.ndarray) -> list[Split]:
        from sklearn.model_selection import (
            GroupKFold,
            KFold,
            StratifiedGroupKFold,
            StratifiedKFold,
        )

        makers = {
            (CLASSIFICATION, False): StratifiedKFold,
            (CLASSIFICATION, True): StratifiedGroupKFold,
            (REGRESSION, False): KFold,
            (REGRESSION, True): GroupKFold,
        }
        maker: Any = makers[self.task, groups is not None]
        splitter = maker(self.folds, shuffle=True, random_state=self.seed)
        return list(splitter.split(labels[:, None], labels, groups))


def make_plan(
    labels: Any,
    count: int,
    *,
    task: str = "auto",
    groups: Any = None,
    types: Any = None,
    folds: int = 5,
    penalty: float = 1.0,
    controls: int = 3,
    permutations: int = 0,
    seed: int = 0,
) -> ProbePlan:
    """Bring what a study is asked for into its types, and refuse what cannot be measured.

    Args:
        labels: See `fit_probes`, here and below.
        count: Number of examples.
        task: As there.
        groups: As there.
        types: As there.
        folds: As there.
        penalty: As there.
        controls: As there.
        permutations: As there.
        seed: As there.

    Raises:
        InputError: they do not fit the examples, or are too few.
    """
    given = _column(labels, count, "labels")
    kind = _task_of(given, task)
    for name, value, least in (
        ("folds", folds, 2), ("controls", controls, 0), ("permutations", permutations, 0),
        ("seed", seed, 0),
    ):  # fmt: skip
        if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < least:
            raise InputError(f"{name} must be an integer, at least {least}; came {value!r}")
    if isinstance(penalty, bool) or not isinstance(penalty, Real) or not 0 < penalty < math.inf:
        raise InputError(f"penalty must be a finite number above 0; came {penalty!r}")
    group_ids = None if groups is None else numbered(_column(groups, count, "groups"))[0]
    if kind == REGRESSION:
        numbers, classes = _numbers(given), ()
    else:
        numbers, classes = numbered(given)
    _check_counts(numbers, classes, group_ids, folds)
    if isinstance(types, str) and types == "token":
        type_ids = None
    elif types is not None:
        type_ids = numbered(_column(types, count, "types"))[0]
    else:
        type_ids = np.arange(count) if group_ids is None else group_ids
    if controls and type_ids is not None:
        check_types(type_ids)
    return ProbePlan(
        kind, numbers, classes, group_ids, type_ids, int(folds), float(penalty), int(controls),
        int(permutations), int(seed),
    )  # fmt: skip


def check_types(types: np.ndarray) -> None:
    """Refuse types that are all the same.

    Raises:
        InputError: they are.
    """
    if not np.ptp(types):
        raise InputError(
            "all examples are of one type, so a control task cannot label types at random: give "
            "types=, or controls=0"
        )


def _column(values: Any, count: int, name: str) -> list[Any]:
    """One plain value per example.

    Raises:
        InputError: there is none for each, one is missing (NaN, None), or holds several.
    """
    ordered = hasattr(values, "__len__") and not isinstance(values, str | Mapping | Set)
    if not ordered or getattr(values, "ndim", 1) == 0:
        raise InputError(f"{name} is a list with one entry per example; came {values!r:.60}")
    plain = values.tolist() if hasattr(values, "tolist") else list(values)
    if len(plain) != count:
        raise InputError(f"{name} has {len(plain)} entries for {count} examples; give one for each")
    found = [_plain(each) for each in plain]
    for place, each in enumerate(found):
        if hasattr(each, "item") or not isinstance(each, Hashable):
            raise InputError(f"{name}[{place}] must be one value, not several; came {each!r:.60}")
        if each is None or each != each:
            raise InputError(f"{name}[{place}] is missing ({each}): leave such examples out")
    return found


def _plain(value: Any) -> Any:
    """A number of any library as Python's own; what holds several as it is."""
    try:
        return value.item() if hasattr(value, "item") else value
    except (ValueError, RuntimeError):
        return value


def _task_of(labels: list[Any], task: str) -> str:
    if task == "auto":
        task = REGRESSION if all(type(x) is float for x in labels) else CLASSIFICATION
        if task == CLASSIFICATION and len(set(map(repr, labels))) > max(len(labels) // 2, 2):
            raise InputError(
                f"{len(labels)} examples have {len(set(map(repr, labels)))} different labels: for "
                "numbers say task='regression', for classes give several examples of each"
            )
    if task not in (CLASSIFICATION, REGRESSION):
        raise InputError(f"task is 'auto', {CLASSIFICATION!r} or {REGRESSION!r}; came {task!r}")
    return task


def _numbers(labels: list[Any]) -> np.ndarray:
    try:
        found = np.array(labels, dtype=float)
    except (TypeError, ValueError):
        raise InputError(f"a regression needs numbers as labels; came {labels[0]!r}") from None
    if not np.isfinite(found).all() or np.ptp(found) == 0:
        raise InputError("a regression needs finite labels that are not all the same")
    return found


def numbered(values: list[Any]) -> tuple[np.ndarray, tuple[Any, ...]]:
    """Each value's place among the different ones, and these in order."""
    try:
        different = sorted(set(values))
    except TypeError:
        different = sorted(set(values), key=lambda value: (type(value).__name__, str(value)))
    places = {value: place for place, value in enumerate(different)}
    return np.array([places[value] for value in values]), tuple(different)


def _check_counts(
    labels: np.ndarray, classes: tuple[Any, ...], groups: np.ndarray | None, folds: int
) -> None:
    units = np.arange(len(labels)) if groups is None else groups
    name = "examples" if groups is None else "groups"
    if len(set(units)) < folds:
        raise InputError(f"{len(set(units))} {name} cannot be split into {folds} folds")
    if len(classes) == 1:
        raise InputError(f"all labels are {classes[0]!r}; a probe tells classes apart")
    for place, label in enumerate(classes):
        held, of_class = len(set(units[labels == place])), int((labels == place).sum())
        if held < 2 or of_class < folds:
            raise InputError(
                f"class {label!r} has {of_class} examples in {held} {name}: for {folds} folds give "
                f"at least {folds} examples{'' if groups is None else ' in 2 groups'}, or fewer "
                "folds"
            )
