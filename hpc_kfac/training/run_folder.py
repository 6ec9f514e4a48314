"""The folder of a run: its settings, where it ran, and its metrics."""

from __future__ import annotations

import contextlib
import json
import math
import os
import platform
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from hpc_kfac.cluster import environment, scheduler
from hpc_kfac.cluster.errors import EXPECTED, exit_status
from hpc_kfac.cluster.files import replace_file
from hpc_kfac.cluster.ranks import Ranks
from hpc_kfac.training.config import Settings
from hpc_kfac.training.scalars import Board

DONE = "done.json"
"""Is there when the training is complete."""
STOPPED = "stopped.json"
"""Is there after a start that ended early, until the next one: reason, step, time and exit status."""


class RunFolder:
    """Writes a run's files; does nothing on other ranks than 0.

    Args:
        path: of the folder; the same on every rank.
        writes: whether this is rank 0.
        tensorboard: also write TensorBoard files.
    """

    def __init__(self, path: Path, writes: bool, tensorboard: bool = False) -> None:
        self.path = path
        self._writes = writes
        self._metrics: int | None = None
        self._waiting = bytearray()
        self._full = False
        if writes:
            self._metrics = os.open(
                path / "metrics.jsonl", os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o666
            )
        self._board = Board(path / "tensorboard") if writes and tensorboard else None

    def write(self, row: dict[str, Any]) -> None:
        """Appends a row to metrics.jsonl; on a full disk, later. A number that JSON has no word for becomes null."""
        if self._metrics is not None:
            self._waiting += (json.dumps(_finite(row)) + "\n").encode()
            self._append()
        if self._board is not None:
            self._board.write(row)

    def metrics(self) -> str:
        """All rows so far; none on other ranks than 0."""
        if self._metrics is None:
            return ""
        return ((self.path / "metrics.jsonl").read_bytes() + self._waiting).decode()

    def mark_done(self, facts: dict[str, Any]) -> None:
        """Leaves word that the training is complete."""
        if self._writes:
            replace_file(self.path / DONE, json.dumps(_finite(facts), indent=2) + "\n")

    def close(self) -> None:
        """Closes the files."""
        if self._metrics is not None:
            self._append()
            os.close(self._metrics)
            self._metrics = None
        if self._board is not None:
            self._board.close()

    def _append(self) -> None:
        """Writes the rows that wait; if there is no space for them they wait on, and training does not."""
        assert self._metrics is not None
        try:
            while self._waiting:
                del self._waiting[: os.write(self._metrics, self._waiting)]
            self._full = False
        except OSError as error:
            if not self._full:
                print(f"Warning: {self.path / 'metrics.jsonl'}: {error.strerror}; its rows wait in memory", flush=True)
            self._full = True


class StopNote:
    """Leaves word in the run folder of why a start has ended early. A context manager; for rank 0.

    Args:
        path: of the folder.
        writes: whether this is rank 0.

    Attributes:
        step: that the run has come to.
        disowned: another job has the folder now; nothing may be written there any more.
    """

    def __init__(self, path: Path, writes: bool) -> None:
        self.step = 0
        self.disowned = False
        self._path, self._writes = path / STOPPED, writes

    def __enter__(self) -> StopNote:
        if self._writes:
            with contextlib.suppress(OSError):
                self._path.unlink()
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if error is None or not self._writes or self.disowned:
            return
        reason = str(error) if isinstance(error, EXPECTED) else f"{type(error).__name__}: {error}"
        note = {"reason": reason, "step": self.step, "time": now(), "status": exit_status(error)}
        with contextlib.suppress(OSError):  # the error itself is worth more than a note of it
            replace_file(self._path, json.dumps(note, indent=2) + "\n")


