"""Reductions against formulas written out again: SVD, trustworthiness, rank correlation."""

import warnings

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr

import dimensionality
from dimensionality import fit_reduction, reduce_dimensions

POINTS = np.random.default_rng(0).normal(size=(40, 8)) * np.arange(8, 0, -1)

UMAP = pytest.param("umap", marks=pytest.mark.slow)  # it compiles for half a minute
ALL = ("pca", "tsne", UMAP)


def distances(points):
    """Return all distances of pairs, by definition."""
    first, second = np.triu_indices(len(points), 1)
    return np.linalg.norm(points[first] - points[second], axis=1)


@pytest.mark.parametrize("shape", [(40, 8), (6, 30), (500, 4)])
@pytest.mark.parametrize("components", [1, 2, 3])
def test_pca_is_the_singular_value_decomposition(shape, components):
    points = np.random.default_rng(1).normal(size=shape) @ np.diag(np.linspace(3, 1, shape[1]))
    reduction = fit_reduction(points, "pca", components)
    u, s, _ = np.linalg.svd(points - points.mean(0), full_matrices=False)
    expected = (u * s)[:, :components]
    signs = np.sign((expected * reduction.coordinates).sum(0))
    np.testing.assert_allclose(reduction.coordinates, expected * signs, atol=1e-8)
    shares = (s**2 / (s**2).sum())[:components]
    np.testing.assert_allclose(reduction.explained_variance, shares, atol=1e-10)
    labels = [f"PC {i + 1} ({share:.1%} of variance)" for i, share in enumerate(shares)]
    assert reduction.axis_labels() == labels


def test_projecting_the_points_of_the_fit_gives_their_coordinates():
    reduction = fit_reduction(POINTS)
    np.testing.assert_allclose(reduction.project(POINTS), reduction.coordinates, atol=1e-9)
    middle = reduction.project((POINTS[:1] + POINTS[1:2]) / 2)
    np.testing.assert_allclose(middle[0], reduction.coordinates[:2].mean(0), atol=1e-9)


@pytest.mark.slow
def test_umap_projects_the_points_of_the_fit_onto_themselves():
    reduction = fit_reduction(POINTS, "umap")
    np.testing.assert_allclose(reduction.project(POINTS), reduction.coordinates, atol=1e-5)


def test_tsne_cannot_project():
    with pytest.raises(ValueError, match=r"t-SNE cannot place new points.*'pca' or 'umap'"):
        fit_reduction(POINTS, "tsne", max_iter=250).project(POINTS)


def test_a_projection_needs_the_same_features():
    with pytest.raises(ValueError, match="the fit has 8 features; came 3"):
        fit_reduction(POINTS).project(np.zeros((2, 3)))


@pytest.mark.parametrize("method", ALL)
def test_the_seed_is_fixed_and_can_be_changed(method):
    first, second = (reduce_dimensions(POINTS, method) for _ in range(2))
    assert np.array_equal(first, second)
    assert first.shape == (40, 2)
    if method != "pca":
        other = reduce_dimensions(POINTS, method, random_state=5, init="random")
        assert not np.allclose(first, other)


@pytest.mark.parametrize("method", ALL)
def test_two_groups_far_apart_stay_apart(method):
    random = np.random.default_rng(3)
    points = random.normal(size=(40, 6))
    points[20:] += 30
    places = reduce_dimensions(points, method)
    gap = np.linalg.norm(places[:20].mean(0) - places[20:].mean(0))
    width = max(np.linalg.norm(p - p.mean(0), axis=1).mean() for p in (places[:20], places[20:]))
    assert gap > 2 * width


@pytest.mark.parametrize("method", ALL)
@pytest.mark.parametrize("count", [3, 4, 5])
def test_a_few_points_are_laid_out_and_the_warning_says_how(method, count):
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        places = reduce_dimensions(POINTS[:count], method)
    assert places.shape == (count, 2)
    assert np.isfinite(places).all()
    messages = [str(w.message) for w in seen]
    if method == "tsne":
        lowered = max(1, (count - 1) / 3)
        assert messages == [
            f"perplexity=30 is lowered to {lowered:g}: there are only {count} points"
        ]
    elif method == "umap":
        assert messages == [
            f"n_neighbors=15 is lowered to {count - 1}: there are only {count} points"
        ]
    else:
        assert messages == []
    assert all(w.category is UserWarning and w.filename == __file__ for w in seen)


@pytest.mark.parametrize(("asked", "used"), [(39, 39), (40, 13), (100, 13)])
def test_perplexity_is_lowered_only_where_the_library_would_refuse_it(asked, used):
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        reduction = fit_reduction(POINTS, "tsne", perplexity=asked, max_iter=250)
    assert reduction.settings["perplexity"] == used
    assert len(seen) == (used != asked)


