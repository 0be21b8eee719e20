"""Pictures of attention: one head's pattern with its tokens, all heads small, scores of all heads.

    plot_pattern       query × key of one head, tokens along both axes
    plot_all_heads     every head of a layer, or layers × heads, as small patterns on one sheet
    plot_head_scores   layer × head, one grid per kind of score

Patterns are white where there is no attention and dark where there is much. They are drawn as they
are given; nothing here needs torch or a model.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from figure_canvas import LABEL_SIZE, checked_labels, figure_of, finish, new_figure
from heat_maps import (
    ColorScale,
    arrange,
    as_table,
    cell_colors,
    draw_cells,
    plot_head_grid,
    write_cells,
)
from token_labels import axis_labels, can_draw, drawing

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLORS = "Blues"

LARGEST_TILE, SMALLEST_TILE = 48, 16
"""Dots along an edge of a small pattern, at most and, of a long text on a full sheet, at least."""

MOST_TEXTED = 16
"""Tokens up to which the numbers are written into a pattern's cells."""

UNITS = {"entropy": "nats", "distance": "tokens"}
"""Of the scores that are no share of attention."""


def _scale(values: np.ndarray, top: float | None) -> ColorScale:
    """White is 0; dark is ``top``, or the largest value."""
    finite = values[np.isfinite(values)]
    high = top if top is not None else float(finite.max(initial=0.0)) or 1.0
    nowhere = np.zeros(values.shape, dtype=bool)
    return ColorScale(COLORS, 0.0, high, False, nowhere, nowhere)


def plot_pattern(
    pattern: np.ndarray,
    tokens: Sequence[str],
    *,
    queries: Sequence[int] | None = None,
    top: float | None = None,
    name: str = "attention",
    title: str | None = None,
    ax: Axes | None = None,
    figsize: tuple[float, float] | None = None,
    save_path: str | Path | None = None,
    show: bool = False,
) -> Figure:
    """One head's attention: a row per token, a column per token that it may look at.

    Args:
        pattern: ``[query, key]``.
        tokens: One per position; those that read alike are told apart by their position.
        queries: Positions whose rows are shown; None shows all.
        top: The value that is darkest; None takes the largest.
        name: What the colours mean, with the unit.
        title: Above the picture.
        ax: Where to draw; None makes a figure.
        figsize: Of a figure made here, in inches; None follows the number of tokens.
        save_path: See `figure_canvas.finish`.
        show: See `figure_canvas.finish`.

    Returns:
        The figure; a short text has the numbers in its cells.

    Raises:
        ValueError: the shapes do not fit together.
    """
    table = as_table(pattern, "pattern")
    names = checked_labels(tokens, table.shape[1], "tokens")
    rows = list(range(len(table))) if queries is None else list(queries)
    table = table[rows]
    with drawing():
        labels = axis_labels(names, drawable=can_draw)
        if ax is None:
            ax = new_figure(figsize or _pattern_size(*table.shape)).subplots()
        image = draw_cells(ax, table, _scale(table, top), name)
        ax.set(xlabel="key: token looked at", ylabel="query: token that looks")
        ax.set_title(title or "", fontsize=11)
        arrange(ax, labels, [labels[row] for row in rows], None)
        if table.shape[1] <= MOST_TEXTED:
            texts = np.vectorize(_short, otypes=[object])(table)
            write_cells(ax, texts, cell_colors(image))
    return finish(figure_of(ax), save_path, show)


def _short(value: float) -> str:
    return f"{value:.2f}".lstrip("0") if value >= 0.005 else ""


def _pattern_size(rows: int, columns: int) -> tuple[float, float]:
    per_cell = 0.34 if columns <= MOST_TEXTED else 0.2
    width, height = (min(count * per_cell, 9.0) for count in (columns, rows))
    return max(width + 2.2, 4.6), max(height + 1.7, 3.0)


# --- Many heads on one sheet ----------------------------------------------------------------------


