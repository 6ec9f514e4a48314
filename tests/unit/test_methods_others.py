"""EKFAC, Eva and the sample-matrix method against dense solves in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from hpc_kfac.layers.batch import LayerShape
from hpc_kfac.linalg.structure import Diagonal, Identity
from hpc_kfac.methods import EKFAC, KFAC, Eva, Method, SampleMatrix, State
from unit.fake_batch import FakeBatch, correlated_batch, names

SHAPE = LayerShape(2, 5, 4, bias=True)
CONV = LayerShape(2, 7, 4, kernel=3, bias=True)
EMBEDDING = LayerShape(1, 6, 3, input_structure=Diagonal())
NORM = LayerShape(3, 2, 1, output_structure=Identity(), bias=True)
SHAPES = pytest.mark.parametrize("shape", [SHAPE, CONV, EMBEDDING, NORM], ids=["linear", "conv", "embedding", "norm"])
DAMPING = 0.07


def step(method: Method, state: State, batch: FakeBatch, shape: LayerShape, decay: float = 0.0) -> None:
    """Statistics, fold, refresh."""
    method.fold(state, method.statistics(batch, state, shape), decay)
    state.update(method.refresh(state, shape, DAMPING))


def settled(method: Method, shape: LayerShape, samples: int = 11, positions: int = 2) -> tuple[FakeBatch, State]:
    """A state after two statistics of the same batch around one refresh, so that EKFAC has measured its diagonal."""
    batch = correlated_batch(shape.blocks, samples, positions, shape.outputs, shape.inputs)
    state: State = {}
    step(method, state, batch, shape)
    method.fold(state, method.statistics(batch, state, shape), 0.0)
    return batch, state


def damped_solve(fisher: Tensor, gradient: Tensor, damping: float = DAMPING) -> Tensor:
    """(F + damping I)^-1 vec(D) for F [p, o a, o a]."""
    damped = fisher + damping * torch.eye(fisher.shape[-1], dtype=fisher.dtype)
    return torch.linalg.solve(damped, gradient.flatten(1).unsqueeze(-1)).reshape(gradient.shape)


def full_basis(method: EKFAC, state: State, shape: LayerShape) -> Tensor:
    """kron(Q_G, Q_A) as [p, o a, o a], column by column through the method's own structures."""
    a_structure, g_structure = method.structures(shape)
    columns = []
    for i in range(shape.outputs * shape.inputs):
        unit = torch.zeros(shape.blocks, shape.outputs * shape.inputs, dtype=torch.float64)
        unit[:, i] = 1.0
        matrix = unit.reshape(-1, shape.outputs, shape.inputs)
        matrix = g_structure.unrotate_left(matrix, state.get("G_basis"))
        columns.append(a_structure.unrotate_right(matrix, state.get("A_basis")).flatten(1))
    return torch.stack(columns, dim=-1)


def sample_fisher(batch: FakeBatch) -> Tensor:
    """E[u u^T] of the per-sample gradients, [p, o a, o a]."""
    u = batch.sample_gradients().flatten(2)
    return u.mT @ u / batch.count


def curvature(method: Method, state: State, batch: FakeBatch, shape: LayerShape) -> Tensor:
    """The dense F that a method stands for."""
    if isinstance(method, EKFAC):
        basis = full_basis(method, state, shape)
        return basis @ torch.diag_embed(state["second_moment"].flatten(1)) @ basis.mT
    if isinstance(method, Eva):
        a, g = batch.x.mean((1, 2)), batch.g.mean(1).sum(1)
        v = torch.einsum("po,pa->poa", g, a).flatten(1)
        return v[:, :, None] * v[:, None, :]
    x, g = batch.x.mean(2), batch.g.sum(2)
    u = torch.einsum("pno,pna->pnoa", g, x).flatten(2)
    return u.mT @ u / u.shape[1]


METHODS = {
    "ekfac": EKFAC(relative_damping=False),
    "ekfac-blocks": EKFAC(relative_damping=False, input_structure="block", output_structure="block", block_size=3),
    "ekfac-one-sided": EKFAC(relative_damping=False, output_structure="identity"),
    "ekfac-other-sided": EKFAC(relative_damping=False, input_structure="identity"),
    "ekfac-diagonal": EKFAC(relative_damping=False, input_structure="identity", output_structure="identity"),
    "ekfac-spatial": EKFAC(relative_damping=False, spatially_uncorrelated=True),
    "eva": Eva(relative_damping=False),
    "sample-matrix": SampleMatrix(rows=16, relative_damping=False),
}
EACH = pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)


