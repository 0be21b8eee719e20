"""The figures again, for a browser: plotly, with the top tokens of every cell under the pointer.

    heatmap, lens_heatmap, metric_panels, refinement, scatter, comparison, paths
                         twins of the functions in `heat_maps`, `figures` and `embedding_figures`
    finish_interactive   save as one html file that needs no network, show, return
    escape               a token as text that a browser takes literally

`visualization` calls them with ``interactive=True``. They take the same arrays and return a
``plotly.graph_objects.Figure``. Tokens are untrusted text: what plotly would read as markup, as a
formula or as the end of the script is escaped.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np

from embedding_figures import PointColors, as_coordinates, as_paths, checked_names, point_colors
from figure_canvas import PALETTE, checked_labels, write_whole
from figures import METRICS, LensTables, Metric, lens_cells, metric_tables, track_tokens
from heat_maps import DIVERGING, ColorScale, as_table, color_scale
from token_labels import axis_labels, readable_token

if TYPE_CHECKING:
    import plotly.graph_objects as go

SHORT, LONG = 8, 40
"""Characters of a token in a cell and under the pointer."""

ESCAPES = str.maketrans({"&": "&amp;", "<": "&lt;", ">": "&gt;", "$": "&#36;", '"': "&quot;"})


def require_plotly() -> ModuleType:
    """``plotly.graph_objects``.

    Raises:
        ImportError: plotly is not installed.
    """
    try:
        import plotly.graph_objects as go
    except ImportError as error:
        raise ImportError(
            "interactive=True needs plotly: pip install 'mech-interp-toolkit[interactive]'"
        ) from error
    module: ModuleType = go
    return module


def escape(text: str) -> str:
    """Text that plotly shows as it is: no tags, no entities, no formulas."""
    return str(text).translate(ESCAPES)


def shown(token: str, max_length: int | None = LONG) -> str:
    """A token for a browser: readable, shortened, escaped."""
    return escape(readable_token(token, max_length))


def finish_interactive(
    figure: go.Figure, save_path: str | Path | None = None, show: bool = False
) -> go.Figure:
    """Save a figure as one html file if a path is given, show it if asked, return it.

    Args:
        figure: A plotly figure.
        save_path: Ends in .html or nothing. The file holds plotly itself (about 5 MB), and needs no
            network. Folders are made.
        show: Open it in a browser or notebook.

    Returns:
        The figure.

    Raises:
        ValueError: the path ends in something else.
    """
    if save_path is not None:
        path = Path(save_path)
        path = path if path.suffix else path.with_suffix(".html")
        if path.suffix.lower() not in (".html", ".htm"):
            raise ValueError(f"an interactive figure is saved as .html; the path is {path.name}")
        html = figure.to_html(include_plotlyjs=True, include_mathjax=False, full_html=True)
        write_whole(path, lambda part: part.write_text(html, encoding="utf-8"))
    if show:
        figure.show()
    return figure


# --- Heat maps -----------------------------------------------------------------------------------


def heatmap(
    values: np.ndarray,
    x_labels: Sequence[str] | None = None,
    y_labels: Sequence[str] | None = None,
    cell_text: np.ndarray | None = None,
    *,
    hover: np.ndarray | None = None,
    value_label: str = "",
    signed: bool | str = "auto",
    x_name: str = "",
    y_name: str = "",
    title: str | None = None,
    **scaling: Any,
) -> go.Figure:
    """Twin of `heat_maps.plot_heatmap`.

    Args:
        values: ``[row, column]``.
        x_labels: One per column.
        y_labels: One per row.
        cell_text: ``[row, column]``, tokens written into the cells.
        hover: ``[row, column]``, more lines under the pointer, already escaped.
        value_label: What the colours mean.
        signed: See `heat_maps.color_scale`.
        x_name: Name of the x axis.
        y_name: Name of the y axis.
        title: Above the table.
        **scaling: ``log``, ``reverse`` and ``limits`` of `heat_maps.color_scale`.

    Returns:
        The figure.
    """
    go = require_plotly()
    table = as_table(values, "values")
    columns = [shown(t, 14) for t in checked_labels(x_labels, table.shape[1], "x_labels")]
    rows = [shown(t, 14) for t in checked_labels(y_labels, table.shape[0], "y_labels")]
    scale = color_scale(table, signed, **scaling)
    trace = _cells(go, table, scale, value_label, columns, rows, hover, cell_text)
    figure = go.Figure(trace)
    _style(figure, title, table.shape, cell_text is not None)
    figure.update_xaxes(title=escape(x_name), **_ticks(columns))
    figure.update_yaxes(title=escape(y_name), autorange="reversed", **_ticks(rows))
    return figure


def _cells(
    go: ModuleType,
    table: np.ndarray,
    scale: ColorScale,
    label: str,
    columns: Sequence[str],
    rows: Sequence[str],
    hover: np.ndarray | None,
    texts: np.ndarray | None = None,
    **bar: Any,
) -> Any:
    """A heat map trace; the pointer shows row, column, value and the lines of ``hover``."""
    about = np.empty(table.shape, dtype=object)
    for row, column in np.ndindex(table.shape):
        head = f"layer {rows[row]}, token {columns[column]}<br>{escape(label)}: "
        tail = "" if hover is None else f"<br>{hover[row, column]}"
        about[row, column] = f"{head}{table[row, column]:.4g}{tail}"
    colors = np.log1p(table) if scale.log else table
    low, high = (np.log1p(v) if scale.log else v for v in (scale.low, scale.high))
    ticks = scale.ticks()
    where = [float(np.log1p(t)) for t in ticks] if ticks and scale.log else ticks
    names = {} if ticks is None else {"tickvals": where, "ticktext": [f"{t:,.0f}" for t in ticks]}
    written = (
        None if texts is None else np.vectorize(lambda t: shown(t, SHORT), otypes=[object])(texts)
    )
    return go.Heatmap(
        z=np.clip(colors, low, high),
        zmin=low,
        zmax=high,
        colorscale="RdBu_r" if scale.colormap == DIVERGING else scale.colormap.capitalize(),
        hovertext=about,
        hoverinfo="text",
        text=written,
        texttemplate=None if texts is None else "%{text}",
        textfont={"size": 10},
        colorbar={"title": {"text": escape(label), "side": "right"}, **names, **bar},
    )


def _ticks(labels: Sequence[str]) -> dict[str, Any]:
    """Labels by number: plotly would merge places that are named alike."""
    step = -(-len(labels) // 64)
    places = list(range(0, len(labels), step))
    return {"tickvals": places, "ticktext": [labels[i] for i in places], "showgrid": False}


def _style(figure: go.Figure, title: str | None, shape: tuple[int, ...], with_text: bool) -> None:
    across, down = (64, 24) if with_text else (26, 20)
    figure.update_layout(
        title={"text": escape(title or "")},
        template="plotly_white",
        width=int(min(max(260 + across * shape[1], 640), 4200)),
        height=int(min(max(180 + down * shape[0], 360), 2400)),
        plot_bgcolor="#dddddd",
    )


def top_lines(top_tokens: np.ndarray, top_probs: np.ndarray, most: int = 10) -> np.ndarray:
    """Lines for the pointer: each cell's best tokens with their probabilities.

    Args:
        top_tokens: ``[row, position, k]``, text, best first.
        top_probs: ``[row, position, k]``.
        most: So many at most.

    Returns:
        ``[row, position]``, escaped, lines joined by ``<br>``.
    """
    lines = np.empty(top_tokens.shape[:2], dtype=object)
    for cell in np.ndindex(lines.shape):
        best = zip(top_tokens[cell][:most], top_probs[cell][:most], strict=True)
        lines[cell] = "<br>".join(
            f"{shown(token)}  {probability:.3f}" for token, probability in best
        )
    return lines


def lens_heatmap(
    lens_result: LensTables,
    color_by: str = "probability",
    *,
    rows: Sequence[int] | None = None,
    columns: Sequence[int] | None = None,
    title: str | None = None,
) -> go.Figure:
    """Twin of `figures.plot_lens_heatmap`; the pointer shows each cell's top tokens.

    Args:
        lens_result: What `LogitLens.run` returned.
        color_by: See there.
        rows: See there.
        columns: See there.
        title: See there.

    Returns:
        The figure.
    """
    cells = lens_cells(lens_result, color_by, rows, columns)
    cut = np.ix_(cells.rows, range(len(lens_result.tokens)) if columns is None else list(columns))
    lines = top_lines(lens_result.top_tokens[cut], lens_result.top_probs[cut])
    for row, column in np.argwhere(cells.right):
        lines[row, column] += "<br>the first is the true next token"
    figure = heatmap(
        cells.values,
        axis_labels(cells.tokens, 12, positions=cells.positions),
        cells.row_labels,
        cells.texts,
        hover=lines,
        value_label=cells.metric.label,
        x_name="input token; framed cells found the true next one",
        y_name="layer",
        title="Logit lens" if title is None else title,
        log=cells.metric.log,
        reverse=cells.metric.reverse,
        limits=cells.metric.limits,
    )
    frame = {"type": "rect", "line": {"color": "#D4006A", "width": 2}}
    for row, column in np.argwhere(cells.right).tolist():
        box = {"x0": column - 0.46, "x1": column + 0.46, "y0": row - 0.43, "y1": row + 0.43}
        figure.add_shape(**frame, **box)
    return figure


def metric_panels(
    metrics: Mapping[str, Any],
    names: Sequence[str],
    *,
    hover: np.ndarray | None = None,
    title: str | None = None,
) -> go.Figure:
    """Twin of `figures.plot_metric_panels`.

    Args:
        metrics: See there.
        names: See there.
        hover: ``[row, position]``, from `top_lines`.
        title: Above all panels.

    Returns:
        The figure.
    """
    go = require_plotly()
    from plotly.subplots import make_subplots

    tables = metric_tables(metrics, names)
    columns = [escape(t) for t in axis_labels(metrics["input_tokens"], 14)]
    rows = [escape(label) for label in metrics["row_labels"]]
    looks = [METRICS.get(name, Metric(name.replace("_", " "))) for name in names]
    lines = -(-len(names) // 2)
    titles = [escape(look.label) for look in looks]
    figure = make_subplots(lines, 2, subplot_titles=titles, horizontal_spacing=0.16)
    for index, (name, look) in enumerate(zip(names, looks, strict=True)):
        table = tables[name]
        scale = color_scale(table, log=look.log, reverse=look.reverse, limits=look.limits)
        row, column = divmod(index, 2)
        panel = next(figure.select_yaxes(row=row + 1, col=column + 1))
        right = next(figure.select_xaxes(row=row + 1, col=column + 1)).domain[1]
        bottom, top = panel.domain
        bar: dict[str, Any] = {"x": right, "y": (bottom + top) / 2, "len": top - bottom, "ypad": 0}
        trace = _cells(go, table, scale, look.label, columns, rows, hover, **bar)
        trace.colorbar.title = None
        figure.add_trace(trace, row + 1, column + 1)
    wide, high = next(iter(tables.values())).shape[::-1]
    _style(figure, title, (high * lines + 8 * lines, wide * 2 + 8), False)
    figure.update_xaxes(title="input token", **_ticks(columns))
    figure.update_yaxes(title="layer", autorange="reversed", **_ticks(rows))
    return figure


# --- Lines and points ----------------------------------------------------------------------------


def refinement(
    top_tokens: np.ndarray,
    top_probs: np.ndarray,
    row_labels: Sequence[str] | None = None,
    *,
    top_ids: np.ndarray | None = None,
    top_k: int = 5,
    title: str | None = None,
) -> go.Figure:
    """Twin of `refinement_figure.plot_refinement`; the pointer shows each layer's top tokens.

    Args:
        top_tokens: See there.
        top_probs: See there.
        row_labels: See there.
        top_ids: See there.
        top_k: See there.
        title: Above the lines.

    Returns:
        The figure.
    """
    go = require_plotly()
    tokens = np.asarray(top_tokens, dtype=object)
    rows = [escape(t) for t in checked_labels(row_labels, len(tokens), "row_labels")]
    tracked = track_tokens(tokens, top_probs, top_ids, top_k)
    lists = top_lines(tokens[None], np.asarray(top_probs)[None])[0]
    figure = go.Figure()
    for index, token in enumerate(tracked.tokens):
        about = [
            f"layer {row}: {shown(token)} {probability:.3f}, rank {rank + 1:.0f}<br><br>{best}"
            for row, probability, rank, best in zip(
                rows, tracked.probabilities[index], tracked.ranks[index], lists, strict=True
            )
        ]
        line = {"color": PALETTE[index % len(PALETTE)]}
        figure.add_scatter(
            y=tracked.probabilities[index],
            mode="lines+markers",
            name=shown(token, 14),
            hovertext=about,
            hoverinfo="text",
            line=line,
        )
    figure.update_layout(template="plotly_white", title={"text": escape(title or "")})
    figure.update_xaxes(title="layer", **_ticks(rows))
    figure.update_yaxes(title="probability", rangemode="tozero")
    return figure


def scatter(
    coordinates: np.ndarray,
    labels: Sequence[str] | None = None,
    colors: Any = None,
    *,
    axis_labels: Sequence[str] | None = None,
    note: str = "",
    title: str | None = None,
) -> go.Figure:
    """Twin of `embedding_figures.plot_scatter`; the pointer shows the label.

    Args:
        coordinates: See there.
        labels: See there.
        colors: See there.
        axis_labels: See there.
        note: See there.
        title: See there.

    Returns:
        The figure.
    """
    go = require_plotly()
    figure = go.Figure(_points(go, coordinates, labels, colors))
    names = [escape(name) for name in axis_labels or ("", "", "")]
    figure.update_layout(template="plotly_white", title=_title(title, note), width=800, height=650)
    if np.shape(coordinates)[1] == 3:
        axes = zip(("xaxis", "yaxis", "zaxis"), names, strict=True)
        figure.update_layout(scene={axis: {"title": {"text": name}} for axis, name in axes})
    else:
        figure.update_layout(xaxis_title=names[0], yaxis_title=names[1])
    return figure


def comparison(
    panels: Sequence[np.ndarray],
    titles: Sequence[str],
    labels: Sequence[str] | None = None,
    colors: Any = None,
) -> go.Figure:
    """Several layouts of the same points side by side.

    Args:
        panels: Each ``[point, 2]``.
        titles: One per panel; a line break starts a second line.
        labels: One per point, or fewer for the first.
        colors: See `embedding_figures.point_colors`.

    Returns:
        The figure.
    """
    go = require_plotly()
    from plotly.subplots import make_subplots

    above = [escape(title).replace("\n", "<br>") for title in titles]
    figure = make_subplots(1, len(panels), subplot_titles=above)
    for column, coordinates in enumerate(panels):
        figure.add_trace(_points(go, coordinates, labels, colors), 1, column + 1)
    figure.update_layout(template="plotly_white", width=480 * len(panels), height=520)
    figure.update_layout(showlegend=False)
    return figure


def _title(title: str | None, note: str) -> dict[str, str]:
    small = f"<br><sub>{escape(note)}</sub>" if note else ""
    return {"text": escape(title or "") + small}


def _points(
    go: ModuleType, coordinates: np.ndarray, labels: Sequence[str] | None, colors: Any
) -> Any:
    points = as_coordinates(coordinates)
    count = len(points)
    names = checked_names(labels, count)
    look: PointColors = point_colors(colors, count, count - len(names) if names else 0)
    tokens = [shown(name) for name in names]
    about = [*tokens, *(f"point {i}" for i in range(len(tokens), count))]
    few = len(tokens) <= 100
    axes = dict(zip("xyz", points.T, strict=False))
    kind = go.Scatter3d if points.shape[1] == 3 else go.Scattergl if count > 5000 else go.Scatter
    unclipped = {"cliponaxis": False} if kind is go.Scatter else {}
    return kind(
        **axes,
        **unclipped,
        mode="markers+text" if tokens and few else "markers",
        text=tokens if tokens and few else None,
        textposition="top center",
        hovertext=about,
        hoverinfo="text",
        marker={"color": look.colors, "size": 4 if count > 2000 else 8},
    )


def paths(
    coordinates: np.ndarray,
    labels: Sequence[str],
    layer_labels: Sequence[str],
    *,
    axis_labels: Sequence[str] | None = None,
    note: str = "",
    title: str | None = None,
) -> go.Figure:
    """Twin of `embedding_figures.plot_paths`; the pointer shows token and layer.

    Args:
        coordinates: See there.
        labels: See there.
        layer_labels: See there.
        axis_labels: See there.
        note: See there.
        title: See there.

    Returns:
        The figure.
    """
    go = require_plotly()
    table = as_paths(coordinates, labels, layer_labels)
    figure = go.Figure()
    for token, label in enumerate(labels):
        name = shown(label)
        x, y = table[:, token].T
        figure.add_scatter(
            x=x,
            y=y,
            name=name,
            mode="lines+markers",
            hovertext=[f"{name}, layer {escape(layer)}" for layer in layer_labels],
            hoverinfo="text",
            line={"color": PALETTE[token % len(PALETTE)], "width": 1},
            marker={"color": list(range(len(x))), "colorscale": "Viridis", "size": 7},
        )
    axes = [escape(axis) for axis in axis_labels or ("", "")]
    figure.update_layout(template="plotly_white", title=_title(title, note), width=900, height=700)
    figure.update_layout(xaxis_title=axes[0], yaxis_title=axes[1])
    return figure
