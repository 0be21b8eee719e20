"""Whatever a user types: an answer, or an error of the toolkit's own that says what to type."""

import functools
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import families
from continuations import sample_continuations
from extraction_request import make_request
from forward_pass import SITES, ArchitectureError, InputError, LayerError, SiteError
from intervention import (
    ActivationPatch,
    CausalTracer,
    compute_feature_attribution,
    steer_generation,
)
from model_analyzer import ModelAnalyzer
from model_architecture import Architecture, resolve_layer
from patch_oracle import assert_untouched, state_of
from tokenization import check_ids, encode, resolve_positions, token_id, token_strings
from tuned_lens import TunedLens

OWN = (InputError, LayerError, SiteError, ArchitectureError)
NAMES = [f"transformer.h.{i}" for i in range(12)]
QUIET = {"show_progress": False}


@functools.cache
def analyzer(name="gpt2"):
    return ModelAnalyzer(families.build(name), tokenizer=families.tiny_tokenizer())


def answer(call, *args, **kwargs):
    """What a call gives, or None where it refuses in words; any other error passes."""
    try:
        return call(*args, **kwargs)
    except OWN as error:
        assert len(str(error)) > 10, error
        return None


# --- Layers ---------------------------------------------------------------------------------------

ANY = st.one_of(
    st.none(), st.booleans(), st.floats(), st.binary(max_size=3), st.complex_numbers(),
    st.tuples(st.integers()), st.lists(st.integers(), max_size=2), st.builds(object),
    st.dictionaries(st.text(max_size=2), st.integers(), max_size=1),
)  # fmt: skip
SURROGATES = st.text(st.characters(), max_size=8)
LAYERS = st.one_of(
    st.integers(-15, 15),
    st.integers(),
    st.integers(-15, 15).map(str),
    st.sampled_from(NAMES),
    st.builds(
        lambda a, i, b: f"{a}{i}{b}",
        st.sampled_from(["", " ", "h.", ".h.", "transformer.h.", "model.layers.", "blocks.", "+"]),
        st.integers(-15, 15),
        st.sampled_from(["", " ", ".", ".mlp", "\n", "\u2028"]),
    ),
    st.integers(-15, 15).map(np.int64),
    st.integers(-15, 15).map(torch.tensor),
    SURROGATES,
    st.text("0123456789²٣५-+_ .", max_size=6),
    ANY,
)


@settings(max_examples=1500)
@given(LAYERS)
def test_any_spelling_of_a_layer(layer):
    index = answer(resolve_layer, layer, NAMES)
    assert index is None or index in range(12)
    if isinstance(layer, str) and index is not None and not layer.strip().lstrip("+-").isdigit():
        assert NAMES[index].endswith(layer.strip())
    if type(layer) is int:
        assert index == (layer % 12 if -12 <= layer < 12 else None)


@settings(max_examples=300)
@given(
    st.one_of(st.none(), LAYERS, st.lists(LAYERS, max_size=3)),
    st.one_of(st.none(), LAYERS, st.lists(LAYERS, max_size=3)),
    st.lists(st.one_of(st.sampled_from(list(SITES)), st.text(max_size=3)), max_size=3),
)
def test_any_request(names, indices, sites):
    request = answer(make_request, analyzer().architecture, names, indices, sites=sites)
    if request is not None:
        assert request.sites
        assert {site.layer for site in request.sites} <= {0, 1, 2}


# --- Positions ------------------------------------------------------------------------------------

