"""What is computed with the two factors: statistics, eigenbases, products."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from hpc_kfac.linalg.solve import named_factor
from hpc_kfac.linalg.structure import Identity
from hpc_kfac.linalg.workspace import Workspace
from hpc_kfac.methods.kronecker.factored import Factored
from hpc_kfac.methods.method import State

if TYPE_CHECKING:
    from hpc_kfac.layers.batch import LayerBatch, LayerShape


@dataclass(frozen=True, kw_only=True)
class Kronecker(Factored):
    """A method on the factors A and G; the settings are those of `KFAC`."""

    def statistics(self, batch: LayerBatch, state: State, shape: LayerShape) -> State:
        return self.moments(batch, shape)

    def moments(self, batch: LayerBatch, shape: LayerShape) -> State:
        """Fresh factors by name."""
        a_structure, g_structure = self.structures(shape)
        fresh = {}
        if not isinstance(a_structure, Identity):
            fresh["A"] = batch.input_moment(a_structure)
        if not isinstance(g_structure, Identity):
            fresh["G"] = batch.output_moment(g_structure)
        return fresh

    def gradient_moments(self, gradient: Tensor, shape: LayerShape) -> State:
        """D^T D and D D^T, in the structures of the factors and by their names."""
        a_structure, g_structure = self.structures(shape)
        rows = {"A": (a_structure, gradient), "G": (g_structure, gradient.mT)}
        return {name: rows[name][0].gram(rows[name][1].contiguous()) for name, _, _ in self.sides(shape)}

    def factors(self, state: State, shape: LayerShape) -> State:
        """The factors by name whose product stands for the curvature."""
        return {name: state[name] for name, _, _ in self.sides(shape)}

    def decompose(self, state: State, shape: LayerShape, part: str | None = None) -> State:
        """Eigenvalues and bases by name; no basis where the factor is diagonal already."""
        result, factors = {}, self.factors(state, shape)
        for name, structure, d in self.sides(shape):
            if part is not None and part != self.part_of(name):
                continue
            with named_factor(name):
                result[f"{name}_values"], basis = structure.eigh(factors[name], d)
            if basis is not None:
                result[f"{name}_basis"] = basis
        return result

    def bases(self, state: State, shape: LayerShape) -> tuple[Tensor | None, Tensor | None]:
        """Q_A and Q_G, None where the factor is diagonal already."""
        a_structure, g_structure = self.structures(shape)
        return (
            None if a_structure.basis_shape(1, shape.inputs) is None else state["A_basis"],
            None if g_structure.basis_shape(1, shape.outputs) is None else state["G_basis"],
        )

    def has_bases(self, state: State, shape: LayerShape) -> bool:
        """Whether there is a basis of each side that is not diagonal already."""
        sides = self.sides(shape)
        return all(f"{name}_basis" in state for name, structure, d in sides if structure.basis_shape(1, d) is not None)

    def rebase(self, moment: Tensor, old: State, new: State, shape: LayerShape) -> Tensor:
        """A curvature's diagonal s [p, o, a] in new bases, if it was diagonal in the old ones.

        (R_G o R_G) s (R_A o R_A)^T with R = Q_new^T Q_old of each side and the elementwise product o.
        """
        a_structure, g_structure = self.structures(shape)
        bases = zip(self.bases(old, shape), self.bases(new, shape), strict=True)
        a_change, g_change = (_squared_rotation(before, after) for before, after in bases)
        turned = g_structure.unrotate_left(moment.clone(), g_change)
        return a_structure.unrotate_right(turned, a_change)

    def two_sided(
        self, matrix: Tensor, left: Tensor | None, right: Tensor | None, shape: LayerShape, work: Workspace
    ) -> Tensor:
        """left @ matrix @ right, None for an identity, in the operands' dtype. In scratch, or the matrix itself."""
        a_structure, g_structure = self.structures(shape)
        if left is not None:
            matrix = g_structure.left(left, work.cast("operand", matrix, left.dtype), work)
        if right is not None:
            matrix = a_structure.right(work.cast("operand", matrix, right.dtype), right, work)
        return matrix

    def divide_in_basis(
        self, matrix: Tensor, values: Tensor, state: State, shape: LayerShape, work: Workspace
    ) -> Tensor:
        """Q_G [(Q_G^T matrix Q_A) / values] Q_A^T, in the dtype of the matrix and in scratch."""
        rotated = self.to_basis(matrix, state, shape, work)
        return self.from_basis(torch.div(rotated, values, out=work.like("divided", matrix)), state, shape, work)

    def spread_damping(self, damping: float, values: Sequence[Tensor], work: Workspace) -> Tensor:
        """The damping, or its share of the product of the mean values of each block, [p, m, n] -> [p or 1, 1, 1]."""
        first = values[0]
        scale = work.number("damping", damping, first.dtype, first.device)
        if not self.relative_damping:
            return scale
        shape = (first.shape[0], 1, 1)
        mean, zero = (work.take(name, shape, first.dtype, first.device) for name in ("mean", "zero"))
        spread = work.take("spread", shape, first.dtype, first.device).copy_(scale)
        for side in values:
            torch.sum(side, (1, 2), keepdim=True, out=mean)
            mean.div_(work.number("count", side[0].numel(), side.dtype, side.device))
            spread.mul_(mean.add_(torch.logical_not(mean, out=zero)))  # as `mean_or_one`
        return spread

    def to_basis(self, matrix: Tensor, state: State, shape: LayerShape, work: Workspace | None = None) -> Tensor:
        """Q_G^T matrix Q_A, in the dtype of the matrix; in scratch, or the matrix itself."""
        work = Workspace() if work is None else work
        a_basis, g_basis = self.bases(state, shape)
        return work.cast("rotated", self.two_sided(matrix, _transposed(g_basis), a_basis, shape, work), matrix.dtype)

    def from_basis(self, rotated: Tensor, state: State, shape: LayerShape, work: Workspace) -> Tensor:
        """Q_G rotated Q_A^T, as `to_basis`."""
        a_basis, g_basis = self.bases(state, shape)
        return work.cast("update", self.two_sided(rotated, g_basis, _transposed(a_basis), shape, work), rotated.dtype)


def eigenvalue_grid(a_values: Tensor | None, g_values: Tensor | None) -> Tensor:
    """Eigenvalues of kron(G, A), broadcasting to [p, o, a]; None is an identity, at most one of the two."""
    if a_values is not None and g_values is not None:
        return g_values[:, :, None] * a_values[:, None, :]
    if a_values is not None:
        return a_values[:, None, :]
    assert g_values is not None
    return g_values[:, :, None]


def mean_or_one(mean: Tensor) -> Tensor:
    """Mean eigenvalues that scale a damping; those of a zero factor count as 1, so that its damping stays positive."""
    return torch.where(mean > 0, mean, torch.ones_like(mean))


def _transposed(basis: Tensor | None) -> Tensor | None:
    return None if basis is None else basis.mT


def _squared_rotation(old: Tensor | None, new: Tensor | None) -> Tensor | None:
    """Elementwise square of Q_new^T Q_old; None where there is no basis."""
    if old is None or new is None:
        return None
    return (new.mT @ old.to(new.dtype)).square()
