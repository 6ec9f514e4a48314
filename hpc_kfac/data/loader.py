"""Reads a rank's batches: by index from memory, else ahead of time in a thread or in worker processes."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from hpc_kfac.cluster.errors import DataError
from hpc_kfac.data.datasets import Dataset, KeyedDataset
from hpc_kfac.data.sampler import GlobalBatch, ShardedSampler

Augment = Callable[[Tensor, Tensor, int, int], Tensor]
"""``augment(inputs, indices, seed, epoch) -> inputs``; draws are keyed, so they do not depend on the rank count."""


@dataclass(frozen=True)
class Batch:
    """One rank's samples of one global batch.

    Attributes:
        inputs: ``[n, ...]``; n may be 0 in a short last batch.
        targets: ``[n, ...]``.
        indices: sample numbers in the data set, int64 ``[n]``.
        global_size: samples of the batch over all ranks.
        epoch: from 0.
        index: number of the batch in its epoch, from 0.
    """

    inputs: Tensor
    targets: Tensor
    indices: Tensor
    global_size: int
    epoch: int
    index: int


class Loader:
    """The batches of a sampler, read from a data set.

    Args:
        dataset: what to read. One that augments by itself (`KeyedDataset`) is given seed and epoch.
        sampler: which samples, in which order.
        augment: applied to the inputs of every batch read.
        workers: reading processes. They are spawned: a fork after MPI is initialised is unsafe. 0 reads in this
            process, one batch ahead in a thread unless the data set lives in memory.
        seed: seed of the augmentation.
    """

    def __init__(
        self, dataset: Dataset, sampler: ShardedSampler, augment: Augment | None = None, workers: int = 0, seed: int = 0
    ) -> None:
        if workers < 0:
            raise ValueError(f"workers = {workers}: give 0 (read in this process) or a number of processes")
        self.sampler = sampler
        self._read = _Reader(dataset, augment, seed)
        self._ahead = not getattr(dataset, "in_memory", False)
        self._positions = _Positions()
        self._workers: DataLoader | None = None
        if workers:
            self._workers = DataLoader(
                self._read,  # type: ignore[arg-type]
                sampler=self._positions,
                batch_size=None,
                num_workers=workers,
                multiprocessing_context="spawn",
                persistent_workers=True,
            )

    def __len__(self) -> int:
        return self.sampler.batches_per_epoch

    def batches(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """This rank's batches of an epoch from batch number `start` on."""
        parts = self.sampler.batches(epoch, start)
        if self._workers is not None:
            return self._from_workers(self._workers, list(parts))
        return self._from_thread(parts) if self._ahead else (_batch(part, self._read(part)) for part in parts)

    def close(self) -> None:
        """Ends the worker processes."""
        self._workers = None

    def _from_workers(self, workers: DataLoader, parts: list[GlobalBatch]) -> Iterator[Batch]:
        self._positions.parts = parts
        with _apart_from_mpi():
            read = iter(workers)  # the first time, this starts the processes
        for part, tensors in zip(parts, read, strict=True):
            if isinstance(tensors, DataError):
                raise tensors
            yield _batch(part, tensors)

    def _from_thread(self, parts: Iterator[GlobalBatch]) -> Iterator[Batch]:
        with ThreadPoolExecutor(1, "read-ahead") as thread:
            waiting = None
            for part in parts:
                reading = part, thread.submit(self._read, part)
                if waiting is not None:
                    yield _batch(waiting[0], waiting[1].result())
                waiting = reading
            if waiting is not None:
                yield _batch(waiting[0], waiting[1].result())


class _Reader:
    """Reads the tensors of one part of a batch; sent to the worker processes."""

    def __init__(self, dataset: Dataset, augment: Augment | None, seed: int) -> None:
        self.dataset, self.augment, self.seed = dataset, augment, seed

    def __call__(self, part: GlobalBatch) -> tuple[Tensor, Tensor]:
        return self.read(part.indices, part.epoch)

    def __getitem__(self, position: tuple[np.ndarray, int]) -> tuple[Tensor, Tensor] | DataError:
        indices, epoch = position
        try:
            return self.read(torch.from_numpy(indices), epoch)
        except DataError as error:
            return error  # raised by the loop: a worker's own exception would be buried in its traceback

    def read(self, indices: Tensor, epoch: int) -> tuple[Tensor, Tensor]:
        if isinstance(self.dataset, KeyedDataset):
            inputs, targets = self.dataset.fetch_keyed(indices, self.seed, epoch)
        else:
            inputs, targets = self.dataset.fetch(indices)
        if self.augment is not None:
            inputs = self.augment(inputs, indices, self.seed, epoch)
        return inputs, targets


class _Positions:
    """Hands the parts of the current epoch to worker processes that outlive epochs."""

    def __init__(self) -> None:
        self.parts: list[GlobalBatch] = []

    def __iter__(self) -> Iterator[tuple[np.ndarray, int]]:
        # Arrays are sent by value; tensors would each travel through a file of shared memory.
        return ((part.indices.numpy(), part.epoch) for part in self.parts)

    def __len__(self) -> int:
        return len(self.parts)


def _batch(part: GlobalBatch, tensors: tuple[Tensor, Tensor]) -> Batch:
    return Batch(tensors[0], tensors[1], part.indices, part.size, part.epoch, part.index)


@contextmanager
def _apart_from_mpi() -> Iterator[None]:
    """What the processes started within it inherit keeps them apart from the rank's MPI and its signals.

    They import the main program; where that imports mpi4py they would initialise MPI as a second process of this rank,
    which ends in a crash. And mpirun passes signals on to a rank's whole process group, though they are for the rank.
    """
    name = "MPI4PY_RC_INITIALIZE"
    before = os.environ.get(name)
    os.environ[name] = "0"
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before
