"""Patches and steering in force, against hooks written by hand, with and without a cache."""

import dataclasses

import numpy as np
import pytest
import torch
from transformers import StaticCache

import families
from activation_extraction import ActivationExtractor
from expert_routing import ROUTING
from forward_pass import SITES, InputError, LayerError, Site, SiteError
from intervention_handler import ActivationPatch, InterventionHandler, SteeringVector, token_shape
from model_architecture import Architecture
from patch_oracle import (
    assert_untouched,
    by_token,
    hooked_logits,
    hooks_on,
    recorded,
    sites_of,
    state_of,
)

IDS = torch.tensor([[7, 11, 15, 6, 49, 10, 13, 12]])
OTHER = torch.tensor([[30, 11, 15, 8, 49, 21, 13, 40]])
LENGTH = IDS.shape[1]
D = families.HIDDEN


@pytest.fixture(scope="module")
def llama():
    return families.build("llama")


@pytest.fixture(scope="module")
def gpt2():
    return families.build("gpt2")


@torch.no_grad()
def run(model, *items, ids=IDS, **inputs):
    handler = InterventionHandler(model)
    for item in items:
        kind = "steering_vector" if isinstance(item, SteeringVector) else "activation_patch"
        getattr(handler, f"register_{kind}")(item)
    with handler:
        return model(ids, **inputs).logits


def plain(model, ids=IDS, **inputs):
    with torch.no_grad():
        return model(ids, **inputs).logits


def draw(*shape, seed=3, std=1.0):
    return std * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# --- Every family, every site ---------------------------------------------------------------------


def test_every_site_of_every_family(family):
    """Another prompt's activation, by a tensor, a record and a function, is what a hook puts.

    At one position, and at all of them, in turn over families and sites.
    """
    name, model = family
    extractor = ActivationExtractor(model, None)
    for number, site in enumerate(sites_of(model), list(families.FAMILIES).index(name)):
        position = None if number % 2 else 2
        there = recorded(model, OTHER, site)[0]

        def change(shown, there=there, position=position):
            new = shown.clone()
            for i in range(LENGTH) if position is None else [position]:
                new[0, i] = there[i]
            return new

        expected = hooked_logits(model, IDS, [(site, change)])
        assert not torch.equal(expected, plain(model))
        record = extractor.extract_activations(
            OTHER[0].tolist(), layer_indices=[site.layer], sites=(site.name,)
        )
        part = there if position is None else there[position]
        for value in (part, part[None, None] if position is not None else part[None], record):
            patch = ActivationPatch(site.layer, position, value, site=site.name)
            torch.testing.assert_close(run(model, patch), expected, rtol=0, atol=1e-5)
        shown = part[None] if position is None else part[None, None]
        function = ActivationPatch(
            site.layer, position, lambda _h, shown=shown: shown, site=site.name
        )
        torch.testing.assert_close(run(model, function), expected, rtol=0, atol=1e-5)


def test_one_head_of_every_family(family):
    _, model = family
    for site in sites_of(model, ("head_out", "query", "key", "value", "attn_pattern")):
        there = recorded(model, OTHER, site)[0]
        for head in {0, there.shape[1] - 1}:

            def change(shown, there=there, head=head):
                new = shown.clone()
                new[0, [1, 5], head] = there[[1, 5], head]
                return new

            expected = hooked_logits(model, IDS, [(site, change)])
            for index in (head, head - there.shape[1]):
                patch = ActivationPatch(
                    site.layer, [5, 1], there[[5, 1], head], site=site.name, head=index
                )
                torch.testing.assert_close(run(model, patch), expected, rtol=0, atol=1e-5)


def test_neurons_of_every_family(family):
    _, model = family
    for site in sites_of(model, ("resid_pre", "resid_mid", "mlp_out", "mlp_neurons", "head_out")):
        there = recorded(model, OTHER, site)[0]
        width = there.shape[-1]

        def change(shown, there=there, width=width):
            new = shown.clone()
            new[0, 4, ..., 1] = there[4, ..., 1]
            new[0, 4, ..., width - 1] = there[4, ..., width - 1]
            return new

        expected = hooked_logits(model, IDS, [(site, change)])
        patch = ActivationPatch(
            site.layer, 4, there[4][..., [1, -1]], site=site.name, neuron=[1, -1]
        )
        torch.testing.assert_close(run(model, patch), expected, rtol=0, atol=1e-5)


