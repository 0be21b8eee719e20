"""Figures of one text read layer by layer. They take arrays and labels: no torch, no model.

    plot_lens_heatmap          layers × positions, each cell's top token as text
    plot_metric_panels         several tables of one text, side by side
    plot_convergence_panels    four of them: how each layer compares with the final prediction
    plot_preservation_panels   two of them: how much of the input token is left
    plot_refinement            how the top tokens of one position move across layers

Plain heat maps (`heat_maps`) and the refinement (`refinement_figure`) are found here too; points
and paths are in `embedding_figures`, the same figures for a browser in `interactive_figures`. Depth
runs downwards: the embedding on top, the last layer at the bottom.

The heat map follows nostalgebraist (2020), "interpreting GPT: the logit lens".
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from figure_canvas import (
    axes_list,
    figure_of,
    finish,
    new_figure,
)
from heat_maps import (
    arrange,
    as_table,
    cell_colors,
    cell_figsize,
    color_scale,
    draw_cells,
    plot_head_grid,
    plot_heatmap,
    plot_similarity,
    write_cells,
)
from refinement_figure import TrackedTokens, plot_refinement, track_tokens
from token_labels import EMPTY, axis_labels, can_draw, drawing, readable_token

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = [
    "CONVERGENCE",
    "METRICS",
    "PRESERVATION",
    "LensCells",
    "LensTables",
    "Metric",
    "TrackedTokens",
    "finish",
    "lens_cells",
    "plot_convergence_panels",
    "plot_head_grid",
    "plot_heatmap",
    "plot_lens_heatmap",
    "plot_metric_panels",
    "plot_preservation_panels",
    "plot_refinement",
    "plot_similarity",
    "track_tokens",
]


@dataclass(frozen=True)
class Metric:
    """How a table of numbers is shown."""

    label: str
    """What the colours mean, with the unit."""
    log: bool = False
    reverse: bool = False
    """Low is good, and bright."""
    limits: tuple[float | None, float | None] = (None, None)


METRICS = {
    "probability": Metric("probability of the top token", limits=(0, 1)),
    "logit": Metric("logit of the top token"),
    "kl_divergence": Metric("KL(final ‖ layer), nats", reverse=True, limits=(0, None)),
    "top1_match": Metric("top token is the final one (1) or not (0)", limits=(0, 1)),
    "top1_rank": Metric("rank of the final top token (0 = best)", log=True, reverse=True),
    "top1_logit": Metric("logit of the layer's top token"),
    "entropy": Metric("entropy, nats", reverse=True, limits=(0, None)),
    "cross_entropy": Metric(
        "cross-entropy of the next token, nats", reverse=True, limits=(0, None)
    ),
    "next_token_prob": Metric("probability of the true next token", limits=(0, 1)),
    "next_token_rank": Metric("rank of the true next token (0 = best)", log=True, reverse=True),
    "target_prob": Metric("probability of the target", limits=(0, 1)),
    "target_rank": Metric("rank of the target (0 = best)", log=True, reverse=True),
    "js_divergence": Metric("Jensen-Shannon divergence, nats", reverse=True, limits=(0, None)),
    "total_variation": Metric("total variation", reverse=True, limits=(0, 1)),
    "input_token_rank": Metric("rank of the input token (0 = best)", log=True, reverse=True),
    "input_token_prob": Metric("probability of the input token", limits=(0, 1)),
    "kl_from_input": Metric("KL(embedding ‖ layer), nats", reverse=True, limits=(0, None)),
}
"""Known tables; any other is drawn by its name."""

COLORINGS = {"rank": "top1_rank", "kl": "kl_divergence"}
"""Short names for `plot_lens_heatmap`."""

CONVERGENCE = ("kl_divergence", "top1_match", "top1_rank", "top1_logit")
PRESERVATION = ("input_token_rank", "kl_from_input")


class LensTables(Protocol):
    """What a lens saw (`lens_result.LensResult`): axes are row, position and k, best first."""

    @property
    def tokens(self) -> Sequence[str]:
        """One per position."""

    @property
    def row_labels(self) -> Sequence[str]:
        """One per row, in order of depth."""

    @property
    def top_tokens(self) -> np.ndarray:
        """``[row, position, k]``, text."""

    @property
    def top_probs(self) -> np.ndarray:
        """``[row, position, k]``."""

    @property
    def top_logits(self) -> np.ndarray:
        """``[row, position, k]``."""

    @property
    def metrics(self) -> Mapping[str, np.ndarray]:
        """``[row, position]`` each."""


# --- The lens heat map ---------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class LensCells:
    """A lens as a heat map shows it: the rows and columns wanted, ready to draw."""

    values: np.ndarray
    """``[row, column]``, what the colours say."""
    texts: np.ndarray
    """``[row, column]``, each cell's top token."""
    right: np.ndarray
    """``[row, column]``, whether it is the true next token."""
    tokens: tuple[str, ...]
    """One per column: the input."""
    next_tokens: tuple[str, ...]
    """One per column: the true next token, "" where nothing follows."""
    positions: tuple[int, ...]
    rows: tuple[int, ...]
    row_labels: tuple[str, ...]
    metric: Metric


