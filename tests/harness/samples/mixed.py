"""Sample for test_mpi_plugin.py: passes, a skip, and a failure on rank 1 only while the others wait in a barrier."""

import pytest


@pytest.mark.ranks(2, 3)
def test_passes(comm, mpi_ranks):
    assert comm.size == mpi_ranks
    assert comm.allreduce(1) == mpi_ranks


@pytest.mark.ranks(2)
def test_rank_1_fails(comm):
    print("said by rank", comm.rank)
    assert comm.rank != 1, "only rank 1"
    comm.Barrier()


@pytest.mark.ranks(2)
def test_skips(comm):
    pytest.skip("not today")


@pytest.mark.ranks(2)
@pytest.mark.parametrize("value", [1, 2])
def test_after_the_failure(comm, value):
    assert comm.bcast(value) == value


def test_serial():
    assert True
