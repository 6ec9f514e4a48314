"""Norms of tensors whose squares may overflow or vanish."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from hpc_kfac.linalg.workspace import Workspace

SAFE = {torch.float32: (1e-15, 1e18), torch.float64: (1e-140, 1e150)}
"""Norms between these come from squares that neither overflowed nor vanished."""


def at_norm(tensor: Tensor, norm: float = 1.0, per_block: bool = False, factor: Tensor | None = None) -> Tensor:
    """The tensor, in place, at a Frobenius norm, whatever its size; zeros stay zeros, and inf or NaN become NaN.

    Args:
        tensor: [p, m, n] of float32 or float64.
        norm: a positive number.
        per_block: each of the p matrices for itself.
        factor: [1], multiplies the norm.
    """
    dims = (1, 2) if per_block else (0, 1, 2)
    if tensor.device.type == "cpu" and (not per_block or len(tensor) == 1):  # reading a number costs nothing here
        found = torch.linalg.vector_norm(tensor, dim=dims).item()
        low, high = SAFE[tensor.dtype]
        if low < found < high:
            return tensor.mul_(norm * (1.0 if factor is None else factor.item()) / found)
    elif tensor.dtype == torch.float32 and tensor.device.type != "cpu":
        return tensor.mul_(_inverse_norm(tensor, dims, norm, factor))
    tensor.div_(size_of(tensor, per_block))
    norms = torch.linalg.vector_norm(tensor, dim=dims, keepdim=True).clamp_(min=0.5)
    return tensor.mul_(norm / norms if factor is None else factor * norm / norms)


def _inverse_norm(tensor: Tensor, dims: tuple[int, ...], norm: float, factor: Tensor | None) -> Tensor:
    """`norm` by the norm of a float32 tensor, without asking the device: float64 holds all squares of float32.

    The inverse of the largest norm is subnormal in float32 and that of the smallest normal one finite.
    """
    inverse = torch.linalg.vector_norm(tensor, dim=dims, keepdim=True, dtype=torch.float64)
    inverse = inverse.clamp_(min=norm * torch.finfo(torch.float32).tiny).reciprocal_().mul_(norm)
    return (inverse if factor is None else inverse.mul_(factor)).to(torch.float32)


def size_of(tensor: Tensor, per_block: bool = False, out: tuple[Tensor, Tensor] | None = None) -> Tensor:
    """The power of two just below the largest absolute entry; the smallest normal number for less, inf for inf or NaN.

    Dividing by it is exact, and leaves entries below 2.

    Args:
        tensor: [p, m, n] of float32 or float64.
        per_block: one for each of the p matrices.
        out: for the result, and scratch of the same shape.

    Returns:
        [p, 1, 1] or [1, 1, 1].
    """
    dims = (1, 2) if per_block else (0, 1, 2)
    # A norm of order inf takes many times longer on CPUs than these two.
    largest = torch.amax(tensor, dims, True, out=None if out is None else out[0])
    least = torch.amin(tensor, dims, True, out=None if out is None else out[1]).neg_()
    torch.maximum(largest, least, out=largest)
    exponent, normal = _constants(tensor.dtype, tensor.device)
    largest.view(exponent.dtype).bitwise_and_(exponent)
    return torch.maximum(largest, normal, out=largest)


@lru_cache(maxsize=16)  # torch allocates for a Python number in every call
def _constants(dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """The bits of a number's exponent, and the smallest normal number."""
    integer, bits = (torch.int32, 0x7F800000) if dtype == torch.float32 else (torch.int64, 0x7FF0000000000000)
    least = torch.tensor(torch.finfo(dtype).tiny, dtype=dtype, device=device)
    return torch.tensor(bits, dtype=integer, device=device), least


def with_length_of(update: Tensor, like: Tensor, work: Workspace) -> Tensor:
    """The update [p, m, n], in place, at the Frobenius norm of another tensor; one that is zero stays so."""
    device, dtype = update.device, update.dtype
    norms, sizes = [], []
    for name, tensor in (("update", update), ("like", like)):
        scratch = [work.take(f"{use} of {name}", (1, 1, 1), dtype, device) for use in ("size", "least")]
        size = size_of(tensor, out=(scratch[0], scratch[1]))
        # The other one is not changed, so that it is scaled in scratch.
        scaled = torch.div(tensor, size, out=update if tensor is update else work.like("scaled", tensor))
        flat = (scaled if scaled.is_contiguous() else scaled.mT).reshape(-1)
        # Not by BLAS, whose sums depend on some processors on where in memory a tensor begins.
        norm = work.take(f"norm of {name}", (1,), dtype, device)
        norms.append(torch.linalg.vector_norm(flat, dim=0, keepdim=True, out=norm))
        sizes.append(size)
    ratio = torch.div(norms[1], norms[0], out=norms[1]).nan_to_num_(1.0, 1.0)
    return update.mul_(ratio).mul_(sizes[1])
