"""Layers that some ranks use and others do not, and unequal shards: one process with everything is the oracle."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import hpc_kfac as hk
from parallel.small_training import average_gradients, read_back

DOUBLE = hk.Precision(torch.float64, torch.float64, torch.float64)
SHARES = (7, 10, 4)  # samples of each rank
STEPS = 3
PLACEMENTS = {"everywhere": hk.Kaisa(1.0), "owner applies": hk.Kaisa(0.0), "owners": hk.Kaisa(0.0, factors="owner")}
CASES = [name for name, method in hk.METHODS.items() if method.reads == "samples" and name != "tnt"]
"""TNT squares each rank's own mean gradient, which is no sum over ranks."""


class Net(nn.Module):
    """`branch` is used where a rank is told to; tokens are counted by a mask."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.norm = nn.Linear(3, 4), nn.LayerNorm(4)
        self.branch, self.head = nn.Linear(4, 4), nn.Linear(4, 3)
        self.double()

    def forward(self, x: Tensor, branch: bool) -> Tensor:
        x = self.norm(self.stem(x))
        x = x + self.branch(x).tanh() if branch else x
        return self.head(x).mean(1)


def shard(step: int, rank: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(100 * step + rank)
    x = torch.randn(SHARES[rank], 5, 3, generator=generator, dtype=torch.float64)
    return x, torch.randint(3, (SHARES[rank],), generator=generator)


def uses(step: int, rank: int) -> bool:
    """One rank, then nobody, then another rank."""
    return step != 1 and rank == step // 2


def taking_turns(step: int, rank: int) -> bool:
    """Somebody in every step."""
    return rank == step % 2


def make(name: str, comm: Any, **more: Any) -> tuple[Net, hk.Preconditioner]:
    model, kind = Net(), hk.METHODS[name]
    rows = {"rows": 64} if hasattr(kind, "rows") else {}
    relative = {"relative_damping": True} if hasattr(kind, "relative_damping") else {}
    preconditioner = hk.Preconditioner(
        model,
        method=kind(**rows, **relative),
        **{"schedule": hk.Schedule(1, 1), **more},
        step_control=None,
        precision=DOUBLE,
        comm=comm,
    )
    return model, preconditioner


def updates(preconditioner: hk.Preconditioner) -> Tensor:
    return torch.cat([layer.gradient().flatten() for layer in preconditioner.capture.layers.values()])


def whole(name: str, ranks: int) -> list[Tensor]:
    """Of one process with all samples."""
    model, preconditioner = make(name, "serial")
    found = []
    for step in range(STEPS):
        model.zero_grad()
        parts = [shard(step, rank) for rank in range(ranks)]
        outputs = torch.cat([model(x, uses(step, rank)) for rank, (x, _) in enumerate(parts)])
        preconditioner.observe(outputs)
        F.cross_entropy(outputs, torch.cat([labels for _, labels in parts])).backward()
        zero_unused(model)
        assert preconditioner.step().applied
        found.append(updates(preconditioner))
    return found


def spread(name: str, comm: Any, micro_batches: int = 1, **more: Any) -> list[Tensor]:
    """Each rank's own samples in micro-batches; a rank's share of the mean loss is its share of the samples."""
    model, preconditioner = make(name, comm, micro_batches=micro_batches, **more)
    samples = sum(SHARES[: comm.size])
    found = []
    for step in range(STEPS):
        model.zero_grad()
        x, labels = shard(step, comm.rank)
        for some_x, some_labels in zip(x.tensor_split(micro_batches), labels.tensor_split(micro_batches), strict=True):
            outputs = model(some_x, uses(step, comm.rank))
            scale = len(some_x) * comm.size / samples
            preconditioner.observe(outputs, loss_scale=scale)
            (F.cross_entropy(outputs, some_labels) * scale).backward()
        zero_unused(model)
        average_gradients(model, comm)
        assert preconditioner.step().applied
        found.append(updates(preconditioner))
    return found


def zero_unused(model: nn.Module) -> None:
    for parameter in model.parameters():
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)


@pytest.mark.ranks(2, 3, timeout=400)
def test_one_process_is_the_oracle(comm):
    wrong = []
    for name in CASES:
        expected = whole(name, comm.size)
        for placement, kind in PLACEMENTS.items():
            found = spread(name, comm, placement=kind)
            for step, (update, wanted) in enumerate(zip(found, expected, strict=True)):
                error = float((update - wanted).norm() / wanted.norm())
                if error > 1e-7:
                    wrong.append((name, placement, step, error))
    assert not wrong


@pytest.mark.ranks(2, timeout=400)
def test_ranks_and_micro_batches_together(comm):
    for name in ("kfac", "eva", "skfac"):
        expected, found = whole(name, comm.size), spread(name, comm, micro_batches=2)
        for update, wanted in zip(found, expected, strict=True):
            assert float((update - wanted).norm() / wanted.norm()) < 1e-7, name


def one_step(model: Net, preconditioner: hk.Preconditioner, step: int, ranks: Any, comm: Any = None) -> None:
    """Of these ranks' samples, of which one takes each part in turn."""
    model.zero_grad()
    parts = [shard(step, rank) for rank in ranks]
    outputs = torch.cat([model(x, taking_turns(step, rank)) for rank, (x, _) in zip(ranks, parts, strict=True)])
    samples = sum(SHARES[: 1 if comm is None else comm.size])
    scale = 1.0 if comm is None else len(outputs) * comm.size / samples
    preconditioner.observe(outputs, loss_scale=scale)
    (F.cross_entropy(outputs, torch.cat([labels for _, labels in parts])) * scale).backward()
    zero_unused(model)
    if comm is not None:
        average_gradients(model, comm)
    assert preconditioner.step().applied


