"""Ranks as threads of one process: a carrier for tests of what does not depend on how messages travel."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from hpc_kfac.distributed.communicator import Communicator, Family


class Board:
    """Where the threads of one group meet."""

    def __init__(self, size: int) -> None:
        self.barrier, self.slots = threading.Barrier(size, timeout=5), [None] * size

    def exchange(self, rank: int, value: Any) -> list[Any]:
        """What every rank has put in, in rank order."""
        self.slots[rank] = value
        self.barrier.wait()
        found = list(self.slots)
        self.barrier.wait()
        return found


class ThreadCommunicator(Communicator):
    """Blocking collectives; sums run in rank order."""

    def __init__(self, board: Board, rank: int, members: Sequence[int], family: Family) -> None:
        super().__init__(family, "threads", members)
        self.board, self.rank, self.size = board, rank, len(members)

    def _free(self) -> None:
        pass

    def _split(self, color: int, name: str) -> Communicator:
        colors = self.board.exchange(self.rank, color)
        ranks = [rank for rank, each in enumerate(colors) if each == color]
        board = self.board.exchange(self.rank, Board(len(ranks)))[ranks[0]]
        return ThreadCommunicator(board, ranks.index(self.rank), [self.members[r] for r in ranks], self._family)

    def _all(self, tensor: Tensor) -> list[Tensor]:
        return self.board.exchange(self.rank, tensor.clone())

    def _allreduce(self, tensor: Tensor) -> None:
        tensor.copy_(torch.stack(self._all(tensor)).sum(0))

    def _reduce_scatter(self, tensor: Tensor, counts: Sequence[int]) -> None:
        self._allreduce(tensor)

    def _broadcast(self, tensor: Tensor, root: int) -> None:
        tensor.copy_(self._all(tensor)[root])

    def _allgather(self, tensor: Tensor, out: Tensor) -> None:
        out.copy_(torch.stack(self._all(tensor)))

    def _allgatherv(self, tensor: Tensor, counts: Sequence[int]) -> None:
        parts = [each.split(list(counts)) for each in self._all(tensor)]
        tensor.copy_(torch.cat([part[rank] for rank, part in enumerate(parts)]))


def on_ranks(size: int, work: Callable[[Communicator], Any]) -> list[Any]:
    """What `work` returns on each of so many ranks; raises the first error of any."""
    board = Board(size)

    def run(rank: int) -> Any:
        try:
            return work(ThreadCommunicator(board, rank, range(size), Family()))
        except BaseException:
            board.barrier.abort()
            raise

    with ThreadPoolExecutor(size) as pool:
        jobs = [pool.submit(run, rank) for rank in range(size)]
        errors = [job.exception() for job in jobs]
    for error in sorted((e for e in errors if e), key=lambda e: isinstance(e, threading.BrokenBarrierError)):
        raise error
    return [job.result() for job in jobs]
