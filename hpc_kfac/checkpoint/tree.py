"""What a checkpoint can hold: nested dictionaries of tensors and plain values."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

# Keys are strings. Values are trees, tensors, Packed, str, int, float, bool, None and lists of str, int, float or bool.
Tree = dict[str, Any]


@dataclass(frozen=True)
class Packed:
    """Symmetric matrices as packed upper triangles, as `linalg.packing.pack_triangle` makes them.

    Attributes:
        tensor: ``[..., size (size + 1) / 2]``, of a real floating-point dtype.
        size: rows of a matrix.
    """

    tensor: Tensor
    size: int
