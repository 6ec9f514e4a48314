"""What travels: fills the messages of a plan's collectives from the layers' states, posts them, and takes them in."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from hpc_kfac.distributed.buffers import BufferPool
from hpc_kfac.distributed.communicator import Work
from hpc_kfac.distributed.groups import Groups
from hpc_kfac.distributed.layout import Message, Slot
from hpc_kfac.engine.operations import SOLVED, WEIGHT, Operation
from hpc_kfac.engine.plan import Problem
from hpc_kfac.engine.running_weight import Weight, total
from hpc_kfac.engine.state import LayerState
from hpc_kfac.layers import CapturedLayer
from hpc_kfac.methods.method import StateSpec

Finish = Callable[[], None]


class Exchange:
    """Posts the collectives of plans.

    Args:
        layers: captured layers by name.
        states: their tensors on this rank.
        problem: what the plans were made of.
        groups: communicators.
        pool: lends buffers.
        device: of the tensors.

    Attributes:
        renewed: units whose solved form this rank renewed in the present step; set by the executor.
    """

    def __init__(
        self,
        layers: Mapping[str, CapturedLayer],
        states: Mapping[str, LayerState],
        problem: Problem,
        groups: Groups,
        pool: BufferPool,
        device: torch.device,
    ) -> None:
        self._layers, self._states, self._problem, self._groups = layers, states, problem, groups
        self._pool, self._device = pool, device
        self._rank = groups.everyone.rank
        self._sums: dict[tuple[str, str], Tensor] = {}  # diagonals over all ranks, until the triangles follow
        self._scales: dict[tuple[str, str], tuple[float, float]] = {}  # their weight on this rank and over all
        self.renewed: dict[tuple[str, str], int] = {}
        self.post: dict[str, Callable[[Operation], tuple[list[Work], Finish]]] = {
            "reduce": self._reduce,
            "scaled": self._scaled,
            "scatter": self._scatter,
            "gather": self._gather,
            "broadcast": self._broadcast,
            "share": self._share,
        }

    def follow(self, problem: Problem) -> None:
        """Goes on with other layers."""
        self._problem = problem

    # Running averages: each rank sends its own times its weight, and the sum is divided by the sum of the weights.

    def _reduce(self, operation: Operation) -> tuple[list[Work], Finish]:
        message = self._fill(operation)
        comm = self._groups.of(operation.ranks)
        works = [comm.allreduce(part, "reduce", operation.about) for part, _ in message.segments()]

        def finish() -> None:
            sums = _sums(message, message.slots)
            for slot in message:
                if slot.name.startswith(WEIGHT):
                    continue
                divisor = self._divisor(slot, sums)
                if divisor > 0 and slot.diagonal:
                    self._sums[slot.layer, slot.name] = message.view(slot).clone()
                    self._scales[slot.layer, slot.name] = self._own_weight(slot), divisor
                elif divisor > 0:
                    self._take(message, slot, divisor)
            for (layer, weight), numbers in sums.items():
                self._states[layer].weights[weight.removeprefix(WEIGHT)].settle(numbers[3] > 0)
                if weight == WEIGHT + "refresh":
                    self._states[layer].local = False
            message.release()

        return works, finish

    def _scatter(self, operation: Operation) -> tuple[list[Work], Finish]:
        """As `_reduce`, but every sum reaches its owner alone."""
        message = self._fill(operation)
        comm, works = self._groups.of(operation.ranks), []
        for part, slots in message.segments():
            counts = [0] * len(operation.ranks)
            for slot in slots:
                counts[operation.ranks.index(slot.owner)] += math.prod(slot.message_shape)
            works.append(comm.reduce_scatter(part, counts, "scatter", operation.about))
        keeps_own = self._problem.assignment.helpers > 0  # trainers go on averaging, helpers only solve

        def finish() -> None:
            sums = _sums(message, [slot for slot in message if slot.owner == self._rank])
            for slot in message:
                state = self._states[slot.layer]
                state.local &= keeps_own
                if slot.name.startswith(WEIGHT):
                    self._hand_over(state, slot, sums.get((slot.layer, slot.name)), keeps_own)
                elif slot.owner == self._rank:
                    divisor = self._divisor(slot, sums)
                    if divisor > 0:
                        self._take(message, slot, divisor)
                elif not keeps_own:
                    state.running.pop(slot.name, None)
            message.release()

        return works, finish

    def _scaled(self, operation: Operation) -> tuple[list[Work], Finish]:
        """Triangles with unit diagonal: sums of positive semidefinite matrices, so that no entry exceeds 1."""
        message = Message(operation.slots, self._pool, self._device)
        comm = self._groups.of(operation.ranks)
        levels = _levels(operation.slots[0].dtype, comm.size)
        for slot in message:
            state, sums = self._states[slot.layer], self._sums.get((slot.layer, slot.name))
            weight, _ = self._scales.get((slot.layer, slot.name), (0.0, 1.0))
            if sums is None or slot.name not in state.running or weight == 0:
                message.put(slot, None)
                continue
            inverse = torch.where(sums > 0, sums.rsqrt(), torch.zeros_like(sums))
            scaled = state.running[slot.name] * (inverse.unsqueeze(-1) * inverse.unsqueeze(-2))
            scaled *= weight * levels
            message.put(slot, scaled.round_() if levels > 1 else scaled)
        works = [comm.allreduce(part, "scaled", operation.about) for part, _ in message.segments()]

        def finish() -> None:
            for slot in message:
                sums = self._sums.pop((slot.layer, slot.name), None)
                if sums is not None:
                    matrix = message.get(slot, torch.empty(slot.shape, dtype=sums.dtype, device=self._device))
                    matrix /= levels
                    # The norm of the rounding noise, d x d of variance ranks / 12 / levels^2, keeps the sum positive.
                    noise = 2.0 * math.sqrt(comm.size / 12.0 * slot.shape[-1]) / levels if levels > 1 else 0.0
                    matrix.diagonal(dim1=-2, dim2=-1).fill_(1.0 + noise)
                    root = sums.sqrt()
                    _, divisor = self._scales.pop((slot.layer, slot.name))
                    matrix *= root.unsqueeze(-1) * root.unsqueeze(-2) / divisor
                    self._states[slot.layer].keep("running", slot.name, matrix.to(self._problem.precision.factors))
            message.release()

        return works, finish

    def _fill(self, operation: Operation) -> Message:
        """Weighted running averages. A rank that has never used a layer adds zeros of weight 0."""
        message = Message(operation.slots, self._pool, self._device)
        missing = {
            (slot.layer, self._spec(slot).reduce_at)
            for slot in message
            if not slot.name.startswith(WEIGHT) and slot.name not in self._states[slot.layer].running
        }
        for slot in message:
            state = self._states[slot.layer]
            if slot.name.startswith(WEIGHT):
                at = slot.name.removeprefix(WEIGHT)
                numbers = state.weights[at].numbers((slot.layer, at) not in missing)
                message.view(slot).copy_(torch.tensor(numbers, dtype=slot.dtype))
            else:
                weight = 0.0 if (slot.layer, self._spec(slot).reduce_at) in missing else self._own_weight(slot)
                message.put(slot, state.running[slot.name] if weight > 0 else None, weight)
        return message

    def _spec(self, slot: Slot) -> StateSpec:
        return self._problem.spec[slot.layer, slot.name]

    def _own_weight(self, slot: Slot) -> float:
        spec = self._spec(slot)
        return self._states[slot.layer].weights[spec.reduce_at].of(spec.over)

    def _divisor(self, slot: Slot, sums: Mapping[tuple[str, str], Sequence[float]]) -> float:
        """What the sum of a slot over ranks is divided by; 0 if no rank has the tensor."""
        spec = self._spec(slot)
        return total(sums[slot.layer, WEIGHT + spec.reduce_at], spec.over)

    def _hand_over(self, state: LayerState, slot: Slot, numbers: Sequence[float] | None, keeps_own: bool) -> None:
        """What the running averages stand for once they are their owner's alone."""
        if not keeps_own:
            weight = Weight() if numbers is None else Weight(total(numbers, "uses"), total(numbers, "terms"))
            state.weights[slot.name.removeprefix(WEIGHT)] = weight

    def _take(self, message: Message, slot: Slot, total: float) -> None:
        message.view(slot).div_(total)
        running = self._states[slot.layer].running
        out = running.get(slot.name)
        if out is None:
            out = torch.empty(slot.shape, dtype=self._problem.precision.factors, device=self._device)
            running[slot.name] = out
        message.get(slot, out)

    # Rows, solved forms and updates

    def _gather(self, operation: Operation) -> tuple[list[Work], Finish]:
        (slot,) = operation.slots
        state = self._states[slot.layer]
        own = state.running.get(slot.name)
        if own is None:
            own = torch.zeros(slot.shape, dtype=slot.dtype, device=self._device)
        own = own.to(self._device, slot.dtype)
        parts, work = self._groups.of(operation.ranks).allgather(own.contiguous(), "gather", operation.about)

        def finish() -> None:
            state.solved[slot.name] = torch.cat(list(parts), dim=1)

        return [work], finish

    def _broadcast(self, operation: Operation) -> tuple[list[Work], Finish]:
        message = Message(operation.slots, self._pool, self._device)
        sends = operation.root == self._rank
        if sends:
            for slot in message:
                if slot.name.startswith(SOLVED):
                    started = self.renewed.get((slot.layer, slot.name.removeprefix(SOLVED)), -1)
                    message.view(slot).fill_(float(started))
                else:
                    message.put(slot, self._states[slot.layer].view().get(slot.name))
        work = self._from_root(operation, message)

        def finish() -> None:
            if not sends:
                self._receive(message)
            message.release()

        return [work], finish

    def _from_root(self, operation: Operation, message: Message) -> Work:
        assert operation.root is not None
        root = operation.ranks.index(operation.root)
        return self._groups.of(operation.ranks).broadcast(message.buffer, root, operation.kind, operation.about)

    def _receive(self, message: Message) -> None:
        flags = [slot for slot in message if slot.name.startswith(SOLVED)]
        started = {(s.layer, s.name.removeprefix(SOLVED)): int(message.view(s).item()) for s in flags}
        for slot in message:
            if slot.name.startswith(SOLVED):
                continue
            spec = self._problem.spec[slot.layer, slot.name]
            step = started[slot.layer, spec.part]
            if step >= 0:
                state = self._states[slot.layer]
                target = state.running if spec.role == "running" else state.solved
                out = target.get(slot.name)
                if out is not None and (tuple(out.shape) != slot.shape or out.dtype != slot.dtype):
                    out = None  # rows of another number of ranks, or kept in the application dtype
                target[slot.name] = message.get(slot, out)
                state.refreshed[spec.part], state.fresh = step, True

    def _share(self, operation: Operation) -> tuple[list[Work], Finish]:
        message = Message(operation.slots, self._pool, self._device)
        sends = operation.root == self._rank
        if sends:
            for slot in message:
                message.put(slot, self._layers[slot.layer].gradient())
        work = self._from_root(operation, message)

        def finish() -> None:
            if not sends:
                for slot in message:
                    self._layers[slot.layer].set_gradient(message.view(slot))
            message.release()

        return [work], finish


def _sums(message: Message, slots: Sequence[Slot]) -> dict[tuple[str, str], list[float]]:
    """The numbers that weigh, summed over ranks."""
    weights = [slot for slot in slots if slot.name.startswith(WEIGHT)]
    values = torch.stack([message.view(slot) for slot in weights]).tolist() if weights else []
    return {(slot.layer, slot.name): value for slot, value in zip(weights, values, strict=True)}


def _levels(payload: torch.dtype, ranks: int) -> float:
    """What 1 is sent as: int8 leaves room for every rank's rounding."""
    return float(127 - (ranks + 1) // 2) if payload == torch.int8 else 1.0
