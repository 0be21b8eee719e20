"""Named tensors and a header of JSON in one file: written whole or not at all, read without trust.

- ``write_arrays(path, format, kind, version, content, arrays)``: one file in one of the `FORMATS`.
- ``open_arrays(path, kind, newest)``: a context manager that gives the content and each array back.
- ``replacing(path)``: the atomic write, for any other file.

Every format holds the same things: the arrays by name, one more named ``header`` (UTF-8 JSON: kind,
schema version, library versions, dtype and shape of every array, the content), and one named
``crc32`` (int64: checksums of the header and of each array). The same input gives the same bytes.
Reading recognises the format by content, not by suffix, and holds checksums against the data.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import secrets
import stat
import sys
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import lru_cache
from importlib.metadata import version as library_version
from itertools import repeat
from pathlib import Path
from types import UnionType
from typing import Any, BinaryIO, TypeVar, get_args, get_origin, get_type_hints

import torch
from torch import Tensor

from array_formats import (
    CHECKSUMS,
    DTYPES,
    FORMATS,
    HEADER,
    ArraySpec,
    Extent,
    Find,
    Values,
    detect_format,
    dump_json,
    memory,
)
from forward_pass import RecordFileError

LIBRARIES = ("torch", "transformers", "numpy", "safetensors")
"""Their versions are noted in every file."""

PIECE = 2**24
"""Bytes of an array that are stacked or split at a time: the memory needed beside the tensors."""


class MissingFileError(RecordFileError, FileNotFoundError):
    """There is no such file."""


Result = TypeVar("Result")

Arrays = Mapping[str, Tensor | Sequence[Tensor]]
"""By name: a tensor, or tensors of one shape and dtype that are stacked along a new first axis."""


# --- Writing --------------------------------------------------------------------------------------


def write_arrays(
    path: Path, format: str, kind: str, version: int, content: Any, arrays: Arrays
) -> None:
    """Write one file, atomically.

    Args:
        path: Where to; its folders are made, an earlier file is replaced.
        format: One of `FORMATS`.
        kind: What the file holds, such as ``"activation records"``; asked for when reading.
        version: Of the content's schema.
        content: Anything that JSON can hold.
        arrays: What to store.

    Raises:
        RecordFileError: unknown format, a tensor that cannot be stored, or the disk refuses.
    """
    if format not in FORMATS:
        raise RecordFileError(f"no format {format!r}; expected one of {', '.join(FORMATS)}")
    specs = {name: _spec(name, tensors) for name, tensors in arrays.items()}
    header = {
        "kind": kind,
        "schema_version": version,
        "byte_order": sys.byteorder,
        "libraries": _versions(),
        "arrays": {name: {"dtype": s.dtype, "shape": s.shape} for name, s in specs.items()},
        "content": content,
    }
    text = dump_json(header)
    sizes = {HEADER: ArraySpec("uint8", (len(text),)), **specs}
    sizes[CHECKSUMS] = ArraySpec("int64", (len(sizes),))
    with replacing(path) as file:
        FORMATS[format].write(file, sizes, _values(text, arrays))


def _spec(name: str, tensors: Tensor | Sequence[Tensor]) -> ArraySpec:
    first = tensors if isinstance(tensors, Tensor) else tensors[0]
    dtype = str(first.dtype).removeprefix("torch.")
    if dtype not in DTYPES:
        raise RecordFileError(f"{name} has the dtype {dtype}; expected one of {', '.join(DTYPES)}")
    rows = () if isinstance(tensors, Tensor) else (len(tensors),)
    return ArraySpec(dtype, (*rows, *first.shape))


def _values(header: bytes, arrays: Arrays) -> Values:
    """Header, arrays, checksums: these come last, being made while the rest is written."""
    sums: dict[str, int] = {}
    yield HEADER, _counted(HEADER, [torch.frombuffer(bytearray(header), dtype=torch.uint8)], sums)
    for name, tensors in arrays.items():
        yield name, _counted(name, _pieces(tensors), sums)
    yield CHECKSUMS, iter([torch.tensor(list(sums.values()), dtype=torch.int64, device="cpu")])


def _counted(name: str, pieces: Iterable[Tensor], sums: dict[str, int]) -> Iterator[Tensor]:
    """The pieces, of which a checksum is taken on the way."""
    sums[name] = 0
    for piece in pieces:
        sums[name] = zlib.crc32(memory(piece), sums[name])
        yield piece


def _pieces(tensors: Tensor | Sequence[Tensor]) -> Iterator[Tensor]:
    """A tensor as it is; tensors to be stacked, some at a time."""
    if isinstance(tensors, Tensor):
        yield tensors.detach().cpu().contiguous()
        return
    step = _rows_at_once(tensors[0].nbytes)
    for start in range(0, len(tensors), step):
        yield torch.stack([tensor.detach().cpu() for tensor in tensors[start : start + step]])


def _rows_at_once(nbytes: int) -> int:
    """How many tensors of a size are stacked, or split, at a time."""
    return max(PIECE // max(nbytes, 1), 1)


@lru_cache(maxsize=1)
def _versions() -> dict[str, str]:
    return {name: library_version(name) for name in LIBRARIES}


# --- Reading --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class StoredArrays:
    """What an open file holds."""

    content: Any
    """As it was given to `write_arrays`."""
    specs: dict[str, ArraySpec]
    """Dtype and shape of every array."""
    nbytes: int
    """Size of the file."""
    _find: Find | None
    """None where there are no values."""
    _sums: dict[str, int]

    def read(self, name: str) -> Tensor:
        """An array by name, in memory of its own; from json without values, on ``meta``.

        Raises:
            RecordFileError: it is not there, or damaged.
        """
        spec = self.specs[name]
        if self._find is None:
            return _without_values(spec)
        data = _read_all(self._find(name, spec))
        self._check_sum(name, zlib.crc32(memory(data)))
        return data.view(spec.torch_dtype).reshape(spec.shape)

    def rows(self, name: str) -> Iterator[Tensor]:
        """The parts of an array along its first axis, each in memory of its own (if it has any).

        Raises:
            RecordFileError: it is not there, or damaged; that may show only at the end.
        """
        count, *shape = self.specs[name].shape
        row = ArraySpec(self.specs[name].dtype, tuple(shape))
        if self._find is None:
            yield from repeat(_without_values(row), count)
            return
        extent, checksum = self._find(name, self.specs[name]), 0
        step = _rows_at_once(row.nbytes)
        for start in range(0, count, step):
            end = min(start + step, count)
            data = extent.read(start * row.nbytes, end * row.nbytes)
            checksum = zlib.crc32(memory(data), checksum)
            rows = data.view(row.torch_dtype).reshape(end - start, *shape)
            yield from (part.clone() for part in rows.unbind(0))
        self._check_sum(name, checksum)

    def _check_sum(self, name: str, found: int) -> None:
        if found != self._sums[name]:
            raise RecordFileError(f"it is damaged: {name!r} does not match its checksum")


@contextmanager
def open_arrays(path: Path, kind: str, newest: int) -> Iterator[StoredArrays]:
    """Open a file that `write_arrays` wrote, in whichever format.

    Whatever goes wrong while the file is open becomes a RecordFileError that names it: a hostile
    file can make a parser raise anything. So does what the body of the ``with`` raises on finding
    that the content makes no sense.

    Args:
        path: The file.
        kind: What it should hold.
        newest: The latest version of the schema that the caller understands.

    Yields:
        The content, and a way to read the arrays.

    Raises:
        RecordFileError: not such a file, from a newer version, damaged, or hostile.
        MissingFileError: there is no such file.
    """
    if not path.exists():
        raise MissingFileError(f"there is no file {path}")
    if not path.is_file():
        raise RecordFileError(f"{path} is no regular file; expected a file of {kind}")
    try:
        with path.open("rb") as file:
            yield _open(file, os.fstat(file.fileno()).st_size, kind, newest)
    except Exception as error:
        why = str(error)
        if isinstance(error, PermissionError):
            why = "you may not read it; change its permissions"
        elif not isinstance(error, RecordFileError):
            why = f"it is damaged, or something else ({type(error).__name__}: {error})"
        raise RecordFileError(f"{path} cannot be read as {kind}: {why}") from error


def _open(file: BinaryIO, size: int, kind: str, newest: int) -> StoredArrays:
    format = detect_format(file, size)
    file.seek(0)
    find = FORMATS[format].open(file, size)
    sums = _read_all(find(CHECKSUMS, None)).view(torch.int64).tolist()
    text = bytes(memory(_read_all(find(HEADER, None))))
    if not sums or zlib.crc32(text) != sums[0]:
        raise RecordFileError("it is damaged: the header does not match its checksum")
    header = json.loads(text)
    specs = _checked(header, kind, newest)
    if format == "json":
        return StoredArrays(header["content"], specs, size, None, {})
    if sum(spec.nbytes for spec in specs.values()) > size:
        raise RecordFileError("it is damaged: its header declares more than the file holds")
    expected = dict(zip(specs, sums[1:], strict=True))
    return StoredArrays(header["content"], specs, size, find, expected)


def _read_all(extent: Extent) -> Tensor:
    return extent.read(0, extent.nbytes)


def _without_values(spec: ArraySpec) -> Tensor:
    return torch.empty(spec.shape, dtype=spec.torch_dtype, device="meta")


def _checked(header: Any, kind: str, newest: int) -> dict[str, ArraySpec]:
    """The arrays that a header declares.

    Raises:
        RecordFileError: it is not a header of this kind, or one from a newer version.
    """
    if not isinstance(header, dict) or header.get("kind") != kind:
        found = header.get("kind") if isinstance(header, dict) else type(header).__name__
        raise RecordFileError(f"its header says {found!r}; expected {kind!r}")
    version, order = header["schema_version"], header["byte_order"]
    if type(version) is not int or not 1 <= version <= newest:
        raise RecordFileError(
            f"it has schema version {version!r}, written with {header.get('libraries')}; this "
            f"version of the toolkit reads 1 to {newest}: upgrade the toolkit"
        )
    if order != sys.byteorder:
        raise RecordFileError(f"its byte order is {order!r}, this computer's is {sys.byteorder!r}")
    specs = {}
    for name, entry in header["arrays"].items():
        shape = entry["shape"]
        if entry["dtype"] not in DTYPES or not all(type(n) is int and n >= 0 for n in shape):
            raise RecordFileError(f"its header declares {name!r} to be {entry}; expected an array")
        specs[name] = ArraySpec(entry["dtype"], tuple(shape))
    return specs


def built(kind: type[Result], fields: Mapping[str, Any]) -> Result:
    """A result out of what a file says, each field of the type that its class declares.

    Args:
        kind: A dataclass, whose line (``repr``) is made once: arrays that lack axes have none.
        fields: By name.

    Raises:
        RecordFileError: a field is of another type.
    """
    hints = get_type_hints(kind)
    for name, value in fields.items():
        if name in hints and not _is_of(value, hints[name]):
            expected = getattr(hints[name], "__name__", hints[name])
            raise RecordFileError(f"its {name} is {repr(value)[:60]}; expected {expected}")
    found = kind(**fields)
    repr(found)
    return found


def _is_of(value: Any, hint: Any) -> bool:
    """Whether a value is what an annotation says: numbers, text, arrays, tuples of these."""
    base, inside = get_origin(hint), get_args(hint)
    if base is UnionType:
        return any(_is_of(value, each) for each in inside)
    if base is tuple:
        if type(value) is not tuple:
            return False
        kinds = (inside[0],) * len(value) if inside[1:] == (...,) else inside
        return len(kinds) == len(value) and all(map(_is_of, value, kinds))
    if hint is float:
        return type(value) in (int, float)
    if hint in (int, str, bool):
        return type(value) is hint
    if isinstance(value, tuple) and hasattr(hint, "_fields"):  # a NamedTuple
        return type(value) is hint and all(map(_is_of, value, get_type_hints(hint).values()))
    return isinstance(value, base or hint)


# --- Replacing a file, whole or not at all --------------------------------------------------------

_ADVICE = {
    errno.ENOSPC: "the disk is full; free some space or choose another folder",
    errno.EDQUOT: "your disk quota is used up; free some space or choose another folder",
    errno.EFBIG: "the file is larger than is allowed here; choose another folder",
    errno.EACCES: "you may not write there; choose another folder or change the permissions",
    errno.EPERM: "you may not write there; choose another folder or change the permissions",
    errno.EROFS: "that file system is read-only; choose another folder",
    errno.EISDIR: "that is a folder; add a file name",
    errno.ENOTDIR: "a part of the path is a file, not a folder",
    errno.EEXIST: "a part of the path is a file, not a folder",
    errno.ENAMETOOLONG: "the name is too long; choose a shorter one",
}


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """Give a file to write to; put it in the place of ``path`` on leaving, unless something raised.

    The data goes to a hidden file in the same folder, is flushed to the disk, and then renamed over
    ``path``, so that whoever reads ``path``, at whatever moment, finds the earlier file or the new
    one. On any exception the hidden file is removed; where the process was killed, the next write
    to the same path removes it. Folders are made. A symbolic link stays one: the file that it
    points to is replaced. Permissions are those of the earlier file, or what the umask leaves.

    Args:
        path: The file to make or replace.

    Yields:
        A binary file, open for writing.

    Raises:
        RecordFileError: the file system refuses; the message says why and what to do.
    """
    try:
        target = _resolved(path)
        mode = _writable_mode(target)
        target.parent.mkdir(parents=True, exist_ok=True)
        _remove_stale(target)
        with _temporary(target) as (file, temporary):
            yield file
            file.flush()
            os.fsync(file.fileno())
            if mode is not None:
                temporary.chmod(mode)
            temporary.replace(target)
        _flush_folder(target.parent)
    except OSError as error:
        advice = _ADVICE.get(error.errno or 0, "the file system refused")
        raise RecordFileError(
            f"cannot write {path}: {advice} ({error}). An earlier file there is unchanged."
        ) from error


def _resolved(path: Path) -> Path:
    """The file itself, where the path is a symbolic link.

    Raises:
        OSError: the links go round in a circle.
    """
    try:
        return path.resolve()
    except RuntimeError as error:
        raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), str(path)) from error


def _writable_mode(target: Path) -> int | None:
    """Permissions of the file that will be replaced; None where there is none yet.

    Raises:
        IsADirectoryError: a folder is there.
        PermissionError: a file is there that must not be written.
        OSError: something else is there, such as a device.
    """
    if not target.exists():
        return None
    if target.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(target))
    if not target.is_file():
        raise OSError(errno.EINVAL, "not a regular file", str(target))
    if not os.access(target, os.W_OK):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(target))
    return stat.S_IMODE(target.stat().st_mode)


def _temporary_prefix(target: Path) -> str:
    """Of the same length for every name: the longest names leave no room for a longer one."""
    return f".{hashlib.sha256(os.fsencode(target.name)).hexdigest()[:16]}-"


@contextmanager
def _temporary(target: Path) -> Iterator[tuple[BinaryIO, Path]]:
    """A new, locked file beside ``target``; gone afterwards, unless it was renamed."""
    while True:
        temporary = target.with_name(f"{_temporary_prefix(target)}{secrets.token_hex(8)}.part")
        try:
            with temporary.open("xb") as file:
                _lock(file, wait=True)
                if not temporary.exists():  # taken for stale before it was locked
                    continue
                yield file, temporary
                return
        finally:
            temporary.unlink(missing_ok=True)


def _remove_stale(target: Path) -> None:
    """Remove what a killed process left of an earlier write to the same path."""
    with suppress(OSError):
        for leftover in target.parent.glob(f"{_temporary_prefix(target)}*.part"):
            with suppress(OSError), leftover.open("r+b") as file:
                if _lock(file, wait=False):
                    leftover.unlink()


def _lock(file: BinaryIO, wait: bool) -> bool:
    """Lock a file until it is closed or the process ends; False where that is not possible."""
    try:
        import fcntl
    except ImportError:  # Windows: a file that is open cannot be removed there anyway
        return True
    try:
        fcntl.flock(file.fileno(), fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError:
        return False
    return True


def _flush_folder(folder: Path) -> None:
    """Make the renaming last through a power cut, where the system can."""
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
