"""The preconditioner on several ranks against one process that sees the whole batch."""

from __future__ import annotations

import itertools
import socket

import pytest
import torch
from torch import nn

import hpc_kfac as hk

DOUBLE = hk.Precision(torch.float64, torch.float64, torch.float64)
BATCH, STEPS = 37, 4  # no rank count divides it, and every factor has full rank, without which eigenbases are arbitrary

METHODS = {
    "kfac-eigen": lambda: hk.KFAC(damping=0.1, solver="eigen"),
    "kfac-cholesky": lambda: hk.KFAC(damping=0.1, solver="cholesky"),
    "ekfac": lambda: hk.EKFAC(damping=0.1),
    "eva": lambda: hk.Eva(damping=0.1),
    "sample-matrix": lambda: hk.SampleMatrix(damping=0.1, rows=37),
}


class Net(nn.Module):
    """Every kind of layer, without BatchNorm, whose statistics differ between shards."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 4, 3, padding=1)
        self.grouped = nn.Conv2d(4, 4, 3, stride=2, groups=2, bias=False)
        self.norm = nn.GroupNorm(2, 4)
        self.head = nn.Linear(4 * 2 * 2, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.conv(x).relu()
        return self.head(self.norm(self.grouped(x)).tanh().flatten(1))


def shard(step: int, rank: int, ranks: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(BATCH, 2, 5, 5, generator=generator, dtype=torch.float64)
    y = torch.randint(5, (BATCH,), generator=generator)
    index = torch.arange(BATCH)[rank::ranks]
    return x[index], y[index], index


def train(comm, method, *, carrier=None, fraction=1.0, fisher="empirical", accumulation=1, schedule=None, steps=STEPS):
    """Weights after some steps, and the preconditioner. comm None: one process, the whole batch.

    `carrier` carries factors and inverses instead of comm.
    """
    torch.manual_seed(0)
    model = Net().double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    rank, ranks = (comm.rank, comm.size) if comm is not None else (0, 1)
    preconditioner = hk.Preconditioner(
        model,
        optimizer,
        method=method,
        placement=hk.Kaisa(fraction),
        schedule=schedule or hk.Schedule(statistics=1, refresh=2),
        step_control=hk.KLClip(1e-2),
        fisher=fisher,
        precision=DOUBLE,
        comm=carrier or comm,
        micro_batches=accumulation,
    )
    for step in range(steps):
        optimizer.zero_grad()
        x, y, index = shard(step, rank, ranks)
        for part in torch.arange(len(x)).chunk(accumulation):
            outputs = model(x[part])
            weight = len(part) * ranks / BATCH
            preconditioner.observe(outputs, loss_scale=weight, sample_index=index[part])
            (nn.functional.cross_entropy(outputs, y[part]) * weight).backward()
        for p in model.parameters():
            if comm is not None:
                total = comm.allreduce(p.grad.numpy())
                p.grad.copy_(torch.from_numpy(total) / ranks)
        report = preconditioner.step(log=True)
        assert report.applied
        optimizer.step()
    return torch.cat([p.detach().flatten() for p in model.parameters()]), preconditioner


# The exact Fisher gives Eva no mean output gradient, and the sample matrix more draws than rows.
SOURCES = [
    (name, fisher)
    for name in METHODS
    for fisher in ("empirical", "sampled", "exact")
    if fisher != "exact" or name not in ("eva", "sample-matrix")
]


@pytest.mark.ranks(2, 3, 4)
@pytest.mark.parametrize(("name", "fisher"), SOURCES)
def test_equals_one_process(comm, name, fisher):
    whole, _ = train(None, METHODS[name](), fisher=fisher)
    spread, _ = train(comm, METHODS[name](), fisher=fisher)
    torch.testing.assert_close(spread, whole, rtol=1e-8, atol=1e-9)


@pytest.mark.ranks(4)
@pytest.mark.parametrize("name", METHODS)
def test_placements_agree_bitwise(comm, name):
    reference, _ = train(comm, METHODS[name](), fraction=1.0)
    for fraction in (0.5, 0.25):
        weights, _ = train(comm, METHODS[name](), fraction=fraction)
        assert torch.equal(weights, reference), fraction


@pytest.fixture
def process_group(comm):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = comm.bcast(server.getsockname()[1])
    torch.distributed.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=comm.rank, world_size=comm.size)
    yield torch.distributed.group.WORLD
    comm.Barrier()
    torch.distributed.destroy_process_group()


@pytest.mark.ranks(2, 4)
@pytest.mark.parametrize("name", METHODS)
def test_torch_distributed_carries_what_mpi_does(comm, process_group, name):
    for fraction in (1.0, 0.5):
        reference, over_mpi = train(comm, METHODS[name](), fraction=fraction)
        weights, over_torch = train(comm, METHODS[name](), carrier=process_group, fraction=fraction)
        torch.testing.assert_close(weights, reference, rtol=1e-10, atol=1e-12)
        assert over_torch.traffic == over_mpi.traffic


@pytest.mark.ranks(2)
def test_two_runs_are_bitwise_equal_on_all_ranks(comm):
    first, _ = train(comm, hk.KFAC(damping=0.1), fisher="sampled")
    second, _ = train(comm, hk.KFAC(damping=0.1), fisher="sampled")
    assert torch.equal(first, second)
    assert all(torch.equal(first, other) for other in comm.allgather(first))


@pytest.mark.ranks(2)
def test_accumulation_equals_the_whole_batch(comm):
    whole, _ = train(None, hk.KFAC(damping=0.1), fisher="sampled")
    spread, _ = train(comm, hk.KFAC(damping=0.1), fisher="sampled", accumulation=3)
    torch.testing.assert_close(spread, whole, rtol=1e-8, atol=1e-9)


@pytest.mark.ranks(2, 4)
def test_statistics_between_refreshes_are_reduced_once(comm):
    """Local running averages commute with the mean over ranks, so intervals 1 and 4 move factors twice in 8 steps."""
    schedule = hk.Schedule(statistics=1, refresh=4)
    whole, _ = train(None, hk.KFAC(damping=0.1), schedule=schedule, steps=8)
    spread, preconditioner = train(comm, hk.KFAC(damping=0.1), schedule=schedule, steps=8)
    torch.testing.assert_close(spread, whole, rtol=1e-8, atol=1e-9)
    once = sum(op.bytes for op in preconditioner.plan(0) if op.kind == "reduce")
    assert preconditioner.traffic["reduce"] == 2 * once > 0


@pytest.mark.ranks(1, 2, 3, 4)
def test_counted_traffic_is_what_the_plan_declares(comm):
    fractions = [d / comm.size for d in range(1, comm.size + 1) if comm.size % d == 0]
    for (name, make), fraction in itertools.product(METHODS.items(), fractions):
        _, preconditioner = train(comm, make(), fraction=fraction)
        declared: dict[str, int] = {}
        for step in range(STEPS):
            for op in preconditioner.plan(step):
                if comm.rank in op.ranks and op.kind != "control":
                    declared[op.kind] = declared.get(op.kind, 0) + op.bytes
        counted = {kind: n for kind, n in preconditioner.traffic.items() if kind != "control"}
        assert counted == {kind: n for kind, n in declared.items() if n}, (name, fraction)


@pytest.mark.ranks(1, 2, 4)
def test_memory_is_what_the_state_tables_declare(comm):
    for name, make in METHODS.items():
        for fraction in (1.0, 0.0):
            _, preconditioner = train(comm, make(), fraction=fraction)
            declared = preconditioner.memory()
            for layer, state in preconditioner.states.items():
                for role in ("running", "solved"):
                    held = sum(t.numel() * t.element_size() for t in getattr(state, role).values())
                    assert held == declared[layer][role], (name, fraction, layer, role)


class Branching(nn.Module):
    """The branch is used by rank 0 only."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk, self.branch = nn.Linear(3, 4), nn.Linear(4, 4)
        self.head = nn.Linear(4, 2)

    def forward(self, x: torch.Tensor, branch: bool) -> torch.Tensor:
        x = self.trunk(x).tanh()
        return self.head(self.branch(x).tanh() if branch else x)


