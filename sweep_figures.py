"""The picture of a patching sweep: tokens across, layers down; a layer × head grid; bars by layer.

Only labels and numbers are seen here (`sweep_result.SweepResult`, or anything with its fields).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from figure_canvas import figure_of, finish, new_figure
from heat_maps import plot_heatmap
from token_labels import axis_labels, can_draw, drawing

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MOST_ROWS = 32
"""Heads shown of a layer × head × position sweep: those with the largest change."""


def sweep_table(result: Any, rows_kept: Sequence[str] | None = None) -> dict[str, Any]:
    """Rows, columns and labels of a sweep's heat map.

    Args:
        result: A sweep over layers and one or two other axes.
        rows_kept: Labels of the rows that are shown; None leaves the choice to the numbers.

    Returns:
        ``values [row, column]``, ``x_labels``, ``y_labels``, ``x_name``, ``y_name`` and a ``note``
        where rows were left out.
    """
    labels = dict(zip(result.axes, result.labels, strict=True))
    order = [axis for axis in ("layer", "head", "neuron", "position") if axis in result.axes]
    values = np.transpose(result.values, [result.axes.index(axis) for axis in order])
    rows, column = (order[:-1], order[-1]) if len(order) > 1 else (order, None)
    x_labels = [""] if column is None else _labels(result, column, labels[column])
    places = [row.ravel() for row in np.indices([len(labels[axis]) for axis in rows])]
    numbers = [np.array(labels[axis])[place] for axis, place in zip(rows, places, strict=True)]
    y_labels = [".".join(map(str, entry)) for entry in zip(*numbers, strict=True)]
    table = values.reshape(len(y_labels), len(x_labels))
    note = ""
    if rows_kept is not None:
        kept = np.array([y_labels.index(label) for label in rows_kept])
        table, y_labels = table[kept], list(rows_kept)
    elif len(rows) > 1 and len(table) > MOST_ROWS:
        change = np.abs(table - np.median(table)).max(axis=1)
        kept = np.sort(np.argsort(-change, kind="stable")[:MOST_ROWS])
        note = f"{MOST_ROWS} of {len(table)} with the largest change"
        table, y_labels = table[kept], [y_labels[i] for i in kept]
    return {
        "values": table,
        "x_labels": x_labels,
        "y_labels": y_labels,
        "x_name": column or "",
        "y_name": ".".join(rows),
        "note": note,
    }


def _labels(result: Any, axis: str, entries: tuple[int, ...]) -> list[str]:
    if axis == "position" and result.tokens:
        tokens = [result.tokens[p] for p in entries]
        return axis_labels(tokens, drawable=can_draw, positions=entries)
    return [str(entry) for entry in entries]


def plot_sweep(
    result: Any,
    *,
    title: str | None = None,
    ax: Axes | None = None,
    save_path: str | Path | None = None,
    show: bool = False,
    interactive: bool = False,
    **options: Any,
) -> Any:
    """Draw a sweep.

    Args:
        result: A `sweep_result.SweepResult`.
        title: Above the picture; None says what was exchanged.
        ax: Where to draw; None makes a figure.
        save_path: See `figure_canvas.finish`; ``.html`` with ``interactive``.
        show: See `figure_canvas.finish`.
        interactive: Return the plotly twin.
        **options: For `heat_maps.plot_heatmap`.

    Returns:
        The figure: bars for a sweep over layers alone, else a heat map.
    """
    heading = title if title is not None else _heading(result)
    if len(result.axes) == 1 and not interactive:
        return _bars(result, heading, ax, save_path, show)
    table = sweep_table(result)
    note = table.pop("note")
    heading = f"{heading}\n{note}" if note else heading
    if interactive:
        from interactive_figures import finish_interactive, heatmap

        figure = heatmap(**table, value_label=result.value_label, title=heading, **options)
        return finish_interactive(figure, save_path, show)
    return plot_heatmap(
        **table, value_label=result.value_label, title=heading, ax=ax, save_path=save_path,
        show=show, **options,
    )  # fmt: skip


def _heading(result: Any) -> str:
    way = "clean into corrupted" if result.direction == "denoising" else "corrupted into clean"
    pairs = f", mean of {result.count} pairs" if result.count > 1 else ""
    return f"{result.site}, {way}{pairs}"


def _bars(result: Any, title: str, ax: Axes | None, save_path: Any, show: bool) -> Any:
    layers = [str(layer) for layer in result.labels[0]]
    with drawing():
        if ax is None:
            ax = new_figure((max(4.0, 0.42 * len(layers) + 1.6), 3.4)).subplots()
        places = np.arange(len(layers))
        errors = None
        if result.low is not None:
            errors = np.abs(np.stack([result.values - result.low, result.high - result.values]))
        ax.bar(places, result.values, yerr=errors, color="#3b6fb6", width=0.75)
        ax.axhline(0, color="black", linewidth=0.8)
        ax.set_xticks(places, layers)
        ax.set(xlabel="layer", ylabel=result.value_label)
        ax.set_title(title, fontsize=11)
    return finish(figure_of(ax), save_path, show)
