"""A logit as a sum over parts: against Hugging Face's logits, and each part against a formula.

The formula here knows the families' norms, multipliers and heads by name, and takes a frozen norm
from the norm's own module; the code under test knows none of that and fits noise.
"""

import copy
import types

import numpy as np
import pytest
import torch

import families
import model_zoo
from array_files import open_arrays
from direct_attribution import logit_attribution
from forward_pass import ArchitectureError, InputError, RecordFileError, Site, SiteError, record
from head_writing import head_writes
from intervention_handler import InterventionHandler
from logit_attribution import KINDS, NAMES, LogitAttribution
from logit_tail import find_tail
from model_analyzer import ModelAnalyzer
from model_architecture import Architecture
from saved_files import read_after_damage
from steering_vector import SteeringVector

IDS = [7, 11, 15, 6, 49, 10, 13]
EXPERTS = {"mixtral", "qwen2_moe", "gpt_oss"}
"""Their experts' product exists in float32 and less alone."""
WHOLE_MLP = EXPERTS | {"mamba"}
POST_NORMS = {
    "olmo2": "post_attention_layernorm",
    "gemma2": "post_attention_layernorm",
    "gemma3": "post_attention_layernorm",
}


def logits_of(model, ids=IDS):
    with torch.no_grad():
        return model(torch.tensor([ids]), use_cache=False).logits[0].double()


def attribute(model, *args, **options):
    return logit_attribution(Architecture(model), None, IDS, *args, **options)


def count(result, kind):
    return int(result.of_kind(kind).sum())


def hooks_on(model):
    tables = ("_forward_hooks", "_forward_pre_hooks")
    return sum(len(getattr(module, name)) for module in model.modules() for name in tables)


# --- The sum --------------------------------------------------------------------------------------


def test_parts_sum_to_the_models_logits(family):
    name, model = family
    result = attribute(model, positions=None)
    logits = logits_of(model)
    best = logits.argmax(-1)
    assert result.target_ids[:, 0].tolist() == best.tolist()
    assert np.array_equal(result.logits[:, 0], logits.max(-1).values.numpy())
    assert result.error <= 1e-6 * float(logits.abs().max())
    architecture = Architecture(model)
    heads = sum(architecture.heads(layer)[0] for layer in range(architecture.n_layers))
    assert count(result, "head") == heads
    assert count(result, "mlp") == (0 if name == "mamba" else architecture.n_layers)
    assert count(result, "mixer") == (architecture.n_layers if name == "mamba" else 0)
    assert count(result, "block") == count(result, "other") == 0


def test_differences_and_neurons_sum_too(family):
    name, model = family
    options = {"tokens": [5, 6], "against": 7, "positions": [2, -1]}
    whole = attribute(model, **options)
    logits = logits_of(model)[[2, -1]]
    expected = logits[:, [5, 6]] - logits[:, [7]]
    np.testing.assert_allclose(whole.logits, expected, rtol=0, atol=1e-12)
    assert whole.error <= 1e-6 * float(logits.abs().max())
    if name in WHOLE_MLP:
        with pytest.raises(SiteError, match="mlp_neurons"):
            attribute(model, neurons=True, **options)
        return
    split = attribute(model, neurons=True, **options)
    assert split.error <= 1e-6 * float(logits.abs().max())
    for layer in range(whole.n_layers):
        neurons = split.values[split.of_kind("neuron") & (split.layers == layer)]
        assert len(neurons) > 40
        np.testing.assert_allclose(neurons.sum(0), whole.part(f"mlp {layer}"), rtol=0, atol=2e-5)
    same = ~whole.of_kind("mlp")
    rest = ~split.of_kind("neuron")
    np.testing.assert_allclose(split.values[rest], whole.values[same], rtol=0, atol=2e-5)


@pytest.mark.parametrize("name", [n for n in families.FAMILIES if n not in EXPERTS])
def test_what_is_missing_is_rounding(name, monkeypatch):
    """In float64, with the float32 islands of the models' own code made float64 as well."""
    model = families.build(name).double()
    monkeypatch.setattr(torch, "float32", torch.float64)
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    result = attribute(model, positions=None)
    assert result.error <= 1e-10, result.error


