"""Executes a step plan on this rank.

Operations are run in the plan's order, which is the same on all ranks. Collectives are only posted; each is waited for
when an operation needs what it brings. Reductions of running averages are posted already during the backward pass: a
layer that is complete is marked as ready, and buckets go out in the plan's order as far as they are complete.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hpc_kfac.distributed.buffers import BufferPool
from hpc_kfac.distributed.communicator import Communicator, Work
from hpc_kfac.distributed.groups import Groups
from hpc_kfac.distributed.texts import decode, encode
from hpc_kfac.engine.agreement import Agreed, Agreement
from hpc_kfac.engine.exchange import Exchange, Finish
from hpc_kfac.engine.liveliness import Liveliness
from hpc_kfac.engine.operations import Due, Operation
from hpc_kfac.engine.plan import Problem
from hpc_kfac.engine.solving import Solver
from hpc_kfac.engine.state import LayerState, StepInputs
from hpc_kfac.engine.timing import Timeline
from hpc_kfac.layers import CapturedLayer
from hpc_kfac.linalg.scaling import size_of
from hpc_kfac.linalg.solve import is_finite
from hpc_kfac.linalg.workspace import Workspace
from hpc_kfac.methods.method import State
from hpc_kfac.options.schedule import Similarity, TraceChange
from hpc_kfac.options.step_control import FixedNorm, StepControl

PHASES = {
    "fold": "statistics",
    "reduce": "factor_allreduce",
    "scaled": "factor_allreduce",
    "scatter": "factor_allreduce",
    "gather": "factor_allreduce",
    "refresh": "refresh",
    "launch": "refresh",
    "collect": "refresh",
    "broadcast": "broadcast",
    "precondition": "precondition",
    "share": "precondition",
    "control": "precondition",
}
"""Which entry of the timings an operation counts for."""

WORK, STOP, FAILED, SAVE = 1.0, 0.0, -1.0, 2.0
"""Orders to helper ranks."""

EARLY = ("reduce", "scatter")
"""Collectives that may be posted from the backward pass."""

NEEDS = {
    "scaled": ("reduce",),
    "precondition": ("reduce", "scaled", "scatter", "gather", "broadcast"),
}
"""Collectives that must be over, as far as they concern the same layers, before an operation begins."""

LONG = ("refresh", "launch")
"""These wait for all reductions, also of other layers: MPI makes no progress while a rank computes for long, so that
the others would wait for theirs until it has finished, and decompositions would come one after another. Measured with
two ranks: a step of 156 instead of 108 ms."""

TURNED = 0.1
"""Relative error of an update from which on operands are not rounded to the application dtype: a cosine of 0.995."""

REDUCTIONS = ("reduce", "scaled", "scatter", "gather")


@dataclass
class Flying:
    """A collective that was posted."""

    kind: str
    layers: frozenset[str]
    works: list[Work]
    finish: Finish
    about: str
    posted: float


class Executor:
    """Runs plans.

    Args:
        model: for its gradients.
        layers: captured layers by name.
        states: their tensors on this rank.
        problem: what the plans are made of.
        comm: all ranks.
        control: bounds the step.
        adapt: compares factors with those of the last refresh, where the schedule depends on it.
        timings: gets seconds by phase.
        timeline: gets every operation's span.

    Attributes:
        overlap: post reductions during the backward pass.
        waited: seconds blocked in collectives.
        pool: buffers of all messages.
        left: layers that are not preconditioned in the present step.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Mapping[str, CapturedLayer],
        states: Mapping[str, LayerState],
        problem: Problem,
        comm: Communicator,
        control: StepControl,
        adapt: Similarity | TraceChange | None,
        timings: dict[str, float],
        timeline: Timeline,
    ) -> None:
        self._layers, self._states, self._problem, self._comm = layers, states, problem, comm
        self._adapt, self._timings, self._timeline = adapt, timings, timeline
        device = next(model.parameters()).device
        owned = {name: problem.assignment.owner[name] == comm.rank for name in layers}
        self._model, self._control = model, control
        self.left: frozenset[str] = frozenset()
        self.groups = Groups(comm, problem.assignment)
        self.agreement = Agreement(model, layers, owned, self.groups.trainers, control, problem.precision.wire)
        self.pool = BufferPool()
        self.solver = Solver(problem, states, comm.rank)
        self._workspace = Workspace()
        self._liveliness = Liveliness(layers, states, device)
        self._exchange = Exchange(layers, states, problem, self.groups, self.pool, device)
        self._exchange.renewed = self.solver.renewed
        self._handlers: dict[str, Callable[[Operation], None]] = {
            "refresh": lambda op: self.solver.refresh(
                (op.layers[0], op.part), self._inputs.number, self._inputs.damping
            ),
            "launch": lambda op: self.solver.launch((op.layers[0], op.part), self._inputs.number, self._inputs.damping),
            "collect": lambda op: self.solver.collect((op.layers[0], op.part)),
            "precondition": self._precondition,
        }
        self._flying: list[Flying] = []
        self._early: list[tuple[int, Operation]] = []
        self._posted: set[int] = set()
        self._ready: set[str] = set()
        self.overlap = problem.assignment.helpers == 0  # helpers need their orders first
        self.waited = 0.0
        self.begin(())

    def follow(self, problem: Problem) -> None:
        """Goes on with other layers, between two steps."""
        self._problem = problem
        self._exchange.follow(problem)
        self.solver.follow(problem)
        owned = {name: problem.assignment.owner[name] == self._comm.rank for name in self._layers}
        wire = problem.precision.wire
        self.agreement = Agreement(self._model, self._layers, owned, self.groups.trainers, self._control, wire)
        self._workspace = Workspace()
        self.left = frozenset()

    def leave(self, layers: frozenset[str]) -> None:
        """Has the next step leave layers as they are, and see the gradients of all that is trained now."""
        self.left = layers
        self.agreement.watch(self._model, {name: layer for name, layer in self._layers.items() if name not in layers})
        for name, layer in self._layers.items():  # a dtype may have changed
            momentum = self._states[name].momentum
            if "average" in momentum:
                dtype = torch.promote_types(torch.float32, layer.parameters[0].dtype)
                momentum["average"] = momentum["average"].to(dtype)

    def bound(self, layers: Mapping[str, CapturedLayer], controls: Mapping[str, FixedNorm]) -> None:
        """Gives layers without curvature the length of an update."""
        for name, control in controls.items():
            layer = layers[name]
            layer.set_gradient(control.bound(layer.gradient(), layer.shared))

    # During the forward and backward pass

    def begin(self, plan: tuple[Operation, ...]) -> None:
        """Begins a step: from now on reductions go out as their layers become ready."""
        self.abandon()
        if self.overlap:
            mine = [(i, op) for i, op in enumerate(plan) if op.kind in EARLY and self._comm.rank in op.ranks]
            self._early = mine[::-1]  # the next one last

    def ready(self, layer: str) -> None:
        """The layer's running averages are complete for this step. Posts what can be posted, in the plan's order."""
        self._ready.add(layer)
        while self._early and self._ready.issuperset(self._early[-1][1].layers):
            index, operation = self._early.pop()
            self._post(operation)
            self._posted.add(index)
        if self._flying:
            self._comm.progress()

    def abandon(self) -> None:
        """Waits for what is still in flight, and forgets it: the step will not be finished."""
        for flying in self._flying:
            for work in flying.works:
                work.wait()
        self._flying.clear()
        self._early, self._posted, self._ready = [], set(), set()

    def release(self) -> None:
        """Gives the memory of scratch and messages back; no step follows."""
        self._workspace.clear()
        self.pool.clear()

    # The step

    def scalars(self, due: Due, inputs: StepInputs) -> int:
        """How many numbers the step's one scalar reduction carries."""
        return self.agreement.size(inputs, due.starting if self._adapt is not None else ())

    def run(self, plan: tuple[Operation, ...], due: Due, inputs: StepInputs) -> Agreed:
        """Executes all operations; afterwards the gradients are preconditioned on every rank.

        Args:
            plan: the one that `begin` was given, apart from the size of the scalar reduction.
            due: what it was made for.
            inputs: of the step.
        """
        self._inputs, self._due = inputs, due
        self.solver.start_step()
        self.agreement.start_step()
        self._keep_averages()
        self._early = []
        if due.starting or due.landing:
            self._order_helpers(WORK)
        for index, operation in enumerate(plan):
            if self._comm.rank in operation.ranks and index not in self._posted:
                self._run(operation)
        return self._agreed

    def serve(self, plan_of: Callable[[Due], tuple[Operation, ...]], save: Callable[[int], str]) -> bool:
        """On a helper rank: runs its part of every step in which something is to be decomposed, until `close`.

        Args:
            plan_of: the plan of what is due.
            save: writes this rank's part of a checkpoint of a step and tells of it.

        Returns:
            False if the trainers have failed.
        """
        names = tuple(self._layers)
        while True:
            orders = torch.zeros(3 + 2 * len(names), dtype=torch.float64)
            work = self.groups.helpers[0].broadcast(orders, 0, "control", "orders to helpers")
            while not work.done():  # for as long as the trainers need, so it is no stall
                time.sleep(1e-3)
            command, number, damping, *flags = orders.tolist()
            if command == SAVE:
                self._tell_trainers(save(int(number)))
                continue
            if command != WORK:
                return command == STOP
            starting, landing = flags[: len(names)], flags[len(names) :]
            self._due = Due(
                False, *(tuple(n for n, flag in zip(names, f, strict=True) if flag) for f in (starting, landing))
            )
            self._inputs = StepInputs(int(number), damping, {}, {}, False, lambda: None)
            self.solver.start_step()
            for operation in plan_of(self._due):
                if self._comm.rank in operation.ranks:
                    self._run(operation)
            self._complete(None, None)

    def close(self, failed: bool) -> None:
        """On all trainers: ends `serve` on the helpers."""
        self._inputs = StepInputs(0, 0.0, {}, {}, False, lambda: None)
        self._due = Due()
        self._order_helpers(FAILED if failed else STOP)

    def order_save(self, step: int) -> Callable[[], list[str]]:
        """On all trainers: has the helpers save. Calling the result waits for what they tell of it."""
        if not self.groups.helpers:
            return lambda: []
        self._inputs, self._due = StepInputs(step, 0.0, {}, {}, False, lambda: None), Due()
        self._order_helpers(SAVE)
        answers = []
        for comm in self.groups.helpers:
            data = encode("")
            answers.append((data, comm.broadcast(data, comm.size - 1, "control", "checkpoints of helpers")))

        def wait() -> list[str]:
            for _, work in answers:
                work.wait()
            return [decode(data) for data, _ in answers]

        return wait

    def _tell_trainers(self, text: str) -> None:
        joint = self.groups.helpers[0]
        work = joint.broadcast(encode(text), joint.size - 1, "control", "checkpoints of helpers")
        while not work.done():
            time.sleep(1e-3)

    def _order_helpers(self, command: float) -> None:
        if not self.groups.helpers:
            return
        due = self._due
        flags = [float(name in layers) for layers in (due.starting, due.landing) for name in self._layers]
        orders = torch.tensor([command, self._inputs.number, self._inputs.damping, *flags], dtype=torch.float64)
        for comm in self.groups.helpers:
            comm.broadcast(orders, 0, "control", "orders to helpers").wait()

    def _run(self, operation: Operation) -> None:
        kind = operation.kind
        if kind in NEEDS:
            self._complete(NEEDS[kind], operation.layers)
        elif kind in LONG:
            self._complete(REDUCTIONS, None)
        elif kind == "control":
            self._complete(None, None)
        start = time.perf_counter()
        if kind in self._exchange.post:
            self._post(operation)
        elif kind == "fold":
            self._fold()
        elif kind == "control":
            self._agree()
        else:
            self._handlers[kind](operation)
        self._note(kind, operation.about, start)
        if self._flying:
            self._comm.progress()

    def _fold(self) -> None:
        method = self._problem.method
        if method.reads == "samples":
            self._inputs.fold()
            return
        for name, layer in self._layers.items():
            if self._problem.assignment.works_on(self._comm.rank, name) and name not in self.left:
                state = self._states[name]
                gradient = layer.gradient(self._workspace).to(self._problem.precision.factors).contiguous()
                if is_finite(gradient):  # else all ranks skip the step
                    method.fold_gradient(state.running, state.solved, gradient, self._problem.shapes[name])

    def _post(self, operation: Operation) -> None:
        works, finish = self._exchange.post[operation.kind](operation)
        layers = frozenset(operation.layers)
        self._flying.append(Flying(operation.kind, layers, works, finish, operation.about, time.perf_counter()))

    def _complete(self, kinds: tuple[str, ...] | None, layers: tuple[str, ...] | None) -> None:
        """Waits for collectives in flight, of these kinds and that concern one of the layers; None stands for all."""
        still = []
        for flying in self._flying:
            other = layers is not None and flying.layers.isdisjoint(layers)
            if other or (kinds is not None and flying.kind not in kinds):
                still.append(flying)
                continue
            start = time.perf_counter()
            for work in flying.works:
                work.wait()
            arrived = time.perf_counter()
            self.waited += arrived - start
            self._timeline.flight(flying.kind, flying.about, flying.posted, arrived)
            flying.finish()
            self._note(flying.kind, f"wait, {flying.about}", start)
        self._flying = still

    def _note(self, kind: str, about: str, start: float) -> None:
        end = time.perf_counter()
        self._timings[PHASES[kind]] += end - start
        self._timeline.span(kind, about, start, end)

    def _precondition(self, operation: Operation) -> None:
        (name,) = operation.layers
        if name in self.left:
            return
        layer, shape, state = self._layers[name], self._problem.shapes[name], self._states[name]
        control = self._inputs.controls.get(name)
        fresh = layer.gradient(self._workspace)
        gradient = update = self._averaged(fresh, state, (control and control.momentum) or 0.0)
        view = state.view()
        ready = self._is_ready(name, view)
        if ready:
            if state.fresh:
                view = self._narrowed(name, gradient)
            update = self._problem.method.precondition(gradient, view, shape, self._inputs.damping, self._workspace)
        else:
            self.agreement.plain(name)
        if self._inputs.log:
            self.agreement.describe(name, update, gradient, self._share(name, view, update, ready))
        if control is not None:
            update = control.bound(update, layer.shared, state.momentum.get("alive"))
        update = self.agreement.downhill(name, update, gradient, control)
        if self._inputs.log:
            begun = state.refreshed.values()
            self.agreement.measure_size(name, update, self._inputs.number - min(begun) if begun else 0)
        wire = self._problem.precision.wire
        if torch.promote_types(update.dtype, wire) != wire:  # as it reaches other ranks, so that all take the same step
            update = update.to(wire).to(update.dtype)
        self.agreement.check(name, update)
        if update is not fresh or control is not None:
            layer.set_gradient(update, self._workspace)

    def _narrowed(self, name: str, gradient: Tensor) -> State:
        """The state, its operands in the application dtype, unless rounding them turned the update of this gradient.

        What the largest eigenvalue shares of a gradient is left over by rounding in directions that the inverse makes
        longer by the condition of the damped curvature: bfloat16 with its 8 digits loses the direction at a condition
        of some hundreds. Ordinary steps ask nothing.
        """
        state, shape, apply = self._states[name], self._problem.shapes[name], self._problem.precision.apply
        view, wide = state.view(), self._problem.precision.solve
        rounded = {
            spec.name: state.solved[spec.name].to(apply)
            for spec in self._problem.specs[name]
            if spec.operand and apply != wide and spec.name in state.solved
        }
        if not rounded:
            state.fresh = False
            return view
        exact, rough = (
            self._problem.method.precondition(gradient, chosen, shape, self._inputs.damping).double()
            for chosen in (view, view | rounded)
        )
        length = exact.norm().item()
        if not 0.0 < length < math.inf:  # no gradient that could tell
            return view
        state.fresh = False
        error = (rough - exact).norm().item() / length
        if error <= TURNED:
            state.solved |= rounded
            return state.view()
        if self._problem.assignment.owner[name] == self._comm.rank:
            self.solver.tell_wide(name, error)
        return view

    def _share(self, name: str, view: State, update: Tensor, ready: bool) -> Tensor | float:
        """<U, F U> / <U, (F + damping) U>, 0 for a plain gradient; NaN for what is no such U, or has no length."""
        method, shape = self._problem.method, self._problem.shapes[name]
        if not method.is_damped(shape) or self._problem.assignment.owner[name] != self._comm.rank:
            return math.nan
        if not ready or not self._problem.has_curvature(name, view):
            return 0.0
        unit = update / size_of(update)
        curved = method.quadratic(unit, view, shape).double()
        return curved / (curved + method.damping_form(unit, view, shape, self._inputs.damping).double())

    def _keep_averages(self) -> None:
        """Drops the moving averages of layers whose optimizer has a momentum by now; the others take in the step."""
        controls, rank, works_on = self._inputs.controls, self._comm.rank, self._problem.assignment.works_on
        momenta = {name: c.momentum for name, c in controls.items() if c.momentum and works_on(rank, name)}
        for name in controls:
            if name not in momenta:
                self._states[name].momentum.clear()
        self._liveliness.step(momenta)

    def _averaged(self, gradient: Tensor, state: LayerState, momentum: float) -> Tensor:
        """The gradient, or what momentum makes of it, in the workspace."""
        if not momentum:
            return gradient
        average = state.momentum.get("average")
        if average is None:
            # As a checkpoint would bring it back: kernels for other strides may round differently.
            state.momentum["average"] = gradient.clone(memory_format=torch.contiguous_format)
            return gradient
        average.lerp_(gradient, 1.0 - momentum)
        return torch.lerp(gradient, average, momentum, out=self._workspace.like("averaged", gradient))

    def _is_ready(self, name: str, view: State) -> bool:
        """Whether the layer has what the method needs; before its first statistics it takes the plain gradient."""
        return all(
            spec.name in view
            for spec in self._problem.specs[name]
            if spec.needed
            and (spec.role == "solved" or spec.reduce_at == "statistics" or spec.reduce in ("gather", "none"))
        )

    def _agree(self) -> None:
        refreshed = 0.0
        for layer, part in self.solver.renewed:
            units = self._problem.units[layer]
            solvers = self._problem.assignment.solvers[layer, part]
            refreshed += 1.0 / len(units) / len(solvers)
        self._agreed = self.agreement.reduce(self._inputs, refreshed, self.solver.failures, self._changes())
        if not self._agreed.applied:
            for state in self._states.values():  # what is not finite would stay so
                state.momentum.clear()

    def _changes(self) -> dict[str, float | None]:
        """By layer whose refresh began: how much its factors have changed, measured by its owner alone."""
        changes: dict[str, float | None] = {}
        if self._adapt is None:
            return changes
        for name in self._due.starting:
            changes[name] = None
            state = self._states[name]
            names = [spec.name for spec in self._problem.specs[name] if spec.role == "running" and not spec.rebased]
            factors = {key: state.running[key] for key in names if key in state.running}
            if factors and self._problem.assignment.owner[name] == self._comm.rank:
                if state.remembered:
                    changes[name] = self._adapt.measure(state.remembered, factors)
                state.remembered = self._adapt.remember(factors)
        return changes
