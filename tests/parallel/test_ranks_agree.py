"""What ranks must have in common is checked (comm, layers, settings, weights, gradients); what they hold is freed."""

from __future__ import annotations

import pytest
import torch
from mpi4py import MPI
from torch import nn

import hpc_kfac as hk
from hpc_kfac import checkpoint
from hpc_kfac.distributed import MPICommunicator, communicator

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


@pytest.mark.ranks(3)
def test_a_forgotten_comm_is_refused(comm, tmp_path):
    for call in (lambda: hk.Preconditioner(net()), lambda: checkpoint.save(tmp_path, 1, model=net())):
        with pytest.raises(ValueError, match=r"MPI has 3 processes.*pass comm=MPI.COMM_WORLD, or comm=\"serial\""):
            call()
    with pytest.raises(ValueError, match="comm is not given"):
        checkpoint.load(tmp_path, model=net())
    alone = hk.Preconditioner(net(), comm="serial")
    assert alone.comm.size == 1
    checkpoint.save(tmp_path, 1, model=net(), comm="serial")
    with pytest.raises(TypeError, match="comm is 'alone'"):
        hk.Preconditioner(net(), comm="alone")


@pytest.mark.ranks(3)
def test_a_forgotten_process_group_is_refused(comm, process_group):
    with pytest.raises(ValueError, match=r"torch.distributed has 3 processes.*comm=torch.distributed.group.WORLD"):
        hk.Preconditioner(net())


@pytest.mark.ranks(3)
def test_checkpoints_free_their_communicators(comm, folder, made):
    for step in range(3):
        checkpoint.save(folder, step, model=net(), comm=comm)
        checkpoint.load(folder, model=net(), comm=comm)
    with pytest.raises(checkpoint.BrokenCheckpoint):
        checkpoint.load(folder / "none", model=net(), comm=comm)
    assert len(made) == 7
    assert all(one == MPI.COMM_NULL for one in made)


@pytest.mark.ranks(3)
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


@pytest.mark.ranks(3)
def test_a_communicator_of_the_users_stays(comm, made):
    carrier = communicator(comm)
    for _ in range(3):
        hk.Preconditioner(net(), comm=carrier).remove()
    total = torch.ones(1)
    carrier.allreduce(total, "test").wait()
    assert total == 3
    carrier.free()
    assert all(one == MPI.COMM_NULL for one in made)


@pytest.mark.ranks(3)
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
