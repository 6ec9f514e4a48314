"""When statistics are taken, when factors are decomposed, and when the result comes into use."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from hpc_kfac.distributed.placement import balance

Interval = int | Mapping[int, int]

STATISTICS: Interval = 10
REFRESH: Mapping[int, int] = {0: 10, 100: 100}
"""Both intervals where neither the user nor the method has others: what the first batch alone tells of the curvature
leaves the gradient as it is, and the first factors age fastest."""

NEVER = 2**62
"""A step that no run reaches, and that every file format can hold."""


@dataclass(frozen=True)
class Similarity:
    """Per layer, longer intervals while its factors stay similar (SP-NGD, Osawa et al. 2020).

    After a refresh the factors are compared with those of the layer's last one. Where the relative change in Frobenius
    norm is below the threshold for all of them, the next interval is the sum of the last two, as with Fibonacci's
    numbers; else it is halved. Keeps a copy of the factors between refreshes.

    Args:
        threshold: relative change that counts as similar, below it.
        longest: largest interval, in refresh intervals of the schedule.

    Raises:
        ValueError: a threshold that is not positive, or a longest interval below 1.
    """

    threshold: float = 0.1
    longest: int = 20

    def __post_init__(self) -> None:
        if not self.threshold > 0:
            raise ValueError(f"schedule.adapt.threshold is {self.threshold}; give a positive relative change")
        if self.longest < 1:
            raise ValueError(
                f"schedule.adapt.longest is {self.longest}; give a number of refresh intervals, at least 1"
            )

    def remember(self, new: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What has to be kept until the next refresh."""
        return {name: tensor.clone() for name, tensor in new.items()}

    def measure(self, old: Mapping[str, Tensor], new: Mapping[str, Tensor]) -> float:
        """Largest relative change |new - old| / |old| of a factor; infinite where something is not remembered.

        Args:
            old: what was remembered at the last refresh.
            new: the factors of this one.
        """
        if not new or set(old) != set(new):
            return math.inf
        return _largest(
            [(tensor - old[name]).norm() for name, tensor in new.items()], [old[name].norm() for name in new]
        )

    def following(self, change: float, interval: int, previous: int) -> tuple[int, int]:
        """The next interval and the one before it, in refresh intervals."""
        if change < self.threshold:
            return min(interval + previous, self.longest), interval
        half = max(1, interval // 2)
        return half, min(previous, half)  # grows again by no more than doubling


@dataclass(frozen=True)
class TraceChange:
    """Per layer, refreshes are left out or end for good by how its factors' traces change (THOR, Chen et al. 2021).

    The largest relative change of a factor's trace between two refreshes decides: above `update` the layer is refreshed
    as usual, from there down to `freeze` its next refresh is left out, below `freeze` it is never refreshed again.
    THOR tests the trace of the whole block and before it decomposes; here each refresh decides about the next.

    Args:
        update: relative change above which the next refresh takes place.
        freeze: relative change below which there is none any more; 0 for never.

    Raises:
        ValueError: not 0 <= freeze <= update.
    """

    update: float = 0.01
    freeze: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.freeze <= self.update:
            raise ValueError(
                f"schedule.adapt.freeze is {self.freeze} and update {self.update}; give 0 <= freeze <= update"
            )

    def remember(self, new: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What has to be kept until the next refresh: one number for each factor."""
        return {name: _trace(tensor) for name, tensor in new.items()}

    def measure(self, old: Mapping[str, Tensor], new: Mapping[str, Tensor]) -> float:
        """Largest relative change of a trace; infinite where something is not remembered.

        Args:
            old: what was remembered at the last refresh.
            new: the factors of this one.
        """
        if not new or set(old) != set(new):
            return math.inf
        traces = self.remember(new)
        return _largest([(traces[name] - old[name]).abs() for name in new], [old[name].abs() for name in new])

    def following(self, change: float, interval: int, previous: int) -> tuple[int, int]:
        """The next interval and the one before it, in refresh intervals; 0 for no further refresh."""
        if change < self.freeze:
            return 0, interval
        return (2 if change <= self.update else 1), interval


@dataclass(frozen=True)
class Schedule:
    """Intervals in optimisation steps; the first step always takes statistics and refreshes.

    Args:
        statistics: steps between two folds of statistics into the running averages. None for the method's.
        refresh: steps between two decompositions; each refresh step takes statistics too. None for the method's. Most
            methods have 10 steps for both up to step 100, and from there on 100 steps for a refresh.
        spread: so many steps share a refresh, each taking a part of the layers; 1 takes all of them at once.
        lag: steps from the start of a decomposition to the use of its result; 0 waits for it.
        adapt: null, or `Similarity` or `TraceChange` for layers that leave out refreshes by how their factors change.

    An interval is a number, or a mapping {from step: interval} for an interval that changes while training, for example
    {0: 1, 100: 10}. The first refresh of all takes every layer at once, and a layer's first result is used at once.

    Raises:
        ValueError: an interval below 1, a mapping that does not start at step 0, or a spread or lag that reaches into
            the next refresh.
    """

    statistics: Interval | None = None
    refresh: Interval | None = None
    spread: int = 1
    lag: int = 0
    adapt: Similarity | TraceChange | None = None

    def __post_init__(self) -> None:
        for name in ("statistics", "refresh"):
            interval = getattr(self, name)
            if interval is None:
                continue
            values = interval.values() if isinstance(interval, Mapping) else [interval]
            if isinstance(interval, Mapping) and 0 not in interval:
                raise ValueError(f"schedule.{name} is {dict(interval)}; give the interval from step 0 on: {{0: 10}}")
            for value in values:
                if value < 1:
                    raise ValueError(f"schedule.{name} is {value}; an interval is a number of steps, at least 1")
        known = self.refresh is not None  # else the upper bounds wait for the method's interval
        gap = _smallest_gap(self.intervals[1])
        if self.spread < 1 or (known and self.spread > gap):
            raise ValueError(
                f"schedule.spread is {self.spread} and the shortest time between two refreshes is {gap} steps; "
                f"give 1 to {gap}, or refresh less often"
            )
        if self.lag < 0 or (known and self.lag >= gap):
            raise ValueError(
                f"schedule.lag is {self.lag} and the shortest time between two refreshes is {gap} steps; "
                f"give 0 to {gap - 1}, or refresh less often"
            )

    @property
    def intervals(self) -> tuple[Interval, Interval]:
        """Of statistics and of refreshes; those of most methods for what is open."""
        return (
            STATISTICS if self.statistics is None else self.statistics,
            REFRESH if self.refresh is None else self.refresh,
        )

    def statistics_due(self, step: int) -> bool:
        """Whether the step takes statistics."""
        return _latest(self.intervals[0], step) == step or self.refresh_due(step)

    def refresh_due(self, step: int) -> bool:
        """Whether a refresh starts at the step."""
        return _latest(self.intervals[1], step) == step


@dataclass
class _LayerTimes:
    """Where a layer stands.

    Attributes:
        first: step of its first refresh.
        again: the last step at which it starts because the refresh of the step before came to nothing; else 0.
        started: step of the last refresh with a recorded change.
        due: it takes part in refreshes of the schedule from this step on.
        interval: present interval, in refresh intervals of the schedule; 0 for no further refresh.
        previous: the interval before.
    """

    first: int = 0
    again: int = 0
    started: int = -1
    due: int = 0
    interval: int = 1
    previous: int = 1


class RefreshTimes:
    """A schedule at work in one run: which layer is refreshed when.

    Questions change nothing and may be asked for any step from the present one on. Without `Schedule.adapt` the answers
    depend on the step alone, but for refreshes that are `overdue`. A layer has no more than one refresh under way; it
    starts and lands in the same step only where the result is used at once.

    Args:
        schedule: the settings.
        costs: layer -> cost of its refresh, any unit, in the order in which layers are answered; balances the steps of
            a refresh that is spread.
    """

    def __init__(self, schedule: Schedule, costs: Mapping[str, float]) -> None:
        self._schedule = schedule
        self._statistics, self._refresh = schedule.intervals
        turn = balance(costs, range(schedule.spread))
        self._turn = {layer: turn[layer] for layer in costs}
        self._times = {layer: _LayerTimes() for layer in costs}

    def leave(self, layer: str) -> Any:
        """Forgets a layer; the result can be given to `join`."""
        return self._times.pop(layer)

    def join(self, costs: Mapping[str, float], step: int, known: Mapping[str, tuple[Any, int]]) -> None:
        """Takes more layers in; all that missed a refresh start one at the step.

        Args:
            costs: layer -> cost of its refresh.
            step: the next one.
            known: where layers stood that had left, and the first step without them.
        """
        self._turn |= balance(costs, range(self._schedule.spread))
        for layer in costs:
            times, since = known.get(layer, (_LayerTimes(first=step), -1))
            if since < 0 or (step > since and _latest(self._refresh, step - 1) >= since):
                times.again = step
            self._times[layer] = times

    def statistics_due(self, step: int) -> bool:
        """Whether the step takes statistics: by the interval, for a refresh as it begins, and where one is repeated."""
        if _latest(self._statistics, step) == step:
            return True
        begins = self._schedule.refresh_due(step)
        return any(
            times.again == step or (begins and (times.due <= step or times.started == step))
            for times in self._times.values()
        )

    def starting(self, step: int) -> tuple[str, ...]:
        """The layers whose refresh starts at the step."""
        begin = _latest(self._refresh, step)
        return tuple(layer for layer, times in self._times.items() if self._starts(layer, times, step, begin))

    def landing(self, step: int) -> tuple[str, ...]:
        """The layers whose new solved form is used from this step on."""
        start = step - self._schedule.lag
        started = set(self.starting(start)) if start >= 0 else ()
        return tuple(
            layer
            for layer, times in self._times.items()
            if step == times.first or (start > times.first and layer in started)
        )

    def overdue(self, layers: Iterable[str], step: int) -> None:
        """Takes back the refreshes that these layers started at the step, for they came to nothing.

        They start again at the step after, with fresh statistics, all at once.
        """
        for layer in layers:
            times = self._times[layer]
            if times.first == step:
                times.first = step + 1
            times.again = step + 1

    def record(self, layer: str, step: int, change: float) -> None:
        """Plans a layer's next refresh by the change of its factors; has no effect unless the schedule adapts.

        Args:
            layer: the layer.
            step: at which its refresh started.
            change: what `measure` of the schedule's `adapt` gave, equal on all ranks.
        """
        adapt = self._schedule.adapt
        if adapt is None:
            return
        times = self._times[layer]
        times.started = step
        times.interval, times.previous = adapt.following(change, times.interval, times.previous)
        times.due = _latest(self._refresh, step) if times.interval else NEVER
        for _ in range(times.interval):
            times.due = _next(self._refresh, times.due)

    def state_dict(self) -> dict[str, Any]:
        """What a restart needs: lists of names and whole numbers."""
        state: dict[str, Any] = {"layers": list(self._times)}
        for entry in fields(_LayerTimes):
            state[entry.name] = [getattr(times, entry.name) for times in self._times.values()]
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores `state_dict`.

        Raises:
            ValueError: it was saved for other layers.
        """
        saved = [str(layer) for layer in state["layers"]]
        if set(saved) != set(self._times):
            differing = ", ".join(sorted(set(saved) ^ set(self._times))[:5])
            raise ValueError(f"the saved schedule's layers differ from the model's: {differing}; load the same model")
        names = [entry.name for entry in fields(_LayerTimes)]
        for place, layer in enumerate(saved):
            self._times[layer] = _LayerTimes(**{name: int(state[name][place]) for name in names})

    def _starts(self, layer: str, times: _LayerTimes, step: int, begin: int) -> bool:
        """Whether the layer starts at the step; `begin` is where the schedule's latest refresh began."""
        if step <= times.again:
            return step == times.again
        if begin == 0 or step - begin != self._turn[layer]:
            return False
        repeated = times.again > times.first
        if repeated and step <= times.again + self._schedule.lag:
            return False  # what was repeated is still under way
        return times.due <= begin or times.started == step


def _latest(interval: Interval, step: int) -> int:
    """The last step up to `step` that the interval hits."""
    if isinstance(interval, Mapping):
        start = max(first for first in interval if first <= step)
        return start + (step - start) // interval[start] * interval[start]
    return step // interval * interval


def _next(interval: Interval, step: int) -> int:
    """The first step after `step` that the interval hits."""
    latest = _latest(interval, step)
    if isinstance(interval, Mapping):
        start = max(first for first in interval if first <= step)
        return min([latest + interval[start], *(first for first in interval if first > step)])
    return latest + interval


def _smallest_gap(interval: Interval) -> int:
    """The least number of steps between two that the interval hits."""
    if not isinstance(interval, Mapping):
        return interval
    return min([*interval.values(), *(start - _latest(interval, start - 1) for start in interval if start)])


def _trace(tensor: Tensor) -> Tensor:
    """Sum of the diagonals of square matrices [p, ..., d, d]; of all numbers where only a diagonal is kept."""
    if tensor.dim() > 2 and tensor.shape[-1] == tensor.shape[-2]:
        tensor = tensor.diagonal(dim1=-2, dim2=-1)
    return tensor.sum()


def _largest(changes: list[Tensor], before: list[Tensor]) -> float:
    """The largest ratio; nothing divided by nothing is no change, a number that is not finite stays so."""
    change = torch.stack(changes)
    return float(torch.where(change == 0, change, change / torch.stack(before)).max())