@pytest.mark.parametrize("name", ["gpt2", "bloom", "gemma2", "granite", "gpt_oss", "mamba"])
def test_every_position_is_as_if_the_text_ended_there(name):
    """All positions of a text from one pass."""
    model = families.build(name)
    result = attribute(model, positions=None)
    passes = 0

    def seen(*_):
        nonlocal passes
        passes += 1

    architecture = Architecture(model)
    handle = architecture.blocks[0].register_forward_hook(seen)
    try:
        attribute(model, positions=None)
    finally:
        handle.remove()
    assert passes == 1
    for row in (1, 4):
        alone = logit_attribution(architecture, None, IDS[: row + 1])
        np.testing.assert_allclose(alone.values[:, 0], result.values[:, row], atol=5e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["gpt2", "gemma2", "cohere", "mamba", "gpt_oss"])
def test_low_precision(name, dtype):
    exact = attribute(families.build(name), 5, positions=None)
    result = attribute(families.build(name).to(dtype), 5, positions=None)
    assert result.labels == exact.labels
    eps = torch.finfo(dtype).eps
    scale = np.abs(exact.values).max()
    assert result.error <= 4 * eps * scale
    assert np.abs(result.values - exact.values).max() <= 8 * eps * scale


# --- Each part ------------------------------------------------------------------------------------


def frozen(norm, point, vectors):
    """A norm's linear part at the scale that it has at ``point``, from its own module."""
    centred = "LayerNorm" in type(norm).__name__ and "RMS" not in type(norm).__name__
    names = ("eps", "variance_epsilon")
    eps = next(getattr(norm, n) for n in names if getattr(norm, n, None) is not None)

    def scale(x):
        x = x - x.mean(-1, keepdim=True) if centred else x
        return (x.square().mean(-1, keepdim=True) + eps).sqrt()

    centred = centred and "Llama" not in type(norm).__name__
    return (norm(vectors) - norm(torch.zeros_like(vectors))) * scale(vectors) / scale(point)


def final_norm_of(model):
    body = model.base_model
    body = getattr(body, "decoder", body)
    names = ("ln_f", "norm", "final_layernorm", "final_layer_norm", "norm_f", "final_norm")
    return next(getattr(body, n) for n in names if getattr(body, n, None) is not None)


SLOPES = {"cohere": 0.5, "granite": 1 / 2.0}


def by_hand(name, model, vectors, point, token):
    """Logits that vectors of the stream add at a point, ``[vector]``."""
    through = frozen(final_norm_of(model), point, vectors)
    return through @ model.get_output_embeddings().weight[token] * SLOPES.get(name, 1.0)


@pytest.mark.parametrize("name", ["gemma2", "olmo2"])
def test_a_norm_with_like_gains_is_no_multiplier_in_half_precision(name):
    """Gains that differ by 5 % are within the rounding of bfloat16, and count all the same."""
    model = families.build(name)
    generator = torch.Generator().manual_seed(0)
    like = 0.0 if name == "gemma2" else 1.0
    for block in model.model.layers:
        for norm in (block.post_attention_layernorm, block.post_feedforward_layernorm):
            gain = like + 0.05 * torch.randn(norm.weight.shape, generator=generator)
            norm.weight.data.copy_(gain)
    half = model.bfloat16()
    found = attribute(half, [5, 8, 13], neurons=True)
    exact = attribute(copy.deepcopy(half).float(), [5, 8, 13], neurons=True)
    for kind in ("head", "neuron"):
        wanted = exact.values[exact.of_kind(kind)]
        off = found.values[found.of_kind(kind)] - wanted
        assert np.sqrt((off**2).mean()) < 0.03 * np.sqrt((wanted**2).mean())


@torch.no_grad()
def test_each_part_by_a_formula_of_its_own(family):
    """What is taken from the final stream, through norm and head: each head, MLP and block."""
    name, model = family
    arch, place, token = Architecture(model), 5, 9
    layers = range(arch.n_layers)
    names = [n for n in ("attn_out", "mlp_out", "head_out") if arch.missing(Site(n, 0)) is None]
    sites = [Site(n, layer) for layer in layers for n in (*names, "resid_post", "resid_pre")]
    inputs = {"input_ids": torch.tensor([IDS])}
    kept = {site: value[0, place] for site, value in record(arch, inputs, sites).items()}
    point = kept[Site("resid_post", arch.n_layers - 1)]
    result = attribute(model, token, positions=place)

    def expect(labels, vectors):
        found = sum(result.part(label) for label in labels if label in result.labels)
        wanted = by_hand(name, model, vectors, point, token)
        np.testing.assert_allclose(found.ravel(), wanted.numpy(), rtol=1e-4, atol=1e-4)

    expect(["embed", "position"], kept[Site("resid_pre", 0)][None])
    for layer in layers:
        if "mlp_out" in names:
            expect([f"mlp {layer}", f"mlp bias {layer}"], kept[Site("mlp_out", layer)][None])
        heads = written_by_heads(name, arch, layer, kept)
        for head, vector in enumerate(heads):
            expect([f"{layer}.{head}"], vector[None])
        bias = kept[Site("attn_out", layer)] - sum(heads)
        whole = [f"attn bias {layer}", f"mixer {layer}"]
        if bias.abs().max() > 1e-4:
            expect(whole, bias[None])
        else:
            assert not set(whole) & set(result.labels)
    lens = result.cumulative()[:, 0, 0] - result.values[result.of_kind("norm_bias")].sum()
    lens = lens - result.values[result.of_kind("unembed_bias")].sum()
    streams = [kept[Site("resid_pre", 0)], *(kept[Site("resid_post", n)] for n in layers)]
    wanted = by_hand(name, model, torch.stack(streams), point, token)
    np.testing.assert_allclose(lens, wanted.numpy(), rtol=1e-4, atol=1e-4)


