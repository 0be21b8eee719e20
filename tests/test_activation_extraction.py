"""Extraction: against hooks by hand, Hugging Face's own outputs, and one prompt at a time."""

import copy
import gc
import io
import sys

import numpy as np
import pytest
import torch

import activation_extraction
import families
from activation_extraction import (
    ActivationExtractor,
    extract_batch,
    make_request,
)
from expert_routing import ROUTING
from forward_pass import SITES, ArchitectureError, InputError, LayerError, SiteError, read_hidden
from model_architecture import Architecture

IDS = families.token_ids(1, 8)[0].tolist()
ROWS = [families.token_ids(1, length, seed=length)[0].tolist() for length in (5, 8, 1, 8, 3)]
TEXTS = ["a cat sat on the mat", "the cat", "on and on it is", "cat"]
SEQUENTIAL = ["gpt2", "llama", "gptj", "bloom", "falcon", "mpt", "gemma2", "gpt_oss"]


@pytest.fixture(scope="module")
def gpt2():
    return families.build("gpt2")


@pytest.fixture
def extractor(gpt2):
    return ActivationExtractor(gpt2, families.tiny_tokenizer())


@pytest.fixture
def forwards(gpt2):
    """The lengths of the texts that went through the model."""
    seen = []
    handle = gpt2.transformer.register_forward_pre_hook(
        lambda _module, _args, kwargs: seen.append(kwargs["input_ids"].shape), with_kwargs=True
    )
    yield seen
    handle.remove()


def sites_of(model):
    """Names of all sites that any of the model's layers has."""
    architecture = Architecture(model)
    names = [architecture.available_sites(layer) for layer in range(architecture.n_layers)]
    return [site for site in SITES if any(site in of_layer for of_layer in names)]


def hooks_of(model):
    tables = [(m._forward_hooks, m._forward_pre_hooks) for m in model.modules()]
    return [list(table.values()) for pair in tables for table in pair]


def relative(a, b):
    return float((a - b).abs().max() / b.abs().max())


def assert_equal_records(mine, expected, tolerance=1e-5):
    assert (mine.prompt, mine.tokens) == (expected.prompt, expected.tokens)
    assert (mine.token_ids, mine.positions) == (expected.token_ids, expected.positions)
    ours, theirs = list(mine.tensors()), list(expected.tensors())
    assert [entry[:2] for entry in ours] == [entry[:2] for entry in theirs]
    for (name, key, a), (_, _, b) in zip(ours, theirs, strict=True):
        assert a.shape == b.shape, (name, key)
        assert relative(a, b) <= tolerance, (name, key)


# --- Right numbers --------------------------------------------------------------------------------


def test_layer_activations_are_what_the_modules_of_that_name_return(family):
    _, model = family
    record = ActivationExtractor(model).extract_activations(IDS)
    seen = {}
    handles = [
        model.get_submodule(name).register_forward_hook(
            lambda _m, _a, out, name=name: seen.update({name: read_hidden(out)})
        )
        for name in record.layer_activations
    ]
    with torch.no_grad():
        model(torch.tensor([IDS]))
    for handle in handles:
        handle.remove()
    assert len(seen) == Architecture(model).n_layers
    assert all(torch.equal(record.layer_activations[name], seen[name]) for name in seen)
    assert record.positions == list(range(8))


@pytest.mark.parametrize("name", ["gpt2", "llama", "gemma2", "gpt_neox", "gpt_oss", "mixtral"])
def test_layer_i_is_hidden_state_i_plus_1(name):
    model = families.build(name)
    record = ActivationExtractor(model).extract_activations(IDS, sites=("embed", "resid_post"))
    with torch.no_grad():
        states = model(torch.tensor([IDS]), output_hidden_states=True).hidden_states
    assert torch.equal(record.at("embed"), states[0])
    for layer in range(len(states) - 2):  # the last one is after the final norm
        assert torch.equal(record.layer_activations[layer], states[layer + 1])


@pytest.mark.parametrize("name", SEQUENTIAL)
def test_attention_weights_are_those_of_an_eager_model(name):
    model = families.build(name)
    implementation = model.config._attn_implementation
    eager = families.build(name, attn_implementation="eager")
    record = ActivationExtractor(model).extract_activations(IDS, include_attention=True)
    with torch.no_grad():
        expected = eager(torch.tensor([IDS]), output_attentions=True).attentions
    assert record.attention_weights.layers == list(range(len(expected)))
    for layer, weights in enumerate(expected):
        assert weights.shape == (1, families.HEADS, 8, 8)
        assert relative(record.attention_weights[layer], weights) < 1e-6
        assert float(weights.diagonal(dim1=-2, dim2=-1).abs().max()) > 0.1
    assert model.config._attn_implementation == implementation


