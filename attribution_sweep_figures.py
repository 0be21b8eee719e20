"""The picture of an attribution sweep: the estimated changes, the exact ones, and their agreement.

Maps have a patching sweep's rows and columns (`sweep_figures`) and one colour scale, white at no
change. Only labels and numbers are seen here (`attribution_sweep.AttributionSweep`, or anything
with its fields).
"""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np

from figure_canvas import axes_list, figure_of, finish, new_figure, settle
from heat_maps import cell_figsize, plot_heatmap
from sweep_figures import plot_sweep, sweep_table
from token_labels import drawing

if TYPE_CHECKING:
    from matplotlib.axes import Axes

NAMED_POINTS = 5
"""Cells of the scatter that are named: the largest exact changes that have room."""

ESTIMATE, EXACT, DROPPED = "#3b6fb6", "#d9822b", "#6b6b6b"


def plot_attribution_sweep(
    result: Any,
    *,
    title: str | None = None,
    axes: Any = None,
    save_path: str | Path | None = None,
    show: bool = False,
    interactive: bool = False,
    **options: Any,
) -> Any:
    """Draw estimated changes, and where there are such exact ones, their agreement, and GradDrop.

    Args:
        result: An `attribution_sweep.AttributionSweep`.
        title: Above the picture; None says what was exchanged.
        axes: What to draw on, one per panel: estimate, exact and agreement (both where there are
            exact numbers), GradDrop (where there is); bars share the first. None makes a figure.
        save_path: See `figure_canvas.finish`; ``.html`` with ``interactive``.
        show: See `figure_canvas.finish`.
        interactive: Return the plotly twin of the estimates alone.
        **options: For `heat_maps.plot_heatmap`.

    Returns:
        The figure.

    Raises:
        ValueError: ``axes`` has another number of entries than there are panels.
    """
    heading = title if title is not None else _heading(result)
    if interactive:
        shown = _view(result, result.effects)
        return plot_sweep(
            shown, title=heading, interactive=True, save_path=save_path, show=show, **options
        )
    panels = _panels(result)
    with drawing():
        places = _places(result, panels, heading) if axes is None else axes_list(axes, len(panels))
        for (name, _), ax in zip(panels, places, strict=True):
            if name == "agreement":
                _scatter(ax, result)
            elif len(result.axes) == 1:
                _bars(ax, result)
        if len(result.axes) > 1:
            _maps(result, panels, places, options)
        if axes is not None:
            places[0].set_title(f"{heading}\n{places[0].get_title()}", fontsize=11)
        if len(result.axes) == 1:  # maps have settled it
            settle(figure_of(places[0]))
        for (name, _), ax in zip(panels, places, strict=True):
            if name == "agreement":
                _name_points(ax, result)
    return finish(figure_of(places[0]), save_path, show)


def _heading(result: Any) -> str:
    way = "clean into corrupted" if result.direction == "denoising" else "corrupted into clean"
    pairs = f", mean of {result.count} pairs" if result.count > 1 else ""
    how = ", attention corrected" if result.attention_correction else ""
    return f"attribution patching of {result.site}, {way}{how}{pairs}"


def _change_label(result: Any) -> str:
    if result.normalized:
        return f"change in {result.metric} (1: clean − corrupted)"
    return f"change in {result.metric}" + (f" ({result.unit})" if result.unit else "")


def _panels(result: Any) -> list[tuple[str, np.ndarray]]:
    """Name and numbers of each panel."""
    panels = [("estimate", result.effects)]
    if result.exact is not None:
        exact = [("exact", result.exact_effects)] if len(result.axes) > 1 else []
        panels += [*exact, ("agreement", result.exact_effects)]
    if result.dropped is not None and len(result.axes) > 1:
        panels.append(("GradDrop", result.dropped))
    return panels


def _view(result: Any, numbers: np.ndarray) -> SimpleNamespace:
    """The result with other numbers in its cells, as `sweep_figures` wants it."""
    kept = ("axes", "labels", "tokens", "site", "direction", "count")
    fields = {name: getattr(result, name) for name in kept}
    return SimpleNamespace(values=numbers, value_label=_change_label(result), **fields)


def _places(result: Any, panels: list[tuple[str, np.ndarray]], heading: str) -> list[Axes]:
    """Axes of a new figure: maps in a row, the scatter square, two rows from four panels on."""
    if len(result.axes) == 1:
        width, height = max(4.0, 0.42 * len(result.labels[0]) + 1.6), 3.6
    else:
        values = sweep_table(_view(result, result.effects))["values"]
        width, height = cell_figsize(values.shape, False)
        width = min(width, 9.0)
    height = max(height, 3.6)
    rows = 2 if len(panels) > 3 else 1
    widths = [min(height + 0.8, 4.6) if name == "agreement" else width for name, _ in panels]
    widths = [width] * 2 if rows == 2 else widths
    figure = new_figure((sum(widths), rows * height + 0.4))
    figure.suptitle(heading, fontsize=11)
    return list(np.ravel(figure.subplots(rows, len(widths), width_ratios=widths, squeeze=False)))


