"""What all ranks must have in common, compared when a preconditioner is made and in its first step."""

from __future__ import annotations

import gc
import hashlib
import math
import sys
import weakref
from collections.abc import Iterable, Mapping
from enum import Enum
from typing import Any

import torch
from torch import Tensor, nn

from hpc_kfac.distributed.communicator import Communicator
from hpc_kfac.distributed.texts import exchange, long_text_of_first
from hpc_kfac.guards.same_weights import listed
from hpc_kfac.layers import CapturedLayer
from hpc_kfac.notices import Refused

PLAIN = (bool, int, float, complex, str, bytes, type(None), torch.dtype, Enum)
PROBED = 1 << 16
"""So many entries of a gradient are compared one by one, the rest by their norm."""
TOLERANCE = 1e-3
"""An allreduce gives all ranks the same bits; what they do to gradients afterwards, such as clipping, may round."""
IMPLEMENTATION = {"foreach", "fused", "capturable", "differentiable"}
"""What an optimizer's group says of the kernels that it uses."""
AVERAGE = (
    "average them before preconditioner.step(): with Horovod by optimizer.synchronize(), with DistributedDataParallel"
    " by the last backward() outside no_sync(), else by an allreduce of every .grad"
)


def describe(layers: Mapping[str, CapturedLayer], settings: Mapping[str, Any]) -> dict[str, str]:
    """What ranks compare, as text by topic: each captured layer, and each setting."""
    facts = {}
    for name, layer in layers.items():
        shapes = ", ".join(f"{str(p.dtype).removeprefix('torch.')} {list(p.shape)}" for p in layer.parameters)
        facts[f"layer '{name}'"] = f"{type(layer.module).__name__} of {shapes}"
    return facts | {name: _text(value) for name, value in settings.items()}


def describe_optimizer(optimizer: Any) -> dict[str, str]:
    """Its class, and the numbers of each group, such as learning rates; not how it is implemented."""
    facts = {"the optimizer": type(optimizer).__name__}
    for position, group in enumerate(getattr(optimizer, "param_groups", ())):
        for key, value in group.items():
            if isinstance(value, Tensor) and value.numel() == 1:
                value = value.item()
            plain = all(isinstance(each, int | float) for each in (value if isinstance(value, tuple) else (value,)))
            if plain and key not in IMPLEMENTATION:
                facts[f"{key} of the optimizer's group {position}"] = _text(value)
    return facts


def check_optimizers(optimizer: Any, comm: Communicator, step: int, sure: bool = False) -> None:
    """Compares this rank's optimizer with rank 0's. Collective; one message of a number a rank if they are alike.

    Args:
        optimizer: takes the gradients; None if there is none.
        comm: the ranks.
        step: of the training.
        sure: they differ, and this is to name what does.

    Raises:
        Refused: on all ranks, naming the first difference and the ranks where it is.
    """
    found = find_difference(describe_optimizer(optimizer), comm)
    if found or sure:
        raise Refused(
            f"step {step}: the ranks' optimizers differ: {found or 'learning rate or momentum'}; make them alike on"
            " all ranks, and give a scheduler that follows the loss, such as ReduceLROnPlateau, the mean over the ranks"
        )


def check_alike(facts: Mapping[str, str], comm: Communicator) -> None:
    """Compares the facts of all ranks. Collective; one message of a number a rank if they are equal.

    Raises:
        ValueError: on all ranks, naming the first difference from rank 0 and the ranks where it is.
    """
    if found := find_difference(facts, comm):
        raise ValueError(
            f"the ranks' preconditioners differ: {found}; make them of the same model and with the same settings on all"
            " ranks"
        )


def find_difference(facts: Mapping[str, str], comm: Communicator) -> str:
    """The first difference from rank 0 and the ranks where it is, in words; empty if there is none. Collective."""
    if comm.size == 1:
        return ""
    text = "\n".join(f"{topic}\t{fact}" for topic, fact in facts.items())
    own = int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), signed=True)
    found, work = comm.allgather(torch.tensor([own]), "control", "what ranks must have in common")
    work.wait()
    if bool((found == found[0]).all()):
        return ""
    first = dict(line.split("\t", 1) for line in long_text_of_first(comm, text).split("\n"))
    differences = exchange(comm, _difference(first, facts))
    worst = next(difference for difference in differences if difference)
    ranks = listed(rank for rank, difference in enumerate(differences) if difference == worst)
    return f"{worst} on rank(s) {ranks}"


def parameters_of(layers: Mapping[str, CapturedLayer]) -> dict[str, nn.Parameter]:
    """The parameters that are preconditioned, by their names in the model."""
    found = {}
    for name, layer in layers.items():
        names = {id(p): key for key, p in layer.module.named_parameters()}
        for parameter in layer.parameters:
            found[f"{name}.{names.get(id(parameter), 'weight')}".lstrip(".")] = parameter
    return found


