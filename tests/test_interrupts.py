"""Ctrl-C, or any error, in the k-th forward pass of every long call: the model is as it was."""

import functools

import pytest
import torch

import families
from ablation import ablate
from activation_extraction import ActivationExtractor
from causal_tracing import trace_subject
from direction_finding import find_directions
from feature_attribution import attribute_features
from generation import generate
from lens_reports import analyze_generation_token
from logit_lens import LogitLens
from model_architecture import Architecture
from patch_oracle import assert_untouched, state_of
from patching_sweep import patching_sweep
from path_patching import patch_paths
from steering import generate_with_steering
from steering_sweep import steering_sweep
from tuned_lens import TunedLens

CLEAN, CORRUPTED = [5, 9, 12, 7, 20], [5, 10, 12, 7, 20]
ROWS = [families.token_ids(1, n, seed=n)[0].tolist() for n in (3, 5, 4)]
TOKENS = {"answer": 20, "foil": 30, "show_progress": False}
QUIET = {"show_progress": False}
FAMILIES = ("gpt2", "llama", "bloom", "gptj")
"""By the ways to attention: the registry, the registry with grouped keys, and products by hand."""

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
    return LogitLens(model).run(CLEAN, 2).top_logits


def _analyze(model):
    found = analyze_generation_token(LogitLens(model), CLEAN, token_position=5, max_new_tokens=2)
    return found["generated_text"]


CALLS = {
    "extraction": _extract,
    "generation": _generate,
    "recorded generation": _record_generation,
    "steering": _steer,
    "steering sweep": _steering_sweep,
    "directions": _directions,
    "sweep": lambda m: patching_sweep(m, None, CLEAN, CORRUPTED, "head_out", **TOKENS).values,
    "pattern sweep": lambda m: patching_sweep(m, None, CLEAN, CORRUPTED, "query", **TOKENS).values,
    "paths": lambda m: patch_paths(m, None, CLEAN, CORRUPTED, **TOKENS).values,
    "trace": lambda m: trace_subject(m, None, CLEAN, 1, answer=20, samples=2, **QUIET).values,
    "ablation": lambda m: (
        ablate(m, None, ROWS, "all", "mean", metric="log_prob", answer=20, **QUIET).values
    ),
    "features": lambda m: attribute_features(m, None, CLEAN, 1, answer=20).importance,
    "lens": _lens,
    "generated token": _analyze,
    "tuned lens": _tuned,
}


@functools.cache
def built(name):
    return families.build(name)


def same(found, expected):
    if isinstance(expected, list):
        assert len(found) == len(expected)
        for one, other in zip(found, expected, strict=True):
            same(one, other)
    elif isinstance(expected, str):
        assert found == expected
    else:
        torch.testing.assert_close(torch.as_tensor(found), torch.as_tensor(expected))


def process_state():
    """What is not the model's, and an interrupted call could leave changed."""
    from transformers.modeling_utils import AttentionInterface

    return (
        AttentionInterface.__dict__.get("get_interface"),
        torch._C._len_torch_function_stack(),
        torch.is_grad_enabled(),
        torch.random.get_rng_state().tolist(),
    )


class Interrupts:
    """Counts the calls of a model's blocks, and raises in one of them."""

    def __init__(self, monkeypatch, model):
        self.count, self.at, self.error = 0, None, None
        kinds = {type(block) for block in Architecture(model).blocks}
        for kind in kinds:
            monkeypatch.setattr(kind, "forward", self.counting(kind.forward))

    def counting(self, forward):
        @functools.wraps(forward)
        def counted(*args, **kwargs):
            self.count += 1
            if self.count == self.at:
                raise self.error
            return forward(*args, **kwargs)

        return counted

    def arm(self, at, error):
        self.count, self.at, self.error = 0, at, error


def spread(count, few):
    """The first calls, the last, and some in between."""
    return sorted({1, 2, count - 1, count, *range(1, count, max(count // few, 1))} - {0})


def check_call(monkeypatch, name, call, few):
    model = built(name)
    call(model)  # what is found out once per model is known now
    interrupts = Interrupts(monkeypatch, model)
    interrupts.arm(None, None)
    expected = call(model)
    count = interrupts.count
    assert count >= 3, "the call runs blocks"
    before, process = state_of(model), process_state()
    for error in (KeyboardInterrupt, RuntimeError("some other error")):
        for at in spread(count, few):
            interrupts.arm(at, error)
            with pytest.raises(type(error) if isinstance(error, Exception) else error):
                call(model)
            assert interrupts.count == at
            assert_untouched(model, before)
            assert process_state() == process
    interrupts.arm(None, None)
    same(call(model), expected)


@pytest.mark.parametrize("call", CALLS)
def test_a_call_that_is_interrupted_leaves_nothing(monkeypatch, call):
    check_call(monkeypatch, "gpt2", CALLS[call], 6)


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("call", CALLS)
def test_interrupted_anywhere_in_every_family(monkeypatch, call, name):
    check_call(monkeypatch, name, CALLS[call], 25)


@pytest.mark.parametrize("call", ["sweep", "pattern sweep", "paths", "features", "extraction"])
def test_the_first_call_on_a_model_can_be_interrupted(monkeypatch, call):
    """While it is still being found out what the model allows: nothing half known stays."""
    expected = CALLS[call](families.build("gpt2"))
    for at in (1, 2, 5, 9, 14, 20):
        model = families.build("gpt2")
        before, process = state_of(model), process_state()
        with monkeypatch.context() as patch:
            interrupts = Interrupts(patch, model)
            interrupts.arm(at, KeyboardInterrupt)
            try:
                CALLS[call](model)
            except KeyboardInterrupt:
                assert interrupts.count == at
        assert_untouched(model, before)
        assert process_state() == process
        same(CALLS[call](model), expected)
