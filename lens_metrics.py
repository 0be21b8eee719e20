"""Numbers of a distribution over the vocabulary, reduced from logits a chunk at a time.

Every metric is computed in float32 from the logits of one row (a layer) and one chunk of positions,
in as few passes over the vocabulary as its formula allows, and compared with a reference
distribution p of the same positions (the model's final one). With z the row's logits less their
largest, q its distribution and Z = log Σ exp z:

- ``kl_divergence``: KL(p ‖ q) = Σ p log p − Σ p z + Z, nats.
- ``entropy``: H(q) = Z − Σ q z, nats.
- ``top1_rank``: the rank of p's best token in the row; ``top1_match``: whether it is the best there
  too (also where another token ties with it); ``top1_logit``: the row's best logit.
- ``cross_entropy`` (nats), ``next_token_prob``, ``next_token_rank``: of the true next token, NaN
  where there is none.
- ``js_divergence``: ½ KL(p ‖ m) + ½ KL(q ‖ m), m = ½ (p + q) (Lin 1991), nats, at most ln 2.
- ``total_variation``: ½ Σ |p − q|, from 0 to 1.

A rank counts the tokens with a strictly larger logit: 0 is best, nothing is sorted.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from forward_pass import InputError

DEFAULT_METRICS = (
    "kl_divergence",
    "top1_match",
    "top1_rank",
    "top1_logit",
    "entropy",
    "cross_entropy",
    "next_token_prob",
    "next_token_rank",
)
METRICS = (*DEFAULT_METRICS, "js_divergence", "total_variation")
"""Every metric that can be asked for by name."""

DISTANCES = frozenset({"kl_divergence", "js_divergence", "total_variation"})
"""Metrics that compare with the whole reference distribution; 0 for the reference itself."""

ROWS_AT_ONCE = 8
"""Positions reduced together on the CPU, at least: what is made of them stays in its cache."""

VALUES_AT_ONCE = 2**18
"""Logits reduced together on the CPU: more positions than `ROWS_AT_ONCE` of a small vocabulary."""

SMALL_VOCABULARY = 4096
"""Up to here torch counts in a row of logits as fast as numpy."""

FOLD = 64
"""Lines that a long row of logits is folded into, to find its best tokens."""


def check_metrics(names: str | Sequence[str]) -> tuple[str, ...]:
    """Names of metrics, each once; a single name may be given as it is.

    Raises:
        InputError: there is no metric of that name.
    """
    asked = (names,) if isinstance(names, str) else tuple(dict.fromkeys(names))
    unknown = [name for name in asked if name not in METRICS]
    if unknown:
        raise InputError(f"no metric {unknown[0]!r}; metrics are {', '.join(METRICS)}")
    return asked


# --- One number per row of logits -----------------------------------------------------------------


def rank_of(logits: Tensor, tokens: Tensor) -> Tensor:
    """How many tokens have a larger logit than the given one.

    Args:
        logits: ``[position, vocab]``.
        tokens: ``[position]``, ids.

    Returns:
        ``[position]``, int64; 0 is the best token.
    """
    values = logits.gather(1, tokens[:, None])
    if logits.device.type != "cpu" or logits.shape[1] <= SMALL_VOCABULARY:
        return (logits > values).sum(1)
    rows = zip(logits.float().numpy(), values.float().numpy(), strict=True)
    counts = [np.count_nonzero(row > value) for row, value in rows]  # several times faster here
    return torch.tensor(counts, dtype=torch.long, device="cpu")


def best_tokens(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The ``k`` largest logits and their ids, best first: ``topk``, faster for a long row.

    The row is folded into `FOLD` lines. No more than k columns of these can hold any of the k best:
    those with the largest maxima.

    Args:
        logits: ``[position, vocab]``.
        k: How many.

    Returns:
        Logits and ids, both ``[position, k]``.
    """
    rows, vocabulary = logits.shape
    columns = vocabulary // FOLD
    if columns < 4 * k:
        values, ids = logits.topk(k)
        return values, ids
    folded = logits[:, : FOLD * columns].view(rows, FOLD, columns)
    hopeful = folded.amax(1).topk(k).indices
    lines = columns * torch.arange(FOLD, device=logits.device)
    rest = torch.arange(FOLD * columns, vocabulary, device=logits.device).expand(rows, -1)
    ids = torch.cat([(hopeful[:, None] + lines[:, None]).flatten(1), rest], 1)
    values, places = logits.gather(1, ids).topk(k)
    return values, ids.gather(1, places)


