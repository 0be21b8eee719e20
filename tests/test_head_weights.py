"""Weights of heads against what the model computes with them, in every layout of projections."""

import dataclasses
import functools

import pytest
import torch
from torch import nn

import attention_projections
import families
import model_zoo
from attention_projections import affine_of, find_columns, watch_attention
from forward_pass import InputError, LayerError, RecordFileError, Site, SiteError, record
from head_weights import (
    TENSORS,
    HeadWeights,
    all_head_weights,
    head_weights,
    layers_with_heads,
    output_weights,
)
from induction_circuit import induction_circuit
from model_architecture import Architecture

LATENT = ("deepseek_v2", "deepseek_v3")
"""Multi-head latent attention: keys and values through a narrow middle with a norm."""
GATED = ("qwen3_next", "bitnet")
FUSED = ("phi3", "dbrx", "gpt_bigcode", "codegen", "internlm2", "glm")
ZOO = tuple(name for name in LATENT + GATED + FUSED if name in model_zoo.MODEL_TYPES)
PARTS = {"query": "Q", "key": "K", "value": "V"}


@functools.cache
def built(name):
    return families.build(name)


def count_hooks(model):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def has_heads(architecture, layer):
    sites = (Site(name, layer) for name in ("query", "key", "value", "head_out"))
    return all(architecture.missing(site) is None for site in sites)


def attention_input(architecture, layer, ids, sites):
    """What attention really takes (behind the model's own norm), and what sites hold meanwhile."""
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
    kept = record(architecture, architecture.inputs(ids), sites)
    handle.remove()
    return seen[0].detach(), {site.name: value for site, value in kept.items()}


def differences(architecture, weights):
    """Largest difference to what the model made of real tokens, by part, relative to its size.

    Queries and keys at position 0, where rotary embeddings turn by nothing. Parts with a norm
    behind them are compared in direction, value by value of the norm's own groups (`normed`).
    """
    layer = weights.layer
    sites = [Site(name, layer) for name in (*PARTS, "head_out")]
    adds = architecture.missing(Site("attn_out", layer)) is None
    ids = families.token_ids(6, 5)
    x, kept = attention_input(architecture, layer, ids, sites + [Site("attn_out", layer)] * adds)
    found = {}
    for scale, (part, letter) in zip(weights.scales, PARTS.items(), strict=True):
        matrix, bias = getattr(weights, f"W_{letter}"), getattr(weights, f"b_{letter}")
        made = scale * (torch.einsum("bpd,hdk->bphk", x, matrix) + bias)
        own = kept[part] if part == "value" else kept[part][:, :1]
        if part not in weights.normed:
            found[part] = relative(made[:, : own.shape[1]], own)
    written = torch.einsum("bphk,hkd->bpd", kept["head_out"], weights.W_O) + weights.b_O
    if adds and not weights.output_normed:
        scaled = written * architecture.structure[layer].scale
        found["attn_out"] = relative(scaled, kept["attn_out"].view_as(scaled))
    return found


def relative(ours, own):
    return float((ours - own).abs().max() / own.abs().max())


# --- The model's own numbers ----------------------------------------------------------------------


