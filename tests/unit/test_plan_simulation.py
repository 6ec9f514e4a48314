"""The simulated step: it is the engine's own plan, with slow, late and missing ranks."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch

import hpc_kfac as hk
from hpc_kfac.engine.operations import Due
from hpc_kfac.engine.plan import Problem
from hpc_kfac.engine.timing import Timeline
from hpc_kfac.planning.clocks import Clocks, Conditions, Members
from hpc_kfac.planning.forecast import Case, make_problem, period
from hpc_kfac.planning.machine import Machine, load
from hpc_kfac.planning.model_costs import ModelCosts, model_costs
from hpc_kfac.planning.simulate import Step, simulate
from hpc_kfac.planning.times import Settings, times
from hpc_kfac.tasks.models_vision import mlp
from hpc_kfac.tasks.outlines import Outline

RANKS, SAMPLES = 8, 16


@dataclass
class Setup:
    """A small perceptron on 8 laptops' cores."""

    costs: ModelCosts
    case: Case
    machine: Machine
    problem: Problem

    def step(self, conditions: Conditions, due: Due | None = None, timeline: Timeline | None = None) -> Step:
        case = self.case
        durations = times(self.costs, case.settings, self.machine, case.samples)
        due = due or next(due for due in period(case.schedule, self.problem) if due.starting)
        return simulate(
            self.problem, due, self.costs, durations, case.settings, self.machine, RANKS, conditions, timeline=timeline
        )


def setup(placement: hk.Kaisa, averaging: str = "horovod") -> Setup:
    outline = Outline("mlp", lambda: mlp([64, 96, 32, 10]), (1, 8, 8))
    costs = model_costs(outline, lambda model: torch.optim.SGD(model.parameters(), lr=0.1))
    settings = Settings(hk.KFAC(), hk.Precision(), hk.KLClip(), averaging=averaging)
    case = Case(settings, placement, hk.Schedule(2, 4), RANKS, SAMPLES)
    machine = load("laptop")
    problem = make_problem(costs, case, machine)
    assert problem is not None
    return Setup(costs, case, machine, problem)


@pytest.fixture(scope="module")
def spread() -> Setup:
    return setup(hk.Kaisa(0.0))


def test_the_fusion_size_changes_the_plan_and_the_time(spread: Setup) -> None:
    """There is one plan, `Problem.plan`: what the engine would execute is what takes longer here."""
    found = {}
    for size in (2**10, 2**25):
        other = replace(spread, problem=replace(spread.problem, message_bytes=size))
        due = next(due for due in period(other.case.schedule, other.problem) if due.starting)
        messages = [op for op in other.problem.plan(due) if op.kind == "reduce"]
        step = other.step(Conditions(), due)
        assert step.traffic["reduce"].tolist() == [sum(op.bytes for op in messages)] * RANKS
        found[size] = (len(messages), step.seconds)
    assert found[2**10][0] > found[2**25][0] == 1
    assert found[2**10][1] > found[2**25][1]


def test_stragglers_are_drawn_from_a_distribution(spread: Setup) -> None:
    calm = spread.step(Conditions())
    shaken = spread.step(Conditions(jitter=0.2, seed=3))
    slowness = Conditions(jitter=0.2, seed=3).slowness(RANKS)
    np.testing.assert_allclose(shaken.busy["forward"], calm.busy["forward"] * slowness)
    assert shaken.seconds > calm.seconds
    assert shaken.phases["wait"] > calm.phases["wait"]
    assert spread.step(Conditions(jitter=0.2, seed=4)).seconds != shaken.seconds
    many = np.log(Conditions(jitter=0.1).slowness(20_000))
    assert many.mean() == pytest.approx(0, abs=0.003) and many.std() == pytest.approx(0.1, rel=0.03)


def test_everybody_waits_for_a_late_rank(spread: Setup) -> None:
    calm, late = spread.step(Conditions()), spread.step(Conditions(late={5: 3.0}))
    assert calm.seconds < 1.0
    assert 3.0 < late.seconds <= 3.0 + calm.seconds * (1 + 1e-9)
    waits = late.busy["wait"] - calm.busy["wait"]
    assert waits[5] < 0.1 and np.delete(waits, 5).min() > 2.9


@pytest.mark.parametrize("averaging", ["horovod", "mpi4py", "owner"])
def test_a_missing_rank_is_waited_for_for_ever(averaging: str) -> None:
    placement = hk.Kaisa(0.0, factors="owner") if averaging == "owner" else hk.Kaisa(1.0)
    step = setup(placement, averaging).step(Conditions(dropped=(2,)))
    assert step.seconds == float("inf") and step.stalled
    assert np.isfinite(step.busy["wait"]).all()


def test_groups_without_the_missing_rank_go_on() -> None:
    clocks = Clocks(4, overlap=1.0, conditions=Conditions(dropped=(3,)))
    whole, broken = Members(range(0, 2)), Members(range(2, 4))
    flights = [clocks.post("share", "a", whole, 1.0, 8), clocks.post("share", "b", broken, 1.0, 8)]
    clocks.wait(flights, whole)
    clocks.wait(flights, broken)
    assert clocks.now.tolist() == [1.0, 1.0, float("inf"), float("inf")] and clocks.stalled == "share of b"


def test_collectives_of_a_rank_follow_each_other_and_overlap_with_its_arithmetic() -> None:
    """Two messages of 2 s on one network, 1 s of arithmetic meanwhile, of which a share moves them."""
    for overlap, end in ((1.0, 4.0), (0.5, 4.5), (0.0, 5.0)):
        clocks = Clocks(2, overlap, Conditions())
        both = Members(range(2))
        flights = [clocks.post("reduce", str(i), both, 2.0, 8) for i in range(2)]
        clocks.compute("backward", "", both, 1.0)
        clocks.wait_for_reductions(both)
        assert clocks.now.tolist() == [end, end], overlap
        assert clocks.busy["wait"].tolist() == [end - 1.0] * 2 and all(flight.done for flight in flights)
        assert clocks.traffic()["reduce"].tolist() == [16, 16]


def test_a_trace_of_any_rank(spread: Setup, tmp_path: Path) -> None:
    for rank in (0, 7):
        timeline = Timeline(rank)
        timeline.recording = True
        step = spread.step(Conditions(), timeline=timeline)
        timeline.write(tmp_path / "trace.json")
        events = json.loads((tmp_path / "trace.json").read_text(), parse_constant=lambda word: pytest.fail(word))
        spans = [event for event in events["traceEvents"] if event["ph"] == "X"]
        assert {event["pid"] for event in events["traceEvents"]} == {rank}
        for phase in ("forward", "backward", "statistics", "refresh"):
            length = sum(span["dur"] for span in spans if span["name"] == phase)
            expected = step.busy[phase][rank] if phase in step.busy else 0.0
            assert length == pytest.approx(1e6 * expected)
        assert max(span["ts"] + span["dur"] for span in spans) <= 1e6 * step.seconds * (1 + 1e-9)
        begun = sorted(event["id"] for event in events["traceEvents"] if event["ph"] == "b")
        assert begun and begun == sorted(event["id"] for event in events["traceEvents"] if event["ph"] == "e")
    assert spread.step(Conditions(dropped=(1,)), timeline=(stalled := Timeline(0))).stalled
    stalled.write(tmp_path / "stalled.json")
    json.loads((tmp_path / "stalled.json").read_text(), parse_constant=lambda word: pytest.fail(word))
