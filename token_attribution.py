"""How much each token of a text matters to each of some predictions: the result of an attribution.

`TokenAttribution` holds one signed number per target and token, says how far the numbers add up,
and draws itself: the text with its tokens coloured, targets × tokens, and a page for a browser.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

from array_files import built, open_arrays, write_arrays
from forward_pass import InputError

if TYPE_CHECKING:
    import pandas as pd

    from highlight_view import HighlightView

KIND = "token attribution"
VERSION = 1
"""Of the file's schema."""

UNSIGNED = ("saliency", "attention_rollout", "gradient_attention")
"""Methods whose numbers are sizes, not negative."""

SCORE_UNITS = {"saliency": "per unit of embedding", "attention_rollout": "share of attention"}
"""Of the methods whose scores are not in the metric's unit."""


class TokenScore(NamedTuple):
    """A token, where it stands, and its score."""

    position: int
    token: str
    score: float


@dataclass(frozen=True, eq=False)
class TokenAttribution:
    """The share of every token of a text in some predictions, by one method.

    A target at position ``p`` is a prediction of what follows position ``p``; tokens after it have
    no share in it.
    """

    scores: np.ndarray
    """``[target, position]``, float64, in ``score_unit``. Positive: the token speaks for the
    target. The methods in `UNSIGNED` only say how much it matters."""
    value: np.ndarray
    """``[target]``: the metric on the text, in ``unit``; NaN for attention rollout, which has
    no metric."""
    baseline_value: np.ndarray
    """``[target]``: the metric where every token has its baseline; NaN without one."""
    tokens: tuple[str, ...]
    """One per position."""
    token_ids: tuple[int, ...]
    """One per position."""
    target_positions: tuple[int, ...]
    """Where each target is predicted, absolute."""
    targets: tuple[str, ...]
    """What each target is, for a reader."""
    target_ids: tuple[int, ...]
    """Each target's token; -1 where it is no single token."""
    method: str
    metric: str
    unit: str
    """Of the metric."""
    baseline: str = ""
    """What tokens were compared with; empty where with nothing."""
    steps: int = 0
    """Points at which gradients were taken; 0 where at none."""
    per_dimension: np.ndarray | None = None
    """``[target, position, d]``, float32, if it was asked for: what each entry of a token's
    embedding contributes (their sum is the score), or for saliency the gradient itself."""

    def __post_init__(self) -> None:
        """Check that numbers and labels fit together."""
        shape = len(self.targets), len(self.tokens)
        if self.scores.shape != shape:
            raise InputError(f"scores must be [target, position], {shape}; {self.scores.shape}")
        counts = (self.value, self.baseline_value, self.target_positions, self.target_ids)
        if any(len(each) != shape[0] for each in counts) or len(self.token_ids) != shape[1]:
            raise InputError("there must be an entry per target, and an id per token")
        if any(not 0 <= position < shape[1] for position in self.target_positions):
            raise InputError(f"target_positions must lie in 0..{shape[1] - 1}")
        dims = self.per_dimension
        if dims is not None and (dims.ndim != 3 or dims.shape[:2] != shape):
            raise InputError(f"per_dimension must be [target, position, d], {shape} and d")

    def __repr__(self) -> str:
        size = f"{len(self.targets)} targets × {len(self.tokens)} tokens"
        if len(self.targets) == 1:
            size = f"{self.targets[0]!r} after {len(self.tokens)} tokens"
        error = self.relative_error
        known = error[np.isfinite(error)]
        added = f", completeness error {known.max():.1e}" if known.size else ""
        return f"TokenAttribution({self.method}, {self.metric}, {size}{added})"

    @property
    def signed(self) -> bool:
        """Whether a score's sign says for or against."""
        return self.method not in UNSIGNED

    @property
    def score_unit(self) -> str:
        """What the scores are measured in."""
        if self.method in SCORE_UNITS:
            return SCORE_UNITS[self.method]
        return "" if self.method in UNSIGNED else self.unit

    @property
    def completeness_error(self) -> np.ndarray:
        """``[target]``, in ``unit``: sum of the scores − (value − value at the baseline).

        0 for integrated gradients but for the error of integration (Sundararajan et al. 2017,
        proposition 1); any other method's scores need not add up. NaN without a baseline.
        """
        return self.scores.sum(-1) - (self.value - self.baseline_value)

    @property
    def relative_error(self) -> np.ndarray:
        """``[target]``: size of the completeness error against the sum of the scores' sizes."""
        size = np.abs(self.scores).sum(-1)
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.abs(self.completeness_error) / size

    def index(self, target: int | str = 0) -> int:
        """A target's number, given that or its label.

        Raises:
            InputError: there is no such target, or several with this label.
        """
        count = len(self.targets)
        if not isinstance(target, str | int | np.integer) or isinstance(target, bool):
            raise InputError(f"a target is its number, 0..{count - 1}, or its label; {target!r}")
        if isinstance(target, str):
            found = [number for number, label in enumerate(self.targets) if label == target]
            if len(found) == 1:
                return found[0]
            raise InputError(
                f"{len(found)} targets are called {target!r}; give its number, 0..{count - 1}"
            )
        if not -count <= target < count:
            raise InputError(f"there are targets 0..{count - 1}; came {target}")
        return int(target) % count

    def heading(self, target: int | str = 0) -> str:
        """A target in words, for a reader: ``"' Paris' after token 5 (logit)"``."""
        number = self.index(target)
        place = self.target_positions[number]
        if self.metric == "attention":
            return f"token {place}"
        return f"{self.targets[number]!r} after token {place} ({self.metric})"

    def top(self, k: int = 10, target: int | str = 0) -> list[TokenScore]:
        """The ``k`` tokens with the largest score in size, largest first.

        Args:
            k: How many.
            target: Of which target, by number or label.

        Raises:
            InputError: ``k`` is below 1, or there is no such target.
        """
        if k < 1:
            raise InputError(f"the number of tokens must be at least 1; came {k}")
        row = self.scores[self.index(target)]
        order = np.argsort(-np.abs(row), kind="stable")[:k]
        return [TokenScore(int(i), self.tokens[i], float(row[i])) for i in order]

    def to_frame(self) -> pd.DataFrame:
        """One row per target and token.

        Returns:
            Columns ``target, target_label, target_position, position, token, token_id, score``.
        """
        import pandas as pd

        target, position = (place.ravel() for place in np.indices(self.scores.shape))
        return pd.DataFrame(
            {
                "target": target,
                "target_label": np.array(self.targets, dtype=object)[target],
                "target_position": np.array(self.target_positions)[target],
                "position": position,
                "token": np.array(self.tokens, dtype=object)[position],
                "token_id": np.array(self.token_ids)[position],
                "score": self.scores.ravel(),
            }
        )

    def plot(self, target: int | str | None = None, **options: Any) -> Any:
        """The text with its tokens coloured, for one target; targets × tokens for several.

        Args:
            target: Which one, by number or label; None means all.
            **options: For `text_highlight.plot_text`, or `text_highlight.plot_targets`.

        Returns:
            The figure.

        Raises:
            InputError: there is no such target.
        """
        from text_highlight import plot_targets, plot_text

        if target is None and len(self.targets) > 1:
            return plot_targets(self, **options)
        number = self.index(0 if target is None else target)
        chosen: dict[str, Any] = {
            "signed": self.signed,
            "mark": self.target_positions[number],
            "value_label": self.value_label,
            "title": f"{self.method}: {self.heading(number)}",
        }
        return plot_text(self.scores[number], self.tokens, **(chosen | options))

    @property
    def value_label(self) -> str:
        """What the colours of a picture mean, with the unit."""
        return f"score ({self.score_unit})" if self.score_unit else "score"

    def view(self, title: str = "") -> HighlightView:
        """A page for a browser, without any network: the text coloured, one target at a time.

        See `highlight_view.highlight_view`.
        """
        from highlight_view import highlight_view

        return highlight_view(
            self.scores,
            self.tokens,
            [self.heading(number) for number in range(len(self.targets))],
            self.target_positions,
            signed=self.signed,
            value_label=self.value_label,
            title=title or f"{self.method}, {len(self.tokens)} tokens",
            note=f"baseline: {self.baseline}" if self.baseline else "",
        )

    def to_html(self, title: str = "") -> str:
        """The page of `view` as text: one document that fetches nothing."""
        return self.view(title).html

    def save(self, path: str | Path) -> None:
        """Write everything into one safetensors file with a JSON header, atomically.

        Raises:
            RecordFileError: the file cannot be written.
        """
        header: dict[str, Any] = {name: getattr(self, name) for name in _PLAIN}
        header |= {name: list(getattr(self, name)) for name in _LISTS}
        tables = {name: getattr(self, name) for name in _TABLES}
        if self.per_dimension is not None:
            tables["per_dimension"] = self.per_dimension
        arrays = {name: torch.from_numpy(np.array(table)) for name, table in tables.items()}
        write_arrays(Path(path), "safetensors", KIND, VERSION, header, arrays)

    @classmethod
    def load(cls, path: str | Path) -> TokenAttribution:
        """Read what `save` wrote.

        Raises:
            RecordFileError: the file is not what `save` writes.
        """
        with open_arrays(Path(path), KIND, VERSION) as stored:
            fields: dict[str, Any] = {name: stored.content[name] for name in _PLAIN}
            fields |= {name: tuple(stored.content[name]) for name in _LISTS}
            names = [name for name in (*_TABLES, "per_dimension") if name in stored.specs]
            fields |= {name: stored.read(name).numpy() for name in names}
            return built(cls, fields)


_TABLES = ("scores", "value", "baseline_value")
_LISTS = ("tokens", "token_ids", "target_positions", "targets", "target_ids")
_PLAIN = ("method", "metric", "unit", "baseline", "steps")
"""How a result lies in a file."""
