"""What another query or key does to a head's pattern, and to what is linear in the pattern.

A gradient at a query or key sees a saturated softmax as flat. AtP* (Kramár et al. 2024, section
3.1.1) recomputes the softmax with the other query or key and is linear only from the pattern on:
the estimate is ``Σ (new pattern − pattern) · gradient at the pattern``.

No table says how a model makes scores of queries and keys. `fit_scores` finds it: between two runs,
the logarithm of a pattern moves as the scores do, whatever is added to these by position (masks,
ALiBi). Scores are ``scale · q·k``, or ``cap · tanh(scale · q·k / cap)`` where the config has a cap;
what is neither is refused. From there on only ratios of a pattern's own entries are used, so that
masks and positions never have to be known. All is computed in float64.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from forward_pass import ArchitectureError
from module_devices import exact

ROUNDINGS = 64
"""A fit is accepted if it is off by no more than so many roundings of a score."""

LEAST = 1e-4
"""Entries of a pattern below this, times its row's largest, are not used for the fit."""


@dataclass(frozen=True, eq=False)
class Attention:
    """One block's queries, keys and pattern in some prompts of one length.

    Keys are once per key/value head.
    """

    query: Tensor
    """``[row, position, head, d_head]``."""
    key: Tensor
    """``[row, position, kv_head, d_head]``."""
    pattern: Tensor
    """``[row, head, query, key]``."""

    def first(self, length: int) -> Attention:
        """The first so many positions alone."""
        pattern = self.pattern[:, :, :length, :length]
        return Attention(self.query[:, :length], self.key[:, :length], pattern)

    def products(self, query: Tensor | None = None, key: Tensor | None = None) -> Tensor:
        """Query times key, float64 ``[row, head, query, key]``; others may stand in for either."""
        queries = exact(self.query if query is None else query)
        keys = exact(self.key if key is None else key)
        groups = queries.shape[2] // keys.shape[2]
        keys = keys.repeat_interleave(groups, dim=2)
        return torch.einsum("rqhd,rkhd->rhqk", queries, keys.to(queries.device))


@dataclass(frozen=True)
class ScoreRule:
    """How a block makes scores of products of query and key, but for what depends on position."""

    scale: float
    cap: float | None = None

    def __call__(self, products: Tensor) -> Tensor:
        """The scores of some products."""
        if self.cap is None:
            return self.scale * products
        return self.cap * (self.scale / self.cap * products).tanh()


# --- Finding the rule -----------------------------------------------------------------------------


def fit_scores(runs: tuple[Attention, Attention], cap: float | None, where: str) -> ScoreRule:
    """How a block makes scores, found from two runs of as many tokens.

    Args:
        runs: The same block in two runs.
        cap: The soft-cap on scores, if the model's config names one.
        where: The block, for the error.

    Raises:
        ArchitectureError: scores are no function of query times key that is known here.
    """
    first, second = runs
    products = first.products(), second.products()
    patterns = [exact(run.pattern).to(products[0].device) for run in runs]
    floor = [LEAST * pattern.amax(-1, keepdim=True) for pattern in patterns]
    known = (patterns[0] > floor[0]) & (patterns[1] > floor[1])
    moved = torch.where(known, patterns[1], 1).log() - torch.where(known, patterns[0], 1).log()
    target = _centred(moved, known)

    def explained(rule: ScoreRule) -> Tensor:
        return _centred(rule(products[1]) - rule(products[0]), known)

    plain = explained(ScoreRule(1.0))
    size = float((plain * plain).sum())
    scale = float((plain * target).sum()) / size if size else 0.0
    rule = ScoreRule(scale)
    if cap is not None:
        rule = _fit_capped(explained, target, cap, first.query.shape[-1])
    off = float((target - explained(rule)).abs().max())
    lengths = [exact(part).norm(dim=-1).amax() for part in (first.query, first.key)]
    largest = abs(rule.scale) * float(lengths[0].cpu() * lengths[1].cpu())
    allowed = ROUNDINGS * _rounding(first.pattern) * (1 + largest)
    if not off <= allowed:
        raise ArchitectureError(
            f"the attention scores of {where} are no known function of query times key (patterns "
            f"differ by {off:.2g}, {allowed:.2g} would be rounding): leave attention_correction out"
        )
    return rule


def _rounding(pattern: Tensor) -> float:
    """Of a pattern's entries; many models make them in float32 at best."""
    return max(torch.finfo(pattern.dtype).eps, torch.finfo(torch.float32).eps)


def _centred(values: Tensor, known: Tensor) -> Tensor:
    """Less the mean of each row's known entries; 0 elsewhere."""
    kept = torch.where(known, values, 0)
    mean = kept.sum(-1, keepdim=True) / known.sum(-1, keepdim=True).clamp(min=1)
    return torch.where(known, values - mean, 0)


def _fit_capped(explained: Any, target: Tensor, cap: float, width: int) -> ScoreRule:
    """The scale under a cap: the best of a grid around 1/√width, refined by golden section."""

    def loss(log_scale: float) -> float:
        rule = ScoreRule(2.0**log_scale, cap)
        return float((explained(rule) - target).square().sum())

    middle = -0.5 * torch.tensor(float(width), device="cpu").log2().item()
    low, high = -6.0, 6.0
    grid = [middle + low + (high - low) * i / 48 for i in range(49)]
    best = min(grid, key=loss)
    low, high, golden = best - 0.25, best + 0.25, (5**0.5 - 1) / 2
    for _ in range(60):
        left, right = high - golden * (high - low), low + golden * (high - low)
        low, high = (low, right) if loss(left) < loss(right) else (left, high)
    return ScoreRule(2.0 ** ((low + high) / 2), cap)


