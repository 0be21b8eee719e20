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
        _baselines(ax, result)
        look: dict[str, Any] = {"marker": "o", "markersize": 4, "linewidth": 1.8}
        error = {"yerr": result.stderr, "elinewidth": 0.8, "capsize": 2}
        ax.errorbar(layers, scores, **error, color=PALETTE[0], label=groups, **look)
        if result.n_groups:
            label = "new examples of known groups"
            ax.plot(layers, result.shared_scores, color=PALETTE[5], label=label, **look)
        if np.isfinite(result.control).any():
            ax.plot(layers, result.control, color=PALETTE[1], label="control task", **look)
        ax.set(xlabel="layer", ylabel=result.score_name)
        ax.set_title(_heading(result) if title is None else title, fontsize=11)
        _integer_axis(ax, layers)
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
        _baselines(ax, result)
        look: dict[str, Any] = {"marker": "o", "markersize": 4, "linewidth": 1.8}
        ax.plot(layers, result.before, color=PALETTE[0], label="as it is", **look)
        ax.plot(layers, result.after, color=PALETTE[1], label="erased, probe refitted", **look)
        score = "accuracy" if result.task == "classification" else "R²"
        ax.set(xlabel="layer", ylabel=score)
        ax.set_title(heading if title is None else title, fontsize=11)
        _integer_axis(ax, layers)
        _legend(ax, [])
    return finish(figure_of(ax), save_path, show)


def _axes(ax: Axes | None, layers: int) -> Axes:
    return ax or new_figure((min(max(5.6, 0.34 * layers + 3.0), 14.0), 3.8)).subplots()


def _integer_axis(ax: Axes, layers: np.ndarray) -> None:
    from matplotlib.ticker import MaxNLocator

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
    for place, (label, values) in enumerate(curves.items()):
        color = PALETTE[(2 + place) % len(PALETTE)]
        points = sorted(values.items())
        xs, ys = [x for x, _ in points], [y for _, y in points]
        other.plot(xs, ys, color=color, linestyle="--", marker="s", markersize=3.5, label=label)
    other.set_ylabel(name)
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
