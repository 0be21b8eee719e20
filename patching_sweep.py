"""Activation patching over every layer, position, head or neuron of a model.

Two prompts, *clean* and *corrupted*, differ in one thing. In each cell of a sweep one activation of
the one run is put into the other, and a metric says how far that moves its answer:

- ``direction="denoising"``: clean into the corrupted run. What restores the answer is *sufficient*
  for it, given the rest of the corrupted run.
- ``direction="noising"``: corrupted into the clean run. What breaks the answer is *necessary* for
  it, given the rest of the clean run.

The numbers are those of one hooked forward pass per cell; `edited_runs` says how they are had for
less. A cell that exchanges an activation for the same one, or one that nothing reads any more, is
not run at all: its number is known.

References: Vig et al. (2020), Causal Mediation Analysis; Meng et al. (2022), ROME; Wang et al.
(2022), IOI; Heimersheim and Nanda (2024), How to Use and Interpret Activation Patching.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from base_run import BaseRun, run_base
from edited_runs import Run, Work, abilities, run_edited
from forward_pass import Site
from growing_pass import Edit
from logit_metrics import Metric, make_metric, reads_of, refuse_unused
from memory_limits import in_batches
from model_architecture import Architecture, Layer
from prompt_pairs import PromptPair, make_pairs, pair_positions
from sweep_cells import Cell, CellPlanner, SweepOptions, list_cells, make_options
from sweep_result import SweepResult, summarize
from tokenization import Positions, token_strings

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

BASE_TOKENS = 2**11
"""Tokens of base prompts that are run together."""


def patching_sweep(
    model: PreTrainedModel | Architecture,
    tokenizer: PreTrainedTokenizerBase | None,
    clean_prompt: Any,
    corrupted_prompt: Any,
    site: str = "resid_pre",
    *,
    axes: Sequence[str] | None = None,
    direction: str = "denoising",
    metric: Any = "logit_diff",
    answer: Any = None,
    foil: Any = None,
    layers: Sequence[Layer] | None = None,
    positions: Positions = None,
    heads: Sequence[int] | None = None,
    neurons: Sequence[int] | None = None,
    align: str | Mapping[int, int] | None = None,
    normalize: bool = False,
    max_tokens: int | None = None,
    show_progress: bool = True,
    seed: int = 0,
) -> SweepResult:
    """Patch one activation at a time, everywhere, and measure each run.

    Args:
        model: A causal language model, never changed.
        tokenizer: For prompts and tokens given as text.
        clean_prompt: Text, a chat or token ids; or a list of prompts, one per pair.
        corrupted_prompt: The same for the corrupted run; as many tokens, unless ``align`` is given.
        site: What is exchanged: a name out of `sweep_cells.DEFAULT_AXES`.
        axes: What a cell is: ``"layer"`` and any of ``"position"``, ``"head"`` (sites with heads),
            ``"neuron"`` (an entry of the last axis; other sites). None is what `DEFAULT_AXES` says
            of the site. Without ``"position"`` a cell exchanges all ``positions`` at once.
        direction: ``"denoising"`` or ``"noising"``: see the head of this module.
        metric: See `logit_metrics`.
        answer: The token measured, by text or id (one for each pair where there are several); None
            is the clean run's best.
        foil: The token it is compared with; None is the corrupted run's best.
        layers: Blocks in any spelling; None means all that have the site.
        positions: Tokens of the edited prompt; None means all.
        heads: Which heads, where they are an axis; for ``key`` and ``value`` key/value heads. None
            means all.
        neurons: Which entries, where they are an axis; None means all.
        align: How prompts of different length correspond: ``"end"`` (last token to last token), or
            a mapping from positions of the edited prompt to those of the other.
        normalize: Scale so that 0 is the corrupted run and 1 the clean one.
        max_tokens: Tokens per pass; None is what memory and processor like.
        show_progress: A progress bar, where there is a terminal to show it.
        seed: Of the bootstrap over pairs.

    Returns:
        A `SweepResult`; with several pairs the mean over them, with standard error and interval.

    Raises:
        InputError: prompts that do not correspond (both token lists are shown), an unknown metric,
            axis or direction, a position that does not exist, or an argument that the site, its
            axes or the metric do not use.
        LayerError: there is no such layer.
        SiteError: no layer has the site, or one that was named has not.
    """
    architecture = model if isinstance(model, Architecture) else Architecture(model)
    architecture.require_head("patching")
    refuse_unused(metric, answer, foil)
    pairs = make_pairs(
        architecture, tokenizer, clean_prompt, corrupted_prompt, direction, align, answer, foil
    )
    options = make_options(
        architecture, site, axes, direction, metric, layers, heads, neurons, normalize
    )
    places = pair_positions(pairs, positions, "position" in options.axes)
    cells = list_cells(options, places)
    sweep = _Sweep(architecture, tokenizer, options, places, cells, max_tokens)
    hidden = not show_progress or not sys.stderr.isatty()
    with tqdm(total=len(pairs) * len(cells), desc="patch", unit="cell", disable=hidden) as bar:
        sweep.run(pairs, bar)
    return sweep.result(pairs, seed)


class _Sweep:
    """Fills the table ``[pair, cell]``."""

    def __init__(
        self,
        architecture: Architecture,
        tokenizer: PreTrainedTokenizerBase | None,
        options: SweepOptions,
        places: Sequence[tuple[int, ...]],
        cells: Sequence[Cell],
        max_tokens: int | None,
    ) -> None:
        self.architecture, self.tokenizer, self.options = architecture, tokenizer, options
        self.places, self.cells, self.max_tokens = places, cells, max_tokens
        self.work = Work()
        self.values = np.zeros((len(places), len(cells)))
        self.clean = np.zeros(len(places))
        self.corrupted = np.zeros(len(places))
        self.metrics: list[Metric | None] = [None] * len(places)

    def run(self, pairs: Sequence[PromptPair], bar: Any) -> None:
        """Run all pairs, those of one shape together."""
        groups: dict[Any, list[int]] = {}
        for number, pair in enumerate(pairs):
            groups.setdefault(pair.shape, []).append(number)
        batches = [
            numbers[start : start + size]
            for numbers in groups.values()
            for size in [max(1, BASE_TOKENS // len(pairs[numbers[0]].base))]
            for start in range(0, len(numbers), size)
        ]

        def bases(numbers: Sequence[int]) -> tuple[BaseRun, BaseRun]:
            return self._bases([pairs[number] for number in numbers])

        def tokens(numbers: Sequence[int]) -> int:
            return sum(len(pairs[number].base) for number in numbers)

        for numbers, found in in_batches(batches, bases, unit="pairs of prompts", cost=tokens):
            self._run_group(pairs, numbers, *found, bar)

    def _bases(self, group: Sequence[PromptPair]) -> tuple[BaseRun, BaseRun]:
        """The two unmodified runs of some pairs."""
        read = reads_of(self.options.metric)
        sites = [Site(self.options.site, layer) for layer in self.options.layers]
        able = abilities(self.architecture)
        base = self._run_prompts([pair.base for pair in group], sites, read, able.suffix)
        return base, self._run_prompts([pair.source for pair in group], sites, read, False)

    def _run_group(
        self,
        pairs: Sequence[PromptPair],
        numbers: Sequence[int],
        base: BaseRun,
        source: BaseRun,
        bar: Any,
    ) -> None:
        group, able = [pairs[number] for number in numbers], abilities(self.architecture)
        self._make_metrics(group, numbers, base, source)
        runs: list[Run] = []
        where: list[tuple[int, int]] = []
        for row, number in enumerate(numbers):
            planner = CellPlanner(
                self.options, group[row], self.places[number], base, source, row, able.local_end
            )
            for index, cell in enumerate(self.cells):
                edit = planner.edit(cell)
                if isinstance(edit, Edit):
                    runs.append(Run((edit,), row))
                    where.append((row, index))
                else:
                    self.values[number, index] = self._known(number, edit)
        bar.update(len(numbers) * len(self.cells) - len(runs))
        if runs:
            self._measure(runs, where, numbers, base, bar)

    def _run_prompts(
        self, prompts: list[list[int]], sites: list[Site], read: Any, cached: bool
    ) -> BaseRun:
        ids = torch.tensor(prompts, device="cpu")
        wanted = range(ids.shape[1]) if read is None else read
        return run_base(self.architecture, ids, sites, wanted, cached=cached)

    def _make_metrics(
        self, group: Sequence[PromptPair], numbers: Sequence[int], base: BaseRun, source: BaseRun
    ) -> None:
        denoising = self.options.direction == "denoising"
        for row, number in enumerate(numbers):
            edited, other = base.logits[row : row + 1], source.logits[row : row + 1]
            clean, corrupted = (other, edited) if denoising else (edited, other)
            pair = group[row]
            metric = make_metric(
                self.options.metric, clean, corrupted, base=edited, answer=pair.answer,
                foil=pair.foil, tokenizer=self.tokenizer, config=self.architecture.config,
            )  # fmt: skip
            self.metrics[number] = metric
            self.clean[number] = float(metric(clean))
            self.corrupted[number] = float(metric(corrupted))

    def _known(self, number: int, run: str) -> float:
        """The number of a cell that is one of the two runs."""
        denoising = self.options.direction == "denoising"
        is_clean = (run == "source") == denoising
        return float((self.clean if is_clean else self.corrupted)[number])

    def _measure(
        self,
        runs: list[Run],
        where: list[tuple[int, int]],
        numbers: Sequence[int],
        base: BaseRun,
        bar: Any,
    ) -> None:
        rows = torch.tensor([row for row, _ in where], device="cpu")

        def reduce(chosen: Tensor, logits: Tensor) -> Tensor:
            values = torch.zeros(len(chosen), dtype=torch.float64, device="cpu")
            for row in rows[chosen].unique().tolist():
                mine = rows[chosen] == row
                metric: Any = self.metrics[numbers[row]]
                values[mine] = metric(logits[mine.to(logits.device)]).cpu().double()
            return values

        found = run_edited(
            self.architecture, base, runs, reduce,
            max_tokens=self.max_tokens, progress=bar.update, work=self.work,
        )  # fmt: skip
        for (row, index), value in zip(where, found.tolist(), strict=True):
            self.values[numbers[row], index] = value

    def result(self, pairs: Sequence[PromptPair], seed: int) -> SweepResult:
        """The table as a result with axes."""
        options = self.options
        found = summarize(self.values, self.clean, self.corrupted, options.normalize, seed)
        choices = {
            "layer": options.layers,
            "position": self.places[0],
            "head": options.heads,
            "neuron": options.neurons,
        }
        labels = tuple(choices[axis] for axis in options.axes)
        shape = tuple(len(each) for each in labels)
        tables = {
            name: None if table is None else table.reshape(shape)
            for name, table in (("stderr", found.stderr), ("low", found.low), ("high", found.high))
        }
        metric: Any = self.metrics[0]
        one = len(pairs) == 1
        return SweepResult(
            values=found.mean.reshape(shape),
            axes=options.axes,
            labels=labels,
            tokens=tuple(token_strings(self.tokenizer, pairs[0].base)) if one else (),
            source_tokens=tuple(token_strings(self.tokenizer, pairs[0].source)) if one else (),
            site=options.site,
            direction=options.direction,
            metric=metric.name,
            unit=metric.unit,
            normalized=options.normalize,
            clean=float(self.clean.mean()),
            corrupted=float(self.corrupted.mean()),
            answer=self._text(metric.answer) if one else "",
            foil=self._text(metric.foil) if one else "",
            count=len(pairs),
            passes=self.work.passes,
            **tables,
        )

    def _text(self, token: int | None) -> str:
        return "" if token is None else token_strings(self.tokenizer, [token])[0]
