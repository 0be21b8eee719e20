"""Python values as JSON and back, exactly: what JSON knows stays as it is, the rest carries a tag.

- ``encode(value, where)``: ``(1, 2)`` becomes ``{"$tuple": [1, 2]}``; an unknown type is an error.
- ``decode(encoded)``: the value again, of the same type, equal to the bit.

Plain: None, booleans, strings, integers of 64 bits, finite floats, lists, dicts with string keys.
Tagged: what JSON would change without a word (tuples, sets, bytes, NaN and infinity, complex
numbers, longer integers, lone surrogates, dicts with other keys, paths, NumPy scalars and arrays,
tensors and their dtypes, devices and sizes). Subclasses of these types are refused: they would come
back as the base class. Tensors come back on the CPU and detached. Nothing here can run code: a tag
that is not in the table is an error.
"""

from __future__ import annotations

import base64
import json
import math
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from forward_pass import RecordFileError

MAX_DEPTH = 64
"""Levels of nesting; a list that contains itself ends here."""

_NUMPY_KINDS = "biufcSUmM"
"""Kinds of NumPy dtypes whose bytes are the value (not objects, not records)."""


def encode(value: Any, where: str = "value", depth: int = 0) -> Any:
    """A value as something that `json.dumps` writes without loss.

    Args:
        value: What to encode.
        where: What it is called in an error, such as ``metadata['seed']``.
        depth: Levels of nesting above it.

    Raises:
        RecordFileError: the value, or one inside it, has no exact form; the message says which.
    """
    if depth > MAX_DEPTH:
        raise RecordFileError(f"{where[:80]}… is nested over {MAX_DEPTH} levels deep, or in itself")
    kind = type(value)
    if _is_plain(value, kind):
        return value
    if kind is list:
        return [encode(item, f"{where}[{i}]", depth + 1) for i, item in enumerate(value)]
    if kind is dict and all(map(_is_plain_key, value)):
        return {k: encode(item, f"{where}[{k!r}]", depth + 1) for k, item in value.items()}
    for codec in _CODECS.values():
        if kind is codec.kind or (codec.kind is np.generic and isinstance(value, np.generic)):
            return {codec.tag: codec.encode(value, where, depth + 1)}
    raise RecordFileError(
        f"{where} is a {kind.__module__}.{kind.__qualname__}, which has no exact form in a file; "
        f"convert it (for example with str(...), float(...) or dict(...)), or leave it out"
    )


def _is_plain_key(key: Any) -> bool:
    """Whether a dict with this key can be a JSON object that is no tag."""
    return type(key) is str and key[:1] != "$" and _is_plain(key, str)


def _is_plain(value: Any, kind: type) -> bool:
    """Whether JSON gives back exactly this."""
    if kind is str:
        return value.isascii() or not any("\ud800" <= c <= "\udfff" for c in value)
    if kind is int:
        return -(2**63) <= value < 2**63
    return value is None or kind is bool or (kind is float and math.isfinite(value))


def decode(encoded: Any) -> Any:
    """The value that was encoded; a new object at every call.

    Raises:
        RecordFileError: an unknown tag, or a tag whose content does not fit it.
    """
    if type(encoded) is list:
        return [decode(item) for item in encoded]
    if type(encoded) is not dict:
        return encoded
    tag = next(iter(encoded), "")
    if tag[:1] != "$":
        return {key: decode(item) for key, item in encoded.items()}
    if tag not in _CODECS or len(encoded) != 1:
        raise RecordFileError(
            f"a value is tagged {list(encoded)}, which this version does not know"
        )
    return _CODECS[tag].decode(encoded[tag])


# --- The table of tags ----------------------------------------------------------------------------


class _Codec(NamedTuple):
    """How one type is written: ``encode(value, where, depth)`` under ``tag``, and ``decode``."""

    tag: str
    kind: type
    encode: Callable[[Any, str, int], Any]
    decode: Callable[[Any], Any]


def _items(values: Any, where: str, depth: int) -> list[Any]:
    return [encode(item, f"{where}[{i}]", depth) for i, item in enumerate(values)]


def _sorted_items(values: Any, where: str, depth: int) -> list[Any]:
    """Of a set, in an order that is the same in every process."""
    return sorted((encode(item, where, depth) for item in values), key=json.dumps)


