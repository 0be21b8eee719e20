"""Causal tracing: which heads, MLPs and positions carry what decides the answer.

- `CausalTracer.trace_attention_heads`, `CausalTracer.trace_mlp_layers`: the output of each head, or
  of each MLP, in a corrupted run goes into the clean run.
- `trace_subject`: the tracing of Meng et al. (2022), Locating and Editing Factual Associations in
  GPT, section 2.1 and appendix B.1:

  1. *Clean run*: keep every activation.
  2. *Corrupted run*: Gaussian noise is added to the token embeddings of the subject, with 3 times
     the standard deviation of the embeddings; several samples of it.
  3. *Corrupted with restoration*: in the noised run one site at one position gets its clean
     activation back: the stream behind one block, or what the MLPs (or attention) of a window of 10
     blocks add. The indirect effect is the answer's probability then, minus that of the noised run.

The noise goes onto what the embedding module gives, before positions, multiplier and norm: these
are the model's own, as in the paper's code. Its standard deviation is taken of what that module
gives for the whole vocabulary (the paper: for the tokens of its subjects), so that a module that
scales its weights (Gemma 3) is noised in proportion.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from base_run import BaseRun, run_base
from edited_runs import Run, Work, abilities, run_edited
from forward_pass import InputError, ModuleTap, Site, SiteError, attached
from growing_pass import Edit
from interrupts import no_grad
from logit_metrics import Metric, make_metric, reads_of
from model_architecture import Architecture
from module_devices import exact
from patching_sweep import patching_sweep
from sweep_result import SweepResult
from tokenization import Positions, Prompt, check_ids, encode, resolve_positions, token_strings
from trace_result import CausalTrace

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

WINDOWS = {"resid_post": 1, "mlp_out": 10, "attn_out": 10}
"""The three panels of Meng et al. (2022), figure 1: a site, and how many layers are restored."""

VOCABULARY_PIECE = 2**13
"""Tokens whose embeddings are looked up at a time."""


class CausalTracer:
    """Causal tracing on one model, which is never changed.

    Args:
        model: A causal language model.
        tokenizer: For prompts given as text.

    Raises:
        ArchitectureError: the model has no head.
    """

    def __init__(
        self,
        model: PreTrainedModel | Architecture,
        tokenizer: PreTrainedTokenizerBase | None = None,
    ) -> None:
        self.architecture = model if isinstance(model, Architecture) else Architecture(model)
        self.architecture.require_head("causal tracing")
        self.tokenizer = tokenizer

    def __repr__(self) -> str:
        return f"CausalTracer({type(self.architecture.model).__name__})"

    def trace_attention_heads(
        self, clean: Prompt, corrupted: Prompt, metric_fn: Any = None
    ) -> Tensor:
        """The effect of each head's output in the corrupted run, put into the clean run.

        A head's output z is exchanged at every position when both prompts have the same number of
        tokens, else at the last.

        Args:
            clean: The prompt that is run.
            corrupted: The prompt that outputs are taken from.
            metric_fn: A function of the patched run's logits ``[1, position, vocab]`` that returns
                a number, or a name out of `logit_metrics.NAMED`. None is ‖clean − patched‖ /
                ‖clean − corrupted‖ of the last position's logits: 0 no effect, 1 all of it.

        Returns:
            ``[layer, head]``; NaN in blocks without heads.

        Raises:
            SiteError: no block has heads.
            InputError: a prompt cannot be run, or the metric is none.
        """
        result = self._sweep(clean, corrupted, "head_out", ("layer", "head"), metric_fn)
        effects = torch.full(
            (self.architecture.n_layers, len(result.labels[1])), torch.nan, device="cpu"
        )
        effects = effects.to(torch.promote_types(self.architecture.model.dtype, torch.float32))
        effects[list(result.labels[0])] = torch.from_numpy(result.values).to(effects)
        return effects

    def trace_mlp_layers(
        self, clean: Prompt, corrupted: Prompt, metric_fn: Any = None
    ) -> dict[int, float]:
        """The effect of each MLP's output in the corrupted run, put into the clean run.

        Args:
            clean: The prompt that is run.
            corrupted: The prompt that outputs are taken from.
            metric_fn: See `trace_attention_heads`.

        Returns:
            ``{layer: effect}``, of the blocks that have an MLP.

        Raises:
            SiteError: no block has an MLP.
            InputError: a prompt cannot be run, or the metric is none.
        """
        return self._sweep(clean, corrupted, "mlp_out", ("layer",), metric_fn).layer_effects()

    def _sweep(
        self, clean: Prompt, corrupted: Prompt, site: str, axes: tuple[str, ...], metric_fn: Any
    ) -> SweepResult:
        ids = [encode(self.tokenizer, prompt) for prompt in (clean, corrupted)]
        alike = len(ids[0]) == len(ids[1])
        where: dict[str, Any] = {} if alike else {"positions": "last", "align": "end"}
        metric = "distance" if metric_fn is None else metric_fn
        return patching_sweep(
            self.architecture, self.tokenizer, ids[0], ids[1], site, axes=axes,
            direction="noising", metric=metric, show_progress=False, **where,
        )  # fmt: skip

    def trace_subject(
        self, prompt: Prompt, subject: str | Positions, **options: Any
    ) -> CausalTrace:
        """Noise the subject, restore one site at one position. See `trace_subject`."""
        return trace_subject(self.architecture, self.tokenizer, prompt, subject, **options)


# --- Meng et al. ----------------------------------------------------------------------------------


def trace_subject(
    model: PreTrainedModel | Architecture,
    tokenizer: PreTrainedTokenizerBase | None,
    prompt: Prompt,
    subject: str | Positions,
    *,
    answer: str | int | None = None,
    foil: str | int | None = None,
    metric: Any = "prob",
    noise: float = 3.0,
    samples: int = 10,
    windows: Mapping[str, int] | None = None,
    positions: Positions = None,
    max_tokens: int | None = None,
    show_progress: bool = True,
    seed: int = 0,
) -> CausalTrace:
    """Noise the subject of a prompt, and restore one site at one position of every layer.

    Args:
        model: A causal language model, never changed.
        tokenizer: For a prompt, a subject and tokens given as text.
        prompt: Text, a chat or token ids.
        subject: What is noised: a part of the prompt's text that occurs in it once, or positions.
        answer: The token whose probability is measured; None is the clean run's best.
        foil: What it is compared with, for ``"logit_diff"``.
        metric: See `logit_metrics`; but not ``"distance"``.
        noise: Standard deviation of the noise, in standard deviations of the token embeddings.
        samples: How many samples of noise the effect is averaged over.
        windows: Site → how many layers are restored together; None is `WINDOWS`, as far as the
            model has these sites. A window reaches from ``layer - window // 2`` over so many layers
            and is cut off at both ends of the model.
        positions: Which tokens are restored; None means all.
        max_tokens: Tokens (runs × positions) per pass; None is what memory and processor like.
        show_progress: A progress bar, where there is a terminal to show it.
        seed: Of the noise.

    Returns:
        A `CausalTrace`, ``[site, layer, position]``; 0 before the subject, where the noised run is
        the clean one.

    Raises:
        InputError: the subject does not occur, or more than once; an unknown metric or window.
        SiteError: no block has a site that was named.
        ArchitectureError: the model has no head.
    """
    architecture = model if isinstance(model, Architecture) else Architecture(model)
    architecture.require_head("causal tracing")
    _check_request(metric, foil, noise, samples)
    ids = encode(tokenizer, prompt)
    check_ids(ids, architecture.config)
    noised = subject_positions(tokenizer, prompt, ids, subject)
    shown = sorted(resolve_positions(positions, len(ids)))
    panels = _panels(architecture, windows)
    asked = reads_of(metric)
    read = range(len(ids)) if asked is None else asked
    sites = sorted({site for panel in panels.values() for sites in panel for site in sites})
    clean = run_base(architecture, torch.tensor([ids], device="cpu"), sites, read, cached=False)
    std = noise * embedding_std(architecture)
    base = noised_run(architecture, ids, noised, std, samples, read, seed)
    chosen = make_metric(
        metric, clean.logits, base.logits[:1], answer=answer, foil=foil,
        tokenizer=tokenizer, config=architecture.config,
    )  # fmt: skip
    trace = _Trace(architecture, clean, base, panels, shown, noised, chosen)
    hidden = not show_progress or not sys.stderr.isatty()
    with tqdm(desc="trace", unit="run", disable=hidden) as bar:
        values = trace.run(max_tokens, bar)
    sizes = WINDOWS if windows is None else windows
    return trace.result(values, sizes, std, token_strings(tokenizer, ids), tokenizer)


def _check_request(metric: Any, foil: Any, noise: float, samples: int) -> None:
    reads_of(metric)
    if metric == "distance":
        raise InputError("metric='distance' compares two prompts; take 'prob', 'log_prob' or 'kl'")
    if metric == "logit_diff" and foil is None:
        raise InputError("metric='logit_diff' needs a foil: pass foil=' Rome', or take 'prob'")
    if samples < 1:
        raise InputError(f"samples must be at least 1; came {samples}")
    if not noise > 0:
        raise InputError(f"noise must be above 0; came {noise}")


def subject_positions(
    tokenizer: PreTrainedTokenizerBase | None,
    prompt: Prompt,
    ids: Sequence[int],
    subject: str | Positions,
) -> list[int]:
    """Positions of a subject, ascending.

    Args:
        tokenizer: For a subject given as text.
        prompt: The prompt; text where the subject is text.
        ids: Its token ids.
        subject: Text that occurs in the prompt once (all tokens that hold a part of it), or
            positions.

    Raises:
        InputError: it does not occur, or more than once, or its tokens cannot be told.
    """
    if not isinstance(subject, str) or subject == "last":
        if subject is None:
            raise InputError("say what the subject is: a part of the prompt's text, or positions")
        return sorted(resolve_positions(subject, len(ids)))
    fast: Any = tokenizer
    if not isinstance(prompt, str) or not getattr(fast, "is_fast", False):
        raise InputError(
            f"a subject given as text ({subject!r}) needs a prompt given as text and a fast "
            "tokenizer; give its positions instead, such as subject=[1, 2]"
        )
    if not subject or subject not in prompt:
        raise InputError(f"the subject {subject!r} does not occur in the prompt {prompt!r}")
    spans = fast(prompt, return_offsets_mapping=True)["offset_mapping"]
    found, start = [], prompt.find(subject)
    while start >= 0:
        end = start + len(subject)
        found.append([p for p, (a, b) in enumerate(spans) if a < b and a < end and b > start])
        start = prompt.find(subject, start + 1)
    if len(found) > 1:
        raise InputError(
            f"the subject {subject!r} occurs {len(found)} times, at positions "
            f"{' and '.join(map(str, found))}: give the positions that are meant"
        )
    return found[0]


@no_grad()
def embedding_std(architecture: Architecture) -> float:
    """Standard deviation of the token embeddings: all entries, over the whole vocabulary."""
    embedding: Any = architecture.model.get_input_embeddings()
    count, total, squares = 0, 0.0, 0.0
    for start in range(0, embedding.num_embeddings, VOCABULARY_PIECE):
        end = min(start + VOCABULARY_PIECE, embedding.num_embeddings)
        ids = torch.arange(start, end, device=architecture.input_device)
        rows = exact(embedding(ids[None]))
        count += rows.numel()
        total += float(rows.sum())
        squares += float(rows.square().sum())
    return float(np.sqrt(max(squares / count - (total / count) ** 2, 0.0)))


def noised_run(
    architecture: Architecture,
    ids: Sequence[int],
    positions: Sequence[int],
    std: float,
    samples: int,
    read: Sequence[int],
    seed: int = 0,
) -> BaseRun:
    """The runs of one prompt with noise on some of its token embeddings, one per sample.

    The noise is drawn on the CPU in float32, ``[sample, position, width]``, so that a seed means
    the same on every device.

    Args:
        architecture: The model.
        ids: The prompt.
        positions: Where the noise is added.
        std: Its standard deviation.
        samples: How many runs.
        read: Positions whose logits are wanted.
        seed: Of the noise.
    """
    embedding: Any = architecture.model.get_input_embeddings()
    generator = torch.Generator().manual_seed(seed)
    shape = (samples, len(positions), int(embedding.weight.shape[1]))
    noise = std * torch.randn(shape, generator=generator, device="cpu")

    def add(value: Tensor) -> Tensor:
        new = value.clone()
        new[:, list(positions)] += noise.to(new)
        return new

    cached = abilities(architecture).suffix
    rows = torch.tensor([list(ids)], device="cpu").repeat(samples, 1)
    with attached([(ModuleTap(embedding), add)]):
        return run_base(architecture, rows, (), read, cached=cached)


def _panels(
    architecture: Architecture, windows: Mapping[str, int] | None
) -> dict[str, list[list[Site]]]:
    """For each site and layer, what is restored together; none where a block has no such site."""
    asked = WINDOWS if windows is None else windows
    panels, n_layers = {}, architecture.n_layers
    for name, size in asked.items():
        if name not in ("resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out"):
            raise SiteError(f"a trace restores the stream, attn_out or mlp_out; came {name!r}")
        if size < 1:
            raise InputError(f"a window has at least one layer; came {size} for {name!r}")
        why = [architecture.missing(Site(name, layer)) for layer in range(n_layers)]
        if all(why):
            if windows is not None:
                raise SiteError(why[0])
            continue
        panels[name] = [
            [Site(name, i) for i in _window(layer, size, n_layers) if not why[i]]
            if not why[layer]
            else []
            for layer in range(n_layers)
        ]
    if not panels:
        raise InputError("windows is empty: name a site, such as {'resid_post': 1}")
    return panels


def _window(layer: int, size: int, n_layers: int) -> range:
    first = layer - size // 2
    return range(max(first, 0), min(first + size, n_layers))


@dataclass(eq=False)
class _Trace:
    """The runs of a trace."""

    architecture: Architecture
    clean: BaseRun
    base: BaseRun
    """The noised runs."""
    panels: Mapping[str, Sequence[Sequence[Site]]]
    positions: Sequence[int]
    subject: Sequence[int]
    """Positions of the noised tokens, ascending."""
    metric: Metric

    def __post_init__(self) -> None:
        self.work = Work()
        self.noised = self.metric(self.base.logits).cpu().double().numpy()

    def run(self, max_tokens: int | None, bar: Any) -> np.ndarray:
        """The effects, ``[site, layer, position, sample]``."""
        samples = self.base.count
        shape = (len(self.panels), self.architecture.n_layers, len(self.positions), samples)
        effects, cells = np.zeros(shape), list(self._cells())
        for number, layers in enumerate(self.panels.values()):
            effects[number, [not sites for sites in layers]] = np.nan
        if not cells:
            return effects
        runs = [Run(edits, sample) for _, edits in cells for sample in range(samples)]
        bar.reset(len(runs))
        found = run_edited(
            self.architecture, self.base, runs, lambda _runs, logits: self.metric(logits),
            max_tokens=max_tokens, progress=bar.update, work=self.work,
        )  # fmt: skip
        values = exact(found).numpy().reshape(len(cells), samples) - self.noised
        for (place, _), row in zip(cells, values, strict=True):
            effects[place] = row
        return effects

    def result(
        self,
        values: np.ndarray,
        sizes: Mapping[str, int],
        std: float,
        tokens: Sequence[str],
        tokenizer: Any,
    ) -> CausalTrace:
        """The effects ``[site, layer, position, sample]``, averaged over samples, with labels."""
        samples, metric = self.base.count, self.metric

        def text(token: int | None) -> str:
            return "" if token is None else token_strings(tokenizer, [token])[0]

        return CausalTrace(
            values=values.mean(-1),
            stderr=values.std(-1, ddof=1) / np.sqrt(samples) if samples > 1 else None,
            sites=tuple(self.panels),
            windows=tuple(sizes[site] for site in self.panels),
            layers=tuple(range(self.architecture.n_layers)),
            positions=tuple(self.positions),
            tokens=tuple(tokens),
            subject=tuple(self.subject),
            metric=metric.name,
            unit=metric.unit,
            clean=float(metric(self.clean.logits)),
            corrupted=float(self.noised.mean()),
            noise_std=std,
            samples=samples,
            answer=text(metric.answer),
            foil=text(metric.foil),
            passes=self.work.passes,
        )

    def _cells(self) -> Iterator[tuple[tuple[int, int, int], tuple[Edit, ...]]]:
        """Place and exchanges of every cell that has to be run."""
        causal = abilities(self.architecture).causal
        for number, layers in enumerate(self.panels.values()):
            for layer, sites in enumerate(layers):
                for column, position in enumerate(self.positions):
                    if not sites or (causal and position < self.subject[0]):
                        continue
                    edits = (Edit(s, self.clean.sites[s][0, position], position) for s in sites)
                    yield (number, layer, column), tuple(edits)