def _maps(
    result: Any, panels: list[tuple[str, np.ndarray]], places: list[Axes], options: dict[str, Any]
) -> None:
    """Heat maps with the same rows, and where the numbers mean the same, the same colours."""
    signed = [numbers for name, numbers in panels if name in ("estimate", "exact")]
    sizes = np.stack([np.abs(numbers) for numbers in signed])
    largest = np.where(np.isnan(sizes).all(0), np.nan, np.nan_to_num(sizes).max(0))
    rows = sweep_table(_view(result, largest))
    finite = sizes[np.isfinite(sizes)]
    end = float(finite.max()) if finite.size and finite.max() else 1.0
    for (name, numbers), ax in zip(panels, places, strict=True):
        if name == "agreement":
            continue
        table = sweep_table(_view(result, numbers), rows["y_labels"])
        table.pop("note")
        look: dict[str, Any] = {"limits": (-end, end), "signed": True}
        label, words = _change_label(result), name
        if name == "GradDrop":
            look, label = {"signed": False}, f"mean size of the {label}"
            words = "GradDrop: one block's gradient dropped at a time"
        note = f" ({rows['note']})" if rows["note"] and name == "estimate" else ""
        plot_heatmap(**table, value_label=label, title=f"{words}{note}", ax=ax, **(look | options))


def _bars(ax: Axes, result: Any) -> None:
    """Estimate, exact change and GradDrop of each layer, side by side."""
    groups = [("estimate", result.effects, ESTIMATE)]
    if result.exact is not None:
        groups.append(("exact", result.exact_effects, EXACT))
    if result.dropped is not None:
        groups.append(("GradDrop (size)", result.dropped, DROPPED))
    layers = np.arange(len(result.labels[0]))
    width = 0.8 / len(groups)
    for number, (name, numbers, color) in enumerate(groups):
        shift = (number - (len(groups) - 1) / 2) * width
        ax.bar(layers + shift, numbers, width=width, color=color, label=name)
    ax.axhline(0, color="black", linewidth=0.8)
    ax.set_xticks(layers, [str(layer) for layer in result.labels[0]])
    ax.set(xlabel="layer", ylabel=_change_label(result))
    if len(groups) > 1:
        ax.legend(fontsize=8, frameon=False)


def _scatter(ax: Axes, result: Any) -> None:
    """Exact against estimated change, a point per cell; on the line the estimate is exact."""
    estimate, exact = result.effects.ravel(), result.exact_effects.ravel()
    ax.axhline(0, color="#cccccc", linewidth=0.7, zorder=0)
    ax.axvline(0, color="#cccccc", linewidth=0.7, zorder=0)
    ax.scatter(estimate, exact, s=14, color=ESTIMATE, alpha=0.7, linewidths=0)
    both = np.concatenate([estimate, exact])
    both = both[np.isfinite(both)]
    if both.size:
        ends = [both.min(), both.max()]
        ax.plot(ends, ends, color="black", linewidth=0.8, linestyle="--", label="estimate = exact")
        ax.legend(fontsize=8, frameon=False, loc="lower right")
    ax.set(xlabel=f"estimated {_change_label(result)}", ylabel=f"exact {_change_label(result)}")
    words = f"Pearson {result.pearson:.3f}, Spearman {result.spearman:.3f}, {len(exact)} cells"
    ax.set_title(words, fontsize=10)


def _name_points(ax: Axes, result: Any) -> None:
    """Write at the cells with the largest exact change what they are, where there is room."""
    estimate, exact = result.effects.ravel(), result.exact_effects.ravel()
    names = _cell_names(result)
    taken: list[Any] = []
    points = ax.transData.transform(np.column_stack([estimate, exact]))
    order = np.argsort(-np.nan_to_num(np.abs(exact)), kind="stable")
    for cell in order[: 4 * NAMED_POINTS]:
        if not exact[cell] or not np.isfinite(exact[cell] + estimate[cell]):
            break
        right = estimate[cell] > np.mean(ax.get_xlim())
        label = ax.annotate(
            names[cell], (estimate[cell], exact[cell]), xytext=(-4 if right else 4, -3),
            textcoords="offset points", fontsize=7, ha="right" if right else "left",
        )  # fmt: skip
        label.set_in_layout(False)
        box = label.get_window_extent().padded(1)
        inside = (points > [box.x0, box.y0]) & (points < [box.x1, box.y1])
        if inside.all(1).any() or any(box.overlaps(other) for other in taken):
            label.remove()
            continue
        taken.append(box)
        if len(taken) == NAMED_POINTS:
            break


def _cell_names(result: Any) -> list[str]:
    """A short name of each cell: ``4.1`` for a head, ``4 @3`` for a token of a layer."""
    names = []
    for place in np.ndindex(result.values.shape):
        found = {
            axis: labels[i]
            for axis, labels, i in zip(result.axes, result.labels, place, strict=True)
        }
        unit = [str(found[axis]) for axis in ("layer", "head", "neuron") if axis in found]
        at = f" @{found['position']}" if "position" in found else ""
        names.append(".".join(unit) + at)
    return names
