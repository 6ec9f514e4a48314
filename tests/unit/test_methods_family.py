"""Relatives of K-FAC against dense matrices and against each other."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hpc_kfac.layers.batch import LayerShape
from hpc_kfac.methods.kronecker.ekfac import EKFAC
from hpc_kfac.methods.kronecker.kfac import KFAC
from hpc_kfac.methods.kronecker.kpsvd import FLOOR, KPSVD
from hpc_kfac.methods.kronecker.tkfac import TEKFAC, TKFAC
from hpc_kfac.methods.method import Method, State
from hpc_kfac.methods.moments.soap import SOAP
from hpc_kfac.methods.moments.tnt import TNT
from hpc_kfac.methods.rows.hylo import HyLo
from hpc_kfac.methods.rows.sample_matrix import SampleMatrix
from hpc_kfac.methods.rows.seng import SENG
from hpc_kfac.methods.rows.skfac import SKFAC
from hpc_kfac.methods.vectors.eva import Eva, EvaF, EvaS
from hpc_kfac.methods.vectors.mkor import MKOR
from unit.fake_batch import FakeBatch, correlated_batch

close = torch.testing.assert_close
SHAPE, DAMPING = LayerShape(2, 5, 4), 0.07


def settled(method: Method, batch: FakeBatch, steps: int = 1, damping: float = DAMPING) -> State:
    """The state after so many statistics of one batch, each with its refresh."""
    state: State = {}
    for _ in range(steps):
        method.fold(state, method.statistics(batch, state, SHAPE), method.decay)
        state.update(method.refresh(state, SHAPE, damping))
    return state


def fisher(batch: FakeBatch) -> Tensor:
    """(1/M) sum over positions of vec(g x^T) vec(g x^T)^T, [p, o a, o a]."""
    u = torch.einsum("pnto,pnta->pntoa", batch.g, batch.x).flatten(3).flatten(1, 2)
    return u.mT @ u / batch.count


def dense_kron(g: Tensor, a: Tensor) -> Tensor:
    return torch.stack([torch.kron(left, right) for left, right in zip(g, a, strict=True)])


def solve(matrix: Tensor, gradient: Tensor, damping: float) -> Tensor:
    eye = torch.eye(matrix.shape[-1], dtype=matrix.dtype)
    return torch.linalg.solve(matrix + damping * eye, gradient.flatten(1).unsqueeze(2)).view(gradient.shape)


def curvature(method: Method, state: State) -> Tensor:
    """The dense F of `Method.quadratic`."""
    return dense(lambda delta: method.quadratic(delta, state, SHAPE))


def dense(form: Callable[[Tensor], Tensor]) -> Tensor:
    """The matrix of a quadratic form, by its values on basis vectors and their sums."""
    n = SHAPE.outputs * SHAPE.inputs
    matrix = torch.zeros(SHAPE.blocks, n, n, dtype=torch.float64)
    unit = torch.zeros(SHAPE.blocks, n, dtype=torch.float64)

    def value(block: int, *places: int) -> Tensor:
        unit.zero_()
        for place in places:
            unit[block, place] += 1.0
        return form(unit.view(SHAPE.blocks, SHAPE.outputs, SHAPE.inputs))

    for block in range(SHAPE.blocks):
        own = [value(block, i) for i in range(n)]
        for i in range(n):
            for j in range(i + 1):
                matrix[block, i, j] = matrix[block, j, i] = (value(block, i, j) - own[i] - own[j]) / 2
            matrix[block, i, i] = own[i]
    return matrix


def best_products(matrix: Tensor, count: int) -> Tensor:
    """The nearest sum of so many Kronecker products to [o a, o a], by the singular values of its rearrangement."""
    o, a = SHAPE.outputs, SHAPE.inputs
    rearranged = matrix.view(o, a, o, a).permute(0, 2, 1, 3).reshape(o * o, a * a)
    u, s, vh = torch.linalg.svd(rearranged)
    near = (u[:, :count] * s[:count]) @ vh[:count]
    return near.view(o, o, a, a).permute(0, 2, 1, 3).reshape(o * a, o * a)


# ---- the damping as it was applied

DAMPED: list[Method] = [
    *(KFAC(damping=DAMPING, solver="eigen", relative_damping=relative) for relative in (False, True)),
    *(KFAC(damping=DAMPING, relative_damping=relative) for relative in (False, True)),
    KFAC(damping=DAMPING, output_structure="identity", relative_damping=True),
    KFAC(damping=DAMPING, input_structure="identity", output_structure="identity"),
    *(kind(damping=DAMPING, relative_damping=r) for kind in (EKFAC, TEKFAC, TKFAC, SKFAC, SOAP) for r in (False, True)),
    TKFAC(damping=DAMPING, solver="eigen", relative_damping=True),
    TNT(damping=DAMPING, relative_damping=True),
    KPSVD(damping=DAMPING, relative_damping=True),
    *(kind(damping=DAMPING, relative_damping=relative) for kind in (Eva, EvaF) for relative in (False, True)),
    *(kind(damping=DAMPING, rows=16, relative_damping=r) for kind in (SampleMatrix, SENG) for r in (False, True)),
    *(HyLo(damping=DAMPING, rows=4, select=s, relative_damping=r) for s in ("kid", "kis") for r in (False, True)),
]


@pytest.mark.parametrize("method", DAMPED, ids=lambda method: type(method).__name__)
def test_damping_form_is_that_of_the_update(method: Method) -> None:
    """(F + damping)^-1 D as a dense solve, at a step whose damping is another one than that of the refresh."""
    batch = correlated_batch(2, 11, 1, 4, 5)
    gradient = batch.gradient()
    state: State = {}
    for _ in range(2):
        if method.reads == "gradients":
            method.fold_gradient(state, state, gradient, SHAPE)
        else:
            method.fold(state, method.statistics(batch, state, SHAPE), method.decay)
        state.update(method.refresh(state, SHAPE, DAMPING))
    update = method.precondition(gradient, state, SHAPE, 3 * DAMPING)
    damped = curvature(method, state) + dense(lambda delta: method.damping_form(delta, state, SHAPE, 3 * DAMPING))
    assert method.is_damped(SHAPE)
    close(solve(damped, gradient, 0.0), update)
    older = {name: tensor for name, tensor in state.items() if name not in ("A_damping", "G_damping")}
    same = curvature(method, older) + dense(lambda delta: method.damping_form(delta, older, SHAPE, DAMPING))
    close(same, curvature(method, state) + dense(lambda delta: method.damping_form(delta, state, SHAPE, DAMPING)))


# ---- TKFAC, TEKFAC


def test_tkfac_keeps_the_trace_and_kfac_does_not() -> None:
    batch = correlated_batch(2, 11, 3, 4, 5)
    trace = fisher(batch).diagonal(dim1=1, dim2=2).sum(1)
    for method, exact in ((TKFAC(), True), (KFAC(), False)):
        found = curvature(method, settled(method, batch)).diagonal(dim1=1, dim2=2).sum(1)
        assert torch.allclose(found, trace) is exact


@pytest.mark.parametrize("relative", [False, True])
@pytest.mark.parametrize("solver", ["cholesky", "eigen"])
def test_tkfac_is_the_dense_solve(solver: str, relative: bool) -> None:
    """Relative: a share of delta / (o a), the mean eigenvalue of delta kron(Psi, Phi)."""
    batch = correlated_batch(2, 11, 2, 4, 5)
    method = TKFAC(damping=DAMPING, solver=solver, relative_damping=relative)
    state = settled(method, batch)
    weights_g, weights_x = batch.g.square().sum(-1), batch.x.square().sum(-1)
    a = torch.einsum("pnt,pnta,pntb->pab", weights_g, batch.x, batch.x) / batch.count
    g = torch.einsum("pnt,pnto,pntq->poq", weights_x, batch.g, batch.g) / batch.count
    delta = (weights_g * weights_x).sum((1, 2), keepdim=True) / batch.count
    phi, psi = a / delta, g / delta
    damping = DAMPING * (delta / 20 if relative else torch.ones_like(delta))
    if solver == "eigen":
        product = delta * dense_kron(psi, phi) + damping * torch.eye(20, dtype=torch.float64)
        expected = solve(product, batch.gradient(), 0.0)
    else:
        left = delta.sqrt() * psi + damping.sqrt() * torch.eye(4, dtype=torch.float64)
        right = delta.sqrt() * phi + damping.sqrt() * torch.eye(5, dtype=torch.float64)
        expected = torch.linalg.solve(left, batch.gradient()) @ torch.linalg.inv(right)
    close(method.precondition(batch.gradient(), state, SHAPE, DAMPING), expected)


def unit_batch() -> FakeBatch:
    """All x and g of length 1, so that no weight differs from 1."""
    batch = correlated_batch(2, 30, 1, 4, 5)
    x, g = (rows / rows.norm(dim=-1, keepdim=True) for rows in (batch.x, batch.g))
    return FakeBatch(x, g)


def test_tekfac_is_ekfac_where_weights_are_one_and_not_elsewhere() -> None:
    for batch, same in ((unit_batch(), True), (correlated_batch(2, 30, 1, 4, 5), False)):
        found, other = (
            method.precondition(batch.gradient(), settled(method, batch, 2), SHAPE, DAMPING)
            for method in (TEKFAC(damping=DAMPING), EKFAC(damping=DAMPING))
        )
        assert torch.allclose(found, other) is same


@pytest.mark.parametrize("better, worse", [(EKFAC, KFAC), (TEKFAC, TKFAC)])
def test_measured_moments_are_nearer_in_frobenius_norm(better: type[Method], worse: type[Method]) -> None:
    """The best diagonal in the same eigenbases (George et al. 2018, theorem 2); here with one position a sample."""
    for seed in range(5):
        batch = correlated_batch(2, 9, 1, 4, 5, seed)
        errors = [
            torch.linalg.matrix_norm(curvature(method, settled(method, batch, 2)) - fisher(batch))
            for method in (better(decay=0.0), worse(decay=0.0))
        ]
        assert bool((errors[0] < errors[1]).all())


# ---- EKFAC of mean gradients


def test_ekfac_of_batch_gradients() -> None:
    batch = correlated_batch(2, 11, 2, 4, 5)
    method = EKFAC(damping=DAMPING, decay=0.0, moments_of="batch")
    state: State = {}
    method.fold(state, method.statistics(batch, state, SHAPE), 0.0)
    state.update(method.refresh(state, SHAPE, DAMPING))
    method.fold(state, method.statistics(batch, state, SHAPE), 0.0)
    q_a, q_g = state["A_basis"], state["G_basis"]
    rotated = q_g.mT @ batch.gradient() @ q_a
    close(state["second_moment"], 11 * rotated.square())
    expected = q_g @ (rotated / (11 * rotated.square() + DAMPING)) @ q_a.mT
    close(method.precondition(batch.gradient(), state, SHAPE, DAMPING), expected)


# ---- KPSVD


@pytest.mark.parametrize("terms", [1, 2])
def test_kpsvd_reaches_the_nearest_products(terms: int) -> None:
    """Power iterations on one batch end at the truncated singular value decomposition; K-FAC is further away."""
    batch = correlated_batch(2, 11, 1, 4, 5)
    method = KPSVD(damping=DAMPING, decay=0.0, terms=terms)
    found = curvature(method, settled(method, batch, 400))
    expected = torch.stack([best_products(matrix, terms) for matrix in fisher(batch)])
    close(found, expected, rtol=1e-5, atol=1e-5 * expected.abs().max().item())
    kfac = curvature(KFAC(), settled(KFAC(), batch))
    errors = [torch.linalg.matrix_norm(near - fisher(batch)) for near in (found, kfac)]
    assert bool((errors[0] < errors[1]).all())


def test_kpsvd_starts_from_identities_of_unit_norm() -> None:
    """F applied to I / |I| of the other side: as much as the steps after it give."""
    batch = correlated_batch(2, 11, 3, 4, 5)
    blocks = fisher(batch).view(2, 4, 5, 4, 5)
    found = KPSVD().statistics(batch, {}, SHAPE)
    close(found["A"], torch.einsum("pgagb->pab", blocks) / 4**0.5)
    close(found["G"], torch.einsum("pgaha->pgh", blocks) / 5**0.5)


def test_kpsvd_corrects_kfac_by_the_nearest_product_to_what_it_misses() -> None:
    batch = correlated_batch(2, 11, 1, 4, 5)
    method = KPSVD(damping=DAMPING, decay=0.0, terms=2, first="kfac")
    found = curvature(method, settled(method, batch, 400))
    kfac = curvature(KFAC(), settled(KFAC(), batch))
    missed = torch.stack([best_products(matrix, 1) for matrix in fisher(batch) - kfac])
    close(found, kfac + missed, rtol=1e-5, atol=1e-5 * found.abs().max().item())


@pytest.mark.parametrize("first", ["best", "kfac"])
def test_two_products_are_solved_as_one_matrix(first: str) -> None:
    """Where no value is clamped, U solves (damped G1 kron damped A1 + G2 kron A2) U = D."""
    batch = correlated_batch(2, 40, 1, 4, 5)
    method = KPSVD(damping=5.0, decay=0.0, terms=2, first=first)
    state = settled(method, batch, 50, damping=5.0)
    assert float((1 + state["G_values"].unsqueeze(2) * state["A_values"].unsqueeze(1)).min()) > FLOOR
    factors = method.factors(state, SHAPE)
    dampings = method.split_damping(factors, SHAPE, 5.0)
    damped = {
        name: factors[name] + dampings[name].view(-1, 1, 1) * torch.eye(factors[name].shape[-1], dtype=torch.float64)
        for name in ("A", "G")
    }
    one = KPSVD(damping=5.0, decay=0.0) if first == "best" else KFAC(damping=5.0, decay=0.0)
    second = curvature(method, state) - curvature(one, state)
    expected = solve(dense_kron(damped["G"], damped["A"]) + second, batch.gradient(), 0.0)
    close(method.precondition(batch.gradient(), state, SHAPE, 5.0), expected)


def test_two_products_stay_positive() -> None:
    """A second product that would make the sum indefinite is bounded: the update still goes downhill."""
    for seed in range(20):
        batch = correlated_batch(2, 3, 1, 4, 5, seed)
        method = KPSVD(damping=1e-4, decay=0.0, terms=2)
        update = method.precondition(batch.gradient(), settled(method, batch, 20, 1e-4), SHAPE, 1e-4)
        assert bool(((update * batch.gradient()).sum((1, 2)) > 0).all())


# ---- SKFAC


def test_skfac_with_all_samples_is_kfac_and_with_some_is_not() -> None:
    batch = correlated_batch(2, 11, 1, 4, 5)
    kfac = KFAC(damping=DAMPING)
    expected = kfac.precondition(batch.gradient(), settled(kfac, batch), SHAPE, DAMPING)
    for rows, same in ((11, True), (20, True), (6, False)):
        method = SKFAC(damping=DAMPING, rows=rows)
        state = settled(method, batch)
        found = method.precondition(batch.gradient(), state, SHAPE, DAMPING)
        assert torch.allclose(found, expected) is same
        if same:
            close(curvature(method, state), curvature(kfac, settled(kfac, batch)))


def test_skfac_of_positions_is_kfac_with_weights_shared() -> None:
    batch = correlated_batch(2, 6, 3, 4, 5)
    kfac = KFAC(damping=DAMPING)
    expected = kfac.precondition(batch.gradient(), settled(kfac, batch), SHAPE, DAMPING)
    for positions, same in (("subsample", True), ("sum", False)):
        method = SKFAC(damping=DAMPING, rows=18, positions=positions)
        found = method.precondition(batch.gradient(), settled(method, batch), SHAPE, DAMPING)
        assert torch.allclose(found, expected) is same


# ---- Eva-f and MKOR


def test_eva_f_is_the_dense_solve() -> None:
    batch = correlated_batch(2, 11, 3, 4, 5)
    method = EvaF(damping=DAMPING)
    state = settled(method, batch)
    mean = batch.x.mean((1, 2))
    matrix = dense_kron(torch.eye(4, dtype=torch.float64).expand(2, 4, 4), mean.unsqueeze(2) * mean.unsqueeze(1))
    close(curvature(method, state), matrix)
    found = method.precondition(batch.gradient(), state, SHAPE, DAMPING)
    close(found, solve(matrix, batch.gradient(), DAMPING))
    eva = Eva(damping=DAMPING)
    assert not torch.allclose(found, eva.precondition(batch.gradient(), settled(eva, batch), SHAPE, DAMPING))


def test_mkor_stays_the_exact_inverse_of_its_average() -> None:
    """Over 100 steps, blending included; what the paper prints is another matrix, and grows where it should shrink."""
    method = MKOR(damping=0.05, memory=0.9)
    state: State = {}
    eye = torch.eye(5, dtype=torch.float64)
    expected = eye.expand(2, 5, 5)
    for step in range(100):
        batch = correlated_batch(2, 7, 2, 4, 5, seed=step)
        state |= method.statistics(batch, state, SHAPE)
        state |= method.refresh(state, SHAPE, 0.05)
        v = batch.x.mean((1, 2)).unsqueeze(2)
        average = 0.9 * torch.linalg.inv(0.95 * expected + 0.05 * eye) + 0.1 * v @ v.mT
        expected = torch.linalg.inv(average)
        close(state["A_inverse"], expected)
    lengths = {}
    for rule in ("exact", "code", "printed"):
        other = MKOR(damping=0.05, memory=0.9, rule=rule)
        m = other.refresh({**state, "A_inverse": eye.expand(2, 5, 5)}, SHAPE, 0.05)["A_inverse"]
        lengths[rule] = (v.mT @ m @ v / (v.mT @ v)).squeeze()
    assert bool((lengths["exact"] < 1.1).all()) and bool((lengths["code"] < 1).all())
    assert bool((lengths["printed"] > lengths["exact"]).all())


def test_mkor_starts_anew_where_damping_is_all() -> None:
    batch, method = correlated_batch(2, 11, 3, 4, 5), MKOR()
    state = settled(method, batch, 3)
    for damping in (1.0, 5.0):
        found = method.refresh(state, SHAPE, damping)
        for name, tensor in method.refresh({m: state[m] for m in ("a_mean", "g_mean")}, SHAPE, damping).items():
            close(found[name], tensor)


def test_mkor_of_the_code_starts_anew_and_keeps_the_gradients_length() -> None:
    method = MKOR(rule="code", damping=0.05)
    batch = correlated_batch(2, 7, 2, 4, 5)
    state = {**method.statistics(batch, {}, SHAPE), "A_inverse": 5 * torch.eye(5, dtype=torch.float64).expand(2, 5, 5)}
    state |= method.refresh(state, SHAPE, 0.05)
    v = batch.x.mean((1, 2)).unsqueeze(2)
    close(state["A_inverse"], torch.linalg.inv(torch.eye(5, dtype=torch.float64) + v @ v.mT))
    update = method.precondition(batch.gradient(), state, SHAPE, 0.05)
    assert update.norm() == pytest.approx(batch.gradient().norm().item())
    free = state["G_inverse"] @ batch.gradient() @ state["A_inverse"]
    close(update / update.norm(), free / free.norm())


@pytest.mark.parametrize("power", [0.25, 0.5, 1.0])
def test_eva_s_is_the_power_of_dense_factors(power: float) -> None:
    """S^-p of S = v v^T + damping I by its eigenvalues, and the form that `quadratic` declares."""
    method = EvaS(damping=DAMPING, power=power, decay=0.5)
    gradients = [correlated_batch(2, 11, 1, 4, 5, seed).gradient() for seed in range(2)]
    running: State = {}
    for gradient in gradients:
        method.fold_gradient(running, {}, gradient, SHAPE)
    means = {axis: 0.5 * gradients[0].mean(axis) + 0.5 * gradients[1].mean(axis) for axis in (1, 2)}

    def factor(axis: int) -> Tensor:
        v = means[axis].unsqueeze(2)
        values, basis = torch.linalg.eigh(v @ v.mT + DAMPING * torch.eye(v.shape[1], dtype=v.dtype))
        return basis @ torch.diag_embed(values**-power) @ basis.mT

    found = method.precondition(gradients[1], running, SHAPE, DAMPING)
    close(found, factor(2) @ gradients[1] @ factor(1))
    a, g = (means[axis] / means[axis].norm(dim=1, keepdim=True) for axis in (1, 2))
    lengths = [(means[axis].norm(dim=1) ** (2 * power)) for axis in (1, 2)]
    expected = ((g.unsqueeze(1) @ gradients[0] @ a.unsqueeze(2)).view(-1).square() * lengths[0] * lengths[1]).sum()
    close(method.quadratic(gradients[0], running, SHAPE), expected)


# ---- SENG


def sampled(batch: FakeBatch) -> Tensor:
    """(1/N) sum over samples of vec(sum_t g_t x_t^T) vec(...)^T."""
    u = batch.sample_gradients().flatten(2)
    return u.mT @ u / u.shape[1]


def test_seng_of_small_layers_solves_the_samples_own_matrix() -> None:
    """Exact where positions share weights, which the sample matrix of mean rows is not."""
    batch = correlated_batch(2, 9, 3, 4, 5)
    method = SENG(damping=DAMPING, rows=9, columns=None)
    state = settled(method, batch)
    close(curvature(method, state), sampled(batch))
    expected = solve(sampled(batch), batch.gradient(), DAMPING)
    close(method.precondition(batch.gradient(), state, SHAPE, DAMPING), expected)
    rows = SampleMatrix(damping=DAMPING, rows=9)
    assert not torch.allclose(rows.precondition(batch.gradient(), settled(rows, batch), SHAPE, DAMPING), expected)


def test_seng_of_large_layers_is_the_sample_matrix() -> None:
    batch = correlated_batch(2, 9, 1, 4, 5)
    rows = SampleMatrix(damping=DAMPING, rows=9)
    expected = rows.precondition(batch.gradient(), settled(rows, batch), SHAPE, DAMPING)
    for given_as in ({"explicit_below": 0}, {"columns": None}, {"columns": 20}):
        method = SENG(damping=DAMPING, rows=9, **given_as)
        close(method.precondition(batch.gradient(), settled(method, batch), SHAPE, DAMPING), expected)


def test_an_approximate_correction_is_the_best_in_its_plane() -> None:
    """The dense (V^T V + damping I) U = D, projected on D and the correction: by a sketch and by a thin product."""
    batch = correlated_batch(2, 9, 2, 4, 5)
    gradient = batch.gradient()
    for given_as in ({"columns": 3}, {"columns": 11}, {"explicit_below": 0, "thin": True}):
        method = SENG(damping=DAMPING, rows=9, **given_as)
        state = settled(method, batch)
        _, correction = method._corrected(gradient, state, SHAPE)
        found = method.precondition(gradient, state, SHAPE, DAMPING)
        dense = curvature(method, state) + DAMPING * torch.eye(20, dtype=torch.float64)
        plane = torch.stack([gradient.flatten(1), correction.flatten(1)], dim=2)
        parts = torch.linalg.solve(plane.mT @ dense @ plane, plane.mT @ gradient.flatten(1).unsqueeze(2))
        close(found.flatten(1), (plane @ parts).squeeze(2))
        exact = solve(curvature(method, state), gradient, DAMPING)
        assert not torch.allclose(found, exact)
        product = (found * gradient).sum()
        close(product, method.quadratic(found, state, SHAPE) + DAMPING * found.square().sum())


def test_thin_seng_keeps_one_product() -> None:
    batch = correlated_batch(2, 9, 1, 4, 5)
    method = SENG(damping=DAMPING, rows=9, explicit_below=0, thin=True)
    state = settled(method, batch)
    products, correction = method._corrected(batch.gradient(), state, SHAPE)
    values = torch.linalg.svdvals(correction)
    assert bool((values[:, 1] < 1e-10 * values[:, 0]).all())
    weights = state["kernel_inverse"] @ products
    roots = weights.abs().sqrt()
    r = (state["R_solved"] * roots).sum(1).unsqueeze(2)
    close(correction, r * ((state["X_solved"] * weights).sum(1, keepdim=True) / roots.sum(1, keepdim=True)))


@settings(max_examples=60, deadline=None)
@given(
    size=st.tuples(st.integers(1, 3), st.integers(1, 7), st.integers(1, 7)),
    samples=st.integers(1, 9),
    columns=st.sampled_from([None, 1, 2, 5, 17]),
    form=st.sampled_from([(0, False), (0, True), (700_000, False)]),
    scale=st.sampled_from([1e-15, 1e-3, 1.0, 1e3, 1e12]),
    damping=st.sampled_from([1e-6, 0.1, 10.0]),
    dtype=st.sampled_from([torch.float64, torch.float32]),
)
def test_seng_never_points_uphill(size, samples, columns, form, scale, damping, dtype) -> None:
    """<U, D> > 0 for any D, of any size, with any sketch."""
    p, o, a = size
    batch = correlated_batch(p, samples, 2, o, a, samples)
    method = SENG(rows=6, columns=columns, explicit_below=form[0], thin=form[1])
    shape = LayerShape(p, a, o)
    state = {name: tensor.to(dtype) for name, tensor in method.statistics(batch, {}, shape).items()}
    state |= method.refresh(state, shape, damping)
    generator = torch.Generator().manual_seed(samples)
    for gradient in (torch.randn(p, o, a, generator=generator, dtype=dtype), batch.gradient().to(dtype)):
        update = method.precondition(gradient * scale, state, shape, damping)
        cosine = (update.double() * gradient.double()).sum() / update.double().norm() / gradient.double().norm()
        assert float(cosine) > 0


@pytest.mark.parametrize("columns", [1, 20, 100])
def test_seng_converges_with_any_sketch(columns: int) -> None:
    """Least squares with 200 weights, at a step without any other bound."""
    generator = torch.Generator().manual_seed(0)
    x, target = (torch.randn(16, d, generator=generator, dtype=torch.float64) for d in (20, 10))
    method, shape = SENG(damping=0.3, rows=16, columns=columns), LayerShape(1, 20, 10)
    weight, losses = torch.zeros(1, 10, 20, dtype=torch.float64), []
    for _ in range(60):
        error = x @ weight[0].mT - target
        losses.append(float(error.square().sum() / 32))
        batch = FakeBatch(x[None, :, None], error[None, :, None])
        state = method.statistics(batch, {}, shape)
        state |= method.refresh(state, shape, 0.3)
        weight -= 0.1 * method.precondition(batch.gradient(), state, shape, 0.3)
    assert losses[-1] < 0.3 * losses[0] and losses == sorted(losses, reverse=True)


# ---- all of them on degenerate input

ALL = {
    "tkfac": TKFAC(),
    "tkfac-eigen": TKFAC(solver="eigen"),
    "tekfac": TEKFAC(),
    "ekfac-batch": EKFAC(moments_of="batch"),
    "kpsvd": KPSVD(),
    "kpsvd-2": KPSVD(terms=2),
    "kpsvd-kfac": KPSVD(terms=2, first="kfac"),
    "skfac": SKFAC(),
    "eva-f": EvaF(),
    "seng": SENG(columns=None),
    "seng-large": SENG(explicit_below=0),
    "seng-sketch": SENG(columns=2),
    "seng-thin": SENG(explicit_below=0, thin=True),
    "mkor": MKOR(),
    "mkor-code": MKOR(rule="code"),
    "mkor-printed": MKOR(rule="printed"),
}


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
@pytest.mark.parametrize("kind", ["one sample", "zero gradient", "rank one", "constant inputs", "zero inputs"])
@pytest.mark.parametrize("name", ALL)
def test_degenerate_input_gives_a_finite_update(name: str, kind: str, scale: float) -> None:
    """And one that does not go uphill."""
    batch = correlated_batch(2, 1 if kind == "one sample" else 9, 1, 4, 5)
    x, g = batch.x * scale, batch.g * scale
    if kind == "zero gradient":
        g = torch.zeros_like(g)
    if kind == "rank one":
        x, g = x[:, :1].expand_as(x), g[:, :1].expand_as(g)
    if kind == "constant inputs":
        x = torch.ones_like(x) * scale
    if kind == "zero inputs":
        x = torch.zeros_like(x)
    batch = FakeBatch(x, g)
    method = ALL[name]
    state = settled(method, batch, 3, 0.1)
    assert all(bool(torch.isfinite(tensor).all()) for tensor in state.values())
    update = method.precondition(batch.gradient(), state, SHAPE, 0.1)
    assert bool(torch.isfinite(update).all())
    assert float((update * batch.gradient()).sum()) >= -1e-9 * float(update.norm() * batch.gradient().norm())
    if kind in ("zero gradient", "zero inputs"):
        assert float(update.norm()) == 0.0


@settings(max_examples=15, deadline=None)
@given(st.integers(1, 3), st.integers(1, 6), st.integers(1, 6), st.integers(1, 7), st.integers(1, 3))
@pytest.mark.parametrize("name", ALL)
def test_any_size(name: str, p: int, o: int, a: int, samples: int, positions: int) -> None:
    """Three steps of every method on blocks of any size: finite, of the gradient's shape, and as the tables say."""
    method, shape = ALL[name], LayerShape(p, a, o)
    state: State = {}
    for seed in range(3):
        batch = correlated_batch(p, samples, positions, o, a, seed)
        method.fold(state, method.statistics(batch, state, shape), method.decay)
        state.update(method.refresh(state, shape, 0.1))
        update = method.precondition(batch.gradient(), state, shape, 0.1)
        assert update.shape == (p, o, a) and bool(torch.isfinite(update).all())
    assert {key: tuple(tensor.shape) for key, tensor in state.items()} == {
        spec.name: spec.shape for spec in method.state(shape)
    }


@pytest.mark.parametrize("name", ALL)
def test_states_are_what_the_tables_say(name: str) -> None:
    method = ALL[name]
    state = settled(method, correlated_batch(2, 9, 2, 4, 5), 3)
    specs = {spec.name: spec.shape for spec in method.state(SHAPE)}
    assert {key: tuple(tensor.shape) for key, tensor in state.items()} == specs
    assert math.isfinite(method.cost(SHAPE).precondition) and method.cost(SHAPE).precondition > 0


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: KPSVD(solver="eigen"), "KPSVD is for cholesky"),
        (lambda: KPSVD(terms=3), "terms is 3"),
        (lambda: KPSVD(first="kfac"), "which is K-FAC"),
        (lambda: EKFAC(moments_of="all"), "moments_of is 'all'"),
        (lambda: SENG(columns=0), "columns is 0"),
        (lambda: EvaS(power=0), "power is 0"),
        (lambda: SKFAC(rows=0), "rows is 0"),
        (lambda: SKFAC(positions="mean"), "positions is 'mean'"),
        (lambda: MKOR(rule="paper"), "rule is 'paper'"),
        (lambda: MKOR(memory=1.0), "memory is 1.0"),
    ],
)
def test_bad_settings_are_named(make, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
