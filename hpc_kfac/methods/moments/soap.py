"""SOAP: Adam in the eigenbasis of Shampoo's factors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from hpc_kfac.linalg.workspace import Workspace
from hpc_kfac.methods.kronecker.ekfac import EKFAC
from hpc_kfac.methods.kronecker.tkfac import Paired
from hpc_kfac.methods.method import State, StateSpec
from hpc_kfac.methods.moments.gradient_moments import GradientMoments
from hpc_kfac.options.damping import Damping

if TYPE_CHECKING:
    from hpc_kfac.layers.batch import LayerShape


@dataclass(frozen=True, kw_only=True)
class SOAP(Paired, GradientMoments, EKFAC):
    """SOAP (Vyas et al. 2024): Adam in Shampoo's eigenbasis, U = Q_G [(Q_G^T D Q_A) / (sqrt(s) + damping)] Q_A^T.

    s is the running square of the rotated gradient. SOAP's momentum, which is kept unrotated, is that of a step control
    such as `FixedNorm`: it averages D before the curvature. When a refresh changes the bases, s follows as EKFAC's.

    Args:
        damping: added to sqrt(s), or a `Damping`.
        decay: weight of the old value in the running factors and in s.
        input_structure: "dense", "block", "diagonal", or "identity" for no rotation on the input side.
        output_structure: the same for the output side.
        block_size: rows of a block for "block".
        spatially_uncorrelated: has no meaning here.
        diagonal_above: a side with more rows than this is not rotated.
        relative_damping: damping is a share of the mean of sqrt(s).
        moments_of: has no meaning here.
        accumulate: factors are sums over steps, and decay is that of s only.

    Raises:
        ValueError: a setting out of range.
    """

    name: ClassVar[str] = "soap"
    damping: float | Damping | None = 1e-8
    relative_damping: bool | None = False

    def state(self, shape: LayerShape) -> tuple[StateSpec, ...]:
        size = (shape.blocks, shape.outputs, shape.inputs)
        moment = StateSpec("second_moment", size, "running", reduce_at="statistics", lives="workers", rebased=True)
        return (*self.factor_specs(shape), moment, *self.basis_specs(shape, lives="workers"))

    def fold_gradient(self, running: State, solved: State, gradient: Tensor, shape: LayerShape) -> None:
        super().fold_gradient(running, solved, gradient, shape)
        if "second_moment" in running:
            fresh = self.to_basis(gradient, {**running, **solved}, shape).square()
            self.fold(running, {"second_moment": fresh}, self.decay)

    def precondition(
        self, gradient: Tensor, state: State, shape: LayerShape, damping: float, work: Workspace | None = None
    ) -> Tensor:
        work = Workspace() if work is None else work
        moment = work.cast("moment", state["second_moment"], gradient.dtype)
        root = torch.sqrt(moment, out=work.like("damped", moment))
        scale = self.spread_damping(damping, [root], work)
        return self.divide_in_basis(gradient, root.add_(scale), state, shape, work)

    def damping_form(self, delta: Tensor, state: State, shape: LayerShape, damping: float) -> Tensor:
        return super().damping_form(delta, {"second_moment": state["second_moment"].sqrt()}, shape, damping)

    def quadratic(self, delta: Tensor, state: State, shape: LayerShape) -> Tensor:
        rotated = self.to_basis(delta, state, shape)
        return (state["second_moment"].to(delta.dtype).sqrt() * rotated.square()).sum()
