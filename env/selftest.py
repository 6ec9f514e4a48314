"""Two ranks show that the environment works: one MPI, THREAD_MULTIPLE, Horovod and mpi4py agree."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import horovod.torch as hvd
import numpy as np
import torch
from mpi4py import MPI


def check(condition: bool, message: str) -> None:
    if not condition:
        sys.exit(f"error: {message}")


def main() -> None:
    comm = MPI.COMM_WORLD
    check(comm.size == 2, f"mpirun -n 2 made {comm.size} rank(s): mpirun and mpi4py belong to different MPIs")
    check(
        MPI.Query_thread() == MPI.THREAD_MULTIPLE,
        f"the MPI gives thread level {MPI.Query_thread()}, not MPI_THREAD_MULTIPLE ({MPI.THREAD_MULTIPLE})",
    )
    hvd.init()
    check((hvd.rank(), hvd.size()) == (comm.rank, comm.size), f"Horovod sees {hvd.size()} rank(s), mpi4py {comm.size}")
    libraries = set(re.findall(r"/\S*/libmpi\.so\S*", Path("/proc/self/maps").read_text()))
    check(len(libraries) <= 1, f"Horovod and mpi4py use different MPI libraries: {sorted(libraries)}")

    # Whole numbers, so that the two sums must be the same bits.
    values = torch.arange(100_000, dtype=torch.float32) * (comm.rank + 1)
    by_mpi = np.empty(values.shape, dtype=np.float32)
    comm.Allreduce(values.numpy(), by_mpi)
    by_horovod = hvd.allreduce(values, op=hvd.Sum).numpy()
    check(np.array_equal(by_mpi, by_horovod), "Horovod's allreduce differs from mpi4py's")
    comm.Barrier()
    if comm.rank == 0:
        library = MPI.Get_library_version().split("\n")[0].split(", package")[0].strip("\0")
        print(f"Self-test passed: torch {torch.__version__}, {library}, THREAD_MULTIPLE, Horovod = mpi4py", flush=True)


main()
