"""Records in files: exact in every format, whatever they hold; damage and hostility are seen."""

import inspect
import json
import math
import random
import time
import tracemalloc
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import record_files
from activation_record import ActivationRecord, LayerActivations
from activation_statistics import compare_activations, get_activation_statistics
from array_files import write_arrays
from array_formats import DTYPES, FORMATS
from forward_pass import RecordFileError
from record_files import DEFAULT_FORMAT, load_activations, save_activations
from test_tagged_json import ANY_TEXT, VALUES, same

WITH_VALUES = [name for name in FORMATS if name != "json"]
NAMES = tuple(f"transformer.h.{i}" for i in range(4))
ATTENTION = ("transformer.h.0.attn", None, "transformer.h.2.attn", "transformer.h.3.attn")


# --- Whether two records are the same -------------------------------------------------------------


def bits(tensor):
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def same_tensor(a, b, with_values):
    return (a.dtype, a.shape) == (b.dtype, b.shape) and (not with_values or bits(a) == bits(b))


def same_group(a, b, with_values):
    if a is None or b is None:
        return a is b
    return (
        type(b) is LayerActivations
        and list(a) == list(b)
        and a.layer_names == b.layer_names
        and a.keys_by_layer == b.keys_by_layer
        and all(same_tensor(a[key], b[key], with_values) for key in a)
    )


def assert_same(a, b, with_values=True):
    """Equal in everything, tensors bit by bit."""
    assert type(b) is ActivationRecord
    for name in ("prompt", "tokens", "token_ids", "positions", "metadata"):
        assert same(getattr(a, name), getattr(b, name)), name
    assert same_group(a.layer_activations, b.layer_activations, with_values)
    assert same_group(a.attention_weights, b.attention_weights, with_values)
    assert list(a.site_activations) == list(b.site_activations)
    for site in a.site_activations:
        assert same_group(a.site_activations[site], b.site_activations[site], with_values)
    assert (a.logits is None) == (b.logits is None)
    assert a.logits is None or same_tensor(a.logits, b.logits, with_values)
    assert all(tensor.is_meta != with_values for _, _, tensor in b.tensors())


def random_tensor(rng, dtype, shape):
    """Any bits at all, NaNs with a payload among them."""
    count = math.prod(shape)
    if dtype is torch.bool:
        return torch.from_numpy(rng.random(count) < 0.5).reshape(shape)
    data = torch.from_numpy(np.frombuffer(bytearray(rng.bytes(count * dtype.itemsize)), np.uint8))
    return data.view(dtype).reshape(shape)


