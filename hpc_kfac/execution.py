"""Executes a step plan on this rank: reduces, decomposes, broadcasts, preconditions, and agrees on the step's length.

Operations are run in the plan's order. Collectives of one kind are posted one after another and finished together
before the next kind of operation begins.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from hpc_kfac.distributed.communicator import Communicator
from hpc_kfac.distributed.layout import Message
from hpc_kfac.layers import CapturedLayer
from hpc_kfac.methods.method import State
from hpc_kfac.step_control import FixedNorm, KLClip, StepControl
from hpc_kfac.step_plan import SOLVED, WEIGHT, Operation, Problem

PHASES = {
    "fold": "statistics",
    "reduce": "factor_allreduce",
    "gather": "factor_allreduce",
    "refresh": "refresh",
    "broadcast": "broadcast",
    "precondition": "precondition",
    "share": "precondition",
    "control": "precondition",
}
"""Which entry of the timings an operation counts for."""

RETRIES = 3
"""A decomposition that fails is tried again with ten times the damping, so many times."""


@dataclass(frozen=True)
class LayerReport:
    """How strongly a layer was preconditioned in a step.

    Attributes:
        cosine: between preconditioned and raw gradient; 1 means that the preconditioner did nothing but scale.
        curvature_share: 1 - damping |U|^2 / <U, D>: the share of the step's quadratic form that comes from
            curvature and not from damping; 0 is a no-op.
    """

    cosine: float
    curvature_share: float


@dataclass(frozen=True)
class StepReport:
    """What one step did; equal on all ranks.

    Attributes:
        applied: False if the gradient was not finite on some rank; then no rank may step its optimizer.
        kl_scale: the factor by which KLClip shortened the update.
        damping: the damping used.
        statistics: statistics were folded in.
        refreshed: number of layers whose solved form was renewed.
        failures: layers that kept their last good solved form because a decomposition failed.
        scalars: sums over ranks of the scalars given to the step.
        layers: by layer name, only when asked for.
    """

    applied: bool
    kl_scale: float
    damping: float
    statistics: bool
    refreshed: int
    failures: int
    scalars: dict[str, float]
    layers: dict[str, LayerReport]


@dataclass
class LayerState:
    """One layer's tensors on this rank.

    Attributes:
        running: running averages; local between two reductions.
        solved: what refreshes and gathers produced.
        weight: loss terms that the running averages stand for.
        refreshed: step of the last successful refresh, -1 before.
    """

    running: State = field(default_factory=dict)
    solved: State = field(default_factory=dict)
    weight: float = 0.0
    refreshed: int = -1

    def view(self) -> State:
        """What a method sees: gathered tensors hide this rank's own part."""
        return {**self.running, **self.solved}


@dataclass
class StepInputs:
    """What a step needs besides the plan.

    Attributes:
        number: the step's number.
        damping: damping of this step.
        learning_rates: layer name -> learning rate.
        scalars: numbers to be summed over ranks.
        log: measure how strongly each layer is preconditioned.
        fold: folds the step's statistics into the running averages.
    """

    number: int
    damping: float
    learning_rates: Mapping[str, float]
    scalars: Mapping[str, float]
    log: bool
    fold: Callable[[], None]


