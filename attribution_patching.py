"""Attribution patching: every cell of a patching sweep, to first order, from one backward pass.

A patching sweep exchanges one activation at a time and runs the model each time. To first order the
metric of such a run is (Nanda 2023, "Attribution Patching")

    metric(base) + Σ (activation of the other run − activation) · gradient of the metric

so that two forward passes and one backward pass give every cell of every site. Directions, sites,
axes and metrics are those of `patching_sweep`, whose numbers can be put beside the estimates
(``exact=True``).

Two known ways in which the estimate is far too small have remedies (AtP*, Kramár et al. 2024):

1. *Saturated attention.* ``attention_correction=True`` sends queries and keys through the softmax
   and is linear only from the pattern on (section 3.1.1; `attention_correction`).
2. *Paths that cancel.* ``grad_drop=True`` makes a backward pass per block in which the block's
   Jacobian is the identity, and averages the sizes of the estimates (section 3.1.2). A node inside
   a block gets nothing when its own block is dropped, so the mean is over the others.

A large change is beyond a first order: what the norms do to it is not seen. Trust the order of
cells more than their numbers, and check the leading ones with `patching_sweep`.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from attribution_estimates import CORRECTED, CellEstimates
from attribution_sweep import AttributionSweep
from forward_pass import ArchitectureError, InputError, Site, SiteError
from gradient_attribution import NOT_FINITE
from gradient_check import check_gradient
from gradient_record import Tape, differentiable, run_plain, run_with_graph
from logit_metrics import Metric, make_metric, reads_of
from memory_limits import in_batches
from model_architecture import Architecture, Layer
from patching_sweep import patching_sweep
from prompt_pairs import PromptPair, make_pairs, pair_positions
from sweep_cells import DEFAULT_AXES, HEAD_SITES, SweepOptions, make_options
from sweep_result import summarize
from tokenization import Positions, resolve_positions, token_strings

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

BASE_TOKENS = 2**11
"""Tokens of prompts that are run together, with their graph."""

STREAMS = ("resid_pre", "resid_post")
"""Sites that no block holds: a dropped block lets their gradient pass."""


def attribution_patching(
    model: PreTrainedModel | Architecture,
    tokenizer: PreTrainedTokenizerBase | None,
    clean_prompt: Any,
    corrupted_prompt: Any,
    site: str = "resid_pre",
    **options: Any,
) -> AttributionSweep:
    """Estimate every cell of a patching sweep from two forward passes and one backward pass.

    Args:
        model: A causal language model, never changed.
        tokenizer: For prompts and tokens given as text.
        clean_prompt: Text, a chat or token ids; or a list of prompts, one per pair.
        corrupted_prompt: The same for the corrupted run.
        site: What is exchanged: a name out of `sweep_cells.DEFAULT_AXES`.
        **options: Those of `attribution_sweeps`.

    Returns:
        An `AttributionSweep`.

    Raises:
        InputError: see `attribution_sweeps`.
        LayerError: there is no such layer.
        SiteError: no layer has the site, or one that was named has not.
        ArchitectureError: see `attribution_sweeps`.
    """
    found = attribution_sweeps(model, tokenizer, clean_prompt, corrupted_prompt, (site,), **options)
    return found[site]


def attribution_sweeps(
    model: PreTrainedModel | Architecture,
    tokenizer: PreTrainedTokenizerBase | None,
    clean_prompt: Any,
    corrupted_prompt: Any,
    sites: Sequence[str] = ("head_out", "mlp_out"),
    *,
    axes: Sequence[str] | Mapping[str, Sequence[str]] | None = None,
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
    attention_correction: bool = False,
    grad_drop: bool = False,
    exact: bool = False,
    show_progress: bool = True,
    seed: int = 0,
    check_gradients: bool = True,
) -> dict[str, AttributionSweep]:
    """Estimate the patching sweeps of several sites from the same passes.

    Args:
        model: A causal language model, never changed.
        tokenizer: For prompts and tokens given as text.
        clean_prompt: Text, a chat or token ids; or a list of prompts, one per pair.
        corrupted_prompt: The same for the corrupted run; as many tokens, unless ``align`` is given.
        sites: What is exchanged: names out of `sweep_cells.DEFAULT_AXES`.
        axes: See `patching_sweep`; a mapping gives each site its own.
        direction: ``"denoising"`` (clean into corrupted) or ``"noising"`` (the reverse).
        metric: See `logit_metrics`; one that has a gradient at the run that is patched.
        answer: The token measured; None is the clean run's best.
        foil: The token it is compared with; None is the corrupted run's best.
        layers: Blocks in any spelling; None means all that have the site.
        positions: Tokens of the patched prompt; None means all.
        heads: Which heads; for ``key`` and ``value`` key/value heads. None means all.
        neurons: Which entries; None means all.
        align: See `patching_sweep`.
        normalize: Scale so that 0 is the corrupted run and 1 the clean one.
        attention_correction: Send queries and keys through the softmax (AtP*, section 3.1.1).
        grad_drop: Also estimate with one block's gradient dropped at a time (AtP*, section 3.1.2):
            one more backward pass per block.
        exact: Run the patching sweeps too, and put their numbers beside the estimates.
        show_progress: A progress bar, where there is a terminal to show it.
        seed: Of the bootstrap over pairs.
        check_gradients: Refuse a model whose gradient is not the slope of its output (once per
            model; `gradient_check`).

    Returns:
        An `AttributionSweep` for each site, in the order given.

    Raises:
        InputError: prompts that do not correspond, an unknown option, or a metric that has no
            gradient where it is needed.
        LayerError: there is no such layer.
        SiteError: no layer has a site, or one that was named has not.
        ArchitectureError: the model has no head or no gradient, its blocks cannot be dropped, or
            its attention cannot be corrected.
    """
    architecture = model if isinstance(model, Architecture) else Architecture(model)
    architecture.require_head("attribution patching")
    _check_metric(metric, direction)
    names = _site_names(sites, attention_correction)
    pairs = make_pairs(
        architecture, tokenizer, clean_prompt, corrupted_prompt, direction, align, answer, foil
    )
    asked = [
        make_options(
            architecture, name, axes[name] if isinstance(axes, Mapping) and name in axes
            else None if isinstance(axes, Mapping) else axes,
            direction, metric, layers, *_entries_of(name, names, heads, neurons), normalize,
        )
        for name in names
    ]  # fmt: skip
    if isinstance(axes, Mapping) and (other := [name for name in axes if name not in names]):
        raise InputError(f"axes names {other[0]!r}, which is none of the sites {', '.join(names)}")
    by_position = any("position" in options.axes for options in asked)
    places = pair_positions(pairs, positions, by_position)
    _check_patterns(asked, pairs)
    if grad_drop:
        _check_drop(architecture)
    if check_gradients:
        check_gradient(architecture, "patching_sweep runs every cell instead")
    run = _Attribution(architecture, tokenizer, asked, places, attention_correction, grad_drop)
    run.run(pairs, show_progress)
    found = {options.site: run.result(options, pairs, seed) for options in asked}
    if not all(np.isfinite(each.values).all() for each in found.values()):
        warnings.warn(NOT_FINITE, UserWarning, stacklevel=2)
    if not exact:
        return found
    return {
        options.site: found[options.site].compare(
            patching_sweep(
                architecture, tokenizer, clean_prompt, corrupted_prompt, options.site,
                axes=options.axes, direction=direction, metric=metric, answer=answer, foil=foil,
                layers=list(options.layers), positions=positions, heads=options.heads or None,
                neurons=options.neurons or None,
                align=align, normalize=normalize, show_progress=show_progress, seed=seed,
            )
        )
        for options in asked
    }  # fmt: skip


# --- What can be asked ----------------------------------------------------------------------------


def _entries_of(name: str, names: Sequence[str], heads: Any, neurons: Any) -> tuple[Any, Any]:
    """What of heads and neurons is meant for one of several sites: each for those that have it."""
    kinds = [other in HEAD_SITES for other in names]
    own = name in HEAD_SITES
    return heads if own or not any(kinds) else None, neurons if not own or all(kinds) else None


def _check_metric(metric: Any, direction: str) -> None:
    reads_of(metric)
    if metric in ("rank", "distance"):
        raise InputError(
            f"the metric {metric!r} has no gradient at the run that is patched; use 'logit_diff', "
            "'logit', 'log_prob' or 'prob' (or patching_sweep, which runs every cell)"
        )
    if metric == "kl" and direction == "noising":
        raise InputError(
            "the KL divergence from the clean run is at its least where the clean run is patched, "
            "so that its first order is 0: use direction='denoising', or another metric"
        )


def _site_names(sites: Sequence[str], corrected: bool) -> list[str]:
    names = [sites] if isinstance(sites, str) else list(dict.fromkeys(sites))
    if not names:
        raise InputError(f"sites is empty; they are some of {', '.join(DEFAULT_AXES)}")
    for name in names:
        if name not in DEFAULT_AXES:
            raise SiteError(f"a sweep exchanges one of {', '.join(DEFAULT_AXES)}; came {name!r}")
    if corrected and not set(names) & set(CORRECTED):
        raise InputError(
            f"attention_correction is for the sites 'query' and 'key'; came {names}: leave it out"
        )
    return names


def _check_patterns(asked: Sequence[SweepOptions], pairs: Sequence[PromptPair]) -> None:
    """A pattern's keys are positions too, so that it means the same only where it stood."""
    if not any(options.site == "attn_pattern" for options in asked):
        return
    for pair in pairs:
        if len(pair.base) != len(pair.source) or any(a != b for a, b in pair.mapping.items()):
            raise InputError(
                "patterns can be exchanged between prompts of one length, position by position: "
                "leave align out"
            )


