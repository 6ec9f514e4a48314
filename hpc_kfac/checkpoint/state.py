"""What goes into a checkpoint: the state of model, optimizer, preconditioner and random numbers as trees, and back.

Rank 0 writes what all ranks share; every rank writes its share of the curvature, and what is its own.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from copy import deepcopy
from functools import partial
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from hpc_kfac.checkpoint.tree import Tree
from hpc_kfac.checkpoint.values import as_tree, check_tensor, from_tree, refusal
from hpc_kfac.owner_optimizer import OwnerOptimizer


class Curvature(Protocol):
    """What is saved of a `Preconditioner`, or of what stands in for one."""

    def share(self) -> tuple[dict[str, Any], dict[str, Any]]: ...

    def prepare_shares(
        self, common: Mapping[str, Any], of: Callable[[int], Mapping[str, Any]]
    ) -> Callable[[], None]: ...

    def keep(self) -> Callable[[], None]: ...


def collect(
    model: nn.Module, optimizer: Optimizer | OwnerOptimizer | None, preconditioner: Curvature | None
) -> tuple[Tree, Tree]:
    """What all ranks share, and this rank's own. Collective; tensors are references.

    Raises:
        TypeError: as `collect_local`.
    """
    common, own = collect_local(model, optimizer)
    if preconditioner is not None:
        add_curvature(common, own, preconditioner)
    return common, own


def add_curvature(common: Tree, own: Tree, preconditioner: Curvature) -> None:
    """Adds what is saved of a preconditioner. Collective.

    Raises:
        TypeError: its damping keeps something that a checkpoint cannot hold.
    """
    counters, share = preconditioner.share()
    if "damping" in counters:  # may be a user's own
        counters["damping"] = as_tree(counters["damping"], "damping.state_dict()")
    common["preconditioner"] = counters
    own |= share


def curvature(common: Mapping[str, Any]) -> dict[str, Any]:
    """What was added, as `Preconditioner.share` gave it.

    Raises:
        ValueError: nothing was.
    """
    if "preconditioner" not in common:
        raise ValueError("the checkpoint has no preconditioner; load it without one")
    counters = dict(common["preconditioner"])
    return counters | {name: from_tree(counters[name]) for name in ("damping",) if name in counters}


def collect_local(model: nn.Module, optimizer: Optimizer | OwnerOptimizer | None) -> tuple[Tree, Tree]:
    """As `collect`, but for the curvature. Needs no other rank.

    Raises:
        TypeError: the model or the optimizer keeps something that a checkpoint cannot hold.
    """
    common: Tree = {"model": _weights(model.state_dict())}
    own: Tree = {"buffers": _weights(_own_buffers(model)), "rng": random_state()}
    if optimizer is not None:
        common["optimizer"], state = _optimizer(optimizer, model)
        if isinstance(optimizer, OwnerOptimizer):
            common["optimizer"]["owner"] = _owners(optimizer, model)
            own["optimizer"] = state
        else:
            common["optimizer"]["state"] = state
    return common, own


def prepare(
    common: Mapping[str, Any],
    of: Callable[[int], Mapping[str, Any]],
    rank: int,
    ranks: int,
    same: bool,
    model: nn.Module,
    optimizer: Optimizer | OwnerOptimizer | None,
    preconditioner: Curvature | None,
    hyperparameters: bool = True,
) -> Callable[[], None]:
    """Reads and checks what `collect` gave, on any number of ranks; the result puts it in place.

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
        ValueError: something was saved for another model, optimizer or method. Nothing is changed.
    """
    weights = common["model"]
    _check_model(model, weights)
    values = {name: from_tree(value) for name, value in weights.items()}
    parts: list[Callable[[], Any]] = [lambda: model.load_state_dict(values)]
    if preconditioner is not None:
        parts.append(preconditioner.prepare_shares(curvature(common), of))
    if optimizer is not None:
        if "optimizer" not in common:
            raise ValueError("the checkpoint has no optimizer; load it without one")
        parts.append(_prepare_optimizer(optimizer, model, common["optimizer"], of, hyperparameters))
    if rank < ranks:
        parts.append(_prepare_random_state(of(rank)["rng"]))
    buffers = _own_buffers(model)
    saved: Mapping[str, Tensor] = {}
    if buffers:
        saved = of(rank)["buffers"] if same else mean_buffers([of(other)["buffers"] for other in range(ranks)])
    for name, buffer in buffers.items():
        _check_tensor(name, saved[name], buffer)

    def put() -> None:
        for part in parts:
            part()
        for name, buffer in buffers.items():
            buffer.copy_(saved[name])

    return put


@torch.no_grad()
def keep(
    model: nn.Module, optimizer: Optimizer | OwnerOptimizer | None, preconditioner: Curvature | None
) -> Callable[[], None]:
    """Copies the state as it is; the result puts it back in place, whatever has become of it.

    Copied are weights and buffers, to host memory, and the state of optimizers that are not torch's own: those put new
    tensors in the place of the old ones.
    """
    tensors = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    copies = [(tensor, tensor.detach().to("cpu", copy=True)) for tensor in tensors.values()]
    more = [
        (module, deepcopy(module.get_extra_state()))
        for module in model.modules()
        if type(module).get_extra_state is not nn.Module.get_extra_state
    ]
    parts = [_keep_optimizer(inner) for inner in _optimizers(_inner(optimizer))] if optimizer is not None else []
    if preconditioner is not None:
        parts.append(preconditioner.keep())
    parts.append(_prepare_random_state(random_state()))

    @torch.no_grad()
    def put_back() -> None:
        for tensor, copy in copies:
            tensor.copy_(copy)
        for module, value in more:
            module.set_extra_state(value)
        for part in parts:
            part()

    return put_back


def mean_buffers(buffers: list[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Floating-point buffers averaged over the ranks that had them, by name."""
    return {
        name: torch.stack([one[name].double() for one in buffers]).mean(0).to(first.dtype)
        for name, first in buffers[0].items()
    }


