"""Why a run is to stop before its end: a signal, or a time limit that comes near."""

from __future__ import annotations

import math
import signal
import threading
import time
from types import FrameType, TracebackType
from typing import Any

from hpc_kfac.cluster.scheduler import parse_duration

SIGNALS = (signal.SIGTERM, signal.SIGUSR2)
SAVES = 3  # of the longest kind must fit in before the limit


class StopRequests:
    """Why this rank wants the run to stop: SIGTERM, SIGUSR2, or the time limit.

    A context manager: within it the two signals only leave a note, also the second and later ones, so that a save goes
    on; afterwards they do what they did before. Outside the main thread, where Python lets nobody handle signals, they
    are left alone. Ranks may differ in what they want; it is for the caller to agree.

    Args:
        time_limit: how long the run may take from here on, as `parse_duration` reads it; None for no limit.
        margin: seconds before the limit at which to stop, at least.
        deadline: unix time of a limit from elsewhere, such as `scheduler_deadline`; the earlier one counts.

    Raises:
        InputError: the time limit is no duration, or not positive.
    """

    def __init__(self, time_limit: str | float | None, margin: float, deadline: float | None = None) -> None:
        limits = [] if deadline is None else [deadline]
        if time_limit is not None:
            limits.append(time.time() + parse_duration(time_limit))
        self._deadline = min(limits, default=math.inf)
        self._margin = margin
        self._signal: signal.Signals | None = None
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopRequests:
        if threading.current_thread() is threading.main_thread():
            self._previous = {number: signal.signal(number, self._note) for number in SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, previous in self._previous.items():
            # None is a handler that Python has not installed and cannot put back.
            signal.signal(number, signal.SIG_DFL if previous is None else previous)
        self._previous = {}

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self._signal is None:
            self._signal = signal.Signals(number)

    @property
    def wanted(self) -> bool:
        """Whether the run is to stop."""
        return self._signal is not None or time.time() >= self._deadline - self._margin

    @property
    def reason(self) -> str | None:
        """In words, such as "SIGUSR2" or "the time limit in 58 s"; None if the run is to go on."""
        if self._signal is not None:
            return self._signal.name
        return f"the time limit in {max(0.0, self._deadline - time.time()):.0f} s" if self.wanted else None

    def saving_took(self, seconds: float) -> None:
        """Notes how long a save took: from then on there is time for three such before the limit."""
        self._margin = max(self._margin, SAVES * seconds)
