"""Settings of all tests. Tests marked `ranks` run under mpirun: see mpi_plugin.py."""

from __future__ import annotations

import pytest
from hypothesis import settings

pytest_plugins = ["mpi_plugin"]

# Every rank must draw the same examples, and a shared machine makes deadlines meaningless.
settings.register_profile("hpc_kfac", derandomize=True, deadline=None, database=None, max_examples=50)
settings.load_profile("hpc_kfac")


@pytest.fixture
def comm():
    """MPI.COMM_WORLD; in a test marked `ranks` it has that many ranks."""
    from mpi4py import MPI

    return MPI.COMM_WORLD