INDEX = st.integers(-12, 12)
POSITIONS = st.one_of(
    INDEX,
    st.integers(),
    st.lists(INDEX, max_size=5),
    st.builds(slice, st.none() | INDEX, st.none() | INDEX, st.none() | st.sampled_from([-2, 1, 3])),
    st.lists(INDEX, max_size=4).map(lambda found: np.array(found, dtype=np.int64)),
    st.lists(INDEX, max_size=4).map(lambda found: torch.tensor(found, dtype=torch.long)),
    st.lists(st.booleans(), max_size=4).map(np.array),
    st.lists(st.booleans(), min_size=1, max_size=4).map(torch.tensor),
    st.lists(st.floats(), max_size=3).map(np.array),
    st.just(slice(0, 3, 0)),
    st.just(slice("a", None)),
    st.just(np.zeros((2, 2), dtype=np.int64)),
    st.sampled_from(["last", "first", "Last", "", "-1"]),
    SURROGATES,
    ANY,
)


@settings(max_examples=1500)
@given(POSITIONS, st.integers(1, 9))
def test_any_positions(positions, length):
    found = answer(resolve_positions, positions, length)
    if found is not None:
        assert found
        assert len(set(found)) == len(found)
        assert set(found) <= set(range(length))
    if isinstance(positions, slice) and found is not None:
        assert found == list(range(length))[positions]


# --- Prompts --------------------------------------------------------------------------------------

TEXTS = st.one_of(
    st.text(max_size=30),
    SURROGATES,
    st.text("a c on the\u0301\u200d\U0001f468\u2028\x00\ufeff\ud800", max_size=200),
    st.sampled_from(["", " ", "<s>", "</s>", "<pad>", "<unk>", "a", "a" * 1000, "cat " * 500]),
)
PROMPTS = st.one_of(
    TEXTS,
    st.lists(st.integers(-3, 110), max_size=6),
    st.lists(st.integers(), max_size=3),
    st.lists(st.integers(4, 98), min_size=129, max_size=140),
    st.lists(st.integers(-1, 98), max_size=4).map(lambda ids: torch.tensor(ids, dtype=torch.long)),
    st.lists(st.integers(-1, 98), max_size=4).map(lambda ids: np.array([ids])),
    st.lists(st.floats(), max_size=2).map(np.array),
    st.just(torch.zeros(2, 2, dtype=torch.long)),
    st.just(torch.zeros(0, 0, 0)),
    st.lists(TEXTS, max_size=2),
    st.lists(st.dictionaries(st.sampled_from(["role", "content", "x"]), TEXTS | st.none(),
                             max_size=2), max_size=2),
    ANY,
)  # fmt: skip

RUNS = {
    "attention_patterns": lambda a, p: a.attention_patterns(p, 1),
    "head_summary": lambda a, p: a.head_summary([p], layers=[1], **QUIET),
    "head_writes": lambda a, p: a.head_writes(p, layers=[1]),
    "weighted patterns": lambda a, p: a.value_weighted_patterns(p, [1]),
    "prompt_similarity": lambda a, p: a.prompt_similarity([p, [5, 6]], 1),
    "geometry": lambda a, p: a.measure_geometry([p, [5, 6]]),
    "comparison": lambda a, p: a.compare_models(a.model, [p], weights=False),
    "probes": lambda a, p: a.train_probes(
        [[5, n] for n in range(6)] + [p], [n / 3 for n in range(7)], layers=[1], folds=2, controls=0
    ),
    "extraction": lambda a, p: a.extract_activations(p, layer_indices=[1]),
    "batch": lambda a, p: a.extract_batch_activations([p, [5, 6]], layer_indices=[1], **QUIET),
    "lens": lambda a, p: a.logit_lens(p, top_k=1),
    "generation": lambda a, p: a.generate(p, max_new_tokens=1),
    "tokens": lambda a, p: a.get_tokens(p),
    "decoding": lambda a, p: a.decode(p) if not isinstance(p, str) else a.tokenize(p),
}


@pytest.mark.parametrize("run", RUNS)
@settings(max_examples=120)
@given(prompt=PROMPTS)
def test_any_prompt(run, prompt):
    answer(RUNS[run], analyzer(), prompt)


