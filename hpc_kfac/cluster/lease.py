"""Who works in a run folder: one job at a time, by a file that its holder keeps touching."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

NAME = "lease.json"
SETTLE = 0.3  # seconds in which a contender that was too late puts back what it took away
JOBS = ("SLURM_JOB_ID", "PBS_JOBID", "LSB_JOBID")


class LeaseTaken(RuntimeError):
    """Another job works in the folder; the message names it and the mend."""


class Lease:
    """The right to work in a run folder. For rank 0.

    The lease is a file with the holder's job, host and process, whose modification time a thread renews. It is taken
    over at once from a process of this machine that is gone, and from an earlier start of the same scheduler job; from
    any other once nobody has renewed it for `stale` seconds. Times are the file system's, so that clocks of hosts do
    not matter.

    Args:
        folder: of the run.
        heartbeat: seconds between two renewals.
        stale: seconds without one after which others may take over; several heartbeats.

    Attributes:
        lost: whether somebody else has taken it over; this process must then write nothing more to the folder.
    """

    def __init__(self, folder: Path, heartbeat: float = 5.0, stale: float = 30.0) -> None:
        self.lost = False
        self._folder, self._path = folder, folder / NAME
        self._heartbeat, self._stale = heartbeat, stale
        self._facts = {"token": uuid.uuid4().hex, **_this_process()}
        self._content = (json.dumps(self._facts, indent=2) + "\n").encode()
        self._aside = folder / f".lease-{self._facts['token']}"
        self._renewed = 0.0
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._keep, name="hpc_kfac lease", daemon=True)

    def acquire(self) -> None:
        """Takes the lease; waits for up to `stale` seconds where it cannot tell whether a holder is still there.

        Raises:
            LeaseTaken: another job holds it.
            OSError: the folder cannot be written.
        """
        try:
            while not self._create(self._content):
                ended = self._wait_for_end()
                if ended is not None:
                    self._remove(*ended)
            time.sleep(SETTLE)
            found = self._read()
            if found is not None and found[0] != self._content:
                raise self._taken(*found)
        except OSError as error:
            raise OSError(
                f"run folder {self._folder}: {NAME} cannot be written: {error.strerror}; free some space there, or set"
                " run_dir to a folder you may write to"
            ) from error
        self._renewed = time.monotonic()
        self._thread.start()

    def release(self) -> None:
        """Gives the lease back; nothing happens if it was lost or never acquired."""
        if not self._thread.is_alive() and not self._renewed:
            return
        self._stopping.set()
        self._thread.join()
        self._renewed = 0.0
        if not self.lost:
            with contextlib.suppress(OSError):
                self._remove(self._content)

    # Taking it

    def _create(self, content: bytes) -> bool:
        """Makes the file unless there is one."""
        try:
            descriptor = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
        except FileExistsError:
            return False
        try:
            with open(descriptor, "wb") as file:
                file.write(content)
        except OSError:
            self._path.unlink(missing_ok=True)
            raise
        return True

    def _remove(self, content: bytes, modified: float | None = None) -> None:
        """Removes the file if it has this content and modification time.

        It is moved away first: of several contenders one succeeds. What turns out to be another lease, because a
        contender was faster still, or one that was renewed after all is put back.
        """
        try:
            os.rename(self._path, self._aside)
        except FileNotFoundError:
            return
        found = self._aside.read_bytes()
        if found != content or modified not in (None, self._aside.stat().st_mtime):
            self._create(found)
        self._aside.unlink()

    def _wait_for_end(self) -> tuple[bytes, float] | None:
        """A lease that nobody holds any more, None if it has gone meanwhile; LeaseTaken if somebody holds it."""
        first = self._read()
        if first is None:
            return None
        content, modified = first
        holder = _parse(content)
        if self._is_earlier_start(holder):
            return first
        deadline = time.monotonic() + self._stale - max(0.0, self._now() - modified)
        while True:
            found = self._read()
            if found is None:
                return None
            if found != first:
                raise self._taken(*found)
            if _is_gone(holder) or time.monotonic() > deadline:
                return first
            time.sleep(self._heartbeat / 10)

    def _is_earlier_start(self, holder: dict[str, Any]) -> bool:
        same = holder.get("job") is not None and holder.get("job") == self._facts["job"]
        return same and _number(holder.get("restart")) < self._facts["restart"]

    def _now(self) -> float:
        """The file system's clock."""
        self._aside.write_bytes(b"?")
        now = self._aside.stat().st_mtime
        self._aside.unlink()
        return now

    def _read(self) -> tuple[bytes, float] | None:
        """Content and modification time; None without a file. Opening it is what renews times on network folders."""
        try:
            with open(self._path, "rb") as file:
                return file.read(10_000), os.fstat(file.fileno()).st_mtime
        except FileNotFoundError:
            return None

    def _taken(self, content: bytes, modified: float) -> LeaseTaken:
        holder = _parse(content)
        job = f"job {holder['job']} (restart {holder.get('restart')}), " if holder.get("job") else ""
        who = f"{job}process {holder.get('pid', 'unknown')} on host {holder.get('host', 'unknown')}"
        age = max(0.0, self._now() - modified)
        return LeaseTaken(
            f"run folder {self._folder} is in use by {who}, which renewed its lease {age:.1f} s ago; wait for its end,"
            " stop it, or train in another run folder"
        )

    # Keeping it

    def _keep(self) -> None:
        while not self.lost and not self._stopping.wait(self._heartbeat):
            with contextlib.suppress(OSError):  # a file system that is away for a while is so for the others, too
                self.lost = not self._renew()

    def _renew(self) -> bool:
        try:
            with open(self._path, "rb") as file:
                if file.read(10_000) != self._content:
                    return False
                os.utime(file.fileno())
        except FileNotFoundError:
            # Cleared away, or put aside for a moment. After a long sleep somebody may have come and gone.
            if time.monotonic() - self._renewed > self._stale:
                return False
            self._create(self._content)
        self._renewed = time.monotonic()
        return True


