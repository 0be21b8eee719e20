"""Tables as colours: choosing the colours, the parts of a heat map, and the plain heat maps.

    plot_heatmap       any table, with text in its cells if wanted
    plot_similarity    layer × layer
    plot_head_grid     layer × head
    color_scale        which map and limits a table gets

Conventions:

- The first row is on top, so that depth runs downwards: the last layer is at the bottom.
- The map is viridis, which the colour-blind read as well; where one end means sure or converged,
  that is the bright one. Signed data gets a diverging map that is white at 0.
- A value far outside the others does not flatten the rest: it keeps the end colour and gets a mark
  (▲ or ▼), and the colour bar an arrow. A missing value is hatched grey.
- Font sizes follow the cells; what does not fit is shortened, then left out; labels are thinned.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from figure_canvas import (
    LABEL_SIZE,
    checked_labels,
    figure_of,
    finish,
    new_figure,
    room_of,
    settle,
    text_colors,
)
from token_labels import drawing, fitted_token, shortened, thinned

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.image import AxesImage

SEQUENTIAL, DIVERGING = "viridis", "RdBu_r"

SMALLEST, LARGEST = 4.5, 8.0
"""Font sizes inside a cell, in points; where the least does not fit, nothing is written."""

FENCE = 3.0
"""A value is far outside beyond the 5 % and 95 % quantiles by this many times their distance."""

NO_VALUE = (0.87, 0.87, 0.87, 1.0)


# --- Colours -------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class ColorScale:
    """How the values of a table become colours."""

    colormap: str
    low: float
    high: float
    log: bool
    """Steps are those of log(1 + value): for ranks."""
    above: np.ndarray
    """Which cells lie above ``high``, same shape as the table."""
    below: np.ndarray
    """Which cells lie below ``low``."""
    binary: bool = False
    """There are only zeros and ones."""

    def norm(self) -> Any:
        """The matplotlib norm from values to 0 … 1."""
        from matplotlib.colors import FuncNorm, Normalize

        if self.log:
            return FuncNorm((np.log1p, np.expm1), vmin=self.low, vmax=self.high)
        return Normalize(self.low, self.high)

    def ticks(self) -> list[float] | None:
        """Where the colour bar has ticks; None leaves it to the library."""
        if self.binary:
            return [0.0, 1.0]
        if not self.log:
            return None
        powers = [0.0, *(10.0**n for n in range(12) if 10**n <= self.high)]
        return powers if len(powers) > 2 else sorted({*powers, float(np.floor(self.high))})

    def extend(self) -> str:
        """Which ends of the colour bar get an arrow: matplotlib's word for it."""
        ends = {(True, True): "both", (True, False): "max", (False, True): "min"}
        return ends.get((bool(self.above.any()), bool(self.below.any())), "neither")


def color_scale(
    values: np.ndarray,
    signed: bool | str = "auto",
    *,
    log: bool = False,
    reverse: bool = False,
    limits: tuple[float | None, float | None] = (None, None),
) -> ColorScale:
    """Choose map and limits for a table.

    Args:
        values: Any shape; NaN is no value, an infinite one is always outside.
        signed: Whether 0 is the middle; ``"auto"``: when there are values on both sides of it.
        log: Colour by log(1 + value), for values that are not negative.
        reverse: Let the bright end be the low one.
        limits: Fixed ends; None means from the values, those far outside (see `FENCE`) not counted.

    Returns:
        The scale, with the cells that lie outside.

    Raises:
        ValueError: ``signed`` is something else, or ``log`` meets negative values.
    """
    if signed not in (True, False, "auto"):
        raise ValueError(f"signed must be True, False or 'auto'; came {signed!r}")
    finite = values[np.isfinite(values)]
    if log and finite.size and finite.min() < 0:
        raise ValueError(f"a logarithmic scale needs values of at least 0; one is {finite.min()}")
    both_sides = bool(finite.size) and bool(finite.min() < 0 < finite.max())
    signed = both_sides if signed == "auto" else bool(signed)
    low, high = (0.0, np.expm1(_range(np.log1p(finite))[1])) if log else _range(finite)
    low, high = (
        found if fixed is None else fixed for found, fixed in zip((low, high), limits, strict=True)
    )
    if signed:
        high = max(abs(low), abs(high))
        low = -high
    if high <= low:
        high = low + 1
    margin = 1e-6 * (high - low)
    with np.errstate(invalid="ignore"):
        above, below = values > high + margin, values < low - margin
    colormap = DIVERGING if signed else SEQUENTIAL + "_r" * reverse
    binary = bool(finite.size) and (low, high) == (0, 1) and bool(np.isin(finite, (0, 1)).all())
    return ColorScale(colormap, float(low), float(high), log, above, below, binary)


