"""Ranks: communicators that count their traffic, and the placement of layers on ranks. Knows nothing of torch.nn."""

from hpc_kfac.distributed.communicator import (
    Communicator,
    MPICommunicator,
    SerialCommunicator,
    TorchCommunicator,
    communicator,
)
from hpc_kfac.distributed.placement import Assignment, Kaisa, Rates, Unit, UnitCost

__all__ = [
    "Assignment",
    "Communicator",
    "Kaisa",
    "MPICommunicator",
    "Rates",
    "SerialCommunicator",
    "TorchCommunicator",
    "Unit",
    "UnitCost",
    "communicator",
]