# Model


def _weights(named: Mapping[str, Any]) -> Tree:
    found: Tree = {}
    for name, value in named.items():
        about = f"{name} in the model's state"
        if not isinstance(value, Tensor):  # of a module's get_extra_state
            found[name] = as_tree(value, about)
            continue
        if callable(getattr(value, "full_tensor", None)):
            raise refusal(value, about)
        check_tensor(value, about)
        found[name] = value.detach()
    return found


def _own_buffers(model: nn.Module) -> dict[str, Tensor]:
    """Those that differ between ranks, as the running statistics of a batch norm do."""
    kept = model.state_dict(keep_vars=True)
    named = {name: buffer for name, buffer in model.named_buffers() if name in kept}
    return {name: buffer for name, buffer in named.items() if buffer.is_floating_point()}


def _check_model(model: nn.Module, saved: Mapping[str, Any]) -> None:
    present = model.state_dict()
    for name in sorted(set(present) ^ set(saved)):
        where = "the model has it, the checkpoint has not" if name in present else "the checkpoint has it alone"
        raise ValueError(f"{name}: {where}; load into the model that was saved")
    for name, tensor in present.items():
        _check_tensor(name, saved[name], tensor)


def _check_tensor(name: str, saved: Any, present: Any) -> None:
    if not isinstance(present, Tensor):
        return
    if not isinstance(saved, Tensor):
        raise ValueError(f"{name} is no tensor in the checkpoint; load into the model that was saved")
    if present.shape != saved.shape:
        raise ValueError(
            f"{name} has shape {tuple(saved.shape)} in the checkpoint and {tuple(present.shape)} in the model;"
            " load into the model that was saved"
        )
    if not torch.can_cast(saved.dtype, present.dtype):  # real for complex, whole for real
        raise ValueError(
            f"{name} is of {saved.dtype} in the checkpoint and of {present.dtype} in the model; load into the model"
            " that was saved"
        )


# Optimizer


def _names(model: nn.Module) -> dict[int, str]:
    return {id(parameter): name for name, parameter in model.named_parameters()}


def _owners(optimizer: OwnerOptimizer, model: nn.Module) -> Tree:
    names = _names(model)
    return {names[key]: rank for key, rank in optimizer.owners.items()}


def _inner(optimizer: Optimizer | OwnerOptimizer) -> Optimizer:
    return optimizer.optimizer if isinstance(optimizer, OwnerOptimizer) else optimizer


