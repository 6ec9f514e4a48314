"""The hooks that a capture places on a model. Models that carry them can be copied and saved at every step."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

INFRASTRUCTURE = (
    torch._C._TorchDispatchModeKey.FAKE,
    torch._C._TorchDispatchModeKey.PROXY,
    torch._C._TorchDispatchModeKey.FUNCTIONAL,
)
"""Dispatch modes under which a pass is traced and not computed."""


class Told(Protocol):
    """Whom hooks tell."""

    @property
    def layers(self) -> Mapping[str, Any]:
        """By name."""

    def reached(self, name: str, x: Tensor, output: Tensor) -> None:
        """A forward pass has come through a layer."""

    def completed(self, name: str) -> None:
        """A backward pass has completed the gradient of a layer's weight."""


class ForwardHook:
    """On a module: tells of its forward passes.

    Args:
        capture: what is told.
        name: of the layer.
    """

    def __init__(self, capture: Told, name: str) -> None:
        self._capture, self._name = capture, name

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> None:
        # A replica of the module has the same hook.
        if torch.compiler.is_compiling() or module is not self._capture.layers[self._name].module:
            return
        if is_plain(output):
            self._capture.reached(self._name, args[0] if args else kwargs["input"], output)

    @property
    def __name__(self) -> str:
        """None: torch.jit.script asks for it, to compile a hook; it shows what is raised here."""
        raise AttributeError(
            "torch.jit.script cannot compile a model that has a preconditioner's hooks: script it before the"
            " preconditioner is made, or after preconditioner.remove()"
        )

    def __reduce__(self) -> tuple[Any, ...]:
        # A callable that does nothing. It is from the standard library, so that a saved model can be loaded where this
        # package is not installed.
        return getattr, (contextlib.nullcontext(), "__exit__")


class GradientHook:
    """On a weight: tells that a backward pass has completed its gradient.

    Args:
        capture: held weakly: the garbage collector does not see what torch's hooks on parameters hold.
        name: of the layer.
    """

    def __init__(self, capture: Told, name: str) -> None:
        self._found, self._name = weakref.ref(capture), name

    @torch._disable_dynamo
    def __call__(self, parameter: nn.Parameter) -> None:
        capture = self._found()
        if capture is not None:
            capture.completed(self._name)


def is_plain(output: Any) -> bool:
    """Whether a pass is one of the module itself, not inside torch.func and not traced for another program."""
    return (
        isinstance(output, Tensor)
        and torch._C._functorch.peek_interpreter_stack() is None
        and torch._C._get_tracing_state() is None
    )


def is_computed(output: Tensor) -> bool:
    """Whether there are numbers in it: on the meta device and in fake tensors there are none."""
    return (
        not isinstance(output, FakeTensor)
        and not output.is_meta
        and all(torch._C._get_dispatch_mode(mode) is None for mode in INFRASTRUCTURE)
    )


def is_stand_in(hook: object) -> bool:
    """Whether a hook is what `ForwardHook` became in a copied or loaded model."""
    return isinstance(getattr(hook, "__self__", None), contextlib.nullcontext)


def remove_stand_ins(module: nn.Module) -> None:
    """Takes off what earlier copies have left, so that it does not pile up over saves and loads."""
    for key in [key for key, hook in module._forward_hooks.items() if is_stand_in(hook)]:
        del module._forward_hooks[key]
        module._forward_hooks_with_kwargs.pop(key, None)
