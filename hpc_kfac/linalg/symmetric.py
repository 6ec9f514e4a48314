"""Products of rows with themselves: half the work, and 16-bit rows with a float32 result."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

# Measured on an AVX-512 core: columns of one panel, and the least columns for which panels pay.
PANEL, LEAST = 128, 257
# 16-bit rows that are multiplied at once. A product of more is rounded to 16 bits later, and so less often.
PIECE = 512


def gram(rows: Tensor) -> Tensor:
    """Sum of r r^T over the rows [p, n, d]: [p, d, d], exactly symmetric, so that a triangle says it all.

    Only the panels on and right of the diagonal are multiplied. 16-bit rows are multiplied as they are and accumulated
    in float32; the sum of every ``PIECE`` rows is rounded to 16 bits once, and their total is kept in float32.
    """
    p, n, d = rows.shape
    half = rows.dtype in (torch.bfloat16, torch.float16)
    result = rows.new_empty(p, d, d, dtype=torch.float32 if half else rows.dtype)
    width = PANEL if d >= LEAST and rows.device.type == "cpu" else max(d, 1)
    for start in range(0, d, width):
        stop = min(start + width, d)
        left, right, target = rows[:, :, start:stop], rows[:, :, start:], result[:, start:stop, start:]
        if half:
            target.copy_(_half_product(left, right))
        elif p == 1:
            torch.mm(left[0].T, right[0], out=target[0])
        else:
            torch.bmm(left.mT, right, out=target)
        result[:, stop:, start:stop] = result[:, start:stop, stop:].mT
        mirror_(result[:, start:stop, start:stop])
    return result


def mirror_(matrix: Tensor) -> Tensor:
    """Makes [..., d, d] that are symmetric but for rounding exactly so, by their upper triangles, in place."""
    return matrix.copy_(torch.where(_below(matrix.shape[-1], matrix.device), matrix.mT, matrix))


@lru_cache(maxsize=64)
def _below(d: int, device: torch.device) -> Tensor:
    """Where a d x d matrix is below its diagonal."""
    return torch.ones(d, d, dtype=torch.bool, device=device).tril(-1)


def _half_product(left: Tensor, right: Tensor) -> Tensor:
    """left^T right for 16-bit [p, n, w] and [p, n, d], in float32."""
    p, n, _ = left.shape
    whole = n - n % PIECE
    total = torch.bmm(left[:, whole:].mT, right[:, whole:]).float()
    if whole:
        pieces = [side[:, :whole].unflatten(1, (-1, PIECE)).flatten(0, 1) for side in (left, right)]
        total += torch.bmm(pieces[0].mT, pieces[1]).unflatten(0, (p, -1)).sum(1, dtype=torch.float32)
    return total