class Executor:
    """Runs plans.

    Args:
        model: for its gradients, which are all checked, those that are left to the optimizer too.
        layers: captured layers by name.
        states: their tensors on this rank.
        problem: what the plans were made of.
        comm: all ranks.
        control: bounds the step.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Mapping[str, CapturedLayer],
        states: Mapping[str, LayerState],
        problem: Problem,
        comm: Communicator,
        control: StepControl,
        timings: dict[str, float],
    ) -> None:
        self._layers, self._states, self._problem, self._comm = layers, states, problem, comm
        self._control_rule, self._timings = control, timings
        workers = problem.assignment.workers
        self._workers = comm.split(comm.rank // workers)
        self._receivers = comm.split(comm.rank % workers)
        self._parameters = [p for p in model.parameters() if p.requires_grad]
        self._device = next(model.parameters()).device
        self._handlers = {
            "fold": self._fold,
            "reduce": self._reduce,
            "gather": self._gather,
            "refresh": self._refresh,
            "broadcast": self._broadcast,
            "precondition": self._precondition,
            "share": self._share,
            "control": self._control,
        }

    def scalars_needed(self, scalars: Mapping[str, float], log: bool) -> int:
        """How many numbers the step's one scalar reduction carries."""
        return 4 + len(scalars) + (3 * len(self._layers) if log else 0)

    def run(self, plan: tuple[Operation, ...], inputs: StepInputs) -> StepReport:
        """Executes all operations; afterwards the gradients are preconditioned on every rank."""
        self._inputs = inputs
        self._updates: dict[str, Tensor] = {}  # to be shared
        self._products: dict[str, Tensor] = {}
        self._folded, self._refreshed, self._failures = False, 0, 0
        flying: list[Callable[[], None]] = []
        kind: str | None = None
        for operation in plan:
            start = time.perf_counter()
            if operation.kind != kind:
                for finish in flying:
                    finish()
                flying.clear()
                start = self._clock(kind, start)
                kind = operation.kind
            if self._comm.rank in operation.ranks:
                finish_later = self._handlers[operation.kind](operation)
                if finish_later is not None:
                    flying.append(finish_later)
            self._clock(kind, start)
        self._updates = {}
        return self._report

    def _clock(self, kind: str | None, start: float) -> float:
        now = time.perf_counter()
        if kind is not None:
            self._timings[PHASES[kind]] += now - start
        return now

    def _fold(self, operation: Operation) -> None:
        self._inputs.fold()
        self._folded = True

    def _reduce(self, operation: Operation) -> Callable[[], None]:
        """Mean over ranks of the running averages, weighted by the loss terms that they stand for."""
        message = Message(operation.slots, self._device)
        # A rank without the tensors, having never used the layer, adds zeros of weight 0.
        missing = {s.layer for s in message if s.name != WEIGHT and s.name not in self._states[s.layer].running}
        for slot in message:
            state = self._states[slot.layer]
            weight = 0.0 if slot.layer in missing else state.weight
            if slot.name == WEIGHT:
                message.view(slot).fill_(weight)
            else:
                message.put(slot, None if slot.layer in missing else state.running[slot.name], weight)
        work = self._comm.allreduce(message.typed(), "reduce")

        def finish() -> None:
            work.wait()
            weights = {slot.layer: message.view(slot).item() for slot in message if slot.name == WEIGHT}
            for slot in message:
                total = weights[slot.layer]
                if slot.name != WEIGHT and total > 0:
                    self._keep(self._states[slot.layer].running, slot.name, message.get(slot).div_(total))

        return finish

    def _gather(self, operation: Operation) -> Callable[[], None]:
        (slot,) = operation.slots
        state = self._states[slot.layer]
        own = state.running.get(slot.name)
        if own is None:
            own = torch.zeros(slot.shape, dtype=slot.dtype, device=self._device)
        parts, work = self._comm.allgather(own.contiguous(), "gather")

        def finish() -> None:
            work.wait()
            state.solved[slot.name] = torch.cat(list(parts), dim=1)

        return finish

    def _refresh(self, operation: Operation) -> None:
        (name,) = operation.layers
        if not self._has_statistics(name):
            return  # a layer that was not used yet has nothing that could fail
        result = self._solve(name)
        if result is None:
            self._failures += 1
            return
        state = self._states[name]
        for spec in self._problem.specs[name]:
            if spec.name in result:
                target = state.running if spec.role == "running" else state.solved
                target[spec.name] = result[spec.name].to(self._problem.precision.stored(spec)).contiguous()
        state.refreshed = self._inputs.number
        self._refreshed += 1

    def _solve(self, name: str) -> State | None:
        """The method's refresh; with more damping if it fails, None if it fails for good."""
        method, shape = self._problem.method, self._problem.shapes[name]
        view = {key: tensor.to(self._problem.precision.solve) for key, tensor in self._states[name].view().items()}
        for attempt in range(RETRIES + 1):
            try:
                result = method.refresh(view, shape, self._inputs.damping * 10**attempt)
            except torch.linalg.LinAlgError:
                continue
            if all(bool(torch.isfinite(tensor).all()) for tensor in result.values()):
                return result
        return None

    def _has_statistics(self, name: str) -> bool:
        view = self._states[name].view()
        return all(
            spec.name in view
            for spec in self._problem.specs[name]
            if spec.role == "running" and spec.reduce_at == "refresh"
        )

    def _broadcast(self, operation: Operation) -> Callable[[], None]:
        assert operation.root is not None
        whole = len(operation.ranks) == self._comm.size
        comm = self._comm if whole else self._workers
        root = operation.root if whole else operation.root % self._workers.size
        message = Message(operation.slots, self._device)
        if operation.root == self._comm.rank:
            for slot in message:
                state = self._states[slot.layer]
                if slot.name == SOLVED:
                    message.view(slot).fill_(float(state.refreshed == self._inputs.number))
                else:
                    message.put(slot, state.view().get(slot.name))
        work = comm.broadcast(message.buffer, root, "broadcast")

        def finish() -> None:
            work.wait()
            if operation.root != self._comm.rank:
                self._receive(operation, message)

        return finish

    def _receive(self, operation: Operation, message: Message) -> None:
        renewed = {slot.layer for slot in message if slot.name == SOLVED and message.view(slot).item() > 0}
        roles = {(name, spec.name): spec.role for name in operation.layers for spec in self._problem.specs[name]}
        for slot in message:
            if slot.name == SOLVED or slot.layer not in renewed:
                continue
            state = self._states[slot.layer]
            target = state.running if roles[slot.layer, slot.name] == "running" else state.solved
            target[slot.name] = message.get(slot)
            state.refreshed = self._inputs.number

    def _precondition(self, operation: Operation) -> None:
        (name,) = operation.layers
        layer, shape = self._layers[name], self._problem.shapes[name]
        gradient = layer.gradient()
        update = gradient
        if self._ready(name):
            update = self._problem.method.precondition(gradient, self._states[name].view(), shape, self._inputs.damping)
        if self._problem.assignment.owner[name] == self._comm.rank:
            self._measure(name, update, gradient)
        if isinstance(self._control_rule, FixedNorm):
            update = update * (self._control_rule.norm / update.norm().clamp(min=torch.finfo(update.dtype).tiny))
        layer.set_gradient(update)
        if self._receivers.size > 1:
            self._updates[name] = update

    def _ready(self, name: str) -> bool:
        """Whether the layer has what the method needs; before its first statistics it takes the plain gradient."""
        view = self._states[name].view()
        return all(
            spec.name in view
            for spec in self._problem.specs[name]
            if spec.role == "solved" or spec.reduce_at == "statistics" or spec.reduce == "gather"
        )

    def _measure(self, name: str, update: Tensor, gradient: Tensor) -> None:
        products = [torch.sum(update * gradient)]
        if self._inputs.log:
            products += [update.square().sum(), gradient.square().sum()]
        self._products[name] = torch.stack(products)

    def _share(self, operation: Operation) -> Callable[[], None]:
        assert operation.root is not None
        message = Message(operation.slots, self._device)
        if operation.root == self._comm.rank:
            for slot in message:
                message.put(slot, self._updates[slot.layer])
        root = operation.root // self._problem.assignment.workers
        work = self._receivers.broadcast(message.buffer, root, "share")

        def finish() -> None:
            work.wait()
            if operation.root != self._comm.rank:
                for slot in message:
                    self._layers[slot.layer].set_gradient(message.view(slot))

        return finish

    def _control(self, operation: Operation) -> None:
        """One scalar reduction: KL clip, finite check, counts and the caller's own numbers."""
        inputs, names = self._inputs, list(self._layers)
        owned = [name for name in names if name in self._products]
        values = torch.stack([self._products[name] for name in owned]).double().cpu() if owned else torch.zeros(0, 3)
        products = dict(zip(owned, values.tolist(), strict=True))
        clip = self._control_rule if isinstance(self._control_rule, KLClip) else None
        rates = {name: 1.0 if clip is None else clip.weight(inputs.learning_rates[name]) for name in products}
        quadratic = sum(rates[name] * product[0] for name, product in products.items())
        bad = float(not (math.isfinite(quadratic) and self._finite()))
        totals = [
            quadratic if not bad else 0.0,
            bad,
            float(self._refreshed),
            float(self._failures),
            *inputs.scalars.values(),
        ]
        if inputs.log:
            totals += [value for name in names for value in products.get(name, [0.0] * 3)]
        vector = torch.tensor(totals, dtype=torch.float64)
        if self._comm.size > 1:
            self._comm.allreduce(vector, "control").wait()
        totals = vector.tolist()
        scale = 1.0 if clip is None else clip.scale(totals[0])
        if scale != 1.0:
            parameters = (p for layer in self._layers.values() for p in layer.parameters)
            torch._foreach_mul_([p.grad for p in parameters if p.grad is not None], scale)
        first_log = 4 + len(inputs.scalars)
        self._report = StepReport(
            applied=totals[1] == 0,
            kl_scale=scale,
            damping=inputs.damping,
            statistics=self._folded,
            refreshed=int(totals[2]),
            failures=int(totals[3]),
            scalars=dict(zip(inputs.scalars, totals[4:first_log], strict=True)),
            layers=self._layer_reports(totals[first_log:]) if inputs.log else {},
        )

    def _layer_reports(self, values: list[float]) -> dict[str, LayerReport]:
        reports = {}
        for position, name in enumerate(self._layers):
            product, update, gradient = values[3 * position : 3 * position + 3]
            norms = math.sqrt(update * gradient)
            share = 1.0 - self._inputs.damping * update / product if product > 0 else 0.0
            reports[name] = LayerReport(product / norms if norms > 0 else 1.0, share)
        return reports

    def _finite(self) -> bool:
        """Whether all gradients are, preconditioned ones included; a bad one of this rank alone counts as well."""
        gradients = [p.grad for p in self._parameters if p.grad is not None]
        return not gradients or bool(torch.isfinite(nn.utils.get_total_norm(gradients)))

    @staticmethod
    def _keep(state: State, name: str, tensor: Tensor) -> None:
        # The running average keeps its storage, which others may hold on to.
        if name in state:
            state[name].copy_(tensor)
        else:
            state[name] = tensor
