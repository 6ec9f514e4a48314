"""Sample for test_mpi_plugin.py: rank 1 is killed by a signal."""

import os
import signal

import pytest


@pytest.mark.ranks(2)
def test_rank_1_dies(comm):
    if comm.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    comm.Barrier()


@pytest.mark.ranks(2)
def test_after(comm):
    comm.Barrier()
