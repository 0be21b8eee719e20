"""Which tokens of a prompt a prediction stands on: gradients, attention, and taking tokens out.

======================== ======= ========================================================
``saliency``             size    ‖∂y/∂e‖₂ of each token's embedding e (Simonyan et al. 2014)
``gradient_x_input``     signed  ∂y/∂e · (e − baseline), one pass (Shrikumar et al. 2016)
``integrated_gradients`` signed  the same along the line from the baseline to the text; adds
                                 up to y(text) − y(baseline) (Sundararajan et al. 2017)
``smoothgrad``           signed  gradient × input, the gradient averaged over noisy copies
                                 (Smilkov et al. 2017)
``occlusion``            signed  y less y with the token's embedding at its baseline: exact,
                                 one run per token (Zeiler and Fergus 2014)
``attention_rollout``    size    attention multiplied up through the blocks, half for the
                                 stream; knows no target token (Abnar and Zuidema 2020)
``gradient_attention``   size    attention times its gradient, positive part, multiplied up
                                 (Chefer et al. 2021)
======================== ======= ========================================================

The embedding is what the model's embedding module gives for a token (with the multiplier that the
module itself applies, as in Gemma; without learned positions). All targets of a text share each
forward pass. The gradient methods first make sure, once per model, that its gradient is its slope
(`gradient_check`).
"""

from __future__ import annotations

import math
import sys
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor
from tqdm import tqdm

