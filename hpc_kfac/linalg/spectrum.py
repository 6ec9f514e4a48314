"""What the eigenvalues of a factor say."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from hpc_kfac.linalg.solve import is_finite

LARGEST = 2048
"""Larger matrices are left out where their eigenvalues are only looked at."""


def eigenvalues(matrix: Tensor) -> Tensor | None:
    """Those of symmetric blocks [..., d, d], ascending, [blocks, d] in float64.

    Returns:
        None for a matrix that is empty, not finite or larger than `LARGEST`, or whose decomposition does not converge.
    """
    size = matrix.shape[-1]
    if not 0 < size <= LARGEST or not is_finite(matrix):
        return None
    try:
        return torch.linalg.eigvalsh(matrix.reshape(-1, size, size).double())
    except torch.linalg.LinAlgError:
        return None


def figures(values: Tensor) -> dict[str, float]:
    """Condition, trace and effective rank of a block-diagonal matrix.

    The condition is the largest eigenvalue by the smallest, without damping; of several blocks the worst, and infinite
    if one is singular. The effective rank is the exponential of the entropy of the eigenvalues (Roy & Vetterli 2007):
    d if all d are equal, 1 if one is left.

    Args:
        values: eigenvalues [blocks, d], ascending.
    """
    smallest, largest = values[:, 0], values[:, -1]
    condition = torch.where(smallest > 0, largest / smallest, torch.inf).max().item()
    positive = values.clamp(min=0)
    total = positive.sum().item()
    share = positive[positive > 0] / total
    entropy = -(share * share.log()).sum().item() if total > 0 else -math.inf
    return {"condition": condition, "trace": values.sum().item(), "effective_rank": math.exp(entropy)}
