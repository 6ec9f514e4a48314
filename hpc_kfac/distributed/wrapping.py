"""What a user passes as `comm`, wrapped."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from hpc_kfac.distributed.communicator import Communicator, SerialCommunicator
from hpc_kfac.distributed.mpi import MPICommunicator
from hpc_kfac.distributed.torch_backend import TorchCommunicator
from hpc_kfac.distributed.world import SERIAL, refuse_alone

_JOINED: weakref.WeakSet[Communicator] = weakref.WeakSet()
"""Made of what users have passed, of several processes."""


def communicator(comm: Any) -> Communicator:
    """Wraps what a user passes as `comm`. Collective: mpi4py communicators and process groups are duplicated.

    Args:
        comm: an mpi4py communicator, a torch.distributed process group, or a `Communicator`, which is taken as it is;
            None for one process; "serial" for one process that works alone though others run beside it.

    Raises:
        ValueError: None or MPI.COMM_SELF or a process group of this rank alone, and it is one of several.
        TypeError: anything else.
    """
    if comm is None:
        refuse_alone("comm is not given")
    if comm is None or (isinstance(comm, str) and comm == SERIAL):
        return SerialCommunicator()
    if isinstance(comm, Communicator):
        return comm
    if hasattr(comm, "Iallreduce"):
        from mpi4py import MPI

        if comm == MPI.COMM_SELF:
            refuse_alone("comm=MPI.COMM_SELF is this process alone")
        return _joined(MPICommunicator(comm))
    if torch.distributed.is_available() and isinstance(comm, torch.distributed.ProcessGroup):
        if comm.size() == 1:
            refuse_alone("comm=a process group of one rank is this process alone")
        return _joined(TorchCommunicator(comm))
    value = f" ({comm!r})" if isinstance(comm, str) else ""
    raise TypeError(
        f"comm is a {type(comm).__name__}{value}; pass MPI.COMM_WORLD, a torch.distributed process group, None for one"
        f' process, or "{SERIAL}" for a process that works alone beside others'
    )


def knows_comm() -> bool:
    """Whether the script has given a `comm` of several processes before, which is still in use."""
    return any(not comm._freed for comm in _JOINED)


def _joined(comm: Communicator) -> Communicator:
    if comm.size > 1:
        _JOINED.add(comm)
    return comm


@contextmanager
def lent(comm: Any) -> Iterator[Communicator]:
    """What a user passes as `comm`, for one call: what was made for it is freed. Collective."""
    carrier = communicator(comm)
    try:
        yield carrier
    finally:  # also after an error of one rank: MPI expects its implementations to free without waiting for others
        if carrier is not comm:
            carrier.free()
