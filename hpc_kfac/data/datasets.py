"""What the trainer asks of a data set, and the kinds that live in memory."""

from __future__ import annotations

from collections.abc import Sized
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor
from torch.utils.data import default_collate

from hpc_kfac.cluster.errors import DataError


class Dataset(Protocol):
    """A map-style data set read by whole batches."""

    def __len__(self) -> int: ...

    def fetch(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """Inputs and targets of these samples, leading axis ``len(indices)`` (which may be 0)."""
        ...


@runtime_checkable
class KeyedDataset(Protocol):
    """A data set that augments while it reads, by draws that depend on seed, epoch and sample number only."""

    def __len__(self) -> int: ...

    def fetch(self, indices: Tensor) -> tuple[Tensor, Tensor]: ...

    def fetch_keyed(self, indices: Tensor, seed: int, epoch: int) -> tuple[Tensor, Tensor]: ...


class TensorDataset:
    """Inputs and targets held as two tensors; fetching is indexing.

    Args:
        inputs: ``[n, ...]``.
        targets: ``[n, ...]``.

    Raises:
        DataError: the two differ in length.
    """

    in_memory = True

    def __init__(self, inputs: Tensor, targets: Tensor) -> None:
        if len(inputs) != len(targets):
            raise DataError(f"{len(inputs)} inputs and {len(targets)} targets: both need one row a sample")
        self.inputs, self.targets = inputs, targets

    def __len__(self) -> int:
        return len(self.targets)

    def fetch(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        return self.inputs[indices], self.targets[indices]


class ByteImages(TensorDataset):
    """Images kept as bytes (a quarter of the memory) and scaled when fetched: ``(byte / 255 - mean) / deviation``.

    Batches are ``[n, channels, height, width]`` with the channels last in memory: convolution and pooling of small nets
    then take about half the time on a CPU, and less on a GPU.

    Args:
        images: uint8 ``[n, channels, height, width]``.
        labels: int64 ``[n]``.
        mean: one value a channel, on the scale [0, 1].
        deviation: one value a channel.
    """

    def __init__(self, images: Tensor, labels: Tensor, mean: tuple[float, ...], deviation: tuple[float, ...]) -> None:
        super().__init__(images.permute(0, 2, 3, 1).contiguous(), labels)
        # One multiplication and one addition a pixel.
        self._scale = 1 / (255 * torch.tensor(deviation))
        self._shift = -torch.tensor(mean) / torch.tensor(deviation)

    def fetch(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        pixels = self.inputs[indices].float().mul_(self._scale).add_(self._shift)
        return pixels.permute(0, 3, 1, 2), self.targets[indices]


class ReconstructionImages:
    """Images as flat vectors in [0, 1] that are their own targets: ``[n, pixels]`` twice.

    Args:
        images: uint8 ``[n, ...]``.
    """

    in_memory = True

    def __init__(self, images: Tensor) -> None:
        self.images = images.flatten(1)

    def __len__(self) -> int:
        return len(self.images)

    def fetch(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        pixels = self.images[indices].float().div_(255)
        return pixels, pixels


class ItemDataset:
    """Any map-style torch data set of (input, target) items, fetched item by item.

    Args:
        items: has ``__len__`` and ``__getitem__`` and returns a pair of tensors, arrays or numbers.
    """

    in_memory = False

    def __init__(self, items: Any) -> None:
        if not isinstance(items, Sized) or not hasattr(items, "__getitem__"):
            raise DataError(
                f"{type(items).__name__} is no map-style data set: it needs __len__ and __getitem__, or fetch(indices)"
            )
        self.items: Any = items

    def __len__(self) -> int:
        return len(self.items)

    def fetch(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        if len(indices) == 0:  # an empty shard still needs the right shapes
            inputs, targets = self.fetch(torch.zeros(1, dtype=torch.int64))
            return inputs[:0], targets[:0]
        pairs = [self.items[int(index)] for index in indices]
        inputs, targets = default_collate([(pair[0], pair[1]) for pair in pairs])
        return inputs, targets
