"""Gains of norms, found by noise, against the parameters of the norms themselves."""

import functools

import pytest
import torch
from torch import nn

import families
from forward_pass import Site, SiteError, record
from model_architecture import Architecture
from norm_gain import (
    NormGain,
    final_norm_gain,
    fit_norm,
    noise_like,
    norm_gains,
    norms_before_attention,
)

CENTRED = (
    *("gpt2", "gptj", "gpt_neo", "gpt_neox", "opt", "bloom", "mpt", "stablelm", "phi"),
    *("falcon", "falcon_new", "cohere"),
)
"""Families of layer norms; the others take no mean off."""
ONE_MORE = ("gemma2", "gemma3")
"""Families whose norms multiply by 1 + weight."""
AS_IT_IS = ("olmo2",)
"""Families whose attention reads the stream without a norm."""


@functools.cache
def built(name):
    return families.build(name)


def of_parameters(name, norm):
    """Gain and bias as the module holds them, in float64."""
    gain = norm.weight.detach().double() + (name in ONE_MORE)
    bias = getattr(norm, "bias", None)
    return gain, torch.zeros_like(gain) if bias is None else bias.detach().double()


def count_hooks(model):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def attention_input(architecture, layer, ids):
    """What attention takes, and the stream before the block, in float64."""
    seen = []
    path = architecture.structure[layer].attention
    handle = (
        architecture.blocks[layer]
        .get_submodule(path)
        .register_forward_pre_hook(
            lambda _, args, kwargs: seen.append(args[0] if args else kwargs["hidden_states"]),
            with_kwargs=True,
        )
    )
    stream = record(architecture, {"input_ids": ids}, [Site("resid_pre", layer)])
    handle.remove()
    return seen[0].double(), stream[Site("resid_pre", layer)].double()


# --- The norms of a model -------------------------------------------------------------------------


def test_the_final_norm_has_the_gain_that_its_module_holds(family):
    name, model = family
    architecture = Architecture(model)
    before = count_hooks(model)
    found = final_norm_gain(architecture)
    assert count_hooks(model) == before
    gain, bias = of_parameters(name, architecture.final_norm)
    assert found.centred is (name in CENTRED)
    torch.testing.assert_close(found.gain, gain, rtol=2e-6, atol=2e-6)
    torch.testing.assert_close(found.bias, bias, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["gpt2", "gpt_neox", "cohere", "mpt", "llama", "gemma2", "olmo2"])
def test_half_precision_confuses_no_kind_of_norm(name, dtype):
    """Coarse numbers must not let a layer norm pass for one that takes no mean off."""
    model = families.build(name).to(dtype)
    architecture = Architecture(model)
    found = final_norm_gain(architecture)
    gain, bias = of_parameters(name, architecture.final_norm)
    assert found.centred is (name in CENTRED)
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(found.gain, gain, rtol=eps / 2, atol=eps / 2)
    torch.testing.assert_close(found.bias, bias, rtol=eps, atol=eps / 2)


def test_the_norm_before_attention_is_found(family):
    name, model = family
    architecture = Architecture(model)
    layers = [
        n for n in range(architecture.n_layers) if architecture.structure[n].attention is not None
    ]
    found = norms_before_attention(architecture, layers) if layers else {}
    ids = families.token_ids(2, 5)
    for layer in layers:
        if name in AS_IT_IS:
            assert found[layer] is None
            continue
        read, stream = attention_input(architecture, layer, ids)
        moved = stream - stream.mean(-1, keepdim=True) * (name in CENTRED)
        scale = (moved.square().mean(-1, keepdim=True) + 1e-5).sqrt()
        expected = moved / scale * found[layer].gain + found[layer].bias
        torch.testing.assert_close(read, expected, rtol=1e-4, atol=1e-4)


