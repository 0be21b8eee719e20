"""How the prediction of one position forms: lines of probability, and each layer's best tokens.

track_tokens      the last row's best tokens, followed through all rows
plot_refinement   the figure
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from figure_canvas import (
    LABEL_SIZE,
    PALETTE,
    axes_list,
    checked_labels,
    figure_of,
    finish,
    new_figure,
    room_of,
)
from heat_maps import arrange, write_cells
from token_labels import EMPTY, can_draw, drawing, readable_token, text_width

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


@dataclass(frozen=True, eq=False)
class TrackedTokens:
    """The last row's best tokens, followed through all rows."""

    tokens: tuple[str, ...]
    probabilities: np.ndarray
    """``[token, row]``; NaN where the token is not among those kept of that row."""
    ranks: np.ndarray
    """``[token, row]``, 0 is best; NaN likewise."""


def track_tokens(
    top_tokens: np.ndarray, top_probs: np.ndarray, top_ids: np.ndarray | None = None, top_k: int = 5
) -> TrackedTokens:
    """Follow the best tokens of the last row through the rows before it.

    Args:
        top_tokens: ``[row, k]``, text, best first.
        top_probs: ``[row, k]``.
        top_ids: ``[row, k]``; None takes equal text for the same token.
        top_k: How many to follow.

    Returns:
        Their probabilities and ranks.
    """
    keys = np.asarray(top_tokens, dtype=object) if top_ids is None else np.asarray(top_ids)
    count = min(top_k, keys.shape[1])
    found = keys[None, :, :] == keys[-1, :count, None, None]  # [token, row, k]
    rank = np.where(found.any(-1), found.argmax(-1), np.nan)
    here = np.take_along_axis(np.asarray(top_probs, float)[None], found.argmax(-1)[..., None], -1)
    probabilities = np.where(found.any(-1), here[..., 0], np.nan)
    return TrackedTokens(tuple(str(t) for t in top_tokens[-1][:count]), probabilities, rank)


def plot_refinement(
    top_tokens: np.ndarray,
    top_probs: np.ndarray,
    row_labels: Sequence[str] | None = None,
    *,
    top_ids: np.ndarray | None = None,
    top_k: int = 5,
    axes: Any = None,
    figsize: tuple[float, float] | None = None,
    title: str | None = None,
    save_path: str | Path | None = None,
    show: bool = False,
) -> Figure:
    """How the prediction of one position forms, layer by layer.

    Above, the probability of each of the last layer's best tokens; where a line is missing, it
    lies below all tokens kept there. Below, each layer's best tokens in order; those followed above
    have their colour.

    Args:
        top_tokens: ``[row, k]``, text, best first; keep more than ``top_k`` to see the lines start.
        top_probs: ``[row, k]``.
        row_labels: One per row; None counts.
        top_ids: ``[row, k]``, to tell tokens of the same text apart.
        top_k: Tokens to follow, and ranks to list.
        axes: Two axes; None makes a figure.
        figsize: Of a figure made here, in inches.
        title: Above the lines.
        save_path: See `figure_canvas.finish`.
        show: See `figure_canvas.finish`.

    Returns:
        The figure.

    Raises:
        ValueError: the shapes do not fit together, or there are not two axes.
    """
    top_tokens = np.asarray(top_tokens, dtype=object)
    if top_tokens.ndim != 2 or top_tokens.shape != np.shape(top_probs):
        shapes = f"{top_tokens.shape} and {np.shape(top_probs)}"
        raise ValueError(f"top_tokens and top_probs must both be [row, k]; they are {shapes}")
    labels = checked_labels(row_labels, len(top_tokens), "row_labels")
    tracked = track_tokens(top_tokens, top_probs, top_ids, top_k)
    with drawing():
        if axes is None:
            width = min(max(0.62 * len(labels) + 1.8, 6.0), 32.0)
            figure = new_figure(figsize or (width, 3.2 + 0.25 * top_k + 0.6))
            axes = figure.subplots(2, 1, sharex=True, height_ratios=(2.8, 0.25 * top_k + 0.4))
        lines, ranks = axes_list(axes, 2)
        _draw_lines(lines, tracked)
        lines.set_title("Prediction refinement" if title is None else title, fontsize=11)
        ranks.imshow(
            np.zeros((min(top_k, top_tokens.shape[1]), len(labels))), alpha=0, aspect="auto"
        )
        names = [f"#{rank + 1}" for rank in range(min(top_k, top_tokens.shape[1]))]
        ranks.set(xlabel="layer", ylabel="rank")
        arrange(ranks, labels, names)
        _name_lines(lines, tracked)
        _write_ranks(
            ranks, np.where(top_tokens == "", EMPTY, top_tokens)[:, : len(names)].T, tracked
        )
    return finish(figure_of(lines), save_path, show)


