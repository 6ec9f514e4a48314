"""Jorge's roots against the roots of the average that they follow."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from hpc_kfac.layers.batch import LayerShape
from hpc_kfac.linalg.structure import Diagonal
from hpc_kfac.methods.method import State
from hpc_kfac.methods.moments.gradient_moments import Shampoo
from hpc_kfac.methods.moments.jorge import Jorge

close = torch.testing.assert_close
SHAPE = LayerShape(1, 4, 4)


def gradients(count: int, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(1, 4, 4, generator=generator, dtype=torch.float64) for _ in range(count)]


def after(method: Shampoo, given: list[Tensor], shape: LayerShape = SHAPE) -> State:
    """The state after a refresh with each gradient."""
    running: State = {}
    solved: State = {}
    for gradient in given:
        method.fold_gradient(running, solved, gradient, shape)
        solved |= method.refresh({**running, **solved}, shape, float(method.damping))  # type: ignore[arg-type]
    return {**running, **solved}


def average(given: list[Tensor], root: Tensor, least: float) -> Tensor:
    """L by its definition, with the betas that belong to exact roots: an oracle with eigenvalues."""
    matrix = root + given[0][0] @ given[0][0].mT
    for gradient in given[1:]:
        s = gradient[0] @ gradient[0].mT
        norm = torch.linalg.norm(torch.linalg.inv(matrix) @ s)
        beta = max(least, float(norm / (norm + 1)))
        matrix = beta * matrix + (1 - beta) * s
    return matrix


@pytest.mark.parametrize(("least", "within"), [(0.0, 0.3), (0.9, 0.03), (0.98, 0.005)])
def test_root_follows_the_average_where_gradients_commute(least: float, within: float) -> None:
    generator = torch.Generator().manual_seed(1)
    basis = torch.linalg.qr(torch.randn(4, 4, generator=generator, dtype=torch.float64))[0]
    values = torch.rand(30, 4, generator=generator, dtype=torch.float64) + 0.2
    given = [(basis * v @ basis.mT)[None] for v in values]
    state = after(Jorge(damping=0.5, relative_damping=False, decay=least), given)
    expected = average(given, 0.5 * torch.eye(4, dtype=torch.float64), least)
    found = torch.linalg.matrix_power(torch.linalg.inv(state["G_root"][0]), 4)
    assert float(torch.linalg.norm(found - expected) / torch.linalg.norm(expected)) < within


def test_it_starts_at_the_root_of_the_first_moment_and_goes_on_by_the_series() -> None:
    given = gradients(2)
    method = Jorge(damping=2.0, relative_damping=False, decay=0.0)
    values, basis = torch.linalg.eigh(given[0][0] @ given[0][0].mT + 2.0 * torch.eye(4))
    m = basis * values**-0.25 @ basis.mT
    close(after(method, given[:1])["G_root"][0], m)
    state = after(method, given)
    x = torch.linalg.matrix_power(m, 4) @ given[1][0] @ given[1][0].mT
    norm = torch.linalg.norm(x)
    y = x / norm
    series = m @ (torch.eye(4) - y / 4 + 5 * y @ y / 32) * (norm / (norm + 1)) ** -0.25
    close(state["G_root"][0], (series + series.mT) / 2)


def test_without_commuting_gradients_it_stays_near_but_is_not_shampoo() -> None:
    given = gradients(40)
    state = after(Jorge(damping=1.0, relative_damping=False, decay=0.9), given)
    expected = average(given, torch.eye(4, dtype=torch.float64), 0.9)
    found = torch.linalg.matrix_power(torch.linalg.inv(state["G_root"][0]), 4)
    error = float(torch.linalg.norm(found - expected) / torch.linalg.norm(expected))
    assert 1e-3 < error < 0.5
    shampoo = after(Shampoo(damping=1e-8, decay=0.9), given)
    assert not torch.allclose(state["G_root"], shampoo["G_root"], rtol=0.01)


def test_update_is_two_sided_and_as_long_as_the_gradient() -> None:
    given = gradients(5)
    method = Jorge(decay=0.5)
    state = after(method, given)
    update = method.precondition(given[-1], state, SHAPE, 1.0)
    product = state["G_root"] @ given[-1] @ state["A_root"]
    close(update, product * given[-1].norm() / product.norm())


def test_quadratic_is_that_of_the_inverse_roots() -> None:
    method = Jorge(decay=0.5)
    state = after(method, gradients(5))
    (delta,) = gradients(1, seed=3)
    half = torch.linalg.solve(state["G_root"], delta) @ torch.linalg.inv(state["A_root"])
    close(method.quadratic(delta, state, SHAPE), half.square().sum())


def test_diagonal_factors_are_the_diagonal_case_of_dense_ones() -> None:
    generator = torch.Generator().manual_seed(2)
    given = [torch.diag(torch.rand(4, generator=generator, dtype=torch.float64) + 0.1)[None] for _ in range(6)]
    settings: dict[str, Any] = {"decay": 0.3}
    dense = after(Jorge(**settings), given)
    shape = LayerShape(1, 4, 4, input_structure=Diagonal(), output_structure=Diagonal())
    close(torch.diag_embed(after(Jorge(**settings), given, shape)["A_root"]), dense["A_root"])


@pytest.mark.parametrize("scale", [0.0, 1e-12, 1e12])
def test_degenerate_gradients_leave_finite_roots(scale: float) -> None:
    given = [scale * gradient for gradient in gradients(3)]
    state = after(Jorge(), given)
    assert all(bool(torch.isfinite(tensor).all()) for tensor in state.values())


def test_refuses_sums() -> None:
    with pytest.raises(ValueError, match="accumulate is true"):
        Jorge(accumulate=True)
