"""A disk that is full: training goes on, what was saved stays good, and space that is found again is used."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from hpc_kfac.checkpoint.sets import list_sets, step_of, verify
from support import ROOT, Result, kill_tree, launch_environment, mpirun, run_mpi

PROGRAM = Path(__file__).parent / "programs" / "starved_train.py"
PATHS = {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
POINTS = ["train", "--task", "user", "--task.function", "trainer_tasks:points", "--task.metric", "accuracy"]
POINTS += ["--global_batch", "12", "--progress", "lines", "--name", "run", "--resume", "auto"]


def starved(folder: Path, where: dict[str, list[int]], *words: str, ranks: int = 2) -> Result:
    program = [str(PROGRAM), *POINTS, "--run_dir", str(folder), *words]
    result = run_mpi(program, ranks, 100, PATHS | {"STARVED": json.dumps(where)})
    assert not result.timed_out and "Traceback" not in result.output, result.output
    return result


def steps(folder: Path) -> list[int]:
    """Of the sets, oldest first; all of them must be in order."""
    found = list_sets(folder / "run" / "checkpoints")[::-1]
    for path in found:
        verify(path)
    return [step_of(path) or 0 for path in found]


def test_no_space_on_some_ranks_for_a_while(tmp_path: Path) -> None:
    words = ["--max_steps", "40", "--checkpoint.steps", "6", "--checkpoint.asynchronous", "false"]
    words += ["--checkpoint.keep_every", "1", "--checkpoint.keep_best", "false", "--log_every", "1000"]
    result = starved(tmp_path, {"2": [0, 1], "4": [1], "5": [0]}, *words)
    assert result.rc == 0, result.output
    said = re.findall(r"Warning: no checkpoint at step (\d+): (.*)", result.output)
    assert said == [
        ("12", "rank 0: [Errno 27] File too large; the last one is that of step 6"),
        ("24", "rank 1: [Errno 27] File too large; the last one is that of step 18"),
        ("30", "rank 0: [Errno 27] File too large; the last one is that of step 18"),
    ]
    assert steps(tmp_path) == [6, 18, 36, 40]
    assert not list((tmp_path / "run" / "checkpoints").glob(".*"))


def test_no_space_for_the_last_one(tmp_path: Path) -> None:
    words = ["--max_steps", "6", "--checkpoint.steps", "4"]
    result = starved(tmp_path, {"2": [1]}, *words)
    assert result.rc == 1
    assert "hpc-kfac: step 6: training is complete, but its last checkpoint could not be written: rank 1:" in (
        result.output
    )
    assert "--resume auto" in result.output and not (tmp_path / "run" / "done.json").exists()
    assert steps(tmp_path) == [4]
    again = starved(tmp_path, {}, *words)
    assert again.rc == 0 and "Goes on from step 4" in again.output, again.output
    assert steps(tmp_path) == [4, 6] and (tmp_path / "run" / "done.json").exists()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 2 MB."""
    place = tmp_path / "disk"
    place.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(place)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except FileNotFoundError:
        pytest.skip("there is no mount on this machine")
    if done.returncode != 0:
        pytest.skip(f"a small disk cannot be mounted here: {done.stderr.strip()}")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True, timeout=20)


def fill(path: Path) -> None:
    """Takes all the space that is left."""
    with contextlib.suppress(OSError), open(path, "wb", buffering=0) as file:
        while file.write(bytes(1 << 12)):
            pass


def wait_for(what: str, process: subprocess.Popen[str], log: Path, seconds: float = 60.0) -> re.Match[str]:
    """Where the log has a pattern, as soon as it has it."""
    deadline = time.monotonic() + seconds
    while (found := re.search(what, log.read_text())) is None:
        assert process.poll() is None and time.monotonic() < deadline, log.read_text()
        time.sleep(0.05)
    return found


def test_a_disk_that_is_full_while_it_trains(tmp_path: Path, small_disk: Path) -> None:
    words = ["--epochs", "100000", "--checkpoint.steps", "20", "--log_every", "5", "--evaluate_every", "100000"]
    program = [sys.executable, "-m", "mpi4py", "-m", "hpc_kfac", *POINTS, "--run_dir", str(small_disk), *words]
    log, filler = tmp_path / "log", small_disk / "filler"
    with open(log, "w") as output:
        process = subprocess.Popen(
            [mpirun(), "-n", "2", *program],
            env={**launch_environment(), **PATHS}, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip
    try:
        wait_for(r"step 60/", process, log)
        fill(filler)
        failed = wait_for(r"Warning: no checkpoint at step (\d+): rank [01]: \[Errno 28\] No space left", process, log)
        wait_for(r"Warning: \S+metrics.jsonl: No space left on device; its rows wait in memory", process, log)
        good = steps(small_disk)
        assert good and good[-1] < int(failed[1])
        here = [int(step) for step in re.findall(r"step (\d+)/", log.read_text())][-1]
        wait_for(rf"step {here + 40}/", process, log)  # it goes on
        os.unlink(filler)
        deadline = time.monotonic() + 60
        while max(map(step_of, list_sets(small_disk / "run" / "checkpoints"))) <= here:
            assert process.poll() is None and time.monotonic() < deadline, log.read_text()
            time.sleep(0.05)
        process.send_signal(signal.SIGUSR2)
        assert process.wait(60) == 75, log.read_text()
    finally:
        kill_tree(process.pid)
    assert "all of it is saved" in log.read_text()
    assert steps(small_disk)[-1] > here
    rows = [json.loads(line) for line in (small_disk / "run" / "metrics.jsonl").read_text().splitlines()]
    train = [row["step"] for row in rows if row["kind"] == "train"]
    assert train == list(range(5, train[-1] + 1, 5))  # not one is lost
