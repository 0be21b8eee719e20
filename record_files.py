"""Activation records in files: five formats, exact to the bit, safe to read, whole or not at all.

- ``save_activations(record_or_records, path, format)``: one record or a list of them.
- ``load_activations(path)``: the same again, a record as a record and a list as a list.

A file holds a header of JSON and arrays by name (`array_files`; `array_formats` has the formats).
The header's ``content`` is

- ``single``: whether a record was saved, or a list;
- ``layouts``: what a record consists of: for each field or site the layer names and keys, and for
  each tensor the name of its array. Records of one shape share a layout;
- ``records``: prompt, tokens, ids, positions (null: all), metadata, and the number of the layout;
- ``shared``: long metadata values, which the records of a list often have in common.

In the file of a single record an array is the record's tensor. In that of a list, the tensors of
one name, shape and dtype are one array with a new first axis, whose rows belong, in order, to the
records that use it: ten thousand records of twelve layers make twelve arrays. Metadata are exact
(`tagged_json`).
"""

from __future__ import annotations

import gc
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from os import PathLike
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from activation_record import ActivationRecord, LayerActivations
from array_files import StoredArrays, open_arrays, write_arrays
from array_formats import DTYPES, FORMATS
from forward_pass import RecordFileError
from tagged_json import decode, encode

KIND = "activation records"
SCHEMA_VERSION = 1

SUFFIXES = {
    ".pkl": "pickle",
    ".pickle": "pickle",
    ".pt": "pt",
    ".pth": "pt",
    ".npz": "npz",
    ".safetensors": "safetensors",
    ".json": "json",
}
"""The format that a file name asks for."""


class _DefaultFormat(str):
    """``"pickle"`` that nobody asked for, so that the file name may say otherwise."""


DEFAULT_FORMAT: Final = _DefaultFormat("pickle")
"""Pass it on where ``format`` is passed on: an equal string would count as asked for."""

SHARED_LENGTHS = range(64, 4096)
"""Characters of JSON that a metadata value has for a list of records to store it only once."""

_STORABLE_DTYPES = {getattr(torch, name) for name in DTYPES if hasattr(torch, name)}

FEW_TENSORS, TENSORS_PER_BYTE = 1_000_000, 16
"""How many tensors and groups of them a file may declare: so many, and more by its size."""


# --- Saving ---------------------------------------------------------------------------------------


def save_activations(
    record_or_records: ActivationRecord | Iterable[ActivationRecord],
    output_path: str | PathLike[str],
    format: str | None = DEFAULT_FORMAT,
) -> Path:
    """Save one record or a list of records.

    The file appears whole or not at all, and an earlier one stays until then. Equal records give
    equal bytes. Tensors come back with the same bits and dtype, on the CPU; everything else comes
    back equal and of the same type. Of tensors, ``"json"`` keeps shape and dtype only.

    Args:
        record_or_records: What to save.
        output_path: The file. Folders are made; no suffix is added.
        format: ``"safetensors"`` (to be recommended: safe, fast, read by other programs),
            ``"npz"``, ``"pt"``, ``"pickle"`` or ``"json"``. Where it is not given, or None, the
            suffix decides (`SUFFIXES`), and without a known one it is pickle.

    Returns:
        The path.

    Raises:
        RecordFileError: unknown format, metadata or a tensor without an exact form, or the disk
            refuses; no file is changed then.
        TypeError: something other than records is given.
    """
    path = Path(output_path)
    if format is None or format is DEFAULT_FORMAT:
        format = SUFFIXES.get(path.suffix.lower(), "pickle")
    if format not in FORMATS:
        raise RecordFileError(f"no format {format!r}; expected one of {', '.join(FORMATS)}")
    single = isinstance(record_or_records, ActivationRecord)
    packing = _Packing(share=not single and format != "json", with_values=format != "json")
    with _collector_paused():
        entries = [packing.add(r, f"record {i}") for i, r in enumerate(_as_list(record_or_records))]
    content = {
        "single": single,
        "layouts": packing.layouts,
        "records": entries,
        "shared": [json.loads(text) for text in packing.shared],
    }
    arrays: Mapping[str, Any] = packing.arrays
    if single:
        arrays = {name: tensors[0] for name, tensors in arrays.items()}
    write_arrays(path, format, KIND, SCHEMA_VERSION, content, arrays)
    return path