@EACH
@SHAPES
def test_update_is_the_dense_solve(method: Method, shape: LayerShape) -> None:
    batch, state = settled(method, shape)
    gradient = batch.gradient()
    expected = damped_solve(curvature(method, state, batch, shape), gradient)
    torch.testing.assert_close(method.precondition(gradient, state, shape, DAMPING), expected)


@EACH
@SHAPES
def test_quadratic_closes_the_identity(method: Method, shape: LayerShape) -> None:
    batch, state = settled(method, shape)
    gradient = batch.gradient()
    update = method.precondition(gradient, state, shape, DAMPING)
    quadratic = method.quadratic(update, state, shape)
    u = update.flatten(1).unsqueeze(-1)
    dense = (u.mT @ curvature(method, state, batch, shape) @ u).sum()
    torch.testing.assert_close(quadratic, dense)
    torch.testing.assert_close((update * gradient).sum(), quadratic + DAMPING * update.square().sum())


@EACH
def test_refresh_is_repeatable_and_reads_only(method: Method) -> None:
    _, state = settled(method, SHAPE)
    before = {name: value.clone() for name, value in state.items()}
    first, second = method.refresh(state, SHAPE, 0.1), method.refresh(state, SHAPE, 0.1)
    rebased = {spec.name for spec in method.state(SHAPE) if spec.rebased}
    assert set(first) == set(names(method, SHAPE, "solved")) | rebased
    for name, value in first.items():
        assert torch.equal(value, second[name])
        assert all(value.data_ptr() != other.data_ptr() for other in state.values())
    for name, value in before.items():
        assert torch.equal(value, state[name])


@EACH
@SHAPES
def test_state_table_is_what_the_functions_make(method: Method, shape: LayerShape) -> None:
    _, state = settled(method, shape)
    table = {spec.name: spec for spec in method.state(shape)}
    assert {name: spec.shape for name, spec in table.items()} == {name: tuple(t.shape) for name, t in state.items()}
    assert all(tensor.is_contiguous() for tensor in state.values())


@EACH
def test_non_finite_running_tensor_is_an_error(method: Method) -> None:
    for name in names(method, SHAPE, "running"):
        if name in ("second_moment", "valid", "skipped"):
            continue
        _, state = settled(method, SHAPE)
        state[name].view(-1)[0] = float("nan")
        with pytest.raises(torch.linalg.LinAlgError):
            method.refresh(state, SHAPE, 0.1)


@EACH
def test_zero_statistics_leave_plain_damping(method: Method) -> None:
    batch, state = settled(method, SHAPE)
    for name in names(method, SHAPE, "running"):
        state[name].zero_()
    state.update(method.refresh(state, SHAPE, DAMPING))
    update = method.precondition(batch.gradient(), state, SHAPE, DAMPING)
    torch.testing.assert_close(update, batch.gradient() / DAMPING)


@EACH
def test_one_by_one(method: Method) -> None:
    shape = LayerShape(1, 1, 1)
    batch, state = settled(method, shape)
    expected = damped_solve(curvature(method, state, batch, shape), batch.gradient())
    torch.testing.assert_close(method.precondition(batch.gradient(), state, shape, DAMPING), expected)


@EACH
def test_cost_is_positive_and_grows_with_the_layer(method: Method) -> None:
    small, large = method.cost(SHAPE), method.cost(LayerShape(2, 10, 8))
    assert 0 < small.precondition < large.precondition
    assert small.refresh <= large.refresh and small.statistics <= large.statistics


# EKFAC


def test_ekfac_starts_as_kfac() -> None:
    batch = correlated_batch(2, 11, 2, 4, 5)
    ekfac_state: State = {}
    kfac_state: State = {}
    step(EKFAC(relative_damping=False), ekfac_state, batch, SHAPE)
    step(KFAC(relative_damping=False, solver="eigen"), kfac_state, batch, SHAPE)
    torch.testing.assert_close(
        EKFAC(relative_damping=False).precondition(batch.gradient(), ekfac_state, SHAPE, DAMPING),
        KFAC(relative_damping=False, solver="eigen").precondition(batch.gradient(), kfac_state, SHAPE, DAMPING),
    )


