"""Curvature as plain dictionaries of tensors and numbers, and back: all of a rank's, or each rank's share of the whole.

A share is what a rank alone can or should write: everything of the layers that it owns, its own running averages where
the ranks' differ, and decompositions that are not in use yet. From all shares any number of ranks can go on.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from hpc_kfac.distributed import Communicator, Unit
from hpc_kfac.engine.plan import Problem
from hpc_kfac.engine.running_weight import NUMBERS, Weight, divisors, total
from hpc_kfac.engine.state import LayerState
from hpc_kfac.linalg.packing import Symmetric
from hpc_kfac.methods.method import State, StateSpec

Pending = Mapping[Unit, tuple[int, State | None]]


# One rank's own state


def save(states: Mapping[str, LayerState]) -> dict[str, Any]:
    """By layer; tensors are references, as in torch."""
    return {
        name: {
            "weight": state.weight,
            "weights": {at: weight.saved() for at, weight in state.weights.items()},
            "local": state.local,
            "refreshed": dict(state.refreshed),
            "running": dict(state.running),
            "solved": dict(state.solved),
            "remembered": dict(state.remembered),
            "momentum": dict(state.momentum),
        }
        for name, state in states.items()
    }


def restore(saved: Mapping[str, Any], problem: Problem, device: torch.device) -> dict[str, LayerState]:
    """What `save` was given, with copies of the tensors.

    Raises:
        ValueError: the layers, their tensors or a tensor's shape are not the problem's.
    """
    _check_names(saved, problem)
    for name in saved:
        for role in ("running", "solved"):
            for key, tensor in saved[name][role].items():
                _check(name, key, role, tensor, problem)
    return {
        name: LayerState(
            running=_own(layer["running"], device),
            solved=_own(layer["solved"], device),
            weights=_weights(float(layer["weight"]), layer.get("weights")),
            refreshed={part: int(step) for part, step in layer["refreshed"].items()},
            remembered=_own(layer["remembered"], device),
            momentum=_own(layer.get("momentum", {}), device),  # states of version 0.1 have none
            local=bool(layer["local"]),
        )
        for name, layer in saved.items()
    }


def own_pending(pending: Pending, device: torch.device) -> dict[Unit, tuple[int, State | None]]:
    """With copies of the tensors."""
    return {
        unit: (int(step), None if result is None else _own(result, device)) for unit, (step, result) in pending.items()
    }


# Shares


def common(states: Mapping[str, LayerState], problem: Problem, trainers: Communicator) -> dict[str, Any]:
    """What is needed to put shares together. Collective."""
    assignment = problem.assignment
    sums = _table(states, problem, lambda weight: weight.numbers(True))
    if trainers.size > 1:
        trainers.allreduce(sums, "checkpoint", "weights of running averages").wait()
    terms = sums[:, 0, 1]  # of the first reduction that the method has
    return {
        "method": method_of(problem),
        "ranks": assignment.ranks,
        "helpers": assignment.helpers,
        "factors": assignment.factors,
        "owner": dict(assignment.owner),
        "weights": dict(zip(sorted(states), terms.tolist(), strict=True)),
        "sums": divisors(sums),
    }


def share(states: Mapping[str, LayerState], pending: Pending, problem: Problem, rank: int) -> dict[str, Any]:
    """What this rank has to write; tensors are references, symmetric ones are marked as such."""
    layers = {}
    if rank in problem.trainers:
        layers = {name: _layer_share(name, state, problem, rank) for name, state in states.items()}
    waiting = {}
    for number, ((layer, part), (step, result)) in enumerate(pending.items()):
        found = {key: _marked(problem, layer, key, tensor) for key, tensor in (result or {}).items()}
        waiting[str(number)] = {
            "layer": layer, "part": part, "step": step, "failed": result is None, "result": found,
        }  # fmt: skip
    return {"layers": layers, "weights": _table(states, problem, Weight.saved), "pending": waiting}


def _layer_share(name: str, state: LayerState, problem: Problem, rank: int) -> dict[str, Any]:
    owns = problem.assignment.owner[name] == rank

    def marked(tensors: State) -> dict[str, Tensor | Symmetric]:
        return {key: _marked(problem, name, key, tensor) for key, tensor in tensors.items()}

    differing = [spec.name for spec in problem.specs[name] if problem.differs(spec, state)]
    running = {key: tensor for key, tensor in state.running.items() if owns or key in differing}
    entry: dict[str, Any] = {"weight": state.weight, "local": state.local, "running": marked(running)}
    if owns:
        entry |= {"solved": marked(state.solved), "remembered": marked(state.remembered)}
        entry["momentum"] = dict(state.momentum)
        entry["refreshed"] = dict(state.refreshed)
    return entry


def _marked(problem: Problem, layer: str, name: str, tensor: Tensor) -> Tensor | Symmetric:
    spec = problem.spec.get((layer, name))
    square = tensor.dim() >= 2 and tensor.shape[-1] == tensor.shape[-2]
    return Symmetric(tensor) if spec is not None and spec.symmetric and square else tensor


@dataclass(frozen=True)
class Shares:
    """All ranks' shares as they were saved.

    Attributes:
        ranks: how many ranks saved, helpers included.
        helpers: how many of these only helped.
        factors: where averaged factors were, as in `Kaisa`.
        owner: layer -> rank that owned it.
        weights: layer -> sum over ranks of the loss terms that the running averages stand for.
        sums: uses and terms over all ranks [layers by name, when reduced, 2]; None in sets of version 0.1.
        waiting: some decomposition may have been under way.
        of: the share of a rank, read when it is asked for.
    """

    ranks: int
    helpers: int
    factors: str
    owner: Mapping[str, int]
    weights: Mapping[str, float]
    sums: Tensor | None
    waiting: bool
    of: Callable[[int], Mapping[str, Any]]

    @staticmethod
    def of_saved(saved: Mapping[str, Any], of: Callable[[int], Mapping[str, Any]], problem: Problem) -> Shares:
        """Out of what `common` told.

        Raises:
            ValueError: it was another method.
        """
        check_method(saved, problem)
        saved = {"sums": None, **saved}
        names = [entry.name for entry in fields(Shares) if entry.name != "of"]
        return Shares(**{name: saved[name] for name in names}, of=of)

    def weights_of(self, rank: int, name: str, problem: Problem) -> dict[str, Weight]:
        """What a rank's running averages of a layer stood for."""
        share = self.of(rank)
        table = share.get("weights")
        numbers = None if table is None else _row(name, problem, table)
        return _weights(share["layers"][name]["weight"], numbers)

    @property
    def trainers(self) -> range:
        return range(self.ranks - self.helpers)

    def fits(self, problem: Problem) -> bool:
        """Whether each rank can simply go on with its own."""
        now = problem.assignment
        return (self.ranks, self.helpers, self.factors) == (now.ranks, now.helpers, now.factors)


