"""Pictures of token scores: a text with its tokens coloured, and targets × tokens.

A text runs in lines as it was written: it breaks where it has newlines, and where the sheet ends.
Each token has a box of its own, so that two of the same text stay two. Red speaks for, blue
against; 0 is the middle. A value far outside the others is at the end of the colours and marked; a
token without a number is hatched.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from figure_canvas import figure_of, finish, new_figure, room_of, settle, text_colors
from heat_maps import NO_VALUE, ColorScale, color_scale, plot_heatmap
from token_labels import axis_labels, can_draw, drawing, readable_token, text_width

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SIZE, LINE, PAD, GAP = 9.0, 16.0, 2.0, 1.0
"""Font size, distance of lines, and room around and between tokens, in points."""

BOX = 13.0
"""Height of a token's box, in points."""

LEGEND = 46.0
"""Room for colour bar and notes below the text, in points."""

WIDTH = 8.5
"""Of a figure made here, in inches."""

MOST_LINES = 60
"""More are cut off at the beginning, which is said."""

LONGEST = 40
"""Characters of one token."""

SURROUND = "#444444"


class Box(NamedTuple):
    """Where a token is drawn, in points from the top left."""

    position: int
    text: str
    left: float
    line: int
    width: float

    @property
    def bottom(self) -> float:
        """The lower edge; the first line's upper edge is 0."""
        return -self.line * LINE - BOX


def text_boxes(tokens: Sequence[str], width: float) -> list[Box]:
    """Place tokens in lines.

    Args:
        tokens: One per position; a newline in one ends its line.
        width: Of a line, in points.

    Returns:
        One box per token, in order.
    """
    boxes: list[Box] = []
    left, line = 0.0, 0
    for position, token in enumerate(tokens):
        text = readable_token(token, LONGEST, can_draw)
        room = text_width(text, SIZE) + 2 * PAD
        while room > width and len(text) > 2:
            text = text[: min(int(len(text) * 0.8), len(text) - 2)].rstrip("…") + "…"
            room = text_width(text, SIZE) + 2 * PAD
        if left and left + room > width:
            left, line = 0.0, line + 1
        boxes.append(Box(position, text, left, line, room))
        left += room + GAP
        if "\n" in token:
            left, line = 0.0, line + 1
    return boxes


def plot_text(
    scores: np.ndarray,
    tokens: Sequence[str],
    *,
    signed: bool = True,
    mark: int | None = None,
    value_label: str = "score",
    max_lines: int = MOST_LINES,
    title: str | None = None,
    ax: Axes | None = None,
    save_path: str | Path | None = None,
    show: bool = False,
) -> Figure:
    """A text with each token's background coloured by its score.

    Args:
        scores: ``[position]``.
        tokens: One per position.
        signed: Whether 0 is the middle of the colours.
        mark: A position that gets an outline; negative from the end.
        value_label: What the colours mean, with the unit.
        max_lines: A longer text loses its beginning, where a line says how many tokens; on axes
            that are given, what fits.
        title: Above the text.
        ax: Where to draw; None makes a figure as high as the text.
        save_path: See `figure_canvas.finish`.
        show: See `figure_canvas.finish`.

    Returns:
        The figure.

    Raises:
        ValueError: scores and tokens do not fit together, or there are none, ``mark`` is no
            position, or ``max_lines`` is below 1.
    """
    row = np.asarray(scores, dtype=float)
    if row.shape != (len(tokens),) or not row.size:
        raise ValueError(f"scores must be [position] of {len(tokens)} tokens; came {row.shape}")
    if mark is not None and not -len(row) <= mark < len(row):
        raise ValueError(f"mark must be a position, 0..{len(row) - 1}; came {mark}")
    mark = None if mark is None else mark % len(row)
    if max_lines < 1:
        raise ValueError(f"max_lines must be at least 1; came {max_lines}")
    with drawing():
        width = 72 * (WIDTH - 0.3)
        if ax is not None:
            settle(figure_of(ax))
            width, height = room_of(ax)
            max_lines = max(1, min(max_lines, int((height - LEGEND) / LINE)))
        boxes, dropped = _last_lines(text_boxes(tokens, width), max_lines)
        lines = boxes[-1].line + 1
        if ax is None:
            ax = new_figure((WIDTH, (lines * LINE + LEGEND + 30) / 72)).subplots()
        seen = row[[box.position for box in boxes]]
        scale = text_scale(seen, signed)
        _draw(ax, boxes, seen, scale, mark)
        if dropped:
            note = f"… {dropped} tokens before these are not shown"
            ax.text(0, -BOX / 2, note, va="center", fontsize=SIZE, style="italic", color=SURROUND)
        ax.set(xlim=(-2, width + 2), ylim=(-lines * LINE - LEGEND, 2))
        ax.set_aspect("equal", anchor="NW")  # a point is a point in both directions
        ax.set_axis_off()
        ax.set_title(_drawable(title or ""), fontsize=11, loc="left", wrap=True)
        marked = any(box.position == mark for box in boxes)
        _legend(ax, scale, value_label, marked, bool(np.isnan(seen).any()), -lines * LINE)
    return finish(figure_of(ax), save_path, show)


