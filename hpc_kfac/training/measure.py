"""Figures of a run: seconds by phase, and what happened since the last row of metrics."""

from __future__ import annotations

import math
import resource
import statistics
import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import psutil
import torch

from hpc_kfac import Preconditioner, StepReport
from hpc_kfac.cluster.ranks import Ranks
from hpc_kfac.engine.timing import Timeline, timed
from hpc_kfac.linalg import spectrum
from hpc_kfac.training.first_order import FirstOrder

NO_OP_COSINE = 0.95
"""A preconditioned gradient this close to the raw one is no preconditioning."""


class Sums(defaultdict[str, float]):
    """Sums by name."""

    def __init__(self) -> None:
        super().__init__(float)

    def add(self, more: Mapping[str, float]) -> None:
        """Adds numbers by name."""
        for name, value in more.items():
            self[name] += value


class Clock:
    """Seconds by phase.

    Args:
        timeline: gets the phases, too.
        inner: seconds by phase that another counts. What it counts within a phase here is no time of that phase:
            statistics are taken in the middle of the backward pass.
    """

    def __init__(self, timeline: Timeline | None = None, inner: Mapping[str, float] | None = None) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self._timeline = timeline or Timeline()
        self._inner = inner if inner is not None else {}

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Adds the time spent in the block."""
        start, before = time.perf_counter(), sum(self._inner.values())
        with timed(self.seconds, name):
            yield
        self.seconds[name] -= sum(self._inner.values()) - before
        self._timeline.span(name, "trainer", start, time.perf_counter())

    def take(self) -> dict[str, float]:
        """The seconds since the last call."""
        seconds, self.seconds = dict(self.seconds), defaultdict(float)
        return seconds


PHASES = (
    "data", "forward", "backward", "gradient_allreduce", "statistics", "factor_allreduce", "refresh", "broadcast",
    "precondition", "update",
)  # fmt: skip


def over_ranks(own: Mapping[str, Mapping[str, float]], ranks: Ranks) -> dict[str, dict[str, dict[str, float]]]:
    """Minimum, mean and maximum over ranks of each number of each group; 0 where a rank has none. Collective."""
    everyone = ranks.gather({group: dict(numbers) for group, numbers in own.items()})
    table: dict[str, dict[str, dict[str, float]]] = {}
    for group in own:
        names = dict.fromkeys(name for one in everyone for name in one[group])
        table[group] = {}
        for name in names:
            values = [one[group].get(name, 0) for one in everyone]
            spread = {"min": min(values), "mean": statistics.fmean(values), "max": max(values)}
            table[group][name] = {figure: short(value) for figure, value in spread.items()}
    return table


def short(value: float) -> float:
    """A number to 6 digits. Rows have many, and more digits would only make them long."""
    return float(f"{value:.6g}") if math.isfinite(value) else value


def memory(device: torch.device) -> dict[str, int]:
    """Bytes of this process: resident now, at its peak, and the peak of tensors on a CUDA device."""
    found = {
        "resident": psutil.Process().memory_info().rss,
        "peak": 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,  # Linux counts it in kB
    }
    if device.type == "cuda":
        found["device_peak"] = torch.cuda.max_memory_allocated(device)
    return found


class Usage:
    """What a rank has spent since the last row of metrics, and the memory that it takes.

    Args:
        clock: of the trainer.
        preconditioner: has seconds and traffic of its own.
        gradients: bytes that a rank hands to an allreduce of gradients in a step.
        device: of this rank.
    """

    def __init__(
        self, clock: Clock, preconditioner: Preconditioner | FirstOrder, gradients: int, device: torch.device
    ) -> None:
        self._clock, self._preconditioner, self._gradients, self._device = clock, preconditioner, gradients, device
        self._posted: Counter[str] = Counter()

    def row(self, steps: int, ranks: Ranks) -> dict[str, Any]:
        """Seconds by phase, bytes handed to collectives by operation, bytes of memory: over ranks. Collective.

        Args:
            steps: taken since the last row.
            ranks: all that train.
        """
        seconds = dict.fromkeys(PHASES, 0.0) | self._clock.take()
        for name, value in self._preconditioner.timings.items():
            seconds[name] = seconds.get(name, 0.0) + value
        self._preconditioner.timings.clear()
        posted = Counter(self._preconditioner.traffic)
        traffic, self._posted = posted - self._posted, posted
        if self._gradients:
            traffic["gradients"] += steps * self._gradients
        return over_ranks({"phases": seconds, "traffic": traffic, "memory": memory(self._device)}, ranks)


def factor_figures(preconditioner: Preconditioner | FirstOrder, ranks: Ranks) -> dict[str, Any]:
    """Condition, trace and effective rank of each symmetric factor, as its owner has averaged it. Collective.

    Returns:
        ``{"factors": {"condition": {"layer A": ...}, ...}}``; empty without factors.
    """
    if not isinstance(preconditioner, Preconditioner):
        return {}
    layers = preconditioner.capture.layers
    found: dict[str, dict[str, float]] = {}
    for layer, owner in preconditioner.assignment.owner.items():
        if owner != preconditioner.comm.rank:
            continue
        running = preconditioner.states[layer].running
        for spec in preconditioner.method.state(layers[layer].shape):
            if spec.role == "running" and spec.symmetric and spec.name in running:
                values = spectrum.eigenvalues(running[spec.name])
                if values is not None:
                    found[f"{layer} {spec.name}"] = spectrum.figures(values)
    everyone = {name: numbers for part in ranks.gather(found) for name, numbers in part.items()}
    place = {layer: number for number, layer in enumerate(layers)}  # the model's order, whoever owns a layer
    everyone = dict(sorted(everyone.items(), key=lambda entry: place[entry[0].rpartition(" ")[0]]))
    names = dict.fromkeys(figure for numbers in everyone.values() for figure in numbers)
    table = {figure: {name: numbers[figure] for name, numbers in everyone.items()} for figure in names}
    return {"factors": table} if table else {}


def figures(sums: Mapping[str, float], prefix: str) -> dict[str, float]:
    """What the sums of a loss's metrics say: ``<prefix>_loss``, and accuracy or squared error where they are there."""
    terms = sums["terms"]
    if terms == 0:
        return {}
    found = {f"{prefix}_loss": sums["loss_sum"] / terms}
    if "correct" in sums:
        found[f"{prefix}_accuracy"] = sums["correct"] / terms
    if "squared_error_sum" in sums:
        found[f"{prefix}_squared_error"] = sums["squared_error_sum"] / terms
    return found