def written_by_heads(name, arch, layer, kept):
    """What each head adds to the stream, through the norm behind attention by its name."""
    if Site("head_out", layer) not in kept:
        return []
    z = kept[Site("head_out", layer)]
    heads = [arch.project_head(z, layer, head) for head in range(len(z))]
    if name in POST_NORMS:
        norm = getattr(arch.blocks[layer], POST_NORMS[name])
        whole = arch.blocks[layer].self_attn.o_proj(z.flatten())
        heads = list(frozen(norm, whole, torch.stack(heads)))
    return [head * (0.5 if name == "granite" else 1.0) for head in heads]


def test_heads_as_head_writes_has_them(family):
    """Two ways to the same numbers: the weights found by watching, and the recorded pass."""
    name, model = family
    if name == "mamba":
        pytest.skip("it has no heads")
    arch = Architecture(model)
    result = attribute(model, [9, 14])
    other = head_writes(arch, None, IDS, [9, 14])
    for row, layer in enumerate(other.layers):
        for head in range(arch.heads(layer)[0]):
            found = result.part(f"{layer}.{head}")[0]
            np.testing.assert_allclose(found, other.values[row, head], rtol=1e-3, atol=2e-4)


def test_a_planted_head():
    """One head writes, all else writes nothing; the unembedding's row is what it writes."""
    model = families.build("llama")
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.down_proj.weight.zero_()
            layer.self_attn.o_proj.weight.zero_()
        generator = torch.Generator().manual_seed(3)
        planted = torch.randn(32, 8, generator=generator)
        model.model.layers[1].self_attn.o_proj.weight[:, 16:24] = planted
        model.model.norm.weight.fill_(1.0)
        arch = Architecture(model)
        kept = record(
            arch,
            {"input_ids": torch.tensor([IDS])},
            [Site("head_out", 1), Site("resid_post", arch.n_layers - 1)],
        )
        written = planted @ kept[Site("head_out", 1)][0, -1, 2]
        model.lm_head.weight[40] = written
        stream = kept[Site("resid_post", arch.n_layers - 1)][0, -1]
        scale = (stream.square().mean() + 1e-6).sqrt()
    result = attribute(model, 40)
    expected = float(written.square().sum() / scale)
    assert result.part("1.2")[0, 0] == pytest.approx(expected, rel=1e-5)
    rest = [n for n, label in enumerate(result.labels) if label not in ("embed", "1.2")]
    assert np.abs(result.values[rest]).max() == 0
    assert result.top(1)["part"][0] == "1.2"


# --- The way to the logits ------------------------------------------------------------------------


def test_a_soft_cap_is_a_part():
    capped, free = families.build("gemma2"), families.build("gemma2", final_logit_softcapping=None)
    result, other = (attribute(m, [5, 9], positions=None) for m in (capped, free))
    assert count(other, "soft_cap") == 0
    parts = ~result.of_kind("soft_cap")
    np.testing.assert_allclose(result.values[parts], other.values, rtol=0, atol=1e-5)
    taken = logits_of(capped)[:, [5, 9]] - logits_of(free)[:, [5, 9]]
    assert taken.abs().max() > 5
    np.testing.assert_allclose(result.part("soft-cap"), taken, rtol=0, atol=1e-4)
    np.testing.assert_allclose(result.cumulative()[-1], other.logits, rtol=0, atol=1e-4)


