"""Records of activations: layers in any spelling, fields that fit together, tables."""

import copy
import pickle

import numpy as np
import pytest
import torch

from activation_record import ActivationRecord, LayerActivations, position_rows, runs
from forward_pass import LayerError, SiteError

NAMES = [f"transformer.h.{i}" for i in range(12)]
ATTENTION = [f"{name}.attn" for name in NAMES]
SPELLINGS = (5, "5", "h.5", "transformer.h.5", -7, np.int64(5), torch.tensor(5))


def some(*layers, shape=(1, 3, 4), names=NAMES, keys=None):
    """Recorded layers; layer i is filled with i."""
    tensors = {(keys or names)[i]: torch.full(shape, float(i)) for i in layers}
    return LayerActivations(tensors, names, keys)


def make(**changes):
    fields = {
        "prompt": "The cat sat",
        "tokens": ["The", " cat", " sat"],
        "token_ids": [1, 2, 3],
        "layer_activations": some(0, 5, 11),
    }
    return ActivationRecord(**(fields | changes))


# --- LayerActivations -----------------------------------------------------------------------------


@pytest.mark.parametrize("layer", SPELLINGS)
def test_a_layer_is_found_by_any_spelling(layer):
    acts = some(0, 5, 11)
    assert acts[layer][0, 0, 0] == 5
    assert layer in acts
    assert acts.get(layer) is acts["transformer.h.5"]


@pytest.mark.parametrize("layer", [*SPELLINGS, "transformer.h.5.attn", "h.5.attn"])
def test_attention_is_found_by_the_layer_and_by_its_own_name(layer):
    assert some(0, 5, keys=ATTENTION)[layer][0, 0, 0] == 5


def test_a_prefix_that_the_model_does_not_have_is_no_matter():
    bare = some(0, 5, names=[f"h.{i}" for i in range(12)])
    assert bare["transformer.h.5"][0, 0, 0] == 5
    attention = some(
        5, names=[f"h.{i}" for i in range(12)], keys=[f"h.{i}.attn" for i in range(12)]
    )
    assert attention["transformer.h.5.attn"][0, 0, 0] == 5


def test_minus_one_is_the_last_block_of_the_model_not_of_the_record():
    assert some(0, 11)[-1][0, 0, 0] == 11
    with pytest.raises(LayerError, match=r"layer 11 .* was not recorded"):
        some(0, 5)[-1]


def test_a_layer_that_was_not_recorded_says_which_were_and_how_to_get_it():
    with pytest.raises(LayerError) as error:
        some(0, 1, 2, 5)["h.7"]
    message = str(error.value)
    assert "layer 7 ('transformer.h.7') was not recorded" in message
    assert "holds layers 0-2, 5 of 0-11" in message
    assert "layer_indices=[7]" in message


@pytest.mark.parametrize(
    "layer", [12, -13, "99", "h.12", "nonsense", "", None, 1.0, True, [1], "."]
)
def test_what_is_no_layer_raises_and_is_not_in(layer):
    acts = some(0, 5)
    with pytest.raises(LayerError):
        acts[layer]
    assert layer not in acts
    assert acts.get(layer) is None
    assert acts.get(layer, 3) == 3
    assert acts.pop(layer, 3) == 3
    with pytest.raises(LayerError):
        del acts[layer]


def test_keys_values_and_items_are_in_layer_order():
    tensors = {name: torch.zeros(1) for name in ("transformer.h.11", "embed", "transformer.h.2")}
    acts = LayerActivations(tensors, NAMES)
    assert list(acts) == ["embed", "transformer.h.2", "transformer.h.11"]
    acts["h.5"] = torch.ones(1)
    assert list(acts) == ["embed", "transformer.h.2", "transformer.h.5", "transformer.h.11"]
    assert [key for key, _ in acts.items()] == list(acts.keys())
    assert acts.layers == [2, 5, 11]


