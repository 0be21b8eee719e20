"""Generation against `model.generate`; what it records against one pass over the final text."""

import logging

import pytest
import torch
from transformers import GenerationConfig

import families
from activation_extraction import extract, make_request
from forward_pass import SITES, ArchitectureError, InputError
from generation import decode_text, generate, generate_text, generate_with_activations
from model_architecture import Architecture

IDS = families.token_ids(1, 7)[0].tolist()
NEW = 6


@pytest.fixture
def architecture():
    """A GPT-2 of its own for each test, since generation configs are changed."""
    return Architecture(families.build("gpt2"))


@pytest.fixture(scope="module")
def tokenizer():
    return families.tiny_tokenizer()


def greedy(model, ids, new=NEW, **kwargs):
    """Hugging Face's own greedy continuation, prompt included."""
    with torch.no_grad():
        out = model.generate(
            torch.tensor([ids]), max_new_tokens=new, do_sample=False, pad_token_id=0, **kwargs
        )
    return out[0].tolist()


def by_hand(model, ids, new=NEW):
    """The likeliest next token, `new` times, without any cache."""
    ids = list(ids)
    with torch.no_grad():
        for _ in range(new):
            ids.append(int(model(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
    return ids


def hooks_of(model):
    tables = [(m._forward_hooks, m._forward_pre_hooks) for m in model.modules()]
    return [list(table.values()) for pair in tables for table in pair]


def sites_of(architecture):
    """Names of all sites but the patterns."""
    have = [architecture.available_sites(layer) for layer in range(architecture.n_layers)]
    return [s for s in SITES if s != "attn_pattern" and any(s in names for names in have)]


# --- Text -----------------------------------------------------------------------------------------


def test_text_is_the_likeliest_continuation(family):
    _, model = family
    expected = by_hand(model, IDS)
    text = generate_text(Architecture(model), None, IDS, max_new_tokens=NEW)
    assert text == " ".join(map(str, expected))


def test_text_equals_that_of_model_generate(architecture, tokenizer):
    ids = tokenizer("the cat")["input_ids"]
    expected = tokenizer.decode(greedy(architecture.model, ids, 20), skip_special_tokens=True)
    text = generate_text(architecture, tokenizer, "the cat", max_new_tokens=20)
    assert text == expected
    assert text.startswith("the cat")


def test_special_tokens_are_left_out_of_the_text(architecture):
    tokenizer = families.tiny_tokenizer(bos=True)
    text = generate_text(architecture, tokenizer, "the cat", max_new_tokens=3)
    assert text.startswith("the cat")
    assert (
        decode_text(tokenizer, [1, *tokenizer("a", add_special_tokens=False)["input_ids"]]) == "a"
    )


@pytest.mark.parametrize("recorded", [False, True])
def test_generation_ends_at_the_end_token(architecture, recorded):
    sequence = by_hand(architecture.model, IDS, 10)
    stop = next(i for i in range(8, 17) if sequence[i] not in sequence[7:i])
    architecture.model.generation_config.eos_token_id = [98, sequence[stop]]
    out = generate(architecture, None, IDS, return_activations=recorded, max_new_tokens=10)
    text = out[0] if recorded else out
    assert text == " ".join(map(str, sequence[: stop + 1]))
    if recorded:
        assert out[1].token_ids == sequence[: stop + 1]


def test_one_new_token(architecture):
    sequence = by_hand(architecture.model, IDS, 1)
    text, record = generate(architecture, None, IDS, return_activations=True, max_new_tokens=1)
    assert text == " ".join(map(str, sequence))
    assert record.layer_activations[0].shape == (1, 8, families.HIDDEN)


# --- Sampling -------------------------------------------------------------------------------------


@pytest.fixture
def flat():
    """A model whose logits are small, so that sampling does not always take the same token."""
    model = families.build("gpt2")
    with torch.no_grad():
        model.transformer.ln_f.weight.mul_(0.05)
        model.transformer.ln_f.bias.mul_(0.05)
    return Architecture(model)


def sample(architecture, seed, **kwargs):
    options = {"temperature": 1.0, "max_new_tokens": 12, **kwargs}
    return generate_text(architecture, None, IDS, seed=seed, **options)


def test_a_seed_makes_sampling_reproducible(flat):
    assert sample(flat, 1) == sample(flat, 1)
    assert len({sample(flat, seed) for seed in range(4)}) == 4
    assert sample(flat, None) != sample(flat, None)


@pytest.mark.parametrize("recorded", [False, True])
def test_a_seed_leaves_the_global_random_state_alone(flat, recorded):
    before = torch.random.get_rng_state()
    first = sample(flat, 1) if not recorded else _recorded(flat, temperature=1.0, seed=1)[0]
    assert torch.equal(torch.random.get_rng_state(), before)
    if recorded:
        assert first == sample(flat, 1, max_new_tokens=NEW)


def test_an_exception_leaves_the_global_random_state_alone(flat):
    before = torch.random.get_rng_state()
    with pytest.raises(ValueError, match="nonsense"):
        sample(flat, 1, nonsense=3)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_sampling_equals_that_of_model_generate(flat):
    torch.manual_seed(3)
    expected = flat.model.generate(
        torch.tensor([IDS]), max_new_tokens=12, do_sample=True, temperature=0.7, top_k=9, top_p=0.8,
        pad_token_id=0,
    )  # fmt: skip
    text = sample(flat, 3, temperature=0.7, top_k=9, top_p=0.8)
    assert text == " ".join(map(str, expected[0].tolist()))


def test_top_k_and_top_p_narrow_and_zero_top_k_does_not(flat):
    """Against the probabilities: what is drawn must be among what is left."""
    with torch.no_grad():
        probabilities = flat.model(torch.tensor([IDS])).logits[0, -1].softmax(-1)
    order = probabilities.argsort(descending=True).tolist()
    drawn = [
        {int(sample(flat, s, max_new_tokens=1, **narrow).split()[-1]) for s in range(30)}
        for narrow in ({"top_k": 3}, {"top_k": 0, "top_p": 0.05}, {"top_k": 0}, {})
    ]
    assert drawn[0] <= set(order[:3])
    assert len(drawn[0]) > 1
    nucleus = int((probabilities.sort(descending=True).values.cumsum(0) < 0.05).sum()) + 1
    assert drawn[1] <= set(order[:nucleus])
    assert drawn[2] - set(order[:50]), "0 takes all tokens"
    assert drawn[3] <= set(order[:50]), "50 by default"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -0.1}, "temperature must be 0"),
        ({"temperature": float("nan")}, "temperature must be 0"),
        ({"temperature": float("inf")}, "temperature must be 0"),
        ({"top_p": 0.0}, r"top_p must lie in \(0, 1\]; came 0.0"),
        ({"top_p": 1.1}, r"top_p must lie in \(0, 1\]; came 1.1"),
        ({"top_k": -1}, "top_k must be 0"),
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1; came 0"),
        ({"do_sample": True}, "do_sample=True contradicts temperature=0.0"),
        ({"do_sample": False, "temperature": 1.0}, "do_sample=False contradicts temperature=1.0"),
        ({"max_length": 20}, "give max_new_tokens"),
        ({"max_new_tokens": 122}, "7 tokens and 122 to generate; the model's context holds 128"),
    ],
)
@pytest.mark.parametrize("recorded", [False, True])
def test_what_cannot_be_generated_is_refused_before_anything_runs(
    architecture, options, message, recorded
):
    ran = []
    architecture.body.register_forward_pre_hook(lambda *_: ran.append(1))
    with pytest.raises(InputError, match=message):
        generate(architecture, None, IDS, return_activations=recorded, **options)
    assert ran == []


