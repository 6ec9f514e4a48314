"""The message buffers of a rank: what `distributed.buffers.BufferPool` comes to hold, without the memory."""

from __future__ import annotations

from collections import Counter

from hpc_kfac.distributed.buffers import rounded


class Buffers:
    """Counts buffers that are lent and given back, class by class.

    Args:
        rank: whose they are.

    Attributes:
        allocated: bytes held, in use or free.
    """

    def __init__(self, rank: int) -> None:
        self.rank = rank
        self.allocated = 0
        self._free: Counter[int] = Counter()

    def take(self, nbytes: int) -> None:
        """As of the pool."""
        size = rounded(nbytes)
        if self._free[size]:
            self._free[size] -= 1
        else:
            self.allocated += size

    def give_back(self, nbytes: int) -> None:
        """As of the pool, by the size that was asked for."""
        self._free[rounded(nbytes)] += 1
