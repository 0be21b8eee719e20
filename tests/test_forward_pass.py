"""Record, edit, resume.

Compared with hooks written by hand, with Hugging Face's own output, and with weights set to zero.
"""

import copy
import io

import pytest
import torch
from torch import nn
from transformers import StaticCache

import families
from forward_pass import (
    READ_ONLY,
    ArchitectureError,
    LayerError,
    Site,
    SiteError,
    attached,
    edit,
    read_hidden,
    read_input,
    record,
    recording,
    resume,
    take_positions,
    write_hidden,
    write_input,
)
from model_architecture import Architecture

IDS = torch.tensor([[7, 11, 15, 6, 49, 10, 13, 12]])
POST_NORM = ("gemma2", "gemma3", "olmo2")


def logits_of(model, ids=IDS):
    with torch.no_grad():
        return model(ids, use_cache=False).logits


def hooks_on(model):
    """Every hook of every module, by identity: what must be the same before and after."""
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks")
    return {
        (path, kind): list(getattr(module, kind).values())
        for path, module in model.named_modules()
        for kind in kinds
    }


def block_outputs(model, blocks):
    """What the blocks return, by hooks of our own."""
    kept = []
    handles = [
        b.register_forward_hook(lambda _m, _a, out: kept.append(read_hidden(out).clone()))
        for b in blocks
    ]
    logits = logits_of(model)
    for handle in handles:
        handle.remove()
    return kept, logits


def every_site(architecture, leave_out=("attn_pattern",)):
    """All sites of all layers.

    Patterns switch the attention implementation, so they are asked for apart.
    """
    return [
        Site(name, layer)
        for layer in range(architecture.n_layers)
        for name in architecture.available_sites(layer)
        if name not in (*leave_out, *READ_ONLY)
    ]


# --- Record ---------------------------------------------------------------------------------------


def test_recorded_streams_are_what_the_blocks_took_and_returned(family):
    _, model = family
    architecture = Architecture(model)
    expected, logits = block_outputs(model, architecture.blocks)
    n = architecture.n_layers
    kept = record(architecture, {"input_ids": IDS}, every_site(architecture), logits=True)
    assert torch.equal(kept.logits, logits)
    for layer in range(n):
        assert torch.equal(kept[Site("resid_post", layer)], expected[layer])
        if layer:
            assert torch.equal(kept[Site("resid_pre", layer)], expected[layer - 1])


@pytest.mark.parametrize("name", ["gpt2", "llama", "opt", "gpt_neox", "gemma2", "mixtral", "phi"])
def test_hidden_states_agree_where_they_are_right(name):
    model = families.build(name)
    architecture = Architecture(model)
    n = architecture.n_layers
    kept = record(architecture, {"input_ids": IDS}, [Site("resid_post", i) for i in range(n)])
    with torch.no_grad():
        states = model(IDS, output_hidden_states=True, use_cache=False).hidden_states
    for layer in range(n - 1):  # the last one is after the final norm
        assert torch.equal(kept[Site("resid_post", layer)], states[layer + 1])
    assert not torch.allclose(kept[Site("resid_post", n - 1)], states[n], atol=1e-2)


def test_blocks_after_the_last_site_and_the_head_are_not_run():
    model = families.build("llama")
    architecture = Architecture(model)
    assert architecture.structure  # the probe runs everything once
    ran = []
    for path, module in model.named_modules():
        module.register_forward_hook(lambda *_, path=path: ran.append(path))
    record(architecture, {"input_ids": IDS}, [Site("attn_out", 1)])
    assert "model.layers.1.mlp.down_proj" in ran
    assert not any(path.startswith("model.layers.2.") for path in ran)
    assert "lm_head" not in ran


def test_a_recording_owns_its_bytes_alone():
    architecture = Architecture(families.build("gpt2"))
    inputs = {"input_ids": IDS.expand(3, -1)}
    sites = every_site(architecture)
    for positions in (None, torch.tensor([7]), slice(2, 4), torch.tensor([[0], [5], [7]])):
        for site, value in record(architecture, inputs, sites, positions=positions).items():
            assert value.untyped_storage().nbytes() == value.numel() * value.element_size(), site
            assert not value.requires_grad


