"""Bytes that each rank holds, by what they are for."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from hpc_kfac.engine.placing import momentum_bytes
from hpc_kfac.engine.plan import Problem
from hpc_kfac.planning.model_costs import ModelCosts
from hpc_kfac.planning.simulate import owned_bytes
from hpc_kfac.planning.times import Settings

ROLES = ("weights", "gradients", "optimizer", "factors", "solved", "momentum", "buffers", "workspace", "activations")


def memory(
    costs: ModelCosts, settings: Settings, problem: Problem | None, ranks: int, samples: float, messages: int = 0
) -> dict[str, np.ndarray]:
    """What each rank holds in a step with a refresh: role -> bytes, [ranks].

    Args:
        costs: of the model.
        settings: of the run.
        problem: the placement; None without a method.
        ranks: how many there are, helpers included.
        samples: of a rank in a step.
        messages: bytes of the pool of messages, as the simulation of a step finds them.
    """
    table = {role: np.zeros(ranks) for role in ROLES}
    table["weights"] += costs.parameter_bytes + costs.buffers
    table["gradients"] += costs.gradient_bytes
    state = sum(weight.state for weight in costs.weights)
    share = 1.0
    if settings.averaging == "owner" and problem is not None and ranks > 1:
        share = owned_bytes(problem, costs) / max(1, costs.gradient_bytes)
    table["optimizer"] += share * state
    if settings.averaging != "horovod" and ranks > 1:  # all gradients once more, in messages
        table["buffers"] += costs.gradient_bytes
    table["buffers"] += messages
    wide = 4.0 if settings.autocast.itemsize == 4 else 2.0
    table["activations"] += costs.kept(samples / settings.accumulation) * wide / 4.0
    if problem is not None:
        curvature = curvature_bytes(problem)
        table |= {role: table[role] + curvature[role] for role in curvature}
        table["workspace"] += workspace_bytes(problem)
    for role in ("gradients", "optimizer", "activations", "workspace"):  # helpers decompose, and nothing else
        if problem is not None:
            table[role][problem.assignment.trainers :] = 0
    return table


def curvature_bytes(problem: Problem) -> dict[str, np.ndarray]:
    """Curvature state after a refresh, as `costs.resident_bytes` has it of one rank: role -> bytes, [ranks]."""
    assignment = problem.assignment
    table = {role: np.zeros(assignment.ranks) for role in ("factors", "solved", "momentum")}
    for layer in problem.shapes:
        if problem.momentum:
            workers = assignment.members(assignment.group(assignment.owner[layer]))
            table["momentum"][_index(workers)] += momentum_bytes(problem, layer)
        for spec in problem.specs[layer]:
            itemsize = problem.precision.stored(spec).itemsize
            here = _index(problem.holders(layer, spec))
            if spec.role == "running":
                table["factors"][here] += math.prod(spec.shape) * itemsize
            whole = math.prod(spec.full_shape(assignment.ranks)) * itemsize
            if spec.reduce == "gather":
                table["solved"] += whole
            elif spec.role == "solved":
                table["solved"][here] += whole
    return table


def workspace_bytes(problem: Problem) -> np.ndarray:
    """What preconditioning works in, [ranks]: some tensors of the size of the largest gradient that a rank works on.

    One product for each side, what is divided in an eigenbasis and by what, the average of gradients and, where a bias
    has to be put beside its weight, the gradient.
    """
    assignment = problem.assignment
    largest, biased = np.zeros(assignment.ranks), np.zeros(assignment.ranks)
    for layer, shape in problem.shapes.items():
        here = _index(assignment.members(assignment.group(assignment.owner[layer])))
        in_basis = any(spec.name.endswith("basis") for spec in problem.specs[layer])
        tensors = 2 + 2 * in_basis + bool(problem.momentum)
        largest[here] = np.maximum(largest[here], tensors * shape.parameters)
        if shape.bias:
            biased[here] = np.maximum(biased[here], shape.parameters)
    return np.asarray((largest + biased) * problem.precision.wire.itemsize)


def total(table: dict[str, np.ndarray], roles: Sequence[str] = ROLES) -> np.ndarray:
    """Bytes of each rank, [ranks]."""
    return np.asarray(sum(table[role] for role in roles))


def _index(ranks: range) -> slice:
    return slice(ranks.start, ranks.stop, ranks.step)