def lens_cells(
    result: LensTables,
    color_by: str = "probability",
    rows: Sequence[int] | None = None,
    columns: Sequence[int] | None = None,
) -> LensCells:
    """Compute what a lens heat map shows.

    Args:
        result: A `lens_result.LensResult`.
        color_by: See `plot_lens_heatmap`.
        rows: Indices of rows to keep; None means all.
        columns: Indices of positions to keep; None means all.

    Returns:
        The cells.

    Raises:
        ValueError: the result has no such table.
    """
    name = COLORINGS.get(color_by, color_by)
    own = {"probability": result.top_probs[:, :, 0], "logit": result.top_logits[:, :, 0]}
    tables = {**result.metrics, **own}
    if name not in tables:
        known = ", ".join((*own, *COLORINGS, *result.metrics))
        raise ValueError(f"color_by={color_by!r} is not in this result; it has {known}")
    count = len(result.tokens)
    rows = tuple(range(len(result.row_labels)) if rows is None else rows)
    columns = tuple(range(count) if columns is None else columns)
    following = (*result.tokens[1:], "")
    cut = np.ix_(rows, columns)
    top = result.top_tokens[:, :, 0]
    rank = result.metrics.get("next_token_rank")
    right = (top == np.array(following, dtype=object)) if rank is None else np.equal(rank, 0)
    places = getattr(result, "positions", range(count))
    return LensCells(
        values=np.asarray(tables[name][cut], dtype=float),
        texts=np.where(top == "", EMPTY, top)[cut],
        right=right[cut],
        tokens=tuple(result.tokens[c] for c in columns),
        next_tokens=tuple(following[c] for c in columns),
        positions=tuple(places[c] for c in columns),
        rows=rows,
        row_labels=tuple(result.row_labels[r] for r in rows),
        metric=METRICS.get(name, Metric(name.replace("_", " "))),
    )


def plot_lens_heatmap(
    lens_result: LensTables,
    color_by: str = "probability",
    *,
    rows: Sequence[int] | None = None,
    columns: Sequence[int] | None = None,
    mark_next: bool = True,
    ax: Axes | None = None,
    figsize: tuple[float, float] | None = None,
    title: str | None = None,
    save_path: str | Path | None = None,
    show: bool = False,
) -> Figure:
    """The logit lens of a text: layers × positions, each cell's top token as text.

    Read a column downwards: what the model would say after this token, if it stopped at that layer.
    The embedding is the first row, the last row the model's own prediction. Input tokens stand
    below, the true next tokens above; a framed cell has found the true next token.

    Args:
        lens_result: What `LogitLens.run` returned.
        color_by: ``"probability"`` or ``"logit"`` of the top token, ``"entropy"``, ``"rank"`` (of
            the final prediction), ``"kl"``, or the name of any metric that the result holds.
        rows: Indices of rows to draw; None means all.
        columns: Indices of positions to draw; None means all.
        mark_next: Frame the cells that have found the true next token, and show it above.
        ax: Where to draw; None makes a figure.
        figsize: Of a figure made here, in inches; None follows the number of cells.
        title: None names the lens.
        save_path: See `figure_canvas.finish`.
        show: See `figure_canvas.finish`.

    Returns:
        The figure.

    Raises:
        ValueError: the result has no such table.
    """
    cells = lens_cells(lens_result, color_by, rows, columns)
    with drawing():
        if ax is None:
            ax = new_figure(figsize or cell_figsize(cells.values.shape, True)).subplots()
        metric = cells.metric
        scale = color_scale(
            cells.values, log=metric.log, reverse=metric.reverse, limits=metric.limits
        )
        image = draw_cells(ax, cells.values, scale, metric.label)
        columns_named = axis_labels(cells.tokens, 12, can_draw, cells.positions)
        above = [readable_token(t, 12, can_draw) if t else "" for t in cells.next_tokens]
        note = "  ·  top: the true next token; framed cells found it" if mark_next else ""
        ax.set(xlabel=f"input token{note}", ylabel="layer")
        ax.set_title("Logit lens" if title is None else title, fontsize=11)
        arrange(ax, columns_named, cells.row_labels, above if mark_next else None)
        write_cells(ax, cells.texts, cell_colors(image))
        if mark_next:
            _frame(ax, cells.right)
    return finish(figure_of(ax), save_path, show)


