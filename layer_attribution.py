"""How much each unit inside a model speaks for a prediction: attribution to layers and neurons.

Let ``e(α)`` be the straight line of token embeddings from a baseline's (α = 0) to the prompt's
(α = 1), ``a`` a site's activations and ``y`` the metric.

========================  ====================================================================
``conductance``           ∫ ∂y/∂a · da/dα dα along the line: what flows through each unit
                          (Dhamdhere, Sundararajan and Yan 2018, equation 3)
``internal_influence``    ∫ ∂y/∂a dα along the same line: the mean gradient
                          (Leino et al. 2018, definition 1)
``integrated_gradients``  (a(1) − a(0)) · ∫ ∂y/∂a at a(0) + α (a(1) − a(0)) dα: the line is that
                          of the activations, and all else is as in the prompt (captum's
                          LayerIntegratedGradients, after Sundararajan et al. 2017)
========================  ====================================================================

Conductances of all units of a residual site add up to y(prompt) − y(baseline), whichever the block;
integrated gradients of any site to what exchanging the whole site for the baseline's would change.
``expected`` and ``completeness_error`` of the result say how well they do.

Conductance and influence of all blocks come from the same passes; integrated gradients need a line,
and passes, for each block.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from embedding_baseline import baseline_embeddings
from embedding_pass import (
    EmbeddingPass,
    embedding_pass,
    memory_needed,
    rows_per_pass,
    token_embeddings,
)
from forward_pass import Hook, InputError, Site, SiteError, edit
from gradient_attribution import NOT_FINITE, WARN_AT, CompletenessWarning
from gradient_check import check_gradient
from gradient_record import differentiable
from gradient_scale import GradientScale
from interrupts import enable_grad, no_grad
from intervention_handler import by_token, token_shape
from layer_attribution_result import METHODS, LayerAttribution
from logit_metrics import Metric, make_metric, reads_of
from memory_limits import in_batches
from model_architecture import Architecture, Layer
from module_devices import exact
from sweep_cells import DEFAULT_AXES
from tokenization import Prompt, check_ids, encode, resolve_positions, token_strings

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

RULES = ("trapezoid", "left")
"""How conductance weighs the gradients at the two ends of a step."""

CUTS = ("resid_pre", "resid_mid", "resid_post")
"""Sites that every path from tokens to logits goes through."""


def layer_attribution(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    prompt: Prompt,
    site: str = "resid_post",
    method: str = "conductance",
    *,
    layers: Sequence[Layer] | None = None,
    baseline: Any = "mean",
    baseline_prompt: Prompt | None = None,
    metric: Any = "logit",
    answer: Any = None,
    foil: Any = None,
    n_steps: int = 50,
    rule: str = "trapezoid",
    batch_size: int | None = None,
    show_progress: bool = True,
    check_gradients: bool = True,
) -> LayerAttribution:
    """Attribute a prediction to every unit of a site.

    Args:
        model: A causal language model, never changed.
        tokenizer: For text, and for readable tokens.
        prompt: Text, a chat or token ids.
        site: A name out of `sweep_cells.DEFAULT_AXES` (``mlp_neurons``, ``head_out``, …).
        method: See the table at the head of this module.
        layers: Blocks in any spelling; None means all that have the site.
        baseline: What the prompt's embeddings are compared with: ``"mean"`` of the vocabulary's,
            ``"zero"``, ``"pad"``, another token by text or id, or a tensor ``[d]`` or
            ``[position, d]``.
        baseline_prompt: A prompt with as many tokens, instead of ``baseline``: a corrupted one.
        metric: See `logit_metrics`.
        answer: The token measured; None is the prompt's best.
        foil: For ``logit_diff``, the other token; None is the baseline's best.
        n_steps: Steps of conductance, or nodes of a Gauss-Legendre rule for the others.
        rule: Of conductance: ``"trapezoid"``, or ``"left"``, captum's, which is of first order.
        batch_size: Points per pass; None is what memory and processor like.
        show_progress: A progress bar, where there is a terminal to show it.
        check_gradients: Refuse a model whose gradient is not the slope of its output.

    Returns:
        A `LayerAttribution`; one that misses its sum by more than 5 % comes with a
        `gradient_attribution.CompletenessWarning`.

    Raises:
        InputError: a prompt, baseline, metric, method or number that cannot be used.
        LayerError: there is no such layer.
        SiteError: no layer has the site, or one that was named has not.
        ArchitectureError: the model has no head, or no gradient.
        NotEnoughMemoryError: a single point does not fit into memory.
    """
    _check_options(site, method, n_steps, rule, batch_size, metric)
    if baseline_prompt is not None and not (isinstance(baseline, str) and baseline == "mean"):
        raise InputError("baseline and baseline_prompt are two ways to say one thing: give one")
    arch = Architecture(model)
    arch.require_head("layer attribution")
    ids = encode(tokenizer, prompt)
    check_ids(ids, arch.config)
    sites = _sites(arch, site, layers)
    start, label = _start(arch, tokenizer, ids, baseline, baseline_prompt)
    if check_gradients:
        check_gradient(arch, "ablate and patching_sweep need none")
    asked = reads_of(metric)
    read: Sequence[int] = range(len(ids))
    if asked is not None:
        read = sorted({resolve_positions(p, len(ids))[0] for p in asked})
    hidden = not show_progress or not sys.stderr.isatty()
    by_layer = method == "integrated_gradients"
    total = (n_steps + (method == "conductance")) * (len(sites) if by_layer else 1)
    with (
        embedding_pass(arch, ids, read, sites) as opened,
        tqdm(total=total, desc=method, unit="point", disable=hidden) as bar,
    ):
        path = _path(opened, start, metric, answer, foil, tokenizer, arch, batch_size, bar.update)
        if by_layer:
            values, expected = _integrated(path, sites, n_steps)
        elif method == "conductance":
            values = _conductance(path, sites, n_steps, rule)
            whole = site in CUTS and not (arch.needs_every_block or arch.reads_earlier_streams)
            expected = [path.top - path.bottom if whole else float("nan")] * len(sites)
        else:
            values = _influence(path, sites, n_steps)
            expected = [float("nan")] * len(sites)
        made = path.metric
    result = LayerAttribution(
        values=np.stack(values).astype(np.float32),
        layers=tuple(each.layer for each in sites),
        tokens=tuple(token_strings(tokenizer, ids)),
        site=site,
        method=method,
        metric=made.name,
        unit=made.unit,
        value=path.top,
        baseline_value=path.bottom,
        expected=np.array(expected),
        baseline=label,
        steps=n_steps,
        answer="" if made.answer is None else token_strings(tokenizer, [made.answer])[0],
        foil="" if made.foil is None else token_strings(tokenizer, [made.foil])[0],
    )
    _warn_of_error(result)
    return result


# --- What is asked --------------------------------------------------------------------------------


def _check_options(
    site: str, method: str, n_steps: int, rule: str, batch_size: int | None, metric: Any
) -> None:
    if method not in METHODS:
        raise InputError(f"no method {method!r}; methods are {', '.join(METHODS)}")
    if site not in DEFAULT_AXES:
        raise SiteError(f"no site {site!r} to attribute to; sites are {', '.join(DEFAULT_AXES)}")
    if rule not in RULES:
        raise InputError(f"rule is 'trapezoid' or 'left'; came {rule!r}")
    if rule != RULES[0] and method != "conductance":
        raise InputError(f"rule belongs to conductance; the method is {method!r}")
    for name, number in (("n_steps", n_steps), ("batch_size", batch_size)):
        whole = isinstance(number, int) and not isinstance(number, bool) and number >= 1
        if not whole and not (name == "batch_size" and number is None):
            raise InputError(f"{name} must be a whole number of at least 1; came {number!r}")
    reads_of(metric)
    if metric in ("rank", "distance"):
        raise InputError(
            f"the metric {metric!r} has no gradient everywhere on the path; use 'logit', "
            "'log_prob', 'prob' or 'logit_diff'"
        )


def _sites(arch: Architecture, name: str, layers: Sequence[Layer] | None) -> list[Site]:
    single = isinstance(layers, int | str)
    asked: Any = range(arch.n_layers) if layers is None else [layers] if single else layers
    found = [Site(name, layer) for layer in dict.fromkeys(arch.resolve(each) for each in asked)]
    reasons = [reason for site in found if (reason := arch.missing(site))]
    if not found or (reasons and (layers is not None or len(reasons) == len(found))):
        raise SiteError(reasons[0] if reasons else "layers is empty; None means all")
    found = [site for site in found if not arch.missing(site)]
    shapes = {token_shape(arch, site) for site in found}
    if len(shapes) > 1:
        raise InputError(
            f"blocks have {name} of different sizes per token, {sorted(shapes)}: choose layers"
        )
    return found


def _start(
    arch: Architecture,
    tokenizer: Any,
    ids: Sequence[int],
    baseline: Any,
    baseline_prompt: Prompt | None,
) -> tuple[Tensor, str]:
    """Embeddings at which the path begins, ``[position, d]``, and what to call them."""
    if baseline_prompt is None:
        return baseline_embeddings(arch, tokenizer, baseline, len(ids))
    other = encode(tokenizer, baseline_prompt)
    check_ids(other, arch.config)
    if len(other) != len(ids):
        raise InputError(
            f"prompt and baseline_prompt have {len(ids)} and {len(other)} tokens: "
            f"{token_strings(tokenizer, ids)} and {token_strings(tokenizer, other)}. Write them "
            "with as many tokens each"
        )
    return token_embeddings(arch, other), "another prompt"


def _warn_of_error(result: LayerAttribution) -> None:
    if not np.isfinite(result.values).all():
        warnings.warn(NOT_FINITE, UserWarning, stacklevel=3)
        return
    size = np.maximum(np.abs(result.expected), 1e-3 * (abs(result.value) + 1e-9))
    missed = np.abs(result.completeness_error) / size
    worst = float(np.nanmax(missed, initial=0.0))
    if worst > WARN_AT:
        warnings.warn(
            f"the units of a block miss what they should add up to by up to {worst:.0%} of it: "
            f"take more than n_steps={result.steps}, or another baseline than "
            f"{result.baseline!r}; where experts are chosen, the output jumps, and no number of "
            "steps will do",
            CompletenessWarning,
            stacklevel=3,
        )


# --- The path -------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Path:
    """The line of embeddings from baseline to prompt, and the metric on it."""

    opened: EmbeddingPass
    start: Tensor
    metric: Metric
    top: float
    bottom: float
    batch_size: int
    progress: Callable[[int], Any]

    def points(self, shares: Sequence[float]) -> Tensor:
        """Embeddings at some shares of the way, ``[point, position, d]``."""
        end = self.opened.embedding
        wide = torch.promote_types(end.dtype, torch.float32)
        way = end.to(wide) - self.start.to(wide)
        weights = torch.tensor(shares, dtype=wide, device=end.device)[:, None, None]
        return (self.start.to(wide) + weights * way).to(end.dtype)

    def activations(self, share: float, sites: Sequence[Site]) -> list[Tensor]:
        """What sites hold at a share of the way, ``[1, …]`` each."""
        with no_grad():
            self.opened.logits(self.points([share]))
        return [self.opened.kept[site].detach().clone() for site in sites]

    def gradients(
        self, embeddings: Tensor, sites: Sequence[Site]
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Activations and gradients of some points, ``[point, …]`` each."""
        scale = GradientScale(self.opened.architecture.model)
        with enable_grad():
            leaf = embeddings.detach().requires_grad_()
            logits = scale.widen(self.opened.logits(leaf))
            values = differentiable([self.metric] * len(leaf), logits, self.metric.name)
            kept = [self.opened.kept[site] for site in sites]
            slopes = torch.autograd.grad(
                values.sum(), kept, allow_unused=True, materialize_grads=True
            )
        self.opened.kept.clear()
        return [value.detach() for value in kept], [scale.undo(slope) for slope in slopes]

    def batches(
        self, count: int, run: Callable[[Sequence[int]], Any]
    ) -> Iterator[tuple[Sequence[int], Any]]:
        """Run the points by number, in order, as many at a time as fit."""
        whole = [
            range(i, min(i + self.batch_size, count)) for i in range(0, count, self.batch_size)
        ]
        for numbers, made in in_batches(
            whole, run, unit="points of the path",
            needs=lambda numbers: memory_needed(self.opened, len(numbers), graph=True),
        ):  # fmt: skip
            yield numbers, made
            self.progress(len(numbers))