def test_a_cap_hidden_by_small_logits_is_still_a_part():
    model = families.build("gemma2", final_logit_softcapping=1e4)
    assert count(attribute(model), "soft_cap") == 1


def test_a_logit_scale_multiplies_every_part():
    one, two = (families.build("cohere", logit_scale=scale) for scale in (0.5, 1.0))
    found, doubled = (attribute(model, 5).values for model in (one, two))
    np.testing.assert_allclose(2 * found, doubled, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["phi", "gptj"])
def test_the_unembeddings_own_bias(name):
    model = families.build(name)
    result = attribute(model, [5, 6])
    bias = model.lm_head.bias[[5, 6]].detach()
    np.testing.assert_allclose(result.part("unembedding bias")[0], bias, rtol=1e-6)


def added_to_logits(model, bias, shortest=1):
    """A handle of a hook that adds to the logits of texts of that length."""

    def add(_module, _args, output):
        if output.logits.shape[1] >= shortest:
            output.logits = output.logits + bias
        return output

    return model.register_forward_hook(add)


def test_a_bias_on_the_logits_themselves():
    model = families.build("llama")
    before = attribute(model, 5)
    bias = torch.zeros(99)
    bias[5] = 3.0
    handle = added_to_logits(model, bias)
    after = attribute(model, 5)
    handle.remove()
    assert count(before, "unembed_bias") == 0
    assert after.part("unembedding bias")[0, 0] == pytest.approx(3.0, abs=1e-6)
    assert after.error < 1e-4


def test_positions_are_apart_where_they_are_added():
    model = families.build("gpt2")
    arch, token = Architecture(model), 5
    result = attribute(model, token, positions=3)
    with torch.no_grad():
        sites = [Site("resid_post", arch.n_layers - 1)]
        point = record(arch, {"input_ids": torch.tensor([IDS])}, sites)[sites[0]][0, 3]
        parts = torch.stack([model.transformer.wte.weight[IDS[3]], model.transformer.wpe.weight[3]])
        wanted = by_hand("gpt2", model, parts, point, token)
    found = [result.part("embed").item(), result.part("position").item()]
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-5)


def test_what_an_intervention_adds_is_a_part():
    model = families.build("llama")
    vector = torch.randn(32, generator=torch.Generator().manual_seed(1))
    before = attribute(model, 5)
    assert count(before, "other") == 0
    with InterventionHandler(model).register_steering_vector(SteeringVector(vector, 1, 2.0)):
        result = attribute(model, 5)
        logits = logits_of(model)
        stream = record(
            Architecture(model), {"input_ids": torch.tensor([IDS])}, [Site("resid_post", 2)]
        )
    point = stream[Site("resid_post", 2)][0, -1]
    assert result.logits[0, 0] == float(logits[-1, 5])
    assert result.error < 1e-4
    with torch.no_grad():
        wanted = by_hand("llama", model, 2 * vector[None], point, 5)
    np.testing.assert_allclose(result.part("other 1")[0], wanted, rtol=1e-4)


# --- Every decoder of transformers ----------------------------------------------------------------

REFUSED = {
    **dict.fromkeys(("deepseek_v4", "gemma3n_text", "hy_v4"), "carries 4 residual streams"),
    "inkling2_text": "reads those of earlier blocks",
    **dict.fromkeys(
        (
            *("bert", "big_bird", "camembert", "data2vec-text", "electra", "ernie"),
            *("megatron-bert", "modernbert-decoder", "qwen4_exp_text", "rembert", "roberta"),
            *("roberta-prelayernorm", "roc_bert", "roformer", "xlm-roberta", "xlm-roberta-xl"),
            "xmod",
        ),
        "neither the stream",
    ),
}
"""Families whose logits are no sum over parts of one stream, and what is said."""

QUICK = (
    *("bert", "deepseek_v3", "deepseek_v4", "inkling2_text", "jamba", "minicpm3", "nanochat"),
    *("openai-gpt", "qwen3_next", "recurrent_gemma", "rwkv"),
)
NO_BLOCKS = ("blt", "cpmant", "hrm_text", "mllama", "prophetnet", "reformer")
UNBUILT = ("gemma3n", "qwen4_exp")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "model_type",
    [
        pytest.param(name, marks=() if name in QUICK else pytest.mark.slow)
        for name in model_zoo.MODEL_TYPES
        if name not in (*model_zoo.NOT_DECODERS, *NO_BLOCKS, *UNBUILT)
    ],
)
def test_a_decoder_is_split_or_refused(model_type):
    model = model_zoo.build(model_type)
    before = hooks_on(model)
    if model_type in REFUSED:
        with pytest.raises((SiteError, ArchitectureError), match=REFUSED[model_type]):
            attribute(model)
    else:
        result = attribute(model, positions=None)
        logits = logits_of(model)
        assert np.array_equal(result.logits[:, 0], logits.max(-1).values.numpy())
        assert result.error <= 1e-6 * float(logits.abs().max())
    assert hooks_on(model) == before