@contextmanager
def _collector_paused() -> Iterator[None]:
    """For making many objects, none of them garbage: looking for some would take half the time."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def _as_list(given: Any) -> list[ActivationRecord]:
    """The records, one or many.

    Raises:
        TypeError: something else is among them.
    """
    records = [given] if isinstance(given, ActivationRecord) else given
    for record in (records := list(records) if isinstance(records, Iterable) else [records]):
        if not isinstance(record, ActivationRecord):
            raise TypeError(
                f"expected an ActivationRecord or a list of them; got {type(given).__name__} with "
                f"a {type(record).__name__} in it"
            )
    return records


class _Packing:
    """Turns records into JSON, and gathers what goes into arrays.

    Args:
        share: Store long metadata values once.
        with_values: Refuse tensors that have none.
    """

    def __init__(self, share: bool, with_values: bool) -> None:
        self.share, self.with_values = share, with_values
        self.arrays: dict[str, list[Tensor]] = {}
        self.layouts: list[Any] = []
        self.shared: dict[str, int] = {}
        self._layouts: dict[Any, tuple[int, list[str]]] = {}
        self._names: dict[Any, str] = {}
        self._counts: Counter[str] = Counter()

    def add(self, record: ActivationRecord, where: str) -> dict[str, Any]:
        """Take a record's tensors, and return the rest of it as JSON.

        Raises:
            RecordFileError: something in it has no exact form, or was edited so as not to fit.
        """
        try:
            record = replace(record)  # checks the fields again
        except (ValueError, TypeError) as error:
            raise RecordFileError(f"{where} cannot be saved: {error}") from error
        tensors = list(record.tensors())
        layout, names = self._layout(record, tensors, where)
        for name, (_, _, tensor) in zip(names, tensors, strict=True):
            self.arrays.setdefault(name, []).append(tensor)
        every = record.positions == list(range(len(record.tokens)))
        return {
            "prompt": _encoded_text(record.prompt, f"{where}: prompt"),
            "tokens": [_encoded_text(token, f"{where}: a token") for token in record.tokens],
            "token_ids": record.token_ids,
            "positions": None if every else record.positions,
            "metadata": self._metadata(record.metadata, f"{where}: metadata"),
            "layout": layout,
        }

    def _metadata(self, metadata: Any, where: str) -> Any:
        """Encoded, with long values replaced by their number in ``shared``."""
        if type(metadata) is not dict:
            raise RecordFileError(f"{where} must be a dict; it is a {type(metadata).__name__}")
        encoded = encode(metadata, where)
        if not self.share or "$dict" in encoded:
            return encoded
        return {key: self._shared(value) for key, value in encoded.items()}

    def _shared(self, encoded: Any) -> Any:
        text = json.dumps(encoded) if isinstance(encoded, str | list | dict) else ""
        if len(text) not in SHARED_LENGTHS:
            return encoded
        return {"$shared": self.shared.setdefault(text, len(self.shared))}

    def _layout(
        self, record: ActivationRecord, tensors: list[tuple[str, str, Tensor]], where: str
    ) -> tuple[int, list[str]]:
        """Number of the record's layout, and the array of each of its tensors, in order."""
        groups = _groups(record)
        parts = tuple([self._storable(name, key, tensor, where) for name, key, tensor in tensors])
        known = (parts, tuple((n, g.layer_names, g.keys_by_layer) for n, g in groups.items()))
        if known not in self._layouts:
            names = [self._array_name(*part) for part in parts]
            left = iter(names)
            encoded: dict[str, Any] = {"groups": {}}
            for name, group in groups.items():
                own_keys = group.keys_by_layer != group.layer_names
                encoded["groups"][name] = {
                    "layer_names": list(group.layer_names),
                    "keys_by_layer": list(group.keys_by_layer) if own_keys else None,
                    "arrays": {key: next(left) for key in group},
                }
            encoded["logits"] = next(left, None)
            self._layouts[known] = (len(self.layouts), names)
            self.layouts.append(encode(encoded))
        return self._layouts[known]

    def _storable(
        self, name: str, key: str, tensor: Tensor, where: str
    ) -> tuple[str, str, torch.dtype, torch.Size]:
        """Name, key, dtype and shape of a tensor.

        Raises:
            RecordFileError: it has no values, not one for each place, or none with an exact form.
        """
        if self.with_values and tensor.is_meta:
            raise RecordFileError(
                f"{where} holds shapes only, no values (it was loaded from a json file): "
                "save the record that the json file was made from, or save as json"
            )
        if tensor.layout is not torch.strided:
            raise RecordFileError(f"{where}: {name} {key!r} is {tensor.layout}; make it dense")
        if tensor.dtype not in _STORABLE_DTYPES:
            raise RecordFileError(
                f"{where}: {name} {key!r} has the dtype {tensor.dtype}; expected one of "
                f"{', '.join(DTYPES)}"
            )
        return name, key, tensor.dtype, tensor.shape

    def _array_name(self, name: str, key: str, dtype: torch.dtype, shape: torch.Size) -> str:
        """Field and key in ASCII, with a number where that name is taken (by another shape)."""
        part = (name, key, dtype, shape)
        if part not in self._names:
            full = name if name == "logits" else f"{name}/{key}"
            full = re.sub(r"[^\w./-]", "_", full, flags=re.ASCII)[:200]
            self._counts[full] += 1
            number = self._counts[full]
            self._names[part] = full if number == 1 else f"{full}@{number}"
        return self._names[part]


