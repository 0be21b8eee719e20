"""Every long call of the toolkit, in small: what is interrupted, starved, threaded and sharded.

CALLS        name -> function of a model (with a head), which gives tensors, arrays or text
WEIGHTS      those among them that read the model's weights, not its activations
same(a, b)   compare two results of one call
"""

import torch

import families
from ablation import ablate
from activation_extraction import ActivationExtractor
from attention_analysis import batch_attention_patterns, head_summary
from causal_tracing import CausalTracer, trace_subject
from concept_eraser import check_erasure
from direction_finding import find_directions
from embedding_geometry import measure_geometry
from feature_attribution import attribute_features
from generation import generate
from head_circuits import copying_scores
from head_writing import head_writes, value_weighted_patterns
from intervention import activation_patch_experiment, path_patching
from lens_reports import analyze_generation_token
from linear_probes import train_probes
from logit_lens import LogitLens
from model_architecture import Architecture
from model_comparison import compare_models
from patching_sweep import patching_sweep
from path_patching import patch_paths
from similarity import layer_similarity, prompt_similarity
from steering import generate_with_steering
from steering_sweep import steering_sweep
from tuned_lens import TunedLens

CLEAN, CORRUPTED = [5, 9, 12, 7, 20], [5, 10, 12, 7, 20]
ROWS = [families.token_ids(1, n, seed=n)[0].tolist() for n in (3, 5, 4)]
LABELLED = [families.token_ids(1, 4, seed=n)[0].tolist() for n in range(12)]
LABELS = [n / 3 for n in range(12)]
QUIET = {"show_progress": False}
TOKENS = {"answer": 20, "foil": 30, **QUIET}
MANY_SITES = ("resid_post", "query", "head_out", "mlp_out")


def _extract(model):
    extractor, some = ActivationExtractor(model), {"batch_size": 1, "sites": MANY_SITES}
    records = extractor.extract_batch_activations(ROWS, include_attention=True, **QUIET, **some)
    return [t for record in records for *_, t in record.tensors()]


def _generate(model):
    return generate(Architecture(model), None, CLEAN, max_new_tokens=3, temperature=1.0, seed=3)


def _record_generation(model):
    text, record = generate(Architecture(model), None, CLEAN, True, max_new_tokens=3)
    return [text, *(t for *_, t in record.tensors())]


def _steer(model):
    return generate_with_steering(model, None, CLEAN, [[5, 9]], [[6, 8]], 1, max_new_tokens=3)


def _steering_sweep(model):
    options = {"n_samples": 2, "max_new_tokens": 2, "score": len, **QUIET}
    return steering_sweep(model, None, [CLEAN], [[5, 9]], [[6, 8]], [1], [1.0], **options).nats


def _directions(model):
    found = find_directions(model, None, ROWS, ROWS[::-1][:2], batch_size=1)
    return [direction.vector for direction in found.values()]


def _tuned(model):
    lens = TunedLens(steps=3, context=4, batch_size=1)
    return lens.fit(Architecture(model), None, ROWS, show_progress=False).weight_


def _lens(model):
    found = LogitLens(model).run(CLEAN, 2)
    return [found.top_logits, found.top_ids.astype(float)]


def _analyze(model):
    found = analyze_generation_token(LogitLens(model), CLEAN, token_position=5, max_new_tokens=2)
    return found["generated_text"]


def _patch(model):
    found = activation_patch_experiment(model, None, CLEAN, CORRUPTED, 1)
    return [found["clean_logits"], found["corrupted_logits"], found["patched_logits"]]


def _sweep(site):
    return lambda m: patching_sweep(m, None, CLEAN, CORRUPTED, site, **TOKENS).values


def _probes(model):
    return train_probes(model, None, LABELLED, LABELS, folds=3, controls=1, batch_size=5).scores


def _erasure(model):
    found = check_erasure(model, None, LABELLED, LABELS, 1, folds=3, shrinkage=0.5, batch_size=5)
    return [torch.tensor([found.kl, found.agreement])]


def _patterns(model):
    found = batch_attention_patterns(model, None, ROWS, batch_size=2, **QUIET)
    return [pattern for each in found for pattern in each.patterns]


def _numbers(result):
    return result.to_frame().select_dtypes("number").to_numpy(copy=True)


CALLS = {
    "extraction": _extract,
    "generation": _generate,
    "recorded generation": _record_generation,
    "steering": _steer,
    "steering sweep": _steering_sweep,
    "directions": _directions,
    "sweep": _sweep("head_out"),
    "pattern sweep": _sweep("query"),
    "paths": lambda m: patch_paths(m, None, CLEAN, CORRUPTED, **TOKENS).values,
    "blocks' paths": lambda m: list(path_patching(m, None, CLEAN, CORRUPTED).values()),
    "patch": _patch,
    "trace": lambda m: trace_subject(m, None, CLEAN, 1, answer=20, samples=2, **QUIET).values,
    "traced heads": lambda m: CausalTracer(m, None).trace_attention_heads(CLEAN, CORRUPTED),
    "ablation": lambda m: (
        ablate(m, None, ROWS, "all", "mean", metric="log_prob", answer=20, **QUIET).values
    ),
    "features": lambda m: attribute_features(m, None, CLEAN, 1, answer=20).importance,
    "lens": _lens,
    "generated token": _analyze,
    "tuned lens": _tuned,
    "attention patterns": _patterns,
    "head summary": lambda m: head_summary(m, None, ROWS, batch_size=2, **QUIET).values,
    "probes": _probes,
    "erasure": _erasure,
    "similar layers": lambda m: layer_similarity(m, None, LABELLED, batch_size=5).values,
    "similar prompts": lambda m: prompt_similarity(m, None, ROWS, 1, batch_size=2).values,
    "geometry": lambda m: _numbers(measure_geometry(m, None, ROWS, batch_size=2)),
    "comparison": lambda m: _numbers(compare_models(m, None, m, ROWS, weights=False)),
    "head writes": lambda m: head_writes(Architecture(m), None, CLEAN, [20, 30]).values,
    "weighted patterns": lambda m: value_weighted_patterns(Architecture(m), None, CLEAN).lengths,
    "copying": lambda m: copying_scores(Architecture(m)).values,
}

WEIGHTS = {"head writes", "weighted patterns", "copying"}


def same(found, expected, **rounding):
    if isinstance(expected, list):
        assert len(found) == len(expected)
        for one, other in zip(found, expected, strict=True):
            same(one, other, **rounding)
    elif isinstance(expected, str):
        assert found == expected
    else:
        found, expected = torch.as_tensor(found), torch.as_tensor(expected)
        torch.testing.assert_close(found, expected, equal_nan=True, **rounding)
