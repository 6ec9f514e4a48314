"""Seconds by phase, and timelines. On the host's clock: a GPU runs behind it."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, MutableMapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def timed(seconds: MutableMapping[str, float], phase: str) -> Iterator[None]:
    """Adds the time spent in the block to ``seconds[phase]``."""
    start = time.perf_counter()
    try:
        yield
    finally:
        seconds[phase] = seconds.get(phase, 0.0) + time.perf_counter() - start


class Timeline:
    """What a rank did when, for a trace viewer (chrome://tracing, Perfetto). Notes nothing until it is started.

    Attributes:
        recording: whether spans are noted.
    """

    def __init__(self, rank: int = 0) -> None:
        self.rank = rank
        self.recording = False
        self._events: list[dict[str, Any]] = []

    def span(self, name: str, about: str, start: float, end: float) -> None:
        """Something that this rank did from `start` to `end`, in seconds of `time.perf_counter`."""
        if self.recording:
            self._add("X", name, about, start, dur=1e6 * (end - start), tid=0)

    def flight(self, name: str, about: str, posted: float, arrived: float) -> None:
        """A collective that was under way, beside whatever this rank did."""
        if self.recording:
            self._add("b", name, about, posted, id=len(self._events), tid=1)
            self._add("e", name, about, arrived, id=len(self._events) - 1, tid=1)

    def write(self, path: Path) -> None:
        """Writes a Chrome trace (JSON) of what was noted."""
        names = {0: "rank", 1: "collectives in flight"}
        labels = [
            {"ph": "M", "name": "thread_name", "pid": self.rank, "tid": tid, "args": {"name": name}}
            for tid, name in names.items()
        ]
        path.write_text(json.dumps({"traceEvents": [*labels, *self._events], "displayTimeUnit": "ms"}))

    def _add(self, phase: str, name: str, about: str, at: float, **more: Any) -> None:
        event = {"ph": phase, "name": name, "cat": "hpc_kfac", "ts": 1e6 * at, "pid": self.rank, "args": {"of": about}}
        self._events.append({**event, **more})
