"""Whether this process is one of several, as far as what was initialised in it tells."""

from __future__ import annotations

import sys
from typing import Any, NamedTuple

import torch

SERIAL = "serial"
"""What `comm=` is for a process that works alone though others run beside it."""


class World(NamedTuple):
    """The processes that a library has joined.

    Attributes:
        library: that joined them.
        rank: of this process.
        size: number of processes.
        comm: what a user passes as `comm`.
    """

    library: str
    rank: int
    size: int
    comm: str


def find_world() -> World | None:
    """The processes that this one was joined with; None if it is alone. Initialises nothing."""
    return _horovod() or _torch() or _mpi()


def refuse_alone(comm: str) -> None:
    """For a `comm` by which a process would work alone.

    Args:
        comm: what was given, in words.

    Raises:
        ValueError: this process is one of several.
    """
    world = find_world()
    if world is not None:
        raise ValueError(
            f"{comm}, but {world.library} has {world.size} processes, and each would take its own samples"
            f' for the whole batch: pass comm={world.comm}, or comm="{SERIAL}" for a process that works alone'
        )


def _horovod() -> World | None:
    horovod = sys.modules.get("horovod.torch")
    if horovod is None or not horovod.is_initialized() or horovod.size() == 1:
        return None
    over_torch = not horovod.mpi_enabled() and _torch() is not None
    comm = "torch.distributed.group.WORLD" if over_torch else "MPI.COMM_WORLD"
    return World("Horovod", horovod.rank(), horovod.size(), comm)


def _torch() -> World | None:
    distributed = torch.distributed
    if not distributed.is_available() or not distributed.is_initialized() or distributed.get_world_size() == 1:
        return None
    rank, size = distributed.get_rank(), distributed.get_world_size()
    return World("torch.distributed", rank, size, "torch.distributed.group.WORLD")


def _mpi() -> World | None:
    mpi = find_mpi()
    return None if mpi is None else World("MPI", mpi.COMM_WORLD.rank, mpi.COMM_WORLD.size, "MPI.COMM_WORLD")


def find_mpi() -> Any:
    """mpi4py's MPI where it runs with several ranks, else None."""
    mpi = getattr(sys.modules.get("mpi4py"), "MPI", None)
    if mpi is None or not mpi.Is_initialized() or mpi.Is_finalized() or mpi.COMM_WORLD.size == 1:
        return None
    return mpi
