"""Two jobs pointed at one run folder, and a job that takes over from one that was killed."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from support import ROOT, kill_tree, launch_environment, mpirun, run_mpi

POINTS = ["-m", "hpc_kfac", "train", "--task", "user", "--task.function", "trainer_tasks:points", "--task.metric"]
POINTS += ["accuracy", "--global_batch", "12", "--progress", "lines", "--name", "run", "--resume", "auto"]
POINTS += ["--checkpoint.steps", "10", "--evaluate_every", "100000", "--log_every", "100"]
PATHS = {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
STALE = 30.0  # seconds after which a lease is taken over, whoever held it


@pytest.mark.timeout(300)
def test_the_second_job_refuses_and_a_requeue_takes_over(tmp_path: Path) -> None:
    folder, log = tmp_path / "run", tmp_path / "log"
    words = [*POINTS, "--run_dir", str(tmp_path), "--epochs", "1000000"]
    with open(log, "w") as output:
        first = subprocess.Popen(
            [mpirun(), "-n", "2", sys.executable, "-m", "mpi4py", *words],
            env={**launch_environment(), **PATHS, "SLURM_JOB_ID": "4711"}, cwd=ROOT, stdout=output,
            stderr=subprocess.STDOUT,
        )  # fmt: skip
    try:
        deadline = time.monotonic() + 100
        while not list(folder.glob("checkpoints/step-*")):
            assert first.poll() is None and time.monotonic() < deadline, log.read_text()
            time.sleep(0.05)
        holder = json.loads((folder / "lease.json").read_text())
        before = (folder / "settings.yaml").read_bytes()
        second = run_mpi([*words, "--epochs", "7"], 2, 100, PATHS | {"SLURM_JOB_ID": "4712"})
        assert second.rc == 2, second.output
        assert f"is in use by job 4711 (restart 0), process {holder['pid']} on host {socket.gethostname()}" in (
            second.output
        )
        assert "another run folder" in second.output and second.output.count("hpc-kfac: ") == 1
        assert "Traceback" not in second.output
        # It has touched nothing, and the first one goes on.
        assert first.poll() is None and (folder / "settings.yaml").read_bytes() == before
    finally:
        kill_tree(first.pid)
    assert (folder / "lease.json").exists()
    requeue = run_mpi([*words, "--time_limit", "3", "--time_margin", "2"], 2, 100, PATHS | {"SLURM_JOB_ID": "4712"})
    assert requeue.rc == 75 and "Goes on from step" in requeue.output, requeue.output
    assert "by the time limit in" in requeue.output
    # It did not wait for the lease to go stale, while the second job had waited for a sign of life.
    assert requeue.seconds < second.seconds + STALE - 5
    assert not (folder / "lease.json").exists()
