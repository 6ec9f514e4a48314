"""The preconditioner on several ranks against one process that sees the whole batch."""

from __future__ import annotations

import itertools
import runpy

import pytest
import torch
from torch import nn

import hpc_kfac as hk
from parallel.small_training import DOUBLE, METHODS, STEPS, average_gradients, train
from support import ROOT

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


@pytest.mark.ranks(2, 4)
@pytest.mark.parametrize("name", METHODS)
def test_torch_distributed_carries_what_mpi_does(comm, process_group, name):
    for fraction in (1.0, 0.5):
        reference, over_mpi = train(comm, METHODS[name](), fraction=fraction)
        weights, over_torch = train(comm, METHODS[name](), carrier=process_group, fraction=fraction)
        torch.testing.assert_close(weights, reference, rtol=1e-10, atol=1e-12)
        assert over_torch.traffic == over_mpi.traffic


@pytest.mark.ranks(2, 3)
def test_beside_distributed_data_parallel(comm, process_group):
    """Its hooks and ours post from one backward pass, over groups of their own."""
    results = []
    for wrapped in (True, False):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3)).double()
        forward = nn.parallel.DistributedDataParallel(model, bucket_cap_mb=1e-4) if wrapped else model
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        preconditioner = hk.Preconditioner(
            model, optimizer, schedule=hk.Schedule(1, 1), precision=DOUBLE, comm=torch.distributed.group.WORLD
        )
        for step in range(6):
            generator = torch.Generator().manual_seed(10 * step + comm.rank)
            x, y = (
                torch.randn(5, 6, generator=generator, dtype=torch.float64),
                torch.randint(3, (5,), generator=generator),
            )
            optimizer.zero_grad()
            nn.functional.cross_entropy(forward(x), y).backward()
            if not wrapped:
                average_gradients(model, comm)
            assert preconditioner.step().applied
            optimizer.step()
        results.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    torch.testing.assert_close(*results, rtol=1e-10, atol=1e-12)


@pytest.mark.ranks(2)
def test_two_runs_are_bitwise_equal_on_all_ranks(comm):
    first, _ = train(comm, hk.KFAC(solver="eigen", damping=0.1), fisher="sampled")
    second, _ = train(comm, hk.KFAC(solver="eigen", damping=0.1), fisher="sampled")
    assert torch.equal(first, second)
    assert all(torch.equal(first, other) for other in comm.allgather(first))


@pytest.mark.ranks(2)
def test_accumulation_equals_the_whole_batch(comm):
    whole, _ = train(None, hk.KFAC(solver="eigen", damping=0.1), fisher="sampled")
    for numbered in (True, False):  # the ranks' samples take turns, as those that are not numbered are taken to do
        spread, _ = train(
            comm, hk.KFAC(solver="eigen", damping=0.1), fisher="sampled", accumulation=3, numbered=numbered
        )
        torch.testing.assert_close(spread, whole, rtol=1e-8, atol=1e-9)


@pytest.mark.ranks(2, 4)
def test_statistics_between_refreshes_are_reduced_once(comm):
    """Local running averages commute with the mean over ranks, so intervals 1 and 4 move factors twice in 8 steps."""
    schedule = hk.Schedule(statistics=1, refresh=4)
    whole, _ = train(None, hk.KFAC(solver="eigen", damping=0.1), schedule=schedule, steps=8)
    spread, preconditioner = train(comm, hk.KFAC(solver="eigen", damping=0.1), schedule=schedule, steps=8)
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
        counted = {kind: n for kind, n in preconditioner.traffic.items() if kind not in ("control", "hash")}
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
        method=hk.KFAC(solver="eigen", damping=0.1),
        placement=hk.Kaisa(fraction),
        schedule=hk.Schedule(1, 1),
        step_control=None,
        precision=DOUBLE,
        comm=comm,
    )
    torch.manual_seed(comm.rank)
    x = torch.randn(6, 3, dtype=torch.float64)
    model(x, branch=comm.rank == 0).square().mean().backward()
    average_gradients(model, comm)
    expected = preconditioner.capture.layers["branch"].gradient().clone()
    preconditioner.step()
    # Rank 0's own factors count, undiluted by the ranks that did not use the layer.
    state = comm.bcast(preconditioner.factors("branch") if comm.rank == 0 else None)
    shape = preconditioner.capture.layers["branch"].shape
    solved = preconditioner.method.refresh(state, shape, 0.1)
    update = preconditioner.method.precondition(expected, {**state, **solved}, shape, 0.1)
    torch.testing.assert_close(preconditioner.capture.layers["branch"].gradient(), update)


@pytest.mark.ranks(2)
@pytest.mark.parametrize(("fraction", "rank"), [(1.0, 0), (1.0, 1), (0.0, 0)])  # rank 0 is the one grad worker at 0
def test_non_finite_gradient_on_one_rank_skips_all(comm, fraction, rank):
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    placement = hk.Kaisa(fraction)
    preconditioner = hk.Preconditioner(model, step_control=None, comm=comm, max_skipped=2, placement=placement)
    for step in range(3):
        model.zero_grad()
        model(torch.ones(4, 3)).sum().backward()
        if comm.rank == rank:
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


@pytest.mark.ranks(2)
@pytest.mark.parametrize("example", ["with_horovod", "owner_optimizer"])
def test_examples_for_several_ranks(comm, example, capsys):
    runpy.run_path(str(ROOT / "examples" / f"{example}.py"))
    assert (", loss 0.7" if example == "with_horovod" else "\nloss 0.7") in capsys.readouterr().out or comm.rank


class Recorded(hk.LevenbergMarquardt):
    """Keeps the ratio that it is told."""

    def adjust(self, ratio: float) -> None:
        self.ratio = ratio
        super().adjust(ratio)


def measured_ratio(comm, placement: hk.Kaisa) -> float:
    """Of a step's actual and predicted change of the loss; the first layer is left to the optimizer."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
    damping = Recorded(0.1, interval=1)
    preconditioner = hk.Preconditioner(
        model,
        optimizer,
        method=hk.KFAC(solver="eigen", damping=damping),
        placement=placement,
        schedule=hk.Schedule(1, 1),
        step_control=None,
        skip=["0"],
        precision=DOUBLE,
        comm=comm or "serial",
    )
    x, y = torch.randn(8, 3, dtype=torch.float64), torch.arange(8) % 3
    if comm is not None:
        x, y = x[comm.rank :: comm.size], y[comm.rank :: comm.size]
    loss = nn.functional.cross_entropy(model(x), y)
    loss.backward()
    if comm is not None:
        average_gradients(model, comm)
    assert preconditioner.step().refreshed == 1
    optimizer.step()
    preconditioner.adapt_damping(lambda: nn.functional.cross_entropy(model(x), y).item(), loss.item())
    return damping.ratio


@pytest.mark.ranks(2)
def test_reduction_ratio_is_that_of_one_process(comm):
    alone = measured_ratio(None, hk.Kaisa())
    by_all = hk.Rates(flops=1e12, latency=1.0, bandwidth=1e9)
    for placement in (hk.Kaisa(1.0), hk.Kaisa(0.0), hk.Kaisa(1.0, all_local=by_all)):
        assert measured_ratio(comm, placement) == pytest.approx(alone)
