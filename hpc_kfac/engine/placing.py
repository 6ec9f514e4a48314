"""What a refresh costs, by formula or measured before training starts, and who therefore does it."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from hpc_kfac.distributed import Communicator, Kaisa, Rates, Unit, UnitCost
from hpc_kfac.distributed.layout import Slot
from hpc_kfac.engine.plan import Problem, units_of
from hpc_kfac.engine.precision import Precision
from hpc_kfac.layers import LayerShape
from hpc_kfac.methods.method import Method, State

MESSAGE = 4 * 2**20  # bytes of a broadcast that is long enough to tell the bandwidth
REPEATS = 3


def make_problem(
    shapes: Mapping[str, LayerShape],
    method: Method,
    placement: Kaisa,
    precision: Precision,
    comm: Communicator,
    device: torch.device,
) -> Problem:
    """Works a placement out for layers and ranks. Collective where something is measured.

    Raises:
        ValueError: method, placement, precision and the number of ranks do not go together.
    """
    costs = declared_costs(shapes, method, precision)
    if "measured" in (placement.costs, placement.all_local):
        measured, rate = measure_costs(costs, method, shapes, precision, comm, device)
        costs = measured if placement.costs == "measured" else costs
        if placement.all_local == "measured":
            placement = replace(placement, all_local=measure_rates(rate, comm, device))
    return place(shapes, method, placement, precision, costs, comm.size)


def declared_costs(shapes: Mapping[str, LayerShape], method: Method, precision: Precision) -> dict[Unit, UnitCost]:
    """What the refresh of every unit takes, by the method's formulas."""
    costs: dict[Unit, UnitCost] = {}
    known: dict[tuple[LayerShape, str], UnitCost] = {}
    for name, units in units_of(method, shapes).items():
        for unit in units or [(name, "")]:
            key = shapes[name], unit[1]
            if key not in known:
                specs = [s for s in method.state(key[0]) if s.role == "solved" and s.part == key[1]]
                sent = sum(Slot(name, s.name, s.shape, precision.sent(s), s.symmetric).bytes for s in specs)
                known[key] = UnitCost(method.refresh_flops(*key), sent, method.refreshed_by_all)
            costs[unit] = known[key]
    return costs


def place(
    shapes: Mapping[str, LayerShape],
    method: Method,
    placement: Kaisa,
    precision: Precision,
    costs: Mapping[Unit, UnitCost],
    ranks: int,
) -> Problem:
    """The problem of this many ranks, without communication and without a device.

    Raises:
        ValueError: method, placement, precision and the number of ranks do not go together.
    """
    problem = Problem(shapes, method, placement.suited(method.refreshed_by_all).assign(costs, ranks), precision)
    problem.check()
    return problem


def measure_costs(
    costs: Mapping[Unit, UnitCost],
    method: Method,
    shapes: Mapping[str, LayerShape],
    precision: Precision,
    comm: Communicator,
    device: torch.device,
) -> tuple[dict[Unit, UnitCost], float]:
    """Replaces declared flops by what the slowest rank needs. Collective; every size is decomposed once or twice.

    Returns:
        The costs, in flops of one common rate, and that rate: flops a second over all that was measured.
    """
    kinds = {unit: (shapes[unit[0]], unit[1]) for unit in costs}
    distinct = list(dict.fromkeys(kinds.values()))
    seconds = torch.tensor([_seconds_of_refresh(method, shape, part, precision, device) for shape, part in distinct])
    everyone, work = comm.allgather(seconds.double(), "measure", "seconds of decompositions")
    work.wait()
    slowest = dict(zip(distinct, everyone.max(0).values.tolist(), strict=True))
    spent = sum(slowest[kind] for kind in kinds.values())
    rate = sum(cost.refresh for cost in costs.values()) / spent if spent > 0 else 1.0
    rate = rate or 1.0  # a method with nothing to decompose
    return {unit: replace(cost, refresh=rate * slowest[kinds[unit]]) for unit, cost in costs.items()}, rate


def measure_broadcast(comm: Communicator, device: torch.device) -> tuple[float, float]:
    """Latency (seconds) and bandwidth (bytes a second) of a broadcast to all ranks, on the slowest one. Collective."""
    if comm.size == 1:
        return 0.0, float("inf")
    times = []
    for nbytes in (1, MESSAGE):
        message = torch.zeros(nbytes, dtype=torch.uint8, device=device)
        times.append(_best(lambda m=message: comm.broadcast(m, 0, "measure", "a broadcast").wait()))  # type: ignore[misc]
    everyone, work = comm.allgather(torch.tensor(times, dtype=torch.float64), "measure", "seconds of broadcasts")
    work.wait()
    latency, long = everyone.max(0).values.tolist()
    return latency, MESSAGE / max(long - latency, 1e-9)


def measure_rates(flops: float, comm: Communicator, device: torch.device) -> Rates:
    """The rates for an all-local threshold. Collective."""
    latency, bandwidth = measure_broadcast(comm, device)
    return Rates(flops, latency, min(bandwidth, 1e15))


def _seconds_of_refresh(
    method: Method, shape: LayerShape, part: str, precision: Precision, device: torch.device
) -> float:
    state = _made_up(method, shape, precision, device)
    if not any(spec.role == "solved" for spec in method.state(shape)):
        return 0.0
    return _best(lambda: method.refresh(state, shape, 1.0, part))


def _made_up(method: Method, shape: LayerShape, precision: Precision, device: torch.device) -> State:
    """Running tensors of the right shapes: positive definite where they are symmetric."""
    generator = torch.Generator().manual_seed(0)
    state: dict[str, Tensor] = {}
    for spec in method.state(shape):
        if spec.role == "running":
            tensor = torch.rand(spec.shape, generator=generator, dtype=precision.solve)
            if spec.symmetric:
                tensor = tensor @ tensor.mT / spec.shape[-1]
            state[spec.name] = tensor.to(device)
    return state


def _best(what: Callable[[], object]) -> float:
    best = float("inf")
    for _ in range(REPEATS):
        start = time.perf_counter()
        what()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - start)
        if best > 1.0:  # large ones are not repeated
            break
    return best


def refresh_flops(problem: Problem) -> dict[str, float]:
    """By layer, of one refresh."""
    return {name: cost.refresh for name, cost in problem.costs.items()}


def momentum_bytes(problem: Problem, layer: str) -> int:
    """Of a layer's moving average of gradients, and of one number that says how alive it is."""
    return problem.shapes[layer].parameters * problem.precision.wire.itemsize + torch.float32.itemsize


def resident_bytes(problem: Problem, rank: int) -> dict[str, dict[str, int]]:
    """Curvature state that a rank holds after a refresh: layer -> role -> bytes."""
    table: dict[str, dict[str, int]] = {}
    for name in problem.shapes:
        table[name] = {"running": 0, "solved": 0}
        if problem.momentum:
            here = problem.assignment.works_on(rank, name)
            table[name]["momentum"] = here * momentum_bytes(problem, name)
        for spec in problem.specs[name]:
            itemsize = problem.precision.stored(spec).itemsize
            here = problem.holds(rank, name, spec)
            if spec.role == "running" and here:
                table[name]["running"] += math.prod(spec.shape) * itemsize
            if spec.reduce == "gather" or (spec.role == "solved" and here):
                table[name]["solved"] += math.prod(spec.full_shape(problem.assignment.ranks)) * itemsize
    return table
