"""Layers in any spelling, and what is found in each family.

Also families that nobody has heard of, and what is refused.
"""

import gc
import weakref

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from transformers import (
    AutoModel,
    PretrainedConfig,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
)
from transformers.modeling_outputs import CausalLMOutput

import families
import model_architecture
from expert_routing import ROUTING
from forward_pass import SITES, ArchitectureError, LayerError, Site, SiteError, record
from model_architecture import Architecture, resolve_layer

NAMES = [f"transformer.h.{i}" for i in range(12)]
IDS = torch.tensor([[7, 11, 15, 6, 49]])


# --- Spellings ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "layer", [5, "5", "h.5", "transformer.h.5", -7, "-7", " 5 ", "+5", np.int64(5), torch.tensor(5)]
)
def test_every_spelling_finds_block_five(layer):
    assert resolve_layer(layer, NAMES) == 5


@given(st.integers(-12, 11))
def test_indices_count_like_a_lists(index):
    assert NAMES[resolve_layer(index, NAMES)] == NAMES[index]
    assert resolve_layer(str(index), NAMES) == resolve_layer(index, NAMES)


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (12, r"layer 12 is out of range.*12 blocks.*0\.\.11 or -12\.\.-1"),
        (-13, r"layer -13 is out of range"),
        ("99", "out of range"),
        ("model.layers.5", "nearest is 'transformer.h.5'"),
        ("h5", "nearest is 'transformer.h.5'"),
        ("transformer.g.3", "nearest is 'transformer.h.3'"),
        ("", "no layer ''"),
        ("h", "no layer 'h'"),
        (".5", "no layer"),
        (1.0, "not float"),
        (True, "not bool"),
        (None, "not NoneType"),
        ([1], "not list"),
    ],
)
def test_a_layer_that_is_not_there_is_named_with_the_nearest(layer, message):
    with pytest.raises(LayerError, match=message):
        resolve_layer(layer, NAMES)
    for kind in (KeyError, ValueError):
        with pytest.raises(kind):
            resolve_layer(layer, NAMES)


@given(st.text(max_size=12))
def test_no_text_gives_another_error(text):
    try:
        assert 0 <= resolve_layer(text, NAMES) < 12
    except LayerError as error:
        assert "valid are" in str(error)


def test_a_base_model_has_the_names_of_the_model_with_a_head():
    for name in ("gpt2", "llama", "opt", "gpt_neox"):
        model = families.build(name)
        base = AutoModel.from_config(model.config)
        assert Architecture(base).layer_names == Architecture(model).layer_names
        assert Architecture(model).has_head
        assert not Architecture(base).has_head
        with pytest.raises(ArchitectureError, match="load_for_generation=True"):
            Architecture(base).require_head("the lens")


# --- What is found --------------------------------------------------------------------------------

EXPECTED = {
    # family: (attention adds, the MLP adds, output projection, down projection, parallel)
    "gpt2": ("attn", "mlp", "attn.c_proj", "mlp.c_proj", False),
    "llama": ("self_attn", "mlp", "self_attn.o_proj", "mlp.down_proj", False),
    "gptj": ("attn", "mlp", "attn.out_proj", "mlp.fc_out", True),
    "bloom": (
        "self_attention.dense",
        "mlp.dense_4h_to_h",
        "self_attention.dense",
        "mlp.dense_4h_to_h",
        False,
    ),
    "opt": ("self_attn", "fc2", "self_attn.out_proj", "fc2", False),
    "gemma2": (
        "post_attention_layernorm",
        "post_feedforward_layernorm",
        "self_attn.o_proj",
        "mlp.down_proj",
        False,
    ),
    "olmo2": (
        "post_attention_layernorm",
        "post_feedforward_layernorm",
        "self_attn.o_proj",
        "mlp.down_proj",
        False,
    ),
    "phi": ("self_attn", "mlp", "self_attn.dense", "mlp.fc2", True),
    "mixtral": ("self_attn", "mlp", "self_attn.o_proj", None, False),
    "gpt_oss": ("self_attn", "mlp", "self_attn.o_proj", None, False),
    "cohere": ("self_attn", "mlp", "self_attn.o_proj", "mlp.down_proj", True),
    "mamba": ("mixer", None, None, None, True),
}


@pytest.mark.parametrize("name", EXPECTED)
def test_writers_and_matrices_of_known_families(name):
    architecture = Architecture(families.build(name))
    for found in architecture.structure:
        parts = (
            found.attn_writer,
            found.mlp_writer,
            found.out_proj,
            found.down_proj,
            not found.has_resid_mid,
        )
        assert parts == EXPECTED[name]


