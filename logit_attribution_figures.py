"""Pictures of a logit as a sum over the parts of a model: bars, a waterfall, heat maps.

What adds to the logit is red, what takes from it blue; 0 is always in the middle of a colour bar.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from figure_canvas import LABEL_SIZE, figure_of, finish, new_figure, room_of
from heat_maps import plot_heatmap
from token_labels import axis_labels, can_draw, drawing, readable_token, thinned

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PLUS, MINUS, SUM = "#b2182b", "#2166ac", "#4d4d4d"

OTHERS = "{} others together"

PICTURES = ("bar", "waterfall", "heatmap")

GROUPS = {
    "attn": ("head", "attn", "attn_bias", "mixer"),
    "mlp": ("mlp", "neuron", "mlp_bias"),
    "block": ("block", "other"),
}
"""The steps of a waterfall within a block, and the kinds of parts that are in each."""

MOST_STEPS = 44
"""A waterfall with more steps than this has one per block."""


def plot_attribution(
    result: Any,
    kind: str = "bar",
    *,
    position: int | None = None,
    target: int = 0,
    k: int = 15,
    cumulative: bool = False,
    ax: Axes | None = None,
    figsize: tuple[float, float] | None = None,
    title: str | None = None,
    save_path: str | Path | None = None,
    show: bool = False,
) -> Figure:
    """One of three pictures.

    Args:
        result: A `logit_attribution.LogitAttribution`.
        kind: ``bar``: the largest parts, and the sum of all others. ``waterfall``: from 0 through
            the embedding and each block's attention and MLP to the logit. ``heatmap``: layer ×
            position for several positions; for one of them layer × head, beside the MLP.
        position: Absolute; None is the last that was attributed (and of a heat map all).
        target: Which of the targets.
        k: How many bars.
        cumulative: Of a heat map over positions: the logit lens with the norm's scale held, instead
            of what each block adds.
        ax: Where to draw; None makes a figure.
        figsize: Of a figure made here, in inches.
        title: Above it; None says what is split.
        save_path: See `figure_canvas.finish`.
        show: See `figure_canvas.finish`.

    Returns:
        The figure.

    Raises:
        ValueError: there is no such kind of picture.
        InputError: there is no such position or target.
    """
    if kind not in PICTURES:
        raise ValueError(f"kind is {', '.join(PICTURES)}; came {kind!r}")
    row, column = result.cell(position, target)
    whole = kind == "heatmap" and position is None and len(result.positions) > 1
    heading = title if title is not None else _heading(result, None if whole else row, column)
    if kind == "heatmap":
        draw = _positions_map if whole else _heads_map
        options: dict[str, Any] = {"ax": ax, "figsize": figsize, "title": heading}
        options |= {"save_path": save_path, "show": show}
        return draw(result, row, column, cumulative, options)
    steps = _bars(result, row, column, k) if kind == "bar" else _steps(result, row, column)
    with drawing():
        if ax is None:
            size = figsize or (6.4, min(max(0.22 * len(steps[0]) + 1.3, 2.6), 13.0))
            ax = new_figure(size).subplots()
        (_draw_bars if kind == "bar" else _draw_waterfall)(ax, *steps)
        what = "logit difference" if result.against_ids[row, column] >= 0 else "logit"
        ax.set(xlabel=f"added to the {what}" if kind == "bar" else what)
        ax.set_title(heading, fontsize=11)
    return finish(figure_of(ax), save_path, show)


def _heading(result: Any, row: int | None, column: int) -> str:
    """What is split, and what it is."""
    places = range(len(result.positions)) if row is None else [row]
    pairs = {(result.targets[i][column], result.against[i][column]) for i in places}
    if len(pairs) > 1:
        return "Logits of the tokens above, by block"
    text, foil = (readable_token(each, 16, can_draw) for each in pairs.pop())
    against = bool((result.against_ids[list(places), column] >= 0).any())
    what = f"'{text}' − '{foil}'" if against else f"'{text}'"
    if row is None:
        return f"{what} after each token"
    token = readable_token(result.tokens[result.positions[row]], 16, can_draw)
    return f"{what} after '{token}': {result.logits[row, column]:.2f}"


# --- Bars -----------------------------------------------------------------------------------------


def _bars(result: Any, row: int, column: int, k: int) -> tuple[list[str], np.ndarray]:
    """Labels and numbers of the largest parts, and of all others together."""
    values = result.values[:, row, column]
    order = np.argsort(-np.abs(values), kind="stable")
    heads = result.of_kind("head")
    labels = [f"head {result.labels[i]}" if heads[i] else result.labels[i] for i in order[:k]]
    rest = order[k:]
    if not len(rest):
        return labels, values[order]
    return [*labels, OTHERS.format(len(rest))], np.append(values[order[:k]], values[rest].sum())


def _draw_bars(ax: Axes, labels: Sequence[str], values: np.ndarray) -> None:
    colors = np.where(values > 0, PLUS, MINUS)
    if labels[-1].endswith(OTHERS[2:]):
        colors[-1] = SUM
    ax.barh(np.arange(len(labels)), values, color=colors, height=0.78)
    _finish_rows(ax, labels, values, np.maximum(values, 0), np.minimum(values, 0))


def _finish_rows(
    ax: Axes, labels: Sequence[str], values: np.ndarray, right: np.ndarray, left: np.ndarray
) -> None:
    """Labels of the rows, each row's number beside its bar, and the line at 0."""
    ax.set_ylim(len(labels) - 0.4, -0.6)
    ax.axvline(0, color="black", linewidth=0.8)
    low, high = min(float(left.min()), 0.0), max(float(right.max()), 0.0)
    room = 0.12 * (high - low or 1.0)
    ax.set_xlim(low - room * (values < 0).any(), high + room * (values >= 0).any())
    shown = thinned(len(labels), room_of(ax)[1] / len(labels), LABEL_SIZE * 1.2)
    ax.set_yticks(shown, [labels[i] for i in shown], fontsize=LABEL_SIZE)
    for place in shown:
        plus = values[place] >= 0
        ax.annotate(
            _signed(values[place]),
            (right[place] if plus else left[place], place),
            xytext=(3 if plus else -3, 0),
            textcoords="offset points",
            ha="left" if plus else "right",
            va="center",
            fontsize=LABEL_SIZE - 1,
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.5},
        )
    ax.spines[["top", "right"]].set_visible(False)


