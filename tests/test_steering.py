"""Steering against plain torch hooks and numpy: every operation, position class and family."""

import math

import numpy as np
import pytest
import torch

import families
from continuations import sample_continuations
from forward_pass import ArchitectureError, InputError, LayerError, Site, SiteError, record
from generation import generate_text
from model_architecture import Architecture
from pass_positions import CLASSES
from steering import create_steering_vector, generate_with_steering, steer, steer_generation
from steering_direction import Direction
from steering_vector import OPERATIONS

IDS = families.token_ids(1, 6)[0].tolist()
NEW = 5
LAYER = 1
VECTOR = 3 * torch.randn(families.HIDDEN, generator=torch.Generator().manual_seed(0))
SOME = ["gpt2", "gptj", "llama", "gemma2", "falcon", "mixtral", "cohere", "mamba"]
"""Tuples and tensors, grouped queries, norms after, parallel, experts, no attention."""


@pytest.fixture(scope="module")
def gpt2():
    return families.build("gpt2")


@pytest.fixture(scope="module")
def tokenizer():
    return families.tiny_tokenizer()


def hooks_of(model):
    tables = [(m._forward_hooks, m._forward_pre_hooks) for m in model.modules()]
    return [list(table.values()) for pair in tables for table in pair]


def hidden_of(output):
    return output if isinstance(output, torch.Tensor) else output[0]


def hooked(model, change, layer=LAYER):
    """A plain hook on a block's output; ``change(h)`` returns what replaces it."""

    def hook(_module, _args, output):
        new = change(hidden_of(output))
        return new if isinstance(output, torch.Tensor) else (new, *output[1:])

    return Architecture(model).blocks[layer].register_forward_hook(hook)


def logits_of(model, ids=IDS):
    with torch.no_grad():
        return model(torch.tensor([ids]), use_cache=False).logits


def in_numpy(operation, h, v, c):
    """The operations once more, in numpy and float64, from their definitions."""
    h, v = np.asarray(h, np.float64), np.asarray(v, np.float64)
    unit = v / np.sqrt((v**2).sum())
    along = (h * unit).sum(-1, keepdims=True)
    if operation == "add":
        return h + c * v
    if operation == "subtract":
        return h - c * v
    if operation == "ablate":
        return h - c * along * unit
    if operation == "clamp":
        return h - along * unit + c * unit
    rest = h - along * unit
    height = np.sqrt((rest**2).sum(-1, keepdims=True))
    size = np.sqrt((h**2).sum(-1, keepdims=True))
    angle = np.clip(np.arccos(along / size) - c, 0, np.pi)
    return size * (np.cos(angle) * unit + np.sin(angle) * rest / height)


def keeping_norm(new, h):
    h = np.asarray(h, np.float64)
    sizes = [np.sqrt((x**2).sum(-1, keepdims=True)) for x in (h, new)]
    return new * sizes[0] / sizes[1]


# --- Operations -----------------------------------------------------------------------------------


@pytest.mark.parametrize("keep_norm", [False, True])
@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("name", SOME)
def test_every_operation_is_its_formula_in_a_plain_hook(name, operation, keep_norm):
    model = families.build(name)
    coefficient = 0.7

    def change(h):
        new = in_numpy(operation, h, VECTOR, coefficient)
        new = keeping_norm(new, h) if keep_norm else new
        return torch.from_numpy(new).float()

    handle = hooked(model, change)
    expected = logits_of(model)
    handle.remove()
    with steer(model, VECTOR, LAYER, coefficient, operation=operation, keep_norm=keep_norm):
        found = logits_of(model)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)
    assert (found - logits_of(model)).abs().max() > 0.01


def test_rotation_stops_at_the_direction(gpt2):
    """An angle larger than what is left turns no further."""
    with steer(gpt2, VECTOR, LAYER, math.pi, operation="rotate"):
        found = stream_of(gpt2)
    unit = VECTOR / VECTOR.norm()
    sizes = stream_of(gpt2).norm(dim=-1, keepdim=True)
    torch.testing.assert_close(found, sizes * unit, rtol=1e-4, atol=1e-4)


def stream_of(model, layer=LAYER, ids=IDS):
    """What enters the next block, ``[1, position, d]``, by a plain hook."""
    seen = []
    block = Architecture(model).blocks[layer + 1]

    def keep(_module, args, kwargs):
        seen.append((args[0] if args else kwargs["hidden_states"]).clone())

    handle = block.register_forward_pre_hook(keep, with_kwargs=True)
    logits_of(model, ids)
    handle.remove()
    return seen[0]


