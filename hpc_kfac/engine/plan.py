"""The step as data: layers x method x placement x what is due -> the ordered operations of one optimisation step.

The plan is worked out by every rank alike, without communication. The preconditioner executes it; its byte and flop
figures are what traffic tests, memory tables and simulations sum up.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import zip_longest

import torch

from hpc_kfac.distributed.layout import Slot
from hpc_kfac.distributed.placement import Assignment, Unit
from hpc_kfac.engine.operations import SOLVED, UPDATE, WEIGHT, Due, Kind, Operation, buckets, message
from hpc_kfac.engine.precision import Precision
from hpc_kfac.engine.running_weight import NUMBERS
from hpc_kfac.engine.state import LayerState
from hpc_kfac.layers.batch import LayerShape
from hpc_kfac.methods.method import Cost, Method, State, StateSpec


@dataclass(frozen=True)
class Problem:
    """Everything a plan depends on besides what is due.

    Attributes:
        shapes: layer name -> shape, in module order.
        method: the curvature method.
        assignment: the placement, worked out.
        precision: dtypes.
        message_bytes: largest fused message. Small enough for several to be in flight while the backward pass and the
            next decompositions go on, large enough for its latency not to count.
        share: send preconditioned gradients to the ranks that do not work on the layer; not needed where owners update.
        momentum: if not 0, a layer's grad workers keep a moving average of its gradients with this weight of the old.
    """

    shapes: Mapping[str, LayerShape]
    method: Method
    assignment: Assignment
    precision: Precision = Precision()
    message_bytes: int = 4 * 2**20
    share: bool = True
    momentum: float = 0.0

    def has_curvature(self, layer: str, state: State) -> bool:
        """Whether a layer's state holds all that the method needs of it."""
        return all(spec.name in state for spec in self.specs[layer] if spec.needed)

    def plan(self, due: Due, scalars: int = 0) -> tuple[Operation, ...]:
        """The operations of one step, in the order in which every rank posts them.

        Args:
            due: what the step has to do.
            scalars: how many numbers the step's one scalar reduction carries.
        """
        operations: list[Operation] = []
        if due.statistics:
            operations.append(self._fold())
        operations += self._reduce(due)
        operations += self._gather(due.starting)
        starting, landing = set(due.starting), set(due.landing)
        operations += self._solve("collect", [name for name in self.shapes if name in landing - starting])
        operations += self._solve("refresh", [name for name in self.shapes if name in landing & starting])
        operations += self._solve("launch", [name for name in self.shapes if name in starting - landing])
        operations += self._precondition()
        operations += self._share()
        operations.append(Operation("control", (), self.trainers, bytes=8 * scalars if len(self.trainers) > 1 else 0))
        return tuple(operations)

    def check(self) -> None:
        """Refuses what does not go together.

        Raises:
            ValueError: a method and a placement or payload that exclude each other.
        """
        method, factors = type(self.method).__name__, self.assignment.factors
        running = [spec for specs in self.specs.values() for spec in specs if spec.role == "running"]
        gathers = any(spec.reduce == "gather" for spec in running)
        early = any(spec.reduce_at == "statistics" for spec in running)
        kept = any(spec.reduce == "none" for spec in running)
        if self.assignment.helpers and (gathers or early or kept):
            raise ValueError(f"placement.helpers is {self.assignment.helpers}, but {method} needs statistics on every"
                             " rank; use helpers with kfac, or helpers: 0")  # fmt: skip
        if factors == "local" and gathers:
            raise ValueError(f"placement.factors is local, but {method} gathers rows of all ranks; use factors: all")
        if factors == "local" and early and self.assignment.workers > 1:
            raise ValueError(f"placement.factors is local with {self.assignment.workers} grad workers, but {method}"
                             " keeps statistics where it preconditions; use grad_worker_fraction: 0")  # fmt: skip
        alone = factors == "owner" or self.assignment.helpers > 0
        if self.precision.scaled and alone:
            raise ValueError(f"precision.payload is {self.precision.payload}, which needs factors on all ranks to scale"
                             " them; use bfloat16, or placement.factors: all without helpers")  # fmt: skip
        if self.precision.payload == torch.int8 and self.assignment.ranks > 128:
            raise ValueError(f"precision.payload is int8, whose sums hold 128 ranks, not {self.assignment.ranks};"
                             " use bfloat16")  # fmt: skip

    @property
    def trainers(self) -> range:
        """All ranks but the helpers."""
        return range(self.assignment.trainers)

    @cached_property
    def specs(self) -> dict[str, tuple[StateSpec, ...]]:
        """The state table of every layer."""
        tables = {shape: self.method.state(shape) for shape in dict.fromkeys(self.shapes.values())}
        return {layer: tables[shape] for layer, shape in self.shapes.items()}

    @cached_property
    def spec(self) -> dict[tuple[str, str], StateSpec]:
        """The state table by layer and name."""
        return {(layer, spec.name): spec for layer, specs in self.specs.items() for spec in specs}

    @cached_property
    def costs(self) -> dict[str, Cost]:
        """What every layer takes."""
        found = {shape: self.method.cost(shape) for shape in dict.fromkeys(self.shapes.values())}
        return {layer: found[shape] for layer, shape in self.shapes.items()}

    @cached_property
    def units(self) -> dict[str, tuple[Unit, ...]]:
        """What is decomposed of every layer."""
        return units_of(self.method, self.shapes)

    def collects(self, rank: int, layer: str) -> bool:
        """Whether the rank takes statistics of the layer."""
        return self.assignment.factors != "local" or self.assignment.owner[layer] == rank

    def holds(self, rank: int, layer: str, spec: StateSpec) -> bool:
        """Whether the rank keeps the tensor after a refresh."""
        return rank in self.holders(layer, spec)

    def holders(self, layer: str, spec: StateSpec) -> range:
        """The ranks that keep the tensor after a refresh."""
        owner = self.assignment.owner[layer]
        if spec.role == "running" and spec.reduce == "none":
            return self._workers(layer)
        if spec.role == "running":
            alone = self.assignment.factors == "local" or self._to_owner(spec)
            return range(owner, owner + 1) if alone else range(self.assignment.ranks)
        if spec.lives == "all" and self.assignment.factors != "local":
            return range(self.assignment.ranks)
        return self._workers(layer)

    def differs(self, spec: StateSpec, state: LayerState) -> bool:
        """Whether each rank has a value of its own in this running tensor, as things stand."""
        if spec.reduce == "mean" and spec.reduce_at == "refresh":
            return self.assignment.factors == "all" and self.assignment.ranks > 1 and state.local
        return spec.reduce == "gather"

    def _to_owner(self, spec: StateSpec) -> bool:
        """Whether the running average exists on the owner alone."""
        return self.assignment.factors == "owner" and spec.reduce == "mean" and spec.reduce_at == "refresh"

    def _fold(self) -> Operation:
        flops = sum(cost.statistics for cost in self.costs.values())
        return Operation("fold", tuple(self.shapes), self.trainers, flops=flops)

    def _reduce(self, due: Due) -> Iterator[Operation]:
        """Fused buckets of running averages, last layers first, as the backward pass completes them.

        Each layer's weight rides with its tensors. What goes to the owner alone goes there with the statistics, so that
        no other rank keeps it; what every rank keeps waits for a refresh.
        """
        if self.assignment.factors == "local" or self.assignment.ranks == 1:
            return
        everywhere: list[list[Slot]] = []
        owners: dict[tuple[int, ...], list[list[Slot]]] = {}
        for layer in reversed(tuple(self.shapes)):
            shared: list[StateSpec] = []
            owned: list[StateSpec] = []
            for spec in self.specs[layer]:
                if spec.role == "running" and spec.reduce == "mean":
                    at_statistics = spec.reduce_at == "statistics" or self._to_owner(spec)
                    if due.statistics if at_statistics else layer in due.starting:
                        single = self._to_owner(spec) or self.assignment.helpers > 0
                        (owned if single else shared).append(spec)
            if shared:
                everywhere.append(self._slots(layer, shared, 0))
            if owned:
                target = self._target(layer)
                ranks = (*self.trainers, target) if self.assignment.helpers else tuple(self.trainers)
                owners.setdefault(ranks, []).append(self._slots(layer, owned, target))
        for bucket in buckets(everywhere, self.message_bytes):
            yield message("reduce", bucket, self.trainers)
        if self.precision.scaled:
            triangles = [[slot for slot in group if slot.diagonal] for group in everywhere]
            whole = [[self._triangle(slot) for slot in group] for group in triangles if group]
            for bucket in buckets(whole, self.message_bytes):
                yield message("scaled", bucket, self.trainers)
        for ranks, groups in owners.items():
            for bucket in buckets(groups, self.message_bytes):
                yield message("scatter", bucket, ranks)

    def _target(self, layer: str) -> int:
        """The rank that a running average goes to if it goes to one only."""
        if self.assignment.helpers:
            return self.assignment.solvers[self.units[layer][0]][0]
        return self.assignment.owner[layer]

    def _slots(self, layer: str, specs: Sequence[StateSpec], target: int) -> list[Slot]:
        wire, payload = self.precision.wire, self.precision.payload or self.precision.wire
        slots = []
        for spec in specs:
            diagonal = spec.symmetric and self.precision.scaled
            dtype = payload if spec.symmetric and not diagonal else wire
            slots.append(Slot(layer, spec.name, spec.shape, dtype, spec.symmetric and not diagonal, diagonal, target))
        weights = dict.fromkeys(WEIGHT + spec.reduce_at for spec in specs)
        return [*slots, *(Slot(layer, weight, (NUMBERS,), wire, owner=target) for weight in weights)]

    def _triangle(self, slot: Slot) -> Slot:
        """What follows a diagonal that was sent ahead."""
        assert self.precision.payload is not None
        return Slot(slot.layer, slot.name, slot.shape, self.precision.payload, symmetric=True)

    def _gather(self, starting: Sequence[str]) -> Iterator[Operation]:
        for layer in starting:
            for spec in self.specs[layer]:
                if spec.reduce == "gather":
                    slot = Slot(layer, spec.name, spec.shape, self.precision.factors)
                    yield message("gather", [slot], self.trainers)

    def _solve(self, kind: Kind, layers: Sequence[str]) -> Iterator[Operation]:
        """Decompositions, each rank's in turn, with a broadcast of what is ready before the next ones begin."""
        queues: dict[int, list[Unit]] = {}
        for layer in layers:
            for unit in self.units[layer]:
                solvers = self.assignment.solvers[unit]
                if len(solvers) > 1:  # every rank that needs it
                    yield self._decomposition(kind, unit, solvers)
                else:
                    queues.setdefault(solvers[0], []).append(unit)
        rounds = [list(buckets([self._solved(unit) for unit in queue], self.message_bytes))
                  for _, queue in sorted(queues.items())]  # fmt: skip
        for turn in zip_longest(*rounds, fillvalue=()):
            for rank, bucket in zip(sorted(queues), turn, strict=True):
                for layer, name in dict.fromkeys((slot.layer, slot.name) for slot in bucket):
                    if name.startswith(SOLVED):
                        yield self._decomposition(kind, (layer, name.removeprefix(SOLVED)), (rank,))
            if kind != "launch":
                for rank, bucket in zip(sorted(queues), turn, strict=True):
                    yield from self._broadcast(rank, bucket)

    def _decomposition(self, kind: Kind, unit: Unit, ranks: Sequence[int]) -> Operation:
        layer, part = unit
        flops = self.method.refresh_flops(self.shapes[layer], part) if kind != "collect" else 0.0
        return Operation(kind, (layer,), ranks, ranks[0], flops=flops, part=part)

    def _solved(self, unit: Unit) -> list[Slot]:
        """What a refresh of the unit makes, and a flag that tells whether it succeeded."""
        layer, part = unit
        slots = [
            Slot(layer, spec.name, spec.full_shape(self.assignment.trainers), self.precision.sent(spec), spec.symmetric)
            for spec in self.specs[layer]
            if (spec.role == "solved" and spec.part == part) or spec.rebased
        ]
        return [*slots, Slot(layer, SOLVED + part, (1,), torch.float32)]

    def _broadcast(self, root: int, bucket: Sequence[Slot]) -> Iterator[Operation]:
        """To the grad workers, or to all ranks where the method needs the tensor everywhere."""
        audiences: dict[Sequence[int], list[Slot]] = {}
        flags = {(slot.layer, slot.name): slot for slot in bucket if slot.name.startswith(SOLVED)}
        for slot in bucket:
            spec = self.spec.get((slot.layer, slot.name))
            if spec is not None:
                ranks = self._audience(slot.layer, spec, root)
                if len(ranks) > 1:
                    slots = audiences.setdefault(ranks, [])
                    flag = flags[slot.layer, SOLVED + spec.part]
                    slots += [slot] if flag in slots else [slot, flag]
        for ranks, slots in audiences.items():
            yield message("broadcast", slots, ranks, root)

    def _audience(self, layer: str, spec: StateSpec, root: int) -> Sequence[int]:
        if self.assignment.helpers:
            return (*self.trainers, root)
        rebased = spec.rebased and spec.reduce != "none"
        everybody = (spec.lives == "all" or rebased) and self.assignment.factors != "local"
        return self.trainers if everybody else self._workers(layer)

    def _workers(self, layer: str) -> range:
        """The ranks that precondition the layer."""
        return self.assignment.members(self.assignment.group(self.assignment.owner[layer]))

    def _precondition(self) -> Iterator[Operation]:
        for layer in self.shapes:
            yield Operation("precondition", (layer,), self._workers(layer), flops=self.costs[layer].precondition)

    def _share(self) -> Iterator[Operation]:
        """Preconditioned gradients from every grad worker to the ranks in its place in the other groups."""
        assignment = self.assignment
        if assignment.workers == assignment.trainers or not self.share:
            return
        groups: dict[int, list[Slot]] = {}
        for layer, shape in self.shapes.items():
            slot = Slot(layer, UPDATE, (shape.blocks, shape.outputs, shape.inputs), self.precision.wire)
            groups.setdefault(assignment.group(assignment.owner[layer]), []).append(slot)
        messages = {group: message("share", slots, ()) for group, slots in groups.items()}
        for root in self.trainers:
            like = messages.get(assignment.group(root))
            if like is not None:
                ranks = assignment.receivers(root)
                yield Operation("share", like.layers, ranks, root, like.slots, like.bytes)


def units_of(method: Method, shapes: Mapping[str, LayerShape]) -> dict[str, tuple[Unit, ...]]:
    """What is decomposed of every layer; nothing where a method has nothing to solve."""
    parts = {}
    for shape in dict.fromkeys(shapes.values()):
        solves = any(spec.role == "solved" for spec in method.state(shape))
        parts[shape] = method.parts(shape) if solves else ()
    return {layer: tuple((layer, part) for part in parts[shape]) for layer, shape in shapes.items()}
