"""Sample for test_mpi_plugin.py: rank 0 waits for ever for a message that nobody sends."""

import pytest


@pytest.mark.ranks(2, timeout=6)
def test_before(comm):
    comm.Barrier()


@pytest.mark.ranks(2, timeout=6)
def test_hangs(comm):
    if comm.rank == 0:
        wait_for_a_message(comm)


@pytest.mark.ranks(2, timeout=6)
def test_after(comm):
    comm.Barrier()


def wait_for_a_message(comm):
    comm.recv(source=1)