def _range(finite: np.ndarray) -> tuple[float, float]:
    """The least and the largest value that is not far outside."""
    if not finite.size:
        return 0.0, 1.0
    low, high = np.quantile(finite, [0.05, 0.95])
    room = FENCE * (high - low)
    if room == 0:
        return float(finite.min()), float(finite.max())
    inside = finite[(finite >= low - room) & (finite <= high + room)]
    return float(inside.min()), float(inside.max())


# --- The parts of a heat map ---------------------------------------------------------------------


def draw_cells(ax: Axes, values: np.ndarray, scale: ColorScale, label: str) -> AxesImage:
    """Draw colours, hatching where there is no value, marks on outliers, and the colour bar."""
    ax.set_facecolor(NO_VALUE)
    ax.patch.set(hatch="////", edgecolor="#999999", linewidth=0)
    drawn = np.where(np.isinf(values), np.clip(values, scale.low, scale.high), values)
    image = ax.imshow(
        np.ma.masked_invalid(drawn),
        aspect="auto",
        interpolation="nearest",
        cmap=scale.colormap,
        norm=scale.norm(),
    )
    for mask, marker, name in ((scale.above, "^", "above"), (scale.below, "v", "below")):
        rows, columns = np.nonzero(mask)
        if len(rows):
            look: dict[str, Any] = {
                "s": 12,
                "linewidths": 0.5,
                "edgecolors": "white",
                "color": "black",
            }
            ax.scatter(columns + 0.36, rows - 0.28, marker=marker, gid=name, **look)
    height, width = values.shape
    ax.set(xlim=(-0.5, width - 0.5), ylim=(height - 0.5, -0.5))
    _color_bar(ax, image, scale, label)
    return image


def _color_bar(ax: Axes, image: AxesImage, scale: ColorScale, label: str) -> None:
    bar = figure_of(ax).colorbar(
        image, ax=ax, label=label, extend=scale.extend(), ticks=scale.ticks(), pad=0.01, aspect=30
    )
    bar.ax.tick_params(labelsize=LABEL_SIZE)
    if scale.log:
        bar.ax.minorticks_off()
        bar.ax.yaxis.set_major_formatter(lambda value, _position: f"{value:,.0f}")


def label_cells(
    ax: Axes,
    x_labels: Sequence[str],
    y_labels: Sequence[str],
    top_labels: Sequence[str] | None = None,
    *,
    fit: bool,
) -> None:
    """Label columns and rows.

    Args:
        ax: Axes of a heat map.
        x_labels: One per column, below.
        y_labels: One per row.
        top_labels: One per column, above.
        fit: False before the layout is known: all labels, columns sideways. True after it: columns
            flat where all fit so, and none that would touch another.
    """
    width, height = room_of(ax)
    both = [x_labels] if top_labels is None else [x_labels, top_labels]
    short = [shortened(labels, width / len(labels) - 6, LABEL_SIZE) for labels in both]
    flat = fit and all(labels is not None for labels in short)
    look: dict[str, Any] = {"fontsize": LABEL_SIZE, "rotation": 0 if flat else 90}
    axes = [ax] if top_labels is None else [ax, _top_axis(ax)]
    for axis, labels in zip(axes, short if flat else both, strict=True):
        assert labels is not None
        room = width / len(labels) if fit and not flat else LABEL_SIZE * 2
        shown = thinned(len(labels), room, LABEL_SIZE * 1.3)
        axis.set_xticks(shown, [labels[i] for i in shown], **look)
        axis.tick_params(length=2)
    shown = thinned(len(y_labels), height / len(y_labels) if fit else 99, LABEL_SIZE * 1.3)
    ax.set_yticks(shown, [y_labels[i] for i in shown], fontsize=LABEL_SIZE)


