"""Seconds of what one rank computes: a machine's rates applied to a model's operations and a method's formulas."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch

from hpc_kfac.distributed.placement import Unit
from hpc_kfac.engine.plan import units_of
from hpc_kfac.engine.precision import Precision
from hpc_kfac.layers import LayerShape
from hpc_kfac.methods.method import Method
from hpc_kfac.options.step_control import Orthogonal, StepControl
from hpc_kfac.planning.machine import Machine
from hpc_kfac.planning.model_costs import ModelCosts

SAMPLED_BACKWARD = 0.64
"""Share of a backward pass that the derivative towards the layers' outputs takes (measured, docs/methods.md)."""
STATISTICS_OPERATIONS, PRECONDITION_OPERATIONS = 8, 8
"""Operations that a layer's statistics and its preconditioning begin, about."""


@dataclass(frozen=True)
class Settings:
    """What of a run's settings bears on time and memory.

    Attributes:
        method: None for the base optimizer alone.
        precision: dtypes.
        control: of the step.
        fisher: source of the output gradients.
        autocast: dtype of forward and backward pass.
        averaging: horovod, ddp, mpi4py or owner.
        accumulation: micro-batches of a step.
    """

    method: Method | None
    precision: Precision
    control: StepControl
    fisher: str = "empirical"
    autocast: torch.dtype = torch.float32
    averaging: str = "horovod"
    accumulation: int = 1


@dataclass(frozen=True)
class Times:
    """Seconds of one rank; of all micro-batches, the backward pass of the last one step by step.

    Attributes:
        forward: all forward passes and all backward passes but the last.
        backward: (seconds since the one before, weights whose gradients are then complete), in time.
        statistics: by layer.
        extra: of a further derivative before the backward pass, on a statistics step.
        refresh: by unit.
        precondition: by layer.
        update: the base optimizer's, for all weights.
        flops: of each phase; refresh over all layers, as if one rank did all.
    """

    forward: float
    backward: tuple[tuple[float, tuple[int, ...]], ...]
    statistics: Mapping[str, float]
    extra: float
    refresh: Mapping[Unit, float]
    precondition: Mapping[str, float]
    update: float
    flops: Mapping[str, float]


@lru_cache(maxsize=64)
def times(costs: ModelCosts, settings: Settings, machine: Machine, samples: float) -> Times:
    """The times of a rank that has so many samples in a step."""
    micro = samples / settings.accumulation
    forward = machine.phase("forward") * float(costs.forward.seconds(micro, machine, settings.autocast).sum())
    passes = machine.phase("backward") * costs.backward.seconds(micro, machine, settings.autocast)
    backward = float(passes.sum())
    update = machine.phase("update") * float(costs.update.seconds(0, machine, torch.float32).sum())
    flops = {
        "forward": samples * costs.forward.flops[1].sum() + settings.accumulation * costs.forward.flops[0].sum(),
        "backward": samples * costs.backward.flops[1].sum() + settings.accumulation * costs.backward.flops[0].sum(),
    }
    before = settings.accumulation * forward + (settings.accumulation - 1) * backward
    events = _events(costs, passes)
    if settings.method is None:
        return Times(before, events, {}, 0.0, {}, {}, update, flops)
    method, precision = settings.method, settings.precision
    known = {shape: method.cost(shape) for shape in dict.fromkeys(costs.shapes.values())}
    layers = {name: known[shape] for name, shape in costs.shapes.items()}
    rows = {name: _rows(method, costs, name, samples) for name in layers}
    extra = SAMPLED_BACKWARD * settings.accumulation * backward if settings.fisher != "empirical" else 0.0
    flops |= {
        "statistics": sum(cost.statistics * rows[name] for name, cost in layers.items()),
        "refresh": sum(cost.refresh for cost in layers.values()),
        "precondition": sum(
            cost.precondition + _control_flops(settings.control, costs, name) for name, cost in layers.items()
        ),
    }
    if method.reads != "samples":
        extra = 0.0
    return Times(
        before,
        events,
        {name: _statistics(costs, settings, machine, name, rows[name], samples) for name in layers},
        extra,
        {unit: _refresh(method, precision, machine, costs.shapes[unit[0]], unit[1]) for unit in _units(method, costs)},
        {name: _precondition(costs, settings, machine, name) for name in layers},
        update,
        flops,
    )


