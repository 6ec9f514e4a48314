"""The clocks of all ranks, and the collectives between them.

The clocks are one vector, so that what a group of ranks does costs as much for 2 of them as for 16 384. What a rank
computes advances its clock; a collective begins when the last of its ranks has posted it and the network is free.
"""

from __future__ import annotations

from collections import Counter, defaultdict, deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from hpc_kfac.distributed.buffers import rounded
from hpc_kfac.engine.execution import REDUCTIONS
from hpc_kfac.engine.timing import Timeline

POOLED = ("reduce", "scaled", "scatter", "broadcast", "share")
"""Collectives with a buffer out of the pool."""


@dataclass(frozen=True)
class Conditions:
    """What does not go as it should.

    Args:
        jitter: spread of the ranks' speeds: each computes exp(jitter * z) times as long, z of a normal distribution.
        late: rank -> seconds that it begins the step later.
        dropped: ranks that are not there.
        seed: of the draws.
    """

    jitter: float = 0.0
    late: Mapping[int, float] = field(default_factory=dict)
    dropped: tuple[int, ...] = ()
    seed: int = 0

    def slowness(self, ranks: int) -> np.ndarray:
        """What each rank's computing is multiplied with, [ranks]."""
        return np.exp(self.jitter * np.random.default_rng(self.seed).standard_normal(ranks))


class Members:
    """Ranks as an index of the clocks."""

    def __init__(self, ranks: Sequence[int]) -> None:
        self.ranks = ranks
        self.index: slice | list[int]
        self._set: Sequence[int] | frozenset[int]
        if isinstance(ranks, range):
            self.index, self._set = slice(ranks.start, ranks.stop, ranks.step), ranks
        else:
            self.index, self._set = list(ranks), frozenset(ranks)

    def __contains__(self, rank: int) -> bool:
        return rank in self._set


@dataclass
class Flight:
    """A collective that was posted.

    Attributes:
        kind: of the plan's operation.
        about: in words.
        members: who takes part.
        posted: when the last of them did.
        seconds: that it takes alone.
        bytes: that each of them posts.
        done: when it ends; infinite if one of them is missing, None while it is not known.
        seen: whether the watched rank has waited for it.
    """

    kind: str
    about: str
    members: Members
    posted: float
    seconds: float
    bytes: int
    done: float | None = None
    seen: bool = False


