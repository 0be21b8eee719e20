"""Embeddings and activations as points: reduced, compared, and followed through the layers.

    plot_embeddings_2d, plot_embeddings_3d   embeddings by PCA, t-SNE or UMAP
    compare_reduction_methods                the three side by side
    plot_layer_embeddings                    each token's path through the layers, in one projection
    plot_layer_similarity                    how alike the layers are
    layer_similarity                         the same as numbers

They are found in `visualization` too, which states the rules that hold for every picture. They are
drawn by `embedding_figures` and `interactive_figures`, and reduced by `dimensionality`.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

import embedding_figures
import interactive_figures
from dimensionality import METHODS, Reduction, as_points, fit_reduction
from figure_canvas import axes_list, figure_of, finish, new_figure
from heat_maps import plot_similarity
from interactive_figures import finish_interactive
from token_labels import axis_labels, drawing

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from activation_record import ActivationRecord
    from model_architecture import Layer

SavePath = str | Path | None


def deliver(figure: Any, interactive: bool, save_path: SavePath, show: bool) -> Any:
    """Save, show and return a figure of either kind. See `figure_canvas.finish`."""
    return (finish_interactive if interactive else finish)(figure, save_path, show)


def refuse_axes(interactive: bool, axes: Any) -> None:
    """An interactive figure has no axes of the caller's.

    Raises:
        ValueError: both are asked for.
    """
    if interactive and axes is not None:
        raise ValueError("interactive=True draws its own figure; leave out ax and axes")


def plot_embeddings_2d(
    embeddings: Any,
    labels: Sequence[str] | None = None,
    colors: Any = None,
    method: str = "pca",
    title: str | None = None,
    figsize: tuple[float, float] = (8, 6.5),
    save_path: SavePath = None,
    show_labels: bool = True,
    *,
    interactive: bool = False,
    ax: Any = None,
    show: bool = False,
    **reduction_kwargs: Any,
) -> Any:
    """Draw embeddings as points in the plane.

    Args:
        embeddings: ``[point, feature]``, array or tensor.
        labels: One per point; fewer label the first points, with a warning.
        colors: One colour, or per point a colour, a number or the name of a group.
        method: ``"pca"``, ``"tsne"`` or ``"umap"``.
        title: None names the method.
        figsize: Of a figure made here, in inches.
        save_path: Save there, with the ending's format.
        show_labels: Write the labels (as many as have room).
        interactive: Return a plotly figure.
        ax: Where to draw; None makes a figure.
        show: Show it.
        **reduction_kwargs: See `dimensionality.reduce_dimensions`.

    Returns:
        The figure; below the points stands what the reduction kept.

    Raises:
        ValueError: the points cannot be reduced, or there are more labels than points.
    """
    reduction = fit_reduction(embeddings, method, 2, **reduction_kwargs)
    names = _checked(labels, reduction) if show_labels else None
    return _draw_points(
        reduction, names, colors, title, figsize, save_path, interactive, ax, show
    )  # fmt: skip


def plot_embeddings_3d(
    embeddings: Any,
    labels: Sequence[str] | None = None,
    colors: Any = None,
    method: str = "pca",
    title: str | None = None,
    figsize: tuple[float, float] = (9, 8),
    save_path: SavePath = None,
    show_labels: bool = True,
    *,
    interactive: bool = False,
    ax: Any = None,
    show: bool = False,
    **reduction_kwargs: Any,
) -> Any:
    """Draw embeddings as points in space.

    Args:
        embeddings: ``[point, feature]``, array or tensor.
        labels: One per point; fewer label the first points, with a warning.
        colors: One colour, or per point a colour, a number or the name of a group.
        method: ``"pca"``, ``"tsne"`` or ``"umap"``.
        title: None names the method.
        figsize: Of a figure made here, in inches.
        save_path: Save there, with the ending's format.
        show_labels: Write the labels (as many as have room).
        interactive: Return a plotly figure, which can be turned.
        ax: Where to draw, made with ``projection="3d"``; None makes a figure.
        show: Show it.
        **reduction_kwargs: See `dimensionality.reduce_dimensions`.

    Returns:
        The figure; in its corner stands what the reduction kept.

    Raises:
        ValueError: the points cannot be reduced, or there are more labels than points.
    """
    reduction = fit_reduction(embeddings, method, 3, **reduction_kwargs)
    names = _checked(labels, reduction) if show_labels else None
    return _draw_points(
        reduction, names, colors, title, figsize, save_path, interactive, ax, show
    )  # fmt: skip


def _checked(labels: Sequence[str] | None, reduction: Reduction) -> Sequence[str] | None:
    """Labels; a warning says it when they name only the first points."""
    count = len(reduction.coordinates)
    if labels is not None and len(labels) < count:
        warnings.warn(
            f"{len(labels)} labels for {count} points: they name the first {len(labels)}",
            UserWarning,
            stacklevel=3,
        )
    return labels


def _draw_points(
    reduction: Reduction,
    labels: Sequence[str] | None,
    colors: Any,
    title: str | None,
    figsize: tuple[float, float],
    save_path: SavePath,
    interactive: bool,
    ax: Any,
    show: bool,
) -> Any:
    refuse_axes(interactive, ax)
    options: dict[str, Any] = {"axis_labels": reduction.axis_labels(), "note": reduction.kept()}
    options["title"] = f"Embeddings ({METHODS[reduction.method]})" if title is None else title
    figure: Any
    if interactive:
        figure = interactive_figures.scatter(reduction.coordinates, labels, colors, **options)
    else:
        options |= {"ax": ax, "figsize": figsize}
        figure = embedding_figures.plot_scatter(reduction.coordinates, labels, colors, **options)
    return deliver(figure, interactive, save_path, show)


def compare_reduction_methods(
    embeddings: Any,
    labels: Sequence[str] | None = None,
    colors: Any = None,
    methods: Sequence[str] = ("pca", "tsne", "umap"),
    figsize: tuple[float, float] | None = None,
    save_path: SavePath = None,
    *,
    interactive: bool = False,
    axes: Any = None,
    show: bool = False,
) -> Any:
    """Draw the same points by several methods, side by side.

    Args:
        embeddings: ``[point, feature]``, array or tensor.
        labels: One per point; fewer label the first points, with a warning.
        colors: One colour, or per point a colour, a number or the name of a group.
        methods: Names of methods, one panel each.
        figsize: Of a figure made here, in inches; None is square panels.
        save_path: Save there, with the ending's format.
        interactive: Return a plotly figure.
        axes: One axes per method; None makes a figure.
        show: Show it.

    Returns:
        The figure; each panel says what its method kept.

    Raises:
        ValueError: there is no method, an unknown one, or the points cannot be reduced.
    """
    refuse_axes(interactive, axes)
    if not methods:
        raise ValueError(f"methods is empty; name some of {', '.join(METHODS)}")
    reductions = [fit_reduction(embeddings, method) for method in methods]
    _checked(labels, reductions[0])
    if interactive:
        titles = [f"{METHODS[r.method]}\n{r.kept()}" for r in reductions]
        points = [r.coordinates for r in reductions]
        figure = interactive_figures.comparison(points, titles, labels, colors)
        return deliver(figure, interactive, save_path, show)
    if axes is None:
        with drawing():
            figure = new_figure(figsize or (5.2 * len(methods), 5.2))
            axes = figure.subplots(1, len(methods))
    panels = axes_list(axes, len(methods))
    for ax, reduction in zip(panels, reductions, strict=True):
        embedding_figures.plot_scatter(
            reduction.coordinates, labels, colors,
            axis_labels=reduction.axis_labels(), note=reduction.kept(),
            title=METHODS[reduction.method], ax=ax,
        )  # fmt: skip
    return deliver(figure_of(panels[0]), interactive, save_path, show)


def plot_layer_embeddings(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    text: str,
    layer_indices: Sequence[Layer] | None = None,
    method: str = "pca",
    figsize: tuple[float, float] = (9, 7),
    save_path: SavePath = None,
    *,
    positions: Sequence[int] | None = None,
    interactive: bool = False,
    ax: Any = None,
    show: bool = False,
    **reduction_kwargs: Any,
) -> Any:
    """Draw the path of each token of a text through the layers.

    One projection is fitted on all layers and tokens together, so that the distance between two
    layers means something.

    Args:
        model: Any Hugging Face model, with a head or without.
        tokenizer: Its tokenizer.
        text: What the model reads.
        layer_indices: Layers to pass through, in any spelling; None means all.
        method: ``"pca"``, ``"tsne"`` or ``"umap"``.
        figsize: Of a figure made here, in inches.
        save_path: Save there, with the ending's format.
        positions: Which tokens to draw and to fit on; None means all. Many models make the first
            so large that it hides the others: leave it out with ``positions=range(1, n)``.
        interactive: Return a plotly figure.
        ax: Where to draw; None makes a figure.
        show: Show it.
        **reduction_kwargs: See `dimensionality.reduce_dimensions`.

    Returns:
        The figure; see `embedding_figures.plot_paths` for how to read it.

    Raises:
        ValueError: the points cannot be reduced, or the text has no such position.
    """
    from activation_extraction import ActivationExtractor

    refuse_axes(interactive, ax)
    extractor = ActivationExtractor(model, tokenizer)
    record = extractor.extract_activations(text, layer_indices=layer_indices)
    stacked, layers = _stacked(record)
    count = stacked.shape[1]
    chosen = list(range(count)) if positions is None else [int(p) for p in positions]
    if not chosen or not all(-count <= p < count for p in chosen):
        raise ValueError(f"positions={chosen} are not among the text's {count} tokens")
    points = stacked[:, chosen]
    reduction = fit_reduction(points.reshape(-1, points.shape[-1]), method, 2, **reduction_kwargs)
    paths = reduction.coordinates.reshape(len(layers), len(chosen), 2)
    places = [p % count for p in chosen]
    names = axis_labels([record.tokens[p] for p in places], positions=places)
    options: dict[str, Any] = {"axis_labels": reduction.axis_labels(), "note": reduction.kept()}
    options["title"] = f"Tokens through the layers ({METHODS[method]}, one fit)"
    if interactive:
        figure = interactive_figures.paths(paths, names, layers, **options)
    else:
        options |= {"ax": ax, "figsize": figsize}
        figure = embedding_figures.plot_paths(paths, names, layers, **options)
    return deliver(figure, interactive, save_path, show)


def _stacked(record: ActivationRecord | Mapping[str, Any]) -> tuple[np.ndarray, list[str]]:
    """``[layer, position, feature]`` of a record, and the layers' labels."""
    held: Any = getattr(record, "layer_activations", record)
    keys = getattr(held, "layers", list(held))
    return np.stack([as_points(held[key][0]) for key in keys]), [str(key) for key in keys]


