"""One optimisation step of all ranks, as a discrete-event simulation of the plan that the engine executes.

The operations of `Problem.plan` are gone through in the plan's order, in which every rank runs them. What a rank
computes and sends advances the clocks; a collective is waited for where the executor waits (`execution.NEEDS`, `LONG`).
Gradients are averaged meanwhile.
"""

from __future__ import annotations

from collections import Counter, defaultdict, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from hpc_kfac.engine.execution import EARLY, LONG, NEEDS
from hpc_kfac.engine.operations import Due, Operation
from hpc_kfac.engine.plan import Problem
from hpc_kfac.engine.timing import Timeline
from hpc_kfac.planning.clocks import Buffers, Clocks, Conditions, Flight, Members
from hpc_kfac.planning.collectives import Group, group_of, seconds
from hpc_kfac.planning.machine import Machine
from hpc_kfac.planning.model_costs import ModelCosts
from hpc_kfac.planning.times import Settings, Times

COLLECTIVES = ("reduce", "scaled", "scatter", "gather", "broadcast", "share")
AWAITED = {kind for kinds in NEEDS.values() for kind in kinds}
"""Collectives that later operations on the same layers wait for."""


@dataclass(frozen=True)
class Step:
    """A simulated step.

    Attributes:
        seconds: until the last rank is through; infinite where a rank is missing.
        phases: kind -> seconds of a rank, the mean over ranks; "wait" for what is spent waiting.
        busy: kind -> seconds of each rank, [ranks].
        traffic: kind -> payload bytes that each rank posts, [ranks].
        sent: kind -> bytes that a rank puts on the wire, the mean over ranks.
        stalled: the collective that nobody gets out of, in words; empty where all is well.
    """

    seconds: float
    phases: Mapping[str, float]
    busy: Mapping[str, np.ndarray]
    traffic: Mapping[str, np.ndarray]
    sent: Mapping[str, float]
    stalled: str


def simulate(
    problem: Problem | None,
    due: Due,
    costs: ModelCosts,
    durations: Times,
    settings: Settings,
    machine: Machine,
    ranks: int,
    conditions: Conditions = Conditions(),  # noqa: B008 - frozen
    scalars: int = 0,
    timeline: Timeline | None = None,
    buffers: Buffers | None = None,
) -> Step:
    """Simulates a step.

    Args:
        problem: makes the plan; None without a method.
        due: what the step has to do.
        costs: of the model.
        durations: of what a rank computes.
        settings: of the run.
        machine: networks.
        ranks: how many there are, helpers included.
        conditions: what does not go as it should.
        scalars: numbers of the step's scalar reduction.
        timeline: gets the spans of its rank.
        buffers: counts the messages of its rank.
    """
    clocks = Clocks(ranks, machine.overlap, conditions, timeline, buffers)
    return _Simulation(problem, due, costs, durations, settings, machine, ranks, scalars, clocks).run()


