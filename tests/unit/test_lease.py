"""Who may work in a run folder, with real processes as holders and contenders."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from hpc_kfac.cluster import lease as module
from hpc_kfac.cluster.lease import Lease, LeaseTaken

pytestmark = pytest.mark.alone
HEARTBEAT, STALE = 0.1, 0.8
# The module by its path: it needs nothing of the package, whose import would take most of the time here.
PROGRAM = f"""
import importlib.util, sys, time
from pathlib import Path
spec = importlib.util.spec_from_file_location("lease", {str(module.__file__)!r})
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
module.SETTLE = 0.1
for line in sys.stdin:
    word, *folder = line.split()
    if word == "acquire":
        lease = module.Lease(Path(folder[0]), {HEARTBEAT}, {STALE})
        try:
            lease.acquire()
            print("held", flush=True)
        except module.LeaseTaken as error:
            print("taken", error, flush=True)
    elif word == "lost":
        print(lease.lost, flush=True)
    elif word == "release":
        lease.release()
        print("released", flush=True)
"""


class Job:
    """A process that works in folders as it is told."""

    def __init__(self, **environ: str) -> None:
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "PBS_", "LSB_"))}
        self.process = subprocess.Popen(
            [sys.executable, "-c", PROGRAM], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            env={**kept, **environ},
        )  # fmt: skip

    def tell(self, *words: object) -> None:
        assert self.process.stdin is not None
        print(*words, file=self.process.stdin, flush=True)

    def answer(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def ask(self, *words: object) -> str:
        self.tell(*words)
        return self.answer()


@pytest.fixture
def job() -> Iterator[Callable[..., Job]]:
    jobs: list[Job] = []

    def start(**environ: str) -> Job:
        jobs.append(Job(**environ))
        return jobs[-1]

    yield start
    for each in jobs:
        each.process.kill()
        each.process.communicate()


@pytest.fixture
def lease(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Lease:
    for name in [name for name in os.environ if name.startswith(("SLURM_", "PBS_", "LSB_"))]:
        monkeypatch.delenv(name)
    return Lease(tmp_path, HEARTBEAT, STALE)


def files(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def change(folder: Path, **values: Any) -> None:
    """Changes what a lease says of its holder."""
    facts = json.loads((folder / "lease.json").read_text())
    (folder / "lease.json").write_text(json.dumps({**facts, **values}))


def left_behind(folder: Path, **values: Any) -> None:
    """A lease whose holder is of another host, so that nobody can look whether it is there."""
    facts = {"token": "x", "job": None, "restart": 0, "host": "elsewhere", "boot": "b", "pid": 1, "started": 1}
    (folder / "lease.json").write_text(json.dumps({**facts, **values}))


def test_taken_and_given_back(tmp_path: Path, lease: Lease, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "2")
    lease = Lease(tmp_path, HEARTBEAT, STALE)
    lease.acquire()
    assert files(tmp_path) == {"lease.json"}
    facts = json.loads((tmp_path / "lease.json").read_text())
    assert (facts["job"], facts["restart"], facts["pid"]) == ("77", 2, os.getpid())
    first = (tmp_path / "lease.json").stat().st_mtime
    time.sleep(3 * HEARTBEAT)
    assert (tmp_path / "lease.json").stat().st_mtime > first and not lease.lost
    lease.release()
    assert files(tmp_path) == set()
    lease.release()


def test_a_second_job_is_refused_and_told_by_whom(tmp_path: Path, lease: Lease, job: Callable[..., Job]) -> None:
    holder = job(SLURM_JOB_ID="123", SLURM_RESTART_COUNT="1")
    assert holder.ask("acquire", tmp_path) == "held"
    start = time.monotonic()
    with pytest.raises(LeaseTaken) as error:
        lease.acquire()
    assert time.monotonic() - start < 0.7 * STALE  # as soon as it saw a renewal
    said = str(error.value)
    for word in (str(tmp_path), "job 123 (restart 1)", str(holder.process.pid), os.uname().nodename, "s ago", "wait"):
        assert word in said
    assert holder.ask("lost") == "False"
    assert holder.ask("release") == "released"
    lease.acquire()
    lease.release()
    assert files(tmp_path) == set()


def test_a_killed_holder_of_this_machine_is_followed_at_once(
    tmp_path: Path, lease: Lease, job: Callable[..., Job]
) -> None:
    holder = job()
    assert holder.ask("acquire", tmp_path) == "held"
    holder.process.kill()
    os.waitid(os.P_PID, holder.process.pid, os.WEXITED | os.WNOWAIT)  # dead, but not reaped: a zombie
    start = time.monotonic()
    lease.acquire()
    assert time.monotonic() - start < module.SETTLE + 0.3 and not lease.lost
    lease.release()


def test_the_process_number_of_another_process_is_no_holder(tmp_path: Path, lease: Lease) -> None:
    left_behind(tmp_path)
    here = {name: lease._facts[name] for name in ("host", "boot", "pid_namespace")}
    change(tmp_path, **here, pid=os.getppid(), started=1)
    start = time.monotonic()
    lease.acquire()
    assert time.monotonic() - start < module.SETTLE + 0.3
    lease.release()


def test_a_stopped_holder_is_followed_and_notices(tmp_path: Path, lease: Lease, job: Callable[..., Job]) -> None:
    holder = job()
    assert holder.ask("acquire", tmp_path) == "held"
    holder.process.send_signal(signal.SIGSTOP)
    start = time.monotonic()
    lease.acquire()
    assert STALE - 2 * HEARTBEAT < time.monotonic() - start < STALE + module.SETTLE + 0.5
    holder.process.send_signal(signal.SIGCONT)
    time.sleep(3 * HEARTBEAT)
    assert holder.ask("lost") == "True" and not lease.lost
    assert holder.ask("release") == "released"
    assert files(tmp_path) == {"lease.json"}  # not its own any more
    lease.release()


def test_a_holder_that_slept_through_another_ones_work_notices(
    tmp_path: Path, lease: Lease, job: Callable[..., Job]
) -> None:
    holder = job()
    assert holder.ask("acquire", tmp_path) == "held"
    holder.process.send_signal(signal.SIGSTOP)
    lease.acquire()
    lease.release()
    holder.process.send_signal(signal.SIGCONT)
    time.sleep(3 * HEARTBEAT)
    assert holder.ask("lost") == "True" and files(tmp_path) == set()


def test_a_lease_that_was_cleared_away_comes_back(tmp_path: Path, lease: Lease) -> None:
    lease.acquire()
    (tmp_path / "lease.json").unlink()
    time.sleep(3 * HEARTBEAT)
    assert not lease.lost and files(tmp_path) == {"lease.json"}
    lease.release()


def test_a_requeued_job_follows_itself_at_once(tmp_path: Path, job: Callable[..., Job]) -> None:
    left_behind(tmp_path, job="55", restart=0)
    start = time.monotonic()
    again = job(SLURM_JOB_ID="55", SLURM_RESTART_COUNT="1")
    assert again.ask("acquire", tmp_path) == "held"
    assert time.monotonic() - start < module.SETTLE + 0.5 < STALE + module.SETTLE


@pytest.mark.parametrize("environ", [{"SLURM_JOB_ID": "55"}, {"SLURM_JOB_ID": "56", "SLURM_RESTART_COUNT": "1"}])
def test_neither_the_same_start_nor_another_job_does(
    tmp_path: Path, job: Callable[..., Job], environ: dict[str, str]
) -> None:
    left_behind(tmp_path, job="55", restart=0)
    other = job(**environ)
    start = time.monotonic()
    assert other.ask("acquire", tmp_path) == "held"
    assert time.monotonic() - start > STALE


def test_an_old_lease_of_another_host_is_followed_at_once(tmp_path: Path, lease: Lease) -> None:
    left_behind(tmp_path)
    old = time.time() - 2 * STALE
    os.utime(tmp_path / "lease.json", (old, old))
    start = time.monotonic()
    lease.acquire()
    assert time.monotonic() - start < module.SETTLE + 0.3
    lease.release()


@pytest.mark.parametrize("content", [b"", b'{"token": "x", "jo', b'{"pid": "x", "restart": null}'])
def test_an_unreadable_lease_goes_by_its_age(tmp_path: Path, lease: Lease, content: bytes) -> None:
    (tmp_path / "lease.json").write_bytes(content)
    start = time.monotonic()
    lease.acquire()
    assert time.monotonic() - start > STALE - HEARTBEAT
    lease.release()


def test_an_unreadable_lease_that_is_renewed_is_held(tmp_path: Path, lease: Lease, job: Callable[..., Job]) -> None:
    (tmp_path / "lease.json").write_bytes(b"{")
    other = job()
    other.tell("acquire", tmp_path)
    answered = threading.Event()

    def renew() -> None:
        while not answered.wait(HEARTBEAT):
            os.utime(tmp_path / "lease.json")

    holder = threading.Thread(target=renew)
    holder.start()
    try:
        assert other.answer().startswith("taken")
    finally:
        answered.set()
        holder.join()


def test_a_time_in_the_future_is_waited_for_no_longer(tmp_path: Path, lease: Lease) -> None:
    left_behind(tmp_path)
    future = time.time() + 1000
    os.utime(tmp_path / "lease.json", (future, future))
    start = time.monotonic()
    lease.acquire()
    assert STALE <= time.monotonic() - start < STALE + module.SETTLE + 0.5
    lease.release()


def test_of_contenders_exactly_one_wins(tmp_path: Path, job: Callable[..., Job]) -> None:
    """In 20 rounds each of three starts: no lease, one of a process that is gone, one that has just become too old."""
    contenders = [job(), job()]
    gone = job()
    for number in range(20):
        folder = tmp_path / str(number)
        folder.mkdir()
        if number % 3 == 1:
            left_behind(folder)
            facts = module._this_process() | {"pid": gone.process.pid, "started": 1}
            change(folder, **facts)
        elif number % 3 == 2:
            left_behind(folder)
            old = time.time() - STALE
            os.utime(folder / "lease.json", (old, old))
        for contender in contenders:
            contender.tell("acquire", folder)
        said = [contender.answer() for contender in contenders]
        held = [word == "held" for word in said]
        assert sum(held) == 1 and sum(word.startswith("taken") for word in said) == 1, (number, said)
        winner = contenders[held.index(True)]
        assert winner.ask("lost") == "False"
        facts = json.loads((folder / "lease.json").read_text())
        assert facts["pid"] == winner.process.pid and files(folder) == {"lease.json"}
        assert winner.ask("release") == "released"


def test_a_contender_that_was_too_late_puts_back_what_it_took(tmp_path: Path, lease: Lease) -> None:
    left_behind(tmp_path)
    seen = lease._read()
    assert seen is not None
    (tmp_path / "lease.json").unlink()
    other = Lease(tmp_path, HEARTBEAT, STALE)
    other.acquire()
    lease._remove(*seen)  # what it decided on before the other one came
    time.sleep(3 * HEARTBEAT)
    assert not other.lost and files(tmp_path) == {"lease.json"}
    seen = other._read()
    assert seen is not None
    time.sleep(3 * HEARTBEAT)
    lease._remove(*seen)  # renewed after all
    time.sleep(3 * HEARTBEAT)
    assert not other.lost and files(tmp_path) == {"lease.json"}
    other.release()
    assert files(tmp_path) == set()


@pytest.mark.skipif(os.geteuid() != 0, reason="mounts a read-only and a full file system")
@pytest.mark.parametrize(("options", "said"), [("size=4k,nr_inodes=1", "No space left"), ("ro", "Read-only")])
def test_a_folder_that_takes_no_file_is_named(tmp_path: Path, lease: Lease, options: str, said: str) -> None:
    folder = tmp_path / "mounted"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", folder], capture_output=True).returncode:
        pytest.skip("may not mount")
    try:
        with pytest.raises(OSError, match=f"{folder}.*{said}.*run_dir"):
            Lease(folder, HEARTBEAT, STALE).acquire()
    finally:
        subprocess.run(["umount", folder], check=True)


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="missing.*No such file"):
        Lease(tmp_path / "missing").acquire()


def test_a_disk_that_is_full_leaves_no_half_lease(tmp_path: Path, job: Callable[..., Job]) -> None:
    """Under a limit on the size of files, as a full disk would: the file is made, but takes no bytes."""
    code = f"""
import resource, signal, runpy, sys
from pathlib import Path
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (10, 10))
try:
    runpy.run_path({str(module.__file__)!r})["Lease"](Path({str(tmp_path)!r})).acquire()
except OSError as error:
    sys.exit(str(error))
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=20)
    assert "File too large" in result.stderr and result.returncode == 1 and files(tmp_path) == set()
