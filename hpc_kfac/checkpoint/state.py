"""What goes into a checkpoint: the state of model, optimizer, preconditioner and random numbers as trees, and back.

Rank 0 writes what all ranks share; every rank writes its share of the curvature, and what is its own.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from hpc_kfac.checkpoint.tree import Tree
from hpc_kfac.owner_optimizer import OwnerOptimizer

LIST = "list of"
"""Key of what stands for a list with tensors in it: how many entries, which follow by number."""


class Curvature(Protocol):
    """What is saved of a `Preconditioner`, or of what stands in for one."""

    def share(self) -> tuple[dict[str, Any], dict[str, Any]]: ...

    def load_shares(self, common: Mapping[str, Any], of: Callable[[int], Mapping[str, Any]]) -> None: ...


def collect(
    model: nn.Module, optimizer: Optimizer | OwnerOptimizer | None, preconditioner: Curvature | None
) -> tuple[Tree, Tree]:
    """What all ranks share, and this rank's own. Collective; tensors are references.

    Raises:
        TypeError: the optimizer keeps something that is neither a tensor nor a plain value.
    """
    common: Tree = {"model": _tensors(model.state_dict())}
    own: Tree = {"buffers": _tensors(_own_buffers(model)), "rng": random_state()}
    if optimizer is not None:
        groups, state = _optimizer(optimizer, model)
        common["optimizer"] = {"groups": groups}
        if isinstance(optimizer, OwnerOptimizer):
            common["optimizer"]["owner"] = _owners(optimizer, model)
            own["optimizer"] = state
        else:
            common["optimizer"]["state"] = state
    if preconditioner is not None:
        common["preconditioner"], share = preconditioner.share()
        own |= share
    return common, own


def restore(
    common: Mapping[str, Any],
    of: Callable[[int], Mapping[str, Any]],
    rank: int,
    ranks: int,
    same: bool,
    model: nn.Module,
    optimizer: Optimizer | OwnerOptimizer | None,
    preconditioner: Curvature | None,
    hyperparameters: bool = True,
) -> None:
    """Puts back what `collect` gave, on any number of ranks.

    Args:
        common: what all ranks shared.
        of: gives a saving rank's own.
        rank: this rank.
        ranks: how many ranks trained when this was saved.
        same: they are as many now.
        model: gets the weights. Buffers such as the running statistics of a batch norm are this rank's own if the ranks
            are as many as then, else the mean over those.
        optimizer: gets its state.
        preconditioner: gets the curvature.
        hyperparameters: also take the learning rate and such from the checkpoint.

    Raises:
        ValueError: something was saved for another model, optimizer or method.
    """
    _load_model(model, common["model"])
    if preconditioner is not None:
        if "preconditioner" not in common:
            raise ValueError("the checkpoint has no preconditioner; load it without one")
        preconditioner.load_shares(common["preconditioner"], of)
    if optimizer is not None:
        if "optimizer" not in common:
            raise ValueError("the checkpoint has no optimizer; load it without one")
        _load_optimizer(optimizer, model, common["optimizer"], of, hyperparameters)
    if rank < ranks:
        set_random_state(of(rank)["rng"])
    buffers = _own_buffers(model)
    if same:
        for name, buffer in buffers.items():
            buffer.copy_(of(rank)["buffers"][name])
    elif buffers:
        for name, mean in mean_buffers([of(other)["buffers"] for other in range(ranks)]).items():
            buffers[name].copy_(mean)


def mean_buffers(buffers: list[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Floating-point buffers averaged over the ranks that had them, by name."""
    return {
        name: torch.stack([one[name].double() for one in buffers]).mean(0).to(first.dtype)
        for name, first in buffers[0].items()
    }


# Model


def _tensors(named: Mapping[str, Any]) -> Tree:
    for name, value in named.items():
        if not isinstance(value, Tensor):
            raise TypeError(f"{name} in the model's state is a {type(value).__name__}; only tensors can be saved")
    return {name: value.detach() for name, value in named.items()}


def _own_buffers(model: nn.Module) -> dict[str, Tensor]:
    """Those that differ between ranks, as the running statistics of a batch norm do."""
    kept = model.state_dict(keep_vars=True)
    named = {name: buffer for name, buffer in model.named_buffers() if name in kept}
    return {name: buffer for name, buffer in named.items() if buffer.is_floating_point()}


def _load_model(model: nn.Module, saved: Mapping[str, Tensor]) -> None:
    present = model.state_dict()
    for name in sorted(set(present) ^ set(saved)):
        where = "the model has it, the checkpoint has not" if name in present else "the checkpoint has it alone"
        raise ValueError(f"{name}: {where}; load into the model that was saved")
    for name, tensor in present.items():
        if tensor.shape != saved[name].shape:
            raise ValueError(
                f"{name} has shape {tuple(saved[name].shape)} in the checkpoint and {tuple(tensor.shape)} in the model;"
                " load into the model that was saved"
            )
    model.load_state_dict(dict(saved))


# Optimizer


def _names(model: nn.Module) -> dict[int, str]:
    return {id(parameter): name for name, parameter in model.named_parameters()}


def _owners(optimizer: OwnerOptimizer, model: nn.Module) -> Tree:
    names = _names(model)
    return {names[key]: rank for key, rank in optimizer.owners.items()}


