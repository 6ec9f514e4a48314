"""The preconditioner: executes the plan of each step. The only place where layers, methods and ranks meet."""

from __future__ import annotations

import weakref
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from hpc_kfac.distributed import (
    Assignment,
    Communicator,
    Kaisa,
    MPICommunicator,
    Watchdog,
    communicator,
)
from hpc_kfac.distributed.world import SERIAL
from hpc_kfac.distributed.wrapping import knows_comm
from hpc_kfac.engine import shares
from hpc_kfac.engine.agreement import Agreed
from hpc_kfac.engine.arguments import CHECKS, check_arguments
from hpc_kfac.engine.execution import Executor
from hpc_kfac.engine.operations import Due, Operation
from hpc_kfac.engine.placing import make_problem, refresh_flops, resident_bytes
from hpc_kfac.engine.plan import Problem
from hpc_kfac.engine.precision import Precision
from hpc_kfac.engine.reduction_ratio import ReductionRatio, check_steers
from hpc_kfac.engine.settling import OPEN, check_means, contradiction, settle, void_graft
from hpc_kfac.engine.state import LayerState, StepInputs
from hpc_kfac.engine.statistics import Collector
from hpc_kfac.engine.step_report import StepReport
from hpc_kfac.engine.timing import Timeline
from hpc_kfac.guards.alike import (
    check_alike,
    check_averaged,
    check_optimizers,
    check_synchronized,
    describe,
    find_averaging,
    parameters_of,
    refuse_gradients,
)
from hpc_kfac.guards.attachments import Attachments
from hpc_kfac.guards.model_changes import ModelChanges
from hpc_kfac.guards.optimizer_facts import BaseOptimizer, Rule, rates_of
from hpc_kfac.guards.optimizer_watch import OptimizerWatch, check_kind
from hpc_kfac.guards.same_weights import DRIFTED, STARTED, check_weights
from hpc_kfac.guards.written import Written
from hpc_kfac.layers import Capture, CapturedLayer, LayerShape
from hpc_kfac.methods import KFAC
from hpc_kfac.methods.method import Method, as_method
from hpc_kfac.notices import Notices, Refused
from hpc_kfac.options.damping import LevenbergMarquardt, as_damping
from hpc_kfac.options.fisher import CrossEntropy, FisherSource, OutputDistribution
from hpc_kfac.options.schedule import RefreshTimes, Schedule
from hpc_kfac.options.step_control import FixedNorm, KLClip, StepControl

PLANS = 256
"""So many plans are kept; an adaptive schedule can make a new one on every step."""


class TrainingDiverged(RuntimeError):
    """Too many optimisation steps in a row had non-finite gradients."""


class Owners(Protocol):
    """What updates the weights of a layer at its owner alone."""

    def check_synchronized(self) -> None:
        """Raises Refused unless owners have the averaged gradients."""

    def preconditioned(self, applied: bool) -> None:
        """They are preconditioned now; unless `applied`, the step is left out."""


@dataclass
class Resting:
    """A layer that has been frozen while training.

    Attributes:
        layer: as it was captured.
        state: its curvature.
        times: where it stood in the schedule.
        since: the first step without it.
        folds: of statistics, at that step.
    """

    layer: CapturedLayer
    state: LayerState
    times: Any
    since: int
    folds: int


class States(dict[str, LayerState]):
    """Curvature by layer; what is asked for a layer that rests, or is left to the optimizer, is not among the items."""

    def __init__(self, resting: Mapping[str, Resting], layers: Iterable[str]) -> None:
        super().__init__({name: LayerState() for name in layers})
        self._resting = resting

    def __missing__(self, name: str) -> LayerState:
        return self._resting[name].state if name in self._resting else LayerState()


