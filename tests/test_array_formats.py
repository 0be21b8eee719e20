"""The five formats: read by the programs they are named after, and harmless whatever they hold."""

import copyreg
import functools
import io
import json
import os
import pickle
import struct
import zipfile
import zlib

import numpy as np
import pytest
import safetensors.torch
import torch

from array_files import open_arrays, write_arrays
from array_formats import CHECKSUMS, DTYPES, FORMATS, HEADER, ArraySpec, dump_json
from forward_pass import RecordFileError

WITH_VALUES = [name for name in FORMATS if name != "json"]
BITS = {"bfloat16": torch.uint16, **{name: torch.uint8 for name in DTYPES if "float8" in name}}


def samples():
    """One array of every dtype, a scalar, and one without values."""
    bits = torch.arange(64, dtype=torch.uint8).reshape(2, 32)
    arrays = {f"of/{name}": bits.view(getattr(torch, name)) for name in DTYPES if name != "bool"}
    arrays["of/bool"] = torch.tensor([[True, False]])
    return arrays | {"scalar": torch.tensor(1.5), "empty": torch.zeros(3, 0, 2)}


def read(path):
    with open_arrays(path, "test", 1) as stored:
        return {name: stored.read(name) for name in stored.specs}


def bits_of(tensor):
    return tensor.reshape(-1).view(torch.uint8).tolist()


def forge(path, format, header, arrays=None, sums=None):
    """A file with any header, and checksums that are right."""
    arrays = arrays or {}
    text = dump_json(header)
    blocks = {HEADER: torch.frombuffer(bytearray(text), dtype=torch.uint8), **arrays}
    sums = (
        sums
        if sums is not None
        else [zlib.crc32(bytes(bits_of(block))) for block in blocks.values()]
    )
    blocks[CHECKSUMS] = torch.tensor(sums)
    specs = {
        name: ArraySpec(str(block.dtype).removeprefix("torch."), tuple(block.shape))
        for name, block in blocks.items()
    }
    with path.open("wb") as file:
        FORMATS[format].write(
            file, specs, ((name, iter([block])) for name, block in blocks.items())
        )


def header_of(arrays, **changes):
    return {
        "kind": "test",
        "schema_version": 1,
        "byte_order": "little",
        "libraries": {},
        "arrays": arrays,
        "content": None,
    } | changes


# --- Other programs -------------------------------------------------------------------------------


@pytest.mark.parametrize("format", WITH_VALUES)
def test_every_dtype_comes_back_bit_by_bit(tmp_path, format):
    write_arrays(tmp_path / "x", format, "test", 1, None, samples())
    found = read(tmp_path / "x")
    assert list(found) == list(samples())
    for name, expected in samples().items():
        assert found[name].dtype == expected.dtype
        assert found[name].shape == expected.shape
        assert bits_of(found[name]) == bits_of(expected)


def test_safetensors_reads_safetensors(tmp_path):
    write_arrays(tmp_path / "x", "safetensors", "test", 1, {"é": 1}, samples())
    with safetensors.safe_open(tmp_path / "x", "pt") as file:
        assert file.metadata() == {"format": "pt"}
        for name, expected in samples().items():
            found = file.get_tensor(name)
            assert (found.dtype, found.shape) == (expected.dtype, expected.shape)
            assert bits_of(found) == bits_of(expected)
        header = json.loads(bytes(file.get_tensor(HEADER).tolist()))
    assert header["content"] == {"é": 1}


def test_numpy_reads_npz(tmp_path):
    write_arrays(tmp_path / "x", "npz", "test", 1, None, samples())
    with np.load(tmp_path / "x", allow_pickle=False) as file:
        for name, expected in samples().items():
            natural = expected.view(BITS.get(name.removeprefix("of/"), expected.dtype))
            np.testing.assert_array_equal(file[name], natural.numpy(), strict=True)


def test_torch_reads_pt(tmp_path):
    write_arrays(tmp_path / "x", "pt", "test", 1, None, samples())
    found = torch.load(tmp_path / "x", weights_only=True)
    for name, expected in samples().items():
        assert found[name].dtype == expected.dtype
        assert bits_of(found[name]) == bits_of(expected)


def test_pickle_reads_pickle(tmp_path):
    write_arrays(tmp_path / "x", "pickle", "test", 1, None, samples())
    with (tmp_path / "x").open("rb") as file:
        found = pickle.load(file)
    assert list(found) == [HEADER, *samples(), CHECKSUMS]
    assert all(list(found[name]) == bits_of(tensor) for name, tensor in samples().items())
    assert json.loads(found[HEADER])["kind"] == "test"


