"""Hidden share of a 16 MB allreduce behind compute, by how MPI gets its turns.

    mpirun -n 2 python -m mpi4py benchmarks/progress.py

Hidden share: 1 - (time above compute alone) / (time of the blocking allreduce). Variants are interleaved;
of each the fastest tenth counts, for the sake of shared machines.
"""

from __future__ import annotations

import statistics
import threading
import time
from collections.abc import Callable

import torch
from mpi4py import MPI

from hpc_kfac.distributed import communicator

MEGABYTES, SIZE, PRODUCTS, ROUNDS = 16, 384, 24, 40


def main() -> None:
    torch.set_num_threads(1)
    world = MPI.COMM_WORLD
    comm = communicator(world)
    message, matrix = torch.ones(MEGABYTES << 18), torch.randn(SIZE, SIZE)
    stop, active = threading.Event(), threading.Event()

    def turns() -> None:
        while not stop.is_set():
            active.wait()
            comm.progress()
            time.sleep(1e-3)

    def compute(between: Callable[[], None] | None = None) -> None:
        for _ in range(PRODUCTS):
            matrix @ matrix
            if between:
                between()

    def send_and_compute(between: Callable[[], None] | None = None) -> None:
        work = comm.allreduce(message, "bench")
        compute(between)
        work.wait()

    def with_thread() -> None:
        active.set()
        send_and_compute()
        active.clear()

    variants: dict[str, Callable[[], None]] = {
        "blocking": lambda: comm.allreduce(message, "bench").wait(),
        "compute": compute,
        "no polling": send_and_compute,
        "progress() between products": lambda: send_and_compute(comm.progress),
        "thread, every 1 ms": with_thread,
    }
    (thread := threading.Thread(target=turns, daemon=True)).start()
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(ROUNDS):
        for name, run in variants.items():
            world.Barrier()
            start = time.perf_counter()
            run()
            seconds[name].append(world.allreduce(time.perf_counter() - start, op=MPI.MAX))
            message.fill_(1.0)
    stop.set()
    active.set()
    thread.join()
    quick = {name: statistics.quantiles(times, n=10)[0] for name, times in seconds.items()}
    for name, taken in quick.items() if world.rank == 0 else ():
        hidden = 1 - (taken - quick["compute"]) / quick["blocking"]
        print(f"{name:28} {taken * 1e3:8.2f} ms", "" if name in ("blocking", "compute") else f"{hidden:8.2f}")


if __name__ == "__main__":
    main()
