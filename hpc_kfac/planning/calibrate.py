"""Measures the machine that this runs on, and writes it as a machine file.

All ranks measure at the same time, as they compute at the same time in training: what they share counts. With a run the
phases of its own step are measured too, on a copy of its model and random inputs, and their ratio to what the model of
time says is written beside the rates. Collectives are measured where there are several ranks, under mpirun.
"""

from __future__ import annotations

import os
import platform
import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace

import torch

from hpc_kfac import Preconditioner
from hpc_kfac.cluster.ranks import Ranks, keep_freed_memory, set_threads
from hpc_kfac.distributed import Communicator, lent
from hpc_kfac.distributed.world import SERIAL
from hpc_kfac.options.schedule import Schedule
from hpc_kfac.planning.machine import PHASES, Link, Machine
from hpc_kfac.planning.run import Run
from hpc_kfac.planning.times import times
from hpc_kfac.training.setup import make_optimizer

REPEATS = 7
PRODUCT, DECOMPOSED = 1024, (64, 256, 1024, 2048)
MEMORY = 64 * 2**20  # bytes of a copy, well beyond caches
MESSAGES = (8, 4 * 2**20)


def calibrate(run: Run | None, ranks: Ranks, samples: int | None = None) -> str:
    """The text of a machine file. Collective.

    Args:
        run: whose phases are measured too; None for the machine alone.
        ranks: all of them; they are taken for one node.
        samples: of a rank in a step; by default the run's.
    """
    set_threads(None, ranks)
    keep_freed_memory()
    device = _device(ranks)
    machine = measure_machine(ranks)
    if run is not None:
        if samples is None:
            samples = max(1, run.given.run.global_batch // ranks.size)
        machine = replace(machine, phases=measure_phases(run, machine, ranks, device, samples))
    return f"# Measured by hpc-kfac plan --calibrate; all {ranks.size} rank(s) at the same time.\n{machine.to_yaml()}"


def measure_machine(ranks: Ranks) -> Machine:
    """Rates of one rank while all work. Collective."""
    device = _device(ranks)
    flops = {_name(dtype): _product(dtype, ranks, device) for dtype in (torch.float32, torch.float64, torch.bfloat16)}
    copied = torch.empty(MEMORY // 4, device=device)
    target = torch.empty_like(copied)
    bandwidth = 2 * MEMORY / _seconds(lambda: target.copy_(copied), ranks)
    small = torch.zeros(16, device=device)
    links, overlap, each = _networks(ranks, device, bandwidth)
    return Machine(
        name=platform.node(),
        source=f"measured, torch {torch.__version__}, {torch.get_num_threads()} thread(s) a rank",
        ranks_per_node=ranks.size,
        memory=float(_memory(device) // ranks.size),
        memory_bandwidth=bandwidth,
        flops=flops,
        efficiency=1.0,
        overhead=_seconds(lambda: [small.add_(1.0) for _ in range(100)], ranks) / 100,
        cholesky={n: n**3 / _decomposition(n, False, ranks, device) for n in DECOMPOSED},
        eigen={n: 9 * n**3 / _decomposition(n, True, ranks, device) for n in DECOMPOSED[:-1]},
        inside=links,
        between=links,
        overlap=overlap,
        gradients=each,
    )


def _networks(ranks: Ranks, device: torch.device, bandwidth: float) -> tuple[Link, float, float]:
    """The network, the share of a collective that goes on beside arithmetic, and seconds of each averaged gradient."""
    if ranks.comm is None or ranks.size == 1:
        return Link(1e-6, bandwidth), 1.0, 0.0
    with lent(ranks.comm) as comm:
        small, large = (torch.zeros(max(1, size // 4), device=device) for size in MESSAGES)
        short = _seconds(lambda: _allreduce(comm, small), ranks, 50)
        long = _seconds(lambda: _allreduce(comm, large), ranks, 20)
        n = ranks.size
        # As `collectives` has a ring: 2 (n - 1) (latency + bytes / n / bandwidth).
        latency = short / (2 * (n - 1))
        # Where something else holds up the short message, the long one is at least half bytes.
        link = Link(latency, 2 * (n - 1) / n * MESSAGES[1] / max(long - short, 0.5 * long))
        return link, _overlap(comm, large, long, ranks, device), _each_gradient(short, ranks)


def _overlap(comm: Communicator, message: torch.Tensor, alone: float, ranks: Ranks, device: torch.device) -> float:
    """Share of an allreduce that is hidden by arithmetic which drives it between two products, as hooks do."""
    a = torch.randn(256, 256, device=device)
    pieces = max(2, round(2 * alone / _seconds(lambda: a @ a, ranks)))

    def compute(drive: bool) -> None:
        for _ in range(pieces):
            a @ a  # noqa: B018 - for its time
            if drive:
                comm.progress()

    def both() -> None:
        work = comm.allreduce(message, "calibrate", "")
        compute(True)
        work.wait()

    computing = _seconds(lambda: compute(False), ranks)
    together = _seconds(both, ranks)
    return min(1.0, max(0.0, (computing + alone - together) / alone))


def _each_gradient(latency: float, ranks: Ranks) -> float:
    """What Horovod adds to each tensor, whatever its size; 0 without Horovod."""
    os.environ.setdefault("HOROVOD_FUSION_THRESHOLD", "0")
    try:
        import horovod.torch as hvd
    except ImportError:
        return 0.0
    if not hvd.is_initialized():
        hvd.init(comm=ranks.comm)
    tensors = [torch.zeros(16) for _ in range(50)]

    def average() -> None:
        handles = [hvd.allreduce_async_(tensor, name=f"calibrate.{i}") for i, tensor in enumerate(tensors)]
        for handle in handles:
            hvd.synchronize(handle)

    return max(0.0, _seconds(average, ranks) / len(tensors) - latency)


def _allreduce(comm: Communicator, tensor: torch.Tensor) -> None:
    comm.allreduce(tensor, "calibrate", "").wait()


def _product(dtype: torch.dtype, ranks: Ranks, device: torch.device) -> float:
    a, b = (torch.randn(PRODUCT, PRODUCT, device=device).to(dtype) for _ in range(2))
    return 2.0 * PRODUCT**3 / _seconds(lambda: a @ b, ranks)


def _decomposition(n: int, eigen: bool, ranks: Ranks, device: torch.device) -> float:
    rows = torch.randn(n, n, device=device)
    matrix = rows @ rows.T / n + torch.eye(n, device=device)
    if eigen:
        return _seconds(lambda: torch.linalg.eigh(matrix), ranks)
    return _seconds(lambda: torch.cholesky_inverse(torch.linalg.cholesky(matrix)), ranks)


def _seconds(what: Callable[[], object], ranks: Ranks, repeats: int = REPEATS) -> float:
    """Of one call, the median over calls of the slowest rank; all ranks begin together. Collective."""
    device = _device(ranks)
    found = []
    what()
    for _ in range(repeats):
        ranks.gather(None)
        start = now(device)
        what()
        found.append(now(device) - start)
    return max(ranks.gather(statistics.median(found)))


def _device(ranks: Ranks) -> torch.device:
    return torch.device("cuda", ranks.local_rank) if torch.cuda.is_available() else torch.device("cpu")


def _memory(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


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
