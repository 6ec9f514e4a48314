"""How named tensors lie in one contiguous message: fused buffers with packed triangles."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hpc_kfac.distributed.buffers import BufferPool
from hpc_kfac.linalg.packing import pack_triangle, packed_size, unpack_triangle


@dataclass(frozen=True)
class Slot:
    """One tensor of one layer in a message.

    Attributes:
        layer: layer name.
        name: tensor name.
        shape: shape of the tensor.
        dtype: dtype in the message.
        symmetric: the last two axes are symmetric and travel as a packed triangle.
        diagonal: only the diagonals of the last two axes travel.
        owner: the rank that a reduce-scatter delivers the slot to.
    """

    layer: str
    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    symmetric: bool = False
    diagonal: bool = False
    owner: int = 0

    @property
    def message_shape(self) -> tuple[int, ...]:
        if self.diagonal:
            return self.shape[:-1]
        return (*self.shape[:-2], packed_size(self.shape[-1])) if self.symmetric else self.shape

    @property
    def bytes(self) -> int:
        return math.prod(self.message_shape) * self.dtype.itemsize


def in_order(slots: Sequence[Slot]) -> tuple[Slot, ...]:
    """Slots as they lie in a message: by falling element size, so that each is aligned, then by dtype and owner."""
    return tuple(sorted(slots, key=lambda slot: (-slot.dtype.itemsize, str(slot.dtype), slot.owner)))


class Message:
    """A buffer for the given slots, borrowed from a pool until `release`.

    Args:
        slots: in the order of `in_order`.
        pool: lends the buffer.
        device: of the buffer.
    """

    def __init__(self, slots: Sequence[Slot], pool: BufferPool, device: torch.device) -> None:
        self.slots = tuple(slots)
        self._pool = pool
        self.buffer = pool.take(sum(slot.bytes for slot in slots), device)
        self._views: dict[Slot, Tensor] = {}
        offset = 0
        for slot in self.slots:
            piece = self.buffer[offset : offset + slot.bytes]
            self._views[slot] = piece.view(slot.dtype).view(slot.message_shape)
            offset += slot.bytes

    def __iter__(self) -> Iterator[Slot]:
        return iter(self.slots)

    def segments(self) -> list[tuple[Tensor, tuple[Slot, ...]]]:
        """The buffer as flat tensors of one dtype each, with the slots that lie in them."""
        found, offset = [], 0
        for dtype in dict.fromkeys(slot.dtype for slot in self.slots):
            slots = tuple(slot for slot in self.slots if slot.dtype == dtype)
            size = sum(slot.bytes for slot in slots)
            found.append((self.buffer[offset : offset + size].view(dtype), slots))
            offset += size
        return found

    def put(self, slot: Slot, tensor: Tensor | None, scale: float = 1.0) -> None:
        """Writes scale * tensor, or zeros for None."""
        view = self._views[slot]
        if tensor is None:
            view.zero_()
            return
        if slot.diagonal:
            view.copy_(tensor.diagonal(dim1=-2, dim2=-1))
        elif slot.symmetric:
            self._pack(tensor, view)
        else:
            view.copy_(tensor.reshape(slot.shape))
        if scale != 1.0:
            view.mul_(scale)

    def get(self, slot: Slot, out: Tensor | None = None) -> Tensor:
        """The slot's tensor in its full shape: written to `out`, whatever its dtype, or a new one."""
        view = self._views[slot]
        if out is None:
            out = view.new_empty(slot.shape)
        if not slot.symmetric:
            return out.copy_(view)
        d = slot.shape[-1]
        if out.dtype == view.dtype and out.is_contiguous():
            return unpack_triangle(view, d, out=out)
        return out.copy_(unpack_triangle(view, d))

    def view(self, slot: Slot) -> Tensor:
        """The slot's part of the buffer, in message shape, without a copy."""
        return self._views[slot]

    def release(self) -> None:
        """Gives the buffer back; views of it must no longer be used."""
        self._views.clear()
        self._pool.give_back(self.buffer)

    def _pack(self, tensor: Tensor, view: Tensor) -> None:
        if tensor.dtype == view.dtype:
            pack_triangle(tensor, out=view)
            return
        scratch = self._pool.take(view.numel() * tensor.element_size(), view.device)
        view.copy_(pack_triangle(tensor, out=scratch.view(tensor.dtype).view(view.shape)))
        self._pool.give_back(scratch)
