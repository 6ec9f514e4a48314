"""Which samples belong to which global batch and, of that batch, to which rank."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class GlobalBatch:
    """One rank's part of a global batch.

    Attributes:
        epoch: epoch the batch belongs to, from 0.
        index: number of the batch in its epoch, from 0.
        size: samples of the global batch, over all ranks. Only the last batch of an epoch may be short.
        indices: this rank's samples, int64 ``[n]``; may be empty in a short last batch.
        offset: position of this rank's first sample in the global batch.
    """

    epoch: int
    index: int
    size: int
    indices: Tensor
    offset: int


class ShardedSampler:
    """Splits every global batch contiguously and evenly over the ranks.

    The order of an epoch, and so the global batches, depend on the seed and the epoch only: the same for any number
    of ranks. Each sample comes exactly once an epoch; nothing is padded or dropped. The last global batch may be short,
    its parts may differ by one sample over the ranks, and may be empty. The sampler keeps no position: `batches` starts
    anywhere.

    Args:
        samples: length of the data set.
        global_batch: samples of one batch over all ranks.
        rank: this process, from 0.
        ranks: number of processes.
        seed: seed of the order.
        shuffle: False keeps the data set's own order in every epoch.

    Raises:
        ValueError: no samples, a rank outside the ranks, or a global batch smaller than the number of ranks.
    """

    def __init__(
        self, samples: int, global_batch: int, rank: int = 0, ranks: int = 1, seed: int = 0, shuffle: bool = True
    ) -> None:
        if samples < 1:
            raise ValueError(f"samples = {samples}: the data set is empty; give it at least one sample")
        if not 0 <= rank < ranks:
            raise ValueError(f"rank = {rank} is outside the {ranks} ranks; it must be from 0 to ranks - 1")
        if global_batch < ranks:
            raise ValueError(
                f"global batch = {global_batch} is smaller than the number of ranks, {ranks}: some ranks would never"
                f" have a sample; use a batch of at least {ranks} or fewer ranks"
            )
        self.samples, self.global_batch = samples, global_batch
        self.rank, self.ranks = rank, ranks
        self.seed, self.shuffle = seed, shuffle
        self._order: tuple[int, Tensor] | None = None

    @property
    def batches_per_epoch(self) -> int:
        return -(-self.samples // self.global_batch)

    def order(self, epoch: int) -> Tensor:
        """All sample numbers in the order of this epoch, int64 ``[samples]``, the same on every rank."""
        if not self.shuffle:
            return torch.arange(self.samples)
        if self._order is None or self._order[0] != epoch:
            generator = torch.Generator().manual_seed((self.seed * 1_000_003 + epoch) % 2**63)
            self._order = (epoch, torch.randperm(self.samples, generator=generator))
        return self._order[1]

    def batches(self, epoch: int, start: int = 0) -> Iterator[GlobalBatch]:
        """This rank's batches of an epoch from batch number `start` on.

        Raises:
            ValueError: the start lies outside the epoch (its end, `batches_per_epoch`, is allowed and yields nothing).
        """
        if not 0 <= start <= self.batches_per_epoch:
            raise ValueError(f"start = {start} is outside an epoch of {self.batches_per_epoch} batches")
        return self._batches(epoch, start)

    def _batches(self, epoch: int, start: int) -> Iterator[GlobalBatch]:
        order = self.order(epoch)
        for index in range(start, self.batches_per_epoch):
            batch = order[index * self.global_batch : (index + 1) * self.global_batch]
            size = len(batch)
            first, last = size * self.rank // self.ranks, size * (self.rank + 1) // self.ranks
            yield GlobalBatch(epoch, index, size, batch[first:last], first)