@pytest.mark.parametrize("format", ["safetensors", "npz"])
def test_what_other_programs_copied_is_read(tmp_path, format):
    write_arrays(tmp_path / "x", format, "test", 1, None, {"a": torch.arange(3.0)})
    if format == "npz":
        with np.load(tmp_path / "x") as file:
            np.savez(tmp_path / "y.npz", **file)
    else:
        safetensors.torch.save_file(safetensors.torch.load_file(tmp_path / "x"), tmp_path / "y.npz")
    assert read(tmp_path / "y.npz")["a"].tolist() == [0, 1, 2]


@pytest.mark.parametrize("format", FORMATS)
def test_the_content_decides_not_the_suffix(tmp_path, format):
    for name in ("x.npz", "x.pkl", "x.pt", "x.safetensors", "x.json", "x"):
        write_arrays(tmp_path / name, format, "test", 1, None, {"a": torch.arange(3.0)})
        assert read(tmp_path / name)["a"].shape == (3,)


# --- Hostile pickles ------------------------------------------------------------------------------


class _Reduces:
    """Pickled as a call of ``os.system``."""

    def __init__(self, command):
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


class _HasState:
    """Pickled with a state that is handed to ``__setstate__`` (BUILD)."""

    def __init__(self, command):
        self.command = command

    def __setstate__(self, state):
        os.system(state["command"])


def instances(command):
    """Opcodes that call something, as protocols 0 and 1 spelled them, and a later extension."""
    quoted = repr(command).encode()
    text = command.encode()
    return {
        "inst": b"(S" + quoted + b"\nios\nsystem\n.",
        "obj": b"(cos\nsystem\nS" + quoted + b"\no.",
        "reduce": b"cos\nsystem\n(S" + quoted + b"\ntR.",
        "newobj": b"\x80\x02csubprocess\nPopen\n(X"
        + struct.pack("<I", len(text))
        + text
        + b"t\x81.",
        "newobj_ex": b"\x80\x04csubprocess\nPopen\n(X"
        + struct.pack("<I", len(text))
        + text
        + b"t}(X\x05\x00\x00\x00shell\x88u\x92.",
        "stack_global": b"\x80\x04\x8c\x02os\x8c\x06system\x93X"
        + struct.pack("<I", len(text))
        + text
        + b"\x85R.",
        "ext": b"\x80\x02\x82\xf0X" + struct.pack("<I", len(text)) + text + b"\x85R.",
    }


def hostile_pickles(command):
    found = instances(command)
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        found[f"reduce {protocol}"] = pickle.dumps(_Reduces(command), protocol)
        found[f"build {protocol}"] = pickle.dumps(_HasState(command), protocol)
        nested = {"header": b"{}", "a": [({1: _Reduces(command)},)]}
        found[f"nested {protocol}"] = pickle.dumps(nested, protocol)
        call = functools.partial(os.system, command)
        found[f"partial {protocol}"] = pickle.dumps(call, protocol)
    return found


@pytest.fixture
def canary(tmp_path):
    """A command that leaves a file behind, and the file."""
    copyreg.add_extension("os", "system", 0xF0)
    yield f"touch {tmp_path / 'canary'}", tmp_path / "canary"
    copyreg.remove_extension("os", "system", 0xF0)


def test_the_hostile_pickles_are_hostile(canary):
    """Or else the next tests would show nothing."""
    command, file = canary
    for name, data in hostile_pickles(command).items():
        if name.startswith("newobj"):
            continue  # makes any object, but calls no __init__
        result = pickle.loads(data)
        if name.startswith("partial"):
            result()
        assert file.exists(), name
        file.unlink()


def test_hostile_pickles_do_nothing(tmp_path, canary):
    command, file = canary
    own = tmp_path / "own"
    write_arrays(own, "pickle", "test", 1, None, {"a": torch.arange(3.0)})
    for name, data in hostile_pickles(command).items():
        body = data[2:] if data[:1] == b"\x80" else data
        variants = {
            "bare": data,
            "after the start": b"\x80\x04}(" + body,
            "after the arrays": own.read_bytes()[:-2] + body,
            "after the end": own.read_bytes() + data,
            "as a value": b"\x80\x04}(X\x06\x00\x00\x00header" + body[:-1] + b"u.",
        }
        for variant in variants.values():
            (tmp_path / "x").write_bytes(variant)
            with pytest.raises(RecordFileError):
                read(tmp_path / "x")
            assert not file.exists(), name


def torch_file(program, storages=()):
    """A .pt file around any pickle program."""
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        archive.writestr("archive/data.pkl", program)
        archive.writestr("archive/byteorder", "little")
        archive.writestr("archive/version", "3\n")
        for i, data in enumerate(storages):
            archive.writestr(f"archive/data/{i}", data)
    return stream.getvalue()


