"""Query, key, value and pattern.

Compared with Hugging Face's eager weights, with projections by hand, and with planted patterns.
"""

import copy
import itertools

import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.modeling_utils import AttentionInterface

import families
import model_zoo
from attention_internals import AttentionFinder
from forward_pass import ArchitectureError, Site, SiteError, edit, record, recording
from model_architecture import Architecture

IDS = torch.tensor([[7, 11, 15, 6, 49, 10, 13, 12]])
LENGTH = IDS.shape[1]
ATTENDING = [name for name in families.FAMILIES if name != "mamba"]


@pytest.fixture(params=ATTENDING)
def attending(request):
    return request.param, families.build(request.param)


def inside(architecture, layer, *names):
    kept = record(architecture, {"input_ids": IDS}, [Site(name, layer) for name in names])
    return [kept[Site(name, layer)] for name in names]


def test_patterns_equal_eager_output_attentions(attending):
    """Built eager: switched at run time, Falcon answers with patterns that see the future."""
    _, model = attending
    eager = AutoModelForCausalLM.from_config(
        copy.deepcopy(model.config), attn_implementation="eager"
    ).eval()
    eager.load_state_dict(model.state_dict())
    with torch.no_grad():
        expected = eager(IDS, output_attentions=True, use_cache=False).attentions
    architecture = Architecture(model)
    for layer in range(architecture.n_layers):
        (pattern,) = inside(architecture, layer, "attn_pattern")
        assert pattern.shape == (1, architecture.structure[layer].n_heads, LENGTH, LENGTH)
        assert torch.equal(pattern, expected[layer])


def test_the_attention_implementation_is_the_users_again(attending):
    _, model = attending
    before = model.config._attn_implementation
    architecture = Architecture(model)
    interface = AttentionInterface.get_interface
    with pytest.raises(ZeroDivisionError), recording(architecture, [Site("attn_pattern", 1)]):
        assert model.config._attn_implementation == "eager"
        raise ZeroDivisionError
    assert model.config._attn_implementation == before
    assert AttentionInterface.get_interface is interface


