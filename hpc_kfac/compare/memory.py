"""Peak memory of contenders: each takes some steps alone, in a process forked from one that only has the data.

The command runs `python -m hpc_kfac.compare.memory TASK DATA BATCH` and hands it contenders and settings as JSON.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch

from hpc_kfac.cluster.ranks import Ranks, choose_device, set_threads
from hpc_kfac.compare.runs import Run, Spec
from hpc_kfac.compare.tasks import TASKS
from hpc_kfac.tasks.tasks import Task

STEPS = 25
LAUNCHERS = ("OMPI_", "PMIX_", "PMI_", "PRTE_", "SLURM_", "MV2_", "HPC_KFAC_RANKS")

Point = tuple[str, dict[str, Any]]
"""A contender and its settings."""


def measure(task: str, data: str | None, batch: int, points: list[Point]) -> list[dict[str, Any]]:
    """Of each point {"bytes": n} or {"error": text}. The processes know nothing of MPI, whoever calls this.

    Args:
        task: name of the task.
        data: folder of its files.
        batch: samples of a step.
        points: contenders and settings.
    """
    environment = {name: value for name, value in os.environ.items() if not name.startswith(LAUNCHERS)}
    command = [sys.executable, "-m", __name__, task, data or "", str(batch)]
    done = subprocess.run(command, input=json.dumps(points), env=environment, capture_output=True, text=True)
    try:
        return list(json.loads(done.stdout.strip().splitlines()[-1]))
    except (IndexError, ValueError):
        why = (done.stderr.strip().splitlines() or [f"status {done.returncode}"])[-1]
        return [{"error": why[:300]}] * len(points)


def take_steps(task: str, data: Task, batch: int, threads: int, point: Point) -> dict[str, Any]:
    """Bytes at the peak, above what was there before: on the device or, on a CPU, resident."""
    torch.set_num_threads(threads)
    ranks = Ranks()
    device = choose_device("auto", ranks)
    _forget_peak()
    before, files = _status("VmRSS"), _status("RssFile")
    run = Run(TASKS[task], data, Spec(*point, seconds=1.0, seed=0), ranks, device, batch)
    run.steps(STEPS)
    if run.result.error is not None:
        return {"error": run.result.error}
    if device.type == "cuda":
        return {"bytes": torch.cuda.max_memory_allocated(device)}
    # Code that the libraries page in is not the contender's.
    return {"bytes": max(0, _status("VmHWM") - before - (_status("RssFile") - files))}


def _forget_peak() -> None:
    """Has Linux measure the peak from here on."""
    Path("/proc/self/clear_refs").write_text("5")


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(name)).split()[1])


def main(task: str, folder: str, batch: str) -> None:
    """Measures the points on standard input."""
    threads = set_threads(None, Ranks())
    torch.set_num_threads(1)  # threads that have worked before a fork are missing after it, and OpenMP waits for them
    data = TASKS[task].make(0, folder or None)
    # A process for each, so that none finds memory that another has left.
    with multiprocessing.get_context("fork").Pool(1, maxtasksperchild=1) as pool:
        points = [(contender, settings) for contender, settings in json.load(sys.stdin)]
        print(json.dumps(pool.map(partial(take_steps, task, data, int(batch), threads), points, chunksize=1)))


if __name__ == "__main__":
    main(*sys.argv[1:])