def _pairs(values: dict[Any, Any], where: str, depth: int) -> list[Any]:
    keys = [encode(key, f"a key of {where}", depth) for key in values]
    items = [encode(item, f"{where}[{key!r}]", depth) for key, item in values.items()]
    return [list(pair) for pair in zip(keys, items, strict=True)]


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode("ascii")


def _unbase64(text: str) -> bytes:
    return base64.b64decode(text, validate=True)


def _array(value: Any, where: str, _: int) -> list[Any]:
    dtype = np.asarray(value).dtype
    if dtype.kind not in _NUMPY_KINDS:
        raise RecordFileError(f"{where} has the NumPy dtype {dtype}, which has no exact form")
    return [dtype.str, list(np.shape(value)), _base64(np.asarray(value).tobytes())]


def _unarray(parts: Any) -> np.ndarray:
    dtype = np.dtype(str(parts[0]))
    if dtype.kind not in _NUMPY_KINDS or dtype.str != parts[0]:
        raise RecordFileError(f"a value is said to have the NumPy dtype {parts[0]!r}")
    if dtype.itemsize == 0:
        return np.empty(parts[1], dtype)
    return np.frombuffer(bytearray(_unbase64(parts[2])), dtype).reshape(parts[1])


def _tensor(value: torch.Tensor, where: str, _: int) -> list[Any]:
    try:
        data = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    except (RuntimeError, TypeError, NotImplementedError) as error:
        raise RecordFileError(f"{where} is a tensor that has no plain bytes: {error}") from error
    return [_dtype_name(value.dtype), list(value.shape), _base64(data.numpy().tobytes())]


def _untensor(parts: Any) -> torch.Tensor:
    data = torch.from_numpy(np.frombuffer(bytearray(_unbase64(parts[2])), np.uint8).copy())
    return data.view(_undtype(parts[0])).reshape(parts[1])


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _undtype(name: str) -> torch.dtype:
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype):
        raise RecordFileError(f"a value is said to have the torch dtype {name!r}")
    return dtype


_CODECS = {
    codec.tag: codec
    for codec in (
        _Codec("$tuple", tuple, _items, lambda v: tuple(map(decode, v))),
        _Codec("$set", set, _sorted_items, lambda v: set(map(decode, v))),
        _Codec("$frozenset", frozenset, _sorted_items, lambda v: frozenset(map(decode, v))),
        _Codec("$dict", dict, _pairs, lambda v: {decode(key): decode(item) for key, item in v}),
        _Codec(
            "$str",
            str,
            lambda v, *_: v.encode("utf-8", "surrogatepass").hex(),
            lambda v: bytes.fromhex(v).decode("utf-8", "surrogatepass"),
        ),
        _Codec("$int", int, lambda v, *_: hex(v), lambda v: int(v, 16)),
        _Codec(
            "$float",
            float,
            lambda v, *_: struct.pack(">d", v).hex(),
            lambda v: struct.unpack(">d", bytes.fromhex(v))[0],
        ),
        _Codec(
            "$complex",
            complex,
            lambda v, *_: struct.pack(">dd", v.real, v.imag).hex(),
            lambda v: complex(*struct.unpack(">dd", bytes.fromhex(v))),
        ),
        _Codec("$bytes", bytes, lambda v, *_: _base64(v), _unbase64),
        _Codec(
            "$bytearray", bytearray, lambda v, *_: _base64(v), lambda v: bytearray(_unbase64(v))
        ),
        _Codec("$path", type(Path()), lambda v, *_: encode(str(v)), lambda v: Path(decode(v))),
        _Codec("$numpy", np.generic, _array, lambda v: _unarray(v)[()]),
        _Codec("$ndarray", np.ndarray, _array, _unarray),
        _Codec("$tensor", torch.Tensor, _tensor, _untensor),
        _Codec("$torch.dtype", torch.dtype, lambda v, *_: _dtype_name(v), _undtype),
        _Codec("$torch.device", torch.device, lambda v, *_: str(v), lambda v: torch.device(v)),
        _Codec("$torch.Size", torch.Size, lambda v, *_: list(v), lambda v: torch.Size(v)),
    )
}
