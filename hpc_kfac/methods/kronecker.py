"""What K-FAC and EKFAC share: two factors, their structures, statistics and eigenbases."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from hpc_kfac.damping import Damping
from hpc_kfac.linalg.spatial import SpatiallyUncorrelated
from hpc_kfac.linalg.structure import Blocks, Dense, Diagonal, Identity, Structure
from hpc_kfac.linalg.workspace import Workspace
from hpc_kfac.methods.method import Method, State, StateSpec

if TYPE_CHECKING:
    from hpc_kfac.layers.batch import LayerBatch, LayerShape

StructureName = Literal["dense", "block", "diagonal", "identity"]

# Flops of a layer's two products from which a 16-bit application dtype pays (measured: even at 6e6, half at 2e7).
LARGE_PRODUCT = 1e7

# Flops in units of n^3: a symmetric eigendecomposition with vectors, a Cholesky inverse, Q f(L) Q^T.
EIGH, INVERSE, COMPOSE = 9.0, 1.0, 2.0


@dataclass(frozen=True, kw_only=True)
class Kronecker(Method):
    """A method on the factors A and G; the settings are those of `KFAC`."""

    damping: float | Damping | None = None
    decay: float = 0.95
    input_structure: StructureName = "dense"
    output_structure: StructureName = "dense"
    block_size: int | None = None
    spatially_uncorrelated: bool = False
    diagonal_above: int | None = None
    relative_damping: bool | None = None

    def __post_init__(self) -> None:
        self._default_damping()
        self._check()
        for name in ("input_structure", "output_structure"):
            if getattr(self, name) not in ("dense", "block", "diagonal", "identity"):
                raise ValueError(f"{name} is {getattr(self, name)!r}; choose dense, block, diagonal or identity")
        if ("block" in (self.input_structure, self.output_structure)) != (self.block_size is not None):
            raise ValueError(f"block_size is {self.block_size}; give it with a structure 'block', and only then")
        for name in ("block_size", "diagonal_above"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} is {value}; give at least 1")

    def structures(self, shape: LayerShape) -> tuple[Structure, Structure]:
        """Structures of A and G: the wanted ones, bounded by what makes sense for the layer."""
        spatial = self.spatially_uncorrelated and self.input_structure == "dense" and shape.kernel > 1
        if spatial and isinstance(shape.input_structure, Dense):
            channels = (shape.inputs - shape.bias) // shape.kernel
            if self.diagonal_above is None or channels <= self.diagonal_above:
                return SpatiallyUncorrelated(shape.kernel, shape.bias), self._output(shape)
        return self._bounded(self.input_structure, shape.input_structure, shape.inputs), self._output(shape)

    def _output(self, shape: LayerShape) -> Structure:
        return self._bounded(self.output_structure, shape.output_structure, shape.outputs)

    def _bounded(self, wanted: StructureName, bound: Structure, d: int) -> Structure:
        if wanted == "identity" or isinstance(bound, Identity):
            return Identity()
        too_large = self.diagonal_above is not None and d > self.diagonal_above
        if wanted == "diagonal" or too_large or isinstance(bound, Diagonal):
            return Diagonal()
        if wanted == "block" and self.block_size is not None and self.block_size < d:
            return Blocks(self.block_size)
        return bound

    def sides(self, shape: LayerShape) -> list[tuple[str, Structure, int]]:
        """Factors that hold numbers, as (name, structure, size)."""
        a_structure, g_structure = self.structures(shape)
        both = [("A", a_structure, shape.inputs), ("G", g_structure, shape.outputs)]
        return [side for side in both if not isinstance(side[1], Identity)]

    def factor_specs(self, shape: LayerShape) -> list[StateSpec]:
        return [
            StateSpec(
                name,
                structure.shape(shape.blocks, d),
                "running",
                reduce="mean",
                lives="all",
                symmetric=structure.symmetric,
            )
            for name, structure, d in self.sides(shape)
        ]

    def basis_specs(self, shape: LayerShape, lives: Literal["all", "workers"]) -> list[StateSpec]:
        bases = [(name, structure.basis_shape(shape.blocks, d)) for name, structure, d in self.sides(shape)]
        return [
            StateSpec(
                f"{name}_basis",
                basis,
                "solved",
                lives=lives,
                operand=self.is_large(shape),
                part=self.part_of(name),
            )
            for name, basis in bases
            if basis is not None
        ]

    def side_specs(self, shape: LayerShape, kind: str) -> list[StateSpec]:
        """A solved matrix for each side, with the structure of its factor; a part of its own."""
        return [
            StateSpec(
                f"{name}_{kind}",
                structure.inverse_shape(shape.blocks, d),
                "solved",
                symmetric=structure.symmetric,
                operand=self.is_large(shape),
                part=name,
            )
            for name, structure, d in self.sides(shape)
        ]

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

    def part_of(self, side: str) -> str:
        """The part of a refresh that makes what is solved of a side."""
        return ""

    def decompose(self, state: State, shape: LayerShape, part: str | None = None) -> State:
        """Eigenvalues and bases by name; no basis where the factor is diagonal already."""
        result, factors = {}, self.factors(state, shape)
        for name, structure, d in self.sides(shape):
            if part is not None and part != self.part_of(name):
                continue
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
        a_basis, g_basis = self.bases(state, shape)
        rotated = work.cast("rotated", self.two_sided(matrix, _transposed(g_basis), a_basis, shape, work), matrix.dtype)
        divided = torch.div(rotated, values, out=work.like("divided", matrix))
        return work.cast("update", self.two_sided(divided, g_basis, _transposed(a_basis), shape, work), matrix.dtype)

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

    def to_basis(self, matrix: Tensor, state: State, shape: LayerShape) -> Tensor:
        """Q_G^T matrix Q_A, in the dtype of the matrix."""
        a_basis, g_basis = self.bases(state, shape)
        return self.two_sided(matrix, _transposed(g_basis), a_basis, shape, Workspace()).to(matrix.dtype)

    def is_large(self, shape: LayerShape) -> bool:
        """Whether a 16-bit application dtype pays; small products take less time than the conversions."""
        return self.product_flops(shape, rotations_only=False) >= LARGE_PRODUCT

    def statistics_flops(self, shape: LayerShape) -> float:
        return 2.0 * shape.blocks * sum(structure.product_size(d) for _, structure, d in self.sides(shape))

    def solve_flops(self, shape: LayerShape, factor: float, part: str | None = None) -> float:
        sides = [side for side in self.sides(shape) if part is None or part == self.part_of(side[0])]
        return factor * shape.blocks * sum(structure.solve_size(d) for _, structure, d in sides)

    def product_flops(self, shape: LayerShape, rotations_only: bool) -> float:
        """One product with each side: 2 a o (a + o) where both are dense."""
        columns = {"A": shape.outputs, "G": shape.inputs}
        return sum(
            2.0 * shape.blocks * columns[name] * structure.product_size(d)
            for name, structure, d in self.sides(shape)
            if not rotations_only or structure.basis_shape(shape.blocks, d) is not None
        )


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
