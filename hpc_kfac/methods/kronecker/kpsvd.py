"""KPSVD: the nearest Kronecker products to a layer's Fisher block in Frobenius norm (Koroko et al. 2023).

Rearranged, a block is a matrix whose singular pairs are its best Kronecker factors (Van Loan & Pitsianis 1993). Each
statistics step takes one step of the power iteration A <- E[(g^T G g) x x^T], G <- E[(x^T A x) g g^T] with the running
factors of unit norm as weights. So there is no further pass over the data. Positions count as samples.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from torch import Tensor

from hpc_kfac.linalg.solve import named_factor, relative_eigh
from hpc_kfac.linalg.structure import Dense
from hpc_kfac.linalg.workspace import Workspace
from hpc_kfac.methods.kronecker.factored import EIGH, INVERSE
from hpc_kfac.methods.kronecker.kfac import KFAC
from hpc_kfac.methods.method import Cost, Over, State, StateSpec, Terms

if TYPE_CHECKING:
    from hpc_kfac.layers.batch import LayerBatch, LayerShape

FLOOR = 0.1
"""Least value of 1 + t s: the sum of two products need not be positive where the second one is negative."""


@dataclass(frozen=True, kw_only=True)
class KPSVD(KFAC):
    """KPSVD: one or two Kronecker products fitted to the curvature.

    With two, F + damping is (G1 kron A1 damped as by K-FAC's cholesky solver) + G2 kron A2, which one basis per side
    diagonalises: K_A^T A1 K_A = I and K_A^T A2 K_A = diag(s), K_G and t likewise, and so
    U = K_G [(K_G^T D K_A) / (1 + t s^T)] K_A^T.

    The settings are those of `KFAC` for the cholesky solver and power 1, and

    Args:
        terms: number of products; the second one is there from the third statistics on.
        first: "best" for the nearest product; "kfac" for K-FAC's own, to which the second one is a correction.

    Raises:
        ValueError: a setting out of range.
    """

    name: ClassVar[str] = "kpsvd"
    terms: Literal[1, 2] = 1
    first: Literal["best", "kfac"] = "best"

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.solver, self.power) != ("cholesky", 1.0):
            raise ValueError(f"solver is {self.solver!r} and power {self.power}; KPSVD is for cholesky and 1.0")
        if self.first not in ("best", "kfac") or self.terms not in (1, 2):
            raise ValueError(f"terms is {self.terms} and first {self.first!r}; choose 1 or 2, and best or kfac")
        if (self.terms, self.first) == (1, "kfac"):
            raise ValueError("terms is 1 and first 'kfac', which is K-FAC: take that, or terms 2")

    def state(self, shape: LayerShape) -> tuple[StateSpec, ...]:
        if not self._fitted(shape):
            return super().state(shape)
        # Every rank weighs with the same factors, so they are reduced with every statistics step.
        running = [replace(spec, reduce_at="statistics") for spec in self.factor_specs(shape)]
        if self.terms == 1:
            return (*running, *(spec for spec in super().state(shape) if spec.role == "solved"))
        running += [replace(spec, name=spec.name + "2", over="terms") for spec in running]
        solved = [
            spec
            for name, _, d in self.sides(shape)
            for spec in (
                StateSpec(f"{name}_basis", (shape.blocks, d, d), "solved", operand=self.is_large(shape), part=name),
                StateSpec(f"{name}_values", (shape.blocks, d), "solved", part=name),
            )
        ]
        return (*running, *solved)

    def _fitted(self, shape: LayerShape) -> bool:
        """Whether there are two dense factors; other layers are K-FAC's."""
        return [type(structure) for _, structure, _ in self.sides(shape)] == [Dense, Dense]

    def over(self, side: str, shape: LayerShape) -> Over:
        return "terms" if self._fitted(shape) and self.first == "best" else super().over(side, shape)

    def statistics(self, batch: LayerBatch, state: State, shape: LayerShape) -> State:
        return self.complete(self.collect(batch, state, shape), Terms.of(batch), state, shape)

    def collect(self, batch: LayerBatch, state: State, shape: LayerShape) -> State:
        if not self._fitted(shape):
            return super().statistics(batch, state, shape)
        fresh: State = {}
        if self.first == "kfac":
            fresh |= super().statistics(batch, state, shape)
        else:
            fresh["A"], fresh["G"] = self._iterate(batch, state, shape)
        if self.terms == 2 and "A" in state:
            g2, a2, _ = self._second(state, shape)
            fresh["A2"], fresh["G2"] = batch.paired_moments(g2, a2, Dense(), Dense())
        return fresh

    def complete(self, merged: State, terms: Terms, state: State, shape: LayerShape) -> State:
        fresh = super().complete(merged, terms, state, shape)
        if self.terms == 1 or not self._fitted(shape):
            return fresh
        if "A" not in state:
            return {**fresh, **{f"{name}2": torch.zeros_like(fresh[name]) for name in ("A", "G")}}
        g2, a2, first = self._second(state, shape)
        fresh["A2"] = fresh["A2"] - _inner(first["G"], g2) * first["A"]
        fresh["G2"] = fresh["G2"] - _inner(first["A"], a2) * first["G"]
        return fresh

    def _second(self, state: State, shape: LayerShape) -> tuple[Tensor, Tensor, State]:
        """G2 and A2 of unit norm, and the first product's factors.

        They are for a step of the power iteration for what the first product leaves of the curvature.

        It starts with one side, the other follows a step later, from what all ranks have: two sides that start apart,
        or from a rank's own samples, may come out with opposite signs.
        """
        first = self.factors(state, shape)
        begun = _inner(state["G2"], state["G2"]) > 0
        return torch.where(begun, _unit(state["G2"]), _unit(_start(first["G"]))), _unit(state["A2"]), first

    @staticmethod
    def _iterate(batch: LayerBatch, state: State, shape: LayerShape) -> tuple[Tensor, Tensor]:
        if "A" in state:
            return batch.paired_moments(_unit(state["G"]), _unit(state["A"]), Dense(), Dense())
        a, g = batch.paired_moments(None, None, Dense(), Dense())  # identities, here of unit norm
        return a / shape.outputs**0.5, g / shape.inputs**0.5

    def factors(self, state: State, shape: LayerShape) -> State:
        if not self._fitted(shape) or self.first == "kfac":
            return super().factors(state, shape)
        return _shared(state["A"], state["G"], "")

    def refresh(self, state: State, shape: LayerShape, damping: float, part: str | None = None) -> State:
        if not self._fitted(shape) or self.terms == 1:
            return super().refresh(state, shape, damping, part)
        factors = self.factors(state, shape)
        second = _shared(state["A2"], state["G2"], "2")
        dampings = self.split_damping(factors, shape, damping)
        result: State = {}
        for name in ("A", "G") if part is None else (part,):
            with named_factor(name):
                values, basis = relative_eigh(second[name + "2"], factors[name], dampings[name])
            result |= {f"{name}_values": values, f"{name}_basis": basis}
        return result

    def precondition(
        self, gradient: Tensor, state: State, shape: LayerShape, damping: float, work: Workspace | None = None
    ) -> Tensor:
        if not self._fitted(shape) or self.terms == 1:
            return super().precondition(gradient, state, shape, damping, work)
        work = Workspace() if work is None else work
        t, s = (work.cast(f"{name} values", state[f"{name}_values"], gradient.dtype) for name in ("G", "A"))
        grid = torch.mul(t.unsqueeze(2), s.unsqueeze(1), out=work.like("damped", gradient))
        grid.add_(work.number("one", 1.0, grid.dtype, grid.device)).clamp_(min=FLOOR)
        return self.divide_in_basis(gradient, grid, state, shape, work)

    def is_damped(self, shape: LayerShape) -> bool:
        """Not with two products, whose sum may be negative where a floor keeps it from the update."""
        return not self._fitted(shape) or self.terms == 1

    def quadratic(self, delta: Tensor, state: State, shape: LayerShape) -> Tensor:
        total = super().quadratic(delta, state, shape)
        if self._fitted(shape) and self.terms == 2:
            found = _shared(state["A2"], state["G2"], "2")
            second = {name: factor.to(delta.dtype) for name, factor in found.items()}
            total = total + (delta * (second["G2"] @ delta @ second["A2"])).sum()
        return total

    def cost(self, shape: LayerShape) -> Cost:
        """Flops: 4 (a^2 + o^2) a row and fitted term; two terms take 13 n^3 a refresh, 4 a o (a + o) a gradient."""
        if not self._fitted(shape):
            return super().cost(shape)
        own = self.statistics_flops(shape)
        plain = super().cost(shape)
        if self.terms == 1:
            return Cost(2 * own, plain.refresh, plain.precondition)
        statistics = 2 * own + (own if self.first == "kfac" else 2 * own)
        refresh = self.solve_flops(shape, EIGH + 4 * INVERSE)
        return Cost(statistics, refresh, 2 * self.product_flops(shape, rotations_only=True) + 3.0 * shape.parameters)

    def refresh_flops(self, shape: LayerShape, part: str) -> float:
        factor = INVERSE if self.terms == 1 or not self._fitted(shape) else EIGH + 4 * INVERSE
        return self.solve_flops(shape, factor, part)


def _norm(matrix: Tensor) -> Tensor:
    """Frobenius norm of each block, [p, 1, 1]; 1 for a zero."""
    norm = torch.linalg.matrix_norm(matrix, keepdim=True)
    return torch.where(norm > 0, norm, torch.ones_like(norm))


def _unit(matrix: Tensor) -> Tensor:
    return matrix / _norm(matrix)


def _inner(left: Tensor, right: Tensor) -> Tensor:
    """Inner product of each block's matrices, [p, 1, 1]."""
    return (left * right).sum((1, 2), keepdim=True)


def _start(first: Tensor) -> Tensor:
    """The identity without its share of the first factor: the power iteration must not start at what was taken out."""
    eye = torch.eye(first.shape[-1], dtype=first.dtype, device=first.device).expand_as(first)
    unit = _unit(first)
    return eye - _inner(eye, unit) * unit


def _shared(a: Tensor, g: Tensor, suffix: str) -> State:
    """A pair whose product is sigma u v^T, from averages sigma u and sigma v."""
    root = (_norm(a) * _norm(g)).sqrt().sqrt()
    return {"A" + suffix: a / root, "G" + suffix: g / root}
