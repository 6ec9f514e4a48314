"""Which modules of a model are captured, and why the others are not."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch
from torch import nn
from torch.nn.parameter import UninitializedParameter
from torch.nn.utils.parametrize import is_parametrized

from hpc_kfac.layers.conv import ConvLayer
from hpc_kfac.layers.embedding import EmbeddingLayer
from hpc_kfac.layers.layer import CapturedLayer
from hpc_kfac.layers.linear import LinearLayer
from hpc_kfac.layers.norm import BatchNormLayer, GroupNormLayer, LayerNormLayer, RMSNormLayer

FAMILIES: dict[type[nn.Module], type[CapturedLayer]] = {
    family: layer
    for layer in (LinearLayer, ConvLayer, EmbeddingLayer, BatchNormLayer, LayerNormLayer, GroupNormLayer, RMSNormLayer)
    for family in layer.families
}

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
"""Of weights that can be preconditioned."""

SHARDED = ("DTensor", "FullyShardedDataParallel", "FlatParameter")
"""Classes of torch.distributed whose weights are spread over ranks."""

# Modules that use their weights, and those of their children, without calling the children.
CLOSED: dict[type[nn.Module], str] = {
    nn.MultiheadAttention: "multi-head attention calls a fused function instead of its projections",
    nn.RNNBase: "recurrent layers show no input and gradient for each time step",
    nn.RNNCellBase: "recurrent cells hold their weights outside any linear layer",
}


@dataclass(frozen=True)
class LeftOut:
    """A module whose trainable parameters are left to the base optimizer.

    Attributes:
        name: its name in the model.
        reason: why.
        parameters: number of trainable parameters that it holds.
    """

    name: str
    reason: str
    parameters: int


def select(
    model: nn.Module, skip: Sequence[str] = (), without: Mapping[str, str] | None = None, again: bool = False
) -> tuple[dict[str, CapturedLayer], list[LeftOut]]:
    """The layers of a model that can be captured, and everything else that has trainable parameters.

    Args:
        model: the model; a module that is registered under several names goes by the first.
        skip: name patterns (``fnmatch``) of modules to leave out, with everything inside them.
        without: names of layers to leave out for a reason that does not show in the module.
        again: a pattern may match nothing that is trained by now.

    Raises:
        ValueError: a pattern matches no module with trainable parameters, a lazy module is not initialised yet, or a
            weight is sharded over ranks.
    """
    without = {} if without is None else without
    holders = _holders(model)
    layers: dict[str, CapturedLayer] = {}
    left_out: list[LeftOut] = []
    names = []
    matched: set[str] = set()
    for name, module, closed in _modules(model):
        held = module.parameters(recurse=closed is not None)
        parameters = [parameter for parameter in held if parameter.requires_grad]
        _check_whole(name, module, parameters)
        if not parameters:
            continue
        if any(isinstance(parameter, UninitializedParameter) for parameter in parameters):
            raise ValueError(f"lazy module {name!r} has no weights yet; run one forward pass before preconditioning it")
        names.append(name)
        patterns = [pattern for pattern in skip if _matches(name, pattern)]
        matched.update(patterns)
        if patterns:
            reason: str | None = f"skipped by pattern {patterns[0]!r}"
        else:
            reason = closed or _tied(name, parameters, holders) or _obstacle(module) or without.get(name)
        if reason is None:
            layers[name] = FAMILIES[_family(module) or type(module)](name, module)
        else:
            left_out.append(LeftOut(name, reason, sum(parameter.numel() for parameter in parameters)))
    for pattern in () if again else skip:
        if pattern not in matched:
            some = ", ".join(repr(name) for name in names[:5]) + (", ..." if len(names) > 5 else "")
            raise ValueError(f"skip pattern {pattern!r} matches no layer; the layers are {some}")
    return layers, left_out


def named_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Every module with its name; one inside torch.compile's wrapper is called as it is without."""
    for name, module in model.named_modules():
        yield ".".join(part for part in name.split(".") if part != "_orig_mod"), module


