"""One optimisation step of all ranks, as a discrete-event simulation of the plan that the engine executes.

Every rank has a clock; the clocks are one vector, so that an operation costs as much for 2 ranks as for 16 384.
The operations of `Problem.plan` are gone through in the plan's order, in which every rank runs them: what a rank
computes advances its clock; a collective begins when the last of its ranks has posted it and the network is free, and
is waited for where the executor waits (`execution.NEEDS`, `LONG`). Gradients are averaged meanwhile.
"""

from __future__ import annotations

from collections import Counter, defaultdict, deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from hpc_kfac.capacity.buffers import Buffers
from hpc_kfac.capacity.collectives import Group, group_of, seconds
from hpc_kfac.capacity.machine import Machine
from hpc_kfac.capacity.model_costs import ModelCosts
from hpc_kfac.capacity.times import Settings, Times
from hpc_kfac.execution import EARLY, LONG, NEEDS, REDUCTIONS
from hpc_kfac.step_plan import Due, Operation, Problem
from hpc_kfac.timing import Timeline

COLLECTIVES = ("reduce", "scaled", "scatter", "gather", "broadcast", "share")
AWAITED = {kind for kinds in NEEDS.values() for kind in kinds}
"""Collectives that later operations on the same layers wait for."""
POOLED = ("reduce", "scaled", "scatter", "broadcast", "share")
"""Collectives with a buffer out of the pool."""
OWNER_BUCKET = 32 * 2**20  # bytes; as in `OwnerOptimizer`


@dataclass(frozen=True)
class Conditions:
    """What does not go as it should.

    Args:
        jitter: spread of the ranks' speeds: each computes exp(jitter * z) times as long, z of a normal distribution.
        late: rank -> seconds that it begins the step later.
        dropped: ranks that are not there.
        seed: of the draws.
    """

    jitter: float = 0.0
    late: Mapping[int, float] = field(default_factory=dict)
    dropped: tuple[int, ...] = ()
    seed: int = 0

    def slowness(self, ranks: int) -> np.ndarray:
        """What each rank's computing is multiplied with."""
        return np.exp(self.jitter * np.random.default_rng(self.seed).standard_normal(ranks))


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


class _Members:
    """Ranks as an index of the clocks."""

    def __init__(self, ranks: Sequence[int]) -> None:
        self.ranks = ranks
        contiguous = isinstance(ranks, range)
        self.index: slice | list[int] = slice(ranks.start, ranks.stop, ranks.step) if contiguous else list(ranks)  # type: ignore[attr-defined]
        self._set: Sequence[int] | frozenset[int] = ranks if contiguous or len(ranks) < 4 else frozenset(ranks)

    def __contains__(self, rank: int) -> bool:
        return rank in self._set


