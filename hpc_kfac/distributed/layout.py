"""How named tensors lie in one contiguous message: fused buffers with packed triangles."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hpc_kfac.linalg.packing import pack_triangle, unpack_triangle


@dataclass(frozen=True)
class Slot:
    """One tensor of one layer in a message.

    Attributes:
        layer: layer name.
        name: tensor name.
        shape: shape of the tensor.
        dtype: dtype in the message.
        symmetric: the last two axes are symmetric and travel as a packed triangle.
    """

    layer: str
    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    symmetric: bool = False

    @property
    def message_shape(self) -> tuple[int, ...]:
        if not self.symmetric:
            return self.shape
        d = self.shape[-1]
        return (*self.shape[:-2], d * (d + 1) // 2)

    @property
    def bytes(self) -> int:
        return math.prod(self.message_shape) * self.dtype.itemsize


class Message:
    """A buffer for the given slots.

    Slots are laid out by falling element size, so that every slot is aligned whatever dtypes are mixed.
    """

    def __init__(self, slots: Sequence[Slot], device: torch.device) -> None:
        self.slots = sorted(slots, key=lambda slot: -slot.dtype.itemsize)
        self.buffer = torch.empty(sum(slot.bytes for slot in slots), dtype=torch.uint8, device=device)
        self._views: dict[Slot, Tensor] = {}
        offset = 0
        for slot in self.slots:
            piece = self.buffer[offset : offset + slot.bytes]
            self._views[slot] = piece.view(slot.dtype).view(slot.message_shape)
            offset += slot.bytes

    def __iter__(self) -> Iterator[Slot]:
        return iter(self.slots)

    def typed(self) -> Tensor:
        """The whole buffer as one tensor; all slots must have one dtype."""
        return self.buffer.view(self.slots[0].dtype)

    def put(self, slot: Slot, tensor: Tensor | None, scale: float = 1.0) -> None:
        """Writes scale * tensor, or zeros for None."""
        view = self._views[slot]
        if tensor is None:
            view.zero_()
        elif slot.symmetric:
            view.copy_(pack_triangle(tensor))
        else:
            view.copy_(tensor.reshape(slot.shape))
        if tensor is not None and scale != 1.0:
            view.mul_(scale)

    def get(self, slot: Slot) -> Tensor:
        """A new tensor of the slot's shape and dtype."""
        view = self._views[slot]
        return unpack_triangle(view, slot.shape[-1]) if slot.symmetric else view.clone()

    def view(self, slot: Slot) -> Tensor:
        """The slot's part of the buffer, in message shape, without a copy."""
        return self._views[slot]
