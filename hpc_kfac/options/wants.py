"""What a method takes where its user leaves a setting open: intervals, Fisher source, step control, momentum."""

from __future__ import annotations

from dataclasses import dataclass, field

from hpc_kfac.options.fisher import FisherSource
from hpc_kfac.options.schedule import REFRESH, STATISTICS, Interval
from hpc_kfac.options.step_control import Orthogonal, StepControl


@dataclass(frozen=True)
class Wants:
    """What a method takes for settings that its user leaves open; by default what suits K-FAC.

    Args:
        statistics: steps between two folds of statistics.
        refresh: steps between two decompositions.
        fisher: source of the output gradients.
        step_control: bounds the step.
        momentum: of a step control that averages gradients, where neither it nor the optimizer has one.
        why: in words, with the paper.
    """

    statistics: Interval = STATISTICS
    refresh: Interval = field(default_factory=lambda: dict(REFRESH))
    fisher: FisherSource = "empirical"
    step_control: StepControl = Orthogonal()
    momentum: float = 0.9
    why: str = ""
