"""Figures of a run: seconds by phase, and what happened since the last row of metrics."""

from __future__ import annotations

import statistics
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from hpc_kfac import StepReport
from hpc_kfac.timing import Timeline, timed
from hpc_kfac.training.launch import Ranks

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
    """

    def __init__(self, timeline: Timeline | None = None) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self._timeline = timeline or Timeline()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Adds the time spent in the block."""
        start = time.perf_counter()
        with timed(self.seconds, name):
            yield
        self._timeline.span(name, "trainer", start, time.perf_counter())

    def take(self) -> dict[str, float]:
        """The seconds since the last call."""
        seconds, self.seconds = dict(self.seconds), defaultdict(float)
        return seconds


PHASES = (
    "data", "forward", "backward", "gradient_allreduce", "statistics", "factor_allreduce", "refresh", "broadcast",
    "precondition", "update",
)  # fmt: skip


def phases_over_ranks(seconds: Mapping[str, float], ranks: Ranks) -> dict[str, dict[str, float]]:
    """Minimum, mean and maximum over ranks of each phase. Collective."""
    names = dict.fromkeys([*PHASES, *seconds])
    everyone = ranks.gather(dict(seconds))
    table = {}
    for name in names:
        values = [one.get(name, 0.0) for one in everyone]
        table[name] = {"min": min(values), "mean": statistics.fmean(values), "max": max(values)}
    return table


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


COUNTS = ("steps", "skipped", "failures", "samples")


class Interval:
    """What happened since the last row of metrics.

    Args:
        started: seconds of training before it.
    """

    def __init__(self, started: float = 0.0) -> None:
        self.started = started
        self.steps = self.skipped = self.failures = self.samples = 0
        self.sums = Sums()

    def add(self, report: StepReport, samples: int) -> None:
        """Takes in a step."""
        self.steps += 1
        self.samples += samples
        self.skipped += not report.applied
        self.failures += report.failures
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
        """Cosine between preconditioned and raw gradient, and share of curvature above the damping, by layer."""
        if not report.layers:
            return {}
        cosine = {name: layer.cosine for name, layer in report.layers.items()}
        median = statistics.median(cosine.values())
        self.lowest = median if self.lowest is None else min(self.lowest, median)
        return {
            "kl_scale": report.kl_scale,
            "damping": report.damping,
            "cosine": median,
            "layer_cosine": cosine,
            "layer_curvature_share": {name: layer.curvature_share for name, layer in report.layers.items()},
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