def _this_process() -> dict[str, Any]:
    job = next((os.environ[name] for name in JOBS if name in os.environ), None)
    index = os.environ.get("LSB_JOBINDEX", "0")
    if "LSB_JOBID" in os.environ and index != "0":
        job = f"{job}[{index}]"
    return {
        "job": job,
        "restart": _number(os.environ.get("SLURM_RESTART_COUNT")),
        "host": socket.gethostname(),
        "boot": _boot(),
        "pid": os.getpid(),
        "pid_namespace": _pid_namespace(),
        "started": _started(os.getpid()),
    }


def _number(text: Any) -> int:
    return int(text) if str(text).isdigit() else 0


def _parse(content: bytes) -> dict[str, Any]:
    """What a lease says; nothing if it is unreadable or half-written."""
    try:
        found = json.loads(content)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _is_gone(holder: dict[str, Any]) -> bool:
    """Whether the holder was a process of this machine, and has ended."""
    here = (socket.gethostname(), _boot(), _pid_namespace())
    if None in here or (holder.get("host"), holder.get("boot"), holder.get("pid_namespace")) != here:
        return False
    pid, started = holder.get("pid"), holder.get("started")
    return isinstance(pid, int) and isinstance(started, int) and _started(pid) != started


def _tried(read: Callable[[], str]) -> str | None:
    try:
        return read()
    except OSError:
        return None


def _boot() -> str | None:
    return _tried(lambda: Path("/proc/sys/kernel/random/boot_id").read_text().strip())


def _pid_namespace() -> str | None:
    """Containers of one host count their processes apart."""
    return _tried(lambda: os.readlink("/proc/self/ns/pid"))


def _started(pid: int) -> int | None:
    """Clock ticks from boot to the start of a process; None if it has ended, reaped or not."""
    text = _tried(lambda: Path(f"/proc/{pid}/stat").read_text())
    if text is None:
        return None
    fields = text.rpartition(")")[2].split()  # behind the command, which may have any characters
    return None if fields[0] in "ZX" else int(fields[19])
