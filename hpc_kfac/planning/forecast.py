"""What a configuration takes on a machine: the steps of one period of its schedule, simulated, and its memory."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache

import numpy as np

from hpc_kfac.distributed import Kaisa, Rates, Unit, UnitCost
from hpc_kfac.engine.agreement import numbers
from hpc_kfac.engine.operations import Due
from hpc_kfac.engine.placing import declared_costs, place, refresh_flops
from hpc_kfac.engine.plan import Problem
from hpc_kfac.engine.precision import Precision
from hpc_kfac.methods.method import Method
from hpc_kfac.options.schedule import RefreshTimes, Schedule
from hpc_kfac.options.step_control import FixedNorm
from hpc_kfac.planning.clocks import Buffers, Conditions
from hpc_kfac.planning.machine import Machine
from hpc_kfac.planning.memory import memory, total
from hpc_kfac.planning.model_costs import ModelCosts
from hpc_kfac.planning.simulate import Step, simulate
from hpc_kfac.planning.times import Settings, Times, times

LONGEST = 1000  # steps of a period


@dataclass(frozen=True)
class Case:
    """One configuration.

    Attributes:
        settings: of the run.
        placement: of the curvature.
        schedule: of statistics and refreshes.
        ranks: how many.
        samples: of a rank in a step.
    """

    settings: Settings
    placement: Kaisa
    schedule: Schedule
    ranks: int
    samples: float


@dataclass(frozen=True)
class Forecast:
    """What a case takes.

    Attributes:
        case: the configuration.
        steps: kind -> a simulated step: plain, statistics, refresh.
        seconds: mean of a step over a period.
        period: steps of it.
        memory: role -> bytes of the rank that holds most.
        peak: their sum.
        traffic: kind -> payload bytes that a rank posts, the mean of a step; of the rank that posts most.
        flops: phase -> of a rank, the mean of a step; of the rank that does most.
        makespan: seconds of the rank that decomposes longest, and those of the mean rank.
        decompositions: flops of a whole refresh.
        problem: what the plans are made of; None without a method.
        times: of what a rank computes.
    """

    case: Case
    steps: Mapping[str, Step]
    seconds: float
    period: int
    memory: Mapping[str, float]
    peak: float
    traffic: Mapping[str, float]
    flops: Mapping[str, float]
    makespan: tuple[float, float]
    decompositions: float
    problem: Problem | None
    times: Times
    dues: Mapping[str, Due] = field(default_factory=dict)

    @property
    def rate(self) -> float:
        """Samples a second over all ranks."""
        trainers = self.problem.assignment.trainers if self.problem is not None else self.case.ranks
        return trainers * self.case.samples / self.seconds


def forecast(
    costs: ModelCosts,
    case: Case,
    machine: Machine,
    conditions: Conditions = Conditions(),  # noqa: B008 - frozen
) -> Forecast:
    """Simulates a case.

    Raises:
        ValueError: method, placement, precision and the number of ranks do not go together.
    """
    problem = make_problem(costs, case, machine)
    durations = times(costs, case.settings, machine, case.samples)
    due_steps = period(case.schedule, problem) if problem is not None else Counter({Due(): 1})
    buffers = Buffers(_fullest(problem))
    scalars = numbers(len(costs.shapes), case.settings.control) if problem is not None else 1
    simulated: dict[Due, Step] = {}
    for due in sorted(due_steps, key=lambda due: (len(due.landing), due.statistics)):
        simulated[due] = simulate(
            problem, due, costs, durations, case.settings, machine, case.ranks, conditions, scalars, buffers=buffers
        )
    steps = sum(due_steps.values())
    mean = sum(due_steps[due] * step.seconds for due, step in simulated.items()) / steps
    traffic: Counter[str] = Counter()
    for due, step in simulated.items():
        for kind, array in step.traffic.items():
            traffic[kind] += int(array.max()) * due_steps[due] / steps  # type: ignore[assignment]
    held = memory(costs, case.settings, problem, case.ranks, case.samples, buffers.allocated)
    fullest = int(total(held).argmax())
    full = max(simulated, key=lambda due: len(due.starting))
    refresh = simulated[full].busy.get("refresh", np.zeros(1))
    kinds = {_kind(due): due for due in due_steps}
    return Forecast(
        case,
        {kind: simulated[due] for kind, due in kinds.items()},
        mean,
        steps,
        {role: float(array[fullest]) for role, array in held.items()},
        float(total(held).max()),
        dict(traffic),
        _flops(problem, durations, due_steps),
        (float(refresh.max()), float(refresh.mean())),
        durations.flops.get("refresh", 0.0),
        problem,
        durations,
        kinds,
    )


def make_problem(costs: ModelCosts, case: Case, machine: Machine) -> Problem | None:
    """The engine's own problem for this case; None without a method.

    Raises:
        ValueError: method, placement, precision and the number of ranks do not go together.
    """
    method, placement = case.settings.method, case.placement
    if method is None:
        return None
    declared = _declared(costs, method, case.settings.precision)
    if placement.all_local == "measured":
        rate = machine.cholesky[max(machine.cholesky)]
        link = machine.inside if case.ranks <= machine.ranks_per_node else machine.between
        placement = replace(placement, all_local=Rates(rate, link.latency, link.bandwidth))
    problem = place(
        costs.shapes, method, replace(placement, costs="declared"), case.settings.precision, declared, case.ranks
    )
    control = case.settings.control
    momentum = control.under(costs.momentum).momentum if isinstance(control, FixedNorm) else 0.0
    return replace(problem, momentum=momentum or 0.0, share=case.settings.averaging != "owner" or case.ranks == 1)


@lru_cache(maxsize=64)
def _declared(costs: ModelCosts, method: Method, precision: Precision) -> Mapping[Unit, UnitCost]:
    return declared_costs(costs.shapes, method, precision)


def period(schedule: Schedule, problem: Problem) -> Counter[Due]:
    """How often each kind of step comes in one period of the schedule, once its intervals no longer change."""
    intervals = [_last(interval) for interval in reversed(schedule.intervals)]
    length = math.lcm(*(interval for _, interval in intervals))
    if length > LONGEST:
        length = intervals[0][1]
    refreshes = RefreshTimes(replace(schedule, adapt=None), refresh_flops(problem))
    # From the second refresh on: the first takes all layers at once and uses them at once.
    begin = intervals[0][0] + length * (1 + math.ceil(intervals[1][0] / length))
    found: Counter[Due] = Counter()
    for step in range(begin, begin + length):
        found[Due(refreshes.statistics_due(step), refreshes.starting(step), refreshes.landing(step))] += 1
    return found


def _last(interval: int | Mapping[int, int]) -> tuple[int, int]:
    """From which step on, and the interval."""
    if isinstance(interval, Mapping):
        start = max(interval)
        return start, interval[start]
    return 0, interval


def _kind(due: Due) -> str:
    if due.starting or due.landing:
        return "refresh"
    return "statistics" if due.statistics else "plain"


def _fullest(problem: Problem | None) -> int:
    """The rank that decomposes most."""
    if problem is None:
        return 0
    loads: Counter[int] = Counter()
    for unit, solvers in problem.assignment.solvers.items():
        for rank in solvers[:1]:
            loads[rank] += int(problem.method.refresh_flops(problem.shapes[unit[0]], unit[1]))
    return max(loads, key=lambda rank: loads[rank], default=0)


def _flops(problem: Problem | None, durations: Times, due_steps: Counter[Due]) -> dict[str, float]:
    """Of the rank that does most in each phase, the mean of a step."""
    steps = sum(due_steps.values())
    found = dict(durations.flops)
    if problem is None:
        return found
    found["statistics"] *= sum(due_steps[due] for due in due_steps if due.statistics) / steps
    refresh = np.zeros(problem.assignment.ranks)
    for due, count in due_steps.items():
        for layer in due.starting:
            for unit in problem.units[layer]:
                flops = problem.method.refresh_flops(problem.shapes[layer], unit[1])
                refresh[list(problem.assignment.solvers[unit])] += count * flops / steps
    found["refresh"] = float(refresh.max())
    groups: Counter[int] = Counter()
    for layer in problem.shapes:
        group = problem.assignment.group(problem.assignment.owner[layer])
        groups[group] += problem.costs[layer].precondition  # type: ignore[assignment]
    if problem.assignment.workers < problem.assignment.trainers:
        found["precondition"] *= max(groups.values()) / max(sum(groups.values()), 1)
    return found
