"""SKFAC: K-FAC whose factors are inverted through the samples (Tang et al. 2021)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from hpc_kfac.linalg.solve import damped_inverse, multiply
from hpc_kfac.linalg.workspace import Workspace
from hpc_kfac.methods.kronecker.kronecker import mean_or_one
from hpc_kfac.methods.method import Cost, State, StateSpec
from hpc_kfac.methods.rows.sample_rows import SampleRows, input_weights, output_weights
from hpc_kfac.options.schedule import REFRESH
from hpc_kfac.options.wants import Wants

if TYPE_CHECKING:
    from hpc_kfac.layers.batch import LayerShape


@dataclass(frozen=True, kw_only=True)
class SKFAC(SampleRows):
    """SKFAC: K-FAC with A = X^T X / n, G = R^T R / n of the latest n rows of all ranks, which are never formed.

    (A + d I)^-1 = [I - X^T (X X^T + n d I)^-1 X] / d, and damping is split over the two factors as K-FAC's cholesky
    solver does. A layer keeps n (a + o) numbers where K-FAC keeps a^2 + o^2, and decomposes matrices of size n.

    The settings are those of `SampleRows`, with

    Args:
        damping: added to the curvature, in units of kron(G, A), or a `Damping`; None for 0.1, by default of the mean.
            The value of the last refresh counts.
        relative_damping: damping is a share of the mean eigenvalue of kron(G, A). None: only if damping is None.
    """

    name: ClassVar[str] = "skfac"
    wants = Wants(statistics=dict(REFRESH), why="rows are replaced, so those between two refreshes are of no use")

    def state(self, shape: LayerShape) -> tuple[StateSpec, ...]:
        p, n = shape.blocks, self.rows
        solved: list[StateSpec] = []
        for name, d in {"X": shape.inputs, "R": shape.outputs}.items():
            solved.append(StateSpec(f"{name}_rows", (p, n, d), "solved", rank_axes=(1,)))
            solved.append(StateSpec(f"{name}_kernel", (p, n, n), "solved", symmetric=True, rank_axes=(1, 2)))
        return (*self.row_specs(shape), *solved, StateSpec("dampings", (p, 2), "solved"))

    def refresh(self, state: State, shape: LayerShape, damping: float, part: str | None = None) -> State:
        rows = _scaled(state)
        means = {name: mean_or_one(matrix.square().sum((1, 2)) / matrix.shape[2]) for name, matrix in rows.items()}
        pi = (means["X"] / means["R"]).sqrt()
        root = damping**0.5 * ((means["X"] * means["R"]).sqrt() if self.relative_damping else 1.0)
        dampings = {"X": root * pi, "R": root / pi}
        kernels = {name: damped_inverse(multiply(matrix, matrix.mT), dampings[name]) for name, matrix in rows.items()}
        return {
            **{f"{name}_rows": matrix for name, matrix in rows.items()},
            **{f"{name}_kernel": kernel for name, kernel in kernels.items()},
            "dampings": torch.stack([dampings["X"], dampings["R"]], dim=1),
        }

    def precondition(
        self, gradient: Tensor, state: State, shape: LayerShape, damping: float, work: Workspace | None = None
    ) -> Tensor:
        # The subtraction cancels most digits where the curvature is far above the damping: never below the rows' dtype.
        work = Workspace() if work is None else work
        update = work.cast("exact", gradient, state["X_rows"].dtype)
        update = self._right(update, state, work)
        update = self._left(update, state, work)
        return work.cast("update", update, gradient.dtype)

    @staticmethod
    def _right(matrix: Tensor, state: State, work: Workspace) -> Tensor:
        """matrix (A + damping I)^-1, with (A + damping I)^-1 = [I - X^T (X X^T + damping I)^-1 X] / damping."""
        rows, kernel = state["X_rows"], state["X_kernel"]
        size = (*matrix.shape[:2], rows.shape[1])
        seen, weights = (work.take(name, size, rows.dtype, rows.device) for name in ("seen", "weights"))
        torch.bmm(torch.bmm(matrix, rows.mT, out=seen), kernel, out=weights)
        update = torch.baddbmm(matrix, weights, rows, alpha=-1.0, out=work.like("right", matrix))
        return update.div_(state["dampings"][:, 0, None, None])

    @staticmethod
    def _left(matrix: Tensor, state: State, work: Workspace) -> Tensor:
        """(G + damping I)^-1 matrix, as `_right`."""
        rows, kernel = state["R_rows"], state["R_kernel"]
        size = (len(rows), rows.shape[1], matrix.shape[2])
        seen, weights = (work.take(name, size, rows.dtype, rows.device) for name in ("seen", "weights"))
        torch.bmm(kernel, torch.bmm(rows, matrix, out=seen), out=weights)
        update = torch.baddbmm(matrix, rows.mT, weights, alpha=-1.0, out=work.like("left", matrix))
        return update.div_(state["dampings"][:, 1, None, None])

    def quadratic(self, delta: Tensor, state: State, shape: LayerShape) -> Tensor:
        rows = {name: matrix.to(delta.dtype) for name, matrix in _scaled(state).items()}
        return (rows["R"] @ delta @ rows["X"].mT).square().sum()

    def damping_form(self, delta: Tensor, state: State, shape: LayerShape, damping: float) -> Tensor:
        """With what damped factors add: kron(G, b I) + kron(c I, A) + b c I."""
        rows = {name: matrix.to(delta.dtype) for name, matrix in _scaled(state).items()}
        b, c = (column[:, None] for column in state["dampings"].to(delta.dtype).unbind(1))
        left, right = (rows["R"] @ delta).square().sum((1, 2)), (delta @ rows["X"].mT).square().sum((1, 2))
        return (b[:, 0] * left + c[:, 0] * right + (b * c)[:, 0] * delta.square().sum((1, 2))).sum()

    def cost(self, shape: LayerShape) -> Cost:
        """Flops for the rows of one rank, n: refresh 2 n^2 (a + o) + 2 n^3, gradient 8 n a o + 2 n^2 (a + o)."""
        p, n, width = shape.blocks, self.rows, shape.inputs + shape.outputs
        refresh = p * (2.0 * n * n * width + 2.0 * n**3)
        return Cost(0.0, refresh, 8.0 * n * shape.parameters + 2.0 * p * n * n * width)


def _scaled(state: State) -> State:
    """X and R so that A = X^T X and G = R^T R."""
    return {"X": state["X"] * input_weights(state).sqrt(), "R": state["R"] * output_weights(state).sqrt()}