# --- What must change nothing ---------------------------------------------------------------------


@pytest.mark.parametrize("operation", ["add", "subtract", "ablate", "rotate"])
def test_coefficient_0_changes_nothing(family, operation):
    _, model = family
    plain = logits_of(model)
    with steer(model, VECTOR, LAYER, 0.0, operation=operation):
        steered = logits_of(model)
    exact = operation in ("add", "subtract")
    torch.testing.assert_close(steered, plain, **({"rtol": 0, "atol": 0} if exact else WIDE))


WIDE = {"rtol": 1e-3, "atol": 1e-3}


def test_ablating_an_absent_direction_changes_nothing(family):
    _, model = family
    architecture = Architecture(model)
    site = Site("resid_post", LAYER)
    stream = record(architecture, architecture.inputs(torch.tensor([IDS])), [site])[site][0]
    absent = torch.linalg.svd(stream.double()).Vh[-1]  # 32 dimensions, 6 tokens
    assert (stream.double() @ absent).abs().max() < 1e-4
    with steer(model, absent, LAYER, operation="ablate"):
        torch.testing.assert_close(logits_of(model), logits_of_plain(model), **WIDE)


def logits_of_plain(model):
    """Logits without the hooks that are there now."""
    tables = [(m, m._forward_hooks, m._forward_pre_hooks) for m in model.modules()]
    try:
        for module, _, _ in tables:
            module._forward_hooks, module._forward_pre_hooks = type(tables[0][1])(), {}
        return logits_of(model)
    finally:
        for module, after, before in tables:
            module._forward_hooks, module._forward_pre_hooks = after, before


def test_algebra_of_directions_is_algebra_of_steering(gpt2):
    v = Direction(VECTOR, LAYER)
    w = Direction(VECTOR.flip(0), LAYER)

    def steered(direction, coefficient=1.0, **options):
        with steer(gpt2, direction, coefficient=coefficient, **options):
            return logits_of(gpt2)

    plain = logits_of(gpt2)
    assert torch.equal(steered(v - v), plain)
    assert torch.equal(steered(0 * v), plain)
    assert torch.equal(steered(v, 0.0), plain)
    assert torch.equal(steered(2 * v), steered(v, 2.0))
    assert torch.equal(steered(-v), steered(v, -1.0))
    assert torch.equal(steered(-v), steered(v, operation="subtract"))
    both = steered(v + w)
    with steer(gpt2, v), steer(gpt2, w):
        torch.testing.assert_close(logits_of(gpt2), both, rtol=1e-4, atol=1e-4)


# --- Generation: cached, uncached, by hand --------------------------------------------------------


def chosen_columns(positions, length):
    """Which of ``length`` tokens are meant, said once more."""
    columns = range(length)
    prompt = len(IDS)
    if positions in (None, "all"):
        return list(columns)
    if positions == "prompt":
        return [c for c in columns if c < prompt]
    if positions == "generated":
        return [c for c in columns if c >= prompt]
    if positions == "last":
        return [prompt - 1]
    if isinstance(positions, slice):
        stop = length if positions.stop is None else positions.stop
        return [c for c in columns if positions.start <= c < stop]
    several = positions if isinstance(positions, list) else [positions]
    return [c for c in (p + prompt if p < 0 else p for p in several) if c < length]


def by_hand(model, positions, coefficient=1.0, new=NEW):
    """Greedy tokens of a loop that runs everything anew at each step, with a plain hook."""

    def change(h):
        h = h.clone()
        h[:, chosen_columns(positions, h.shape[1])] += coefficient * VECTOR
        return h

    ids = list(IDS)
    handle = hooked(model, change)
    for _ in range(new):
        ids.append(int(logits_of(model, ids)[0, -1].argmax()))
    handle.remove()
    return ids


POSITIONS = [*CLASSES, None, 0, -2, [1, -1], [2, len(IDS) + 1], slice(3, None)]


@pytest.mark.parametrize("positions", POSITIONS, ids=str)
def test_every_position_class_cached_and_uncached(gpt2, positions):
    expected = " ".join(map(str, by_hand(gpt2, positions)))
    for cache in (True, False):
        found = steer_generation(
            gpt2,
            None,
            IDS,
            VECTOR,
            LAYER,
            positions=positions,
            max_new_tokens=NEW,
            use_cache=cache,
        )
        assert found == expected


