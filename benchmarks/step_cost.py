"""What second order adds to a step on Fashion-MNIST, against SGD through Horovod.

All contenders train copies of one model in one job, in turns of ten steps, so that whatever else the machine does meets
all alike. Ratios are of seconds over equal numbers of steps; a step is over when the slowest rank is.

    mpirun -n 2 python -m mpi4py benchmarks/step_cost.py resnet20 --out logs/step_cost.json
    mpirun -n 2 python -m mpi4py benchmarks/step_cost.py cnn --steps 500
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ.setdefault("HOROVOD_FUSION_THRESHOLD", "0")  # as the trainer has it: bitwise repeatable

import horovod.torch as hvd
import torch
from mpi4py import MPI
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import hpc_kfac as hk
from hpc_kfac.cluster.ranks import keep_freed_memory
from hpc_kfac.methods.vectors.mkor import MKOR
from hpc_kfac.tasks.tasks import fashion

TURN, PERIOD = 10, 100
BATCH = {"resnet20": 128, "cnn": 125}
KFAC = hk.KFAC(damping=0.03, solver="cholesky")


def kfac(statistics: int, refresh: int, **settings: Any) -> dict[str, Any]:
    return {"method": KFAC, "schedule": hk.Schedule(statistics, refresh), **settings}


def rank_one(method: hk.Method, every: int) -> dict[str, Any]:
    """As published: one scale for all layers, and the optimizer's momentum."""
    return {"method": method, "schedule": hk.Schedule(every, every), "step_control": hk.KLClip(1e-3)}


CONTENDERS: dict[str, dict[str, dict[str, Any]]] = {
    "resnet20": {
        "SGD": {},
        "K-FAC, empirical, 10 / 100": kfac(10, 100),
        "K-FAC, empirical, 1 / 10": kfac(1, 10),
        "K-FAC, sampled, 10 / 100": kfac(10, 100, fisher="sampled"),
        "K-FAC, sampled, 1 / 10": kfac(1, 10, fisher="sampled"),
        "K-FAC, empirical, 10 / 100, spread 10": {**kfac(10, 100), "schedule": hk.Schedule(10, 100, spread=10)},
        "K-FAC, empirical, 10 / 100, lag 5": {**kfac(10, 100), "schedule": hk.Schedule(10, 100, lag=5)},
    },
    "cnn": {
        "SGD": {},
        "Eva, every step": rank_one(hk.Eva(), 1),
        "Eva, every 10 steps": rank_one(hk.Eva(), 10),
        "MKOR, every step": rank_one(MKOR(), 1),
        "MKOR, every 10 steps": rank_one(MKOR(), 10),
    },
}
LIMITS = {
    "K-FAC, empirical, 10 / 100": 1.08,
    "K-FAC, empirical, 1 / 10": 1.6,
    "K-FAC, sampled, 10 / 100": 1.15,
    "K-FAC, sampled, 1 / 10": 2.3,
    **dict.fromkeys(("Eva, every step", "Eva, every 10 steps", "MKOR, every step", "MKOR, every 10 steps"), 1.05),
}
"""Wanted: mean step over that of SGD."""


@dataclass
class Contender:
    """A model in training.

    Attributes:
        name: of the contender.
        step: trains on a batch.
        preconditioner: None for SGD.
        seconds: of every measured step.
    """

    name: str
    step: Callable[[Tensor, Tensor], None]
    preconditioner: hk.Preconditioner | None
    seconds: list[float] = field(default_factory=list)


def make(name: str, settings: dict[str, Any], model: nn.Module, moments: torch.dtype | None) -> Contender:
    sgd = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, weight_decay=5e-4)
    optimizer: Any = hvd.DistributedOptimizer(sgd, [(f"{name}.{n}", p) for n, p in model.named_parameters()])
    preconditioner = None
    if settings:
        preconditioner = hk.Preconditioner(
            model,
            optimizer,
            precision=hk.Precision(moments=moments),
            comm=MPI.COMM_WORLD,
            **settings,
        )

    def step(x: Tensor, y: Tensor) -> None:
        optimizer.zero_grad()
        outputs = model(x)
        if preconditioner is not None:
            preconditioner.observe(outputs)
        cross_entropy(outputs, y).backward()
        optimizer.synchronize()
        if preconditioner is not None:
            preconditioner.step()
        with optimizer.skip_synchronize():
            optimizer.step()

    return Contender(name, step, preconditioner)


