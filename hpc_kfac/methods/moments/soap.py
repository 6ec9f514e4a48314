"""SOAP: Adam in the eigenbasis of Shampoo's factors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from torch import Tensor

from hpc_kfac.linalg.workspace import Workspace
from hpc_kfac.methods.kronecker.factored import EIGH
from hpc_kfac.methods.method import Cost, State, StateSpec
from hpc_kfac.methods.moments.gradient_moments import GradientMoments
from hpc_kfac.options.step_control import FixedNorm
from hpc_kfac.options.wants import Wants

if TYPE_CHECKING:
    from hpc_kfac.layers.batch import LayerShape

OF_GRADIENT, OF_BASES = 64.0, 4.0
"""Least damping in rounding errors of the largest sqrt(s): of sums over a batch, and of the bases' dtype."""


@dataclass(frozen=True, kw_only=True)
class SOAP(GradientMoments):
    """SOAP (Vyas et al. 2024): Adam in Shampoo's eigenbasis, U = Q_G [(Q_G^T D Q_A) / (sqrt(s) + damping)] Q_A^T.

    s is the running square of the rotated gradient, with Adam's correction of the bias: after t gradients their weights
    are decay^(t-1), ..., decay, 1 by their sum. (In the eigenbasis of the first gradient its square is diagonal; were
    it the start at full weight, entries beside the diagonal would be 1/sqrt(1 - decay) times too long in the second
    update.) Gradients from before the first refresh have no basis: of these the latest counts. SOAP's momentum, which
    is kept unrotated, is that of a step control such as `FixedNorm`: it averages D before the curvature. When a refresh
    changes the bases, s follows as EKFAC's.

    The damping is never below 64 rounding errors of the largest sqrt(s), 8e-6 of it in float32: where D is zero but for
    rounding, as along the sum over the outputs of a softmax, D / sqrt(s) would be noise of full length.

    Args:
        damping: added to sqrt(s), or a `Damping`; None for 0.1, by default of the mean.
        decay: weight of the old value in the running factors and in s.
        input_structure: "dense", "block", "diagonal", or "identity" for no rotation on the input side.
        output_structure: the same for the output side.
        block_size: rows of a block for "block".
        spatially_uncorrelated: has no meaning here.
        diagonal_above: a side with more rows than this is not rotated.
        relative_damping: damping is a share of the mean of sqrt(s). None: only if damping is None.
        moments_of: has no meaning here.
        accumulate: factors are sums over steps, and decay is that of s only.

    Raises:
        ValueError: a setting out of range.
    """

    name: ClassVar[str] = "soap"
    wants = Wants(
        statistics=1,
        refresh=10,
        step_control=FixedNorm(),
        why="Adam's moments of every gradient, bases every 10 steps (Vyas et al. 2024)",
    )
    moments_of: Literal["samples", "batch"] = "samples"

    def state(self, shape: LayerShape) -> tuple[StateSpec, ...]:
        size = (shape.blocks, shape.outputs, shape.inputs)
        return (
            *self.factor_specs(shape),
            StateSpec("second_moment", size, "running", reduce_at="statistics", rebased=True),
            StateSpec("moment_count", (1,), "running", reduce_at="statistics", needed=False),
            *self.basis_specs(shape, lives="workers"),
        )

    def fold_gradient(self, running: State, solved: State, gradient: Tensor, shape: LayerShape) -> None:
        super().fold_gradient(running, solved, gradient, shape)
        if not self.has_bases(solved, shape):
            running["second_moment"] = gradient.clone()  # a refresh makes its rotated square of it
            running["moment_count"] = gradient.new_ones(1)
            return
        square = self.to_basis(gradient, solved, shape).square()
        if "second_moment" not in running:
            running["second_moment"], running["moment_count"] = square, gradient.new_ones(1)
            return
        # How many gradients s is a mean of: 1 + decay + decay^2 + ...; older checkpoints do not tell, so at its limit.
        count = running.get("moment_count", gradient.new_full((1,), self._most))
        running["moment_count"] = count = count * self.decay + 1.0
        running["second_moment"].lerp_(square, count.reciprocal())

    def refresh(self, state: State, shape: LayerShape, damping: float, part: str | None = None) -> State:
        solved = self.decompose(state, shape)
        for name, _, _ in self.sides(shape):
            del solved[f"{name}_values"]
        return self.landed(solved, state, shape)

    def landed(self, result: State, state: State, shape: LayerShape) -> State:
        moment = state["second_moment"]
        if self.has_bases(state, shape):
            return {**result, "second_moment": self.rebase(moment, state, result, shape)}
        return {**result, "second_moment": self.to_basis(moment, result, shape).square()}

    def precondition(
        self, gradient: Tensor, state: State, shape: LayerShape, damping: float, work: Workspace | None = None
    ) -> Tensor:
        work = Workspace() if work is None else work
        rotated = self.to_basis(gradient, state, shape, work)
        divided = work.like("divided", gradient)
        root = self._root(rotated, state, shape, divided, work)
        root.add_(self._damping(damping, root, state, shape, work))
        return self.from_basis(torch.div(rotated, root, out=divided), state, shape, work)

    def _root(self, rotated: Tensor, state: State, shape: LayerShape, scratch: Tensor, work: Workspace) -> Tensor:
        """sqrt(s), and at least what it were with this gradient taken in, which it may not be: |rotated| / sqrt(n + 1).

        Adam's bound on an update, without which gradients between two statistics would be divided by the zeros that the
        first one leaves beside the diagonal of its own eigenbasis.
        """
        moment = work.cast("moment", state["second_moment"], rotated.dtype)
        root = torch.sqrt(moment, out=work.like("damped", moment))
        count = work.take("count", (1,), rotated.dtype, rotated.device)
        count.copy_(state["moment_count"]) if "moment_count" in state else count.fill_(self._most)
        count.add_(work.number("one", 1.0, count.dtype, count.device).view(1)).rsqrt_()
        return torch.maximum(root, torch.abs(rotated, out=scratch).mul_(count), out=root)

    def _damping(self, damping: float, root: Tensor, state: State, shape: LayerShape, work: Workspace) -> Tensor:
        """What is added to sqrt(s) of each block, [p, 1, 1]."""
        bases = [basis for basis in self.bases(state, shape) if basis is not None]
        errors = [OF_GRADIENT * torch.finfo(root.dtype).eps, *(OF_BASES * torch.finfo(q.dtype).eps for q in bases)]
        least = work.take("least", (shape.blocks, 1, 1), root.dtype, root.device)
        torch.amax(root, (1, 2), keepdim=True, out=least).mul_(
            work.number("error", max(errors), root.dtype, root.device)
        )
        return torch.maximum(least, self.spread_damping(damping, [root], work), out=least)

    @property
    def _most(self) -> float:
        """How many gradients s is a mean of after many steps."""
        return 1.0 / (1.0 - self.decay)

    def is_damped(self, shape: LayerShape) -> bool:
        return True

    def damping_form(self, delta: Tensor, state: State, shape: LayerShape, damping: float) -> Tensor:
        """As it is added to sqrt(s); where a gradient is larger than s counts, its bound comes on top."""
        scale = self._damping(damping, state["second_moment"].sqrt(), state, shape, Workspace())
        return (scale.to(delta.dtype) * delta.square()).sum()

    def quadratic(self, delta: Tensor, state: State, shape: LayerShape) -> Tensor:
        rotated = self.to_basis(delta, state, shape)
        return (state["second_moment"].to(delta.dtype).sqrt() * rotated.square()).sum()

    def cost(self, shape: LayerShape) -> Cost:
        """Flops: EKFAC's of a refresh and a gradient, and none for a row."""
        products = self.product_flops(shape, rotations_only=True)
        return Cost(0.0, self.solve_flops(shape, EIGH + 2.0) + products, 2 * products + 2.0 * shape.parameters)