def _optimizer(optimizer: Optimizer | OwnerOptimizer, model: nn.Module) -> tuple[Tree, Tree]:
    """All but the state: hyperparameters by group, with the names of its parameters; and state by parameter name."""
    names, inner = _names(model), _inner(optimizer)
    missing = [p for group in inner.param_groups for p in group["params"] if id(p) not in names]
    if missing:
        raise TypeError(f"the optimizer has {len(missing)} parameter(s) that are not the model's; save them apart")
    ordered = [names[id(p)] for group in inner.param_groups for p in group["params"]]
    packed = inner.state_dict()
    if not _is_torchs(packed, inner):
        raise TypeError(
            f"the state_dict of the optimizer {type(inner).__name__} is not made as torch's are; save it apart:"
            " extra={'optimizer': optimizer.state_dict()}"
        )
    groups: Tree = {}
    for number, group in enumerate(packed["param_groups"]):
        others = {key: value for key, value in group.items() if key != "params"}
        plain = as_tree(others, f"optimizer.param_groups[{number}]")
        groups[str(number)] = {"params": [ordered[i] for i in group["params"]], **plain}
    state, whole = {}, {}
    for key, entries in packed["state"].items():
        if type(key) is not int:
            whole[key] = entries
        elif entries:
            state[ordered[key]] = as_tree(entries, f"the optimizer's state of {ordered[key]}")
    more = {key: value for key, value in packed.items() if key not in ("state", "param_groups")}
    found: Tree = {"class": type(inner).__name__, "groups": groups}
    for name, value in (("whole", whole), ("more", more)):
        if value:
            found[name] = as_tree(value, f"optimizer.state_dict(): {name}")
    return found, state


def _is_torchs(packed: Any, inner: Optimizer) -> bool:
    """Whether a state dict is as `torch.optim.Optimizer.state_dict` makes it."""
    groups, state = packed.get("param_groups"), packed.get("state")
    if not isinstance(groups, list) or not isinstance(state, dict):
        return False
    numbers = [group.get("params") for group in groups]
    lengths = [len(group["params"]) for group in inner.param_groups]
    if not all(isinstance(group, list) for group in numbers) or [len(group) for group in numbers] != lengths:
        return False
    return [i for group in numbers for i in group] == list(range(sum(lengths)))


def _prepare_optimizer(
    optimizer: Optimizer | OwnerOptimizer,
    model: nn.Module,
    saved: Mapping[str, Any],
    of: Callable[[int], Mapping[str, Any]],
    hyperparameters: bool,
) -> Callable[[], None]:
    names, inner = _names(model), _inner(optimizer)
    parameters = [p for group in inner.param_groups for p in group["params"]]
    present = [[names.get(id(p)) for p in group["params"]] for group in inner.param_groups]
    before = [list(group["params"]) for group in saved["groups"].values()]
    if present != before:
        raise ValueError(
            f"the optimizer has groups of {[len(g) for g in present]} parameters and the checkpoint's had"
            f" {[len(g) for g in before]}, or others; use the same optimizer and the same frozen layers"
        )
    numbers = iter(range(len(parameters)))
    current = [{**group, "params": [next(numbers) for _ in group["params"]]} for group in inner.param_groups]
    kept = [_hyperparameters(group, like) for group, like in zip(saved["groups"].values(), current, strict=True)]
    _check_class(inner, saved.get("class"), kept)
    groups = [{**group, **(old if hyperparameters else {})} for group, old in zip(current, kept, strict=True)]
    mine = {names[id(p)] for p in parameters}
    if isinstance(optimizer, OwnerOptimizer):
        mine = {name for name, rank in _owners(optimizer, model).items() if rank == optimizer.rank}
    states, nested = {}, {}
    for number, parameter in enumerate(parameters):
        name = names[id(parameter)]
        tree = _state_of(name, saved, of) if name in mine else None
        if tree:
            states[number] = from_tree(tree)
            nested[number] = from_tree(tree, partial(_moved, parameter.device))
    whole, more = from_tree(saved.get("whole", {})), from_tree(saved.get("more", {}))

    def put() -> None:
        handed = {number: {k: v for k, v in state.items() if _torch_takes(v)} for number, state in states.items()}
        inner.load_state_dict({"state": {**handed, **whole}, "param_groups": groups, **more})
        for number, state in states.items():
            _mend_state(inner.state[parameters[number]], state, nested[number])

    return put


def _check_class(inner: Optimizer, saved: str | None, kept: list[dict[str, Any]]) -> None:
    """Another optimizer has another name and lacks hyperparameters: a class may be renamed, and may get new ones."""
    present = type(inner).__name__
    if saved not in (None, present) and any(not set(inner.defaults) <= set(group) for group in kept):
        raise ValueError(f"the optimizer was {saved} when this was saved, and now is {present}; use that")