def _top_axis(ax: Axes) -> Any:
    """The second column axis of a heat map, made when first asked for."""
    for child in ax.child_axes:
        if child.get_gid() == "top labels":
            return child
    axis = ax.secondary_xaxis("top")
    axis.set_gid("top labels")
    return axis


def write_cells(ax: Axes, texts: np.ndarray, backgrounds: np.ndarray) -> list[Any]:
    """Write a token (or any text) into each cell, as large as the cells allow, shortened to fit.

    Args:
        ax: Axes whose cell (row, column) is centred on (column, row).
        texts: ``[row, column]``, text; "" writes nothing.
        backgrounds: ``[row, column, 4]``, colours below the text.

    Returns:
        The text artists; none where the cells are too small to read anything in them.
    """
    rows, columns = texts.shape
    room = room_of(ax)
    width, height = room[0] / columns, room[1] / rows
    size = min(LARGEST, height * 0.62)
    if size < SMALLEST:
        return []
    colors = text_colors(backgrounds)
    written = []
    for row, column in np.ndindex(texts.shape):
        text = fitted_token(str(texts[row, column]), width - 3, size) if texts[row, column] else ""
        if text:
            look = {"ha": "center", "va": "center", "fontsize": size, "clip_on": True}
            written.append(ax.text(column, row, text, color=str(colors[row, column]), **look))
            written[-1].set_in_layout(False)
    return written


def cell_colors(image: AxesImage) -> np.ndarray:
    """``[row, column, 4]``: the colour of each cell, light grey where there is no value."""
    values: Any = np.ma.asarray(image.get_array())
    colors = np.asarray(image.to_rgba(values), dtype=float)
    colors[np.ma.getmaskarray(values)] = NO_VALUE
    return colors


def cell_figsize(shape: tuple[int, ...], with_text: bool) -> tuple[float, float]:
    """A size in inches at which the cells are readable, with room for labels and colour bar."""
    rows, columns = shape
    per_column, per_row, most = (
        (0.62, 0.25, (44.0, 26.0)) if with_text else (0.17, 0.16, (14.0, 10.0))
    )
    width = min(max(columns * per_column + 1.8, 4.8), most[0])
    return width, min(max(rows * per_row + 1.5, 2.6), most[1])


def number_cells(values: np.ndarray, form: str = "{:.2f}", most: int = 16) -> np.ndarray | None:
    """The numbers of a small table as text for its cells, ``[row, column]``; None of a large one.

    Args:
        values: ``[row, column]``; what is not finite stays empty.
        form: A format.
        most: Rows or columns of a table that is small.
    """
    if max(values.shape) > most:
        return None
    write = np.vectorize(lambda x: form.format(x) if np.isfinite(x) else "", otypes=[object])
    return write(values)


def as_table(values: Any, name: str) -> np.ndarray:
    """Any array of two axes, as floats.

    Raises:
        ValueError: it has other axes, or no cell.
    """
    table = np.asarray(values, dtype=float)
    if table.ndim != 2 or not table.size:
        raise ValueError(
            f"{name} must be [row, column] with at least one cell; it is {list(table.shape)}"
        )
    return table


# --- Plain heat maps -----------------------------------------------------------------------------


