"""What a rank has posted and waits for."""

from __future__ import annotations

import threading
import time
from collections import Counter, deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

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


class Answer(NamedTuple):
    """What a rank says of itself.

    Attributes:
        arrived: it has posted the collective that it was asked about.
        posted: what that was, as (kind, label); None if it is not known.
        waits: it waits for some collective.
        doing: what it does, in words.
    """

    arrived: bool
    posted: tuple[str, str] | None
    waits: bool
    doing: str


class Monitor:
    """What this rank does, for its watchdog.

    Attributes:
        rank: of this process, in the communicator that all others were split from.
        posted: number of collectives posted by name of the communicator.
        recent: the last ones, newest last.
        steps: that it has taken.
    """

    def __init__(self) -> None:
        self.rank = self.steps = 0
        self.posted: Counter[str] = Counter()
        self.recent: deque[Posting] = deque(maxlen=KEPT_POSTINGS)
        self._waits: dict[Posting, float] = {}
        self._main: dict[Posting, float] = {}  # those of the main thread

    def post(self, group: str, members: tuple[int, ...], kind: str, label: str, about: str) -> Posting:
        """Notes that a collective was posted."""
        self.posted[group] += 1
        posting = Posting(group, members, self.posted[group], kind, label, about, time.monotonic())
        self.recent.append(posting)
        return posting

    @contextmanager
    def waiting(self, posting: Posting) -> Iterator[None]:
        """Notes that a thread waits for a collective while in the block."""
        self._waits[posting] = now = time.monotonic()
        if threading.current_thread() is threading.main_thread():
            self._main[posting] = now
        try:
            yield
        finally:
            del self._waits[posting]
            self._main.pop(posting, None)

    def oldest_wait(self) -> tuple[Posting, float] | None:
        """What has been waited for longest, and since when; None if nothing is waited for."""
        waits = list(self._waits.items())
        return min(waits, key=lambda wait: wait[1]) if waits else None

    def main_wait(self) -> tuple[Posting, float] | None:
        """What the main thread waits for, and since when."""
        return next(iter(list(self._main.items())), None)

    def answer(self, group: str, number: int) -> Answer:
        """What another rank wants to know that waits for collective `number` of a group."""
        recent, wait, now = list(self.recent), self.oldest_wait(), time.monotonic()
        if wait is not None:
            doing = f"has waited {now - wait[1]:.1f} s for {wait[0]}"
        elif recent:
            doing = f"last posted {recent[-1]}, {now - recent[-1].time:.1f} s ago, and waits for no collective"
        else:
            doing = "has posted nothing so far"
        same = next((p for p in recent if (p.group, p.number) == (group, number)), None)
        return Answer(self.posted[group] >= number, (same.kind, same.label) if same else None, wait is not None, doing)
