"""Loading in memory, in a thread and in worker processes; augmentation; the kinds of data set."""

from __future__ import annotations

import threading

import pytest
import torch
from torch import Tensor

from hpc_kfac.cluster.errors import DataError
from hpc_kfac.data.augment import CropAndFlip
from hpc_kfac.data.datasets import ByteImages, ItemDataset, ReconstructionImages, TensorDataset
from hpc_kfac.data.loader import Batch, Loader
from hpc_kfac.data.sampler import ShardedSampler

IMAGES = torch.randint(0, 256, (50, 3, 8, 6), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


class Slow:
    """A data set that is not in memory: inputs are the squares of the sample numbers."""

    def __init__(self) -> None:
        self.threads: set[str] = set()

    def __len__(self) -> int:
        return 20

    def fetch(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        self.threads.add(threading.current_thread().name)
        return (indices**2).float(), indices


class Keyed(Slow):
    def fetch_keyed(self, indices: Tensor, seed: int, epoch: int) -> tuple[Tensor, Tensor]:
        return indices.float() + 100 * epoch + 1000 * seed, indices


class Broken(Slow):
    def fetch(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        if 13 in indices:
            raise DataError("file 13 is damaged")
        return super().fetch(indices)


def rows(batches: list[Batch]) -> list[tuple[int, int, int, list[float], list[int]]]:
    return [(b.epoch, b.index, b.global_size, b.inputs.tolist(), b.targets.tolist()) for b in batches]


def test_batches_from_memory_follow_the_sampler() -> None:
    data = TensorDataset(torch.arange(20.0), torch.arange(20))
    sampler = ShardedSampler(20, 6, rank=1, ranks=3, seed=4)
    loader = Loader(data, sampler)
    assert len(loader) == 4
    for batch, part in zip(loader.batches(2, 1), sampler.batches(2, 1), strict=True):
        assert batch.indices.equal(part.indices)
        assert batch.inputs.tolist() == part.indices.tolist() == batch.targets.tolist()
        assert (batch.epoch, batch.index, batch.global_size) == (2, part.index, part.size)


def test_reading_ahead_in_a_thread() -> None:
    data, sampler = Slow(), ShardedSampler(20, 3)
    expected = [(part.indices**2).float().tolist() for part in sampler.batches(0)]
    assert [batch.inputs.tolist() for batch in Loader(data, sampler).batches(0)] == expected
    assert data.threads
    assert all(name.startswith("read-ahead") for name in data.threads)
    assert [b.inputs.tolist() for b in Loader(data, sampler).batches(0, 5)] == expected[5:]
    assert list(Loader(data, sampler).batches(0, 7)) == []


def test_an_abandoned_reading_thread_ends() -> None:
    batches = Loader(Slow(), ShardedSampler(20, 3)).batches(0)
    next(batches)
    batches.close()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("read-ahead")]


@pytest.mark.parametrize("workers", [0, 1])
def test_an_error_while_reading_reaches_the_loop(workers: int) -> None:
    loader = Loader(Broken(), ShardedSampler(20, 3, shuffle=False), workers=workers)
    with pytest.raises(DataError, match="^file 13 is damaged$"):
        list(loader.batches(0))
    loader.close()


def test_keyed_data_sets_get_seed_and_epoch() -> None:
    batch = next(iter(Loader(Keyed(), ShardedSampler(20, 2, shuffle=False), seed=3).batches(4)))
    assert batch.inputs.tolist() == [3400, 3401]


def test_worker_processes_give_the_same_batches_and_restart_anywhere() -> None:
    data = ByteImages(IMAGES, torch.arange(50), (0.5,) * 3, (0.2,) * 3)
    sampler = ShardedSampler(50, 12, rank=1, ranks=2, seed=1)
    here = Loader(data, sampler, CropAndFlip(2), seed=7)
    away = Loader(data, sampler, CropAndFlip(2), workers=1, seed=7)
    try:
        assert rows(list(away.batches(0))) == rows(list(here.batches(0)))
        abandoned = away.batches(1)
        next(abandoned)
        assert rows(list(away.batches(2, 3))) == rows(list(here.batches(2, 3)))
    finally:
        away.close()


def test_negative_workers_are_refused() -> None:
    with pytest.raises(ValueError, match="workers = -1"):
        Loader(Slow(), ShardedSampler(20, 3), workers=-1)


def test_crop_and_flip_moves_and_mirrors() -> None:
    indices = torch.arange(400)
    image = torch.arange(1.0, 31).view(1, 1, 5, 6).expand(400, 2, 5, 6)
    changed = CropAndFlip(1)(image, indices, 1, 2)
    assert changed.shape == image.shape
    padded = torch.nn.functional.pad(image[0], (1,) * 4)
    views = [padded[:, top : top + 5, left : left + 6] for top in range(3) for left in range(3)]
    candidates = torch.stack(views + [view.flip(2) for view in views])
    which = (changed[:, None] == candidates[None]).flatten(2).all(2)
    assert which.sum(1).eq(1).all()
    assert which.sum(0).min() > 5  # each of the 18 comes about 22 times


def test_crop_and_flip_is_keyed_by_sample() -> None:
    images, indices = IMAGES.float(), torch.arange(50)
    augment = CropAndFlip(2)
    whole = augment(images, indices, 1, 2)
    assert augment(images[30:], indices[30:], 1, 2).equal(whole[30:])
    assert not augment(images, indices, 1, 3).equal(whole)
    assert not augment(images, indices, 2, 2).equal(whole)
    assert augment(images[:0], indices[:0], 1, 2).shape == (0, 3, 8, 6)


def test_byte_images_are_scaled() -> None:
    data = ByteImages(IMAGES, torch.arange(50), (0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    inputs, labels = data.fetch(torch.tensor([7, 3]))
    for channel, (mean, deviation) in enumerate(((0.1, 0.4), (0.2, 0.5), (0.3, 0.6))):
        expected = (IMAGES[[7, 3], channel].float() / 255 - mean) / deviation
        torch.testing.assert_close(inputs[:, channel], expected)
    assert labels.tolist() == [7, 3]
    assert inputs.is_contiguous(memory_format=torch.channels_last)
    assert CropAndFlip(1)(inputs, torch.tensor([7, 3]), 0, 0).is_contiguous(memory_format=torch.channels_last)


def test_reconstruction_targets_are_the_inputs() -> None:
    data = ReconstructionImages(IMAGES)
    inputs, targets = data.fetch(torch.tensor([4]))
    assert len(data) == 50
    assert inputs.equal(targets)
    torch.testing.assert_close(inputs, IMAGES[4:5].flatten(1).float() / 255)


def test_item_data_sets_are_collated() -> None:
    data = ItemDataset([(torch.full((2,), float(i)), i % 3) for i in range(9)])
    inputs, targets = data.fetch(torch.tensor([8, 1]))
    assert inputs.tolist() == [[8, 8], [1, 1]]
    assert targets.tolist() == [2, 1]
    inputs, targets = data.fetch(torch.tensor([], dtype=torch.int64))
    assert inputs.shape == (0, 2)
    assert targets.dtype == torch.int64
    with pytest.raises(DataError, match="generator.*__getitem__"):
        ItemDataset(i for i in range(3))
    with pytest.raises(DataError, match="3 inputs and 2 targets"):
        TensorDataset(torch.zeros(3), torch.zeros(2))
