"""Which neurons, or entries of the residual stream, a prediction at one token stands on.

Two answers, side by side:

1. *Exact*: each feature is ablated (set to a value, 0 by default) at that token in a run of its
   own; its importance is what the metric loses. All runs go through in a few batches
   (`edited_runs`).
2. *Gradient*: (activation − ablated value) × gradient of the metric, one forward and one backward
   pass: the first-order estimate of the same loss (Nanda 2023, attribution patching). It is NaN
   for a metric that has no gradient (``rank``, or a function that returns no tensor).

Their correlation says how far the cheap answer can be trusted on this prompt.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from array_files import built, open_arrays, write_arrays
from base_run import BaseRun, run_base
from edited_runs import Run, abilities, run_edited
from forward_pass import InputError, Site, SiteError, edit, evaluate
from gradient_scale import GradientScale
from growing_pass import Edit
from interrupts import UndoStack
from intervention_handler import token_shape
from logit_metrics import Metric, make_metric, reads_of, refuse_unused
from model_architecture import Architecture, Layer
from tokenization import Prompt, as_ids, check_ids, encode, resolve_positions, token_strings

if TYPE_CHECKING:
    import pandas as pd
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

KIND = "feature attribution"
VERSION = 1
"""Of the file's schema."""


@dataclass(frozen=True, eq=False)
class FeatureAttribution:
    """How much each feature of one token matters to a prediction."""

    importance: np.ndarray
    """``[feature]``: metric of the run less metric with the feature ablated, in its unit."""
    gradient: np.ndarray
    """``[feature]``: the first-order estimate of the same."""
    activation: np.ndarray
    """``[feature]``: what was ablated."""
    features: tuple[int, ...]
    """Which entry of the site each of them is."""
    site: str
    layer: int
    position: int
    """Absolute."""
    tokens: tuple[str, ...]
    metric: str
    unit: str
    answer: str = ""

    def __post_init__(self) -> None:
        """Check that the tables fit together."""
        shape = (len(self.features),)
        if any(getattr(self, name).shape != shape for name in _TABLES):
            raise InputError("importance, gradient and activation must have one entry per feature")
        if not 0 <= self.position < len(self.tokens):
            raise InputError(f"position {self.position} is none of the {len(self.tokens)} tokens")

    def __repr__(self) -> str:
        where = f"{self.site} of layer {self.layer} at {self.tokens[self.position]!r}"
        size = f"{len(self.importance)} features, correlation {self.correlation:.3f}"
        return f"FeatureAttribution({where}, {self.metric} {self.answer!r}, {size})"

    @property
    def correlation(self) -> float:
        """Pearson correlation of exact and gradient importances; NaN where one is constant."""
        spread = np.ptp(self.importance) * np.ptp(self.gradient)
        if not spread or np.isnan(spread):
            return float("nan")
        return float(np.corrcoef(self.importance, self.gradient)[0, 1])

    def top(self, k: int = 10) -> list[tuple[int, float]]:
        """The ``k`` features with the largest importance in size, ``(feature, importance)``.

        Raises:
            InputError: ``k`` is below 1.
        """
        if k < 1:
            raise InputError(f"the number of features must be at least 1; came {k}")
        order = np.argsort(-np.abs(self.importance), kind="stable")[:k]
        return [(self.features[i], float(self.importance[i])) for i in order]

    def to_frame(self) -> pd.DataFrame:
        """One row per feature: ``feature, activation, importance, gradient``."""
        import pandas as pd

        return pd.DataFrame(
            {
                "feature": np.array(self.features),
                "activation": self.activation,
                "importance": self.importance,
                "gradient": self.gradient,
            }
        )

    def plot(self, **options: Any) -> Any:
        """The most important features, and exact against gradient. See `attribution_figures`."""
        from attribution_figures import plot_features

        return plot_features(self, **options)

    def save(self, path: str | Path) -> None:
        """Write everything into one safetensors file with a JSON header, atomically.

        Raises:
            RecordFileError: the file cannot be written.
        """
        header = {name: getattr(self, name) for name in _PLAIN}
        header |= {name: list(getattr(self, name)) for name in ("tokens", "features")}
        arrays = {name: torch.from_numpy(getattr(self, name).copy()) for name in _TABLES}
        write_arrays(Path(path), "safetensors", KIND, VERSION, header, arrays)

    @classmethod
    def load(cls, path: str | Path) -> FeatureAttribution:
        """Read what `save` wrote.

        Raises:
            RecordFileError: the file is not what `save` writes.
        """
        with open_arrays(Path(path), KIND, VERSION) as stored:
            header = dict(stored.content)
            header |= {name: tuple(header[name]) for name in ("tokens", "features")}
            tables: Any = {name: stored.read(name).numpy() for name in _TABLES}
            return built(cls, {**header, **tables})