def test_attention_is_found_by_its_modules_name_and_by_layer(gpt2, extractor):
    record = extractor.extract_activations("the cat", include_attention=True)
    assert list(record.attention_weights) == [f"transformer.h.{i}.attn" for i in range(3)]
    assert record.attention_weights["h.1"] is record.attention_weights["transformer.h.1.attn"]
    assert extractor.extract_activations("the cat").attention_weights is None


@pytest.mark.parametrize("positions", [None, "last", [3, 1]])
def test_logits_are_the_models_own(family, positions):
    _, model = family
    record = ActivationExtractor(model).extract_activations(
        IDS, return_logits=True, positions=positions
    )
    with torch.no_grad():
        expected = model(torch.tensor([IDS])).logits[:, record.positions]
    assert record.logits.shape == expected.shape
    assert relative(record.logits, expected) <= 1e-6
    if positions is None:
        assert torch.equal(record.logits, expected)


def test_logits_alone_can_be_had(extractor):
    record = extractor.extract_activations(IDS, sites=(), return_logits=True, positions="last")
    assert record.logits.shape == (1, 1, families.VOCAB)
    assert len(record.layer_activations) == 0


def test_every_site_of_every_layer_has_its_axes(family):
    """Lengths that no two axes share, so that a transposed one is seen."""
    name, model = family
    sites = sites_of(model)
    record = ActivationExtractor(model).extract_activations(IDS[:7], sites=sites)
    heads, head_size = families.HEADS, 16 if "head_dim" in families.FAMILIES[name].kwargs else 8
    kv_heads = next((s[1] for s in [Architecture(model).heads(0)]), 0)
    shapes = {
        "head_out": (1, 7, heads, head_size),
        "query": (1, 7, heads, head_size),
        "key": (1, 7, kv_heads, head_size),
        "value": (1, 7, kv_heads, head_size),
        "attn_pattern": (1, heads, 7, 7),
        **dict.fromkeys(ROUTING, (1, 7, 4)),
    }
    for site in sites:
        for value in record.at_site(site).values():
            if site == "mlp_neurons":
                assert value.shape[:2] == (1, 7)
                assert value.shape[2] != families.HIDDEN
            else:
                assert value.shape == shapes.get(site, (1, 7, families.HIDDEN))


def test_a_model_in_training_mode_is_run_without_dropout_and_stays_so(gpt2):
    model = copy.deepcopy(gpt2).train()
    model.transformer.h[1].eval()
    modes = [module.training for module in model.modules()]
    extractor = ActivationExtractor(model)
    expected = ActivationExtractor(gpt2).extract_activations(IDS, return_logits=True)
    assert_equal_records(extractor.extract_activations(IDS, return_logits=True), expected, 0)
    assert [module.training for module in model.modules()] == modes


def test_bfloat16(gpt2):
    model = copy.deepcopy(gpt2).to(torch.bfloat16)
    sites = [site for site in sites_of(model) if site != "attn_pattern"]  # that runs eager
    record = ActivationExtractor(model).extract_activations(IDS, sites=sites, return_logits=True)
    with torch.no_grad():
        states = model(torch.tensor([IDS]), output_hidden_states=True).hidden_states
    assert torch.equal(record.layer_activations[1], states[2])
    assert {tensor.dtype for _, _, tensor in record.tensors()} == {torch.bfloat16}
    assert record.metadata["dtype"] == "bfloat16"


def test_a_model_without_a_head_gives_the_same_record(family):
    _, model = family
    whole, headless = ActivationExtractor(model), ActivationExtractor(model.base_model)
    sites = sites_of(model)
    record = headless.extract_activations(IDS, sites=sites)
    assert_equal_records(record, whole.extract_activations(IDS, sites=sites), 0)
    with pytest.raises(ArchitectureError, match="load_for_generation=True"):
        headless.extract_activations(IDS, return_logits=True)


# --- What was asked for, and nothing else ---------------------------------------------------------


