"""Batched dense solves that fail loudly: LinAlgError instead of NaN."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor

_FACTOR: ContextVar[str] = ContextVar("factor", default="a factor")
_REPEATED: ContextVar[list[str] | None] = ContextVar("repeated", default=None)


@contextmanager
def named_factor(name: str) -> Iterator[None]:
    """What is decomposed inside is the factor of this name, for `repetitions`."""
    token = _FACTOR.set(name)
    try:
        yield
    finally:
        _FACTOR.reset(token)


@contextmanager
def repetitions() -> Iterator[list[str]]:
    """Collects the names of factors whose eigendecomposition inside had to be repeated with more digits."""
    found: list[str] = []
    token = _REPEATED.set(found)
    try:
        yield found
    finally:
        _REPEATED.reset(token)


def multiply(left: Tensor, right: Tensor) -> Tensor:
    """left @ right for [p, m, k] and [p, k, n]. One block takes the plain product, faster than a batch of one."""
    if left.shape[0] == 1:
        return torch.mm(left[0], right[0])[None]
    return torch.bmm(left, right)


def damped_inverse(matrix: Tensor, damping: Tensor | float) -> Tensor:
    """(S + damping I)^-1 by Cholesky, on one copy.

    Args:
        matrix: symmetric [p, ..., n, n]; read only.
        damping: a number or [p].

    Raises:
        torch.linalg.LinAlgError: the damped matrix is not positive definite or not finite.
    """
    require_finite(matrix, "factor")
    work = matrix.clone(memory_format=torch.contiguous_format)
    diagonal = work.diagonal(dim1=-2, dim2=-1)
    if isinstance(damping, Tensor) and damping.ndim:
        damping = damping.reshape(-1, *[1] * (diagonal.ndim - 1))
    diagonal.add_(damping)
    # In place on the transposed view: LAPACK works on columns, and the matrix is symmetric, so nothing is copied.
    columns, info = work.mT, torch.empty(work.shape[:-2], dtype=torch.int32, device=work.device)
    torch.linalg.cholesky_ex(columns, out=(columns, info))
    if bool(info.any()):
        raise torch.linalg.LinAlgError("a damped factor is not positive definite")
    torch.cholesky_inverse(columns, out=columns)
    require_finite(work, "inverse of a damped factor")
    return work


def woodbury_inverse(kernel: Tensor, damping: Tensor | float) -> tuple[Tensor, Tensor]:
    """(K + damping I)^-1 and the damping [p], raised where it is too small for Woodbury's identity in this precision.

    In (I - V^T (K + damping I)^-1 V) / damping two nearly equal terms are subtracted: what remains in the direction of
    K's largest value k is off by (k / damping)^2 rounding errors, and could point anywhere. With a damping of
    2 sqrt(eps) tr K it is right within a quarter.

    Args:
        kernel: K, positive semi-definite [p, n, n].
        damping: wanted, a number or [p].

    Raises:
        torch.linalg.LinAlgError: as `damped_inverse`.
    """
    least = 2.0 * torch.finfo(kernel.dtype).eps ** 0.5
    raised = (kernel.diagonal(dim1=-2, dim2=-1).sum(-1) * least).clamp_(min=damping)
    return damped_inverse(kernel, raised), raised


def positive_eigh(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues, negative ones set to 0, and eigenvectors of symmetric [..., n, n].

    Raises:
        torch.linalg.LinAlgError: the matrix is not finite or the decomposition does not converge.
    """
    require_finite(matrix, "factor")
    values, basis = eigh(matrix)
    return values.clamp_min_(0), basis.contiguous()


def eigh(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues, ascending, and eigenvectors of finite symmetric [..., n, n], where `torch.linalg.eigh` fails too.

    LAPACK's divide and conquer gives up, or answers NaN, on matrices of nearly rank one whose other eigenvalues are
    rounding errors: one in four float32 moments of ReLUs with nearly constant inputs. All blocks are then decomposed
    in float64, moved by their mean eigenvalue, which takes the small ones away from 0: right but for rounding errors
    of the largest one, as any decomposition is.

    Raises:
        torch.linalg.LinAlgError: not even that converges.
    """
    try:
        values, basis = torch.linalg.eigh(matrix)
        if is_finite(values) and is_finite(basis):
            return values, basis
    except torch.linalg.LinAlgError:
        pass
    repeated = _REPEATED.get()
    if repeated is not None:
        repeated.append(_FACTOR.get())
    moved = matrix.double()
    shift = moved.diagonal(dim1=-2, dim2=-1).mean(-1, keepdim=True)
    moved = moved + torch.diag_embed(shift.expand(moved.shape[:-1]))
    values, basis = torch.linalg.eigh(moved)
    require_finite(values, "eigenvalues of a factor")
    require_finite(basis, "eigenvectors of a factor")
    return (values - shift).to(matrix.dtype), basis.to(matrix.dtype)


def relative_eigh(matrix: Tensor, metric: Tensor, damping: Tensor | float) -> tuple[Tensor, Tensor]:
    """Values s and K with K^T (M + damping I) K = I and K^T S K = diag(s), for symmetric S, M [p, n, n].

    Args:
        matrix: S, of any signs.
        metric: M, positive semi-definite.
        damping: a number or [p].

    Raises:
        torch.linalg.LinAlgError: the damped metric is not positive definite, or something is not finite.
    """
    require_finite(matrix, "second factor")
    require_finite(metric, "factor")
    damped = metric.clone()
    shift = damping.reshape(-1, 1) if isinstance(damping, Tensor) and damping.ndim else damping
    damped.diagonal(dim1=-2, dim2=-1).add_(shift)
    root = torch.linalg.cholesky(damped)
    left = torch.linalg.solve_triangular(root, matrix, upper=False)
    whitened = torch.linalg.solve_triangular(root, left.mT, upper=False)
    values, basis = eigh((whitened + whitened.mT).mul_(0.5))
    return values, torch.linalg.solve_triangular(root.mT, basis, upper=True).contiguous()


def spectral(values: Tensor, basis: Tensor) -> Tensor:
    """Q diag(values) Q^T, exactly symmetric; values [..., n], Q [..., n, n]."""
    product = (basis * values[..., None, :]) @ basis.mT
    return (product + product.mT).mul_(0.5)


def is_finite(tensor: Tensor) -> bool:
    """Whether the tensor holds neither inf nor NaN.

    A finite sum says so in one reading; `torch.isfinite(...).all()` takes 46 times as long for 289 x 289 on a CPU.
    """
    return math.isfinite(tensor.sum().item()) or bool(torch.isfinite(tensor).all())


def require_finite(tensor: Tensor, name: str) -> None:
    """Raises torch.linalg.LinAlgError if the tensor holds inf or NaN."""
    if not is_finite(tensor):
        raise torch.linalg.LinAlgError(f"{name}: values are not finite")