def layer_similarity(
    record: ActivationRecord | Mapping[str, Any], metric: str = "cosine"
) -> tuple[np.ndarray, list[str]]:
    """How alike the layers of a record are.

    Args:
        record: Holds ``[1, position, feature]`` per layer.
        metric: ``"cosine"``: of the same position at two layers, the mean over positions, -1 to 1.
            ``"cka"``: linear centred kernel alignment (Kornblith et al. 2019), 0 to 1, blind to
            rotation and scale; needs at least two positions, better many.

    Returns:
        ``[layer, layer]`` and the layers' labels.

    Raises:
        ValueError: there is no such metric, or only one position for CKA.
    """
    stacked, labels = _stacked(record)
    stacked = stacked.astype(np.float64)
    if metric == "cosine":
        unit = stacked / np.maximum(np.linalg.norm(stacked, axis=-1, keepdims=True), 1e-30)
        return np.einsum("ipd,jpd->ij", unit, unit) / stacked.shape[1], labels
    if metric != "cka":
        raise ValueError(f"metric={metric!r} is not known; use 'cosine' or 'cka'")
    if stacked.shape[1] < 2:
        raise ValueError("CKA compares positions with each other: give it at least two")
    centred = stacked - stacked.mean(1, keepdims=True)
    grams = np.einsum("lpd,lqd->lpq", centred, centred)
    inner = np.einsum("ipq,jpq->ij", grams, grams)
    norms = np.sqrt(np.maximum(np.diag(inner), 1e-30))
    return inner / np.outer(norms, norms), labels


