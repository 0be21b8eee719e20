"""The sweep: its cells are steered continuations, and a planted effect is found."""

import numpy as np
import pytest
import torch

import families
from continuations import continuation_nats, sample_continuations
from direction_finding import find_directions
from forward_pass import ArchitectureError, InputError, LayerError
from model_architecture import Architecture
from model_loader import load_model
from steering import steer
from steering_direction import Direction
from steering_sweep import steering_sweep, sweep_directions

PROMPTS = [[5, 9, 11], [40, 8, 21, 30, 7]]
SAMPLING = {"max_new_tokens": 5, "temperature": 4.0}
GENERATOR = torch.Generator().manual_seed(0)
DIRECTIONS = {
    layer: Direction(4 * torch.randn(families.HIDDEN, generator=GENERATOR), layer)
    for layer in (0, 2)
}


@pytest.fixture(scope="module")
def model():
    return families.build("gpt2")


def length(text):
    return float(len(text))


def sweep(model, directions=None, coefficients=(-1, 2), **options):
    chosen = {"score": length, "n_samples": 3, **SAMPLING} | options
    directions = DIRECTIONS if directions is None else directions
    return sweep_directions(model, None, PROMPTS, directions, coefficients, **chosen)


def hooks_of(model):
    tables = [(m._forward_hooks, m._forward_pre_hooks) for m in model.modules()]
    return [list(table.values()) for pair in tables for table in pair]


@pytest.mark.parametrize(
    "steering",
    [
        {},
        {"positions": "prompt"},
        {"positions": "generated", "keep_norm": True},
        {"operation": "ablate"},
        {"operation": "rotate"},
    ],
    ids=str,
)
def test_each_cell_is_a_steered_run(model, steering):
    before = hooks_of(model)
    found = sweep(model, seed=3, **steering)
    assert hooks_of(model) == before
    architecture = Architecture(model)
    assert found.coefficients == (-1.0, 0.0, 2.0)
    assert found.layers == (0, 2)
    for layer in found.layers:
        for coefficient in found.coefficients:
            with steer(model, DIRECTIONS[layer], coefficient=coefficient, **steering):
                expected = sample_continuations(architecture, None, PROMPTS, 3, seed=3, **SAMPLING)
            column = found.coefficients.index(coefficient)
            place = found.layers.index(layer), column
            assert list(found.texts[place]) == [each.text for each in expected]
            np.testing.assert_allclose(
                found.nats[place], continuation_nats(architecture, expected), rtol=1e-5
            )
            assert list(found.n_tokens[place]) == [5] * 6
            scores = np.array([length(each.text) for each in expected])
            np.testing.assert_array_equal(found.scores[place], scores)
            assert found.cell(layer, coefficient).effect == pytest.approx(scores.mean())
    assert found.prompts == ("5 9 11",) * 3 + ("40 8 21 30 7",) * 3
    assert found.effect_name == "length"


def test_the_unsteered_column_is_one_run(model):
    found = sweep(model)
    column = found.coefficients.index(0.0)
    assert (found.texts[0, column] == found.texts[1, column]).all()
    assert not (found.texts[0, 0] == found.texts[0, column]).all()


def test_a_planted_effect_rises_with_the_coefficient(model):
    """Along a token's row of the head, behind the last block, that token becomes likelier."""
    token = 17
    with torch.no_grad():
        row = model.lm_head.weight[token] * model.transformer.ln_f.weight
    directions = {2: Direction(row / row.norm() * 20, 2)}
    found = sweep(
        model,
        directions,
        (-2, -1, 0, 1, 2),
        score=lambda text: text.split().count(str(token)) / 5,
        n_samples=40,
        effect_name="share of the token",
    )
    effect = found.effect[0]
    assert (np.diff(effect) >= 0).all()
    assert effect[-1] > effect[2] + 0.3
    assert found.effect_name == "share of the token"
    assert found.best(fluent=1e6)[:2] == (2, 2.0)


