"""Points in two or three dimensions, with labels that do not touch, and paths through them.

    plot_scatter    points in 2-D or 3-D
    plot_paths      each token's way through the layers
    point_colors    what a caller's ``colors`` mean
    place_labels    where labels go

Labels are placed greedily, in the order given: beside the point first, then further away with a
thin line, never on another label or outside the axes. One for which there is no room is left out,
and the figure says how many were.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from figure_canvas import LABEL_SIZE, PALETTE, figure_of, finish, new_figure, settle
from token_labels import can_draw, drawing, readable_token, text_width

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SEQUENTIAL = "viridis"

LONGEST = 20
"""Characters of a label."""

MOST_LABELS = 1500
"""So many labels are tried, more never fit."""

CROWD = 3000
"""With more points than this, labels do not keep clear of them."""

FEW_LABELS = 80
"""With more than this, a label stays close to its point: many long lines cannot be followed."""

DIRECTIONS = np.array([[1, 0], [1, 1], [1, -1], [-1, 0], [-1, 1], [-1, -1], [0, 1], [0, -1]], float)
DISTANCES = (5.0, 14.0, 26.0, 42.0)
"""From the point to the near edge of its label, in points; from the second on with a line."""


# --- Where labels go -----------------------------------------------------------------------------


def place_labels(
    anchors: np.ndarray,
    sizes: np.ndarray,
    room: tuple[float, float],
    points: np.ndarray | None = None,
) -> np.ndarray:
    """Find a place for each label, those first in order first.

    Args:
        anchors: ``[label, 2]``, the labelled points, from the lower left corner of the axes.
        sizes: ``[label, 2]``, width and height of each label.
        room: Width and height of the axes.
        points: ``[point, 2]``, points that labels had better not cover; all in the same unit.

    Returns:
        ``[label, 2]``, the centre of each label; NaN where there is no room. No two labels touch.
    """
    placed = np.full(anchors.shape, np.nan)
    boxes = np.empty((0, 4))
    distances = DISTANCES if len(anchors) <= FEW_LABELS else DISTANCES[:2]
    for index, (anchor, size) in enumerate(zip(anchors, sizes, strict=True)):
        centers = _candidates(anchor, size, distances)
        low, high = centers - size / 2, centers + size / 2
        free = (low >= 0).all(1) & (high <= np.asarray(room)).all(1)
        touch = (low[:, None] < boxes[None, :, 2:]) & (high[:, None] > boxes[None, :, :2])
        free &= ~touch.all(-1).any(1)
        if not free.any():
            continue
        if points is None:
            covered = np.zeros(len(centers))
        else:
            inside = (points[None] > low[:, None] - 2) & (points[None] < high[:, None] + 2)
            covered = inside.all(-1).sum(1)
        best = int(np.lexsort((np.arange(len(centers)), covered, ~free))[0])
        placed[index] = centers[best]
        boxes = np.vstack([boxes, [*low[best], *high[best]]])
    return placed


def _candidates(anchor: np.ndarray, size: np.ndarray, distances: Sequence[float]) -> np.ndarray:
    """Centres of a label around its point, ``[candidate, 2]``, the nearest first."""
    return np.vstack([anchor + DIRECTIONS * (size / 2 + distance) for distance in distances])


# --- What colours mean ---------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class PointColors:
    """One colour per point, and what they mean."""

    colors: list[str]
    """``[point]``, as ``#rrggbb``."""
    categories: dict[str, str]
    """Name to colour, where the colours stand for names."""
    values: np.ndarray | None = None
    """``[point]``, where they stand for numbers."""


