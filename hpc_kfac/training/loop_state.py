"""How far a run has come: what is saved of the loop itself."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

SMOOTHING = 0.9
FIRST_STEPS = 10
"""So many steps tell what the loss was at the start."""


@dataclass
class Progress:
    """The loop's own state; plain values.

    Attributes:
        step: optimisation steps taken.
        epoch: that goes on.
        batch: the next one in it.
        seconds: of training.
        loss: smoothed over steps; None before the first.
        first_loss: smoothed, after the first steps.
        lowest_loss: smoothed.
        best_score: of all evaluations; higher is better.
        checkpoints: written or begun.
        epoch_loss: smoothed, at the end of the last epoch.
        rollbacks: how often the run went back after its loss had blown up.
        lr_scale: what the learning rate is multiplied with since.
        figures: of the last evaluation.
        strength: lowest median cosine between preconditioned and raw gradients.
        interval: sums since the last row of metrics.
        scaler: state of the gradient scaler.
    """

    step: int = 0
    epoch: int = 0
    batch: int = 0
    seconds: float = 0.0
    loss: float | None = None
    first_loss: float | None = None
    lowest_loss: float | None = None
    epoch_loss: float | None = None
    best_score: float | None = None
    checkpoints: int = 0
    rollbacks: int = 0
    lr_scale: float = 1.0
    figures: dict[str, float] = field(default_factory=dict)
    strength: float | None = None
    interval: dict[str, Any] = field(default_factory=dict)
    scaler: dict[str, Any] = field(default_factory=dict)

    def note_loss(self, loss: float) -> None:
        """Takes in the mean loss of a step."""
        self.loss = loss if self.loss is None else SMOOTHING * self.loss + (1 - SMOOTHING) * loss
        if self.step >= FIRST_STEPS:
            self.first_loss = self.loss if self.first_loss is None else self.first_loss
            self.lowest_loss = min(self.loss, self.loss if self.lowest_loss is None else self.lowest_loss)

    def end_epoch(self) -> float | None:
        """The share by which the smoothed loss has fallen since the end of the epoch before; None after the first."""
        before, self.epoch_loss = self.epoch_loss, self.loss
        return None if before is None or self.loss is None or before == 0 else 1.0 - self.loss / before

    def blown_up(self, factor: float | None) -> bool:
        """Whether the smoothed loss is above what it was at the start, and `factor` times what it has been at best."""
        if factor is None or self.loss is None or self.first_loss is None or self.lowest_loss is None:
            return False
        return self.loss > max(self.first_loss, factor * self.lowest_loss)

    @property
    def healthy(self) -> bool:
        """Whether the smoothed loss is finite and not on its way up."""
        if self.loss is None or self.first_loss is None or self.lowest_loss is None:
            return True
        return math.isfinite(self.loss) and self.loss <= max(2 * abs(self.lowest_loss), self.lowest_loss)

    def state(self) -> dict[str, Any]:
        """As a plain dictionary."""
        return asdict(self)

    @staticmethod
    def of(state: Mapping[str, Any]) -> Progress:
        """The reverse; entries that are not known here are left out."""
        known = {entry.name for entry in fields(Progress)}
        return Progress(**{name: value for name, value in state.items() if name in known})
