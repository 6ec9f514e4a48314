"""MKOR: inverse factors that follow mean vectors by rank-one updates (Mozaffari et al. 2023)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from torch import Tensor

from hpc_kfac.linalg.scaling import at_norm, with_length_of
from hpc_kfac.linalg.solve import require_finite
from hpc_kfac.linalg.workspace import Workspace
from hpc_kfac.methods.method import Cost, Method, State, StateSpec
from hpc_kfac.options.damping import Damping
from hpc_kfac.options.wants import Wants

if TYPE_CHECKING:
    from hpc_kfac.layers.batch import LayerBatch, LayerShape


@dataclass(frozen=True, kw_only=True)
class MKOR(Method):
    """MKOR: U = M_G D M_A, at the length of D, where each refresh updates both M with the batch's mean vector v.

    The paper, its code and the recursion that they mean differ. With c the memory, and M first blended with the
    identity, M <- (1 - damping) M + damping I, without which M grows without bound where no v points:

    - "exact": M <- [M - (1 - c) M v v^T M / (c + (1 - c) v^T M v)] / c, the inverse of c M^-1 + (1 - c) v v^T;
    - "code": M <- M - M v v^T M / (1 + v^T M v), the inverse of M^-1 + v v^T, and M starts anew from I once an entry is
      above 2, as in the authors' code;
    - "printed": M <- c M + (1 - c) / [c^2 (1 + c (1 - c) v^T M v)] M v v^T M, the paper's equation, which is not the
      inverse of that average: it grows along v.

    Every rank that needs M updates it itself, so that nothing but the vectors is sent.

    Args:
        damping: share of the identity that is blended into M before each update, below 1, or a `Damping`; None for
            0.05.
        memory: c, the weight of the old average.
        rule: "exact", "code" or "printed".
        decay: has no effect, a mean vector is that of the latest batch.
        relative_damping: v is taken at the length sqrt(d) of its d entries, so that the identity, which M starts from
            and is blended with, is the mean eigenvalue of v v^T, whatever the size of inputs and gradients. None: only
            if damping is None.

    Raises:
        ValueError: a setting out of range.
    """

    name: ClassVar[str] = "mkor"
    wants = Wants(
        refresh=10, why="an update takes a^2 + o^2 operations, and so one every 10 steps (Mozaffari et al. 2023)"
    )
    share: ClassVar[float] = 0.05
    damping: float | Damping | None = None
    memory: float = 0.95
    rule: Literal["exact", "code", "printed"] = "exact"
    decay: float = 0.0
    relative_damping: bool | None = None
    refreshed_by_all: ClassVar[bool] = True

    def __post_init__(self) -> None:
        self._default_damping()
        self._check()
        if self.rule not in RULES:
            raise ValueError(f"rule is {self.rule!r}; choose {', '.join(RULES)}")
        if not 0.0 < self.memory < 1.0:
            raise ValueError(f"memory is {self.memory}; give a weight between 0 and 1, such as 0.95")

    def state(self, shape: LayerShape) -> tuple[StateSpec, ...]:
        p = shape.blocks
        sides = (
            ("A", "a_mean", shape.inputs, shape.input_over),
            ("G", "g_mean", shape.outputs, shape.output_over),
        )
        return tuple(
            spec
            for name, mean, d, over in sides
            for spec in (
                StateSpec(mean, (p, d), "running", reduce="mean", reduce_at="statistics", lives="all", over=over),
                StateSpec(f"{name}_inverse", (p, d, d), "solved", symmetric=True, operand=True),
            )
        )

    def statistics(self, batch: LayerBatch, state: State, shape: LayerShape) -> State:
        a_mean, g_mean = batch.means()
        return {"a_mean": a_mean, "g_mean": g_mean}

    def refresh(self, state: State, shape: LayerShape, damping: float, part: str | None = None) -> State:
        solved = {}
        for name, mean in (("A", "a_mean"), ("G", "g_mean")):
            require_finite(state[mean], mean)
            v = state[mean].unsqueeze(2)
            if self.relative_damping:
                v = at_norm(v.clone(), v.shape[1] ** 0.5, per_block=True)
            inverse = self._blended(state.get(f"{name}_inverse"), v, min(damping, 1.0))
            mv = torch.bmm(inverse, v)
            beta, alpha, weight = RULES[self.rule](torch.bmm(v.mT, mv), self.memory)
            mv *= weight.sqrt()  # in both factors of the product alike, which keeps M exactly symmetric
            solved[f"{name}_inverse"] = inverse.baddbmm_(mv, mv.mT, beta=beta, alpha=alpha)
        return solved

    def _blended(self, old: Tensor | None, v: Tensor, share: float) -> Tensor:
        """A new (1 - share) M + share I in v's dtype; I without an old M."""
        if old is None:
            return torch.eye(v.shape[1], dtype=v.dtype, device=v.device).repeat(len(v), 1, 1)
        if self.rule == "code":
            large = old.abs().amax((1, 2), keepdim=True) > 2.0
            old = torch.where(large, torch.eye(v.shape[1], dtype=old.dtype, device=old.device), old)
        new = old.to(v.dtype) * (1.0 - share)
        new.diagonal(dim1=1, dim2=2).add_(share)
        return new

    def precondition(
        self, gradient: Tensor, state: State, shape: LayerShape, damping: float, work: Workspace | None = None
    ) -> Tensor:
        work = Workspace() if work is None else work
        a, g = state["A_inverse"], state["G_inverse"]
        operand = work.cast("operand", gradient, a.dtype)
        half = torch.bmm(operand, a, out=work.like("right", operand))
        update = work.cast("update", torch.bmm(g, half, out=work.like("left", operand)), gradient.dtype)
        return with_length_of(update, gradient, work)

    def needs_output_means(self, shape: LayerShape) -> bool:
        return True

    def quadratic(self, delta: Tensor, state: State, shape: LayerShape) -> Tensor:
        right = torch.linalg.solve(state["A_inverse"].to(delta.dtype), delta.mT).mT
        return (delta * torch.linalg.solve(state["G_inverse"].to(delta.dtype), right)).sum()

    def cost(self, shape: LayerShape) -> Cost:
        """Flops: a + o a row, 5 (a^2 + o^2) a refresh, 2 a o (a + o) for one gradient."""
        p, a, o = shape.blocks, shape.inputs, shape.outputs
        return Cost(float(p * (a + o)), 5.0 * p * (a * a + o * o), 2.0 * shape.parameters * (a + o))


Coefficients = tuple[float, float, Tensor]


def _exact(vmv: Tensor, c: float) -> Coefficients:
    return 1 / c, -1.0, (1 - c) / (c * (c + (1 - c) * vmv))


def _code(vmv: Tensor, c: float) -> Coefficients:
    return 1.0, -1.0, 1 / (1 + vmv)


def _printed(vmv: Tensor, c: float) -> Coefficients:
    return c, 1.0, (1 - c) / (c * c * (1 + c * (1 - c) * vmv))


RULES: dict[str, Callable[[Tensor, float], Coefficients]] = {"exact": _exact, "code": _code, "printed": _printed}
"""beta, alpha and weight [p, 1, 1] of M <- beta M + alpha weight (M v)(M v)^T, from v^T M v and the memory."""
