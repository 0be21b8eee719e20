"""Directions as gguf control vectors, the files that repeng writes and llama.cpp reads.

Such a file holds one float32 tensor ``direction.<layer>`` per layer, and the model's type as
``controlvector.model_hint``. All three programs count alike: layer ``i`` is added to what leaves
block ``i``, 0 being the first. llama.cpp refuses a file that has a layer 0.

The format is that of repeng (https://github.com/vgel/repeng). It needs the package ``gguf``:
``pip install gguf``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch

from array_files import MissingFileError, replacing
from forward_pass import InputError, RecordFileError
from steering_direction import Direction, by_layer

KIND = "controlvector"
"""What such a file's ``general.architecture`` says."""


def _gguf() -> Any:
    """The package that knows the format.

    Raises:
        ImportError: it is not installed.
    """
    try:
        import gguf
    except ImportError as error:
        raise ImportError("control vectors need the package gguf: pip install gguf") from error
    return gguf


def export_gguf(
    directions: Direction | Mapping[int, Direction], path: str | Path, model_hint: str | None = None
) -> None:
    """Write directions as a control vector, atomically; lengths are kept.

    Args:
        directions: One, or several by layer, of the site ``resid_post``.
        path: Where to; its folders are made.
        model_hint: The model's type (``"llama"``, …); None takes what the directions say.

    Raises:
        InputError: a direction belongs to another site, or their model is not known.
        RecordFileError: the file cannot be written.
        ImportError: the package ``gguf`` is not installed.
    """
    gguf = _gguf()
    found = by_layer(directions)
    elsewhere = [direction for direction in found.values() if direction.site != "resid_post"]
    if elsewhere:
        raise InputError(
            f"a control vector acts on the output of blocks (resid_post); {elsewhere[0]!r} does not"
        )
    hints = {direction.model for direction in found.values()} - {""}
    if model_hint is None and len(hints) != 1:
        raise InputError(
            f"the directions say {', '.join(sorted(hints)) or 'nothing'} of their model: "
            "give model_hint=, the model_type of its config"
        )
    with TemporaryDirectory() as folder:
        whole = Path(folder) / "vector.gguf"
        writer = gguf.GGUFWriter(whole, KIND)
        writer.add_string(f"{KIND}.model_hint", model_hint or hints.pop())
        writer.add_uint32(f"{KIND}.layer_count", len(found))
        for layer, direction in found.items():
            writer.add_tensor(f"direction.{layer}", direction.vector.float().cpu().numpy())
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        with replacing(Path(path)) as file:
            file.write(whole.read_bytes())


def import_gguf(path: str | Path) -> dict[int, Direction]:
    """Read a control vector; its directions act on the output of blocks, as in repeng.

    Returns:
        By layer, float32.

    Raises:
        RecordFileError: it is no control vector, or one of its tensors is not ``[d_model]``.
        MissingFileError: there is no such file.
        ImportError: the package ``gguf`` is not installed.
    """
    gguf, path = _gguf(), Path(path)
    if not path.exists():
        raise MissingFileError(f"there is no file {path}")
    try:
        reader = gguf.GGUFReader(path)
        kind = _text(reader, "general.architecture")
        if kind != KIND:
            raise RecordFileError(f"its architecture is {kind!r}; expected {KIND!r}")
        hint = _text(reader, f"{KIND}.model_hint")
        found = [_direction(gguf, tensor, hint) for tensor in reader.tensors]
        return by_layer({one.layer: one for one in found if one is not None})
    except Exception as error:
        raise RecordFileError(f"{path} cannot be read as a control vector: {error}") from error


def _text(reader: Any, key: str) -> str:
    field = reader.get_field(key)
    return "" if field is None else bytes(field.parts[-1]).decode("utf-8", "replace")


def _direction(gguf: Any, tensor: Any, hint: str) -> Direction | None:
    """A tensor of the file as a direction; None for one of another name."""
    if not tensor.name.startswith("direction"):
        return None
    match = re.fullmatch(r"direction\.(\d+)", tensor.name)
    if match is None:
        raise RecordFileError(f"{tensor.name!r} names no layer; expected direction.<number>")
    values = np.array(gguf.dequantize(tensor.data, tensor.tensor_type), dtype=np.float32)
    return Direction(torch.from_numpy(values), int(match[1]), method="gguf", model=hint)