def test_ekfac_omits_its_diagonal_until_there_is_a_basis() -> None:
    batch = correlated_batch(2, 11, 1, 4, 5)
    state: State = {}
    assert set(EKFAC(relative_damping=False).statistics(batch, state, SHAPE)) == {"A", "G"}
    step(EKFAC(relative_damping=False), state, batch, SHAPE)
    assert set(EKFAC(relative_damping=False).statistics(batch, state, SHAPE)) == {"A", "G", "second_moment"}


@pytest.mark.parametrize("seed", range(5))
def test_ekfac_is_nearer_to_the_fisher_than_kfac_and_keeps_its_trace(seed: int) -> None:
    """The best diagonal in a basis is the measured one (George et al. 2018, theorem 2)."""
    batch = correlated_batch(2, 30, 1, 4, 5, seed)
    method = EKFAC(relative_damping=False)
    state: State = {}
    step(method, state, batch, SHAPE)
    exact = sample_fisher(batch)
    kfac_error = torch.linalg.matrix_norm(curvature(method, state, batch, SHAPE) - exact)
    method.fold(state, method.statistics(batch, state, SHAPE), 0.0)
    ekfac = curvature(method, state, batch, SHAPE)
    ekfac_error = torch.linalg.matrix_norm(ekfac - exact)
    assert bool((ekfac_error < 0.99 * kfac_error).all())
    torch.testing.assert_close(ekfac.diagonal(dim1=1, dim2=2).sum(1), exact.diagonal(dim1=1, dim2=2).sum(1))


def rotated_state(state: State, o_change: Tensor, a_change: Tensor) -> State:
    """The same factors, but the old bases multiplied from the right by the given orthogonal matrices."""
    changed = dict(state)
    changed["G_basis"] = state["G_basis"] @ o_change
    changed["A_basis"] = state["A_basis"] @ a_change
    return changed


def test_rebasing_follows_permutations_and_signs_exactly() -> None:
    _, state = settled(EKFAC(relative_damping=False), SHAPE)
    o_order, a_order = torch.tensor([2, 0, 3, 1]), torch.tensor([4, 1, 0, 3, 2])
    o_change = torch.eye(4, dtype=torch.float64)[:, o_order] * torch.tensor([1.0, -1.0, -1.0, 1.0])
    a_change = torch.eye(5, dtype=torch.float64)[:, a_order] * torch.tensor([-1.0, 1.0, -1.0, 1.0, 1.0])
    old = rotated_state(state, o_change, a_change)
    old["second_moment"] = state["second_moment"][:, o_order][:, :, a_order]
    solved = EKFAC(relative_damping=False).refresh(old, SHAPE, 0.1)
    torch.testing.assert_close(solved["second_moment"], state["second_moment"])


def test_rebasing_is_exact_when_the_old_diagonal_was_the_whole_curvature() -> None:
    _, state = settled(EKFAC(relative_damping=False), SHAPE)
    q_o, _ = torch.linalg.qr(torch.randn(2, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0)))
    q_a, _ = torch.linalg.qr(torch.randn(2, 5, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1)))
    old = rotated_state(state, q_o, q_a)
    old_basis = full_basis(EKFAC(relative_damping=False), old, SHAPE)
    covariance = old_basis @ torch.diag_embed(old["second_moment"].flatten(1)) @ old_basis.mT
    new = {**old, **EKFAC(relative_damping=False).refresh(old, SHAPE, 0.1)}
    new_basis = full_basis(EKFAC(relative_damping=False), new, SHAPE)
    expected = (new_basis.mT @ covariance @ new_basis).diagonal(dim1=1, dim2=2)
    torch.testing.assert_close(new["second_moment"].flatten(1), expected)
    assert not torch.allclose(new["second_moment"], old["second_moment"])


def test_ekfac_measures_with_a_basis_kept_in_low_precision() -> None:
    batch, state = settled(EKFAC(relative_damping=False), SHAPE)
    low = {
        name: value.float().to(torch.bfloat16) if name.endswith("basis") else value.float()
        for name, value in state.items()
    }
    single = FakeBatch(batch.x.float(), batch.g.float())
    fresh = EKFAC(relative_damping=False).statistics(single, low, SHAPE)
    assert fresh["second_moment"].dtype == torch.float32
    torch.testing.assert_close(fresh["second_moment"].double(), state["second_moment"], rtol=0.1, atol=0.5)


def test_ekfac_relative_damping_is_a_share_of_the_mean() -> None:
    batch, state = settled(EKFAC(relative_damping=False), SHAPE)
    relative = EKFAC(relative_damping=True).precondition(batch.gradient(), state, SHAPE, 0.2)
    for block in range(2):
        damping = 0.2 * float(state["second_moment"][block].mean())
        absolute = EKFAC(relative_damping=False).precondition(batch.gradient(), state, SHAPE, damping)
        torch.testing.assert_close(relative[block], absolute[block])


