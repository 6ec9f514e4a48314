"""Small messages beside the collectives, by which ranks notice that they have gone different ways.

A rank sends one before it does what all ranks have to do together (`Letters.meet`), and when it ends. A thread looks
for them while this rank waits long for a collective: if a rank that it waits for had not posted that when it wrote,
and does nothing but wait for others, or has ended, the collective never completes, and the thread ends the job.
"""

from __future__ import annotations

import atexit
import json
import os
import sys
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch

from hpc_kfac.distributed.monitor import Monitor
from hpc_kfac.notices import Refused

TAG = 31416
"""Of messages on MPI communicators of this package."""
LONG = 1.0
"""Seconds of waiting after which the thread looks for letters."""
LOOK = 0.25
"""Seconds between its looks."""
LATEST = 600.0
"""Seconds that a rank waits for the others in `meet`: one may evaluate for minutes before all save."""
MANY = 64
"""A rank that ends tells all others, among more ranks than these the next one alone."""
MEND = "call it on all ranks alike, not under `if rank == 0`"


class Letter(NamedTuple):
    """What a rank writes.

    Attributes:
        rank: that wrote it, as the communicator numbers them that all of the family were split from.
        number: of the meeting that it waits in; -1 if it has ended.
        turn: of the exchange within the meeting.
        texts: what it and others before it want to do.
        posted: number of collectives that it had posted by name of the communicator.
        steps: that it had taken.
    """

    rank: int
    number: int
    turn: int
    texts: list[str]
    posted: dict[str, int]
    steps: int


class Letters(ABC):
    """The letters of a family of communicators.

    Args:
        monitor: of the family.
        size: ranks of the communicator that all of it were split from.
    """

    def __init__(self, monitor: Monitor, size: int) -> None:
        self._monitor, self._size = monitor, size
        self._meetings = 0
        _Lookout.take(self)

    def meet(self, members: Sequence[int], text: str) -> list[str]:
        """Waits for all members, with what each wants to do; without repetitions, sorted. Collective.

        Raises:
            Refused: a rank has ended, or does not come.
        """
        texts = {text}
        deadline = time.monotonic() + LATEST
        place, turn = members.index(self._monitor.rank), 0
        while 1 << turn < len(members):  # each turn, what is known doubles
            there, back = ((place + sign * (1 << turn)) % len(members) for sign in (1, -1))
            self._send(members[there], self._letter(self._meetings, turn, sorted(texts)))
            letter = self._await(members[back], turn, deadline, text)
            texts.update(letter.texts)
            turn += 1
        self._meetings += 1
        return sorted(texts)

    def lost(self) -> str:
        """Why what this rank waits for never comes; empty if nothing is known."""
        wait = self._monitor.main_wait()  # other threads may post what the letter does not know of
        if wait is None or time.monotonic() - wait[1] < LONG + LOOK * min(self._monitor.rank, 8):
            return ""
        posting = wait[0]
        for letter in self._found():
            if letter.rank not in posting.members or letter.posted.get(posting.group, 0) >= posting.number:
                continue
            if letter.number < 0:
                return (
                    f"rank {letter.rank} has ended after step {letter.steps}, but rank {self._monitor.rank} goes on "
                    f"and waits for it: every rank must take as many steps, with as many batches"
                )
            if letter.number >= self._meetings:
                here = f"rank {self._monitor.rank} is in another call, and waits for {posting}"
                return f"rank {letter.rank} is in {' / '.join(letter.texts)}, but {here}: {MEND}"
        return ""

    def leave(self) -> None:
        """This rank ends."""
        letter = self._letter(-1, 0, [])
        others = [rank for rank in range(self._size) if rank != letter.rank]
        for rank in others if self._size <= MANY else [(letter.rank + 1) % self._size]:
            self._send(rank, letter)

    def free(self) -> None:
        """The communicator is freed."""
        _Lookout.drop(self)

    def _letter(self, number: int, turn: int, texts: list[str]) -> Letter:
        return Letter(self._monitor.rank, number, turn, texts, dict(self._monitor.posted), self._monitor.steps)

    def _await(self, rank: int, turn: int, deadline: float, text: str) -> Letter:
        pause = 0.0
        while time.monotonic() < deadline:
            for letter in self._found():
                if letter.number < 0:
                    raise Refused(f"rank {letter.rank} has ended, but rank {self._monitor.rank} is in {text}: {MEND}")
                if (letter.rank, letter.number, letter.turn) == (rank, self._meetings, turn):
                    self._taken(letter)
                    return letter
            time.sleep(pause)
            pause = min(pause + 1e-5, 2e-3)
        raise Refused(f"rank {rank} did not come to {text} within {LATEST:g} s of rank {self._monitor.rank}: {MEND}")

    @abstractmethod
    def _send(self, rank: int, letter: Letter) -> None: ...

    @abstractmethod
    def _found(self) -> list[Letter]:
        """Letters to this rank that have not been taken."""

    @abstractmethod
    def _taken(self, letter: Letter) -> None: ...

    @abstractmethod
    def end(self, words: str) -> None:
        """Tells it, and ends the job."""


