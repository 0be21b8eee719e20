"""What heads write on a prompt: parts that add up, norms by hand, a planted answer."""

import dataclasses
import functools

import numpy as np
import pytest
import torch
from torch import nn

import families
from forward_pass import (
    ArchitectureError,
    InputError,
    LayerError,
    RecordFileError,
    Site,
    SiteError,
    record,
)
from head_writing import head_writes, value_weighted_patterns
from head_writing_result import HeadWrites, WeightedPatterns
from induction_circuit import INDUCTION, induction_circuit
from model_analyzer import ModelAnalyzer
from model_architecture import Architecture

IDS = [9, 30, 41, 9, 77, 52, 30]
TARGETS = [7, 50, 98]
POST_NORM = ("olmo2", "gemma2", "gemma3")
"""Families with a norm between attention and the stream."""
ONE_MORE = ("gemma2", "gemma3")
"""Families whose norms multiply by 1 + weight."""
CENTRED = (
    *("gpt2", "gptj", "gpt_neo", "gpt_neox", "opt", "bloom", "mpt", "stablelm", "phi"),
    *("falcon", "falcon_new", "cohere"),
)
FACTORS = {"cohere": 0.5, "granite": 1 / 2.0}
"""Of the logits; `families` says so."""


@functools.cache
def built(name):
    return families.build(name)


def count_hooks(model):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def held_norm(name, norm, at):
    """A norm as a linear map with its scale held at ``at``: from parameters, in float64."""
    gain = norm.weight.detach().double() + (name in ONE_MORE)
    eps = next(getattr(norm, n) for n in ("variance_epsilon", "eps") if hasattr(norm, n))

    def moved(x):
        x = x.double()
        return x - x.mean(-1, keepdim=True) * (name in CENTRED)

    scale = (moved(at).square().mean(-1, keepdim=True) + eps).sqrt()
    return lambda x: gain * moved(x) / scale


def heads_alone(architecture, layer, z):
    """What each head gives by the output projection itself, all other heads at 0."""
    return [architecture.project_head(z, layer, head) for head in range(z.shape[-2])]


def by_hand(name, model, position):
    """Effects ``[layer, head, vocab]`` and lengths, through the model's own modules, norms held."""
    architecture = Architecture(model)
    n, inputs = architecture.n_layers, architecture.inputs(torch.tensor([IDS]))
    names = ("head_out", "attn_out")
    sites = [Site(each, layer) for layer in range(n) for each in names]
    kept = record(architecture, inputs, [*sites, Site("resid_post", n - 1)])
    stream = kept[Site("resid_post", n - 1)][0, position]
    final = held_norm(name, architecture.final_norm, stream)
    effects, lengths = [], []
    for layer in range(n):
        found = architecture.structure[layer]
        with torch.no_grad():
            parts = heads_alone(architecture, layer, kept[Site("head_out", layer)][0, position])
            if name in POST_NORM:
                norm = model.model.layers[layer].post_attention_layernorm
                projection = model.model.layers[layer].self_attn.o_proj
                whole = projection(kept[Site("head_out", layer)][0, position].flatten())
                parts = [held_norm(name, norm, whole)(part) for part in parts]
            parts = torch.stack([part.double() * found.scale for part in parts])
        lengths.append(parts.norm(dim=-1))
        logits = final(parts) @ model.get_output_embeddings().weight.detach().double().mT
        effects.append(logits * FACTORS.get(name, 1.0))
    return torch.stack(effects), torch.stack(lengths)


# --- What heads say -------------------------------------------------------------------------------


@pytest.mark.parametrize("position", [-1, 2])
def test_effects_are_those_of_the_models_own_parts(family, position):
    name, model = family
    if name == "mamba":
        with pytest.raises(SiteError, match="computes no attention"):
            head_writes(Architecture(model), None, IDS)
        return
    architecture = Architecture(model)
    len(architecture.structure)
    before = count_hooks(model)
    found = head_writes(architecture, None, IDS, TARGETS, position=position, k=3)
    assert count_hooks(model) == before
    effects, lengths = by_hand(name, model, position)
    size = float(effects.abs().max())
    np.testing.assert_allclose(found.values, effects[..., TARGETS], atol=2e-5 * size)
    np.testing.assert_allclose(found.lengths, lengths, rtol=2e-5)
    centred = effects - effects.mean(-1, keepdim=True)
    best = torch.stack([centred.topk(3).values, centred.topk(3, largest=False).values], dim=2)
    np.testing.assert_allclose(found.top_values, best, atol=2e-5 * size)
    at_best = centred.gather(-1, torch.tensor(found.top_ids).flatten(2))
    np.testing.assert_allclose(at_best, best.flatten(2), atol=4e-5 * size)
    with torch.no_grad():
        logits = model(torch.tensor([IDS])).logits[0, position]
    assert found.logits == pytest.approx(logits[TARGETS].tolist(), abs=1e-5)
    assert found.position == position % len(IDS)
    assert found.before_cap is (name == "gemma2")