def test_n_iter_is_max_iter():
    by_old_name = fit_reduction(POINTS, "tsne", n_iter=260)
    assert by_old_name.reducer.max_iter == 260
    assert np.array_equal(by_old_name.coordinates, reduce_dimensions(POINTS, "tsne", max_iter=260))
    with pytest.raises(ValueError, match="n_iter and max_iter mean the same"):
        reduce_dimensions(POINTS, "tsne", n_iter=260, max_iter=260)


@pytest.mark.slow
def test_umap_takes_its_own_arguments():
    reduction = fit_reduction(POINTS, "umap", 3, n_neighbors=20, min_dist=0.05)
    assert reduction.coordinates.shape == (40, 3)
    assert (reduction.reducer.n_neighbors, reduction.reducer.min_dist) == (20, 0.05)
    assert reduction.axis_labels() == ["UMAP 1", "UMAP 2", "UMAP 3"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_tensors_are_taken(dtype):
    tensor = torch.tensor(POINTS).to(dtype).requires_grad_()
    expected = reduce_dimensions(tensor.detach().double().numpy())
    np.testing.assert_allclose(reduce_dimensions(tensor), expected, atol=1e-4)


@pytest.mark.parametrize(
    ("points", "options", "message"),
    [
        (np.array([[1, np.nan], [1, 2], [np.inf, 0]]), {}, "2 points .* first is point 0"),
        (POINTS[:1], {}, "PCA to 2 dimensions needs at least 2 points; came 1"),
        (POINTS[:1], {"method": "tsne"}, "t-SNE to 2 dimensions needs at least 3 points; came 1"),
        (POINTS[:2], {"method": "umap"}, "UMAP to 2 dimensions needs at least 3 points; came 2"),
        (POINTS[:2], {"n_components": 3}, "PCA to 3 dimensions needs at least 3 points; came 2"),
        (POINTS[:, :2], {"n_components": 3}, "PCA finds at most 2 components in 2 features"),
        (POINTS, {"n_components": 0}, "n_components must be at least 1"),
        (POINTS, {"method": "lda"}, "method='lda' is not known; use 'pca', 'tsne', 'umap'"),
        (np.ones((4, 3)), {}, "all 4 points are the same"),
        (POINTS[0], {}, r"embeddings must be \[point, feature\]; they are \[8\]"),
    ],
)
def test_what_cannot_be_reduced_is_refused_clearly(points, options, message):
    with pytest.raises(ValueError, match=message):
        reduce_dimensions(points, **options)


def test_trustworthiness_follows_its_formula():
    reduction = fit_reduction(POINTS)
    n, k = 40, 5
    before, after = (
        np.linalg.norm(p[:, None] - p[None], axis=-1) for p in (POINTS, reduction.coordinates)
    )
    rank = np.argsort(np.argsort(before, 1), 1)
    penalty = 0
    for i in range(n):
        near = np.argsort(after[i])[1 : k + 1]
        penalty += sum(max(0, rank[i, j] - k) for j in near)
    expected = 1 - 2 / (n * k * (2 * n - 3 * k - 1)) * penalty
    assert reduction.trustworthiness == pytest.approx(expected)


def test_the_distance_correlation_is_spearmans():
    reduction = fit_reduction(POINTS)
    expected = spearmanr(distances(POINTS), distances(reduction.coordinates)).statistic
    assert reduction.distance_correlation == pytest.approx(expected)
    assert f"ρ = {expected:.2f}" in reduction.kept()


def test_a_flat_cloud_is_kept_whole():
    turn = np.linalg.qr(np.random.default_rng(0).normal(size=(6, 6)))[0]
    flat = np.random.default_rng(1).normal(size=(30, 2)) @ turn[:2]
    reduction = fit_reduction(flat)
    assert reduction.trustworthiness == pytest.approx(1)
    assert reduction.distance_correlation == pytest.approx(1)
    assert reduction.explained_variance.sum() == pytest.approx(1)


def test_few_points_have_no_measure():
    reduction = fit_reduction(POINTS[:3])
    assert np.isnan(reduction.trustworthiness)
    assert reduction.kept() == ""
    assert np.isnan(fit_reduction(POINTS[:2], n_components=1).distance_correlation)


def test_many_points_are_measured_on_some_of_them(monkeypatch):
    whole = fit_reduction(POINTS).distance_correlation
    monkeypatch.setattr(dimensionality, "MEASURED", 20)
    part = fit_reduction(POINTS)
    assert len(part._measured) == 20
    assert part.distance_correlation != whole
    assert part.distance_correlation == fit_reduction(POINTS).distance_correlation


def test_the_points_are_left_as_they_were_and_the_repr_is_short():
    before = POINTS.copy()
    reduction = fit_reduction(POINTS, "tsne", max_iter=250)
    assert np.array_equal(POINTS, before)
    assert repr(reduction) == "Reduction(t-SNE, 40 points to 2 dimensions)"
