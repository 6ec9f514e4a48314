"""Where a run starts: anew, where it was stopped, or from another run's checkpoint."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import yaml

from hpc_kfac.checkpoint import BrokenCheckpoint, Saved, find, newest
from hpc_kfac.checkpoint.sets import clean
from hpc_kfac.cluster.errors import InputError
from hpc_kfac.cluster.ranks import Ranks
from hpc_kfac.distributed import lent
from hpc_kfac.training.config import Settings
from hpc_kfac.training.run_folder import DONE
from hpc_kfac.training.settings_changes import Changes, compare


@dataclass(frozen=True)
class Start:
    """Where a run starts.

    Attributes:
        folder: to work in; None for a new one.
        source: what to go on from; None for nothing.
        finished: why there is nothing to do, or None.
    """

    folder: Path | None = None
    source: Path | None = None
    finished: str | None = None


def find_start(settings: Settings, ranks: Ranks) -> Start:
    """Looks on rank 0 for what `resume` says. Collective.

    Raises:
        InputError: a path that is not there.
    """
    start = Start()
    with ranks.agreed():
        if ranks.rank == 0:
            start = _look(settings)
    return ranks.broadcast(start)


def _look(settings: Settings) -> Start:
    resume = settings.run.resume
    if resume == "never":
        return Start()
    if resume != "auto":
        if not Path(resume).exists():
            raise InputError(f"resume is {resume}, which is not there; give auto, never, or a run folder or checkpoint")
        return Start(source=Path(resume))
    folder = _own_folder(settings)
    done = folder / DONE
    if done.exists():
        _check_same_run(folder, settings)
        return Start(folder, finished=_done_text(done))
    return Start(folder, folder / "checkpoints")


def _own_folder(settings: Settings) -> Path:
    """The run's folder; one of an earlier version had the task's name, and is gone on with if it is this run's."""
    runs = Path(settings.run.run_dir)
    folder, earlier = runs / settings.name, runs / settings.task_name
    if settings.run.name is None and not folder.exists() and earlier.exists():
        differences = _differences(earlier, settings)
        if differences is not None and not differences.contradictory + differences.taken:
            return earlier
    return folder


def _check_same_run(folder: Path, settings: Settings) -> None:
    """Refuses to take a run that has ended for another one.

    Raises:
        InputError: its settings differ.
    """
    differences = _differences(folder, settings)
    lines = [] if differences is None else differences.contradictory + differences.taken
    if lines:
        raise InputError(
            f"the run in {folder} has ended, and its settings are not these:\n  " + "\n  ".join(lines)
            + f"\nGive this run a --name of its own, or go on from there with --resume {folder}."
        )  # fmt: skip


def _differences(folder: Path, settings: Settings) -> Changes | None:
    """Between a run's settings and these; None where it has left none."""
    try:
        return compare((folder / "settings.yaml").read_text(), settings.resolved)
    except (OSError, ValueError, yaml.YAMLError):
        return None


def _done_text(done: Path) -> str:
    try:
        summary = json.loads(done.read_text())["summary"]
    except (OSError, ValueError, LookupError, TypeError):
        summary = "It is complete."
    return (
        f"The run in {done.parent} has ended. {summary}\n"
        "Use --resume never or another --name for a new run; --resume with this folder's path and more epochs to go on."
    )


def load_start(start: Start, settings: Settings, ranks: Ranks, say: Callable[[str], None]) -> Saved | None:
    """The checkpoint to go on from, once it has been checked and its settings compared. Collective.

    Args:
        start: where to look.
        settings: of this run.
        ranks: all that train.
        say: gets what has changed, on rank 0.

    Raises:
        InputError: no checkpoint is in order, or it was made with settings that contradict these.
    """
    if start.source is None:
        return None
    if start.folder is not None:
        with ranks.agreed():
            if ranks.rank == 0:
                clean(start.source)  # puts back a set that a killed job was about to replace
    try:
        with lent(ranks.carrier) as comm:
            saved = (newest if start.folder is not None else find)(start.source, comm, say)
    except BrokenCheckpoint as error:
        raise InputError(f"{error} (--resume never)" if start.folder is not None else str(error)) from error
    if saved is None:
        return None
    with ranks.agreed():
        if "run" not in saved.common:
            raise InputError(f"{saved.path} was not written by the trainer; take its weights with --init-from")
        changes = compare(saved.common["run"]["settings"], settings.resolved)
        if changes.contradictory:
            raise InputError(
                f"{saved.path} cannot be gone on from:\n  " + "\n  ".join(changes.contradictory)
                + "\nUse the checkpoint's settings, or take its weights alone with --init-from."
            )  # fmt: skip
    changed = changes.taken + changes.unknown
    if changed and ranks.rank == 0:
        say("Settings that have changed since: " + "; ".join(changed))
    return saved