def shrunk(pattern: np.ndarray, size: int = LARGEST_TILE) -> np.ndarray:
    """A pattern in at most ``size × size`` cells; of several, the largest value stays.

    Args:
        pattern: ``[query, key]``, square.
        size: Cells along an edge.
    """
    length = len(pattern)
    if length <= size:
        return pattern
    edges = np.linspace(0, length, size, endpoint=False).astype(int)
    return np.maximum.reduceat(np.maximum.reduceat(pattern, edges, axis=0), edges, axis=1)


def plot_all_heads(
    patterns: Sequence[np.ndarray],
    layers: Sequence[int],
    *,
    columns: int | None = None,
    title: str | None = None,
    figsize: tuple[float, float] | None = None,
    save_path: str | Path | None = None,
    show: bool = False,
) -> Figure:
    """Every head as a small pattern, first token in its upper left corner.

    Args:
        patterns: ``[head, query, key]`` for each layer.
        layers: The block of each.
        columns: Heads in a row where there is one layer; None chooses. Several layers have a row
            each.
        title: Above the sheet.
        figsize: In inches; None follows the number of heads.
        save_path: See `figure_canvas.finish`.
        show: See `figure_canvas.finish`.

    Returns:
        The figure. All patterns share the colours of 0 to 1, in steps of the square root, so that
        faint attention shows; of a text with more tokens than there is room for dots, each dot
        shows the largest of its cells.

    Raises:
        ValueError: there is not one layer per entry, or no head.
    """
    if len(patterns) != len(layers) or not layers:
        raise ValueError(
            f"{len(patterns)} layers of patterns came with {len(layers)} layer numbers"
        )
    grid = _grid(patterns, layers, columns)
    rows, across = len(grid), max(map(len, grid))
    dots = int(72 * _tile_inches(rows, across))
    edge = min(patterns[0].shape[-1], LARGEST_TILE, max(dots, SMALLEST_TILE))
    gap = max(1, edge // 12)
    sheet = np.full((rows * (edge + gap) + gap, across * (edge + gap) + gap), np.nan)
    for row, column in _filled(grid):
        top, left = gap + row * (edge + gap), gap + column * (edge + gap)
        sheet[top : top + edge, left : left + edge] = shrunk(grid[row][column][1], edge)
    figure = new_figure(figsize or _sheet_size(rows, across))
    with drawing():
        from matplotlib.colors import PowerNorm

        ax = figure.subplots()
        look: dict[str, Any] = {"cmap": COLORS, "norm": PowerNorm(0.5, vmin=0, vmax=1)}
        image = ax.imshow(np.ma.masked_invalid(sheet), interpolation="nearest", **look)
        ax.set_facecolor("#d9d9d9")
        ax.set_title(title or "", fontsize=11)
        _name_tiles(ax, grid, edge, gap, one_layer=len(layers) == 1, layers=layers)
        bar = figure.colorbar(image, ax=ax, label="attention", pad=0.01, aspect=30, shrink=0.8)
        bar.ax.tick_params(labelsize=LABEL_SIZE)
    return finish(figure, save_path, show)


Grid = list[list[tuple[str, np.ndarray]]]
"""Rows of small patterns, each with its head's number."""


def _grid(patterns: Sequence[np.ndarray], layers: Sequence[int], columns: int | None) -> Grid:
    rows = [
        [(f"{layer}.{head}", table) for head, table in enumerate(of_layer)]
        for layer, of_layer in zip(layers, patterns, strict=True)
    ]
    if len(rows) > 1:
        return rows
    (heads,) = rows
    if not heads:
        raise ValueError("there is no head to draw")
    across = columns or min(len(heads), max(4, math.ceil(math.sqrt(len(heads)))))
    return [heads[start : start + across] for start in range(0, len(heads), across)]


def _filled(grid: Grid) -> list[tuple[int, int]]:
    return [(row, column) for row, heads in enumerate(grid) for column in range(len(heads))]


def _tile_inches(rows: int, columns: int) -> float:
    return min(1.6, 15.0 / max(columns, rows))


def _sheet_size(rows: int, columns: int) -> tuple[float, float]:
    each = _tile_inches(rows, columns)
    return max(columns * each + 1.4, 3.2), max(rows * each + 0.7, 2.2)


def _name_tiles(
    ax: Axes, grid: Grid, edge: int, gap: int, *, one_layer: bool, layers: Sequence[int]
) -> None:
    """Heads and layers along the edges, or each head's name in its empty corner."""
    step = edge + gap
    across = max(map(len, grid))
    middle = gap + edge / 2 - 0.5
    if one_layer:
        ax.set(xticks=[], yticks=[], xlabel="", ylabel="")
        for row, column in _filled(grid):
            place = (gap + column * step + edge - 1, gap + row * step)
            text = ax.text(*place, grid[row][column][0], ha="right", va="top", fontsize=LABEL_SIZE)
            text.set_in_layout(False)
        return
    look: dict[str, Any] = {"fontsize": LABEL_SIZE}
    ax.set_xticks([middle + i * step for i in range(across)], list(map(str, range(across))), **look)
    ax.set_yticks([middle + i * step for i in range(len(grid))], list(map(str, layers)), **look)
    ax.set(xlabel="head", ylabel="layer")
    ax.tick_params(length=0)


# --- Scores ---------------------------------------------------------------------------------------


def plot_head_scores(
    tables: Mapping[str, np.ndarray],
    layers: Sequence[int],
    *,
    title: str | None = None,
    ax: Axes | None = None,
    figsize: tuple[float, float] | None = None,
    save_path: str | Path | None = None,
    show: bool = False,
    **options: Any,
) -> Figure:
    """Layer × head grids, one per kind of score.

    Args:
        tables: By kind, ``[layer, head]``; NaN where there is no such head.
        layers: The block of each row.
        title: Above everything.
        ax: Where to draw a single grid; None makes a figure.
        figsize: In inches; None follows the number of heads and kinds.
        save_path: See `figure_canvas.finish`.
        show: See `figure_canvas.finish`.
        **options: For `heat_maps.plot_heatmap`, such as ``limits``.

    Returns:
        The figure; each grid has its own scale, from 0.

    Raises:
        ValueError: there is no table, or one axes for several.
    """
    if not tables or (ax is not None and len(tables) > 1):
        raise ValueError(
            f"expected at least one table, and a single one with ax; {len(tables)} came"
        )
    across = min(len(tables), 4)
    down = math.ceil(len(tables) / across)
    if ax is not None:
        panels = [ax]
    else:
        heads = next(iter(tables.values())).shape[1]
        figure = new_figure(figsize or _scores_size(len(layers), heads, down, across))
        panels = list(figure.subplots(down, across, squeeze=False).ravel())
    for panel, (kind, table) in zip(panels, tables.items(), strict=False):
        _draw_scores(panel, kind, table, layers, options)
    for unused in panels[len(tables) :]:
        unused.set_visible(False)
    figure = figure_of(panels[0])
    if title:
        with drawing():
            figure.suptitle(title, fontsize=12)
    return finish(figure, save_path, show)


def _draw_scores(
    panel: Axes, kind: str, table: np.ndarray, layers: Sequence[int], options: Mapping[str, Any]
) -> None:
    finite = table[np.isfinite(table)]
    largest = float(finite.max(initial=0.0))
    unit = UNITS.get(kind, "share of attention")
    chosen: dict[str, Any] = {"limits": (0.0, largest if largest > 1e-6 else 1.0)}
    chosen |= {"signed": False, "title": kind.replace("_", " ")}
    plot_head_grid(table, list(map(str, layers)), name=unit, ax=panel, **(chosen | dict(options)))


def _scores_size(layers: int, heads: int, down: int, across: int) -> tuple[float, float]:
    width = min(max(heads * 0.2 + 1.7, 2.9), 8.0)
    height = min(max(layers * 0.17 + 1.2, 2.2), 7.0)
    return min(width * across, 22.0), min(height * down, 16.0)