_TABLES = ("importance", "gradient", "activation")
_PLAIN = ("site", "layer", "position", "metric", "unit", "answer")
"""How a result lies in a file."""


def attribute_features(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    prompt: Prompt,
    layer_name: Layer,
    position: int = -1,
    *,
    site: str = "resid_post",
    metric: Any = "logit",
    answer: Any = None,
    foil: Any = None,
    features: Sequence[int] | None = None,
    ablate_to: float | Tensor = 0.0,
) -> FeatureAttribution:
    """Ablate every feature of one token, each in a run of its own.

    Args:
        model: A causal language model, never changed.
        tokenizer: For a text.
        prompt: Text, a chat or token ids.
        layer_name: The block, in any spelling.
        position: Which token.
        site: ``resid_post`` (features are entries of the residual stream), ``mlp_neurons``, or any
            site that holds one vector per token.
        metric: See `logit_metrics`; what needs a second prompt cannot be used.
        answer: The token measured; None is the model's own best next token.
        foil: For ``logit_diff``.
        features: Which; None means all.
        ablate_to: What an ablated feature becomes: a number, or one for each, ``[feature]`` (a
            mean over other prompts).

    Returns:
        A `FeatureAttribution` over ``features``.

    Raises:
        InputError: the prompt, position, metric or a feature cannot be used, or the metric would
            not look at ``answer`` or ``foil``.
        LayerError: there is no such layer.
        SiteError: the layer has no such site, or the site has heads.
    """
    arch = Architecture(model)
    arch.require_head("feature attribution")
    where = Site(site, arch.resolve(layer_name))
    ids = encode(tokenizer, prompt)
    check_ids(ids, arch.config)
    width = _width(arch, where)
    if isinstance(metric, str) and metric in ("kl", "distance"):
        raise InputError(
            f"metric {metric!r} compares two prompts; use 'logit', 'log_prob' or 'prob'"
        )
    refuse_unused(metric, answer, foil)
    chosen = _features(features, width)
    place, *others = resolve_positions(position, len(ids))
    if others:
        raise InputError(f"features are those of one token; came position={position!r}")
    read = reads_of(metric)
    base = run_base(
        arch, torch.tensor([ids], device="cpu"), [where], range(len(ids)) if read is None else read,
        cached=abilities(arch).suffix,
    )  # fmt: skip
    made = make_metric(
        metric, base.logits, base.logits, answer=answer, foil=foil, tokenizer=tokenizer,
        config=arch.config,
    )  # fmt: skip
    activation = base.sites[where][0, place]
    target = _target(ablate_to, activation)
    importance = _exact(arch, base, where, place, target, chosen, made)
    slope = _gradient(arch, base, where, place, made)
    index = torch.tensor(chosen, device="cpu")
    estimate = ((activation - target) * slope).cpu().double()[index]
    return FeatureAttribution(
        importance=importance,
        gradient=estimate.numpy(),
        activation=activation.cpu().double()[index].numpy(),
        features=tuple(chosen),
        site=site,
        layer=where.layer,
        position=place,
        tokens=tuple(token_strings(tokenizer, ids)),
        metric=made.name,
        unit=made.unit,
        answer="" if made.answer is None else token_strings(tokenizer, [made.answer])[0],
    )


