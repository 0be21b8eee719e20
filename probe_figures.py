"""Pictures of linear probes: score by layer with what it must be compared with, and after erasure.

Only labels and numbers are seen here (`probe_result.ProbeResult`, `concept_eraser.ErasureResult`,
or anything with their fields).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from figure_canvas import LABEL_SIZE, PALETTE, figure_of, finish, new_figure
from token_labels import drawing

if TYPE_CHECKING:
    from matplotlib.axes import Axes

LINE: dict[str, Any] = {"marker": "o", "markersize": 4, "linewidth": 1.8}
"""How a score by layer is drawn."""

EDGE = 0.04
"""Room below 0 and above 1, of an axis of shares."""


def plot_probes(
    result: Any,
    *,
    against: Mapping[str, Mapping[int, float]] | None = None,
    against_name: str = "effect",
    title: str | None = None,
    ax: Axes | None = None,
    save_path: str | Path | None = None,
    show: bool = False,
) -> Any:
    """Score by layer, with its baselines, the control task and the range of permuted labels.

    Args:
        result: A `probe_result.ProbeResult`.
        against: Other curves by name, each ``{layer: value}``, such as the effects of patching;
            drawn dashed, with an axis of their own on the right.
        against_name: What that axis measures.
        title: Above the picture; None says what was probed.
        ax: Where to draw; None makes a figure.
        save_path: See `figure_canvas.finish`.
        show: See `figure_canvas.finish`.

    Returns:
        The figure.
    """
    layers, scores = np.array(result.layers), result.scores
    groups = f"new {'groups' if result.n_groups else 'examples'}"
    with drawing():
        ax = _axes(ax, len(layers))
        if result.null.shape[1] > 1:
            low, high = np.percentile(result.null, [2.5, 97.5], axis=1)
            ax.fill_between(layers, low, high, color="#dddddd", label="labels permuted (95 %)")
        error: dict[str, Any] = {"elinewidth": 0.8, "capsize": 2, "fmt": "none"}
        ax.errorbar(layers, scores, result.stderr, ecolor=PALETTE[0], **error)
        ax.plot(layers, scores, color=PALETTE[0], label=groups, **LINE)
        if result.n_groups:
            label = "new examples of known groups"
            ax.plot(layers, result.shared_scores, color=PALETTE[5], label=label, **LINE)
        if np.isfinite(result.control).any():
            ax.plot(layers, result.control, color=PALETTE[1], label="control task", **LINE)
        _frame(ax, layers, result, _heading(result) if title is None else title)
        _legend(ax, _second_axis(ax, against, against_name))
    return finish(figure_of(ax), save_path, show)


def plot_erasure(
    result: Any,
    *,
    title: str | None = None,
    ax: Axes | None = None,
    save_path: str | Path | None = None,
    show: bool = False,
) -> Any:
    """Score by layer, with and without the erasure.

    Args:
        result: A `concept_eraser.ErasureResult`.
        title: Above the picture; None says what was erased.
        ax: Where to draw; None makes a figure.
        save_path: See `figure_canvas.finish`.
        show: See `figure_canvas.finish`.

    Returns:
        The figure.
    """
    layers = np.array(result.layers)
    heading = f"{result.site}: erased at layer {layers[0]} ({result.method}, rank {result.rank})"
    with drawing():
        ax = _axes(ax, len(layers))
        ax.plot(layers, result.before, color=PALETTE[0], label="as it is", **LINE)
        ax.plot(layers, result.after, color=PALETTE[1], label="erased, probe refitted", **LINE)
        _frame(ax, layers, result, heading if title is None else title)
        _legend(ax, [])
    return finish(figure_of(ax), save_path, show)


def _axes(ax: Axes | None, layers: int) -> Axes:
    return ax or new_figure((min(max(5.6, 0.34 * layers + 3.0), 14.0), 3.8)).subplots()


def _frame(ax: Axes, layers: np.ndarray, result: Any, title: str) -> None:
    """Baselines, limits and names of the axes."""
    from matplotlib.ticker import MaxNLocator

    _baselines(ax, result)
    accuracy = result.task == "classification"
    ax.set(xlabel="layer", ylabel="accuracy" if accuracy else "R²")
    if accuracy:
        ax.set_ylim(-EDGE, 1 + EDGE)
    ax.set_title(title, fontsize=11)
    ax.xaxis.set_major_locator(MaxNLocator(nbins=16, integer=True, min_n_ticks=1))
    ax.set_xlim(layers.min() - 0.5, layers.max() + 0.5)
    ax.spines[["top", "right"]].set_visible(False)


def _baselines(ax: Axes, result: Any) -> None:
    """Lines for the majority (or the mean) and for guessing, one line where they are the same."""
    same = np.isfinite(result.chance) and abs(result.chance - result.baseline) < 1e-9
    name = "largest class" if np.isfinite(result.chance) else "mean of the labels"
    label = "chance" if same else name
    ax.axhline(result.baseline, color="#555555", linewidth=1, linestyle="--", label=label)
    if np.isfinite(result.chance) and not same:
        ax.axhline(result.chance, color="#555555", linewidth=1, linestyle=":", label="chance")


def _heading(result: Any) -> str:
    what = f"{len(result.classes)} classes" if result.classes else "a number"
    head = "" if result.head is None else f", head {result.head}"
    groups = f" in {result.n_groups} groups" if result.n_groups else ""
    return f"Linear probes of {result.site}{head}: {what}, {len(result.labels)} examples{groups}"


def _second_axis(
    ax: Axes, curves: Mapping[str, Mapping[int, float]] | None, name: str
) -> list[Any]:
    """Draw other curves on an axis on the right; returns that axis, if there is one."""
    if not curves:
        return []
    other = ax.twinx()
    limits = ax.get_ylim()
    inside = True
    for place, (label, values) in enumerate(curves.items()):
        color = PALETTE[(2 + place) % len(PALETTE)]
        points = sorted(values.items())
        xs, ys = [x for x, _ in points], [y for _, y in points]
        inside = inside and all(limits[0] <= y <= limits[1] for y in ys)
        other.plot(xs, ys, color=color, linestyle="--", marker="s", markersize=3.5, label=label)
    if inside and limits[1] == 1 + EDGE:  # of shares both, so heights shall mean the same
        other.set_ylim(limits)
    other.set_ylabel(name, fontsize=9)
    other.spines["top"].set_visible(False)
    return [other]


def _legend(ax: Axes, others: list[Any]) -> None:
    """One legend for both axes, beside the picture, where it hides nothing."""
    found = [each.get_legend_handles_labels() for each in (ax, *others)]
    handles = [handle for part in found for handle in part[0]]
    labels = [label for part in found for label in part[1]]
    figure_of(ax).legend(
        handles, labels, loc="outside lower center", ncols=min(3, len(labels)), frameon=False,
        fontsize=LABEL_SIZE,
    )  # fmt: skip
