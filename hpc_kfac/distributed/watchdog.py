"""Finds out, while a rank waits for a collective for too long, which ranks are missing, and ends the job saying so."""

from __future__ import annotations

import atexit
import os
import platform
import select
import signal
import sys
import threading
import time
import weakref
from collections.abc import Callable, Collection, Mapping
from typing import Any

from hpc_kfac.distributed.monitor import Answer, Monitor, Posting

ASK, ANSWER = 1, 2  # tags of messages
SHOWN = 8  # ranks that a message names, at most
LASTING = 0.2  # seconds; a launcher leaves ranks half a second between SIGTERM and SIGKILL


_ALIVE: weakref.WeakSet[Watchdog] = weakref.WeakSet()


def stop_all() -> None:
    """Ends the threads of all watchdogs of this process, as MPI_Finalize needs it."""
    for watchdog in list(_ALIVE):
        watchdog.stop()


class Watchdog:
    """A thread that ends the job when a wait lasts too long, with one message that names the collective and the ranks.

    The thread of a rank that has waited too long asks those of all others how far they are, by messages on a
    communicator of their own. It does not speak while a lower rank asks, too, so that one rank alone does: once it has
    made up its mind it answers nobody, and whoever asks later waits for that answer until the job has ended.

    Where nobody else has a use for them, it also takes SIGTERM's default and Python's wake-up descriptor, to say what
    was being waited for when the launcher ends this rank because another one died. A program's own handler of SIGTERM
    is left as it is.

    Args:
        comm: mpi4py communicator of all ranks that the monitor's communicator was made from. Collective.
        monitor: what this rank does.
        seconds: how long a wait may last.
        say: shows a message; default: standard error.
        abort: ends all ranks; default: MPI's Abort of the world.

    Raises:
        ValueError: seconds are not positive.
    """

    def __init__(
        self,
        comm: Any,
        monitor: Monitor,
        seconds: float,
        say: Callable[[str], None] | None = None,
        abort: Callable[[int], None] | None = None,
    ) -> None:
        if seconds <= 0:
            raise ValueError(f"the longest wait is {seconds} s; give a positive number of seconds")
        from mpi4py import MPI

        self._mpi, self._comm, self._monitor, self._seconds = MPI, comm.Dup(), monitor, seconds
        self._say, self._abort = say or _say, abort or MPI.COMM_WORLD.Abort
        self._hosts = self._comm.allgather(platform.node())
        self._interval = min(0.1, seconds / 20)  # between looks
        self._patience = max(1.0, seconds / 10)  # for answers; longer than an abort takes to reach all ranks
        self._quiet_until = self._told_until = 0.0  # a lower rank, any rank has asked and may be about to speak
        self._asked = 0
        self._sent: list[Any] = []
        self._bell, self._push = os.pipe()  # bytes: signals by number, 0 to stop
        self._takes_sigterm = _take_sigterm(self._push)
        self._thread = threading.Thread(target=self._run, name="hpc_kfac watchdog", daemon=True)
        self._thread.start()
        atexit.register(self.stop)
        _ALIVE.add(self)

    def stop(self) -> None:
        """Ends the thread; call it before MPI is finalized. A rank that has stopped answers no other."""
        if not self._thread.is_alive():
            return
        os.write(self._push, b"\0")
        self._thread.join()
        atexit.unregister(self.stop)
        if self._takes_sigterm:
            _give_sigterm_back()
        os.close(self._bell)
        os.close(self._push)

    def free(self) -> None:
        """Stops, and gives the communicator back. Collective."""
        self.stop()
        if not self._mpi.Is_finalized() and self._comm != self._mpi.COMM_NULL:
            self._comm.Free()

    def _run(self) -> None:
        while True:
            rung = self._sleep(self._interval)
            if 0 in rung or self._mpi.Is_finalized():
                return
            self._answer_all()  # first, for a rank that was stopped learns by it that its stall has been told
            if signal.SIGTERM in rung:
                self._last_words()
            wait = self._overdue()
            if wait is not None:
                self._investigate(*wait)

    def _sleep(self, seconds: float) -> bytes:
        ready, _, _ = select.select([self._bell], [], [], seconds)
        return os.read(self._bell, 100) if ready else b""

    def _overdue(self) -> tuple[Posting, float] | None:
        wait, now = self._monitor.oldest_wait(), time.monotonic()
        # A low rank begins, so that the others hear its question before they ask themselves.
        limit = self._seconds + 2 * self._interval * min(self._comm.rank, 10)
        return wait if wait is not None and now >= self._quiet_until and now - wait[1] >= limit else None

    def _answer_all(self) -> None:
        status = self._mpi.Status()
        while self._comm.iprobe(self._mpi.ANY_SOURCE, ASK, status):
            asked, group, number = self._comm.recv(source=status.source, tag=ASK)
            self._told_until = time.monotonic() + 3 * self._patience
            if status.source < self._comm.rank:
                self._quiet_until = self._told_until
            self._send((asked, self._monitor.answer(group, number)), status.source, ANSWER)

    def _send(self, message: object, to: int, tag: int) -> None:
        self._sent = [request for request in self._sent if not request.Test()]
        self._sent.append(self._comm.isend(message, to, tag))

    def _investigate(self, posting: Posting, since: float) -> None:
        """Asks all others; ends the job unless a lower rank asks, too, or the wait has ended meanwhile."""
        self._asked += 1
        for rank in range(self._comm.size):
            if rank != self._comm.rank:
                self._send((self._asked, posting.group, posting.number), rank, ASK)
        answers: dict[int, Answer] = {}
        deadline = time.monotonic() + self._patience
        status = self._mpi.Status()
        while len(answers) < self._comm.size - 1 and time.monotonic() < deadline:
            time.sleep(self._interval / 10)
            while self._comm.iprobe(self._mpi.ANY_SOURCE, ANSWER, status):
                asked, answer = self._comm.recv(source=status.source, tag=ANSWER)
                if asked == self._asked:
                    answers[status.source] = answer
            self._answer_all()
        current = self._monitor.oldest_wait()
        if time.monotonic() >= self._quiet_until and current is not None and current[0] is posting:
            self._say(self._story(posting, time.monotonic() - since, answers))
            self._abort(1)

    def _story(self, posting: Posting, waited: float, answers: Mapping[int, Answer]) -> str:
        lines = [f"{self._waited(posting, waited)}, number {posting.number} on {_ranks(posting.members)}:"]
        found = {rank: _fault(posting, answers.get(rank)) for rank in posting.members if rank != self._comm.rank}
        blamed = {rank: fault for rank, fault in found.items() if fault}
        if all(rank in answers and answers[rank].waits for rank in blamed):  # they are held up by ranks elsewhere
            for rank in set(range(self._comm.size)) - set(posting.members):
                answer = answers.get(rank)
                if answer is None or not answer.waits:
                    blamed[rank] = answer.doing if answer else _fault(posting, None)
        for rank in sorted(blamed)[:SHOWN]:
            lines.append(f"  rank {rank} on {self._hosts[rank]} {blamed[rank]}")
        if len(blamed) > SHOWN:
            lines.append(f"  and {len(blamed) - SHOWN} more ranks")
        if not blamed:
            lines.append("  all of its ranks have posted it: MPI or the network does not carry it out")
        limit = f"{self._seconds:g} s"
        lines.append(f"  The job is ended. A rank may be late by {limit}; raise this limit if that is too short.")
        return "\n".join(lines)

    def _waited(self, posting: Posting, seconds: float) -> str:
        rank, size = self._comm.rank, self._comm.size
        return f"hpc_kfac: rank {rank} of {size} on {self._hosts[rank]} has waited {seconds:.1f} s for {posting}"

    def _last_words(self) -> None:
        dies = self._takes_sigterm and signal.getsignal(signal.SIGTERM) is _die
        wait = self._monitor.oldest_wait()
        if not dies:  # whoever handles the signal may be about to go on: only a wait that lasts is worth a word
            time.sleep(LASTING)
            before, wait = wait, self._monitor.oldest_wait()
            wait = wait if before is not None and wait == before else None
        now = time.monotonic()
        # Of the first two ranks at least one is alive to say it. A stall that another rank found is told by that.
        if wait is not None and now - wait[1] >= self._interval and self._comm.rank < 2 and now >= self._told_until:
            self._say(f"{self._waited(wait[0], now - wait[1])} when SIGTERM came")
        if dies:
            os._exit(128 + signal.SIGTERM)  # the main thread may be held in a call for long


