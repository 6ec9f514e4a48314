"""Why a run stops: signals, durations, and what schedulers say."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from hpc_kfac.cluster.errors import InputError
from hpc_kfac.cluster.scheduler import parse_duration, scheduler_deadline
from hpc_kfac.training.stop import StopRequests

CHILD = """
import sys, time
from hpc_kfac.training.stop import StopRequests

with StopRequests(None, 0) as requests:
    print("ready", flush=True)
    while not requests.wanted:
        time.sleep(0.01)
    print(requests.reason, flush=True)
    sys.stdin.readline()  # the save: more signals come
    print("saved", requests.reason, flush=True)
time.sleep(60)
"""


def test_nothing_is_wanted_without_a_reason() -> None:
    with StopRequests(None, 5) as requests:
        assert not requests.wanted and requests.reason is None


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR2])
def test_the_first_signal_is_the_reason(number: signal.Signals) -> None:
    with StopRequests(None, 5) as requests:
        os.kill(os.getpid(), number)
        assert requests.wanted and requests.reason == number.name
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGUSR2)
        assert requests.reason == number.name


def test_handlers_come_back_and_others_are_left() -> None:
    interrupt = signal.getsignal(signal.SIGINT)

    def own(number: int, frame: object) -> None: ...

    before = signal.signal(signal.SIGUSR2, own)
    try:
        with pytest.raises(KeyError), StopRequests(None, 5):
            assert signal.getsignal(signal.SIGUSR2) is not own
            assert signal.getsignal(signal.SIGINT) is interrupt
            raise KeyError
        assert signal.getsignal(signal.SIGUSR2) is own
    finally:
        signal.signal(signal.SIGUSR2, before)


def test_outside_the_main_thread_signals_are_left_alone() -> None:
    seen: list[object] = []

    def body() -> None:
        with StopRequests(60, 5) as requests:
            seen.extend([signal.getsignal(signal.SIGTERM), requests.wanted])

    before = signal.getsignal(signal.SIGTERM)
    thread = threading.Thread(target=body)
    thread.start()
    thread.join()
    assert seen == [before, False] and signal.getsignal(signal.SIGTERM) is before


def test_a_process_saves_through_further_signals_and_then_dies_of_one() -> None:
    child = subprocess.Popen([sys.executable, "-c", CHILD], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert child.stdin is not None and child.stdout is not None
    try:
        assert child.stdout.readline() == "ready\n"
        child.send_signal(signal.SIGUSR2)
        assert child.stdout.readline() == "SIGUSR2\n"
        for _ in range(3):
            child.send_signal(signal.SIGTERM)
            time.sleep(0.02)
        child.stdin.write("\n")
        child.stdin.flush()
        assert child.stdout.readline() == "saved SIGUSR2\n"
        time.sleep(0.05)  # out of the context by now
        child.send_signal(signal.SIGTERM)
        assert child.wait(10) == -signal.SIGTERM
    finally:
        child.kill()
        child.wait()


def test_the_time_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now)
    requests = StopRequests("10m", 60)
    now += 539
    assert not requests.wanted
    now += 3
    assert requests.wanted and requests.reason == "the time limit in 58 s"
    now += 100
    assert requests.wanted and requests.reason == "the time limit in 0 s"


def test_three_of_the_longest_saves_fit_before_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now)
    requests = StopRequests(1000, 60)
    now += 800
    for seconds in (1.0, 50.0, 2.0):
        requests.saving_took(seconds)
    assert not requests.wanted  # 150 s are needed, 200 are left
    requests.saving_took(67.0)
    assert requests.wanted and requests.reason == "the time limit in 200 s"


def test_the_earlier_limit_counts() -> None:
    soon, late = time.time() + 10, time.time() + 1000
    assert StopRequests("900", 60, soon).wanted
    assert StopRequests("30", 60, late).wanted
    assert StopRequests(None, 60, soon).wanted
    assert not StopRequests("900", 60, late).wanted


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("90", 90), (90, 90), (0.5, 0.5), ("90s", 90), ("15m", 900), ("4h", 14400), ("2d", 172800), ("1.5h", 5400),
        ("1h30m", 5400), (" 90 ", 90), ("1:30", 90), ("1:30:00", 5400), ("100:00:00", 360000),
        ("2-00:00:00", 172800), ("1-02:03:04", 93784), ("2-12", 216000), ("2-12:30", 217800),
    ],
)  # fmt: skip
def test_durations(text: str | float, seconds: float) -> None:
    assert parse_duration(text) == seconds


@pytest.mark.parametrize("text", ["", "soon", "0", "-5", "4 hours", "1:2:3:4", "nan", "inf", "1e3", "h", "0:00", True])
def test_what_is_no_duration_is_named(text: str) -> None:
    with pytest.raises(InputError, match="time limit .* is no duration; write it like") as error:
        StopRequests(text, 5)
    assert repr(text) in str(error.value)


@pytest.fixture
def scheduler(tmp_path: Path) -> Callable[[str, str], dict[str, str]]:
    """Makes a shell script that stands for a scheduler's command, as none is installed; returns the PATH to it."""

    def make(name: str, body: str) -> dict[str, str]:
        script = tmp_path / name
        script.write_text("#!/bin/sh\n" + textwrap.dedent(body))
        script.chmod(0o755)
        return {"PATH": f"{tmp_path}:/usr/bin:/bin"}

    return make


