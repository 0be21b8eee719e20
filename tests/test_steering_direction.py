"""Directions as values: algebra against numpy, and files that give back what went in."""

import numpy as np
import pytest
import torch

from forward_pass import InputError, RecordFileError
from steering_direction import Direction, by_layer, load_directions, save_directions
from steering_vector import SteeringVector

WIDTH = 5
A, B = np.random.default_rng(0).normal(size=(2, WIDTH)).astype(np.float32)


def direction(values=A, layer=2, **about):
    return Direction(torch.from_numpy(values.copy()), layer, **about)


# --- Algebra --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("made", "expected"),
    [
        (lambda a, b: a + b, A + B),
        (lambda a, b: a - b, A - B),
        (lambda a, b: -a, -A),
        (lambda a, b: 2.5 * a, 2.5 * A),
        (lambda a, b: a * 3, 3 * A),
        (lambda a, b: a / 4, A / 4),
        (lambda a, b: np.float32(2) * a, 2 * A),
        (lambda a, b: np.float64(2) * a, 2 * A),
        (lambda a, b: 0.5 * a - (b + b) / 2, 0.5 * A - B),
        (lambda a, b: a - a, 0 * A),
        (lambda a, b: a.unit(), A / np.linalg.norm(A)),
    ],
)
def test_algebra_is_that_of_the_vectors(made, expected):
    a, b = direction(A, method="mean", model="gpt2"), direction(B, method="mean", model="gpt2")
    result = made(a, b)
    assert isinstance(result, Direction)
    np.testing.assert_allclose(result.vector.numpy(), expected, rtol=1e-6)
    assert (result.layer, result.site, result.model) == (2, "resid_post", "gpt2")


def test_operations_leave_their_operands_alone():
    source = torch.from_numpy(A.copy())
    a = Direction(source, 2)
    source.zero_()
    _ = a + a, -a, 2 * a, a.unit(), a.to(dtype=torch.float64)
    np.testing.assert_array_equal(a.vector.numpy(), A)


def test_norm_and_cosine():
    a, b = direction(A), direction(B, layer=4)
    assert a.norm == pytest.approx(np.linalg.norm(A), rel=1e-6)
    expected = A @ B / (np.linalg.norm(A) * np.linalg.norm(B))
    assert a.cosine(b) == pytest.approx(expected, rel=1e-5)
    assert a.cosine(-3 * a) == pytest.approx(-1)


def test_names_follow_the_algebra():
    happy, formal = direction(A, label="happy"), direction(B, label="formal")
    assert (happy - formal).label == "happy − formal"
    assert (2 * happy).label == "2 × (happy)"
    assert (happy + direction(B)).label == ""
    mixed = direction(A, method="mean", model="llama") + direction(B, method="pca", model="qwen2")
    assert (mixed.method, mixed.model) == ("", "")
    assert repr(happy).startswith("Direction('happy', resid_post of layer 2, ‖")
    assert "\n" not in repr(happy)


@pytest.mark.parametrize("other", [1, "a", A, None, torch.ones(WIDTH)])
def test_only_directions_are_added(other):
    with pytest.raises(TypeError):
        direction() + other


@pytest.mark.parametrize("factor", ["2", None, True, A])
def test_only_numbers_multiply(factor):
    with pytest.raises(TypeError):
        direction() * factor


def test_what_does_not_fit_is_refused():
    with pytest.raises(InputError, match="different places"):
        direction() + direction(layer=3)
    with pytest.raises(InputError, match="different places"):
        direction() - direction(site="mlp_out")
    with pytest.raises(InputError, match="widths differ: 5"):
        direction() + direction(np.ones(4, np.float32))
    with pytest.raises(InputError, match="no angle"):
        direction().cosine(direction(0 * A))
    with pytest.raises(InputError, match="length 1"):
        direction(0 * A).unit()
    for wrong in (np.ones((1, 5)), np.ones(0), np.array([1, np.nan]), np.array([np.inf])):
        with pytest.raises(InputError, match=r"is \[d_model\], finite; came"):
            direction(wrong)
    for layer in (-1, "3", 1.5, True, None):
        with pytest.raises(InputError, match="layer is an index"):
            direction(layer=layer)


def test_moving_and_casting_give_a_copy():
    half = direction().to("cpu", torch.bfloat16)
    assert half.vector.dtype == torch.bfloat16
    assert direction().to(dtype=torch.float64).vector.dtype == torch.float64
    assert Direction(torch.arange(3), np.int64(1)).vector.dtype == torch.float32


def test_a_direction_makes_its_steering_vector():
    vector = direction(layer=3).steering(2.0, positions="prompt", operation="ablate")
    assert isinstance(vector, SteeringVector)
    assert (vector.layer_name, vector.coefficient, vector.positions) == (3, 2.0, "prompt")
    assert direction(site="mlp_out").steering(layer_name=1).site == "mlp_out"
    np.testing.assert_array_equal(vector.vector.numpy(), A)


# --- Files ----------------------------------------------------------------------------------------

ABOUT = {"site": "mlp_out", "method": "pca", "label": "happy − “sad”", "model": "gpt2"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_direction_survives_its_file(tmp_path, dtype):
    before = direction(**ABOUT).to(dtype=dtype)
    before.save(tmp_path / "folder" / "happy.safetensors")
    after = Direction.load(tmp_path / "folder" / "happy.safetensors")
    assert after.vector.dtype == dtype
    assert torch.equal(after.vector, before.vector)
    assert {name: getattr(after, name) for name in ABOUT} == ABOUT
    assert after.layer == 2


def test_several_layers_survive_their_file(tmp_path):
    path = tmp_path / "all.safetensors"
    save_directions({10: direction(A, 10), 2: direction(B, 2, label="b")}, path)
    found = load_directions(path)
    assert list(found) == [2, 10]
    assert found[2].label == "b"
    np.testing.assert_array_equal(found[10].vector.numpy(), A)
    with pytest.raises(RecordFileError, match="layers 2, 10: read it by load_directions"):
        Direction.load(path)


def test_other_files_are_refused(tmp_path):
    path = tmp_path / "other.safetensors"
    path.write_bytes(b"not a file of this kind at all, but long enough")
    with pytest.raises(RecordFileError, match=r"other\.safetensors cannot be read"):
        Direction.load(path)
    with pytest.raises(RecordFileError, match="no file"):
        Direction.load(tmp_path / "missing")


@pytest.mark.parametrize("wrong", [{}, [direction()], {3: direction()}, {2: A}, None])
def test_by_layer_refuses_what_has_no_place(wrong):
    with pytest.raises(InputError, match="layer"):
        by_layer(wrong)