class Clocks:
    """All ranks of a step.

    Args:
        ranks: how many.
        overlap: share of a collective that goes on while a rank computes.
        conditions: what does not go as it should.
        timeline: gets the spans of its rank.
        buffers: counts the messages of its rank.

    Attributes:
        now: seconds of each rank, [ranks]; infinite for one that is missing or waits for one.
        slowness: what a rank's computing is multiplied with, [ranks].
        busy: kind -> seconds that each rank has spent, [ranks]; "wait" for collectives.
        stalled: the first collective that nobody gets out of, in words; empty where all is well.
    """

    def __init__(
        self,
        ranks: int,
        overlap: float,
        conditions: Conditions,
        timeline: Timeline | None = None,
        buffers: Buffers | None = None,
    ) -> None:
        self.now = np.zeros(ranks)
        for rank, seconds in conditions.late.items():
            self.now[rank] += seconds
        self.now[list(conditions.dropped)] = np.inf
        self.slowness = conditions.slowness(ranks)
        self.busy: dict[str, np.ndarray] = defaultdict(lambda: np.zeros(ranks))
        self.stalled = ""
        self._overlap, self._timeline, self._buffers = overlap, timeline, buffers
        self._watched = timeline.rank if timeline is not None else buffers.rank if buffers is not None else -1
        self._network = np.zeros(ranks)  # until when each rank's is taken
        self._unsettled: deque[Flight] = deque()
        self._flying: list[Flight] = []
        self._reductions: list[Flight] = []
        self._noted = 0  # so many of them count in:
        self._reduced = np.zeros(ranks)
        self._posted: Counter[tuple[str, Members]] = Counter()

    def compute(self, kind: str, about: str, members: Members, took: float) -> None:
        """These ranks compute for so many seconds, each at its own speed."""
        if took <= 0.0:
            return
        if self._timeline is not None and self._watched in members and self.now[self._watched] < np.inf:
            start = float(self.now[self._watched])
            self._timeline.span(kind, about, start, start + took * float(self.slowness[self._watched]))
        spent = took * self.slowness[members.index]
        self.now[members.index] += spent
        self.busy[kind][members.index] += spent

    def post(self, kind: str, about: str, members: Members, took: float, nbytes: int) -> Flight:
        """These ranks post a collective and go on."""
        flight = Flight(kind, about, members, float(self.now[members.index].max()), took, nbytes)
        self._posted[kind, members] += nbytes
        self._unsettled.append(flight)
        self._flying.append(flight)
        if kind in REDUCTIONS:
            self._reductions.append(flight)
        if self._buffers is not None and self._watched in members and kind in POOLED:
            self._buffers.take(nbytes)
        return flight

    def wait(self, flights: Iterable[Flight], members: Members) -> None:
        """These ranks wait for those of the collectives that they take part in."""
        latest, first = 0.0, members.ranks[0]
        for flight in flights:
            if first in flight.members:
                latest = max(latest, self._settle(flight))
                self._watch(flight, members)
        if latest > 0.0:
            self._arrive(members.index, latest)

    def wait_for_reductions(self, members: Members) -> None:
        """These ranks wait for all reductions so far; each rank's latest end is kept, as every refresh asks for it."""
        for flight in self._reductions[self._noted :]:
            ends = self._reduced[flight.members.index]
            np.maximum(ends, self._settle(flight), out=ends)
            self._reduced[flight.members.index] = ends
        self._noted = len(self._reductions)
        if self._watched in members:
            for flight in self._reductions:
                self._watch(flight, members)
        self._arrive(members.index, self._reduced[members.index])

    def wait_for_all(self) -> None:
        """Every rank waits for everything that it has posted."""
        latest: dict[Members, float] = {}
        for flight in self._flying:
            latest[flight.members] = max(latest.get(flight.members, 0.0), self._settle(flight))
            self._watch(flight, flight.members)
        until = np.zeros_like(self.now)
        for members, done in latest.items():
            until[members.index] = np.maximum(until[members.index], done)
        self._arrive(slice(None), until)
        self._flying.clear()

    def traffic(self) -> dict[str, np.ndarray]:
        """Kind -> payload bytes that each rank has posted, [ranks]."""
        found: dict[str, np.ndarray] = {}
        for (kind, members), nbytes in self._posted.items():
            if nbytes:
                found.setdefault(kind, np.zeros(len(self.now), dtype=np.int64))[members.index] += nbytes
        return found

    def _arrive(self, index: slice | list[int], done: float | np.ndarray) -> None:
        """No rank is earlier than what it has waited for."""
        before = self.now[index]
        after = np.maximum(before, done)
        finite = np.isfinite(after)
        self.busy["wait"][index] += np.subtract(after, before, out=np.zeros_like(after), where=finite)
        self.now[index] = after

    def _settle(self, flight: Flight) -> float:
        """When a collective ends; those that were posted before it come first."""
        while flight.done is None:
            first = self._unsettled.popleft()
            index = first.members.index
            begin = max(first.posted, float(self._network[index].max()))
            if begin == np.inf:
                self.stalled = self.stalled or " of ".join(dict.fromkeys((first.kind, first.about)))
                first.done = np.inf
            else:
                first.done = _end(begin, float(self.now[index].max()), first.seconds, self._overlap)
            self._network[index] = first.done
        return flight.done

    def _watch(self, flight: Flight, members: Members) -> None:
        """Notes, once, what a wait means for the rank that is watched."""
        if flight.seen or self._watched not in members or self._watched not in flight.members:
            return
        flight.seen = True
        if self._timeline is not None and self.now[self._watched] < np.inf:
            done = flight.done if flight.done is not None and flight.done < np.inf else 0.0
            start = float(self.now[self._watched])
            posted = flight.posted if flight.posted < np.inf else start
            self._timeline.flight(flight.kind, flight.about, posted, max(done, posted))
            self._timeline.span(flight.kind, f"wait, {flight.about}", start, max(start, done))
        if self._buffers is not None and flight.kind in POOLED:
            self._buffers.give_back(flight.bytes)


def _end(begin: float, now: float, took: float, overlap: float) -> float:
    """When a collective ends whose ranks have computed until now: only a share of that time moved it."""
    if overlap * (now - begin) >= took:
        return begin + (took / overlap if overlap else 0.0)
    return max(begin, now) + took - overlap * max(0.0, now - begin)


class Buffers:
    """Counts buffers that are lent and given back, class by class.

    Args:
        rank: whose they are.

    Attributes:
        allocated: bytes held, in use or free.
    """

    def __init__(self, rank: int) -> None:
        self.rank = rank
        self.allocated = 0
        self._free: Counter[int] = Counter()

    def take(self, nbytes: int) -> None:
        """As of the pool."""
        size = rounded(nbytes)
        if self._free[size]:
            self._free[size] -= 1
        else:
            self.allocated += size

    def give_back(self, nbytes: int) -> None:
        """As of the pool, by the size that was asked for."""
        self._free[rounded(nbytes)] += 1