def _width(arch: Architecture, where: Site) -> int:
    """How many features a token has at a site."""
    shape = token_shape(arch, where)
    if len(shape) != 1:
        raise SiteError(f"{where.name} holds {shape} per token, not one vector; use patching_sweep")
    return shape[0]


def _target(ablate_to: float | Tensor, activation: Tensor) -> Tensor:
    """What each feature becomes, ``[feature]``."""
    target = torch.as_tensor(ablate_to, dtype=activation.dtype, device=activation.device)
    if target.dim() and target.shape != activation.shape:
        raise InputError(
            f"ablate_to is a number, or one for each feature, {list(activation.shape)}; "
            f"came {list(target.shape)}"
        )
    return target.expand_as(activation)


def _features(asked: Sequence[int] | None, count: int) -> list[int]:
    if asked is None:
        return list(range(count))
    try:
        chosen = as_ids(asked)
    except (InputError, TypeError):
        chosen = []
    if not chosen or not all(0 <= feature < count for feature in chosen):
        raise InputError(f"features are whole numbers 0..{count - 1}, at least one; came {asked!r}")
    return chosen


def _exact(
    arch: Architecture,
    base: BaseRun,
    where: Site,
    place: int,
    target: Tensor,
    features: Sequence[int],
    metric: Metric,
) -> np.ndarray:
    runs = [Run((Edit(where, target[i], place, neuron=i),)) for i in features]
    left = run_edited(arch, base, runs, lambda _runs, logits: metric(logits).cpu().double())
    return float(metric(base.logits)) - left.numpy()


def _gradient(arch: Architecture, base: BaseRun, where: Site, place: int, metric: Metric) -> Tensor:
    """Gradient of the metric with respect to one token's activation, ``[d]``, in its true size."""
    leaves: list[Tensor] = []
    scale = GradientScale(arch.model)

    def start_here(value: Tensor) -> Tensor:
        leaves[:] = [value.detach().clone().requires_grad_()]
        return leaves[0].clone()  # some models add to it in place

    with UndoStack() as stack:
        stack.enter_context(torch.enable_grad())
        evaluate(stack, arch.model)
        stack.enter_context(edit(arch, [(where, start_here)]))
        logits = arch.model(**base.inputs, use_cache=False).logits
        value = _in_graph(metric, scale.widen(logits[:, list(base.read)]))
        if value is None:
            return torch.full_like(leaves[0][0, place], torch.nan)
        (slope,) = torch.autograd.grad(value.sum(), leaves[0])
    return scale.undo(slope[:, place])[0].detach()


def _in_graph(metric: Metric, logits: Tensor) -> Tensor | None:
    """The metric as a tensor that has a gradient; None for one that leaves the graph."""
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Converting a tensor with requires_grad")
            value = metric(logits)
    except RuntimeError as err:
        if "requires grad" in str(err):  # what .numpy() says
            return None
        raise
    return value if value.requires_grad else None


def compute_feature_attribution(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    prompt: Prompt,
    layer_name: Layer,
    position: int = -1,
    n_features: int = 10,
    **options: Any,
) -> list[tuple[int, float]]:
    """The features of one token that matter most to the next token's logit.

    Args:
        model: A causal language model, never changed.
        tokenizer: For a text.
        prompt: Text, a chat or token ids.
        layer_name: The block, in any spelling.
        position: Which token.
        n_features: How many to return.
        **options: For `attribute_features` (``site="mlp_neurons"``, ``metric``, ``answer``, …).

    Returns:
        ``(feature, importance)``, the largest in size first; importance is what the metric (the
        logit of the model's best token) loses when that entry of the activation is set to 0.

    Raises:
        InputError: ``n_features`` is below 1, or an argument cannot be used.
    """
    if n_features < 1:
        raise InputError(f"n_features must be at least 1; came {n_features}")
    found = attribute_features(model, tokenizer, prompt, layer_name, position, **options)
    return found.top(n_features)
