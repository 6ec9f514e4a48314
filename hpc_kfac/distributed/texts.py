"""Short texts between ranks."""

from __future__ import annotations

import torch

from hpc_kfac.distributed.communicator import Communicator

LONGEST = 2048
"""Bytes of a text; what is longer is cut."""


def encode(text: str) -> torch.Tensor:
    """A text as bytes of a fixed length."""
    data = text.encode()[:LONGEST]
    return torch.tensor(list(data.ljust(LONGEST, b"\0")), dtype=torch.uint8)


def decode(data: torch.Tensor) -> str:
    """The reverse."""
    return bytes(data.tolist()).rstrip(b"\0").decode(errors="replace")


def exchange(comm: Communicator, text: str) -> list[str]:
    """The texts of all ranks, on all ranks. Collective."""
    found, work = comm.allgather(encode(text), "control", "checkpoint")
    work.wait()
    return [decode(row) for row in found]


def from_first(comm: Communicator, text: str) -> str:
    """Rank 0's text, on all ranks. Collective."""
    data = encode(text)
    comm.broadcast(data, 0, "control", "checkpoint").wait()
    return decode(data)


def long_text_of_first(comm: Communicator, text: str) -> str:
    """Rank 0's text of any length, on all ranks. Collective."""
    data = torch.tensor(list(text.encode()), dtype=torch.uint8)
    length = torch.tensor([len(data)])
    comm.broadcast(length, 0, "control", "length of a text").wait()
    data = data if comm.rank == 0 else torch.empty(int(length), dtype=torch.uint8)
    comm.broadcast(data, 0, "control", "text").wait()
    return bytes(data.tolist()).decode(errors="replace")
