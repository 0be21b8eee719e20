"""Path patching: which part of a model tells which other part what.

Activation patching exchanges what a component says for everybody who listens. Path patching
exchanges it for some listeners only: the edges from *senders* to *receivers* carry the sender's
output in another run, everything else on the way is as in the unmodified run, and what lies behind
the receivers is recomputed. A receiver is the query, key or value of a head, an MLP, a whole
block, or the logits; `circuit_nodes` says how they are written.

    effects = patch_paths(model, tokenizer, clean, corrupted, "heads", "9.6.q")
    effects.top(5)      # who tells head 9.6 where to look
    effects.plot()

Algorithm (Wang et al. 2022, Interpretability in the Wild, section 3.1 and appendix B;
Goldowsky-Dill et al. 2023, Localizing Model Behavior with Path Patching):

1. Run the clean and the corrupted prompt, and keep what every sender adds.
2. For each sender give each receiver the clean stream plus what that sender adds in the corrupted
   run minus what it adds in the clean one; `path_pass` says how one pass does this for many.
3. Run on from there, and compare the metric with that of the clean run.

MLPs between sender and receiver are frozen too (Goldowsky-Dill et al.: every path is a single
edge), unless ``through_mlps`` lets them carry a change on, as Wang et al. do.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from base_run import run_base
from circuit_nodes import Group, parts_of, reads_at, receiver_nodes, sender_groups
from edited_runs import abilities, default_tokens, memory_needed
from forward_pass import InputError
from logit_metrics import Metric, make_metric, reads_of
from memory_limits import in_batches
from model_architecture import Architecture
from node_effects import PathEffects
from path_pass import PathPlan, PathRuns, plan_path, run_paths, sender_sites
from prompt_pairs import PromptPair, make_pairs
from sweep_result import summarize
from tokenization import Positions, resolve_positions, token_strings

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def patch_paths(
    model: PreTrainedModel | Architecture,
    tokenizer: PreTrainedTokenizerBase | None,
    clean_prompt: Any,
    corrupted_prompt: Any,
    senders: Any = "heads",
    receivers: Any = "logits",
    *,
    direction: str = "noising",
    metric: Any = "logit_diff",
    answer: Any = None,
    foil: Any = None,
    sender_positions: Positions = None,
    receiver_positions: Positions = None,
    through_mlps: bool = False,
    max_tokens: int | None = None,
    show_progress: bool = True,
    seed: int = 0,
) -> PathEffects:
    """Patch the paths from each sender to the receivers, and measure each run.

    Args:
        model: A causal language model, never changed.
        tokenizer: For prompts and tokens given as text.
        clean_prompt: Text, a chat or token ids; or a list of prompts, one per pair.
        corrupted_prompt: The same for the corrupted run, with as many tokens.
        senders: ``"heads"``, ``"mlps"``, ``"attns"``, ``"blocks"`` or ``"all"`` (heads, MLPs and
            the embedding): each by itself. Or a node (``"9.6"``, ``"mlp 3"``, ``"embed"``), or a
            list of nodes, one run each; a list within the list is sent together.
        receivers: A node that reads (``"9.6.q"``, ``"mlp 10"``, ``"block 11"``, ``"logits"``), a
            list of these, or ``"queries"``, ``"keys"``, ``"values"``, ``"mlps"``, ``"attns"``,
            ``"blocks"``, ``"all"``: they receive all at once. Keys and values count the heads that
            are stored (grouped-query attention).
        direction: ``"noising"``: the clean run is changed, senders come from the corrupted one;
            ``"denoising"``: the other way round.
        metric: See `logit_metrics`.
        answer: The token measured, by text or id (one for each pair where there are several); None
            is the clean run's best.
        foil: The token it is compared with; None is the corrupted run's best.
        sender_positions: At which tokens senders are exchanged; None means all.
        receiver_positions: At which tokens receivers read the exchange; None means all. (An edge
            stays at its token: what is read there was written there.)
        through_mlps: Let MLPs between sender and receivers pass a change on.
        max_tokens: Tokens (rows × positions) per pass; None is what memory and processor like.
        show_progress: A progress bar, where there is a terminal to show it.
        seed: Of the bootstrap over pairs.

    Returns:
        `PathEffects`, one number per sender: the metric of the patched run minus that of the
        unmodified one, exactly 0 where no path leads from sender to receivers. With several pairs
        the mean over them, with standard error and interval.

    Raises:
        InputError: prompts of different length (both token lists are shown), an unknown sender,
            receiver, metric or direction, or a position that does not exist.
        LayerError: there is no such layer.
        SiteError: the model lacks a part that a sender or receiver needs.
        ArchitectureError: the model has no head.
    """
    architecture = model if isinstance(model, Architecture) else Architecture(model)
    architecture.require_head("path patching")
    if direction not in ("noising", "denoising"):
        raise InputError(f"direction is 'noising' or 'denoising'; came {direction!r}")
    reads_of(metric)
    groups = sender_groups(architecture, senders)
    ends = receiver_nodes(architecture, receivers)
    pairs = make_pairs(
        architecture, tokenizer, clean_prompt, corrupted_prompt, direction, "end", answer, foil
    )
    for pair in pairs:
        _check_lengths(tokenizer, pair)
    places = [
        tuple(_mask(each, len(pair.base)) for each in (sender_positions, receiver_positions))
        for pair in pairs
    ]
    study = _PathStudy(architecture, groups, ends, through_mlps, max_tokens)
    values, metrics = [], []
    hidden = not show_progress or not sys.stderr.isatty()
    with tqdm(total=len(pairs) * len(groups), desc="paths", unit="path", disable=hidden) as bar:
        for pair, (sending, receiving) in zip(pairs, places, strict=True):
            measured = _Measured(architecture, tokenizer, pair, metric, direction)
            values.append(study.run(pair, measured, sending, receiving, bar))
            metrics.append(measured)
    return _result(study, pairs, metrics, np.array(values), direction, tokenizer, seed)


def _check_lengths(tokenizer: Any, pair: PromptPair) -> None:
    """Raise InputError unless positions of both prompts correspond."""
    if len(pair.clean) != len(pair.corrupted):
        shown = [token_strings(tokenizer, ids) for ids in (pair.clean, pair.corrupted)]
        raise InputError(
            f"the prompts have {len(pair.clean)} and {len(pair.corrupted)} tokens, so their "
            f"positions do not correspond: {shown[0]} and {shown[1]}. Write them with as many "
            "tokens each"
        )


def _mask(positions: Positions, length: int) -> Tensor:
    """``[position]``, whether a position is meant."""
    mask = torch.zeros(length, dtype=torch.bool, device="cpu")
    mask[resolve_positions(positions, length)] = True
    return mask


class _Measured:
    """A pair's metric, and what it says of the two unmodified runs."""

    metric: Metric
    base: float
    other: float

    def __init__(
        self,
        architecture: Architecture,
        tokenizer: Any,
        pair: PromptPair,
        metric: Any,
        direction: str,
    ) -> None:
        self.architecture, self.tokenizer, self.pair = architecture, tokenizer, pair
        self.asked, self.noising = metric, direction == "noising"
        read = reads_of(metric)
        self.read = range(len(pair.base)) if read is None else read

    def prepare(self, base: Tensor, other: Tensor) -> None:
        """Make the metric from the logits ``[1, read, vocab]`` of both runs."""
        clean, corrupted = (base, other) if self.noising else (other, base)
        self.metric = make_metric(
            self.asked, clean, corrupted, base=base, answer=self.pair.answer, foil=self.pair.foil,
            tokenizer=self.tokenizer, config=self.architecture.config,
        )  # fmt: skip
        self.base, self.other = float(self.metric(base)), float(self.metric(other))


