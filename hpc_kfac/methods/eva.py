"""Eva: rank-one curvature from two mean vectors (Zhang, Shi & Li 2023)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from hpc_kfac.damping import Damping
from hpc_kfac.linalg.solve import require_finite
from hpc_kfac.linalg.workspace import Workspace
from hpc_kfac.methods.method import Cost, Method, State, StateSpec

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

    damping: float | Damping = 0.03
    decay: float = 0.95

    def __post_init__(self) -> None:
        self._check()

    def state(self, shape: LayerShape) -> tuple[StateSpec, ...]:
        # Reduced with every statistics step, because there is no refresh to wait for.
        sizes = (("a_mean", shape.inputs), ("g_mean", shape.outputs))
        return tuple(
            StateSpec(name, (shape.blocks, d), "running", reduce="mean", reduce_at="statistics", lives="all")
            for name, d in sizes
        )

    def statistics(self, batch: LayerBatch, state: State, shape: LayerShape) -> State:
        a_mean, g_mean = batch.means()
        return {"a_mean": a_mean, "g_mean": g_mean}

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

    def quadratic(self, delta: Tensor, state: State, shape: LayerShape) -> Tensor:
        work = Workspace()
        return _product(delta, *_vectors(state, delta.dtype, work), work).square().sum()

    def cost(self, shape: LayerShape) -> Cost:
        """Flops: a + o a row, 5 a o for one gradient, no refresh."""
        return Cost(float(shape.blocks * (shape.inputs + shape.outputs)), 0.0, 5.0 * shape.parameters)


def _vectors(state: State, dtype: torch.dtype, work: Workspace) -> tuple[Tensor, Tensor]:
    """The means as columns [p, a, 1] and [p, o, 1]."""
    a, g = (work.cast(name, state[name], dtype) for name in ("a_mean", "g_mean"))
    return a.unsqueeze(2), g.unsqueeze(2)


def _product(matrix: Tensor, a: Tensor, g: Tensor, work: Workspace) -> Tensor:
    """g^T matrix a for each block, [p, 1, 1], in scratch."""
    column = torch.bmm(matrix, a, out=work.like("column", g))
    return torch.bmm(g.mT, column, out=work.take("product", (g.shape[0], 1, 1), g.dtype, g.device))