@settings(max_examples=400)
@given(TEXTS)
def test_any_text_becomes_tokens_that_can_be_shown(text):
    tokenizer = analyzer().tokenizer
    ids = answer(encode, tokenizer, text)
    if ids is not None:
        assert ids == tokenizer(text)["input_ids"]
        strings = token_strings(tokenizer, ids)
        assert len(strings) == len(ids)
        assert all(strings)


@settings(max_examples=400)
@given(st.one_of(TEXTS, st.integers(), ANY))
def test_any_target_token(token):
    found = answer(token_id, analyzer().tokenizer, token, analyzer().config)
    assert found is None or 0 <= found < families.VOCAB


def test_a_prompt_of_the_bos_alone_or_of_one_token_is_run():
    bos = ModelAnalyzer(families.build("gpt2"), tokenizer=families.tiny_tokenizer(bos=True))
    for prompt in ([1], [7], ""):
        record = answer(bos.extract_activations, prompt)
        assert record is None or len(record.tokens) == 1
        assert answer(bos.generate, prompt, max_new_tokens=2) != ""


# --- Pages of html --------------------------------------------------------------------------------

PAGES = {
    "attention_view": "test_attention_view",
    "highlight_view": "test_text_highlight",
    "interactive_figures": "test_interactive_figures",
    "token_attribution": "test_text_highlight",
}
"""What makes html, and where tokens that are markup are put into it."""


def test_everything_that_makes_html_is_tried_with_markup():
    root = Path(__file__).parent.parent
    makes = re.compile(r"def (_repr_html_|to_html)|\.to_html\(|</(div|span|p|script|html)>")
    found = {p.stem for p in root.glob("*.py") if makes.search(p.read_text(encoding="utf-8"))}
    assert found - {"attention_page", "highlight_page"} == set(PAGES)
    for test in PAGES.values():
        assert "<script>" in (root / "tests" / f"{test}.py").read_text(encoding="utf-8")


# --- Longer than the context ----------------------------------------------------------------------

LONG = [5 + i % 90 for i in range(families.POSITIONS + 1)]
OTHER = [6, *LONG[1:]]
TOKENS = {"answer": 20, "foil": 30, "show_progress": False}
PATCH = [ActivationPatch(1, 0, torch.zeros(families.HIDDEN))]
WORDS = {"score": len, "n_samples": 1, "max_new_tokens": 1, "show_progress": False}

TWELVE = [[5, 9, n] for n in range(11)]

