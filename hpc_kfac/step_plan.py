"""The step as data: layers x method x placement x what is due -> the ordered operations of one optimisation step.

The plan is worked out by every rank alike, without communication. The preconditioner executes it; its byte and flop
figures are what traffic tests, memory tables and simulations sum up.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch

from hpc_kfac.distributed.layout import Slot
from hpc_kfac.distributed.placement import Assignment
from hpc_kfac.layers.batch import LayerShape
from hpc_kfac.methods.method import Method, StateSpec

Kind = Literal["fold", "reduce", "gather", "refresh", "broadcast", "precondition", "share", "control"]

WEIGHT = "weight"
"""Slot that carries how many loss terms a rank's running average stands for."""
SOLVED = "solved"
"""Slot that carries whether the owner's decomposition succeeded."""
UPDATE = "update"
"""Slot that carries a preconditioned gradient."""


@dataclass(frozen=True)
class Precision:
    """Dtypes by role.

    Args:
        factors: running averages and the statistics folded into them.
        solve: decompositions and their results.
        apply: the matrices multiplied with the gradient on every step.
    """

    factors: torch.dtype = torch.float32
    solve: torch.dtype = torch.float32
    apply: torch.dtype = torch.float32

    def stored(self, spec: StateSpec) -> torch.dtype:
        """The dtype a state tensor is kept in."""
        if spec.role == "running":
            return self.factors
        return self.apply if spec.operand else self.solve

    @property
    def wire(self) -> torch.dtype:
        """The dtype of reductions and updates: MPI cannot add half-precision numbers."""
        return torch.promote_types(self.factors, torch.float32)


@dataclass(frozen=True)
class Operation:
    """One entry of a plan.

    Attributes:
        kind: what is done.
        layers: the layers concerned.
        ranks: the ranks that take part.
        root: the rank whose data count (refresh, broadcast, share).
        slots: what lies in the message.
        bytes: payload of the message.
        flops: arithmetic on each taking part rank.
    """

    kind: Kind
    layers: tuple[str, ...]
    ranks: range
    root: int | None = None
    slots: tuple[Slot, ...] = ()
    bytes: int = 0
    flops: float = 0.0