def _modules(model: nn.Module) -> Iterator[tuple[str, nn.Module, str | None]]:
    """Every module once, with the reason that closes it; nothing from inside a closed module."""
    inside: set[int] = set()
    for name, module in named_modules(model):
        if id(module) in inside:
            continue
        closed = next((reason for kind, reason in CLOSED.items() if isinstance(module, kind)), None)
        if is_parametrized(module):
            closed = "its weight is parametrized: it is computed from other parameters"
        if closed is not None:
            inside.update(id(child) for child in module.modules())
        yield name, module, closed


def _holders(model: nn.Module) -> dict[int, list[str]]:
    """Names of the modules that hold each parameter."""
    holders: dict[int, list[str]] = {}
    for name, module in named_modules(model):
        for parameter in module.parameters(recurse=False):
            holders.setdefault(id(parameter), []).append(name)
    return holders


def _tied(name: str, parameters: Sequence[nn.Parameter], holders: dict[int, list[str]]) -> str | None:
    others = {other for parameter in parameters for other in holders[id(parameter)] if other != name}
    return f"tied with {', '.join(sorted(others))}" if others else None


def _family(module: nn.Module) -> type[nn.Module] | None:
    return next((kind for kind in type(module).__mro__ if kind in FAMILIES), None)


def _obstacle(module: nn.Module) -> str | None:
    """Why a module with trainable parameters of its own cannot be captured; None when it can."""
    kind = qualified(type(module))
    family = _family(module)
    if isinstance(module, torch.jit.ScriptModule):
        return "TorchScript runs it without hooks: precondition the model as it was before torch.jit"
    if type(module) is nn.Module:
        return "an exported program has no layers that are called: precondition the model as it was before torch.export"
    if family is None:
        if isinstance(module, nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d):
            return "transposed convolutions are not supported"
        if type(module).__module__.startswith("torch.nn.modules"):
            return f"{kind} is not supported"
        return f"parameters held directly by {kind}"
    own_forward = "forward" in vars(module) or type(module).forward is not family.forward
    if own_forward or getattr(type(module), "_conv_forward", None) is not getattr(family, "_conv_forward", None):
        return f"{kind} has a forward of its own"
    names = FAMILIES[family].parameter_names
    weight = module._parameters.get(names[0])
    if weight is None:
        return f"its {names[0]} is not a plain parameter"
    if not weight.requires_grad:
        return f"its {names[0]} is frozen"
    extra = set(module._parameters) - set(names)
    if extra:
        return f"{kind} holds further parameters: {', '.join(sorted(extra))}"
    for name in names:
        held = module._parameters.get(name)
        if held is not None and held.dtype not in DTYPES:
            return f"its {name} is {str(held.dtype).removeprefix('torch.')}, and only real floating point is supported"
    return FAMILIES[family].obstacle(module)


def qualified(kind: type) -> str:
    """A class with the module that it comes from, so that it is not taken for another one of the same name."""
    if kind.__module__.startswith("torch.nn.modules"):
        return f"torch.nn.{kind.__qualname__}"
    return f"{kind.__module__}.{kind.__qualname__}"


def _check_whole(name: str, module: nn.Module, parameters: Sequence[nn.Parameter]) -> None:
    """Refuses weights of which this rank has only a part."""
    classes = [kind for thing in (module, *parameters) for kind in type(thing).__mro__]
    kinds = [kind for kind in classes if kind.__name__ in SHARDED]
    found = [qualified(kind) for kind in kinds if kind.__module__.startswith("torch.distributed")]
    found += ["FSDP" for parameter in parameters if hasattr(parameter, "_fsdp_flattened")]
    if found:
        raise ValueError(
            f"module {name or 'the model'!r} has its weights sharded over ranks ({found[0]}), but a layer is"
            " preconditioned as a whole: give the model unsharded, with torch's DistributedDataParallel, Horovod or"
            " hpc_kfac.OwnerOptimizer, which keeps the optimizer's state on one rank each"
        )


def _matches(name: str, pattern: str) -> bool:
    """Whether a pattern matches a module's name or that of a module around it."""
    parts = name.split(".")
    return any(fnmatchcase(".".join(parts[:end]), pattern) for end in range(1, len(parts) + 1))
