"""SENG: sketched sample matrices (Yang, Xu, Wen, Chen & Xu 2022)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from hpc_kfac.linalg.scaling import size_of
from hpc_kfac.linalg.solve import multiply, require_finite, woodbury_inverse
from hpc_kfac.linalg.workspace import Workspace
from hpc_kfac.methods.method import Cost, State, StateSpec
from hpc_kfac.methods.rows.sample_matrix import row_kernel, row_products
from hpc_kfac.methods.rows.sample_rows import SampleRows, output_weights, row_scale
from hpc_kfac.options.wants import Wants

if TYPE_CHECKING:
    from hpc_kfac.layers.batch import LayerBatch, LayerShape


@dataclass(frozen=True, kw_only=True)
class SENG(SampleRows):
    """SENG: the sample matrix with a sketched kernel, and in small layers with the samples' own gradients.

    Up to `explicit_below` weights a layer keeps u_n, the exact gradients of its samples also where positions share
    weights, and forms the kernel K = V V^T from `columns` of their entries, evenly spaced and scaled to keep the mean.
    A larger layer keeps a sample's x_n and r_n, whose kernel takes no more than products with them, and with `thin`
    replaces C = V^T z = sum z_n r_n x_n^T, z = (K + damping I)^-1 V D, by the one product
    (sum sqrt|z_n| r_n) (sum z_n x_n / sum sqrt|z_n|)^T.

    (D - C) / damping is the update where K and C are exact. Elsewhere it could point uphill: what an approximation
    misses is divided by the damping. There the update is what solves (V^T V + damping I) U = D within the plane of D
    and D - C, that is, minimises <U, (V^T V + damping I) U> / 2 - <U, D> there. So <U, D> is above 0 always.

    Args:
        damping: added to the curvature, or a `Damping`; None for 0.1, by default of its trace. The value of the last
            refresh counts.
        explicit_below: weights of the largest layer whose samples' gradients are kept.
        columns: entries in the sketch of a sample's gradient; None for all.
        thin: large layers take one product of rank one for the correction.
    """

    name: ClassVar[str] = "seng"
    wants = Wants(
        statistics={0: 10, 100: 200},
        refresh={0: 10, 100: 200},
        why="a refresh every 200 steps (Yang et al. 2022); rows in between are of no use",
    )
    rows: int = 32
    explicit_below: int = 700_000
    columns: int | None = 512**2
    thin: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.columns is not None and self.columns < 1:
            raise ValueError(f"columns is {self.columns}; give at least 1 entry, or none for all")

    def _explicit(self, shape: LayerShape) -> bool:
        return shape.outputs * shape.inputs <= self.explicit_below

    def state(self, shape: LayerShape) -> tuple[StateSpec, ...]:
        if not self._explicit(shape):
            return (*self.row_specs(shape), *self.kernel_specs(shape, {"X": shape.inputs, "R": shape.outputs}))
        size = shape.outputs * shape.inputs
        rows = StateSpec("U", (shape.blocks, self.rows, size), "running", reduce="gather", lives="all", rank_axes=(1,))
        return (rows, *self.row_specs(shape)[2:], *self.kernel_specs(shape, {"U": size}))

    def collect(self, batch: LayerBatch, state: State, shape: LayerShape) -> State:
        if not self._explicit(shape):
            return super().collect(batch, state, shape)
        samples = batch.available(False)
        rows = batch.sample_gradients(self.rows).flatten(2) / row_scale(samples, batch.count)
        return {"U": rows, "samples": torch.tensor(float(samples))}

    def refresh(self, state: State, shape: LayerShape, damping: float, part: str | None = None) -> State:
        solved = {f"{name}_solved": state[name].clone() for name in ("U", "X") if name in state}
        if "U" in state:
            solved["U_solved"] *= output_weights(state).sqrt()
        else:
            solved["R_solved"] = state["R"] * output_weights(state).sqrt()
        for name, rows in solved.items():
            require_finite(rows, name)
        if "U" in state:
            sketch = self._sketch(solved["U_solved"])
            kernel = multiply(sketch, sketch.mT) * (solved["U_solved"].shape[2] / sketch.shape[2])
        else:
            kernel = row_kernel(solved["X_solved"], solved["R_solved"])
        inverse, raised = woodbury_inverse(kernel, self.added(damping, kernel))
        return {**solved, "kernel_inverse": inverse, "kernel_damping": raised}

    def _sketch(self, rows: Tensor) -> Tensor:
        """Evenly spaced entries of rows [p, n, m]."""
        size = rows.shape[2]
        if self.columns is None or size <= self.columns:
            return rows
        return rows[:, :, torch.arange(self.columns, device=rows.device) * size // self.columns]

    def _exact(self, shape: LayerShape) -> bool:
        """Whether nothing of the correction is approximate."""
        if not self._explicit(shape):
            return not self.thin
        return self.columns is None or shape.outputs * shape.inputs <= self.columns

    def precondition(
        self, gradient: Tensor, state: State, shape: LayerShape, damping: float, work: Workspace | None = None
    ) -> Tensor:
        work = Workspace() if work is None else work
        damped = state["kernel_damping"][:, None, None]
        exact = work.cast("exact", gradient, state["kernel_inverse"].dtype)
        if self._exact(shape):
            _, correction = self._corrected(exact, state, shape)
            update = torch.sub(exact, correction, out=work.like("correction", exact)).div_(damped)
        else:
            size = size_of(exact, per_block=True)
            unit = exact / size  # whose squares neither vanish nor overflow
            products, correction = self._corrected(unit, state, shape)
            rest = unit - correction
            update = _solved_in_plane((unit, products), (rest, self._products(rest, state, shape)), damped).mul_(size)
        return work.cast("update", update, gradient.dtype)

    def _corrected(self, matrix: Tensor, state: State, shape: LayerShape) -> tuple[Tensor, Tensor]:
        """V matrix [p, n, 1], and C [p, o, a]."""
        products = self._products(matrix, state, shape)
        weights = state["kernel_inverse"] @ products
        if self._explicit(shape):
            return products, (state["U_solved"].mT @ weights).view_as(matrix)
        x, r = state["X_solved"], state["R_solved"]
        if not self.thin:
            return products, (r * weights).mT @ x
        roots = weights.abs().sqrt()
        total = roots.sum(1, keepdim=True)
        total = torch.where(total > 0, total, torch.ones_like(total))
        return products, (r * roots).sum(1).unsqueeze(2) * ((x * weights).sum(1, keepdim=True) / total)

    def _products(self, matrix: Tensor, rows: State, shape: LayerShape, which: str = "_solved") -> Tensor:
        """<u_n, matrix> of each row, [p, n, 1]: of the rows as they were at a refresh, or with "" as they are."""
        if self._explicit(shape):
            return rows[f"U{which}"] @ matrix.flatten(1).unsqueeze(2)
        return row_products(matrix, rows[f"X{which}"], rows[f"R{which}"], Workspace())

    def quadratic(self, delta: Tensor, state: State, shape: LayerShape) -> Tensor:
        products = self._products(delta.to(state["valid"].dtype), state, shape, "")
        return (products.square() * output_weights(state)).sum()

    def cost(self, shape: LayerShape) -> Cost:
        """Flops for the rows of one rank, n: refresh 2 n^2 s + n^3 with s numbers of a sample, gradient 4 n a o
        + 2 n^2, and 2 n a o more in a plane."""
        p, n, size = shape.blocks, self.rows, shape.outputs * shape.inputs
        numbers = min(size, self.columns or size) if self._explicit(shape) else shape.outputs + shape.inputs
        products = 4.0 if self._exact(shape) else 6.0
        return Cost(0.0, p * (2.0 * n * n * numbers + n**3), products * n * shape.parameters + 2.0 * p * n * n)


def _solved_in_plane(first: tuple[Tensor, Tensor], second: tuple[Tensor, Tensor], damping: Tensor) -> Tensor:
    """U of the span of D and E with <P, (V^T V + damping I) U> = <P, D> for P = D and P = E, block by block.

    The second direction is made conjugate to the first; one that rounding alone keeps apart from it is left out.

    Args:
        first: D [p, o, a] and V D [p, n, 1].
        second: E and V E.
        damping: [p, 1, 1].
    """
    (d, vd), (e, ve) = first, second
    squared = _inner(d, d)
    curvature = _inner(vd, vd) + damping * squared
    shift = _ratio(_inner(vd, ve) + damping * _inner(d, e), curvature)
    least = (64 * torch.finfo(d.dtype).eps) ** 2 * (_inner(e, e) + shift.square() * squared)
    e, ve = e - shift * d, ve - shift * vd
    length = _inner(e, e)
    step = torch.where(length > least, _ratio(_inner(e, d), _inner(ve, ve) + damping * length), 0.0)
    return _ratio(squared, curvature) * d + step * e


def _inner(left: Tensor, right: Tensor) -> Tensor:
    """Inner product of each block's matrices, [p, 1, 1]."""
    return (left * right).sum((1, 2), keepdim=True)


def _ratio(top: Tensor, bottom: Tensor) -> Tensor:
    return torch.where(bottom > 0, top / bottom, 0.0)