class Preconditioner:
    """Preconditions the averaged gradients of a model, layer by layer, spread over ranks.

    Args:
        model: the model; supported layers with trainable parameters are captured, the rest is left to the optimizer.
        optimizer: the optimizer that takes the preconditioned gradients. Its groups, learning rates and momentum are
            read in every step: `KLClip` needs the learning rate, `FixedNorm` and `Orthogonal` the momentum.
        method: the curvature method; a class, or a name of `METHODS`, stands for one with its own settings.
        placement: which ranks decompose and precondition which layers.
        schedule: when statistics are taken and factors decomposed; None, and intervals that are None, for the method's.
        step_control: Orthogonal, FixedNorm, TrustRegion, KLClip, or None for none; "method" for what the method wants.
        fisher: "empirical" uses the training gradients; "sampled" draws labels from the model, "exact" sums over all
            outputs; these two need `observe` on every step. None for what the method wants.
        precision: dtypes of running averages, decompositions and application.
        comm: the ranks whose gradients are averaged: an mpi4py communicator or a torch.distributed process group; None
            for one process; "serial" for one process that works alone though others run beside it.
        skip: fnmatch patterns of layer names that are left to the optimizer.
        weight_sharing: "expand" counts every position as a sample, "reduce" sums over them first (Eschenhagen
            et al. 2023).
        seed: for sampled labels.
        max_skipped: so many non-finite steps in a row raise `TrainingDiverged`.
        micro_batches: forward and backward passes of one optimisation step. With the last one, factors are reduced
            while the backward pass goes on.
        check_weights_every: steps between two checks that all ranks have the same weights; None never checks.
        stall_seconds: a collective that takes longer than this ends the job with a message that names it and the ranks
            that are missing; None waits for ever. Over mpi4py only.

    Raises:
        ValueError: an argument of another kind or out of range, a model without a layer that can be captured, KLClip
            without an optimizer, no `comm` where torch.distributed, Horovod or MPI has several processes, other
            layers or settings than on rank 0, an optimizer with a momentum of 1 under a length rule, or
            `LevenbergMarquardt` where its ratio steers nothing.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Any = None,
        *,
        method: Method | type[Method] | str | None = None,
        placement: Kaisa | None = None,
        schedule: Schedule | None = None,
        step_control: StepControl | Literal["method"] = OPEN,
        fisher: FisherSource | None = None,
        precision: Precision | None = None,
        comm: Any = None,
        skip: Sequence[str] = (),
        weight_sharing: Literal["expand", "reduce"] = "expand",
        seed: int = 0,
        max_skipped: int = 10,
        micro_batches: int = 1,
        check_weights_every: int | None = None,
        stall_seconds: float | None = None,
    ) -> None:
        given = locals() | {"method": as_method(method)}
        check_arguments({name: given[name] for name in CHECKS})
        self.method: Method = given["method"] or KFAC()
        self.settled = settle(self.method, schedule, fisher, step_control)
        told = contradiction(self.method, fisher)
        schedule, fisher, step_control = self.settled.schedule, self.settled.fisher, self.settled.step_control
        if isinstance(step_control, KLClip) and step_control.needs_learning_rate and optimizer is None:
            raise ValueError("KLClip needs the learning rate: pass optimizer=..., or step_control=None")
        check_kind(optimizer)
        self.damping = as_damping(self.method.damping)
        self.schedule = schedule
        self.step_control: StepControl = step_control
        self.precision = precision or Precision()
        self.steps = 0
        self.failures = 0
        self.skipped = 0
        self.retired = self._closed = False
        self.timings: dict[str, float] = defaultdict(float)
        # A second preconditioner may be meant for this process alone: the script knows of comm= by then.
        alone = comm is None and knows_comm() and not hasattr(optimizer, "synchronize")
        self._comm = communicator(SERIAL if alone else comm)
        self._comm_is_lent = self._comm is comm
        self.capture = Capture(
            model,
            skip=skip,
            weight_sharing=weight_sharing,
            dtype=self.precision.factors,
            rows=self.precision.moments,
        )
        shapes = {name: layer.shape for name, layer in self.capture.layers.items()}
        try:
            check_means(self.method, fisher, shapes)
            if isinstance(self.damping, LevenbergMarquardt):
                check_steers(self.method, shapes, step_control)
        except ValueError:
            self.capture.remove()
            raise
        modules = {name: layer.module for name, layer in self.capture.layers.items()}
        self._attachments = Attachments(self, modules, self.capture.place, self.capture.remove)
        self._checked = self._comm.size == 1
        self._check_alike(
            {
                "method": self.method,
                "placement": placement or Kaisa(),
                "schedule": self.schedule,
                "step_control": step_control,
                "fisher": fisher,
                "precision": self.precision,
                "weight_sharing": weight_sharing,
                "seed": seed,
                "max_skipped": max_skipped,
                "micro_batches": micro_batches,
                "check_weights_every": check_weights_every,
                "stall_seconds": stall_seconds,
            }
        )
        self._resting: dict[str, Resting] = {}
        self._averaging: list[weakref.ref[Any]] | None = None  # Horovod's, as far as they have been looked for
        self._owners: Callable[[], Owners | None] = lambda: None
        self.states = States(self._resting, self.capture.layers)
        self._device = next(model.parameters()).device
        self._model, self._base = model, BaseOptimizer(optimizer, self.capture.layers)
        self._max_skipped = max_skipped
        self._scale_known = fisher != "empirical"
        self._check_weights_every = check_weights_every
        self._skipped_in_row = 0
        self.notices = Notices(self._comm.rank)
        if alone:
            self.notices.once(
                "alone",
                "comm is not given, though another preconditioner of this process has one: this one works alone, with"
                f' its own samples; comm="{SERIAL}" says so, and pass the comm of the other one if it is not meant',
            )
        if told:
            self.notices.once("fisher", told)
        if void := void_graft(self.method, step_control):
            self.notices.once("graft", void)
        self._watchdog = None
        if stall_seconds is not None and isinstance(self._comm, MPICommunicator) and self._comm.size > 1:
            self._watchdog = Watchdog(self._comm.mpi, self._comm.monitor, stall_seconds)
            self._attachments.add(self._watchdog.stop)
        self._placement = placement or Kaisa()
        self._problem = self._place(shapes)
        self._placed = self._problem.assignment  # of all layers that there were
        self._control = step_control
        self._controls(self._base.rules())
        self._watch = OptimizerWatch(optimizer, self.capture.layers, step_control, self.notices)
        self._attachments.add(self._watch.remove)
        self._times = RefreshTimes(self.schedule, refresh_flops(self._problem))
        self.timeline = Timeline(self._comm.rank)
        self._executor = Executor(
            model,
            self.capture.layers,
            self.states,
            self._problem,
            self._comm,
            step_control,
            self.schedule.adapt,
            self.timings,
            self.timeline,
        )
        self._attachments.add(self._executor.solver.stop)
        self._plans: dict[tuple[Due, int], tuple[Operation, ...]] = {}
        self._ratio = ReductionRatio(model, self.capture.layers, self.states, self._problem, self.trainers)
        self._capture_own()
        self._changes = ModelChanges(
            model, self.capture, optimizer, self.trainers, self.notices, skip, self.assignment.helpers == 0
        )
        self._collector = Collector(
            self.capture,
            self.method,
            self._problem.shapes,
            self.states,
            fisher,
            seed,
            self._comm.rank,
            self._comm.size,
            micro_batches,
            self._executor.ready,
            self.timings,
            self.notices,
        )
        if "fisher" in self.settled.from_method:
            self._collector.wanted_by = type(self.method).__name__
        self._written = Written(self.capture)
        self._attachments.claim()
        self._start_step()

    def __repr__(self) -> str:
        """Method, layers, placement and ranks. Local."""
        placed, share = self.assignment, 100 * self.capture.coverage
        return (
            f"Preconditioner({self.method!r},\n"
            f"  {len(self.capture.layers)} layers with {share:.1f} % of the trainable parameters,\n"
            f"  placement: {placed.workers} of {placed.trainers} rank(s) a layer, factors {placed.factors!r},"
            f" helpers {placed.helpers},\n  rank {self._comm.rank} of {self._comm.size}, step {self.steps})"
        )

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise Refused(
            "a preconditioner cannot be copied or pickled: it has hooks on its model, and communicators. Save its "
            "state_dict(), or make a new Preconditioner for the copied model and load that into it"
        )

    # What the user calls

    @torch._disable_dynamo
    def observe(
        self,
        outputs: Tensor,
        loss: OutputDistribution | None = None,
        count: int | None = None,
        mask: Tensor | None = None,
        loss_scale: float = 1.0,
        sample_index: Tensor | None = None,
    ) -> None:
        """Says what the outputs of this forward pass stand for. Call it before `loss.backward()`, once per micro-batch.

        Not needed for the empirical Fisher of a mean loss over the samples of the batch. Without it the number of loss
        terms is that of the last captured layer's samples.

        Args:
            outputs: the model's outputs [N, ...].
            loss: the distribution that they stand for; CrossEntropy by default.
            count: number of terms that the mean loss runs over on this rank; by default the mask's, else the loss's.
            mask: [N, ...] True where a position counts (padding, ignore_index), or flat. Layers that see the positions
                flattened, time first, or pooled take it as their shape tells.
            loss_scale: the tensor on which backward() is called is loss_scale times the loss; the gradient scaler's
                scale times one over the accumulation steps, for example.
            sample_index: [N] number of each sample in the whole batch over all ranks, so that sampled labels do not
                depend on the rank count.

        Raises:
            ValueError: an argument that has no meaning, or does not fit the outputs.
            Refused: outputs without a graph, under the sampled and exact Fisher; or it comes after the backward pass.
        """
        self._attachments.check()
        if not self.capture.armed or not torch.is_grad_enabled():  # the second in an evaluation
            return
        self._scale_known = self._scale_known or loss_scale != 1.0
        loss = CrossEntropy() if loss is None else loss
        self._collector.observe(outputs, loss, count, mask, loss_scale, sample_index)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leaves the forward and backward passes inside out of the statistics; their gradients count all the same."""
        before, self.capture.paused = self.capture.paused, True
        try:
            yield
        finally:
            self.capture.paused = before

    @torch._disable_dynamo
    @torch.no_grad()
    def step(self, scalars: Mapping[str, float] | None = None, log: bool = False) -> StepReport:
        """Replaces the averaged gradients in `.grad` by preconditioned ones. Once per optimisation step, on all ranks.

        Unscaling (`scaler.unscale_(optimizer)`) and clipping (`clip_grad_norm_`) come before it.

        Args:
            scalars: numbers to be summed over ranks in the step's one scalar reduction; the same names on every rank.
            log: report cosine and curvature share of every layer.

        Returns:
            A report, equal on all ranks. If it says `applied=False`, skip the optimizer step; one that is taken all the
            same finds no gradients and changes nothing.

        Raises:
            TrainingDiverged: more than `max_skipped` steps in a row were not finite; on all ranks alike.
            RuntimeError: the step had more passes than `micro_batches`.
            Refused: the sampled or exact Fisher without `observe`; gradients that are not averaged, which the first
                step and checks of weights compare in full and every step in one parameter, optimizers or learning
                rates that differ, both on all ranks alike, and the step is left out; the rank is a helper; owners
                update, and `synchronize` did not come before; it was removed or replaced by a later one; it comes
                twice for one backward pass; the last step's gradients were not cleared; or the optimizer has none of
                the model's parameters, on all ranks alike.
            WeightsDiffer: the ranks' weights differ in the first step, or have drifted apart; on all ranks alike.
        """
        self._attachments.check()
        if self._comm.rank >= self.assignment.trainers:
            raise Refused(
                f"rank {self._comm.rank} is a helper (placement helpers={self.assignment.helpers}) and takes no steps:"
                " call preconditioner.serve() there in place of the training loop, and preconditioner.close() on the"
                " other ranks after it"
            )
        owners = self._owners()
        if owners is not None:
            owners.check_synchronized()
        training = self._base.optimizer is not None
        self._written.check(self.notices, refuse=training)
        if self._comm.size > 1:
            self._check_ranks()
        self._changes.look(self.steps == 0 or self._due.statistics, self._collects)
        found, self._collector.left = self._changes.found, self._changes.left
        if found or self._changes.left != self._executor.left:
            self._executor.leave(self._changes.left)
        rules = self._base.rules()
        self._watch.check_groups(rules, self._model)
        if self._collects:
            self._collector.finish_passes()
            self._written.check_cleared(self._collector.passes, self.notices, training)
        rates = {name: rule.learning_rate for name, rule in rules.items()}
        damping = self.damping.at(self.steps, max(rates.values(), default=0.0))
        controls = self._controls(rules)
        inputs = StepInputs(self.steps, damping, rates, scalars or {}, log, self._collector.fold, controls, found)
        inputs.rates = rates_of(rules.values())
        rule = self.damping if isinstance(self.damping, LevenbergMarquardt) and not self.retired else None
        self._ratio.due = rule is not None and rule.due(self.steps)
        if self._ratio.due:
            self._ratio.remember()
        plan = self._plan(self._due, self._executor.scalars(self._due, inputs))
        agreed = self._run(plan, inputs)
        for layer, change in agreed.changes.items():
            self._times.record(layer, self.steps, change)
        report = StepReport(
            applied=agreed.applied,
            kl_scale=agreed.kl_scale,
            damping=inputs.damping,
            statistics=self._due.statistics,
            refreshed=agreed.refreshed,
            failures=agreed.failures,
            staleness=self._staleness(),
            scalars=agreed.scalars,
            layers=agreed.layers,
            uphill=agreed.uphill,
        )
        if report.uphill and report.applied:
            self._tell_uphill(report)
        if controls and report.applied:
            self._even_out(rules)
        self._watch.written(report.applied, self._is_linear, report.statistics)
        self._count_skipped(report.applied)
        if report.statistics:
            self._collector.finish(report.applied)
        if not report.applied:
            self._times.overdue(self._due.starting, self.steps)
        self.failures += report.failures
        self.steps += 1
        if agreed.changed:
            self._follow()
        if owners is not None:
            owners.preconditioned(report.applied)
        self._start_step()
        self._written.note(report.applied)
        if agreed.differing:
            self._refuse_differing(agreed.differing)
        return report

    @property
    def damping_due(self) -> bool:
        """Whether `adapt_damping` has something to do after the step just taken."""
        return self._ratio.due

    @torch._disable_dynamo
    def adapt_damping(self, evaluate: Callable[[], float], loss: float) -> None:
        """The Levenberg-Marquardt rule; does nothing unless `damping_due`. Collective, after `optimizer.step()`.

        Args:
            evaluate: the local mean loss of the batch just used, with the new weights.
            loss: the same with the old weights.
        """
        if self._ratio.due and isinstance(self.damping, LevenbergMarquardt):
            self.damping.adjust(self._ratio.measure(evaluate() - loss, self.damping.current))

    @torch._disable_dynamo
    def retire(self) -> None:
        """Ends statistics, decompositions and preconditioning for good and frees their memory; step control goes on.

        Between two steps, on all ranks alike.
        """
        self.retired = True
        self._watch.retire()
        self._executor.abandon()
        self._executor.solver.restore({})
        for name, state in self.states.items():
            self.states[name] = LayerState(momentum=state.momentum)
        for rest in self._resting.values():
            rest.state = LayerState(momentum=rest.state.momentum)
        self._start_step()

    def raise_damping(self, factor: float) -> None:
        """More damping from here on, for a run whose steps went wrong."""
        self.damping.raise_by(factor)

    def summary(self) -> str:
        """What is captured and what is left out, and what the method decided that was left open, in words."""
        told = self.settled.told(type(self.method).__name__)
        return f"{self.capture.summary()} {told}".rstrip()

    def factors(self, layer: str) -> dict[str, Tensor]:
        """Copies of a layer's running averages on this rank, such as "A" [p, a, a] and "G" [p, o, o] of K-FAC.

        Between two reductions each rank has averages of its own samples; a rank that keeps none has none.

        Args:
            layer: name of the module.

        Raises:
            ValueError: no such layer is captured.
        """
        if layer not in self.states:
            some = ", ".join(repr(name) for name in list(self.states)[:5])
            raise ValueError(f"layer {layer!r} is not captured; the captured layers are {some}")
        return {name: tensor.clone() for name, tensor in self.states[layer].running.items()}

    def plan(self, step: int) -> tuple[Operation, ...]:
        """The operations of a step."""
        due = self._due_at(step)
        return self._plan(due, self._executor.scalars(due, StepInputs(step, 0.0, {}, {}, False, lambda: None)))

    def memory(self) -> dict[str, dict[str, int]]:
        """Bytes of curvature state that this rank holds after a refresh: layer -> role -> bytes."""
        return resident_bytes(self._problem, self._comm.rank)

    @property
    def assignment(self) -> Assignment:
        """Which rank does what."""
        return self._problem.assignment

    @property
    def comm(self) -> Communicator:
        """All ranks."""
        return self._comm

    @property
    def trainers(self) -> Communicator:
        """All ranks but the helpers."""
        return self._executor.groups.trainers

    def update_at_owners(self, owners: Owners) -> None:
        """From now on only a layer's owner gets its preconditioned gradient, as `OwnerOptimizer` wants it.

        Args:
            owners: updates; held weakly.
        """
        self._owners = weakref.ref(owners)
        self._problem = replace(self._problem, share=False)
        self._ratio.sharded = self._collector.doubts.sharded = True
        self._plans.clear()
        self._start_step()

    def serve(self, save: Callable[[int, dict[str, Any]], str] = lambda step, share: "") -> bool:
        """What a helper rank does instead of training: decomposes for the trainers until they `close`.

        Args:
            save: writes this rank's share of a checkpoint of a step, and returns what the trainers are to know of it.

        Returns:
            False if they have failed.
        """
        return self._executor.serve(lambda due: self._plan(due, 0), lambda step: save(step, self._own_share()))

    def order_save(self, step: int) -> Callable[[], list[str]]:
        """Has the helper ranks save; on all trainers. Calling the result waits for what they tell of it."""
        return self._executor.order_save(step)

    def close(self, failed: bool = False) -> None:
        """Lets the helper ranks go and ends the watchdog; call it on all trainers after the last step."""
        if not self._closed:
            self._closed = True
            self._executor.close(failed)
        if self._watchdog is not None:
            self._watchdog.stop()

    @torch._disable_dynamo
    def remove(self) -> None:
        """Takes everything off the model and gives back memory, threads and communicators. Between two steps.

        Collective; lets the helper ranks go as `close` does. The model then trains as if there had been no
        preconditioner, and `step` raises Refused. A second call does nothing.

        A preconditioner that is dropped is taken off its model, too; only its communicators are not given back then,
        for ranks need not come to it together. One that is made later for the same layers takes the hooks over: the
        earlier one refuses to step until the later one is removed or dropped.
        """
        if self._attachments.removed:
            return
        self._executor.abandon()
        if self._comm.rank < self.assignment.trainers:
            self.close()
        self._attachments.end()
        for name in self.states:
            self.states[name] = LayerState()
        self._executor.release()
        self._free_communicators()

    @property
    def waited(self) -> float:
        """Seconds that this rank has been blocked in collectives of the preconditioner."""
        return self._executor.waited

    @property
    def traffic(self) -> Counter[str]:
        """Payload bytes that this rank has posted, by operation."""
        return self._comm.traffic

    def state_dict(self) -> dict[str, Any]:
        """This rank's curvature state; tensors are references, as in torch."""
        return {
            **self._counters(),
            "method": shares.method_of(self._problem),
            "layers": shares.save(self.states),
            "pending": self._executor.solver.pending(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores `state_dict`.

        Raises:
            ValueError: the method, the layers, their tensors or a tensor's shape are others. Nothing is changed then.
        """
        self._settle()
        shares.check_method(state, self._problem)
        states = shares.restore(state["layers"], self._problem, self._device)
        self._load(state, states, shares.own_pending(state["pending"], self._device))

    @property
    def reduced(self) -> bool:
        """No rank has running averages of its own, so that owners alone have something to save; equal on all ranks."""
        return not any(
            self._problem.differs(spec, self.states[name])
            for name, specs in self._problem.specs.items()
            for spec in specs
            if spec.reduce == "mean"
        )

    def share(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """What all ranks have in common, and what this rank has to save for all: see `shares`. Collective.

        Tensors are references; symmetric ones are marked as `linalg.packing.Symmetric`.
        """
        common = shares.common(self.states, self._problem, self.trainers)
        common |= {"waiting": self.schedule.lag > 0, **self._counters()}
        return common, self._own_share()

    def load_shares(self, common: Mapping[str, Any], of: Callable[[int], Mapping[str, Any]]) -> None:
        """Restores what `share` gave on any number of ranks, with any placement.

        Args:
            common: what all ranks had in common.
            of: gives the share of a rank, which is asked for only if it is needed here.

        Raises:
            ValueError: the method, the layers, their tensors or a tensor's shape are others. Nothing is changed then.
        """
        self.prepare_shares(common, of)()

    def prepare_shares(self, common: Mapping[str, Any], of: Callable[[int], Mapping[str, Any]]) -> Callable[[], None]:
        """Reads and checks what `load_shares` restores; the result puts it in place. As `load_shares`."""
        self._settle()
        saved = shares.Shares.of_saved(common, of, self._problem)
        rank, device = self._comm.rank, self._device
        states = shares.take(saved, self._problem, rank, device)
        pending = shares.take_pending(saved, self._problem, rank, device)
        return lambda: self._load(common, states, pending)

    def keep(self) -> Callable[[], None]:
        """The result puts back the state as it is now, between two steps."""
        self._settle()
        counters, states, pending = self._counters(), dict(self.states), self._executor.solver.pending()
        return lambda: self._load(counters, states, pending)

    # A model that changes

    def _run(self, plan: tuple[Operation, ...], inputs: StepInputs) -> Agreed:
        try:
            agreed = self._executor.run(plan, self._due, inputs)
        except RuntimeError as error:
            if reason := self._changes.explain():
                raise Refused(reason) from error
            raise
        if agreed.changed:
            self._changes.agree()
            fresh = {layer.name: layer for layer in self._changes.fresh if agreed.applied}
            rules, control = BaseOptimizer(self._base.optimizer, fresh).rules(), self._control
            if isinstance(control, FixedNorm):
                self._executor.bound(fresh, {n: control.under(r.momentum, r.dampening) for n, r in rules.items()})
        return agreed

    def _follow(self) -> None:
        """Goes on with the layers that the model has now. Collective where costs are measured."""
        before = dict(self.capture.layers)
        self._changes.take()
        layers = self.capture.layers
        for name in [name for name, layer in before.items() if layers.get(name) is not layer]:
            state, times = self.states.pop(name), self._times.leave(name)
            self._resting[name] = Resting(before[name], state, times, self.steps, self._collector.folds)
        shapes = {name: layer.shape for name, layer in layers.items()}
        back = {n: self._resting.pop(n) for n in layers if n not in self.states and n in self._resting}
        back = {n: rest for n, rest in back.items() if _goes_on(rest.layer, layers[n])}
        new = {name: shape for name, shape in shapes.items() if name not in self.states and name not in back}
        if new:
            more = self._place(new).assignment
            solvers = {unit: ranks for unit, ranks in self._placed.solvers.items() if unit[0] not in new}
            owner, solvers = {**self._placed.owner, **more.owner}, {**solvers, **more.solvers}
            if self._ratio.sharded:  # what owners update stays with them
                owner |= self._placed.owner
                solvers |= {unit: (owner[unit[0]],) for unit in more.solvers}
            self._placed = replace(self._placed, owner=owner, solvers=solvers)
        for rest in back.values():
            rest.state.age(self.method.decay ** (self._collector.folds - rest.folds))
        states = {**self.states, **{name: rest.state for name, rest in back.items()}}
        self.states.clear()
        self.states.update({name: states.get(name, LayerState()) for name in layers})
        owner = {name: self._placed.owner[name] for name in layers}
        solvers = {unit: ranks for unit, ranks in self._placed.solvers.items() if unit[0] in layers}
        assignment = replace(self._placed, owner=owner, solvers=solvers)
        self._problem = replace(self._problem, shapes=shapes, assignment=assignment)
        costs = refresh_flops(self._problem)
        joined = {name: costs[name] for name in layers if name in new or name in back}
        self._times.join(joined, self.steps, {n: (rest.times, rest.since) for n, rest in back.items()})
        self._executor.follow(self._problem)
        self._ratio.follow(self._problem)
        self._collector.follow(shapes)
        self._capture_own()
        self._attachments.take({name: layer.module for name, layer in layers.items()})
        self._plans.clear()

    def _settle(self) -> None:
        """Follows changes of the model between two steps."""
        if self._changes.settle():
            self._follow()
            self._start_step()

    def _place(self, shapes: Mapping[str, LayerShape]) -> Problem:
        return make_problem(shapes, self.method, self._placement, self.precision, self._comm, self._device)

    def _capture_own(self) -> None:
        if self.assignment.factors == "local":
            self.capture.only = frozenset(n for n in self.states if self._problem.collects(self._comm.rank, n))

    @property
    def _collects(self) -> bool:
        """Whether statistics of captured passes are due."""
        return self._due.statistics and self.method.reads == "samples"

    @property
    def _is_linear(self) -> bool:
        """Whether an update of a scaled loss is scaled alike."""
        known = self._scale_known and self.method.reads == "samples"
        return self._control is None and (self.retired or known)

    # Small helpers

    def _controls(self, rules: Mapping[str, Rule]) -> dict[str, FixedNorm]:
        """The length rule of each layer under the optimizer's present momentum; empty without a length rule."""
        control = self._control
        if not isinstance(control, FixedNorm):
            return {}
        own = self.method.wants.momentum
        found = {name: control.under(rule.momentum, rule.dampening, own) for name, rule in rules.items()}
        largest = max(rules.values(), key=lambda rule: rule.momentum, default=Rule())
        self.step_control = control.under(largest.momentum, largest.dampening, own)
        kept = max((each.momentum or 0.0 for each in found.values()), default=0.0)
        if kept != self._problem.momentum:
            self._problem = replace(self._problem, momentum=kept)
        return found

    def _even_out(self, rules: Mapping[str, Rule]) -> None:
        """Gives a bias whose group has another momentum than its weight's the length that it has under one."""
        for name, rule in rules.items():
            if rule.bias != 1.0 and name in self.capture.layers and name not in self._executor.left:
                gradient = self.capture.layers[name].parameters[1].grad
                if gradient is not None:
                    gradient.div_(rule.bias)

    def _tell_uphill(self, report: StepReport) -> None:
        first, more = report.uphill[0], len(report.uphill) - 1
        self.notices.once(
            "uphill",
            f"step {self.steps}: the update of layer {first!r}{f' and {more} more' if more else ''} by"
            f" {type(self.method).__name__} pointed uphill (its product with the gradient is below 0, at damping"
            f" {report.damping:g}); the layer takes its gradient whenever that is so, and StepReport.uphill names it."
            " Rounding and approximate solves do that: raise the damping, or give"
            " precision=hk.Precision(solve=torch.float64)",
        )

    def _check_alike(self, settings: Mapping[str, Any]) -> None:
        try:
            check_alike(describe(self.capture.layers, settings), self._comm)
            if not self.capture.layers:
                raise ValueError(f"the model has no layer that can be captured. {self.capture.summary()}")
        except ValueError:  # of all ranks
            if not self._comm_is_lent:
                self._comm.free()
            raise

    def _check_ranks(self) -> None:
        """Whether all ranks still have the same weights, and averaged gradients."""
        check_synchronized([self._base.optimizer])
        if self._averaging is None:
            self._averaging = find_averaging(self._model.parameters())
        if self._averaging:
            check_synchronized([optimizer() for optimizer in self._averaging])
        due = self._check_weights_every and self.steps % self._check_weights_every == 0
        if self._checked and not due:
            return
        weights = dict(self._model.named_parameters()) if due else parameters_of(self.capture.layers)
        check_weights(weights, self.trainers, self.steps, DRIFTED if self._checked else STARTED)
        check_optimizers(self._base.optimizer, self.trainers, self.steps)
        if self._problem.share:
            check_averaged(self.capture.layers, self.trainers, self.steps)
        self._checked = True

    def _refuse_differing(self, what: str) -> None:
        """After a step that was left out since ranks are apart. Collective."""
        if what == "optimizers":
            check_optimizers(self._base.optimizer, self.trainers, self.steps - 1, sure=True)
        agreement = self._executor.agreement
        names = {id(p): name for name, p in parameters_of(self.capture.layers).items()}
        name = names.get(id(agreement.witness), "a parameter")
        refuse_gradients(name, agreement.amount, self.trainers, self.steps - 1)

    def _free_communicators(self) -> None:
        """On all ranks, helpers included. A `Communicator` that was passed as `comm` is left as it is."""
        if self._watchdog is not None:
            self._watchdog.free()
        self._executor.groups.free()
        if not self._comm_is_lent:
            self._comm.free()

    def _counters(self) -> dict[str, Any]:
        return {
            "steps": self.steps,
            "skipped": self.skipped,
            "skipped_in_row": self._skipped_in_row,
            "failures": self.failures,
            "folds": self._collector.folds,
            "retired": self.retired,
            "schedule": self._times.state_dict(),
            "damping": self.damping.state_dict(),
        }

    def _own_share(self) -> dict[str, Any]:
        return shares.share(self.states, self._executor.solver.pending(), self._problem, self._comm.rank)

    def _load(self, counters: Mapping[str, Any], states: Mapping[str, LayerState], pending: Mapping[Any, Any]) -> None:
        names = ("steps", "skipped", "failures", "skipped_in_row", "folds")
        steps, skipped, failures, skipped_in_row, folds = (int(counters[name]) for name in names)
        times, damping = self._times.state_dict(), self.damping.state_dict()
        try:  # what checks comes first
            self._times.load_state_dict(counters["schedule"])
            self.damping.load_state_dict(counters["damping"])
        except Exception:
            self._times.load_state_dict(times)
            self.damping.load_state_dict(damping)
            raise
        self.states.update(states)
        self.steps, self.skipped, self.failures = steps, skipped, failures
        self._skipped_in_row = skipped_in_row
        self.retired = bool(counters.get("retired", False))  # sets of version 0.1 have none
        self._collector.folds = folds
        self._executor.solver.restore(pending)
        self._start_step()

    def _start_step(self) -> None:
        self._attachments.check()
        self._due = self._due_at(self.steps)
        self._executor.begin(self._plan(self._due, 0))
        self._collector.start(self.steps, armed=self._collects)

    def _due_at(self, step: int) -> Due:
        if self.retired:
            return Due()
        times = self._times
        return Due(times.statistics_due(step), times.starting(step), times.landing(step))

    def _staleness(self) -> int:
        started = [step for state in self.states.values() for step in state.refreshed.values()]
        return self.steps - min(started) if started else 0

    def _plan(self, due: Due, scalars: int) -> tuple[Operation, ...]:
        if (due, scalars) not in self._plans:
            if len(self._plans) > PLANS:
                self._plans.clear()
            self._plans[due, scalars] = self._problem.plan(due, scalars)
        return self._plans[due, scalars]

    def _count_skipped(self, applied: bool) -> None:
        if applied:
            self._skipped_in_row = 0
            return
        self.skipped += 1
        self._skipped_in_row += 1
        self._ratio.due = False
        if self._skipped_in_row > self._max_skipped:
            good = self.steps - self._skipped_in_row
            raise TrainingDiverged(
                f"{self._skipped_in_row} steps in a row had non-finite gradients (last good step: {good}); "
                "lower the learning rate or the KL clip, or raise the damping"
            )


def _goes_on(before: CapturedLayer, now: CapturedLayer) -> bool:
    """Whether the curvature of a layer holds on: the same module, with weights of the same shape."""
    return before.module is now.module and before.shape == now.shape
