"""Every structure against the dense algebra of its own `to_dense`, in float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hpc_kfac.linalg.spatial import SpatiallyUncorrelated
from hpc_kfac.linalg.structure import Blocks, Dense, Diagonal, Identity, Structure

LinAlgError = torch.linalg.LinAlgError


@st.composite
def cases(draw: st.DrawFn) -> tuple[Structure, Tensor, int]:
    """A structure, a random positive definite tensor of it for p blocks, and d."""
    p, d = draw(st.integers(1, 3)), draw(st.integers(1, 9))
    kind = draw(st.sampled_from(["dense", "blocks", "diagonal", "identity", "spatial"]))
    structure: Structure
    if kind == "spatial":
        kernel, bias = draw(st.integers(1, 4)), draw(st.booleans())
        d = kernel * draw(st.integers(1, 4)) + bias
        structure = SpatiallyUncorrelated(kernel, bias)
    elif kind == "blocks":
        structure = Blocks(draw(st.integers(1, 10)))
    else:
        structure = {"dense": Dense(), "diagonal": Diagonal(), "identity": Identity()}[kind]
    rows = normal(p, 2 * d + 1, d, seed=draw(st.integers(0, 1000)))
    return structure, structure.from_dense(rows.mT @ rows / rows.shape[1]), d


def normal(*size: int, seed: int = 0) -> Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def eye(d: int) -> Tensor:
    return torch.eye(d, dtype=torch.float64)


def dampings(p: int) -> list[Tensor | float]:
    return [0.3, torch.linspace(0.1, 0.5, p, dtype=torch.float64)]


@given(cases())
@settings(max_examples=60, deadline=None)
def test_shape_trace_and_round_trip(case: tuple[Structure, Tensor, int]) -> None:
    structure, tensor, d = case
    p = tensor.shape[0]
    dense = structure.to_dense(tensor, d)
    assert tuple(tensor.shape) == structure.shape(p, d)
    assert dense.shape == (p, d, d)
    torch.testing.assert_close(dense, dense.mT)
    torch.testing.assert_close(structure.from_dense(dense), tensor)
    torch.testing.assert_close(structure.trace(tensor, d), dense.diagonal(dim1=1, dim2=2).sum(-1))
    if structure.symmetric:
        torch.testing.assert_close(tensor, tensor.mT)


@given(cases())
@settings(max_examples=60, deadline=None)
def test_products(case: tuple[Structure, Tensor, int]) -> None:
    structure, tensor, d = case
    p = tensor.shape[0]
    dense = structure.to_dense(tensor, d)
    left, right = normal(p, d, 5, seed=1), normal(p, 4, d, seed=2)
    torch.testing.assert_close(structure.left(tensor, left), dense @ left)
    torch.testing.assert_close(structure.right(right, tensor), right @ dense)


@given(cases())
@settings(max_examples=60, deadline=None)
def test_inverse_and_root(case: tuple[Structure, Tensor, int]) -> None:
    structure, tensor, d = case
    p = tensor.shape[0]
    if isinstance(structure, Identity):
        with pytest.raises(ValueError, match="other factor"):
            structure.inverse(tensor, 0.1)
        return
    before = tensor.clone()
    vectors = normal(p, d, 3, seed=1)
    for damping in dampings(p):
        column = damping.reshape(p, 1, 1) if isinstance(damping, Tensor) else damping
        damped = structure.to_dense(tensor, d) + column * eye(d)
        inverse, root = structure.inverse(tensor, damping), structure.inverse_root(tensor, damping)
        assert tuple(inverse.shape) == structure.inverse_shape(p, d) == tuple(root.shape)
        torch.testing.assert_close(structure.to_dense(inverse, d) @ damped, eye(d).expand(p, d, d))
        torch.testing.assert_close(structure.left(inverse, damped @ vectors), vectors)
        torch.testing.assert_close(structure.right((damped @ vectors).mT, inverse), vectors.mT)
        twice = structure.left(root, structure.left(root, damped @ vectors))
        torch.testing.assert_close(twice, vectors)
        assert torch.equal(inverse, structure.inverse(tensor, damping))
    assert torch.equal(tensor, before)


@given(cases())
@settings(max_examples=60, deadline=None)
def test_eigh_and_rotations(case: tuple[Structure, Tensor, int]) -> None:
    structure, tensor, d = case
    p = tensor.shape[0]
    values, basis = structure.eigh(tensor, d)
    assert values.shape == (p, d)
    assert (None if basis is None else tuple(basis.shape)) == structure.basis_shape(p, d)
    full = eye(d).expand(p, d, d)
    q = structure.unrotate_left(full, basis)
    torch.testing.assert_close(q.mT @ q, full)
    torch.testing.assert_close(q @ torch.diag_embed(values) @ q.mT, structure.to_dense(tensor, d))
    left, right = normal(p, d, 5, seed=1), normal(p, 4, d, seed=2)
    torch.testing.assert_close(structure.unrotate_left(left, basis), q @ left)
    torch.testing.assert_close(structure.rotate_right(right, basis), right @ q)
    torch.testing.assert_close(structure.unrotate_right(right, basis), right @ q.mT)


@given(cases(), st.integers(1, 6))
@settings(max_examples=60, deadline=None)
def test_gram_is_the_part_of_the_dense_gram(case: tuple[Structure, Tensor, int], n: int) -> None:
    structure, tensor, d = case
    rows = normal(tensor.shape[0], n, d, seed=3)
    torch.testing.assert_close(structure.gram(rows), structure.from_dense(rows.mT @ rows))


@given(cases())
@settings(max_examples=30, deadline=None)
def test_from_dense_is_the_nearest(case: tuple[Structure, Tensor, int]) -> None:
    """A projection leaves a residual orthogonal to every matrix of the structure; the fixed entries are left out."""
    structure, tensor, d = case
    p = tensor.shape[0]
    if isinstance(structure, Identity):
        return
    free = d - 1 if isinstance(structure, SpatiallyUncorrelated) and structure.bias else d
    raw = normal(p, d, d, seed=4)
    matrix = raw + raw.mT
    residual = matrix - structure.to_dense(structure.from_dense(matrix), d)
    inner = (residual * structure.to_dense(tensor, d))[:, :free, :free].sum((1, 2))
    torch.testing.assert_close(inner, torch.zeros_like(inner), atol=1e-9, rtol=0)


@pytest.mark.parametrize("structure", [Dense(), Blocks(2), Diagonal(), SpatiallyUncorrelated(2, True)])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_non_finite_input_is_an_error(structure: Structure, bad: float) -> None:
    tensor = structure.from_dense(eye(5)[None])
    tensor.view(-1)[0] = bad
    with pytest.raises(LinAlgError):
        structure.inverse(tensor, 0.1)
    with pytest.raises(LinAlgError):
        structure.inverse_root(tensor, 0.1)
    with pytest.raises(LinAlgError):
        structure.eigh(tensor, 5)


@pytest.mark.parametrize("structure", [Dense(), Blocks(2), Diagonal(), SpatiallyUncorrelated(2, False)])
def test_not_positive_definite_is_an_error(structure: Structure) -> None:
    tensor = structure.from_dense(-eye(4).expand(2, 4, 4))
    with pytest.raises(LinAlgError):
        structure.inverse(tensor, 0.5)
    values, _ = structure.eigh(tensor, 4)
    assert torch.equal(values, torch.zeros(2, 4, dtype=torch.float64))


def test_one_bad_block_among_good_ones_is_an_error() -> None:
    tensor = eye(3).repeat(4, 1, 1)
    tensor[2, 0, 0] = -5.0
    with pytest.raises(LinAlgError):
        Dense().inverse(tensor, 0.1)


def test_rank_deficient_and_zero_matrices_are_solved() -> None:
    row = normal(1, 1, 6)
    for tensor in (row.mT @ row, torch.zeros(1, 6, 6, dtype=torch.float64)):
        inverse = Dense().inverse(tensor, 0.1)
        torch.testing.assert_close(inverse @ (tensor + 0.1 * eye(6)), eye(6)[None])
        values, _ = Dense().eigh(tensor, 6)
        assert bool((values >= 0).all())


@pytest.mark.parametrize("d", [5, 7])
@pytest.mark.parametrize("seed", range(3))
def test_padding_of_the_last_block_never_mixes_with_zero_eigenvalues(d: int, seed: int) -> None:
    """Rank one in the padded block: all its other eigenvalues are zero, as are those of the padding."""
    row = normal(1, 1, d, seed=seed)
    structure = Blocks(4)
    values, basis = structure.eigh(structure.from_dense(row.mT @ row), d)
    q = structure.unrotate_left(eye(d)[None], basis)
    torch.testing.assert_close(q.mT @ q, eye(d)[None])
    assert values.shape == (1, d)


def test_low_precision_operands_keep_the_gradient_dtype() -> None:
    gradient = normal(1, 3, 6).float()
    tensor = Dense().gram(normal(1, 9, 6, seed=1)).to(torch.bfloat16)
    product = Dense().rotate_right(gradient, tensor)
    assert product.dtype == torch.float32
    torch.testing.assert_close(product, gradient @ tensor.float(), rtol=0.03, atol=0.3)
    assert torch.equal(product, (gradient.to(torch.bfloat16) @ tensor).float())


def test_sizes_that_do_not_fit_are_named() -> None:
    with pytest.raises(ValueError, match="block size is 0"):
        Blocks(0)
    with pytest.raises(ValueError, match="8 inputs are not channels x 3"):
        SpatiallyUncorrelated(3, False).shape(1, 8)