def test_an_unembedding_that_does_more_than_its_matrix_is_refused():
    """A cap would hide it: the sum with the part ``soft_cap`` is right whatever comes before it."""
    model = families.build("gemma2")
    plain = model.lm_head.forward
    direction = torch.randn(32, generator=torch.Generator().manual_seed(0))

    def bent(hidden):
        return plain(hidden) + (hidden @ direction).square()[..., None]

    model.lm_head.forward = bent
    with pytest.raises(SiteError, match="does not give what its matrix makes"):
        attribute(model)


def test_parts_that_do_not_add_up_are_refused():
    """The logits of texts of several tokens are more than what the unembedding gives."""
    model = families.build("llama")
    handle = added_to_logits(model, 0.01, shortest=2)
    try:
        with pytest.raises(ArchitectureError, match=r"add up to .* and its logit is"):
            attribute(model)
    finally:
        handle.remove()
    assert hooks_on(model) == 0


def test_what_comes_between_two_blocks_is_a_part():
    model = families.build("llama")
    arch = Architecture(model)
    arch.structure  # noqa: B018  looked at before the model is changed

    def change(_module, args, kwargs):
        return (args[0] + 1.0, *args[1:]), kwargs

    handle = arch.blocks[1].register_forward_pre_hook(change, with_kwargs=True)
    try:
        result = logit_attribution(arch, None, IDS, 5)
        last = Site("resid_post", 2)
        point = record(arch, {"input_ids": torch.tensor([IDS])}, [last])[last][0, -1]
    finally:
        handle.remove()
    assert result.error < 1e-4
    with torch.no_grad():
        wanted = by_hand("llama", model, torch.ones(1, 32), point, 5)
    np.testing.assert_allclose(result.part("other 1")[0], wanted, rtol=1e-3)


# --- Other ways to hold a model -------------------------------------------------------------------


@pytest.mark.parametrize("name", ["gpt2", "gemma2"])
def test_offloaded_weights(name):
    accelerate = pytest.importorskip("accelerate")
    model = families.build(name)
    expected = attribute(model, [5, 9], neurons=True)
    there = accelerate.cpu_offload(copy.deepcopy(model), execution_device=torch.device("cpu"))
    result = attribute(there, [5, 9], neurons=True)
    assert result.labels == expected.labels
    np.testing.assert_allclose(result.values, expected.values, rtol=0, atol=1e-5)


@pytest.mark.filterwarnings("ignore")
def test_quantized_weights():
    quantization = pytest.importorskip("torchao.quantization")
    model = families.build("llama")
    expected = attribute(model, [5, 9], neurons=True)
    quantization.quantize_(model, quantization.Int8WeightOnlyConfig())
    result = attribute(model, [5, 9], neurons=True)
    assert result.labels == expected.labels
    assert result.error <= 1e-6 * 40
    assert np.abs(result.values - expected.values).max() < 0.6


def test_training_mode_and_hooks_are_as_before():
    model = families.build("gpt2").train()
    model.transformer.drop.p = 0.5
    result = attribute(model, 5)
    assert model.training
    assert model.transformer.drop.training
    assert hooks_on(model) == 0
    assert np.array_equal(result.values, attribute(model.eval(), 5).values)


# --- What is asked --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tokens": []}, r"no token in tokens=\[\]; None is the model's best token"),
        ({"against": []}, r"no token in against=\[\]; None is no comparison"),
        ({"tokens": 99}, "token id 99 is outside"),
        ({"tokens": "x"}, "needs a tokenizer"),
        ({"tokens": [1, 2], "against": [3, 4, 5]}, "one for each of the 2 tokens; came 3"),
        ({"tokens": [1, 2], "against": 2}, "'<2>' against itself is 0"),
        ({"positions": 7}, "position 7 is out of range"),
        ({"positions": []}, "selects none"),
        ({"following": True, "tokens": 1}, "leave out tokens"),
        ({"following": True}, r"no token follows position 6.*slice\(0, -1\)"),
        ({"neurons": [9]}, "layer 9 is out of range"),
        ({"neurons": "11"}, "no layer '11'|layer 11 is out of range"),
        ({"neurons": 9}, "layer 9 is out of range"),
        ({"tokens": 5.0}, "integers"),
        ({"tokens": {5, 6}}, "integers"),
    ],
)
def test_bad_requests_are_refused_before_the_model_runs(options, message):
    model = families.build("llama")
    arch = Architecture(model)
    arch.structure  # noqa: B018  the probe's own pass does not count
    runs = []
    handle = arch.blocks[0].register_forward_hook(lambda *_: runs.append(1))
    with pytest.raises((InputError, KeyError), match=message):
        logit_attribution(arch, None, IDS, **options)
    handle.remove()
    assert not runs


