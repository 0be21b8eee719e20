"""Five ways to lay named arrays out in a file, each a function that writes and one that opens.

`FORMATS` lists them. A writer is given what the arrays are, then their values, piece by piece; an
opener gives a function that finds an array by name. What the arrays mean, checksums and paths are
`array_files`' business.

- *safetensors*, the one to recommend: `safetensors.torch.load_file` and other languages read it.
- *npz*: `numpy.load` reads it; bfloat16 and float8 are unsigned integers there (their bits).
- *pt*: ``torch.load(weights_only=True)`` reads it. All arrays are in memory while it is written.
- *pickle*: ``pickle.load`` gives a dict of bytes; here a parser of five opcodes reads it.
- *json*: the header alone.

No opener runs code: there is no unpickler but torch's restricted one, behind a list of what may
occur. Lengths are held against the size of the file before anything is allocated. A file that is
not what it should be raises: as a rule a RecordFileError with a reason, for hostile bytes anything.
"""

from __future__ import annotations

import json
import math
import pickle
import pickletools
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, BinaryIO, NamedTuple

import torch
from torch import Tensor

from forward_pass import RecordFileError

HEADER, CHECKSUMS = "header", "crc32"
"""Names of the first and the last array of every file: JSON as bytes, and one number per array."""

DTYPES = {
    "float64": ("F64", "<f8"),
    "float32": ("F32", "<f4"),
    "float16": ("F16", "<f2"),
    "bfloat16": ("BF16", "<u2"),
    "float8_e4m3fn": ("F8_E4M3", "|u1"),
    "float8_e5m2": ("F8_E5M2", "|u1"),
    "float8_e4m3fnuz": ("F8_E4M3FNUZ", "|u1"),
    "float8_e5m2fnuz": ("F8_E5M2FNUZ", "|u1"),
    "float8_e8m0fnu": ("F8_E8M0", "|u1"),
    "int64": ("I64", "<i8"),
    "int32": ("I32", "<i4"),
    "int16": ("I16", "<i2"),
    "int8": ("I8", "|i1"),
    "uint64": ("U64", "<u8"),
    "uint32": ("U32", "<u4"),
    "uint16": ("U16", "<u2"),
    "uint8": ("U8", "|u1"),
    "bool": ("BOOL", "|b1"),
}
"""What can be stored: torch's name, safetensors' name, NumPy's (of the bits, if it has no such)."""


class ArraySpec(NamedTuple):
    """What an array is: its dtype by torch's name, and its shape."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype itself."""
        dtype: torch.dtype = getattr(torch, self.dtype)
        return dtype

    @property
    def nbytes(self) -> int:
        """Size of the values."""
        return math.prod(self.shape) * self.torch_dtype.itemsize


class Extent(NamedTuple):
    """Where the values of an array lie in a file."""

    nbytes: int
    """Size of the values."""
    read: Callable[[int, int], Tensor]
    """Bytes from one place to another, ``[byte]`` uint8, in memory of their own."""


Values = Iterator[tuple[str, Iterator[Tensor]]]
"""Each array by name and in pieces: contiguous tensors on the CPU, made when their turn comes."""

Find = Callable[[str, ArraySpec | None], Extent]
"""Finds an array by name; an error where the file says something else of it than the spec."""


def memory(tensor: Tensor) -> memoryview:
    """The bytes of a contiguous tensor on the CPU, not copied."""
    return tensor.reshape(-1).view(torch.uint8).numpy().data


