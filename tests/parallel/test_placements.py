"""Every placement, payload and schedule against one process: equal where the mathematics is, close where it is not."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from torch import nn

import hpc_kfac as hk
from hpc_kfac.engine.running_weight import NUMBERS
from parallel.small_training import DOUBLE, METHODS, STEPS, AllKinds, average_gradients, shard, train

RATES = hk.Rates(flops=1e9, latency=1e-6, bandwidth=1e9)  # some of the small net's units are below it, some above

PLACEMENTS = {
    "apart": hk.Kaisa(1.0, colocate=False),
    "apart, one worker": hk.Kaisa(0.0, colocate=False),
    "all local": hk.Kaisa(1.0, all_local=RATES),
    "owner": hk.Kaisa(0.0, factors="owner"),
    "owner, all workers": hk.Kaisa(1.0, factors="owner"),
}


@pytest.mark.ranks(1, 2, 3, 4, 6, timeout=400)
@pytest.mark.parametrize("name", METHODS)
def test_equals_one_process(comm, name):
    schedule = hk.Schedule(statistics=1, refresh=2)
    whole, _ = train(None, METHODS[name](), schedule=schedule)
    for placement, kind in PLACEMENTS.items():
        spread, _ = train(comm, METHODS[name](), placement=kind, schedule=schedule)
        torch.testing.assert_close(spread, whole, rtol=1e-8, atol=1e-9, msg=lambda m, p=placement: f"{p}: {m}")


@pytest.mark.ranks(2, 3, 4, timeout=400)
@pytest.mark.parametrize("solver", ["eigen", "cholesky"])
def test_every_layer_family(comm, solver):
    method = hk.KFAC(damping=0.1, solver=solver)
    whole, _ = train(None, method, net=AllKinds)
    for kind in (*PLACEMENTS.values(), hk.Kaisa(1.0), hk.Kaisa(0.0)):
        spread, preconditioner = train(comm, method, placement=kind, net=AllKinds)
        assert len(preconditioner.capture.layers) == 8
        torch.testing.assert_close(spread, whole, rtol=1e-8, atol=1e-9)
    owners, _ = train(comm, method, placement=hk.Kaisa(0.0, factors="owner"), net=AllKinds, owners_update=True)
    torch.testing.assert_close(owners, whole, rtol=1e-8, atol=1e-9)


class Branching(nn.Module):
    """The branch is used by the last rank only, and by nobody in the first step."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk, self.branch, self.head = nn.Linear(3, 4), nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x, branch):
        x = self.trunk(x).tanh()
        return self.head(self.branch(x).tanh() if branch else x)


def branched(comm, placement, schedule=None, precision=DOUBLE):
    """Weights after a few steps."""
    torch.manual_seed(0)
    model = Branching().double()
    schedule = schedule or hk.Schedule(1, 2)
    preconditioner = hk.Preconditioner(
        model,
        torch.optim.SGD(model.parameters(), lr=0.1),
        method=hk.KFAC(solver="eigen", damping=0.1),
        placement=placement,
        schedule=schedule,
        precision=precision,
        comm=comm,
    )
    for step in range(8):
        x = torch.randn(6, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(10 * step + comm.rank))
        model.zero_grad()
        model(x, branch=step > 0 and comm.rank == comm.size - 1).square().mean().backward()
        average_gradients(model, comm)
        assert preconditioner.step().applied
        preconditioner._base.optimizer.step()
    return torch.cat([p.detach().flatten() for p in model.parameters()])


@pytest.mark.ranks(2, 3, 4, timeout=400)
def test_a_layer_that_some_ranks_do_not_use(comm):
    """All placements, and all schedules with them, agree; what the first of them does is checked elsewhere."""
    for schedule in (hk.Schedule(1, 2), *SCHEDULES.values()):
        reference = branched(comm, hk.Kaisa(1.0), schedule)
        for kind in (*PLACEMENTS.values(), hk.Kaisa(0.0)):
            torch.testing.assert_close(branched(comm, kind, schedule), reference, rtol=1e-8, atol=1e-9)
    exact = branched(comm, hk.Kaisa(1.0))
    for payload in BOUNDS:
        rounded = branched(comm, hk.Kaisa(1.0), precision=hk.Precision(payload=payload))
        assert (rounded - exact).norm() < BOUNDS[payload] * exact.norm()