def plot_heatmap(
    values: np.ndarray,
    x_labels: Sequence[str] | None = None,
    y_labels: Sequence[str] | None = None,
    cell_text: np.ndarray | None = None,
    *,
    value_label: str = "",
    signed: bool | str = "auto",
    log: bool = False,
    reverse: bool = False,
    limits: tuple[float | None, float | None] = (None, None),
    x_name: str = "",
    y_name: str = "",
    top_labels: Sequence[str] | None = None,
    ax: Axes | None = None,
    figsize: tuple[float, float] | None = None,
    title: str | None = None,
    save_path: str | Path | None = None,
    show: bool = False,
) -> Figure:
    """A table as colours, first row on top.

    Args:
        values: ``[row, column]``; NaN is hatched, an infinite or far outlying value is marked.
        x_labels: One per column; None counts.
        y_labels: One per row; None counts.
        cell_text: ``[row, column]``, tokens or other text, shortened to fit.
        value_label: What the colours mean, with the unit.
        signed: Centre the map on 0; ``"auto"`` when there are values on both sides.
        log: Colour by log(1 + value).
        reverse: Let the bright end be the low one.
        limits: Fixed ends of the colours; None means from the values.
        x_name: Name of the x axis.
        y_name: Name of the y axis.
        top_labels: A second row of labels, above.
        ax: Where to draw; None makes a figure.
        figsize: Of a figure made here, in inches; None follows the number of cells.
        title: Above the table.
        save_path: See `figure_canvas.finish`.
        show: See `figure_canvas.finish`.

    Returns:
        The figure.

    Raises:
        ValueError: the shapes do not fit together.
    """
    values = as_table(values, "values")
    texts = None if cell_text is None else np.asarray(cell_text, dtype=object)
    if texts is not None and texts.shape != values.shape:
        raise ValueError(f"cell_text must be as the values, {values.shape}; it is {texts.shape}")
    columns = checked_labels(x_labels, values.shape[1], "x_labels")
    rows = checked_labels(y_labels, values.shape[0], "y_labels")
    with drawing():
        if ax is None:
            ax = new_figure(figsize or cell_figsize(values.shape, texts is not None)).subplots()
        scale = color_scale(values, signed, log=log, reverse=reverse, limits=limits)
        image = draw_cells(ax, values, scale, value_label)
        ax.set(xlabel=x_name, ylabel=y_name)
        ax.set_title(title or "", fontsize=11)
        arrange(ax, columns, rows, top_labels)
        if texts is not None:
            write_cells(ax, texts, cell_colors(image))
    return finish(figure_of(ax), save_path, show)


def arrange(*panels: Any) -> None:
    """Place and label panels: ``ax, x_labels, y_labels, top_labels``, or several such tuples."""
    several = panels if isinstance(panels[0], tuple) else (panels,)
    for panel in several:
        label_cells(*panel, fit=False)
    settle(figure_of(several[0][0]))
    for panel in several:  # these need no more room than those before
        label_cells(*panel, fit=True)


def plot_similarity(
    values: np.ndarray,
    labels: Sequence[str] | None = None,
    *,
    name: str = "similarity",
    **options: Any,
) -> Figure:
    """Layer × layer: how alike each two layers are.

    Args:
        values: ``[layer, layer]``, at most 1.
        labels: One per layer.
        name: What the colours mean.
        **options: See `plot_heatmap`.

    Returns:
        The figure; numbers stand in the cells of a small table.

    Raises:
        ValueError: the table is not square.
    """
    table = as_table(values, "values")
    count = len(table)
    if table.shape != (count, count):
        raise ValueError(f"a similarity is [layer, layer]; it is {list(table.shape)}")
    texts = number_cells(table)
    side = min(max(count * 0.42, 3.6), 9.0)
    chosen = {
        "figsize": (side + 1.4, side),
        "x_name": "layer",
        "y_name": "layer",
        "value_label": name,
    }
    return plot_heatmap(table, labels, labels, texts, **(chosen | options))


def plot_head_grid(
    values: np.ndarray,
    layer_labels: Sequence[str] | None = None,
    *,
    name: str = "effect",
    **options: Any,
) -> Figure:
    """Layer × head: one number per attention head, such as an effect of patching it.

    Args:
        values: ``[layer, head]``; NaN where a layer has no such head.
        layer_labels: One per layer; None counts.
        name: What the colours mean, with the unit.
        **options: See `plot_heatmap`.

    Returns:
        The figure.
    """
    chosen = {"x_name": "head", "y_name": "layer", "value_label": name}
    return plot_heatmap(values, None, layer_labels, **(chosen | options))
