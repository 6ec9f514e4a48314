"""Why a run is to stop before its end: a signal, or a time limit that comes near."""

from __future__ import annotations

import json
import math
import re
import signal
import subprocess
import threading
import time
from collections.abc import Mapping
from types import FrameType, TracebackType
from typing import Any

from hpc_kfac.cluster.ranks import InputError

SIGNALS = (signal.SIGTERM, signal.SIGUSR2)
SAVES = 3  # of the longest kind must fit in before the limit
PATIENCE = 10.0  # seconds for an answer of the scheduler
UNITS = {"d": 86400.0, "h": 3600.0, "m": 60.0, "s": 1.0}


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


def parse_duration(text: str | float) -> float:
    """Seconds of a duration.

    Forms: 90, 90s, 15m, 4h, 2d, 1h30m, and with colons 1:30 (minutes and seconds), 1:30:00, 2-00:00:00 (days first;
    2-12 and 2-12:30 go down to hours and minutes). With colons they are Slurm's. A bare number is seconds here and
    minutes there.

    Raises:
        InputError: it is none of these, or not positive.
    """
    try:
        seconds = _seconds(str(text).strip())
    except ValueError:
        seconds = math.nan
    if not 0 < seconds < math.inf:
        raise InputError(f"time limit {text!r} is no duration; write it like 90s, 15m, 4h, 1:30:00 or 2-00:00:00")
    return seconds


def scheduler_deadline(environ: Mapping[str, str]) -> float | None:
    """Unix time at which the scheduler ends this job, as far as it tells: Slurm, PBS or LSF.

    Args:
        environ: the job's environment; the scheduler's command is looked for on its PATH.

    Returns:
        None without a scheduler, without a limit, or if it does not answer within 10 s.
    """
    for variable, ask in (("SLURM_JOB_ID", _slurm), ("PBS_JOBID", _pbs), ("LSB_JOBID", _lsf)):
        if variable in environ:
            try:
                return ask(environ[variable], environ)
            except (OSError, subprocess.SubprocessError, ValueError, LookupError, TypeError):
                return None
    return None


def _slurm(job: str, environ: Mapping[str, str]) -> float:
    if environ.get("SLURM_JOB_END_TIME", "").isdigit():
        return float(environ["SLURM_JOB_END_TIME"])
    lines = scheduler_answer(["squeue", "-h", "-j", job, "-o", "%L"], environ).split()
    return time.time() + _seconds(lines[0])  # UNLIMITED and NOT_SET are no durations


def _pbs(job: str, environ: Mapping[str, str]) -> float:
    (facts,) = json.loads(scheduler_answer(["qstat", "-f", "-F", "json", job], environ))["Jobs"].values()
    limit = _seconds(facts["Resource_List"]["walltime"])
    # Not resources_used.walltime: it is minutes old.
    return time.mktime(time.strptime(facts["stime"], "%a %b %d %H:%M:%S %Y")) + limit


def _lsf(job: str, environ: Mapping[str, str]) -> float:
    index = environ.get("LSB_JOBINDEX", "0")
    which = job if index in ("", "0") else f"{job}[{index}]"
    text = scheduler_answer(["bjobs", "-noheader", "-o", "time_left", which], environ)
    found = re.match(r"(\d+):(\d+)\b", text.strip())  # hours, minutes, and a letter for what kind of limit it is
    if found is None:
        raise ValueError(text)
    return time.time() + 3600 * int(found[1]) + 60 * int(found[2])


def scheduler_answer(command: list[str], environ: Mapping[str, str]) -> str:
    """What a command of the scheduler prints; an exception if it fails or is not there in time."""
    result = subprocess.run(
        command, env=dict(environ), stdin=subprocess.DEVNULL, capture_output=True, text=True, check=True,
        timeout=PATIENCE,
    )  # fmt: skip
    return result.stdout


def _seconds(text: str) -> float:
    """Of any of the forms, zero included; ValueError for others."""
    number = r"\d+(?:\.\d+)?"
    if re.fullmatch(number, text):
        return float(text)
    if re.fullmatch(rf"(?:{number}[dhms])+", text):
        return sum(float(amount) * UNITS[unit] for amount, unit in re.findall(rf"({number})([dhms])", text))
    found = re.fullmatch(r"(?:(\d+)-)?(\d+(?::\d+){0,2})", text)
    if found is None:
        raise ValueError(text)
    parts = [int(part) for part in found[2].split(":")]
    if found[1] is None:  # M:S or H:M:S; behind days the hours come first
        parts = [0] * (3 - len(parts)) + parts
    return 86400 * int(found[1] or 0) + sum(part * unit for part, unit in zip(parts, (3600, 60, 1), strict=False))
