"""How runs are doing, from their own files and, where there is one, the scheduler. Never fails over a broken file."""

from __future__ import annotations

import json
import math
import os
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tabulate import tabulate

from hpc_kfac.checkpoint.sets import list_sets, step_of
from hpc_kfac.cluster import lease
from hpc_kfac.cluster.errors import INTERRUPTED, InputError
from hpc_kfac.cluster.scheduler import GONE, UNKNOWN, WAITING, Job, ask_scheduler, job_of
from hpc_kfac.training.run_folder import DONE, STOPPED

TAIL = 256 * 1024  # bytes of the metrics that are read; rows of large models have some kB
RECENT = 5  # rows of metrics whose step times tell the time that is left
STALE = 30.0  # seconds without a sign of life; the lease is renewed every 5


@dataclass(frozen=True)
class Status:
    """What is known of a run; None for what is not.

    Attributes:
        run: its folder.
        state: training; starting (the job runs, nobody trains yet); waiting (in the queue, to go on); complete;
            interrupted (asked to stop, can go on); stopped (by an error); silent (ended without a word); or unknown.
        since: ISO time at which it came into this state, as far as the files tell.
        step: of the last row of metrics.
        steps: of the whole run.
        seconds_left: of training, judged by the last rows of metrics.
        loss: in the last row.
        restarts: so far.
        checkpoint: step of the newest one.
        job: id at the scheduler.
        job_state: what the scheduler says of it; unknown if it does not answer, gone if it does not know the job.
        error: why the run ended early the last time.
    """

    run: str
    state: str
    since: str | None
    step: int | None
    steps: int | None
    seconds_left: float | None
    loss: float | None
    restarts: int
    checkpoint: int | None
    job: str | None
    job_state: str | None
    error: str | None


def find_runs(paths: Sequence[Path]) -> list[Path]:
    """Run folders, oldest first: the given ones, and those in given folders.

    Raises:
        InputError: a path is no folder, or nothing of a run is in it.
    """
    found: list[Path] = []
    for path in paths:
        if not path.is_dir():
            raise InputError(f"{path} is no folder; give run folders, or a folder of them such as logs")
        runs = [path] if _is_run(path) else [entry for entry in path.iterdir() if entry.is_dir() and _is_run(entry)]
        if not runs:
            raise InputError(f"there is no run in {path}; give run folders, or a folder of them such as logs")
        found += runs
    return sorted(dict.fromkeys(found), key=lambda run: (_modified(run / "settings.yaml") or 0.0, run.name))


def look(runs: Sequence[Path], environ: Mapping[str, str] = os.environ) -> list[Status]:
    """What is known of each run."""
    starts = {run: _starts(run) for run in runs}
    jobs = {run: job_of(starts[run][-1]) for run in runs}
    told = ask_scheduler({job for run, job in jobs.items() if job and not (run / DONE).exists()}, environ)
    return [_status(run, starts[run], jobs[run], told) for run in runs]


def table(found: Sequence[Status]) -> str:
    """As text, with the last error of a run in a line below it."""
    header = ("run", "state", "step", "", "left", "loss", "restarts", "checkpoint", "job")
    rows = [header, *map(_row, found)]
    head, *lines = tabulate(rows, headers="firstrow", tablefmt="plain", disable_numparse=True).splitlines()
    text = [head]
    for line, status in zip(lines, found, strict=True):
        text.append(line)
        if status.error and status.state != "complete":
            text.append(f"    last error: {status.error.splitlines()[0]}")
    return "\n".join(text)


def as_json(found: Sequence[Status]) -> str:
    """As a JSON list."""
    return json.dumps([asdict(status) for status in found], indent=2)


# A run's own files


def _is_run(path: Path) -> bool:
    return any((path / name).exists() for name in ("run.json", lease.NAME, STOPPED, DONE))


def _starts(run: Path) -> list[dict[str, Any]]:
    """The facts of a run's starts, the first one's first."""
    first = _read(run / "run.json")
    later = first.get("restarts")
    return [first, *(start for start in (later if isinstance(later, list) else []) if isinstance(start, dict))]