def _path(
    opened: EmbeddingPass,
    start: Tensor,
    metric: Any,
    answer: Any,
    foil: Any,
    tokenizer: Any,
    arch: Architecture,
    batch_size: int | None,
    progress: Callable[[int], Any],
) -> _Path:
    start = start.to(opened.embedding.device)
    with no_grad():
        bottom = opened.logits(start[None].to(opened.embedding.dtype)).detach()
    opened.kept.clear()
    made = make_metric(
        metric, opened.base, bottom, base=opened.base, answer=answer, foil=foil,
        tokenizer=tokenizer, config=arch.config,
    )  # fmt: skip
    size = rows_per_pass(opened, graph=True) if batch_size is None else batch_size
    ends = float(made(opened.base)), float(made(bottom))
    return _Path(opened, start, made, *ends, size, progress)


def _table(value: Tensor, site: Site) -> np.ndarray:
    """A sum over points, ``[…]``, with the position first; float64."""
    return by_token(exact(value)[None], site)[0].cpu().numpy()


def _nodes(count: int) -> tuple[list[float], list[float]]:
    """Gauss-Legendre nodes and weights on [0, 1]."""
    nodes, weights = np.polynomial.legendre.leggauss(count)
    return ((1 + nodes) / 2).tolist(), (weights / 2).tolist()