@dataclass(frozen=True)
class Problem:
    """Everything a plan depends on besides what is due.

    Attributes:
        shapes: layer name -> shape, in module order.
        method: the curvature method.
        assignment: the placement, worked out.
        precision: dtypes.
        bucket_bytes: largest fused reduction.
    """

    shapes: Mapping[str, LayerShape]
    method: Method
    assignment: Assignment
    precision: Precision = Precision()
    bucket_bytes: int = 32 * 2**20

    def plan(self, *, statistics: bool, refresh: bool, scalars: int = 0) -> tuple[Operation, ...]:
        """The operations of one step, in the order in which every rank posts them.

        Args:
            statistics: fold statistics in this step.
            refresh: decompose the factors in this step.
            scalars: how many numbers the step's one scalar reduction carries.
        """
        operations: list[Operation] = []
        if statistics:
            operations.append(self._fold())
            operations += self._reduce("statistics")
        if refresh:
            operations += self._reduce("refresh")
            operations += self._gather()
            operations += self._refresh()
            operations += self._broadcast()
        operations += self._precondition()
        operations += self._share()
        operations.append(Operation("control", (), self._all, bytes=8 * scalars if len(self._all) > 1 else 0))
        return tuple(operations)

    @property
    def _all(self) -> range:
        return range(self.assignment.ranks)

    @property
    def _layers(self) -> tuple[str, ...]:
        return tuple(self.shapes)

    @cached_property
    def specs(self) -> dict[str, tuple[StateSpec, ...]]:
        """The state table of every layer."""
        return {layer: self.method.state(shape) for layer, shape in self.shapes.items()}

    def _fold(self) -> Operation:
        flops = sum(self.method.cost(self.shapes[layer]).statistics for layer in self._layers)
        return Operation("fold", self._layers, self._all, flops=flops)

    def _reduce(self, when: str) -> Iterator[Operation]:
        """Fused buckets of running averages; each layer's weight rides with its tensors."""
        if len(self._all) == 1:
            return
        groups: list[list[Slot]] = []
        for layer in self._layers:
            slots = [
                Slot(layer, spec.name, spec.shape, self.precision.wire, spec.symmetric)
                for spec in self.specs[layer]
                if spec.role == "running" and spec.reduce == "mean" and spec.reduce_at == when
            ]
            if slots:
                groups.append([*slots, Slot(layer, WEIGHT, (1,), self.precision.wire)])
        for bucket in _buckets(groups, self.bucket_bytes):
            yield self._message("reduce", bucket, self._all)

    def _gather(self) -> Iterator[Operation]:
        for layer in self._layers:
            for spec in self.specs[layer]:
                if spec.reduce == "gather":
                    slot = Slot(layer, spec.name, spec.shape, self.precision.factors)
                    yield self._message("gather", [slot], self._all)

    def _refresh(self) -> Iterator[Operation]:
        for layer in self._layers:
            if any(spec.role == "solved" for spec in self.specs[layer]):
                owner = self.assignment.owner[layer]
                flops = self.method.cost(self.shapes[layer]).refresh
                yield Operation("refresh", (layer,), range(owner, owner + 1), root=owner, flops=flops)

    def _broadcast(self) -> Iterator[Operation]:
        """Solved forms to the grad workers; what a refresh re-bases, to everybody."""
        for everybody in (False, True):
            if len(self._all) == 1 or (self.assignment.workers == 1 and not everybody):
                continue
            for owner in self._all:
                slots = [
                    Slot(
                        layer,
                        spec.name,
                        spec.full_shape(self.assignment.ranks),
                        self.precision.stored(spec),
                        spec.symmetric,
                    )
                    for layer in self._layers
                    if self.assignment.owner[layer] == owner
                    for spec in self.specs[layer]
                    if _refreshed(spec) and (spec.lives == "all" or spec.rebased) == everybody
                ]
                if slots:
                    names = dict.fromkeys(slot.layer for slot in slots)
                    flags = [Slot(layer, SOLVED, (1,), torch.float32) for layer in names]
                    ranks = self._all if everybody else self.assignment.members(self.assignment.group(owner))
                    yield self._message("broadcast", [*slots, *flags], ranks, root=owner)

    def _precondition(self) -> Iterator[Operation]:
        for layer in self._layers:
            workers = self.assignment.members(self.assignment.group(self.assignment.owner[layer]))
            flops = self.method.cost(self.shapes[layer]).precondition
            yield Operation("precondition", (layer,), workers, flops=flops)

    def _share(self) -> Iterator[Operation]:
        """Preconditioned gradients from every grad worker to the ranks in its place in the other groups."""
        assignment = self.assignment
        if assignment.workers == assignment.ranks:
            return
        for root in self._all:
            slots = []
            for layer in self._layers:
                if assignment.works_on(root, layer):
                    shape = self.shapes[layer]
                    slots.append(Slot(layer, UPDATE, (shape.blocks, shape.outputs, shape.inputs), self.precision.wire))
            if slots:
                yield self._message("share", slots, assignment.receivers(root), root=root)

    def _message(self, kind: Kind, slots: Sequence[Slot], ranks: range, root: int | None = None) -> Operation:
        layers = tuple(dict.fromkeys(slot.layer for slot in slots))
        return Operation(kind, layers, ranks, root, tuple(slots), sum(slot.bytes for slot in slots))


def _refreshed(spec: StateSpec) -> bool:
    return spec.role == "solved" or spec.rebased


def _buckets(groups: list[list[Slot]], limit: int) -> Iterator[list[Slot]]:
    bucket: list[Slot] = []
    for group in groups:
        if bucket and sum(slot.bytes for slot in bucket + group) > limit:
            yield bucket
            bucket = []
        bucket = bucket + group
    if bucket:
        yield bucket
