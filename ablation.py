"""Ablation: how much worse a model does without some of its parts.

    effects = ablate(model, tokenizer, prompts, method="mean")
    effects.top(5)          # the heads and MLPs that are missed most
    ablate(model, tokenizer, prompts, [["9.6", "9.9"]], "zero")     # two heads at once

A part's output (a head's z, what attention or an MLP adds to the residual stream) is replaced

- ``zero``: by 0, which may be far from anything the model ever saw;
- ``mean``: by its mean over all tokens (the first ones too) of reference prompts, which takes away
  what it says about this prompt and leaves what it always says (Wang et al. 2022,
  Interpretability in the Wild);
- ``resample``: by what it is in a reference prompt drawn at random, which keeps it natural (Chan et
  al. 2022, Causal Scrubbing); the drop is averaged over several draws.

A head's z is replaced before the output projection, so the projection's bias stays. The *drop* is
the metric without the ablation minus the metric with it.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from base_run import BaseRun, run_base
from circuit_nodes import WRITERS, Group, Node, parts_of, sender_groups
from edited_runs import Run, Work, abilities, run_edited
from forward_pass import InputError, Recording, Site, record
from growing_pass import Edit
from logit_metrics import Metric, make_metric, reads_of
from model_architecture import Architecture
from module_devices import exact
from node_effects import AblationEffects
from prompt_pairs import is_dataset
from sweep_result import summarize
from tokenization import Positions, check_ids, encode, resolve_positions, token_strings

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

METHODS = ("zero", "mean", "resample")


def ablate(
    model: PreTrainedModel | Architecture,
    tokenizer: PreTrainedTokenizerBase | None,
    prompts: Any,
    components: Any = "all",
    method: str = "mean",
    *,
    reference: Any = None,
    per_position: bool = False,
    samples: int = 10,
    metric: Any = "log_prob",
    answer: Any = None,
    foil: Any = None,
    positions: Positions = None,
    max_tokens: int | None = None,
    show_progress: bool = True,
    seed: int = 0,
) -> AblationEffects:
    """Ablate parts of a model, each entry by itself, and measure the drop.

    Args:
        model: A causal language model, never changed.
        tokenizer: For prompts and tokens given as text.
        prompts: Text, a chat or token ids; or a list of prompts, over which the drop is averaged.
        components: ``"all"`` (every head and MLP), ``"heads"``, ``"mlps"``, ``"attns"``,
            ``"blocks"``, a node (see `circuit_nodes`), or a list of nodes, one run each; a list
            within the list is ablated together.
        method: ``"zero"``, ``"mean"`` or ``"resample"``: see the head of this module.
        reference: Prompts to average over, or to draw from; None means ``prompts``, if there are
            several (a prompt never draws itself).
        per_position: Take a mean for every position (reference prompts must have the prompt's
            length), not one over all tokens of all reference prompts.
        samples: Draws per entry and prompt, for ``"resample"``.
        metric: See `logit_metrics`; but not ``"distance"``, which needs a second run.
        answer: The token measured, by text or id, or one for each prompt; None is each prompt's own
            best token.
        foil: The token it is compared with, for ``"logit_diff"``.
        positions: At which tokens; None means all.
        max_tokens: Tokens (runs × positions) per pass; None is what memory and processor like.
        show_progress: A progress bar, where there is a terminal to show it.
        seed: Of the draws, and of the bootstrap over prompts.

    Returns:
        `AblationEffects`, one number per entry. With several prompts the mean over them, with
        standard error and interval.

    Raises:
        InputError: an unknown method, part or metric, no reference prompts, or reference prompts of
            another length where positions must correspond (both token lists are shown).
        LayerError: there is no such layer.
        SiteError: the model lacks such a part.
        ArchitectureError: the model has no head.
    """
    architecture = model if isinstance(model, Architecture) else Architecture(model)
    architecture.require_head("ablation")
    _check_request(method, metric, foil, samples)
    groups = sender_groups(architecture, components, embed=False)
    texts = list(prompts) if is_dataset(prompts) else [prompts]
    rows = [_encoded(architecture, tokenizer, text) for text in texts]
    places = [None if positions is None else sorted(resolve_positions(positions, len(row)))
              for row in rows]  # fmt: skip
    parts = [parts_of(architecture, group) for group in groups]
    stand_ins = _StandIns(
        architecture, tokenizer, parts, method, per_position,
        samples if method == "resample" else 1, np.random.default_rng(seed),
    )  # fmt: skip
    stand_ins.prepare(rows, _references(architecture, tokenizer, reference, method, rows))
    study = _Study(architecture, tokenizer, parts, stand_ins, max_tokens)
    hidden = not show_progress or not sys.stderr.isatty()
    total = len(rows) * len(groups) * stand_ins.samples
    with tqdm(total=total, desc="ablate", unit="run", disable=hidden) as bar:
        for i, row in enumerate(rows):
            right, wrong = (_of_prompt(each, i, len(rows)) for each in (answer, foil))
            study.run(row, places[i], metric, right, wrong, bar)
    return study.result(groups, rows, seed)


def _check_request(method: str, metric: Any, foil: Any, samples: int) -> None:
    if method not in METHODS:
        raise InputError(f"method is one of {', '.join(METHODS)}; came {method!r}")
    reads_of(metric)
    if metric == "distance":
        raise InputError("metric='distance' compares two prompts; take 'kl' or 'log_prob'")
    if metric == "logit_diff" and foil is None:
        raise InputError("metric='logit_diff' needs a foil: pass foil=' Rome', or take 'log_prob'")
    if samples < 1:
        raise InputError(f"samples must be at least 1; came {samples}")


def _encoded(architecture: Architecture, tokenizer: Any, text: Any) -> list[int]:
    ids = encode(tokenizer, text)
    check_ids(ids, architecture.config)
    return ids


def _of_prompt(token: Any, index: int, count: int) -> Any:
    """A token for one prompt, out of one for all or a list of one for each."""
    if not isinstance(token, list | tuple):
        return token
    if len(token) != count:
        raise InputError(f"{len(token)} tokens for {count} prompts: give one, or one for each")
    return token[index]


def _references(
    architecture: Architecture, tokenizer: Any, reference: Any, method: str, rows: list[list[int]]
) -> list[list[int]]:
    """Token ids of the prompts that stand-ins come from; none for ``zero``."""
    if method == "zero":
        return []
    if reference is None:
        if len(rows) < 2:
            raise InputError(
                f"{method} ablation of a single prompt needs reference=: a list of prompts "
                "(a mean over the prompt itself would keep what it is about)"
            )
        return rows
    several = list(reference) if is_dataset(reference) else [reference]
    return [_encoded(architecture, tokenizer, each) for each in several]


# --- What is put in the place of an output --------------------------------------------------------


@dataclass(eq=False)
class _StandIns:
    """Makes the values that replace a part's output."""

    architecture: Architecture
    tokenizer: Any
    parts: Sequence[Group]
    method: str
    per_position: bool
    samples: int
    rng: np.random.Generator
    references: list[list[int]] = field(default_factory=list)
    means: dict[Site, Tensor] = field(default_factory=dict)
    """``[head, d_head]`` or ``[d_model]``; with a position axis first where ``per_position``."""

    @property
    def sites(self) -> list[Site]:
        """What must be recorded of a reference prompt."""
        nodes = (node for group in self.parts for node in group)
        return sorted({Site(WRITERS[node.kind], node.layer) for node in nodes})

    def prepare(self, rows: Sequence[Sequence[int]], references: list[list[int]]) -> None:
        """Take the means; check that positions correspond where they must."""
        self.references = references
        if self.method == "resample":
            for row in rows:
                self._candidates(row)
        if self.method != "mean":
            return
        if self.per_position:
            for row in rows:
                for other in references:
                    self._check_length(row, other)
        sums: dict[Site, Tensor] = {}
        for ids in references:
            for site, value in self._record(ids).items():
                value = exact(value[0])
                value = value if self.per_position else value.sum(0)
                sums[site] = sums[site] + value if site in sums else value
        count = len(references) if self.per_position else sum(map(len, references))
        self.means = {site: total / count for site, total in sums.items()}

    def _record(self, ids: Sequence[int]) -> Recording:
        inputs = self.architecture.inputs(torch.tensor([list(ids)], device="cpu"))
        return record(self.architecture, inputs, self.sites)

    def _check_length(self, row: Sequence[int], other: Sequence[int]) -> None:
        if len(row) != len(other):
            mine, theirs = (token_strings(self.tokenizer, each) for each in (row, other))
            raise InputError(
                f"prompt and reference have {len(row)} and {len(other)} tokens, so their positions "
                f"do not correspond: {mine} and {theirs}. Give reference prompts with as many "
                "tokens, or take method='mean' without per_position"
            )

    def _candidates(self, row: Sequence[int]) -> list[list[int]]:
        """The reference prompts that a prompt may draw."""
        others = [each for each in self.references if list(each) != list(row)]
        fitting = [each for each in others if len(each) == len(row)]
        if others and not fitting:
            self._check_length(row, others[0])
        if not fitting:
            raise InputError("every reference prompt is the prompt itself: give others")
        return fitting

    def draw(self, row: Sequence[int]) -> list[Recording | None]:
        """For each sample the recorded reference run of one prompt; None where there is none."""
        if self.method != "resample":
            return [None] * self.samples
        fitting = self._candidates(row)
        chosen = self.rng.integers(len(fitting), size=self.samples).tolist()
        known = {number: self._record(fitting[number]) for number in set(chosen)}
        return [known[number] for number in chosen]

    def edit(self, node: Node, positions: list[int] | None, drawn: Recording | None) -> Edit:
        """The exchange that ablates one part."""
        site = Site(WRITERS[node.kind], node.layer)
        head = node.head if node.kind == "head" else None
        where = None if positions is None else torch.tensor(positions, device="cpu")
        if self.method == "zero":
            return Edit(site, torch.zeros(1, device="cpu"), where, head)
        value = self.means[site] if drawn is None else drawn[site][0]
        by_position = drawn is not None or self.per_position
        if by_position and positions is not None:
            value = value[positions]
        if head is not None:
            value = value[:, head] if by_position else value[head]
        return Edit(site, value, where, head)


