"""The picture of a feature attribution: what matters most, and exact against gradient."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from figure_canvas import axes_list, figure_of, finish, new_figure
from token_labels import can_draw, drawing, readable_token


def plot_features(
    result: Any,
    *,
    n_features: int = 15,
    title: str | None = None,
    axes: Any = None,
    save_path: str | Path | None = None,
    show: bool = False,
) -> Any:
    """Bars of the most important features; exact importance against the gradient's estimate.

    Args:
        result: A `feature_attribution.FeatureAttribution`, or anything with its fields.
        n_features: Number of bars.
        title: Above the bars; None says what was ablated.
        axes: Two axes to draw on; None makes a figure.
        save_path: See `figure_canvas.finish`.
        show: See `figure_canvas.finish`.

    Returns:
        The figure.
    """
    exact, estimate = result.importance, result.gradient
    order = np.argsort(-np.abs(exact), kind="stable")[:n_features]
    token = readable_token(result.tokens[result.position], 14, can_draw)
    heading = title or f"{result.site} {result.layer} at {token!r}"
    unit = f" ({result.unit})" if result.unit else ""
    with drawing():
        if axes is None:
            axes = new_figure((9.5, max(3.6, 0.24 * len(order) + 1.2))).subplots(1, 2)
        bars, points = axes_list(axes, 2)
        colors = ["#b2182b" if exact[i] > 0 else "#2166ac" for i in order]
        bars.barh(np.arange(len(order)), exact[order], color=colors)
        bars.set_yticks(np.arange(len(order)), [str(result.features[i]) for i in order])
        bars.invert_yaxis()
        bars.axvline(0, color="black", linewidth=0.8)
        bars.set(xlabel=f"{result.metric} lost without it{unit}", ylabel="feature")
        bars.set_title(heading, fontsize=11)
        points.scatter(estimate, exact, s=14, color="#555555", linewidths=0)
        ends = [min(exact.min(), estimate.min()), max(exact.max(), estimate.max())]
        points.plot(ends, ends, color="#b2182b", linewidth=0.9)
        points.set(xlabel=f"gradient estimate{unit}", ylabel=f"exact{unit}")
        points.set_title(f"correlation {result.correlation:.3f}", fontsize=11)
    return finish(figure_of(bars), save_path, show)
