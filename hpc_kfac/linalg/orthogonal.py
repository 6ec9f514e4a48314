"""The nearest matrix with orthonormal rows or columns, about, by products alone."""

from __future__ import annotations

import torch
from torch import Tensor

from hpc_kfac.linalg.half import bfloat16_is_faster
from hpc_kfac.linalg.scaling import at_norm

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Of x -> a x + b x^3 + c x^5, which carries (0, 1] to about (0.7, 1.2) in few iterations (Jordan et al. 2024)."""


def orthogonal(matrices: Tensor, iterations: int) -> Tensor:
    """About U V^T of every matrix U S V^T: singular values between about 0.7 and 1.2, where they were not too small.

    Args:
        matrices: [p, m, n]; not changed. float32 is multiplied in bfloat16 where that is faster: enough for so coarse a
            result.
        iterations: each makes small singular values 3.4 times larger; 5 carry up from 1/500 of the matrix's norm.

    Returns:
        [p, m, n] in the dtype of the matrices.
    """
    tall = matrices.shape[-2] > matrices.shape[-1]
    x = at_norm(matrices.clone(memory_format=torch.contiguous_format), per_block=True)
    half = x.dtype == torch.float32 and bfloat16_is_faster(x.device.type)
    x = (x.mT if tall else x).to(torch.bfloat16 if half else x.dtype)
    a, b, c = COEFFICIENTS
    for _ in range(iterations):
        square = torch.bmm(x, x.mT)
        polynomial = torch.baddbmm(square, square, square, beta=b, alpha=c)
        x = torch.baddbmm(x, polynomial, x, beta=a)
    return (x.mT if tall else x).to(matrices.dtype)