def test_recorded_tensors_do_not_change_with_the_model_afterwards():
    """Falcon adds attention's output to the MLP's in place."""
    architecture = Architecture(families.build("falcon"))
    kept = record(architecture, {"input_ids": IDS}, every_site(architecture))
    for layer in range(architecture.n_layers):
        total = sum(kept[Site(name, layer)] for name in ("resid_pre", "attn_out", "mlp_out"))
        torch.testing.assert_close(total, kept[Site("resid_post", layer)], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("axis", [1, 2])
def test_take_positions_picks_what_indexing_picks(axis):
    value = torch.randn(3, 5, 6, 2, generator=torch.Generator().manual_seed(0))
    rows = torch.tensor([[0, 4], [2, 1], [3, 3]])
    taken = take_positions(value, rows, axis)
    for row in range(3):
        moved = value[row].movedim(axis - 1, 0)[rows[row]].movedim(0, axis - 1)
        assert torch.equal(taken[row], moved)
    assert torch.equal(
        take_positions(value, torch.tensor([4, 0]), axis),
        value.movedim(axis, 0)[[4, 0]].movedim(0, axis),
    )
    assert torch.equal(
        take_positions(value, slice(1, 3), axis), value.movedim(axis, 0)[1:3].movedim(0, axis)
    )


# --- Resume ---------------------------------------------------------------------------------------


def test_resuming_anywhere_gives_the_logits_bit_for_bit(family):
    _, model = family
    architecture = Architecture(model)
    outputs, logits = block_outputs(model, architecture.blocks)
    first = record(architecture, {"input_ids": IDS}, [Site("resid_pre", 0)])[Site("resid_pre", 0)]
    with torch.no_grad():
        for layer, stream in enumerate([first, *outputs]):
            assert torch.equal(resume(architecture, {"input_ids": IDS}, layer, stream), logits), (
                layer
            )


def test_resuming_at_the_end_applies_the_soft_cap_and_the_scales():
    """`lm_head(norm(h))` is not the logits of these; the model's own way to the logits is."""
    for name, path in (
        ("gemma2", "model.norm"),
        ("cohere", "model.norm"),
        ("granite", "model.norm"),
    ):
        model = families.build(name)
        outputs, logits = block_outputs(model, Architecture(model).blocks)
        with torch.no_grad():
            naive = model.lm_head(model.get_submodule(path)(outputs[-1]))
        assert (naive - logits).abs().max() > 0.5, name


def test_resume_runs_as_many_rows_as_the_stream_has():
    model = families.build("qwen3")
    architecture = Architecture(model)
    stream = torch.randn(
        4, IDS.shape[1], families.HIDDEN, generator=torch.Generator().manual_seed(1)
    )
    with torch.no_grad():
        together = resume(architecture, {"input_ids": IDS}, 1, stream)
        for row in range(4):
            alone = resume(architecture, {"input_ids": IDS}, 1, stream[row : row + 1])
            torch.testing.assert_close(together[row : row + 1], alone, rtol=1e-5, atol=1e-4)


def test_resume_is_differentiable():
    model = families.build("gpt2").double()
    architecture = Architecture(model)
    stream = record(architecture, {"input_ids": IDS}, [Site("resid_post", 1)])[
        Site("resid_post", 1)
    ]

    def value(x):
        return resume(architecture, {"input_ids": IDS}, 2, x)[0, -1, 5]

    point = stream.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(value(point), point)
    direction = torch.randn(
        stream.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2)
    )
    with torch.no_grad():
        step = 1e-5
        slope = (value(stream + step * direction) - value(stream - step * direction)) / (2 * step)
    torch.testing.assert_close((gradient * direction).sum(), slope, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("layer", [-1, 4])
def test_resume_refuses_a_layer_that_is_not_there(layer):
    architecture = Architecture(families.build("gpt2"))
    with pytest.raises(LayerError, match=r"valid are 0\.\.3"):
        resume(architecture, {"input_ids": IDS}, layer, torch.zeros(1, 8, families.HIDDEN))


def test_a_forward_attribute_of_the_user_is_put_back():
    """Accelerate replaces a module's `forward`; a skipped block must get that one back."""
    model = families.build("llama")
    architecture = Architecture(model)
    assert architecture.structure  # the probe runs everything once
    block = architecture.blocks[0]
    original = block.forward
    calls = []

    def wrapped(*args, **kwargs):
        calls.append(1)
        return original(*args, **kwargs)

    block.forward = wrapped
    stream = torch.zeros(1, 8, families.HIDDEN)
    with torch.no_grad():
        resume(architecture, {"input_ids": IDS}, 2, stream)
    assert block.forward is wrapped
    assert calls == []  # it was skipped
    assert "forward" not in architecture.blocks[1].__dict__


# --- Edit -----------------------------------------------------------------------------------------


def test_edits_that_return_copies_change_nothing(family):
    _, model = family
    architecture = Architecture(model)
    logits = logits_of(model)
    with edit(architecture, [(site, torch.clone) for site in every_site(architecture)]):
        assert torch.equal(logits_of(model), logits)
    with edit(architecture, [(site, lambda _value: None) for site in every_site(architecture)]):
        assert torch.equal(logits_of(model), logits)


def without(model, layer, part):
    """A copy of the model whose matrix at the end of attention or MLP is zero, bias too."""
    changed = copy.deepcopy(model)
    found = Architecture(model).structure[layer]
    path = found.out_proj if part == "attn_out" else found.down_proj
    matrix = Architecture(changed).blocks[layer].get_submodule(path)
    with torch.no_grad():
        for parameter in matrix.parameters():
            parameter.zero_()
    return changed


@pytest.mark.parametrize("part", ["attn_out", "mlp_out"])
def test_zeroing_a_part_equals_zeroing_its_last_matrix(family, part):
    name, model = family
    architecture = Architecture(model)
    if (
        architecture.structure[1].out_proj
        if part == "attn_out"
        else architecture.structure[1].down_proj
    ) is None:
        pytest.skip("no such matrix")
    with edit(architecture, {Site(part, 1): torch.zeros_like}):
        edited = logits_of(model)
    assert (edited - logits_of(model)).abs().max() > 0.05
    expected = without(model, 1, part)
    # an RMS norm after the sublayer maps zero to zero, so this holds for post-norm families too
    torch.testing.assert_close(edited, logits_of(expected), rtol=1e-4, atol=1e-4, msg=name)


def test_zeroing_one_head_equals_zeroing_its_slice_of_the_output_projection(family):
    _, model = family
    architecture = Architecture(model)
    found = architecture.structure[1]
    if found.out_proj is None:
        pytest.skip("no heads")
    head = 2

    def zero_head(z):
        z = z.clone()
        z[:, :, head] = 0
        return z

    changed = copy.deepcopy(model)
    matrix = Architecture(changed).blocks[1].get_submodule(found.out_proj)
    with torch.no_grad():
        weight = matrix.weight if type(matrix).__name__ == "Conv1D" else matrix.weight.T
        width = weight.shape[0] // found.n_heads
        weight[head * width : (head + 1) * width] = 0
    with edit(architecture, {Site("head_out", 1): zero_head}):
        edited = logits_of(model)
    assert (edited - logits_of(model)).abs().max() > 0.01
    torch.testing.assert_close(edited, logits_of(changed), rtol=1e-4, atol=1e-4)


def test_resid_mid_edited_back_to_resid_pre_removes_attention(family):
    _, model = family
    architecture = Architecture(model)
    if not architecture.structure[1].has_resid_mid:
        pytest.skip("a parallel block")
    pre = record(architecture, {"input_ids": IDS}, [Site("resid_pre", 1)])[Site("resid_pre", 1)]
    with edit(architecture, {Site("resid_mid", 1): lambda _mid: pre}):
        removed = logits_of(model)
    with edit(architecture, {Site("attn_out", 1): torch.zeros_like}):
        torch.testing.assert_close(removed, logits_of(model), rtol=1e-4, atol=1e-4)


def test_an_edit_is_seen_by_what_is_recorded_after_it(family):
    """hidden_states are stale under an intervention; our own records are not."""
    _, model = family
    architecture = Architecture(model)
    shift = torch.linspace(-1, 1, architecture.d_model)
    sites = [Site("resid_post", 0), Site("resid_pre", 1), Site("resid_post", 2)]
    plain = record(architecture, {"input_ids": IDS}, sites)
    with edit(architecture, {Site("resid_post", 0): lambda h: h + shift}):
        kept = record(architecture, {"input_ids": IDS}, sites)
    assert torch.equal(kept[sites[0]], plain[sites[0]] + shift)
    assert torch.equal(kept[sites[1]], plain[sites[0]] + shift)
    with torch.no_grad():
        expected = resume(architecture, {"input_ids": IDS}, 1, plain[sites[0]] + shift)
        resumed = resume(architecture, {"input_ids": IDS}, 3, kept[sites[2]])
    assert torch.equal(resumed, expected)


def test_edits_of_one_site_run_in_order_and_upstream_ones_first():
    architecture = Architecture(families.build("llama"))
    seen = []

    def note(name, value):
        seen.append(name)
        return value * 2

    edits = [
        (Site("resid_mid", 1), lambda v: note("mid", v)),
        (Site("resid_pre", 1), lambda v: note("first", v)),
        (Site("resid_pre", 1), lambda v: note("second", v)),
    ]
    sites = [Site("resid_pre", 1), Site("attn_out", 1), Site("resid_mid", 1)]
    plain = record(architecture, {"input_ids": IDS}, sites)
    with edit(architecture, edits):
        kept = record(architecture, {"input_ids": IDS}, sites)
    assert seen == ["first", "second", "mid"]
    assert torch.equal(kept[sites[0]], plain[sites[0]] * 4)
    # an RMS norm does not see the factor 4, so attention adds what it added before;
    # then mid is doubled
    expected = 2 * (4 * plain[sites[0]] + plain[sites[1]])
    torch.testing.assert_close(kept[sites[2]], expected, rtol=1e-4, atol=1e-4)


def test_granite_adds_its_sublayers_scaled():
    model = families.build("granite")
    architecture = Architecture(model)
    assert architecture.structure[0].scale == model.config.residual_multiplier != 1
    with edit(architecture, {Site("mlp_out", 0): torch.ones_like}):
        kept = record(
            architecture, {"input_ids": IDS}, [Site("resid_mid", 0), Site("resid_post", 0)]
        )
    difference = kept[Site("resid_post", 0)] - kept[Site("resid_mid", 0)]
    torch.testing.assert_close(difference, torch.ones_like(difference), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["gpt2", "llama", "bloom", "mamba", "falcon"])
def test_absolute_positions_hold_through_the_cache(name):
    """An edit from position 6 on must give the same text with and without the cache."""
    model = families.build(name)
    architecture = Architecture(model)
    push = 3 * torch.randn(architecture.d_model, generator=torch.Generator().manual_seed(3))
    texts = {}
    for cached in (True, False):

        def from_position_six(hidden):
            absolute = torch.arange(hidden.shape[1]) + clock.offset
            return hidden + push * (absolute >= 6)[None, :, None]

        with edit(architecture, {Site("resid_post", 1): from_position_six}) as clock:
            texts[cached] = model.generate(
                IDS[:, :5],
                attention_mask=torch.ones(1, 5),
                max_new_tokens=8,
                do_sample=False,
                use_cache=cached,
            ).tolist()
    plain = model.generate(
        IDS[:, :5], attention_mask=torch.ones(1, 5), max_new_tokens=8, do_sample=False
    ).tolist()
    assert texts[True] == texts[False]
    assert texts[True] != plain
    assert texts[True][0][:7] == plain[0][:7]  # what positions 0 to 5 predict is as before


def test_an_edit_of_another_shape_is_refused():
    architecture = Architecture(families.build("gpt2"))
    with (
        pytest.raises(SiteError, match=r"shape \(1, 8, 32\).*\(1, 8\)"),
        edit(architecture, {Site("resid_post", 1): lambda h: h[..., 0]}),
    ):
        logits_of(architecture.model)
    with (
        pytest.raises(SiteError, match="returned float"),
        edit(architecture, {Site("resid_post", 1): lambda _h: 3.0}),
    ):
        logits_of(architecture.model)


def test_an_edit_keeps_the_dtype_of_the_stream():
    model = families.build("llama").bfloat16()
    architecture = Architecture(model)
    vector = torch.ones(architecture.d_model, dtype=torch.float32)
    with edit(architecture, {Site("resid_post", 0): lambda h: h + vector}):
        kept = record(architecture, {"input_ids": IDS}, [Site("resid_post", 1)])
    assert kept[Site("resid_post", 1)].dtype == torch.bfloat16


# --- Contexts within contexts ---------------------------------------------------------------------


@pytest.mark.parametrize("site", ["resid_mid", "attn_out", "resid_pre", "resid_post", "value"])
def test_a_recording_sees_all_edits_whichever_context_is_opened_first(family, site):
    _, model = family
    architecture = Architecture(model)
    if architecture.missing(Site(site, 1)):
        pytest.skip("no such site")
    edits = [
        (Site(name, 1), lambda v: v * 0.5 + 1)
        for name in ("resid_mid", "resid_pre", "attn_out", "resid_post", "value")
        if not architecture.missing(Site(name, 1))
    ]
    with edit(architecture, edits), recording(architecture, [Site(site, 1)]) as inner:
        expected = logits_of(model)
    with recording(architecture, [Site(site, 1)]) as outer, edit(architecture, edits[::-1]):
        assert torch.equal(logits_of(model), expected)
    assert torch.equal(outer[Site(site, 1)], inner[Site(site, 1)])


def test_a_model_first_seen_inside_an_edit_is_still_understood():
    architecture = Architecture(families.build("llama"))
    with edit(architecture, {Site("resid_pre", 1): torch.zeros_like}):
        record(architecture, {"input_ids": IDS}, [Site("resid_post", 0)])
    assert (
        Architecture(architecture.model).structure
        == Architecture(families.build("llama")).structure
    )


def test_resuming_inside_an_edit_does_not_apply_it_twice():
    model = families.build("llama")
    architecture = Architecture(model)
    for layer in (0, 1, 2):
        pre, post = Site("resid_pre", layer), Site("resid_post", layer)
        plain = record(architecture, {"input_ids": IDS}, [pre])[pre]
        with edit(architecture, {post: lambda h: h + 1}), torch.no_grad():
            kept = record(architecture, {"input_ids": IDS}, [post], logits=True)
            assert torch.equal(
                resume(architecture, {"input_ids": IDS}, layer + 1, kept[post]), kept.logits
            )
            assert torch.equal(resume(architecture, {"input_ids": IDS}, layer, plain), kept.logits)
        with edit(architecture, {pre: lambda h: h + 1}), torch.no_grad():
            expected = record(architecture, {"input_ids": IDS}, [], logits=True).logits
            assert torch.equal(resume(architecture, {"input_ids": IDS}, layer, plain), expected)


def test_skipped_blocks_run_no_hook():
    model = families.build("llama")
    architecture = Architecture(model)
    assert architecture.structure
    calls = []
    handle = architecture.blocks[2].register_forward_hook(lambda *_: calls.append(1))
    with recording(architecture, [Site("resid_post", 2)]) as outer:
        logits_of(model)
        before = outer[Site("resid_post", 2)].clone()
        record(architecture, {"input_ids": IDS}, [Site("resid_post", 0)])
        assert torch.equal(outer[Site("resid_post", 2)], before)
    assert calls == [1]
    logits_of(model)
    assert calls == [1, 1]  # the user's hook is back
    handle.remove()
    assert not architecture.blocks[2]._forward_hooks


@pytest.mark.parametrize("name", ["falcon", "falcon_new", "llama"])
def test_a_tensor_that_an_edit_returns_is_not_changed_by_the_model(name):
    model = families.build(name)
    architecture = Architecture(model)
    mine = torch.ones(1, IDS.shape[1], architecture.d_model)
    with edit(architecture, {Site("mlp_out", 1): lambda _v: mine}):
        first, second = logits_of(model), logits_of(model)
    assert torch.equal(first, second)
    assert torch.equal(mine, torch.ones_like(mine))


def test_an_edit_that_writes_into_the_value_is_refused(family):
    _, model = family
    architecture = Architecture(model)

    def in_place(value):
        value[:, -1] = 0
        return value

    before = hooks_on(model)
    for site in every_site(architecture, leave_out=()):
        with pytest.raises(SiteError, match=r"value\.clone"), edit(architecture, {site: in_place}):
            logits_of(model)
    assert hooks_on(model) == before


@pytest.mark.parametrize("name", ["llama", "falcon", "granite"])
@pytest.mark.parametrize("part", ["attn_out", "mlp_out", "resid_post"])
def test_gradients_of_recorded_sites(name, part):
    """Kept in the graph, a site's gradient is the slope of the logit when the site is pushed."""
    model = families.build(name).double()
    architecture = Architecture(model)
    site = Site(part, 1)
    push = torch.randn(
        1, 8, architecture.d_model, dtype=torch.float64, generator=torch.Generator().manual_seed(5)
    )
    with recording(architecture, [site], detach=False) as kept:
        value = model(IDS, use_cache=False).logits[0, -1, 5]
        (gradient,) = torch.autograd.grad(value, kept[site])

    def pushed(step):
        with edit(architecture, {site: lambda v: v + step * push}):
            return logits_of(model)[0, -1, 5]

    slope = (pushed(1e-3) - pushed(-1e-3)) / 2e-3  # llama's norm computes in float32 even here
    torch.testing.assert_close((gradient * push).sum(), slope, rtol=2e-3, atol=2e-3)


def test_the_clock_believes_a_cache_that_counts():
    model = families.build("llama")
    architecture = Architecture(model)
    cache = StaticCache(config=model.config, max_cache_len=16)
    with edit(architecture, []) as clock, torch.no_grad():
        for expected in (0, 8):
            model(IDS, past_key_values=cache)
            assert (clock.offset, clock.length) == (expected, 8)
        cache.reset()
        model(IDS, past_key_values=cache)
        assert clock.offset == 0


def test_the_clock_follows_a_state_space_model_by_hand():
    model = families.build("mamba")
    with edit(Architecture(model), []) as clock, torch.no_grad():
        state = model(IDS, use_cache=True).cache_params
        model(IDS[:, :1], cache_params=state, use_cache=True)
        assert clock.offset == 8
        model(IDS)
        assert clock.offset == 0


def test_dropout_is_off_while_recording_and_back_on_afterwards():
    model = families.build("gpt2", resid_pdrop=0.5, embd_pdrop=0.5)
    expected = logits_of(model)
    model.train()
    model.transformer.h[1].eval()
    modes = [module.training for module in model.modules()]
    kept = record(Architecture(model), {"input_ids": IDS}, [Site("resid_post", 2)], logits=True)
    assert torch.equal(kept.logits, expected)
    with torch.no_grad():
        resumed = resume(Architecture(model), {"input_ids": IDS}, 3, kept[Site("resid_post", 2)])
    assert torch.equal(resumed, expected)
    assert [module.training for module in model.modules()] == modes


# --- What stays as it was -------------------------------------------------------------------------


class Stop(Exception):
    """Raised on purpose."""


@pytest.mark.parametrize("error", [Stop, KeyboardInterrupt])
def test_no_hook_is_left_behind(family, error):
    _, model = family
    architecture = Architecture(model)
    sites = every_site(architecture, leave_out=())
    before = hooks_on(model)

    def fail(_value):
        raise error

    with pytest.raises(error), edit(architecture, {sites[-1]: fail}):
        logits_of(model)
    with pytest.raises(error), recording(architecture, sites):
        raise error
    with pytest.raises(LayerError), recording(architecture, [sites[0], Site("resid_post", 99)]):
        pass
    with (
        pytest.raises(SiteError),
        edit(architecture, [(sites[0], fail), (Site("nonsense", 0), fail)]),
    ):
        pass
    assert hooks_on(model) == before
    assert torch.isfinite(logits_of(model)).all()


def test_the_users_own_hooks_stay_and_take_part():
    model = families.build("gpt2")
    architecture = Architecture(model)
    own = architecture.blocks[1].register_forward_hook(lambda _m, _a, out: out + 1)
    before = hooks_on(model)
    kept = record(architecture, {"input_ids": IDS}, [Site("resid_post", 1)])[Site("resid_post", 1)]
    assert hooks_on(model) == before
    own.remove()
    plain = record(architecture, {"input_ids": IDS}, [Site("resid_post", 1)])[Site("resid_post", 1)]
    assert torch.equal(kept, plain + 1)


def test_the_model_is_as_it_was(family, tmp_path):
    _, model = family
    architecture = Architecture(model)
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    grads = {name: p.requires_grad for name, p in model.named_parameters()}
    config, implementation = model.config.to_dict(), model.config._attn_implementation
    attributes = {path: set(module.__dict__) for path, module in model.named_modules()}
    sites = every_site(architecture, leave_out=())
    record(architecture, {"input_ids": IDS}, sites, logits=True)
    with edit(architecture, [(site, lambda v: v * 1.5) for site in sites]):
        logits_of(model)
    with torch.no_grad():
        resume(architecture, {"input_ids": IDS}, 2, torch.zeros(1, 8, architecture.d_model))
    after = model.state_dict()
    assert list(after) == list(weights)
    assert all(torch.equal(after[name], tensor) for name, tensor in weights.items())
    assert {name: p.requires_grad for name, p in model.named_parameters()} == grads
    assert model.config.to_dict() == config
    assert model.config._attn_implementation == implementation
    assert {path: set(module.__dict__) for path, module in model.named_modules()} == attributes
    model.save_pretrained(tmp_path)
    torch.save(model.state_dict(), io.BytesIO())


# --- Small parts ----------------------------------------------------------------------------------


def test_hidden_states_in_tuples_and_keywords():
    tensor, other, new = torch.zeros(2), torch.ones(2), torch.full((2,), 5.0)
    assert read_hidden((tensor, other)) is tensor
    assert read_hidden(tensor) is tensor
    assert write_hidden((tensor, other), new) == (new, other)
    assert write_hidden([tensor, None], new) == [new, None]
    assert write_hidden(tensor, new) is new
    assert read_input((), {"mask": other, "hidden_states": tensor}) is tensor
    assert read_input((tensor,), {"hidden_states": other}) is tensor
    assert read_input((), {"flag": True, "x": tensor}) is tensor
    assert write_input((), {"hidden_states": tensor}, new) == ((), {"hidden_states": new})
    assert write_input((tensor, 3), {"a": 1}, new) == ((new, 3), {"a": 1})
    with pytest.raises(ArchitectureError, match="without any tensor"):
        read_input((), {"flag": True})


def test_a_site_that_is_never_reached_is_an_error():
    class Never:
        module = nn.Linear(2, 2)

        def attach(self, stack, hook, last=False):
            pass

    architecture = Architecture(families.build("gpt2"))
    architecture.tap = lambda _site: Never()
    with pytest.raises(SiteError, match="never reached resid_post of layer 1"):
        record(architecture, {"input_ids": IDS}, [Site("resid_post", 1)])


def test_attached_removes_what_it_attached_when_a_later_tap_fails():
    linear = nn.Linear(2, 2)

    class Good:
        module = linear

        def attach(self, stack, hook, last=False):
            stack.callback(linear.register_forward_hook(hook).remove)

    class Bad:
        module = linear

        def attach(self, stack, hook, last=False):
            raise SiteError("no")

    with pytest.raises(SiteError), attached([(Good(), print), (Bad(), print)]):
        pass
    assert not linear._forward_hooks