class HeadFails(hk.KFAC):
    """The head, of 5 outputs, never gets a curvature."""

    def refresh(self, state, shape, damping, part=None):
        if shape.outputs == 5:
            raise torch.linalg.LinAlgError
        return super().refresh(state, shape, damping, part)


@pytest.mark.ranks(2, 3, 4, timeout=400)
@pytest.mark.filterwarnings("ignore:layer 'head'")
@pytest.mark.parametrize("control", [None, hk.KLClip(1e-2), hk.FixedNorm()], ids=["none", "clip", "length"])
def test_a_layer_without_curvature(comm, control):
    """Its length follows from the other layers' on every rank alike."""
    whole, _ = train(None, HeadFails(), step_control=control)
    for owners, kind in ((False, hk.Kaisa(1.0)), (False, hk.Kaisa(0.0)), (True, hk.Kaisa(0.0, factors="owner"))):
        spread, _ = train(comm, HeadFails(), placement=kind, step_control=control, owners_update=owners)
        torch.testing.assert_close(spread, whole, rtol=1e-8, atol=1e-9)
        assert all(torch.equal(spread, other) for other in comm.allgather(spread))


class Large(hk.KFAC):
    """Layers of any size are applied in the application dtype."""

    def is_large(self, shape):
        return True


@pytest.mark.ranks(2, 3)
@pytest.mark.filterwarnings("ignore:layer")
@pytest.mark.parametrize("damping", [1e-8, 0.1])
def test_bfloat16_application(comm, damping):
    """Owners send what they solve as it is; whoever applies it finds out alike whether bfloat16 will do."""
    method, precision = Large(damping=damping, solver="eigen"), replace(DOUBLE, apply=torch.bfloat16)
    whole, alone = train(None, method, precision=precision)
    kept = {name: state.solved["A_basis"].dtype for name, state in alone.states.items()}
    assert (torch.bfloat16 if damping == 0.1 else torch.float64) in kept.values()
    for fraction in (1.0, 0.0):
        spread, preconditioner = train(comm, method, precision=precision, fraction=fraction)
        torch.testing.assert_close(spread, whole, rtol=1e-2, atol=1e-2)
        assert all(torch.equal(spread, other) for other in comm.allgather(spread))
        for name, state in preconditioner.states.items():
            if preconditioner.assignment.works_on(comm.rank, name):
                assert state.solved["A_basis"].dtype == kept[name]


@pytest.mark.ranks(1, 2, 3, 4, 6, timeout=400)
@pytest.mark.parametrize("name", METHODS)
def test_owners_update(comm, name):
    whole, _ = train(None, METHODS[name]())
    for factors in ("all", "owner"):
        placement = hk.Kaisa(0.0, factors=factors)
        spread, _ = train(comm, METHODS[name](), placement=placement, owners_update=True)
        torch.testing.assert_close(spread, whole, rtol=1e-8, atol=1e-9)
        assert all(torch.equal(spread, other) for other in comm.allgather(spread))


@pytest.mark.ranks(2, 3, 4, 6, timeout=400)
@pytest.mark.parametrize("name", ["kfac-eigen", "kfac-cholesky"])
@pytest.mark.parametrize("lag", [0, 1])
def test_helpers(comm, name, lag):
    schedule = hk.Schedule(statistics=1, refresh=2, lag=lag)
    whole, _ = train(None, METHODS[name](), schedule=schedule, steps=6)
    for helpers in range(1, min(comm.size, 3)):
        spread, _ = train(comm, METHODS[name](), placement=hk.Kaisa(helpers=helpers), schedule=schedule, steps=6)
        if comm.rank < comm.size - helpers:
            torch.testing.assert_close(spread, whole, rtol=1e-8, atol=1e-9)


