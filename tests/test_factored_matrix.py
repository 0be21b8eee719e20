"""Products of thin matrices against the same matrices written out, in double."""

import pytest
import torch

import factored_matrix
from factored_matrix import FactoredMatrix
from forward_pass import InputError


def thin(m, r, n, *stack, seed=0):
    """Return a product with factors of float64."""
    generator = torch.Generator().manual_seed(seed)
    left, right = (
        torch.randn(*stack, *shape, generator=generator, dtype=torch.float64)
        for shape in ((m, r), (r, n))
    )
    return FactoredMatrix(left, right)


SHAPES = {"tall": (30, 4, 12), "square": (20, 5, 20), "full rank": (6, 6, 6), "wide": (5, 9, 7)}
"""m, r, n; the last has an inner size above both others."""


@pytest.fixture(params=SHAPES)
def matrix(request):
    return thin(*SHAPES[request.param])


# --- Numbers --------------------------------------------------------------------------------------


def test_the_norm_is_that_of_the_dense_matrix(matrix):
    torch.testing.assert_close(matrix.norm(), torch.linalg.matrix_norm(matrix.full()))


def test_singular_values_and_vectors_are_those_of_the_dense_matrix(matrix):
    dense = matrix.left @ matrix.right
    u, values, v = matrix.svd()
    own = torch.linalg.svd(dense, full_matrices=False)
    k = len(values)
    torch.testing.assert_close(values, own.S[:k])
    torch.testing.assert_close(own.S[k:], torch.zeros_like(own.S[k:]))
    torch.testing.assert_close(u @ values.diag() @ v, dense)
    torch.testing.assert_close(u.mT @ u, torch.eye(k, dtype=u.dtype))
    torch.testing.assert_close(v @ v.mT, torch.eye(k, dtype=u.dtype))
    signs = (u * own.U[:, :k]).sum(0)
    torch.testing.assert_close(signs.abs(), torch.ones_like(signs))


@pytest.mark.parametrize("shape", [(20, 5, 20), (6, 6, 6)])
def test_eigenvalues_are_those_of_the_dense_matrix_without_its_zeros(shape):
    matrix = thin(*shape)
    dense = torch.linalg.eigvals(matrix.full())
    dense = dense[dense.abs().argsort(descending=True)]
    found = matrix.eigenvalues()
    assert dense[matrix.rank :].abs().max() < 1e-9 if matrix.rank < len(dense) else True

    def ordered(values):
        return sorted(values.tolist(), key=lambda z: (round(z.real, 8), round(z.imag, 8)))

    torch.testing.assert_close(
        torch.tensor(ordered(found)), torch.tensor(ordered(dense[: matrix.rank]))
    )
    assert (found.abs().diff() <= 1e-12).all()
    torch.testing.assert_close(matrix.trace(), matrix.full().trace())
    torch.testing.assert_close(found.sum().real, matrix.full().trace())


@pytest.mark.parametrize("largest", [True, False])
@pytest.mark.parametrize("entries", [1, 100, 2**24])
def test_the_largest_entries_do_not_depend_on_the_chunks(monkeypatch, largest, entries):
    monkeypatch.setattr(factored_matrix, "CHUNK_ENTRIES", entries)
    matrix = thin(30, 4, 12)
    values, rows, columns = matrix.top_entries(17, largest=largest)
    dense = matrix.full().flatten()
    own = dense.topk(17, largest=largest)
    torch.testing.assert_close(values, own.values)
    assert (rows * 12 + columns).tolist() == own.indices.tolist()
    assert len(matrix.top_entries(360).values) == 360


def test_no_more_than_a_chunk_of_the_product_exists(monkeypatch):
    monkeypatch.setattr(factored_matrix, "CHUNK_ENTRIES", 40)
    matrix, seen = thin(30, 4, 12), []
    own = torch.Tensor.__matmul__
    monkeypatch.setattr(torch.Tensor, "__matmul__", lambda a, b: seen.append(own(a, b)) or seen[-1])
    matrix.top_entries(3)
    assert len(seen) == 10 and max(each.numel() for each in seen) <= 40


# --- Products -------------------------------------------------------------------------------------