def _check_drop(architecture: Architecture) -> None:
    if architecture.n_layers < 2:
        raise InputError("grad_drop drops one block of several; this model has one")
    if architecture.stream.streams > 1 or architecture.reads_earlier_streams:
        raise ArchitectureError(
            f"grad_drop lets the residual stream pass a block by, and the blocks of "
            f"{type(architecture.model).__name__} have more than one stream between them"
        )


# --- The passes -----------------------------------------------------------------------------------


class _Attribution:
    """Runs the pairs, those of one shape together, and fills a table per site, ``[pair, …]``."""

    def __init__(
        self,
        architecture: Architecture,
        tokenizer: PreTrainedTokenizerBase | None,
        asked: Sequence[SweepOptions],
        places: Sequence[tuple[int, ...]],
        corrected: bool,
        grad_drop: bool,
    ) -> None:
        self.architecture, self.tokenizer, self.asked = architecture, tokenizer, asked
        self.places, self.corrected, self.grad_drop = places, corrected, grad_drop
        self.passes = self.backward_passes = 0
        self.clean, self.corrupted = np.zeros(len(places)), np.zeros(len(places))
        self.metrics: list[Metric | None] = [None] * len(places)
        self.flat: set[int] = set()
        """Pairs whose metric has a gradient of 0."""
        shapes = {options.site: self._shape(options) for options in asked}
        self.effects = {s: np.zeros((len(places), *shape)) for s, shape in shapes.items()}
        self.dropped = {s: np.zeros((len(places), *shape)) for s, shape in shapes.items()}

    def _labels(self, options: SweepOptions) -> tuple[tuple[int, ...], ...]:
        choices = {
            "layer": options.layers,
            "position": self.places[0],
            "head": options.heads,
            "neuron": options.neurons,
        }
        return tuple(choices[axis] for axis in options.axes)

    def _shape(self, options: SweepOptions) -> tuple[int, ...]:
        return tuple(len(labels) for labels in self._labels(options))

    def sites(self) -> list[Site]:
        """Every site whose value or gradient is needed."""
        found: dict[Site, None] = {}
        for options in self.asked:
            names = [options.site]
            if self.corrected and options.site in CORRECTED:
                names = ["query", "key", "attn_pattern"]
            found |= dict.fromkeys(Site(n, layer) for layer in options.layers for n in names)
        return list(found)

    def run(self, pairs: Sequence[PromptPair], show_progress: bool) -> None:
        """Fill the tables."""
        groups: dict[Any, list[int]] = {}
        for number, pair in enumerate(pairs):
            groups.setdefault(pair.shape, []).append(number)
        batches = []
        for numbers in groups.values():
            size = max(1, BASE_TOKENS // len(pairs[numbers[0]].base))
            batches += [numbers[i : i + size] for i in range(0, len(numbers), size)]
        hidden = not show_progress or not sys.stderr.isatty()
        drops = self.architecture.n_layers if self.grad_drop else 0
        total = len(pairs) * (1 + drops)
        with tqdm(total=total, desc="attribute", unit="pass", disable=hidden) as bar:
            done = in_batches(
                batches, lambda numbers: self._run_batch(pairs, numbers, bar),
                unit="pairs of prompts", cost=lambda n: len(n) * len(pairs[n[0]].base),
            )  # fmt: skip
            for _ in done:
                pass
        self._tell_of_flat_metrics(len(pairs))

    @torch.inference_mode(False)
    def _run_batch(self, pairs: Sequence[PromptPair], numbers: Sequence[int], bar: Any) -> None:
        group, sites = [pairs[number] for number in numbers], self.sites()
        base_ids, source_ids = (
            torch.tensor([getattr(pair, name) for pair in group], device="cpu")
            for name in ("base", "source")
        )
        asked = reads_of(self.asked[0].metric)
        reads = [
            range(ids.shape[1])
            if asked is None
            else sorted({resolve_positions(p, ids.shape[1])[0] for p in asked})
            for ids in (base_ids, source_ids)
        ]
        source = run_plain(self.architecture, source_ids, sites, reads[1])
        tape = run_with_graph(
            self.architecture, base_ids, sites, reads[0], droppable=self.grad_drop
        )
        self.passes += 2
        assert source.logits is not None
        self._make_metrics(group, numbers, tape.logits.detach(), source.logits)
        metrics: Any = [self.metrics[number] for number in numbers]
        values = differentiable(metrics, tape.logits, metrics[0].name)
        self._note_flat(values, tape, numbers)
        mapping = group[0].mapping
        where = self.places[numbers[0]]
        base = {site: value.detach() for site, value in tape.values.items()}
        cells = CellEstimates(
            self.architecture, self.asked, base, source, where, [mapping[p] for p in where],
            self.corrected,
        )  # fmt: skip
        drops = list(range(self.architecture.n_layers)) if self.grad_drop else []
        slopes = tape.gradients(values.sum(), keep=bool(drops))
        for name, found in cells.effects(slopes).items():
            self.effects[name][numbers] = found
        bar.update(len(numbers))
        for name in self.dropped:
            self.dropped[name][numbers] = 0
        for layer in drops:
            last = layer == drops[-1]
            slopes = tape.gradients(values.sum(), drop=layer, keep=not last)
            for name, found in cells.effects(slopes).items():
                among = len(drops) - (name not in STREAMS)
                self.dropped[name][numbers] += np.abs(found) / among
            bar.update(len(numbers))
        self.backward_passes += 1 + len(drops)

    def _make_metrics(
        self, group: Sequence[PromptPair], numbers: Sequence[int], base: Tensor, source: Tensor
    ) -> None:
        denoising = self.asked[0].direction == "denoising"
        for row, number in enumerate(numbers):
            edited, other = base[row : row + 1], source[row : row + 1]
            clean, corrupted = (other, edited) if denoising else (edited, other)
            metric = make_metric(
                self.asked[0].metric, clean, corrupted, base=edited, answer=group[row].answer,
                foil=group[row].foil, tokenizer=self.tokenizer, config=self.architecture.config,
            )  # fmt: skip
            self.metrics[number] = metric
            self.clean[number] = float(metric(clean))
            self.corrupted[number] = float(metric(corrupted))

    def _note_flat(self, values: Tensor, tape: Tape, numbers: Sequence[int]) -> None:
        """Remember the pairs whose metric does not move with the logits at all."""
        (slope,) = torch.autograd.grad(values.sum(), tape.logits, retain_graph=True)
        still = (slope == 0).flatten(1).all(1)
        self.flat |= {number for number, flat in zip(numbers, still.tolist(), strict=True) if flat}

    def _tell_of_flat_metrics(self, count: int) -> None:
        if not self.flat:
            return
        metric: Any = self.metrics[min(self.flat)]
        message = (
            f"the metric {metric.name!r} has a gradient of exactly 0 at the run that is patched "
            "(it is saturated, or at its least): there is no first order; use 'logit_diff' or "
            "'log_prob'"
        )
        if len(self.flat) == count:
            raise InputError(message)
        warnings.warn(
            f"in {len(self.flat)} of {count} pairs of prompts {message}", UserWarning, stacklevel=4
        )

    def result(
        self, options: SweepOptions, pairs: Sequence[PromptPair], seed: int
    ) -> AttributionSweep:
        """The table of one site as a result with axes."""
        name = options.site
        base = self.corrupted if options.direction == "denoising" else self.clean
        count, shape = len(pairs), self._shape(options)
        values = base[:, None] + self.effects[name].reshape(count, -1)
        found = summarize(values, self.clean, self.corrupted, options.normalize, seed)
        tables: dict[str, Any] = {
            key: None if table is None else table.reshape(shape)
            for key, table in (
                ("values", found.mean), ("stderr", found.stderr), ("low", found.low),
                ("high", found.high),
            )
        }  # fmt: skip
        if self.grad_drop:
            apart = abs(self.clean.mean() - self.corrupted.mean()) if options.normalize else 1.0
            tables["dropped"] = self.dropped[name].mean(0) / apart
        metric: Any = self.metrics[0]
        one = count == 1
        return AttributionSweep(
            axes=options.axes,
            labels=self._labels(options),
            tokens=tuple(token_strings(self.tokenizer, pairs[0].base)) if one else (),
            source_tokens=tuple(token_strings(self.tokenizer, pairs[0].source)) if one else (),
            site=name,
            direction=options.direction,
            metric=metric.name,
            unit=metric.unit,
            normalized=options.normalize,
            clean=float(self.clean.mean()),
            corrupted=float(self.corrupted.mean()),
            answer=self._text(metric.answer) if one else "",
            foil=self._text(metric.foil) if one else "",
            count=count,
            passes=self.passes,
            attention_correction=self.corrected and name in CORRECTED,
            backward_passes=self.backward_passes,
            **tables,
        )

    def _text(self, token: int | None) -> str:
        return "" if token is None else token_strings(self.tokenizer, [token])[0]