def test_a_patch_with_a_runs_own_activation_changes_nothing(family):
    _, model = family
    for site in sites_of(model):
        if site.name == "attn_pattern":
            continue  # it is computed by another implementation, up to rounding
        own = recorded(model, IDS, site)[0]
        assert torch.equal(
            run(model, ActivationPatch(site.layer, None, own, site=site.name)), plain(model)
        )
        scaled = ActivationPatch(site.layer, None, 1.0, mode="scale", site=site.name)
        assert torch.equal(run(model, scaled), plain(model))


def test_patching_the_last_layer_gives_the_other_run(family):
    _, model = family
    there = recorded(model, OTHER, Site("resid_post", Architecture(model).n_layers - 1))[0]
    assert torch.equal(run(model, ActivationPatch(-1, None, there)), plain(model, OTHER))


def test_nothing_is_left_behind(family):
    """Also when the body raises, when a pass is refused, when registering fails, on Ctrl-C."""
    _, model = family
    Architecture(model).structure  # noqa: B018 - what it leaves is another test's
    before = state_of(model)
    handler = InterventionHandler(model)
    for site in sites_of(model):
        handler.register_activation_patch(ActivationPatch(site.layer, -1, 2.0, "scale", site.name))
    handler.register_steering_vector(SteeringVector(draw(D), 0))
    with handler, torch.no_grad():
        model(IDS)
    for error in (RuntimeError, KeyboardInterrupt):
        with pytest.raises(error, match="on purpose"), handler:
            raise error("on purpose")
    with pytest.raises(LayerError), handler:
        handler.register_activation_patch(ActivationPatch(99, 0, 0.0))
    with pytest.raises(InputError, match="before the start"), handler, torch.no_grad():
        handler.register_activation_patch(ActivationPatch(0, -9, 0.0))
        model(IDS)
    assert_untouched(model, before)
    # what was learnt of the model is still true
    assert torch.isfinite(plain(model)).all()


# --- Positions, padding, caches -------------------------------------------------------------------

ROWS = [[7, 11, 15], [6, 49, 10, 13, 12]]
MASK = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
BATCH = torch.tensor([[0, 0, *ROWS[0]], ROWS[1]])
NEW = 6

WHERE = {
    "all": None,
    "prompt": "prompt",
    "generated": "generated",
    "last": -1,
    "second": 1,
    "third generated or later": [0, 6, 4],
    "slice": slice(2, 7, 2),
    "from the end": slice(-2, None),
}


@torch.no_grad()
def generate(model, ids, mask, cached, **options):
    """Return the tokens, and the logits that they were chosen by, ``[batch, step, vocab]``."""
    options = {"do_sample": False, "pad_token_id": 0, "max_new_tokens": NEW} | options
    flags = {"return_dict_in_generate": True, "output_logits": True}
    output = model.generate(ids, attention_mask=mask, use_cache=cached, **flags, **options)
    return output.sequences[:, ids.shape[1] :], torch.stack(output.logits, 1)


def generate_with(model, items, ids, mask, cached, **options):
    handler = InterventionHandler(model)
    for item in items:
        handler._register(item)
    with handler:
        return generate(model, ids, mask, cached, **options)


def patches_at(model, where, strong=1.0):
    """Return one change of each kind."""
    architecture = Architecture(model)
    middle = architecture.n_layers // 2
    items = [
        ActivationPatch(1, where, draw(D, std=strong), "add"),
        ActivationPatch(middle, where, lambda h: -h, site="attn_out"),
        SteeringVector(draw(D, seed=4), -1, 2.0 * strong, where),
    ]
    if not architecture.missing(Site("value", middle)):
        items += [
            ActivationPatch(middle, where, strong, "add", site="value", head=0),
            ActivationPatch(middle, where, -1.0, "scale", site="key", head=-1),
            ActivationPatch(middle, where, 0.5, "subtract", site="query"),
        ]
    return items


