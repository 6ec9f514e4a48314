"""What `hpc-kfac plan` foretells, against the engine: exact bytes of every step, memory within 5 %."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace

import pytest
import torch
from torch import nn

import hpc_kfac as hk
from hpc_kfac.cluster.ranks import Ranks
from hpc_kfac.planning import calibrate
from hpc_kfac.planning.forecast import Case, forecast, make_problem, period
from hpc_kfac.planning.machine import load
from hpc_kfac.planning.memory import memory
from hpc_kfac.planning.model_costs import model_costs
from hpc_kfac.planning.simulate import COLLECTIVES, simulate
from hpc_kfac.planning.times import Settings, times
from hpc_kfac.tasks.models_text import GPT
from hpc_kfac.tasks.models_vision import cifar_resnet, mlp
from hpc_kfac.tasks.outlines import Outline
from parallel.small_training import average_gradients

SCHEDULE = hk.Schedule(statistics=2, refresh=4)
SAMPLES = 4
MODELS = {
    "mlp": Outline("mlp", lambda: mlp([64, 96, 32, 10]), (1, 8, 8)),
    "resnet": Outline("resnet", lambda: cifar_resnet(8, 1, 10), (1, 8, 8)),
    "gpt": Outline("gpt", lambda: GPT(50, 8, 32, 2, 2), (8,), 50),
}
PLACEMENTS = {
    "COMM-OPT": (hk.Kaisa(1.0), "mpi4py"),
    "MEM-OPT": (hk.Kaisa(0.0), "mpi4py"),
    "factors at owners": (hk.Kaisa(0.0, factors="owner"), "mpi4py"),
    "owners update": (hk.Kaisa(0.0, factors="owner"), "owner"),
}


@dataclass
class Trained:
    """What the engine did.

    Attributes:
        traffic: of each step from the second refresh on, over one period.
        dues: of these steps.
        preconditioner: at the end.
        held: bytes by role.
    """

    traffic: list[Counter[str]]
    dues: list[object]
    preconditioner: hk.Preconditioner
    held: dict[str, int]


def make_optimizer(model):
    return torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)


def nbytes(tensors):
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def train(comm, outline, placement, averaging, message_bytes=None):
    torch.manual_seed(0)
    model = outline.make().train()
    base = make_optimizer(model)
    preconditioner = hk.Preconditioner(
        model, base, method=hk.KFAC(damping=0.1), placement=placement, schedule=SCHEDULE, comm=comm
    )
    if message_bytes is not None:
        preconditioner._problem = preconditioner._executor._problem = replace(
            preconditioner._problem, message_bytes=message_bytes
        )
        preconditioner._plans.clear()
        preconditioner._start_step()
    owners = hk.OwnerOptimizer(base, model, preconditioner) if averaging == "owner" and comm.size > 1 else None
    traffic, dues = [], []
    for _ in range(12):
        inputs = outline.inputs(SAMPLES, torch.device("cpu"))
        model.zero_grad()
        before = Counter(preconditioner.traffic)
        dues.append(preconditioner._due)
        torch.log_softmax(model(inputs), -1)[..., 0].mean().neg().backward()
        if owners is None:
            average_gradients(model, comm)
        else:
            owners.synchronize()
        assert preconditioner.step().applied
        (base if owners is None else owners).step()
        traffic.append(Counter(preconditioner.traffic) - before)
    states = preconditioner.states.values()
    held = {
        "weights": nbytes(model.parameters()) + nbytes(model.buffers()),
        "optimizer": nbytes(t for state in base.state.values() for t in state.values() if isinstance(t, torch.Tensor)),
        "factors": nbytes(t for state in states for t in state.running.values()),
        "solved": nbytes(t for state in states for t in state.solved.values()),
        "momentum": nbytes(t for state in states for t in state.momentum.values()),
        "messages": preconditioner._executor.pool.allocated,
        "workspace": nbytes(preconditioner._executor._workspace._pieces.values()),
    }
    return Trained(traffic[8:], dues[8:], preconditioner, held)


def planned(outline, placement, averaging, ranks):
    costs = model_costs(outline, make_optimizer)
    settings = Settings(hk.KFAC(damping=0.1), hk.Precision(), hk.Orthogonal(), averaging=averaging)
    return costs, Case(settings, placement, SCHEDULE, ranks, SAMPLES)


@pytest.mark.ranks(1, 2, 4, timeout=300)
@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("name", MODELS)
def test_bytes_of_every_step_are_exact_and_memory_nearly(comm, name, placement):
    where, averaging = PLACEMENTS[placement]
    trained = train(comm, MODELS[name], where, averaging)
    costs, case = planned(MODELS[name], where, averaging, comm.size)
    traffic_is_foretold(comm, trained, costs, case, averaging)
    memory_is_foretold(comm, trained.held, costs, case)


def traffic_is_foretold(comm, trained, costs, case, averaging):
    machine = load("laptop")
    problem = make_problem(costs, case, machine)
    assert Counter(trained.dues) == period(SCHEDULE, problem)
    durations = times(costs, case.settings, machine, SAMPLES)
    kinds = (*COLLECTIVES, *(("gradients", "weights") if averaging == "owner" else ()))
    for due, measured in zip(trained.dues, trained.traffic, strict=True):
        step = simulate(problem, due, costs, durations, case.settings, machine, comm.size)
        foretold = {kind: int(step.traffic[kind][comm.rank]) for kind in kinds if kind in step.traffic}
        foretold = {kind: sent for kind, sent in foretold.items() if sent}
        assert {kind: measured[kind] for kind in kinds if measured[kind]} == foretold, due


def memory_is_foretold(comm, held, costs, case):
    """Curvature is exact; what a rank holds in all is within 5 %."""
    found = forecast(costs, case, load("laptop"))
    table = {
        role: array[comm.rank] for role, array in memory(costs, case.settings, found.problem, comm.size, 0).items()
    }
    for role in ("weights", "factors", "solved", "momentum"):
        assert table[role] == held[role], role
    everyone = comm.allgather(held)
    assert found.memory["optimizer"] == pytest.approx(max(other["optimizer"] for other in everyone), rel=0.05)
    roles = ("weights", "optimizer", "factors", "solved", "momentum", "messages", "workspace")
    largest = max(sum(other[role] for role in roles) for other in everyone)
    gradients = costs.gradient_bytes if comm.size > 1 else 0  # a message of their own, which this test does not keep
    foretold = found.peak - found.memory["gradients"] - found.memory["activations"] - gradients
    assert foretold == pytest.approx(largest, rel=0.05)


@pytest.mark.ranks(2)
def test_the_fusion_size_changes_the_engine_and_the_plan_alike(comm):
    """There is one plan: fewer bytes in a message are more messages in both."""
    trained = {size: train(comm, MODELS["mlp"], hk.Kaisa(0.0), "mpi4py", size) for size in (2**12, 2**22)}
    costs, case = planned(MODELS["mlp"], hk.Kaisa(0.0), "mpi4py", comm.size)
    machine, messages = load("laptop"), {}
    problem = make_problem(costs, case, machine)
    durations = times(costs, case.settings, machine, SAMPLES)
    for size, run in trained.items():
        other = replace(problem, message_bytes=size)
        refresh = next(due for due in run.dues if due.starting)
        plan = run.preconditioner.plan(8)
        assert [op.bytes for op in plan[:-1]] == [op.bytes for op in other.plan(refresh)[:-1]]
        step = simulate(other, refresh, costs, durations, case.settings, machine, comm.size)
        measured = run.traffic[run.dues.index(refresh)]
        assert measured["reduce"] == step.traffic["reduce"][comm.rank]
        messages[size] = sum(op.kind == "reduce" for op in plan), step.seconds
    assert messages[2**12][0] > messages[2**22][0] == 1
    assert messages[2**12][1] != messages[2**22][1]


@pytest.mark.ranks(2)
def test_the_model_may_be_of_any_kind(comm):
    """What is not captured is averaged and updated all the same."""
    outline = Outline("mixed", lambda: nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.PReLU()), (1, 8, 8))
    trained = train(comm, outline, hk.Kaisa(0.0, factors="owner"), "owner")
    costs, case = planned(outline, hk.Kaisa(0.0, factors="owner"), "owner", comm.size)
    found = forecast(costs, case, load("laptop"))
    plain = found.steps["plain"].traffic
    for kind in ("gradients", "weights"):
        assert plain[kind][comm.rank] == trained.traffic[1][kind] == costs.gradient_bytes


@pytest.mark.ranks(2)
def test_calibration_measures_the_network(comm, monkeypatch, tmp_path):
    """Both ranks at the same time; both come to one machine, whose file is read again."""
    for name, value in {"PRODUCT": 64, "DECOMPOSED": (8, 16, 32), "MEMORY": 2**20}.items():
        monkeypatch.setattr(calibrate, name, value)
    machine = calibrate.measure_machine(Ranks(comm, comm.rank, comm.size, comm.rank, comm.size))
    assert comm.allgather(machine.to_yaml()) == [machine.to_yaml()] * comm.size
    assert machine.ranks_per_node == comm.size and machine.inside == machine.between
    assert 1e-7 < machine.inside.latency < 0.1 and 1e6 < machine.inside.bandwidth < 1e12
    assert 0 <= machine.overlap <= 1 and 0 <= machine.gradients < 0.1
    path = tmp_path / f"{comm.rank}.yaml"
    path.write_text(machine.to_yaml())
    assert load(str(path)).to_yaml() == machine.to_yaml()