def check_averaged(layers: Mapping[str, CapturedLayer], comm: Communicator, step: int) -> None:
    """Compares this rank's gradients of captured layers with rank 0's. Collective; two short messages.

    What is missing, sparse or not finite on a rank is not compared.

    Raises:
        Refused: on all ranks, naming the first gradient that differs and the ranks where it does.
    """
    parameters = parameters_of(layers)
    names = list(parameters)
    own = torch.tensor([_probe(p.grad) for p in parameters.values()], dtype=torch.float64)
    reference = own.clone()
    comm.broadcast(reference, 0, "control", "norms of gradients").wait()
    scale = torch.maximum(own[:, 0], reference[:, 0])
    errors = ((own - reference).abs().amax(1) / scale).nan_to_num(0.0, 0.0, 0.0)
    differing = (errors > TOLERANCE).nonzero().flatten().tolist()
    first = torch.tensor([differing[0] if differing else len(names)])
    found, work = comm.allgather(first, "control", "norms of gradients")
    work.wait()
    worst = int(found.min())
    if worst < len(names):
        ranks = listed(rank for rank, value in enumerate(found.flatten().tolist()) if value == worst)
        raise Refused(
            f"step {step}: the gradients are not averaged over the ranks: that of {names[worst]} on rank(s)"
            f" {ranks} differs from rank 0's; {AVERAGE}"
        )


def refuse_gradients(name: str, amount: float, comm: Communicator, step: int) -> None:
    """For gradients that were found to differ. Collective.

    Args:
        name: of the parameter.
        amount: of its gradient on this rank.
        comm: the ranks.
        step: of the training.

    Raises:
        Refused: on all ranks, with the ranks where it differs from the first one that has it.
    """
    found, work = comm.allgather(torch.tensor([amount], dtype=torch.float64), "control", "gradients")
    work.wait()
    amounts = found.flatten()
    first = int(amounts.isfinite().nonzero()[0])
    apart = (amounts - amounts[first]).abs().nan_to_num(0.0)
    ranks = listed((apart > apart.max() * TOLERANCE).nonzero().flatten().tolist())
    raise Refused(
        f"step {step}: the gradients are not averaged over the ranks: that of {name} on rank(s) {ranks} differs from"
        f" rank {first}'s; {AVERAGE}"
    )


def find_averaging(parameters: Iterable[nn.Parameter]) -> list[weakref.ref[Any]]:
    """Horovod's optimizers that average some of these parameters, whichever optimizer the preconditioner was given.

    Looks through all objects, which takes some 0.1 s; nowhere else does Horovod say what it has hooked.
    """
    if "horovod.torch" not in sys.modules:
        return []
    wanted = set(map(id, parameters))
    kinds = (torch.optim.Optimizer,)
    optimizers = [each for each in gc.get_objects() if issubclass(type(each), kinds) and _of_horovod(each)]
    held = ((each, {id(p) for group in each.param_groups for p in group["params"]}) for each in optimizers)
    return [weakref.ref(each) for each, ids in held if not wanted.isdisjoint(ids)]


def _of_horovod(optimizer: Any) -> bool:
    return hasattr(optimizer, "skip_synchronize") and hasattr(optimizer, "_handles")


def check_synchronized(optimizers: Iterable[Any]) -> None:
    """Whether Horovod's have finished their reductions. Not collective; Horovod begins them on all ranks alike.

    Args:
        optimizers: others among them are not looked at.

    Raises:
        Refused: one has not.
    """
    if any(_of_horovod(each) and each._handles for each in optimizers):
        raise Refused(
            "Horovod still averages the gradients, and they would be preconditioned before: call"
            " optimizer.synchronize() before preconditioner.step(), and afterwards `with optimizer.skip_synchronize():"
            " optimizer.step()`"
        )


def _difference(first: Mapping[str, str], own: Mapping[str, str]) -> str:
    """The first one, in words; empty if there is none."""
    for topic in first:
        if topic not in own:
            return f"{topic} is {first[topic]} on rank 0 and missing"
        if own[topic] != first[topic]:
            return f"{topic} is {first[topic]} on rank 0 and {own[topic]}"
    for topic in own:
        if topic not in first:
            return f"{topic} is missing on rank 0 and {own[topic]}"
    for here, there in zip(own, first, strict=True):
        if here != there:
            return f"{there} comes before {here} on rank 0 and after it"
    return ""


def _text(value: Any) -> str:
    """A value in words that are the same on all ranks: nothing of a user's own class but its name."""
    if isinstance(value, PLAIN):
        return repr(value).replace("\n", " ").replace("\t", " ")
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{_text(key)}: {_text(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(_text, value)) + "]"
    kind = type(value)
    if not kind.__module__.startswith("hpc_kfac."):
        return f"{kind.__module__}.{kind.__qualname__}"
    inside = getattr(value, "__dict__", {})
    return f"{kind.__qualname__}({', '.join(f'{key}={_text(item)}' for key, item in inside.items())})"


def _probe(gradient: Tensor | None) -> list[float]:
    """Norm, and a product with a fixed vector; not finite for what is not compared."""
    if gradient is None or gradient.is_sparse:
        return [math.nan, math.nan]
    gradient = gradient.detach()
    entries = gradient.reshape(-1)[:PROBED].to(torch.promote_types(gradient.dtype, torch.float32))
    vector = torch.arange(1, len(entries) + 1, dtype=entries.dtype, device=entries.device).sin_()
    norm = torch.linalg.vector_norm(gradient, dtype=entries.dtype)
    return torch.stack([norm, entries @ vector]).tolist()
