"""What is attributed: tokens at positions, measured by logit, log probability, probability or more.

`Targets` pairs positions with tokens and is the function from logits to their values.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from embedding_pass import Measure
from forward_pass import InputError
from gradient_record import differentiable
from interrupts import enable_grad
from logit_metrics import UNITS, make_metric, reads_of
from tokenization import Positions, resolve_positions, token_id, token_strings

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

METRICS = ("logit", "log_prob", "prob", "logit_diff")
"""Metrics by name; `logit_metrics` defines them."""

SPELLINGS = {"logprob": "log_prob", "probability": "prob", "diff": "logit_diff"}


@dataclass(frozen=True)
class Targets:
    """One entry per target: a token at a position."""

    positions: tuple[int, ...]
    """Absolute; the token is predicted there, after this position."""
    ids: tuple[int, ...]
    """-1 where a function of all logits is measured."""
    labels: tuple[str, ...]
    metric: str
    unit: str
    against: tuple[int, ...] = ()
    """For ``logit_diff``, the token that each is compared with."""
    function: Callable[[Tensor], Tensor] | None = None
    """Logits ``[row, position, vocab]`` → ``[row]``."""

    def measure(self, read: Sequence[int]) -> Measure:
        """The targets' values as a function of logits at ``read``."""
        if self.function is not None:
            function = self.function
            return Measure(lambda logits: function(logits)[:, None], None)
        slots = tuple(list(read).index(position) for position in self.positions)
        slot, ids = torch.tensor(slots, device="cpu"), torch.tensor(self.ids, device="cpu")

        def values(logits: Tensor) -> Tensor:
            at = logits[:, slot.to(logits.device), ids.to(logits.device)]
            if self.metric == "logit_diff":
                foils = torch.tensor(self.against, device=logits.device)
                return at - logits[:, slot.to(logits.device), foils]
            if self.metric == "logit":
                return at
            log_prob = at - logits.logsumexp(-1)[:, slot.to(logits.device)]
            return log_prob if self.metric == "log_prob" else log_prob.exp()

        return Measure(values, slots)

    def followed(self, logits: Tensor, read: Sequence[int], *, one: bool) -> Targets:
        """The same; a function's position is the one whose logits its gradient comes from.

        Args:
            logits: The prompt's, ``[1, read, vocab]``.
            read: Their positions.
            one: Whether there must be no more than one.

        Raises:
            InputError: the function has no gradient, or needs more positions than ``one``.
        """
        if self.function is None:
            return self
        leaf = logits.detach().clone().to(torch.promote_types(logits.dtype, torch.float32))
        with enable_grad():
            leaf.requires_grad_()
            total = differentiable([self.measure(read)], leaf, self.metric).sum()
        (slope,) = torch.autograd.grad(total, leaf, allow_unused=True, materialize_grads=True)
        moved = (slope[0] != 0).any(-1).tolist()
        places = tuple(place for place, moves in zip(read, moved, strict=True) if moves)
        if one and len(places) > 1:
            raise InputError(
                f"gradient-weighted attention is followed back from one position, and the metric "
                f"{self.metric!r} is made of the logits of {len(places)}: give one that reads a "
                "single position, or use method='integrated_gradients'"
            )
        return replace(self, positions=places) if len(places) == 1 else self


@dataclass(frozen=True)
class Request:
    """What was asked for, checked as far as it can be before any pass."""

    metric: Any
    """A name out of `METRICS`, or a function."""
    positions: tuple[int, ...]
    """Of the targets, absolute; one for each of ``ids``, where there are any. Of a function the
    last one that it may read."""
    ids: tuple[int, ...] | None
    """None: the model's best token at each position."""
    against: tuple[int, ...]
    length: int

    @property
    def read(self) -> tuple[int, ...]:
        """Positions whose logits are needed, ascending."""
        if callable(self.metric):
            asked = reads_of(self.metric)
            if asked is None:
                return tuple(range(self.length))
            return tuple(sorted({resolve_positions(p, self.length)[0] for p in asked}))
        return tuple(sorted(set(self.positions)))

    def targets(self, logits: Tensor, tokenizer: PreTrainedTokenizerBase | None) -> Targets:
        """The targets, given the prompt's logits ``[1, read, vocab]``.

        Raises:
            InputError: a target would be compared with itself, or a function is no metric.
        """
        if callable(self.metric):
            made = make_metric(self.metric, logits, logits)
            return Targets(
                self.positions, (-1,), (made.name,), made.name, made.unit, (), made.measure
            )
        ids = self.ids
        if ids is None:
            rows = [self.read.index(position) for position in self.positions]
            ids = tuple(logits[0, rows].argmax(-1).tolist())
        labels = token_strings(tokenizer, ids)
        if self.metric == "logit_diff":
            foils = token_strings(tokenizer, self.against)
            for own, foil, label in zip(ids, self.against, labels, strict=True):
                if own == foil:
                    raise InputError(
                        f"{label!r} would be compared with itself; say which tokens are compared: "
                        "targets=' Paris', against=' Rome'"
                    )
            labels = [f"{a} − {b}" for a, b in zip(labels, foils, strict=True)]
        unit = UNITS[self.metric]
        return Targets(self.positions, ids, tuple(labels), self.metric, unit, self.against)


