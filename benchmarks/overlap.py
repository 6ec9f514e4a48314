"""How much of the factor allreduce hides behind the backward pass, with a timeline to look at.

The Fashion-MNIST autoencoder, factors reduced on every step, in turns of ten steps with reductions posted from the
backward pass and after it. Overlap is 1 - (seconds blocked in collectives, posted early) / (the same, posted late).

    mpirun -n 2 python -m mpi4py benchmarks/overlap.py --trace logs/overlap
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from pathlib import Path

import torch
from mpi4py import MPI
from torch import Tensor, nn

import hpc_kfac as hk
from hpc_kfac.cluster.ranks import keep_freed_memory
from hpc_kfac.tasks.tasks import fashion_autoencoder

BATCH, TURN = 250, 10


class Contender:
    """A model in training, its gradients left unaveraged: only the preconditioner's own traffic counts here."""

    def __init__(self, model: nn.Module, overlap: bool) -> None:
        self.model = model
        self.optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
        schedule, method = hk.Schedule(statistics=1, refresh=1), hk.KFAC(damping=0.3, solver="cholesky")
        comm = MPI.COMM_WORLD
        self.preconditioner = hk.Preconditioner(model, self.optimizer, method=method, schedule=schedule, comm=comm)
        self.preconditioner._executor.overlap = overlap  # no setting: nobody wants it off but this comparison
        self.blocked: list[float] = []
        self.seconds: list[float] = []

    def step(self, x: Tensor, y: Tensor) -> None:
        MPI.COMM_WORLD.Barrier()
        start, blocked = time.perf_counter(), self.preconditioner.waited
        self.optimizer.zero_grad()
        nn.functional.binary_cross_entropy_with_logits(self.model(x), y).backward()
        self.preconditioner.step()
        self.seconds.append(time.perf_counter() - start)
        self.blocked.append(self.preconditioner.waited - blocked)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--turns", type=int, default=10, help="turns of each, after one that does not count")
    parser.add_argument("--trace", type=Path, help="folder that gets a Chrome trace of each rank")
    arguments = parser.parse_args()
    comm = MPI.COMM_WORLD
    torch.set_num_threads(1)
    keep_freed_memory()
    task = fashion_autoencoder(seed=0)
    contenders = {name: Contender(copy.deepcopy(task.model), name == "early") for name in ("early", "late")}
    generator = torch.Generator().manual_seed(comm.rank)
    batches = [task.train.fetch(torch.randint(60000, (BATCH,), generator=generator)) for _ in range(TURN)]
    for turn in range(arguments.turns + 1):
        for contender in contenders.values():
            if turn == 1:
                contender.blocked.clear()
                contender.seconds.clear()
            for x, y in batches:
                contender.step(x, y)
    early, late = (comm.allreduce(sum(contenders[name].blocked)) for name in ("early", "late"))
    if comm.rank == 0:
        print(f"{comm.size} ranks, {arguments.turns * TURN} steps of each, factors reduced on every step")
        for name, blocked in (("early", early), ("late", late)):
            median = 1e3 * statistics.median(contenders[name].seconds)
            per_step = 1e3 * blocked / comm.size / len(contenders[name].seconds)
            print(f"posted {name:<6} {median:7.1f} ms a step, {per_step:6.2f} ms of it blocked in collectives")
        print(f"overlap {1 - early / late:.2f}")
    if arguments.trace:
        timeline = contenders["early"].preconditioner.timeline
        timeline.recording = True
        for x, y in batches[:3]:
            contenders["early"].step(x, y)
        arguments.trace.mkdir(parents=True, exist_ok=True)
        timeline.write(arguments.trace / f"trace_rank{comm.rank}.json")


if __name__ == "__main__":
    main()