def point_colors(colors: Any, count: int, quiet: int = 0) -> PointColors:
    """What a caller's ``colors`` mean.

    Args:
        colors: None; one colour; or per point a colour, a number, or the name of a group.
        count: How many points.
        quiet: The last so many points are grey where no colours are given.

    Returns:
        The colours.

    Raises:
        ValueError: there are not as many as points.
    """
    from matplotlib.colors import is_color_like, to_hex

    if colors is None:
        return PointColors([PALETTE[0]] * (count - quiet) + ["#b0b0b0"] * quiet, {})
    if isinstance(colors, str) and is_color_like(colors):
        return PointColors([to_hex(colors)] * count, {})
    given = list(np.asarray(colors)) if isinstance(colors, np.ndarray) else list(colors)
    if len(given) != count:
        raise ValueError(f"colors must hold one per point, {count}; they hold {len(given)}")
    if all(isinstance(c, int | float | np.number) for c in given):
        return _by_number(np.array(given, dtype=float))
    if all(is_color_like(c) for c in given):
        return PointColors([to_hex(c) for c in given], {})
    names = list(dict.fromkeys(map(str, given)))
    table = {name: PALETTE[i % len(PALETTE)] for i, name in enumerate(names)}
    return PointColors([table[str(c)] for c in given], table)


def _by_number(values: np.ndarray) -> PointColors:
    from matplotlib import colormaps
    from matplotlib.colors import to_hex

    spread = np.nanmax(values) - np.nanmin(values)
    shares = (values - np.nanmin(values)) / (spread or 1)
    return PointColors([to_hex(c) for c in colormaps[SEQUENTIAL](shares)], {}, values)


# --- Points --------------------------------------------------------------------------------------


def plot_scatter(
    coordinates: np.ndarray,
    labels: Sequence[str] | None = None,
    colors: Any = None,
    *,
    axis_labels: Sequence[str] | None = None,
    note: str = "",
    ax: Axes | None = None,
    figsize: tuple[float, float] = (8, 6.5),
    title: str | None = None,
    save_path: str | Path | None = None,
    show: bool = False,
) -> Figure:
    """Points in two or three dimensions.

    Args:
        coordinates: ``[point, 2]`` or ``[point, 3]``.
        labels: One per point; fewer name the first points, the others are then small and grey.
        colors: See `point_colors`.
        axis_labels: One per dimension.
        note: A line below the points, such as what a reduction kept.
        ax: Where to draw (with ``projection="3d"`` for three dimensions); None makes a figure.
        figsize: Of a figure made here, in inches.
        title: Above the points.
        save_path: See `figure_canvas.finish`.
        show: See `figure_canvas.finish`.

    Returns:
        The figure.

    Raises:
        ValueError: the shapes do not fit together, or the axes has other dimensions.
    """
    points = as_coordinates(coordinates)
    names = checked_names(labels, len(points))
    quiet = len(points) - len(names) if names else 0
    look = point_colors(colors, len(points), quiet)
    flat = points.shape[1] == 2
    with drawing():
        if ax is None:
            ax = new_figure(figsize).add_subplot(projection=None if flat else "3d")
        if flat == hasattr(ax, "get_zlim"):
            raise ValueError(f"{points.shape[1]} dimensions need an axes with as many")
        _draw_points(ax, points, look, quiet)
        for axis, name in zip("xyz", axis_labels or (), strict=False):
            getattr(ax, f"set_{axis}label")(name, fontsize=LABEL_SIZE + 1)
        ax.set_title(title or "", fontsize=11)
        _explain_colors(ax, look)
        _annotate(ax, points, names, note)
    return finish(figure_of(ax), save_path, show)


def as_coordinates(coordinates: Any) -> np.ndarray:
    """Points as ``[point, 2 or 3]``, floats.

    Raises:
        ValueError: they have other axes.
    """
    points = np.asarray(coordinates, dtype=float)
    if points.ndim != 2 or points.shape[1] not in (2, 3) or not len(points):
        raise ValueError(f"coordinates must be [point, 2 or 3]; they are {list(points.shape)}")
    return points


def checked_names(labels: Sequence[str] | None, count: int) -> list[str]:
    """Labels as text.

    Raises:
        ValueError: there are more than points.
    """
    names = [] if labels is None else [str(label) for label in labels]
    if len(names) > count:
        raise ValueError(f"there are {len(names)} labels for {count} points")
    return names


def _draw_points(ax: Any, points: np.ndarray, look: PointColors, quiet: int) -> None:
    count = len(points)
    size = 36 if count <= 60 or quiet else 16 if count <= 2000 else 4
    named = count - quiet
    ax.set_axisbelow(True)
    ax.grid(alpha=0.25)
    ax.tick_params(labelsize=LABEL_SIZE)
    groups = ((slice(named, None), 8 if count <= 2000 else 3, 1), (slice(0, named), size, 3))
    for part, area, order in groups:
        if len(points[part]):
            style = {"s": area, "zorder": order, "linewidths": 0, "rasterized": count > 5000}
            ax.scatter(*points[part].T, c=look.colors[part], **style)


