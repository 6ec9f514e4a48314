"""Finds out, while a rank waits for a collective for too long, which ranks are missing, and ends the job saying so."""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

KEPT_POSTINGS = 256


@dataclass(frozen=True, eq=False)
class Posting:
    """One collective that this rank has posted.

    Attributes:
        group: name of its communicator, the same on all of its ranks.
        members: ranks of its communicator.
        number: how many collectives were posted on that communicator, with this one.
        kind: what it does, e.g. "allreduce".
        label: what its traffic is counted under.
        about: what is in it.
        time: when it was posted, on this process's monotonic clock.
    """

    group: str
    members: tuple[int, ...]
    number: int
    kind: str
    label: str
    about: str
    time: float

    def __str__(self) -> str:
        return f"{self.kind} '{self.label}'" + (f" ({self.about})" if self.about else "")


class Monitor:
    """What this rank does, for its watchdog.

    Attributes:
        rank: of this process, in the communicator that all others were split from.
        posted: number of collectives posted by name of the communicator.
        recent: the last ones, newest last.
    """

    def __init__(self) -> None:
        self.rank = 0
        self.posted: Counter[str] = Counter()
        self.recent: deque[Posting] = deque(maxlen=KEPT_POSTINGS)
        self._waits: dict[Posting, float] = {}

    def post(self, group: str, members: tuple[int, ...], kind: str, label: str, about: str) -> Posting:
        """Notes that a collective was posted."""
        self.posted[group] += 1
        posting = Posting(group, members, self.posted[group], kind, label, about, time.monotonic())
        self.recent.append(posting)
        return posting

    @contextmanager
    def waiting(self, posting: Posting) -> Iterator[None]:
        """Notes that a thread waits for a collective while in the block."""
        self._waits[posting] = time.monotonic()
        try:
            yield
        finally:
            del self._waits[posting]

    def oldest_wait(self) -> tuple[Posting, float] | None:
        """What has been waited for longest, and since when; None if nothing is waited for."""
        waits = list(self._waits.items())
        return min(waits, key=lambda wait: wait[1]) if waits else None
