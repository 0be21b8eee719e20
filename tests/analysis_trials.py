"""Every analysis of a `ModelAnalyzer` in small, to be tried on another device than the CPU.

QUICK, MORE             name -> function of an analyzer
difference(one, other)  between two results of one, in units of the largest value
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from activation_statistics import compare_activations, get_activation_statistics
from intervention import ActivationPatch, CausalTracer
from tuned_lens import TunedLens

P, Q = "the cat sat on the mat", "the mat sat on the cat"
POSITIVE = ["the cat sat", "a cat is on", "the mat and", "on the cat"]
NEGATIVE = ["is a b", "the and on mat", "cat mat", "on and on"]


def _patches(analyzer: Any) -> list[ActivationPatch]:
    value = torch.full((analyzer.architecture.d_model,), 0.5)
    return [ActivationPatch(1, -1, value, mode="add")]


def _every_site(analyzer: Any) -> Any:
    names = tuple(analyzer.architecture.available_sites(1))
    return analyzer.extract_activations(P, return_logits=True, sites=names).layer_activations


def _tuned(analyzer: Any) -> Any:
    lens = TunedLens(steps=1, context=8)
    return lens.fit(analyzer.architecture, analyzer.tokenizer, [P * 3], show_progress=False).bias_


QUICK: dict[str, Callable[[Any], Any]] = {
    "check": lambda a: a.check().raise_if_failed() or True,
    "generate, recorded": lambda a: a.generate(P, 3, return_activations=True)[1].layer_activations,
    "extract": _every_site,
    "extract a batch": lambda a: [
        each.layer_activations
        for each in a.extract_batch_activations([P, "the"], show_progress=False)
    ],
    "lens": lambda a: a.logit_lens(P),
    "lens metrics": lambda a: a.lens.get_convergence_metrics(P),
    "attention": lambda a: a.attention_patterns(P),
    "sweep": lambda a: a.patching_sweep(P, Q),
    "sweep of heads": lambda a: a.patching_sweep(P, Q, "head_out", metric="kl"),
    "patches": lambda a: a.patch_and_run(P, _patches(a)),
    "steering": lambda a: a.generate_with_steering(P, POSITIVE, NEGATIVE, max_new_tokens=3),
    "head weights": lambda a: a.head_weights(1, fold_norm=True),
    "ablation": lambda a: a.ablate([P, Q], method="mean"),
    "feature attribution": lambda a: a.compute_feature_attribution(P, 1),
}

MORE: dict[str, Callable[[Any], Any]] = {
    "generate, sampled": lambda a: a.generate(P, 3, temperature=1.0, top_k=1, seed=0),
    "statistics": lambda a: get_activation_statistics(a.extract_activations(P), 1),
    "compare": lambda a: compare_activations(a.extract_activations(P), a.extract_activations(Q), 1),
    "memory": lambda a: a.estimate_memory([P, Q]) is not None,
    "lens of a record": lambda a: a.logit_lens_on_activation(a.extract_activations(P)),
    "lens predictions": lambda a: a.lens.get_layer_predictions(P),
    "lens of the input": lambda a: a.lens.compare_to_input(P),
    "lens of generation": lambda a: a.analyze_generation_token(P, max_new_tokens=2),
    "attention of a batch": lambda a: a.batch_attention_patterns([P, "the"], show_progress=False),
    "head summary": lambda a: a.head_summary(),
    "copying": lambda a: a.copying_scores(),
    "copying by query and key": lambda a: a.copying_scores(circuit="qk"),
    "composition": lambda a: a.composition_scores(),
    "circuit tokens": lambda a: a.circuit_tokens("1.2"),
    "head directions": lambda a: a.head_directions("1.2"),
    "value-weighted patterns": lambda a: a.value_weighted_patterns(P),
    "head writes": lambda a: a.head_writes(P),
    "generate with patches": lambda a: a.generate_with_patching(P, _patches(a), max_new_tokens=3),
    "logit attribution": lambda a: a.logit_attribution(P),
    "attribution patching": lambda a: a.attribution_patching(P, Q, exact=True, show_progress=False),
    "layer attribution": lambda a: a.layer_attribution(P, n_steps=4),
    **{
        f"tokens by {method}": lambda a, method=method: a.attribute_tokens(P, method)
        for method in ("saliency", "gradient_x_input", "integrated_gradients", "smoothgrad",
                       "occlusion", "attention_rollout", "gradient_attention")
    },
    "patch experiment": lambda a: a.activation_patch_experiment(P, Q, 1),
    "path patching": lambda a: a.path_patching(P, Q),
    "sweep of differences": lambda a: a.patching_sweep(P, Q, answer=40, foil=12),
    "paths": lambda a: a.patch_paths(P, Q),
    "trace": lambda a: a.trace_subject(P, "cat").values,
    "trace heads": lambda a: CausalTracer(a.model, a.tokenizer).trace_attention_heads(P, Q),
    "direction": lambda a: a.find_direction(POSITIVE, NEGATIVE, 1, method="pca"),
    "steering sweep": lambda a: a.steering_sweep(
        [P], POSITIVE, NEGATIVE, [1], (0.0, 2.0), score=len, n_samples=2, max_new_tokens=3,
        temperature=0.0,
    ),
    "erasure": lambda a: a.erase_concept(POSITIVE * 3 + NEGATIVE * 3, [1] * 12 + [0] * 12, 1),
    "similarity of layers": lambda a: a.layer_similarity([P, Q]),
    "similarity of prompts": lambda a: a.prompt_similarity([P, Q], 1),
    "nearest tokens": lambda a: a.nearest_tokens(torch.ones(a.architecture.d_model)),
    "token neighbours": lambda a: a.token_neighbors(" cat"),
    "geometry": lambda a: a.measure_geometry([P, Q]),
    "compare models": lambda a: a.compare_models(a.model, [P, Q]),
    "tuned lens": _tuned,
    "weights": lambda a: a.get_weights_by_layer(1),
}  # fmt: skip


def difference(one: Any, other: Any) -> float:
    """Largest difference, relative to each array's largest value; infinite where words differ."""
    if isinstance(one, torch.Tensor):
        one, other = one.detach().cpu().numpy(), other.detach().cpu().numpy()
    if isinstance(one, np.ndarray) and one.dtype.kind in "fc":
        if one.shape != other.shape or (np.isnan(one) != np.isnan(other)).any():
            return float("inf")
        scale = np.nanmax(np.abs(one), initial=1e-30)
        return float(np.nanmax(np.abs(one - other), initial=0.0) / scale)
    if isinstance(one, np.ndarray):
        return 0.0 if np.array_equal(one, other) else float("inf")
    if isinstance(one, float):
        return 0.0 if one == other or one != one else abs(one - other) / max(abs(one), 1e-2)
    if isinstance(one, dict):
        pairs = [(one[key], other[key]) for key in one]
    elif dataclasses.is_dataclass(one):
        names = (field.name for field in dataclasses.fields(one))
        pairs = [(getattr(one, name), getattr(other, name)) for name in names]
    elif isinstance(one, list | tuple):
        pairs = list(zip(one, other, strict=True))
    else:
        return 0.0 if not isinstance(one, str | int) or one == other else float("inf")
    return max((difference(*pair) for pair in pairs), default=0.0)