def test_the_whole_context_can_be_used(architecture):
    out = generate_text(architecture, None, IDS, max_new_tokens=families.POSITIONS - 7)
    assert len(out.split()) == families.POSITIONS


def test_generating_needs_a_head(architecture):
    headless = Architecture(architecture.model.transformer)
    for recorded in (False, True):
        with pytest.raises(ArchitectureError, match="load_for_generation=True"):
            generate(headless, None, IDS, return_activations=recorded)


# --- The model's generation config, and what is passed on -----------------------------------------


@pytest.fixture
def quiet():
    """Fail on anything that transformers logs (pytest sees Python's own warnings)."""
    records = []

    class Keep(logging.Handler):
        def emit(self, record):
            records.append(record.getMessage())

    logger, handler = logging.getLogger("transformers"), Keep(logging.WARNING)
    logger.addHandler(handler)
    yield
    logger.removeHandler(handler)
    assert records == []


SAMPLING = {"do_sample": True, "temperature": 0.6, "top_p": 0.9, "top_k": 20, "min_p": 0.1}


@pytest.mark.parametrize("own", [SAMPLING, {"max_length": 9}, {"max_new_tokens": 2}, {}])
def test_the_models_generation_config_is_read_only_and_its_sampling_is_not_ours(
    architecture, quiet, own
):
    model = architecture.model
    expected = " ".join(map(str, by_hand(model, IDS)))
    model.generation_config = GenerationConfig(**own, pad_token_id=4)
    before = model.generation_config.to_dict()
    assert generate_text(architecture, None, IDS, max_new_tokens=NEW) == expected
    assert _recorded(architecture)[0] == expected
    assert model.generation_config.to_dict() == before


