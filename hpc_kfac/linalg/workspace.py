"""Scratch tensors that are used again and again, so that an ordinary step allocates nothing."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor


class Workspace:
    """Named scratch. Each name is one piece of memory, grown to the largest request and lent again every time."""

    def __init__(self) -> None:
        self._pieces: dict[tuple[str, torch.device], Tensor] = {}
        # Views are kept, because making one takes as long as a small product.
        self._views: dict[tuple[str, torch.Size | tuple[int, ...], torch.dtype, torch.device], Tensor] = {}
        self._made: dict[int, dict[str, list[Tensor]]] = {}  # from these, by identity
        self._numbers: dict[tuple[str, torch.dtype, torch.device], tuple[float, Tensor]] = {}

    def take(self, name: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
        """A contiguous tensor with arbitrary content; valid until the same name is taken again."""
        key = (name, shape, dtype, device)
        view = self._views.get(key)
        if view is None:
            size = math.prod(shape) * dtype.itemsize
            view = self._views[key] = self._piece(name, size, device)[:size].view(dtype).view(shape)
            self._made[id(view)] = {}
        return view

    def like(self, name: str, tensor: Tensor) -> Tensor:
        """As `take`, with shape, dtype and device of a tensor [..., m, n]; transposed in memory where that one is."""
        if not tensor.is_contiguous() and tensor.mT.is_contiguous():
            return self.take(name, tensor.mT.shape, tensor.dtype, tensor.device).mT
        return self.take(name, tensor.shape, tensor.dtype, tensor.device)

    def cast(self, name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
        """The tensor itself where it has the dtype already, otherwise a copy in scratch."""
        if tensor.dtype == dtype:
            return tensor
        return self.take(name, tensor.shape, dtype, tensor.device).copy_(tensor)

    def number(self, name: str, value: float, dtype: torch.dtype, device: torch.device) -> Tensor:
        """The number as a tensor [1, 1, 1], read only: torch allocates one for a Python number in every call."""
        held = self._numbers.get((name, dtype, device))
        if held is None:
            held = self._numbers[name, dtype, device] = value, torch.full((1, 1, 1), value, dtype=dtype, device=device)
        elif held[0] != value:
            held = self._numbers[name, dtype, device] = value, held[1].fill_(value)
        return held[1]

    def views(self, tensor: Tensor, name: str, make: Callable[[Tensor], list[Tensor]]) -> list[Tensor]:
        """Views that `make` makes of a tensor: under one name only once if the tensor is scratch, else every time."""
        made = self._made.get(id(tensor))
        if made is None:
            return make(tensor)
        if name not in made:
            made[name] = make(tensor)
        return made[name]

    def clear(self) -> None:
        """Gives all memory back; nothing that was taken is valid any more."""
        for kept in (self._pieces, self._views, self._made, self._numbers):
            kept.clear()

    def _piece(self, name: str, size: int, device: torch.device) -> Tensor:
        piece = self._pieces.get((name, device))
        if piece is None or piece.numel() < size:
            self._views = {key: view for key, view in self._views.items() if (key[0], key[3]) != (name, device)}
            self._made = {key: self._made[key] for key in map(id, self._views.values())}
            piece = self._pieces[name, device] = torch.empty(size, dtype=torch.uint8, device=device)
        return piece


def scratch(work: Workspace | None, name: str, like: Tensor) -> Tensor:
    """`Workspace.like`, or a new tensor without a workspace."""
    return torch.empty_like(like) if work is None else work.like(name, like)