def test_a_model_without_a_head():
    with pytest.raises(ArchitectureError, match="language-model head"):
        attribute(families.build("llama").model)


def test_following_asks_about_the_prompts_own_tokens():
    model = families.build("llama")
    result = attribute(model, positions=slice(0, -1), following=True, against=3)
    assert result.target_ids[:, 0].tolist() == IDS[1:]
    logits = logits_of(model)
    expected = logits[range(6), IDS[1:]] - logits[:6, 3]
    np.testing.assert_allclose(result.total[:, 0], expected, rtol=0, atol=1e-4)


def test_one_foil_for_each_token():
    result = attribute(families.build("llama"), [5, 6], [7, 8])
    logits = logits_of(families.build("llama"))[-1]
    expected = logits[[5, 6]] - logits[[7, 8]]
    np.testing.assert_allclose(result.logits[0], expected, rtol=0, atol=1e-12)
    assert result.target_text(0, 1) == "'<6>' − '<8>'"
    for tokens in (np.array([5, 6]), torch.tensor([5, 6])):
        again = attribute(families.build("llama"), tokens, torch.tensor([7, 8]))
        np.testing.assert_array_equal(again.values, result.values)


def test_neurons_of_some_layers():
    result = attribute(families.build("llama"), 5, neurons=[-1])
    assert set(result.layers[result.of_kind("neuron")]) == {2}
    assert count(result, "mlp") == 2


def test_the_tail_of_a_family():
    model = families.build("granite")
    tail = find_tail(Architecture(model), torch.zeros(32))
    assert tail.slope.numpy() == pytest.approx(0.5)
    assert not tail.capped
    np.testing.assert_allclose(tail.norm.gain, model.model.norm.weight.detach(), rtol=1e-5)


# --- The result -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def result():
    model = families.build("gpt2")
    tokenizer = families.tiny_tokenizer()
    arch = Architecture(model)
    return logit_attribution(arch, tokenizer, IDS, [5, 6], 7, [2, 6])


def test_views_are_sums_of_parts(result):
    assert result.values.shape == (len(result.labels), 2, 2)
    by_layer = result.by_layer()
    assert by_layer.shape == (5, 2, 2)
    np.testing.assert_allclose(by_layer.sum(0), result.total, rtol=0, atol=1e-12)
    second = result.values[result.layers == 1].sum(0)
    np.testing.assert_allclose(by_layer[2], second, rtol=0, atol=1e-12)
    np.testing.assert_allclose(by_layer[-1], result.part("final norm bias"), rtol=0, atol=1e-12)
    lens = result.cumulative()
    assert lens.shape == (4, 2, 2)
    np.testing.assert_allclose(np.diff(lens, axis=0), by_layer[1:-1], rtol=0, atol=1e-12)
    np.testing.assert_allclose(lens[-1], result.logits, rtol=0, atol=1e-4)


def test_tables(result):
    frame = result.to_frame()
    assert len(frame) == result.values.size
    sums = frame.groupby(["position", "target"])["value"].sum()
    assert sums.loc[6].to_numpy() == pytest.approx(result.total[1])
    row = frame.query("part == '1.3' and position == 2").iloc[1]
    assert row["value"] == result.part("1.3")[0, 1]
    assert (row["kind"], row["layer"], row["index"]) == ("head", 1, 3)
    top = result.top(3, position=2, target=1)
    order = np.sort(np.abs(result.values[:, 0, 1]))[::-1][:3]
    np.testing.assert_array_equal(top["value"].abs(), order)
    assert set(top["position"]) == {2}
    assert result.top(1)["position"][0] == 6


