"""Checkpoints of a run: state is copied, then written by a background thread while training goes on.

Every rank writes its own file. When all have done so, which the trainer learns from its scalar reduction, rank 0 writes
the manifest and gives the set its name. No rank waits for another, and no thread but the main one uses MPI.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import hpc_kfac
from hpc_kfac.checkpoint.files import FileRecord, write_file
from hpc_kfac.checkpoint.image import build
from hpc_kfac.checkpoint.manifest import COMMON, Manifest, rank_file, write_manifest
from hpc_kfac.checkpoint.sets import clean, prune, publish, temporary
from hpc_kfac.checkpoint.staging import Staging
from hpc_kfac.checkpoint.structure import SCHEMA
from hpc_kfac.checkpoint.tree import Tree
from hpc_kfac.distributed import communicator
from hpc_kfac.distributed.texts import exchange


@dataclass(frozen=True)
class Checkpointing:
    """When checkpoints are written, and which are kept.

    Args:
        steps: steps between two; null for none by steps. It is written at the next step at which no rank has statistics
            of its own that are not averaged yet, if there is one within a tenth of `steps`: it is smaller then.
        minutes: minutes between two; null for none by time.
        keep_last: so many of the newest are kept, at least 2.
        keep_best: keep the one with the best test figure, too, and write one after each evaluation that is the best.
        keep_every: keep every such one for good: 1 keeps all; null none.
        asynchronous: write while training goes on, from a copy of the state in memory.

    Raises:
        ValueError: a number that makes no sense.
    """

    steps: int | None = None
    minutes: float | None = 10.0
    keep_last: int = 2
    keep_best: bool = True
    keep_every: int | None = None
    asynchronous: bool = True

    def __post_init__(self) -> None:
        for name in ("steps", "minutes", "keep_every"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"checkpoint.{name} is {value}; give a positive number, or null for none")
        if self.keep_last < 2:
            raise ValueError(
                f"checkpoint.keep_last is {self.keep_last}; keep at least 2: the newest may be broken when it is needed"
            )


Phase = Literal["idle", "writing", "publishing"]


class Checkpoints:
    """Writes the checkpoints of a run, one at a time. All calls are collective.

    Args:
        folder: gets the sets; removes what killed runs left there. The same for all ranks, on a shared file system.
        settings: which are kept.
        comm: the ranks that train; as for `Preconditioner`.
        say: gets a line for every set that could not be written, on rank 0.
        allowed: asked on rank 0 before a set gets its name; a text says why it may not.

    Attributes:
        last: step of the newest set that was written, or None.
        problem: why the last attempt failed, or None.
        longest: seconds that the slowest set took.
    """

    def __init__(
        self,
        folder: Path,
        settings: Checkpointing | None = None,
        comm: Any = None,
        say: Callable[[str], None] = print,
        allowed: Callable[[], str | None] = lambda: None,
    ) -> None:
        self.folder = folder
        self._settings = settings or Checkpointing()
        self._comm = communicator(comm)
        self._say, self._allowed = say, allowed
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._staging = Staging()
        self._phase: Phase = "idle"
        self._work: Future[str] | None = None
        self.last: int | None = None
        self.problem: str | None = None
        self.longest = 0.0
        if self._comm.rank == 0:
            clean(folder)
        exchange(self._comm, "")  # else a rank could already write what another removes

    @property
    def busy(self) -> bool:
        """A checkpoint is under way; the same on all ranks."""
        return self._phase != "idle"

    @property
    def working(self) -> bool:
        """This rank's thread is at work."""
        return self._work is not None and not self._work.done()

    def save(
        self,
        step: int,
        common: Tree,
        own: Tree,
        facts: dict[str, Any],
        helpers: Callable[[], list[str]] = lambda: [],
    ) -> None:
        """Copies the state and begins to write it. Collective; not while `busy`.

        Args:
            step: steps taken.
            common: what all ranks share; looked at on rank 0 only.
            own: what this rank alone has.
            facts: for the manifest; looked at on rank 0 only.
            helpers: waits for the records of ranks that do not train, as text.
        """
        assert not self.busy
        self._step, self._facts, self._helpers, self._started = step, facts, helpers, time.monotonic()
        trees = {rank_file(self._comm.rank): own} | ({COMMON: common} if self._comm.rank == 0 else {})
        staged = self._staging.copy(trees)
        self._work = self._thread.submit(attempt, lambda: write_trees(self.folder, step, staged))
        self._phase = "writing"

    def advance(self, working: float) -> None:
        """Takes the next step of a checkpoint under way if it can be taken. Collective.

        Args:
            working: on how many ranks `working` was true; the same number on all.
        """
        if self._phase == "idle" or working > 0:
            return
        assert self._work is not None
        records = exchange(self._comm, self._work.result())
        outcomes = [json.loads(text) for text in (*records, *(self._helpers() if self._phase == "writing" else ()))]
        problems = [f"rank {rank}: {one['error']}" for rank, one in enumerate(outcomes) if "error" in one]
        if problems or self._phase == "publishing":
            self._end(problems)
        else:
            self._phase = "publishing"
            self._work = self._thread.submit(attempt, lambda: self._publish(outcomes))

    def finish(self) -> None:
        """Waits until what is under way is complete or has failed. Collective."""
        while self.busy:
            if self._work is not None:
                self._work.result()
            self.advance(0)

    def close(self) -> None:
        """Finishes, and ends the thread. Collective."""
        self.finish()
        self._thread.shutdown()

    def _end(self, problems: list[str]) -> None:
        self._phase, self._work = "idle", None
        self.problem = problems[0] if problems else None
        seconds = time.monotonic() - self._started
        self.longest = max(self.longest, seconds)
        if not problems:
            self.last = self._step
            return
        if self._comm.rank == 0:
            shutil.rmtree(temporary(self.folder, self._step), ignore_errors=True)
            before = f"; the last one is that of step {self.last}" if self.last is not None else ""
            self._say(f"Warning: no checkpoint at step {self._step}: {self.problem}{before}")

    def _publish(self, outcomes: list[dict[str, Any]]) -> dict[str, Any]:
        """On rank 0: makes the set valid."""
        if self._comm.rank != 0:
            return {}
        refusal = self._allowed()
        if refusal is not None:
            raise OSError(refusal)
        files = {name: FileRecord(name, *record) for one in outcomes for name, record in one.items()}
        settings = self._settings
        manifest = Manifest(
            schema=SCHEMA,
            step=self._step,
            ranks=len(outcomes),
            created=time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            version=hpc_kfac.__version__,
            files=files,
            facts=self._facts,
        )
        write_manifest(temporary(self.folder, self._step), manifest)
        publish(self.folder, self._step)
        prune(self.folder, settings.keep_last, settings.keep_best, settings.keep_every)
        return {}


def write_trees(folder: Path, step: int, trees: dict[str, Tree]) -> dict[str, Any]:
    """Writes a rank's files of a set that is under way.

    Returns:
        Size and sha256 by name.

    Raises:
        OSError: they could not be written.
    """
    place = temporary(folder, step)
    place.mkdir(parents=True, exist_ok=True)
    written = {}
    for name, tree in trees.items():
        image = build(tree, "common" if name == COMMON else "rank", step)
        record = write_file(place / name, image.segments())
        written[name] = [record.size, record.sha256]
    return written


def attempt(work: Callable[[], dict[str, Any]]) -> str:
    """What the work returns, or the error that it ended with, as JSON text."""
    try:
        return json.dumps(work())
    except Exception as error:  # whatever it is, training goes on
        text = str(error) if isinstance(error, OSError) else f"{type(error).__name__}: {error}"
        return json.dumps({"error": text[:1000]})