# --- The methods ----------------------------------------------------------------------------------


def _conductance(path: _Path, sites: list[Site], steps: int, rule: str) -> list[np.ndarray]:
    """Sums of (gradient · step of the activations), the gradient at the step's ends or its left."""
    totals: list[Any] = [0.0] * len(sites)
    before: list[tuple[Tensor, Tensor]] = []

    def run(numbers: Sequence[int]) -> tuple[list[Tensor], list[Tensor]]:
        return path.gradients(path.points([n / steps for n in numbers]), sites)

    for _, (values, slopes) in path.batches(steps + 1, run):
        ends = []
        for i in range(len(sites)):
            value, slope = exact(values[i]), exact(slopes[i])
            ends.append((value[-1:].clone(), slope[-1:].clone()))
            if before:
                value, slope = (
                    torch.cat([old, new])
                    for old, new in zip(before[i], (value, slope), strict=True)
                )
            at = slope[:-1] if rule == "left" else (slope[:-1] + slope[1:]) / 2
            totals[i] = totals[i] + (at * (value[1:] - value[:-1])).sum(0)
        before = ends
    return [_table(total, site) for total, site in zip(totals, sites, strict=True)]


def _influence(path: _Path, sites: list[Site], steps: int) -> list[np.ndarray]:
    """Mean gradients along the path."""
    shares, weights = _nodes(steps)
    totals: list[Any] = [0.0] * len(sites)

    def run(numbers: Sequence[int]) -> list[Tensor]:
        _, slopes = path.gradients(path.points([shares[n] for n in numbers]), sites)
        return [_weighted(slope, [weights[n] for n in numbers]) for slope in slopes]

    for _, sums in path.batches(steps, run):
        totals = [total + part for total, part in zip(totals, sums, strict=True)]
    return [_table(total, site) for total, site in zip(totals, sites, strict=True)]