SCHEDULES = {
    "spread": hk.Schedule(statistics=2, refresh=4, spread=3),
    "lag": hk.Schedule(statistics=1, refresh=4, lag=2),
    "spread and lag": hk.Schedule(statistics=1, refresh=4, spread=3, lag=2),
    "similarity": hk.Schedule(statistics=1, refresh=1, adapt=hk.Similarity(threshold=0.4)),
    "trace": hk.Schedule(statistics=1, refresh=1, adapt=hk.TraceChange()),
    "growing": hk.Schedule(statistics={0: 1, 4: 2}, refresh={0: 1, 2: 3}),
}


@pytest.mark.ranks(1, 2, 3, 4, 6, timeout=400)
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_schedules_equal_one_process(comm, schedule):
    whole, _ = train(None, hk.KFAC(solver="eigen", damping=0.1), schedule=SCHEDULES[schedule], steps=9)
    for fraction in (1.0, 0.0):
        spread, preconditioner = train(
            comm, hk.KFAC(solver="eigen", damping=0.1), fraction=fraction, schedule=SCHEDULES[schedule], steps=9
        )
        torch.testing.assert_close(spread, whole, rtol=1e-8, atol=1e-9)
    again, _ = train(comm, hk.KFAC(solver="eigen", damping=0.1), fraction=0.0, schedule=SCHEDULES[schedule], steps=9)
    assert torch.equal(again, spread), "two runs, bitwise"


@pytest.mark.ranks(2)
@pytest.mark.parametrize("schedule", ["similarity", "trace"])
def test_adaptive_schedules_leave_refreshes_out(comm, schedule):
    def refreshes(chosen):
        _, preconditioner = train(comm, hk.KFAC(solver="eigen", damping=0.1), schedule=chosen, steps=9)
        return preconditioner.traffic["broadcast"]

    assert refreshes(SCHEDULES[schedule]) < refreshes(hk.Schedule(1, 1))


@pytest.mark.ranks(2, 4)
def test_own_samples_only(comm):
    """The owner's factors are those of its own shard; there is no factor traffic."""
    placement = hk.Kaisa(0.0, factors="local")
    _, preconditioner = train(
        comm, hk.KFAC(solver="eigen", damping=0.1), placement=placement, schedule=hk.Schedule(1, 1), steps=1
    )
    _, alone = train(None, hk.KFAC(solver="eigen", damping=0.1), schedule=hk.Schedule(1, 1), steps=0)
    assert preconditioner.traffic["reduce"] == preconditioner.traffic["scatter"] == 0
    torch.manual_seed(0)
    x, y, _ = shard(0, comm.rank, comm.size)
    model = alone._model
    torch.nn.functional.cross_entropy(model(x), y).backward()
    alone.step()
    for layer, state in preconditioner.states.items():
        if preconditioner.assignment.owner[layer] == comm.rank:
            for name, factor in state.running.items():
                torch.testing.assert_close(factor, alone.factors(layer)[name])
        else:
            assert not state.running and not state.solved


BOUNDS = {torch.bfloat16: 0.05, torch.float16: 0.01, torch.int8: 0.3}
"""Largest relative change of the way from the first to the last weights."""


@pytest.mark.ranks(2, 3, 4, 6, timeout=400)
@pytest.mark.parametrize("payload", BOUNDS, ids=str)
def test_rounded_payloads(comm, payload):
    precision = hk.Precision(payload=payload)
    start, _ = train(None, hk.KFAC(solver="eigen", damping=0.1), steps=0)
    whole, _ = train(comm, hk.KFAC(solver="eigen", damping=0.1))
    spread, preconditioner = train(comm, hk.KFAC(solver="eigen", damping=0.1), precision=precision)
    assert 0 < (spread - whole).norm() < BOUNDS[payload] * (whole - start).norm()
    assert all(torch.equal(spread, other) for other in comm.allgather(spread))
    _, full = train(comm, hk.KFAC(solver="eigen", damping=0.1), precision=hk.Precision())
    sent = preconditioner.traffic["reduce"] + preconditioner.traffic["scaled"]
    assert sent < full.traffic["reduce"]