class _PathStudy:
    """The same paths, for one pair of prompts after the other."""

    def __init__(
        self,
        architecture: Architecture,
        groups: Sequence[Group],
        receivers: Group,
        through_mlps: bool,
        max_tokens: int | None,
    ) -> None:
        self.architecture, self.groups, self.receivers = architecture, groups, receivers
        self.through_mlps, self.max_tokens, self.passes = through_mlps, max_tokens, 0
        senders = [parts_of(architecture, group) for group in groups]
        times = {node: reads_at(architecture, node) for node in receivers}
        found = [
            plan_path(architecture, number, each, times, through_mlps)
            for number, each in enumerate(senders)
        ]
        self.plans = sorted((p for p in found if p is not None), key=lambda plan: plan.join)
        self.sites = sender_sites(self.plans)

    def run(
        self, pair: PromptPair, measured: _Measured, sending: Tensor, receiving: Tensor, bar: Any
    ) -> list[float]:
        """The metric's change by each group's paths."""
        arch = self.architecture
        able = abilities(arch)
        ids = [torch.tensor([each], device="cpu") for each in (pair.base, pair.source)]
        base = run_base(arch, ids[0], self.sites, measured.read, cached=able.suffix)
        other = run_base(arch, ids[1], self.sites, measured.read, cached=False)
        measured.prepare(base.logits, other.logits)
        values = [0.0] * len(self.groups)
        differs = (ids[0] != ids[1])[0]
        changed = (differs.cumsum(0) > 0) & sending if able.causal else sending
        plans = self.plans if bool(changed.any()) and bool(differs.any()) else []
        bar.update(len(self.groups) - len(plans))
        if not plans:
            return values
        start = int(changed.int().argmax()) if able.suffix else 0
        runs = PathRuns(arch, base, other, start, sending, receiving)
        limit = self.max_tokens or default_tokens(arch, base)
        size = max(1, limit // (2 * (base.length - start)))
        batches = in_batches(
            _batches(plans, size, able.grows),
            lambda batch: run_paths(runs, batch, able.grows),
            unit="paths",
            needs=lambda _batch: memory_needed(arch, base, 2 * (base.length - start)),
        )
        for batch, logits in batches:
            self.passes += 1
            unread = len(base.read) - logits.shape[1]
            before = base.logits[:, :unread].expand(len(logits), -1, -1)
            found = measured.metric(torch.cat([before.to(logits), logits], 1)).cpu().double()
            for plan, value in zip(batch, found.tolist(), strict=True):
                values[plan.number] = value - measured.base
            bar.update(len(batch))
        return values


def _batches(plans: Sequence[PathPlan], size: int, grows: bool) -> Iterator[list[PathPlan]]:
    """Paths that go through the model together, in order of joining."""
    batch: list[PathPlan] = []
    for plan in plans:
        apart = batch and not grows and batch[0].join != plan.join
        if len(batch) == size or apart:
            yield batch
            batch = []
        batch.append(plan)
    if batch:
        yield batch


def _result(
    study: _PathStudy,
    pairs: Sequence[PromptPair],
    measured: Sequence[_Measured],
    values: np.ndarray,
    direction: str,
    tokenizer: Any,
    seed: int,
) -> PathEffects:
    bases, others = ([getattr(m, name) for m in measured] for name in ("base", "other"))
    found = summarize(values, bases, others, False, seed)
    one, metric = len(pairs) == 1, measured[0].metric

    def text(token: int | None) -> str:
        return "" if token is None or not one else token_strings(tokenizer, [token])[0]

    return PathEffects(
        values=found.mean,
        stderr=found.stderr,
        low=found.low,
        high=found.high,
        groups=tuple(study.groups),
        receivers=study.receivers,
        metric=metric.name,
        unit=metric.unit,
        base=float(np.mean(bases)),
        other=float(np.mean(others)),
        answer=text(metric.answer),
        foil=text(metric.foil),
        tokens=tuple(token_strings(tokenizer, pairs[0].base)) if one else (),
        source_tokens=tuple(token_strings(tokenizer, pairs[0].source)) if one else (),
        direction=direction,
        through_mlps=study.through_mlps,
        count=len(pairs),
        passes=study.passes,
    )
