"""Scratch tensors that are used again and again, so that an ordinary step allocates nothing."""

from __future__ import annotations

import math

import torch
from torch import Tensor


class Workspace:
    """Named scratch. Each name is one piece of memory that grows to the largest request and is lent again every time."""

    def __init__(self) -> None:
        self._pieces: dict[tuple[str, torch.device], Tensor] = {}

    def take(self, name: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
        """A contiguous tensor with arbitrary content; valid until the same name is taken again."""
        size = math.prod(shape) * dtype.itemsize
        piece = self._pieces.get((name, device))
        if piece is None or piece.numel() < size:
            piece = self._pieces[name, device] = torch.empty(size, dtype=torch.uint8, device=device)
        return piece[:size].view(dtype).view(shape)