@pytest.mark.ranks(2)
def test_int8_keeps_a_singular_factor_positive(comm):
    """Of few samples: rounding alone would leave eigenvalues far below zero."""
    torch.manual_seed(0)
    model = nn.Linear(40, 2)
    preconditioner = hk.Preconditioner(
        model, step_control=None, schedule=hk.Schedule(1, 1), precision=hk.Precision(payload=torch.int8), comm=comm
    )
    x = torch.randn(2, 40, generator=torch.Generator().manual_seed(comm.rank))
    model(x).square().mean().backward()
    average_gradients(model, comm)
    preconditioner.step()
    rows = torch.cat([torch.cat(comm.allgather(x)), torch.ones(4, 1)], dim=1).double()
    exact, found = rows.T @ rows / 4, preconditioner.states[""].running["A"][0].double()
    assert torch.linalg.eigvalsh(found).min() > 0
    assert torch.linalg.matrix_norm(found - exact, 2) < 0.1 * torch.linalg.matrix_norm(exact, 2)


@pytest.mark.ranks(2, 4)
def test_bfloat16_reaches_owners(comm):
    start, _ = train(None, hk.KFAC(solver="eigen", damping=0.1), steps=0)
    whole, _ = train(comm, hk.KFAC(solver="eigen", damping=0.1))
    placement = hk.Kaisa(0.0, factors="owner")
    spread, _ = train(
        comm, hk.KFAC(solver="eigen", damping=0.1), placement=placement, precision=hk.Precision(payload=torch.bfloat16)
    )
    assert 0 < (spread - whole).norm() < BOUNDS[torch.bfloat16] * (whole - start).norm()


# What travels and what stays


def declared_traffic(preconditioner, rank, steps):
    declared = {}
    for step in range(steps):
        for operation in preconditioner.plan(step):
            if rank in operation.ranks and operation.kind != "control" and operation.bytes:
                declared[operation.kind] = declared.get(operation.kind, 0) + operation.bytes
    return declared


OURS = ("reduce", "scaled", "scatter", "gather", "broadcast", "share")


@pytest.mark.ranks(1, 2, 3, 4, 6, timeout=400)
@pytest.mark.parametrize("name", METHODS)
def test_traffic_and_memory_are_what_is_declared(comm, name):
    choices = [
        *itertools.product(PLACEMENTS.values(), [DOUBLE], [hk.Schedule(1, 2)]),
        (hk.Kaisa(), hk.Precision(payload=torch.int8), hk.Schedule(1, 2)),
        (hk.Kaisa(0.0), hk.Precision(payload=torch.bfloat16), hk.Schedule(1, 2, spread=2)),
        (hk.Kaisa(0.0, factors="owner"), hk.Precision(payload=torch.bfloat16), hk.Schedule(1, 2, lag=1)),
    ]
    for placement, precision, schedule in choices:
        _, preconditioner = train(comm, METHODS[name](), placement=placement, precision=precision, schedule=schedule)
        counted = {kind: n for kind, n in preconditioner.traffic.items() if kind in OURS and n}
        assert counted == declared_traffic(preconditioner, comm.rank, STEPS), (placement, precision)
        told = preconditioner.memory()
        for layer, state in preconditioner.states.items():
            for role in ("running", "solved"):
                held = sum(t.numel() * t.element_size() for t in getattr(state, role).values())
                assert held == told[layer][role], (placement, layer, role)


def triangle(d):
    return d * (d + 1) // 2


