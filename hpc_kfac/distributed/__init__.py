"""Ranks: communicators that count their traffic, and the placement of layers on ranks. Knows nothing of torch.nn."""

from hpc_kfac.distributed import last_words
from hpc_kfac.distributed.buffers import BufferPool
from hpc_kfac.distributed.communicator import Communicator, SerialCommunicator, Work
from hpc_kfac.distributed.monitor import Monitor
from hpc_kfac.distributed.mpi import MPICommunicator
from hpc_kfac.distributed.placement import Assignment, Kaisa, Rates, Unit, UnitCost
from hpc_kfac.distributed.torch_backend import TorchCommunicator
from hpc_kfac.distributed.watchdog import Watchdog
from hpc_kfac.distributed.wrapping import communicator, lent

__all__ = [
    "Assignment",
    "BufferPool",
    "Communicator",
    "Kaisa",
    "MPICommunicator",
    "Monitor",
    "Rates",
    "SerialCommunicator",
    "TorchCommunicator",
    "Unit",
    "UnitCost",
    "Watchdog",
    "Work",
    "communicator",
    "lent",
]

last_words.install()