def test_without_a_head_the_logit_falls_by_its_effect(family):
    """The model itself from the last block on, a head's part gone, its final norm's scale held."""
    name, model = family
    if name == "mamba":
        return
    architecture = Architecture(model)
    found = head_writes(architecture, None, IDS, TARGETS)
    norm, head = architecture.final_norm, model.get_output_embeddings()
    last = Site("resid_post", architecture.n_layers - 1)
    inputs = architecture.inputs(torch.tensor([IDS]))
    stream = record(architecture, inputs, [last])[last][0, -1]
    linear = held_norm(name, norm, stream)
    bias = getattr(norm, "bias", None)
    offset = 0 if bias is None else bias.detach().double()
    z = record(architecture, inputs, [Site("head_out", 1), Site("attn_out", 1)])

    def logits_of(final_stream):
        with torch.no_grad():
            return head((linear(final_stream) + offset).float()) * FACTORS.get(name, 1.0)

    with torch.no_grad():
        whole = model(torch.tensor([IDS])).logits[0, -1]
    if name != "gemma2":  # it bends them
        torch.testing.assert_close(logits_of(stream), whole, rtol=1e-4, atol=1e-4)
    for number in range(4):
        part = architecture.project_head(z[Site("head_out", 1)][0, -1], 1, number).detach()
        if name in POST_NORM:
            block = model.model.layers[1]
            whole_z = z[Site("head_out", 1)][0, -1].flatten()
            at = block.self_attn.o_proj(whole_z).detach()
            part = held_norm(name, block.post_attention_layernorm, at)(part).float()
        part = part * architecture.structure[1].scale
        fallen = logits_of(stream) - logits_of(stream - part)
        np.testing.assert_allclose(found.values[1, number], fallen[TARGETS], atol=2e-4)


def test_heads_bias_and_the_rest_of_the_stream_add_up_to_the_logit():
    model = built("gpt2")
    architecture = Architecture(model)
    found = head_writes(architecture, None, IDS, TARGETS)
    inputs = architecture.inputs(torch.tensor([IDS]))
    sites = [Site("embed", 0)] + [Site("mlp_out", layer) for layer in range(3)]
    sites.append(Site("resid_post", 2))
    kept = {site: value[0, -1] for site, value in record(architecture, inputs, sites).items()}
    biases = sum(block.attn.c_proj.bias.detach() for block in model.transformer.h)
    norm = model.transformer.ln_f
    linear = held_norm("gpt2", norm, kept[Site("resid_post", 2)])
    rest = sum(kept[site] for site in sites[:-1]) + biases
    end = model.lm_head.weight.detach().double()[TARGETS]
    others = end @ (linear(rest) + norm.bias.detach().double())
    total = found.values.sum((0, 1)) + others.numpy()
    assert total.tolist() == pytest.approx(found.logits, abs=1e-4)


@pytest.mark.parametrize("name", ["gpt2", "gpt_neox", "llama", "gemma2", "olmo2", "cohere"])
def test_half_precision_gives_nearly_the_same(name):
    """Coarse numbers must hide no norm, mean, multiplier or soft-cap."""
    exact = head_writes(Architecture(families.build(name).bfloat16().float()), None, IDS, TARGETS)
    coarse = head_writes(Architecture(families.build(name).bfloat16()), None, IDS, TARGETS)
    assert coarse.before_cap is exact.before_cap is (name == "gemma2")
    off = np.abs(coarse.values - exact.values).max()
    assert off < 0.05 * np.abs(exact.values).max()
    np.testing.assert_allclose(coarse.lengths, exact.lengths, rtol=0.1)


def test_the_planted_head_writes_what_comes_next():
    model = induction_circuit(copies=True)
    found = head_writes(Architecture(model), None, [3, 5, 9, 14, 5], 9)
    row, head = np.unravel_index(found.values[..., 0].argmax(), (2, 3))
    assert (row, head) == INDUCTION
    assert found.top_ids[1, 2, 0, 0] == 9
    assert found.top(1)["head"][0] == "1.2"
    others = np.delete(found.values.ravel(), 5)
    assert (
        found.values[1, 2, 0] > 10 * np.abs(others).max()
    )  # not 0: a layer norm moves all entries


