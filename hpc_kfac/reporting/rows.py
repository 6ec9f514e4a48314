"""Reads metrics.jsonl into columns of numbers. A line that cannot be read is left out and counted."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import chain
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np

from hpc_kfac.cluster.errors import InputError

try:
    import orjson

    _fast: Callable[[bytes], Any] = orjson.loads
except ImportError:  # of the extra "report"; a file of 100 000 rows then takes 2 s longer
    _fast = json.loads

PIECE = 256 * 2**10  # bytes whose rows are held at once: few enough for them to stay in the processor's cache
Numbers = np.ndarray
"""float64, one entry a row; NaN where a row has no such number."""


class Table:
    """Rows as columns. A number inside of others is named by the way to it: "phases/forward/mean".

    Attributes:
        count: rows so far.
    """

    def __init__(self) -> None:
        self.count = 0
        self._parts: dict[str, list[tuple[int, Numbers]]] = {}
        self._kept: list[tuple[int, int]] = []

    def add(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Appends rows."""
        for name, numbers in _columns(rows, ""):
            self._parts.setdefault(name, []).append((self.count, numbers))
        self.count += len(rows)

    def go_back(self, step: int) -> None:
        """The rows so far that are of later steps do not count: the run went back to this one."""
        self._kept.append((self.count, step))

    def columns(self) -> dict[str, Numbers]:
        """All columns, by name, of the rows that count."""
        kept = np.ones(self.count, dtype=bool)
        steps = self._whole("step")
        for count, step in self._kept:
            kept[:count] &= steps[:count] <= step
        return {name: self._whole(name)[kept] for name in self._parts}

    def _whole(self, name: str) -> Numbers:
        column = np.full(self.count, np.nan)
        for start, numbers in self._parts.get(name, []):
            column[start : start + len(numbers)] = numbers
        return column


class Metrics:
    """The metrics of a run, read as far as they are written.

    Args:
        path: of metrics.jsonl.

    Attributes:
        train: rows of training.
        evaluation: rows of evaluations.
        rollbacks: steps (from, to) at which the run went back because its loss had blown up.
        skipped: lines that could not be read, the last one if it is half-written among them.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._start_anew(-1)

    def poll(self) -> bool:
        """Reads what has been added since the last call; all of it if the file is another one.

        Returns:
            Whether there was anything.

        Raises:
            InputError: there is no such file, or it cannot be read.
        """
        try:
            with open(self._path, "rb") as file:
                facts = os.fstat(file.fileno())
                if facts.st_ino != self._inode or facts.st_size < self._read:
                    self._start_anew(facts.st_ino)
                file.seek(self._read)
                before = self._read + len(self._tail)
                while lines := file.readlines(PIECE):
                    self._take(lines)
        except OSError as error:
            raise InputError(f"{self._path}: {error.strerror}; give the folder of a run that has begun") from error
        return self._read + len(self._tail) != before

    @property
    def skipped(self) -> int:
        return self._broken + (_parsed(self._tail) is None if self._tail.strip() else 0)

    def _start_anew(self, inode: int) -> None:
        self.train, self.evaluation = Table(), Table()
        self.rollbacks: list[tuple[int, int]] = []
        self._inode: int = inode
        self._read: int = 0
        self._broken: int = 0
        self._tail: bytes = b""

    def _take(self, lines: list[bytes]) -> None:
        self._tail = b"" if lines[-1].endswith(b"\n") else lines.pop()
        self._read += sum(map(len, lines))
        waiting: dict[str, list[dict[str, Any]]] = {"train": [], "evaluation": []}
        for line in lines:
            row = _parsed(line)
            if row is None:
                self._broken += bool(line.strip())
            elif row["kind"] in waiting:
                waiting[row["kind"]].append(row)
            elif row["kind"] == "rollback" and _is_step(row.get("to_step")):
                self._flush(waiting)
                self.rollbacks.append((row["step"], row["to_step"]))
                self.train.go_back(row["to_step"])
                self.evaluation.go_back(row["to_step"])
        self._flush(waiting)

    def _flush(self, waiting: dict[str, list[dict[str, Any]]]) -> None:
        for kind, table in (("train", self.train), ("evaluation", self.evaluation)):
            table.add(waiting[kind])
            waiting[kind] = []


def parsed_rows(path: Path) -> Iterator[dict[str, Any]]:
    """The rows of a file one by one, as they are; what cannot be read is left out."""
    with open(path, "rb") as file:
        for line in file:
            row = _parsed(line)
            if row is not None:
                yield row


def _parsed(line: bytes) -> dict[str, Any] | None:
    """A row; None if it is none."""
    try:
        row = _loads(line)
    except (ValueError, RecursionError):
        return None
    good = isinstance(row, dict) and isinstance(row.get("kind"), str) and _is_step(row.get("step"))
    return row if good else None


def _loads(line: bytes) -> Any:
    try:
        return _fast(line)
    except ValueError:
        return json.loads(line)  # which knows NaN, Infinity and integers of any length


def _is_step(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**53


def _columns(rows: Sequence[Mapping[str, Any]], prefix: str) -> Iterator[tuple[str, Numbers]]:
    for name, values in _by_name(rows):
        numbers = None if name == "kind" or isinstance(values[0], dict) else _numbers(values)
        if numbers is not None:
            yield prefix + name, numbers
        elif any(isinstance(value, dict) for value in values):
            inner = [value if isinstance(value, dict) else {} for value in values]
            yield from _columns(inner, f"{prefix}{name}/")


def _by_name(rows: Sequence[Mapping[str, Any]]) -> Iterator[tuple[str, list[Any]]]:
    """The rows' values by name. Most rows have the same names, and are then taken apart much faster."""
    if not rows:
        return
    first = rows[0].keys()
    if all(row.keys() == first for row in rows):
        yield from ((name, list(map(itemgetter(name), rows))) for name in first)
    else:
        for name in dict.fromkeys(chain.from_iterable(rows)):
            yield name, [row.get(name) for row in rows]


def _numbers(values: Sequence[Any]) -> Numbers | None:
    """As an array; None if there are no numbers."""
    try:
        numbers = np.array(values, dtype=np.float64)  # None becomes NaN
        if numbers.ndim == 1:
            return numbers
    except (ValueError, TypeError, OverflowError):
        pass
    good = [isinstance(value, int | float) for value in values]
    return np.array([_number(value) for value in values]) if any(good) else None


def _number(value: Any) -> float:
    try:
        return float(value) if isinstance(value, int | float) else float("nan")
    except OverflowError:
        return float("nan")
