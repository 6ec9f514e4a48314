"""SENG: sketched sample matrices (Yang, Xu, Wen, Chen & Xu 2022)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from hpc_kfac.linalg.solve import multiply, require_finite, woodbury_inverse
from hpc_kfac.linalg.workspace import Workspace
from hpc_kfac.methods.method import Cost, State, StateSpec
from hpc_kfac.methods.rows.sample_rows import SampleRows, output_weights, row_scale
from hpc_kfac.options.damping import Damping

if TYPE_CHECKING:
    from hpc_kfac.layers.batch import LayerBatch, LayerShape


@dataclass(frozen=True, kw_only=True)
class SENG(SampleRows):
    """SENG: the sample matrix with a sketched kernel, and in small layers with the samples' own gradients.

    Up to `explicit_below` weights a layer keeps u_n, the exact gradients of its samples also where positions share
    weights, and forms the kernel from `columns` of their entries. A larger layer keeps a sample's x_n and r_n, forms
    kernel and products from `columns` entries of each, and with `thin` replaces V^T z = sum z_n r_n x_n^T by the one
    product (sum sqrt|z_n| r_n) (sum z_n x_n / sum sqrt|z_n|)^T. Sketches take evenly spaced entries, scaled to keep the
    mean. What a sketch misses of the kernel is divided by the damping: keep that near the kernel's own size.

    Args:
        damping: added to the curvature, or a `Damping`; the value of the last refresh counts.
        explicit_below: weights of the largest layer whose samples' gradients are kept.
        columns: entries in a sketch; None for all, which makes large layers those of `SampleMatrix`.
        thin: large layers take one product of rank one for the correction.
    """

    name: ClassVar[str] = "seng"
    damping: float | Damping | None = 0.3
    rows: int = 32
    explicit_below: int = 700_000
    columns: int | None = 512
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
        kernel = torch.ones((), dtype=state["valid"].dtype, device=state["valid"].device)
        for name, rows in solved.items():
            require_finite(rows, name)
            sketch = self._sketch(rows, 2)
            kernel = kernel * multiply(sketch, sketch.mT) * (rows.shape[2] / sketch.shape[2])
        inverse, raised = woodbury_inverse(kernel, damping)
        return {**solved, "kernel_inverse": inverse, "kernel_damping": raised}

    def _sketch(self, tensor: Tensor, axis: int) -> Tensor:
        """Evenly spaced entries along an axis."""
        size = tensor.shape[axis]
        if self.columns is None or size <= self.columns:
            return tensor
        return tensor.index_select(axis, torch.arange(self.columns, device=tensor.device) * size // self.columns)

    def precondition(
        self, gradient: Tensor, state: State, shape: LayerShape, damping: float, work: Workspace | None = None
    ) -> Tensor:
        work = Workspace() if work is None else work
        exact = work.cast("exact", gradient, state["kernel_inverse"].dtype)
        if self._explicit(shape):
            rows = state["U_solved"]
            weights = state["kernel_inverse"] @ (rows @ exact.flatten(1).unsqueeze(2))
            correction = (rows.mT @ weights).view_as(exact)
        else:
            weights = state["kernel_inverse"] @ self._products(exact, state)
            correction = self._correction(state, weights)
        update = torch.sub(exact, correction, out=work.like("correction", exact)).div_(
            state["kernel_damping"][:, None, None]
        )
        return work.cast("update", update, gradient.dtype)

    def _products(self, exact: Tensor, state: State) -> Tensor:
        """About r_n^T D x_n of each row, [p, n, 1]."""
        x, r = self._sketch(state["X_solved"], 2), self._sketch(state["R_solved"], 2)
        scale = state["X_solved"].shape[2] / x.shape[2] * state["R_solved"].shape[2] / r.shape[2]
        part = self._sketch(self._sketch(exact, 2), 1)
        return ((x @ part.mT) * r).sum(2, keepdim=True) * scale

    def _correction(self, state: State, weights: Tensor) -> Tensor:
        x, r = state["X_solved"], state["R_solved"]
        if not self.thin:
            return (r * weights).mT @ x
        roots = weights.abs().sqrt()
        total = roots.sum(1, keepdim=True)
        total = torch.where(total > 0, total, torch.ones_like(total))
        return (r * roots).sum(1).unsqueeze(2) * ((x * weights).sum(1, keepdim=True) / total)

    def quadratic(self, delta: Tensor, state: State, shape: LayerShape) -> Tensor:
        if self._explicit(shape):
            products = state["U"] @ delta.to(state["U"].dtype).flatten(1).unsqueeze(2)
        else:
            products = ((state["X"] @ delta.to(state["X"].dtype).mT) * state["R"]).sum(2, keepdim=True)
        return (products.square() * output_weights(state)).sum()

    def cost(self, shape: LayerShape) -> Cost:
        """Flops for the rows of one rank, n: of what it keeps of a sample, m numbers, sketches of s: 2 n^2 s + n^3."""
        p, n = shape.blocks, self.rows
        sizes = [shape.outputs * shape.inputs] if self._explicit(shape) else [shape.outputs, shape.inputs]
        sketched = sum(min(size, self.columns or size) for size in sizes)
        return Cost(0.0, p * (2.0 * n * n * sketched + n**3), 4.0 * n * shape.parameters + 2.0 * p * n * n)