def assert_same_generation(one, other):
    assert torch.equal(one[0], other[0])
    scale = float(one[1].abs().max())
    torch.testing.assert_close(one[1], other[1], rtol=0, atol=1e-5 * max(scale, 10))


def test_cached_and_uncached_generation_give_the_same_text(family):
    """Every kind of position at once, in a padded batch, and each row alone."""
    _, model = family
    kinds = patches_at(model, None)
    items = [
        replaced_position(kinds[i % len(kinds)], where) for i, where in enumerate(WHERE.values())
    ]
    cached = generate_with(model, items, BATCH, MASK, True)
    assert_same_generation(generate_with(model, items, BATCH, MASK, False), cached)
    assert not torch.allclose(
        generate(model, BATCH, MASK, True)[1][:, 0], cached[1][:, 0], atol=0.1
    )
    for row, tokens in enumerate(ROWS):
        ids = torch.tensor([tokens])
        alone = generate_with(model, items, ids, torch.ones_like(ids), row == 0)
        assert_same_generation(alone, tuple(part[row][None] for part in cached))


def replaced_position(item, where):
    name = "positions" if isinstance(item, SteeringVector) else "position"
    return dataclasses.replace(item, **{name: where})


@pytest.mark.parametrize("where", WHERE)
@pytest.mark.parametrize("name", ["gpt2", "llama", "bloom", "gemma2", "mamba"])
def test_each_kind_of_position_in_generation(name, where):
    model = families.build(name)
    items = patches_at(model, WHERE[where], strong=2.0)
    cached = generate_with(model, items, BATCH, MASK, True)
    assert_same_generation(generate_with(model, items, BATCH, MASK, False), cached)
    before = generate(model, BATCH, MASK, True)
    changed = [
        not torch.allclose(before[1][:, step], cached[1][:, step], atol=0.05) for step in range(NEW)
    ]
    # generated tokens are first fed back in the second step, position 1 is of every prompt
    assert changed[1:] == [True] * (NEW - 1)
    assert changed[0] == (where != "generated")


@pytest.mark.parametrize("name", ["mistral", "gemma2", "gemma3", "gpt_oss"])
@pytest.mark.parametrize("site", ["key", "value"])
def test_keys_that_a_sliding_window_has_forgotten(name, site):
    """A cache of the last few positions is not indexed as if it were whole."""
    model = families.build(name)
    mask = torch.ones(1, LENGTH)
    before = generate(model, IDS, mask, True)
    for where in ([LENGTH - 1, 1], "generated"):
        items = [
            ActivationPatch(layer, where, draw(16, std=3), site=site, head=1)
            for layer in range(Architecture(model).n_layers)
        ]
        cached = generate_with(model, items, IDS, mask, True)
        assert_same_generation(generate_with(model, items, IDS, mask, False), cached)
        assert not torch.allclose(before[1], cached[1], atol=0.1)


@pytest.mark.parametrize("name", ["gpt2", "llama", "bloom"])
@pytest.mark.parametrize(
    "options",
    [
        {"num_beams": 3, "num_return_sequences": 2},
        {"do_sample": True, "num_return_sequences": 2, "temperature": 0.7},
    ],
    ids=["beams", "samples"],
)
def test_beams_and_several_samples(name, options):
    model = families.build(name)
    items = [
        ActivationPatch(1, [2, 4], draw(D, std=3), "add"),
        ActivationPatch(1, "generated", 0.5, "scale"),
    ]
    texts = []
    for cached in (True, False):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            texts.append(generate_with(model, items, BATCH, MASK, cached, **options)[0])
    assert torch.equal(*texts)


def test_a_static_cache(llama):
    items = [
        ActivationPatch(1, where, draw(8, std=4), site="value", head=1)
        for where in (1, "generated")
    ]
    mask = torch.ones(1, LENGTH)
    wanted = generate_with(llama, items, IDS, mask, True)
    cache = StaticCache(config=llama.config, max_cache_len=32)
    options = {"past_key_values": cache, "disable_compile": True}
    assert_same_generation(generate_with(llama, items, IDS, mask, True, **options), wanted)