def test_hostile_pt_files_do_nothing(tmp_path, canary):
    command, file = canary
    for name, data in hostile_pickles(command).items():
        saved = io.BytesIO()
        torch.save({"a": torch.zeros(1), "b": _Reduces(command)}, saved)
        for variant in (torch_file(data), saved.getvalue()):
            (tmp_path / "x").write_bytes(variant)
            with pytest.raises(RecordFileError, match=r"it would load|cannot be read"):
                read(tmp_path / "x")
            assert not file.exists(), name


@pytest.mark.parametrize(
    "value",
    [
        [torch.zeros(1)],
        {"a": 1},
        {"a": torch.nn.Parameter(torch.zeros(1))},
        {"a": torch.zeros(2, 2).to_sparse()},
        torch.zeros(1),
        {1: torch.zeros(1)},
        {},
    ],
    ids=repr,
)
def test_other_pt_files(tmp_path, value):
    torch.save(value, tmp_path / "x")
    with pytest.raises(RecordFileError):
        read(tmp_path / "x")


def test_a_giant_bytearray_in_a_pt_file_is_not_made(tmp_path):
    program = b"\x80\x02cbuiltins\nbytearray\n\x8a\x06" + (10**13).to_bytes(6, "little") + b"\x85R."
    (tmp_path / "x").write_bytes(torch_file(program))
    with pytest.raises(RecordFileError, match="it would load 'builtins bytearray'"):
        read(tmp_path / "x")


def test_a_pt_tensor_that_repeats_one_number_is_not_unfolded(tmp_path):
    """A view with stride 0 is small in the file and would be giant in memory."""
    text = json.dumps(header_of({"a": {"dtype": "float32", "shape": [10**11]}})).encode()
    header = torch.frombuffer(bytearray(text), dtype=torch.uint8)
    sums = torch.tensor([zlib.crc32(text), 0])
    wide = torch.zeros(1).expand(10**11)
    torch.save({HEADER: header, "a": wide, CHECKSUMS: sums}, tmp_path / "x")
    with pytest.raises(RecordFileError, match="declares more than the file holds"):
        read(tmp_path / "x")
    torch.save(
        {HEADER: torch.zeros(1, dtype=torch.uint8).expand(10**11), CHECKSUMS: sums}, tmp_path / "x"
    )
    with pytest.raises(RecordFileError, match="declares more bytes than the file has"):
        read(tmp_path / "x")


def test_object_arrays_in_npz_do_nothing(tmp_path, canary):
    command, file = canary
    np.savez(tmp_path / "x.npz", header=np.array([_Reduces(command)]), crc32=np.zeros(1, np.int64))
    with pytest.raises(RecordFileError):
        read(tmp_path / "x.npz")
    assert not file.exists()


# --- Bombs and lies -------------------------------------------------------------------------------


@pytest.mark.parametrize("format", WITH_VALUES)
@pytest.mark.parametrize(
    "arrays",
    [
        {"a": {"dtype": "float32", "shape": [10**12]}},
        {"a": {"dtype": "float32", "shape": [2**62, 2**62]}},
        {"a": {"dtype": "float32", "shape": [0, 2**70]}},
        {"a": {"dtype": "float32", "shape": [-3]}},
        {"a": {"dtype": "float32", "shape": [3.0]}},
        {"a": {"dtype": "float32", "shape": [True]}},
        {"a": {"dtype": "float32", "shape": 3}},
        {"a": {"dtype": "complex64", "shape": [3]}},
        {"a": {"dtype": "load", "shape": [3]}},
        {"a": {"dtype": ["float32"], "shape": [3]}},
        {"a": {"shape": [3]}},
        {"a": {"dtype": "float16", "shape": [3]}},
        {"a": {"dtype": "float32", "shape": [4]}},
        {"a": {"dtype": "int32", "shape": [2]}},
        {"b": {"dtype": "float32", "shape": [3]}},
        {"header": {"dtype": "float32", "shape": [3]}},
        ["a"],
        None,
    ],
    ids=str,
)
def test_a_header_that_lies_about_the_arrays(tmp_path, format, arrays):
    forge(tmp_path / "x", format, header_of(arrays), {"a": torch.arange(3.0)})
    with pytest.raises(RecordFileError):
        read(tmp_path / "x")


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize(
    "changes",
    [
        {"schema_version": "1"},
        {"schema_version": True},
        {"schema_version": 0},
        {"schema_version": None},
        {"kind": ["test"]},
        {"byte_order": "big"},
    ],
    ids=str,
)
def test_a_header_with_wrong_fields(tmp_path, format, changes):
    forge(tmp_path / "x", format, header_of({}, **changes))
    with pytest.raises(RecordFileError):
        read(tmp_path / "x")


