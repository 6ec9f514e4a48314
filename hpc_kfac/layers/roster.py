"""What a model looked like when its layers were captured, so that a later change of it is noticed."""

from __future__ import annotations

import operator
from collections.abc import Hashable
from zlib import crc32

import torch
from torch import nn

_requires_grad = operator.attrgetter("requires_grad")


class Roster:
    """Remembers the modules and parameters of a model, by identity, and what matters of them.

    Args:
        model: the model.

    Attributes:
        parameters: of the model, as remembered.
        trained: whether each of them required a gradient.
        dtypes: of them.
        devices: of them.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self.remember()

    def remember(self) -> None:
        """Takes the model as it is now."""
        self.parameters = list(self._model.parameters())
        self.trained = [p.requires_grad for p in self.parameters]
        self.dtypes = [p.dtype for p in self.parameters]
        self.devices = [p.device for p in self.parameters]
        self._words, self._things = _described(self._model)

    def differs(self, thorough: bool) -> bool:
        """Whether something has changed: what is frozen and the dtype; with `thorough` modules and parameters, too."""
        if list(map(_requires_grad, self.parameters)) != self.trained:
            return True
        if self.parameters and self.parameters[0].dtype != self.dtypes[0]:
            return True
        if not thorough:
            return False
        words, things = _described(self._model)
        if words != self._words or not all(map(operator.is_, things, self._things)):
            return True
        now = [(p.dtype, p.device) for p in self.parameters]
        return now != list(zip(self.dtypes, self.devices, strict=True))

    def fingerprint(self) -> int:
        """A number that tells the model as it is now from others, by names, classes, shapes, dtypes and what trains."""
        words, things = _described(self._model)
        trained = [p.requires_grad for p in things if isinstance(p, nn.Parameter)]
        return crc32(repr((words, trained)).encode())

    def moved(self, parameter: torch.Tensor) -> torch.device | None:
        """The device that a parameter was on, if it is on another one now."""
        for known, device in zip(self.parameters, self.devices, strict=True):
            if known is parameter:
                return device if device != parameter.device else None
        return None


def _described(model: nn.Module) -> tuple[list[Hashable], list[object]]:
    """Every module with its parameters: in words, and the things themselves."""
    words: list[Hashable] = []
    things: list[object] = []
    for name, module in model.named_modules():
        kind = type(module)
        words.append((name, kind.__module__, kind.__qualname__, "forward" in vars(module)))
        things.append(module)
        for key, parameter in module._parameters.items():
            if parameter is not None:
                words.append((key, tuple(parameter.shape), str(parameter.dtype)))
                things.append(parameter)
    return words, things
