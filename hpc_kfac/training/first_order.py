"""Stands in for the preconditioner under ``method: none``: the same calls, the gradient as it is."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import nn

from hpc_kfac import StepReport, TrainingDiverged
from hpc_kfac.cluster.ranks import Ranks
from hpc_kfac.engine.timing import Timeline


class FirstOrder:
    """Checks the averaged gradient and sums the loop's numbers over ranks, as the preconditioner does.

    Args:
        model: whose gradients are checked.
        ranks: all processes.
        max_skipped: so many non-finite steps in a row raise `TrainingDiverged`.
    """

    damping_due = False
    reduced = True
    retired = True

    def __init__(self, model: nn.Module, ranks: Ranks, max_skipped: int = 10) -> None:
        self._model, self._ranks, self._max_skipped = model, ranks, max_skipped
        self._skipped_in_row = 0
        self.timings: dict[str, float] = {}
        self.traffic: Counter[str] = Counter()
        self.timeline = Timeline(ranks.rank)

    def observe(self, outputs: Any, **about: Any) -> None:
        """Nothing to observe."""

    def step(self, scalars: Mapping[str, float] | None = None, log: bool = False) -> StepReport:
        """Leaves the gradients alone.

        Raises:
            TrainingDiverged: more than `max_skipped` steps in a row had non-finite gradients.
        """
        gradients = [p.grad for p in self._model.parameters() if p.grad is not None]
        finite = bool(torch.isfinite(nn.utils.get_total_norm(gradients)))
        totals = self._ranks.sum({"bad": float(not finite), **(scalars or {})})
        applied = totals.pop("bad") == 0
        self._skipped_in_row = 0 if applied else self._skipped_in_row + 1
        if self._skipped_in_row > self._max_skipped:
            raise TrainingDiverged(f"{self._skipped_in_row} steps in a row had non-finite gradients")
        return StepReport(applied, 1.0, 0.0, False, 0, 0, 0, totals, {})

    def adapt_damping(self, evaluate: Callable[[], float], loss: float) -> None:
        """There is no damping."""

    def share(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """What a checkpoint holds of it."""
        return {"method": "none", "skipped_in_row": self._skipped_in_row}, {}

    def prepare_shares(self, common: Mapping[str, Any], of: Callable[[int], Mapping[str, Any]]) -> Callable[[], None]:
        """The result restores `share`.

        Raises:
            ValueError: it was a method's.
        """
        if common["method"] != "none":
            raise ValueError(f"the method was {common['method']} when this was saved, and now is none; use that")
        return partial(setattr, self, "_skipped_in_row", common["skipped_in_row"])

    def keep(self) -> Callable[[], None]:
        """The result restores this very state."""
        return partial(setattr, self, "_skipped_in_row", self._skipped_in_row)

    def retire(self) -> None:
        """There is nothing to end."""

    def order_save(self, step: int) -> Callable[[], list[str]]:
        """There are no helpers."""
        return list

    def raise_damping(self, factor: float) -> None:
        """There is no damping."""

    def close(self, failed: bool = False) -> None:
        """Nothing to end."""