def test_a_key_that_is_no_block_is_found_by_its_exact_name_only():
    acts = LayerActivations({"embed": torch.zeros(1)}, NAMES)
    assert "embed" in acts
    assert "model.embed" not in acts
    acts["model.embed"] = torch.ones(1)
    assert list(acts) == ["embed", "model.embed"]
    assert acts["embed"] == 0
    assert acts.layers == []


def test_writing_takes_any_spelling():
    acts = some()
    acts[5] = torch.zeros(1)
    acts.update({"h.3": torch.ones(1), -1: torch.ones(1)})
    acts.setdefault("0", torch.ones(1))
    acts.setdefault("h.5", torch.ones(1))
    acts |= {7: torch.ones(1)}
    assert acts.layers == [0, 3, 5, 7, 11]
    assert acts["h.5"] == 0
    assert isinstance(acts, LayerActivations)
    del acts["h.7"]
    assert acts.pop(11) == 1
    assert acts.layers == [0, 3, 5]
    assert set(acts) <= set(NAMES)


@pytest.mark.parametrize("layer", [12, "12", "h.12", "encoder.3"])
def test_a_block_that_there_is_not_cannot_be_set(layer):
    acts = some(0)
    with pytest.raises(LayerError):
        acts[layer] = torch.zeros(1)
    with pytest.raises(LayerError):
        LayerActivations({layer: torch.zeros(1)}, NAMES)


def test_without_layer_names_the_keys_are_the_layers():
    acts = LayerActivations({"a.0": torch.zeros(1), "a.1": torch.ones(1)})
    assert acts[1] == acts["a.1"] == acts[-1] == 1


def test_blocks_without_attention():
    keys = ["h.0.attn", None, "h.2.attn"]
    acts = LayerActivations({"h.2.attn": torch.zeros(1)}, ["h.0", "h.1", "h.2"], keys)
    assert 2 in acts
    assert 1 not in acts
    with pytest.raises(LayerError, match=r"block 1 \('h.1'\) has no such tensor.*have one: 0, 2"):
        acts[1]


def test_a_key_for_every_block_is_needed():
    with pytest.raises(ValueError, match="each of the 12 blocks; it holds 2"):
        LayerActivations({}, NAMES, ["a", "b"])


def test_an_empty_record_of_layers():
    with pytest.raises(LayerError, match="this holds nothing"):
        LayerActivations()[0]
    assert 0 not in LayerActivations()


@pytest.mark.parametrize(
    "copied",
    [copy.copy, copy.deepcopy, LayerActivations.copy, lambda a: pickle.loads(pickle.dumps(a))],
)
def test_copies_know_the_same_layers(copied):
    acts = some(5, keys=ATTENTION)
    twin = copied(acts)
    assert type(twin) is LayerActivations
    assert torch.equal(twin["h.5"], acts["h.5"])
    assert twin.layer_names == acts.layer_names
    assert twin.keys_by_layer == acts.keys_by_layer
    del twin[5]
    assert 5 in acts


def test_reprs_are_one_line_and_show_no_numbers():
    assert repr(some(0, 1, 5)) == "LayerActivations(layers 0-1, 5 of 12, each [1, 3, 4])"
    assert repr(LayerActivations()) == "LayerActivations(empty)"
    record = make(prompt="a\n" * 50, logits=torch.zeros(1, 3, 9), attention_weights=None)
    assert repr(record).startswith(r"ActivationRecord('a\na\n")
    assert "3 of 12 layers, logits" in repr(record)
    assert "\n" not in repr(record)
    assert len(repr(record)) < 150


@pytest.mark.parametrize(
    ("indices", "text"), [([], ""), ([3], "3"), ([0, 1, 2], "0-2"), ([0, 2, 3, 9], "0, 2-3, 9")]
)
def test_runs(indices, text):
    assert runs(indices) == text


# --- ActivationRecord -----------------------------------------------------------------------------