from attention_attribution import attention_rollout, gradient_attention, pattern_sites
from attribution_targets import Targets, make_request
from embedding_baseline import baseline_embeddings
from embedding_pass import (
    EmbeddingPass,
    Measure,
    embedding_pass,
)
from forward_pass import InputError
from gradient_check import check_gradient
from model_architecture import Architecture
from token_attribution import TokenAttribution
from tokenization import Positions, Prompt, check_ids, encode, token_strings
from weighted_gradients import (
    along_path,
    around_input,
    at_input,
    occlusion,
    values_at,
    weighted_gradients,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

METHODS: dict[str, frozenset[str]] = {
    "saliency": frozenset({"per_dimension", "batch_size"}),
    "gradient_x_input": frozenset({"baseline", "per_dimension", "batch_size"}),
    "integrated_gradients": frozenset({"baseline", "n_steps", "per_dimension", "batch_size"}),
    "smoothgrad": frozenset(
        {"baseline", "n_steps", "noise", "seed", "per_dimension", "batch_size"}
    ),
    "occlusion": frozenset({"baseline", "batch_size"}),
    "attention_rollout": frozenset(),
    "gradient_attention": frozenset(),
}
"""Every method and the options that it takes."""

SPELLINGS = {
    "ig": "integrated_gradients",
    "input_x_gradient": "gradient_x_input",
    "gradient_input": "gradient_x_input",
    "grad_x_input": "gradient_x_input",
    "smooth_grad": "smoothgrad",
    "rollout": "attention_rollout",
    "chefer": "gradient_attention",
    "gradient_weighted_attention": "gradient_attention",
    "gradient": "saliency",
}

BASELINES = {
    "gradient_x_input": "zero",
    "integrated_gradients": "mean",
    "smoothgrad": "zero",
    "occlusion": "mean",
}
"""What each method compares with by default.

Integrating from zero asks for many steps on models that norm their input first: an embedding's
length makes no difference to them, so all the change lies just beside zero.
"""

DEFAULT_STEPS = 50
DEFAULT_NOISE = 0.1

WARN_AT = 0.05
"""Relative completeness error of integrated gradients from which on they are warned of."""


NOT_FINITE = (
    "some scores are no finite numbers: the model or the metric overflows; load the model in "
    "bfloat16 or float32"
)
"""What is said of an attribution that holds NaN or infinite numbers."""


class CompletenessWarning(UserWarning):
    """Integrated gradients do not add up to what they should."""


@dataclass(frozen=True)
class _Options:
    """What a method was asked to do, checked."""

    method: str
    baseline: Any = None
    n_steps: int = DEFAULT_STEPS
    noise: float = DEFAULT_NOISE
    seed: int = 0
    per_dimension: bool = False
    batch_size: int | None = None

    @property
    def takes_baseline(self) -> bool:
        return "baseline" in METHODS[self.method]


def attribute_tokens(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    prompt: Prompt,
    method: str = "integrated_gradients",
    targets: Any = None,
    target_positions: Positions = -1,
    *,
    metric: Any = "logit",
    against: Any = None,
    follow_text: bool = False,
    baseline: Any = None,
    n_steps: int | None = None,
    noise: float | None = None,
    seed: int | None = None,
    per_dimension: bool = False,
    batch_size: int | None = None,
    show_progress: bool = True,
    check_gradients: bool = True,
) -> TokenAttribution:
    """How much each token of a prompt speaks for what the model predicts.

    Args:
        model: A causal language model with its head, never changed.
        tokenizer: For text, and for readable tokens.
        prompt: Text, a chat, or token ids.
        method: See the table at the head of this module.
        targets: Which token is predicted, by text or id: one for all positions, one for each
            position, or several for one position; None is the model's own best at each.
        target_positions: After which positions; ``-1`` is the last, ``"all"`` every one. A function
            says itself which it reads.
        metric: ``"logit"``, ``"log_prob"``, ``"prob"``, ``"logit_diff"``, or a function of logits
            ``[1, position, vocab]`` that returns a number (one target by itself), or a
            `logit_metrics.Metric`.
        against: For ``logit_diff``, the other token; one for all targets, or one for each.
        follow_text: The targets are the tokens that follow each position in the prompt itself.
        baseline: What tokens are compared with: ``"zero"``, ``"mean"`` of the vocabulary's
            embeddings, ``"pad"``, any other token by text or id, or a tensor ``[d]`` or
            ``[position, d]``. None is the method's own (`BASELINES`): the mean, or zero for
            gradient × input.
        n_steps: Nodes of the Gauss-Legendre rule, or noisy copies; None is 50.
        noise: Of SmoothGrad: standard deviation over the embeddings' range; None is 0.1.
        seed: Of SmoothGrad's noise; None is 0.
        per_dimension: Also keep what each entry of a token's embedding contributes.
        batch_size: Steps (or occluded tokens) per pass; None is what memory and processor like. The
            numbers do not depend on it but for rounding.
        show_progress: A progress bar, where there is a terminal to show it.
        check_gradients: Refuse a model whose gradient is not the slope of its output.

    Returns:
        Scores ``[target, position]``; ``completeness_error`` says how far they add up. Integrated
        gradients that miss by more than `WARN_AT` come with a `CompletenessWarning`, scores that
        are no finite numbers with a UserWarning.

    Raises:
        InputError: the prompt, a target, or an option cannot be used, or the method ignores it.
        ArchitectureError: the model has no head, or no gradient.
        SiteError: a method that follows attention meets a block without.
        NotEnoughMemoryError: a single step does not fit into memory.
    """
    options = _checked_options(
        method, baseline=baseline, n_steps=n_steps, noise=noise, seed=seed,
        per_dimension=per_dimension, batch_size=batch_size,
    )  # fmt: skip
    arch = Architecture(model)
    ids = encode(tokenizer, prompt)
    check_ids(ids, arch.config)
    request = make_request(
        tokenizer, arch.config, ids, targets, target_positions, metric, against, follow_text
    )
    if options.method == "attention_rollout":
        plain = targets is None and against is None and not follow_text and metric == "logit"
        return _rollout(arch, tokenizer, ids, request.positions, plain)
    arch.require_head("attribution to tokens")
    start, label = _baseline(arch, tokenizer, options, len(ids))
    if check_gradients and options.method != "occlusion":
        check_gradient(arch)
    hidden = not show_progress or not sys.stderr.isatty()
    sites = pattern_sites(arch, "gradient-weighted attention") if _by_attention(options) else []
    with embedding_pass(arch, ids, request.read, sites) as opened:
        found = request.targets(opened.base, tokenizer)
        if options.method != "occlusion":
            found = found.followed(opened.base, opened.read, one=_by_attention(options))
        measure = found.measure(opened.read)
        with tqdm(desc=options.method, unit="step", disable=hidden) as bar:
            scores, dims = _run(opened, measure, found, options, start, bar.update)
        value = measure(opened.base)[0].cpu().double().numpy()
        nothing = np.full(len(value), np.nan)
        bottom = nothing if start is None else values_at(opened, measure, start)
    result = TokenAttribution(
        scores=scores,
        value=value,
        baseline_value=bottom,
        tokens=tuple(token_strings(tokenizer, ids)),
        token_ids=tuple(ids),
        target_positions=found.positions,
        targets=found.labels,
        target_ids=found.ids,
        method=options.method,
        metric=found.metric,
        unit=found.unit,
        baseline=label,
        steps=_steps(options),
        per_dimension=None if dims is None else dims.astype(np.float32),
    )
    if not np.isfinite(result.scores).all():
        warnings.warn(NOT_FINITE, UserWarning, stacklevel=2)
    elif options.method == "integrated_gradients":
        _warn_of_error(result)
    return result


def _warn_of_error(result: TokenAttribution) -> None:
    worst = float(np.nanmax(result.relative_error, initial=0.0))
    if worst > WARN_AT:
        warnings.warn(
            f"integrated gradients miss what they should add up to by {worst:.0%} of their size: "
            f"take more than n_steps={result.steps}, or another baseline than "
            f"{result.baseline!r} ('mean', a token); where experts are chosen, the output jumps, "
            "and no number of steps will do",
            CompletenessWarning,
            stacklevel=3,
        )


# --- Options --------------------------------------------------------------------------------------


def _checked_options(method: str, **given: Any) -> _Options:
    """The options of a method.

    Raises:
        InputError: there is no such method, it ignores an option, or a number is out of range.
    """
    word = str(method).strip().lower().replace("-", "_").replace(" ", "_").replace("×", "x")
    word = SPELLINGS.get(word, word)
    if word not in METHODS:
        raise InputError(f"no method {method!r}; methods are {', '.join(METHODS)}")
    asked = {
        name: value
        for name, value in given.items()
        if value is not None and not (name == "per_dimension" and value is False)
    }
    for name in asked:
        if name not in METHODS[word]:
            able = [each for each, names in METHODS.items() if name in names]
            raise InputError(f"{word} takes no {name}; it belongs to {', '.join(able)}")
    options = _Options(word, **asked)
    for name in ("n_steps", "batch_size"):
        number = getattr(options, name)
        whole = isinstance(number, int) and not isinstance(number, bool)
        if number is not None and not (whole and number >= 1):
            raise InputError(f"{name} must be a whole number of at least 1; came {number!r}")
    noise, seed = options.noise, options.seed
    if not isinstance(noise, int | float) or isinstance(noise, bool) or not 0 < noise < math.inf:
        raise InputError(f"noise must be above 0, and finite; came {noise!r}")
    if not isinstance(seed, int) or isinstance(seed, bool) or seed < 0:
        raise InputError(f"seed must be a whole number of at least 0; came {seed!r}")
    return options


def _by_attention(options: _Options) -> bool:
    return options.method == "gradient_attention"


def _steps(options: _Options) -> int:
    if options.method in ("integrated_gradients", "smoothgrad"):
        return options.n_steps
    return 0 if options.method == "occlusion" else 1


def _baseline(
    arch: Architecture, tokenizer: Any, options: _Options, length: int
) -> tuple[Tensor | None, str]:
    """The baseline ``[position, d]`` and its name; None where the method has none.

    Raises:
        InputError: it is none.
    """
    if not options.takes_baseline:
        return None, ""
    asked = BASELINES[options.method] if options.baseline is None else options.baseline
    return baseline_embeddings(arch, tokenizer, asked, length)


# --- Methods --------------------------------------------------------------------------------------


def _run(
    opened: EmbeddingPass,
    measure: Measure,
    targets: Targets,
    options: _Options,
    baseline: Tensor | None,
    progress: Any,
) -> tuple[np.ndarray, np.ndarray | None]:
    """Scores ``[target, position]``, and by dimension where that was asked for."""
    start = None if baseline is None else baseline.to(opened.embedding.device)
    common: dict[str, Any] = {"batch_size": options.batch_size, "progress": progress}
    if options.method == "gradient_attention":
        return gradient_attention(opened, measure, targets.positions), None
    if start is None:
        plan = at_input(opened, None)
    elif options.method == "occlusion":
        return occlusion(opened, measure, start, **common), None
    elif options.method == "integrated_gradients":
        plan = along_path(opened, start, options.n_steps)
    elif options.method == "smoothgrad":
        plan = around_input(opened, start, options.n_steps, options.noise, options.seed)
    else:
        plan = at_input(opened, start)
    return weighted_gradients(opened, measure, plan, per_dimension=options.per_dimension, **common)


def _rollout(
    arch: Architecture, tokenizer: Any, ids: Sequence[int], positions: tuple[int, ...], plain: bool
) -> TokenAttribution:
    """Rollout for some positions; ``plain`` says that nothing was asked of target tokens.

    Raises:
        InputError: something was.
    """
    if not plain:
        raise InputError(
            "attention rollout knows positions, no target tokens: leave out targets, metric, "
            "against and follow_text, or use method='gradient_attention'"
        )
    nothing = np.full(len(positions), np.nan)
    tokens = token_strings(tokenizer, ids)
    return TokenAttribution(
        scores=attention_rollout(arch, ids, positions),
        value=nothing,
        baseline_value=nothing,
        tokens=tuple(tokens),
        token_ids=tuple(ids),
        target_positions=positions,
        targets=tuple(tokens[position] for position in positions),
        target_ids=(-1,) * len(positions),
        method="attention_rollout",
        metric="attention",
        unit="",
    )
