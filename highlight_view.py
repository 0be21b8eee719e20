"""A coloured text in a browser: one html file that asks nothing of any network.

Every token is coloured by its score for one prediction, chosen from a list; the pointer (or the
arrow keys) shows the token, its position and its value. Tokens stay apart by position, however
often they occur; newlines and spaces are seen. They are untrusted text and enter the page as such.
"""

from __future__ import annotations

import base64
import html
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from attention_view import POLICY
from figure_canvas import write_whole
from heat_maps import color_scale
from highlight_page import BODY, SCRIPT, STYLE
from token_labels import readable_token

LONGEST_LABEL = 60
"""Characters of a token that are shown."""

FRAME_HEIGHT = 420
"""Of the view in a notebook, in pixels."""


@dataclass(frozen=True)
class HighlightView:
    """A page for a browser; a notebook shows it in a frame."""

    html: str
    """The whole document."""
    title: str
    """Its heading."""

    def __repr__(self) -> str:
        return f"HighlightView({self.title!r}, {len(self.html) / 1e3:.0f} kB of html)"

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


def highlight_view(
    scores: np.ndarray,
    tokens: Sequence[str],
    targets: Sequence[str],
    places: Sequence[int],
    *,
    signed: bool = True,
    value_label: str = "score",
    title: str = "",
    note: str = "",
) -> HighlightView:
    """A page that shows a text with its tokens coloured, for one target at a time.

    Args:
        scores: ``[target, position]``; NaN is no number and shown hatched.
        tokens: One per position.
        targets: One per target, in words.
        places: Position of each target, which is outlined.
        signed: Whether 0 is the middle of the colours.
        value_label: What a score is, with its unit.
        title: Above the page.
        note: Beside the list of targets.

    Returns:
        The page. A target's colours end at its largest score that is not far outside.

    Raises:
        ValueError: scores, tokens and targets do not fit together, or there are none.
    """
    if scores.shape != (len(targets), len(tokens)) or not scores.size:
        raise ValueError(
            f"scores are [target, position] of {len(targets)} targets and {len(tokens)} tokens, at "
            f"least one of each; came {list(scores.shape)}"
        )
    if len(places) != len(targets):
        raise ValueError(f"{len(places)} places came for {len(targets)} targets")
    heading = title or f"{len(tokens)} tokens"
    content = {
        "title": heading,
        "note": note,
        "value": value_label,
        "signed": bool(signed),
        "labels": [readable_token(token, LONGEST_LABEL) for token in tokens],
        "breaks": ["\n" in token for token in tokens],
        "targets": [str(name)[: 2 * LONGEST_LABEL] for name in targets],
        "places": list(map(int, places)),
        "limits": [limit_of(row, signed) for row in scores],
        "scores": base64.b64encode(scores.astype("<f4").tobytes()).decode("ascii"),
    }
    return HighlightView(_document(content, heading), heading)


def limit_of(scores: np.ndarray, signed: bool) -> float:
    """The score at which a target's colours end: the largest that is not far outside the others.

    Args:
        scores: ``[position]``; zeros do not count.
        signed: Whether negative ones count.
    """
    seen = scores[np.isfinite(scores) & (scores != 0)]
    return color_scale(seen, signed, limits=(None if signed else 0.0, None)).high


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