def test_heads_are_counted_as_the_config_says(family):
    name, model = family
    config, architecture = model.config, Architecture(model)
    if name == "mamba":
        assert architecture.heads(0) == (0, 0)
        return
    kv_heads = {"falcon": 1}.get(
        name,
        getattr(config, "num_key_value_heads", None)
        or getattr(config, "num_kv_heads", families.HEADS),
    )
    for layer in range(architecture.n_layers):
        assert architecture.heads(layer) == (families.HEADS, kv_heads)


def test_every_available_site_can_be_recorded_and_no_other(family):
    _, model = family
    architecture = Architecture(model)
    batch, length, d_model = 2, IDS.shape[1], architecture.d_model
    for layer in range(architecture.n_layers):
        available = architecture.available_sites(layer)
        kept = record(
            architecture, {"input_ids": IDS.expand(batch, -1)}, [Site(n, layer) for n in available]
        )
        heads, kv_heads = architecture.heads(layer)
        for name in available:
            shape = tuple(kept[Site(name, layer)].shape)
            if name == "attn_pattern":
                assert shape == (batch, heads, length, length)
            elif name in ("head_out", "query", "key", "value"):
                assert shape[:3] == (batch, length, kv_heads if name in ("key", "value") else heads)
            elif name == "mlp_neurons":
                assert shape[:2] == (batch, length)
                assert shape[2] not in (1, d_model)
            elif name in ROUTING:
                assert shape == (batch, length, 4), name
            else:
                assert shape == (batch, length, d_model), name
        for name in set(SITES) - set(available) - {"embed"}:
            with pytest.raises(SiteError, match=f"no site '{name}' in layer {layer}: .{{20}}"):
                architecture.tap(Site(name, layer))


def test_attention_and_mlp_names_are_modules_of_the_model(family):
    _, model = family
    architecture = Architecture(model)
    modules = dict(model.named_modules())
    for part in ("attention", "mlp", "out_proj", "down_proj"):
        for layer in range(architecture.n_layers):
            name = architecture.part_name(layer, part)
            assert name is None or (
                name in modules and name.startswith(architecture.layer_names[layer])
            )


def test_the_probe_runs_once_and_is_forgotten_with_the_model(monkeypatch):
    model = families.build("llama")
    runs = []
    probe = model_architecture.probe_structure
    monkeypatch.setattr(
        model_architecture, "probe_structure", lambda *a: runs.append(1) or probe(*a)
    )
    structure = Architecture(model).structure
    assert Architecture(model).structure is structure
    assert runs == [1]
    model.model.layers[0].mlp.down_proj = nn.Linear(families.INTERMEDIATE, families.HIDDEN)
    assert Architecture(model).structure == structure
    assert runs == [1, 1]  # another module is in the model now: looked at again
    reference = weakref.ref(model)
    del model
    gc.collect()
    assert reference() is None


def test_the_probe_leaves_a_model_in_training_mode_as_it_was():
    model = families.build("gpt2", resid_pdrop=0.5, attn_pdrop=0.5).train()
    model.transformer.h[1].eval()
    before = [module.training for module in model.modules()]
    assert Architecture(model).structure[0].attn_writer == "attn"
    assert [module.training for module in model.modules()] == before


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_the_structure_is_the_same_in_every_dtype(family, dtype):
    name, model = family
    expected = Architecture(model).structure
    other = families.build(name).to(dtype)
    try:
        other(IDS)
    except RuntimeError:
        pytest.skip("the model itself does not run in this dtype")
    assert Architecture(other).structure == expected


# --- Families that nobody has heard of ------------------------------------------------------------


class OddConfig(PretrainedConfig):
    model_type = "odd"

    def __init__(
        self, vocab_size=50, hidden_size=16, num_hidden_layers=3, flavour="plain", **kwargs
    ):
        super().__init__(**kwargs)
        self.vocab_size, self.hidden_size, self.num_hidden_layers = (
            vocab_size,
            hidden_size,
            num_hidden_layers,
        )
        self.flavour = flavour


class Wobble(nn.Module):
    """A causal convolution over the tokens."""

    def __init__(self, width):
        super().__init__()
        self.taps = nn.Conv1d(width, width, 2, padding=1)

    def forward(self, stream):
        return self.taps(stream.transpose(1, 2))[..., :-1].transpose(1, 2)


