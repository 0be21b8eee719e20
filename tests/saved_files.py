"""One small file of every kind that the toolkit reads, and who reads it.

SAVED            name -> Saved: makes the object, writes and reads it
data_of(name)    the bytes of such a file, made once
damaged(data, rng)  one way to damage a file
read_after_damage(found, path)  whether a damaged file of a result is ever read wrong
"""

import dataclasses
import functools
import random
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import families
from ablation import ablate
from activation_extraction import ActivationExtractor
from array_formats import FORMATS
from attention_analysis import attention_patterns, head_summary
from attention_result import AttentionPatterns, HeadSummary
from causal_tracing import trace_subject
from comparison_result import ModelComparison
from concept_eraser import ConceptEraser, ErasureResult, check_erasure, erase_concept
from control_vectors import export_gguf, import_gguf
from direct_attribution import logit_attribution
from embedding_geometry import GeometryResult, NearestTokens, measure_geometry, nearest_tokens
from feature_attribution import FeatureAttribution, attribute_features
from forward_pass import RecordFileError
from gradient_attribution import attribute_tokens
from head_circuit_result import CircuitTokens, CompositionScores, HeadDirections, HeadScores
from head_circuits import circuit_tokens, composition_scores, copying_scores, head_directions
from head_weights import HeadWeights, head_weights
from head_writing import head_writes, value_weighted_patterns
from head_writing_result import HeadWrites, WeightedPatterns
from layer_attribution import layer_attribution
from layer_attribution_result import LayerAttribution
from lens_result import LensResult
from linear_probes import train_probes
from logit_attribution import LogitAttribution
from logit_lens import LogitLens
from model_architecture import Architecture
from model_comparison import compare_models
from node_effects import AblationEffects, PathEffects
from patching_sweep import patching_sweep
from path_patching import patch_paths
from probe_result import ProbeResult
from record_files import load_activations, save_activations
from similarity import SimilarityResult, prompt_similarity
from steering_direction import Direction, load_directions, save_directions
from steering_effects import SteeringSweep
from steering_sweep import sweep_directions
from sweep_result import SweepResult
from token_attribution import TokenAttribution
from trace_result import CausalTrace
from tuned_lens import TunedLens

CLEAN, CORRUPTED = [5, 9, 12, 7], [5, 10, 12, 7]
ROWS = [[5, 9, n] for n in range(12, 20)]
LABELS = [n / 4 for n in range(8)]
QUIET = {"show_progress": False}


@dataclasses.dataclass(frozen=True)
class Saved:
    """A kind of file."""

    make: Callable[[], Any]
    save: Callable[[Any, Path], object]
    load: Callable[[Path], Any]


@functools.cache
def model():
    return families.build("gpt2")


def _architecture():
    return Architecture(model())


@functools.cache
def _records():
    extractor = ActivationExtractor(model(), families.tiny_tokenizer())
    texts = ["a cat sat", "the mat"]
    options = {"layer_indices": [0, 2], "include_attention": True, "return_logits": True}
    records = extractor.extract_batch_activations(texts, show_progress=False, **options)
    records[0].metadata |= {"tuple": (1, 2), "nan": float("nan"), "bytes": b"\x00\xff"}
    return records


def _direction(layer=1):
    return Direction(
        torch.linspace(-1, 1, families.HIDDEN), layer, label="a \u2028 b", model="gpt2"
    )


def _steering():
    texts = {"score": len, "n_samples": 2, "max_new_tokens": 2, "show_progress": False}
    return sweep_directions(model(), None, [CLEAN], _direction(), [1.0], **texts)


def _options(**more):
    return {"answer": 20, "foil": 30, "show_progress": False, **more}


def _by_save(make, kind):
    return Saved(make, lambda found, path: found.save(path), kind.load)


def _of_records(single, format):
    return Saved(
        lambda: _records()[0] if single else _records(),
        lambda found, path: save_activations(found, path, format),
        load_activations,
    )


