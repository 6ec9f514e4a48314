"""What methods share that work with rows of the latest samples in place of moments."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch.nn.functional as F
from torch import Tensor

from hpc_kfac.damping import Damping
from hpc_kfac.methods.method import Method, State, StateSpec

if TYPE_CHECKING:
    from hpc_kfac.layers.batch import LayerBatch, LayerShape


@dataclass(frozen=True, kw_only=True)
class SampleRows(Method):
    """Keeps X [p, n, a] and R [p, n, o] of the latest batch and gathers those of all ranks.

    Args:
        damping: added to the curvature, or a `Damping`; the value of the last refresh counts.
        decay: has no effect, rows are replaced and not averaged.
        rows: that each rank contributes; a batch with fewer leaves the rest empty.
        positions: "sum" makes one row of a sample: x averaged and g summed over its positions; "subsample" takes
            positions apart, evenly spread.

    Raises:
        ValueError: a setting out of range.
    """

    damping: float | Damping | None = 0.03
    decay: float = 0.0
    rows: int = 64
    positions: Literal["sum", "subsample"] = "sum"

    def __post_init__(self) -> None:
        self._check()
        if self.rows < 1:
            raise ValueError(f"rows is {self.rows}; give at least 1 row a rank")
        if self.positions not in ("sum", "subsample"):
            raise ValueError(f"positions is {self.positions!r}; choose sum or subsample")

    def row_specs(self, shape: LayerShape) -> tuple[StateSpec, ...]:
        """X, R, and a 1 for each row that is no padding."""
        sizes = {"X": shape.inputs, "R": shape.outputs, "valid": 1}
        return tuple(
            StateSpec(name, (shape.blocks, self.rows, d), "running", reduce="gather", lives="all", rank_axes=(1,))
            for name, d in sizes.items()
        )

    def kernel_specs(self, shape: LayerShape, sizes: Mapping[str, int]) -> tuple[StateSpec, ...]:
        """Rows of these sizes as they were at a refresh, and what is solved through their kernel."""
        p, n = shape.blocks, self.rows
        return (
            *(StateSpec(f"{name}_solved", (p, n, d), "solved", rank_axes=(1,)) for name, d in sizes.items()),
            StateSpec("kernel_inverse", (p, n, n), "solved", symmetric=True, rank_axes=(1, 2)),
            StateSpec("kernel_damping", (p,), "solved"),
        )

    def statistics(self, batch: LayerBatch, state: State, shape: LayerShape) -> State:
        inputs, outputs = self.take_rows(batch, self.rows)
        return self.padded({"X": inputs, "R": outputs})

    def take_rows(self, batch: LayerBatch, limit: int) -> tuple[Tensor, Tensor]:
        """At most so many rows of a batch, of samples or of positions."""
        return (batch.rows if self.positions == "sum" else batch.position_rows)(limit)

    def padded(self, found: State) -> State:
        """Rows [p, n, d] with zeros after them, and which ones are no padding."""
        first = next(iter(found.values()))
        found = {**found, "valid": first.new_ones(*first.shape[:2], 1)}
        return {name: F.pad(rows, (0, 0, 0, self.rows - rows.shape[1])) for name, rows in found.items()}

    def fold(self, state: State, fresh: State, decay: float) -> None:
        """Replaces the rows."""
        state.update(fresh)


def samples(state: State) -> Tensor:
    """Rows in use, [p, 1, 1]; at least 1."""
    return state["valid"].sum(1, keepdim=True).clamp_min(1.0)