def test_each_row_of_a_padded_batch_gets_its_own_tokens(family):
    """Against each row alone."""
    _, model = family
    inputs = Architecture(model).inputs(BATCH, MASK)
    kwargs = {name: value for name, value in inputs.items() if name != "input_ids"}
    for spec in (-1, [2, 0], slice(1, None)):
        patch = ActivationPatch(1, spec, lambda h: h * 0.3 + 1)
        logits = run(model, patch, ids=BATCH, **kwargs)
        for row, tokens in enumerate(ROWS):
            alone = run(model, patch, ids=torch.tensor([tokens]))[0]
            torch.testing.assert_close(logits[row, MASK[row].bool()], alone, rtol=0, atol=2e-4)


def test_right_padding(llama):
    ids = torch.tensor([[*ROWS[0], 0, 0], ROWS[1]])
    for spec in (-1, [2, 0], slice(-2, None)):
        patch = ActivationPatch(1, spec, draw(D, std=3), "add")
        logits = run(llama, patch, ids=ids, attention_mask=MASK.flip(1))
        for row, tokens in enumerate(ROWS):
            alone = run(llama, patch, ids=torch.tensor([tokens]))[0]
            torch.testing.assert_close(logits[row, : len(tokens)], alone, rtol=0, atol=1e-4)


def test_values_per_position_and_row_of_a_padded_batch(llama):
    """``[batch, position, d]`` belongs to a row's real tokens, whatever stands beside it."""
    value = draw(2, 2, D)
    mask = {"attention_mask": MASK}
    logits = run(llama, ActivationPatch(1, [-1, 0], value), ids=BATCH, **mask)
    for row, tokens in enumerate(ROWS):

        def change(shown, row=row):
            new = shown.clone()
            new[0, -1], new[0, 0] = value[row, 0], value[row, 1]
            return new

        alone = hooked_logits(llama, tokens, [(Site("resid_post", 1), change)])[0]
        torch.testing.assert_close(logits[row, MASK[row].bool()], alone, rtol=0, atol=1e-4)
    per_row = run(llama, ActivationPatch(1, 4, draw(2, 1, D)), ids=BATCH, **mask)
    assert torch.equal(per_row[0], plain(llama, BATCH, **mask)[0])  # it has no fifth token


# --- Values and modes -----------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["replace", "add", "subtract", "scale"])
def test_modes(gpt2, mode):
    value = draw(D)
    written = {
        "replace": lambda h: value.expand_as(h),
        "add": lambda h: h + value,
        "subtract": lambda h: h - value,
        "scale": lambda h: h * value,
    }[mode]

    def change(shown):
        new = shown.clone()
        new[:, 2:5] = written(shown[:, 2:5])
        return new

    expected = hooked_logits(gpt2, IDS, [(Site("resid_mid", 1), change)])
    for given in (
        value,
        value[None],
        value.numpy(),
        value.tolist(),
        value.double(),
        lambda _h: value,
    ):
        patch = ActivationPatch(1, slice(2, 5), given, mode, "resid_mid")
        torch.testing.assert_close(run(gpt2, patch), expected, rtol=0, atol=1e-5)


def test_a_number_is_not_rounded_to_float32():
    model = families.build("gpt2").double()
    change = lambda h: h * 0.1  # noqa: E731
    expected = hooked_logits(model, IDS, [(Site("resid_post", 1), change)])
    for value in (0.1, np.float64(0.1), [0.1]):
        found = run(model, ActivationPatch(1, None, value, "scale"))
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


def test_a_value_takes_the_dtype_of_the_stream():
    model = families.build("llama").bfloat16()
    patch = ActivationPatch(1, -1, draw(D))
    steer = SteeringVector(draw(D), 1)
    assert run(model, patch, steer).dtype == torch.bfloat16


