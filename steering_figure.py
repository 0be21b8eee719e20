"""The picture of a steering sweep: what each layer and coefficient does, and what fluency it costs.

Three panels: the effect, layer × coefficient; the perplexity, likewise; and both together, one line
per layer through its coefficients. The best cells lie where the effect has moved and the perplexity
has not. It takes arrays and labels: no torch, no model.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from figure_canvas import LABEL_SIZE, axes_list, checked_labels, figure_of, finish, new_figure
from heat_maps import (
    SEQUENTIAL,
    arrange,
    as_table,
    cell_colors,
    color_scale,
    draw_cells,
    write_cells,
)
from token_labels import drawing

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def plot_steering(
    effect: np.ndarray,
    perplexity: np.ndarray,
    coefficients: Sequence[float],
    layer_labels: Sequence[str] | None = None,
    *,
    effect_name: str = "effect",
    unsteered: tuple[float, float] | None = None,
    axes: Any = None,
    figsize: tuple[float, float] | None = None,
    title: str | None = None,
    save_path: str | Path | None = None,
    show: bool = False,
) -> Figure:
    """Effect and perplexity of every layer and coefficient, and the one against the other.

    Args:
        effect: ``[layer, coefficient]``; NaN where nothing could be measured.
        perplexity: ``[layer, coefficient]``, of the steered text under the unsteered model.
        coefficients: One per column, in the order drawn.
        layer_labels: One per row; None counts.
        effect_name: What the effect is, with its unit.
        unsteered: Effect and perplexity without steering, marked by a star.
        axes: Three axes; None makes a figure.
        figsize: Of a figure made here, in inches.
        title: Above the panels.
        save_path: See `figure_canvas.finish`.
        show: See `figure_canvas.finish`.

    Returns:
        The figure.

    Raises:
        ValueError: the shapes do not fit together, or there are not three axes.
    """
    effect, perplexity = as_table(effect, "effect"), as_table(perplexity, "perplexity")
    if effect.shape != perplexity.shape or effect.shape[1] != len(coefficients):
        raise ValueError(
            "effect and perplexity must both be [layer, coefficient]; they are "
            f"{effect.shape} and {perplexity.shape}, with {len(coefficients)} coefficients"
        )
    rows = checked_labels(layer_labels, len(effect), "layer_labels")
    columns = [f"{coefficient:+g}" if coefficient else "0" for coefficient in coefficients]
    with drawing():
        if axes is None:
            width, height = 0.62 * len(columns) + 1.9, 0.3 * len(rows) + 1.5
            figure = new_figure(figsize or (2 * width + 4.6, max(height, 3.4)))
            ratios = (width, width, 4.6)
            axes = figure.subplots(1, 3, width_ratios=ratios)
            figure.suptitle(title or "", fontsize=12)
        left, middle, right = axes_list(axes, 3)
        images = [
            _draw_table(left, effect, effect_name, {}),
            _draw_table(middle, perplexity, "perplexity", {"log": True, "reverse": True}),
        ]
        _draw_trade(right, effect, perplexity, rows, unsteered)
        right.set(ylabel=effect_name)
        arrange((left, columns, rows, None), (middle, columns, rows, None))
        for ax, table, image in zip((left, middle), (effect, perplexity), images, strict=True):
            write_cells(ax, np.vectorize(_short, otypes=[object])(table), cell_colors(image))
    return finish(figure_of(left), save_path, show)


def _short(value: float) -> str:
    """A number in the width of a cell."""
    if not np.isfinite(value):
        return ""
    return f"{value:.2f}" if abs(value) < 10 else f"{value:.0f}"


def _draw_table(ax: Axes, table: np.ndarray, name: str, options: dict[str, Any]) -> Any:
    image = draw_cells(ax, table, color_scale(table, **options), "")
    ax.set(xlabel="coefficient", ylabel="layer")
    ax.set_title(name, fontsize=10)
    return image


def _draw_trade(
    ax: Axes,
    effect: np.ndarray,
    perplexity: np.ndarray,
    names: Sequence[str],
    unsteered: tuple[float, float] | None,
) -> None:
    """One line per layer, from its lowest coefficient to its highest."""
    from matplotlib import colormaps
    from matplotlib.ticker import LogLocator

    for row in range(len(effect)):
        color = colormaps[SEQUENTIAL](row / max(len(effect) - 1, 1) * 0.9)
        look: dict[str, Any] = {"color": color, "marker": "o", "markersize": 3, "linewidth": 1}
        name = f"layer {names[row]}" if row in (0, len(effect) - 1) else None
        ax.plot(perplexity[row], effect[row], label=name, **look)
    if unsteered is not None:
        star: dict[str, Any] = {"marker": "*", "color": "black", "s": 90, "zorder": 3}
        ax.scatter(unsteered[1], unsteered[0], label="unsteered", **star)
    ax.set(xscale="log", xlabel="perplexity under the unsteered model")
    ax.set_title("effect against fluency", fontsize=10)
    ax.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0), numticks=8))
    ax.xaxis.set_major_formatter(lambda value, _position: f"{value:,g}")
    ax.minorticks_off()
    ax.tick_params(labelsize=LABEL_SIZE)
    ax.grid(alpha=0.3)
    ax.legend(fontsize=LABEL_SIZE, loc="best")