@pytest.mark.parametrize("format", FORMATS)
def test_the_forgery_would_be_read_if_it_were_right(tmp_path, format):
    """Or else the two tests above would show nothing."""
    header = header_of({"a": {"dtype": "float32", "shape": [3]}})
    forge(tmp_path / "x", format, header, {"a": torch.arange(3.0)})
    assert read(tmp_path / "x")["a"].shape == (3,)


@pytest.mark.parametrize("format", WITH_VALUES)
@pytest.mark.parametrize("sums", [[], [1], [1, 2, 3]])
def test_checksums_that_do_not_fit(tmp_path, format, sums):
    header = header_of({"a": {"dtype": "float32", "shape": [3]}})
    forge(tmp_path / "x", format, header, {"a": torch.arange(3.0)}, sums)
    if sums:
        sums[0] = zlib.crc32(dump_json(header))
        forge(tmp_path / "x", format, header, {"a": torch.arange(3.0)}, sums)
    with pytest.raises(RecordFileError):
        read(tmp_path / "x")


@pytest.mark.parametrize("missing", [HEADER, CHECKSUMS])
def test_a_missing_part(tmp_path, missing):
    parts = {
        HEADER: torch.zeros(3, dtype=torch.uint8),
        CHECKSUMS: torch.zeros(1, dtype=torch.int64),
    }
    del parts[missing]
    safetensors.torch.save_file(parts, tmp_path / "x")
    with pytest.raises(RecordFileError, match=f"the array '{missing}' is missing"):
        read(tmp_path / "x")


def test_a_pickle_that_declares_more_than_it_has(tmp_path):
    for length in (2**31, 2**62, 2**64 - 1):
        data = b"\x80\x04}(X\x06\x00\x00\x00header\x8e" + struct.pack("<Q", length) + b"abc"
        (tmp_path / "x").write_bytes(data)
        with pytest.raises(RecordFileError, match="truncated"):
            read(tmp_path / "x")
    (tmp_path / "x").write_bytes(b"\x80\x04}(X\xff\xff\xff\xff" + b"a" * 20)
    with pytest.raises(RecordFileError):
        read(tmp_path / "x")


@pytest.mark.parametrize(
    "offsets", [[0, 10**15], [-8, 3], [3, 0], [0.0, 3.0], ["0", "3"], [True, 3], []]
)
def test_safetensors_offsets_outside_of_the_file(tmp_path, offsets):
    table = {
        name: {"dtype": "U8", "shape": [3], "data_offsets": offsets} for name in (HEADER, CHECKSUMS)
    }
    text = json.dumps(table).encode()
    (tmp_path / "x").write_bytes(struct.pack("<Q", len(text)) + text + bytes(64))
    with pytest.raises(RecordFileError):
        read(tmp_path / "x")


def test_zip_bombs(tmp_path):
    for name in ("header.npy", "archive/data.pkl"):
        with zipfile.ZipFile(tmp_path / "x", "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr(name, bytes(10_000_000))
        assert (tmp_path / "x").stat().st_size < 20_000
        with pytest.raises(RecordFileError, match="compressed or encrypted"):
            read(tmp_path / "x")


def test_zip_members_that_overlap(tmp_path):
    """A thousand names for the same bytes."""
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        archive.writestr("header.npy", bytes(10_000))
        first = archive.filelist[0]
        for i in range(1000):
            twin = zipfile.ZipInfo(f"{i}.npy")
            twin.CRC, twin.file_size, twin.compress_size = first.CRC, 10_000, 10_000
            twin.header_offset = first.header_offset
            archive.filelist.append(twin)
    (tmp_path / "x").write_bytes(stream.getvalue())
    with pytest.raises(RecordFileError, match="more bytes than the file has"):
        read(tmp_path / "x")


@pytest.mark.parametrize(
    "document", ["[" * 100_000, '{"a":' * 100_000, "{" + " " * 1000, '{"a": NaN}']
)
def test_json_that_is_too_deep_or_broken(tmp_path, document):
    (tmp_path / "x").write_text(document)
    with pytest.raises(RecordFileError):
        read(tmp_path / "x")
    forge(tmp_path / "y", "safetensors", None)
    data = (tmp_path / "y").read_bytes()
    assert b"null" in data
    with pytest.raises(RecordFileError, match="its header says 'NoneType'"):
        read(tmp_path / "y")