def test_a_function_is_given_the_activation_at_its_positions(llama):
    seen = {}

    def note(name):
        def function(value):
            seen[name] = value
            value += 1  # its own copy
            return value - 1

        return function

    stream = recorded(llama, IDS, Site("resid_post", 1))
    heads = recorded(llama, IDS, Site("head_out", 1))
    found = run(
        llama,
        ActivationPatch(1, [5, 2], note("list"), neuron=[3, 0]),
        ActivationPatch(1, None, note("head"), site="head_out", head=2),
    )
    torch.testing.assert_close(found, plain(llama), rtol=0, atol=1e-4)
    # in the order of the sequence
    torch.testing.assert_close(seen["list"] - 1, stream[:, [2, 5]][..., [3, 0]], rtol=0, atol=1e-5)
    torch.testing.assert_close(seen["head"] - 1, heads[:, :, 2], rtol=0, atol=1e-5)


def test_a_tensor_is_kept_in_the_graph(llama):
    value = draw(D).requires_grad_()
    handler = InterventionHandler(llama).register_activation_patch(ActivationPatch(1, -1, value))
    with handler:
        logits = llama(IDS).logits[0, -1, 5]
    (slope,) = torch.autograd.grad(logits, value)
    step = draw(D, seed=5)
    moved = [
        run(llama, ActivationPatch(1, -1, value.detach() + s * step))[0, -1, 5]
        for s in (1e-2, -1e-2)
    ]
    torch.testing.assert_close(slope @ step, (moved[0] - moved[1]) / 2e-2, rtol=2e-2, atol=2e-2)


def test_a_record_of_another_length(llama):
    """Negative positions count from that prompt's end."""
    longer = [3, *OTHER[0].tolist()]
    extractor = ActivationExtractor(llama, None)
    record = extractor.extract_activations(longer, layer_indices=[1])
    there = recorded(llama, longer, Site("resid_post", 1))[0]
    for spec, row in ((-1, 8), (-2, 7), (0, 0), ([0, -1], [0, 8]), (slice(-2, None), [7, 8])):
        ours = row if isinstance(row, list) else [row]

        def change(shown, ours=ours):
            new = shown.clone()
            for place in ours:
                new[0, place if place < 2 else place - 1] = there[place]
            return new

        expected = hooked_logits(llama, IDS, [(Site("resid_post", 1), change)])
        found = run(llama, ActivationPatch(1, spec, record))
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    only = extractor.extract_activations(longer, layer_indices=[1], positions=[2])
    with pytest.raises(InputError, match=r"does not hold position 8, only \[2\]"):
        run(llama, ActivationPatch(1, -1, only))
    with pytest.raises(InputError, match="does not say which tokens of a record"):
        run(llama, ActivationPatch(1, "generated", record))


@pytest.mark.parametrize("layer", [1, "1", "layers.1", "model.layers.1", -2])
def test_layer_spellings(llama, layer):
    expected = hooked_logits(llama, IDS, [(Site("resid_post", 1), torch.zeros_like)])
    assert torch.equal(run(llama, ActivationPatch(layer, None, 0.0)), expected)
    steered = run(llama, SteeringVector(draw(D), layer))
    expected = hooked_logits(llama, IDS, [(Site("resid_post", 1), lambda h: h + draw(D))])
    torch.testing.assert_close(steered, expected, rtol=0, atol=1e-5)


# --- Several, nested, late ------------------------------------------------------------------------


def test_several_act_in_the_order_registered(gpt2):
    double = ActivationPatch(1, 2, 2.0, "scale")
    push = SteeringVector(draw(D), 1, positions=2)

    def first_double(h):
        new = h.clone()
        new[:, 2] = h[:, 2] * 2 + draw(D)
        return new

    def first_push(h):
        new = h.clone()
        new[:, 2] = (h[:, 2] + draw(D)) * 2
        return new

    for items, change in (((double, push), first_double), ((push, double), first_push)):
        expected = hooked_logits(gpt2, IDS, [(Site("resid_post", 1), change)])
        torch.testing.assert_close(run(gpt2, *items), expected, rtol=0, atol=1e-5)