class _Simulation:
    def __init__(
        self,
        problem: Problem | None,
        due: Due,
        costs: ModelCosts,
        durations: Times,
        settings: Settings,
        machine: Machine,
        ranks: int,
        scalars: int,
        clocks: Clocks,
    ) -> None:
        self.problem, self.due, self.costs, self.durations = problem, due, costs, durations
        self.settings, self.machine, self.size, self.scalars = settings, machine, ranks, scalars
        self.clocks = clocks
        self.trainers = Members(problem.trainers if problem is not None else range(ranks))
        self.gradients: list[Flight] = []
        self.by_layer: dict[str, list[Flight]] = defaultdict(list)
        self.sent: dict[str, float] = defaultdict(float)
        self.groups: dict[Sequence[int], tuple[Members, Group]] = {}

    def run(self) -> Step:
        """Goes through the step."""
        trainers, clocks = self.trainers, self.clocks
        plan = self.problem.plan(self.due, self.scalars) if self.problem is not None else self._control()
        clocks.compute("forward", "", trainers, self.durations.forward)
        early = self._backward(plan)
        clocks.wait(self.gradients, trainers)
        for index, operation in enumerate(plan):
            if index not in early:
                self._execute(operation)
        self._update()
        end = float(clocks.now[trainers.index].max())
        phases = {kind: float(array[trainers.index].mean()) for kind, array in clocks.busy.items()}
        return Step(end, phases, clocks.busy, clocks.traffic(), self.sent, clocks.stalled)

    def _control(self) -> tuple[Operation, ...]:
        return (Operation("control", (), range(self.size), bytes=8 * self.scalars if self.size > 1 else 0),)

    # Forward and backward pass

    def _backward(self, plan: Sequence[Operation]) -> set[int]:
        """Posts gradients as they are completed and reductions of what is ready; places in the plan of the latter."""
        statistics = self.due.statistics and self.problem is not None and self.problem.method.reads == "samples"
        early = statistics and self.settings.fisher == "empirical"
        if statistics and not early:  # all of it in `observe`
            self.clocks.compute("statistics", "the model's own labels", self.trainers, self.durations.extra)
            for layer in self.durations.statistics:
                self._statistics(layer)
        helpers = self.problem is not None and self.problem.assignment.helpers > 0
        queue = deque((i, op) for i, op in enumerate(plan) if early and not helpers and op.kind in EARLY)
        posted: set[int] = set()
        ready: set[str] = set()
        messages = Messages(self.costs, self.settings.averaging, self.size)
        for more, weights in self.durations.backward:
            self.clocks.compute("backward", "", self.trainers, more)
            for weight in weights:
                self._post_gradients(messages.complete(weight))
                layer = self.costs.weights[weight].layer
                if early and layer and layer not in ready:
                    self._statistics(layer)
                    ready.add(layer)
                    while queue and ready.issuperset(queue[0][1].layers):
                        index, operation = queue.popleft()
                        self._post(operation)
                        posted.add(index)
        self._post_gradients(messages.rest())
        return posted

    def _statistics(self, layer: str) -> None:
        assert self.problem is not None
        assignment = self.problem.assignment
        members = self.trainers
        if assignment.factors == "local":
            members, _ = self._group(range(assignment.owner[layer], assignment.owner[layer] + 1))
        self.clocks.compute("statistics", f"layer {layer}", members, self.durations.statistics[layer])

    def _post_gradients(self, sizes: Sequence[int]) -> None:
        owners = self.settings.averaging == "owner"
        members, group = self._group(self.trainers.ranks)
        for nbytes in sizes:
            took = seconds("gradient_scatter" if owners else "gradients", nbytes, group, self.machine)
            took += self.machine.gradients
            self.gradients.append(self.clocks.post("gradients", "gradients", members, took, nbytes))
            self.sent["gradients"] += nbytes * (1 if owners else 2) * (group.ranks - 1) / group.ranks

    # The step's operations

    def _execute(self, operation: Operation) -> None:
        kind, durations = operation.kind, self.durations
        members, group = self._group(operation.ranks)
        if kind in NEEDS:
            needed = [f for layer in operation.layers for f in self.by_layer[layer] if f.kind in NEEDS[kind]]
            self.clocks.wait(needed, members)
        elif kind in LONG:
            self.clocks.wait_for_reductions(members)
        elif kind == "control":
            self.clocks.wait_for_all()
            self._post(operation)
            self.clocks.wait_for_all()
        elif kind == "fold":
            self._fold()
        if kind in COLLECTIVES:
            self._post(operation)
        elif kind in LONG:
            took = durations.refresh[operation.layers[0], operation.part]
            self.clocks.compute("refresh", operation.about, members, took)
        elif kind == "precondition":
            self.clocks.compute(kind, operation.about, members, durations.precondition[operation.layers[0]])

    def _fold(self) -> None:
        assert self.problem is not None
        if self.problem.method.reads == "gradients":
            assignment = self.problem.assignment
            for layer in self.problem.shapes:
                members, _ = self._group(assignment.members(assignment.group(assignment.owner[layer])))
                self.clocks.compute("statistics", f"layer {layer}", members, self.durations.statistics[layer])

    def _post(self, operation: Operation) -> None:
        members, group = self._group(operation.ranks)
        whole = operation.bytes * (len(operation.ranks) if operation.kind == "gather" else 1)
        took = seconds(operation.kind, whole, group, self.machine)
        flight = self.clocks.post(operation.kind, operation.about, members, took, operation.bytes)
        if operation.kind in AWAITED:
            for layer in operation.layers:
                self.by_layer[layer].append(flight)
        self.sent[operation.kind] += operation.sent() * len(operation.ranks) / self.size

    def _update(self) -> None:
        update = self.durations.update
        if self.settings.averaging != "owner" or self.problem is None:
            self.clocks.compute("update", "", self.trainers, update)
            return
        share = owned_bytes(self.problem, self.costs) / max(1, self.costs.gradient_bytes)
        members, group = self._group(self.trainers.ranks)
        self.clocks.compute("update", "", members, update * share)
        for nbytes in Messages(self.costs, "owner", self.size).sizes:
            took = seconds("weights", nbytes, group, self.machine)
            self.clocks.post("weights", "updated weights", members, took, nbytes)
            self.sent["weights"] += nbytes * (group.ranks - 1) / group.ranks
        self.clocks.wait_for_all()

    def _group(self, ranks: Sequence[int]) -> tuple[Members, Group]:
        found = self.groups.get(ranks)
        if found is None:
            found = self.groups[ranks] = (Members(ranks), group_of(ranks, self.machine))
        return found


