r"""Tokens as labels: readable, told apart, short enough, drawable, and no more of them than fit.

A token is any text: a space, a newline, half an emoji, a formula. Where it is shown,

- a space is ``·``, a newline ``↵``, a tab ``⇥``, and four or more in a row are ``·×4``;
- a character that cannot be seen (control, format) or that no installed font has is written as
  its code, ``\u4e2d``, so that two of them stay two;
- a long token ends in ``…``;
- a token that occurs several times carries its position as a subscript: ``·the₄``.

`drawing` is the state in which matplotlib takes such text literally (``$`` starts no formula) and
finds its glyphs in any installed font. Nothing here needs torch or a model.
"""

from __future__ import annotations

import itertools
import math
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache, lru_cache
from typing import Any

SPACE, NEWLINE, TAB, EMPTY = "·", "↵", "⇥", "∅"
MARKERS = {" ": SPACE, "\n": NEWLINE, "\t": TAB}

SUBSCRIPTS = str.maketrans("0123456789-", "₀₁₂₃₄₅₆₇₈₉₋")

INVISIBLE = {"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp", "Zs"}
"""Unicode categories of what leaves nothing to see."""

FALLBACK_FONTS = (
    *(f"Noto Sans CJK {kind}" for kind in ("JP", "SC", "TC", "KR")),
    *(
        "Noto Sans",
        "Noto Sans Arabic",
        "Noto Sans Hebrew",
        "Noto Sans Devanagari",
        "Noto Sans Thai",
    ),
    *("Noto Sans Symbols", "Noto Sans Symbols 2", "Noto Emoji", "Source Han Sans", "Symbola"),
    *("WenQuanYi Zen Hei", "WenQuanYi Micro Hei", "Droid Sans Fallback", "Unifont", "GNU Unifont"),
    *("Hiragino Sans", "PingFang SC", "Apple Symbols", "Microsoft YaHei", "MS Gothic"),
    *("Malgun Gothic", "Segoe UI Symbol", "Segoe UI Emoji", "Arial Unicode MS", "DejaVu Sans"),
)
"""Asked in this order for what the user's own font does not have, as far as they are installed."""


# --- Text ----------------------------------------------------------------------------------------


def readable_token(
    token: str, max_length: int | None = None, drawable: Callable[[str], bool] | None = None
) -> str:
    """A token as one line of visible text.

    Args:
        token: Any text; ``" the"`` becomes ``"·the"``.
        max_length: At most this many characters; None means all. What is cut off leaves ``…``.
        drawable: Whether a character can be drawn; one that cannot becomes its code. None draws all
            (a browser finds a font). For matplotlib it is `can_draw`.

    Returns:
        The text, not yet escaped for HTML (see `interactive_figures.escape`).

    Raises:
        ValueError: ``max_length`` is not positive.
    """
    if max_length is not None and max_length < 1:
        raise ValueError(f"max_length must be at least 1; came {max_length}")
    units = list(_units(token, drawable)) or [EMPTY]
    if max_length is None or sum(map(len, units)) <= max_length:
        return "".join(units)
    ends = itertools.accumulate(map(len, units))
    kept = "".join(unit for unit, end in zip(units, ends, strict=True) if end < max_length)
    return (kept or units[0][: max_length - 1]) + "…"


def _units(token: str, drawable: Callable[[str], bool] | None) -> Iterator[str]:
    """The pieces of a shown token that may not be cut apart."""
    for char, group in itertools.groupby(str(token)):
        count = len(list(group))
        unit = _unit(char, drawable)
        if char.isspace() and count > 3:
            yield f"{unit}×{count}"
        elif unit:
            yield from itertools.repeat(unit, count)


def _unit(char: str, drawable: Callable[[str], bool] | None) -> str:
    if char in MARKERS:
        return MARKERS[char]
    if "\ufe00" <= char <= "\ufe0f":  # variation selectors: they only choose a style
        return ""
    if unicodedata.category(char) in INVISIBLE or not (drawable is None or drawable(char)):
        code = ord(char)
        if code < 0x100:
            return f"\\x{code:02x}"
        return f"\\u{code:04x}" if code < 0x10000 else f"\\u{{{code:x}}}"
    return char


def axis_labels(
    tokens: Sequence[str],
    max_length: int | None = 12,
    drawable: Callable[[str], bool] | None = None,
    positions: Sequence[int] | None = None,
) -> list[str]:
    """One label per token; those that would read the same carry their position as a subscript.

    Args:
        tokens: One per position.
        max_length: Of a label without its subscript; None means any.
        drawable: See `readable_token`.
        positions: What the subscripts say; None counts from 0.

    Returns:
        As many labels as tokens, each different.
    """
    places = range(len(tokens)) if positions is None else positions
    shown = [readable_token(token, max_length, drawable) for token in tokens]
    counts = Counter(shown)
    return [
        text + str(place).translate(SUBSCRIPTS) if counts[text] > 1 else text
        for text, place in zip(shown, places, strict=True)
    ]