def _status(run: Path, starts: list[dict[str, Any]], job: Job | None, told: Mapping[Job, str]) -> Status:
    note = _read(run / STOPPED)
    rows = _last_rows(run / "metrics.jsonl")
    newest: dict[str, Any] = rows[-1] if rows else {}
    step, steps = _whole(newest.get("step")), _whole(starts[-1].get("steps"))
    job_state = told.get(job) if job is not None else None
    state, since = _state(run, job_state, note)
    times = [row["step_seconds"] for row in rows[-RECENT:] if _number(row.get("step_seconds")) is not None]
    left = None
    if state == "training" and times and step is not None and steps is not None:
        left = max(0, steps - step) * statistics.fmean(times)
    return Status(
        run=str(run),
        state=state,
        since=since,
        step=step,
        steps=steps,
        seconds_left=left,
        loss=_number(newest.get("loss")),
        restarts=len(starts) - 1,
        checkpoint=_newest_checkpoint(run),
        job=job[1] if job is not None else None,
        job_state=job_state,
        error=str(note["reason"]) if "reason" in note else None,
    )


def _state(run: Path, job_state: str | None, note: Mapping[str, Any]) -> tuple[str, str | None]:
    """State, and since when."""
    done, stopped, alive = (_modified(run / name) for name in (DONE, STOPPED, lease.NAME))
    if done is not None:
        return "complete", _clock(done)
    if alive is not None and time.time() - alive < STALE:
        return "training", None
    if job_state in WAITING:
        return "waiting", _clock(stopped or alive)
    runs = job_state not in (None, UNKNOWN, GONE)
    interrupted = stopped is not None and note.get("status") == INTERRUPTED
    if runs and (interrupted or (stopped is None and alive is None)):
        return "starting", None
    if stopped is not None:
        return ("interrupted" if interrupted else "stopped"), _clock(stopped)
    if alive is not None:
        return "silent", _clock(alive)
    return "unknown", _clock(_modified(run / "metrics.jsonl"))


def _newest_checkpoint(run: Path) -> int | None:
    try:
        sets = list_sets(run / "checkpoints")
        return next((step_of(path) for path in sets if (path / "manifest.json").exists()), None)
    except OSError:
        return None


def _last_rows(path: Path) -> list[dict[str, Any]]:
    """Rows of training at the end of the metrics; half-written lines and other rows are left out."""
    try:
        with open(path, "rb") as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - TAIL))
            lines = file.read().splitlines()
    except OSError:
        return []
    rows = (_parsed(line) for line in lines)
    return [row for row in rows if row.get("kind") == "train"]


def _read(path: Path) -> dict[str, Any]:
    try:
        return _parsed(path.read_bytes())
    except OSError:
        return {}


def _parsed(text: bytes | str) -> dict[str, Any]:
    """A JSON object; an empty one for anything else."""
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _whole(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def _number(value: Any) -> float | None:
    """A finite number; None for anything else."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return float(value) if is_number and math.isfinite(value) else None


def _modified(path: Path) -> float | None:
    """Time of the last change. Opening a file is what renews times on network folders."""
    try:
        with open(path, "rb") as file:
            return os.fstat(file.fileno()).st_mtime
    except OSError:
        return None


def _clock(seconds: float | None) -> str | None:
    return None if seconds is None else time.strftime("%Y-%m-%dT%H:%M:%S%z", time.localtime(seconds))


# The scheduler


# Text


def _row(status: Status) -> tuple[str, ...]:
    steps = "" if status.step is None else str(status.step)
    share = ""
    if status.steps is not None:
        steps = f"{steps or 0}/{status.steps}"
        share = f"{100 * (status.step or 0) / status.steps:.0f} %" if status.steps else ""
    state = status.state
    if status.since is not None and state in ("silent", "stopped", "interrupted", "waiting"):
        state += f" since {status.since[5:16].replace('T', ' ')}"
    job = " ".join(word for word in (status.job, status.job_state) if word is not None)
    loss = "" if status.loss is None else f"{status.loss:.4g}"
    checkpoint = "none" if status.checkpoint is None else str(status.checkpoint)
    left = "" if status.seconds_left is None else _duration(status.seconds_left)
    return (status.run, state, steps, share, left, loss, str(status.restarts), checkpoint, job)


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}"