def test_weights_times_input_are_what_the_model_computes(family):
    name, model = family
    architecture = Architecture(model)
    if name == "mamba":
        with pytest.raises(SiteError, match="it computes no attention"):
            all_head_weights(architecture)
        return
    before = count_hooks(model)
    found = all_head_weights(architecture)
    assert count_hooks(model) == before
    assert [each.layer for each in found] == list(range(architecture.n_layers))
    for weights in found:
        close = differences(architecture, weights)
        normed = {"qwen3": 2, "olmo2": 2, "gemma3": 2}.get(name, 0)
        assert weights.normed == ("query", "key")[:normed]
        assert weights.output_normed is (name in ("olmo2", "gemma2", "gemma3"))
        assert len(close) == 3 - normed + (not weights.output_normed)
        assert max(close.values()) < 1e-6, close
        heads, stored = architecture.heads(weights.layer)
        assert len(weights.W_Q) == len(weights.W_O) == heads
        assert len(weights.W_K) == len(weights.W_V) == stored
        each = heads // stored
        assert weights.kv_of_head == tuple(head // each for head in range(heads))
        rotary = name not in ("gpt2", "gpt_neo", "opt", "bloom", "mpt")
        assert weights.rotated is rotary


@pytest.mark.parametrize("name", ZOO)
def test_latent_gated_and_fused_projections(name):
    architecture = Architecture(model_zoo.build(name))
    layers = [n for n in range(architecture.n_layers) if has_heads(architecture, n)]
    assert layers
    for weights in all_head_weights(architecture):
        close = differences(architecture, weights)
        assert close and max(close.values()) < 1e-6, close
        assert weights.gated is (name in GATED)
        assert ("value" in weights.normed) is (name in LATENT)


@pytest.mark.parametrize("name", ["qwen3", "gemma3", "olmo2"])
def test_behind_a_query_norm_the_models_norm_completes_the_query(name):
    model = built(name)
    architecture = Architecture(model)
    for layer in range(architecture.n_layers):
        weights = head_weights(architecture, layer)
        sites = [Site("query", layer), Site("key", layer)]
        x, kept = attention_input(architecture, layer, families.token_ids(6, 2), sites)
        attention = model.model.layers[layer].self_attn
        for part, norm, letter in (("query", "q_norm", "Q"), ("key", "k_norm", "K")):
            raw = torch.einsum("bd,hdk->bhk", x[:, 0], getattr(weights, f"W_{letter}"))
            shape = raw.shape
            raw = raw.flatten(1) if name == "olmo2" else raw
            with torch.no_grad():
                made = getattr(attention, norm)(raw).view(shape)
            assert relative(made, kept[part][:, 0]) < 1e-6


@pytest.mark.parametrize("name", LATENT)
def test_behind_a_latent_norm_a_value_lacks_its_scale_alone(name):
    """The same factor for all entries of all heads of a token: the norm's, which depends on it."""
    architecture = Architecture(model_zoo.build(name))
    for weights in all_head_weights(architecture):
        site = Site("value", weights.layer)
        x, kept = attention_input(architecture, weights.layer, families.token_ids(4, 5), [site])
        made = torch.einsum("bpd,hdk->bphk", x, weights.W_V).flatten(2)
        own = kept["value"].flatten(2)
        factor = (made * own).sum(-1) / made.square().sum(-1)
        assert relative(made * factor[..., None], own) < 1e-5
        assert factor.std() > 1e-3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["gpt2", "gpt_neox", "falcon", "llama", "opt", "gemma2", "olmo2"])
def test_half_precision_gives_the_stored_numbers(name, dtype):
    coarse = families.build(name).to(dtype)
    found = all_head_weights(Architecture(coarse))
    exact = all_head_weights(Architecture(families.build(name).to(dtype).float()))
    for ours, own in zip(found, exact, strict=True):
        for tensor in TENSORS:
            torch.testing.assert_close(getattr(ours, tensor), getattr(own, tensor), rtol=0, atol=0)
        for field in ("kv_of_head", "normed", "rotated", "gated", "output_normed", "modules"):
            assert getattr(ours, field) == getattr(own, field)
        assert ours.scales == pytest.approx(own.scales, rel=1e-3)


def test_values_that_are_zero_prove_nothing_and_are_not_needed():
    """GPT-2's output projection is square: by zeros, either way up would do."""
    model = induction_circuit()
    with torch.no_grad():
        noise = torch.randn(96, 96, generator=torch.Generator().manual_seed(0))
        model.transformer.h[1].attn.c_proj.weight.copy_(noise)
    weights = head_weights(Architecture(model), 1)
    assert not weights.W_V.any()
    torch.testing.assert_close(weights.W_O.flatten(0, 1), noise, rtol=0, atol=0)
    assert weights.kv_of_head == (0, 1, 2)


def test_an_adapter_is_in_the_weights():
    """A projection that is no plain matrix multiplication is asked how it answers."""

    class Adapted(nn.Module):
        def __init__(self, base):
            super().__init__()
            self.base, self.in_features = base, base.in_features
            generator = torch.Generator().manual_seed(0)
            self.down = torch.randn(32, 2, generator=generator)
            self.up = torch.randn(2, base.out_features, generator=generator)

        @property
        def weight(self):
            return self.base.weight

        def forward(self, x):
            return self.base(x) + x @ self.down @ self.up

    model = families.build("qwen2")
    layer = model.model.layers[1].self_attn
    layer.v_proj = Adapted(layer.v_proj)
    weights = head_weights(Architecture(model), 1)
    assert max(differences(Architecture(model), weights).values()) < 1e-6
    plain = layer.v_proj.base.weight.mT + layer.v_proj.down @ layer.v_proj.up
    ours = weights.W_V.movedim(0, 1).flatten(1)
    torch.testing.assert_close(ours, plain.detach(), rtol=1e-5, atol=1e-5)