@dataclass
class _Flight:
    """A collective that was posted."""

    kind: str
    about: str
    members: _Members
    posted: float
    seconds: float
    buffer: int = 0
    done: float | None = None
    over: bool = False  # all of its ranks have waited for it
    seen: bool = False  # the watched rank has


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
    return _Simulation(
        problem, due, costs, durations, settings, machine, ranks, conditions, scalars, timeline, buffers
    ).run()


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
        conditions: Conditions,
        scalars: int,
        timeline: Timeline | None,
        buffers: Buffers | None,
    ) -> None:
        self.problem, self.due, self.costs, self.durations = problem, due, costs, durations
        self.settings, self.machine, self.size, self.scalars = settings, machine, ranks, scalars
        self.timeline, self.buffers = timeline, buffers
        self.watched = timeline.rank if timeline is not None else buffers.rank if buffers is not None else -1
        self.clock = np.zeros(ranks)
        for rank, seconds_late in conditions.late.items():
            self.clock[rank] += seconds_late
        self.clock[list(conditions.dropped)] = np.inf
        self.slowness = conditions.slowness(ranks)
        self.network = np.zeros(ranks)  # until when each rank's is taken
        self.trainers = _Members(problem.trainers if problem is not None else range(ranks))
        self.waiting: deque[_Flight] = deque()  # whose end is not known yet
        self.flying: dict[int, _Flight] = {}
        self.by_layer: dict[str, list[_Flight]] = defaultdict(list)
        self.busy: dict[str, np.ndarray] = defaultdict(lambda: np.zeros(ranks))
        self.traffic: dict[str, np.ndarray] = defaultdict(lambda: np.zeros(ranks, dtype=np.int64))
        self.sent: dict[str, float] = defaultdict(float)
        self.stalled = ""
        self.groups: dict[Sequence[int], tuple[_Members, Group]] = {}

    def run(self) -> Step:
        trainers, durations = self.trainers, self.durations
        plan = self.problem.plan(self.due, self.scalars) if self.problem is not None else self._control()
        self.compute("forward", "", trainers, durations.forward)
        self._backward(plan)
        self.wait((flight for flight in self.flying.values() if flight.kind == "gradients"), trainers)
        for index, operation in enumerate(plan):
            if index not in self.posted:
                self._execute(operation)
        self._update()
        end = float(self.clock[trainers.index].max())
        phases = {kind: float(array[trainers.index].mean()) for kind, array in self.busy.items()}
        return Step(end, phases, self.busy, self.traffic, self.sent, self.stalled)

    def _control(self) -> tuple[Operation, ...]:
        return (Operation("control", (), range(self.size), bytes=8 * self.scalars if self.size > 1 else 0),)

    # Forward and backward pass

    def _backward(self, plan: Sequence[Operation]) -> None:
        """Goes through the gradients as they are completed; posts them, and reductions of what is ready."""
        statistics = self.due.statistics and self.problem is not None and self.problem.method.reads == "samples"
        early = statistics and self.settings.fisher == "empirical"
        if statistics and not early:  # all of it in `observe`
            self.compute("statistics", "the model's own labels", self.trainers, self.durations.extra)
            for layer in self.durations.statistics:
                self._statistics(layer)
        helpers = self.problem is not None and self.problem.assignment.helpers > 0
        queue = deque((i, op) for i, op in enumerate(plan) if early and not helpers and op.kind in EARLY)
        self.posted: set[int] = set()
        ready: set[str] = set()
        messages = _Gradients(self.costs, self.settings.averaging, self.size)
        for seconds_more, weights in self.durations.backward:
            self.compute("backward", "", self.trainers, seconds_more)
            for weight in weights:
                self._post_gradients(messages.complete(weight))
                layer = self.costs.weights[weight].layer
                if early and layer and layer not in ready:
                    self._statistics(layer)
                    ready.add(layer)
                    while queue and ready.issuperset(queue[0][1].layers):
                        index, operation = queue.popleft()
                        self._post(operation)
                        self.posted.add(index)
        self._post_gradients(messages.rest())

    def _statistics(self, layer: str) -> None:
        assert self.problem is not None
        local = self.problem.assignment.factors == "local"
        members = _Members((self.problem.assignment.owner[layer],)) if local else self.trainers
        self.compute("statistics", f"layer {layer}", members, self.durations.statistics[layer])

    def _post_gradients(self, sizes: Sequence[int]) -> None:
        kind = "gradient_scatter" if self.settings.averaging == "owner" else "gradients"
        for nbytes in sizes:
            members, group = self._group(self.trainers.ranks)
            took = seconds(kind, nbytes, group, self.machine) + self.machine.gradients
            self._fly("gradients", "gradients", (), members, took, nbytes)
            self.sent["gradients"] += (
                nbytes * (1 if kind == "gradient_scatter" else 2) * (group.ranks - 1) / group.ranks
            )

    # The step's operations

    def _execute(self, operation: Operation) -> None:
        kind = operation.kind
        members, group = self._group(operation.ranks)
        if kind in NEEDS:
            needed = [f for layer in operation.layers for f in self.by_layer[layer] if f.kind in NEEDS[kind]]
            self.wait(needed, members)
        elif kind in LONG:
            self.wait((f for f in self.flying.values() if f.kind in REDUCTIONS), members)
        elif kind == "control":
            self._wait_for_all()
            took = seconds("control", operation.bytes, group, self.machine)
            self._fly(kind, operation.about, (), members, took, operation.bytes)
            self._wait_for_all()
            self.sent[kind] += operation.sent() * len(operation.ranks) / self.size
        elif kind == "fold":
            self._fold()
        if kind in COLLECTIVES:
            self._post(operation)
        elif kind in ("refresh", "launch"):
            self.compute(
                "refresh", operation.about, members, self.durations.refresh[operation.layers[0], operation.part]
            )
        elif kind == "precondition":
            self.compute(kind, operation.about, members, self.durations.precondition[operation.layers[0]])

    def _fold(self) -> None:
        assert self.problem is not None
        if self.problem.method.reads == "gradients":
            for layer in self.problem.shapes:
                assignment = self.problem.assignment
                members = _Members(assignment.members(assignment.group(assignment.owner[layer])))
                self.compute("statistics", f"layer {layer}", members, self.durations.statistics[layer])

    def _post(self, operation: Operation) -> None:
        members, group = self._group(operation.ranks)
        whole = operation.bytes * (len(operation.ranks) if operation.kind == "gather" else 1)
        took = seconds(operation.kind, whole, group, self.machine)
        layers = operation.layers if operation.kind in AWAITED else ()
        self._fly(operation.kind, operation.about, layers, members, took, operation.bytes)
        self.sent[operation.kind] += operation.sent() * len(operation.ranks) / self.size

    def _update(self) -> None:
        update = self.durations.update
        if self.settings.averaging != "owner" or self.problem is None:
            self.compute("update", "", self.trainers, update)
            return
        share = owned_bytes(self.problem, self.costs) / max(1, self.costs.gradient_bytes)
        self.clock += update * share * self.slowness
        self.busy["update"] += update * share
        for nbytes in _Gradients(self.costs, "owner", self.size).sizes:
            members, group = self._group(self.trainers.ranks)
            took = seconds("weights", nbytes, group, self.machine)
            self._fly("weights", "updated weights", (), members, took, nbytes)
            self.sent["weights"] += nbytes * (group.ranks - 1) / group.ranks
        self._wait_for_all()

    # Clocks

    def compute(self, kind: str, about: str, members: _Members, took: float) -> None:
        """These ranks compute for so many seconds, each at its own speed."""
        if took <= 0.0:
            return
        spent = took * self.slowness[members.index]
        if self.timeline is not None and self.timeline.rank in members:
            start = float(self.clock[self.timeline.rank])
            self.timeline.span(kind, about, start, start + took * float(self.slowness[self.timeline.rank]))
        self.clock[members.index] += spent
        self.busy[kind][members.index] += spent

    def wait(self, flights: Iterable[_Flight], members: _Members) -> None:
        """These ranks wait for those of the collectives that they take part in."""
        first, everybody = members.ranks[0], len(members.ranks)
        latest = -np.inf
        for flight in [flight for flight in flights if not flight.over and first in flight.members]:
            latest = max(latest, self._settle(flight))
            self._watch(flight, members)
            if everybody >= len(flight.members.ranks):
                flight.over = True
                del self.flying[id(flight)]
        if latest > -np.inf:
            self._arrive(members, latest)

    def _wait_for_all(self) -> None:
        for flight in self.flying.values():
            done = self._settle(flight)
            self._watch(flight, flight.members)
            self._arrive(flight.members, done)
            flight.over = True
        self.flying.clear()

    def _arrive(self, members: _Members, done: float) -> None:
        """No rank is earlier than what it has waited for."""
        before = self.clock[members.index]
        after = np.maximum(before, done)
        if done < np.inf:
            self.busy["wait"][members.index] += after - before
        self.clock[members.index] = after

    def _watch(self, flight: _Flight, members: _Members) -> None:
        """Notes, once, what a wait means for the rank that is watched."""
        if flight.seen or self.watched not in members:
            return
        flight.seen = True
        done = flight.done if flight.done is not None and flight.done < np.inf else flight.posted
        if self.timeline is not None:
            start = float(self.clock[self.watched])
            self.timeline.flight(flight.kind, flight.about, flight.posted, max(done, flight.posted))
            self.timeline.span(flight.kind, f"wait, {flight.about}", start, max(start, done))
        if self.buffers is not None and flight.kind in POOLED:
            self.buffers.give_back(flight.buffer)

    def _fly(self, kind: str, about: str, layers: Sequence[str], members: _Members, took: float, nbytes: int) -> None:
        posted = float(self.clock[members.index].max())
        flight = _Flight(kind, about, members, posted, took, nbytes)
        if nbytes:
            self.traffic[kind][members.index] += nbytes
        self.waiting.append(flight)
        self.flying[id(flight)] = flight
        for layer in layers:
            self.by_layer[layer].append(flight)
        if self.buffers is not None and self.watched in members and kind in POOLED:
            self.buffers.take(nbytes)

    def _settle(self, flight: _Flight) -> float:
        """When a collective ends; those that were posted before it come first."""
        while flight.done is None:
            first = self.waiting.popleft()
            index = first.members.index
            begin = max(first.posted, float(self.network[index].max()))
            if begin == np.inf:
                self.stalled = self.stalled or f"{first.kind} ({first.about})"
                first.done = np.inf
            else:
                first.done = _end(begin, float(self.clock[index].max()), first.seconds, self.machine.overlap)
            self.network[index] = first.done
        return flight.done

    def _group(self, ranks: Sequence[int]) -> tuple[_Members, Group]:
        found = self.groups.get(ranks)
        if found is None:
            found = self.groups[ranks] = (_Members(ranks), group_of(ranks, self.machine))
        return found


def _end(begin: float, now: float, took: float, overlap: float) -> float:
    """When a collective ends whose ranks have computed until now: only a share of that time moved it."""
    if overlap * (now - begin) >= took:
        return begin + (took / overlap if overlap else 0.0)
    return max(begin, now) + took - overlap * max(0.0, now - begin)


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


class _Gradients:
    """Which messages gradients travel in, and when each is complete."""

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
        found = (
            self.sizes[self._next :]
            if self._in_order
            else [size for size, missing in zip(self.sizes, self._missing, strict=True) if missing > 0]
        )
        self._next = len(self.sizes)
        return found
