"""Eva, Eva-f and Eva-s: rank-one curvature from mean vectors (Zhang, Shi & Li 2023)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from torch import Tensor

from hpc_kfac.linalg.solve import require_finite
from hpc_kfac.linalg.workspace import Workspace
from hpc_kfac.methods.method import Cost, Method, State, StateSpec
from hpc_kfac.options.damping import Damping
from hpc_kfac.options.wants import Wants

if TYPE_CHECKING:
    from hpc_kfac.layers.batch import LayerBatch, LayerShape


@dataclass(frozen=True, kw_only=True)
class Eva(Method):
    """Eva: F = v v^T with v = kron(g_mean, a_mean), solved exactly by Sherman-Morrison.

    U = [D - (g_mean^T D a_mean) / (damping + |a_mean|^2 |g_mean|^2) g_mean a_mean^T] / damping. It keeps a + o numbers
    a block and has nothing to decompose.

    Args:
        damping: added to the curvature, or a `Damping`.
        decay: weight of the old value in the running means.

    Raises:
        ValueError: a setting out of range.
    """

    name: ClassVar[str] = "eva"
    wants = Wants(statistics=1, refresh=1, why="means of every step; there is nothing to decompose (Zhang et al. 2023)")
    refreshed_by_all: ClassVar[bool] = True
    damping: float | Damping = 0.03
    decay: float = 0.95

    def __post_init__(self) -> None:
        self._check()

    def state(self, shape: LayerShape) -> tuple[StateSpec, ...]:
        # Reduced with every statistics step, because there is no refresh to wait for.
        sides = (("a_mean", shape.inputs, shape.input_over), ("g_mean", shape.outputs, shape.output_over))
        return tuple(
            StateSpec(name, (shape.blocks, d), "running", reduce="mean", reduce_at="statistics", lives="all", over=over)
            for name, d, over in sides
        )

    def statistics(self, batch: LayerBatch, state: State, shape: LayerShape) -> State:
        a_mean, g_mean = batch.means()
        return {"a_mean": a_mean, "g_mean": g_mean}

    @property
    def refresh_damps(self) -> bool:
        return False

    def refresh(self, state: State, shape: LayerShape, damping: float, part: str | None = None) -> State:
        for name in ("a_mean", "g_mean"):
            require_finite(state[name], name)
        return {}

    def precondition(
        self, gradient: Tensor, state: State, shape: LayerShape, damping: float, work: Workspace | None = None
    ) -> Tensor:
        work = Workspace() if work is None else work
        a, g = _vectors(state, gradient.dtype, work)
        one = (shape.blocks, 1, 1)
        curvature, other = (work.take(name, one, gradient.dtype, gradient.device) for name in ("curvature", "other"))
        torch.bmm(a.mT, a, out=curvature).mul_(torch.bmm(g.mT, g, out=other))
        curvature.add_(work.number("damping", damping, gradient.dtype, gradient.device))
        share = _product(gradient, a, g, work).div_(curvature)
        correction = torch.mul(g, share, out=work.like("correction", g))
        update = work.like("update", gradient)
        return torch.baddbmm(gradient, correction, a.mT, beta=1.0 / damping, alpha=-1.0 / damping, out=update)

    def is_damped(self, shape: LayerShape) -> bool:
        return True

    def damping_form(self, delta: Tensor, state: State, shape: LayerShape, damping: float) -> Tensor:
        return damping * delta.square().sum()

    def quadratic(self, delta: Tensor, state: State, shape: LayerShape) -> Tensor:
        work = Workspace()
        return _product(delta, *_vectors(state, delta.dtype, work), work).square().sum()

    def cost(self, shape: LayerShape) -> Cost:
        """Flops: a + o a row, 5 a o for one gradient, no refresh."""
        return Cost(float(shape.blocks * (shape.inputs + shape.outputs)), 0.0, 5.0 * shape.parameters)


@dataclass(frozen=True, kw_only=True)
class EvaF(Eva):
    """Eva-f: F = kron(I, a_mean a_mean^T), the rank-one form of FOOF; it needs no gradients of outputs.

    U = [D - (D a_mean) a_mean^T / (damping + |a_mean|^2)] / damping.

    Args:
        damping: added to the curvature, or a `Damping`.
        decay: weight of the old value in the running mean.

    Raises:
        ValueError: a setting out of range.
    """

    name: ClassVar[str] = "eva_f"

    def state(self, shape: LayerShape) -> tuple[StateSpec, ...]:
        return super().state(shape)[:1]

    def statistics(self, batch: LayerBatch, state: State, shape: LayerShape) -> State:
        return {"a_mean": batch.means()[0]}

    def refresh(self, state: State, shape: LayerShape, damping: float, part: str | None = None) -> State:
        require_finite(state["a_mean"], "a_mean")
        return {}

    def precondition(
        self, gradient: Tensor, state: State, shape: LayerShape, damping: float, work: Workspace | None = None
    ) -> Tensor:
        work = Workspace() if work is None else work
        a = work.cast("a_mean", state["a_mean"], gradient.dtype).unsqueeze(2)
        one = (shape.blocks, 1, 1)
        curvature = torch.bmm(a.mT, a, out=work.take("curvature", one, gradient.dtype, gradient.device))
        curvature.add_(work.number("damping", damping, gradient.dtype, gradient.device))
        size = (shape.blocks, shape.outputs, 1)
        column = torch.bmm(gradient, a, out=work.take("column", size, gradient.dtype, gradient.device)).div_(curvature)
        update = work.like("update", gradient)
        return torch.baddbmm(gradient, column, a.mT, beta=1.0 / damping, alpha=-1.0 / damping, out=update)

    def quadratic(self, delta: Tensor, state: State, shape: LayerShape) -> Tensor:
        return torch.bmm(delta, state["a_mean"].to(delta.dtype).unsqueeze(2)).square().sum()

    def cost(self, shape: LayerShape) -> Cost:
        """Flops: a a row, 4 a o for one gradient, no refresh."""
        return Cost(float(shape.blocks * shape.inputs), 0.0, 4.0 * shape.parameters)


@dataclass(frozen=True, kw_only=True)
class EvaS(Eva):
    """Eva-s: Shampoo with rank-one factors of the averaged gradient's means, U = S_G^-power D S_A^-power.

    S = v v^T + damping I with v_A the mean of D over its rows and v_G over its columns, and in closed form
    S^-p = damping^-p (I - v v^T / |v|^2) + (damping + |v|^2)^-p v v^T / |v|^2.

    Args:
        damping: added to each rank-one factor, or a `Damping`.
        decay: weight of the old value in the running means.
        power: of each factor; Shampoo's is 1/4.

    Raises:
        ValueError: a setting out of range.
    """

    name: ClassVar[str] = "eva_s"
    reads: ClassVar[Literal["samples", "gradients"]] = "gradients"
    power: float = 0.25

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.power > 0:
            raise ValueError(f"power is {self.power}; give a positive power, such as 0.25")

    def state(self, shape: LayerShape) -> tuple[StateSpec, ...]:
        sizes = (("a_mean", shape.inputs), ("g_mean", shape.outputs))
        return tuple(StateSpec(name, (shape.blocks, d), "running") for name, d in sizes)

    def fold_gradient(self, running: State, solved: State, gradient: Tensor, shape: LayerShape) -> None:
        self.fold(running, {"a_mean": gradient.mean(1), "g_mean": gradient.mean(2)}, self.decay)

    def precondition(
        self, gradient: Tensor, state: State, shape: LayerShape, damping: float, work: Workspace | None = None
    ) -> Tensor:
        work = Workspace() if work is None else work
        a, g = _vectors(state, gradient.dtype, work)
        scale = work.number("damping", damping ** (-2 * self.power), gradient.dtype, gradient.device)
        update = torch.mul(gradient, scale, out=work.like("update", gradient))
        shift = work.number("shift", damping, gradient.dtype, gradient.device)
        exponent = work.number("exponent", -self.power, gradient.dtype, gradient.device)
        size = (shape.blocks, 1, 1)
        for v, matrix, name in ((a, update, "column"), (g, update.mT, "row")):
            square = torch.bmm(v.mT, v, out=work.take("square", size, v.dtype, v.device))
            # Along v the power is (damping + |v|^2)^-p in place of damping^-p: a change relative to |v|^2.
            share = torch.div(square, shift, out=work.like("share", square)).log1p_().mul_(exponent).expm1_()
            share.div_(square).nan_to_num_(0.0, 0.0, 0.0)
            along = work.take(name, (shape.blocks, matrix.shape[1], 1), v.dtype, v.device)
            matrix.baddbmm_(torch.bmm(matrix, v, out=along).mul_(share), v.mT)
        return update

    def is_damped(self, shape: LayerShape) -> bool:
        return False

    def quadratic(self, delta: Tensor, state: State, shape: LayerShape) -> Tensor:
        """With kron(v_G v_G^T, v_A v_A^T)^power."""
        work = Workspace()
        a, g = _vectors(state, delta.dtype, work)
        length = a.norm(dim=1, keepdim=True) * g.norm(dim=1, keepdim=True)
        scale = torch.where(length > 0, length.pow(2 * self.power - 2), 0.0)
        return (_product(delta, a, g, work).square() * scale).sum()

    def cost(self, shape: LayerShape) -> Cost:
        """Flops: 9 a o for one gradient, nothing else."""
        return Cost(0.0, 0.0, 9.0 * shape.parameters)


def _vectors(state: State, dtype: torch.dtype, work: Workspace) -> tuple[Tensor, Tensor]:
    """The means as columns [p, a, 1] and [p, o, 1]."""
    a, g = (work.cast(name, state[name], dtype) for name in ("a_mean", "g_mean"))
    return a.unsqueeze(2), g.unsqueeze(2)


def _product(matrix: Tensor, a: Tensor, g: Tensor, work: Workspace) -> Tensor:
    """g^T matrix a for each block, [p, 1, 1], in scratch."""
    column = torch.bmm(matrix, a, out=work.like("column", g))
    return torch.bmm(g.mT, column, out=work.take("product", (g.shape[0], 1, 1), g.dtype, g.device))
