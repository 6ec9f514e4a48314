"""Finds a checkpoint that can be believed and gives its parts to whoever needs them."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import TypeVar

from hpc_kfac.checkpoint.files import BrokenCheckpoint, read_file
from hpc_kfac.checkpoint.image import parse
from hpc_kfac.checkpoint.manifest import COMMON, Manifest, rank_file, read_manifest
from hpc_kfac.checkpoint.sets import list_sets, set_name, verify_bytes, verify_structure
from hpc_kfac.checkpoint.tree import Tree
from hpc_kfac.distributed import Communicator
from hpc_kfac.distributed.texts import exchange, from_first

Result = TypeVar("Result")


class Saved:
    """A set on disk. Files are read when they are asked for, and checked once more.

    Args:
        path: of the set.

    Raises:
        BrokenCheckpoint: its manifest cannot be used.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.manifest: Manifest = read_manifest(path)
        self._shares: dict[int, Tree] = {}

    @property
    def step(self) -> int:
        return self.manifest.step

    @cached_property
    def common(self) -> Tree:
        """What all ranks shared."""
        return self._read(COMMON)

    def of(self, rank: int) -> Tree:
        """What a rank alone had."""
        if rank not in self._shares:
            self._shares[rank] = self._read(rank_file(rank))
        return self._shares[rank]

    def forget(self) -> None:
        """Frees what was read."""
        self._shares.clear()
        self.__dict__.pop("common", None)

    @property
    def trainers(self) -> int:
        """Ranks that trained when this was saved."""
        return self.manifest.ranks - int(self.common.get("preconditioner", {}).get("helpers", 0))

    def _read(self, name: str) -> Tree:
        data = read_file(self.path, self.manifest.files[name])
        try:
            return parse(data)
        except BrokenCheckpoint as error:
            raise BrokenCheckpoint(f"{self.path / name} {error}") from error


def newest(folder: Path, comm: Communicator, warn: Callable[[str], None]) -> Saved | None:
    """The newest set that is in order. Collective: rank 0 looks for sets, all ranks share the check of their files.

    Args:
        folder: of the sets.
        comm: all ranks that train.
        warn: gets a line for every set that is broken, on rank 0.

    Returns:
        None if there is no set at all.

    Raises:
        BrokenCheckpoint: there are sets and not one is in order.
    """
    names = [path.name for path in list_sets(folder)] if comm.rank == 0 else []
    problem = ""
    for number in range(int(from_first(comm, str(len(names))))):
        path = folder / from_first(comm, names[number] if comm.rank == 0 else "")
        found, problem = _checked(path, comm)
        if not problem:
            return found
        if comm.rank == 0:
            warn(f"Warning: checkpoint {path.name} cannot be used: {problem}")
    if problem:
        raise BrokenCheckpoint(f"no checkpoint in {folder} is in order: load another one, or train anew")
    return None


def open_set(path: Path, comm: Communicator) -> Saved:
    """A given set, once all its files have been checked. Collective.

    Raises:
        BrokenCheckpoint: it is not in order, on all ranks.
    """
    found, problem = _checked(path, comm)
    if found is None or problem:
        raise BrokenCheckpoint(problem)
    return found


def find(path: Path, comm: Communicator, warn: Callable[[str], None]) -> Saved:
    """The set that a path means: itself, or the newest in the run or folder of checkpoints that it is. Collective.

    Raises:
        BrokenCheckpoint: there is none that is in order.
    """
    kind = "none"
    if comm.rank == 0:
        places = [place for place in (path / "checkpoints", path) if list_sets(place)]
        kind = "set" if (path / "manifest.json").exists() else str(places[0]) if places else "none"
    kind = from_first(comm, kind)
    if kind == "set":
        return open_set(path, comm)
    found = newest(Path(kind), comm, warn) if kind != "none" else None
    if found is None:
        raise BrokenCheckpoint(
            f"{path} is no checkpoint and holds none; give a run folder, or a folder such as {set_name(1000)} in it"
        )
    return found


def _checked(path: Path, comm: Communicator) -> tuple[Saved | None, str]:
    """The set, and what is wrong with it."""

    def structure(manifest: Manifest) -> Saved:
        verify_structure(path, manifest, comm.rank, comm.size)
        return Saved(path)

    try:
        manifest = together(comm, lambda: verify_bytes(path, comm.rank, comm.size))
        return together(comm, lambda: structure(manifest)), ""
    except BrokenCheckpoint as error:
        return None, str(error)


def together(comm: Communicator, work: Callable[[], Result]) -> Result:
    """What the work returns, if it succeeds on all ranks. Collective.

    Raises:
        BrokenCheckpoint: on all ranks, with the message of the first one where it failed.
    """
    found: list[Result] = []
    failure, problem = None, ""
    try:
        found.append(work())
    except (BrokenCheckpoint, ValueError, OSError) as error:
        failure, problem = error, str(error) or type(error).__name__
    problems = [text for text in exchange(comm, problem) if text]
    if problems:
        raise BrokenCheckpoint(problems[0]) from failure
    return found[0]