@pytest.mark.parametrize("positions", [None, "prompt", "generated"])
def test_generation_of_every_family_is_that_of_a_loop_by_hand(family, positions):
    _, model = family
    expected = " ".join(map(str, by_hand(model, positions)))
    before = hooks_of(model)
    for cache in (True, False):
        options = {"positions": positions, "max_new_tokens": NEW, "use_cache": cache}
        assert steer_generation(model, None, IDS, VECTOR, LAYER, **options) == expected
    assert hooks_of(model) == before


def test_batches_are_one_by_one_under_steering(family):
    _, model = family
    architecture = Architecture(model)
    prompts = [families.token_ids(1, n, seed=n)[0].tolist() for n in (2, 7, 4)]
    options = {"max_new_tokens": 4, "temperature": 3.0}
    for positions in (None, "prompt", "generated", [0, -1]):
        with steer(model, VECTOR, LAYER, positions=positions):
            whole, alone = (
                sample_continuations(architecture, None, prompts, 2, batch_size=size, **options)
                for size in (64, 1)
            )
        assert whole == alone


def test_the_same_random_numbers_without_steering_give_the_same_text(gpt2):
    architecture = Architecture(gpt2)
    options = {"max_new_tokens": 6, "temperature": 3.0}
    plain = sample_continuations(architecture, None, [IDS], 5, **options)
    with steer(gpt2, VECTOR, LAYER, 0.0):
        assert sample_continuations(architecture, None, [IDS], 5, **options) == plain
    with steer(gpt2, VECTOR, LAYER, 2.0):
        assert sample_continuations(architecture, None, [IDS], 5, **options) != plain


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 5.0, "top_k": 0, "seed": 3},
        {"num_beams": 3},
        {"num_beams": 4, "temperature": 4.0, "seed": 1},
        {"repetition_penalty": 1.5},
        {"prompt_lookup_num_tokens": 2},
    ],
    ids=str,
)
@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_sampling_and_beams_are_those_of_a_plain_hook(name, options):
    model = families.build(name)
    architecture = Architecture(model)
    handle = hooked(model, lambda h: h + 1.5 * VECTOR)
    expected = generate_text(architecture, None, IDS, max_new_tokens=8, **options)
    handle.remove()
    for _ in range(2):
        found = steer_generation(model, None, IDS, VECTOR, LAYER, 1.5, max_new_tokens=8, **options)
        assert found == expected
    assert generate_text(architecture, None, IDS, max_new_tokens=8, **options) != expected


@pytest.mark.parametrize("positions", ["prompt", "generated"])
def test_beams_know_prompt_from_generated(gpt2, positions):
    options = {"num_beams": 3, "max_new_tokens": 6, "positions": positions}
    cached, uncached = (
        steer_generation(gpt2, None, IDS, VECTOR, LAYER, use_cache=cache, **options)
        for cache in (True, False)
    )
    assert cached == uncached


def test_a_hook_of_the_user_stays_and_still_runs(gpt2):
    calls = []
    handle = Architecture(gpt2).blocks[LAYER].register_forward_hook(lambda *_: calls.append(1))
    before = hooks_of(gpt2)
    steer_generation(gpt2, None, IDS, VECTOR, LAYER, max_new_tokens=2)
    assert hooks_of(gpt2) == before
    handle.remove()
    assert len(calls) == 2


# --- Many layers, types, devices ------------------------------------------------------------------


def test_several_layers_at_once(gpt2):
    other = VECTOR.flip(0)
    handles = [
        hooked(gpt2, lambda h: h + 0.5 * VECTOR, 0),
        hooked(gpt2, lambda h: h + 0.5 * other, 2),
    ]
    expected = logits_of(gpt2)
    for handle in handles:
        handle.remove()
    directions = {2: Direction(other, 2), 0: Direction(VECTOR, 0)}
    with steer(gpt2, directions, coefficient=0.5):
        torch.testing.assert_close(logits_of(gpt2), expected)
    with steer(gpt2, directions, [0, "h.2"], 0.5):
        torch.testing.assert_close(logits_of(gpt2), expected)
    with steer(gpt2, VECTOR, 0, 0.5), steer(gpt2, other.numpy(), [-1], 0.5):
        torch.testing.assert_close(logits_of(gpt2), expected)
    with steer(gpt2, directions, "transformer.h.0", 0.5):
        assert not torch.allclose(logits_of(gpt2), expected)


def test_one_vector_at_several_layers(gpt2):
    handles = [hooked(gpt2, lambda h: h + VECTOR, layer) for layer in (0, 1, 2)]
    expected = logits_of(gpt2)
    for handle in handles:
        handle.remove()
    for directions in (VECTOR, Direction(VECTOR, 1)):
        with steer(gpt2, directions, [0, 1, 2]):
            torch.testing.assert_close(logits_of(gpt2), expected)


