"""What ranks must have in common is checked (comm, layers, settings, weights, gradients); what they hold is freed."""

from __future__ import annotations

import gc

import pytest
import torch
from mpi4py import MPI
from torch import nn

import hpc_kfac as hk
from hpc_kfac import checkpoint
from hpc_kfac.distributed import MPICommunicator, communicator
from parallel.small_training import average_gradients

PLACEMENTS = [hk.Kaisa(1.0), hk.Kaisa(0.0, factors="owner"), hk.Kaisa(helpers=1)]


def net(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3))


def end(preconditioner: hk.Preconditioner) -> None:
    """On all ranks: trainers let helpers go."""
    if preconditioner.comm.rank >= preconditioner.assignment.trainers:
        preconditioner.serve()
    preconditioner.remove()


@pytest.fixture
def made(monkeypatch):
    """Every mpi4py communicator that the library makes."""
    found: list[MPI.Comm] = []
    init = MPICommunicator.__init__

    def noting(self, *args, **kwargs):
        init(self, *args, **kwargs)
        found.append(self.mpi)

    monkeypatch.setattr(MPICommunicator, "__init__", noting)
    return found


@pytest.mark.ranks(3, timeout=400)
def test_a_forgotten_comm_is_refused(comm, tmp_path):
    gc.collect()  # preconditioners of earlier tests
    for call in (lambda: hk.Preconditioner(net()), lambda: checkpoint.save(tmp_path, 1, model=net())):
        with pytest.raises(ValueError, match=r"MPI has 3 processes.*pass comm=MPI.COMM_WORLD, or comm=\"serial\""):
            call()
    with pytest.raises(ValueError, match="comm is not given"):
        checkpoint.load(tmp_path, model=net())
    alone = hk.Preconditioner(net(), comm="serial")
    assert alone.comm.size == 1
    checkpoint.save(tmp_path, 1, model=net(), comm="serial")
    with pytest.raises(TypeError, match=r"comm is a str \('alone'\)"):
        hk.Preconditioner(net(), comm="alone")
    together = hk.Preconditioner(net(), comm=comm)
    with pytest.warns(hk.CurvatureWarning, match='comm is not given, though another.*comm="serial" says so'):
        assert hk.Preconditioner(net()).comm.size == 1
    together.remove()
    with pytest.raises(ValueError, match="comm is not given"):
        hk.Preconditioner(net())


@pytest.mark.ranks(3, timeout=400)
def test_a_forgotten_process_group_is_refused(comm, process_group):
    with pytest.raises(ValueError, match=r"torch.distributed has 3 processes.*comm=torch.distributed.group.WORLD"):
        hk.Preconditioner(net())


@pytest.mark.ranks(3, timeout=400)
def test_checkpoints_free_their_communicators(comm, folder, made):
    for step in range(3):
        checkpoint.save(folder, step, model=net(), comm=comm)
        checkpoint.load(folder, model=net(), comm=comm)
    with pytest.raises(checkpoint.BrokenCheckpoint):
        checkpoint.load(folder / "none", model=net(), comm=comm)
    assert len(made) == 7
    assert all(one == MPI.COMM_NULL for one in made)


@pytest.mark.ranks(3, timeout=400)
def test_preconditioners_free_their_communicators(comm, made):
    for placement in PLACEMENTS:
        model = net()
        preconditioner = hk.Preconditioner(model, placement=placement, comm=comm, stall_seconds=60)
        if placement.factors == "owner":
            owners = hk.OwnerOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), model, preconditioner)
            owners.remove()
            owners.remove()
        end(preconditioner)
        preconditioner.remove()
    assert len(made) > 6
    assert all(one == MPI.COMM_NULL for one in made)


@pytest.mark.ranks(3, timeout=400)
def test_a_communicator_of_the_users_stays(comm, made):
    carrier = communicator(comm)
    for _ in range(3):
        hk.Preconditioner(net(), comm=carrier).remove()
    total = torch.ones(1)
    carrier.allreduce(total, "test").wait()
    assert total == 3
    carrier.free()
    assert all(one == MPI.COMM_NULL for one in made)


@pytest.mark.ranks(3, timeout=400)
def test_process_groups_are_used_again(comm, process_group):
    """Torch cannot destroy and make anew a group of the same ranks: they would hang."""
    groups = torch.distributed.distributed_c10d._world.pg_map
    counts = []
    for _ in range(4):
        for placement in PLACEMENTS:
            preconditioner = hk.Preconditioner(net(), placement=placement, comm=process_group)
            total = torch.ones(1)
            preconditioner.trainers.allreduce(total, "test").wait()
            assert total == preconditioner.trainers.size
            end(preconditioner)
        counts.append(len(groups))
    assert counts[1:] == counts[:1] * 3


class OwnDamping(hk.Damping):
    """A user's, with something in it that no two ranks have in common."""

    def __init__(self) -> None:
        self.mark = object()
        self.rank = MPI.COMM_WORLD.rank

    def at(self, step: int, learning_rate: float) -> float:
        return 0.1


def wider(rank: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(5, 7 + rank), nn.Tanh(), nn.Linear(7 + rank, 3))