def _drawable(title: str) -> str:
    """A title as it is, but for characters that no font has."""
    return "".join(c if c == " " else readable_token(c, None, can_draw) for c in title)


def _last_lines(boxes: list[Box], most: int) -> tuple[list[Box], int]:
    """The boxes of the last lines, under a line that says how many are missing."""
    lines = boxes[-1].line + 1
    if lines <= most:
        return boxes, 0
    first = lines - most
    kept = [box._replace(line=box.line - first + 1) for box in boxes if box.line >= first]
    return kept, len(boxes) - len(kept)


def text_scale(scores: np.ndarray, signed: bool) -> ColorScale:
    """Colours of a text's tokens; zeros (tokens that are not reached) do not set their ends."""
    seen = np.where(scores == 0, np.nan, scores)
    return color_scale(seen, signed, limits=(None if signed else 0.0, None))


def _draw(
    ax: Axes, boxes: list[Box], scores: np.ndarray, scale: ColorScale, mark: int | None
) -> None:
    from matplotlib.collections import PatchCollection
    from matplotlib.colors import to_rgba
    from matplotlib.patches import Rectangle

    values = np.clip(np.nan_to_num(scores), scale.low, scale.high)
    colors = _colors(scale, values)
    inks = text_colors(colors)
    colors[np.isnan(scores)] = to_rgba(NO_VALUE)
    patches = [Rectangle((b.left, b.bottom), b.width, BOX) for b in boxes]
    ax.add_collection(PatchCollection(patches, facecolors=list(colors), linewidths=0))
    for box, ink in zip(boxes, inks, strict=True):
        middle = box.bottom + BOX / 2
        ax.text(box.left + PAD, middle, box.text, va="center_baseline", fontsize=SIZE, color=ink)
    beyond = scale.above | scale.below
    for box in (box for box, out in zip(boxes, beyond, strict=True) if out):
        ends, below = [box.left, box.left + box.width], [box.bottom - 1] * 2
        ax.plot(ends, below, color="black", lw=1.5, gid="beyond")
    for box in (box for box, score in zip(boxes, scores, strict=True) if np.isnan(score)):
        look: dict[str, Any] = {"fill": False, "hatch": "////", "linewidth": 0, "alpha": 0.4}
        ax.add_patch(Rectangle((box.left, box.bottom), box.width, BOX, gid="missing", **look))
    for box in (box for box in boxes if box.position == mark):
        edge: dict[str, Any] = {"fill": False, "edgecolor": "black", "linewidth": 1.3}
        ax.add_patch(Rectangle((box.left, box.bottom), box.width, BOX, gid="mark", **edge))


def _colors(scale: ColorScale, values: np.ndarray) -> np.ndarray:
    """``[token, 4]``."""
    import matplotlib

    norm = scale.norm()
    return np.asarray(matplotlib.colormaps[_colormap(scale)](norm(values)), dtype=float)


def _colormap(scale: ColorScale) -> str:
    """White where a token does not matter, so that the text stays readable."""
    return scale.colormap if scale.low < 0 else "Reds"


def _legend(
    ax: Axes, scale: ColorScale, label: str, marked: bool, missing: bool, bottom: float
) -> None:
    from matplotlib.cm import ScalarMappable

    notes = [label]
    if marked:
        notes.append("outlined: where the prediction is made")
    if (scale.above | scale.below).any():
        notes.append("underlined: beyond the colours")
    if missing:
        notes.append("hatched: no number")
    place = ax.inset_axes((0, bottom - 16, 240, 8), transform=ax.transData)
    bar = figure_of(ax).colorbar(
        ScalarMappable(scale.norm(), _colormap(scale)), cax=place, orientation="horizontal",
        extend=scale.extend(),
    )  # fmt: skip
    bar.ax.tick_params(labelsize=8)
    bar.set_label("; ".join(notes), fontsize=8, loc="left")


# --- Targets × tokens -----------------------------------------------------------------------------


def plot_targets(result: Any, **options: Any) -> Figure:
    """A row per target, a column per token; what lies after a target's position is hatched.

    Args:
        result: A `token_attribution.TokenAttribution`, or anything with its fields.
        **options: For `heat_maps.plot_heatmap`.

    Returns:
        The figure.
    """
    table = np.array(result.scores, dtype=float)
    for row, place in enumerate(result.target_positions):
        after = table[row, place + 1 :]
        after[after == 0] = np.nan
    with drawing():
        places = result.target_positions
        rows = axis_labels(result.targets, 14, can_draw, places)
        columns = axis_labels(result.tokens, 12, can_draw)
    chosen: dict[str, Any] = {
        "x_name": "token",
        "y_name": "prediction",
        "value_label": result.value_label,
        "signed": result.signed,
        "limits": (None if result.signed else 0.0, None),
        "title": f"{result.method} ({result.metric})",
    }
    return plot_heatmap(table, columns, rows, **(chosen | options))