def test_other_sites(gpt2):
    handle = gpt2.transformer.h[LAYER].mlp.register_forward_hook(lambda _m, _a, out: out + VECTOR)
    expected = logits_of(gpt2)
    handle.remove()
    for options in ({"site": "mlp_out"}, {}):
        direction = VECTOR if options else Direction(VECTOR, LAYER, site="mlp_out")
        with steer(gpt2, direction, LAYER, **options):
            torch.testing.assert_close(logits_of(gpt2), expected)


@pytest.mark.parametrize("keep_norm", [False, True])
def test_a_bfloat16_stream_stays_bfloat16(keep_norm):
    model = families.build("llama").to(torch.bfloat16)
    with steer(model, VECTOR, LAYER, 2.0, keep_norm=keep_norm):
        stream, logits = stream_of(model), logits_of(model)
    assert stream.dtype == logits.dtype == torch.bfloat16
    h = stream_of(model).float()
    expected = h + 2 * VECTOR
    if keep_norm:
        expected *= h.norm(dim=-1, keepdim=True) / expected.norm(dim=-1, keepdim=True)
    assert torch.equal(stream, expected.bfloat16())


def test_an_offloaded_model_is_steered_alike(gpt2, tokenizer):
    """Between passes accelerate keeps the weights elsewhere, and leaves `meta` tensors behind."""
    accelerate = pytest.importorskip("accelerate")
    expected = create_steering_vector(gpt2, tokenizer, HAPPY, SAD, 1)
    text = steer_generation(gpt2, tokenizer, "the cat", expected, 1, max_new_tokens=4)
    model = families.build("gpt2")
    accelerate.cpu_offload(model.transformer.h[1])
    assert model.transformer.h[1].mlp.c_fc.weight.is_meta
    vector = create_steering_vector(model, tokenizer, HAPPY, SAD, 1)
    torch.testing.assert_close(vector, expected)
    assert steer_generation(model, tokenizer, "the cat", vector, 1, max_new_tokens=4) == text


def test_hooks_are_gone_however_it_ends(gpt2):
    before = hooks_of(gpt2)
    with pytest.raises(ZeroDivisionError), steer(gpt2, VECTOR, [0, 1]):
        assert hooks_of(gpt2) != before
        1 / 0  # noqa: B018
    assert hooks_of(gpt2) == before
    with pytest.raises(ValueError, match="position"):
        steer_generation(gpt2, None, IDS, VECTOR, LAYER, positions="first")
    with pytest.raises(LayerError):
        steer(gpt2, VECTOR, [0, 9])
    with pytest.raises((TypeError, ValueError)):
        steer_generation(gpt2, None, IDS, VECTOR, LAYER, no_such_option=1)
    assert hooks_of(gpt2) == before


# --- The calls ------------------------------------------------------------------------------------

HAPPY, SAD = ["the cat sat on the mat", "a cat is here"], ["no dog ran", "it is bad on a road"]


def last_activation(model, tokenizer, text, layer=LAYER):
    seen = []
    handle = hooked(model, lambda h: seen.append(h[0, -1].clone()) or h, layer)
    logits_of(model, tokenizer(text)["input_ids"])
    handle.remove()
    return seen[0]


def mean_gap(model, tokenizer, layer=LAYER):
    means = [
        torch.stack([last_activation(model, tokenizer, t, layer) for t in texts]).mean(0)
        for texts in (HAPPY, SAD)
    ]
    return means[0] - means[1]


@pytest.mark.parametrize("layer", [1, "1", "h.1", "transformer.h.1", -2])
def test_create_steering_vector_is_the_difference_of_means(gpt2, tokenizer, layer):
    vector = create_steering_vector(gpt2, tokenizer, HAPPY, SAD, layer)
    torch.testing.assert_close(vector, mean_gap(gpt2, tokenizer), rtol=1e-4, atol=1e-4)
    unit = create_steering_vector(gpt2, tokenizer, HAPPY, SAD, layer, normalize=True)
    torch.testing.assert_close(unit, vector / vector.norm())
    assert (vector.dtype, vector.requires_grad) == (torch.float32, False)


def test_a_vector_needs_no_head(gpt2, tokenizer):
    whole = create_steering_vector(gpt2, tokenizer, HAPPY, SAD, "transformer.h.1")
    base = create_steering_vector(gpt2.transformer, tokenizer, HAPPY, SAD, "transformer.h.1")
    torch.testing.assert_close(base, whole)
    with pytest.raises(ArchitectureError, match="head"):
        steer_generation(gpt2.transformer, tokenizer, "the cat", whole, 1)


