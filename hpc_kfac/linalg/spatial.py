"""The structure of a convolution's input factor whose channels are correlated and whose kernel positions are not."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from hpc_kfac.linalg.solve import damped_inverse, positive_eigh, spectral
from hpc_kfac.linalg.structure import Structure, damped_root
from hpc_kfac.linalg.symmetric import gram
from hpc_kfac.linalg.workspace import Workspace, scratch


@dataclass(frozen=True)
class SpatiallyUncorrelated(Structure):
    """kron(M, I_kernel), and 1 for the bias: channels are correlated, kernel positions are not (Grosse & Martens 2016).

    The tensor is M, [p, C, C], with d = C * kernel + bias in torch's order [C, kernel positions]. The bias entry is
    always 1 (its input is), so it is kept only where an inverse changes it: inverses are [p, C + bias, C + bias].

    Args:
        kernel: kernel positions of the convolution.
        bias: whether the last column stands for the bias.
    """

    kernel: int
    bias: bool

    def _channels(self, d: int) -> int:
        if (d - self.bias) % self.kernel:
            raise ValueError(f"{d} inputs are not channels x {self.kernel} kernel positions with bias={self.bias}")
        return (d - self.bias) // self.kernel

    def shape(self, p: int, d: int) -> tuple[int, ...]:
        return (p, self._channels(d), self._channels(d))

    def inverse_shape(self, p: int, d: int) -> tuple[int, ...]:
        size = self._channels(d) + self.bias
        return (p, size, size)

    def basis_shape(self, p: int, d: int) -> tuple[int, ...] | None:
        return self.shape(p, d)

    def gram(self, rows: Tensor) -> Tensor:
        p, n, d = rows.shape
        channels = self._channels(d)
        split = rows[..., : channels * self.kernel].reshape(p, n, channels, self.kernel)
        columns = split.transpose(1, 2).reshape(p, channels, n * self.kernel)
        return gram(columns.mT) / self.kernel

    def from_dense(self, matrix: Tensor) -> Tensor:
        p, d, _ = matrix.shape
        channels = self._channels(d)
        spatial = channels * self.kernel
        split = matrix[:, :spatial, :spatial].reshape(p, channels, self.kernel, channels, self.kernel)
        return split.diagonal(dim1=2, dim2=4).mean(-1)

    def _with_bias(self, tensor: Tensor) -> Tensor:
        if not self.bias:
            return tensor
        full = F.pad(tensor, (0, 1, 0, 1))
        full[:, -1, -1] = 1
        return full

    def to_dense(self, tensor: Tensor, d: int) -> Tensor:
        channels = self._channels(d)
        eye = torch.eye(self.kernel, dtype=tensor.dtype, device=tensor.device)
        spatial = torch.einsum("pij,kl->pikjl", tensor[:, :channels, :channels], eye)
        full = tensor.new_zeros(tensor.shape[0], d, d)
        full[:, : d - self.bias, : d - self.bias] = spatial.reshape(-1, d - self.bias, d - self.bias)
        if self.bias:
            full[:, -1, -1] = tensor[:, -1, -1] if tensor.shape[-1] > channels else 1
        return full

    def trace(self, tensor: Tensor, d: int) -> Tensor:
        return self.kernel * tensor.diagonal(dim1=-2, dim2=-1).sum(-1) + self.bias

    def inverse(self, tensor: Tensor, damping: Tensor | float) -> Tensor:
        return damped_inverse(self._with_bias(tensor), damping)

    def inverse_root(self, tensor: Tensor, damping: Tensor | float, root: int = 2) -> Tensor:
        values, basis = positive_eigh(self._with_bias(tensor))
        return spectral(damped_root(values, damping, root), basis)

    def eigh(self, tensor: Tensor, d: int) -> tuple[Tensor, Tensor | None]:
        values, basis = positive_eigh(tensor)
        return F.pad(values.repeat_interleave(self.kernel, -1), (0, int(self.bias)), value=1.0), basis

    def left(self, operator: Tensor, matrix: Tensor, work: Workspace | None = None) -> Tensor:
        return self.right(matrix.mT, operator.mT, work).mT

    def right(self, matrix: Tensor, operator: Tensor, work: Workspace | None = None) -> Tensor:
        p, n, d = matrix.shape
        channels, spatial = self._channels(d), d - self.bias
        out = scratch(work, "right", matrix)
        before, after = (x[..., :spatial].unflatten(2, (channels, self.kernel)).transpose(1, 2) for x in (matrix, out))
        # Rows and kernel positions side by side, so that all channels are multiplied in one product.
        work = Workspace() if work is None else work
        columns = work.take("columns", (p, channels, n * self.kernel), matrix.dtype, matrix.device)
        product = work.take("columns product", (p, channels, n * self.kernel), matrix.dtype, matrix.device)
        columns.view(before.shape).copy_(before)
        torch.bmm(operator.mT[:, :channels, :channels], columns, out=product)
        after.copy_(product.view(before.shape))
        if self.bias:
            out[..., -1:].copy_(matrix[..., -1:])
            if operator.shape[-1] > channels:
                out[..., -1:].mul_(operator[:, -1:, -1:])
        return out

    def product_size(self, d: int) -> int:
        return self._channels(d) ** 2 * self.kernel

    def solve_size(self, d: int) -> int:
        return self._channels(d) ** 3