def test_saved_and_read_again(result, tmp_path):
    path = tmp_path / "parts.safetensors"
    result.save(path)
    again = LogitAttribution.load(path)
    assert again.labels == result.labels
    for name in ("values", "logits", "target_ids", "against_ids", "kinds", "layers", "indices"):
        assert np.array_equal(getattr(again, name), getattr(result, name))
    for name in ("targets", "against", "positions", "tokens", "n_layers"):
        assert getattr(again, name) == getattr(result, name)
    with open_arrays(path, "logit attribution", 1) as stored:
        assert stored.content["positions"] == [2, 6]
    with pytest.raises(RecordFileError, match="logit attribution"):
        from head_circuit_result import HeadScores

        HeadScores.load(path)


def test_a_damaged_file_is_never_read_wrong(result, tmp_path):
    assert read_after_damage(result, tmp_path / "parts.safetensors") > 30


def test_a_one_line_repr(result):
    text = repr(result)
    assert "\n" not in text
    assert "2 positions" in text
    assert f"{len(result.labels)} parts" in text


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda r: r.part("9.9"), "no part '9.9'; parts are written 'embed'"),
        (lambda r: r.of_kind("heads"), "no kind 'heads'; kinds are embed"),
        (lambda r: r.top(0), "at least 1; came 0"),
        (lambda r: r.top(2.5), "at least 1; came 2.5"),
        (lambda r: r.top(True), "at least 1; came True"),
        (lambda r: r.top(1, position=True), "position True was not attributed"),
        (lambda r: r.top(1, target="a"), r"target is 0\.\.1; came 'a'"),
        (lambda r: r.top(1, target=True), r"target is 0\.\.1; came True"),
        (lambda r: r.top(1, position=3), r"position 3 was not attributed; positions are \[2, 6\]"),
        (lambda r: r.top(1, target=2), r"target is 0\.\.1; came 2"),
    ],
)
def test_bad_questions(result, call, message):
    with pytest.raises(InputError, match=message):
        call(result)


def test_parts_that_are_written_alike_are_one(result):
    """What comes between two blocks, and what a block adds beyond its writers: both "other 1"."""
    import dataclasses

    other = np.full(2, NAMES.index("other"))
    more = {"kinds": other, "layers": np.ones(2, int), "indices": np.full(2, -1)}
    joined = {name: np.concatenate([getattr(result, name), new]) for name, new in more.items()}
    added = np.array([3.0, 4.0])[:, None, None] * np.ones((1, *result.logits.shape))
    values = np.concatenate([result.values, added])
    twice = dataclasses.replace(result, values=values, **joined)
    np.testing.assert_array_equal(twice.part("other 1"), np.full(result.logits.shape, 7.0))


def test_tables_that_do_not_fit_are_refused(result):
    import dataclasses

    for change in (
        {"logits": result.logits[:1]},
        {"kinds": result.kinds + 99},
        {"kinds": result.kinds.astype(float)},
        {"layers": result.layers + 1},
        {"targets": (("a",), ("b", "c"))},
        {"positions": (2, 60)},
    ):
        with pytest.raises(InputError, match="must"):
            dataclasses.replace(result, **change)


def test_kinds_are_written_once_each():
    assert len(set(KINDS.values())) == len(NAMES)


# --- Pictures -------------------------------------------------------------------------------------


def bars_of(ax):
    return [patch for patch in ax.patches if patch.get_width() or patch.get_height()]


def test_bars_show_the_largest_parts_and_the_rest(result):
    figure = result.plot(k=4, position=2)
    ax = figure.axes[0]
    widths = [patch.get_width() for patch in bars_of(ax)]
    values = result.values[:, 0, 0]
    order = np.argsort(-np.abs(values))
    np.testing.assert_allclose(widths[:4], values[order[:4]])
    assert widths[4] == pytest.approx(values[order[4:]].sum())
    labels = [text.get_text() for text in ax.get_yticklabels()]
    assert labels[-1] == f"{len(values) - 4} others together"
    assert len(labels) == 5
    assert f"{result.logits[0, 0]:.2f}" in ax.get_title()


def test_a_waterfall_ends_at_the_logit(result):
    ax = result.plot("waterfall").axes[0]
    bars = bars_of(ax)
    ends = [bar.get_x() + bar.get_width() for bar in bars]
    starts = [bar.get_x() for bar in bars]
    np.testing.assert_allclose(starts[1:-1], ends[:-2], atol=1e-9)
    assert ends[-1] == pytest.approx(result.total[1, 0])
    assert ends[-2] == pytest.approx(ends[-1])
    labels = [text.get_text() for text in ax.get_yticklabels()]
    assert labels[:3] == ["embed", "position", "attn 0"]
    assert labels[-1] == "difference"


