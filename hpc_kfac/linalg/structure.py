"""Structures of a symmetric matrix: how its numbers are kept, applied, inverted and decomposed.

A layer has p independent blocks, and so every tensor here has a leading axis p. A structure is only a description; the
numbers are one plain tensor, which makes averaging, sending and saving the same for all structures.

Rotations take a basis Q from `eigh` and accept None, the basis of a matrix that is diagonal already. Products run in
the dtype of the structure's tensor and return the dtype of the matrix: a bfloat16 tensor gives bfloat16 products.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from hpc_kfac.linalg.solve import damped_inverse, positive_eigh, require_finite, spectral
from hpc_kfac.linalg.symmetric import gram
from hpc_kfac.linalg.workspace import Workspace, scratch


class Structure(ABC):
    """A symmetric d x d matrix S, batched over p. `tensor` below is what `shape` describes."""

    @property
    def symmetric(self) -> bool:
        """Whether the last two axes form symmetric matrices, which may be sent as packed triangles."""
        return True

    @abstractmethod
    def shape(self, p: int, d: int) -> tuple[int, ...]:
        """Shape of the tensor that holds p matrices of size d."""

    def inverse_shape(self, p: int, d: int) -> tuple[int, ...]:
        """Shape of what `inverse` and `inverse_root` return; it differs only where a bias adds an entry."""
        return self.shape(p, d)

    @abstractmethod
    def basis_shape(self, p: int, d: int) -> tuple[int, ...] | None:
        """Shape of the basis that `eigh` returns, None where that basis is None."""

    @abstractmethod
    def gram(self, rows: Tensor) -> Tensor:
        """Sum of r r^T over the rows [p, n, d], restricted to this structure; dense ones of 16-bit rows in float32."""

    @abstractmethod
    def from_dense(self, matrix: Tensor) -> Tensor:
        """The part of a matrix [p, d, d] that this structure can hold (its nearest one in Frobenius norm)."""

    @abstractmethod
    def to_dense(self, tensor: Tensor, d: int) -> Tensor:
        """The full matrix [p, d, d]."""

    @abstractmethod
    def trace(self, tensor: Tensor, d: int) -> Tensor:
        """Trace of the full matrix, [p]."""

    @abstractmethod
    def inverse(self, tensor: Tensor, damping: Tensor | float) -> Tensor:
        """(S + damping I)^-1, of shape `inverse_shape`; damping is a number or [p].

        Raises:
            torch.linalg.LinAlgError: the damped matrix is not positive definite or not finite.
        """

    @abstractmethod
    def inverse_root(self, tensor: Tensor, damping: Tensor | float, root: int = 2) -> Tensor:
        """(S + damping I)^(-1/root), as `inverse`."""

    @abstractmethod
    def eigh(self, tensor: Tensor, d: int) -> tuple[Tensor, Tensor | None]:
        """Eigenvalues [p, d], negative ones set to 0, and the basis Q with S = Q diag(values) Q^T.

        Raises:
            torch.linalg.LinAlgError: the matrix is not finite or the decomposition does not converge.
        """

    @abstractmethod
    def left(self, operator: Tensor, matrix: Tensor, work: Workspace | None = None) -> Tensor:
        """operator @ matrix [p, d, n]; the operator has this structure but need not be symmetric. Both have one dtype.

        With a workspace the result lies there, valid until the next `left`.
        """

    @abstractmethod
    def right(self, matrix: Tensor, operator: Tensor, work: Workspace | None = None) -> Tensor:
        """matrix [p, n, d] @ operator, as `left`."""

    def rotate_right(self, matrix: Tensor, basis: Tensor | None) -> Tensor:
        """matrix @ Q, matrix [p, n, d]."""
        return matrix if basis is None else self.right(matrix.to(basis.dtype), basis).to(matrix.dtype)

    def unrotate_left(self, matrix: Tensor, basis: Tensor | None) -> Tensor:
        """Q @ matrix, matrix [p, d, n]."""
        return matrix if basis is None else self.left(basis, matrix.to(basis.dtype)).to(matrix.dtype)

    def unrotate_right(self, matrix: Tensor, basis: Tensor | None) -> Tensor:
        """matrix @ Q^T, matrix [p, n, d]."""
        return matrix if basis is None else self.right(matrix.to(basis.dtype), basis.mT).to(matrix.dtype)

    @abstractmethod
    def product_size(self, d: int) -> int:
        """Multiplications of one product with a vector; also those of one row in `gram`."""

    @abstractmethod
    def solve_size(self, d: int) -> int:
        """Sum of n^3 over the n x n matrices that are decomposed (n for a diagonal of n)."""


@dataclass(frozen=True)
class Dense(Structure):
    """All entries: [p, d, d]."""

    def shape(self, p: int, d: int) -> tuple[int, ...]:
        return (p, d, d)

    def basis_shape(self, p: int, d: int) -> tuple[int, ...] | None:
        return (p, d, d)

    def gram(self, rows: Tensor) -> Tensor:
        return gram(rows)

    def from_dense(self, matrix: Tensor) -> Tensor:
        return matrix.clone()

    def to_dense(self, tensor: Tensor, d: int) -> Tensor:
        return tensor.clone()

    def trace(self, tensor: Tensor, d: int) -> Tensor:
        return tensor.diagonal(dim1=-2, dim2=-1).sum(-1)

    def inverse(self, tensor: Tensor, damping: Tensor | float) -> Tensor:
        return damped_inverse(tensor, damping)

    def inverse_root(self, tensor: Tensor, damping: Tensor | float, root: int = 2) -> Tensor:
        values, basis = positive_eigh(tensor)
        return spectral(damped_root(values, damping, root), basis)

    def eigh(self, tensor: Tensor, d: int) -> tuple[Tensor, Tensor | None]:
        return positive_eigh(tensor)

    def left(self, operator: Tensor, matrix: Tensor, work: Workspace | None = None) -> Tensor:
        return torch.bmm(operator, matrix, out=scratch(work, "left", matrix))

    def right(self, matrix: Tensor, operator: Tensor, work: Workspace | None = None) -> Tensor:
        return torch.bmm(matrix, operator, out=scratch(work, "right", matrix))

    def product_size(self, d: int) -> int:
        return d * d

    def solve_size(self, d: int) -> int:
        return d**3


@dataclass(frozen=True)
class Blocks(Structure):
    """Diagonal blocks of one size: [p, ceil(d / size), size, size], the last one padded with zeros.

    The padding of an inverse is meaningless; it only ever meets zeros.

    Args:
        size: rows of a block.
    """

    size: int

    def __post_init__(self) -> None:
        if self.size < 1:
            raise ValueError(f"block size is {self.size}; give at least 1")

    def _count(self, d: int) -> int:
        return -(-d // self.size)

    def shape(self, p: int, d: int) -> tuple[int, ...]:
        return (p, self._count(d), self.size, self.size)

    def basis_shape(self, p: int, d: int) -> tuple[int, ...] | None:
        return self.shape(p, d)

    def _split(self, matrix: Tensor) -> Tensor:
        """[p, d, n] -> [p, blocks, size, n]."""
        p, d, n = matrix.shape
        count = self._count(d)
        return F.pad(matrix, (0, 0, 0, count * self.size - d)).reshape(p, count, self.size, n)

    def gram(self, rows: Tensor) -> Tensor:
        columns = self._split(rows.mT)
        return columns @ columns.mT

    def from_dense(self, matrix: Tensor) -> Tensor:
        p, d, _ = matrix.shape
        count = self._count(d)
        padding = count * self.size - d
        padded = F.pad(matrix, (0, padding, 0, padding)).reshape(p, count, self.size, count, self.size)
        return padded.diagonal(dim1=1, dim2=3).permute(0, 3, 1, 2).contiguous()

    def to_dense(self, tensor: Tensor, d: int) -> Tensor:
        p, count = tensor.shape[:2]
        full = tensor.new_zeros(p, count, self.size, count, self.size)
        full.diagonal(dim1=1, dim2=3).copy_(tensor.permute(0, 2, 3, 1))
        size = count * self.size
        return full.reshape(p, size, size)[:, :d, :d].contiguous()

    def trace(self, tensor: Tensor, d: int) -> Tensor:
        return tensor.diagonal(dim1=-2, dim2=-1).sum((-2, -1))

    def inverse(self, tensor: Tensor, damping: Tensor | float) -> Tensor:
        return damped_inverse(tensor, damping)

    def inverse_root(self, tensor: Tensor, damping: Tensor | float, root: int = 2) -> Tensor:
        values, basis = positive_eigh(tensor)
        return spectral(damped_root(values, damping, root), basis)

    def eigh(self, tensor: Tensor, d: int) -> tuple[Tensor, Tensor | None]:
        # The last block is decomposed without its padding: eigh would mix padding into the basis of zero eigenvalues.
        p, count = tensor.shape[:2]
        rest = d - (count - 1) * self.size
        values = tensor.new_zeros(p, d)
        basis = torch.zeros_like(tensor)
        if count > 1:
            full_values, basis[:, :-1] = positive_eigh(tensor[:, :-1])
            values[:, :-rest] = full_values.reshape(p, -1)
        values[:, -rest:], basis[:, -1, :rest, :rest] = positive_eigh(tensor[:, -1, :rest, :rest])
        return values, basis

    def left(self, operator: Tensor, matrix: Tensor, work: Workspace | None = None) -> Tensor:
        return self._multiply(operator, matrix, scratch(work, "left", matrix))

    def right(self, matrix: Tensor, operator: Tensor, work: Workspace | None = None) -> Tensor:
        out = scratch(work, "right", matrix)
        self._multiply(operator.mT, matrix.mT, out.mT)
        return out

    def _multiply(self, operator: Tensor, matrix: Tensor, out: Tensor) -> Tensor:
        """operator @ matrix [p, d, n] into out."""
        p, d, _ = matrix.shape
        whole, rest = divmod(d, self.size)
        if whole:
            # One batched product for each p or for each block, whichever are fewer.
            axis, split = int(p > whole), (whole, self.size)
            parts = (operator[:, :whole], *(x[:, : d - rest].unflatten(1, split) for x in (matrix, out)))
            for block, rows, product in zip(*(part.unbind(axis) for part in parts), strict=True):
                torch.bmm(block, rows, out=product)
        if rest:  # without the padding
            torch.bmm(operator[:, -1, :rest, :rest], matrix[:, -rest:], out=out[:, -rest:])
        return out

    def product_size(self, d: int) -> int:
        return self._count(d) * self.size**2

    def solve_size(self, d: int) -> int:
        return self._count(d) * self.size**3


@dataclass(frozen=True)
class Diagonal(Structure):
    """The diagonal only: [p, d]."""

    @property
    def symmetric(self) -> bool:
        return False

    def shape(self, p: int, d: int) -> tuple[int, ...]:
        return (p, d)

    def basis_shape(self, p: int, d: int) -> tuple[int, ...] | None:
        return None

    def gram(self, rows: Tensor) -> Tensor:
        return rows.square().sum(1)

    def from_dense(self, matrix: Tensor) -> Tensor:
        return matrix.diagonal(dim1=-2, dim2=-1).clone()

    def to_dense(self, tensor: Tensor, d: int) -> Tensor:
        return torch.diag_embed(tensor)

    def trace(self, tensor: Tensor, d: int) -> Tensor:
        return tensor.sum(-1)

    def _damped(self, tensor: Tensor, damping: Tensor | float) -> Tensor:
        damped = tensor + _column(damping)
        require_finite(damped, "diagonal factor")
        if bool((damped <= 0).any()):
            raise torch.linalg.LinAlgError("the damped diagonal factor has entries that are not positive")
        return damped

    def inverse(self, tensor: Tensor, damping: Tensor | float) -> Tensor:
        return self._damped(tensor, damping).reciprocal()

    def inverse_root(self, tensor: Tensor, damping: Tensor | float, root: int = 2) -> Tensor:
        return self._damped(tensor, damping).pow(-1.0 / root)

    def eigh(self, tensor: Tensor, d: int) -> tuple[Tensor, Tensor | None]:
        require_finite(tensor, "diagonal factor")
        return tensor.clamp_min(0), None

    def left(self, operator: Tensor, matrix: Tensor, work: Workspace | None = None) -> Tensor:
        return torch.mul(operator[:, :, None], matrix, out=scratch(work, "left", matrix))

    def right(self, matrix: Tensor, operator: Tensor, work: Workspace | None = None) -> Tensor:
        return torch.mul(matrix, operator[:, None, :], out=scratch(work, "right", matrix))

    def product_size(self, d: int) -> int:
        return d

    def solve_size(self, d: int) -> int:
        return d


@dataclass(frozen=True)
class Identity(Structure):
    """The identity, which holds no numbers: [p, 0]. It cannot be damped; damping belongs to the other side."""

    @property
    def symmetric(self) -> bool:
        return False

    def shape(self, p: int, d: int) -> tuple[int, ...]:
        return (p, 0)

    def basis_shape(self, p: int, d: int) -> tuple[int, ...] | None:
        return None

    def gram(self, rows: Tensor) -> Tensor:
        return rows.new_zeros(rows.shape[0], 0)

    def from_dense(self, matrix: Tensor) -> Tensor:
        return matrix.new_zeros(matrix.shape[0], 0)

    def to_dense(self, tensor: Tensor, d: int) -> Tensor:
        return torch.eye(d, dtype=tensor.dtype, device=tensor.device).expand(tensor.shape[0], d, d).clone()

    def trace(self, tensor: Tensor, d: int) -> Tensor:
        return tensor.new_full((tensor.shape[0],), float(d))

    def inverse(self, tensor: Tensor, damping: Tensor | float) -> Tensor:
        raise ValueError("an identity factor cannot be damped; give all damping to the other factor")

    def inverse_root(self, tensor: Tensor, damping: Tensor | float, root: int = 2) -> Tensor:
        return self.inverse(tensor, damping)

    def eigh(self, tensor: Tensor, d: int) -> tuple[Tensor, Tensor | None]:
        return tensor.new_ones(tensor.shape[0], d), None

    def left(self, operator: Tensor, matrix: Tensor, work: Workspace | None = None) -> Tensor:
        return matrix

    def right(self, matrix: Tensor, operator: Tensor, work: Workspace | None = None) -> Tensor:
        return matrix

    def product_size(self, d: int) -> int:
        return 0

    def solve_size(self, d: int) -> int:
        return 0


def _column(damping: Tensor | float) -> Tensor | float:
    """A damping per block of shape [p] as a column that broadcasts over [p, d]."""
    return damping[:, None] if isinstance(damping, Tensor) and damping.ndim else damping


def damped_root(values: Tensor, damping: Tensor | float, root: int = 2) -> Tensor:
    """(values + damping)^(-1/root), values [p, ..., n], damping a number or [p].

    Raises:
        torch.linalg.LinAlgError: a damped value is not positive.
    """
    if isinstance(damping, Tensor) and damping.ndim:
        damping = damping.reshape(-1, *[1] * (values.ndim - 1))
    damped = values + damping
    if not bool((damped > 0).all()):
        raise torch.linalg.LinAlgError("a damped factor has eigenvalues that are not positive")
    return damped.pow(-1.0 / root)
