"""The training loop."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from hpc_kfac import StepReport, TrainingDiverged, WeightsDiffer
from hpc_kfac.checkpoint import Saved
from hpc_kfac.cluster.errors import LossBlewUp, RunStopped
from hpc_kfac.data.loader import Batch
from hpc_kfac.tasks.dropout import keyed
from hpc_kfac.training.console import Console
from hpc_kfac.training.evaluation import evaluate, totals
from hpc_kfac.training.loop_state import Progress
from hpc_kfac.training.measure import Clock, Interval, Strength, Sums, Usage, factor_figures
from hpc_kfac.training.optimizers import set_learning_rate
from hpc_kfac.training.run_folder import RunFolder
from hpc_kfac.training.saving import Saver
from hpc_kfac.training.setup import Setup

SMALLER_STEP, MORE_DAMPING = 0.5, 4.0
"""What a run whose loss blew up goes on with, times what it had."""


@dataclass
class Result:
    """How a run ended.

    Attributes:
        steps: optimisation steps taken.
        seconds: of training, evaluations aside.
        figures: of the last evaluation.
        warning: what the user should know, or None.
    """

    steps: int
    seconds: float
    figures: dict[str, float]
    warning: str | None


class Loop:
    """Trains.

    Args:
        setup: the parts of the run.
        folder: gets the metrics.
        console: shows them.
        saver: writes checkpoints, and knows when the run is to stop early; None for neither.

    Attributes:
        progress: how far the training has come.
    """

    def __init__(self, setup: Setup, folder: RunFolder, console: Console, saver: Saver | None = None) -> None:
        self.setup, self.folder, self.console, self.saver = setup, folder, console, saver
        self.run_settings = setup.settings.run
        self.loss = setup.task.loss
        self.optimizer = setup.averaging.optimizer
        self.parameters = [p for p in setup.model.parameters() if p.requires_grad]
        dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(self.run_settings.autocast)
        self.autocast = torch.autocast(setup.device.type, dtype=dtype, enabled=dtype is not None)
        self.scaler = torch.amp.GradScaler(setup.device.type, enabled=dtype is torch.float16)
        self.clock = Clock(setup.preconditioner.timeline, setup.preconditioner.timings)
        self.strength, self.interval = Strength(), Interval()
        self.usage = Usage(self.clock, setup.preconditioner, self._allreduced(), setup.device)
        self.progress = Progress()
        self.last_good = "no step yet"
        if saver is not None:
            saver.prepare = self._note_state

    def restore(self, saved: Saved) -> None:
        """Goes on from a checkpoint. Collective.

        Raises:
            InputError: it is another model's, optimizer's or method's, or damaged.
        """
        assert self.saver is not None
        self.progress = self.saver.restore(saved)
        if self.progress.scaler:
            self.scaler.load_state_dict(self.progress.scaler)
        self.interval = Interval(self.progress.seconds)
        self.interval.load_state_dict(self.progress.interval)
        self.strength = Strength(self.progress.strength)
        self.last_good = f"step {saved.step}"

    def run(self) -> Result:
        """Trains to the end. Collective.

        Raises:
            RunStopped: the loss is not finite, or too many steps in a row were not.
            RunInterrupted: the run was asked to stop, and has been saved.
        """
        self.console.start(self.setup.length.steps, self.progress.step)
        self.setup.preconditioner.timeline.recording = self.run_settings.trace_steps > 0
        self.setup.model.train()
        while True:
            try:
                self._train()
                break
            except LossBlewUp as error:
                self._go_back(error)
        self._evaluate(last=True)
        progress = self.progress
        return Result(progress.step, progress.seconds, progress.figures, self.strength.warning)

    def _train(self) -> None:
        """All epochs that are left."""
        progress, steps = self.progress, self.setup.length.steps
        while progress.step < steps or progress.batch == len(self.setup.train):
            if progress.step < steps and not self._epoch():
                return
            if progress.batch == len(self.setup.train):
                progress.epoch, progress.batch = progress.epoch + 1, 0
                self._weigh_curvature()
                if progress.epoch % self.run_settings.evaluate_every == 0 and progress.step < steps:
                    self._evaluate()

    def _weigh_curvature(self) -> None:
        """Ends preconditioning where the loss falls too slowly to pay for it."""
        fallen, least = self.progress.end_epoch(), self.run_settings.retire_below
        if least is None or fallen is None or fallen >= least or self.setup.preconditioner.retired:
            return
        self.setup.preconditioner.retire()
        self.console.say(
            f"The loss fell by {100 * fallen:.2g} % in epoch {self.progress.epoch}, less than retire_below:"
            " from here on gradients are not preconditioned."
        )

    def _epoch(self) -> bool:
        """The rest of a pass over the training set; False if the run is to end early."""
        progress = self.progress
        start = time.perf_counter() - progress.seconds
        for batch in self._timed(self.setup.train.batches(progress.epoch, progress.batch)):
            report = self._step(batch)
            progress.batch += 1
            progress.seconds = time.perf_counter() - start
            self._record(report, batch)
            self.console.advance()
            self._check_loss()
            if self.saver is not None:
                self.saver.after_step(report.scalars, progress)
            if report.scalars["stop"]:
                return False
            if progress.step == self.setup.length.steps:
                break
        return True

    def _note_state(self) -> None:
        """Has the progress hold all that a checkpoint needs of the loop."""
        self.progress.interval = self.interval.state_dict()
        self.progress.strength = self.strength.lowest
        self.progress.scaler = self.scaler.state_dict()

    def _check_loss(self) -> None:
        progress = self.progress
        if progress.blown_up(self.run_settings.blow_up):
            raise LossBlewUp(
                f"step {progress.step}: the loss has blown up to {progress.loss:.4g}, from {progress.lowest_loss:.4g}."
                f" {self._state} Use a smaller learning rate or KL clip, or more damping."
            )

    def _go_back(self, error: LossBlewUp) -> None:
        """Goes on from the last good checkpoint, more carefully, if that was not done too often. Collective."""
        rollbacks = self.progress.rollbacks + 1
        if self.saver is None or rollbacks > self.run_settings.max_rollbacks:
            raise error
        saved = self.saver.last_healthy()
        if saved is None:
            raise error
        step = self.progress.step
        self.setup.averaging.skip()
        self.restore(saved)
        progress = self.progress
        progress.rollbacks, progress.lr_scale = rollbacks, progress.lr_scale * SMALLER_STEP
        self.setup.preconditioner.raise_damping(MORE_DAMPING)
        self.folder.write({"kind": "rollback", "step": step, "to_step": progress.step, "number": rollbacks})
        self.console.go_back(progress.step)
        self.console.say(
            f"Warning: {error}\nBack to step {progress.step} with {progress.lr_scale:g} times the learning rate and"
            f" {MORE_DAMPING:g} times the damping ({rollbacks} of {self.run_settings.max_rollbacks} such returns)."
        )
        self.saver.save(progress)

    def _timed(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        while True:
            with self.clock.phase("data"):
                batch = next(batches, None)
            if batch is None:
                return
            yield batch

    def _step(self, batch: Batch) -> StepReport:
        """One optimisation step."""
        progress = self.progress
        set_learning_rate(self.optimizer, progress.lr_scale * self.setup.learning_rate(progress.step))
        self.optimizer.zero_grad()
        parts = self._micro_batches(batch)
        sums = Sums()
        for part in parts:
            with (
                keyed(self.run_settings.seed, progress.step, part.indices),
                self.setup.averaging.micro_batch(last=part is parts[-1]),
            ):
                self._forward_backward(part, sums, last=part is parts[-1])
        with self.clock.phase("gradient_allreduce"):
            self._finish_gradients(batch)
        report = self._precondition(sums)
        self._update(report)
        self._adapt_damping(parts, sums)
        progress.step += 1
        progress.note_loss(self._mean_loss(report))
        if progress.step == self.run_settings.trace_steps:
            self._write_trace()
        return report

    def _micro_batches(self, batch: Batch) -> list[Batch]:
        device, count = self.setup.device, self.run_settings.accumulation_steps
        inputs = batch.inputs.to(device, non_blocking=True).tensor_split(count)
        targets = batch.targets.to(device, non_blocking=True).tensor_split(count)
        indices = batch.indices.tensor_split(count)
        return [
            Batch(x, y, index, batch.global_size, batch.epoch, batch.index)
            for x, y, index in zip(inputs, targets, indices, strict=True)
        ]

    def _forward_backward(self, part: Batch, sums: Sums, last: bool) -> None:
        """Adds the part's gradients and its sums."""
        # Batch norm can make nothing of no samples. The passes are taken all the same: others wait for the gradients.
        self.setup.model.train(len(part.indices) > 0)
        with self.clock.phase("forward"), self.autocast:
            outputs = self.setup.averaging.forward(part.inputs)
            loss = self.loss(outputs, part.targets)
        terms = self.loss.terms(outputs, part.targets)
        sums.add(
            {"objective": float(loss.detach()) * terms, **totals(self.loss.metrics(outputs.float(), part.targets))}
        )
        if last:  # how many terms there are in all is needed after the backward pass
            self._all_terms = self.setup.ranks.sum_later(sums["terms"])
        # The mean over ranks of the scaled losses is the sum over all terms, per sample of the global batch.
        scale = terms * self.setup.ranks.size / part.global_size
        self.setup.preconditioner.observe(
            outputs,
            loss=self.loss.distribution,
            count=terms,
            mask=self.loss.mask(part.targets),
            loss_scale=scale * self.scaler.get_scale() if terms else 1.0,
            sample_index=part.indices,
        )
        with self.clock.phase("backward"):
            self.scaler.scale(loss * scale).backward()
        self.setup.model.train()

    def _finish_gradients(self, batch: Batch) -> None:
        """Makes `.grad` the gradient of the mean loss over all terms of the global batch."""
        self.setup.averaging.synchronize()
        self.scaler.unscale_(self.optimizer)
        terms = self._all_terms()
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        if terms not in (0, batch.global_size):
            torch._foreach_mul_(gradients, batch.global_size / terms)
        if self.run_settings.clip_gradient is not None:
            norm = self.setup.averaging.gradient_norm()
            nn.utils.clip_grads_with_norm_(self.parameters, self.run_settings.clip_gradient, norm)

    def _precondition(self, sums: Sums) -> StepReport:
        step, longest = self.progress.step, self.run_settings.max_seconds
        over = longest is not None and self.progress.seconds > longest
        scalars = {**sums, "stop": float(over), **(self.saver.scalars() if self.saver is not None else {})}
        try:
            report = self.setup.preconditioner.step(scalars, log=self._logged(step + 1))
        except TrainingDiverged as error:
            raise LossBlewUp(f"step {step}: {error}. {self._state}") from error
        except WeightsDiffer as error:
            raise RunStopped(f"{error}. {self._state}") from error
        if not math.isfinite(report.scalars["objective"]):
            raise LossBlewUp(
                f"step {step}: the loss is {report.scalars['objective']}. {self._state}"
                " Use a smaller learning rate or KL clip, or more damping."
            )
        return report

    def _update(self, report: StepReport) -> None:
        with self.clock.phase("update"):
            if report.applied:
                self.setup.averaging.update(lambda: self.scaler.step(self.optimizer))
                self.last_good = f"step {self.progress.step} with a training loss of {self._mean_loss(report):.4g}"
            else:
                self.setup.averaging.skip()
            self.scaler.update()

    def _adapt_damping(self, parts: list[Batch], sums: Sums) -> None:
        """Lets the Levenberg-Marquardt rule see the same batch again, under the new weights."""
        if self.setup.preconditioner.damping_due:
            loss = sums["objective"] / max(1.0, sums["terms"])
            self.setup.preconditioner.adapt_damping(lambda: self._loss_again(parts), loss)

    @torch.no_grad()
    def _loss_again(self, parts: list[Batch]) -> float:
        total = terms = 0.0
        with _kept_norm_statistics(self.setup.model):
            for part in parts:
                if len(part.indices) == 0:
                    continue
                with keyed(self.run_settings.seed, self.progress.step, part.indices), self.autocast:
                    outputs = self.setup.model(part.inputs)
                    count = self.loss.terms(outputs, part.targets)
                    total += float(self.loss(outputs, part.targets)) * count
                    terms += count
        return total / max(1.0, terms)

    def _write_trace(self) -> None:
        timeline = self.setup.preconditioner.timeline
        timeline.recording = False
        timeline.write(self.folder.path / f"trace_rank{self.setup.ranks.rank}.json")

    def _logged(self, steps: int) -> bool:
        """Whether a row of metrics follows so many steps."""
        return steps % self.run_settings.log_every == 0 or steps == self.setup.length.steps

    def _record(self, report: StepReport, batch: Batch) -> None:
        self.interval.add(report, batch.global_size)
        if not (self._logged(self.progress.step) or report.scalars["stop"]):
            return
        row: dict[str, Any] = {
            "kind": "train",
            "step": self.progress.step,
            "epoch": batch.epoch,
            "lr": self.optimizer.param_groups[0]["lr"],
            **self.interval.row(self.progress.seconds),
            **self.strength.row(report),
            "staleness": report.staleness,
            **self.usage.row(self.interval.steps, self.setup.ranks),
        }
        self.folder.write(row)
        self.console.row(row)
        self.interval = Interval(self.progress.seconds)

    def _allreduced(self) -> int:
        """Bytes of gradients that a rank hands to an allreduce in a step; where owners update, they count their own."""
        reduces = self.setup.averaging.name in ("horovod", "ddp", "mpi4py")
        return sum(p.numel() * p.element_size() for p in self.parameters) if reduces else 0

    def _evaluate(self, last: bool = False) -> None:
        """Evaluates, and saves the best so far, and the last."""
        setup, progress = self.setup, self.progress
        epoch = progress.epoch + (progress.batch > 0)  # one that was begun counts
        start = time.perf_counter()
        progress.figures = evaluate(setup.model, setup.test, self.loss, setup.ranks, setup.device, self.autocast)
        row = {
            "kind": "evaluation",
            "step": progress.step,
            "epoch": epoch,
            **progress.figures,
            **factor_figures(setup.preconditioner, setup.ranks),
            "train_seconds": progress.seconds,
            "evaluation_seconds": time.perf_counter() - start,
        }
        self.folder.write(row)
        shown = ", ".join(f"{name} {value:.4g}" for name, value in progress.figures.items())
        self.console.say(f"epoch {epoch}: {shown} after {progress.seconds:.1f} s of training")
        self._save_evaluated(last)

    def _save_evaluated(self, last: bool) -> None:
        progress, metric = self.progress, self.setup.task.metric
        value = progress.figures.get(f"test_{metric}", math.nan)
        score = value if metric == "accuracy" else -value
        best = not math.isnan(score) and (progress.best_score is None or score > progress.best_score)
        if best:
            progress.best_score = score
        if self.saver is None:
            return
        if last:
            self.saver.end(progress, score)
        elif best and self.saver.keeps_best:
            self.saver.save(progress, score)

    def _mean_loss(self, report: StepReport) -> float:
        return report.scalars["objective"] / max(1.0, report.scalars["terms"])

    @property
    def _state(self) -> str:
        evaluated = "".join(f", {name} {value:.4g}" for name, value in self.progress.figures.items())
        return f"The last good state was {self.last_good}{evaluated}; see {self.folder.path}."


@contextmanager
def _kept_norm_statistics(model: nn.Module) -> Iterator[None]:
    """Within it, forward passes leave the running statistics of batch norms as they are."""
    norms = [module for module in model.modules() if isinstance(module, _NormBase)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = 0.0
    try:
        yield
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