def _color(index: int) -> str:
    return PALETTE[index % len(PALETTE)]


def _draw_lines(ax: Axes, tracked: TrackedTokens) -> None:
    for index, values in enumerate(tracked.probabilities):
        style = "-" if index < len(PALETTE) else "--"
        ax.plot(values, style, color=_color(index), marker="o", markersize=3, linewidth=1.6)
    highest = float(np.nanmax(tracked.probabilities))
    top = 1.0 if highest > 0.5 else 1.2 * max(highest, 1e-6)
    ax.set(
        ylabel="probability",
        ylim=(-0.02 * top, 1.02 * top),
        xlim=(-0.5, tracked.ranks.shape[1] - 0.5),
    )
    ax.grid(alpha=0.3)
    longest = max(
        text_width(readable_token(t, 14, can_draw), LABEL_SIZE + 1) for t in tracked.tokens
    )
    ax.annotate(  # room for the names, which are written when the layout is known
        "", (1, 0.5), xytext=(longest + 36, 0), xycoords="axes fraction", textcoords="offset points"
    )


def _name_lines(ax: Axes, tracked: TrackedTokens) -> None:
    """Write each token beside the end of its line, moved apart where they would touch."""
    ends = np.nan_to_num(tracked.probabilities[:, -1])
    height = room_of(ax)[1]
    low, high = ax.get_ylim()
    wanted = (ends - low) / (high - low) * height
    for index, place in enumerate(spread(wanted, (LABEL_SIZE + 1) * 1.25, height)):
        name = readable_token(tracked.tokens[index], 14, can_draw)
        ax.annotate(
            name,
            (tracked.ranks.shape[1] - 1, ends[index]),
            xytext=(1 + 18 / room_of(ax)[0], place / height),
            textcoords="axes fraction",
            color=_color(index),
            fontsize=LABEL_SIZE + 1,
            va="center",
            arrowprops={"arrowstyle": "-", "color": _color(index), "alpha": 0.4, "shrinkA": 3},
            annotation_clip=False,
        )


def spread(wanted: np.ndarray, gap: float, height: float) -> np.ndarray:
    """Places near those wanted, in their order, ``gap`` apart, inside 0 … height if all fit."""
    order = np.argsort(wanted, kind="stable")
    lowest, highest = gap / 2, height - gap / 2
    places = np.clip(np.asarray(wanted, dtype=float)[order], lowest, highest)
    steps = np.arange(len(places)) * gap
    places = np.maximum.accumulate(places - steps) + steps  # push up
    down = steps[::-1]
    places = np.minimum(places, highest - down)
    places = np.maximum(places, lowest + steps) if lowest + steps[-1] > highest else places
    result = np.empty_like(places)
    result[order] = places
    return result


def _write_ranks(ax: Axes, texts: np.ndarray, tracked: TrackedTokens) -> None:
    """Fill the table of ranks: ``texts`` is ``[rank, row]``."""
    from matplotlib.colors import to_rgb

    colors = np.ones((*texts.shape, 3))
    for index in range(len(tracked.tokens)):
        for row, rank in enumerate(tracked.ranks[index]):
            if rank < len(texts):
                colors[int(rank), row] = 0.55 + 0.45 * np.array(to_rgb(_color(index)))
    ax.imshow(colors, aspect="auto", interpolation="nearest")
    write_cells(ax, texts, colors)