@pytest.mark.ranks(2, 3)
@pytest.mark.parametrize("fraction", [1.0, 0.0])
def test_a_layer_unused_on_some_ranks(comm, fraction):
    torch.manual_seed(0)
    model = Branching().double()
    preconditioner = hk.Preconditioner(
        model,
        method=hk.KFAC(damping=0.1),
        placement=hk.Kaisa(fraction),
        schedule=hk.Schedule(1, 1),
        step_control=None,
        precision=DOUBLE,
        comm=comm,
    )
    torch.manual_seed(comm.rank)
    x = torch.randn(6, 3, dtype=torch.float64)
    model(x, branch=comm.rank == 0).square().mean().backward()
    for p in model.parameters():
        grad = torch.zeros_like(p) if p.grad is None else p.grad
        p.grad = torch.from_numpy(comm.allreduce(grad.numpy()) / comm.size)
    expected = preconditioner.capture.layers["branch"].gradient().clone()
    preconditioner.step()
    # Rank 0's own factors count, undiluted by the ranks that did not use the layer.
    state = comm.bcast(preconditioner.states["branch"].running if comm.rank == 0 else None)
    shape = preconditioner.capture.layers["branch"].shape
    solved = preconditioner.method.refresh(state, shape, 0.1)
    update = preconditioner.method.precondition(expected, {**state, **solved}, shape, 0.1)
    torch.testing.assert_close(preconditioner.capture.layers["branch"].gradient(), update)


@pytest.mark.ranks(2)
def test_non_finite_gradient_on_one_rank_skips_all(comm):
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    preconditioner = hk.Preconditioner(model, step_control=None, comm=comm, max_skipped=2)
    for step in range(3):
        model.zero_grad()
        model(torch.ones(4, 3)).sum().backward()
        if comm.rank == 1:
            model.weight.grad[0, 0] = float("nan")
        if step == 2:
            with pytest.raises(hk.TrainingDiverged, match="3 steps in a row"):
                preconditioner.step()
        else:
            assert not preconditioner.step().applied
    assert preconditioner.skipped == 3


@pytest.mark.ranks(2)
def test_scalars_are_summed_in_the_same_reduction(comm):
    model = nn.Linear(3, 2)
    preconditioner = hk.Preconditioner(model, step_control=None, comm=comm)
    model(torch.ones(4, 3)).sum().backward()
    report = preconditioner.step(scalars={"loss": comm.rank + 1.0, "stop": float(comm.rank == 1)}, log=True)
    assert report.scalars == {"loss": 3.0, "stop": 1.0}
    assert set(report.layers) == {""}  # the model itself is the one captured layer