def _frame(ax: Axes, cells: np.ndarray) -> None:
    """Draw a frame, dark on light, around each cell that is True."""
    from matplotlib.collections import LineCollection

    corners = np.array([[-0.46, -0.43], [0.46, -0.43], [0.46, 0.43], [-0.46, 0.43], [-0.46, -0.43]])
    boxes = [corners + place[::-1] for place in np.argwhere(cells)]
    for name, color, width in (("frame ground", "white", 2.6), ("found", "#D4006A", 1.3)):
        ax.add_collection(
            LineCollection(boxes, colors=color, linewidths=width, gid=name), autolim=False
        )


# --- Several tables of one text ------------------------------------------------------------------


def plot_metric_panels(
    metrics: Mapping[str, Any],
    names: Sequence[str],
    *,
    axes: Any = None,
    figsize: tuple[float, float] | None = None,
    title: str | None = None,
    save_path: str | Path | None = None,
    show: bool = False,
) -> Figure:
    """One heat map, layers × positions, for each of several tables.

    Args:
        metrics: ``[row, position]`` under each name, and ``input_tokens``, ``row_labels``.
        names: Which tables.
        axes: As many axes as names; None makes a figure.
        figsize: Of a figure made here, in inches; None follows the number of cells.
        title: Above all panels of a figure made here.
        save_path: See `figure_canvas.finish`.
        show: See `figure_canvas.finish`.

    Returns:
        The figure.

    Raises:
        ValueError: a table is missing or has other axes, or there are too few axes.
    """
    tables = metric_tables(metrics, names)
    tokens, rows = metrics["input_tokens"], [str(label) for label in metrics["row_labels"]]
    with drawing():
        labels = axis_labels(tokens, 12, can_draw)
        if axes is None:
            wide, high = cell_figsize((len(rows), len(tokens)), False)
            columns = 2 if wide < 9 or len(names) == 4 else 1
            lines = -(-len(names) // columns)
            figure = new_figure(figsize or (wide * columns, high * lines + 0.3))
            sheet = figure.subplots(lines, columns, squeeze=False).ravel()
            axes = sheet[: len(names)]
            for unused in sheet[len(names) :]:
                unused.remove()
            figure.suptitle(title or "", fontsize=12)
        panels = axes_list(axes, len(names))
        for ax, name in zip(panels, names, strict=True):
            metric = METRICS.get(name, Metric(name.replace("_", " ")))
            scale = color_scale(
                tables[name], log=metric.log, reverse=metric.reverse, limits=metric.limits
            )
            draw_cells(ax, tables[name], scale, "")
            ax.set(xlabel="input token", ylabel="layer")
            ax.set_title(metric.label, fontsize=10)
        arrange(*((ax, labels, rows, None) for ax in panels))
    return finish(figure_of(panels[0]), save_path, show)


def metric_tables(metrics: Mapping[str, Any], names: Sequence[str]) -> dict[str, np.ndarray]:
    """The tables by name, checked against the labels.

    Raises:
        ValueError: one is missing or has other axes.
    """
    needed = {*names, "input_tokens", "row_labels"} - {*metrics}
    if needed:
        raise ValueError(
            f"the metrics lack {', '.join(sorted(needed))}; they hold {', '.join(metrics)}"
        )
    shape = (len(metrics["row_labels"]), len(metrics["input_tokens"]))
    tables = {name: as_table(metrics[name], name) for name in names}
    for name, table in tables.items():
        if table.shape != shape:
            raise ValueError(f"{name} must be [row, position] = {shape}; it is {table.shape}")
    return tables


def plot_convergence_panels(metrics: Mapping[str, Any], **options: Any) -> Figure:
    """How each layer compares with the final prediction: KL, top-1 match, rank and logit.

    Args:
        metrics: What `LogitLens.get_convergence_metrics` returned.
        **options: See `plot_metric_panels`.

    Returns:
        The figure, four panels. They brighten downwards as the prediction converges.
    """
    return plot_metric_panels(metrics, CONVERGENCE, **({"title": "Convergence"} | options))


def plot_preservation_panels(metrics: Mapping[str, Any], **options: Any) -> Figure:
    """How much of the input token each layer still says: its rank, and KL from the embedding.

    Args:
        metrics: What `LogitLens.compare_to_input` returned.
        **options: See `plot_metric_panels`.

    Returns:
        The figure, two panels. They darken downwards as the input is forgotten.
    """
    return plot_metric_panels(metrics, PRESERVATION, **({"title": "Input preservation"} | options))