def timed(contender: Contender, batch: tuple[Tensor, Tensor]) -> float:
    """Seconds until the slowest rank has finished the step."""
    MPI.COMM_WORLD.Barrier()
    start = time.perf_counter()
    contender.step(*batch)
    MPI.COMM_WORLD.Barrier()
    return time.perf_counter() - start


def measure(arguments: argparse.Namespace) -> list[Contender]:
    comm = MPI.COMM_WORLD
    task, batch = fashion(model=arguments.task, seed=0), BATCH[arguments.task]
    moments = torch.bfloat16 if arguments.moments == "bf16" else None
    chosen = {
        n: s for n, s in CONTENDERS[arguments.task].items() if n == "SGD" or not arguments.only or n in arguments.only
    }
    contenders = [make(n, s, copy.deepcopy(task.model).train(), moments) for n, s in chosen.items()]
    generator = torch.Generator().manual_seed(comm.rank)
    batches = [task.train.fetch(torch.randint(60000, (batch,), generator=generator)) for _ in range(8)]
    for contender in contenders:  # the first step, which measures kernels and fills buffers
        for samples in batches[:2]:
            contender.step(*samples)
        if contender.preconditioner is not None:
            contender.preconditioner.steps = 0  # so that turns and intervals fit
            contender.preconditioner.load_state_dict(contender.preconditioner.state_dict())
    for turn in range(arguments.steps // TURN):
        for contender in contenders:
            contender.seconds += [timed(contender, batches[(turn + i) % 8]) for i in range(TURN)]
        if comm.rank == 0:
            print(f"turn {turn + 1} of {arguments.steps // TURN}", end="\r", flush=True)
    return contenders


def _by_place(seconds: list[float]) -> list[float]:
    """Median over refresh periods of each step of the period; without the very first, which refreshes all layers."""
    return [statistics.median(seconds[place or PERIOD :: PERIOD] or seconds[1:2]) for place in range(PERIOD)]


def table(contenders: list[Contender]) -> tuple[str, list[dict[str, Any]]]:
    base = contenders[0].seconds
    rows = []
    lines = ["| contender | ms a step | over SGD | wanted | largest step over mean |", "|---|---|---|---|---|"]
    for c in contenders:
        ratio = sum(c.seconds) / sum(base)
        turns = [sum(c.seconds[i : i + TURN]) / sum(base[i : i + TURN]) for i in range(0, len(base), TURN)]
        largest = max(_by_place(c.seconds)) / statistics.fmean(c.seconds)
        figures = {"ratio": ratio, "ratio_of_turns": turns, "largest_over_mean": largest}
        rows.append({"name": c.name, **figures, "seconds": c.seconds})
        limit = f"{LIMITS[c.name]:.2f}" if c.name in LIMITS else ""
        ms = 1e3 * statistics.fmean(c.seconds)
        lines.append(f"| {c.name} | {ms:.1f} | {ratio:.3f} | {limit} | {largest:.2f} |")
    return "\n".join(lines), rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("task", choices=list(CONTENDERS), nargs="?", default="resnet20")
    parser.add_argument("--steps", type=int, default=100, help="measured steps of every contender, a multiple of 100")
    parser.add_argument("--moments", choices=["fp32", "bf16"], default="bf16", help="rows multiplied into factors")
    parser.add_argument("--only", nargs="*", help="contenders beside SGD")
    parser.add_argument("--out", type=Path, help="JSON file")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    keep_freed_memory()
    hvd.init(comm=MPI.COMM_WORLD)
    contenders = measure(arguments)
    if MPI.COMM_WORLD.rank == 0:
        text, rows = table(contenders)
        where = f"{arguments.task}, {MPI.COMM_WORLD.size} rank(s), batch {BATCH[arguments.task]} a rank"
        print(f"{where}, moments {arguments.moments}\n\n{text}")
        if arguments.out:
            arguments.out.parent.mkdir(parents=True, exist_ok=True)
            arguments.out.write_text(json.dumps({"ranks": MPI.COMM_WORLD.size, "rows": rows}, indent=1))
    hvd.shutdown()


if __name__ == "__main__":
    main()