class OddBlock(nn.Module):
    """Names that are in no list, a convolution for a mixer; optionally a block that is no sum."""

    def __init__(self, config):
        super().__init__()
        self.flavour = config.flavour
        self.wobble = Wobble(config.hidden_size)
        self.quench = nn.Linear(config.hidden_size, 40)
        self.temper = nn.Linear(40, config.hidden_size)

    def forward(self, stream, **_kwargs):
        stream = stream + self.wobble(stream)
        out = stream + self.temper(torch.tanh(self.quench(stream)))
        return torch.tanh(out) if self.flavour == "squashed" else out


class OddModel(PreTrainedModel):
    config_class = OddConfig
    base_model_prefix = "kernel"

    def __init__(self, config):
        super().__init__(config)
        self.words = nn.Embedding(config.vocab_size, config.hidden_size)
        count = config.num_hidden_layers + (config.flavour == "miscounted")
        self.stages = nn.ModuleList(OddBlock(config) for _ in range(count))
        self.readout = nn.Linear(config.hidden_size, config.vocab_size)
        self.post_init()

    def get_input_embeddings(self):
        return self.words

    def get_output_embeddings(self):
        return self.readout

    def forward(self, input_ids=None, use_cache=None, **_kwargs):
        stream = self.words(input_ids)
        for stage in self.stages:
            stream = stage(stream)
        return CausalLMOutput(logits=self.readout(stream))


def test_a_family_in_no_list_works_if_its_structure_allows():
    architecture = Architecture(OddModel(OddConfig()).eval())
    (found, *_) = architecture.structure
    assert (found.attn_writer, found.mlp_writer) == ("wobble", "temper")
    assert found.down_proj == "temper"
    assert found.attention is None
    kept = record(architecture, {"input_ids": IDS}, [Site("resid_post", 1), Site("mlp_neurons", 1)])
    assert kept[Site("mlp_neurons", 1)].shape == (1, 5, 40)
    with pytest.raises(
        SiteError, match=r"OddModel has no site 'attn_pattern'.*computes no attention"
    ):
        architecture.tap(Site("attn_pattern", 0))


def test_a_block_that_is_not_a_sum_says_so():
    architecture = Architecture(OddModel(OddConfig(flavour="squashed")).eval())
    assert architecture.available_sites(1) == ["resid_pre", "resid_post"]
    with pytest.raises(SiteError, match="no two modules were found whose outputs are all"):
        architecture.tap(Site("mlp_out", 0))
    model = OddModel(OddConfig(flavour="squashed")).bfloat16().eval()
    with torch.no_grad():
        model.words.weight *= 50  # else tanh is the identity within bfloat16's rounding
    assert Architecture(model).available_sites(1) == ["resid_pre", "resid_post"]


def test_a_model_without_a_list_of_blocks_says_what_it_has():
    with pytest.raises(ArchitectureError, match=r"no ModuleList of 3 blocks.*it has stages \(4\)"):
        Architecture(OddModel(OddConfig(flavour="miscounted")))


def test_an_encoder_decoder_is_refused():
    config = T5Config(vocab_size=50, d_model=16, d_kv=8, d_ff=16, num_layers=2, num_heads=2)
    with pytest.raises(ArchitectureError, match="encoder-decoder"):
        Architecture(T5ForConditionalGeneration(config))


def test_unknown_sites_and_unresolved_layers():
    architecture = Architecture(families.build("gpt2"))
    with pytest.raises(SiteError, match="no site 'residual'; sites are embed, resid_pre"):
        architecture.tap(Site("residual", 0))
    with pytest.raises(SiteError, match="input of block 0"):
        architecture.tap(Site("embed", 1))
    for layer in (-1, 3):
        with pytest.raises(LayerError):
            architecture.tap(Site("resid_post", layer))


# --- Inputs ---------------------------------------------------------------------------------------


def test_padded_batches_count_positions_from_the_first_real_token():
    architecture = Architecture(families.build("gpt2"))
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    inputs = architecture.inputs(IDS.expand(2, -1), mask)
    assert inputs["position_ids"].tolist() == [[0, 0, 0, 1, 2], [0, 1, 2, 3, 4]]
    assert architecture.inputs(IDS, torch.ones_like(IDS)).keys() == {"input_ids"}
    assert "position_ids" not in Architecture(families.build("bloom")).inputs(
        IDS.expand(2, -1), mask
    )
