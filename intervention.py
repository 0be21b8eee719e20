"""Interventions: patch activations, steer, trace. The calls of this module lead to all of them.

- `InterventionHandler`, `ActivationPatch`, `SteeringVector`: hold changes in force in a ``with``.
- `patch_and_run`, `generate_with_patching`: the same for one call.
- `activation_patch_experiment`, `path_patching`: one layer, or every layer, at one position.
- `patching_sweep`: every layer × position, head or neuron, in a fraction of the forward passes.
- `patch_paths`: from senders to receivers, everything else as it was.
- `CausalTracer`, `ablate`: what restoring or removing each component does.
- `compute_feature_attribution`: the neurons that a prediction stands on.
- `create_steering_vector`, `steer_generation`: directions from contrastive prompts.
- `zero`, `noise`, `mean_activation`, `activation_of`: what to put in an activation's place.

In every experiment on two prompts the *clean* run is edited here: the corrupted run's activation
goes into it, and an effect is how far that moves the clean run's answer towards the corrupted one.
`patching_sweep` does it in either direction.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ablation import ablate
from activation_extraction import ActivationExtractor, ActivationRecord
from causal_tracing import CausalTracer, trace_subject
from feature_attribution import attribute_features, compute_feature_attribution
from forward_pass import InputError, Site, evaluate
from generation import generate_text
from interrupts import UndoStack, no_grad
from intervention_handler import (
    ActivationPatch,
    InterventionHandler,
    SteeringVector,
    by_token,
    refuse_chunks,
)
from logit_metrics import Metric, make_metric
from model_architecture import Architecture, Layer
from pass_positions import Selection, check_spec
from patching_sweep import patching_sweep
from path_patching import patch_paths
from prompt_pairs import align_tokens
from steering import create_steering_vector, steer_generation
from tokenization import Prompt, check_ids, encode, resolve_positions

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = [
    "ActivationPatch",
    "CausalTracer",
    "InterventionHandler",
    "Metric",
    "SteeringVector",
    "ablate",
    "activation_of",
    "activation_patch_experiment",
    "attribute_features",
    "compute_feature_attribution",
    "create_steering_vector",
    "generate_with_patching",
    "make_metric",
    "mean_activation",
    "noise",
    "patch_and_run",
    "patch_paths",
    "patching_sweep",
    "path_patching",
    "steer_generation",
    "trace_subject",
    "zero",
]

Patches = ActivationPatch | SteeringVector | Sequence[ActivationPatch | SteeringVector]


# --- Values for a patch ---------------------------------------------------------------------------


def zero(activation: Tensor) -> Tensor:
    """A patch's value that ablates: zeros of the activation's shape."""
    return torch.zeros_like(activation)


class _Noise:
    """Adds Gaussian noise that a token keeps, whichever pass it is in."""

    def __init__(self, std: float, seed: int) -> None:
        self.std, self.seed = std, seed

    def __call__(self, activation: Tensor) -> Tensor:
        """Noise for ``[batch, position, …]``, the positions being the first ones."""
        rows, order = torch.meshgrid(
            torch.arange(activation.shape[0], device="cpu"),
            torch.arange(activation.shape[1], device="cpu"),
            indexing="ij",
        )
        return self.of_tokens(activation, Selection(rows, order, order))

    def of_tokens(self, activation: Tensor, chosen: Selection) -> Tensor:
        """Noise for the tokens that a patch selects."""
        drawn = torch.zeros(activation.shape, device="cpu")
        for place in chosen.order.unique().tolist():
            here = chosen.order == place
            rows = chosen.rows[here]
            generator = torch.Generator().manual_seed(hash((self.seed, place)) & (2**63 - 1))
            shape = (int(rows.max()) + 1, *activation.shape[2:])
            drawn[here] = torch.randn(shape, generator=generator, device="cpu")[rows]
        return activation + self.std * drawn.to(activation)


def noise(std: float, seed: int = 0) -> Callable[[Tensor], Tensor]:
    """A patch's value that adds Gaussian noise, with ``mode="replace"``.

    Args:
        std: Standard deviation, in the activation's unit.
        seed: Of the noise; the global random state is left alone. A token's noise depends on the
            seed, on its row and on which of the tokens meant it is, so that generation with and
            without a cache sees the same; another sample needs another seed.

    Returns:
        A function of an activation ``[batch, position, …]``.
    """
    return _Noise(std, seed)


def activation_of(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    prompt: Prompt,
    layer_name: Layer,
    site: str = "resid_post",
) -> ActivationRecord:
    """Another prompt's activations as a patch's value (resampling): all positions of one site.

    Args:
        model: The model.
        tokenizer: For a text.
        prompt: The other prompt.
        layer_name: The block that will be patched, in any spelling.
        site: The site that will be patched.

    Returns:
        A record; `ActivationPatch.value` takes it and picks the same position of it.
    """
    extractor = ActivationExtractor(model, tokenizer)
    return extractor.extract_activations(prompt, layer_indices=[layer_name], sites=(site,))


def mean_activation(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    prompts: Sequence[Prompt],
    layer_name: Layer,
    site: str = "resid_post",
    position: int | None = None,
) -> Tensor:
    """The mean activation over a set of prompts as a patch's value (mean ablation).

    Args:
        model: The model.
        tokenizer: For texts.
        prompts: Texts, chats or lists of token ids.
        layer_name: The block, in any spelling.
        site: A site with the same shape for every token (not ``attn_pattern``).
        position: The mean over this token of each prompt; None means over all tokens of all.

    Returns:
        One token's shape: ``[d_model]``, or ``[head, d_head]`` of a site with heads; float32 or
        better.

    Raises:
        InputError: a pattern is asked for, or there is no prompt.
    """
    if site == "attn_pattern":
        raise InputError("patterns of prompts with different lengths have no mean")
    if not len(prompts):
        raise InputError("prompts is empty: a mean needs at least one")
    extractor = ActivationExtractor(model, tokenizer)
    records = extractor.extract_batch_activations(
        prompts, layer_indices=[layer_name], sites=(site,), positions=position, show_progress=False
    )
    rows = torch.cat([record.at(site)[0] for record in records])
    return rows.to(torch.promote_types(rows.dtype, torch.float32)).mean(0)


# --- Running with patches -------------------------------------------------------------------------


def patch_and_run(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    prompt: Prompt,
    patches: Patches,
) -> Tensor:
    """Run one prompt with activations exchanged.

    Args:
        model: A causal language model, never changed.
        tokenizer: For a text.
        prompt: Text, a chat or token ids.
        patches: One or several, made in this order.

    Returns:
        The logits, ``[1, position, vocab]``.

    Raises:
        InputError: a position lies outside the prompt, or a value does not fit.
        LayerError: there is no such layer.
        SiteError: a layer has no such site, head or neuron.
    """
    ids = encode(tokenizer, prompt)
    check_ids(ids, Architecture(model).config)
    handler = _handler(model, tokenizer, patches)
    _check_positions(handler, len(ids))
    return _logits(handler, ids)


def _handler(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, patches: Patches
) -> InterventionHandler:
    handler = InterventionHandler(model, tokenizer)
    several = patches if isinstance(patches, Sequence) else [patches]
    for patch in several:
        if isinstance(patch, SteeringVector):
            handler.register_steering_vector(patch)
        else:
            handler.register_activation_patch(patch)
    if not handler.interventions:
        raise InputError("patches is empty: give at least one ActivationPatch")
    handler.architecture.require_head("patching")
    return handler


def _check_positions(handler: InterventionHandler, length: int) -> None:
    """Every position must lie in the prompt."""
    for bound in handler.interventions:
        spec = check_spec(bound.positions)
        if spec == "generated":
            raise InputError("nothing is generated here: position='generated' means no token")
        if not isinstance(spec, str | slice):
            resolve_positions(spec, length)


@no_grad()
def _logits(handler: InterventionHandler, ids: Sequence[int], patched: bool = True) -> Tensor:
    arch = handler.architecture
    with UndoStack() as stack:
        evaluate(stack, arch.model)
        if patched:
            stack.enter_context(handler)
        return arch.model(
            **arch.inputs(torch.tensor([list(ids)], device="cpu")), use_cache=False
        ).logits.clone()


def generate_with_patching(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    prompt: Prompt,
    patches: Patches,
    max_new_tokens: int = 50,
    **generation_kwargs: Any,
) -> str:
    """Continue a prompt with activations exchanged; the same text with and without a cache.

    Args:
        model: A causal language model, never changed.
        tokenizer: For a text.
        prompt: Text, a chat or token ids.
        patches: One or several. Positions are absolute: negative ones count from the end of the
            prompt, ``"generated"`` means every new token, None means all.
        max_new_tokens: How many tokens to add at most.
        **generation_kwargs: As in `generation.generate_text` (``temperature``, ``seed``, …).

    Returns:
        The prompt and its continuation.

    Raises:
        InputError: a value does not fit, or a patch never took effect.
    """
    config = Architecture(model).config
    check_ids(encode(tokenizer, prompt), config, extra=max_new_tokens)
    handler = _handler(model, tokenizer, patches)
    refuse_chunks(generation_kwargs)
    generation_kwargs.setdefault("disable_compile", True)  # compiled code would not run the hooks
    with handler:
        return generate_text(
            handler.architecture,
            tokenizer,
            prompt,
            max_new_tokens=max_new_tokens,
            **generation_kwargs,
        )


# --- Two prompts ----------------------------------------------------------------------------------


def activation_patch_experiment(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    clean_prompt: Prompt,
    corrupted_prompt: Prompt,
    layer_name: Layer,
    position: int = -1,
    site: str = "resid_post",
    metric: Any = "distance",
    answer: Any = None,
    foil: Any = None,
) -> dict[str, Any]:
    """Put one activation of the corrupted run into the clean run.

    Args:
        model: A causal language model, never changed.
        tokenizer: For texts.
        clean_prompt: The prompt that is edited.
        corrupted_prompt: The prompt that the activation comes from.
        layer_name: The block, in any spelling.
        position: A token of the clean prompt. Prompts of different length correspond from their
            end, so that only a negative position can be given.
        site: What is exchanged.
        metric: The effect; see `logit_metrics`. The default, ``"distance"``, is
            ‖clean − patched‖ / ‖clean − corrupted‖ of the last position's logits: 0 no effect, 1
            all of it.
        answer: See `logit_metrics.make_metric`.
        foil: See `logit_metrics.make_metric`.

    Returns:
        ``clean_logits``, ``corrupted_logits``, ``patched_logits`` (each ``[1, position, vocab]``),
        ``clean_prompt``, ``corrupted_prompt``, ``layer`` (its index), ``layer_name`` (in full),
        ``position`` (absolute, in the clean prompt), ``effect``, ``metric`` and ``site``.

    Raises:
        InputError: the prompts do not correspond at this position; both token lists are shown.
        LayerError: there is no such layer.
        SiteError: the layer has no such site.
    """
    arch = Architecture(model)
    layer = arch.resolve(layer_name)
    ids = [encode(tokenizer, prompt) for prompt in (clean_prompt, corrupted_prompt)]
    for each in ids:
        check_ids(each, arch.config)
    (place,) = resolve_positions(position, len(ids[0]))
    align_tokens(tokenizer, ids[0], ids[1], "end" if position < 0 else None)
    source = place if position >= 0 else place - len(ids[0]) + len(ids[1])
    if source < 0:
        raise InputError(f"position {position} has no counterpart among {len(ids[1])} tokens")
    record = activation_of(model, tokenizer, ids[1], layer, site)
    value = by_token(record.at(site), Site(site, layer))[0, source]
    handler = _handler(model, tokenizer, ActivationPatch(layer, place, value, site=site))
    clean = _logits(handler, ids[0], patched=False)
    corrupted = _logits(handler, ids[1], patched=False)
    patched = _logits(handler, ids[0])
    made = make_metric(
        metric, clean, corrupted, base=clean, answer=answer, foil=foil, tokenizer=tokenizer,
        config=arch.config,
    )  # fmt: skip
    return {
        "clean_logits": clean,
        "corrupted_logits": corrupted,
        "patched_logits": patched,
        "clean_prompt": clean_prompt,
        "corrupted_prompt": corrupted_prompt,
        "layer": layer,
        "layer_name": arch.layer_names[layer],
        "position": place,
        "effect": float(made(patched)),
        "metric": made.name,
        "site": site,
    }


def path_patching(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    clean_prompt: Any,
    corrupted_prompt: Any,
    layers_to_test: Sequence[Layer] | None = None,
    metric: Any = "distance",
    **options: Any,
) -> dict[int, float]:
    """How far each layer's last position carries the difference between two prompts.

    The corrupted run's ``resid_post`` at the last position goes into the clean run, one layer at a
    time; prompts of different length correspond at their last token. This is a thin call of
    `patching_sweep`; for paths between components see `path_patching.patch_paths`.

    Args:
        model: A causal language model, never changed.
        tokenizer: For texts.
        clean_prompt: The prompt that is edited (or a list of them: the mean effect).
        corrupted_prompt: The prompt that activations come from.
        layers_to_test: Blocks in any spelling; None means all.
        metric: ``"distance"`` is ‖clean − patched‖ / ‖clean − corrupted‖ of the last position's
            logits: 0 no effect, 1 all of it; the last layer is exactly 1. Any other of
            `logit_metrics` gives its value in the patched run.
        **options: For `patching_sweep` (``answer``, ``foil``, ``normalize``, …).

    Returns:
        ``{layer index: effect}``, in order of layers.

    Raises:
        InputError: the prompts or the metric cannot be used.
        LayerError: there is no such layer.
    """
    chosen: dict[str, Any] = {
        "axes": ("layer",),
        "positions": "last",
        "direction": "noising",
        "align": "end",
        "site": "resid_post",
        "show_progress": False,
    }
    result = patching_sweep(
        model, tokenizer, clean_prompt, corrupted_prompt, layers=layers_to_test, metric=metric,
        **(chosen | options),
    )  # fmt: skip
    return dict(sorted(result.layer_effects().items()))
