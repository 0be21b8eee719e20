"""Pictures of similarities, nearest tokens, geometry, and of two models compared.

Only labels and numbers are seen here (the results of `similarity`, `embedding_geometry` and
`comparison_result`, or anything with their fields).
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from figure_canvas import LABEL_SIZE, PALETTE, axes_list, figure_of, finish, new_figure
from heat_maps import number_cells, plot_heatmap
from token_labels import axis_labels, can_draw, drawing, readable_token

if TYPE_CHECKING:
    from matplotlib.axes import Axes

LONGEST = 28
"""Characters of a prompt that stand beside a table."""


def plot_similarities(result: Any, *, title: str | None = None, **options: Any) -> Any:
    """A table of similarities as colours, with numbers in the cells of a small one.

    Args:
        result: A `similarity.SimilarityResult`.
        title: Above the table; None says what was compared.
        **options: See `heat_maps.plot_heatmap`.

    Returns:
        The figure.
    """
    values = result.values
    rows, columns = result.row_labels, result.column_labels
    if result.between == "prompts":
        rows = columns = axis_labels(rows, LONGEST, can_draw)
    texts = number_cells(values)
    side = [min(max(count * 0.42, 3.4), 9.0) for count in values.shape]
    room = 2.2 if result.between == "prompts" else 1.4
    names = {
        "layers": ("layer", "layer"),
        "models": ("layer of the other model", "layer"),
        "prompts": ("", ""),
    }[result.between]
    where = f" at layer {result.layer}" if result.layer is not None else ""
    metric = result.metric.replace("cka", "CKA")
    size = f", {result.count} vectors" if result.count > 1 else ""
    heading = f"{metric} of {result.between}: {result.site}{where}{size}"
    chosen: dict[str, Any] = {
        "figsize": (side[1] + room, side[0] + room - 1.4),
        "x_name": names[0],
        "y_name": names[1],
        "value_label": metric,
        "title": heading if title is None else title,
    }
    return plot_heatmap(values, columns, rows, texts, **(chosen | options))


def plot_nearest(result: Any, *, title: str | None = None, **options: Any) -> Any:
    """A row of tokens for each vector, coloured by score.

    Args:
        result: An `embedding_geometry.NearestTokens`.
        title: Above the table; None says what was searched.
        **options: See `heat_maps.plot_heatmap`.

    Returns:
        The figure.
    """
    rows, k = result.ids.shape
    texts = np.array(result.tokens, dtype=object).reshape(rows, k)
    labels = axis_labels(result.labels, 20, can_draw)
    name = "cosine" if result.metric == "cosine" else "dot product"
    heading = f"nearest tokens by {name}, {result.matrix} embedding"
    chosen: dict[str, Any] = {
        "figsize": (min(0.8 * k + 2.4, 20.0), min(0.3 * rows + 1.3, 20.0)),
        "x_name": "rank",
        "value_label": name,
        "title": heading if title is None else title,
    }
    return plot_heatmap(result.scores, None, labels, texts, **(chosen | options))


def plot_geometry(
    result: Any,
    *,
    title: str | None = None,
    axes: Any = None,
    save_path: str | Path | None = None,
    show: bool = False,
) -> Any:
    """Mean cosine and share of the first component on the left, participation ratio on the right.

    Args:
        result: An `embedding_geometry.GeometryResult`.
        title: Above the picture; None says of what it is.
        axes: Two axes to draw on; None makes a figure.
        save_path: See `figure_canvas.finish`.
        show: See `figure_canvas.finish`.

    Returns:
        The figure.
    """
    heading = f"{result.site}: {result.count} vectors of {result.width}"
    with drawing():
        if axes is None:
            axes = new_figure((9.0, 3.4)).subplots(1, 2)
        left, right = axes_list(axes, 2)
        _line(left, result.layers, result.mean_cosine, 0, "mean cosine of two vectors")
        _line(left, result.layers, result.first_component, 1, "variance in first component")
        left.set_ylim(min(0.0, float(np.nanmin(result.mean_cosine))) - 0.03, 1.03)
        left.legend(fontsize=LABEL_SIZE, frameon=False)
        _line(right, result.layers, result.participation_ratio, 2, "")
        right.set_ylabel("participation ratio (dimensions)")
        right.set_ylim(bottom=0)
        left.set_title(heading if title is None else title, fontsize=11)
    return finish(figure_of(left), save_path, show)


def plot_weights(result: Any, *, title: str | None = None, **options: Any) -> Any:
    """Relative change of the weights, part × layer.

    Args:
        result: A `comparison_result.WeightChanges`.
        title: Above the table.
        **options: See `heat_maps.plot_heatmap`.

    Returns:
        The figure.
    """
    table = result.by_layer().T
    texts = number_cells(table.to_numpy(), "{:.2g}")
    columns = ["none" if layer == -1 else str(layer) for layer in table.columns]
    chosen: dict[str, Any] = {
        "x_name": "layer",
        "value_label": "‖change‖ / ‖weight‖",
        "signed": False,
        "title": "relative change of the weights" if title is None else title,
        "figsize": (min(max(0.5 * table.shape[1] + 3.0, 5.0), 16.0), 0.3 * len(table) + 1.4),
    }
    return plot_heatmap(table.to_numpy(), columns, list(table.index), texts, **(chosen | options))


def plot_comparison(
    result: Any,
    *,
    title: str | None = None,
    axes: Any = None,
    save_path: str | Path | None = None,
    show: bool = False,
) -> Any:
    """How far apart two models are, by layer: activations, similarity, lens, and weights.

    Args:
        result: A `comparison_result.ModelComparison`.
        title: Above the picture; None names the models.
        axes: Four axes to draw on; None makes a figure.
        save_path: See `figure_canvas.finish`.
        show: See `figure_canvas.finish`.

    Returns:
        The figure.
    """
    names = [readable_token(str(name), 40, can_draw).replace("·", " ") for name in result.models]
    heading = f"{names[0]} and {names[-1]}: {result.tokens} tokens of {result.texts} texts"
    with drawing():
        if axes is None:
            figure = new_figure((10.0, 6.2))
            axes = figure.subplots(2, 2)
            figure.suptitle(heading if title is None else title, fontsize=11)
        panels = axes_list(axes, 4)
        rows = result.row_labels
        _line(panels[0], rows, result.distance, 0, "")
        panels[0].set(ylabel="relative distance ‖x₂ − x₁‖ / ‖x₁‖")
        _line(panels[1], rows, result.cosine, 1, "cosine")
        _line(panels[1], rows, result.cka, 2, "debiased CKA")
        _line(panels[1], rows, result.agreement, 3, "lens: same best token")
        panels[1].set_ylabel("similarity")
        panels[1].legend(fontsize=LABEL_SIZE, frameon=False)
        _line(panels[2], rows, result.lens_kl, 4, "")
        panels[2].set_ylabel("lens: KL(first ‖ second), nats")
        for panel in (panels[0], panels[2]):
            panel.set_ylim(bottom=0)
        _weight_lines(panels[3], result.weights)
    return finish(figure_of(panels[0]), save_path, show)


def _weight_lines(ax: Axes, weights: Any) -> None:
    """Relative change of attention, MLP and the rest, by block; the others as a text."""
    if weights is None:
        ax.set_axis_off()
        return
    table = weights.by_layer()
    blocks = table[table.index >= 0].dropna(axis=1, how="all")
    labels = [str(layer) for layer in blocks.index]
    for place, part in enumerate(blocks.columns):
        _line(ax, labels, blocks[part].to_numpy(), place, part)
    ax.set(ylabel="weights: ‖change‖ / ‖weight‖")
    ax.set_ylim(bottom=0)
    if len(blocks.columns):
        ax.legend(fontsize=LABEL_SIZE, frameon=False)
    if -1 in table.index:
        others = table.loc[-1].dropna()
        ax.set_title(", ".join(f"{part} {value:.2g}" for part, value in others.items()), fontsize=8)


def _line(ax: Axes, labels: Any, values: np.ndarray, color: int, name: str) -> None:
    """A line over layers, with as many of their labels as fit."""
    places = np.arange(len(labels))
    look: dict[str, Any] = {"marker": "o", "markersize": 3.5, "linewidth": 1.5}
    ax.plot(places, values, color=PALETTE[color], label=name, **look)
    step = max(1, -(-len(labels) // 16))
    shown = [i for i in places if i % step == 0]
    ax.set_xticks(shown, [labels[i] for i in shown], fontsize=LABEL_SIZE)
    ax.set_xlabel("layer")
    ax.spines[["top", "right"]].set_visible(False)
