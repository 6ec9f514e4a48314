"""Damping: a number, a schedule, or the Levenberg-Marquardt rule."""

from __future__ import annotations

import math
from collections.abc import Mapping


class Damping:
    """A fixed damping.

    Args:
        value: the number added to the curvature, in units of the squared per-sample gradient.

    Raises:
        ValueError: a damping that is not positive and finite.
    """

    def __init__(self, value: float | None) -> None:
        self.current = positive("damping", value)

    def at(self, step: int, learning_rate: float) -> float:
        """The damping of a step.

        Args:
            step: its number.
            learning_rate: the optimizer's; the largest of its groups that have preconditioned layers.
        """
        return self.current

    def raise_by(self, factor: float) -> None:
        """More damping from here on, after steps that went wrong."""
        self.current *= factor

    def state_dict(self) -> dict[str, float]:
        """What a restart needs."""
        return {"current": self.current}

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        """Restores `state_dict`."""
        self.current = float(state["current"])


class ScheduledDamping(Damping):
    """Damping that follows given points, geometrically interpolated between them and constant outside.

    Args:
        points: step -> damping, for example {0: 1.0, 1000: 0.03}.
    """

    def __init__(self, points: Mapping[int, float]) -> None:
        if not points:
            raise ValueError("damping points are empty; give at least one, as in {0: 0.03}")
        self.points = {int(step): positive("damping", points[step]) for step in sorted(points)}
        self.raised = 1.0
        super().__init__(next(iter(self.points.values())))

    def raise_by(self, factor: float) -> None:
        self.raised *= factor

    def state_dict(self) -> dict[str, float]:
        return {"current": self.current, "raised": self.raised}

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        super().load_state_dict(state)
        self.raised = float(state.get("raised", 1.0))

    def at(self, step: int, learning_rate: float) -> float:
        before = [s for s in self.points if s <= step]
        after = [s for s in self.points if s > step]
        if not before:
            found = self.points[after[0]]
        elif not after:
            found = self.points[before[-1]]
        else:
            start, end = before[-1], after[0]
            share = (step - start) / (end - start)
            found = math.exp((1 - share) * math.log(self.points[start]) + share * math.log(self.points[end]))
        self.current = self.raised * found
        return self.current


class AnnealedDamping(Damping):
    """Damping that falls with the learning rate: value * max(floor, (rate / largest rate so far)^power).

    While steps are long, noise sets how much damping is needed; as the schedule shortens them, the curvature can be
    trusted further, and directions of little curvature still have far to go.

    Args:
        value: damping at the largest learning rate, also during a warm-up.
        power: how fast it falls; 1 keeps it in proportion to the learning rate.
        floor: least share of it.
    """

    def __init__(self, value: float, power: float = 2.0, floor: float = 0.05) -> None:
        super().__init__(value)
        self.power, self.floor = positive("damping power", power), positive("damping floor", floor)
        if floor > 1:
            raise ValueError(f"damping floor is {floor}; give a share, above 0 and up to 1")
        self.value, self.largest = self.current, 0.0

    def raise_by(self, factor: float) -> None:
        self.value *= factor

    def at(self, step: int, learning_rate: float) -> float:
        self.largest = max(self.largest, learning_rate)
        share = learning_rate / self.largest if self.largest > 0 else 1.0
        self.current = self.value * max(self.floor, share**self.power)
        return self.current

    def state_dict(self) -> dict[str, float]:
        return {**super().state_dict(), "value": self.value, "largest": self.largest}

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        super().load_state_dict(state)
        self.value, self.largest = float(state["value"]), float(state["largest"])


class LevenbergMarquardt(Damping):
    """Damping steered by how well the quadratic model predicted the change of the loss (Martens & Grosse 2015, 6.5).

    Every `interval` steps the ratio of the actual to the predicted change is measured on the same batch. Above 3/4 the
    damping shrinks by factor**interval, below 1/4 it grows by the inverse.

    Args:
        initial: damping to start from.
        interval: steps between two adjustments.
        factor: change per step, below 1.
        minimum: lower bound.
        maximum: upper bound.
    """

    def __init__(
        self, initial: float, interval: int = 5, factor: float = 0.95, minimum: float = 1e-8, maximum: float = 1e4
    ) -> None:
        super().__init__(initial)
        if interval < 1:
            raise ValueError(f"damping interval is {interval}; give a number of steps, at least 1")
        if not 0.0 < factor < 1.0:
            raise ValueError(f"damping factor is {factor}; give a number between 0 and 1, such as 0.95")
        if not 0.0 < minimum <= initial <= maximum:
            raise ValueError(f"damping {initial} must lie between minimum {minimum} and maximum {maximum}")
        self.interval, self.factor, self.minimum, self.maximum = interval, factor, minimum, maximum

    def due(self, step: int) -> bool:
        """Whether the step ends with an adjustment."""
        return (step + 1) % self.interval == 0

    def adjust(self, ratio: float) -> None:
        """Takes in a measured ratio of actual to predicted change; a non-finite ratio counts as a bad prediction."""
        change = self.factor**self.interval
        if ratio > 0.75:
            self.current = max(self.minimum, self.current * change)
        elif not ratio >= 0.25:
            self.current = min(self.maximum, self.current / change)


def as_damping(value: float | Damping | None) -> Damping:
    """A `Damping` from what a method was given."""
    return value if isinstance(value, Damping) else Damping(value)


def positive(name: str, value: float | None) -> float:
    """Checks a setting that must be positive and finite.

    Raises:
        ValueError: it is not.
    """
    if not (isinstance(value, int | float) and math.isfinite(value) and value > 0):
        raise ValueError(f"{name} is {value}; give a positive number")
    return float(value)