def _explain_colors(ax: Any, look: PointColors) -> None:
    """A legend for names, a colour bar for numbers."""
    if look.values is not None:
        from matplotlib.cm import ScalarMappable
        from matplotlib.colors import Normalize

        ends = Normalize(float(np.nanmin(look.values)), float(np.nanmax(look.values)))
        figure_of(ax).colorbar(ScalarMappable(ends, SEQUENTIAL), ax=ax, shrink=0.8)
    elif look.categories:
        from matplotlib.lines import Line2D

        style: dict[str, Any] = {"marker": "o", "linestyle": ""}
        handles = [Line2D([], [], color=c, label=n, **style) for n, c in look.categories.items()]
        ax.legend(handles=handles, fontsize=LABEL_SIZE, loc="best", framealpha=0.8)


def _annotate(ax: Any, points: np.ndarray, names: Sequence[str], note: str) -> None:
    """Write the labels where there is room, and the note below."""
    _write_note(ax, note, " " if names else "")
    if names:
        settle(figure_of(ax))
        left_out = _write_labels(ax, points, names)
        if left_out:
            _write_note(ax, note, f"{left_out} of {len(names)} labels left out for lack of room")


def _write_note(ax: Any, *lines: str) -> None:
    """Small lines below the axes; in three dimensions in its lower left corner, which is empty."""
    text = "\n".join(line for line in lines if line)
    for old in [artist for artist in ax.texts if artist.get_gid() == "note"]:
        old.remove()
    look = {"fontsize": LABEL_SIZE, "color": "#555555", "gid": "note"}
    if hasattr(ax, "text2D"):
        ax.text2D(0, 0, text, transform=ax.transAxes, **look)
    elif text:
        below = ax.xaxis.label
        below.set_text("\n".join((below.get_text().split("\n")[0], text)))


def _write_labels(ax: Any, points: np.ndarray, names: Sequence[str]) -> int:
    """Write the labels that fit; returns how many did not."""
    texts = [readable_token(name, LONGEST, can_draw) for name in names[:MOST_LABELS]]
    figure = figure_of(ax)
    ax.apply_aspect()  # drawing would, and then the points would lie elsewhere
    unit = 72 / figure.dpi
    box = ax.get_window_extent()
    pixels = ax.transData.transform(_in_plane(ax, points))
    spots = (pixels - [box.x0, box.y0]) * unit
    sizes = np.array([[text_width(t, LABEL_SIZE) + 3, LABEL_SIZE * 1.35] for t in texts])
    crowd = spots if len(spots) <= CROWD else None
    places = place_labels(spots[: len(texts)], sizes, (box.width * unit, box.height * unit), crowd)
    for text, point, spot, place, size in zip(texts, points, spots, places, sizes, strict=False):
        if not np.isnan(place[0]):
            _write_label(ax, text, point, place - spot, size)
    return len(names) - int((~np.isnan(places[:, 0])).sum())


def _in_plane(ax: Any, points: np.ndarray) -> np.ndarray:
    """The points as seen: ``[point, 2]`` in the data coordinates of the (flat) axes."""
    if points.shape[1] == 2:
        return points
    from mpl_toolkits.mplot3d import proj3d

    x, y, _depth = proj3d.proj_transform(*points.T, ax.get_proj())
    return np.column_stack([x, y])


def _write_label(
    ax: Any, text: str, point: np.ndarray, offset: np.ndarray, size: np.ndarray
) -> None:
    from matplotlib.patheffects import withStroke

    gap = np.abs(offset) - size / 2
    far = gap.max() > DISTANCES[0] + 1
    line = {"arrowstyle": "-", "color": "#888888", "linewidth": 0.6, "shrinkA": 0, "shrinkB": 2}
    written = ax.annotate(
        text,
        tuple(_in_plane(ax, point[None])[0]),
        xytext=tuple(offset),
        textcoords="offset points",
        ha="center",
        va="center",
        fontsize=LABEL_SIZE,
        gid="label",
        zorder=5,
        arrowprops=line if far else None,
    )
    written.set_in_layout(False)
    written.set_path_effects([withStroke(linewidth=2, foreground="white", alpha=0.8)])
    if len(point) == 3:
        written.draw = partial(_draw_turned, written, ax, point)