def dump_json(value: Any) -> bytes:
    """JSON as bytes, the same for equal values."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False).encode()


def detect_format(file: BinaryIO, size: int) -> str:
    """The format, by its first bytes.

    Raises:
        RecordFileError: it is none of them.
    """
    start = file.read(16)
    if not start:
        raise RecordFileError("it is empty")
    if start[8:9] == b"{" and int.from_bytes(start[:8], "little") <= size - 8:
        return "safetensors"
    if start[:4] == b"PK\x03\x04":
        return "npz" if f"{HEADER}.npy" in _zip_members(file, size) else "pt"
    if start[:1] == b"\x80":
        return "pickle"
    if start[:1] == b"{":
        return "json"
    raise RecordFileError(f"it is none of {', '.join(FORMATS)}: it begins with {start!r}")


def _part(file: BinaryIO, start: int, nbytes: int) -> Extent:
    """A part of the file, which is known to be there."""

    def _read(begin: int, end: int) -> Tensor:
        data = torch.empty(end - begin, dtype=torch.uint8, device="cpu")
        file.seek(start + begin)
        if file.readinto(memory(data)) != end - begin:  # type: ignore[attr-defined]
            raise RecordFileError("it is truncated")
        return data

    return Extent(nbytes, _read)


def _whole(tensor: Tensor) -> Extent:
    """A tensor that is in memory already."""
    data = tensor.contiguous().reshape(-1).view(torch.uint8)
    return Extent(len(data), lambda begin, end: data[begin:end].clone())


def _entry(index: Mapping[str, Any], name: str) -> Any:
    if name not in index:
        raise RecordFileError(f"the array {name!r} is missing; it holds {list(index)[:5]}")
    return index[name]


def _agree(name: str, expected: Any, found: Any) -> None:
    if expected != found:
        raise RecordFileError(f"the array {name!r} should be {expected}, and is {found}")


# --- safetensors ----------------------------------------------------------------------------------


def _write_safetensors(file: BinaryIO, specs: dict[str, ArraySpec], values: Values) -> None:
    table: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, spec in specs.items():
        start, end = end, end + spec.nbytes
        dtype = DTYPES[spec.dtype][0]
        table[name] = {"dtype": dtype, "shape": spec.shape, "data_offsets": [start, end]}
    text = dump_json(table)
    text += b" " * (-len(text) % 8)
    file.write(struct.pack("<Q", len(text)) + text)
    for _, pieces in values:
        for piece in pieces:
            file.write(memory(piece))


def _open_safetensors(file: BinaryIO, size: int) -> Find:
    base = 8 + int.from_bytes(file.read(8), "little")
    table = json.loads(file.read(base - 8))

    def _find(name: str, spec: ArraySpec | None) -> Extent:
        entry = _entry(table, name)
        start, end = entry["data_offsets"]
        if not (type(start) is type(end) is int and 0 <= start <= end <= size - base):
            raise RecordFileError(f"it is truncated or damaged: {name!r} lies at {start} to {end}")
        if spec is not None:
            expected = (DTYPES[spec.dtype][0], list(spec.shape), spec.nbytes)
            _agree(name, expected, (entry["dtype"], entry["shape"], end - start))
        return _part(file, base + start, end - start)

    return _find


# --- npz ------------------------------------------------------------------------------------------


def _npy_text(spec: ArraySpec) -> bytes:
    """What a .npy file says of its values, without the padding."""
    descr = DTYPES[spec.dtype][1]
    return f"{{'descr': {descr!r}, 'fortran_order': False, 'shape': {spec.shape}, }}".encode()


def _npy_start(spec: ArraySpec) -> bytes:
    """All that stands before the values in a .npy file (format 1.0): a multiple of 64 bytes."""
    text = _npy_text(spec)
    text += b" " * (-(len(text) + 11) % 64) + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text


def _write_npz(file: BinaryIO, specs: dict[str, ArraySpec], values: Values) -> None:
    with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        for name, pieces in values:
            start = _npy_start(specs[name])
            member = zipfile.ZipInfo(f"{name}.npy")  # dated 1980: the same bytes every time
            member.file_size = len(start) + specs[name].nbytes
            with archive.open(member, "w") as stream:
                stream.write(start)
                for piece in pieces:
                    stream.write(memory(piece))


def _zip_members(file: BinaryIO, size: int) -> dict[str, tuple[int, int]]:
    """Start and length of every member; all are uncompressed, and no two can share their bytes.

    Raises:
        RecordFileError: compressed, encrypted, or larger than the file (a zip bomb).
    """
    found = {}
    try:
        archive = zipfile.ZipFile(file)
    except zipfile.BadZipFile as error:
        raise RecordFileError(f"it is truncated or damaged: {error}") from error
    with archive:
        for member in archive.infolist():
            stored = member.compress_type == zipfile.ZIP_STORED and not member.flag_bits & 1
            if not stored or member.file_size != member.compress_size:
                raise RecordFileError(f"its member {member.filename!r} is compressed or encrypted")
            file.seek(member.header_offset)
            before = struct.unpack("<26xHH", file.read(30))
            start = member.header_offset + 30 + sum(before)
            found[member.filename] = (start, member.file_size)
    if any(start + length > size for start, length in found.values()):
        raise RecordFileError("it is truncated: a member of it ends after the file")
    if sum(length for _, length in found.values()) > size:
        raise RecordFileError("its members declare more bytes than the file has")
    return found


def _open_npz(file: BinaryIO, size: int) -> Find:
    index = _zip_members(file, size)

    def _find(name: str, spec: ArraySpec | None) -> Extent:
        start, length = _entry(index, f"{name}.npy")
        file.seek(start)
        text = file.read(struct.unpack("<8xH", file.read(10))[0])
        nbytes = length - 10 - len(text)
        if spec is not None:
            _agree(name, (_npy_text(spec), spec.nbytes), (text.strip(), nbytes))
        return _part(file, start + 10 + len(text), nbytes)

    return _find


# --- pt -------------------------------------------------------------------------------------------


def _write_pt(file: BinaryIO, specs: dict[str, ArraySpec], values: Values) -> None:
    tensors: dict[str, Tensor] = {}
    seen = set()  # torch would store all of a storage, and refuses one that is seen as two dtypes
    for name, pieces in values:
        parts = list(pieces)
        block = parts[0] if len(parts) == 1 else torch.cat(parts)
        storage = block.untyped_storage()
        own = storage.nbytes() == specs[name].nbytes and storage.data_ptr() not in seen
        tensors[name] = block if own else block.clone()
        seen.add(storage.data_ptr())
    try:
        torch.save(tensors, file)
    except RuntimeError as error:  # torch hides what the file raised
        raise error.__context__ or error from None


_PT_GLOBALS = {
    "collections OrderedDict",
    "torch._utils _rebuild_tensor_v2",
    "torch._utils _rebuild_tensor_v3",
    "torch.storage UntypedStorage",
    *(f"torch {name}" for name in DTYPES),
    *(f"torch {name}Storage" for name in ("Double", "Float", "Half", "BFloat16", "Bool")),
    *(f"torch {name}Storage" for name in ("Long", "Int", "Short", "Char", "Byte", "Untyped")),
}
"""All that torch's own unpickler may look up: it would allow more, such as a giant bytearray."""


