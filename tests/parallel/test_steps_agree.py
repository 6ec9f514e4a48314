"""What ranks do apart while training: steps of helpers, owners and optimizers, gradients that are not averaged."""

from __future__ import annotations

import re

import pytest
import torch
from mpi4py import MPI
from torch import nn

import hpc_kfac as hk


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3))


def sgd(model: nn.Module, lr: float = 0.1, **settings) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=lr, **settings)


def made(model: nn.Module, optimizer, comm, **settings) -> hk.Preconditioner:
    return hk.Preconditioner(model, optimizer, comm=comm, schedule=hk.Schedule(1, 1), **settings)


def backward(model: nn.Module, rank: int) -> None:
    model.zero_grad()
    x = torch.randn(8, 5, generator=torch.Generator().manual_seed(rank))
    model(x).square().mean().backward()


def refused_on_all(comm, words: str, call) -> None:
    """The same words on all ranks."""
    with pytest.raises(hk.Refused, match=words) as caught:
        call()
    assert len(set(comm.allgather(str(caught.value)))) == 1


@pytest.mark.ranks(2)
def test_a_comm_of_one_process_is_refused(comm, process_group):
    alone = [torch.distributed.new_group([rank]) for rank in range(comm.size)][comm.rank]
    for given, name in ((MPI.COMM_SELF, "MPI.COMM_SELF"), (alone, "a process group of one rank")):
        with pytest.raises(ValueError, match=f'comm={name} is this process alone.*2 processes.*comm="serial"'):
            hk.Preconditioner(net(), comm=given)


@pytest.mark.ranks(2)
def test_helpers_and_owners_have_their_own_steps(comm):
    model = net()
    preconditioner = made(model, sgd(model), comm, placement=hk.Kaisa(helpers=1))
    if comm.rank == 1:
        with pytest.raises(hk.Refused, match=r"rank 1 is a helper \(placement helpers=1\).*preconditioner.serve\(\)"):
            preconditioner.step()
        preconditioner.serve()
    preconditioner.remove()

    model = net()
    inner = sgd(model, momentum=0.9)
    preconditioner = made(model, inner, comm, placement=hk.Kaisa(0.0, factors="owner"))
    owners = hk.OwnerOptimizer(inner, model, preconditioner)
    backward(model, comm.rank)
    refused_on_all(comm, r"call OwnerOptimizer.synchronize\(\) between backward", preconditioner.step)
    owners.synchronize()
    preconditioner.step()
    before = [p.detach().clone() for p in model.parameters()]
    refused_on_all(comm, r"call OwnerOptimizer.step\(\)", inner.step)
    assert all(map(torch.equal, before, model.parameters()))
    backward(model, comm.rank)
    refused_on_all(comm, r"step\(\) did not follow the last preconditioner.step\(\)", owners.synchronize)
    owners.abandon()
    for bad in (False, True, False):  # one that is left out needs no word
        backward(model, comm.rank)
        if bad:
            next(model.parameters()).grad.fill_(torch.nan)
        owners.synchronize()
        if preconditioner.step().applied:
            owners.step()
    weights = torch.cat([p.detach().flatten() for p in model.parameters()])
    assert all(torch.equal(weights, other) for other in comm.allgather(weights))
    owners.remove()
    preconditioner.remove()


# What the last rank has, and what is said of it.
OPTIMIZERS = {
    "class": (lambda model: torch.optim.AdamW(model.parameters(), lr=0.1), "the optimizer is SGD on rank 0 and AdamW"),
    "none": (lambda model: None, "the optimizer is SGD on rank 0 and NoneType"),
    "rate": (lambda model: sgd(model, 0.2), "lr of the optimizer's group 0 is 0.1 on rank 0 and 0.2"),
    "momentum": (lambda model: sgd(model, momentum=0.9), "momentum of .* is 0 on rank 0 and 0.9"),
    "decay": (lambda model: sgd(model, weight_decay=0.1), "weight_decay of .* is 0 on rank 0 and 0.1"),
}


@pytest.mark.ranks(2)
def test_other_optimizers_are_refused(comm):
    for make, words in OPTIMIZERS.values():
        model = net()
        preconditioner = made(model, make(model) if comm.rank else sgd(model), comm)
        backward(model, 0)
        refused_on_all(comm, f"step 0: the ranks' optimizers differ: {words} on rank", preconditioner.step)
        preconditioner.remove()


@pytest.mark.ranks(2)
def test_horovod_is_seen_behind_another_optimizer(comm):
    import horovod.torch as hvd

    hvd.init()
    for given in ("inner", "none"):
        model = net()
        inner = sgd(model)
        outer = hvd.DistributedOptimizer(inner, model.named_parameters())
        other = net()  # trained beside it, and not averaged yet
        beside = hvd.DistributedOptimizer(sgd(other), [("b." + n, p) for n, p in other.named_parameters()])
        preconditioner = made(model, inner if given == "inner" else None, comm)
        backward(other, comm.rank)
        for synchronized in (True, False):
            backward(model, comm.rank)
            if synchronized:
                outer.synchronize()
                assert preconditioner.step().applied
            else:
                refused_on_all(comm, re.escape("call optimizer.synchronize()"), preconditioner.step)
                outer.synchronize()
        beside.synchronize()
        preconditioner.remove()


@pytest.mark.ranks(2)
def test_what_ranks_do_apart_later_is_refused(comm, process_group):
    """In any step, and the weights stay as they are."""
    model = net()
    optimizer = sgd(model)
    ddp = nn.parallel.DistributedDataParallel(model)
    preconditioner = made(model, optimizer, comm)
    scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0)
    assert train(ddp, comm, preconditioner, optimizer)
    before = [p.detach().clone() for p in model.parameters()]
    with ddp.no_sync():
        words = r"step 1: the gradients are not averaged over the ranks: that of 2.bias on rank\(s\) 1 differs from"
        refused_on_all(comm, words, lambda: train(ddp, comm, preconditioner, optimizer))
    optimizer.step()
    assert all(map(torch.equal, before, model.parameters()))
    assert train(ddp, comm, preconditioner, optimizer)
    for epoch in range(2):
        scheduler.step(1.0 + epoch * comm.rank)
    words = r"step 3: the ranks' optimizers differ: lr of .* group 0 is 0.1 on rank 0 and 0.0\d+ on rank\(s\) 1.*mean"
    if comm.rank == 0:
        optimizer.param_groups[0]["lr"] = 0.1
    refused_on_all(comm, words, lambda: train(ddp, comm, preconditioner, optimizer))
    optimizer.param_groups[0]["lr"] = 0.05
    assert train(ddp, comm, preconditioner, optimizer)
    preconditioner.remove()


def train(ddp: nn.Module, comm, preconditioner: hk.Preconditioner, optimizer) -> bool:
    backward(ddp, comm.rank)
    report = preconditioner.step()
    optimizer.step()
    return report.applied
