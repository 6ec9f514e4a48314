"""Notices that `step` meets gradients that it has written itself: again as they are, or with new ones added to them."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from hpc_kfac.layers import Capture
from hpc_kfac.notices import Notices, Refused

SAMPLE = 4
"""So many entries are compared: a gradient may be written past torch, as by a message or through numpy."""


class Written:
    """One gradient as the last step left it.

    It counts as unchanged if it is the same tensor at the same version with the same entries, and nothing that could
    have made a new one has entered an autograd graph since; or, where a forward pass may have been for a log alone, if
    the first layer's is unchanged, too, the entries are other ones than before the step, and the weight is in use.

    Args:
        capture: of whose layers the last that has a gradient is looked at, and the first.
    """

    def __init__(self, capture: Capture) -> None:
        self._capture = capture
        self._name = ""
        self._parameter: nn.Parameter | None = None
        self._before: list[float] = []
        self._first: tuple[nn.Parameter, int, int] | None = None
        self._sample: Tensor | None = None
        self._looked = self._kept = False
        capture.on_arrival = self._arrived

    def note(self, written: bool) -> None:
        """A step is over, and has written gradients."""
        self._parameter = self._sample = None
        self._looked = self._kept = False
        last = self._end(reversed(self._capture.layers)) if written else None
        first = self._end(self._capture.layers)
        if last is None or first is None:
            return
        self._first = first[1], id(first[2]), first[2]._version
        self._name, self._parameter, gradient = last
        self._is, self._version = weakref.ref(gradient), gradient._version
        self._entries, self._graph = _entries(gradient), torch.autograd._get_sequence_nr()
        self._replaced = self._entries != self._before
        if self._capture.armed and gradient.numel() >= SAMPLE:
            self._sample = _some(gradient).clone()

    def _end(self, names: Iterable[str]) -> tuple[str, nn.Parameter, Tensor] | None:
        """The first of some layers that has a gradient."""
        for name in names:
            parameter = self._capture.layers[name].parameters[0]
            if parameter.grad is not None:
                return name, parameter, parameter.grad
        return None

    def _arrived(self, name: str) -> None:
        """A backward pass is about to add to a layer's gradient: only now it shows whether that was cleared."""
        if name != self._name or self._parameter is None or self._looked:
            return
        self._looked, gradient, sample = True, self._parameter.grad, self._sample
        if gradient is not None and gradient is self._is() and gradient._version == self._version:
            # Zeros that were written through `.data` leave the version as it is.
            self._kept = sample is not None and bool(sample.any()) and torch.equal(sample, _some(gradient))

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
        if self._kept and noted is not None and self._capture.completions.get(self._name) == (id(noted), added):
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
        unchanged, last = self._is_unchanged(), self._end(reversed(self._capture.layers))
        self._before = [] if last is None else _entries(last[2])
        if not unchanged:
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
            and any(self._entries)
            and self._entries == _entries(gradient)
            and (self._graph == torch.autograd._get_sequence_nr() or self._is_unchanged_for_sure())
        )

    def _is_unchanged_for_sure(self) -> bool:
        """Of a gradient that looks unchanged, after something has entered an autograd graph."""
        if self._first is None or not self._replaced or not self._capture.has(self._parameter):
            return False
        parameter, identity, version = self._first
        return id(parameter.grad) == identity and getattr(parameter.grad, "_version", -1) == version


def _tell(text: str, notices: Notices, refuse: bool) -> None:
    if refuse:
        raise Refused(text)
    notices.once(text, text)


def _entries(gradient: Tensor) -> list[float]:
    """Some entries, as they lie in memory; none where reading them would wait for a device."""
    if gradient.device.type != "cpu" or gradient.numel() < SAMPLE:
        return []
    return _some(gradient).tolist()


def _some(gradient: Tensor) -> Tensor:
    return gradient.as_strided((SAMPLE,), (1,))