def create_run_folder(settings: Settings, ranks: Ranks, path: Path | None = None) -> Path:
    """Makes a run's folder on rank 0: a new one, or the given one, which may be there. Collective.

    Raises:
        InputError: it cannot be written.
    """
    with ranks.agreed():
        if ranks.rank == 0:
            if path is None:
                path = _new_folder(Path(settings.run.run_dir), settings.name)
            else:
                _make(path)
    return ranks.broadcast(path)


def open_run_folder(
    path: Path, settings: Settings, ranks: Ranks, device: torch.device, steps: int, metrics: str = "", step: int = 0
) -> RunFolder:
    """Writes settings.yaml and run.json, and puts metrics.jsonl where the run starts. Collective.

    Args:
        path: of the folder.
        settings: of the run.
        ranks: all that train.
        device: of this rank.
        steps: that the whole run has.
        metrics: rows up to the checkpoint that the run goes on from.
        step: of that.

    Raises:
        InputError: they cannot be written.
    """
    hosts = ranks.gather(socket.gethostname())
    devices = ranks.gather(str(device))
    with ranks.agreed():
        if ranks.rank == 0:
            facts = describe(settings, ranks) | {
                "hosts": hosts, "devices": devices, "steps": steps, "from_step": step
            }  # fmt: skip
            replace_file(path / "settings.yaml", settings.annotated)
            replace_file(path / "run.json", json.dumps(_with_earlier(path / "run.json", facts), indent=2) + "\n")
            replace_file(path / "metrics.jsonl", metrics)
    return RunFolder(path, ranks.rank == 0, settings.run.tensorboard)


def _with_earlier(path: Path, facts: dict[str, Any]) -> dict[str, Any]:
    """The facts of the run's first start, with those of later ones under "restarts"."""
    try:
        first = json.loads(path.read_text())
    except (OSError, ValueError):
        return facts
    return first | {"restarts": [*first.get("restarts", []), facts]}


def now() -> str:
    """The time, in ISO 8601."""
    return time.strftime("%Y-%m-%dT%H:%M:%S%z")


def describe(settings: Settings, ranks: Ranks) -> dict[str, Any]:
    """What is needed to judge and repeat a run."""
    return {
        "name": settings.name,
        "started": now(),
        "command": sys.argv,
        "git": _git(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "versions": {name: environment.version(name) for name in environment.PACKAGES},
        "ranks": ranks.size,
        "mpi": _mpi() if ranks.comm is not None else None,
        "averaging": settings.run.averaging if ranks.size > 1 else None,
        "threads": torch.get_num_threads(),
        "seed": settings.run.seed,
        "scheduler": scheduler.scheduler_variables(),
    }


def _new_folder(parent: Path, name: str) -> Path:
    stamp = f"{name}-{time.strftime('%Y%m%d-%H%M%S')}"
    for suffix in ("", *(f"-{number}" for number in range(2, 1000))):
        path = parent / (stamp + suffix)
        try:
            path.mkdir(parents=True)
        except FileExistsError:
            continue
        except OSError as error:
            raise _refused(path, error) from error
        return path
    raise OSError(f"run folder {parent / stamp} exists a thousand times; set name or run_dir")


def _make(path: Path) -> None:
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _refused(path, error) from error


def _refused(path: Path, error: OSError) -> OSError:
    return OSError(f"run folder {path}: {error.strerror}; set run_dir to a folder you may write to")


def _git() -> dict[str, Any] | None:
    """Commit of the source tree that this package is in, if it is in one."""
    folder = Path(__file__).resolve().parent

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(folder), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", __file__)  # an installed package inside somebody else's repository
        return {"commit": git("rev-parse", "HEAD"), "dirty": bool(git("status", "--porcelain", "-uno"))}
    except (OSError, subprocess.SubprocessError):
        return None


def _mpi() -> dict[str, Any]:
    from mpi4py import MPI

    library = MPI.Get_library_version().strip("\0\n").split("\n")[0]
    return {"library": library, "thread_level": environment.thread_level_name(MPI.Query_thread())}


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(entry) for key, entry in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value