def test_products_on_both_sides(matrix):
    m, n = matrix.shape
    left, right = torch.randn(3, m, dtype=torch.float64), torch.randn(n, 2, dtype=torch.float64)
    dense = matrix.full()
    torch.testing.assert_close((matrix @ right).full(), dense @ right)
    torch.testing.assert_close((left @ matrix).full(), left @ dense)
    torch.testing.assert_close(matrix.apply(left), left @ dense)
    torch.testing.assert_close(matrix.mT.full(), dense.mT)
    other = thin(n, 2, 8, seed=1)
    product = matrix @ other
    assert product.rank == min(matrix.rank, 2)
    torch.testing.assert_close(product.full(), dense @ other.full())
    torch.testing.assert_close((other.mT @ matrix.mT).full(), product.full().mT)


def test_a_stack_is_its_matrices_one_by_one():
    stack = thin(9, 3, 9, 4)
    assert stack.shape == (4, 9, 9)
    for name in ("norm", "trace"):
        each = torch.stack([getattr(stack[i], name)() for i in range(4)])
        torch.testing.assert_close(getattr(stack, name)(), each)
    torch.testing.assert_close(stack.svd().values[2], stack[2].svd().values)
    torch.testing.assert_close(stack.eigenvalues()[3].abs(), stack[3].eigenvalues().abs())
    torch.testing.assert_close(stack[1:3].full(), stack.full()[1:3])


def test_one_factor_may_be_shared_by_a_stack():
    left, right = thin(9, 3, 5, 4).left, thin(9, 3, 5).right
    stack = FactoredMatrix(left, right)
    assert stack.shape == (4, 9, 5)
    torch.testing.assert_close(stack[2].full(), left[2] @ right)
    torch.testing.assert_close(FactoredMatrix(left, right[None])[3].full(), left[3] @ right)


def test_half_precision_is_widened():
    factor = torch.randn(4, 2, dtype=torch.bfloat16)
    matrix = FactoredMatrix(factor, factor.mT)
    assert matrix.left.dtype == matrix.norm().dtype == torch.float32
    assert FactoredMatrix(factor, factor.double().mT).left.dtype == torch.float64
    assert not FactoredMatrix(factor.requires_grad_(), factor.mT).full().requires_grad


def test_it_says_what_it_is_and_refuses_what_it_is_not():
    matrix = thin(30, 4, 12)
    assert repr(matrix) == "FactoredMatrix([30, 12], rank 4 or less)"
    with pytest.raises(InputError, match=r"left \[..., m, r\] and right \[..., r, n\] share r; ca"):
        FactoredMatrix(torch.ones(3, 2), torch.ones(3, 2))
    with pytest.raises(InputError, match=r"right is a matrix .*; came \[2\]"):
        FactoredMatrix(torch.ones(3, 2), torch.ones(2))
    with pytest.raises(InputError, match=r"left is a matrix .*; came list"):
        FactoredMatrix([[1.0]], torch.ones(1, 1))
    with pytest.raises(InputError, match="this is one matrix, not a stack"):
        matrix[0]
    for name in ("trace", "eigenvalues"):
        with pytest.raises(InputError, match=r"needs a square matrix; this one is \[30, 12\]"):
            getattr(matrix, name)()
    for k in (0, 361):
        with pytest.raises(InputError, match=f"k is 1 to 360 entries; came {k}"):
            matrix.top_entries(k)
    with pytest.raises(InputError, match="those of one matrix"):
        thin(3, 2, 3, 2).top_entries(1)


@pytest.mark.parametrize("seed", range(4))
def test_the_signs_of_singular_vectors_are_the_same_everywhere(seed):
    """Factored another way, as another computer's routines would, the vectors are the same."""
    generator = torch.Generator().manual_seed(seed)
    left, right = (
        torch.randn(shape, generator=generator, dtype=torch.float64)
        for shape in ((3, 9, 4), (3, 4, 7))
    )
    turn = torch.linalg.qr(torch.randn(3, 4, 4, generator=generator, dtype=torch.float64)).Q
    one, other = (
        FactoredMatrix(left, right).svd(),
        FactoredMatrix(left @ turn, turn.mT @ right).svd(),
    )
    torch.testing.assert_close(one.left, other.left)
    torch.testing.assert_close(one.right, other.right)
    assert (one.left.gather(-2, one.left.abs().argmax(-2, keepdim=True)) > 0).all()
    torch.testing.assert_close(one.left * one.values[:, None] @ one.right, left @ right)
