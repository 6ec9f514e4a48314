"""Settings of the tests on ranks."""

from __future__ import annotations

import shutil
import socket
import tempfile
from pathlib import Path

import pytest
import torch


@pytest.fixture
def folder(comm):
    """One folder for all ranks."""
    path = comm.bcast(tempfile.mkdtemp() if comm.rank == 0 else None)
    yield Path(path)
    comm.Barrier()
    if comm.rank == 0:
        shutil.rmtree(path)


@pytest.fixture
def process_group(comm):
    """A gloo group of all ranks of the test."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = comm.bcast(server.getsockname()[1])
    torch.distributed.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=comm.rank, world_size=comm.size)
    yield torch.distributed.group.WORLD
    comm.Barrier()
    torch.distributed.destroy_process_group()
