"""Metrics for other programs: CSV and TensorBoard files."""

from __future__ import annotations

import csv
import shutil
from datetime import datetime
from pathlib import Path
from typing import Any

from hpc_kfac.reporting.history import History
from hpc_kfac.reporting.rows import parsed_rows
from hpc_kfac.training.scalars import Board, numbers_of


def write_csv(run: Path, path: Path) -> None:
    """Writes all rows of a run's metrics as one table: a line for each row, a column for each number.

    A number inside of others is named by the way to it, "phases/forward/mean"; what a row has not is left empty.

    Args:
        run: its folder.
        path: of the file.
    """
    names: dict[str, None] = {}
    for row in parsed_rows(run / "metrics.jsonl"):  # twice: the rows of a long run need more memory than there may be
        names.update((name, None) for name, _ in numbers_of(row))
    aside = path.with_name(f".{path.name}.new")
    with open(aside, "w", newline="") as file:
        writer = csv.DictWriter(file, ["kind", *names], lineterminator="\n")
        writer.writeheader()
        for row in parsed_rows(run / "metrics.jsonl"):
            writer.writerow({"kind": row["kind"], **dict(numbers_of(row))})
    aside.replace(path)


def write_tensorboard(history: History, folder: Path) -> None:
    """Writes a run's columns as TensorBoard scalars, at the time at which they were reached in training.

    Args:
        history: of the run.
        folder: gets the event file; what was there is replaced.

    Raises:
        InputError: tensorboard is not installed.
    """
    shutil.rmtree(folder, ignore_errors=True)
    board, began = Board(folder), _began(history.facts)
    for kind, columns in (("train", history.train), ("evaluation", history.evaluation)):
        for number, step in enumerate(columns["step"]):
            row = {name: float(column[number]) for name, column in columns.items()}
            board.write({"kind": kind, **row, "step": int(step)}, began + row["seconds"])
    board.close()


def _began(facts: dict[str, Any]) -> float:
    """When the run was started, in seconds since 1970; 0 if that is not known."""
    try:
        return datetime.fromisoformat(facts["started"]).timestamp()
    except (LookupError, TypeError, ValueError):
        return 0.0
