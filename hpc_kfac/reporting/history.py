"""What a run folder tells of a run: its columns, with what happened at which step."""

from __future__ import annotations

import fnmatch
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from hpc_kfac.checkpoint.sets import list_sets, step_of
from hpc_kfac.cluster.errors import InputError
from hpc_kfac.reporting.rows import Metrics, Numbers

AXES = {"step": "steps", "samples": "samples", "seconds": "seconds of training"}
"""What curves are drawn against, and how an axis is labelled."""


@dataclass
class Marks:
    """Steps at which something happened.

    Attributes:
        checkpoints: of those that are there.
        restarts: from which the run went on.
        rollbacks: to which it went back because its loss had blown up.
    """

    checkpoints: list[int] = field(default_factory=list)
    restarts: list[int] = field(default_factory=list)
    rollbacks: list[int] = field(default_factory=list)


@dataclass
class History:
    """A run, as far as it has come.

    Attributes:
        label: a letter, which stands for the run in pictures.
        folder: of the run.
        facts: of run.json; empty if it cannot be read.
        settings: of settings.yaml, likewise.
        train: columns of the rows of training, with "samples" and "seconds" since the start among them, and "steps":
            how many each row is of.
        evaluation: columns of the evaluations, with the same axes.
        marks: restarts and checkpoints.
        skipped: lines of the metrics that could not be read.
    """

    label: str
    folder: Path
    facts: dict[str, Any]
    settings: dict[str, Any]
    train: dict[str, Numbers]
    evaluation: dict[str, Numbers]
    marks: Marks
    skipped: int

    @property
    def name(self) -> str:
        return self.folder.resolve().name

    def at(self, steps: list[int], axis: str) -> Numbers:
        """Where steps lie on an axis."""
        if axis == "step" or not len(self.train["step"]):
            return np.array(steps, dtype=np.float64)
        known = np.concatenate([[0.0], self.train["step"]])
        return np.interp(steps, known, np.concatenate([[0.0], self.train[axis]]))

    def below(self, prefix: str, columns: dict[str, Numbers] | None = None) -> dict[str, Numbers]:
        """The columns under a name: "phases/" gives those of "forward/mean" and so on."""
        columns = self.train if columns is None else columns
        return {name.removeprefix(prefix): column for name, column in columns.items() if name.startswith(prefix)}


def check_folder(folder: Path) -> None:
    """Makes sure that a path is a run.

    Raises:
        InputError: it is not.
    """
    if not folder.is_dir():
        raise InputError(f"run folder {folder} is not there; give folders of runs, such as logs/NAME")
    if not (folder / "metrics.jsonl").exists():
        raise InputError(f"{folder} has no metrics.jsonl; give folders of runs, such as logs/NAME")


def history(folder: Path, metrics: Metrics, label: str) -> History:
    """Puts together what is known of a run.

    Args:
        folder: of the run.
        metrics: read from it.
        label: for the pictures.
    """
    facts, settings = _json(folder / "run.json"), _yaml(folder / "settings.yaml")
    train, evaluation = metrics.train.columns(), metrics.evaluation.columns()
    _add_axes(train)
    _add_axes_of_evaluations(evaluation, train)
    starts = facts.get("restarts")
    starts = [facts, *(starts if isinstance(starts, list) else [])]
    restarts = [start.get("from_step") for start in starts if isinstance(start, dict)]
    marks = Marks(
        checkpoints=sorted(step for path in list_sets(folder / "checkpoints") if (step := step_of(path)) is not None),
        restarts=[step for step in restarts[1:] if isinstance(step, int)],
        rollbacks=[to for _, to in metrics.rollbacks],
    )
    return History(label, folder, facts, settings, train, evaluation, marks, metrics.skipped)


def matching(names: list[str], patterns: list[str]) -> list[str]:
    """Names that one of the fnmatch patterns fits."""
    return [name for name in names if any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)]


def _add_axes(train: dict[str, Numbers]) -> None:
    """Seconds and samples since the start: a row tells of the steps since the one before it."""
    step = train.setdefault("step", np.empty(0))
    empty = np.full(len(step), np.nan)
    steps = np.maximum(np.diff(step, prepend=0.0), 0.0)
    seconds = np.nan_to_num(steps * train.get("step_seconds", empty))
    samples = np.nan_to_num(seconds * train.get("samples_per_second", empty))
    train |= {"steps": steps, "seconds": np.cumsum(seconds), "samples": np.cumsum(samples)}


def _add_axes_of_evaluations(evaluation: dict[str, Numbers], train: dict[str, Numbers]) -> None:
    step = evaluation.setdefault("step", np.empty(0))
    known = np.concatenate([[0.0], train["step"]])
    for axis in ("samples", "seconds"):
        evaluation[axis] = np.interp(step, known, np.concatenate([[0.0], train[axis]]))
    if "train_seconds" in evaluation:
        exact = evaluation["train_seconds"]
        evaluation["seconds"] = np.where(np.isnan(exact), evaluation["seconds"], exact)


def _json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _yaml(path: Path) -> dict[str, Any]:
    import yaml

    try:
        found = yaml.safe_load(path.read_bytes())
    except (OSError, ValueError, yaml.YAMLError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}
