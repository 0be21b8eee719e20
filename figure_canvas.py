"""What every figure needs: a sheet to draw on, its room in points, colours, and a way out.

A figure made here is not registered with pyplot unless it is shown: nothing has to be closed, and a
script may make thousands.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from glob import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PALETTE = (
    *("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9"),
    *("#8C564B", "#4D4D4D"),
)
"""Okabe and Ito's colours, which the colour-blind tell apart, but for its yellow and black."""

LABEL_SIZE = 8.0
"""Font size of labels, in points."""


def new_figure(figsize: tuple[float, float]) -> Figure:
    """An empty figure with a constrained layout, not registered with pyplot; size in inches."""
    from matplotlib.figure import Figure

    if "ipykernel" in sys.modules:  # a notebook displays figures once its backend is loaded
        import matplotlib
        from matplotlib import pyplot

        pyplot.switch_backend(matplotlib.get_backend())
    return Figure(figsize=figsize, layout="constrained")


def figure_of(ax: Axes) -> Figure:
    """The whole figure that an axes lies in, also where it lies in a subfigure."""
    figure = ax.get_figure(root=True)
    assert figure is not None, "the axes was removed from its figure"
    return figure


def settle(figure: Figure) -> None:
    """Let the layout, if there is one, give every axes its place, so that room can be measured."""
    engine = figure.get_layout_engine()
    if engine is not None:
        engine.execute(figure)


def room_of(ax: Axes) -> tuple[float, float]:
    """Width and height of an axes, in points."""
    box = ax.get_window_extent()
    points = 72 / figure_of(ax).dpi
    return box.width * points, box.height * points


def axes_list(axes: Any, count: int) -> list[Axes]:
    """Axes that a caller gave, as a flat list.

    Raises:
        ValueError: there are not ``count`` of them.
    """
    flat = list(np.ravel(np.asarray(axes, dtype=object)))
    if len(flat) != count:
        raise ValueError(f"axes must hold {count} axes, one per panel; it holds {len(flat)}")
    return flat


def finish(figure: Figure, save_path: str | Path | None = None, show: bool = False) -> Figure:
    """Save a figure if a path is given, show it if asked, return it.

    Args:
        figure: A matplotlib figure.
        save_path: Its ending names the format: png, pdf, svg, …; none means png. Folders are made.
        show: Open a window, or display it in a notebook.

    Returns:
        The figure.

    Raises:
        ValueError: matplotlib writes no such format.
    """
    if save_path is not None:
        path = Path(save_path)
        path = path if path.suffix else path.with_suffix(".png")
        if path.suffix[1:].lower() not in figure.canvas.get_supported_filetypes():
            raise ValueError(
                f"cannot save a figure as {path.suffix!r} ({path.name}); use .png, .pdf or .svg, "
                "or interactive=True for .html"
            )
        write_whole(path, lambda part: figure.savefig(part, dpi=150))
    if show:
        from matplotlib import pyplot

        pyplot.figure(figure)
        pyplot.show()
    return figure


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Make a file and its folders; a file that is there stays as it was if writing fails."""
    path.parent.mkdir(parents=True, exist_ok=True)
    _remove_stale(path)
    part = path.with_name(f".{path.stem}-{os.getpid()}{path.suffix}")
    try:
        write(part)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def _remove_stale(path: Path) -> None:
    """Remove what processes left that were killed while they saved the same picture."""
    if os.name != "posix":  # elsewhere nobody can be asked whether they are alive
        return
    start = f".{path.stem}-"
    for part in path.parent.glob(f"{escape(start)}*{escape(path.suffix)}"):
        number = part.name[len(start) : len(part.name) - len(path.suffix)]
        if number.isascii() and number.isdigit() and not _is_alive(int(number)):
            part.unlink(missing_ok=True)


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:  # it is somebody else's
        return True
    return True


def text_colors(colors: np.ndarray) -> np.ndarray:
    """Black or white, whichever is read more easily on each background (by WCAG's contrast).

    Args:
        colors: ``[…, 3 or 4]``, red, green, blue from 0 to 1.

    Returns:
        ``[…]``, ``"black"`` or ``"white"``.
    """
    linear = np.where(colors <= 0.04045, colors / 12.92, ((colors + 0.055) / 1.055) ** 2.4)
    luminance = linear[..., :3] @ np.array([0.2126, 0.7152, 0.0722])
    return np.where(luminance > 0.179, "black", "white")


def checked_labels(labels: Sequence[str] | None, count: int, name: str) -> list[str]:
    """Labels as text; None counts from 0.

    Raises:
        ValueError: there are not ``count`` of them.
    """
    if labels is None:
        return [str(i) for i in range(count)]
    if len(labels) != count:
        raise ValueError(f"{name} must hold {count} labels; it holds {len(labels)}")
    return [str(label) for label in labels]
