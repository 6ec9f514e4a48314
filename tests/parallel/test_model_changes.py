"""A model that changes while several ranks train it."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import hpc_kfac as hk
from parallel.small_training import BATCH, DOUBLE, Net, average_gradients, shard

PLACEMENTS = {
    "COMM-OPT": (hk.Kaisa(1.0), False),
    "MEM-OPT": (hk.Kaisa(0.0), False),
    "owners": (hk.Kaisa(0.0, factors="owner"), False),
    "owners update": (hk.Kaisa(0.0, factors="owner"), True),
}
STEPS = 9
START = {"conv": False, "grouped": False}
LATER = {4: {"conv": True, "grouped": True}, 6: {"grouped": False, "head": False}, 7: {"head": True}}


def train(comm, placement, owners_update=False, start=START, later=LATER, control=hk.Orthogonal()):  # noqa: B008
    torch.manual_seed(0)
    model = Net().double()
    for name, trained in start.items():
        model.get_submodule(name).requires_grad_(trained)
    sgd = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    preconditioner = hk.Preconditioner(
        model,
        sgd,
        method=hk.KFAC(damping=0.1),
        placement=placement,
        schedule=hk.Schedule(statistics=2, refresh=4),
        step_control=control,
        precision=DOUBLE,
        comm=comm or "serial",
    )
    optimizer = hk.OwnerOptimizer(sgd, model, preconditioner) if owners_update and comm is not None else sgd
    rank, ranks = (comm.rank, comm.size) if comm is not None else (0, 1)
    for step in range(STEPS):
        for name, trained in later.get(step, {}).items():
            (model.get_parameter if name.endswith("bias") else model.get_submodule)(name).requires_grad_(trained)
        optimizer.zero_grad()
        x, y, _ = shard(step, rank, ranks)
        weight = len(x) * ranks / BATCH
        outputs = model(x)
        preconditioner.observe(outputs, loss_scale=weight)
        (nn.functional.cross_entropy(outputs, y) * weight).backward()
        if isinstance(optimizer, hk.OwnerOptimizer):
            optimizer.synchronize()
        elif comm is not None:
            average_gradients(model, comm)
        assert preconditioner.step(log=True).applied
        optimizer.step()
    return torch.cat([p.detach().flatten() for p in model.parameters()]), preconditioner


@pytest.mark.ranks(2, 3)
@pytest.mark.parametrize("name", [name for name in PLACEMENTS if name != "owners update"])
def test_freezing_and_unfreezing_equal_one_process(comm, name):
    placement, owners_update = PLACEMENTS[name]
    whole, alone = train(None, hk.Kaisa(0.0))
    spread, preconditioner = train(comm, placement, owners_update)
    torch.testing.assert_close(spread, whole, rtol=1e-8, atol=1e-9)
    assert list(preconditioner.states) == list(alone.states) == ["conv", "norm", "head"]


@pytest.mark.ranks(2)
def test_freezing_under_an_owner_optimizer(comm):
    later = {3: {"head": False, "norm": False}, 5: {"head": True, "conv.bias": False}}
    whole, _ = train(None, hk.Kaisa(0.0), start={}, later=later)
    spread, _ = train(comm, *PLACEMENTS["owners update"], start={}, later=later)
    torch.testing.assert_close(spread, whole, rtol=1e-8, atol=1e-9)
    with pytest.raises(hk.Refused, match="parameter 'conv.weight' is trained since this step"):
        train(comm, *PLACEMENTS["owners update"])


def small(comm, frozen=()):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
    for place in frozen:
        model[place].requires_grad_(False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    preconditioner = hk.Preconditioner(model, optimizer, schedule=hk.Schedule(1, 1), comm=comm)

    def backward(average=True):
        optimizer.zero_grad()
        x = torch.randn(8, 4, generator=torch.Generator().manual_seed(comm.rank))
        model(x).square().mean().backward()
        if average:
            average_gradients(model, comm)

    backward()
    preconditioner.step()
    return model, preconditioner, backward


@pytest.mark.ranks(2)
def test_one_rank_alone_does_not_leave_the_others_waiting(comm):
    model, preconditioner, backward = small(comm)
    if comm.rank == 1:
        model[0].requires_grad_(False)
    backward()
    with pytest.raises(hk.Refused, match="changed on some ranks only: .* differ between rank 0 and rank 1"):
        preconditioner.step()
    model, preconditioner, backward = small(comm)
    if comm.rank == 1:
        model[2] = nn.Linear(5, 3)
    backward()
    with pytest.raises(hk.Refused, match=r"layer '2': its module is another one .* \(seen by rank 1\)"):
        preconditioner.step()


@pytest.mark.ranks(2)
def test_gradients_that_nothing_averages(comm):
    model, preconditioner, backward = small(comm, frozen=[0])
    model[0].requires_grad_(True)
    backward(average=False)
    with pytest.raises(hk.Refused, match="layer '0': trained since this step, but its gradient differs"):
        preconditioner.step()


class Experts(nn.Module):
    """Each rank calls another expert; `c` is used without a call."""

    def __init__(self, rank):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.c = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)
        self.rank = rank

    def forward(self, x):
        return nn.functional.linear((self.b if self.rank else self.a)(x), self.c.weight)


@pytest.mark.ranks(2)
def test_a_layer_that_another_rank_calls_is_not_taken_for_uncalled(comm):
    model = Experts(comm.rank)
    preconditioner = hk.Preconditioner(model, schedule=hk.Schedule(1, 1), placement=hk.Kaisa(0.0), comm=comm)
    for _ in range(2):
        model.zero_grad()
        model(torch.ones(6, 4)).square().mean().backward()
        average_gradients(model, comm)
        raw = model.c.weight.grad.clone()
        preconditioner.step()
        assert torch.equal(model.c.weight.grad, raw)
    assert list(preconditioner.capture.layers) == ["a", "b"]
    assert [out.name for out in preconditioner.capture.left_out] == ["c"]


@pytest.mark.ranks(2)
def test_freezing_under_horovod(comm):
    """Which goes on giving a frozen weight a gradient of zeros, by which the optimizer's momentum would move it."""
    import horovod.torch as hvd

    hvd.init()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
    sgd = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    optimizer = hvd.DistributedOptimizer(sgd, named_parameters=model.named_parameters())
    preconditioner = hk.Preconditioner(model, optimizer, schedule=hk.Schedule(1, 1), comm=comm)
    seen = []
    for step in range(6):
        if step in (2, 4):
            model[0].requires_grad_(step == 4)
        optimizer.zero_grad()
        x = torch.randn(8, 4, generator=torch.Generator().manual_seed(10 * step + comm.rank))
        model(x).square().mean().backward()
        optimizer.synchronize()
        assert preconditioner.step().applied
        with optimizer.skip_synchronize():
            optimizer.step()
        seen.append(model[0].weight.detach().clone())
    assert torch.equal(seen[1], seen[3]) and not torch.equal(seen[3], seen[5])
    first = comm.bcast(seen[5])
    assert torch.equal(seen[5], first)