OWNER_BUCKET = 32 * 2**20  # bytes; as in `OwnerOptimizer`


class Messages:
    """Messages of a backward pass.

    Args:
        costs: of the model.
        averaging: "horovod" sends every gradient by itself as it is complete, "ddp" likewise but in a fixed order,
            "mpi4py" all of them in one message at the end, "owner" buckets in a fixed order.
        ranks: how many there are; one sends nothing.

    Attributes:
        sizes: bytes of each message, in their order.
    """

    def __init__(self, costs: ModelCosts, averaging: str, ranks: int) -> None:
        trained = [index for index, weight in enumerate(costs.weights) if weight.trained]
        self._bucket: dict[int, int] = {}
        self.sizes: list[int] = []
        for index in reversed(trained if ranks > 1 else []):
            nbytes = costs.weights[index].bytes
            joins = bool(self.sizes) and (
                averaging == "mpi4py" or (averaging == "owner" and self.sizes[-1] + nbytes <= OWNER_BUCKET)
            )
            if not joins:
                self.sizes.append(0)
            self.sizes[-1] += nbytes
            self._bucket[index] = len(self.sizes) - 1
        counts = Counter(self._bucket.values())
        self._missing = [counts[bucket] for bucket in range(len(self.sizes))]
        self._in_order = averaging != "horovod"
        self._late = averaging == "mpi4py"
        self._next = 0

    def complete(self, weight: int) -> list[int]:
        """Sizes of the messages that can go out now that this gradient is there."""
        if weight not in self._bucket:
            return []
        bucket = self._bucket[weight]
        self._missing[bucket] -= 1
        if not self._in_order:
            return [self.sizes[bucket]] if self._missing[bucket] == 0 else []
        found = []
        while not self._late and self._next < len(self.sizes) and self._missing[self._next] == 0:
            found.append(self.sizes[self._next])
            self._next += 1
        return found

    def rest(self) -> list[int]:
        """Sizes of what goes out after the backward pass."""
        if self._in_order:
            found, self._next = self.sizes[self._next :], len(self.sizes)
            return found
        return [size for size, missing in zip(self.sizes, self._missing, strict=True) if missing > 0]


def owned_bytes(problem: Problem, costs: ModelCosts) -> int:
    """Bytes of the weights of the rank that owns most, where owners update."""
    loads: Counter[int] = Counter()
    others = 0
    for weight in costs.weights:
        if weight.layer:
            loads[problem.assignment.owner[weight.layer]] += weight.bytes
        else:
            others += weight.bytes
    largest = max(loads.values(), default=0)
    return max(largest, -(-(sum(loads.values()) + others) // problem.assignment.ranks))