@pytest.mark.ranks(1, 2, 3, 4, 6, timeout=400)
def test_traffic_is_that_of_the_formulas(comm):
    """Shapes of the small net: (p, a, o, bias column included) of its four layers; norms have a 2 x 2 A alone."""
    sides = {"conv": (1, 19, 4), "grouped": (2, 18, 2), "norm": (4, 2, 0), "head": (1, 17, 5)}
    factors = {layer: p * (triangle(a) + triangle(o)) for layer, (p, a, o) in sides.items()}
    bases = {layer: p * (a * a + a + o * o + o) for layer, (p, a, o) in sides.items()}
    gradients = sum(p * a * max(o, 1) for p, a, o in sides.values())
    parts = {"conv": 2, "grouped": 2, "norm": 1, "head": 2}  # each with a flag that tells whether it was solved
    fractions = {1.0, 0.0} | ({0.5} if comm.size % 2 == 0 else set())
    placements = [*map(hk.Kaisa, sorted(fractions)), hk.Kaisa(0.0, factors="owner"), hk.Kaisa(0.0, factors="local")]
    inverses = {layer: factors[layer] + p * parts[layer] for layer, (p, _, _) in sides.items()}  # and their dampings
    for solver, solved in (("eigen", bases), ("cholesky", inverses)):
        for placement in placements:
            method = hk.KFAC(damping=0.1, solver=solver)
            _, preconditioner = train(comm, method, placement=placement, schedule=hk.Schedule(1, 1), steps=1)
            found = {kind: preconditioner.traffic[kind] for kind in OURS}
            expected = dict.fromkeys(OURS, 0)
            assignment = preconditioner.assignment
            if comm.size > 1 and placement.factors != "local":
                kind = "reduce" if placement.factors == "all" else "scatter"
                expected[kind] = 8 * (sum(factors.values()) + NUMBERS * len(sides))  # and what weighs
            if assignment.workers > 1:  # within the group that works on the layer
                mine = [layer for layer in sides if assignment.works_on(comm.rank, layer)]
                expected["broadcast"] = sum(8 * solved[layer] + 4 * parts[layer] for layer in mine)
            if assignment.workers < comm.size:
                expected["share"] = 8 * gradients
            assert found == expected, (solver, placement)


@pytest.mark.ranks(2, 3, 4, 6, timeout=400)
def test_owner_updates_cost_no_more_than_an_allreduce(comm):
    placement = hk.Kaisa(0.0, factors="owner")
    schedule = hk.Schedule(statistics=100, refresh=100)
    _, preconditioner = train(
        comm, hk.KFAC(solver="eigen", damping=0.1), placement=placement, schedule=schedule, owners_update=True
    )
    parameters = sum(p.numel() for p in preconditioner._model.parameters())
    assert preconditioner.traffic["gradients"] == preconditioner.traffic["weights"] == STEPS * 8 * parameters
    assert preconditioner.traffic["share"] == 0


@pytest.mark.ranks(1, 2, 3, 4, 6, timeout=400)
def test_memory_of_owners_does_not_grow_with_the_ranks(comm):
    placement = hk.Kaisa(0.0, factors="owner")
    _, preconditioner = train(
        comm, hk.KFAC(solver="eigen", damping=0.1), placement=placement, owners_update=True, steps=2
    )
    held = sum(sum(roles.values()) for roles in preconditioner.memory().values())
    _, alone = train(None, hk.KFAC(solver="eigen", damping=0.1), steps=2)
    whole = {name: sum(roles.values()) for name, roles in alone.memory().items()}
    assert comm.allreduce(held) == sum(whole.values())
    assert comm.allreduce(held, op=max_of()) <= sum(whole.values()) / comm.size + max(whole.values())
    optimizer_state = sum(
        state["momentum_buffer"].numel() for state in preconditioner._base.optimizer.state.values() if state
    )
    parameters = sum(p.numel() for p in preconditioner._model.parameters())
    assert comm.allreduce(optimizer_state) == parameters


def max_of():
    from mpi4py import MPI

    return MPI.MAX
