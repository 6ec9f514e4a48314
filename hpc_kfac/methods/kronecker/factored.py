"""Which factors a layer has: their structures, the state that they take, and what their products cost."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from hpc_kfac.linalg.spatial import SpatiallyUncorrelated
from hpc_kfac.linalg.structure import Blocks, Dense, Diagonal, Identity, Structure
from hpc_kfac.methods.method import Method, Over, StateSpec
from hpc_kfac.options.damping import Damping

if TYPE_CHECKING:
    from hpc_kfac.layers.batch import LayerShape

StructureName = Literal["dense", "block", "diagonal", "identity"]

# Flops of a layer's two products from which a 16-bit application dtype pays (measured: even at 6e6, half at 2e7).
LARGE_PRODUCT = 1e7

# Flops in units of n^3: a symmetric eigendecomposition with vectors, a Cholesky inverse, Q f(L) Q^T.
EIGH, INVERSE, COMPOSE = 9.0, 1.0, 2.0


@dataclass(frozen=True, kw_only=True)
class Factored(Method):
    """A method with a factor on each side of a gradient; the settings are those of `KFAC`."""

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
                over=self.over(name, shape),
            )
            for name, structure, d in self.sides(shape)
        ]

    def over(self, side: str, shape: LayerShape) -> Over:
        """What the factor of a side is a mean over."""
        return shape.input_over if side == "A" else shape.output_over

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

    def part_of(self, side: str) -> str:
        """The part of a refresh that makes what is solved of a side."""
        return ""

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
