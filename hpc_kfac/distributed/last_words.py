"""How a program on several ranks ends by an exception: with one message, and with no rank left waiting.

What this package refuses is raised on all ranks alike as a rule. It is then told by rank 0 alone, as the line of the
script and the message; a rank that fails otherwise tells it itself. Ranks that wait in MPI for one that has failed are
ended. Other exceptions, threads and interactive sessions are left to whoever handled them before.
"""

from __future__ import annotations

import linecache
import sys
import time
import traceback
import weakref
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from hpc_kfac.distributed.letters import leave
from hpc_kfac.distributed.watchdog import stop_all
from hpc_kfac.distributed.world import find_mpi, find_world

PATIENCE = 3.0
"""Seconds that the first rank waits for the others to fail, too."""
LONGER = 1.0
"""So much longer the others wait for its answer."""
TAG = 31415
"""Of messages on MPI's world."""
PACKAGE = str(Path(__file__).parent.parent)
PLAIN = (ValueError, TypeError, RuntimeError, OSError)

_ALIVE: weakref.WeakSet[Any] = weakref.WeakSet()
"""Communicators of several ranks."""


def joined(comm: object) -> None:
    """A communicator of several ranks was made; they may wait for each other until it is freed."""
    _ALIVE.add(comm)


def left(comm: object) -> None:
    """It was freed."""
    _ALIVE.discard(comm)


def install() -> None:
    """Puts itself before the present `sys.excepthook`."""
    if not isinstance(sys.excepthook, _Hook):
        sys.excepthook = _Hook(sys.excepthook)


class _Hook:
    def __init__(self, before: Callable[..., object]) -> None:
        self._before = before

    def __call__(self, kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        interactive = hasattr(sys, "ps1") or sys.flags.interactive
        if interactive or not isinstance(error, Exception) or find_world() is None:
            self._before(kind, error, trace)
        elif refused(error, trace):
            _end(_words(error, trace))
        else:
            self._before(kind, error, trace)
            if _ALIVE and "mpi4py.run" not in sys.modules:  # which ends all ranks by itself
                _end(None)


def refused(error: BaseException, trace: TracebackType | None) -> bool:
    """Whether this package has raised it on purpose."""
    frames = traceback.extract_tb(trace)
    if not frames or not frames[-1].filename.startswith(PACKAGE):
        return False
    line = linecache.getline(frames[-1].filename, frames[-1].lineno or 0)
    return type(error).__module__.startswith("hpc_kfac.") or (type(error) in PLAIN and line.strip().startswith("raise"))


def leave_mpi() -> None:
    """Shuts MPI down in order: exiting with an error code from within it would add a page about MPI_ABORT."""
    from mpi4py import MPI

    stop_all()
    leave()
    horovod = sys.modules.get("horovod.torch")
    if horovod is not None and horovod.is_initialized():
        horovod.shutdown()
    MPI.Finalize()


def _words(error: BaseException, trace: TracebackType | None) -> str:
    outside = [frame for frame in traceback.extract_tb(trace) if not _internal(frame.filename)]
    return "".join(traceback.format_list(outside[-1:]) + traceback.format_exception_only(error))


def _internal(filename: str) -> bool:
    return filename.startswith((PACKAGE, str(Path(torch.__file__).parent), "<frozen"))


def _end(words: str | None) -> None:
    """Tells it, unless rank 0 tells the same, and sees to it that all ranks end."""
    say = _Say(words)
    mpi = find_mpi()
    try:
        if mpi is None:
            _meet_over_torch(words or "", say)
        elif not _meet_over_mpi(mpi, words or "", say):
            say()
            mpi.COMM_WORLD.Abort(1)
        elif words is not None:
            leave_mpi()
    except Exception:  # noqa: BLE001 - whatever else is broken, this is to be told
        say()


class _Say:
    """Shows the words once."""

    def __init__(self, words: str | None) -> None:
        self._words = words

    def __call__(self) -> None:
        if self._words is not None:
            sys.stdout.flush()
            sys.stderr.write(self._words)
            sys.stderr.flush()
        self._words = None


def _meet_over_mpi(mpi: Any, words: str, say: _Say) -> bool:
    """Whether all ranks have failed."""
    comm = mpi.COMM_WORLD
    if comm.rank == 0:
        say()
        arrived: list[int] = []
        _until(PATIENCE, lambda: _receive(mpi, mpi.ANY_SOURCE, arrived.append) and len(arrived) == comm.size - 1)
        complete = len(arrived) == comm.size - 1
        sent = [comm.isend((words, complete), rank, TAG) for rank in arrived]
        _until(LONGER, lambda: all(request.Test() for request in sent))
        return complete
    sent = [comm.isend(comm.rank, 0, TAG)]
    answers: list[tuple[str, bool]] = []
    _until(PATIENCE + LONGER, lambda: sent[0].Test() and _receive(mpi, 0, answers.append))
    if not answers:
        return False
    if answers[0][0] != words:
        say()
    return answers[0][1]


def _receive(mpi: Any, source: int, found: Callable[[Any], None]) -> bool:
    while mpi.COMM_WORLD.iprobe(source, TAG):
        found(mpi.COMM_WORLD.recv(source=source, tag=TAG))
        if source == 0:
            return True
    return source != 0


def _until(seconds: float, ready: Callable[[], bool]) -> None:
    deadline = time.monotonic() + seconds
    while not ready() and time.monotonic() < deadline:
        time.sleep(0.005)


def _meet_over_torch(words: str, say: _Say) -> None:
    """The same over the store of the default process group, which rank 0 may be the host of."""
    store = torch.distributed.distributed_c10d._get_default_store()
    rank, size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    here = "hpc_kfac/end/"
    if rank == 0:
        say()
        store.set(here + "0", words)
        others = [f"{here}{other}" for other in range(1, size)]
        _until(PATIENCE, lambda: store.check(others))
        return
    _until(PATIENCE, lambda: store.check([here + "0"]))  # `wait` would write lines of its own
    if not store.check([here + "0"]) or store.get(here + "0").decode() != words:
        say()
    store.set(f"{here}{rank}", "")