@pytest.mark.parametrize(
    "layer", [1, "1", -2, "h.1", "transformer.h.1", np.int64(1), torch.tensor(1)]
)
def test_a_layer_in_every_spelling(extractor, layer):
    expected = extractor.extract_activations(IDS).layer_activations["transformer.h.1"]
    for asked in ({"layer_names": [layer]}, {"layer_indices": [layer]}, {"layer_indices": layer}):
        found = extractor.extract_activations(IDS, **asked).layer_activations
        assert list(found) == ["transformer.h.1"]
        assert torch.equal(found[layer], expected)


def test_names_and_indices_are_both_taken_in_layer_order(extractor):
    record = extractor.extract_activations(IDS, layer_names=["h.2"], layer_indices=[0, -1])
    assert list(record.layer_activations) == ["transformer.h.0", "transformer.h.2"]


def test_sites_come_in_the_order_asked_for(extractor):
    record = extractor.extract_activations(IDS, sites=("mlp_out", "resid_pre", "attn_out"))
    assert list(record.site_activations) == ["mlp_out", "resid_pre", "attn_out"]
    assert len(record.layer_activations) == 0
    assert extractor.extract_activations(IDS, sites="mlp_out").sites == ["mlp_out"]


@pytest.mark.parametrize(
    ("positions", "wanted"),
    [
        ("last", [7]),
        (3, [3]),
        ([5, 0, 2], [5, 0, 2]),
        (slice(None, None, -1), [7, 6, 5, 4, 3, 2, 1, 0]),
    ],
)
def test_positions_are_those_asked_for_in_that_order(family, positions, wanted):
    _, model = family
    extractor, sites = ActivationExtractor(model), sites_of(model)
    whole = extractor.extract_activations(IDS, sites=sites)
    part = extractor.extract_activations(IDS, sites=sites, positions=positions)
    assert part.positions == wanted
    for site in sites:
        for key, value in whole.at_site(site).items():
            expected = value[:, :, wanted] if site == "attn_pattern" else value[:, wanted]
            assert torch.equal(part.at_site(site)[key], expected), (site, key)


@pytest.mark.parametrize("positions", [None, "last", 0, [0, -1], slice(0, 1), slice(-3, None)])
@pytest.mark.parametrize("rows", [ROWS[:1], ROWS[:2], ROWS])
def test_tensors_own_exactly_their_bytes(extractor, gpt2, positions, rows):
    rows = [row for row in rows if len(row) > 1]
    records = extractor.extract_batch_activations(
        rows, sites=sites_of(gpt2), return_logits=True, positions=positions, show_progress=False
    )
    tensors = [tensor for record in records for _, _, tensor in record.tensors()]
    assert len({t.untyped_storage().data_ptr() for t in tensors}) == len(tensors)
    for tensor in tensors:
        assert tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()
        assert not tensor.requires_grad


def test_later_blocks_and_the_head_are_not_run(gpt2, extractor):
    extractor.extract_activations(IDS)  # the first one looks at the whole model
    ran, handles = [], []
    for path, module in gpt2.named_modules():
        handles.append(module.register_forward_hook(lambda *_, path=path: ran.append(path)))
    try:
        extractor.extract_activations(IDS, layer_indices=[1])
        assert "transformer.h.1.mlp.c_proj" in ran
        assert not [path for path in ran if path.startswith(("transformer.h.2.", "lm_head"))]
        ran.clear()
        extractor.extract_activations(IDS, layer_indices=[1], return_logits=True)
        assert {"transformer.h.2.mlp.c_proj", "lm_head"} <= set(ran)
    finally:
        for handle in handles:
            handle.remove()


# --- Batches --------------------------------------------------------------------------------------


@pytest.mark.parametrize("positions", [None, "last", [0, -1]])
def test_a_batch_equals_one_by_one(family, positions):
    """Mixed lengths in batches of four: padding, order, every site, patterns and logits."""
    _, model = family
    extractor, sites = ActivationExtractor(model), sites_of(model)
    rows = ROWS if positions != [0, -1] else [row for row in ROWS if len(row) > 1]
    keep = {"sites": sites, "return_logits": True, "positions": positions}
    records = extractor.extract_batch_activations(rows, batch_size=4, show_progress=False, **keep)
    assert [record.token_ids for record in records] == rows
    for row, record in zip(rows, records, strict=True):
        assert_equal_records(record, extractor.extract_activations(row, **keep))


