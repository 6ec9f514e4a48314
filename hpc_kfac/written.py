"""Notices that `step` meets gradients that it has written itself: again as they are, or with new ones added to them."""

from __future__ import annotations

import weakref
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from hpc_kfac.layers import Capture
from hpc_kfac.notices import Notices, Refused

SAMPLE = 4
"""So many entries are compared: a gradient may be written past torch, as by a message or through numpy."""


class Written:
    """One gradient as the last step left it.

    It counts as unchanged if it is the same tensor at the same version with the same entries, and nothing that could
    have made a new one has entered an autograd graph since.

    Args:
        capture: of whose layers the last that has a gradient is looked at.
    """

    def __init__(self, capture: Capture) -> None:
        self._capture = capture
        self._name = ""
        self._parameter: nn.Parameter | None = None

    def note(self, written: bool) -> None:
        """A step is over, and has written gradients."""
        self._parameter = None
        for name, layer in reversed(self._capture.layers.items()) if written else ():
            gradient = layer.parameters[0].grad
            if gradient is None:
                continue
            self._name, self._parameter = name, layer.parameters[0]
            self._is, self._version = weakref.ref(gradient), gradient._version
            self._entries, self._graph = _entries(gradient), torch.autograd._get_sequence_nr()
            break

    def check_cleared(self, passes: Mapping[str, int], notices: Notices, refuse: bool) -> None:
        """Tells that backward passes have added their gradients to what was noted.

        Args:
            passes: number of backward passes by layer. Each one that adds in place raises the version by one, and so
                does clearing.
            notices: as for `check`.
            refuse: as for `check`.
        """
        noted = None if self._parameter is None else self._is()
        added = self._version + max(1, passes.get(self._name, 0)) if noted is not None else -1
        if noted is not None and self._capture.completions.get(self._name) == (id(noted), added):
            _tell(
                f"the gradient of layer {self._name!r} was not cleared after the last step: backward() has added to"
                " what step() had written; call optimizer.zero_grad() before backward()",
                notices,
                refuse,
            )

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
        _tell(text, notices, refuse)

    def _is_unchanged(self) -> bool:
        gradient = None if self._parameter is None else self._parameter.grad
        return bool(
            gradient is not None
            and self._is() is gradient
            and self._version == gradient._version
            and self._graph == torch.autograd._get_sequence_nr()
            and any(self._entries)
            and self._entries == _entries(gradient)
        )


def _tell(text: str, notices: Notices, refuse: bool) -> None:
    if refuse:
        raise Refused(text)
    notices.once(text, text)


def _entries(gradient: Tensor) -> list[float]:
    """Some entries, as they lie in memory; none where reading them would wait for a device."""
    if gradient.device.type != "cpu" or gradient.numel() < SAMPLE:
        return []
    return gradient.as_strided((SAMPLE,), (1,)).tolist()