def _open_pt(file: BinaryIO, size: int) -> Find:
    members = _zip_members(file, size)
    pickles = [name for name in members if name.endswith("/data.pkl")]
    if len(pickles) != 1:
        raise RecordFileError(f"it is a zip file of something else: {list(members)[:5]}")
    file.seek(members[pickles[0]][0])
    program = file.read(members[pickles[0]][1])
    for opcode, argument, _ in pickletools.genops(program):
        loads = "GLOBAL" in opcode.name or opcode.name in ("INST", "EXT1", "EXT2", "EXT4")
        if loads and (opcode.name != "GLOBAL" or argument not in _PT_GLOBALS):
            raise RecordFileError(f"it would load {argument or opcode.name!r}: that is refused")
        if opcode.name == "PROTO" and int(argument or 0) > pickle.HIGHEST_PROTOCOL:
            raise RecordFileError(f"it is damaged: there is no pickle protocol {argument}")
    file.seek(0)
    tensors = torch.load(file, map_location="cpu", weights_only=True)
    if type(tensors) is not dict or any(type(t) is not Tensor for t in tensors.values()):
        raise RecordFileError("it holds something other than a dict of tensors")

    def _find(name: str, spec: ArraySpec | None) -> Extent:
        tensor = _entry(tensors, name)
        if spec is not None:
            _agree(name, (spec.torch_dtype, spec.shape), (tensor.dtype, tuple(tensor.shape)))
        if tensor.nbytes > size:
            raise RecordFileError(f"the array {name!r} declares more bytes than the file has")
        del tensors[name]
        return _whole(tensor)

    return _find