def left(environ: dict[str, str]) -> float:
    deadline = scheduler_deadline(environ)
    assert deadline is not None
    return deadline - time.time()


def test_no_scheduler_no_deadline() -> None:
    assert scheduler_deadline({"PATH": "/usr/bin"}) is None


def test_slurm_in_the_environment() -> None:
    environ = {"SLURM_JOB_ID": "7", "SLURM_JOB_END_TIME": "1795000000", "PATH": "/nowhere"}
    assert scheduler_deadline(environ) == 1795000000.0


@pytest.mark.parametrize(("said", "seconds"), [("1-00:00:05", 86405), ("2:30", 150), ("0:00", 0), ("1:00:00", 3600)])
def test_slurm_asked(scheduler: Callable[[str, str], dict[str, str]], said: str, seconds: float) -> None:
    path = scheduler("squeue", f'[ "$*" = "-h -j 7 -o %L" ] && echo {said}')
    assert left({"SLURM_JOB_ID": "7", **path}) == pytest.approx(seconds, abs=5)


@pytest.mark.parametrize("body", ["echo UNLIMITED", "echo NOT_SET", "true", "exit 1", "echo 1:00; exit 1"])
def test_slurm_without_a_limit_or_an_answer(scheduler: Callable[[str, str], dict[str, str]], body: str) -> None:
    assert scheduler_deadline({"SLURM_JOB_ID": "7", **scheduler("squeue", body)}) is None


def test_pbs(scheduler: Callable[[str, str], dict[str, str]]) -> None:
    begun = time.strftime("%a %b %d %H:%M:%S %Y", time.localtime(time.time() - 600))
    path = scheduler(
        "qstat",
        f"""
        [ "$*" = "-f -F json 42.server" ] || exit 1
        echo '{{"Jobs": {{"42.server": {{"stime": "{begun}", "Resource_List": {{"walltime": "01:00:00"}}}}}}}}'
        """,
    )
    assert left({"PBS_JOBID": "42.server", **path}) == pytest.approx(3000, abs=5)


@pytest.mark.parametrize("body", ["echo '{'", 'echo \'{"Jobs": {"42": {}}}\'', "echo '[]'", "exit 3"])
def test_pbs_without_a_limit_or_an_answer(scheduler: Callable[[str, str], dict[str, str]], body: str) -> None:
    assert scheduler_deadline({"PBS_JOBID": "42", **scheduler("qstat", body)}) is None


def test_lsf(scheduler: Callable[[str, str], dict[str, str]]) -> None:
    path = scheduler("bjobs", '[ "$*" = "-noheader -o time_left 9" ] && echo "1:30 L"')
    assert left({"LSB_JOBID": "9", "LSB_JOBINDEX": "0", **path}) == pytest.approx(5400, abs=5)
    path = scheduler("bjobs", '[ "$*" = "-noheader -o time_left 9[3]" ] && echo "0:10 E"')
    assert left({"LSB_JOBID": "9", "LSB_JOBINDEX": "3", **path}) == pytest.approx(600, abs=5)
    assert scheduler_deadline({"LSB_JOBID": "9", **scheduler("bjobs", 'echo "-"')}) is None


def test_a_scheduler_that_hangs_is_not_waited_for(
    scheduler: Callable[[str, str], dict[str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hpc_kfac.cluster.scheduler.PATIENCE", 0.3)
    path = scheduler("squeue", "exec sleep 30")
    start = time.monotonic()
    assert scheduler_deadline({"SLURM_JOB_ID": "7", **path}) is None
    assert time.monotonic() - start < 5


def test_a_scheduler_whose_command_is_missing() -> None:
    assert scheduler_deadline({"SLURM_JOB_ID": "7", "PATH": "/nowhere"}) is None
