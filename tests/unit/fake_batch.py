"""A LayerBatch made of explicit rows: every statistic by its definition, slow and obvious. An oracle, not a layer."""

from __future__ import annotations

import torch
from torch import Tensor

from hpc_kfac.layers.batch import LayerShape
from hpc_kfac.linalg.structure import Structure
from hpc_kfac.methods.method import Method


class FakeBatch:
    """x [p, N, T, a] and g [p, N, T, o]: N samples of T positions each, in p blocks; N loss terms."""

    ranks = 1

    def __init__(self, x: Tensor, g: Tensor) -> None:
        self.x, self.g = x, g
        self.count = float(x.shape[1])

    @property
    def input_rows(self) -> float:
        return float(self.x.shape[1] * self.x.shape[2])

    def available(self, positions: bool) -> int:
        return self.x.shape[1] * (self.x.shape[2] if positions else 1)

    def gradient(self) -> Tensor:
        """D = (1/N) sum of g x^T, [p, o, a]."""
        return torch.einsum("pnto,pnta->poa", self.g, self.x) / self.count

    def input_moment(self, structure: Structure) -> Tensor:
        dense = torch.einsum("pnta,pntb->pab", self.x, self.x)
        return structure.from_dense(dense / (self.x.shape[1] * self.x.shape[2]))

    def output_moment(self, structure: Structure) -> Tensor:
        return structure.from_dense(torch.einsum("pnto,pntq->poq", self.g, self.g) / self.count)

    def means(self) -> tuple[Tensor, Tensor]:
        return self.input_mean(), self.g.sum((1, 2)) / self.count

    def input_mean(self) -> Tensor:
        return self.x.mean((1, 2))

    def paired_moments(
        self,
        output_form: Tensor | None,
        input_form: Tensor | None,
        output_structure: Structure,
        input_structure: Structure,
    ) -> tuple[Tensor, Tensor]:
        def form(matrix: Tensor | None, structure: Structure, d: int) -> Tensor:
            blocks = torch.eye(d, dtype=self.x.dtype).expand(len(self.x), d, d)
            return blocks if matrix is None else structure.to_dense(matrix, d)

        by_g = torch.einsum("pnto,poq,pntq->pnt", self.g, form(output_form, output_structure, self.g.shape[-1]), self.g)
        by_x = torch.einsum("pnta,pab,pntb->pnt", self.x, form(input_form, input_structure, self.x.shape[-1]), self.x)
        a = torch.einsum("pnt,pnta,pntb->pab", by_g, self.x, self.x) / self.count
        g = torch.einsum("pnt,pnto,pntq->poq", by_x, self.g, self.g) / self.count
        return input_structure.from_dense(a), output_structure.from_dense(g)

    def mean_gradient(self) -> Tensor:
        return self.gradient()

    def position_rows(self, limit: int) -> tuple[Tensor, Tensor]:
        x, g = self.x.flatten(1, 2), self.g.flatten(1, 2)
        n = min(limit, x.shape[1])
        chosen = torch.arange(n) * x.shape[1] // n
        return x[:, chosen], g[:, chosen] * (x.shape[1] / self.count) ** 0.5

    def sample_gradients(self, limit: int = 1 << 30) -> Tensor:
        """Each sample's own gradient, [p, N, o, a]."""
        n = min(limit, self.x.shape[1])
        chosen = torch.arange(n) * self.x.shape[1] // n
        return torch.einsum("pnto,pnta->pnoa", self.g[:, chosen], self.x[:, chosen])

    def projected_square(
        self,
        output_basis: Tensor | None,
        input_basis: Tensor | None,
        output_structure: Structure,
        input_structure: Structure,
    ) -> Tensor:
        result = torch.zeros(self.gradient().shape, dtype=self.x.dtype)
        for n in range(self.x.shape[1]):
            rotated = output_structure.rotate_right(self.sample_gradients()[:, n].mT, output_basis).mT
            result += input_structure.rotate_right(rotated, input_basis).square()
        return result / self.count

    def rows(self, limit: int) -> tuple[Tensor, Tensor]:
        samples = self.x.shape[1]
        n = min(limit, samples)
        chosen = torch.arange(n) * samples // n
        return self.x.mean(2)[:, chosen], self.g.sum(2)[:, chosen]


def correlated_batch(p: int, samples: int, positions: int, o: int, a: int, seed: int = 0) -> FakeBatch:
    """float64 rows whose x and g depend on each other, so that a Kronecker product is only an approximation."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, dtype=torch.float64)

    x = normal(p, samples, positions, a) @ normal(p, 1, a, a)
    x[..., -1] = 1.0
    g = normal(p, samples, positions, o) @ normal(p, 1, o, o)
    g = g * x.square().mean(-1, keepdim=True).sqrt() + torch.tanh(x[..., :1])
    return FakeBatch(x, g)


def names(method: Method, shape: LayerShape, role: str) -> tuple[str, ...]:
    """Names of a layer's running or solved tensors."""
    return tuple(spec.name for spec in method.state(shape) if spec.role == role)
