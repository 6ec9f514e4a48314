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
from hpc_kfac.keyed_random import keyed
from hpc_kfac.training.console import Console
from hpc_kfac.training.evaluation import evaluate, totals
from hpc_kfac.training.launch import RunStopped
from hpc_kfac.training.loader import Batch
from hpc_kfac.training.measure import Clock, Interval, Strength, Sums, phases_over_ranks
from hpc_kfac.training.optimizers import set_learning_rate
from hpc_kfac.training.run_folder import RunFolder
from hpc_kfac.training.setup import Setup


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
    """

    def __init__(self, setup: Setup, folder: RunFolder, console: Console) -> None:
        self.setup, self.folder, self.console = setup, folder, console
        self.run_settings = setup.settings.run
        self.loss = setup.task.loss
        self.optimizer = setup.averaging.optimizer
        self.parameters = [p for p in setup.model.parameters() if p.requires_grad]
        dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(self.run_settings.autocast)
        self.autocast = torch.autocast(setup.device.type, dtype=dtype, enabled=dtype is not None)
        self.scaler = torch.amp.GradScaler(setup.device.type, enabled=dtype is torch.float16)
        self.clock, self.strength, self.interval = Clock(setup.preconditioner.timeline), Strength(), Interval()
        self.step = 0
        self.seconds = 0.0
        self.last_good = "no step yet"
        self.figures: dict[str, float] = {}

    def run(self) -> Result:
        """Trains to the end. Collective.

        Raises:
            RunStopped: the loss is not finite, or too many steps in a row were not.
        """
        self.console.start(self.setup.length.steps)
        self.setup.preconditioner.timeline.recording = self.run_settings.trace_steps > 0
        self.setup.model.train()
        epoch = 0
        while self.step < self.setup.length.steps and self._epoch(epoch):
            epoch += 1
            if epoch % self.run_settings.evaluate_every == 0 and self.step < self.setup.length.steps:
                self._evaluate(epoch)
        self._evaluate(epoch)
        return Result(self.step, self.seconds, self.figures, self.strength.warning)

    def _epoch(self, epoch: int) -> bool:
        """One pass over the training set; False if the run is to end early."""
        start = time.perf_counter() - self.seconds
        for batch in self._timed(self.setup.train.batches(epoch)):
            report = self._step(batch)
            self.seconds = time.perf_counter() - start
            self._record(report, batch)
            self.console.advance()
            if report.scalars["stop"]:
                return False
            if self.step == self.setup.length.steps:
                break
        return True

    def _timed(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        while True:
            with self.clock.phase("data"):
                batch = next(batches, None)
            if batch is None:
                return
            yield batch

    def _step(self, batch: Batch) -> StepReport:
        """One optimisation step."""
        set_learning_rate(self.optimizer, self.setup.learning_rate(self.step))
        self.optimizer.zero_grad()
        parts = self._micro_batches(batch)
        sums = Sums()
        for part in parts:
            with (
                keyed(self.run_settings.seed, self.step, part.indices),
                self.setup.averaging.micro_batch(last=part is parts[-1]),
            ):
                self._forward_backward(part, sums, last=part is parts[-1])
        with self.clock.phase("gradient_allreduce"):
            self._finish_gradients(batch)
        report = self._precondition(sums)
        self._update(report)
        self._adapt_damping(parts, sums)
        self.step += 1
        if self.step == self.run_settings.trace_steps:
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
        over = self.run_settings.max_seconds is not None and self.seconds > self.run_settings.max_seconds
        scalars = {**sums, "stop": float(over)}
        try:
            report = self.setup.preconditioner.step(scalars, log=self._logged(self.step + 1))
        except TrainingDiverged as error:
            raise RunStopped(f"step {self.step}: {error}. {self._state}") from error
        except WeightsDiffer as error:
            raise RunStopped(f"{error}. {self._state}") from error
        if not math.isfinite(report.scalars["objective"]):
            raise RunStopped(
                f"step {self.step}: the loss is {report.scalars['objective']}. {self._state}"
                " Use a smaller learning rate or KL clip, or more damping."
            )
        return report

    def _update(self, report: StepReport) -> None:
        with self.clock.phase("update"):
            if report.applied:
                self.setup.averaging.update(lambda: self.scaler.step(self.optimizer))
                self.last_good = f"step {self.step} with a training loss of {self._mean_loss(report):.4g}"
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
                with keyed(self.run_settings.seed, self.step, part.indices), self.autocast:
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
        if not (self._logged(self.step) or report.scalars["stop"]):
            return
        seconds = self.clock.take()
        for name, value in self.setup.preconditioner.timings.items():
            seconds[name] = seconds.get(name, 0.0) + value
        self.setup.preconditioner.timings.clear()
        row: dict[str, Any] = {
            "kind": "train",
            "step": self.step,
            "epoch": batch.epoch,
            "lr": self.optimizer.param_groups[0]["lr"],
            **self.interval.row(self.seconds),
            **self.strength.row(report),
            "staleness": report.staleness,
            "phases": phases_over_ranks(seconds, self.setup.ranks),
        }
        self.folder.write(row)
        self.console.row(row)
        self.interval = Interval(self.seconds)

    def _evaluate(self, epoch: int) -> None:
        setup = self.setup
        start = time.perf_counter()
        self.figures = evaluate(setup.model, setup.test, self.loss, setup.ranks, setup.device, self.autocast)
        row = {
            "kind": "evaluation",
            "step": self.step,
            "epoch": epoch,
            **self.figures,
            "train_seconds": self.seconds,
            "evaluation_seconds": time.perf_counter() - start,
        }
        self.folder.write(row)
        shown = ", ".join(f"{name} {value:.4g}" for name, value in self.figures.items())
        self.console.say(f"epoch {epoch}: {shown} after {self.seconds:.1f} s of training")

    def _mean_loss(self, report: StepReport) -> float:
        return report.scalars["objective"] / max(1.0, report.scalars["terms"])

    @property
    def _state(self) -> str:
        evaluated = "".join(f", {name} {value:.4g}" for name, value in self.figures.items())
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