@pytest.mark.parametrize("end", [None, 98, [97, 98]])
def test_nothing_is_logged_without_a_pad_token(architecture, quiet, end):
    architecture.model.generation_config.eos_token_id = end
    generate_text(architecture, None, IDS, max_new_tokens=2)
    generate_text(architecture, None, IDS, max_new_tokens=2, temperature=0.5, top_k=3, seed=0)


def test_other_parts_of_the_generation_config_hold(architecture, quiet):
    model = architecture.model
    plain = by_hand(model, IDS)
    model.generation_config.repetition_penalty = 5.0
    expected = greedy(model, IDS)
    assert expected != plain
    assert generate_text(architecture, None, IDS, max_new_tokens=NEW) == " ".join(
        map(str, expected)
    )


def test_a_generation_config_of_the_call_is_taken(architecture, quiet):
    """But length and sampling are the arguments' business."""
    sampling = {**SAMPLING, "min_p": None}
    config = GenerationConfig(repetition_penalty=5.0, max_new_tokens=2, max_length=9, **sampling)
    before = config.to_dict()
    expected = greedy(architecture.model, IDS, repetition_penalty=5.0)
    text = generate_text(architecture, None, IDS, max_new_tokens=NEW, generation_config=config)
    assert text == " ".join(map(str, expected))
    assert config.to_dict() == before


def test_other_arguments_reach_model_generate(architecture, quiet):
    class Streamer:
        def __init__(self):
            self.seen = []

        def put(self, value):
            self.seen += value.flatten().tolist()

        def end(self):
            self.seen.append("end")

    streamer = Streamer()
    banned = by_hand(architecture.model, IDS, 1)[-1]
    expected = greedy(architecture.model, IDS, suppress_tokens=[banned])
    assert banned not in expected[7:]
    text = generate_text(
        architecture, None, IDS, max_new_tokens=NEW, streamer=streamer, suppress_tokens=[banned]
    )
    assert text == " ".join(map(str, expected))
    assert streamer.seen == [*expected, "end"]


def test_beams_without_activations(flat):
    expected = greedy(flat.model, IDS, num_beams=3)
    assert expected != by_hand(flat.model, IDS)
    text = generate_text(flat, None, IDS, max_new_tokens=NEW, num_beams=3)
    assert text == " ".join(map(str, expected))


def test_stop_strings_need_no_tokenizer_argument(architecture, tokenizer):
    text = generate_text(architecture, tokenizer, "the cat", max_new_tokens=20)
    stop = text[len("the cat") + 3 :][:1]
    short = generate_text(
        architecture, tokenizer, "the cat", max_new_tokens=20, stop_strings=[stop]
    )
    assert short == text[: text.index(stop, len("the cat")) + 1]
    assert len(short) < len(text)


def test_a_model_in_training_mode_generates_without_dropout(architecture):
    expected = by_hand(architecture.model, IDS)
    architecture.model.train()
    assert generate_text(architecture, None, IDS, max_new_tokens=NEW) == " ".join(
        map(str, expected)
    )
    assert _recorded(architecture)[1].token_ids == expected
    assert all(module.training for module in architecture.model.modules())


# --- Recorded generation --------------------------------------------------------------------------


def _recorded(architecture, sites=("resid_post",), **options):
    request = make_request(architecture, sites=sites)
    options = {"max_new_tokens": NEW, **options}
    return generate_with_activations(architecture, None, IDS, request, **options)


def assert_equals_one_pass(architecture, record, sites):
    expected = extract(
        architecture, None, record.token_ids, make_request(architecture, sites=sites)
    )
    pairs = list(zip(record.tensors(), expected.tensors(), strict=True))
    assert len(pairs) >= len(sites)
    for (name, key, mine), (other, other_key, one_pass) in pairs:
        assert (name, key, mine.shape) == (other, other_key, one_pass.shape)
        assert float((mine - one_pass).abs().max() / one_pass.abs().max()) < 1e-5, (name, key)
        assert mine.untyped_storage().nbytes() == mine.numel() * mine.element_size()


