"""gguf control vectors: what is written is what repeng and llama.cpp read."""

import sys

import numpy as np
import pytest
import torch

from control_vectors import export_gguf, import_gguf
from forward_pass import InputError, RecordFileError
from steering_direction import Direction

VECTORS = np.random.default_rng(0).normal(size=(3, 32)).astype(np.float32)
DIRECTIONS = {
    layer: Direction(torch.from_numpy(VECTORS[layer - 1]), layer, model="llama")
    for layer in (1, 2, 3)
}


def gguf():
    return pytest.importorskip("gguf", reason="the package gguf is not installed")


def test_without_the_package_the_error_says_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "gguf", None)
    for call in (lambda p: export_gguf(DIRECTIONS, p), import_gguf):
        with pytest.raises(ImportError, match="pip install gguf"):
            call(tmp_path / "x.gguf")


def test_round_trip(tmp_path):
    gguf()
    export_gguf(DIRECTIONS, tmp_path / "new" / "happy.gguf")
    found = import_gguf(tmp_path / "new" / "happy.gguf")
    assert list(found) == [1, 2, 3]
    for layer, direction in found.items():
        np.testing.assert_array_equal(direction.vector.numpy(), VECTORS[layer - 1])
        assert (direction.layer, direction.site, direction.model) == (layer, "resid_post", "llama")


def test_the_file_holds_what_llama_cpp_asks_for(tmp_path):
    """Its loader wants one-dimensional float32 tensors named direction.<layer above 0>."""
    reader_class = gguf().GGUFReader
    export_gguf(DIRECTIONS[2].to(dtype=torch.bfloat16), tmp_path / "one.gguf", model_hint="qwen2")
    reader = reader_class(tmp_path / "one.gguf")
    (tensor,) = reader.tensors
    assert tensor.name == "direction.2"
    assert tensor.tensor_type.name == "F32"
    assert list(tensor.shape) == [32]
    texts = {
        key: bytes(reader.get_field(key).parts[-1]).decode()
        for key in ("general.architecture", "controlvector.model_hint")
    }
    assert texts == {
        "general.architecture": "controlvector",
        "controlvector.model_hint": "qwen2",
    }
    assert int(reader.get_field("controlvector.layer_count").parts[-1][0]) == 1


def test_a_file_that_repeng_would_write_is_read(tmp_path):
    writer = gguf().GGUFWriter(tmp_path / "theirs.gguf", "controlvector")
    writer.add_string("controlvector.model_hint", "mistral")
    writer.add_uint32("controlvector.layer_count", 2)
    writer.add_tensor("direction.9", VECTORS[0])
    writer.add_tensor("direction.0", VECTORS[1].astype(np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    found = import_gguf(tmp_path / "theirs.gguf")
    assert list(found) == [0, 9]
    assert found[9].model == "mistral"
    np.testing.assert_array_equal(found[9].vector.numpy(), VECTORS[0])
    np.testing.assert_array_equal(
        found[0].vector.numpy(), VECTORS[1].astype(np.float16).astype(np.float32)
    )


def test_what_is_no_control_vector_is_refused(tmp_path):
    writer = gguf().GGUFWriter(tmp_path / "model.gguf", "llama")
    writer.add_tensor("direction.1", VECTORS[0])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(RecordFileError, match="expected 'controlvector'"):
        import_gguf(tmp_path / "model.gguf")
    (tmp_path / "noise.gguf").write_bytes(b"noise" * 50)
    with pytest.raises(RecordFileError, match=r"noise.gguf cannot be read"):
        import_gguf(tmp_path / "noise.gguf")
    with pytest.raises(RecordFileError, match="no file"):
        import_gguf(tmp_path / "missing.gguf")


def test_what_cannot_be_exported_is_refused(tmp_path):
    gguf()
    elsewhere = Direction(torch.ones(4), 1, site="mlp_out", model="llama")
    with pytest.raises(InputError, match="output of blocks"):
        export_gguf(elsewhere, tmp_path / "x.gguf")
    with pytest.raises(InputError, match="model_hint="):
        export_gguf(Direction(torch.ones(4), 1), tmp_path / "x.gguf")
    assert list(tmp_path.iterdir()) == []