def plot_layer_similarity(
    record: ActivationRecord | Mapping[str, Any],
    metric: str = "cosine",
    *,
    interactive: bool = False,
    ax: Any = None,
    figsize: tuple[float, float] | None = None,
    title: str | None = None,
    save_path: SavePath = None,
    show: bool = False,
) -> Any:
    """Draw how alike the layers of a record are, layer × layer.

    Args:
        record: What `ActivationExtractor.extract_activations` returned.
        metric: See `layer_similarity`.
        interactive: Return a plotly figure.
        ax: Where to draw; None makes a figure.
        figsize: Of a figure made here, in inches.
        title: Above the table.
        save_path: Save there, with the ending's format.
        show: Show it.

    Returns:
        The figure: blocks of bright cells are stretches in which little changes.

    Raises:
        ValueError: there is no such metric.
    """
    refuse_axes(interactive, ax)
    values, labels = layer_similarity(record, metric)
    name = {"cosine": "cosine similarity", "cka": "linear CKA"}[metric]
    figure: Any
    if interactive:
        figure = interactive_figures.heatmap(
            values, labels, labels, value_label=name, x_name="layer", y_name="layer", title=title
        )
    else:
        sizes = {} if figsize is None else {"figsize": figsize}
        figure = plot_similarity(values, labels, name=name, ax=ax, title=title, **sizes)
    return deliver(figure, interactive, save_path, show)
