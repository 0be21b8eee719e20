"""Every picture of the toolkit, from a lens, a model or embeddings to a figure in one call.

Of a text, through a lens:

    plot_logit_lens_basic        each layer's best token, some layers and positions
    plot_lens_heatmap            the same for all of them, coloured by any metric
    plot_convergence_analysis    four tables: when does each position reach its final prediction
    plot_token_preservation      two tables: how long is the input token remembered
    plot_prediction_refinement   how the best tokens of one position change places

Of points:

    plot_embeddings_2d, plot_embeddings_3d   embeddings by PCA, t-SNE or UMAP
    compare_reduction_methods                the three side by side
    plot_layer_embeddings                    each token's path through the layers, in one projection
    plot_layer_similarity                    how alike the layers are
    reduce_dimensions                        coordinates without a picture

One rule for all: the figure is returned; it is saved when ``save_path`` is given and shown only
with ``show=True``. ``interactive=True`` returns the same picture as a plotly figure, which saves
itself as one .html file. Where one panel is drawn, ``ax`` takes the caller's axes, else ``axes``.

What takes points lies in `embedding_visualization`. The drawing is done by `figures`, `heat_maps`,
`embedding_figures` and `interactive_figures`, which take arrays.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

import figures
import interactive_figures
from dimensionality import fit_reduction, reduce_dimensions
from embedding_visualization import (
    SavePath,
    compare_reduction_methods,
    deliver,
    layer_similarity,
    plot_embeddings_2d,
    plot_embeddings_3d,
    plot_layer_embeddings,
    plot_layer_similarity,
    refuse_axes,
)
from token_labels import readable_token

if TYPE_CHECKING:
    from logit_lens import LogitLens
    from model_architecture import Layer

__all__ = [
    "compare_reduction_methods",
    "fit_reduction",
    "layer_similarity",
    "plot_convergence_analysis",
    "plot_embeddings_2d",
    "plot_embeddings_3d",
    "plot_layer_embeddings",
    "plot_layer_similarity",
    "plot_lens_heatmap",
    "plot_logit_lens_basic",
    "plot_prediction_refinement",
    "plot_token_preservation",
    "reduce_dimensions",
]

TRACKED = 50
"""Tokens kept per layer for `plot_prediction_refinement`: lines begin at this rank."""

# --- Of a text, through a lens -------------------------------------------------------------------


def _lens(lens: LogitLens | None, model_path: str | Path | None) -> LogitLens:
    """The lens given, or one on the model at a path."""
    if lens is not None:
        return lens
    if model_path is None:
        raise ValueError("give a lens, or lens=None and model_path=")
    from logit_lens import LogitLens

    return LogitLens(model_path)


def plot_logit_lens_basic(
    lens: LogitLens | None,
    text: str,
    layer_step: int = 3,
    max_tokens: int = 8,
    *,
    color_by: str = "probability",
    model_path: str | Path | None = None,
    interactive: bool = False,
    ax: Any = None,
    figsize: tuple[float, float] | None = None,
    save_path: SavePath = None,
    show: bool = False,
) -> Any:
    """Draw each layer's best next token at the first positions of a text.

    Args:
        lens: A `logit_lens.LogitLens`; None makes one from ``model_path``.
        text: What the model reads.
        layer_step: Draw every so many layers; the embedding and the last layer always.
        max_tokens: Draw at most so many positions.
        color_by: See `plot_lens_heatmap`.
        model_path: A folder or hub id, for ``lens=None``.
        interactive: Return a plotly figure.
        ax: Where to draw; None makes a figure.
        figsize: Of a figure made here, in inches.
        save_path: Save there, with the ending's format.
        show: Show it.

    Returns:
        The figure; see `figures.plot_lens_heatmap` for how to read it.

    Raises:
        ValueError: ``layer_step`` or ``max_tokens`` is not positive, or there is neither lens nor
            path.
    """
    if layer_step < 1 or max_tokens < 1:
        raise ValueError(f"layer_step and max_tokens start at 1; came {layer_step}, {max_tokens}")
    result = _lens(lens, model_path).run(text)
    first = 1 if result.row_labels[0] == "embed" else 0
    last = len(result.row_labels) - 1
    rows = sorted({*range(first), *range(first, last + 1, layer_step), last})
    shown = min(max_tokens, len(result.tokens))
    cut = "" if shown == len(result.tokens) else f", first {shown} of {len(result.tokens)} tokens"
    return _draw_lens(
        result, color_by, interactive, ax, figsize, save_path, show,
        rows=rows, columns=range(shown), title=f"Logit lens{cut}",
    )  # fmt: skip


def plot_lens_heatmap(
    lens: LogitLens | None,
    text: str,
    color_by: str = "probability",
    *,
    model_path: str | Path | None = None,
    interactive: bool = False,
    ax: Any = None,
    figsize: tuple[float, float] | None = None,
    save_path: SavePath = None,
    show: bool = False,
) -> Any:
    """Draw the logit lens of a text, all layers and positions, each cell with its best token.

    Args:
        lens: A `logit_lens.LogitLens`; None makes one from ``model_path``.
        text: What the model reads.
        color_by: ``"probability"`` or ``"logit"`` of the best token, ``"entropy"``, ``"rank"`` (of
            the final prediction), ``"kl"``, or any metric that `LogitLens.run` measures.
        model_path: A folder or hub id, for ``lens=None``.
        interactive: Return a plotly figure.
        ax: Where to draw; None makes a figure.
        figsize: Of a figure made here, in inches.
        save_path: Save there, with the ending's format.
        show: Show it.

    Returns:
        The figure; see `figures.plot_lens_heatmap` for how to read it.

    Raises:
        ValueError: there is no such metric, or neither lens nor path.
    """
    result = _lens(lens, model_path).run(text)
    return _draw_lens(result, color_by, interactive, ax, figsize, save_path, show)


def _draw_lens(
    result: Any,
    color_by: str,
    interactive: bool,
    ax: Any,
    figsize: tuple[float, float] | None,
    save_path: SavePath,
    show: bool,
    **options: Any,
) -> Any:
    refuse_axes(interactive, ax)
    if interactive:
        figure = interactive_figures.lens_heatmap(result, color_by, **options)
    else:
        figure = figures.plot_lens_heatmap(result, color_by, ax=ax, figsize=figsize, **options)
    return deliver(figure, interactive, save_path, show)


def plot_convergence_analysis(
    lens: LogitLens | None,
    text: str,
    save_path: SavePath = None,
    *,
    model_path: str | Path | None = None,
    interactive: bool = False,
    axes: Any = None,
    figsize: tuple[float, float] | None = None,
    show: bool = False,
) -> Any:
    """Draw how each layer's prediction compares with the final one: KL, top-1 match, rank, logit.

    Args:
        lens: A `logit_lens.LogitLens`; None makes one from ``model_path``.
        text: What the model reads.
        save_path: Save there, with the ending's format.
        model_path: A folder or hub id, for ``lens=None``.
        interactive: Return a plotly figure.
        axes: Four axes; None makes a figure.
        figsize: Of a figure made here, in inches.
        show: Show it.

    Returns:
        The figure. Its panels brighten downwards as the prediction converges.

    Raises:
        ValueError: there is neither lens nor path, or not four axes.
    """
    refuse_axes(interactive, axes)
    chosen = _lens(lens, model_path)
    metrics = chosen.get_convergence_metrics(text)
    figure: Any
    if interactive:
        names, title = figures.CONVERGENCE, "Convergence"
        figure = interactive_figures.metric_panels(
            metrics, names, hover=_top_lines(chosen, text), title=title
        )
    else:
        figure = figures.plot_convergence_panels(metrics, axes=axes, figsize=figsize)
    return deliver(figure, interactive, save_path, show)


def plot_token_preservation(
    lens: LogitLens | None,
    text: str,
    save_path: SavePath = None,
    *,
    model_path: str | Path | None = None,
    interactive: bool = False,
    axes: Any = None,
    figsize: tuple[float, float] | None = None,
    show: bool = False,
) -> Any:
    """Draw how much of the input token each layer still says: its rank, and KL from the embedding.

    Args:
        lens: A `logit_lens.LogitLens`; None makes one from ``model_path``.
        text: What the model reads.
        save_path: Save there, with the ending's format.
        model_path: A folder or hub id, for ``lens=None``.
        interactive: Return a plotly figure.
        axes: Two axes; None makes a figure.
        figsize: Of a figure made here, in inches.
        show: Show it.

    Returns:
        The figure. Its panels darken downwards as the input is forgotten.

    Raises:
        ValueError: there is neither lens nor path, or not two axes.
    """
    refuse_axes(interactive, axes)
    chosen = _lens(lens, model_path)
    metrics = chosen.compare_to_input(text)
    figure: Any
    if interactive:
        names, title = figures.PRESERVATION, "Input preservation"
        figure = interactive_figures.metric_panels(
            metrics, names, hover=_top_lines(chosen, text), title=title
        )
    else:
        figure = figures.plot_preservation_panels(metrics, axes=axes, figsize=figsize)
    return deliver(figure, interactive, save_path, show)


def _top_lines(lens: LogitLens, text: str) -> np.ndarray:
    result = lens.run(text, 5)
    return interactive_figures.top_lines(result.top_tokens, result.top_probs)


def plot_prediction_refinement(
    lens: LogitLens | None,
    text: str,
    layers: Sequence[Layer] | None = None,
    *,
    position: int = -1,
    top_k: int = 5,
    model_path: str | Path | None = None,
    interactive: bool = False,
    axes: Any = None,
    figsize: tuple[float, float] | None = None,
    save_path: SavePath = None,
    show: bool = False,
) -> Any:
    """Draw how the best next tokens of one position change places, layer by layer.

    Args:
        lens: A `logit_lens.LogitLens`; None makes one from ``model_path``.
        text: What the model reads.
        layers: Layers to draw, in any spelling; None means all.
        position: Which token's prediction; -1 is the last.
        top_k: How many of the last layer's best tokens to follow.
        model_path: A folder or hub id, for ``lens=None``.
        interactive: Return a plotly figure.
        axes: Two axes; None makes a figure.
        figsize: Of a figure made here, in inches.
        save_path: Save there, with the ending's format.
        show: Show it.

    Returns:
        The figure; see `refinement_figure.plot_refinement` for how to read it.

    Raises:
        ValueError: the text has no such position, or there is neither lens nor path.
    """
    refuse_axes(interactive, axes)
    chosen = _lens(lens, model_path)
    kept = max(top_k, min(TRACKED, int(chosen.architecture.config.vocab_size)))
    predictions = chosen.get_layer_predictions(text, layer_indices=layers, top_k=kept)
    tokens = predictions["input_tokens"]
    if not -len(tokens) <= position < len(tokens):
        raise ValueError(f"position={position} is outside the text's {len(tokens)} tokens")
    table = list(predictions["layers"].values())
    text_of, probs, ids = (
        np.array([layer[name][position] for layer in table], dtype=kind)
        for name, kind in (("top_k_tokens", object), ("top_k_probs", float), ("top_k_indices", int))
    )
    rows = [str(layer) for layer in predictions["layers"]]
    after = readable_token(tokens[position], 20)
    options: dict[str, Any] = {"title": f"Prediction after {after}", "top_k": top_k, "top_ids": ids}
    figure: Any
    if interactive:
        figure = interactive_figures.refinement(text_of, probs, rows, **options)
    else:
        options |= {"axes": axes, "figsize": figsize}
        figure = figures.plot_refinement(text_of, probs, rows, **options)
    return deliver(figure, interactive, save_path, show)