# --- pickle ---------------------------------------------------------------------------------------

_PICKLE_START, _TEXT, _BYTES, _PICKLE_END = b"\x80\x04}(", b"X", b"\x8e", b"u."
"""PROTO 4, EMPTY_DICT, MARK; then BINUNICODE and BINBYTES8 by turns; then SETITEMS, STOP."""


def _write_pickle(file: BinaryIO, specs: dict[str, ArraySpec], values: Values) -> None:
    file.write(_PICKLE_START)
    for name, pieces in values:
        text = name.encode()
        file.write(_TEXT + struct.pack("<I", len(text)) + text)
        file.write(_BYTES + struct.pack("<Q", specs[name].nbytes))
        for piece in pieces:
            file.write(memory(piece))
    file.write(_PICKLE_END)


def _open_pickle(file: BinaryIO, size: int) -> Find:
    index = {}
    if file.read(4) != _PICKLE_START:
        raise RecordFileError(
            "it is a pickle of something else: only the plain form that this toolkit writes is "
            "read, because loading any other pickle can run code"
        )
    while (opcode := file.read(1)) == _TEXT:
        (length,) = struct.unpack("<I", file.read(4))
        name = file.read(min(length, size)).decode()
        opcode, nbytes = file.read(1), struct.unpack("<Q", file.read(8))[0]
        start = file.tell()
        if opcode != _BYTES or start + nbytes > size:
            raise RecordFileError(f"it is truncated or damaged: {name!r} should be bytes")
        index[name] = (start, nbytes)
        file.seek(start + nbytes)
    if opcode + file.read(2) != _PICKLE_END:
        raise RecordFileError("it is truncated or damaged: what follows the arrays is no end")

    def _find(name: str, spec: ArraySpec | None) -> Extent:
        start, nbytes = _entry(index, name)
        if spec is not None:
            _agree(name, f"{spec.nbytes} bytes", f"{nbytes} bytes")
        return _part(file, start, nbytes)

    return _find


# --- json -----------------------------------------------------------------------------------------


def _write_json(file: BinaryIO, _: dict[str, ArraySpec], values: Values) -> None:
    text = b"".join(bytes(memory(piece)) for piece in next(values)[1])
    document = {**json.loads(text), CHECKSUMS: zlib.crc32(text)}
    indent = 1 if len(text) < 1_000_000 else None
    file.write(json.dumps(document, ensure_ascii=False, indent=indent).encode())


def _open_json(file: BinaryIO, size: int) -> Find:
    document = json.loads(file.read(size))
    checksum = torch.tensor([document.pop(CHECKSUMS)], device="cpu")
    text = torch.frombuffer(bytearray(dump_json(document)), dtype=torch.uint8)
    arrays = {HEADER: text, CHECKSUMS: checksum}
    return lambda name, _: _whole(arrays[name])


class Format(NamedTuple):
    """How a format is written and opened."""

    write: Callable[[BinaryIO, dict[str, ArraySpec], Values], None]
    open: Callable[[BinaryIO, int], Find]


FORMATS = {
    "json": Format(_write_json, _open_json),
    "pickle": Format(_write_pickle, _open_pickle),
    "pt": Format(_write_pt, _open_pt),
    "npz": Format(_write_npz, _open_npz),
    "safetensors": Format(_write_safetensors, _open_safetensors),
}