def _weighted(values: Tensor, weights: Sequence[float]) -> Tensor:
    """``[point, …]`` → ``[…]``, float64."""
    wide = exact(values)
    return torch.einsum(
        "p,p...->...", torch.tensor(weights, dtype=wide.dtype, device="cpu").to(wide), wide
    )


def _integrated(path: _Path, sites: list[Site], steps: int) -> tuple[list[np.ndarray], list[float]]:
    """Integrated gradients of each site along the line of its own activations, and their sums."""
    shares, weights = _nodes(steps)
    firsts, lasts = path.activations(0.0, sites), path.activations(1.0, sites)
    found, expected = [], []
    for site, first, last in zip(sites, firsts, lasts, strict=True):
        way = last - first

        def run(numbers: Sequence[int], site: Site = site, first: Tensor = first,
                way: Tensor = way) -> Tensor:  # fmt: skip
            line = torch.tensor([shares[n] for n in numbers], device="cpu").to(way)
            points = first + line.view(-1, *[1] * (way.dim() - 1)) * way
            with edit(path.opened.architecture, [(site, _put(points.requires_grad_()))]):
                own = path.opened.embedding.expand(len(numbers), -1, -1)
                _, (slope,) = path.gradients(own, [site])
            return _weighted(slope, [weights[n] for n in numbers])

        total: Any = sum(part for _, part in path.batches(steps, run))
        found.append(_table(total * exact(way)[0], site))
        with no_grad(), edit(path.opened.architecture, [(site, _put(first))]):
            expected.append(path.top - float(path.metric(path.opened.logits(None))))
    return found, expected


def _put(value: Tensor) -> Hook:
    return lambda _: value