# --- The study ------------------------------------------------------------------------------------


@dataclass(eq=False)
class _Study:
    """Runs the ablations of one prompt after the other."""

    architecture: Architecture
    tokenizer: Any
    parts: Sequence[Group]
    stand_ins: _StandIns
    max_tokens: int | None
    drops: list[np.ndarray] = field(default_factory=list)
    bases: list[float] = field(default_factory=list)
    metrics: list[Metric] = field(default_factory=list)
    work: Work = field(default_factory=Work)

    def run(
        self, row: list[int], places: list[int] | None, asked: Any, answer: Any, foil: Any, bar: Any
    ) -> None:
        """Ablate every entry in one prompt."""
        arch, read = self.architecture, reads_of(asked)
        wanted = range(len(row)) if read is None else read
        able = abilities(arch)
        base = run_base(arch, torch.tensor([row], device="cpu"), (), wanted, cached=able.suffix)
        metric = make_metric(
            asked, base.logits, base.logits, answer=answer, foil=foil,
            tokenizer=self.tokenizer, config=arch.config,
        )  # fmt: skip
        runs = [
            Run(tuple(self.stand_ins.edit(node, places, drawn) for node in group))
            for drawn in self.stand_ins.draw(row)
            for group in self.parts
        ]
        values = self._measure(base, runs, metric, bar)
        unmodified = float(metric(base.logits))
        found = values.reshape(self.stand_ins.samples, len(self.parts)).mean(0)
        self.drops.append(unmodified - found)
        self.bases.append(unmodified)
        self.metrics.append(metric)

    def _measure(self, base: BaseRun, runs: list[Run], metric: Metric, bar: Any) -> np.ndarray:
        found = run_edited(
            self.architecture, base, runs, lambda _runs, logits: metric(logits),
            max_tokens=self.max_tokens, progress=bar.update, work=self.work,
        )  # fmt: skip
        return exact(found).numpy()

    def result(self, groups: Sequence[Group], rows: list[list[int]], seed: int) -> AblationEffects:
        """The drops, averaged over prompts."""
        zeros = np.zeros(len(rows))
        found = summarize(np.array(self.drops), zeros, zeros, False, seed)
        one, metric = len(rows) == 1, self.metrics[0]

        def text(token: int | None) -> str:
            return "" if token is None or not one else token_strings(self.tokenizer, [token])[0]

        return AblationEffects(
            values=found.mean,
            stderr=found.stderr,
            low=found.low,
            high=found.high,
            groups=tuple(groups),
            method=self.stand_ins.method,
            references=len(self.stand_ins.references),
            samples=self.stand_ins.samples,
            metric=metric.name,
            unit=metric.unit,
            base=float(np.mean(self.bases)),
            answer=text(metric.answer),
            foil=text(metric.foil),
            tokens=tuple(token_strings(self.tokenizer, rows[0])) if one else (),
            count=len(rows),
            passes=self.work.passes,
        )