def thinned(count: int, spacing: float, size: float) -> list[int]:
    """Which of ``count`` labels in a row to show: the first, the last, and none that would touch.

    Args:
        count: Number of places.
        spacing: From one place to the next.
        size: Room that one label needs, in the same unit.
    """
    if count < 1:
        return []
    step = max(1, math.ceil(size / spacing)) if spacing > 0 else count
    kept = list(range(0, count, step))
    while len(kept) > 1 and count - 1 - kept[-1] < step and kept[-1] != count - 1:
        kept.pop()
    return kept if kept[-1] == count - 1 else [*kept, count - 1]


# --- Fonts ---------------------------------------------------------------------------------------


@contextmanager
def drawing() -> Iterator[None]:
    """While open, new text in matplotlib is literal and finds its glyphs in any installed font."""
    import matplotlib

    settings: Any = {"text.parse_math": False, "font.family": list(_families())}
    with matplotlib.rc_context(settings):
        yield


@cache
def _installed_fallbacks() -> tuple[str, ...]:
    from matplotlib import font_manager

    installed = {font.name for font in font_manager.fontManager.ttflist}
    return tuple(name for name in FALLBACK_FONTS if name in installed)


def can_draw(char: str) -> bool:
    """Whether a glyph for it is in the user's font or in an installed fallback."""
    return _font_of(char, _families()) is not None


def _families() -> tuple[str, ...]:
    """The user's font families, and the fallbacks that add another font to them."""
    import matplotlib

    own = tuple(matplotlib.rcParams["font.family"])
    files = {_font_file(family) for family in own}
    return (*own, *(name for name in _installed_fallbacks() if _font_file(name) not in files))


@lru_cache(maxsize=65536)
def _font_of(char: str, families: tuple[str, ...]) -> str | None:
    """The file of the first font that has the character."""
    for family in families:
        path = _font_file(family)
        if path is not None and ord(char) in _characters(path):
            return path
    return None


@cache
def _font_file(family: str) -> str | None:
    from matplotlib import font_manager

    try:
        return str(font_manager.findfont(family, fallback_to_default=False))
    except ValueError:  # there is no such font
        return None


@cache
def _characters(path: str) -> frozenset[int]:
    from matplotlib import font_manager

    return frozenset(font_manager.get_font(path).get_charmap())


@lru_cache(maxsize=65536)
def _advance(char: str, families: tuple[str, ...]) -> float:
    """Width of a character, in units of the font size."""
    from matplotlib import font_manager

    path = _font_of(char, families)
    if path is None:
        return 1.0
    font = font_manager.get_font(path)
    font.set_size(100, 72)
    return float(font.load_char(ord(char)).linearHoriAdvance / 65536 / 100)


def text_width(text: str, size: float) -> float:
    """Width of a line of text, in points, at a font size in points."""
    families = _families()
    return size * sum(_advance(char, families) for char in text)


@lru_cache(maxsize=65536)
def fitted_token(token: str, width: float, size: float, shortest: int = 2) -> str:
    """As much of a readable token as fits into a width, "" where that is less than ``shortest``.

    Args:
        token: The token.
        width: In points.
        size: Font size in points.
        shortest: Fewer characters of a longer token than this (``…`` not counted) say nothing.
    """
    full = readable_token(token, None, can_draw)
    if text_width(full, size) <= width:
        return full
    for length in range(min(len(full), 24), shortest, -1):
        text = readable_token(token, length, can_draw)
        if len(text) > shortest and text_width(text, size) <= width:
            return text
    return ""


def shortened(labels: Sequence[str], width: float, size: float) -> list[str] | None:
    """Labels cut to a width, their subscripts kept; None where that would leave too little.

    Args:
        labels: From `axis_labels`.
        width: In points.
        size: Font size in points.

    Returns:
        As many labels, still different where they were; None if one would keep less than 4
        characters of its text.
    """
    cut = [_cut(label, width, size) for label in labels]
    return (
        None if None in cut or len(set(cut)) < len(set(labels)) else [str(label) for label in cut]
    )


def _cut(label: str, width: float, size: float) -> str | None:
    text = label.rstrip("₀₁₂₃₄₅₆₇₈₉₋")
    subscript = label[len(text) :]
    for kept in range(len(text), min(len(text), 4) - 1, -1):
        piece = text if kept == len(text) else text[:kept] + "…"
        if text_width(piece + subscript, size) <= width:
            return piece + subscript
    return None