def test_pattern_times_value_is_z(attending):
    _, model = attending
    architecture = Architecture(model)
    pattern, value, z = inside(architecture, 1, "attn_pattern", "value", "head_out")
    heads, kv_heads = architecture.heads(1)
    assert value.shape[:3] == (1, LENGTH, kv_heads)
    mixed = torch.stack(
        [pattern[0, h] @ value[0, :, h * kv_heads // heads] for h in range(heads)], dim=1
    )
    torch.testing.assert_close(mixed, z[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["gpt2", "llama", "mistral", "qwen2", "gptj", "gpt_neo"])
def test_values_are_the_value_projection_by_head(name):
    model = families.build(name)
    architecture = Architecture(model)
    value, key = inside(architecture, 1, "value", "key")
    attention = architecture.blocks[1].get_submodule(architecture.structure[1].attention)
    kept = []
    handles = [
        module.register_forward_hook(lambda _m, _a, out, p=path: kept.append((p, out)))
        for path, module in attention.named_children()
    ]
    with torch.no_grad():
        model(IDS, use_cache=False)
    for handle in handles:
        handle.remove()
    outputs = dict(kept)
    by_hand = outputs["c_attn"].chunk(3, -1)[2] if "c_attn" in outputs else outputs["v_proj"]
    assert torch.equal(value.flatten(2), by_hand)
    assert key.shape == value.shape


@pytest.mark.parametrize("name", ["gpt2", "llama", "qwen3", "stablelm", "gptj", "falcon"])
def test_a_zero_query_attends_uniformly(name):
    """Softmax of zeros over the causal window: 1 / (position + 1) each."""
    architecture = Architecture(families.build(name))
    with edit(architecture, {Site("query", 1): torch.zeros_like}):
        (pattern,) = inside(architecture, 1, "attn_pattern")
    uniform = torch.ones(LENGTH, LENGTH).tril() / torch.arange(1, LENGTH + 1)[:, None]
    torch.testing.assert_close(pattern, uniform.expand_as(pattern), rtol=1e-5, atol=1e-6)


def test_a_diagonal_pattern_hands_each_position_its_own_value(attending):
    name, model = attending
    architecture = Architecture(model)
    heads, kv_heads = architecture.heads(1)
    (value,) = inside(architecture, 1, "value")

    def diagonal(pattern):
        return torch.eye(LENGTH).expand_as(pattern)

    with edit(architecture, {Site("attn_pattern", 1): diagonal}):
        kept = record(
            architecture,
            {"input_ids": IDS},
            [Site("head_out", 1), Site("resid_post", 2)],
            logits=True,
        )
    own = value.repeat_interleave(heads // kv_heads, dim=2)
    torch.testing.assert_close(kept[Site("head_out", 1)], own, rtol=1e-4, atol=1e-5, msg=name)
    with edit(architecture, {Site("head_out", 1): lambda _z: own}):
        other = record(architecture, {"input_ids": IDS}, [Site("resid_post", 2)], logits=True)
    torch.testing.assert_close(kept.logits, other.logits, rtol=1e-4, atol=1e-4)


def test_one_key_value_head_feeds_its_own_query_heads_only(attending):
    _, model = attending
    architecture = Architecture(model)
    heads, kv_heads = architecture.heads(1)
    plain, value = inside(architecture, 1, "head_out", "value")

    def zero_last(v):
        v = v.clone()
        v[:, :, kv_heads - 1] = 0
        return v

    with edit(architecture, {Site("value", 1): zero_last}):
        edited, seen = inside(architecture, 1, "head_out", "value")
    assert torch.equal(seen, zero_last(value))
    group = heads // kv_heads
    assert edited[:, :, heads - group :].abs().max() == 0
    torch.testing.assert_close(edited[:, :, : heads - group], plain[:, :, : heads - group])


def test_an_edited_key_changes_the_pattern_of_its_group_only(attending):
    name, model = attending
    architecture = Architecture(model)
    heads, kv_heads = architecture.heads(1)
    if kv_heads == 1:
        pytest.skip("one key head feeds all")
    (plain,) = inside(architecture, 1, "attn_pattern")

    def flip_first(k):
        k = k.clone()
        k[:, :, 0] *= -1
        return k

    with edit(architecture, {Site("key", 1): flip_first}):
        (edited,) = inside(architecture, 1, "attn_pattern")
    group = heads // kv_heads
    assert (edited[:, :group] - plain[:, :group]).abs().max() > 1e-3, name
    torch.testing.assert_close(edited[:, group:], plain[:, group:])


def test_inside_and_outside_are_seen_in_one_pass(attending):
    """Sites inside attention do not change the numbers outside it.

    The pattern, being eager, changes them by rounding only.
    """
    _, model = attending
    architecture = Architecture(model)
    outside = [Site("resid_post", layer) for layer in range(architecture.n_layers)]
    within = [Site(name, 1) for name in ("query", "key", "value")]
    alone = record(architecture, {"input_ids": IDS}, outside)
    beside = record(architecture, {"input_ids": IDS}, [*outside, *within])
    eager = record(architecture, {"input_ids": IDS}, [*outside, Site("attn_pattern", 1)])
    for site in outside:
        assert torch.equal(alone[site], beside[site])
        torch.testing.assert_close(alone[site], eager[site], rtol=1e-4, atol=1e-5)


def test_other_models_do_not_see_the_hooks():
    """The registry is shared by all models in the process."""
    watched, other = families.build("llama"), families.build("llama", seed=1)
    with torch.no_grad():
        expected = other(IDS, use_cache=False).logits
    with edit(Architecture(watched), {Site("value", 1): torch.zeros_like}), torch.no_grad():
        assert torch.equal(other(IDS, use_cache=False).logits, expected)


def test_nested_contexts_undo_themselves_in_any_order():
    model = families.build("llama")
    architecture = Architecture(model)
    interface = AttentionInterface.get_interface
    first, second = (
        edit(architecture, {Site("value", layer): torch.zeros_like}) for layer in (0, 1)
    )
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    (z,) = inside(architecture, 1, "head_out")
    assert z.abs().max() == 0
    second.__exit__(None, None, None)
    assert AttentionInterface.get_interface is interface
    (z,) = inside(architecture, 1, "head_out")
    assert z.abs().max() > 0


def test_a_pattern_of_the_wrong_shape_is_refused():
    for name in ("llama", "bloom"):
        architecture = Architecture(families.build(name))
        with (
            pytest.raises(SiteError, match=r"shape \(1, 4, 8, 8\)"),
            edit(architecture, {Site("attn_pattern", 1): lambda p: p[:, :1]}),
        ):
            record(architecture, {"input_ids": IDS}, [], logits=True)


def test_an_implementation_without_weights_is_named(monkeypatch):
    """Where eager was switched away inside the context, there is no pattern, and that is said."""
    model = families.build("llama")
    with recording(Architecture(model), [Site("attn_pattern", 1)]):
        model.config._attn_implementation_internal = "sdpa"
        with pytest.raises(ArchitectureError, match="attn_implementation='eager'"), torch.no_grad():
            model(IDS, use_cache=False)


def test_probing_one_model_does_not_suspend_the_hooks_on_another():
    watched = families.build("llama")
    architecture = Architecture(watched)
    with edit(architecture, {Site("value", 1): torch.zeros_like}):
        expected = record(architecture, {"input_ids": IDS}, [], logits=True).logits
        with AttentionFinder(5, lambda: None, itertools.count()):
            assert torch.equal(
                record(architecture, {"input_ids": IDS}, [], logits=True).logits, expected
            )


def test_a_sink_that_scales_the_output_is_in_the_pattern():
    """Granite SWA's own weights leave the sink out, and its output is scaled: the site has both."""
    model = model_zoo.build("granite_swa")
    architecture = Architecture(model)
    sites = [Site(name, 1) for name in ("attn_pattern", "value", "head_out")]
    plain = record(architecture, {"input_ids": IDS}, sites, logits=True)
    pattern, value, made = (plain[site] for site in sites)
    assert float(pattern.sum(-1).min()) < 0.9
    values = value.repeat_interleave(2, dim=2)
    torch.testing.assert_close(torch.einsum("bhqk,bkhd->bqhd", pattern, values), made)
    with edit(architecture, [(Site("attn_pattern", i), torch.clone) for i in range(4)]):
        same = record(architecture, {"input_ids": IDS}, [], logits=True)
    logits = record(architecture, {"input_ids": IDS}, [], logits=True).logits
    torch.testing.assert_close(same.logits, logits, atol=1e-4, rtol=1e-4)