def test_word_lists_are_counted_in_the_continuation_alone(model):
    tokenizer = families.tiny_tokenizer()
    options = {"positive_words": ["the", "on"], "negative_words": ["and", "is"]}
    found = steering_sweep(
        model,
        tokenizer,
        ["the on the on"],
        ["the cat", "a mat"],
        ["no dog", "it is"],
        [1, "h.2"],
        [1.0],
        n_samples=30,
        **SAMPLING,
        **options,
    )
    assert found.effect_name == "share of positive words"
    assert found.layers == (1, 2)
    for place in np.ndindex(found.texts.shape):
        words = "".join(c if c.isalpha() else " " for c in found.texts[place].lower()).split()
        counts = [sum(word in options[name] for word in words) for name in options]
        assert found.weights[place] == sum(counts)
        if sum(counts):
            assert found.scores[place] == counts[0] / sum(counts)
    directions = find_directions(
        model, tokenizer, ["the cat", "a mat"], ["no dog", "it is"], [1, 2]
    )
    same = sweep_directions(
        model, tokenizer, ["the on the on"], directions, [1.0], n_samples=30, **SAMPLING, **options
    )
    assert (found.texts == same.texts).all()


def test_a_score_may_abstain(model):
    found = sweep(model, score=lambda text: float("nan") if len(text) % 2 else 1.0)
    np.testing.assert_array_equal(found.weights == 0, np.isnan(found.scores))
    assert set(found.effect[np.isfinite(found.effect)]) == {1.0}


def test_batches_do_not_matter(model):
    whole, small = sweep(model), sweep(model, batch_size=2)
    assert (whole.texts == small.texts).all()
    np.testing.assert_allclose(whole.nats, small.nats, rtol=1e-5)
    other = sweep(model, seed=1)
    assert not (whole.texts == other.texts).all()


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"score": None}, InputError, "say what the effect is"),
        ({"positive_words": ["a"], "negative_words": ["b"]}, InputError, "say what the effect is"),
        ({"score": None, "positive_words": ["a"]}, InputError, "negative_words holds"),
        ({"coefficients": []}, InputError, "one of them not 0"),
        ({"coefficients": [0]}, InputError, "one of them not 0"),
        ({"coefficients": [1, float("nan")]}, InputError, "must be finite"),
        ({"coefficients": 2}, InputError, "is a list of numbers"),
        ({"operation": "clamp"}, InputError, "clamp acts at coefficient 0 too"),
        ({"directions": {}}, InputError, "at least one"),
        ({"directions": {5: Direction(torch.ones(32), 5)}}, LayerError, "out of range"),
        ({"directions": Direction(torch.ones(31), 1)}, InputError, r"is \[32\]; came \[31\]"),
        ({"n_samples": 0}, InputError, "n_samples"),
        ({"score": lambda _text: float("inf")}, InputError, "must be a number"),
        ({"positions": 99}, InputError, "never took effect"),
    ],
)
def test_bad_input_says_what_to_do(model, changed, error, message):
    before = hooks_of(model)
    with pytest.raises(error, match=message):
        sweep(model, **changed)
    assert hooks_of(model) == before


def test_bad_examples_and_models(model):
    with pytest.raises(InputError, match="say what the effect is"):
        steering_sweep(model, None, PROMPTS, [[5]], [[6]])
    with pytest.raises(InputError, match="write prompts="):
        sweep_directions(model, None, "text", DIRECTIONS, score=length)
    with pytest.raises(InputError, match="positive_prompts is empty"):
        steering_sweep(model, None, PROMPTS, [], [[6]], score=length)
    with pytest.raises(ArchitectureError, match="head"):
        sweep(model.transformer)


@pytest.mark.slow  # a few seconds: 4 × 100 continuations of the bundled model, twice
@pytest.mark.parametrize(
    ("prompt", "positive", "negative"),
    [
        ("Today I feel", ["I am happy", "This is great"], ["I am sad", "This is terrible"]),
        ("The movie was", ["The movie was amazing"], ["The movie was terrible"]),
    ],
)
def test_the_bundled_model_is_steered_from_sad_to_happy(prompt, positive, negative):
    """The README's examples at the facade's default layer, fluent where it is not pushed hard."""
    from demo_model.write_corpus import NEGATIVE_WORDS, POSITIVE_WORDS

    model, tokenizer = load_model(device="cpu")
    found = steering_sweep(
        model,
        tokenizer,
        [prompt],
        positive,
        negative,
        Architecture(model).n_layers // 2,
        positive_words=POSITIVE_WORDS,
        negative_words=NEGATIVE_WORDS,
        n_samples=100,
        batch_size=100,
        seed=7,
    )
    (effect,), (cost,) = found.effect, found.perplexity
    assert (np.diff(effect) > 0).all()
    assert effect[0] < 0.25
    assert effect[-1] > 0.75
    assert cost[[1, 3]].max() < 1.5 * found.unsteered[1]
    assert cost[0] < 3 * found.unsteered[1]
