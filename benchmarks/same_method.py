"""Step time and memory of K-FAC against kfac-pytorch at the same method, intervals, model and batch.

All contenders train copies of one model in one job, in turns of a refresh interval, so that whatever else the machine
does meets all alike. A full step takes statistics and decomposes, an ordinary one does neither.

    PYTHONPATH=/where/kfac-pytorch/is mpirun -n 2 python -m mpi4py benchmarks/same_method.py resnet20 --intervals 1 10
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

from mpi4py import MPI

from hpc_kfac.cluster.ranks import Ranks, choose_device, join, keep_freed_memory, set_threads
from hpc_kfac.compare import memory
from hpc_kfac.compare.peers import CONTENDERS
from hpc_kfac.compare.runs import Run, Spec
from hpc_kfac.compare.tasks import TASKS


def points(every: int, refresh: int) -> dict[str, tuple[str, dict[str, Any]]]:
    """What is compared: a name in the table -> contender and settings."""
    steps = {"statistics": every, "refresh": refresh, "damping": 0.003}
    ours = {**steps, "early": refresh, "lr": 0.01, "kappa": 0.001}
    theirs = {**steps, "lr": 0.01, "kl_clip": 0.001}
    return {
        "SGD": ("sgd", {"lr": 0.01}),
        "ours, eigen, float32": ("kfac_clip", {**ours, "solver": "eigen", "bf16": False}),
        "ours, eigen, bfloat16": ("kfac_clip", {**ours, "solver": "eigen", "bf16": True}),
        "ours, Cholesky, the faster of the two": ("kfac_clip", ours),
        "kfac-pytorch, eigen": ("kfac_pytorch", theirs),
        "kfac-pytorch, inverse": ("kfac_pytorch", {**theirs, "solver": "inverse"}),
    }


def timed(run: Run, steps: int) -> list[float]:
    """Seconds of each step, until the slowest rank has finished it."""
    found = []
    for _ in range(steps):
        MPI.COMM_WORLD.Barrier()
        start = time.perf_counter()
        run.steps(1)
        MPI.COMM_WORLD.Barrier()
        found.append(time.perf_counter() - start)
    if run.result.error is not None:
        raise RuntimeError(f"{run.spec.contender}: {run.result.error}")
    return found


def measure(arguments: argparse.Namespace, ranks: Ranks) -> dict[str, list[float]]:
    task = TASKS[arguments.task]
    refresh = arguments.intervals[1]
    data = task.make(0, arguments.data)
    chosen = points(*arguments.intervals)
    device = choose_device("auto", ranks)
    batch = ranks.size * arguments.batch
    runs = {n: Run(task, data, Spec(c, s, 1e9, 0), ranks, device, batch) for n, (c, s) in chosen.items()}
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(arguments.turns + 1):  # the first one fills buffers and measures kernels
        for name, run in runs.items():
            found = timed(run, refresh)
            seconds[name] += found if turn else []
    return seconds


def by_kind(seconds: list[float], every: int, refresh: int) -> dict[str, float]:
    """Milliseconds: mean of all steps, median of full and of ordinary ones."""
    full = seconds[::refresh]
    ordinary = [second for i, second in enumerate(seconds) if i % every]
    found = {"mean": statistics.fmean(seconds), "full": statistics.median(full)}
    if ordinary:
        found["ordinary"] = statistics.median(ordinary)
    return {kind: 1e3 * value for kind, value in found.items()}


def table(rows: dict[str, dict[str, float]]) -> str:
    base = rows["kfac-pytorch, eigen"]
    kinds = list(base)
    lines = ["| contender | " + " | ".join(kinds) + " |", "|" + "---|" * (len(kinds) + 1)]
    for name, row in rows.items():
        cells = [f"{row[kind]:.1f} ({row[kind] / base[kind]:.2f})" for kind in kinds]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("task", help=", ".join(TASKS))
    parser.add_argument("--intervals", type=int, nargs=2, default=[10, 100], metavar=("STATISTICS", "REFRESH"))
    parser.add_argument("--turns", type=int, default=3, help="refresh intervals measured of every contender")
    parser.add_argument("--batch", type=int, default=64, help="samples a rank")
    parser.add_argument("--data", help="folder of the task's files")
    parser.add_argument("--out", type=Path, help="JSON file")
    arguments = parser.parse_args()
    ranks = join()
    missing = CONTENDERS["kfac_pytorch"].missing()
    if missing:
        parser.error(missing)
    set_threads(1, ranks)
    keep_freed_memory()
    seconds = measure(arguments, ranks)
    if ranks.rank == 0:
        rows = {name: by_kind(found, *arguments.intervals) for name, found in seconds.items()}
        asked = list(points(*arguments.intervals).values())
        held = memory.measure(arguments.task, arguments.data, arguments.batch, asked)
        for name, found in zip(rows, held, strict=True):
            rows[name]["MB"] = found.get("bytes", float("nan")) / 1e6
        print(f"{ranks.size} rank(s), batch {arguments.batch} a rank, intervals {arguments.intervals}; milliseconds")
        print(f"and, in brackets, shares of kfac-pytorch's; peak memory of one process alone\n\n{table(rows)}")
        if arguments.out:
            arguments.out.parent.mkdir(parents=True, exist_ok=True)
            arguments.out.write_text(json.dumps({"ranks": ranks.size, "rows": rows, "seconds": seconds}, indent=1))
    ranks.broadcast(None)


if __name__ == "__main__":
    main()