class MPILetters(Letters):
    """Over an mpi4py communicator that carries no other messages between two ranks."""

    def __init__(self, comm: Any, monitor: Monitor) -> None:
        self._comm = comm
        self._lock = threading.Lock()
        self._box: list[Letter] = []
        self._sent: list[Any] = []
        super().__init__(monitor, comm.size)

    def _send(self, rank: int, letter: Letter) -> None:
        self._sent = [request for request in self._sent if not request.Test()]
        self._sent.append(self._comm.isend(tuple(letter), rank, TAG))

    def _found(self) -> list[Letter]:
        with self._lock:
            while self._comm.iprobe(tag=TAG):
                self._box.append(Letter(*self._comm.recv(tag=TAG)))
            return list(self._box)

    def _taken(self, letter: Letter) -> None:
        with self._lock:
            self._box.remove(letter)

    def end(self, words: str) -> None:
        from mpi4py import MPI

        _say(words)
        MPI.COMM_WORLD.Abort(1)


class StoreLetters(Letters):
    """Over the store of torch's default process group, by the name of a group."""

    def __init__(self, name: str, monitor: Monitor, size: int) -> None:
        self._store = torch.distributed.distributed_c10d._get_default_store()
        self._here = f"hpc_kfac/letters/{name}"
        super().__init__(monitor, size)

    def _send(self, rank: int, letter: Letter) -> None:
        self._store.set(self._key(letter.rank, rank, letter.number % 2), json.dumps(letter))

    def _found(self) -> list[Letter]:
        others = [rank for rank in range(self._size) if rank != self._monitor.rank]
        keys = [self._key(rank, self._monitor.rank, parity) for rank in others for parity in (0, 1)]
        return [Letter(*json.loads(self._store.get(key))) for key in keys if self._store.check([key])]

    def _taken(self, letter: Letter) -> None:
        pass  # the next but one replaces it

    def _key(self, source: int, target: int, parity: int) -> str:
        return f"{self._here}/{source}/{target}/{parity}"

    def leave(self) -> None:
        pass  # whoever waits for a process that is gone gets an error

    def end(self, words: str) -> None:
        _say(words)
        os._exit(1)


class _Lookout:
    """The thread that looks for all families of this process."""

    _families: list[Letters] = []
    _thread: threading.Thread | None = None
    _stop = threading.Event()
    _process = 0

    @classmethod
    def take(cls, letters: Letters) -> None:
        cls._families.append(letters)
        if cls._process != os.getpid():
            cls._process = os.getpid()
            cls._stop.clear()
            cls._thread = threading.Thread(target=cls._run, name="hpc_kfac lookout", daemon=True)
            cls._thread.start()
            atexit.register(leave)

    @classmethod
    def drop(cls, letters: Letters) -> None:
        if letters in cls._families:
            cls._families.remove(letters)

    @classmethod
    def stop(cls) -> Iterator[Letters]:
        if cls._process == os.getpid() and cls._thread is not None:
            cls._stop.set()
            cls._thread.join()
            cls._thread = None
            yield from cls._families

    @classmethod
    def _run(cls) -> None:
        while not cls._stop.wait(LOOK):
            for letters in list(cls._families):
                try:
                    words = letters.lost()
                except Exception:  # noqa: BLE001 - whatever carries letters is being shut down
                    continue
                if words:
                    letters.end(words)


def leave() -> None:
    """Ends the thread, as MPI_Finalize needs it, and tells the others that this rank ends."""
    mpi = getattr(sys.modules.get("mpi4py"), "MPI", None)
    for letters in _Lookout.stop():
        if not isinstance(letters, MPILetters) or (mpi is not None and not mpi.Is_finalized()):
            letters.leave()


def _say(words: str) -> None:
    sys.stdout.flush()
    sys.stderr.write(f"hpc_kfac: {words}\n")
    sys.stderr.flush()