def make_request(
    tokenizer: PreTrainedTokenizerBase | None,
    config: Any,
    ids: Sequence[int],
    targets: Any,
    target_positions: Positions,
    metric: Any,
    against: Any,
    follow_text: bool,
) -> Request:
    """Check what shall be attributed.

    Args:
        tokenizer: For tokens given as text.
        config: The model's text config.
        ids: The prompt.
        targets: None, a token, or several: see `gradient_attribution.attribute_tokens`.
        target_positions: Which positions; ``"all"`` or None means all.
        metric: A name, or a function of logits ``[1, position, vocab]``.
        against: For ``logit_diff``: a token, or one for each target.
        follow_text: Take the tokens that follow in the prompt as targets.

    Raises:
        InputError: something does not fit; the message says what does.
    """
    every = isinstance(target_positions, str) and target_positions == "all"
    chosen = None if every else target_positions
    length = len(ids)
    if callable(metric):
        last = isinstance(chosen, str | int) and chosen in (-1, "last")
        if targets is not None or against is not None or follow_text or not last:
            raise InputError(
                "a function of all logits is one target by itself: leave out targets, "
                "target_positions, against and follow_text"
            )
        asked = Request(metric, (length - 1,), None, (), length)
        return replace(asked, positions=asked.read[-1:])
    name = _metric_name(metric)
    if follow_text:
        positions, own = _following(ids, targets, chosen)
    else:
        positions = resolve_positions(chosen, length)
        own = None if targets is None else _tokens(tokenizer, config, targets, "targets")
        positions, own = _paired(positions, own)
    foils = _foils(tokenizer, config, name, against, len(positions))
    if foils and len(foils) > len(positions) == 1:  # one answer against several
        positions, own = positions * len(foils), None if own is None else own * len(foils)
    return Request(name, tuple(positions), None if own is None else tuple(own), foils, length)


def _metric_name(metric: Any) -> str:
    name = SPELLINGS.get(metric, metric) if isinstance(metric, str) else metric
    if name not in METRICS:
        raise InputError(
            f"a metric is one of {', '.join(METRICS)}, or a function of logits "
            f"[1, position, vocab]; came {metric!r}"
        )
    return str(name)


def _following(
    ids: Sequence[int], targets: Any, chosen: Positions
) -> tuple[list[int], list[int] | None]:
    """Positions that have a next token in the prompt, and these tokens."""
    last = len(ids) - 1
    if targets is not None:
        raise InputError("follow_text=True takes the tokens of the text: leave out targets")
    positions = list(range(last)) if chosen is None else resolve_positions(chosen, len(ids))
    if not positions or last in positions:
        raise InputError(
            f"no token follows the last position, {last}: with follow_text=True choose earlier "
            "positions, or 'all', of a text of at least two tokens"
        )
    return positions, [ids[position + 1] for position in positions]


def _tokens(
    tokenizer: PreTrainedTokenizerBase | None, config: Any, tokens: Any, name: str
) -> list[int]:
    plain = tokens.tolist() if isinstance(tokens, Tensor | np.ndarray) else tokens
    several = [plain] if isinstance(plain, str) or hasattr(plain, "__index__") else plain
    if not isinstance(several, list | tuple) or not several:
        raise InputError(f"{name} is a token, or a list of at least one; came {tokens!r}")
    return [token_id(tokenizer, token, config) for token in several]


def _paired(positions: list[int], own: list[int] | None) -> tuple[list[int], list[int] | None]:
    """One position for each token, and one token for each position."""
    if own is None or len(own) == len(positions):
        return positions, own
    if len(own) == 1:
        return positions, own * len(positions)
    if len(positions) == 1:
        return positions * len(own), own
    raise InputError(
        f"{len(own)} targets do not pair with {len(positions)} target_positions: give one token "
        "for each position, one token for all, or several tokens for one position"
    )


def _foils(
    tokenizer: PreTrainedTokenizerBase | None, config: Any, metric: str, against: Any, count: int
) -> tuple[int, ...]:
    if metric != "logit_diff":
        if against is not None:
            raise InputError(f"against= belongs to metric='logit_diff'; the metric is {metric!r}")
        return ()
    if against is None:
        raise InputError("metric='logit_diff' needs the other token: against=' Rome'")
    foils = _tokens(tokenizer, config, against, "against")
    if len(foils) == 1:
        foils *= count
    if len(foils) != count and count != 1:
        raise InputError(
            f"against is one token, or one for each of the {count} targets; came {len(foils)}"
        )
    return tuple(foils)