def js_divergence(p: Tensor, q: Tensor) -> Tensor:
    """Jensen-Shannon divergence, nats: ``[position, vocab]`` twice → ``[position]``."""
    of_p, of_q, of_middle = (_negative_entropy(each) for each in (p, q, (p + q) / 2))
    return ((of_p + of_q) / 2 - of_middle).clamp_(min=0)


def _negative_entropy(p: Tensor) -> Tensor:
    """Σ p log p, where 0 log 0 is 0."""
    return torch.linalg.vecdot(p, p.clamp(min=torch.finfo(p.dtype).tiny).log_())


def total_variation(p: Tensor, q: Tensor) -> Tensor:
    """Half the summed absolute difference: ``[position, vocab]`` twice → ``[position]``."""
    return (p - q).abs_().sum(-1) / 2


# --- The tables of a lens -------------------------------------------------------------------------


class RowMeter:
    """Fills the tables of a lens, one row and one chunk of positions at a time.

    Args:
        rows: Number of rows.
        count: Number of positions.
        top_k: Tokens kept per cell.
        names: Which of `METRICS`.
        target: Id of a token whose ``target_prob`` and ``target_rank`` are wanted too.

    Raises:
        InputError: a metric has no such name.
    """

    def __init__(
        self, rows: int, count: int, top_k: int, names: Sequence[str], target: int | None = None
    ) -> None:
        self._names, self._target, self._k = check_metrics(names), target, top_k
        self._shape = rows, count
        self._tables: dict[str, Tensor] = {}
        self._scratch: tuple[Tensor, Tensor] | None = None

    # Results ----------------------------------------------------------------------------------

    @property
    def metrics(self) -> dict[str, np.ndarray]:
        """Each metric, ``[row, position]``, float32."""
        return {name: self._table(name) for name in self._tables if not name.startswith("top_")}

    @property
    def top_ids(self) -> np.ndarray:
        """The best tokens, ``[row, position, k]``, int64."""
        return self._table("top_ids")

    @property
    def top_probs(self) -> np.ndarray:
        """Their probabilities, ``[row, position, k]``, float32."""
        return self._table("top_probs")

    @property
    def top_logits(self) -> np.ndarray:
        """Their logits, ``[row, position, k]``, float32."""
        return self._table("top_logits")

    def _table(self, name: str) -> np.ndarray:
        return self._tables[name].cpu().numpy()

    def _make_tables(self, device: torch.device) -> dict[str, Tensor]:
        """Empty tables where the logits are, so that nothing waits for a copy before the end."""
        extra = () if self._target is None else ("target_prob", "target_rank")
        tables = {
            name: torch.full(self._shape, torch.nan, device=device)
            for name in (*self._names, *extra)
        }
        tables["top_ids"] = torch.zeros(*self._shape, self._k, dtype=torch.long, device=device)
        for name in ("top_probs", "top_logits"):
            tables[name] = torch.zeros(*self._shape, self._k, device=device)
        return tables

    # Measuring --------------------------------------------------------------------------------

    def start_chunk(self, chunk: slice, reference: Tensor | None, following: Tensor) -> None:
        """Begin a chunk of positions.

        Args:
            chunk: Which positions.
            reference: Logits ``[position, vocab]`` in float32 that the metrics compare with; None
                where there are no metrics.
            following: ``[position]``, the true next tokens, -1 where there is none.
        """
        self._chunk, self._following = chunk, following
        if reference is None or not self._names:
            return
        parts = [reference[here] for here in _parts(reference)]
        self._best = torch.cat([best_tokens(part, 1)[1][:, 0] for part in parts])
        if DISTANCES & set(self._names):
            self._p, self._p_log_p = torch.empty_like(reference), torch.empty_like(reference[:, 0])
            for here, part in zip(_parts(reference), parts, strict=True):
                log_p = part.log_softmax(-1)
                torch.exp(log_p, out=self._p[here])
                self._p_log_p[here] = torch.linalg.vecdot(self._p[here], log_p)

    def add(self, row: int, logits: Tensor, is_reference: bool = False) -> None:
        """Reduce one row's logits of the chunk.

        Args:
            row: Which row.
            logits: ``[position, vocab]``, float32.
            is_reference: They are the reference's own: their distances to it are exactly 0.
        """
        if not self._tables:
            self._tables = self._make_tables(logits.device)
        for here in _parts(logits):
            self._reduce(row, here, logits[here])
        if is_reference:
            for name in DISTANCES & set(self._names):
                self._tables[name][row, self._chunk] = 0.0

    def _put(self, name: str, row: int, here: slice, value: Tensor) -> None:
        first = self._chunk.start
        self._tables[name][row, first + here.start : first + here.stop] = value

    def _reduce(self, row: int, here: slice, logits: Tensor) -> None:
        best, ids = best_tokens(logits, self._k)
        z, weights = self._buffers(logits)
        torch.sub(logits, best[:, :1], out=z)
        torch.exp(z, out=weights)
        total = weights.sum(-1)
        log_total = total.log()
        self._put("top_ids", row, here, ids)
        self._put("top_logits", row, here, best)
        self._put("top_probs", row, here, (best - best[:, :1]).exp_() / total[:, None])
        values: dict[str, Callable[[], Tensor]] = {
            "kl_divergence": lambda: (
                self._p_log_p[here] - torch.linalg.vecdot(self._p[here], z) + log_total
            ).clamp_(min=0),
            "entropy": lambda: log_total - torch.linalg.vecdot(weights, z) / total,
            "top1_match": lambda: z.gather(1, self._best[here, None])[:, 0] == 0,
            "top1_rank": lambda: rank_of(logits, self._best[here]),
            "top1_logit": lambda: best[:, 0],
            "js_divergence": lambda: js_divergence(self._p[here], weights / total[:, None]),
            "total_variation": lambda: total_variation(self._p[here], weights / total[:, None]),
        }
        for name, value in values.items():
            if name in self._names:
                self._put(name, row, here, value())
        self._reduce_tokens(row, here, logits, z, log_total)

    def _buffers(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """Two tensors to write into, the same ones again and again: fresh memory costs more."""
        if self._scratch is None or len(self._scratch[0]) < len(like):
            self._scratch = torch.empty_like(like), torch.empty_like(like)
        z, weights = self._scratch
        return z[: len(like)], weights[: len(like)]

    def _reduce_tokens(
        self, row: int, here: slice, logits: Tensor, z: Tensor, log_total: Tensor
    ) -> None:
        """Probability and rank of the true next token and of the target."""
        following = self._following[here].to(z.device)
        tokens = following.clamp(min=0)
        log_q = z.gather(1, tokens[:, None])[:, 0] - log_total
        values: dict[str, Callable[[], Tensor]] = {
            "cross_entropy": lambda: -log_q,
            "next_token_prob": log_q.exp,
            "next_token_rank": lambda: rank_of(logits, tokens).float(),
        }
        for name, value in values.items():
            if name in self._names:
                self._put(name, row, here, torch.where(following >= 0, value(), torch.nan))
        if self._target is not None:
            target = torch.full_like(tokens, self._target)
            share = (z.gather(1, target[:, None])[:, 0] - log_total).exp()
            self._put("target_prob", row, here, share)
            self._put("target_rank", row, here, rank_of(logits, target))


def _parts(logits: Tensor) -> list[slice]:
    """The positions that are reduced together."""
    step = max(ROWS_AT_ONCE, VALUES_AT_ONCE // logits.shape[1])
    if logits.device.type != "cpu":
        step = len(logits)
    return [slice(start, min(start + step, len(logits))) for start in range(0, len(logits), step)]
