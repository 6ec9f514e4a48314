"""A rank that sleeps, is stopped or is killed while the others wait for it in a collective: told, and ended in time."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path

import pytest

from support import ROOT, Result, run_mpi

LIMIT = 2.0  # seconds that a wait may last
ENDED = 9.0  # seconds that ending a job may take, on a busy machine

PROGRAM = """
import os
import signal
import sys
import time

from mpi4py import MPI

from hpc_kfac.distributed import Watchdog, communicator
import torch

comm = MPI.COMM_WORLD
carrier = communicator(comm)
watchdog = Watchdog(comm, carrier.monitor, {limit})
pairs = carrier.split(comm.rank // 2)


def reduce(of=carrier, about="layers conv1 .. fc"):
    work = of.allreduce(torch.ones(1000), "reduce", about)
    time.sleep(0.01)
    work.wait()


for _ in range(3):
    reduce(about="layers before")
reduce(pairs, about="layers of pairs")
comm.Barrier()
if comm.rank == 0:
    with open("begun", "w") as file:
        file.write(str(time.time()))
{body}
reduce(about="layers after")
print(f"rank {{comm.rank}} came through", flush=True)
"""


def job(folder: Path, body: str, ranks: int = 3, limit: float = LIMIT) -> Result:
    """Runs the program; `seconds` is the time from the beginning of the body."""
    script = folder / "program.py"
    script.write_text(PROGRAM.format(body=body, limit=limit))
    result = run_mpi(script, ranks, timeout=60, env={"PYTHONPATH": str(ROOT)}, cwd=folder)
    assert not result.timed_out, result.output
    since = time.time() - float((folder / "begun").read_text())
    return replace(result, seconds=since)


def told(result: Result, *words: str) -> str:
    """The job failed in time, with one message, which has these words."""
    assert result.rc != 0 and result.seconds < LIMIT + ENDED, result.output
    assert result.output.count("hpc_kfac: rank") == 1, result.output
    assert "came through" not in result.output
    start = result.output.index("hpc_kfac: rank")
    message = result.output[start : result.output.index("raise this limit", start)]
    assert all(word in message for word in words), message
    return message


@pytest.mark.parametrize(("late", "ranks", "first"), [(0, 5, ""), (2, 3, "if comm.rank == 0: time.sleep(1)")])
def test_a_rank_that_sleeps_is_named_with_the_collective(tmp_path: Path, late: int, ranks: int, first: str) -> None:
    """By the rank that has waited longest, of several the lowest."""
    message = told(
        job(tmp_path, f"{first}\nif comm.rank == {late}: time.sleep(50)\nreduce()", ranks),
        f"rank 1 of {ranks}",
        "allreduce 'reduce' (layers conv1 .. fc)",
        f"rank {late} on ",
        "has not posted it: it last posted allreduce 'reduce' (layers of pairs)",
    )
    assert message.count("has not posted it") == 1


def test_the_rank_behind_a_chain_of_waits_is_named(tmp_path: Path) -> None:
    """Rank 3 sleeps; rank 2 waits for it as its pair, so that ranks 0 and 1 wait for both as all."""
    body = "if comm.rank == 3: time.sleep(50)\nif comm.rank == 2: reduce(pairs, 'layer x')\nreduce()"
    message = told(job(tmp_path, body, ranks=4), "rank 0 of 4", "rank 2 on ", "(layer x)", "rank 3 on ")
    assert "rank 1 on" not in message


def test_a_stopped_rank_does_not_answer(tmp_path: Path) -> None:
    body = "if comm.rank == 1: os.kill(os.getpid(), signal.SIGSTOP)\nreduce()"
    message = told(job(tmp_path, body), "(layers conv1 .. fc)", "rank 1 on ", "does not answer")
    assert "rank 2 on" not in message


def test_another_collective_in_its_place_is_named(tmp_path: Path) -> None:
    body = (
        "if comm.rank == 1: carrier.broadcast(torch.ones(1000), 1, 'share')\n"
        "elif comm.rank == 0: reduce()\n"
        "else: time.sleep(50)"
    )
    told(job(tmp_path, body), "rank 1 on ", "posted broadcast 'share' in its place", "rank 2 on ", "has not posted it")


def test_a_killed_rank_ends_the_job_by_itself(tmp_path: Path) -> None:
    """mpirun names the dead rank; the rank that waited for it says for what."""
    body = "if comm.rank == 1:\n    time.sleep(0.5)\n    os.kill(os.getpid(), signal.SIGKILL)\nreduce()"
    result = job(tmp_path, body, limit=30)
    assert result.rc != 0 and result.seconds < ENDED, result.output
    assert "rank 1" in result.output and "signal 9" in result.output, result.output
    assert result.output.count("hpc_kfac: rank 0 of 3") == result.output.count("hpc_kfac: rank") == 1, result.output
    assert "allreduce 'reduce' (layers conv1 .. fc) when SIGTERM came" in result.output


def test_a_late_rank_and_a_long_time_outside_collectives_are_no_stall(tmp_path: Path) -> None:
    body = f"if comm.rank == 1: time.sleep({LIMIT / 2})\nreduce()\ntime.sleep({LIMIT * 2})\nreduce()"
    result = job(tmp_path, body)
    assert result.rc == 0 and result.stdout.count("came through") == 3, result.output
    assert "hpc_kfac" not in result.output


def test_a_handler_of_the_programs_own_keeps_sigterm(tmp_path: Path) -> None:
    body = """
signal.signal(signal.SIGTERM, lambda *_: print("handled", flush=True))
if comm.rank == 1: os.kill(os.getpid(), signal.SIGTERM)
"""
    result = job(tmp_path, body, ranks=2)
    assert result.rc == 0 and result.stdout.count("handled") == 1 and result.stdout.count("came through") == 2
    assert "hpc_kfac" not in result.output, result.output


def test_without_a_handler_sigterm_still_ends_the_process(tmp_path: Path) -> None:
    """A forked child, too, which shares the pipe of its parent's watchdog: the parent must not take it for its own."""
    body = """
child = os.fork()
if child == 0:
    time.sleep(50)
time.sleep(0.2)
os.kill(child, signal.SIGTERM)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGTERM
reduce()
print("both went on", flush=True)
comm.Barrier()
if comm.rank == 1: os.kill(os.getpid(), signal.SIGTERM)
time.sleep(50)
"""
    result = job(tmp_path, body, ranks=2)
    assert result.rc not in (0, 1) and result.seconds < ENDED, result.output
    assert result.stdout.count("both went on") == 2, result.output
    assert "Traceback" not in result.output and "hpc_kfac: rank" not in result.output, result.output