def take(shares: Shares, problem: Problem, rank: int, device: torch.device) -> dict[str, LayerState]:
    """This rank's states out of all shares.

    With the same ranks and the same home of the factors every rank gets its own running averages back, bit by bit.
    Else they are averaged, weighted by the loss terms that they stand for. Rows that ranks have gathered are left out
    then: the next statistics bring new ones.

    Raises:
        ValueError: the layers, their tensors or a tensor's shape are not the problem's.
    """
    _check_names(shares.owner, problem)
    if rank not in problem.trainers:
        return {name: LayerState() for name in problem.shapes}
    return {name: _take_layer(name, shares, problem, rank, device) for name in problem.shapes}


def _take_layer(name: str, shares: Shares, problem: Problem, rank: int, device: torch.device) -> LayerState:
    owned = shares.of(shares.owner[name])["layers"][name]
    own = shares.of(rank)["layers"][name] if shares.fits(problem) else None
    owns = problem.assignment.owner[name] == rank
    state = LayerState(weights=_shared_weights(name, shares, problem, owns))
    if own is not None and shares.owner[name] == problem.assignment.owner[name]:
        state.weights = shares.weights_of(rank, name, problem)
    if own is not None:
        state.local = own["local"]
    solved, running = {}, {}
    for spec in problem.specs[name]:
        here = problem.holds(rank, name, spec)
        if spec.name in owned["solved"] and (here or spec.reduce == "gather"):
            solved[spec.name] = owned["solved"][spec.name]
        if spec.role == "running" and here:
            found = _running(name, spec, shares, own, problem)
            if found is not None:
                running[spec.name] = found
    for role, tensors in (("running", running), ("solved", solved)):
        for key, tensor in tensors.items():
            _check(name, key, role, tensor, problem)
    state.running, state.solved = _own(running, device), _own(solved, device)
    if solved:
        state.refreshed = dict(owned["refreshed"])
    if owns:
        state.remembered = _own(owned["remembered"], device)
    if problem.momentum and problem.assignment.works_on(rank, name):
        state.momentum = _own(owned.get("momentum", {}), device)  # sets of version 0.1 have none
    return state


def _running(
    name: str, spec: StateSpec, shares: Shares, own: Mapping[str, Any] | None, problem: Problem
) -> Tensor | None:
    if own is not None and spec.name in own["running"]:
        return own["running"][spec.name]
    owned = shares.of(shares.owner[name])["layers"][name]
    if spec.reduce == "gather":
        return None
    averaged = spec.reduce == "mean" and spec.reduce_at == "refresh"
    if not (averaged and owned["local"] and shares.factors == "all"):
        return owned["running"].get(spec.name)
    parts = [shares.of(rank)["layers"][name] for rank in shares.trainers]
    weights = [shares.weights_of(rank, name, problem)[spec.reduce_at] for rank in shares.trainers]
    there = [spec.name in part["running"] for part in parts]
    numbers = [weight.numbers(here) for weight, here in zip(weights, there, strict=True)]
    divisor = total([sum(column) for column in zip(*numbers, strict=True)], spec.over)
    if divisor == 0:
        return owned["running"].get(spec.name)
    return sum(
        (weight.of(spec.over) / divisor) * part["running"][spec.name]
        for weight, part, here in zip(weights, parts, there, strict=True)
        if here
    )


