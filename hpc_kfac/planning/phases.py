"""Seconds of the phases of a run's own step, measured on a copy of its model with random inputs."""

from __future__ import annotations

import statistics
import time
from collections import defaultdict

import torch

from hpc_kfac import Preconditioner
from hpc_kfac.cluster.ranks import Ranks
from hpc_kfac.distributed.world import SERIAL
from hpc_kfac.options.schedule import Schedule
from hpc_kfac.planning.machine import PHASES, Machine
from hpc_kfac.planning.run import Run
from hpc_kfac.planning.times import times
from hpc_kfac.training.setup import make_optimizer

STATISTICS, REFRESH = 2, 4  # intervals
FIRST, STEPS = 4, 40  # the first are not counted: kernels are chosen, buffers are filled


def measure_phases(run: Run, machine: Machine, ranks: Ranks, device: torch.device, samples: int) -> dict[str, float]:
    """Phase -> measured seconds over those of the model of time. Collective, though no rank hears of another's step.

    Args:
        run: whose model and settings are taken.
        machine: its own phases are left out of account.
        ranks: all of them measure at the same time; the slowest counts.
        device: of this rank.
        samples: of a rank in a step.
    """
    copy = _Copy(run, device, max(1, samples // run.settings.accumulation))
    found: dict[str, list[float]] = defaultdict(list)
    for step in range(STEPS):
        ranks.gather(None)
        for phase, seconds in copy.step().items():
            if step >= FIRST:
                found[phase].append(seconds)
    medians = {phase: statistics.median(seconds) for phase, seconds in found.items()}
    measured = {phase: max(ranks.gather(seconds)) for phase, seconds in medians.items()}
    foretold = times(run.costs(), run.settings, machine, samples)
    backward = sum(seconds for seconds, _ in foretold.backward)
    micro = run.settings.accumulation
    model = {
        "forward": (foretold.forward - (micro - 1) * backward) / micro,
        "backward": backward,
        "statistics": foretold.extra + sum(foretold.statistics.values()),
        "refresh": sum(foretold.refresh.values()),
        "precondition": sum(foretold.precondition.values()),
        "update": foretold.update,
    }
    return {p: measured[p] / model[p] for p in PHASES if measured.get(p, 0.0) > 0 and model[p] > 0}


class _Copy:
    """The run's model, alone on this rank."""

    def __init__(self, run: Run, device: torch.device, samples: int) -> None:
        torch.manual_seed(0)
        self.run, self.device, self.samples = run, device, samples
        self.model = run.outline.make().train().to(device)
        self.optimizer = make_optimizer(run.given.parts, self.model)
        settings = run.settings
        self.preconditioner = None
        if settings.method is not None:
            self.preconditioner = Preconditioner(
                self.model,
                self.optimizer,
                method=settings.method,
                schedule=Schedule(STATISTICS, REFRESH),
                step_control=settings.control,
                precision=settings.precision,
                comm=SERIAL,
                skip=run.given.run.skip,
                fisher=settings.fisher,  # type: ignore[arg-type]
            )

    def step(self) -> dict[str, float]:
        """Phase -> seconds of one step; without the phases that it does not have."""
        settings, preconditioner = self.run.settings, self.preconditioner
        inputs = batch_of(self.run, self.samples, self.device)
        self.optimizer.zero_grad()
        clock = [now(self.device)]
        with torch.autocast(self.device.type, settings.autocast, enabled=settings.autocast != torch.float32):
            outputs = self.model(inputs)
            loss = torch.log_softmax(outputs, -1).mean().neg()
        clock.append(now(self.device))
        if preconditioner is not None:
            preconditioner.timings.clear()
            preconditioner.observe(outputs)
        clock.append(now(self.device))
        loss.backward()
        clock.append(now(self.device))
        forward, observe, backward = (end - start for start, end in zip(clock, clock[1:], strict=False))
        found = {"forward": forward, "backward": backward}
        if preconditioner is not None:
            in_backward = settings.fisher == "empirical"
            taken = preconditioner.timings.get("statistics", 0.0)
            report = preconditioner.step()
            timings = preconditioner.timings
            found["precondition"] = timings["precondition"]
            if report.statistics:
                found["backward"] -= taken if in_backward else 0.0
                found["statistics"] = timings["statistics"] + (0.0 if in_backward else observe)
            if report.refreshed:
                found["refresh"] = timings["refresh"]
        start = now(self.device)
        self.optimizer.step()
        return {**found, "update": now(self.device) - start}


def batch_of(run: Run, samples: int, device: torch.device) -> torch.Tensor:
    """Random inputs; images with the channels last in memory, as the data sets give them."""
    inputs = run.outline.inputs(samples, device)
    return inputs.contiguous(memory_format=torch.channels_last) if inputs.dim() == 4 else inputs


def now(device: torch.device) -> float:
    """Seconds, once the device is through."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