def _signed(value: float) -> str:
    return f"{value:+.2f}".replace("-", "−")


# --- The waterfall --------------------------------------------------------------------------------


def _steps(result: Any, row: int, column: int) -> tuple[list[str], np.ndarray, int]:
    """Labels and numbers of the steps from 0 to the logit, and how many of them are sums."""
    values = result.values[:, row, column]
    steps: list[tuple[str, float]] = []
    for kind in ("embed", "position"):
        steps += _step(kind, values[result.of_kind(kind)])
    blocks = [_block_steps(result, values, layer) for layer in range(result.n_layers)]
    if sum(map(len, blocks)) > MOST_STEPS:
        blocks = [[(str(n), sum(v for _, v in block))] for n, block in enumerate(blocks)]
    for block in blocks:
        steps += block
    for kind, name in ENDS.items():
        steps += _step(name, values[result.of_kind(kind)])
    against = bool(result.against_ids[row, column] >= 0)
    steps.append(("difference" if against else "logit", float(values.sum())))
    return [name for name, _ in steps], np.array([value for _, value in steps]), 1


ENDS = {
    "norm_bias": "final norm bias",
    "unembed_bias": "unembedding bias",
    "soft_cap": "soft-cap",
}


def _step(name: str, values: np.ndarray) -> list[tuple[str, float]]:
    return [(name, float(values.sum()))] if len(values) else []


def _block_steps(result: Any, values: np.ndarray, layer: int) -> list[tuple[str, float]]:
    here = result.layers == layer
    steps = []
    for name, kinds in GROUPS.items():
        chosen = here & result.of_kind(*kinds)
        names = {kind for kind in kinds if (chosen & result.of_kind(kind)).any()}
        label = names.pop() if len(names) == 1 and names <= {"mixer", "other"} else name
        steps += _step(f"{label} {layer}", values[chosen])
    return steps


def _draw_waterfall(ax: Axes, labels: Sequence[str], values: np.ndarray, sums: int) -> None:
    parts = values[:-sums]
    ends = np.append(parts.cumsum(), values[-sums:])
    starts = np.append(ends[: len(parts)] - parts, np.zeros(sums))
    places = np.arange(len(labels))
    colors = np.where(values > 0, PLUS, MINUS)
    colors[-sums:] = SUM
    ax.barh(places, ends - starts, left=starts, color=colors, height=0.78)
    for place in places[:-1]:
        ax.plot([ends[place]] * 2, [place + 0.39, place + 0.61], color="#777777", linewidth=0.7)
    _finish_rows(ax, labels, values, np.maximum(starts, ends), np.minimum(starts, ends))


# --- Heat maps ------------------------------------------------------------------------------------


def _positions_map(
    result: Any, _row: int, column: int, cumulative: bool, options: dict[str, Any]
) -> Figure:
    """Layer × position: what each block adds, or the lens after it."""
    table = (result.cumulative() if cumulative else result.by_layer())[..., column]
    rows = ["embed", *map(str, range(result.n_layers))]
    if not cumulative and result.of_kind(*ENDS).any():
        rows.append("end")
    tokens = [result.tokens[p] for p in result.positions]
    below = axis_labels(tokens, drawable=can_draw, positions=result.positions)
    targets = [row[column] for row in result.targets]
    above = axis_labels(targets, drawable=can_draw, positions=result.positions)
    return plot_heatmap(
        table[: len(rows)],
        below,
        rows,
        top_labels=above if len(set(targets)) > 1 else None,
        value_label="logit after the block" if cumulative else "added to the logit",
        signed=True,
        y_name="layer",
        **options,
    )


def _heads_map(
    result: Any, row: int, column: int, _cumulative: bool, options: dict[str, Any]
) -> Figure:
    """Layer × part of a block: heads, then what is no head."""
    values = result.values[:, row, column]
    heads = result.of_kind("head")
    count = int(result.indices[heads].max()) + 1 if heads.any() else 0
    columns = [str(i) for i in range(count)]
    table = np.full((result.n_layers, count), np.nan)
    table[result.layers[heads], result.indices[heads]] = values[heads]
    rest = (("bias", ("attn_bias",)), ("attn", ("attn", "mixer")), ("MLP", GROUPS["mlp"]))
    for name, kinds in (*rest, ("other", GROUPS["block"])):
        chosen = result.of_kind(*kinds)
        if chosen.any():
            sums = np.full(result.n_layers, np.nan)
            sums[result.layers[chosen]] = 0
            np.add.at(sums, result.layers[chosen], values[chosen])
            columns.append(name)
            table = np.column_stack([table, sums])
    outside = [i for i in np.flatnonzero(result.layers < 0)]
    named = ", ".join(f"{result.labels[i]} {_signed(values[i])}" for i in outside)
    options["title"] = f"{options['title']}\n{named}" if named else options["title"]
    return plot_heatmap(
        table,
        columns,
        [str(n) for n in range(result.n_layers)],
        value_label="added to the logit",
        signed=True,
        x_name="head, and what is no head",
        y_name="layer",
        **options,
    )