@pytest.mark.parametrize("use_cache", [True, False])
def test_a_recorded_generation_equals_one_pass_over_the_text(family, use_cache):
    _, model = family
    architecture = Architecture(model)
    sites = sites_of(architecture)
    text, record = _recorded(architecture, sites, use_cache=use_cache)
    assert record.token_ids == by_hand(model, IDS)
    assert record.prompt == text == " ".join(map(str, record.token_ids))
    assert record.positions == list(range(7 + NEW))
    assert record.metadata["prompt_length"] == 7
    assert_equals_one_pass(architecture, record, sites)


@pytest.mark.parametrize("name", ["gpt2", "llama", "mistral", "gemma2"])
def test_a_static_cache_has_places_for_later_tokens_that_are_not_recorded(name):
    architecture = Architecture(families.build(name))
    sites = sites_of(architecture)
    _, record = _recorded(architecture, sites, cache_implementation="static")
    assert record.token_ids == by_hand(architecture.model, IDS)
    assert_equals_one_pass(architecture, record, sites)


def test_each_token_is_read_once_and_in_steps_of_one(architecture):
    """Captured while generating: no second pass over the text, only one more step for its end."""
    make_request(architecture, sites=("mlp_out",))  # looks at the model once
    lengths = []
    architecture.body.register_forward_pre_hook(
        lambda _m, args, kwargs: lengths.append((*args, kwargs.get("input_ids"))[0].shape[1]),
        with_kwargs=True,
    )
    _recorded(architecture, ("mlp_out",))
    assert lengths == [7] + [1] * NEW


def test_a_sampled_generation_is_recorded_as_it_was(flat):
    text, record = _recorded(flat, temperature=1.0, seed=5, max_new_tokens=12)
    assert text == sample(flat, 5)
    assert_equals_one_pass(flat, record, ("resid_post",))


def test_some_layers_alone(architecture):
    request = make_request(architecture, layer_indices=[-1], sites=("resid_post", "value"))
    _, record = generate_with_activations(architecture, None, IDS, request, max_new_tokens=2)
    assert list(record.layer_activations) == ["transformer.h.2"]
    assert list(record.at_site("value")) == ["transformer.h.2"]


def test_bfloat16_is_recorded_in_its_dtype():
    architecture = Architecture(families.build("gpt2").to(torch.bfloat16))
    _, record = _recorded(architecture)
    assert record.layer_activations[0].dtype == torch.bfloat16
    assert record.layer_activations[0].shape == (1, 7 + NEW, families.HIDDEN)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_beams": 2}, "num_beams=2"),
        ({"num_return_sequences": 2, "temperature": 1.0}, "num_return_sequences=2"),
        ({"prompt_lookup_num_tokens": 2}, "prompt_lookup_num_tokens=2"),
        ({"guidance_scale": 2.0}, "guidance_scale=2.0"),
        ({"generation_config": GenerationConfig(num_beams=2)}, "num_beams=2"),
    ],
)
def test_ways_of_generating_that_read_other_tokens_are_not_recorded(architecture, options, message):
    with pytest.raises(InputError, match=f"records one sequence as it grows, which {message}"):
        _recorded(architecture, **options)
    architecture.model.generation_config.num_beams = 2
    with pytest.raises(InputError, match="which num_beams=2"):
        _recorded(architecture)


def test_patterns_and_logits_are_not_recorded_while_generating(architecture):
    for wanted in ({"include_attention": True}, {"return_logits": True}):
        request = make_request(architecture, **wanted)
        with pytest.raises(InputError, match="extract them from the text"):
            generate_with_activations(architecture, None, IDS, request)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_exception_in_the_middle_leaves_no_hook(family, error):
    _, model = family
    architecture = Architecture(model)
    sites = sites_of(architecture)

    before, calls = hooks_of(model), []

    def stop(*_):
        calls.append(1)
        if len(calls) == 3:
            raise error("stop")

    handle = architecture.blocks[1].register_forward_hook(stop)
    try:
        with pytest.raises(error):
            _recorded(architecture, sites)
    finally:
        handle.remove()
    assert hooks_of(model) == before


# --- Ids back to text -----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [list, torch.tensor, lambda ids: torch.tensor([ids])])
def test_decoding_undoes_tokenizing(tokenizer, kind):
    ids = tokenizer("a cat sat on the mat")["input_ids"]
    assert decode_text(tokenizer, kind(ids)) == "a cat sat on the mat"
    assert decode_text(tokenizer, []) == ""
    with pytest.raises(InputError, match=r"token ids of one text are \[position\]; came \(2, 2\)"):
        decode_text(tokenizer, torch.zeros(2, 2, dtype=torch.long))
