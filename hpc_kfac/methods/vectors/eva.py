"""Eva, Eva-f and Eva-s: rank-one curvature from mean vectors (Zhang, Shi & Li 2023)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from torch import Tensor

from hpc_kfac.linalg.scaling import size_of
from hpc_kfac.linalg.solve import require_finite
from hpc_kfac.linalg.workspace import Workspace
from hpc_kfac.methods.method import Cost, Method, State, StateSpec
from hpc_kfac.options.damping import Damping
from hpc_kfac.options.wants import Wants

if TYPE_CHECKING:
    from hpc_kfac.layers.batch import LayerBatch, LayerShape

ROUNDING = 64.0
"""Rounding errors that a sum over a batch may be off by."""


@dataclass(frozen=True, kw_only=True)
class Eva(Method):
    """Eva: F = v v^T with v = kron(g_mean, a_mean), solved exactly by Sherman-Morrison.

    U = [D - (g_mean^T D a_mean) / (damping + |a_mean|^2 |g_mean|^2) g_mean a_mean^T] / damping. It keeps a + o numbers
    a block and has nothing to decompose.

    Args:
        damping: added to the curvature, or a `Damping`; None for 0.1, by default of F's one eigenvalue.
        decay: weight of the old value in the running means.
        relative_damping: damping is a share of |a_mean|^2 |g_mean|^2. None: only if damping is None.

    Raises:
        ValueError: a setting out of range.
    """

    name: ClassVar[str] = "eva"
    wants = Wants(statistics=1, refresh=1, why="means of every step; there is nothing to decompose (Zhang et al. 2023)")
    refreshed_by_all: ClassVar[bool] = True
    damping: float | Damping | None = None
    decay: float = 0.95
    relative_damping: bool | None = None

    def __post_init__(self) -> None:
        self._default_damping()
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
        (a, g), curvature = self._rank_one(state, gradient.dtype, work)
        shift = self._shift(damping, curvature, work)
        along = _product(gradient, a, g, work).div_(_one_and(shift, curvature, work))
        update, correction = work.like("update", gradient), torch.mul(g, along, out=work.like("correction", g))
        return torch.baddbmm(gradient, correction, a.mT, alpha=-1.0, out=update).div_(shift)

    def _rank_one(self, state: State, dtype: torch.dtype, work: Workspace) -> tuple[list[Tensor], Tensor]:
        """The means at length 1, as columns, and the eigenvalue [p, 1, 1] of F that is not zero."""
        pairs = [_unit(v, name, work) for v, name in zip(_vectors(state, dtype, work), "ag", strict=True)]
        return [unit for unit, _ in pairs], pairs[0][1].mul_(pairs[1][1]).square_()

    def _shift(self, damping: float, curvature: Tensor, work: Workspace) -> Tensor:
        """The damping, [p or 1, 1, 1]: a number, or a share of the eigenvalue, which counts as 1 where it is zero."""
        scale = work.number("damping", damping, curvature.dtype, curvature.device)
        if not self.relative_damping:
            return scale
        return torch.logical_not(curvature, out=work.like("shift", curvature)).add_(curvature).mul_(scale)

    def is_damped(self, shape: LayerShape) -> bool:
        return True

    def damping_form(self, delta: Tensor, state: State, shape: LayerShape, damping: float) -> Tensor:
        work = Workspace()
        _, curvature = self._rank_one(state, delta.dtype, work)
        return (self._shift(damping, curvature, work) * delta.square()).sum()

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
        damping: added to the curvature, or a `Damping`; None for 0.1, by default of |a_mean|^2.
        decay: weight of the old value in the running mean.
        relative_damping: damping is a share of |a_mean|^2. None: only if damping is None.

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
        (a,), curvature = self._rank_one(state, gradient.dtype, work)
        shift = self._shift(damping, curvature, work)
        size = (shape.blocks, shape.outputs, 1)
        along = torch.bmm(gradient, a, out=work.take("column", size, gradient.dtype, gradient.device))
        along.div_(_one_and(shift, curvature, work))
        return torch.baddbmm(gradient, along, a.mT, alpha=-1.0, out=work.like("update", gradient)).div_(shift)

    def _rank_one(self, state: State, dtype: torch.dtype, work: Workspace) -> tuple[list[Tensor], Tensor]:
        unit, length = _unit(work.cast("a_mean", state["a_mean"], dtype).unsqueeze(2), "a", work)
        return [unit], length.square_()

    def quadratic(self, delta: Tensor, state: State, shape: LayerShape) -> Tensor:
        return torch.bmm(delta, state["a_mean"].to(delta.dtype).unsqueeze(2)).square().sum()

    def cost(self, shape: LayerShape) -> Cost:
        """Flops: a a row, 4 a o for one gradient, no refresh."""
        return Cost(float(shape.blocks * shape.inputs), 0.0, 4.0 * shape.parameters)


@dataclass(frozen=True, kw_only=True)
class EvaS(Eva):
    """Eva-s: Shampoo with rank-one factors of the averaged gradient's means, U = S_G^-power D S_A^-power.

    S = v v^T + damping I with v_A the mean of D over its rows and v_G over its columns, and in closed form
    S^-p = damping^-p (I - v v^T / |v|^2) + (damping + |v|^2)^-p v v^T / |v|^2. A relative damping is never below what
    rounding leaves of a v that is zero, as the mean over the outputs of a softmax is.

    Args:
        damping: added to each rank-one factor, or a `Damping`; None for 0.01, by default of |v|^2.
        decay: weight of the old value in the running means.
        relative_damping: damping is a share of |v|^2 of each factor. None: only if damping is None.
        power: of each factor; Shampoo's is 1/4.

    Raises:
        ValueError: a setting out of range.
    """

    name: ClassVar[str] = "eva_s"
    share: ClassVar[float] = 0.01
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
        vectors = _vectors(state, gradient.dtype, work)
        update = work.like("update", gradient).copy_(gradient)
        exponent = work.number("exponent", -self.power, gradient.dtype, gradient.device)
        for v, matrix, name in zip(vectors, (update, update.mT), "ag", strict=True):
            unit, length = _unit(v, name, work)
            least = ROUNDING * torch.finfo(state[f"{name}_mean"].dtype).eps / matrix.shape[1] ** 0.5
            shift = self._root(damping, length, gradient, least, work)
            # Along v the power is (shift^2 + |v|^2)^-p in place of shift^-2p.
            share = length.div_(shift).square_().log1p_().mul_(exponent).expm1_()
            along = work.take(f"along {name}", (shape.blocks, matrix.shape[1], 1), v.dtype, v.device)
            matrix.baddbmm_(torch.bmm(matrix, unit, out=along).mul_(share), unit.mT)
            update.mul_(torch.pow(shift.square_(), exponent, out=shift))
        return update

    def _root(self, damping: float, length: Tensor, gradient: Tensor, least: float, work: Workspace) -> Tensor:
        """The root of a factor's damping [p, 1, 1], at least this share of the gradient; 1 where all is zero."""
        root = work.number("root", damping**0.5, length.dtype, length.device)
        shift = work.like("shift", length)
        if not self.relative_damping:
            return shift.copy_(root.expand_as(shift))
        torch.linalg.vector_norm(gradient, dim=(1, 2), keepdim=True, out=shift)
        shift.mul_(work.number(f"error {least}", least, length.dtype, length.device))
        torch.maximum(shift, torch.mul(length, root, out=work.like("other", length)), out=shift)
        return shift.add_(torch.logical_not(shift, out=work.like("other", length)))

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