@pytest.mark.ranks(2, timeout=400)
def test_saved_between_reductions(comm):
    """The same ranks go on bit by bit; one process gets what one process would have had."""
    settings = {"schedule": hk.Schedule(1, 2)}
    for name in ("kfac", "ekfac"):
        model, running = make(name, comm, **settings)
        alone_model, alone = make(name, "serial", **settings)
        for step in range(2):
            one_step(model, running, step, [comm.rank], comm)
            one_step(alone_model, alone, step, range(comm.size))
        common, own = running.share()
        shares = comm.allgather(read_back(own))
        copies = [make(name, comm, **settings) for _ in range(2)]
        copies[0][1].load_state_dict(running.state_dict())
        copies[1][1].load_shares(common, shares.__getitem__)
        for net, preconditioner in ((model, running), *copies):
            one_step(net, preconditioner, 2, [comm.rank], comm)
        assert all(torch.equal(updates(copy), updates(running)) for _, copy in copies), name
        _, single = make(name, "serial", **settings)
        single.load_shares(common, shares.__getitem__)
        for layer, wanted in alone.states.items():
            found = single.states[layer]
            for key, tensor in wanted.running.items():
                torch.testing.assert_close(found.running[key], tensor)
                spec = alone._problem.spec[layer, key]
                weights = [state.weights[spec.reduce_at].of(spec.over) for state in (found, wanted)]
                assert weights[0] == pytest.approx(weights[1]), (name, layer, key)


@pytest.mark.ranks(3, timeout=400)
def test_helpers_solve_for_trainers_that_take_turns(comm):
    settings = {"placement": hk.Kaisa(helpers=1), "schedule": hk.Schedule(1, 1)}
    model, preconditioner = make("kfac", comm, **settings)
    trainers = comm.Split(int(comm.rank == 2))
    if comm.rank == 2:
        preconditioner.serve()
        return
    alone_model, alone = make("kfac", "serial")
    for step in range(STEPS):
        one_step(model, preconditioner, step, [comm.rank], trainers)
        one_step(alone_model, alone, step, range(2))
        torch.testing.assert_close(updates(preconditioner), updates(alone))
    preconditioner.close()
