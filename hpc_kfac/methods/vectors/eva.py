"""Eva, Eva-f and Eva-s: rank-one curvature from mean vectors (Zhang, Shi & Li 2023)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from torch import Tensor

from hpc_kfac.linalg.scaling import size_of
from hpc_kfac.linalg.solve import require_finite
from hpc_kfac.linalg.structure import Diagonal, Identity
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
        damping: added to the curvature, or a `Damping`; None for 0.3, by default of K-FAC's mean eigenvalue.
        decay: weight of the old value in the running means.
        relative_damping: damping is a share of E|x|^2 E|g|^2 / (a o) of the layer, the mean eigenvalue of K-FAC's
            curvature, which stays where F vanishes with the mean gradient. None: only if damping is None.

    Raises:
        ValueError: a setting out of range.
    """

    name: ClassVar[str] = "eva"
    wants = Wants(statistics=1, refresh=1, why="means of every step; there is nothing to decompose (Zhang et al. 2023)")
    share: ClassVar[float] = 0.3
    refreshed_by_all: ClassVar[bool] = True
    damping: float | Damping | None = None
    decay: float = 0.95
    relative_damping: bool | None = None

    def __post_init__(self) -> None:
        self._default_damping()
        self._check()

    def state(self, shape: LayerShape) -> tuple[StateSpec, ...]:
        squares = self.relative_damping
        return (*_side("a", shape.inputs, shape, squares), *_side("g", shape.outputs, shape, squares))

    def statistics(self, batch: LayerBatch, state: State, shape: LayerShape) -> State:
        a_mean, g_mean = batch.means()
        found = {"a_mean": a_mean, "g_mean": g_mean}
        if self.relative_damping:
            found |= {"a_square": _input_square(batch), "g_square": _output_square(batch, shape)}
        return found

    def needs_output_means(self, shape: LayerShape) -> bool:
        return True

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
        shift = self._shift(damping, curvature, state, shape, work)
        along = _product(gradient, a, g, work).div_(_one_and(shift, curvature, work))
        update, correction = work.like("update", gradient), torch.mul(g, along, out=work.like("correction", g))
        return torch.baddbmm(gradient, correction, a.mT, alpha=-1.0, out=update).div_(shift)

    def _rank_one(self, state: State, dtype: torch.dtype, work: Workspace) -> tuple[list[Tensor], Tensor]:
        """The means at length 1, as columns, and the eigenvalue [p, 1, 1] of F that is not zero."""
        pairs = [_unit(v, name, work) for v, name in zip(_vectors(state, dtype, work), "ag", strict=True)]
        return [unit for unit, _ in pairs], pairs[0][1].mul_(pairs[1][1]).square_()

    def _shift(self, damping: float, curvature: Tensor, state: State, shape: LayerShape, work: Workspace) -> Tensor:
        """The damping, [p or 1, 1, 1]: a number, or a share of the mean curvature, which counts as 1 where it is zero.

        Of F itself where a checkpoint of an earlier version lacks the squares.
        """
        scale = work.number("damping", damping, curvature.dtype, curvature.device)
        if not self.relative_damping:
            return scale
        mean = curvature if "a_square" not in state else self._mean_curvature(state, shape, curvature, work)
        some = torch.logical_not(mean, out=work.like("shift", mean)).add_(mean)
        return some.mul_(scale)

    def _mean_curvature(self, state: State, shape: LayerShape, like: Tensor, work: Workspace) -> Tensor:
        """The mean eigenvalue [1, 1, 1] of K-FAC's curvature over all blocks: a channel may have none."""
        squares = [name for name in ("a_square", "g_square") if name in state]
        factor = 1.0 / (shape.blocks ** len(squares) * self._eigenvalues(shape))
        mean = work.number(f"one of the mean {factor}", factor, like.dtype, like.device)
        for name in squares:
            square = work.cast(name, state[name], like.dtype).unsqueeze(2)
            total = work.take(f"total {name}", (1, 1, 1), like.dtype, like.device)
            mean = torch.sum(square, dim=0, keepdim=True, out=total).mul_(mean)
        return mean

    def _eigenvalues(self, shape: LayerShape) -> int:
        """How many a block of K-FAC's curvature has whose mean the damping is a share of."""
        return shape.inputs * shape.outputs

    def is_damped(self, shape: LayerShape) -> bool:
        return True

    def damping_form(self, delta: Tensor, state: State, shape: LayerShape, damping: float) -> Tensor:
        work = Workspace()
        _, curvature = self._rank_one(state, delta.dtype, work)
        return (self._shift(damping, curvature, state, shape, work) * delta.square()).sum()

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
        damping: added to the curvature, or a `Damping`; None for 0.1, by default of E|x|^2 / a.
        decay: weight of the old value in the running mean.
        relative_damping: damping is a share of E|x|^2 / a of the layer. None: only if damping is None.

    Raises:
        ValueError: a setting out of range.
    """

    name: ClassVar[str] = "eva_f"
    share: ClassVar[float] = 0.1

    def state(self, shape: LayerShape) -> tuple[StateSpec, ...]:
        return _side("a", shape.inputs, shape, self.relative_damping)

    def statistics(self, batch: LayerBatch, state: State, shape: LayerShape) -> State:
        found = {"a_mean": batch.input_mean()}
        return found | {"a_square": _input_square(batch)} if self.relative_damping else found

    def needs_output_means(self, shape: LayerShape) -> bool:
        return shape.gradient_rows

    def refresh(self, state: State, shape: LayerShape, damping: float, part: str | None = None) -> State:
        require_finite(state["a_mean"], "a_mean")
        return {}

    def precondition(
        self, gradient: Tensor, state: State, shape: LayerShape, damping: float, work: Workspace | None = None
    ) -> Tensor:
        work = Workspace() if work is None else work
        (a,), curvature = self._rank_one(state, gradient.dtype, work)
        shift = self._shift(damping, curvature, state, shape, work)
        size = (shape.blocks, shape.outputs, 1)
        along = torch.bmm(gradient, a, out=work.take("column", size, gradient.dtype, gradient.device))
        along.div_(_one_and(shift, curvature, work))
        return torch.baddbmm(gradient, along, a.mT, alpha=-1.0, out=work.like("update", gradient)).div_(shift)

    def _rank_one(self, state: State, dtype: torch.dtype, work: Workspace) -> tuple[list[Tensor], Tensor]:
        unit, length = _unit(work.cast("a_mean", state["a_mean"], dtype).unsqueeze(2), "a", work)
        return [unit], length.square_()

    def _eigenvalues(self, shape: LayerShape) -> int:
        return shape.inputs

    def quadratic(self, delta: Tensor, state: State, shape: LayerShape) -> Tensor:
        return torch.bmm(delta, state["a_mean"].to(delta.dtype).unsqueeze(2)).square().sum()

    def cost(self, shape: LayerShape) -> Cost:
        """Flops: a a row, 4 a o for one gradient, no refresh."""
        return Cost(float(shape.blocks * shape.inputs), 0.0, 4.0 * shape.parameters)


@dataclass(frozen=True, kw_only=True)
class EvaS(Eva):
    """Eva-s: Shampoo with rank-one factors of the averaged gradient's means, U = S_G^-power D S_A^-power.

    S = v v^T + damping I with v_A the mean of D over its rows and v_G over its columns, and in closed form
    S^-p = damping^-p (I - v v^T / |v|^2) + (damping + |v|^2)^-p v v^T / |v|^2. A relative damping is of the rows'
    mean square where that is more than |v|^2: v may be zero, as the mean over the outputs of a softmax is.

    Args:
        damping: added to each rank-one factor, or a `Damping`; None for 0.001, by default of the rows' mean square.
        decay: weight of the old value in the running means.
        relative_damping: damping is a share of |v|^2 of each factor, or of the mean square of the rows that v is the
            mean of, if that is more. None: only if damping is None.
        power: of each factor; Shampoo's is 1/4.

    Raises:
        ValueError: a setting out of range.
    """

    name: ClassVar[str] = "eva_s"
    share: ClassVar[float] = 0.001
    reads: ClassVar[Literal["samples", "gradients"]] = "gradients"
    power: float = 0.25

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.power > 0:
            raise ValueError(f"power is {self.power}; give a positive power, such as 0.25")

    def state(self, shape: LayerShape) -> tuple[StateSpec, ...]:
        sizes = (("a_mean", shape.inputs), ("g_mean", shape.outputs))
        return tuple(StateSpec(name, (shape.blocks, d), "running") for name, d in sizes)

    def needs_output_means(self, shape: LayerShape) -> bool:
        return False

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
            shift = self._root(damping, length, gradient, matrix.shape[1], work)
            # Along v the power is (shift^2 + |v|^2)^-p in place of shift^-2p.
            share = length.div_(shift).square_().log1p_().mul_(exponent).expm1_()
            along = work.take(f"along {name}", (shape.blocks, matrix.shape[1], 1), v.dtype, v.device)
            matrix.baddbmm_(torch.bmm(matrix, unit, out=along).mul_(share), unit.mT)
            update.mul_(torch.pow(shift.square_(), exponent, out=shift))
        return update

    def _root(self, damping: float, length: Tensor, gradient: Tensor, rows: int, work: Workspace) -> Tensor:
        """The root of a factor's damping [p, 1, 1], at least a share of so many rows' mean; 1 where all is zero."""
        root = work.number("root", damping**0.5, length.dtype, length.device)
        shift = work.like("shift", length)
        if not self.relative_damping:
            return shift.copy_(root.expand_as(shift))
        torch.linalg.vector_norm(gradient, dim=(1, 2), keepdim=True, out=shift)
        shift.mul_(work.number(f"mean of {rows}", rows**-0.5, length.dtype, length.device))
        torch.maximum(shift, length, out=shift).mul_(root)
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


def _side(name: Literal["a", "g"], d: int, shape: LayerShape, squares: bool | None) -> tuple[StateSpec, ...]:
    """The running mean [p, d] of a side's rows, and where `squares` that of their squared lengths [p, 1]."""
    over = shape.input_over if name == "a" else shape.output_over

    def spec(tensor: str, d: int, needed: bool) -> StateSpec:
        # Reduced with every statistics step, because there is no refresh to wait for.
        return StateSpec(
            f"{name}_{tensor}",
            (shape.blocks, d),
            "running",
            reduce="mean",
            reduce_at="statistics",
            lives="all",
            over=over,
            needed=needed,
        )

    return (spec("mean", d, True), spec("square", 1, False)) if squares else (spec("mean", d, True),)


def _input_square(batch: LayerBatch) -> Tensor:
    """The mean of |x|^2, [p, 1]."""
    return batch.input_moment(Diagonal()).sum(1, keepdim=True)


def _output_square(batch: LayerBatch, shape: LayerShape) -> Tensor:
    """(1/M) sum of |g|^2, [p, 1]."""
    if isinstance(shape.output_structure, Identity):
        return batch.means()[1].square()
    return batch.output_moment(Diagonal()).sum(1, keepdim=True)


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