def test_nested_handlers_act_from_the_outside_in(gpt2):
    outer = InterventionHandler(gpt2).register_activation_patch(
        ActivationPatch(1, None, 2.0, "scale")
    )
    inner = InterventionHandler(gpt2).register_activation_patch(
        ActivationPatch(1, None, 1.0, "add")
    )
    with torch.no_grad():
        with outer, inner:
            both = gpt2(IDS).logits
        with outer:
            with inner:
                gpt2(IDS)
            once = gpt2(IDS).logits
    change = lambda h: h * 2 + 1  # noqa: E731
    expected = hooked_logits(gpt2, IDS, [(Site("resid_post", 1), change)])
    torch.testing.assert_close(both, expected, rtol=0, atol=1e-5)
    assert torch.equal(once, run(gpt2, ActivationPatch(1, None, 2.0, "scale")))


def test_registering_and_clearing_inside(llama):
    handler = InterventionHandler(llama)
    with handler, torch.no_grad():
        assert torch.equal(llama(IDS).logits, plain(llama))
        handler.register_activation_patch(ActivationPatch(1, 2, 0.0))
        late = llama(IDS).logits
        handler.register_steering_vector(SteeringVector(draw(D), 0))
        both = llama(IDS).logits
        handler.clear_interventions()
        assert torch.equal(llama(IDS).logits, plain(llama))
        handler.register_activation_patch(ActivationPatch(1, 2, 0.0))
        assert torch.equal(llama(IDS).logits, late)
    assert torch.equal(late, run(llama, ActivationPatch(1, 2, 0.0)))
    assert torch.equal(both, run(llama, ActivationPatch(1, 2, 0.0), SteeringVector(draw(D), 0)))
    with handler, torch.no_grad():  # again
        assert torch.equal(llama(IDS).logits, late)


def test_registering_inside_an_open_handler_runs_no_pass(llama):
    """Finding out a site's shape must not count as a pass of the outer handler."""
    model = families.build("llama")
    seen = []
    outer = InterventionHandler(model)
    outer.register_activation_patch(ActivationPatch(1, 0, lambda h: seen.append(1) or h))
    with pytest.raises(InputError, match="never took effect: no pass was run"), outer:
        inner = InterventionHandler(model)
        for name in set(SITES) - set(ROUTING):
            inner.register_activation_patch(ActivationPatch(0, 0, 0.0, site=name))
        outer.register_activation_patch(ActivationPatch(0, 0, 0.0, site="attn_pattern"))
    assert not seen


def test_opening_twice_is_refused(llama):
    handler = InterventionHandler(llama).register_activation_patch(ActivationPatch(1, 0, 0.0))
    before = hooks_on(llama)
    with handler, torch.no_grad():
        with pytest.raises(InputError, match="open already"):
            handler.__enter__()
        assert not torch.equal(llama(IDS).logits, plain(families.build("llama")))
    assert hooks_on(llama) == before


def test_two_prompts_in_one_context(llama):
    """A prompt that begins with the one before it is a prompt of its own."""
    handler = InterventionHandler(llama).register_activation_patch(ActivationPatch(1, -1, 0.0))
    with handler, torch.no_grad():
        found = [llama(IDS[:, :length]).logits for length in (5, 6, 7)]
    for length, logits in zip((5, 6, 7), found, strict=True):
        assert torch.equal(logits, run(llama, ActivationPatch(1, -1, 0.0), ids=IDS[:, :length]))