def _fault(posting: Posting, answer: Answer | None) -> str:
    """What is wrong with a rank that ought to have posted this; empty if nothing is."""
    if answer is None:
        return "does not answer: it is stopped or dead, or cut off"
    if not answer.arrived:
        return f"has not posted it: it {answer.doing}"
    if answer.posted is not None and answer.posted != (posting.kind, posting.label):
        kind, label = answer.posted
        return f"posted {kind} '{label}' in its place: all ranks must post the same collectives in the same order"
    return ""


def _ranks(members: Collection[int]) -> str:
    shown = ", ".join(map(str, sorted(members)[:SHOWN]))
    return f"ranks {shown}" + (f" and {len(members) - SHOWN} more" if len(members) > SHOWN else "")


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _take_sigterm(descriptor: int) -> bool:
    """Has the numbers of signals written to a pipe, even while the main thread is in MPI, and makes SIGTERM one."""
    os.set_blocking(descriptor, False)
    if threading.current_thread() is not threading.main_thread():
        return False
    previous = signal.set_wakeup_fd(descriptor, warn_on_full_buffer=False)
    if previous != -1:
        signal.set_wakeup_fd(previous)
        return False
    # A forked process has the same pipe, and must not ring for its parent.
    os.register_at_fork(after_in_child=lambda: signal.set_wakeup_fd(-1))
    if signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
        signal.signal(signal.SIGTERM, _die)
    return True


def _give_sigterm_back() -> None:
    signal.set_wakeup_fd(-1)
    if signal.getsignal(signal.SIGTERM) is _die:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _die(number: int, frame: object) -> None:
    signal.signal(number, signal.SIG_DFL)
    os.kill(os.getpid(), number)
