"""EKFAC: K-FAC's eigenbasis with a measured diagonal (George et al. 2018)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from torch import Tensor

from hpc_kfac.linalg.workspace import Workspace
from hpc_kfac.methods.kronecker.factored import EIGH
from hpc_kfac.methods.kronecker.kronecker import Kronecker, eigenvalue_grid
from hpc_kfac.methods.method import Cost, State, StateSpec, Terms

if TYPE_CHECKING:
    from hpc_kfac.layers.batch import LayerBatch, LayerShape


@dataclass(frozen=True, kw_only=True)
class EKFAC(Kronecker):
    """EKFAC: U = Q_G [(Q_G^T D Q_A) / (s + damping)] Q_A^T with s = E[(Q_G^T g x^T Q_A)^2], elementwise.

    Before the first refresh there is no basis; the first s is K-FAC's product of eigenvalues. When a refresh changes
    the bases, s follows as (R_G * R_G) s (R_A * R_A)^T with R = Q_new^T Q_old, elementwise squares: the new diagonal of
    a curvature that was diagonal in the old basis.

    Args:
        damping: added to s, or a `Damping`; None for 0.1, by default of the mean.
        decay: weight of the old value in the running factors and in s.
        input_structure: "dense", "block", "diagonal", or "identity" for no rotation on the input side.
        output_structure: the same for the output side.
        block_size: rows of a block for "block".
        spatially_uncorrelated: convolutions rotate channels only.
        diagonal_above: a side with more rows than this is not rotated.
        relative_damping: damping is a share of the mean of s. None: only if damping is None.
        moments_of: "samples" measures s on every sample's gradient; "batch" takes N (Q_G^T D Q_A)^2 of the mean
            gradient D of N samples, the paper's running average, which projects no samples but is noisier.

    Raises:
        ValueError: a setting out of range.
    """

    name: ClassVar[str] = "ekfac"
    moments_of: Literal["samples", "batch"] = "samples"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.moments_of not in ("samples", "batch"):
            raise ValueError(f"moments_of is {self.moments_of!r}; choose samples or batch")

    def state(self, shape: LayerShape) -> tuple[StateSpec, ...]:
        second_moment = StateSpec(
            "second_moment",
            (shape.blocks, shape.outputs, shape.inputs),
            "running",
            reduce="mean",
            reduce_at="statistics",
            lives="all",
            rebased=True,
        )
        # Every rank projects its own samples, so every rank needs the bases.
        return (*self.factor_specs(shape), second_moment, *self.basis_specs(shape, lives="all"))

    def statistics(self, batch: LayerBatch, state: State, shape: LayerShape) -> State:
        return self.complete(self.collect(batch, state, shape), Terms.of(batch), state, shape)

    def collect(self, batch: LayerBatch, state: State, shape: LayerShape) -> State:
        fresh = super().statistics(batch, state, shape)
        if self.has_bases(state, shape):
            if self.moments_of == "batch":
                return {**fresh, "rotated": self.to_basis(batch.mean_gradient(), state, shape)}
            a_structure, g_structure = self.structures(shape)
            a_basis, g_basis = (_full_precision(basis) for basis in self.bases(state, shape))
            fresh["second_moment"] = batch.projected_square(g_basis, a_basis, g_structure, a_structure)
        return fresh

    def needs_output_means(self, shape: LayerShape) -> bool:
        return self.moments_of == "batch"

    def complete(self, merged: State, terms: Terms, state: State, shape: LayerShape) -> State:
        fresh = super().complete(merged, terms, state, shape)
        if "rotated" in fresh:
            fresh["second_moment"] = fresh.pop("rotated").square_().mul_(terms.all)
        return fresh

    @property
    def refresh_damps(self) -> bool:
        return False

    def refresh(self, state: State, shape: LayerShape, damping: float, part: str | None = None) -> State:
        solved = self.decompose(state, shape)
        a_values, g_values = (solved.pop(f"{name}_values", None) for name in ("A", "G"))
        if self._is_measured(state, shape):
            return self.landed(solved, state, shape)
        moment = eigenvalue_grid(a_values, g_values).expand(shape.blocks, shape.outputs, shape.inputs)
        return {**solved, "second_moment": moment.contiguous()}

    def _is_measured(self, state: State, shape: LayerShape) -> bool:
        """Whether there is an s already, in bases."""
        return "second_moment" in state and self.has_bases(state, shape)

    def landed(self, result: State, state: State, shape: LayerShape) -> State:
        if not self._is_measured(state, shape):
            return result
        return {**result, "second_moment": self.rebase(state["second_moment"], state, result, shape).contiguous()}

    def precondition(
        self, gradient: Tensor, state: State, shape: LayerShape, damping: float, work: Workspace | None = None
    ) -> Tensor:
        work = Workspace() if work is None else work
        moment = work.cast("moment", state["second_moment"], gradient.dtype)
        scale = self.spread_damping(damping, [moment], work)
        damped = torch.add(moment, scale, out=work.like("damped", moment))
        return self.divide_in_basis(gradient, damped, state, shape, work)

    def quadratic(self, delta: Tensor, state: State, shape: LayerShape) -> Tensor:
        rotated = self.to_basis(delta, state, shape)
        return (state["second_moment"].to(delta.dtype) * rotated.square()).sum()

    def is_damped(self, shape: LayerShape) -> bool:
        return True

    def damping_form(self, delta: Tensor, state: State, shape: LayerShape, damping: float) -> Tensor:
        scale = self.spread_damping(damping, [state["second_moment"]], Workspace())
        return (scale.to(delta.dtype) * delta.square()).sum()

    def cost(self, shape: LayerShape) -> Cost:
        """Flops: K-FAC's eigen solver, 2 a o more a row, 2 a^3 + 2 o^3 + 2 a o (a + o) more a refresh to re-base s."""
        products = self.product_flops(shape, rotations_only=True)
        elementwise = 2.0 * shape.parameters
        return Cost(
            self.statistics_flops(shape) + elementwise,
            self.solve_flops(shape, EIGH + 2.0) + products,
            2 * products + elementwise,
        )


def _full_precision(basis: Tensor | None) -> Tensor | None:
    """A basis kept in a 16-bit application dtype as float32; others as they are."""
    return basis if basis is None or basis.element_size() >= 4 else basis.float()