# --- Refused --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("patch", "error", "message"),
    [
        (lambda: ActivationPatch(9, 0, 0.0), LayerError, r"layer 9 is out of range.*0\.\.2"),
        (lambda: ActivationPatch("layers.9", 0, 0.0), LayerError, "nearest is"),
        (lambda: ActivationPatch(1, 0, 0.0, site="resid"), SiteError, "no site 'resid'; sites are"),
        (lambda: ActivationPatch(1, 0, 0.0, "swap"), InputError, "mode 'swap' is none of replace"),
        (lambda: ActivationPatch(1, "end", 0.0), InputError, "'end' is none of all, prompt"),
        (lambda: ActivationPatch(1, 0, 0.0, head=0), SiteError, "resid_post has no head axis"),
        (
            lambda: ActivationPatch(1, 0, 0.0, site="key", head=2),
            SiteError,
            r"head 2 is out of range: key of layer 1 has 2, valid are 0\.\.1",
        ),
        (
            lambda: ActivationPatch(1, 0, 0.0, site="query", head=4),
            SiteError,
            r"head 4 .*has 4, valid are 0\.\.3",
        ),
        (
            lambda: ActivationPatch(1, 0, 0.0, neuron=[3, 32]),
            SiteError,
            r"neuron 32 .*has 32, valid are 0\.\.31",
        ),
        (lambda: ActivationPatch(1, 0, 0.0, neuron=[]), SiteError, "neuron is an index, or a list"),
        (lambda: ActivationPatch(1, 0, 0.0, neuron=1.5), SiteError, "neuron is an index"),
        (
            lambda: ActivationPatch(1, 0, 0.0, site="attn_pattern", neuron=-1),
            SiteError,
            "attn_pattern has keys on its last axis",
        ),
        (lambda: ActivationPatch(1, 0, draw(31)), InputError, r"must be \[32\] for one.*\[31\]"),
        (lambda: ActivationPatch(1, 0, draw(1, 1, 1, D)), InputError, r"came \[1, 1, 1, 32\]"),
        (
            lambda: ActivationPatch(1, 0, draw(8), site="mlp_out"),
            InputError,
            r"must be \[32\] for one token, or have the positions.*came \[8\]",
        ),
        (
            lambda: ActivationPatch(1, 0, draw(4, 9), site="head_out"),
            InputError,
            r"must be \[4, 8\]",
        ),
        (
            lambda: ActivationPatch(1, 0, draw(4, 8), site="head_out", head=2),
            InputError,
            "holds 4 positions, and 1 token is to be patched",
        ),
        (
            lambda: ActivationPatch(1, [2, 3], draw(5, D)),
            InputError,
            "holds 5 positions, and 2 tokens are",
        ),
        (
            lambda: ActivationPatch(1, [2, 3, 4], draw(2, D)),
            InputError,
            "holds 2 positions, and 3 tokens are",
        ),
        (lambda: ActivationPatch(1, 0, "big"), InputError, "a tensor, a number, a function.*str"),
        (lambda: ActivationPatch(1, 0, None), InputError, "a tensor, a number.*NoneType"),
        (lambda: SteeringVector(draw(31), 1), InputError, r"layer 1 is \[32\]; came \[31\]"),
        (
            lambda: SteeringVector(draw(8), 1, site="head_out"),
            SiteError,
            "head_out does not hold one vector per token",
        ),
        (lambda: SteeringVector(draw(D), 7), LayerError, "layer 7 is out of range"),
        (lambda: draw(D), InputError, "an ActivationPatch or a SteeringVector, not Tensor"),
    ],
)
def test_what_does_not_fit_is_refused_when_it_is_registered(llama, patch, error, message):
    handler = InterventionHandler(llama)
    with pytest.raises(error, match=message):
        handler._register(patch())
    assert not handler.interventions


@pytest.mark.parametrize(
    ("patch", "message"),
    [
        (ActivationPatch(1, None, draw(5, D)), "holds 5 positions, and 8 tokens are"),
        (ActivationPatch(1, "prompt", draw(9, D)), "holds 9 positions, and 8 tokens are"),
        (ActivationPatch(1, slice(2, 6), draw(3, D)), "holds 3 positions, and 4 tokens are"),
        (ActivationPatch(1, None, draw(2, 8, D)), "holds 2 rows, the batch has 1"),
        (ActivationPatch(1, -9, 0.0), "position -9 lies before the start of row 0"),
        (ActivationPatch(1, [0, -9], 0.0), "position -9 lies before"),
    ],
)
def test_what_does_not_fit_a_prompt_is_refused_before_its_blocks_run(llama, patch, message):
    run(llama, ActivationPatch(1, 0, 0.0))  # what is found out once per model is known now
    ran = []
    handle = llama.model.layers[0].register_forward_hook(lambda *_: ran.append(1))
    with pytest.raises(InputError, match=message):
        run(llama, patch)
    handle.remove()
    assert not ran