# What differs on the last rank, and what is said of it.
DIFFERENT = {
    "a shape": (lambda last: (wider(int(last)), {}), r"layer '0' is Linear of float32 \[7, 5\].* on rank 0 and .*8"),
    "a layer more": (
        lambda last: (nn.Sequential(*net(), *([nn.Linear(3, 3)] if last else [])), {}),
        "layer '3' is missing on rank 0 and Linear",
    ),
    "a layer left out": (
        lambda last: (net(), {"skip": ["2"] if last else []}),
        "layer '2' is .* on rank 0 and missing",
    ),
    "a kind": (
        lambda last: (nn.Sequential(nn.Linear(2, 3) if last else nn.Embedding(2, 3)), {}),
        "layer '0' is Embedding of .* and Linear",
    ),
    "nothing captured": (
        lambda last: (nn.Sequential(net()[0], nn.Identity()) if not last else nn.PReLU(), {}),
        "missing",
    ),
    "damping": (lambda last: (net(), {"method": hk.KFAC(damping=0.1 + last)}), r"damping=0.1.*damping=1.1"),
    "schedule": (lambda last: (net(), {"schedule": hk.Schedule(1, 1 + last)}), "schedule is Schedule"),
    "step control": (lambda last: (net(), {"step_control": None if last else hk.Orthogonal()}), "step_control is Orth"),
    "passes": (lambda last: (net(), {"micro_batches": 1 + last}), "micro_batches is 1 on rank 0 and 2"),
    "a limit": (
        lambda last: (net(), {"stall_seconds": None if last else 60}),
        "stall_seconds is 60 on rank 0 and None",
    ),
}


@pytest.mark.ranks(3, timeout=400)
def test_ranks_that_differ_are_refused_on_all(comm, made):
    for kind, (make, words) in DIFFERENT.items():
        model, settings = make(comm.rank == 2)
        with pytest.raises(ValueError, match=f"(?s){words}.* on rank\\(s\\) 2; make them of the same model") as caught:
            hk.Preconditioner(model, comm=comm, **settings)
        assert len(set(comm.allgather(str(caught.value)))) == 1, kind
    assert all(one == MPI.COMM_NULL for one in made)
    own = hk.Preconditioner(net(), method=hk.KFAC(damping=OwnDamping()), comm=comm)
    own.remove()


def backward(model: nn.Module, rank: int) -> None:
    model.zero_grad()
    x = torch.randn(8, 5, generator=torch.Generator().manual_seed(rank))
    model(x).square().mean().backward()


@pytest.mark.ranks(3, timeout=400)
def test_other_weights_in_the_first_step_are_refused(comm):
    model = net(seed=comm.rank // 2)
    preconditioner = hk.Preconditioner(model, comm=comm)
    backward(model, 0)
    average_gradients(model, comm)
    with pytest.raises(
        hk.WeightsDiffer, match=r"start from different weights: 0.weight on rank\(s\) 2 .*broadcast_par"
    ):
        preconditioner.step()
    for p in model.parameters():
        comm.Bcast(p.detach().numpy())
    assert preconditioner.step().applied
    preconditioner.remove()


@pytest.mark.ranks(3, timeout=400)
def test_local_gradients_are_refused(comm, process_group):
    model = net()
    preconditioner = hk.Preconditioner(model, comm=comm, check_weights_every=2)
    backward(model, comm.rank)
    with pytest.raises(
        hk.Refused, match=r"step 0: the gradients are not averaged .* 0.weight on rank\(s\) 1, 2 differs"
    ):
        preconditioner.step()
    average_gradients(model, comm)
    if comm.rank == 1:  # nothing to compare with
        model[0].weight.grad[0, 0] = float("nan")
        model[2].weight.grad = None
    preconditioner.step()
    for step in (1, 2):  # without a check of weights and with one
        backward(model, comm.rank)
        with pytest.raises(hk.Refused, match=rf"step {step}: the gradients are not averaged .* 1, 2 differs"):
            preconditioner.step()
    preconditioner.remove()

    ddp = nn.parallel.DistributedDataParallel(net())
    preconditioner = hk.Preconditioner(ddp.module, comm=process_group)
    with ddp.no_sync():
        backward(ddp, comm.rank)
    with pytest.raises(hk.Refused, match="outside no_sync"):
        preconditioner.step()
    preconditioner.remove()


@pytest.mark.ranks(3, timeout=400)
def test_horovod_is_synchronized_first(comm):
    import horovod.torch as hvd

    hvd.init()
    with pytest.raises(ValueError, match=r"Horovod has 3 processes.*comm=MPI.COMM_WORLD"):
        hk.Preconditioner(net())

    def trained(kind: str, passes: int = 1) -> torch.Tensor:
        model = net()
        sgd = torch.optim.SGD(model.parameters(), lr=0.1)
        optimizer = hvd.DistributedOptimizer(sgd, model.named_parameters(), backward_passes_per_step=passes)
        preconditioner = hk.Preconditioner(
            model, optimizer, comm=comm, schedule=hk.Schedule(1, 1), micro_batches=passes
        )
        for step in range(3):
            optimizer.zero_grad()
            for part in range(passes):
                x = torch.randn(8, 5, generator=torch.Generator().manual_seed(10 * step + part + 3 * comm.rank))
                (model(x).square().mean() / passes).backward()
            if kind == "never":
                with pytest.raises(hk.Refused, match=r"call optimizer.synchronize\(\) before preconditioner.step"):
                    preconditioner.step()
                optimizer.synchronize()
                break
            optimizer.synchronize()
            assert preconditioner.step().applied
            if kind == "twice":
                optimizer.step()  # Horovod warns, and averages what is equal
            else:
                with optimizer.skip_synchronize():
                    optimizer.step()
        preconditioner.remove()
        return torch.cat([p.detach().flatten() for p in model.parameters()])

    trained("never")
    right = trained("right", passes=2)
    assert all(torch.equal(right, other) for other in comm.allgather(right))
    torch.testing.assert_close(trained("twice"), trained("right"))
