"""Copies of tensors that training goes on changing, in one buffer that is used again for the next checkpoint."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from hpc_kfac.checkpoint.tree import Packed, Tree
from hpc_kfac.linalg.packing import Symmetric, pack_triangle, packed_size

ALIGNMENT = 64


class Staging:
    """Host memory for one checkpoint; pinned where tensors come from a GPU."""

    def __init__(self) -> None:
        self._buffer = torch.empty(0, dtype=torch.uint8)

    def copy(self, tree: Tree) -> Tree:
        """The tree with copies of its tensors, symmetric ones packed; valid until the next call."""
        leaves = list(_leaves(tree))
        size = sum(_room(_packed_shape(leaf), _tensor(leaf).dtype) for leaf in leaves)
        on_gpu = any(_tensor(leaf).is_cuda for leaf in leaves)
        if self._buffer.numel() < size or (on_gpu and not self._buffer.is_pinned()):
            self._buffer = torch.empty(0, dtype=torch.uint8)  # before the larger one
            self._buffer = torch.empty(size, dtype=torch.uint8, pin_memory=on_gpu)
        self._used = 0
        staged = self._copied(tree)
        if on_gpu:
            torch.cuda.synchronize()
        return staged

    def _copied(self, value: Any) -> Any:
        if isinstance(value, Mapping):
            return {key: self._copied(entry) for key, entry in value.items()}
        if isinstance(value, Symmetric):
            out, matrix = self._take(value), value.matrix.detach()
            if matrix.is_cuda:
                out.copy_(pack_triangle(matrix), non_blocking=True)
            else:
                pack_triangle(matrix, out)
            return Packed(out, matrix.shape[-1])
        if isinstance(value, Tensor):
            return self._take(value).copy_(value.detach(), non_blocking=True)
        return value

    def _take(self, leaf: Tensor | Symmetric) -> Tensor:
        shape, dtype = _packed_shape(leaf), _tensor(leaf).dtype
        start, self._used = self._used, self._used + _room(shape, dtype)
        return self._buffer[start : start + math.prod(shape) * dtype.itemsize].view(dtype).view(shape)


def _leaves(value: Any) -> Iterator[Tensor | Symmetric]:
    if isinstance(value, Mapping):
        for entry in value.values():
            yield from _leaves(entry)
    elif isinstance(value, Tensor | Symmetric):
        yield value


def _tensor(leaf: Tensor | Symmetric) -> Tensor:
    return leaf.matrix if isinstance(leaf, Symmetric) else leaf


def _packed_shape(leaf: Tensor | Symmetric) -> tuple[int, ...]:
    shape = tuple(_tensor(leaf).shape)
    return (*shape[:-2], packed_size(shape[-1])) if isinstance(leaf, Symmetric) else shape


def _room(shape: tuple[int, ...], dtype: torch.dtype) -> int:
    return -(-math.prod(shape) * dtype.itemsize // ALIGNMENT) * ALIGNMENT
