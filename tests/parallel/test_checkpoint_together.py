"""If one rank cannot save or load, none does, and all say why."""

from __future__ import annotations

import pytest
import torch

import hpc_kfac as hk
from hpc_kfac import checkpoint
from parallel.small_training import DOUBLE, Net


class HalfSGD(torch.optim.SGD):
    """Cannot load on the rank that says so."""

    broken = False

    def load_state_dict(self, state):
        super().load_state_dict(state)
        if self.broken:
            raise AttributeError("half of it")


@pytest.mark.ranks(2, timeout=100)
def test_one_ranks_failure_is_everybodys(comm, folder):
    torch.manual_seed(0)
    model = Net().double()
    optimizer = HalfSGD(model.parameters(), lr=0.1, momentum=0.9)
    preconditioner = hk.Preconditioner(
        model, optimizer, comm=comm, schedule=hk.Schedule(statistics=1, refresh=1), precision=DOUBLE
    )
    things = {"model": model, "optimizer": optimizer, "preconditioner": preconditioner}

    def step():
        optimizer.zero_grad()
        x = torch.randn(8, 2, 5, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
        model(x).square().mean().backward()
        preconditioner.step()
        optimizer.step()

    def state():
        return [*model.state_dict().values(), *(s["momentum_buffer"] for s in optimizer.state.values())]

    step()
    extra = {"epoch": {0: (1, 2)}} if comm.rank == 0 else {"epoch": object()}  # rank 0's is saved
    path = checkpoint.save(folder, 1, **things, extra=extra)
    step()
    before = [tensor.clone() for tensor in state()]
    steps, folds = preconditioner.steps, preconditioner.state_dict()["folds"]
    optimizer.broken = comm.rank == 1
    with pytest.raises(checkpoint.BrokenCheckpoint, match="AttributeError: half of it"):
        checkpoint.load(path, **things)
    assert all(map(torch.equal, state(), before))
    assert (preconditioner.steps, preconditioner.state_dict()["folds"]) == (steps, folds)

    if comm.rank == 1:
        optimizer.state[model.head.weight]["odd"] = object()
    with pytest.raises(TypeError, match=r"the optimizer's state of head.weight\['odd'\] is <object"):
        checkpoint.save(folder, 2, **things)
    if comm.rank == 1:
        del optimizer.state[model.head.weight]["odd"]

    optimizer.broken = False
    assert checkpoint.load(path, **things)[1] == {"epoch": {0: (1, 2)}}
    step()  # the same step again
    torch.testing.assert_close(state(), before, rtol=1e-12, atol=1e-14)
    preconditioner.close()
