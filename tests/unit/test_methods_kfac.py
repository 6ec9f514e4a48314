"""K-FAC against dense solves in float64."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hpc_kfac.layers.batch import LayerShape
from hpc_kfac.linalg.spatial import SpatiallyUncorrelated
from hpc_kfac.linalg.structure import Blocks, Dense, Diagonal, Identity
from hpc_kfac.methods import KFAC, State
from unit.fake_batch import FakeBatch, correlated_batch, names

SHAPE = LayerShape(2, 5, 4, bias=True)
CONV = LayerShape(2, 7, 4, kernel=3, bias=True)
EMBEDDING = LayerShape(1, 6, 3, input_structure=Diagonal())
NORM = LayerShape(3, 2, 1, output_structure=Identity(), bias=True)
VARIANTS = {
    "dense": {},
    "one-sided": {"output_structure": "identity"},
    "other-sided": {"input_structure": "identity"},
    "unpreconditioned": {"input_structure": "identity", "output_structure": "identity"},
    "diagonal": {"input_structure": "diagonal"},
    "blocks": {"input_structure": "block", "output_structure": "block", "block_size": 3},
    "diagonal-above": {"diagonal_above": 4},
    "spatial": {"spatially_uncorrelated": True},
}


def prepared(method: KFAC, shape: LayerShape, damping: float, seed: int = 0) -> tuple[FakeBatch, State]:
    batch = correlated_batch(shape.blocks, 11, 2, shape.outputs, shape.inputs, seed)
    state: State = {}
    method.fold(state, method.statistics(batch, state, shape), method.decay)
    state.update(method.refresh(state, shape, damping))
    return batch, state


def dense_factors(method: KFAC, state: State, shape: LayerShape) -> tuple[Tensor, Tensor]:
    """A and G as full matrices, read from the running state alone."""
    a_structure, g_structure = method.structures(shape)
    empty = torch.zeros(shape.blocks, 0, dtype=torch.float64)
    a, g = state.get("A", empty), state.get("G", empty)
    return a_structure.to_dense(a, shape.inputs), g_structure.to_dense(g, shape.outputs)


def solve_kron(g: Tensor, a: Tensor, gradient: Tensor, damping: float) -> Tensor:
    """(kron(G, A) + damping I)^-1 vec(D), one block at a time, D row by row."""
    solved = []
    for block in range(a.shape[0]):
        matrix = torch.kron(g[block], a[block])
        matrix = matrix + damping * torch.eye(len(matrix), dtype=matrix.dtype)
        solved.append(torch.linalg.solve(matrix, gradient[block].reshape(-1)).reshape(gradient[block].shape))
    return torch.stack(solved)


def inverse_power(matrix: Tensor, power: float) -> Tensor:
    values, q = torch.linalg.eigh(matrix)
    return q @ torch.diag_embed(values**-power) @ q.mT


@pytest.mark.parametrize("shape", [SHAPE, CONV, EMBEDDING, NORM], ids=["linear", "conv", "embedding", "norm"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_eigen_is_the_dense_solve(variant: str, shape: LayerShape) -> None:
    method = KFAC(relative_damping=False, solver="eigen", **VARIANTS[variant])
    batch, state = prepared(method, shape, 0.07)
    a, g = dense_factors(method, state, shape)
    for damping in (0.07, 3.0):  # damping counts when preconditioning, not when refreshing
        update = method.precondition(batch.gradient(), state, shape, damping)
        torch.testing.assert_close(update, solve_kron(g, a, batch.gradient(), damping))


@given(st.integers(1, 3), st.integers(1, 6), st.integers(1, 6), st.floats(1e-3, 10.0))
@settings(max_examples=25, deadline=None)
def test_eigen_is_the_dense_solve_for_any_size(p: int, o: int, a: int, damping: float) -> None:
    shape, method = LayerShape(p, a, o), KFAC(solver="eigen", relative_damping=False)
    batch, state = prepared(method, shape, damping)
    expected = solve_kron(*reversed(dense_factors(method, state, shape)), batch.gradient(), damping)
    torch.testing.assert_close(method.precondition(batch.gradient(), state, shape, damping), expected)


@pytest.mark.parametrize("shape", [SHAPE, CONV, EMBEDDING, NORM], ids=["linear", "conv", "embedding", "norm"])
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("power", [1.0, 0.5])
@pytest.mark.parametrize("relative", [False, True])
def test_split_damping_is_the_dense_solve(relative: bool, power: float, variant: str, shape: LayerShape) -> None:
    damping = 0.07
    method = KFAC(solver="cholesky", power=power, relative_damping=relative, **VARIANTS[variant])
    batch, state = prepared(method, shape, damping)
    a, g = dense_factors(method, state, shape)
    a_structure, g_structure = method.structures(shape)
    expected = []
    for block in range(shape.blocks):
        mean_a, mean_g = float(a[block].trace()) / shape.inputs, float(g[block].trace()) / shape.outputs
        pi = math.sqrt(mean_a / mean_g)
        add_a, add_g = pi * math.sqrt(damping), math.sqrt(damping) / pi
        if relative and power == 1.0:
            add_a, add_g = math.sqrt(damping) * mean_a, math.sqrt(damping) * mean_g
        if relative and power == 0.5:
            add_a, add_g = damping * mean_a, damping * mean_g
        a_alone, g_alone = isinstance(g_structure, Identity), isinstance(a_structure, Identity)
        if a_alone:
            add_a, add_g = damping * (mean_a if relative else 1.0), 0.0
        if g_alone:
            add_a, add_g = 0.0, damping * (mean_g if relative else 1.0)
        if a_alone and g_alone:
            add_a, add_g = damping, 0.0
        eye_a, eye_g = (torch.eye(d, dtype=torch.float64) for d in (shape.inputs, shape.outputs))
        left = inverse_power(g[block] + add_g * eye_g, power)
        right = inverse_power(a[block] + add_a * eye_a, power)
        expected.append(left @ batch.gradient()[block] @ right)
    update = method.precondition(batch.gradient(), state, shape, damping)
    torch.testing.assert_close(update, torch.stack(expected))


@pytest.mark.parametrize("variant", [name for name in VARIANTS if name != "unpreconditioned"])
def test_relative_damping_of_the_eigen_solver_is_a_share_of_the_mean_eigenvalue(variant: str) -> None:
    method = KFAC(solver="eigen", relative_damping=True, **VARIANTS[variant])
    batch, state = prepared(method, SHAPE, 0.2)
    a, g = dense_factors(method, state, SHAPE)
    update = method.precondition(batch.gradient(), state, SHAPE, 0.2)
    for block in range(SHAPE.blocks):
        product = torch.kron(g[block], a[block])
        damping = 0.2 * float(product.trace()) / len(product)
        only = slice(block, block + 1)
        torch.testing.assert_close(update[only], solve_kron(g[only], a[only], batch.gradient()[only], damping))


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("shape", [SHAPE, CONV, NORM], ids=["linear", "conv", "norm"])
def test_quadratic_is_the_dense_form_and_closes_the_identity(variant: str, shape: LayerShape) -> None:
    method, damping = KFAC(solver="eigen", relative_damping=False, **VARIANTS[variant]), 0.07
    batch, state = prepared(method, shape, damping)
    a, g = dense_factors(method, state, shape)
    gradient = batch.gradient()
    update = method.precondition(gradient, state, shape, damping)
    expected = sum(u.reshape(-1) @ torch.kron(g[i], a[i]) @ u.reshape(-1) for i, u in enumerate(update))
    quadratic = method.quadratic(update, state, shape)
    torch.testing.assert_close(quadratic, torch.as_tensor(expected))
    torch.testing.assert_close((update * gradient).sum(), quadratic + damping * update.square().sum())


@pytest.mark.parametrize("settings_", [{"solver": "eigen"}, {"solver": "cholesky"}, {"power": 0.5}])
def test_refresh_is_repeatable_and_reads_only(settings_: dict) -> None:
    method = KFAC(relative_damping=False, **settings_)
    _, state = prepared(method, SHAPE, 0.1)
    before = {name: value.clone() for name, value in state.items()}
    first, second = method.refresh(state, SHAPE, 0.1), method.refresh(state, SHAPE, 0.1)
    assert set(first) == set(names(method, SHAPE, "solved"))
    for name, value in first.items():
        assert torch.equal(value, second[name])
    for name, value in before.items():
        assert torch.equal(value, state[name])


@pytest.mark.parametrize("settings_", [{"solver": "eigen"}, {"solver": "cholesky"}, {"power": 0.5}])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("side", ["A", "G"])
def test_non_finite_factor_is_an_error(settings_: dict, bad: float, side: str) -> None:
    method = KFAC(relative_damping=False, **settings_)
    _, state = prepared(method, SHAPE, 0.1)
    state[side][1, 0, 0] = bad
    with pytest.raises(torch.linalg.LinAlgError):
        method.refresh(state, SHAPE, 0.1)


@pytest.mark.parametrize("settings_", [{"solver": "eigen"}, {"solver": "cholesky"}, {"power": 0.5}])
@pytest.mark.parametrize("relative", [False, True])
@pytest.mark.parametrize("zero", [("A",), ("G",), ("A", "G")])
def test_zero_factors_give_finite_updates(settings_: dict, relative: bool, zero: tuple[str, ...]) -> None:
    method = KFAC(relative_damping=relative, **settings_)
    batch, state = prepared(method, SHAPE, 0.1)
    for side in zero:
        state[side].zero_()
    state.update(method.refresh(state, SHAPE, 0.1))
    assert bool(method.precondition(batch.gradient(), state, SHAPE, 0.1).isfinite().all())


@pytest.mark.parametrize("settings_", [{"solver": "eigen"}, {"solver": "cholesky"}, {"power": 0.5}])
def test_rank_deficient_factors_and_one_by_one(settings_: dict) -> None:
    method = KFAC(relative_damping=False, **settings_)
    for shape, samples in ((LayerShape(1, 9, 7), 2), (LayerShape(1, 1, 1), 5)):
        batch = correlated_batch(1, samples, 1, shape.outputs, shape.inputs)
        state = method.statistics(batch, {}, shape)
        state.update(method.refresh(state, shape, 0.1))
        update = method.precondition(batch.gradient(), state, shape, 0.1)
        assert bool(update.isfinite().all())
        assert float((update * batch.gradient()).sum()) > 0


def test_fold_starts_from_the_first_batch_and_weighs_the_old_value() -> None:
    method = KFAC(solver="eigen", relative_damping=False)
    state: State = {}
    first = method.statistics(correlated_batch(2, 5, 1, 4, 5, seed=1), state, SHAPE)
    method.fold(state, {name: value.clone() for name, value in first.items()}, 0.9)
    assert torch.equal(state["A"], first["A"])
    held = state["A"]
    second = method.statistics(correlated_batch(2, 5, 1, 4, 5, seed=2), state, SHAPE)
    method.fold(state, second, 0.9)
    assert state["A"] is held
    torch.testing.assert_close(state["A"], 0.9 * first["A"] + 0.1 * second["A"])


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("settings_", [{"solver": "eigen"}, {"solver": "cholesky"}, {"power": 0.5}])
@pytest.mark.parametrize("shape", [SHAPE, CONV, EMBEDDING, NORM], ids=["linear", "conv", "embedding", "norm"])
def test_state_table_is_what_the_functions_make(shape: LayerShape, settings_: dict, variant: str) -> None:
    method = KFAC(relative_damping=False, **settings_, **VARIANTS[variant])
    _, state = prepared(method, shape, 0.1)
    table = {spec.name: spec for spec in method.state(shape)}
    assert {name: spec.shape for name, spec in table.items()} == {name: tuple(t.shape) for name, t in state.items()}
    for name, spec in table.items():
        if spec.symmetric:
            torch.testing.assert_close(state[name], state[name].mT)
        assert state[name].is_contiguous()


def test_structures_are_bounded_by_the_layer() -> None:
    assert KFAC(solver="eigen").structures(SHAPE) == (Dense(), Dense())
    assert KFAC(solver="eigen").structures(EMBEDDING) == (Diagonal(), Dense())
    assert KFAC(solver="eigen").structures(NORM) == (Dense(), Identity())
    assert KFAC(solver="eigen", diagonal_above=4).structures(SHAPE) == (Diagonal(), Dense())
    assert KFAC(solver="eigen", input_structure="block", block_size=3).structures(SHAPE) == (Blocks(3), Dense())
    assert KFAC(solver="eigen", input_structure="block", block_size=8).structures(SHAPE) == (Dense(), Dense())
    spatial = KFAC(solver="eigen", relative_damping=False, spatially_uncorrelated=True, diagonal_above=2)
    assert spatial.structures(CONV) == (SpatiallyUncorrelated(3, True), Diagonal())
    assert spatial.structures(LayerShape(1, 10, 2, kernel=3, bias=True))[0] == Diagonal()


def test_low_precision_application_is_close_and_keeps_dtype() -> None:
    for settings_ in ({"solver": "eigen"}, {"solver": "cholesky"}, {"power": 0.5}):
        method = KFAC(relative_damping=False, **settings_)
        batch, state = prepared(method, SHAPE, 0.5)
        exact = method.precondition(batch.gradient(), state, SHAPE, 0.5)
        low = dict(state)
        for spec in method.state(SHAPE):
            operand = spec.name.endswith(("basis", "inverse", "root"))
            low[spec.name] = state[spec.name].to(torch.bfloat16 if operand else torch.float32)
        update = method.precondition(batch.gradient().float(), low, SHAPE, 0.5)
        assert update.dtype == torch.float32
        cosine = torch.nn.functional.cosine_similarity(update.flatten().double(), exact.flatten(), dim=0)
        assert 0.999 < float(cosine) <= 1.0 + 1e-9


@pytest.mark.parametrize("settings_", [{"solver": "eigen"}, {"solver": "cholesky"}, {"power": 0.5}])
def test_only_large_layers_are_applied_in_low_precision(settings_: dict) -> None:
    method = KFAC(relative_damping=False, **settings_)
    for shape, large in ((NORM, False), (LayerShape(1, 288, 32), False), (LayerShape(1, 576, 64), True)):
        operands = {spec.name for spec in method.state(shape) if spec.operand}
        ends = ("basis", "inverse", "root")
        assert operands == {spec.name for spec in method.state(shape) if large and spec.name.endswith(ends)}


def test_cost_follows_the_formulas() -> None:
    shape = LayerShape(3, 20, 10)
    eigen, cholesky, root = (
        KFAC(**s).cost(shape) for s in ({"solver": "eigen"}, {"solver": "cholesky"}, {"power": 0.5})
    )
    assert eigen.statistics == 3 * 2 * (20**2 + 10**2)
    assert eigen.refresh == 3 * 9 * (20**3 + 10**3)
    assert eigen.precondition == 3 * (4 * 200 * 30 + 3 * 200)
    assert (cholesky.refresh, root.refresh) == (3 * 9000, 3 * 11 * 9000)
    assert cholesky.precondition == root.precondition == 3 * 2 * 200 * 30
    one_sided = KFAC(solver="eigen", output_structure="identity").cost(shape)
    assert one_sided.precondition == 3 * (4 * 20 * 20 * 10 + 3 * 200)


@pytest.mark.parametrize(
    ("settings_", "message"),
    [
        ({"damping": 0.0}, "damping is 0.0"),
        ({"damping": -1.0}, "damping is -1.0"),
        ({"decay": 1.0}, "decay is 1.0"),
        ({"decay": -0.1}, "decay is -0.1"),
        ({"solver": "lu"}, "solver is 'lu'"),
        ({"power": 2.0}, "power is 2.0"),
        ({"input_structure": "sparse"}, "input_structure is 'sparse'"),
        ({"input_structure": "block"}, "block_size is None"),
        ({"block_size": 4}, "block_size is 4"),
        ({"output_structure": "block", "block_size": 0}, "block_size is 0"),
        ({"diagonal_above": 0}, "diagonal_above is 0"),
    ],
)
def test_bad_settings_are_named(settings_: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        KFAC(relative_damping=False, **settings_)