def _draw_turned(written: Any, ax: Any, point: np.ndarray, renderer: Any) -> None:
    """Draw a label in three dimensions where its point is seen now."""
    written.xy = tuple(_in_plane(ax, point[None])[0])
    type(written).draw(written, renderer)


# --- Paths ---------------------------------------------------------------------------------------


def plot_paths(
    coordinates: np.ndarray,
    labels: Sequence[str],
    layer_labels: Sequence[str],
    *,
    axis_labels: Sequence[str] | None = None,
    note: str = "",
    ax: Axes | None = None,
    figsize: tuple[float, float] = (9, 7),
    title: str | None = None,
    save_path: str | Path | None = None,
    show: bool = False,
) -> Figure:
    """Each token's way through the layers, in one common projection.

    A line joins one token's points in the order of the layers; the colour of a point says the
    layer, a ring where the line starts; the name stands at its end.

    Args:
        coordinates: ``[layer, token, 2]``, all from one fit.
        labels: One per token.
        layer_labels: One per layer.
        axis_labels: Two.
        note: A line below, such as what the reduction kept.
        ax: Where to draw; None makes a figure.
        figsize: Of a figure made here, in inches.
        title: Above the paths.
        save_path: See `figure_canvas.finish`.
        show: See `figure_canvas.finish`.

    Returns:
        The figure.

    Raises:
        ValueError: the shapes do not fit together.
    """
    paths = as_paths(coordinates, labels, layer_labels)
    layers, tokens, _ = paths.shape
    with drawing():
        ax = new_figure(figsize).add_subplot() if ax is None else ax
        ax.set_axisbelow(True)
        ax.grid(alpha=0.25)
        ax.tick_params(labelsize=LABEL_SIZE)
        for token in range(tokens):
            color = PALETTE[token % len(PALETTE)] if tokens <= len(PALETTE) else "#8a8a8a"
            ax.plot(*paths[:, token].T, color=color, linewidth=1, alpha=0.7, zorder=2, gid="path")
        depth = np.repeat(np.arange(layers), tokens)
        x, y = paths.reshape(-1, 2).T
        style: dict[str, Any] = {"cmap": SEQUENTIAL, "s": 20, "zorder": 3, "linewidths": 0}
        dots = ax.scatter(x, y, c=depth, vmin=0, vmax=max(1, layers - 1), **style)
        ring: dict[str, Any] = {"facecolors": "none", "edgecolors": "black", "linewidths": 0.8}
        ax.scatter(paths[0, :, 0], paths[0, :, 1], s=60, zorder=4, **ring)
        bar = figure_of(ax).colorbar(dots, ax=ax, label="layer", pad=0.01, aspect=30)
        shown = np.unique(np.linspace(0, layers - 1, min(layers, 12)).round().astype(int))
        bar.set_ticks(list(shown), labels=[layer_labels[i] for i in shown])
        bar.ax.tick_params(labelsize=LABEL_SIZE)
        for axis, name in zip("xy", axis_labels or (), strict=False):
            getattr(ax, f"set_{axis}label")(name, fontsize=LABEL_SIZE + 1)
        ax.set_title(title or "", fontsize=11)
        everything = np.vstack([paths[-1], paths[:-1].reshape(-1, 2)])
        _annotate(ax, everything, [str(label) for label in labels], note)
    return finish(figure_of(ax), save_path, show)


def as_paths(coordinates: Any, labels: Sequence[str], layer_labels: Sequence[str]) -> np.ndarray:
    """Paths as ``[layer, token, 2]``, floats.

    Raises:
        ValueError: they have other axes, or there are other labels.
    """
    paths = np.asarray(coordinates, dtype=float)
    shape = (len(layer_labels), len(labels), 2)
    if paths.shape != shape or not paths.size:
        raise ValueError(
            f"coordinates must be [layer, token, 2] = {list(shape)}; {list(paths.shape)}"
        )
    return paths
