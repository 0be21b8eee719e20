"""Attention in a browser: one html file, token to token, that asks nothing of any network.

The page shows a layer's heads as small patterns, the chosen head's pattern, and the text: the token
under the pointer (or reached by the arrow keys) colours all others by how much it looks at them, or
they at it. A click pins it. It follows the browser's light or dark scheme. Style, markup and script
are those of `attention_page`; tokens are untrusted text and enter the page as such.
"""

from __future__ import annotations

import base64
import html
import json
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from attention_page import BODY, SCRIPT, STYLE
from figure_canvas import write_whole
from token_labels import axis_labels

POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; "
    "base-uri 'none'; form-action 'none'"
)
"""The page forbids itself to fetch anything."""

LONGEST_LABEL = 24
"""Characters of a token that are shown."""

FRAME_HEIGHT = 720
"""Of the view in a notebook, in pixels."""


@dataclass(frozen=True)
class AttentionView:
    """A page for a browser; a notebook shows it in a frame."""

    html: str
    """The whole document."""
    title: str
    """Its heading."""

    def __repr__(self) -> str:
        return f"AttentionView({self.title!r}, {len(self.html) / 1e6:.1f} MB of html)"

    def _repr_html_(self) -> str:
        """The page in a frame of its own, for a notebook."""
        return (
            f'<iframe srcdoc="{html.escape(self.html)}" sandbox="allow-scripts" '
            f'style="width: 100%; height: {FRAME_HEIGHT}px; border: 0"></iframe>'
        )

    def save(self, path: str | Path) -> Path:
        """Write the page as one file.

        Args:
            path: Ends in .html or nothing. Folders are made.

        Returns:
            Where it was written.

        Raises:
            ValueError: the path ends in something else.
        """
        target = Path(path)
        target = target if target.suffix else target.with_suffix(".html")
        if target.suffix.lower() not in (".html", ".htm"):
            raise ValueError(f"a view is saved as .html; the path is {target.name}")
        write_whole(target, lambda part: part.write_text(self.html, encoding="utf-8"))
        return target


def attention_view(
    patterns: Sequence[np.ndarray],
    layers: Sequence[int],
    tokens: Sequence[str],
    title: str = "",
) -> AttentionView:
    """A page that shows what every token looks at.

    Args:
        patterns: ``[head, query, key]`` for each layer, from 0 to 1. The page holds them to within
            0.004.
        layers: The block of each.
        tokens: One per position.
        title: Above the page.

    Returns:
        The page.

    Raises:
        ValueError: shapes, layers and tokens do not fit together.
    """
    count = len(tokens)
    if len(patterns) != len(layers) or not layers:
        raise ValueError(
            f"{len(patterns)} layers of patterns came with {len(layers)} layer numbers"
        )
    for pattern in patterns:
        if pattern.ndim != 3 or pattern.shape[1:] != (count, count) or not count:
            raise ValueError(
                f"a layer's patterns are [head, query, key] of {count} tokens; came {pattern.shape}"
            )
    heading = title or f"Attention, {len(layers)} layers, {count} tokens"
    content = {
        "title": heading,
        "labels": axis_labels(tokens, LONGEST_LABEL),
        "layers": list(map(int, layers)),
        "heads": [len(pattern) for pattern in patterns],
        "patterns": [packed(pattern) for pattern in patterns],
    }
    return AttentionView(_document(content, heading), heading)


def packed(pattern: np.ndarray) -> str:
    """A pattern for the page: base64 of deflated bytes, each the rounded ``255·√attention``.

    Args:
        pattern: ``[head, query, key]``, from 0 to 1.
    """
    steps = np.rint(255 * np.sqrt(np.clip(np.nan_to_num(pattern), 0, 1))).astype(np.uint8)
    return base64.b64encode(zlib.compress(steps.tobytes(), 6)).decode("ascii")


def _document(content: Mapping[str, object], title: str) -> str:
    # no "<" in it, so that no text can end the block
    block = json.dumps(content, ensure_ascii=True).replace("<", "\\u003c")
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{html.escape(title)}</title><style>{STYLE}</style></head><body>{BODY}"
        f'<script type="application/json" id="data">{block}</script>'
        f"<script>{SCRIPT}</script></body></html>\n"
    )
