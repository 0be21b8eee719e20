"""Python values through JSON: the same type, the same bits, or an error that says where."""

import collections
import datetime
import enum
import json
import math
import struct
from pathlib import Path, PurePosixPath

import hypothesis.extra.numpy as hnp
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from forward_pass import RecordFileError
from tagged_json import MAX_DEPTH, decode, encode


def through_json(value):
    return decode(json.loads(json.dumps(encode(value), allow_nan=False)))


def same(a, b):
    """Equal in type and in every bit, all the way down."""
    if type(a) is not type(b):
        return False
    if isinstance(a, float):
        return struct.pack("d", a) == struct.pack("d", b)
    if isinstance(a, complex):
        return same(a.real, b.real) and same(a.imag, b.imag)
    if isinstance(a, np.ndarray | np.generic):
        return (a.dtype.str, a.shape, a.tobytes()) == (b.dtype.str, b.shape, b.tobytes())
    if isinstance(a, torch.Tensor):
        bits = [t.reshape(-1).view(torch.uint8).tolist() for t in (a, b)]
        return a.dtype == b.dtype and a.shape == b.shape and bits[0] == bits[1]
    if isinstance(a, dict):
        return same(list(a), list(b)) and same(list(a.values()), list(b.values()))
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


ANY_TEXT = st.text(st.characters(exclude_categories=()))
HASHABLE = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False)
    | ANY_TEXT
    | st.binary()
    | st.builds(Path, st.text("abc/é", min_size=1))
    | st.sampled_from([torch.float32, torch.bfloat16, torch.device("cpu"), torch.Size([2, 3])])
)
LEAVES = (
    HASHABLE
    | st.floats()
    | st.complex_numbers()
    | st.binary().map(bytearray)
    | hnp.arrays(hnp.scalar_dtypes(), hnp.array_shapes(min_dims=0, min_side=0))
    | hnp.arrays(hnp.scalar_dtypes(), ()).map(lambda a: a[()])
)
VALUES = st.recursive(
    LEAVES,
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.lists(inner, max_size=4).map(tuple)
        | st.sets(HASHABLE, max_size=4)
        | st.frozensets(HASHABLE, max_size=4)
        | st.dictionaries(HASHABLE, inner, max_size=4)
        | st.dictionaries(ANY_TEXT, inner, max_size=4)
    ),
    max_leaves=12,
)


@given(VALUES)
def test_values_come_back_the_same(value):
    assert same(through_json(value), value)


@pytest.mark.parametrize(
    "value",
    [
        "\ud800",
        "\ud83d\ude00",  # two lone surrogates that JSON would join into one character
        "😀\x00\u2028",
        float("nan"),
        -0.0,
        struct.unpack("d", struct.pack("Q", 0x7FF8_0000_DEAD_BEEF))[0],  # a NaN with a payload
        2**63,
        -(2**63),
        10**5000,
        {"$tuple": [1]},
        {"a": 1, "$set": 2},
        {1: "a", "1": "b"},
        {True: 1, None: 2, (1, 2): 3},
        {"\ud800": 1},
        np.float32("nan"),
        np.str_("é"),
        np.str_(""),
        np.bytes_(b"a"),
        np.datetime64("2020-01-01"),
        np.array([1, 2], dtype=">i4"),
        np.array(["ab", "c"]),
        np.zeros((0, 3)),
        torch.tensor(1.5, dtype=torch.bfloat16),
        torch.zeros(0, 4, dtype=torch.float8_e4m3fn),
        torch.arange(6).reshape(2, 3).T,
        torch.tensor([1 + 2j]),
        torch.tensor([True, False]),
    ],
    ids=lambda value: type(value).__name__,
)
def test_values_that_json_alone_would_change(value):
    assert same(through_json(value), value)


def test_what_json_knows_stays_readable():
    value = {"model": "gpt2", "layers": [1, 2.5, None, True], "é": {"n": -1}}
    assert encode(value) == value


def test_equal_sets_are_written_equally():
    words = [f"word {i}" for i in range(100)]
    assert encode(set(words)) == encode(set(reversed(words)))


def test_a_decoded_value_shares_nothing():
    encoded = encode({"a": [1], "b": np.zeros(2)})
    first, second = decode(encoded), decode(encoded)
    first["a"].append(2)
    first["b"][0] = 1
    assert second["a"] == [1]
    assert second["b"][0] == 0


def test_tensors_lose_their_graph_only():
    value = through_json(torch.ones(2, requires_grad=True))
    assert value.tolist() == [1, 1]


class _Colour(enum.IntEnum):
    RED = 1


class _List(list):
    pass


@pytest.mark.parametrize(
    "value",
    [
        object(),
        _Colour.RED,
        _List([1]),
        collections.OrderedDict(a=1),
        collections.defaultdict(list),
        collections.namedtuple("Point", "x")(1),
        datetime.date(2020, 1, 1),
        PurePosixPath("a") if type(Path()) is not PurePosixPath else object(),
        len,
        slice(1),
        np.array([object()]),
        np.zeros(2, dtype=[("a", "i4")]),
        np.ma.zeros(2),
        torch.nn.Parameter(torch.zeros(1)),
        torch.zeros(2, device="meta"),
        torch.zeros(2, 2).to_sparse(),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_has_no_exact_form_is_refused_by_name(value):
    with pytest.raises(RecordFileError, match=r"^metadata\['runs'\]\[1\]\['x'\]"):
        encode({"runs": [0, {"x": value}]}, "metadata")


def test_a_list_in_itself_is_refused():
    value = []
    value.append(value)
    with pytest.raises(RecordFileError, match=f"over {MAX_DEPTH} levels"):
        encode(value, "metadata")


def test_the_deepest_nesting_comes_back():
    value = 1
    for _ in range(MAX_DEPTH):
        value = (value,)
    assert same(through_json(value), value)


@pytest.mark.parametrize(
    "encoded",
    [
        {"$call": "os.system"},
        {"$tuple": [1], "x": 2},
        {"$numpy": ["O", [], "AAAA"]},
        {"$ndarray": ["V8", [], "AAAA"]},
        {"$ndarray": ["<f4", [100000000000], "AAAA"]},
        {"$tensor": ["load", [], ""]},
        {"$tensor": ["float32", [1000000], ""]},
        {"$torch.dtype": "nn"},
        {"$bytes": "not base64!"},
        {"$int": 5},
        {"$float": "00"},
    ],
    ids=repr,
)
def test_tags_that_were_never_written_are_refused(encoded):
    with pytest.raises((RecordFileError, ValueError, TypeError, RuntimeError, struct.error)):
        decode(encoded)


def test_infinities():
    assert through_json([math.inf, -math.inf]) == [math.inf, -math.inf]