def test_a_batch_of_texts_equals_one_by_one(extractor):
    records = extractor.extract_batch_activations(TEXTS, batch_size=3, include_attention=True)
    assert [record.prompt for record in records] == TEXTS
    for text, record in zip(TEXTS, records, strict=True):
        single = extractor.extract_activations(text, include_attention=True)
        assert_equal_records(record, single)
        assert "".join(record.tokens) == text


def test_a_tokenizer_padded_elsewhere_or_not_at_all_makes_no_difference(gpt2):
    plain = ActivationExtractor(gpt2, families.tiny_tokenizer())
    padding = families.tiny_tokenizer(pad=True)
    padding.padding_side = "right"
    padded = ActivationExtractor(gpt2, padding)
    for a, b in zip(
        plain.extract_batch_activations(TEXTS), padded.extract_batch_activations(TEXTS), strict=True
    ):
        assert_equal_records(a, b, 0)
    assert padding.padding_side == "right"


def test_the_number_of_passes_is_the_number_of_batches(extractor, forwards):
    extractor.extract_activations(IDS)
    forwards.clear()
    extractor.extract_batch_activations(ROWS, batch_size=2)
    assert forwards == [(2, 8), (2, 5), (1, 1)]


def test_prompts_may_come_from_anywhere(extractor):
    expected = extractor.extract_batch_activations(ROWS[:2])
    for prompts in (iter(ROWS[:2]), (np.array(row) for row in ROWS[:2])):
        for a, b in zip(extractor.extract_batch_activations(prompts), expected, strict=True):
            assert_equal_records(a, b, 0)
    assert extractor.extract_batch_activations([]) == []


def test_the_progress_bar_is_silent_where_there_is_no_terminal(extractor, monkeypatch, capsys):
    extractor.extract_batch_activations(ROWS)
    assert capsys.readouterr() == ("", "")

    class Terminal(io.StringIO):
        def isatty(self):
            return True

    monkeypatch.setattr(sys, "stderr", Terminal())
    extractor.extract_batch_activations(ROWS)
    assert "5/5" in sys.stderr.getvalue()
    monkeypatch.setattr(sys, "stderr", Terminal())
    extractor.extract_batch_activations(ROWS, show_progress=False)
    assert sys.stderr.getvalue() == ""


# --- Errors ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("asked", "error", "message"),
    [
        ({"layer_indices": [3]}, LayerError, r"layer 3 is out of range.*0\.\.2 or -3\.\.-1"),
        ({"layer_names": ["layers.1"]}, LayerError, r"no layer 'layers.1'.*'transformer\.h\.1'"),
        ({"layer_indices": [True]}, LayerError, "not bool"),
        ({"layer_indices": [1.0]}, LayerError, "not float"),
        ({"sites": ("residual",)}, SiteError, "no site 'residual'; sites are embed, resid_pre"),
        ({"sites": ()}, SiteError, "nothing to extract"),
        ({"layer_indices": []}, SiteError, "nothing to extract"),
        ({"positions": 2}, InputError, r"position 2 is out of range: the prompt has 2 tokens"),
        ({"positions": [True, False]}, InputError, "positions is 'last'"),
        ({"prompt": ""}, InputError, "gives no token"),
        ({"prompt": [0, 99]}, InputError, r"token id 99 is outside .* 99 \(0\.\.98\)"),
        ({"prompt": [5] * 129}, InputError, "129 tokens; the model's context holds 128"),
    ],
)
def test_what_cannot_be_extracted_is_refused_before_anything_runs(
    extractor, forwards, asked, error, message
):
    with pytest.raises(error, match=message):
        extractor.extract_activations(**{"prompt": [5, 6], **asked})
    assert forwards == []


def test_a_site_that_a_layer_does_not_have_says_why():
    extractor = ActivationExtractor(families.build("mamba"))
    with pytest.raises(SiteError, match="no site 'attn_pattern' in layer 0: it computes no attent"):
        extractor.extract_activations(IDS, include_attention=True)
    with pytest.raises(SiteError, match="no site 'mlp_out' in layer 1"):
        extractor.extract_activations(IDS, layer_indices=[1], sites=("mlp_out",))


def test_a_bad_prompt_of_a_batch_is_named_before_anything_runs(extractor, forwards):
    with pytest.raises(InputError, match=r"prompt 2 of 3: token id 99 is outside"):
        extractor.extract_batch_activations([[5], [6], [99]])
    with pytest.raises(InputError, match=r"prompt 1 of 2: position 3 is out of range"):
        extractor.extract_batch_activations([[5] * 4, [6]], positions=3)
    with pytest.raises(InputError, match="prompts is a list of prompts"):
        extractor.extract_batch_activations("the cat")
    with pytest.raises(InputError, match="batch_size must be at least 1; came 0"):
        extractor.extract_batch_activations([[5]], batch_size=0)
    assert forwards == []


