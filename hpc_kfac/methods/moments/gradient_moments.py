"""Shampoo, and what it shares with SOAP: moments of the averaged gradient, so that no sample is looked at.

With the gradient D [o, a] of a layer the factors are G = E[D D^T] and A = E[D^T D], over steps.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from torch import Tensor

from hpc_kfac.linalg.scaling import with_length_of
from hpc_kfac.linalg.solve import named_factor
from hpc_kfac.linalg.workspace import Workspace
from hpc_kfac.methods.kronecker.factored import COMPOSE, EIGH
from hpc_kfac.methods.kronecker.kronecker import Kronecker, mean_or_one
from hpc_kfac.methods.method import Cost, State, StateSpec
from hpc_kfac.options.damping import Damping
from hpc_kfac.options.step_control import FixedNorm
from hpc_kfac.options.wants import Wants

if TYPE_CHECKING:
    from hpc_kfac.layers.batch import LayerBatch, LayerShape


@dataclass(frozen=True, kw_only=True)
class GradientMoments(Kronecker):
    """A method on G = E[D D^T] and A = E[D^T D]; the settings are those of `Kronecker`.

    Args:
        accumulate: factors are sums over steps, as in AdaGrad, and decay has no effect.
    """

    reads: ClassVar[Literal["samples", "gradients"]] = "gradients"
    accumulate: bool = False

    def factor_specs(self, shape: LayerShape) -> list[StateSpec]:
        return [
            StateSpec(name, structure.shape(shape.blocks, d), "running", lives="workers", symmetric=structure.symmetric)
            for name, structure, d in self.sides(shape)
        ]

    def statistics(self, batch: LayerBatch, state: State, shape: LayerShape) -> State:
        raise TypeError(f"{type(self).__name__} reads no samples")

    def fold_gradient(self, running: State, solved: State, gradient: Tensor, shape: LayerShape) -> None:
        fresh = self.gradient_moments(gradient, shape)
        if self.accumulate:
            for name, moment in fresh.items():
                running[name] = running[name] + moment if name in running else moment
        else:
            self.fold(running, fresh, self.decay)

    def statistics_flops(self, shape: LayerShape) -> float:
        """None for a row of a batch; a step's moments take 2 a o (a + o)."""
        return 0.0


@dataclass(frozen=True, kw_only=True)
class Shampoo(GradientMoments):
    """Shampoo (Gupta et al. 2018; Anil et al. 2020): U = G^(-1/2k) D A^(-1/2k) for k sides that have a factor.

    Large sides can be left out (`input_structure: identity`), kept diagonal (`diagonal_above`) or in blocks.

    Args:
        damping: added to the eigenvalues of each factor, or a `Damping`.
        decay: weight of the old value in the running factors.
        input_structure: "dense", "block", "diagonal" or "identity".
        output_structure: the same for the output side.
        block_size: rows of a block for "block".
        spatially_uncorrelated: has no meaning here; must be false.
        diagonal_above: a side with more rows than this keeps its diagonal only.
        relative_damping: damping is a share of the mean eigenvalue of each factor.
        accumulate: factors are sums over steps, as in AdaGrad, and decay has no effect.
        graft: length of a layer's update: "none" leaves it, "sgd" takes the gradient's, "rmsprop" and "adagrad" that of
            D / sqrt(E[D^2]) and D / sqrt(sum D^2). A step control that fixes lengths makes it void.

    Raises:
        ValueError: a setting out of range.
    """

    name: ClassVar[str] = "shampoo"
    wants = Wants(
        statistics=1,
        refresh=10,
        step_control=FixedNorm(),
        why="moments of every gradient, roots now and then (Gupta et al. 2018; Anil et al. 2020)",
    )
    damping: float | Damping | None = 1e-4
    relative_damping: bool | None = True
    graft: Literal["none", "sgd", "rmsprop", "adagrad"] = "none"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.graft not in ("none", "sgd", "rmsprop", "adagrad"):
            raise ValueError(f"graft is {self.graft!r}; choose none, sgd, rmsprop or adagrad")
        if self.spatially_uncorrelated:
            raise ValueError("spatially_uncorrelated is true; Shampoo has factors of gradients, not of inputs")

    def state(self, shape: LayerShape) -> tuple[StateSpec, ...]:
        squares = [StateSpec("squares", (shape.blocks, shape.outputs, shape.inputs), "running", lives="workers")]
        return (*self.factor_specs(shape), *(squares if self._counts_squares else []), *self.side_specs(shape, "root"))

    @property
    def _counts_squares(self) -> bool:
        return self.graft in ("rmsprop", "adagrad")

    def fold_gradient(self, running: State, solved: State, gradient: Tensor, shape: LayerShape) -> None:
        super().fold_gradient(running, solved, gradient, shape)
        if self._counts_squares:
            fresh = gradient.square()
            if self.graft == "adagrad" and "squares" in running:
                fresh += running["squares"]
            self.fold(running, {"squares": fresh}, 0.0 if self.graft == "adagrad" else self.decay)

    def parts(self, shape: LayerShape) -> tuple[str, ...]:
        return tuple(name for name, _, _ in self.sides(shape)) or ("",)

    def refresh_flops(self, shape: LayerShape, part: str) -> float:
        return self.solve_flops(shape, EIGH + COMPOSE, part)

    def refresh(self, state: State, shape: LayerShape, damping: float, part: str | None = None) -> State:
        sides, result = self.sides(shape), {}
        for name, structure, d in sides:
            if part is None or part == name:
                mean = mean_or_one(structure.trace(state[name], d) / d)
                shift = damping * mean if self.relative_damping else damping
                with named_factor(name):
                    result[f"{name}_root"] = structure.inverse_root(state[name], shift, 2 * len(sides))
        return result

    def precondition(
        self, gradient: Tensor, state: State, shape: LayerShape, damping: float, work: Workspace | None = None
    ) -> Tensor:
        work = Workspace() if work is None else work
        roots = {name: state[f"{name}_root"] for name, _, _ in self.sides(shape)}
        product = self.two_sided(gradient, roots.get("G"), roots.get("A"), shape, work)
        update = work.cast("update", product, gradient.dtype)
        if self.graft == "none":
            return update
        like = gradient
        if self._counts_squares:
            squares = work.cast("squares", state["squares"], gradient.dtype)
            least = torch.finfo(squares.dtype).tiny ** 0.5  # below it squares vanish
            root = torch.sqrt(squares, out=work.like("like", squares)).clamp_(min=least)
            like = torch.div(gradient, root, out=root)
        if update is gradient:  # no side has a factor
            update = work.like("update", gradient).copy_(gradient)
        return with_length_of(update, like, work)

    def quadratic(self, delta: Tensor, state: State, shape: LayerShape) -> Tensor:
        """With kron(G, A)^(1/k): the matrix whose inverse root, of k sides, the update is made with."""
        sides = self.sides(shape)
        for name, structure, d in sides:
            values, basis = structure.eigh(state[name].to(delta.dtype), d)
            scale = values.pow(0.5 / len(sides)).unsqueeze(1)
            turned = structure.rotate_right((delta if name == "A" else delta.mT).contiguous(), basis) * scale
            delta = turned if name == "A" else turned.mT
        return delta.square().sum()

    def cost(self, shape: LayerShape) -> Cost:
        """Flops: root 11 n^3 a side and refresh, 2 a o (a + o) for one gradient; as much for its moments."""
        return Cost(0.0, self.solve_flops(shape, EIGH + COMPOSE), self.product_flops(shape, rotations_only=False))