def test_the_bundled_models_heads_write_the_copied_token():
    analyzer = ModelAnalyzer(device="cpu")
    ids = [40, 900, 77, 1500, 333, 40, 900, 77, 1500]
    found = analyzer.head_writes(ids, [333])
    assert set(found.top(3)["head"]) <= {f"4.{head}" for head in range(6)}
    own = analyzer.head_writes(ids)
    with torch.no_grad():
        logits = analyzer.model(torch.tensor([ids])).logits[0, -1]
    assert own.logits == pytest.approx([float(logits.max())], abs=1e-4)


def test_some_layers_and_targets_in_every_spelling():
    architecture, tokenizer = Architecture(built("llama")), families.tiny_tokenizer()
    whole = head_writes(architecture, tokenizer, "the cat sat", [" the", 50])
    part = head_writes(architecture, tokenizer, "the cat sat", " the", layers=-1)
    assert (part.layers, part.targets) == ((2,), (" the",))
    np.testing.assert_allclose(part.values[0, :, 0], whole.values[2, :, 0], rtol=1e-6)
    array = head_writes(architecture, tokenizer, "the cat sat", np.array([50]), layers=[0, "2"])
    np.testing.assert_allclose(array.values[..., 0], whole.values[[0, 2], :, 1], rtol=1e-6)
    number = head_writes(architecture, tokenizer, "the cat sat", torch.tensor(50), position=[3])
    np.testing.assert_allclose(number.values[..., 0], whole.values[..., 1], rtol=1e-6)
    for k in (0, -1, 1.0):
        with pytest.raises(InputError, match="the number of rows must be at least 1"):
            whole.top(k)
    for target in (2, -3, True, "a"):
        with pytest.raises(InputError, match=r"target is 0\.\.1; came"):
            whole.plot(target)


# --- What is refused ------------------------------------------------------------------------------


def test_what_cannot_be_read_is_refused_before_anything_runs(monkeypatch):
    architecture, tokenizer = Architecture(built("gpt2")), families.tiny_tokenizer()
    len(architecture.structure)
    monkeypatch.setattr(architecture, "inputs", None)  # a pass would fail otherwise
    for options, message in (
        ({"targets": []}, "no token in an empty list; None means the model's best token"),
        ({"targets": " the cat"}, "token"),
        ({"targets": 99}, "99"),
        ({"position": 40}, "position 40"),
        ({"position": None}, "at one position; position=None is 4"),
        ({"position": [0, 1]}, r"at one position; position=\[0, 1\] is 2"),
        ({"position": slice(0, 2)}, "at one position"),
        ({"k": 0}, "k is 1 to 99 tokens; came 0"),
        ({"k": 2.5}, "k is 1 to 99 tokens; came 2.5"),
    ):
        with pytest.raises(InputError, match=message):
            head_writes(architecture, tokenizer, "the cat sat", **options)
    for search in (head_writes, value_weighted_patterns):
        with pytest.raises(InputError, match="outside"):
            search(architecture, tokenizer, [5, 500])
        with pytest.raises(LayerError, match="layer 9 is out of range"):
            search(architecture, tokenizer, "the cat sat", layers=[9])
    with pytest.raises(ArchitectureError, match="needs the language-model head"):
        head_writes(Architecture(built("gpt2").transformer), tokenizer, "the cat sat")


def test_ways_to_the_logits_that_are_no_factor_and_no_cap_are_refused():
    class Mirrored(nn.Linear):
        def forward(self, x):
            return super().forward(x).sin()

    model = families.build("gpt2", tie_word_embeddings=False)
    head = Mirrored(32, families.VOCAB, bias=False)
    head.weight = model.lm_head.weight
    model.lm_head = head
    with pytest.raises(SiteError, match="are not what its head makes of the final norm's output"):
        head_writes(Architecture(model), None, IDS)
    assert count_hooks(model) == 0


def test_heads_that_do_not_add_up_are_refused(monkeypatch):
    """Something between the output projection and the stream that only real tokens bring out."""
    model = families.build("llama")
    projection = model.model.layers[1].self_attn.o_proj
    own, calls = projection.forward, []

    def drifting(x):
        calls.append(x.shape)
        return own(x) * (1.5 if x.shape[-2] == len(IDS) else 1.0)

    architecture = Architecture(model)
    len(architecture.structure)
    monkeypatch.setattr(projection, "forward", drifting)
    with pytest.raises(SiteError, match="the heads of layer 1 of LlamaForCausalLM do not add up"):
        head_writes(architecture, None, IDS)
    assert calls and count_hooks(model) == 0


