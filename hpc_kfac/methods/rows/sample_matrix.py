"""Natural gradient through the sample kernel: the Fisher of a few samples, inverted by Woodbury's identity."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from hpc_kfac.linalg.solve import multiply, woodbury_inverse
from hpc_kfac.linalg.workspace import Workspace
from hpc_kfac.methods.method import Cost, State, StateSpec
from hpc_kfac.methods.rows.sample_rows import SampleRows, output_weights
from hpc_kfac.options.schedule import REFRESH
from hpc_kfac.options.wants import Wants

if TYPE_CHECKING:
    from hpc_kfac.layers.batch import LayerShape


@dataclass(frozen=True, kw_only=True)
class SampleMatrix(SampleRows):
    """The layer's own Fisher block from the latest samples of all ranks, undistorted by a Kronecker product.

    With rows u_n = vec(g_n x_n^T) / sqrt(N) of a matrix V, F = V^T V and K = V V^T = (X X^T) * (R R^T) / N elementwise,
    (F + damping I)^-1 D = [D - V^T (K + damping I)^-1 V D] / damping (Ren & Goldfarb 2019). V is never formed. The rows
    of a refresh are kept with its kernel, since newer rows would not fit it. N is the number of samples, also where
    the loss is a mean over positions.

    The settings are those of `SampleRows`.

    Args:
        damping: added to the curvature, or a `Damping`; None for 0.03, by default of its trace. The value of the last
            refresh counts.
    """

    name: ClassVar[str] = "sample_matrix"
    share: ClassVar[float] = 0.03
    wants = Wants(
        statistics=dict(REFRESH),
        why="rows between refreshes are of no use; each step's own, as in Ren & Goldfarb 2019, fit its noise",
    )

    def state(self, shape: LayerShape) -> tuple[StateSpec, ...]:
        return (*self.row_specs(shape), *self.kernel_specs(shape, {"X": shape.inputs, "R": shape.outputs}))

    def refresh(self, state: State, shape: LayerShape, damping: float, part: str | None = None) -> State:
        inputs = state["X"].clone()
        outputs = state["R"] * output_weights(state).sqrt()
        kernel = row_kernel(inputs, outputs)
        inverse, raised = woodbury_inverse(kernel, self.added(damping, kernel))
        return {
            "X_solved": inputs,
            "R_solved": outputs,
            "kernel_inverse": inverse,
            "kernel_damping": raised,
        }

    def precondition(
        self, gradient: Tensor, state: State, shape: LayerShape, damping: float, work: Workspace | None = None
    ) -> Tensor:
        # The subtraction cancels most digits where the curvature is far above the damping: never below the rows' dtype.
        work = Workspace() if work is None else work
        inputs, outputs = state["X_solved"], state["R_solved"]
        exact = work.cast("exact", gradient, inputs.dtype)
        products = row_products(exact, inputs, outputs, work)
        weights = torch.bmm(state["kernel_inverse"], products, out=work.like("weights", products))
        weighted = torch.mul(outputs, weights, out=work.like("weighted", outputs))
        update = torch.bmm(weighted.mT, inputs, out=work.like("correction", exact))
        torch.sub(exact, update, out=update).div_(state["kernel_damping"][:, None, None])
        return work.cast("update", update, gradient.dtype)

    def quadratic(self, delta: Tensor, state: State, shape: LayerShape) -> Tensor:
        products = row_products(delta.to(state["X"].dtype), state["X"], state["R"], Workspace())
        return (products.square() * output_weights(state)).sum()

    def cost(self, shape: LayerShape) -> Cost:
        """Flops for the rows of one rank, n: refresh 2 n^2 (a + o) + n^3, gradient 4 n a o + 2 n^2; rows are free."""
        p, n = shape.blocks, self.rows
        refresh = p * (2.0 * n * n * (shape.inputs + shape.outputs) + n**3)
        return Cost(0.0, refresh, 4.0 * n * shape.parameters + 2.0 * p * n * n)


def row_kernel(inputs: Tensor, outputs: Tensor) -> Tensor:
    """Inner products of vec(r_n x_n^T), [p, n, n]."""
    return multiply(inputs, inputs.mT) * multiply(outputs, outputs.mT)


def row_products(matrix: Tensor, inputs: Tensor, outputs: Tensor, work: Workspace) -> Tensor:
    """g_n^T matrix x_n of each row, [p, n, 1], in scratch."""
    rows = torch.bmm(inputs, matrix.mT, out=work.like("weighted", outputs)).mul_(outputs)
    products = work.take("products", (*rows.shape[:2], 1), rows.dtype, rows.device)
    return torch.sum(rows, -1, keepdim=True, out=products)