def _groups(record: ActivationRecord) -> dict[str, LayerActivations]:
    """Everything but the logits, by field or site, in the order of ``record.tensors()``."""
    groups = {"layer_activations": record.layer_activations}
    if record.attention_weights is not None:
        groups["attention_weights"] = record.attention_weights
    return groups | record.site_activations


def _encoded_text(text: Any, where: str) -> Any:
    if not isinstance(text, str):
        raise RecordFileError(f"{where} must be a string; it is a {type(text).__name__}")
    return encode(text, where)


# --- Loading --------------------------------------------------------------------------------------


def load_activations(path: str | PathLike[str]) -> ActivationRecord | list[ActivationRecord]:
    """Load what `save_activations` wrote, in whichever format; the content decides, not the suffix.

    Loading never runs code from the file, whoever made it, and checks it against its checksums.

    Args:
        path: The file.

    Returns:
        A record if one was saved, a list if a list was. Every tensor owns its memory. Records from
        a json file have tensors without values (on the ``meta`` device): shapes and dtypes can be
        looked at, and what needs values says that there are none.

    Raises:
        RecordFileError: no such file, truncated, damaged, hostile, of another kind, or from a newer
            version; the message says what was expected and what was found.
        FileNotFoundError: there is no such file (the same error is a RecordFileError).
    """
    with _collector_paused(), open_arrays(Path(path), KIND, SCHEMA_VERSION) as stored:
        records = list(_unpacked(stored))
        return records[0] if stored.content["single"] else records