class Stop(Exception):
    pass


@pytest.mark.parametrize("error", [Stop, KeyboardInterrupt])
def test_an_exception_in_the_middle_leaves_no_hook(family, error):
    _, model = family
    architecture = Architecture(model)
    request = make_request(architecture, sites=sites_of(model))

    def stop(*_):
        raise error

    before, implementation = hooks_of(model), model.config._attn_implementation
    handle = architecture.blocks[1].register_forward_hook(stop)
    try:
        with pytest.raises(error):
            extract_batch(architecture, None, ROWS, request, show_progress=False)
    finally:
        handle.remove()
    assert hooks_of(model) == before
    assert model.config._attn_implementation == implementation
    assert not [block for block in architecture.blocks if "forward" in vars(block)]


# --- The record's own account ---------------------------------------------------------------------


def test_prompts_of_every_kind_and_their_text(gpt2, extractor):
    ids = extractor.tokenizer("the cat")["input_ids"]
    for prompt in (ids, torch.tensor(ids), torch.tensor([ids]), np.array(ids), "the cat"):
        record = extractor.extract_activations(prompt)
        assert (record.prompt, record.token_ids) == ("the cat", ids)
        assert record.tokens == ["t", "he", " cat"]
    assert ActivationExtractor(gpt2).extract_activations([7, 9]).prompt == "7 9"


def test_metadata_says_where_a_record_comes_from_and_keeps_the_users(extractor):
    mine = {"label": [1], "model": "mine"}
    record = extractor.extract_activations(IDS, metadata=mine)
    assert record.metadata["label"] == [1]
    assert record.metadata["model"] == "mine"
    assert record.metadata["model_class"] == "GPT2LMHeadModel"
    assert record.metadata["dtype"] == "float32"
    assert record.metadata["n_layers"] == 3
    assert record.metadata["attn_implementation"] == "sdpa"
    eager = extractor.extract_activations(IDS, include_attention=True)
    assert eager.metadata["attn_implementation"] == "eager"
    assert record.metadata["versions"]["torch"] == torch.__version__
    assert mine == {"label": [1], "model": "mine"}
    assert "label" not in extractor.extract_activations(IDS).metadata


def test_records_of_a_batch_share_no_metadata(extractor):
    first, second = extractor.extract_batch_activations(ROWS[:2])
    first.metadata["versions"]["torch"] = "changed"
    assert second.metadata["versions"]["torch"] == torch.__version__


def test_records_are_saved_and_loaded(extractor, tmp_path):
    records = extractor.extract_batch_activations(TEXTS, include_attention=True)
    extractor.save_activations(records, tmp_path / "records.safetensors", format="safetensors")
    for loaded in (
        ActivationExtractor.load_activations(tmp_path / "records.safetensors"),
        activation_extraction.load_activations(tmp_path / "records.safetensors"),
    ):
        for a, b in zip(loaded, records, strict=True):
            assert_equal_records(a, b, 0)


def test_a_loaded_record_is_pickled_by_default(extractor, tmp_path):
    record = extractor.extract_activations("the cat")
    extractor.save_activations(record, tmp_path / "record.pkl")
    assert_equal_records(extractor.load_activations(tmp_path / "record.pkl"), record, 0)


@pytest.mark.parametrize("enabled", [True, False])
def test_the_collector_is_left_as_it_was(monkeypatch, enabled):
    """Also after an error while records are made."""
    extractor, before = activation_extraction.ActivationExtractor(families.build("gpt2")), []

    def noting(*args, **kwargs):
        before.append(gc.isenabled())
        raise RuntimeError("on purpose")

    (gc.enable if enabled else gc.disable)()
    try:
        extractor.extract_batch_activations([[5, 6], [7]], show_progress=False)
        assert gc.isenabled() is enabled
        monkeypatch.setattr(activation_extraction, "assemble_record", noting)
        with pytest.raises(RuntimeError, match="on purpose"):
            extractor.extract_batch_activations([[5, 6], [7]], show_progress=False)
        assert gc.isenabled() is enabled
        assert before == [False]
    finally:
        gc.enable()