def test_defaults():
    record = make()
    assert record.positions == [0, 1, 2]
    assert record.metadata == {}
    assert record.attention_weights is record.logits is None
    assert record.num_layers == 3
    assert record.sites == ["resid_post"]
    assert make().metadata is not record.metadata


def test_an_explicitly_empty_list_of_positions_is_none_at_all():
    assert make(positions=[], layer_activations=some(5, shape=(1, 0, 4))).positions == []


def test_fields_are_brought_into_their_types():
    record = make(
        token_ids=torch.tensor([1, 2, 3]),
        tokens=("a", "b", "c"),
        layer_activations={"x.0": torch.zeros(1, 2, 4)},
        positions=np.array([0, 2]),
        site_activations={"embed": {"embed": torch.zeros(1, 2, 4)}},
    )
    assert record.token_ids == [1, 2, 3]
    assert all(type(i) is int for i in [*record.token_ids, *record.positions])
    assert record.tokens == ["a", "b", "c"]
    assert 0 in record.layer_activations
    assert "embed" in record.site_activations["embed"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"token_ids": [1, 2]}, "3 tokens and 2 ids"),
        ({"positions": [0, 1, 3]}, r"must lie in 0\.\.2, absolute; got \[3\]"),
        ({"positions": [-1]}, r"got \[-1\]"),
        ({"positions": [0]}, r"must be \[1, position, d_model\] with 1 .*got \[1, 3, 4\]"),
        ({"layer_activations": some(0, shape=(3, 4))}, r"got \[3, 4\]"),
        ({"layer_activations": some(0, shape=(2, 3, 4))}, r"got \[2, 3, 4\]"),
        ({"layer_activations": some(0, shape=())}, r"got \[\]"),
        ({"logits": torch.zeros(1, 2, 9)}, r"logits .* \[1, position, vocab\].*got \[1, 2, 9\]"),
        ({"attention_weights": some(0, shape=(1, 4, 2, 3))}, r"\[1, head, query, key\]"),
        ({"attention_weights": some(0, shape=(1, 3, 3))}, r"got \[1, 3, 3\]"),
        ({"site_activations": {"mlp_out": some(0, shape=(1, 2, 4))}}, r"mlp_out .*\[1, 2, 4\]"),
        ({"site_activations": {"resid_post": some(0)}}, "belongs in the field layer_activations"),
        ({"site_activations": {"attn_pattern": some(0)}}, "in the field attention_weights"),
        ({"site_activations": {"logits": some(0)}}, "in the field logits"),
    ],
)
def test_fields_that_do_not_fit_together(changes, message):
    with pytest.raises(ValueError, match=message):
        make(**changes)


def test_every_tensor_has_its_position_axis_checked():
    record = make(
        positions=[2],
        layer_activations=some(0, shape=(1, 1, 4)),
        attention_weights=some(0, shape=(1, 2, 1, 3), keys=ATTENTION),
        logits=torch.zeros(1, 1, 9),
        site_activations={"query": some(0, shape=(1, 1, 2, 2))},
    )
    assert record.positions == [2]


def test_at():
    embedding = torch.ones(1, 3, 4)
    record = make(
        attention_weights=some(5, shape=(1, 2, 3, 3), keys=ATTENTION),
        site_activations={
            "mlp_out": some(5),
            "embed": LayerActivations({"embed": embedding}, NAMES),
        },
    )
    assert record.at("resid_post", "h.5") is record.layer_activations[5]
    assert record.at("attn_pattern", 5) is record.attention_weights["transformer.h.5.attn"]
    assert record.at("mlp_out", -7) is record.site_activations["mlp_out"]["h.5"]
    assert record.at("embed") is embedding
    assert record.at("mlp_out") is record.at("mlp_out", 5)
    assert record.sites == ["resid_post", "attn_pattern", "mlp_out", "embed"]
    with pytest.raises(LayerError, match="say which layer of 'resid_post'"):
        record.at("resid_post")
    with pytest.raises(SiteError, match=r"'head_out' was not recorded.*sites=\('head_out',\)"):
        record.at("head_out", 5)
    with pytest.raises(SiteError, match="include_attention=True"):
        make().at("attn_pattern", 5)


