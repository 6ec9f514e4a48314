"""Notices that `step` is called again on gradients that it has written itself."""

from __future__ import annotations

import weakref
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from hpc_kfac.notices import Notices, Refused

SAMPLE = 4
"""So many entries are compared: a gradient may be written past torch, as by a message or through numpy."""


class Written:
    """One gradient as the last step left it.

    It counts as unchanged if it is the same tensor at the same version with the same entries, and nothing that could
    have made a new one has entered an autograd graph since.

    Args:
        parameters: of the captured layers; the first that has a gradient is looked at.
    """

    def __init__(self, parameters: Iterable[nn.Parameter]) -> None:
        self._parameters = tuple(parameters)
        self._parameter: nn.Parameter | None = None

    def note(self, written: bool) -> None:
        """A step is over, and has written gradients."""
        self._parameter = next((p for p in self._parameters if p.grad is not None), None) if written else None
        if self._parameter is not None:
            gradient = self._parameter.grad
            assert gradient is not None
            self._is, self._version = weakref.ref(gradient), gradient._version
            self._entries, self._graph = _entries(gradient), torch.autograd._get_sequence_nr()

    def check(self, notices: Notices, refuse: bool) -> None:
        """Tells that the gradients are still the ones that were noted.

        Args:
            notices: get a warning, if it is not refused.
            refuse: raises Refused; in training it has no meaning.
        """
        if not self._is_unchanged():
            return
        text = (
            "step() was called twice for one backward pass: the gradients are those that the last step() has written,"
            " and are preconditioned again; call it once, after backward() and before optimizer.step()"
        )
        if refuse:
            raise Refused(text)
        notices.once("step twice", text)

    def _is_unchanged(self) -> bool:
        gradient = None if self._parameter is None else self._parameter.grad
        return (
            gradient is not None
            and self._is() is gradient
            and self._version == gradient._version
            and self._graph == torch.autograd._get_sequence_nr()
            and any(self._entries)
            and self._entries == _entries(gradient)
        )


def _entries(gradient: Tensor) -> list[float]:
    """Some entries, as they lie in memory; none where reading them would wait for a device."""
    if gradient.device.type != "cpu" or gradient.numel() < SAMPLE:
        return []
    return gradient.as_strided((SAMPLE,), (1,)).tolist()
