"""Reading processes beside MPI: they must neither join it nor take the rank's signals."""

from __future__ import annotations

from pathlib import Path

from support import run_mpi

PROGRAM = """
from mpi4py import MPI  # imported again by each worker, as part of the main program

import os
import signal

import psutil
import torch

from hpc_kfac.data.loader import Loader
from hpc_kfac.data.sampler import ShardedSampler


class Probe:
    def __len__(self):
        return 20

    def fetch(self, indices):
        return torch.full((len(indices),), float(MPI.Is_initialized())), indices


if __name__ == "__main__":
    comm = MPI.COMM_WORLD
    signal.signal(signal.SIGUSR2, lambda *_: None)
    loader = Loader(Probe(), ShardedSampler(20, 6, comm.rank, comm.size), workers=1)
    seen, joined = 0, 0.0
    for epoch in range(2):
        for batch in loader.batches(epoch):
            if batch.index == 1:
                for child in psutil.Process().children(recursive=True):
                    child.send_signal(signal.SIGUSR2)
                os.kill(os.getpid(), signal.SIGUSR2)
            seen, joined = seen + len(batch.indices), joined + batch.inputs.sum().item()
    print(f"seen {comm.allreduce(seen)} joined {comm.allreduce(joined)}", flush=True)
    loader.close()
"""


def test_workers_stay_out_of_mpi_and_outlive_signals(tmp_path: Path) -> None:
    script = tmp_path / "program.py"
    script.write_text(PROGRAM)
    result = run_mpi(script, ranks=2, timeout=90)
    assert result.rc == 0, result.output
    assert result.stdout.splitlines() == ["seen 40 joined 0.0"] * 2