def _unpacked(stored: StoredArrays) -> Iterator[ActivationRecord]:
    """The records, once it is known that they use up the arrays exactly."""
    content = stored.content
    single, shared = content["single"] is True, content["shared"]
    layouts = [_decoded_layout(layout) for layout in content["layouts"]]
    numbers = [entry["layout"] for entry in content["records"]]
    if not all(type(number) is int and 0 <= number < len(layouts) for number in numbers):
        raise RecordFileError("a record refers to a layout that is not there")
    if single and len(numbers) != 1:
        raise RecordFileError(f"it should hold one record, and holds {len(numbers)}")
    if not all(len(json.dumps(value)) in SHARED_LENGTHS for value in shared):
        raise RecordFileError("it shares values that are too short or too long to be shared")
    _check_uses(stored, [(layouts[n], times) for n, times in Counter(numbers).items()], single)
    rows = {}
    for name in stored.specs:
        rows[name] = iter([stored.read(name)] if single else list(stored.rows(name)))
    for entry in content["records"]:
        yield _record(entry, layouts[entry["layout"]], rows, shared)


def _decoded_layout(encoded: Any) -> Any:
    """With names as tuples, which all records of the layout then have in common."""
    layout = decode(encoded)
    for group in layout["groups"].values():
        group["layer_names"] = tuple(group["layer_names"])
        if group["keys_by_layer"] is not None:
            group["keys_by_layer"] = tuple(group["keys_by_layer"])
    return layout


def _check_uses(stored: StoredArrays, layouts: list[tuple[Any, int]], single: bool) -> None:
    """Every row of every array has one owner, and what is declared is in proportion to the file.

    Args:
        stored: The file.
        layouts: Each layout, and how many records have it.
        single: Whether arrays are tensors, without an axis of rows.

    Raises:
        RecordFileError: otherwise.
    """
    uses: Counter[str] = Counter()
    n_groups = 0
    for layout, times in layouts:
        n_groups += times * len(layout["groups"])
        names = [name for group in layout["groups"].values() for name in group["arrays"].values()]
        for name in names if layout["logits"] is None else [*names, layout["logits"]]:
            uses[name] += times
    rows = {name: 1 if single else next(iter(s.shape), 0) for name, s in stored.specs.items()}
    if rows != dict(uses):
        wrong = sorted(name for name in {*rows, *uses} if rows.get(name) != uses.get(name))
        raise RecordFileError(f"its arrays do not fit its records: {wrong[:5]}")
    declared = sum(rows.values()) + n_groups
    if declared > FEW_TENSORS + TENSORS_PER_BYTE * stored.nbytes:
        raise RecordFileError(f"it declares {declared} tensors in {stored.nbytes} bytes")


def _record(
    entry: Any, layout: Any, rows: Mapping[str, Iterator[Tensor]], shared: list[Any]
) -> ActivationRecord:
    groups = {
        name: LayerActivations(
            {key: next(rows[array]) for key, array in group["arrays"].items()},
            group["layer_names"],
            group["keys_by_layer"],
        )
        for name, group in layout["groups"].items()
    }
    tokens = [_decoded_text(token) for token in entry["tokens"]]
    positions = entry["positions"]
    return ActivationRecord(
        prompt=_decoded_text(entry["prompt"]),
        tokens=tokens,
        token_ids=entry["token_ids"],
        layer_activations=groups.pop("layer_activations"),
        attention_weights=groups.pop("attention_weights", None),
        metadata=_decoded_metadata(entry["metadata"], shared),
        logits=None if layout["logits"] is None else next(rows[layout["logits"]]),
        site_activations=groups,
        positions=list(range(len(tokens))) if positions is None else positions,
    )


def _decoded_text(encoded: Any) -> str:
    text = decode(encoded)
    if not isinstance(text, str):
        raise RecordFileError(f"it has {text!r:.40} where a string was expected")
    return text


def _decoded_metadata(encoded: Any, shared: list[Any]) -> dict[str, Any]:
    """New objects for every record: to edit one's metadata should not edit another's."""
    if "$dict" not in encoded:
        references = {
            key: value["$shared"]
            for key, value in encoded.items()
            if type(value) is dict and "$shared" in value
        }
        encoded = {**encoded, **{key: shared[number] for key, number in references.items()}}
    metadata = decode(encoded)
    if type(metadata) is not dict:
        raise RecordFileError(f"it has {metadata!r:.40} where metadata were expected")
    return metadata
