"""What a curvature method is: a table of the state it needs and stateless functions over that state."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from torch import Tensor

from hpc_kfac.damping import Damping, positive
from hpc_kfac.linalg.workspace import Workspace

if TYPE_CHECKING:
    from hpc_kfac.layers.batch import LayerBatch, LayerShape

State = dict[str, Tensor]


@dataclass(frozen=True)
class StateSpec:
    """One tensor of a layer's state. Buffers, collectives, checkpoints and memory figures are derived from it.

    Args:
        name: key in the state.
        shape: its shape; for `reduce="gather"` what one rank contributes.
        role: "running" averages are filled by `statistics` and `fold`, "solved" tensors by `refresh`.
        reduce: how ranks are combined (running only): averaged, concatenated along axis 1 in rank order, or not.
        reduce_at: when: before a refresh, or at every statistics step, before folding.
        lives: which ranks hold it.
        symmetric: the last two axes are symmetric and may be sent as a packed triangle.
        rebased: a running tensor that refresh rewrites; it is broadcast with the solved ones.
        operand: multiplied with gradients in the application dtype; the others keep the solve dtype, as do the operands
            of products that are too small to gain from another one.
        rank_axes: axes that are longer by the number of ranks once rows have been gathered.
        part: solved only: which of `Method.parts` makes it.
    """

    name: str
    shape: tuple[int, ...]
    role: Literal["running", "solved"]
    reduce: Literal["mean", "gather", "none"] = "none"
    reduce_at: Literal["refresh", "statistics"] = "refresh"
    lives: Literal["all", "workers", "owner"] = "workers"
    symmetric: bool = False
    rebased: bool = False
    operand: bool = False
    rank_axes: tuple[int, ...] = ()
    part: str = ""

    def full_shape(self, ranks: int) -> tuple[int, ...]:
        """Shape when this many ranks have contributed."""
        return tuple(n * ranks if axis in self.rank_axes else n for axis, n in enumerate(self.shape))


@dataclass(frozen=True)
class Cost:
    """Floating-point operations of one layer (a multiply and an add are two).

    Args:
        statistics: for one row, that is one position of one sample.
        refresh: one refresh on the owner.
        precondition: one gradient.
    """

    statistics: float
    refresh: float
    precondition: float


class Method(ABC):
    """A curvature method. Stateless: the same object serves all layers and ranks.

    Every layer is a batch of p independent blocks with gradients D [p, o, a]. All functions are local; combining ranks
    is the caller's part, as the state table says.
    """

    damping: float | Damping | None
    decay: float

    @abstractmethod
    def state(self, shape: LayerShape) -> tuple[StateSpec, ...]:
        """The state table of a layer."""

    @abstractmethod
    def statistics(self, batch: LayerBatch, state: State, shape: LayerShape) -> State:
        """Fresh means of this rank's batch by the names of running specs; one that cannot be filled yet is omitted."""

    def fold(self, state: State, fresh: State, decay: float) -> None:
        """running = decay * running + (1 - decay) * fresh, in place; a name not yet in the state is taken as it is."""
        for name, value in fresh.items():
            if name in state:
                state[name].lerp_(value.to(state[name].dtype), 1.0 - decay)
            else:
                state[name] = value

    def parts(self, shape: LayerShape) -> tuple[str, ...]:
        """What of a layer can be decomposed apart, by different ranks; by default the layer is one part."""
        return ("",)

    def refresh_flops(self, shape: LayerShape, part: str) -> float:
        """Flops of one part's refresh."""
        return self.cost(shape).refresh / len(self.parts(shape))

    @abstractmethod
    def refresh(self, state: State, shape: LayerShape, damping: float, part: str | None = None) -> State:
        """The solved tensors and the re-based running ones, all new; the given state is not changed.

        Args:
            state: the running tensors, and the solved ones as far as there are any.
            shape: of the layer.
            damping: of this refresh.
            part: only what belongs to this part; None for all.

        Raises:
            torch.linalg.LinAlgError: a factor is not finite or cannot be decomposed.
        """

    @abstractmethod
    def precondition(
        self, gradient: Tensor, state: State, shape: LayerShape, damping: float, work: Workspace | None = None
    ) -> Tensor:
        """The preconditioned gradient, [p, o, a] -> [p, o, a]; the given one is not changed.

        Args:
            gradient: D, a tensor of its own or the workspace's "gradient".
            state: the solved tensors.
            shape: of the layer.
            damping: of this step.
            work: for everything that is needed meanwhile, and for the result, which is valid until the next call; a new
                one by default.
        """

    @abstractmethod
    def quadratic(self, delta: Tensor, state: State, shape: LayerShape) -> Tensor:
        """<delta, F delta> over all blocks, a scalar, with the method's undamped curvature F of the running tensors."""

    @abstractmethod
    def cost(self, shape: LayerShape) -> Cost:
        """Floating-point operations, from closed formulas."""

    def _check(self) -> None:
        """Checks the settings that all methods share; called at the end of construction."""
        if not isinstance(self.damping, Damping):
            positive("damping", self.damping)
        if not 0.0 <= self.decay < 1.0:
            raise ValueError(f"decay is {self.decay}; give the weight of the old average, from 0 up to below 1")