def test_folded_weights_act_on_the_scaled_stream(family):
    name, model = family
    if name == "mamba":
        return
    architecture = Architecture(model)
    ids = families.token_ids(4, 3)
    for raw, folded in zip(
        all_head_weights(architecture),
        all_head_weights(architecture, fold_norm=True),
        strict=True,
    ):
        assert folded.folded and not raw.folded
        stream = Site("resid_pre", raw.layer)
        x, kept = attention_input(architecture, raw.layer, ids, [stream])
        r = kept["resid_pre"]
        centred = name in CENTRED
        moved = r - r.mean(-1, keepdim=True) * centred
        scale = (moved.square().mean(-1, keepdim=True) + 1e-5).sqrt()
        scale = torch.ones_like(scale) if name == "olmo2" else scale
        for letter in PARTS.values():
            ours = torch.einsum("bpd,hdk->bphk", r / scale, getattr(folded, f"W_{letter}"))
            own = torch.einsum("bpd,hdk->bphk", x, getattr(raw, f"W_{letter}"))
            ours = ours + getattr(folded, f"b_{letter}")
            assert relative(ours, own + getattr(raw, f"b_{letter}")) < 2e-5
        torch.testing.assert_close(folded.W_O, raw.W_O, rtol=0, atol=0)


CENTRED = (
    *("gpt2", "gptj", "gpt_neo", "gpt_neox", "opt", "bloom", "mpt", "stablelm", "phi"),
    *("falcon", "falcon_new", "cohere"),
)
"""Families with layer norms."""


# --- Circuits -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["gpt2", "llama", "falcon", "mistral"])
def test_circuits_are_the_products_of_each_head_and_its_stored_one(name):
    weights = head_weights(Architecture(built(name)), 1)
    for head, stored in enumerate(weights.kv_of_head):
        qk = weights.W_Q[head] @ weights.W_K[stored].mT
        ov = weights.W_V[stored] @ weights.W_O[head]
        torch.testing.assert_close(weights.qk(head).full(), qk)
        torch.testing.assert_close(weights.ov(head).full(), ov)
        torch.testing.assert_close(weights.qk()[head].full(), qk)
        torch.testing.assert_close(weights.expanded().ov()[head].full(), ov)
        assert weights.ov(head).rank == weights.W_V.shape[-1]
    torch.testing.assert_close(weights.ov(-1).full(), weights.ov(weights.n_heads - 1).full())
    with pytest.raises(InputError, match=r"layer 1 has 4 heads, 0\.\.3; came 4"):
        weights.qk(4)
    for head in (True, "0", 1.5):
        with pytest.raises(InputError, match=rf"0\.\.3; came {head!r}"):
            weights.ov(head)


def test_the_qk_circuit_gives_the_models_pattern():
    """Without biases, norms and rotation the pattern is the softmax of x QK xᵀ / √d_head."""
    model = families.build("gpt2")
    with torch.no_grad():
        for block in model.transformer.h:
            block.attn.c_attn.bias.zero_()
    architecture = Architecture(model)
    weights = head_weights(architecture, 2)
    pattern = Site("attn_pattern", 2)
    x, kept = attention_input(architecture, 2, families.token_ids(1, 6), [pattern])
    for head in range(4):
        scores = x[0] @ weights.qk(head).full() @ x[0].mT / 8**0.5
        scores = scores.masked_fill(~torch.ones(6, 6).tril().bool(), -torch.inf)
        torch.testing.assert_close(scores.softmax(-1), kept["attn_pattern"][0, head])


# --- What cannot be found -------------------------------------------------------------------------


def test_what_is_not_proven_is_refused():
    class Bent(nn.Linear):
        def forward(self, x):
            return super().forward(x) + 0.01 * x.sum(-1, keepdim=True).sin()

    class Tilted(nn.Module):
        """As wide as it is long, and no norm: it must not be passed by."""

        def forward(self, x):
            return x + x.flip(-1).tanh()

    model = families.build("llama", num_key_value_heads=4)
    attention = model.model.layers[1].self_attn
    for projection in ("q_proj", "o_proj"):
        kept = getattr(attention, projection)
        bent = Bent(32, 32, bias=False)
        bent.weight = kept.weight
        setattr(attention, projection, bent)
        what = "makes the query" if projection == "q_proj" else "is no plain matrix"
        with pytest.raises(SiteError, match=rf"layer 1 of LlamaForCausalLM.*{what}|{what}"):
            head_weights(Architecture(model), 1)
        assert head_weights(Architecture(model), 0).layer == 0
        setattr(attention, projection, kept)
    attention.k_proj = nn.Sequential(attention.k_proj, Tilted())
    with pytest.raises(SiteError, match="makes the key"):
        head_weights(Architecture(model), 1)
    assert count_hooks(model) == 0


def test_what_depends_on_other_tokens_is_refused():
    class Shifted(nn.Module):
        def __init__(self, base):
            super().__init__()
            self.base = base

        def forward(self, x):
            return self.base(x + 0.1 * x.roll(1, 1))

    model = families.build("llama")
    model.model.layers[0].self_attn.v_proj = Shifted(model.model.layers[0].self_attn.v_proj)
    with pytest.raises(SiteError, match="the value in layer 0 of LlamaForCausalLM depends on earl"):
        head_weights(Architecture(model), 0)