def _unit(v: Tensor, name: str, work: Workspace) -> tuple[Tensor, Tensor]:
    """v [p, d, 1] at length 1 in each block, zeros as they are, and its length [p, 1, 1], both in scratch."""
    one = (v.shape[0], 1, 1)
    size, least, length = (work.take(f"{use} of {name}", one, v.dtype, v.device) for use in ("size", "least", "length"))
    size_of(v, True, (size, least))  # squares of what is not scaled may overflow or vanish
    unit = torch.div(v, size, out=work.take(f"unit {name}", tuple(v.shape), v.dtype, v.device))
    torch.bmm(unit.mT, unit, out=length).sqrt_()
    unit.div_(torch.clamp(length, min=work.number("half", 0.5, v.dtype, v.device), out=least))
    return unit, length.mul_(size)


def _one_and(shift: Tensor, curvature: Tensor, work: Workspace) -> Tensor:
    """1 + damping / curvature, [p, 1, 1]; inf without curvature."""
    one = work.number("one", 1.0, shift.dtype, shift.device)
    return torch.div(shift, curvature, out=work.like("grown", curvature)).add_(one)


def _product(matrix: Tensor, a: Tensor, g: Tensor, work: Workspace) -> Tensor:
    """g^T matrix a for each block, [p, 1, 1], in scratch."""
    column = torch.bmm(matrix, a, out=work.like("column", g))
    return torch.bmm(g.mT, column, out=work.take("product", (g.shape[0], 1, 1), g.dtype, g.device))