# --- Value-weighted patterns ----------------------------------------------------------------------


def test_weighted_patterns_are_lengths_of_what_is_moved(family):
    """Kobayashi et al.: ‖α v W_O‖, every token's value through the projection itself."""
    name, model = family
    if name == "mamba":
        return
    architecture = Architecture(model)
    found = value_weighted_patterns(architecture, None, IDS)
    assert found.tokens and found.layers == tuple(range(architecture.n_layers))
    for layer in found.layers:
        sites = [Site(each, layer) for each in ("attn_pattern", "value", "head_out")]
        kept = record(architecture, architecture.inputs(torch.tensor([IDS])), sites)
        pattern, value, z = (kept[site][0] for site in sites)
        pattern = pattern[..., : len(IDS)]
        each = z.shape[1] // value.shape[1]
        np.testing.assert_allclose(found.patterns[layer], pattern, atol=1e-6)
        for head in range(z.shape[1]):
            only = torch.zeros_like(z)
            only[:, head] = value[:, head // each]
            with torch.no_grad():
                written = architecture.project_head(only, layer, head)
            lengths = written.norm(dim=-1)
            np.testing.assert_allclose(found.lengths[layer, head], lengths, rtol=1e-4)
            moved = pattern[head][..., None] * written[None]
            np.testing.assert_allclose(
                found.weighted[layer, head], moved.norm(dim=-1), rtol=1e-4, atol=1e-5
            )
            torch.testing.assert_close(pattern[head] @ value[:, head // each], z[:, head])


# --- Results --------------------------------------------------------------------------------------


@functools.cache
def results():
    architecture, tokenizer = Architecture(built("gemma2")), families.tiny_tokenizer()
    return [
        head_writes(architecture, tokenizer, "the cat sat on the mat", [" the", " cat"], k=2),
        value_weighted_patterns(architecture, tokenizer, "the cat sat on the mat", [2, 0]),
    ]


@pytest.mark.parametrize("number", [0, 1])
def test_results_are_kept(tmp_path, number):
    made = results()[number]
    made.save(tmp_path / "result.safetensors")
    again = type(made).load(tmp_path / "result.safetensors")
    assert repr(again) == repr(made) and "\n" not in repr(made)
    for field in dataclasses.fields(made):
        ours, own = getattr(again, field.name), getattr(made, field.name)
        if isinstance(own, np.ndarray):
            np.testing.assert_array_equal(ours, own)
        else:
            assert (ours, type(ours)) == (own, type(own))
    with pytest.raises(RecordFileError):
        (WeightedPatterns, HeadWrites)[number].load(tmp_path / "result.safetensors")


def test_results_are_tabulated_and_drawn():
    writes, weighted = results()
    frame = writes.to_frame()
    assert len(frame) == 4 * 4 * 2
    row = frame[(frame["head"] == "2.3") & (frame.target == " cat")].iloc[0]
    assert row["value"] == writes.values[2, 3, 1]
    assert row["raises"] == writes.top_tokens[2][3][0]
    assert writes.top(4)["value"].abs().is_monotonic_decreasing
    ax = writes.plot(1).axes[0]
    np.testing.assert_array_equal(ax.images[0].get_array(), writes.values[..., 1])
    assert "before its cap" in writes.plot().axes[1].get_ylabel()
    frame = weighted.to_frame()
    length = len(weighted.tokens)
    assert len(frame) == 2 * 4 * length * (length + 1) // 2
    row = frame[(frame["head"] == "2.1") & (frame["query"] == 4) & (frame["key"] == 2)].iloc[0]
    assert row["weighted"] == weighted.weighted[0, 1, 4, 2]
    assert row["key_token"] == weighted.tokens[2]
    np.testing.assert_array_equal(weighted.of("0.3"), weighted.weighted[1, 3])
    np.testing.assert_array_equal(weighted.of("0.3", weighted=False), weighted.patterns[1, 3])
    shown = np.ma.filled(weighted.plot("2.1").axes[0].images[0].get_array(), np.nan)
    np.testing.assert_array_equal(shown, weighted.of("2.1"))
    assert ax.get_title() == "Heads that write ·cat"
    with pytest.raises(InputError, match=r"a layer out of \[2, 0\] and a head 0\.\.3"):
        weighted.of("1.0")
