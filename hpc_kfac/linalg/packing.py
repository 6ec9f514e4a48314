"""Symmetric matrices as packed upper triangles, in row order, for sending and saving."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

# Above this size a CPU copies row by row: index tensors would take more memory than the matrix and gain little.
_LARGEST_INDEXED = 3072
_MIRROR_TILE = 256


@dataclass(frozen=True)
class Symmetric:
    """Marks symmetric matrices [..., d, d], of which a triangle says it all."""

    matrix: Tensor


def packed_size(d: int) -> int:
    """Entries of a packed d x d triangle."""
    return d * (d + 1) // 2


def pack_triangle(matrix: Tensor, out: Tensor | None = None) -> Tensor:
    """Upper triangles of [..., d, d] as [..., d (d + 1) / 2].

    Args:
        matrix: symmetric matrices; the lower triangles are not read.
        out: contiguous tensor of the result's shape and dtype to write into, for example a slice of a send buffer.
    """
    d = matrix.shape[-1]
    if out is None:
        out = matrix.new_empty(*matrix.shape[:-2], packed_size(d))
    flat = out.view(-1, packed_size(d))
    if _indexed(matrix):
        _select(matrix.reshape(-1, d * d), _triangle(d, matrix.device), flat)
    else:
        for source, target in zip(matrix.reshape(-1, d, d), flat, strict=True):
            torch.cat([row[i:] for i, row in enumerate(source)], out=target)
    return out


def unpack_triangle(packed: Tensor, d: int, out: Tensor | None = None) -> Tensor:
    """Symmetric matrices [..., d, d] from packed upper triangles [..., d (d + 1) / 2].

    Args:
        packed: triangles as `pack_triangle` writes them.
        d: rows of a matrix.
        out: contiguous tensor of the result's shape and dtype to write into.

    Raises:
        ValueError: the packed length does not belong to d.
    """
    if packed.shape[-1] != packed_size(d):
        raise ValueError(f"packed triangle has {packed.shape[-1]} entries; a {d} x {d} matrix has {packed_size(d)}")
    if out is None:
        out = packed.new_empty(*packed.shape[:-1], d, d)
    if _indexed(out):
        _select(packed.reshape(-1, packed_size(d)), _mirror(d, packed.device), out.view(-1, d * d))
    else:
        for source, target in zip(packed.reshape(-1, packed_size(d)), out.view(-1, d, d), strict=True):
            _unpack_rows(source, target)
    return out


def _indexed(matrix: Tensor) -> bool:
    return matrix.device.type != "cpu" or matrix.shape[-1] <= _LARGEST_INDEXED


def _select(source: Tensor, index: Tensor, out: Tensor) -> None:
    """out[:, i] = source[:, index[i]]; one row is faster as a vector."""
    if source.shape[0] == 1:
        torch.index_select(source[0], 0, index, out=out[0])
    else:
        torch.index_select(source, 1, index, out=out)


def _unpack_rows(packed: Tensor, matrix: Tensor) -> None:
    d = matrix.shape[-1]
    for i, row in enumerate(packed.split(list(range(d, 0, -1)))):
        matrix[i, i:].copy_(row)
    for start in range(0, d, _MIRROR_TILE):  # by tiles, because a transposed copy by rows misses the cache
        end = min(start + _MIRROR_TILE, d)
        matrix[end:, start:end].copy_(matrix[start:end, end:].T)
        upper = matrix[start:end, start:end].triu()
        matrix[start:end, start:end] = upper + upper.triu(1).T


@lru_cache(maxsize=256)
def _triangle(d: int, device: torch.device) -> Tensor:
    """Positions of the upper triangle in a flattened matrix."""
    rows, columns = torch.triu_indices(d, d, device=device)
    return (rows * d + columns).int()


@lru_cache(maxsize=256)
def _mirror(d: int, device: torch.device) -> Tensor:
    """For each entry of a flattened matrix its position in the packed triangle."""
    rows, columns = torch.triu_indices(d, d, device=device)
    order = torch.arange(packed_size(d), dtype=torch.int32, device=device)
    index = torch.empty(d, d, dtype=torch.int32, device=device)
    index[rows, columns] = order
    index[columns, rows] = order
    return index.flatten()
