"""K-FAC: the curvature of a layer as a Kronecker product of two factors (Martens & Grosse 2015).

F is replaced by kron(G, A) with the activation factor A = E[x x^T] and the gradient factor G = E[g g^T], g the gradient
of a sample's own loss. One-sided, diagonal, block-diagonal and spatially uncorrelated factors are structures of A, G.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from torch import Tensor

from hpc_kfac.linalg.solve import named_factor
from hpc_kfac.linalg.workspace import Workspace
from hpc_kfac.methods.kronecker.factored import COMPOSE, EIGH, INVERSE
from hpc_kfac.methods.kronecker.kronecker import Kronecker, mean_or_one
from hpc_kfac.methods.method import Cost, State, StateSpec

if TYPE_CHECKING:
    from hpc_kfac.layers.batch import LayerShape


@dataclass(frozen=True, kw_only=True)
class KFAC(Kronecker):
    """K-FAC: F = kron(G, A), damped and inverted factor by factor or in its eigenbasis.

    Args:
        damping: added to the curvature, in units of kron(G, A), or a `Damping`; None for 0.1, by default of the mean.
        decay: weight of the old value in the running factors.
        solver: "eigen" damps the Kronecker product exactly: U = Q_G [(Q_G^T D Q_A) / (d_G d_A^T + damping)] Q_A^T.
            "cholesky" damps each factor, (G + sqrt(damping)/pi I)^-1 D (A + pi sqrt(damping) I)^-1 with
            pi^2 = (tr A / a) / (tr G / o); half the work when applied and far less in a refresh.
        power: 1 for the inverse; 0.5 for factors to the power -1/2, each damped alone as for "cholesky".
        input_structure: "dense", "block", "diagonal", or "identity" for no preconditioning on the input side.
        output_structure: the same for the output side; "identity" needs no gradient statistics (FOOF, Benzing 2022).
        block_size: rows of a block for "block".
        spatially_uncorrelated: convolutions keep channel correlations only (Grosse & Martens 2016).
        diagonal_above: a side with more rows than this keeps its diagonal only.
        relative_damping: damping is a share: of the mean eigenvalue of kron(G, A) for power 1, of the mean eigenvalue
            of each factor for power 0.5. None: only if damping is None.

    Raises:
        ValueError: a setting out of range.
    """

    name: ClassVar[str] = "kfac"
    solver: Literal["eigen", "cholesky"] = "cholesky"
    power: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.solver not in ("eigen", "cholesky"):
            raise ValueError(f"solver is {self.solver!r}; choose eigen or cholesky")
        if self.power not in (0.5, 1.0):
            raise ValueError(f"power is {self.power}; choose 1.0 or 0.5")

    @property
    def _exact(self) -> bool:
        """Whether damping is added to the Kronecker product itself, at precondition time."""
        return self.solver == "eigen" and self.power == 1.0

    @property
    def _solve_factor(self) -> float:
        """Flops of a decomposition in units of n^3."""
        if self._exact:
            return EIGH
        return INVERSE if self.power == 1.0 else EIGH + COMPOSE

    @property
    def _solved_name(self) -> str:
        return "inverse" if self.power == 1.0 else "root"

    def state(self, shape: LayerShape) -> tuple[StateSpec, ...]:
        specs = self.factor_specs(shape)
        if self._exact:
            specs += self.basis_specs(shape, lives="workers")
            specs += [
                StateSpec(f"{name}_values", (shape.blocks, d), "solved", part=name) for name, _, d in self.sides(shape)
            ]
        else:
            specs += self.side_specs(shape, self._solved_name)
            specs += [
                StateSpec(f"{name}_damping", (shape.blocks,), "solved", part=name, needed=False)
                for name, _, _ in self.sides(shape)
            ]
        return tuple(specs)

    def parts(self, shape: LayerShape) -> tuple[str, ...]:
        return tuple(name for name, _, _ in self.sides(shape))

    def part_of(self, side: str) -> str:
        return side

    def refresh_flops(self, shape: LayerShape, part: str) -> float:
        return self.solve_flops(shape, self._solve_factor, part)

    @property
    def refresh_damps(self) -> bool:
        return not self._exact

    def refresh(self, state: State, shape: LayerShape, damping: float, part: str | None = None) -> State:
        if self._exact:
            return self.decompose(state, shape, part)
        factors = self.factors(state, shape)
        dampings = self.split_damping(factors, shape, damping)
        result: State = {}
        for name, structure, _ in self.sides(shape):
            if part is not None and part != name:
                continue
            solve = structure.inverse if self.power == 1.0 else structure.inverse_root
            with named_factor(name):
                result[f"{name}_{self._solved_name}"] = solve(factors[name], dampings[name])
            result[f"{name}_damping"] = factors[name].new_zeros(shape.blocks) + dampings[name]
        return result

    def split_damping(self, factors: State, shape: LayerShape, damping: float) -> dict[str, Tensor | float]:
        """Damping of each factor, [p] where it depends on traces."""
        sides = self.sides(shape)
        means = {name: mean_or_one(structure.trace(factors[name], d) / d) for name, structure, d in sides}
        if self.relative_damping and self.power == 0.5:
            return {name: damping * mean for name, mean in means.items()}
        if len(sides) < 2:  # the identity on the other side leaves the product equal to this factor
            return {name: damping * (mean if self.relative_damping else 1.0) for name, mean in means.items()}
        root = damping**0.5 * (means["A"] * means["G"]).sqrt() if self.relative_damping else damping**0.5
        pi = (means["A"] / means["G"]).sqrt()
        return {"A": root * pi, "G": root / pi}

    def precondition(
        self, gradient: Tensor, state: State, shape: LayerShape, damping: float, work: Workspace | None = None
    ) -> Tensor:
        work = Workspace() if work is None else work
        if not self.sides(shape):
            scale = work.number("damping", (1.0 + damping) ** self.power, gradient.dtype, gradient.device)
            return torch.div(gradient, scale, out=work.like("update", gradient))
        if self._exact:
            damped = self._damped_values(state, shape, damping, gradient.dtype, work)
            return self.divide_in_basis(gradient, damped, state, shape, work)
        a_solved, g_solved = self._by_side(state, shape, "_" + self._solved_name)
        return work.cast("update", self.two_sided(gradient, g_solved, a_solved, shape, work), gradient.dtype)

    def _by_side(self, state: State, shape: LayerShape, suffix: str) -> tuple[Tensor | None, Tensor | None]:
        """The A and the G tensor of a kind, None for an identity."""
        found = {name: state[name + suffix] for name, _, _ in self.sides(shape)}
        return found.get("A"), found.get("G")

    def _damped_values(
        self, state: State, shape: LayerShape, damping: float, dtype: torch.dtype, work: Workspace
    ) -> Tensor:
        """d_G d_A^T + damping, broadcasting to [p, o, a]."""
        a_values, g_values = self._by_side(state, shape, "_values")
        a = None if a_values is None else work.cast("A values", a_values, dtype).unsqueeze(1)
        g = None if g_values is None else work.cast("G values", g_values, dtype).unsqueeze(2)
        sides = [side for side in (g, a) if side is not None]
        size = (shape.blocks, 1 if g is None else shape.outputs, 1 if a is None else shape.inputs)
        damped = work.take("damped", size, dtype, sides[0].device)
        values = sides[0] if g is None or a is None else torch.mul(g, a, out=damped)
        return torch.add(values, self.spread_damping(damping, sides, work), out=damped)

    def quadratic(self, delta: Tensor, state: State, shape: LayerShape) -> Tensor:
        a_factor, g_factor = self._by_side(self.factors(state, shape), shape, "")
        work = Workspace()
        left = self.two_sided(delta, g_factor, None, shape, work)
        return (left * self.two_sided(delta, None, a_factor, shape, work)).sum()

    def is_damped(self, shape: LayerShape) -> bool:
        return self.power == 1.0

    def damping_form(self, delta: Tensor, state: State, shape: LayerShape, damping: float) -> Tensor:
        """With damping I, or with what damped factors add: kron(G, b I) + kron(c I, A) + b c I."""
        if not self.sides(shape):
            return damping * delta.square().sum()
        if self._exact:
            values = [state[f"{name}_values"].unsqueeze(2) for name, _, _ in self.sides(shape)]
            spread = self.spread_damping(damping, values, Workspace())
            return (spread.to(delta.dtype) * delta.square()).sum()
        factors = self.factors(state, shape)
        a_damping, g_damping = (
            0.0 if side is None else side.to(delta.dtype)[:, None, None]
            for side in self._by_side(self._applied(factors, state, shape, damping), shape, "")
        )
        a_factor, g_factor = self._by_side(factors, shape, "")
        work = Workspace()
        left = a_damping * self.two_sided(delta, g_factor, None, shape, work)
        right = g_damping * self.two_sided(delta, None, a_factor, shape, work)
        return (delta * (left + right + a_damping * g_damping * delta)).sum()

    def _applied(self, factors: State, state: State, shape: LayerShape, damping: float) -> State:
        """The damping [p] of each factor in the last refresh; this step's where an older checkpoint tells none."""
        now = self.split_damping(factors, shape, damping)
        return {name: state.get(f"{name}_damping", factors[name].new_zeros(shape.blocks) + now[name]) for name in now}

    def cost(self, shape: LayerShape) -> Cost:
        """Flops of dense factors: statistics 2 (a^2 + o^2) for a row, eigh 9 n^3, Cholesky inverse n^3, root 11 n^3,
        gradient 4 a o (a + o) with the eigen solver and half of that with one matrix a side."""
        elementwise = 3.0 * shape.parameters
        refresh = self.solve_flops(shape, self._solve_factor)
        if self._exact:
            precondition = 2 * self.product_flops(shape, rotations_only=True) + elementwise
        else:
            precondition = self.product_flops(shape, rotations_only=False)
        return Cost(self.statistics_flops(shape), refresh, precondition)