def _moved(device: torch.device, tensor: Tensor) -> Tensor:
    return tensor.to(device)


def _torch_takes(value: Any) -> bool:
    """Whether `Optimizer.load_state_dict` can copy a value of a state: it takes all that can be iterated for a list."""
    if isinstance(value, dict):
        return all(map(_torch_takes, value.values()))
    if isinstance(value, list | tuple):
        return all(map(_torch_takes, value))
    return value is None or isinstance(value, Tensor | int | float | complex)


def _mend_state(state: dict[Any, Any], kept: Mapping[Any, Any], nested: Mapping[Any, Any]) -> None:
    """Torch gives state the weight's dtype, and may lose bits, and containers the types of its own."""
    for key, value in kept.items():
        if isinstance(value, Tensor):
            loaded = state.get(key)
            if isinstance(loaded, Tensor) and loaded.dtype != value.dtype:
                state[key] = value.to(loaded.device)
        elif not (value is None or isinstance(value, int | float)):
            state[key] = nested[key]


def _state_of(name: str, saved: Mapping[str, Any], of: Callable[[int], Mapping[str, Any]]) -> Mapping[str, Any] | None:
    if "owner" in saved:
        return of(saved["owner"][name])["optimizer"].get(name)
    return saved["state"].get(name)


def _hyperparameters(saved: Mapping[str, Any], like: Mapping[str, Any]) -> dict[str, Any]:
    """A group's, on the devices and with tuples where they are now: schema 1 had lists alone."""
    taken = from_tree({key: value for key, value in saved.items() if key != "params"})
    for key, value in taken.items():
        if isinstance(value, list) and isinstance(like.get(key), tuple):
            taken[key] = tuple(value)
        if isinstance(value, Tensor) and isinstance(like.get(key), Tensor):
            taken[key] = value.to(like[key].device)
    return taken


def _optimizers(optimizer: Optimizer) -> list[Optimizer]:
    """An optimizer and those that it is made of."""
    found = [optimizer]
    for other in found:
        for value in vars(other).values():
            for part in value if isinstance(value, list | tuple) else [value]:
                if isinstance(part, Optimizer) and all(part is not known for known in found):
                    found.append(part)
    return found


def _keep_optimizer(optimizer: Optimizer) -> Callable[[], None]:
    """Puts back the very objects that were there, with what they held."""
    attributes = dict(vars(optimizer))
    containers: list[tuple[Any, Any]] = [(optimizer.state, dict(optimizer.state))]
    containers += [(entries, dict(entries)) for entries in optimizer.state.values() if isinstance(entries, dict)]
    containers += [(group, dict(group)) for group in optimizer.param_groups]
    groups = list(optimizer.param_groups)
    held = [value for _, entries in containers[1:] for value in entries.values() if isinstance(value, Tensor)]
    copies = [(tensor, tensor.detach().clone()) for tensor in held] if _in_place(optimizer) else []

    def put_back() -> None:
        vars(optimizer).clear()
        vars(optimizer).update(attributes)
        optimizer.param_groups[:] = groups
        for container, entries in containers:
            container.clear()
            container.update(entries)
        for tensor, copy in copies:
            tensor.copy_(copy)

    return put_back


def _in_place(optimizer: Optimizer) -> bool:
    """Whether loading may write into the tensors that are there, as torch's own optimizers never do."""
    hooks = optimizer._optimizer_load_state_dict_pre_hooks or optimizer._optimizer_load_state_dict_post_hooks
    return bool(hooks) or not type(optimizer).__module__.startswith("torch.optim.")


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


def _prepare_random_state(state: Mapping[str, Any]) -> Callable[[], None]:
    """Reads `random_state`; the result puts it in place."""
    old, python = state["numpy"], state["python"]
    keys = old["keys"].numpy().astype(np.uint32)
    numpys = ("MT19937", keys, old["position"], old["has_gauss"], old["gauss"])
    words = tuple(python["words"].tolist())
    pythons = (python["version"], words, python["gauss"])
    torchs, cudas = state["torch"], state.get("cuda")

    def put() -> None:
        torch.set_rng_state(torchs)
        np.random.set_state(numpys)  # noqa: NPY002
        random.setstate(pythons)
        if cudas is not None and torch.cuda.is_available():
            torch.cuda.set_rng_state(cudas)

    return put