SAVED = {
    **{f"record.{f}": _of_records(True, f) for f in FORMATS},
    **{f"records.{f}": _of_records(False, f) for f in FORMATS},
    "lens": _by_save(
        lambda: LogitLens(model(), tokenizer=families.tiny_tokenizer()).run("a cat sat", 2),
        LensResult,
    ),
    "tuned lens": _by_save(
        lambda: TunedLens(steps=1, context=4).fit(
            LogitLens(model()).architecture, None, [CLEAN], show_progress=False
        ),
        TunedLens,
    ),
    "sweep": _by_save(
        lambda: patching_sweep(model(), None, CLEAN, CORRUPTED, **_options()), SweepResult
    ),
    "trace": _by_save(
        lambda: trace_subject(model(), None, CLEAN, 1, answer=20, samples=2, show_progress=False),
        CausalTrace,
    ),
    "ablation": _by_save(
        lambda: ablate(
            model(), None, CLEAN, "all", "zero", metric="log_prob", answer=20, show_progress=False
        ),
        AblationEffects,
    ),
    "paths": _by_save(
        lambda: patch_paths(model(), None, CLEAN, CORRUPTED, **_options()), PathEffects
    ),
    "features": _by_save(
        lambda: attribute_features(model(), None, CLEAN, 1, answer=20), FeatureAttribution
    ),
    "steering": _by_save(_steering, SteeringSweep),
    "head summary": _by_save(lambda: head_summary(model(), None, ROWS, **QUIET), HeadSummary),
    "patterns": _by_save(lambda: attention_patterns(model(), None, CLEAN, 1), AttentionPatterns),
    "probes": _by_save(
        lambda: train_probes(model(), None, ROWS, LABELS, folds=2, controls=1), ProbeResult
    ),
    "eraser": _by_save(lambda: erase_concept(model(), None, ROWS, LABELS, 1), ConceptEraser),
    "erasure": _by_save(
        lambda: check_erasure(model(), None, ROWS, LABELS, 2, folds=2), ErasureResult
    ),
    "similarity": _by_save(lambda: prompt_similarity(model(), None, ROWS[:3], 1), SimilarityResult),
    "geometry": _by_save(lambda: measure_geometry(model(), None, ROWS), GeometryResult),
    "nearest": _by_save(lambda: nearest_tokens(model(), None, torch.ones(32), 3), NearestTokens),
    "comparison": _by_save(
        lambda: compare_models(model(), None, model(), ROWS[:3]), ModelComparison
    ),
    "head weights": _by_save(lambda: head_weights(_architecture(), 1), HeadWeights),
    "head scores": _by_save(lambda: copying_scores(_architecture()), HeadScores),
    "composition": _by_save(lambda: composition_scores(_architecture()), CompositionScores),
    "circuit": _by_save(
        lambda: circuit_tokens(_architecture(), None, (1, 2), [5, 6]), CircuitTokens
    ),
    "head directions": _by_save(
        lambda: head_directions(_architecture(), None, (1, 2), directions=2, k=3), HeadDirections
    ),
    "weighted patterns": _by_save(
        lambda: value_weighted_patterns(_architecture(), None, CLEAN, [1]), WeightedPatterns
    ),
    "head writes": _by_save(
        lambda: head_writes(_architecture(), None, CLEAN, [20], k=2), HeadWrites
    ),
    "logit parts": _by_save(
        lambda: logit_attribution(_architecture(), None, CLEAN, 20, 30), LogitAttribution
    ),
    "token attribution": _by_save(
        lambda: attribute_tokens(model(), None, CLEAN, "input_x_gradient", 20), TokenAttribution
    ),
    "layer attribution": _by_save(
        lambda: layer_attribution(model(), None, CLEAN, n_steps=30, answer=20, **QUIET),
        LayerAttribution,
    ),
    "direction": _by_save(_direction, Direction),
    "directions": Saved(
        lambda: {n: _direction(n) for n in (0, 2)}, save_directions, load_directions
    ),
}
"""Every kind with checksums. `GGUF` has none of its own, and needs a package."""

GGUF = Saved(_direction, export_gguf, import_gguf)


def bytes_of(saved, found):
    """What a kind writes of an object."""
    with tempfile.TemporaryDirectory() as folder:
        saved.save(found, Path(folder) / "x")
        return (Path(folder) / "x").read_bytes()


@functools.cache
def data_of(name):
    return bytes_of(SAVED[name], SAVED[name].make())


def damaged(data, rng):
    """One way to damage a file: cut, flip, overwrite, delete, insert, repeat, exchange."""
    data = bytearray(data)
    at, length = rng.randrange(len(data)), rng.choice([1, 4, 8, 40, 300])
    kind = rng.randrange(8)
    if kind == 0:
        del data[at:]
    elif kind == 1:
        data[at] ^= 1 << rng.randrange(8)
    elif kind == 2:
        data[at] = rng.randrange(256)
    elif kind == 3:
        del data[at : at + length]
    elif kind == 4:
        data[at:at] = rng.randbytes(length)
    elif kind == 5:
        data[at : at + 8] = rng.choice([bytes(8), b"\xff" * 8, (2**31).to_bytes(8, "little")])
    elif kind == 6:
        data[at:at] = data[at : at + length]
    else:
        other = rng.randrange(len(data))
        part, twin = data[at : at + length], data[other : other + length]
        data[at : at + length], data[other : other + length] = twin, part
    return bytes(data)


def read_after_damage(found, path, count=40):
    """Damage a result's file again and again: it is refused, or what is read is what was saved.

    Returns:
        How often it was refused.
    """
    found.save(path)
    data, rng, refused = path.read_bytes(), random.Random(0), 0
    for _ in range(count):
        path.write_bytes(damaged(data, rng))
        try:
            again = type(found).load(path)
        except RecordFileError:
            refused += 1
            continue
        again.save(path)
        assert path.read_bytes() == data
    return refused