# sample matrix


def test_sample_matrix_gathers_ranks_with_different_numbers_of_rows() -> None:
    """Three ranks with 5, 2 and no samples equal one process with the 7 samples."""
    method, shape = SampleMatrix(rows=5, relative_damping=False), SHAPE
    whole = correlated_batch(2, 7, 2, 4, 5)
    parts = [FakeBatch(whole.x[:, i:j], whole.g[:, i:j]) for i, j in ((0, 5), (5, 7))]
    fresh = [method.statistics(part, {}, shape) for part in parts]
    fresh.append({name: torch.zeros_like(value) for name, value in fresh[0].items()})
    gathered = {name: torch.cat([part[name] for part in fresh], dim=1) for name in fresh[0]}
    table = {spec.name: spec.full_shape(3) for spec in method.state(shape)}
    state = {**gathered, **method.refresh(gathered, shape, DAMPING)}
    assert table == {name: tuple(value.shape) for name, value in state.items()}

    expected = damped_solve(curvature(method, state, whole, shape), whole.gradient())
    torch.testing.assert_close(method.precondition(whole.gradient(), state, shape, DAMPING), expected)


def test_older_rows_count_where_no_rank_has_newer_ones() -> None:
    """Ranks of 3 and 2 samples; a rank that does not use the layer tells its loss terms, step after step."""
    method, delta = SampleMatrix(rows=4), torch.ones(SHAPE.blocks, SHAPE.outputs, SHAPE.inputs, dtype=torch.float64)
    batches = [correlated_batch(SHAPE.blocks, n, 1, SHAPE.outputs, SHAPE.inputs, seed=n) for n in (3, 2)]
    running = [method.statistics(batch, {}, SHAPE) for batch in batches]

    def found() -> Tensor:
        gathered = {name: torch.cat([rank[name] for rank in running], dim=1) for name in running[0]}
        return method.quadratic(delta, gathered, SHAPE)

    own = [(sample_fisher(batch) @ delta.flatten(1).unsqueeze(2)).sum() for batch in batches]
    torch.testing.assert_close(found(), (3 * own[0] + 2 * own[1]) / 5)
    for terms in (5.0, 8.0):
        method.skip(running[0], terms, SHAPE)
        running[1] = method.statistics(batches[1], running[1], SHAPE)
        torch.testing.assert_close(found(), 2 * own[1] / (terms + 2))
    for terms in ((6.0, 2.0), (0.0, 0.0), (1.0, 9.0)):  # no rank uses it: all stays as it was in the last step with it
        for rank in (0, 1):
            method.skip(running[rank], terms[rank], SHAPE)
        torch.testing.assert_close(found(), 2 * own[1] / (8.0 + 2))
    running[0] = method.statistics(batches[0], running[0], SHAPE)
    method.skip(running[1], 4.0, SHAPE)
    torch.testing.assert_close(found(), 3 * own[0] / (3 + 4))


def test_sample_matrix_uses_the_rows_of_its_refresh() -> None:
    method = SampleMatrix(rows=11)
    batch, state = settled(method, SHAPE)
    before = method.precondition(batch.gradient(), state, SHAPE, DAMPING)
    newer = correlated_batch(2, 11, 2, 4, 5, seed=9)
    method.fold(state, method.statistics(newer, state, SHAPE), 0.9)
    assert not torch.equal(state["X"], state["X_solved"])
    assert torch.equal(method.precondition(batch.gradient(), state, SHAPE, 99.0), before)


def test_sample_matrix_takes_a_part_of_a_large_batch() -> None:
    method = SampleMatrix(rows=4, relative_damping=False)
    batch, state = settled(method, SHAPE)
    chosen = FakeBatch(batch.x[:, [0, 2, 5, 8]], batch.g[:, [0, 2, 5, 8]])
    expected = damped_solve(curvature(method, state, chosen, SHAPE), batch.gradient())
    torch.testing.assert_close(method.precondition(batch.gradient(), state, SHAPE, DAMPING), expected)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SampleMatrix(rows=0), "rows is 0"),
        (lambda: Eva(damping=-1.0), "damping is -1.0"),
        (lambda: EKFAC(relative_damping=False, decay=2.0), "decay is 2.0"),
    ],
)
def test_bad_settings_are_named(make: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