def _events(costs: ModelCosts, passes: np.ndarray) -> tuple[tuple[float, tuple[int, ...]], ...]:
    ends = np.concatenate([[0.0], np.cumsum(passes)])
    by_place: dict[int, list[int]] = {}
    for index, weight in enumerate(costs.weights):
        if weight.trained:
            by_place.setdefault(weight.ready, []).append(index)
    events, last = [], 0.0
    for place, weights in sorted(by_place.items()):
        events.append((float(ends[place]) - last, tuple(weights)))
        last = float(ends[place])
    return (*events, (float(ends[-1]) - last, ()))


def _units(method: Method, costs: ModelCosts) -> list[Unit]:
    return [unit for units in units_of(method, costs.shapes).values() for unit in units]


def _rows(method: Method, costs: ModelCosts, name: str, samples: float) -> float:
    """How often the formula of a layer's statistics counts."""
    return samples * costs.rows[name] if method.reads == "samples" else 1.0


def _statistics(
    costs: ModelCosts, settings: Settings, machine: Machine, name: str, rows: float, samples: float
) -> float:
    method, precision = settings.method, settings.precision
    assert method is not None
    shape = costs.shapes[name]
    running = [spec for spec in method.state(shape) if spec.role == "running"]
    if not running:
        return 0.0
    folded = 3 * sum(int(np.prod(spec.shape)) for spec in running) * precision.factors.itemsize
    read = samples * costs.traffic[name] if method.reads == "samples" else shape.parameters * 4
    dtype = precision.moments or precision.factors
    flops = method.cost(shape).statistics * rows
    seconds = machine.seconds(flops, read + folded, dtype, STATISTICS_OPERATIONS)
    return machine.phase("statistics") * seconds


def _refresh(method: Method, precision: Precision, machine: Machine, shape: LayerShape, part: str) -> float:
    specs = [spec for spec in method.state(shape) if spec.role == "solved" and spec.part == part]
    size = max((max(spec.shape[1:], default=1) for spec in specs), default=1)
    eigen = any(spec.name.endswith(("basis", "root")) for spec in specs)
    seconds = machine.decomposition(method.refresh_flops(shape, part), size, eigen, precision.solve)
    return machine.phase("refresh") * seconds


def _precondition(costs: ModelCosts, settings: Settings, machine: Machine, name: str) -> float:
    method, precision, shape = settings.method, settings.precision, costs.shapes[name]
    assert method is not None
    solved = [spec for spec in method.state(shape) if spec.role == "solved"]
    dtype = precision.apply if any(spec.operand for spec in solved) else precision.solve
    held = sum(int(np.prod(spec.shape)) * precision.stored(spec).itemsize for spec in solved)
    nbytes = held + 6 * shape.parameters * precision.wire.itemsize
    seconds = machine.seconds(method.cost(shape).precondition, nbytes, dtype, PRECONDITION_OPERATIONS)
    orthogonal = _control_flops(settings.control, costs, name)
    if orthogonal:
        assert isinstance(settings.control, Orthogonal)
        nbytes = 12 * settings.control.iterations * shape.parameters
        seconds += machine.seconds(orthogonal, nbytes, torch.bfloat16, 3 * settings.control.iterations)
    return machine.phase("precondition") * seconds


def _control_flops(control: StepControl, costs: ModelCosts, name: str) -> float:
    """Of the Newton-Schulz iterations of `Orthogonal`: three products each."""
    if not isinstance(control, Orthogonal) or not costs.shared[name]:
        return 0.0
    shape = costs.shapes[name]
    low, high = sorted((shape.outputs, shape.inputs))
    return control.iterations * shape.blocks * (4.0 * low * low * high + 2.0 * low**3)