def test_layers_are_named_in_every_spelling_and_checked_first():
    architecture = Architecture(built("gpt2"))
    for spelled in (-1, "h.2", "transformer.h.2"):
        assert layers_with_heads(architecture, spelled) == [2]
    assert layers_with_heads(architecture, [2, "0", -1]) == [2, 0]
    assert [each.layer for each in all_head_weights(architecture, [2, 0])] == [2, 0]
    with pytest.raises(LayerError, match="layer 7 is out of range"):
        all_head_weights(architecture, [7])
    with pytest.raises(SiteError, match="no layer in an empty list; None means all"):
        all_head_weights(architecture, [])


def test_hooks_are_gone_after_an_error(monkeypatch):
    model = families.build("llama")
    architecture = Architecture(model)
    len(architecture.structure)

    def broken(*_, **__):
        raise RuntimeError("broken")

    monkeypatch.setattr(model.model.layers[2].self_attn.o_proj, "forward", broken)
    for search in (all_head_weights, lambda a: output_weights(a, [0, 1, 2])):
        with pytest.raises(RuntimeError, match="broken"):
            search(architecture)
        assert count_hooks(model) == 0


def test_large_square_matrices_in_half_precision_are_not_turned_over():
    """Roundings of a long sum must not excuse a transposed matrix."""
    model = families.build("gpt2").bfloat16()
    found = watch_attention(Architecture(model), [0])[0]
    call = next(each for each in found.calls if each.path == "c_proj")
    matrix = torch.randn(2048, 2048, generator=torch.Generator().manual_seed(0)).bfloat16()
    taken = torch.randn(32, 2048, generator=torch.Generator().manual_seed(1)).bfloat16()
    given = (taken.float() @ matrix.float()).bfloat16()
    conv = nn.Module()
    conv.weight, conv.bias = nn.Parameter(matrix), nn.Parameter(torch.zeros(2048).bfloat16())
    made = dataclasses.replace(call, module=conv, taken=taken, given=given)
    made.tried, made.affine = False, None
    torch.testing.assert_close(affine_of(made)[0], matrix.float(), rtol=0, atol=0)
    assert attention_projections._proven(made, matrix.mT, conv.bias) is None


def test_columns_are_found_where_they_stand():
    pool = torch.randn(32, 600, generator=torch.Generator().manual_seed(0))
    order = torch.randperm(600, generator=torch.Generator().manual_seed(1))
    assert find_columns(pool[:, order], pool).tolist() == order.tolist()
    moved = pool[:, :3] * torch.tensor([1.0, 1.001, -1.0])
    assert find_columns(moved, pool).tolist() == [0, -1, -1]


# --- Result ---------------------------------------------------------------------------------------


def test_it_is_tabulated_drawn_and_kept(tmp_path):
    weights = head_weights(Architecture(built("opt")), 1, fold_norm=True)
    assert repr(weights) == "HeadWeights(layer 1, 4 heads, 32 × 8, folded)"
    grouped = head_weights(Architecture(built("llama")), 2)
    assert repr(grouped) == "HeadWeights(layer 2, 4 heads, 2 key/value heads, 32 × 8, rotated)"
    frame = grouped.to_frame()
    assert list(frame.columns) == [
        "layer",
        "head",
        "kv_head",
        "W_Q",
        "W_K",
        "W_V",
        "W_O",
        "qk",
        "ov",
    ]
    assert frame["kv_head"].tolist() == [0, 0, 1, 1]
    assert frame["W_K"][3] == pytest.approx(float(grouped.W_K[1].norm()), rel=1e-5)
    assert frame["ov"][2] == pytest.approx(float(grouped.ov(2).full().norm()), rel=1e-5)
    ax = grouped.plot().axes[0]
    assert [label.get_text() for label in ax.get_yticklabels()][-1] == "ov"
    weights.save(tmp_path / "weights")
    again = HeadWeights.load(tmp_path / "weights")
    for field in dataclasses.fields(HeadWeights):
        ours, own = getattr(again, field.name), getattr(weights, field.name)
        assert torch.equal(ours, own) if field.name in TENSORS else ours == own
    for path in tmp_path.iterdir():
        path.write_bytes(b"no")
    with pytest.raises(RecordFileError):
        HeadWeights.load(tmp_path / "weights")


def test_copies_do_not_change_the_model():
    """Writing into the weights of a head must not reach the matrix that they were found in."""
    for name in ("gpt2", "llama", "bloom"):
        model = families.build(name)
        before = {path: each.clone() for path, each in model.named_parameters()}
        for weights in all_head_weights(Architecture(model)):
            for tensor in TENSORS:
                getattr(weights, tensor).fill_(7.0)
        for path, parameter in model.named_parameters():
            torch.testing.assert_close(parameter, before[path], rtol=0, atol=0)