# --- What a patch does ----------------------------------------------------------------------------


def query_effects(
    rule: ScoreRule, run: Attention, slope: Tensor, query: Tensor, places: Tensor
) -> Tensor:
    """The estimate for each query that is replaced, by position and head.

    Rows of a pattern do not see each other, so that the effect of several is their sum.

    Args:
        rule: From `fit_scores`.
        run: The run that is patched.
        slope: Gradient at its pattern, ``[row, head, query, key]``.
        query: What is put in, ``[row, place, head, d_head]``.
        places: Where, ``[place]``.

    Returns:
        ``[row, place, head]``, float64.
    """
    old = Attention(run.query[:, places.to(run.query.device)], run.key, run.pattern)
    moved = rule(old.products(query)) - rule(old.products())
    pattern, slopes = (_at(each, places, moved) for each in (run.pattern, slope))
    rest = _rest(run.pattern)[:, :, places].to(moved.device)
    return _moved_mean(pattern, slopes, moved, rest).transpose(1, 2)


def key_effects(
    rule: ScoreRule, run: Attention, slope: Tensor, key: Tensor, places: Tensor, together: bool
) -> Tensor:
    """The estimate for keys that are replaced, by position and key/value head.

    Args:
        rule: From `fit_scores`.
        run: The run that is patched.
        slope: Gradient at its pattern, ``[row, head, query, key]``.
        key: What is put in, ``[row, place, kv_head, d_head]``.
        places: Where, ``[place]``.
        together: Replace all places at once; else each alone.

    Returns:
        ``[row, place, kv_head]``, with one place where ``together``; float64.
    """
    new = run.key.clone()
    new[:, places.to(new.device)] = key.to(new)
    moved = rule(run.products(key=new)) - rule(run.products())
    pattern, slopes = exact(run.pattern).to(moved.device), exact(slope).to(moved.device)
    rest = _rest(run.pattern).to(moved.device)
    if together:
        found = _moved_mean(pattern, slopes, moved, rest).sum(-1)[:, None]
    else:
        found = _one_moved(pattern, slopes, moved, rest)[..., places.to(moved.device)].sum(2).mT
    return found.unflatten(-1, (run.key.shape[2], -1)).sum(-1)


def _at(value: Tensor, places: Tensor, like: Tensor) -> Tensor:
    """Some query rows of a pattern."""
    return exact(value[:, :, places.to(value.device)]).to(like.device)


def _rest(pattern: Tensor) -> Tensor:
    """What each row of a pattern gives to no key (a sink), ``[row, head, query]``.

    A row with one key alone shows whether there is a sink: without one it says 1 exactly.
    """
    sums = exact(pattern).sum(-1)
    has_sink = (sums[..., :1] < 1 - 4 * _rounding(pattern)).any(0, keepdim=True)
    return torch.where(has_sink, (1 - sums).clamp(min=0), 0)


def _moved_mean(pattern: Tensor, slopes: Tensor, moved: Tensor, rest: Tensor) -> Tensor:
    """Mean of the slopes under a pattern whose scores have moved, less that under it as it was.

    Args:
        pattern: ``[…, key]``.
        slopes: Like it.
        moved: By how much each score changes.
        rest: What no key gets, ``[…]``; its score stays.
    """
    most = torch.where(pattern > 0, moved, -torch.inf).amax(-1, keepdim=True)
    most = torch.where(rest[..., None] > 0, most.clamp(min=0), most)  # the rest's score stays
    grown = torch.where(pattern > 0, pattern * (moved - most).exp(), 0)
    kept = torch.where(rest > 0, rest * (-most[..., 0]).exp(), 0)
    before = (pattern * slopes).sum(-1) / (pattern.sum(-1) + rest)
    after = (grown * slopes).sum(-1) / (grown.sum(-1) + kept)
    return after - before


def _one_moved(pattern: Tensor, slopes: Tensor, moved: Tensor, rest: Tensor) -> Tensor:
    """`_moved_mean` for each key alone, ``[…, key]``.

    The sums over all other keys are made without the largest entry where that is the one that
    moves: as a difference from the whole they would be rounding in a saturated row.
    """
    total = pattern.sum(-1, keepdim=True) + rest[..., None]
    mass = (pattern * slopes).sum(-1, keepdim=True)
    others, others_mass = total - pattern, mass - pattern * slopes
    top = pattern.argmax(-1, keepdim=True)
    without = pattern.scatter(-1, top, 0.0)
    others = others.scatter(-1, top, without.sum(-1, keepdim=True) + rest[..., None])
    others_mass = others_mass.scatter(-1, top, (without * slopes).sum(-1, keepdim=True))
    most = moved.clamp(min=0)
    grown, shrunk = pattern * (moved - most).exp(), (-most).exp()
    whole = others * shrunk + grown
    after = (others_mass * shrunk + grown * slopes) / whole
    return torch.where(whole > 0, after - mass / total, 0)