def test_the_facade_composes_the_two_calls(gpt2, tokenizer):
    options = {"max_new_tokens": 6}
    for coefficient in (-2.0, 2.0):
        vector = create_steering_vector(gpt2, tokenizer, HAPPY, SAD, 1)  # 3 // 2
        expected = steer_generation(gpt2, tokenizer, "the cat", vector, 1, coefficient, **options)
        found = generate_with_steering(
            gpt2, tokenizer, "the cat", HAPPY, SAD, coefficient=coefficient, max_new_tokens=6
        )
        assert found == expected
        assert found.startswith("the cat")
    several = generate_with_steering(
        gpt2, tokenizer, "the cat", HAPPY, SAD, ["h.0", 2], max_new_tokens=6
    )
    directions = {
        layer: Direction(create_steering_vector(gpt2, tokenizer, HAPPY, SAD, layer), layer)
        for layer in (0, 2)
    }
    expected = steer_generation(gpt2, tokenizer, "the cat", directions, None, 2.0, **options)
    assert several == expected


def test_max_length_counts_the_prompt(gpt2):
    for given, total in (({"max_length": 9}, 9), ({}, 50), ({"max_new_tokens": 2}, len(IDS) + 2)):
        text = steer_generation(gpt2, None, IDS, VECTOR, LAYER, **given)
        assert len(text.split()) == total
    with pytest.raises(InputError, match=r"prompt's 6 tokens .* give max_new_tokens="):
        steer_generation(gpt2, None, IDS, VECTOR, LAYER, max_length=6)


def test_a_chat_is_continued(gpt2):
    tokenizer = families.tiny_tokenizer(bos=True)
    tokenizer.chat_template = "{{ bos_token }}{% for m in messages %}{{ m['content'] }}{% endfor %}"
    chats = [[{"role": "user", "content": text}] for text in ("the cat", "a dog", "it is")]
    text = generate_with_steering(
        gpt2, tokenizer, chats[2], chats[:1], chats[1:2], max_new_tokens=4
    )
    expected = generate_with_steering(
        gpt2, tokenizer, "it is", ["the cat"], ["a dog"], max_new_tokens=4
    )
    assert text == expected


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"steering_vector": torch.ones(31)}, InputError, r"is \[32\]; came \[31\]"),
        ({"steering_vector": torch.full((32,), math.nan)}, InputError, "NaN"),
        ({"steering_vector": "happy"}, InputError, "directions are a Direction"),
        ({"steering_vector": [1.0] * 32}, InputError, "directions are a Direction"),
        ({"layer_name": 7}, LayerError, r"valid are 0\.\.2"),
        ({"layer_name": "layers.1"}, LayerError, "nearest is"),
        ({"layer_name": None}, InputError, "belongs to no layer: give layers="),
        ({"layer_name": []}, InputError, "at least one layer"),
        ({"layer_name": [1, "h.1"]}, InputError, "each once"),
        ({"steering_vector": {0: Direction(VECTOR, 0)}}, InputError, "no direction of layer 1"),
        ({"operation": "multiply"}, InputError, "none of add, subtract"),
        (
            {"steering_vector": torch.zeros(32), "operation": "ablate"},
            InputError,
            "no direction to ablate",
        ),
        ({"positions": "end"}, InputError, "none of all, prompt"),
        ({"positions": 99}, InputError, "never took effect"),
        ({"positions": "generated", "max_new_tokens": 1}, InputError, "never took effect"),
        ({"positions": "prompt", "guidance_scale": 2.0}, InputError, "runs two prompts"),
        ({"prompt": [1, 200]}, InputError, "outside the model's vocabulary"),
        ({"prompt": "text"}, InputError, "needs a tokenizer"),
    ],
)
def test_bad_input_says_what_to_do(gpt2, arguments, error, message):
    given = {"prompt": IDS, "steering_vector": VECTOR, "layer_name": LAYER, "max_new_tokens": 3}
    with pytest.raises(error, match=message):
        steer_generation(gpt2, None, **(given | arguments))


def test_bad_sites_and_directions_of_absent_layers(gpt2):
    with pytest.raises(SiteError):
        steer(gpt2, VECTOR, 1, site="nowhere")
    with pytest.raises(LayerError, match="layer 7 is out of range"):
        steer(gpt2, Direction(VECTOR, 7))
    with pytest.raises(InputError, match="write positive_prompts="):
        generate_with_steering(gpt2, None, IDS, "happy", ["sad"])
