"""When statistics are taken and when factors are decomposed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

Interval = int | Mapping[int, int]


@dataclass(frozen=True)
class Schedule:
    """Intervals in optimisation steps; the first step always takes statistics and refreshes.

    Args:
        statistics: steps between two folds of statistics into the running averages.
        refresh: steps between two decompositions; each refresh step takes statistics too. By default every 10 steps
            up to step 100, every 100 from there on: what the first batch alone tells leaves the gradient as it is.

    Either is a number, or a mapping {from step: interval} for an interval that changes while training, for example
    {0: 1, 100: 10}.

    Raises:
        ValueError: an interval below 1, or a mapping that does not start at step 0.
    """

    statistics: Interval = 10
    refresh: Interval = field(default_factory=lambda: {0: 10, 100: 100})

    def __post_init__(self) -> None:
        for name in ("statistics", "refresh"):
            interval = getattr(self, name)
            values = interval.values() if isinstance(interval, Mapping) else [interval]
            if isinstance(interval, Mapping) and 0 not in interval:
                raise ValueError(f"schedule.{name} is {dict(interval)}; give the interval from step 0 on: {{0: 10}}")
            for value in values:
                if value < 1:
                    raise ValueError(f"schedule.{name} is {value}; an interval is a number of steps, at least 1")

    def statistics_due(self, step: int) -> bool:
        """Whether the step takes statistics."""
        return _due(self.statistics, step) or self.refresh_due(step)

    def refresh_due(self, step: int) -> bool:
        """Whether the step decomposes the factors."""
        return _due(self.refresh, step)


def _due(interval: Interval, step: int) -> bool:
    if isinstance(interval, Mapping):
        start = max(first for first in interval if first <= step)
        return (step - start) % interval[start] == 0
    return step % interval == 0
