"""Weights that drift apart are found; costs and rates that are measured lead to one assignment on all ranks."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import hpc_kfac as hk
from parallel.small_training import train


@pytest.mark.ranks(2, 3)
@pytest.mark.parametrize("change", ["one bit", "two entries swapped"])
def test_drift_names_the_first_parameter_and_the_rank(comm, change):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    preconditioner = hk.Preconditioner(model, step_control=None, comm=comm, check_weights_every=2)
    for step in range(3):
        model.zero_grad()
        model(torch.ones(4, 3)).sum().backward()
        if step == 1 and comm.rank == 1:
            with torch.no_grad():
                weight = model[2].weight
                if change == "one bit":
                    weight[0, 0] = torch.nextafter(weight[0, 0], torch.tensor(2.0))
                else:
                    weight[0, :2] = weight[0, :2].flip(0)
        if step == 2:
            with pytest.raises(hk.WeightsDiffer, match=r"step 2: .* 2.weight on rank\(s\) 1 differs"):
                preconditioner.step()
        else:
            preconditioner.step()


@pytest.mark.ranks(2)
def test_equal_weights_pass(comm):
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    preconditioner = hk.Preconditioner(model, step_control=None, comm=comm, check_weights_every=1)
    for _ in range(3):
        model(torch.ones(4, 3)).sum().backward()
        preconditioner.step()
    assert preconditioner.traffic["hash"] > 0


@pytest.mark.ranks(1, 2, 3)
def test_measured_costs_place_alike_on_all_ranks(comm):
    placement = hk.Kaisa(1.0, colocate=False, costs="measured", all_local="measured")
    whole, _ = train(None, hk.KFAC(solver="eigen", damping=0.1), steps=2)
    spread, preconditioner = train(comm, hk.KFAC(solver="eigen", damping=0.1), placement=placement, steps=2)
    torch.testing.assert_close(spread, whole, rtol=1e-8, atol=1e-9)
    assignment = preconditioner.assignment
    assert all(other == assignment for other in comm.allgather(assignment))


@pytest.mark.ranks(2)
def test_all_local_where_sending_is_slow(comm):
    slow, fast = (hk.Rates(flops=1e12, latency=latency, bandwidth=1e12) for latency in (1.0, 0.0))
    for rates, everywhere in ((slow, True), (fast, False)):
        _, preconditioner = train(comm, hk.KFAC(solver="eigen", damping=0.1), placement=hk.Kaisa(1.0, all_local=rates))
        solvers = preconditioner.assignment.solvers.values()
        assert all((len(ranks) == 2) == everywhere for ranks in solvers)
        assert (preconditioner.traffic["broadcast"] == 0) == everywhere
