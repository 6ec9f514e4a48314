"""Sample for test_mpi_plugin.py: cannot be imported inside MPI."""

import os

import pytest

import support

if support.RANK_REPORTS in os.environ:
    raise ImportError("no such thing under mpirun")


@pytest.mark.ranks(2)
def test_something(comm):
    comm.Barrier()
