"""The door for layers and methods that are not the package's own."""

from __future__ import annotations

import warnings
from typing import Any, TypeVar, overload

from torch import nn

from hpc_kfac.layers import CapturedLayer, selection
from hpc_kfac.methods.method import NAMED, Method, is_method

M = TypeVar("M", bound=Method)


@overload
def register(kind: type[M]) -> type[M]: ...
@overload
def register(kind: type[nn.Module], layer: type[CapturedLayer]) -> None: ...
def register(kind: Any, layer: Any = None) -> Any:
    """Has modules of a class captured, or a method known by its name.

    Modules are captured from the next preconditioner on, in place of what captured them before; those of subclasses are
    too, unless they have a forward of their own. A method is then in `METHODS` and in run files by its name.

    Args:
        kind: the class of the modules, or of the method.
        layer: says what is captured of the modules; not for a method.

    Returns:
        The method's class, so that it can be a decorator.

    Raises:
        ValueError: a class of another kind, or a method without a name or with one that is taken.
    """
    if layer is None:
        if not is_method(kind):
            raise ValueError(
                f"{kind!r} is no complete class of methods; give a subclass of hpc_kfac.Method, or for a layer two"
                " classes: register(module class, layer class)"
            )
        if not kind.name:
            raise ValueError(f'{kind!r} has no name to be known by; give it one: name = "mine"')
        NAMED.add(kind)
        return kind
    if not (isinstance(kind, type) and issubclass(kind, nn.Module)):
        raise ValueError(f"{kind!r} is no class of modules; give a subclass of torch.nn.Module")
    if not (isinstance(layer, type) and issubclass(layer, CapturedLayer)):
        raise ValueError(f"{layer!r} is no class of layers; give a subclass of hpc_kfac.CapturedLayer")
    selection.FAMILIES[kind] = layer
    return None


def register_layer(module: type[nn.Module], layer: type[CapturedLayer]) -> None:
    """The old name of `register`, for one release."""
    warnings.warn(
        "hpc_kfac.register_layer is hpc_kfac.register now; the old name goes with the next release",
        FutureWarning,
        stacklevel=2,
    )
    register(module, layer)