def test_a_heat_map_of_heads(result):
    figure = result.plot("heatmap", position=6)
    ax = figure.axes[0]
    table = ax.images[0].get_array()
    assert table.shape == (3, 6)
    assert table[1, 3] == pytest.approx(result.part("1.3")[1, 0])
    mlp = result.part("mlp 2") + result.part("mlp bias 2")
    assert table[2, 5] == pytest.approx(mlp[1, 0])
    low, high = ax.images[0].get_clim()
    assert low == -high


@pytest.mark.parametrize("cumulative", [False, True])
def test_a_heat_map_of_positions(result, cumulative):
    ax = result.plot("heatmap", cumulative=cumulative, target=1).axes[0]
    table = np.asarray(ax.images[0].get_array())
    expected = result.cumulative() if cumulative else result.by_layer()
    np.testing.assert_allclose(table, expected[..., 1])
    labels = [text.get_text() for text in ax.get_yticklabels()]
    assert labels == ["embed", "0", "1", "2"] + ["end"] * (not cumulative)


def test_a_model_with_many_blocks_has_one_step_per_block(result):
    import dataclasses

    repeat = 40
    layers = np.tile(result.layers, repeat) + np.repeat(np.arange(repeat) * 3, len(result.layers))
    layers[np.tile(result.layers, repeat) < 0] = -1
    many = dataclasses.replace(
        result,
        values=np.tile(result.values, (repeat, 1, 1)) / repeat,
        kinds=np.tile(result.kinds, repeat),
        indices=np.tile(result.indices, repeat),
        layers=layers,
        n_layers=3 * repeat,
    )
    ax = many.plot("waterfall").axes[0]
    bars = bars_of(ax)
    assert len(bars) == 2 + 3 * repeat + 1 + 1
    assert bars[-1].get_width() == pytest.approx(many.total[1, 0])


def test_pictures_leave_nothing_behind(result, tmp_path):
    from matplotlib import pyplot

    for kind in ("bar", "waterfall", "heatmap"):
        path = tmp_path / f"{kind}.png"
        result.plot(kind, save_path=path)
        assert path.stat().st_size > 5000
    assert not pyplot.get_fignums()
    with pytest.raises(ValueError, match="kind is bar, waterfall, heatmap; came 'pie'"):
        result.plot("pie")


def test_tokens_of_any_script_are_drawn(result):
    import dataclasses

    odd = dataclasses.replace(
        result,
        tokens=("\n", " ", "中文字", "$x^2$", "🙂" * 30, "", "a"),
        targets=(("中", "\t"), ("$", "  ")),
    )
    for kind in ("bar", "waterfall", "heatmap"):
        odd.plot(kind).canvas.draw()


# --- On the bundled model -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def analyzer():
    return ModelAnalyzer(device="cpu")


def test_the_facade_and_what_moves_the_name(analyzer):
    """Taking a head's written vector away, the norm's scale held, takes away its part."""
    prompt = "When Mary and John went to the store, John gave a drink to"
    result = analyzer.logit_attribution(prompt, " Mary", " John")
    assert result.error < 1e-4
    assert result.logits[0, 0] > 5
    assert result.targets == ((" Mary",),)
    assert result.against == ((" John",),)
    arch = analyzer.architecture
    ids = torch.tensor([analyzer.tokenizer(prompt)["input_ids"]])
    sites = [Site("head_out", 4), Site("resid_post", arch.n_layers - 1)]
    kept = record(arch, {"input_ids": ids}, sites)
    mary, john = (analyzer.tokenizer(t)["input_ids"][0] for t in (" Mary", " John"))
    point = kept[sites[1]][0, -1]
    with torch.no_grad():
        for head in range(arch.heads(4)[0]):
            vector = arch.project_head(kept[sites[0]], 4, head)[0, -1]
            through = frozen(analyzer.model.transformer.ln_f, point, vector[None])
            row = analyzer.model.lm_head.weight[mary] - analyzer.model.lm_head.weight[john]
            found = result.part(f"4.{head}")[0, 0]
            assert found == pytest.approx(float(through[0] @ row), abs=1e-4)
    heads = result.top(5)
    assert {part.partition(".")[0] for part in heads["part"]} == {"4"}


def test_a_stand_in_is_no_model():
    with pytest.raises(Exception, match="SimpleNamespace"):
        logit_attribution(Architecture(types.SimpleNamespace()), None, IDS)
