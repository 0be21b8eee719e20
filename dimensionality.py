"""Many dimensions to two or three: PCA, t-SNE and UMAP, and how much of the distances is left.

    reduce_dimensions   embeddings in, coordinates out
    fit_reduction       the same with what was fitted: projects new points, states what it kept

1. The points are checked: NaN, a single point or identical points get a clear error.
2. ``perplexity`` or ``n_neighbors`` is lowered, with a warning, where there are too few points.
3. The library's own estimator is fitted with a fixed seed (``random_state=`` overrides it).

What was kept is stated by two numbers that hold for every method. `Reduction.trustworthiness`
(Venna & Kaski 2001): whether neighbours in the picture are neighbours in the data, 1 at best.
`Reduction.distance_correlation`: Spearman's ρ between all distances before and after. Both are
measured on at most `MEASURED` points. PCA also knows the variance that each axis explains.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

METHODS = {"pca": "PCA", "tsne": "t-SNE", "umap": "UMAP"}

SEED = 0

MEASURED = 1000
"""On at most so many points, drawn with the fixed seed, is it measured what a reduction kept."""

NEIGHBORS = 5
"""Neighbours that `Reduction.trustworthiness` asks for (fewer where there are few points)."""


@dataclass(frozen=True, eq=False)
class Reduction:
    """Points in few dimensions, and what made them."""

    coordinates: np.ndarray
    """``[point, component]``."""
    method: str
    """``"pca"``, ``"tsne"`` or ``"umap"``."""
    reducer: Any
    """The fitted estimator of scikit-learn or umap."""
    explained_variance: np.ndarray | None
    """``[component]``, PCA's share of the variance along each axis, 0 to 1; None for the others."""
    settings: Mapping[str, Any]
    """What the estimator was made with: asked for, or lowered to fit."""
    source: np.ndarray = field(repr=False)
    """``[point, feature]``, the points as they came."""

    def __repr__(self) -> str:
        count, components = self.coordinates.shape
        return f"Reduction({METHODS[self.method]}, {count} points to {components} dimensions)"

    def project(self, points: Any) -> np.ndarray:
        """Put further points into the same picture, which stays as it is.

        Args:
            points: ``[point, feature]``, array or tensor.

        Returns:
            ``[point, component]``.

        Raises:
            ValueError: the method cannot (t-SNE), the width differs, or there is a NaN.
        """
        if not hasattr(self.reducer, "transform"):
            raise ValueError(
                f"{METHODS[self.method]} cannot place new points: it has no map, only coordinates; "
                "fit all points together, or use method='pca' or 'umap'"
            )
        table = as_points(points)
        if table.shape[1] != self.source.shape[1]:
            raise ValueError(f"the fit has {self.source.shape[1]} features; came {table.shape[1]}")
        with _quiet():
            return np.asarray(self.reducer.transform(table))

    def axis_labels(self) -> list[str]:
        """One name per axis; PCA's with the share of the variance."""
        names = {"pca": "PC ", "tsne": "t-SNE ", "umap": "UMAP "}
        count = self.coordinates.shape[1]
        labels = [f"{names[self.method]}{i + 1}" for i in range(count)]
        if self.explained_variance is None:
            return labels
        shares = self.explained_variance
        return [f"{a} ({share:.1%} of variance)" for a, share in zip(labels, shares, strict=True)]

    @cached_property
    def _measured(self) -> np.ndarray:
        count = len(self.source)
        if count <= MEASURED:
            return np.arange(count)
        return np.sort(np.random.default_rng(SEED).choice(count, MEASURED, replace=False))

    @cached_property
    def trustworthiness(self) -> float:
        """Are neighbours in the picture neighbours in the data: 1 all, about 0.5 by chance.

        NaN with fewer than 4 points. Of more than `MEASURED` points, only so many are looked at.
        """
        from sklearn.manifold import trustworthiness

        chosen = self._measured
        neighbors = min(NEIGHBORS, (len(chosen) - 1) // 2)
        if len(chosen) < 4:
            return float("nan")
        points, places = self.source[chosen], self.coordinates[chosen]
        return float(trustworthiness(points, places, n_neighbors=neighbors))

    @cached_property
    def distance_correlation(self) -> float:
        """Spearman's ρ between all pairs' distances before and after: 1 keeps their order.

        NaN with fewer than 3 points. Of more than `MEASURED` points, only so many are looked at.
        """
        from scipy.spatial.distance import pdist
        from scipy.stats import rankdata

        chosen = self._measured
        before, after = (rankdata(pdist(t[chosen])) for t in (self.source, self.coordinates))
        if len(before) < 3 or np.ptp(before) == 0 or np.ptp(after) == 0:
            return float("nan")
        return float(np.corrcoef(before, after)[0, 1])

    def kept(self) -> str:
        """What was kept, as a caption: neighbours (trustworthiness), distances (Spearman's ρ)."""
        if len(self.coordinates) < 4:
            return ""
        return (
            f"neighbours kept {self.trustworthiness:.2f} (trustworthiness), "
            f"distances ρ = {self.distance_correlation:.2f}"
        )


def reduce_dimensions(
    embeddings: Any, method: str = "pca", n_components: int = 2, **kwargs: Any
) -> np.ndarray:
    """Reduce points to few dimensions.

    Args:
        embeddings: ``[point, feature]``, array or tensor.
        method: ``"pca"``, ``"tsne"`` or ``"umap"``.
        n_components: Dimensions wanted.
        **kwargs: The estimator's own arguments (`sklearn.decomposition.PCA`,
            `sklearn.manifold.TSNE`, `umap.UMAP`); ``n_iter`` is taken for t-SNE's ``max_iter``.
            ``random_state`` is 0.

    Returns:
        ``[point, n_components]``.

    Raises:
        ValueError: there is no such method, too few points, or a value is missing.
    """
    return fit_reduction(embeddings, method, n_components, **kwargs).coordinates


def fit_reduction(
    embeddings: Any, method: str = "pca", n_components: int = 2, **kwargs: Any
) -> Reduction:
    """Reduce points to few dimensions and keep what was fitted.

    Args:
        embeddings: ``[point, feature]``, array or tensor.
        method: ``"pca"``, ``"tsne"`` or ``"umap"``.
        n_components: Dimensions wanted.
        **kwargs: As for `reduce_dimensions`.

    Returns:
        The `Reduction`.

    Raises:
        ValueError: there is no such method, too few points, or a value is missing.
    """
    if method not in METHODS:
        raise ValueError(f"method={method!r} is not known; use {', '.join(map(repr, METHODS))}")
    points = as_points(embeddings)
    _check(points, method, n_components)
    make = {"pca": _pca, "tsne": _tsne, "umap": _umap}[method]
    reducer, settings = make(points, n_components, {"random_state": SEED, **kwargs})
    with _quiet():
        coordinates = np.asarray(reducer.fit_transform(points))
    shares = getattr(reducer, "explained_variance_ratio_", None)
    return Reduction(coordinates, method, reducer, shares, settings, points)


def as_points(embeddings: Any) -> np.ndarray:
    """An array or tensor as ``[point, feature]`` in float32 or float64.

    Raises:
        ValueError: it has other axes, is empty, or a value is NaN or infinite.
    """
    if hasattr(embeddings, "detach"):  # a tensor, on any device; numpy has no bfloat16
        embeddings = embeddings.detach().cpu()
        if "16" in str(embeddings.dtype):
            embeddings = embeddings.float()
    points = np.asarray(embeddings)
    if points.ndim != 2 or not points.size:
        raise ValueError(f"embeddings must be [point, feature]; they are {list(points.shape)}")
    if points.dtype != np.float32:
        points = points.astype(np.float64)
    bad = ~np.isfinite(points).all(1)
    if bad.any():
        first = int(bad.argmax())
        raise ValueError(
            f"{int(bad.sum())} points hold NaN or infinity; the first is point {first}"
        )
    return points


def _check(points: np.ndarray, method: str, n_components: int) -> None:
    """Refuse what no method can reduce, and what this one cannot."""
    count, features = points.shape
    name = METHODS[method]
    if n_components < 1:
        raise ValueError(f"n_components must be at least 1; came {n_components}")
    least = n_components if method == "pca" else n_components + 1
    least = max(least, 3 if method == "umap" else 2)
    if count < least:
        raise ValueError(
            f"{name} to {n_components} dimensions needs at least {least} points; came {count}"
        )
    if method == "pca" and features < n_components:
        raise ValueError(f"PCA finds at most {features} components in {features} features")
    if (points == points[0]).all():
        raise ValueError(f"all {count} points are the same: there is nothing to lay out")


def _pca(
    points: np.ndarray, n_components: int, given: dict[str, Any]
) -> tuple[Any, dict[str, Any]]:
    from sklearn.decomposition import PCA

    count, features = points.shape
    # Both are exact. The covariance is the quick way through many points, such as a vocabulary.
    solver = "covariance_eigh" if count > 10 * features and features <= 2000 else "full"
    if min(count, features) > 2000:
        solver = "randomized"
    settings = {"svd_solver": solver, **given}
    return PCA(n_components, **settings), settings


def _tsne(
    points: np.ndarray, n_components: int, given: dict[str, Any]
) -> tuple[Any, dict[str, Any]]:
    from sklearn.manifold import TSNE

    count = len(points)
    if "n_iter" in given:
        if "max_iter" in given:
            raise ValueError("n_iter and max_iter mean the same; give one")
        given = {**given, "max_iter": given["n_iter"]}
        del given["n_iter"]
    # Each point looks at about three times as many neighbours as the perplexity says.
    most = max(1.0, (count - 1) / 3)
    settings = {"perplexity": 30.0, "init": "pca", **given}
    settings["perplexity"] = _lowered("perplexity", settings["perplexity"], count, most)
    if min(points.shape) < n_components and settings["init"] == "pca":
        settings["init"] = "random"
    if n_components > 3:
        settings.setdefault("method", "exact")  # the other knows at most 3 dimensions
    return TSNE(n_components, **settings), settings


def _umap(
    points: np.ndarray, n_components: int, given: dict[str, Any]
) -> tuple[Any, dict[str, Any]]:
    UMAP = _umap_class()
    count = len(points)
    settings = {"n_neighbors": 15, **given}
    settings["n_neighbors"] = _lowered("n_neighbors", settings["n_neighbors"], count, count - 1)
    if settings["random_state"] is not None:
        settings.setdefault("n_jobs", 1)  # a seed allows no more, and it would warn
    if count <= n_components + 2:
        settings.setdefault("init", "random")  # there are too few points for its spectral start
    return UMAP(n_components=n_components, **settings), settings


def _umap_class() -> Any:
    with warnings.catch_warnings():
        # It says on import that its variant on TensorFlow, which is not used, is not there.
        warnings.filterwarnings("ignore", "Tensorflow not installed", ImportWarning)
        import umap
    return umap.UMAP


def _lowered(name: str, value: float, count: int, most: float) -> float:
    """A setting that must stay below the number of points."""
    if value < count:
        return value
    warnings.warn(
        f"{name}={value:g} is lowered to {most:g}: there are only {count} points",
        UserWarning,
        stacklevel=_levels_out(),
    )
    return most


def _levels_out() -> int:
    """How far out the first caller is that lies in another file: a warning points there."""
    import sys

    level, frame = 1, sys._getframe(1)
    while frame.f_back is not None and frame.f_code.co_filename == __file__:
        level, frame = level + 1, frame.f_back
    return level


class _quiet(warnings.catch_warnings):
    """While open, hide two notes that say nothing about the result; all other warnings stay."""

    def __enter__(self) -> None:
        super().__enter__()
        # On its spectral start with few points, before it does the same another way.
        warnings.filterwarnings("ignore", r"k >= N for N \* N square matrix", RuntimeWarning)
        warnings.filterwarnings("ignore", "Tensorflow not installed", ImportWarning)