def test_a_norm_with_its_scale_held_is_the_norm_at_that_point():
    model = built("gpt2")
    norm = model.transformer.ln_f
    found = final_norm_gain(Architecture(model))
    x = torch.randn(3, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        y = norm(x)
    straight = found.linear(x) * found.factor(x, y) + found.bias
    torch.testing.assert_close(straight, y.double(), rtol=1e-5, atol=1e-5)
    matrix = torch.randn(2, 32, 7, dtype=torch.float64)
    scaled = x.double() * found.factor(x, y)
    folded = scaled @ found.fold_into(matrix) + (found.bias @ matrix)[:, None]
    torch.testing.assert_close(folded, y.double() @ matrix, rtol=1e-5, atol=1e-5)


def test_what_is_no_norm_has_no_gain():
    model = families.build("gpt2")
    architecture = Architecture(model)
    model.transformer.h[0].ln_1 = nn.Sequential(nn.LayerNorm(32), nn.Tanh())
    (found, right) = norm_gains(architecture, [model.transformer.h[0].ln_1, model.transformer.ln_f])
    assert found is None and right is not None
    with pytest.raises(SiteError, match=r"attention in layer 0 of GPT2LMHeadModel is not one norm"):
        norms_before_attention(Architecture(model), [0, 1])
    assert set(norms_before_attention(Architecture(model), [1])) == {1}
    model.transformer.ln_f = nn.Tanh()
    with pytest.raises(SiteError, match="final norm of GPT2LMHeadModel is neither"):
        final_norm_gain(Architecture(model))


# --- The fit --------------------------------------------------------------------------------------


def fitted(module, width=None, size=1.0, dtype=torch.float32):
    taken = noise_like(torch.empty(32, 24, dtype=dtype), 3, size)
    with torch.no_grad():
        given = module(taken)
    return fit_norm(taken, given, width)


def rms(x, gain, eps=1e-6):
    return gain * x * (x.square().mean(-1, keepdim=True) + eps).rsqrt()


@pytest.mark.parametrize("size", [0.05, 1.0, 30.0])
@pytest.mark.parametrize("eps", [1e-6, 1e-5])
def test_an_epsilon_under_the_root_is_no_error(size, eps):
    """Beside small numbers it changes every scale, and the gain must not take it in."""
    gain = torch.rand(24, generator=torch.Generator().manual_seed(0)) + 0.5
    found = fitted(lambda x: rms(x, gain, eps), size=size)
    torch.testing.assert_close(found.gain, gain.double(), rtol=1e-5, atol=1e-5)
    assert not found.centred and not found.bias.any()


def test_norms_of_every_head_have_gains_of_their_own():
    gain = torch.rand(3, 8, generator=torch.Generator().manual_seed(0)) + 0.5
    found = fitted(lambda x: rms(x.view(-1, 3, 8), gain).flatten(1), 8)
    torch.testing.assert_close(found.gain, gain.flatten().double(), rtol=1e-5, atol=1e-5)
    assert fitted(lambda x: rms(x.view(-1, 3, 8), gain).flatten(1)) is None


def test_a_small_bias_is_kept_and_none_is_made_up():
    norm = nn.LayerNorm(24)
    assert not fitted(norm).bias.any()
    with torch.no_grad():
        norm.bias[3] = 0.01
    for dtype in (torch.float32, torch.bfloat16):
        found = fitted(norm.to(dtype), dtype=dtype)
        assert found.centred
        assert found.bias[3] == pytest.approx(0.01, abs=2e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "made",
    [torch.relu, torch.tanh, lambda x: x, lambda x: x.roll(1, -1), lambda x: x + x.roll(1, -1)],
)
def test_other_maps_are_no_norms(made, dtype):
    assert fitted(made, dtype=dtype) is None


def test_a_norm_is_what_it_says():
    found = fitted(nn.LayerNorm(24))
    assert isinstance(found, NormGain) and found.centred
    torch.testing.assert_close(found.gain, torch.ones(24).double(), rtol=1e-5, atol=1e-5)