def _inner(optimizer: Optimizer | OwnerOptimizer) -> Optimizer:
    return optimizer.optimizer if isinstance(optimizer, OwnerOptimizer) else optimizer


def _optimizer(optimizer: Optimizer | OwnerOptimizer, model: nn.Module) -> tuple[Tree, Tree]:
    """Hyperparameters by group, with the names of its parameters, and state by parameter name."""
    names, inner = _names(model), _inner(optimizer)
    groups: Tree = {}
    for number, group in enumerate(inner.param_groups):
        missing = [p for p in group["params"] if id(p) not in names]
        if missing:
            raise TypeError(f"the optimizer has {len(missing)} parameter(s) that are not the model's; save them apart")
        plain = {key: as_tree(value, key) for key, value in group.items() if key != "params"}
        groups[str(number)] = {"params": [names[id(p)] for p in group["params"]], **plain}
    state = {names[id(p)]: as_tree(entries, names[id(p)]) for p, entries in inner.state.items() if entries}
    return groups, state


def _load_optimizer(
    optimizer: Optimizer | OwnerOptimizer,
    model: nn.Module,
    saved: Mapping[str, Any],
    of: Callable[[int], Mapping[str, Any]],
    hyperparameters: bool,
) -> None:
    names, inner = _names(model), _inner(optimizer)
    present = [[names[id(p)] for p in group["params"]] for group in inner.param_groups]
    before = [list(group["params"]) for group in saved["groups"].values()]
    if present != before:
        raise ValueError(
            f"the optimizer has groups of {[len(g) for g in present]} parameters and the checkpoint's had"
            f" {[len(g) for g in before]}, or others; use the same optimizer and the same frozen layers"
        )
    mine = {name for group in present for name in group}
    if isinstance(optimizer, OwnerOptimizer):
        mine = {name for name, rank in _owners(optimizer, model).items() if rank == optimizer.rank}
    states = {name: _state_of(name, saved, of) for group in present for name in group if name in mine}
    numbers = {name: i for i, name in enumerate(name for group in present for name in group)}
    current = inner.state_dict()["param_groups"]
    groups = [
        _typed({**group, **(_taken(kept) if hyperparameters else {})}, group)
        for group, kept in zip(current, saved["groups"].values(), strict=True)
    ]
    found = {numbers[name]: from_tree(state) for name, state in states.items() if state}
    inner.load_state_dict({"state": found, "param_groups": groups})
    for parameter, state in inner.state.items():  # torch gives state the weight's dtype, and may lose bits
        kept = states.get(names[id(parameter)]) or {}
        for key, value in state.items():
            if isinstance(value, Tensor) and isinstance(kept.get(key), Tensor) and value.dtype != kept[key].dtype:
                state[key] = kept[key].to(value.device)


def _state_of(name: str, saved: Mapping[str, Any], of: Callable[[int], Mapping[str, Any]]) -> Mapping[str, Any] | None:
    if "owner" in saved:
        return of(saved["owner"][name])["optimizer"].get(name)
    return saved["state"].get(name)


def _taken(group: Mapping[str, Any]) -> dict[str, Any]:
    return {key: from_tree(value) for key, value in group.items() if key != "params"}


def _typed(group: dict[str, Any], like: Mapping[str, Any]) -> dict[str, Any]:
    """With tuples where they were tuples."""
    return {key: tuple(v) if isinstance(like.get(key), tuple) else v for key, v in group.items()}


def as_tree(value: Any, about: str) -> Any:
    """Nested dictionaries, lists and tuples of tensors and plain values as what a tree can hold.

    Raises:
        TypeError: there is something else among them.
    """
    if isinstance(value, Tensor):
        return value.detach()
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Mapping):
        return {str(key): as_tree(entry, about) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        if all(isinstance(entry, bool | int | float | str) for entry in value):
            return list(value)
        return {LIST: len(value)} | {str(i): as_tree(entry, about) for i, entry in enumerate(value)}
    raise TypeError(f"{about}: the optimizer keeps a {type(value).__name__}, which cannot be saved")


def from_tree(value: Any) -> Any:
    """The reverse; tuples come back as lists."""
    if not isinstance(value, Mapping):
        return value
    if LIST in value:
        return [from_tree(value[str(i)]) for i in range(value[LIST])]
    return {key: from_tree(entry) for key, entry in value.items()}


# Random numbers


def random_state() -> Tree:
    """Of torch on all devices, numpy and Python."""
    _, keys, position, has_gauss, gauss = np.random.get_state(legacy=True)  # noqa: NPY002 - the user's, whichever it is
    version, words, pair = random.getstate()
    state: Tree = {
        "torch": torch.get_rng_state(),
        "numpy": {
            "keys": torch.from_numpy(np.asarray(keys).astype(np.int64)),
            "position": int(position),
            "has_gauss": int(has_gauss),
            "gauss": float(gauss),
        },
        "python": {"version": version, "words": torch.tensor(words), "gauss": pair},
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def set_random_state(state: Mapping[str, Any]) -> None:
    """Restores `random_state`."""
    torch.set_rng_state(state["torch"])
    old = state["numpy"]
    keys = old["keys"].numpy().astype(np.uint32)
    np.random.set_state(("MT19937", keys, old["position"], old["has_gauss"], old["gauss"]))  # noqa: NPY002
    python = state["python"]
    random.setstate((python["version"], tuple(python["words"].tolist()), python["gauss"]))
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