COUNTS = ("steps", "skipped", "failures", "uphill", "samples")


class Interval:
    """What happened since the last row of metrics.

    Args:
        started: seconds of training before it.
    """

    def __init__(self, started: float = 0.0) -> None:
        self.started = started
        self.steps = self.skipped = self.failures = self.uphill = self.samples = 0
        self.sums = Sums()

    def add(self, report: StepReport, samples: int) -> None:
        """Takes in a step."""
        self.steps += 1
        self.samples += samples
        self.skipped += not report.applied
        self.failures += report.failures
        self.uphill += len(report.uphill)
        self.sums.add(report.scalars)

    def state_dict(self) -> dict[str, Any]:
        """Plain values."""
        counts = {name: getattr(self, name) for name in ("started", *COUNTS)}
        return counts | {"sums": dict(self.sums)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores `state_dict`."""
        for name in ("started", *COUNTS):
            setattr(self, name, state.get(name, getattr(self, name)))
        self.sums.add(state.get("sums", {}))

    def row(self, now: float) -> dict[str, Any]:
        """Figures of the interval, which ends after `now` seconds of training."""
        elapsed = now - self.started
        found = figures(self.sums, "train")
        return {
            "loss": self.sums["objective"] / self.sums["terms"] if self.sums["terms"] else None,
            **{name: value for name, value in found.items() if name != "train_loss"},
            "skipped": self.skipped,
            "uphill": self.uphill,
            "step_seconds": elapsed / self.steps,
            "samples_per_second": self.samples / elapsed,
        }


class Strength:
    """How strongly the layers are preconditioned, over the run.

    Args:
        lowest: median cosine between preconditioned and raw gradients so far.
    """

    def __init__(self, lowest: float | None = None) -> None:
        self.lowest = lowest

    def row(self, report: StepReport) -> dict[str, Any]:
        """KL scale, damping, and the figures of each layer: see `LayerReport`."""
        if not report.layers:
            return {}
        cosine = {name: layer.cosine for name, layer in report.layers.items()}
        median = statistics.median(cosine.values())
        self.lowest = median if self.lowest is None else min(self.lowest, median)
        told = {name: layer.curvature_share for name, layer in report.layers.items()}
        shares = {name: short(value) for name, value in told.items() if value is not None}
        return {
            "kl_scale": report.kl_scale,
            "damping": report.damping,
            "cosine": median,
            "layer_cosine": {name: short(value) for name, value in cosine.items()},
            "layer_curvature_share": shares,
            "layer_update": {name: short(layer.update) for name, layer in report.layers.items()},
            "layer_staleness": {name: layer.staleness for name, layer in report.layers.items()},
        }

    @property
    def warning(self) -> str | None:
        """A sentence if the preconditioner did nothing all along."""
        if self.lowest is None or self.lowest <= NO_OP_COSINE:
            return None
        return (
            f"Warning: no-op. The median cosine between preconditioned and raw gradient was never below"
            f" {self.lowest:.3f}: the damping hides the curvature. Use a smaller damping."
        )