def _shared_weights(name: str, shares: Shares, problem: Problem, owns: bool) -> dict[str, Weight]:
    """What this rank's running averages stand for, when the ranks or the factors' home have changed."""
    factors = problem.assignment.factors
    factor = float(len(shares.trainers) if shares.factors == "local" else 1)
    weights = {}
    for at in LayerState().weights:
        everywhere = factors == "all" or (factors == "owner" and at == "statistics")
        if not (everywhere or owns):
            weights[at] = Weight()
            continue
        alone = factors == "owner" and not everywhere
        part = factor / (1 if alone else problem.assignment.trainers)
        sums = {} if shares.sums is None else _row(name, problem, shares.sums)
        if at in sums:
            uses, terms = sums[at]
            weights[at] = Weight(uses * part, terms * part)
        else:
            weights[at] = Weight(None, shares.weights[name] * part)
    return weights


def _weights(terms: float, saved: Mapping[str, Sequence[float]] | None) -> dict[str, Weight]:
    """Version 0.1 only told loss terms."""
    if saved is None:
        saved = {}
    unknown = {at: Weight(None, terms) for at in LayerState().weights}
    return unknown | {at: Weight.restored(numbers) for at, numbers in saved.items()}


def _reductions(problem: Problem) -> list[str]:
    """When the method's running averages are reduced: "refresh", "statistics" or both."""
    return sorted({spec.reduce_at for spec in problem.spec.values() if spec.role == "running"})


def _table(states: Mapping[str, LayerState], problem: Problem, numbers: Callable[[Weight], list[float]]) -> Tensor:
    """Numbers of all weights [layers by name, when reduced, numbers]: one small tensor in place of many."""
    when = _reductions(problem)
    rows = [[numbers(states[name].weights[at]) for at in when] for name in sorted(states)]
    return torch.tensor(rows, dtype=torch.float64).view(len(states), len(when), NUMBERS)


def _row(name: str, problem: Problem, table: Tensor) -> dict[str, list[float]]:
    """When reduced -> numbers of a layer."""
    return dict(zip(_reductions(problem), table[sorted(problem.shapes).index(name)].tolist(), strict=True))


def take_pending(shares: Shares, problem: Problem, rank: int, device: torch.device) -> dict[Unit, Any]:
    """Decompositions that are to come into use, for the rank that is to bring them."""
    if not shares.waiting:
        return {}
    order = list(range(shares.ranks))
    if shares.fits(problem):
        order = [rank, *(other for other in order if other != rank)]
    found: dict[Unit, Any] = {}
    for source in order:
        for entry in shares.of(source)["pending"].values():
            unit = entry["layer"], entry["part"]
            if rank in problem.assignment.solvers[unit] and unit not in found:
                result = None if entry["failed"] else _own(entry["result"], device)
                found[unit] = entry["step"], result
    return found


# Checks


def method_of(problem: Problem) -> str:
    """The method's name in what is saved."""
    return type(problem.method).__name__


def check_method(saved: Mapping[str, Any], problem: Problem) -> None:
    """Other methods may keep tensors of the same names and shapes, as K-FAC and TKFAC do, that mean something else.

    Raises:
        ValueError: it was another method; states of version 0.1 do not tell.
    """
    now = method_of(problem)
    if saved.get("method", now) != now:
        raise ValueError(f"the method was {saved['method']} when this was saved, and now is {now}; use that")


def _own(tensors: Mapping[str, Tensor], device: torch.device) -> State:
    return {key: torch.as_tensor(tensor).detach().clone().to(device) for key, tensor in tensors.items()}


def _check_names(saved: Mapping[str, Any], problem: Problem) -> None:
    if set(saved) != set(problem.shapes):
        names = ", ".join(sorted(set(saved) ^ set(problem.shapes))[:5])
        raise ValueError(
            f"the saved layers differ from the model's: {names}; load into the same model, with the same layers frozen"
        )


def _check(layer: str, key: str, role: str, tensor: Tensor, problem: Problem) -> None:
    spec = problem.spec.get((layer, key))
    if spec is None:
        names = ", ".join(spec.name for spec in problem.specs[layer])
        raise ValueError(
            f"{layer}.{key} is not part of {type(problem.method).__name__}, which keeps {names}; "
            "load into the same method"
        )
    needed, found = spec.shape, tuple(tensor.shape)
    if role == "solved":  # rows of any number of ranks
        ranks = max(1, *(found[axis] // needed[axis] for axis in spec.rank_axes)) if spec.rank_axes else 1
        needed = spec.full_shape(ranks)
    if found != needed:
        raise ValueError(
            f"{layer}.{key} has shape {found}, this model and method need {needed}; load into the same model and method"
        )