def make(n_tokens=3, dtype=torch.float32, seed=0, positions=None, full=True, **fields):
    """A record with something in every field."""
    rng = np.random.default_rng(seed)
    kept = list(range(n_tokens)) if positions is None else positions
    n = len(kept)

    def group(shape, keys=None):
        tensors = {k: random_tensor(rng, dtype, shape) for k in (keys or NAMES)[::2]}
        return LayerActivations(tensors, NAMES, keys)

    rest = {}
    if full:
        rest = {
            "attention_weights": group((1, 2, n, n_tokens), ATTENTION),
            "logits": random_tensor(rng, dtype, (1, n, 5)),
            "site_activations": {
                "query": group((1, n, 2, 3)),
                "embed": LayerActivations({"embed": random_tensor(rng, dtype, (1, n, 6))}, NAMES),
                "mlp_out": LayerActivations({}, NAMES),
            },
        }
    return ActivationRecord(
        **{
            "prompt": "Grüße 😀\n\x00",
            "tokens": [f" t{i}" for i in range(n_tokens)],
            "token_ids": list(range(n_tokens)),
            "layer_activations": group((1, n, 6)),
            "metadata": {"model": "gpt2", "n": (1, 2), "layer_names": list(NAMES)},
            "positions": kept,
        }
        | rest
        | fields
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder for tests that hypothesis runs many times."""
    return tmp_path_factory.mktemp("records")


# --- Round trips ----------------------------------------------------------------------------------


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("dtype", [getattr(torch, name) for name in DTYPES], ids=str)
def test_every_dtype_in_every_format(tmp_path, format, dtype):
    record = make(dtype=dtype)
    assert save_activations(record, tmp_path / "x", format) == tmp_path / "x"
    assert_same(record, load_activations(tmp_path / "x"), format != "json")


@st.composite
def records(draw):
    n_tokens = draw(st.integers(0, 4))
    positions = draw(st.none() | st.lists(st.integers(0, n_tokens - 1))) if n_tokens else None
    return make(
        n_tokens,
        getattr(torch, draw(st.sampled_from(list(DTYPES)))),
        draw(st.integers(0, 9)),
        positions,
        draw(st.booleans()),
        prompt=draw(ANY_TEXT),
        tokens=draw(st.lists(ANY_TEXT, min_size=n_tokens, max_size=n_tokens)),
        token_ids=draw(st.lists(st.integers(-1, 2**63), min_size=n_tokens, max_size=n_tokens)),
        metadata=draw(st.dictionaries(ANY_TEXT | st.integers(), VALUES, max_size=3)),
    )


@settings(max_examples=60)
@given(record=records(), format=st.sampled_from(list(FORMATS)))
def test_any_record(folder, record, format):
    save_activations(record, folder / "x", format)
    assert_same(record, load_activations(folder / "x"), format != "json")


@settings(max_examples=60)
@given(given_records=st.lists(records(), max_size=5), format=st.sampled_from(list(FORMATS)))
def test_any_list_of_records(folder, given_records, format):
    save_activations(given_records, folder / "x", format)
    loaded = load_activations(folder / "x")
    assert type(loaded) is list
    assert len(loaded) == len(given_records)
    for record, twin in zip(given_records, loaded, strict=True):
        assert_same(record, twin, format != "json")


@pytest.mark.parametrize("format", FORMATS)
def test_a_list_of_one_is_a_list(tmp_path, format):
    for given_records in ([make()], (make(),), iter([make()]), []):
        save_activations(given_records, tmp_path / "x", format)
        assert type(load_activations(tmp_path / "x")) is list
    assert load_activations(tmp_path / "x") == []


@pytest.mark.parametrize("format", WITH_VALUES)
def test_views_shared_memory_and_graphs(tmp_path, format):
    batch = torch.arange(10000.0).reshape(100, 4, 25)
    view, crossed = batch[3:4], batch[5:6].transpose(1, 2)[:, :4]
    record = ActivationRecord(
        "p",
        list("abcd"),
        [0] * 4,
        LayerActivations({"a.0": view, "a.1": view, "a.2": view.clone().requires_grad_()}),
        site_activations={"mlp_out": {"a.0": view.view(torch.int32)}, "x": {"a.0": crossed}},
    )
    for saved in (record, [record, record]):
        save_activations(saved, tmp_path / "x", format)
        loaded = load_activations(tmp_path / "x")
        twins = loaded if isinstance(loaded, list) else [loaded]
        for twin in twins:
            assert_same(record, twin)
            assert twin.nbytes == sum(t.nbytes for _, _, t in record.tensors())
            assert not any(t.requires_grad for _, _, t in twin.tensors())
        assert (tmp_path / "x").stat().st_size < 10_000
        twins[0].layer_activations[0].zero_()
        assert twins[0].layer_activations[1].sum() == view.sum()
        assert twins[-1].layer_activations[1].sum() == view.sum()


@pytest.mark.parametrize("format", FORMATS)
def test_saving_changes_nothing_in_the_record(tmp_path, format):
    record, twin = make(), make()
    tensors = [tensor for _, _, tensor in record.tensors()]
    metadata = record.metadata
    save_activations([record], tmp_path / "x", format)
    save_activations(record, tmp_path / "x", format)
    assert_same(record, twin)
    assert record.metadata is metadata
    assert all(a is b for a, (_, _, b) in zip(tensors, record.tensors(), strict=True))


@pytest.mark.parametrize("format", FORMATS)
def test_records_that_share_metadata_do_not_after_loading(tmp_path, format):
    manifest = {"names": [f"a long name {i}" for i in range(20)]}
    saved = [make(metadata={"manifest": manifest, "i": i}) for i in range(50)]
    save_activations(saved, tmp_path / "x", format)
    if format not in ("json", "pt", "npz"):
        assert (tmp_path / "x").read_bytes().count(b"a long name 7") == 1
    loaded = load_activations(tmp_path / "x")
    loaded[0].metadata["manifest"]["names"].append("x")
    assert loaded[1].metadata["manifest"] == manifest
    assert [record.metadata["i"] for record in loaded] == list(range(50))


@pytest.mark.parametrize("format", FORMATS)
def test_the_same_records_give_the_same_bytes(tmp_path, format):
    for number, saved in enumerate((make(), [make(2), make(3), make(2, seed=1)])):
        again = make() if number == 0 else [make(2), make(3), make(2, seed=1)]
        save_activations(saved, tmp_path / "x", format)
        save_activations(again, tmp_path / "y", format)
        assert (tmp_path / "x").read_bytes() == (tmp_path / "y").read_bytes()
        loaded = load_activations(tmp_path / "x")
        if format != "json":
            save_activations(loaded, tmp_path / "y", format)
            assert (tmp_path / "x").read_bytes() == (tmp_path / "y").read_bytes()


def test_arrays_have_names_that_other_programs_can_use(tmp_path):
    save_activations(make(), tmp_path / "x.npz")
    with np.load(tmp_path / "x.npz") as file:
        assert "layer_activations/transformer.h.2" in file
        assert file["attention_weights/transformer.h.0.attn"].shape == (1, 2, 3, 3)
        assert file["logits"].shape == (1, 3, 5)
        assert file["embed/embed"].shape == (1, 3, 6)
    save_activations([make(3), make(5), make(3)], tmp_path / "x.npz")
    with np.load(tmp_path / "x.npz") as file:
        assert file["layer_activations/transformer.h.2"].shape == (2, 1, 3, 6)
        assert file["layer_activations/transformer.h.2@2"].shape == (1, 1, 5, 6)


def test_keys_that_are_no_names(tmp_path):
    keys = ["é/..", "e_/..", "a b", "a_b", "", "$x", "\ud800", "x" * 300, "x" * 299, "header"]
    group = LayerActivations({key: torch.full((1, 3, 1), float(i)) for i, key in enumerate(keys)})
    record = make(
        full=False, layer_activations=group, site_activations={"header": group, "é": group}
    )
    for format in FORMATS:
        save_activations(record, tmp_path / "x", format)
        assert_same(record, load_activations(tmp_path / "x"), format != "json")


# --- Formats --------------------------------------------------------------------------------------


def test_the_default_is_pickle_unless_the_name_says_otherwise(tmp_path):
    assert inspect.signature(save_activations).parameters["format"].default == "pickle"
    beginnings = {
        "x.pkl": b"\x80\x04}(",
        "x": b"\x80\x04}(",
        "x.dat": b"\x80\x04}(",
        "x.pt": b"PK",
        "x.PTH": b"PK",
        "x.npz": b"PK",
        "x.json": b"{",
    }
    for name, beginning in beginnings.items():
        for format in ({}, {"format": None}, {"format": DEFAULT_FORMAT}):
            save_activations(make(), tmp_path / name, **format)
            assert (tmp_path / name).read_bytes().startswith(beginning)
        save_activations(make(), tmp_path / name, "pickle")
        assert (tmp_path / name).read_bytes().startswith(b"\x80\x04}(")
    save_activations(make(), str(tmp_path / "x.safetensors"))
    assert (tmp_path / "x.safetensors").read_bytes()[8:9] == b"{"
    assert_same(make(), load_activations(str(tmp_path / "x.safetensors")))


def test_an_unknown_format(tmp_path):
    for format in ("hdf5", "Pickle", ""):
        with pytest.raises(
            RecordFileError, match=f"no format '{format}'; expected one of json, pi"
        ):
            save_activations(make(), tmp_path / "x", format)
    assert list(tmp_path.iterdir()) == []


def test_records_from_json_have_shapes_and_say_that_they_have_no_values(tmp_path):
    save_activations([make(), make(5)], tmp_path / "x.json")
    record = load_activations(tmp_path / "x.json")[1]
    assert record.layer_activations["h.2"].shape == (1, 5, 6)
    assert record.nbytes == 0
    assert record.num_layers == 2
    for use in (
        lambda: get_activation_statistics(record, 0),
        lambda: compare_activations(record, record, 0),
        record.to_frame,
        lambda: save_activations(record, tmp_path / "x.npz"),
        lambda: save_activations([make(), record], tmp_path / "x.pt"),
    ):
        with pytest.raises(ValueError, match="shapes only"):
            use()
    before = (tmp_path / "x.json").read_bytes()
    save_activations(load_activations(tmp_path / "x.json"), tmp_path / "x.json")
    assert (tmp_path / "x.json").read_bytes() == before


def test_json_can_be_read_by_people(tmp_path):
    save_activations(make(), tmp_path / "x.json")
    text = (tmp_path / "x.json").read_text(encoding="utf-8")
    document = json.loads(text)
    assert "Grüße 😀" in text
    (record,) = document["content"]["records"]
    assert record["tokens"] == [" t0", " t1", " t2"]
    assert record["metadata"]["model"] == "gpt2"
    array = document["content"]["layouts"][0]["groups"]["layer_activations"]["arrays"][NAMES[2]]
    assert document["arrays"][array] == {"dtype": "float32", "shape": [1, 3, 6]}


# --- What cannot be saved -------------------------------------------------------------------------


@pytest.mark.parametrize("given_records", [None, 5, "abc", {"a": make(full=False)}, [make(), None]])
def test_what_is_no_record(tmp_path, given_records):
    with pytest.raises(TypeError, match="expected an ActivationRecord or a list of them; got"):
        save_activations(given_records, tmp_path / "x")


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"metadata": {"a": [object()]}}, r"record 1: metadata\['a'\]\[0\] is a builtins.object"),
        ({"metadata": [1]}, "record 1: metadata must be a dict; it is a list"),
        ({"prompt": None}, "record 1: prompt must be a string; it is a NoneType"),
        ({"tokens": [1, 2, 3]}, "record 1: a token must be a string; it is a int"),
        (
            {"logits": torch.zeros(1, 3, 2, dtype=torch.complex64)},
            "record 1: logits '' has the dtype torch.complex64",
        ),
        ({"logits": torch.zeros(1, 3, 2).to_sparse()}, r"logits '' is torch.sparse_coo"),
    ],
)
def test_what_has_no_exact_form(tmp_path, format, fields, message):
    (tmp_path / "x").write_bytes(b"earlier")
    with pytest.raises(RecordFileError, match=message):
        save_activations([make(), make(**fields)], tmp_path / "x", format)
    assert (tmp_path / "x").read_bytes() == b"earlier"
    assert len(list(tmp_path.iterdir())) == 1


def test_a_record_that_was_edited_out_of_shape_is_not_saved(tmp_path):
    """It could not be loaded."""
    record = make()
    record.layer_activations[1] = torch.zeros(1, 2, 6)
    with pytest.raises(RecordFileError, match=r"record 0 cannot be saved: .*got \[1, 2, 6\]"):
        save_activations(record, tmp_path / "x")
    record = make()
    record.tokens.append("x")
    with pytest.raises(RecordFileError, match="4 tokens and 3 ids"):
        save_activations(record, tmp_path / "x")
    assert list(tmp_path.iterdir()) == []


# --- Damage ---------------------------------------------------------------------------------------


def damaged(data, rng):
    """One way to damage a file."""
    data = bytearray(data)
    at = rng.randrange(len(data))
    kind = rng.randrange(6)
    if kind == 0:
        return bytes(data[:at])
    if kind == 1:
        data[at] ^= 1 << rng.randrange(8)
    elif kind == 2:
        data[at] = rng.randrange(256)
    elif kind == 3:
        del data[at : at + rng.randrange(1, 40)]
    elif kind == 4:
        data[at:at] = rng.randbytes(rng.randrange(1, 40))
    else:
        data[at : at + 8] = rng.choice([bytes(8), b"\xff" * 8, (2**31).to_bytes(8, "little")])
    return bytes(data)


@pytest.mark.parametrize("single", [True, False])
@pytest.mark.parametrize("format", FORMATS)
def test_a_damaged_file_is_refused_or_read_right(tmp_path, format, single):
    """Never another error, never another record."""
    saved = make() if single else [make(2), make(3, full=False), make(2, seed=1)]
    save_activations(saved, tmp_path / "x", format)
    data, rng = (tmp_path / "x").read_bytes(), random.Random(format + str(single))
    refused = 0
    for _ in range(300):
        (tmp_path / "x").write_bytes(damaged(data, rng))
        try:
            loaded = load_activations(tmp_path / "x")
        except RecordFileError:
            refused += 1
            continue
        pairs = [(saved, loaded)] if single else zip(saved, loaded, strict=True)
        for record, twin in pairs:
            assert_same(record, twin, format != "json")
    assert refused > 150


@pytest.mark.parametrize("format", FORMATS)
def test_a_truncated_file_is_refused_at_every_length(tmp_path, format):
    save_activations(make(), tmp_path / "x", format)
    data = (tmp_path / "x").read_bytes()
    for length in {
        *range(0, len(data), max(len(data) // 150, 1)),
        *range(len(data) - 40, len(data)),
    }:
        (tmp_path / "x").write_bytes(data[:length])
        with pytest.raises(RecordFileError, match=r"/x cannot be read as activation records: \w"):
            load_activations(tmp_path / "x")


# --- Headers that lie -----------------------------------------------------------------------------


def forged(tmp_path, change, arrays=None, format="safetensors"):
    """Write the content of a list of two records, changed."""
    saved = [make(2, full=False), make(2, full=False, seed=1)]
    save_activations(saved, tmp_path / "x.json")
    content = json.loads((tmp_path / "x.json").read_text(encoding="utf-8"))["content"]
    change(content)
    if arrays is None:
        arrays = {
            f"layer_activations/{name}": [record.layer_activations[name] for record in saved]
            for name in NAMES[::2]
        }
    path = tmp_path / "forged"
    write_arrays(path, format, record_files.KIND, record_files.SCHEMA_VERSION, content, arrays)
    return path


def test_the_forgery_would_be_read_if_it_were_right(tmp_path):
    for format in FORMATS:
        assert len(load_activations(forged(tmp_path, lambda content: None, format=format))) == 2


def _set(*path, to):
    def change(content):
        *steps, last = path
        for step in steps:
            content = content[step]
        content[last] = to

    change.__name__ = f"{path} to {to}"[:60]
    return change


GROUP = ("layouts", 0, "groups", "layer_activations")


@pytest.mark.parametrize("format", ["safetensors", "json"])
@pytest.mark.parametrize(
    "change",
    [
        _set("single", to=True),
        _set("layouts", to=[]),
        _set("layouts", 0, "logits", to="layer_activations/transformer.h.0"),
        _set("layouts", 0, "logits", to="header"),
        _set("layouts", 0, "groups", to={}),
        _set(*GROUP, to=None),
        _set(*GROUP, "arrays", to={}),
        _set(*GROUP, "arrays", NAMES[0], to="nothing"),
        _set(*GROUP, "arrays", NAMES[0], to=3),
        _set(*GROUP, "arrays", NAMES[0], to=f"layer_activations/{NAMES[2]}"),
        _set(*GROUP, "layer_names", to=["a.0"]),
        _set(*GROUP, "layer_names", to=5),
        _set(*GROUP, "keys_by_layer", to=["a"]),
        _set("records", to={}),
        _set("records", to=[]),
        _set("records", 0, to=None),
        _set("records", 0, "layout", to=1),
        _set("records", 0, "layout", to=-1),
        _set("records", 0, "layout", to=False),
        _set("records", 0, "prompt", to=5),
        _set("records", 0, "prompt", to={"$call": "os.system"}),
        _set("records", 0, "tokens", to=["a", 5]),
        _set("records", 0, "tokens", to=["a"]),
        _set("records", 0, "token_ids", to=["a", "b"]),
        _set("records", 0, "token_ids", to=5),
        _set("records", 0, "positions", to=[0]),
        _set("records", 0, "positions", to=[0, 9]),
        _set("records", 0, "metadata", to=5),
        _set("records", 0, "metadata", to={"$tuple": [1]}),
        _set("records", 0, "metadata", to={"a": {"$shared": 0}}),
        _set("records", 0, "metadata", to={"a": {"$shared": "x"}}),
    ],
    ids=lambda change: change.__name__,
)
def test_content_that_makes_no_sense(tmp_path, change, format):
    with pytest.raises(RecordFileError, match="forged cannot be read as activation records"):
        load_activations(forged(tmp_path, change, format=format))


def test_a_few_bytes_that_declare_millions_of_tensors(tmp_path, monkeypatch):
    monkeypatch.setattr(record_files, "FEW_TENSORS", 0)
    monkeypatch.setattr(record_files, "TENSORS_PER_BYTE", 1)

    def change(content):
        names = {f"k{i}": f"a{i}" for i in range(1000)}
        content["layouts"][0]["groups"]["layer_activations"]["arrays"] = names
        content["records"] = content["records"][:1] * 1000

    empty = {f"a{i}": torch.zeros(1000, 1, 0, 6) for i in range(1000)}
    for format in FORMATS:
        with pytest.raises(RecordFileError, match="declares 1001000 tensors"):
            load_activations(forged(tmp_path, change, empty, format))


def test_a_long_value_that_many_records_share_is_not_unfolded(tmp_path):
    def change(content):
        content["shared"] = ["x" * 1_000_000]
        content["records"][0]["metadata"] = {str(i): {"$shared": 0} for i in range(100_000)}

    with pytest.raises(RecordFileError, match="too long to be shared"):
        load_activations(forged(tmp_path, change))


def test_a_newer_schema(tmp_path):
    write_arrays(tmp_path / "x", "npz", record_files.KIND, 2, {}, {})
    with pytest.raises(RecordFileError, match=r"schema version 2.*upgrade the toolkit"):
        load_activations(tmp_path / "x")


def test_a_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError):
        load_activations(tmp_path / "x")
    with pytest.raises(RecordFileError, match=r"there is no file .*/x"):
        load_activations(str(tmp_path / "x"))


# --- Size, memory, time ---------------------------------------------------------------------------


def many(count):
    """Records as one saves them by the thousand: twelve layers of one position each."""
    names = [f"transformer.h.{i}" for i in range(12)]
    values = torch.randn(count, 12, 1, 1, 96)
    return [
        ActivationRecord(
            f"The prompt number {i} is here",
            [f" tok{j}" for j in range(8)],
            list(range(8)),
            LayerActivations({name: values[i, j].clone() for j, name in enumerate(names)}, names),
            metadata={"model": "demo", "layer_names": names, "versions": {"torch": "2.13"}, "i": i},
            positions=[7],
        )
        for i in range(count)
    ]


@pytest.mark.parametrize("format", WITH_VALUES)
def test_a_file_is_hardly_larger_than_its_values(tmp_path, format):
    saved = many(500)
    save_activations(saved, tmp_path / "x", format)
    assert (tmp_path / "x").stat().st_size < 1.15 * sum(record.nbytes for record in saved)
    loaded = load_activations(tmp_path / "x")
    assert sum(record.nbytes for record in loaded) == sum(record.nbytes for record in saved)


@pytest.mark.slow
@pytest.mark.parametrize("format", FORMATS)
def test_ten_thousand_records_take_seconds(tmp_path, format):
    saved = many(10_000)
    start = time.process_time()
    save_activations(saved, tmp_path / "x", format)
    between = time.process_time()
    loaded = load_activations(tmp_path / "x")
    assert between - start < 5
    assert time.process_time() - between < 5
    assert len(loaded) == 10_000
    assert_same(saved[7777], loaded[7777], format != "json")


@pytest.mark.parametrize("format", [name for name in WITH_VALUES if name != "pt"])
def test_saving_needs_little_memory_of_its_own(tmp_path, format):
    """A file of 40 MB, of which Python (not torch) allocates nearly nothing."""
    tensors = {f"a.{i}": torch.ones(1, 100, 10_000) for i in range(10)}
    record = ActivationRecord("p", ["t"] * 100, [0] * 100, LayerActivations(tensors))
    tracemalloc.start()
    try:
        save_activations(record, tmp_path / "x", format)
        assert tracemalloc.get_traced_memory()[1] < 2_000_000
        tracemalloc.reset_peak()
        load_activations(tmp_path / "x")
        assert tracemalloc.get_traced_memory()[1] < 2_000_000
    finally:
        tracemalloc.stop()


def test_the_collector_is_left_as_it_was(tmp_path):
    import gc

    save_activations([make()], tmp_path / "x")
    load_activations(tmp_path / "x")
    assert gc.isenabled()
    gc.disable()
    try:
        load_activations(tmp_path / "x")
        with pytest.raises(RecordFileError):
            load_activations(Path(tmp_path / "nothing"))
        assert not gc.isenabled()
    finally:
        gc.enable()


def test_checksums_are_of_the_values(tmp_path):
    """Read from the file by hand, as any other program could."""
    save_activations(make(), tmp_path / "x.npz")
    with np.load(tmp_path / "x.npz") as file:
        names = [name for name in file.files if name != "crc32"]
        assert [zlib.crc32(file[name].tobytes()) for name in names] == file["crc32"].tolist()