@pytest.mark.parametrize(
    ("item", "message"),
    [
        (ActivationPatch(1, 8, 0.0), "position 8.*never took effect: the passes held 8 tokens"),
        (ActivationPatch(1, "generated", 0.0), "never took effect"),
        (ActivationPatch(1, slice(4, 4), 0.0), "never took effect"),
        (ActivationPatch(1, [0, 9], 0.0), "never took effect at position 9: the passes held 8"),
        (ActivationPatch(1, [7, -1], 0.0), "never took effect at position 7"),
        (ActivationPatch(1, None, draw(9, D)), "holds 9 positions, and 8 tokens are"),
        (ActivationPatch(1, slice(0, 3), draw(4, D)), "holds 4 positions, and 3 tokens are"),
        (SteeringVector(draw(D), 1, positions=[20]), "SteeringVector.*never took effect"),
    ],
)
def test_what_never_fired_is_an_error(llama, item, message):
    before = hooks_on(llama)
    with pytest.raises(InputError, match=message):
        run(llama, ActivationPatch(0, 0, 0.0), item)
    assert hooks_on(llama) == before


def test_no_pass_at_all_is_an_error_and_another_error_goes_first(llama):
    handler = InterventionHandler(llama).register_activation_patch(ActivationPatch(1, 0, 0.0))
    with pytest.raises(InputError, match="no pass was run"), handler:
        pass
    with pytest.raises(ZeroDivisionError), handler:
        raise ZeroDivisionError
    with InterventionHandler(llama):
        pass


def test_a_function_that_returns_another_shape(llama):
    for function, came in (
        (lambda h: h[0, 0, :5], r"\(5,\)"),
        (lambda h: h[:, :0], r"\(1, 0, 32\)"),
        (lambda h: torch.cat([h, h]), r"\(2, 2, 32\)"),
        (lambda _h: 1.0, "float"),
    ):
        with pytest.raises(InputError, match=rf"given \(1, 2, 32\).*returned {came}"):
            run(llama, ActivationPatch(1, [0, 1], function))


def test_a_pattern_with_another_number_of_keys(llama):
    for value, head in ((torch.rand(4, 7), None), (torch.rand(7), 1)):
        with pytest.raises(InputError, match="holds 7 keys, and 8 stand there"):
            run(llama, ActivationPatch(1, 2, value, site="attn_pattern", head=head))


def test_a_model_without_the_site():
    with pytest.raises(SiteError):
        InterventionHandler(families.build("mamba"))._register(
            ActivationPatch(1, 0, 0.0, site="key")
        )


def test_reprs(llama):
    handler = InterventionHandler(llama)
    handler.register_activation_patch(ActivationPatch(1, [0], 0.0, site="key", head=1, neuron=2))
    written = "replace key of layer 1, head 1, neuron 2, position [0]"
    assert repr(handler) == f"InterventionHandler([ActivationPatch({written})], closed)"
    with pytest.raises(InputError), handler:
        assert "open" in repr(handler)


# --- Small parts ----------------------------------------------------------------------------------


def test_token_shapes(family):
    _, model = family
    architecture = Architecture(model)
    for layer in range(architecture.n_layers):
        for name in architecture.available_sites(layer):
            site = Site(name, layer)
            expected = tuple(recorded(model, IDS[:, :5], site).shape[2:])
            assert token_shape(architecture, site) == expected
    value = torch.zeros(2, 3, 4, 5)
    assert by_token(value, Site("attn_pattern", 0)).shape == (2, 4, 3, 5)


def test_a_prompt_fed_in_chunks_is_refused():
    from intervention import generate_with_patching
    from steering import steer_generation

    model, ids = families.build("gpt2"), [5, 6, 7, 8]
    chunks = {"prefill_chunk_size": 2, "max_new_tokens": 2}
    patch = ActivationPatch(1, -1, 0.0)
    with pytest.raises(InputError, match="prefill_chunk_size=2 splits the prompt"):
        generate_with_patching(model, None, ids, patch, **chunks)
    with pytest.raises(InputError, match="prefill_chunk_size=2 splits the prompt"):
        steer_generation(model, None, ids, torch.ones(families.HIDDEN), 1, **chunks)
