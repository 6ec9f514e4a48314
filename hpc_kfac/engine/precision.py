"""Dtypes by role."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from hpc_kfac.methods.method import StateSpec

SCALED = (torch.float16, torch.int8)
"""Payloads that need factors scaled to unit diagonal, whose sums then stay within [-1, 1]."""


@dataclass(frozen=True)
class Precision:
    """Dtypes by role.

    Args:
        factors: running averages and the statistics folded into them.
        solve: decompositions and their results.
        apply: the matrices multiplied with the gradient on every step. A layer for which this would turn the update, by
            more than a tenth of its length, goes on with ``solve`` until the next refresh: asked of the first gradient
            after each.
        payload: symmetric factors while they are reduced: as wide as ``factors`` if None, or bfloat16, float16, int8.
            The last two send the diagonal apart, in full, and the rest scaled to unit diagonal; int8 also damps by the
            norm of its rounding noise.
        moments: rows that are multiplied into factors: None for ``factors``, or bfloat16 with sums in float32.

    Raises:
        ValueError: a payload or moments of another dtype.
    """

    factors: torch.dtype = torch.float32
    solve: torch.dtype = torch.float32
    apply: torch.dtype = torch.float32
    payload: torch.dtype | None = None
    moments: torch.dtype | None = None

    def __post_init__(self) -> None:
        if self.payload not in (None, self.wire, torch.bfloat16, *SCALED):
            raise ValueError(f"precision.payload is {self.payload}; use {self.wire}, bfloat16, float16 or int8")
        if self.moments not in (None, self.factors, torch.bfloat16):
            raise ValueError(f"precision.moments is {self.moments}; use {self.factors} or bfloat16")

    def stored(self, spec: StateSpec) -> torch.dtype:
        """The dtype a state tensor is kept in."""
        if spec.role == "running":
            return self.factors
        return self.apply if spec.operand else self.solve

    def sent(self, spec: StateSpec) -> torch.dtype:
        """The dtype a state tensor is made and sent in; whoever applies it finds out whether it can be kept in less."""
        return self.factors if spec.role == "running" else self.solve

    @property
    def wire(self) -> torch.dtype:
        """The dtype of reductions and updates: MPI cannot add half-precision numbers by itself."""
        return torch.promote_types(self.factors, torch.float32)

    @property
    def scaled(self) -> bool:
        """Whether factors travel with unit diagonal."""
        return self.payload in SCALED
