"""Sampled continuations: the right distribution, the same text in any batch, likelihoods."""

import numpy as np
import pytest
import torch

import families
from continuations import Continuation, UniformDraw, continuation_nats, sample_continuations
from forward_pass import ArchitectureError, InputError
from model_architecture import Architecture

PROMPTS = [families.token_ids(1, n, seed=n)[0].tolist() for n in (3, 9, 6, 1)]


@pytest.fixture(scope="module")
def architecture():
    return Architecture(families.build("gpt2"))


def ids_of(continuations):
    return [each.ids for each in continuations]


def sample(architecture, prompts=PROMPTS, n_samples=3, **options):
    chosen = {"temperature": 4.0, "max_new_tokens": 6} | options
    return sample_continuations(architecture, None, prompts, n_samples, **chosen)


# --- Sampling -------------------------------------------------------------------------------------


def test_a_batch_is_one_by_one(family):
    """Greedy and sampled, left padding and all, for every family."""
    _, model = family
    architecture = Architecture(model)
    for temperature in (0.0, 4.0):
        together = sample(architecture, temperature=temperature)
        alone = sample(architecture, temperature=temperature, batch_size=1)
        assert ids_of(together) == ids_of(alone)
        assert [list(each.prompt_ids) for each in together[::3]] == PROMPTS
        assert all(len(each.ids) == 6 for each in together)


def test_greedy_is_the_likeliest_token_by_hand(family):
    _, model = family
    expected = []
    with torch.no_grad():
        for prompt in PROMPTS:
            ids = list(prompt)
            for _ in range(4):
                logits = model(torch.tensor([ids]), use_cache=False).logits[0, -1]
                ids.append(int(logits.argmax()))
            expected.append(tuple(ids[len(prompt) :]))
    options = {"n_samples": 1, "temperature": 0.0, "max_new_tokens": 4}
    assert ids_of(sample(Architecture(model), **options)) == expected


@pytest.mark.parametrize(
    "options",
    [{"temperature": 3.0}, {"temperature": 5.0, "top_k": 6}, {"temperature": 4.0, "top_p": 0.6}],
)
def test_tokens_come_as_often_as_they_are_likely(architecture, options):
    prompt, n = [7, 8, 9], 20_000
    drawn = sample(architecture, [prompt], n, max_new_tokens=1, batch_size=n, **options)
    found = np.bincount([each.ids[0] for each in drawn], minlength=families.VOCAB) / n
    with torch.no_grad():
        logits = architecture.model(torch.tensor([prompt])).logits[0, -1].double()
    expected = (logits / options["temperature"]).softmax(-1).numpy()
    order = np.argsort(-expected)
    keep = options.get("top_k", families.VOCAB)
    if "top_p" in options:  # the least number of tokens whose mass reaches top_p
        keep = int(np.searchsorted(np.cumsum(expected[order]), options["top_p"])) + 1
    expected[order[keep:]] = 0
    expected /= expected.sum()
    assert np.abs(found - expected).max() < 5 * np.sqrt(0.25 / n)
    assert found[expected == 0].sum() == 0


def test_the_draw_is_the_inverse_of_the_distribution():
    scores = torch.tensor([[0.1, 0.0, 0.4, 0.5]]).log().repeat(5, 1)
    numbers = np.array([[0.0], [0.0999], [0.1001], [0.5001], [1 - 1e-16]])
    left = UniformDraw(numbers, 2, 1.0, 1.0, 0)(torch.zeros(5, 2, dtype=torch.long), scores)
    assert left.argmax(-1).tolist() == [0, 0, 2, 3, 3]
    assert (left > -torch.inf).sum(-1).tolist() == [1] * 5


def test_the_seed_alone_decides(architecture):
    state = torch.random.get_rng_state()
    first = ids_of(sample(architecture, seed=1))
    assert torch.equal(torch.random.get_rng_state(), state)
    torch.manual_seed(5)
    assert ids_of(sample(architecture, seed=1)) == first
    assert ids_of(sample(architecture, seed=2)) != first
    assert len(set(first)) > 6, "samples of one prompt differ"


def test_it_ends_with_the_end_of_text_token():
    architecture = Architecture(families.build("gpt2"))
    plain = ids_of(sample(architecture, n_samples=10))
    ends = [plain[0][2], plain[13][4]]
    architecture.model.generation_config.eos_token_id = ends
    cut = ids_of(sample(architecture, n_samples=10))
    for whole, part in zip(plain, cut, strict=True):
        stop = next((i for i, token in enumerate(whole) if token in ends), len(whole))
        assert part == whole[: stop + 1]
    assert any(len(part) < 6 for part in cut)


def test_the_models_own_sampling_settings_do_not_matter(architecture):
    other = Architecture(families.build("gpt2"))
    other.model.generation_config.update(do_sample=True, temperature=0.3, top_k=2, top_p=0.5)
    assert ids_of(sample(other)) == ids_of(sample(architecture))
    other.model.generation_config.max_new_tokens = 3
    assert ids_of(sample(other)) == ids_of(sample(architecture))


def test_text_is_what_was_added(architecture):
    tokenizer = families.tiny_tokenizer(bos=True)
    options = {"temperature": 4.0, "max_new_tokens": 8}
    for each in sample_continuations(architecture, tokenizer, ["the cat", "on"], 4, **options):
        whole = tokenizer.decode([*each.prompt_ids, *each.ids], skip_special_tokens=True)
        before = tokenizer.decode(each.prompt_ids, skip_special_tokens=True)
        assert before + each.text == whole


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"prompts": "the cat"}, "list of at least one prompt"),
        ({"prompts": []}, "list of at least one prompt"),
        ({"n_samples": 0}, "at least 1; came 0"),
        ({"batch_size": 0}, "at least 1"),
        ({"temperature": -1.0}, "temperature must be 0"),
        ({"top_p": 0.0}, "top_p must lie"),
        ({"top_k": -1}, "top_k must be"),
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1"),
        ({"max_new_tokens": 500}, "context holds 128"),
        ({"prompts": [[1, 200]]}, "outside the model's vocabulary"),
    ],
)
def test_bad_input_is_refused(architecture, changed, message):
    with pytest.raises(InputError, match=message):
        sample(architecture, **changed)


def test_a_model_without_a_head_is_refused():
    architecture = Architecture(families.build("gpt2").base_model)
    with pytest.raises(ArchitectureError, match="head"):
        sample(architecture)
    with pytest.raises(ArchitectureError, match="head"):
        continuation_nats(architecture, [Continuation((5,), (6,), "")])


# --- Likelihood -----------------------------------------------------------------------------------


def test_likelihoods_are_those_of_one_pass_each(family):
    _, model = family
    architecture = Architecture(model)
    given = sample(architecture, n_samples=2)
    given = [Continuation(c.prompt_ids, c.ids[: 1 + i % 6], "") for i, c in enumerate(given)]
    expected = []
    for each in given:
        with torch.no_grad():
            logits = model(torch.tensor([each.prompt_ids + each.ids])).logits[0].double()
        table = logits.log_softmax(-1)
        first = len(each.prompt_ids) - 1
        expected.append(-sum(float(table[first + i, t]) for i, t in enumerate(each.ids)))
    found = continuation_nats(architecture, given)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


def test_the_batches_do_not_matter(architecture, monkeypatch):
    given = sample(architecture)
    whole = continuation_nats(architecture, given)
    monkeypatch.setattr("continuations.LOGIT_BYTES", 1)
    np.testing.assert_allclose(continuation_nats(architecture, given), whole, rtol=1e-5)
    assert continuation_nats(architecture, []).shape == (0,)