LONG_RUNS = {
    "attention_patterns": lambda a: a.attention_patterns(LONG),
    "batch_attention_patterns": lambda a: a.batch_attention_patterns([[5], LONG], **QUIET),
    "head_summary": lambda a: a.head_summary([[5, 6], LONG], **QUIET),
    "find_heads": lambda a: a.find_heads("induction", [LONG], **QUIET),
    "value_weighted_patterns": lambda a: a.value_weighted_patterns(LONG),
    "head_writes": lambda a: a.head_writes(LONG),
    "train_probes": lambda a: a.train_probes([*TWELVE, LONG], [n / 3 for n in range(12)]),
    "erase_concept": lambda a: a.erase_concept([*TWELVE, LONG], [n / 3 for n in range(12)], 1),
    "check_erasure": lambda a: a.check_erasure([*TWELVE, LONG], [n / 3 for n in range(12)], 1),
    "layer_similarity": lambda a: a.layer_similarity([LONG, [5, 6]]),
    "prompt_similarity": lambda a: a.prompt_similarity([LONG, [5, 6]], 1),
    "measure_geometry": lambda a: a.measure_geometry([LONG]),
    "compare_models": lambda a: a.compare_models(a.model, [LONG]),
    "extract_activations": lambda a: a.extract_activations(LONG),
    "extract_batch_activations": lambda a: a.extract_batch_activations([[5], LONG], **QUIET),
    "estimate_memory": lambda a: a.estimate_memory([[5], LONG]),
    "generate": lambda a: a.generate(LONG),
    "generate and record": lambda a: a.generate(LONG, return_activations=True),
    "logit_lens": lambda a: a.logit_lens(LONG),
    "print_logit_lens": lambda a: a.print_logit_lens(LONG),
    "layer predictions": lambda a: a.lens.get_layer_predictions(LONG),
    "convergence": lambda a: a.lens.get_convergence_metrics(LONG),
    "compare_to_input": lambda a: a.lens.compare_to_input(LONG),
    "analyze_generation_token": lambda a: a.analyze_generation_token(LONG, max_new_tokens=1),
    "generate_with_patching": lambda a: a.generate_with_patching(LONG, PATCH),
    "patch_and_run": lambda a: a.patch_and_run(LONG, PATCH),
    "activation_patch": lambda a: a.activation_patch_experiment(LONG, OTHER, 1),
    "path_patching": lambda a: a.path_patching(LONG, OTHER),
    "patching_sweep": lambda a: a.patching_sweep(LONG, OTHER, **TOKENS),
    "patch_paths": lambda a: a.patch_paths(LONG, OTHER, **TOKENS),
    "trace_subject": lambda a: a.trace_subject(LONG, 1, answer=20, **QUIET),
    "trace_heads": lambda a: CausalTracer(a.model, a.tokenizer).trace_attention_heads(LONG, OTHER),
    "ablate": lambda a: a.ablate(LONG, method="zero", metric="log_prob", answer=20, **QUIET),
    "ablate, reference": lambda a: a.ablate(
        [5, 6], metric="log_prob", answer=20, reference=[LONG], **QUIET
    ),
    "features": lambda a: compute_feature_attribution(a.model, a.tokenizer, LONG, 1),
    "steering": lambda a: a.generate_with_steering(LONG, [[5]], [[6]]),
    "steering examples": lambda a: a.generate_with_steering([5], [LONG], [[6]]),
    "steer_generation": lambda a: steer_generation(
        a.model, a.tokenizer, LONG, torch.ones(families.HIDDEN), 1, max_new_tokens=1
    ),
    "find_direction": lambda a: a.find_direction([LONG], [[6]], 1),
    "steering_sweep": lambda a: a.steering_sweep([LONG], [[5]], [[6]], [1], [1.0], **WORDS),
    "continuations": lambda a: sample_continuations(a.architecture, None, [LONG]),
    "tuned lens": lambda a: TunedLens(steps=1, context=len(LONG)).fit(
        a.architecture, None, [LONG], show_progress=False
    ),
}


@pytest.mark.parametrize("name", ["gpt2", "llama"])
@pytest.mark.parametrize("call", LONG_RUNS)
def test_a_text_longer_than_the_context_is_refused_with_the_numbers(monkeypatch, call, name):
    """Learned positions would be an index out of range, rotary ones numbers that mean nothing."""
    one = analyzer(name)
    one.architecture.structure  # noqa: B018
    before, kind, runs = state_of(one.model), type(one.architecture.blocks[0]), []
    real = kind.forward
    monkeypatch.setattr(kind, "forward", lambda *a, **k: runs.append(1) or real(*a, **k))
    with pytest.raises(InputError, match=r"129 tokens.*context holds 128.*nothing is cut off"):
        LONG_RUNS[call](one)
    assert_untouched(one.model, before)
    assert runs == [], "refused before any pass"


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_what_is_to_be_generated_counts(name):
    one = analyzer(name)
    assert len(one.tokenize(one.generate(LONG[:126], max_new_tokens=2))) > 1
    with pytest.raises(InputError, match=r"127 tokens and 2 to generate.* to its last 126 tokens"):
        one.generate(LONG[:127], max_new_tokens=2)


@pytest.mark.parametrize("name", ["mamba", "bloom"])
def test_models_without_a_limit_have_none(name):
    one = analyzer(name)
    check_ids(LONG * 100, one.config)
    assert one.extract_activations(LONG, layer_indices=[0]).layer_activations[0].shape[1] == 129
    assert isinstance(one.architecture, Architecture)