def test_nbytes_counts_whole_storages_and_shared_ones_once():
    tensor = torch.zeros(1, 3, 4)
    assert make(layer_activations={"a": tensor, "b": tensor}).nbytes == 48
    batch = torch.zeros(10, 3, 4)
    assert make(layer_activations={"a": batch[:1]}).nbytes == 480
    assert make(layer_activations={}).nbytes == 0
    assert make(layer_activations={"a": torch.zeros(1, 3, 4, device="meta")}).nbytes == 0


def test_tensors_lists_everything_once():
    record = make(
        attention_weights=some(5, shape=(1, 2, 3, 3)),
        logits=torch.zeros(1, 3, 9),
        site_activations={"mlp_out": some(5)},
    )
    assert [(name, key) for name, key, _ in record.tensors()] == [
        ("layer_activations", "transformer.h.0"),
        ("layer_activations", "transformer.h.5"),
        ("layer_activations", "transformer.h.11"),
        ("attention_weights", "transformer.h.5"),
        ("mlp_out", "transformer.h.5"),
        ("logits", ""),
    ]


def test_to_frame():
    tensor = torch.randn(1, 2, 4, dtype=torch.bfloat16)
    record = make(
        positions=[0, 2], layer_activations=LayerActivations({"h.1": tensor}, ["h.0", "h.1"])
    )
    frame = record.to_frame()
    values = tensor[0].double().numpy()
    assert frame.columns.tolist() == ["layer", "position", "token", "norm", "mean", "std"]
    assert frame["layer"].tolist() == [1, 1]
    assert frame["position"].tolist() == [0, 2]
    assert frame["token"].tolist() == ["The", " sat"]
    np.testing.assert_allclose(frame["norm"], np.sqrt((values**2).sum(1)))
    np.testing.assert_allclose(frame["mean"], values.mean(1))
    np.testing.assert_allclose(frame["std"], values.std(1))


def test_to_frame_of_other_sites():
    record = make(
        attention_weights=some(0, 1, shape=(1, 2, 3, 3)),
        site_activations={"embed": {"embed": torch.ones(1, 3, 4)}},
    )
    assert len(record.to_frame("attn_pattern")) == 6
    assert record.to_frame("embed")["norm"].tolist() == [2.0] * 3
    assert make(layer_activations={}).to_frame().empty


def test_position_rows():
    pattern = torch.arange(12.0).reshape(1, 2, 3, 2)
    rows = position_rows(pattern, "attn_pattern")
    assert rows.tolist() == [[0, 1, 6, 7], [2, 3, 8, 9], [4, 5, 10, 11]]
    assert position_rows(torch.zeros(1, 0, 4), "resid_post").shape == (0, 4)
    assert position_rows(torch.zeros(1, 3, 2, 2).half(), "query").shape == (3, 4)
    assert position_rows(torch.zeros(1, 3), "x").dtype == torch.float64
    with pytest.raises(ValueError, match="shapes only"):
        position_rows(torch.zeros(1, 3, 4, device="meta"), "resid_post")
    with pytest.raises(ValueError, match="complex64"):
        position_rows(torch.zeros(1, 3, 4, dtype=torch.complex64), "resid_post")


def test_a_record_can_be_copied_and_sent_to_another_process():
    record = make(metadata={"a": [1]})
    for twin in (copy.deepcopy(record), pickle.loads(pickle.dumps(record))):
        assert twin.prompt == record.prompt
        assert torch.equal(twin.at("resid_post", 5), record.at("resid_post", 5))
        twin.metadata["a"].append(2)
    assert record.metadata == {"a": [1]}
