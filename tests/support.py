"""Runs programs under mpirun from tests: `run_mpi` for fault and command-line tests, and what the harness uses."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parent.parent
RANK_REPORTS = "HPC_KFAC_RANK_REPORTS"  # set inside the harness's ranks: the folder of their reports
# Left behind by an MPI or scheduler that this process itself runs under; a nested mpirun would misread them.
LAUNCHER_PREFIXES = ("PMIX_", "PMI_", "PRTE_", "OMPI_", "PALS_", "HYDRA_")


@dataclass(frozen=True)
class Result:
    """How a program under mpirun ended.

    Attributes:
        rc: exit status of mpirun; -1 if it was killed because its time was up.
        stdout, stderr: what all ranks wrote.
        seconds: wall time.
        timed_out: whether it was killed because its time was up.
    """

    rc: int
    stdout: str
    stderr: str
    seconds: float
    timed_out: bool

    @property
    def output(self) -> str:
        return self.stdout + self.stderr


def mpirun() -> str:
    """The mpirun of this Python's environment, else (a site's MPI) the one on PATH."""
    own = Path(sys.prefix, "bin", "mpirun")
    found = str(own) if own.exists() else shutil.which("mpirun")
    if found is None:
        raise RuntimeError("no mpirun in this environment nor on PATH: run env/install.sh, or load the site's MPI")
    return found


def launch_environment() -> dict[str, str]:
    """This process's environment, made fit for a plain `mpirun -n N` on this machine."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(LAUNCHER_PREFIXES) or "_MCA_" in k}
    lines = (ROOT / "env" / "launch.env").read_text().splitlines()
    settings = dict(line.split("=", 1) for line in lines if line and not line.startswith("#"))
    return {**kept, **settings, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


def run_mpi(
    program: str | Path | Sequence[str],
    ranks: int = 2,
    timeout: float | Callable[[], bool] = 60,
    env: dict[str, str] | None = None,
    cwd: Path | None = None,
) -> Result:
    """Runs a Python program under mpirun and waits for it; kills all of it when its time is up.

    Args:
        program: a script's path, or Python's arguments, e.g. ["-m", "hpc_kfac", "train", "x.yaml"].
        ranks: how many ranks.
        timeout: seconds, or says whether its time is up.
        env: further environment variables.
        cwd: working directory (default: the repository).
    """
    arguments = [str(program)] if isinstance(program, str | Path) else [str(a) for a in program]
    command = [mpirun(), "-n", str(ranks), sys.executable, "-m", "mpi4py", *arguments]
    return run(command, timeout, {**launch_environment(), **(env or {})}, cwd or ROOT)


def run(command: list[str], timeout: float | Callable[[], bool], env: dict[str, str], cwd: Path) -> Result:
    """Runs a command; when its time is up (in seconds, or as a function says) it is killed with all its descendants.

    It gets a folder of its own for temporary files: what a killed mpirun leaves keeps a later one with the same process
    number from starting.
    """
    with tempfile.TemporaryDirectory(prefix="mpi-", ignore_cleanup_errors=True) as folder:
        return _run(command, timeout, env | {"TMPDIR": folder}, cwd)


def _run(command: list[str], timeout: float | Callable[[], bool], env: dict[str, str], cwd: Path) -> Result:
    start = time.monotonic()
    process = subprocess.Popen(
        command, env=env, cwd=cwd, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        text=True, errors="replace",
    )  # fmt: skip
    overdue = timeout if callable(timeout) else lambda: time.monotonic() - start > timeout
    timed_out = False
    try:
        while True:
            try:
                stdout, stderr = process.communicate(timeout=0.2)
                break
            except subprocess.TimeoutExpired:
                if not timed_out and overdue():
                    timed_out = True
                    kill_tree(process.pid)
    except BaseException:  # Ctrl-C: leave no ranks behind
        kill_tree(process.pid)
        raise
    return Result(-1 if timed_out else process.returncode, stdout, stderr, time.monotonic() - start, timed_out)


def kill_tree(pid: int) -> None:
    """Kills a process and all its descendants (ranks are in process groups of their own)."""
    try:
        root = psutil.Process(pid)
        processes = [*root.children(recursive=True), root]
    except psutil.NoSuchProcess:
        return
    for process in processes:
        try:
            process.kill()
        except psutil.NoSuchProcess:
            continue
    psutil.wait_procs(processes, timeout=5)
