"""The ranks of a run: how they find each other, which device each takes, and how they end together."""

from __future__ import annotations

import contextlib
import ctypes
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NoReturn

import torch

from hpc_kfac.cluster import environment, scheduler
from hpc_kfac.cluster.errors import EXPECTED, InputError, exit_status
from hpc_kfac.distributed.last_words import leave_mpi
from hpc_kfac.distributed.world import SERIAL

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
RANK_VARIABLES = ("OMPI_COMM_WORLD_RANK", "PMI_RANK", "SLURM_PROCID")


@dataclass(frozen=True)
class Ranks:
    """This process among all of the run.

    Attributes:
        comm: an mpi4py communicator of the trainer's own; None for one process.
        rank: from 0.
        size: number of processes.
        local_rank: from 0, on this machine.
        local_size: number of processes on this machine.
    """

    comm: Any = None
    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1

    @property
    def carrier(self) -> Any:
        """What the library takes as `comm`."""
        return SERIAL if self.comm is None else self.comm

    def gather(self, value: Any) -> list[Any]:
        """The values of all ranks, on all ranks. Collective."""
        return [value] if self.comm is None else self.comm.allgather(value)

    def broadcast(self, value: Any) -> Any:
        """Rank 0's value. Collective."""
        return value if self.comm is None else self.comm.bcast(value)

    def sum(self, values: Mapping[str, float]) -> dict[str, float]:
        """Sums by name; the same names on every rank. Collective."""
        totals = torch.tensor(list(values.values()), dtype=torch.float64)
        self.sum_tensor(totals)
        return dict(zip(values, totals.tolist(), strict=True))

    def sum_tensor(self, tensor: torch.Tensor) -> None:
        """Sums a contiguous tensor over ranks in place. Collective."""
        if self.comm is not None:
            host = tensor.detach().cpu()
            self.comm.Allreduce(_in_place(), host.numpy())
            if host.data_ptr() != tensor.data_ptr():
                tensor.copy_(host)

    def sum_later(self, value: float) -> Callable[[], float]:
        """Begins to sum a number over ranks; calling the result waits for it. Collective."""
        if self.comm is None:
            return lambda: value
        total = torch.tensor([value], dtype=torch.float64)
        request = self.comm.Iallreduce(_in_place(), total.numpy())

        def wait() -> float:
            request.Wait()
            return total.item()

        return wait

    def without_last(self, count: int) -> Ranks:
        """All but the last ranks; on these, the last ones. Collective."""
        if count == 0 or self.comm is None:
            return self
        comm = self.comm.Split(int(self.rank >= self.size - count))
        return Ranks(comm, comm.rank, comm.size, self.local_rank, self.local_size)

    @contextmanager
    def only_first_speaks(self) -> Iterator[None]:
        """Within it, help, settings and errors of the command line are printed by rank 0 alone."""
        with contextlib.ExitStack() as stack:
            if self.rank:
                nowhere = stack.enter_context(open(os.devnull, "w"))
                stack.enter_context(contextlib.redirect_stdout(nowhere))
                stack.enter_context(contextlib.redirect_stderr(nowhere))
            yield

    @contextmanager
    def agreed(self) -> Iterator[None]:
        """Wraps what each rank does by itself, such as opening files: if it fails on one rank, it fails on all.

        Raises:
            InputError: on every rank, with the message of the first rank that failed.
        """
        problem: str | None = None
        try:
            yield
        except (ValueError, OSError, ImportError) as error:
            problem = str(error)
        problems = self.gather(problem)
        failed = [rank for rank, text in enumerate(problems) if text is not None]
        if failed:
            where = "" if len(failed) == self.size else f"rank {failed[0]} of {self.size}: "
            raise InputError(where + problems[failed[0]])


def _in_place() -> Any:
    from mpi4py import MPI

    return MPI.IN_PLACE


def alone() -> Ranks:
    """This process before it has found the others; what the launcher calls it decides whether it speaks."""
    given = next((os.environ[name] for name in RANK_VARIABLES if os.environ.get(name, "").isdigit()), "0")
    return Ranks(rank=int(given))


def join() -> Ranks:
    """Finds the other ranks. Without a launcher that started several this process is alone and needs no MPI.

    Raises:
        LaunchError: the launcher made processes that do not know of each other, or not as many as it should.
    """
    launched = scheduler.launched_ranks()
    if (launched is None or launched[1] == 1) and (scheduler.expected_ranks() or 1) == 1:
        return Ranks()
    environment.check_launch()
    from mpi4py import MPI

    comm = MPI.COMM_WORLD.Dup()
    node = comm.Split_type(MPI.COMM_TYPE_SHARED)
    ranks = Ranks(comm, comm.rank, comm.size, node.rank, node.size)
    node.Free()
    return ranks


def choose_device(name: str, ranks: Ranks) -> torch.device:
    """The device of this rank: its local rank's GPU, or the CPU.

    Raises:
        InputError: cuda is asked for and there is none.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise InputError("device is cuda, but torch sees no GPU; use device: cpu, or check 'hpc-kfac info'")
    if name == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    device = torch.device("cuda", ranks.local_rank % torch.cuda.device_count())
    torch.cuda.set_device(device)
    return device


def keep_freed_memory() -> None:
    """Has glibc keep what is freed: else large tensors go back to the system and are faulted in anew at every use."""
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL(None)
        libc.mallopt(M_MMAP_THRESHOLD, 32 * 2**20)  # the largest that it takes
        libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def set_threads(threads: int | None, ranks: Ranks) -> int:
    """Sets torch's threads: as told, else as OMP_NUM_THREADS says, else an even share of the cores."""
    if threads is None and "OMP_NUM_THREADS" not in os.environ:
        threads = max(1, len(os.sched_getaffinity(0)) // ranks.local_size)
    if threads is not None:
        torch.set_num_threads(threads)
    return torch.get_num_threads()


def end(error: BaseException, ranks: Ranks) -> NoReturn:
    """Ends all ranks after an exception: quietly together if all of them got here, by MPI's Abort if not.

    An expected error is one message; anything else is this rank's traceback.
    """
    code = exit_status(error)
    if isinstance(error, EXPECTED) and _all_arrived(ranks):
        if ranks.rank == 0:
            _say(f"hpc-kfac: {error}")
        if ranks.comm is not None:
            ranks.comm.Barrier()  # mpirun kills the others, rank 0's message included, as soon as one has exited
            leave_mpi()
        sys.exit(code)
    who = f"rank {ranks.rank} of {ranks.size}: " if ranks.size > 1 else ""
    _say(f"hpc-kfac: {who}{error}" if isinstance(error, EXPECTED) else who + traceback.format_exc())
    if ranks.comm is not None and ranks.size > 1:
        ranks.comm.Abort(code)
    sys.exit(code)


def _all_arrived(ranks: Ranks, seconds: float = 3.0) -> bool:
    if ranks.comm is None:
        return True
    request = ranks.comm.Ibarrier()
    deadline = time.monotonic() + seconds
    while not request.Test():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True


def _say(text: str) -> None:
    sys.stdout.flush()
    print(text, file=sys.stderr, flush=True)


def underscored(word: str) -> str:
    """An option with underscores, as the settings have them, for one with hyphens."""
    option, equals, value = word.partition("=")
    return (option.replace("-", "_").replace("__", "--", 1) if word.startswith("--") else option) + equals + value
