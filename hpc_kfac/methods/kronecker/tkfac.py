"""TKFAC and TEKFAC: Kronecker factors of paired statistics, whose product has the trace of the Fisher matrix.

F is replaced by delta * kron(Psi, Phi) with delta = E[|x|^2 |g|^2], Phi = E[|g|^2 x x^T] / delta and
Psi = E[|x|^2 g g^T] / delta, both of trace 1 (Gao et al. 2020, 2021). Kept are the averages of the numerators, of which
each has the trace delta. Positions count as samples.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from hpc_kfac.linalg.structure import Structure
from hpc_kfac.methods.kronecker.ekfac import EKFAC
from hpc_kfac.methods.kronecker.kfac import KFAC
from hpc_kfac.methods.kronecker.kronecker import Kronecker, mean_or_one
from hpc_kfac.methods.method import Over, State

if TYPE_CHECKING:
    from hpc_kfac.layers.batch import LayerBatch, LayerShape


@dataclass(frozen=True, kw_only=True)
class Paired(Kronecker):
    """Factors weighted by the other side; where a side is the identity, plain ones."""

    def moments(self, batch: LayerBatch, shape: LayerShape) -> State:
        if len(self.sides(shape)) < 2:
            return super().moments(batch, shape)
        a_structure, g_structure = self.structures(shape)
        a, g = batch.paired_moments(None, None, g_structure, a_structure)
        return {"A": a, "G": g}

    def over(self, side: str, shape: LayerShape) -> Over:
        return super().over(side, shape) if len(self.sides(shape)) < 2 else "terms"

    def factors(self, state: State, shape: LayerShape) -> State:
        """sqrt(delta) Phi and sqrt(delta) Psi, of one trace."""
        if len(self.sides(shape)) < 2:
            return super().factors(state, shape)
        roots = {name: _root_of_trace(state[name], structure, d) for name, structure, d in self.sides(shape)}
        return {name: state[name] / root for name, root in roots.items()}


@dataclass(frozen=True, kw_only=True)
class TKFAC(Paired, KFAC):
    """TKFAC (Gao et al. 2020): K-FAC on factors whose product keeps the trace of the layer's Fisher block.

    With the cholesky solver U = (sqrt(delta) Psi + sqrt(damping) I)^-1 D (sqrt(delta) Phi + sqrt(damping) I)^-1.
    The settings are those of `KFAC`.
    """

    name: ClassVar[str] = "tkfac"

    def split_damping(self, factors: State, shape: LayerShape, damping: float) -> dict[str, Tensor | float]:
        sides = self.sides(shape)
        if len(sides) < 2 or self.power == 0.5:
            return super().split_damping(factors, shape, damping)
        if not self.relative_damping:
            return dict.fromkeys(("A", "G"), damping**0.5)
        means = [mean_or_one(structure.trace(factors[name], d) / d) for name, structure, d in sides]
        return dict.fromkeys(("A", "G"), (damping * means[0] * means[1]).sqrt())


@dataclass(frozen=True, kw_only=True)
class TEKFAC(Paired, EKFAC):
    """TEKFAC (Gao et al. 2021): EKFAC's measured second moments in the eigenbases of TKFAC's factors.

    The settings are those of `EKFAC`.
    """

    name: ClassVar[str] = "tekfac"


def _root_of_trace(factor: Tensor, structure: Structure, d: int) -> Tensor:
    """sqrt(delta) of each block, broadcasting; 1 where there is nothing to divide."""
    root = structure.trace(factor, d).sqrt()
    return torch.where(root > 0, root, torch.ones_like(root)).view(-1, *[1] * (factor.dim() - 1))
