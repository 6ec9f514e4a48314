"""Buffers that are used again: after one round of the same requests nothing more is allocated."""

from __future__ import annotations

import threading
from collections import defaultdict

import torch
from torch import Tensor

ALIGNMENT = 64  # bytes; what torch's allocators give


class BufferPool:
    """Byte buffers by size class and device.

    A request is rounded up by at most an eighth, so that nearly equal sizes share buffers, and is only met by a buffer
    of its own class: a class never holds more buffers than were once in use together, in whatever order they came.
    Threads may share a pool.

    Args:
        pinned: host buffers are page-locked, which copies from and to a GPU need to be asynchronous.

    Attributes:
        allocated: bytes held, in use or free.
    """

    def __init__(self, *, pinned: bool = False) -> None:
        self.allocated = 0
        self._pinned = pinned
        self._lock = threading.Lock()
        self._free: defaultdict[tuple[int, torch.device], list[Tensor]] = defaultdict(list)
        self._taken: dict[int, Tensor] = {}  # by address of their storage

    def take(self, nbytes: int, device: torch.device | str = "cpu") -> Tensor:
        """A buffer of nbytes uint8 elements, 64-byte aligned, with arbitrary content.

        Raises:
            ValueError: a negative size.
        """
        if nbytes < 0:
            raise ValueError(f"a buffer of {nbytes} bytes was asked for; a size is at least 0")
        device, size = torch.device(device), rounded(nbytes)
        with self._lock:
            free = self._free[size, device]
            if free:
                buffer = free.pop()
            else:
                buffer = torch.empty(size, dtype=torch.uint8, device=device, pin_memory=self._pinned)
                self.allocated += size
            self._taken[buffer.untyped_storage().data_ptr()] = buffer
        return buffer[:nbytes]

    def give_back(self, buffer: Tensor) -> None:
        """Makes a buffer, or any view of one, free for the next request of its size.

        Raises:
            ValueError: it is not one of this pool's that is in use.
        """
        with self._lock:
            whole = self._taken.pop(buffer.untyped_storage().data_ptr(), None)
            if whole is None:
                raise ValueError("a buffer was given back that is not in use; give back what take() returned, once")
            self._free[whole.numel(), whole.device].append(whole)

    def clear(self) -> None:
        """Gives back the memory of buffers that are not in use."""
        with self._lock:
            self.allocated -= sum(size * len(buffers) for (size, _), buffers in self._free.items())
            self._free.clear()


def rounded(nbytes: int) -> int:
    """Bytes of the size class that a request is met from."""
    step = max(ALIGNMENT, 1 << max(0, nbytes.bit_length() - 4))
    return max(1, -(-nbytes // step)) * step
