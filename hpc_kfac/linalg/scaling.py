"""Powers of two that bring tensors to where squares neither overflow nor vanish; ordinary results stay bit for bit."""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor

from hpc_kfac.linalg.workspace import Workspace


def size_of(tensor: Tensor, per_block: bool = False, out: Tensor | None = None) -> Tensor:
    """The power of two just below the largest absolute entry; the smallest normal number for less, inf for inf or NaN.

    Dividing by it is exact, and leaves entries below 2.

    Args:
        tensor: [p, m, n] of float32 or float64.
        per_block: one for each of the p matrices.
        out: for the result.

    Returns:
        [p, 1, 1] or [1, 1, 1].
    """
    dims = (1, 2) if per_block else (0, 1, 2)
    largest = torch.linalg.vector_norm(tensor, math.inf, dim=dims, keepdim=True, out=out)
    exponent, least = _constants(tensor.dtype, tensor.device)
    largest.view(exponent.dtype).bitwise_and_(exponent)
    return torch.maximum(largest, least, out=largest)


@lru_cache(maxsize=16)  # torch allocates for a Python number in every call
def _constants(dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """The bits of a number's exponent, and the smallest normal number."""
    integer, bits = (torch.int32, 0x7F800000) if dtype == torch.float32 else (torch.int64, 0x7FF0000000000000)
    least = torch.tensor(torch.finfo(dtype).tiny, dtype=dtype, device=device)
    return torch.tensor(bits, dtype=integer, device=device), least


def with_length_of(update: Tensor, like: Tensor, work: Workspace) -> Tensor:
    """The update [p, m, n], in place, at the Frobenius norm of another tensor; one that is zero stays so."""
    device, dtype = update.device, update.dtype
    squares, sizes = [], []
    for name, tensor in (("update", update), ("like", like)):
        size = size_of(tensor, out=work.take(f"size of {name}", (1, 1, 1), dtype, device))
        # The other one is not changed, so that it is scaled in scratch.
        scaled = torch.div(tensor, size, out=update if tensor is update else work.like("scaled", tensor))
        flat = (scaled if scaled.is_contiguous() else scaled.mT).reshape(-1)
        squares.append(torch.mv(flat.view(1, -1), flat, out=work.take(f"square of {name}", (1,), dtype, device)))
        sizes.append(size)
    ratio = torch.div(squares[1], squares[0], out=squares[1]).sqrt_().nan_to_num_(1.0, 1.0)
    return update.mul_(ratio).mul_(sizes[1])
