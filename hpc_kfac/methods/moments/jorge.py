"""Jorge: Shampoo whose roots follow the gradients by matrix products alone (Singh et al. 2023)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from torch import Tensor

from hpc_kfac.linalg.solve import require_finite
from hpc_kfac.linalg.structure import Structure
from hpc_kfac.methods.kronecker.kronecker import mean_or_one
from hpc_kfac.methods.method import Cost, State
from hpc_kfac.methods.moments.gradient_moments import Shampoo
from hpc_kfac.options.damping import Damping
from hpc_kfac.options.wants import Wants

if TYPE_CHECKING:
    from hpc_kfac.layers.batch import LayerShape

PRODUCTS = 10.0
"""Flops of one update of a root in units of n^3: five products."""


@dataclass(frozen=True, kw_only=True)
class Jorge(Shampoo):
    """Jorge: M = L^(-1/2k) for k sides, where L = beta L + (1 - beta) S and S is D D^T or D^T D of one gradient.

    With r = 2k, X = M^r S and beta = |X| / (|X| + 1): M <- beta^(-1/r) M (I - Y/r + (1 + r) Y^2 / (2 r^2)),
    Y = X (1 - beta) / beta, made symmetric: the second-order series of (I + Y)^(-1/r), for M and S that commute.

    Args:
        damping: L starts at the first S and this share of its mean eigenvalue (or this value) times the identity, whose
            root takes the one decomposition that there is.
        decay: beta is at least this. The paper has 0, where the series errs most: in a commuting case L was off by a
            quarter, with 0.9 by 2 %.
        relative_damping: damping is a share of the mean eigenvalue of the first S.
        accumulate: has no meaning here; must be false.
        graft: the paper gives an update the length that SGD's has.

    Raises:
        ValueError: a setting out of range.
    """

    name: ClassVar[str] = "jorge"
    wants = Wants(
        refresh=10, why="M follows the latest gradient alone; with one of every step it diverged on the digits"
    )
    damping: float | Damping | None = 0.1
    decay: float = 0.9
    graft: Literal["none", "sgd", "rmsprop", "adagrad"] = "sgd"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.accumulate:
            raise ValueError("accumulate is true; Jorge's L is an average whose weights follow from the gradients")

    def fold(self, state: State, fresh: State, decay: float) -> None:
        """The latest S alone is kept; squares for grafting are averaged."""
        super().fold(state, fresh, decay if "squares" in fresh else 0.0)

    def refresh_flops(self, shape: LayerShape, part: str) -> float:
        return self.solve_flops(shape, PRODUCTS, part)

    def refresh(self, state: State, shape: LayerShape, damping: float, part: str | None = None) -> State:
        sides, result = self.sides(shape), {}
        for name, structure, d in sides:
            if part is None or part == name:
                require_finite(state[name], name)
                root = state.get(f"{name}_root")
                if root is None:
                    found = self._start(state[name], structure, d, damping, 2 * len(sides))
                else:
                    found = _followed(root.to(state[name].dtype), state[name], 2 * len(sides), self.decay)
                result[f"{name}_root"] = found
        return result

    def _start(self, moment: Tensor, structure: Structure, d: int, damping: float, root: int) -> Tensor:
        mean = mean_or_one(structure.trace(moment, d) / d)
        shift = damping * mean if self.relative_damping else damping
        return structure.inverse_root(moment, shift, root)

    def quadratic(self, delta: Tensor, state: State, shape: LayerShape) -> Tensor:
        sides = self.sides(shape)
        roots = {name: state[f"{name}_root"].to(delta.dtype) for name, _, _ in sides}
        return super().quadratic(delta, {name: _power(root, -2 * len(sides)) for name, root in roots.items()}, shape)

    def cost(self, shape: LayerShape) -> Cost:
        """Flops: 10 n^3 a side and refresh, 2 a o (a + o) for one gradient; as much for its moments."""
        return Cost(0.0, self.solve_flops(shape, PRODUCTS), self.product_flops(shape, rotations_only=False))


def _followed(m: Tensor, s: Tensor, r: int, least: float) -> Tensor:
    """M after S, both [p, ..., n, n], or [p, n] where they are diagonal."""
    diagonal = s.ndim == 2
    x = _power(m, r) * s if diagonal else _power(m, r) @ s
    norm = x.flatten(1).norm(dim=1).reshape(-1, *[1] * (x.ndim - 1))
    beta = (norm / (norm + 1)).clamp(min=max(least, torch.finfo(x.dtype).tiny))
    y = x * ((1 - beta) / beta)
    second = (1 + r) / (2 * r)
    if diagonal:
        grown = m * (1 - (y - second * y * y) / r)
    else:
        grown = m - m @ (y - second * (y @ y)) / r
        grown = (grown + grown.mT).mul_(0.5)
    return torch.where(norm > 0, grown * beta ** (-1 / r), m)  # without a gradient nothing is forgotten


def _power(m: Tensor, exponent: int) -> Tensor:
    return m**exponent if m.ndim == 2 else torch.linalg.matrix_power(m, exponent)
