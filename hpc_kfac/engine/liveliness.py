"""Which layers still get gradients, where moving averages of them would go on without."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from hpc_kfac.engine.state import LayerState
from hpc_kfac.layers import CapturedLayer


class Liveliness:
    """A factor for the length of each layer's step: 1 with a gradient, and momentum times less in each step without.

    What a length rule makes of a moving average is as long as ever, however small the average has become; the factor
    falls as the average does. All layers are done at once, without synchronising with the device.

    Args:
        layers: captured layers by name.
        states: of these; "alive" [1] is kept beside the moving average.
        device: of the gradients.
    """

    def __init__(
        self, layers: Mapping[str, CapturedLayer], states: Mapping[str, LayerState], device: torch.device
    ) -> None:
        self._layers, self._states = layers, states
        self._names: tuple[str, ...] = ()
        self._alive = torch.ones(0, device=device)
        self._views: tuple[Tensor, ...] = ()
        self._none = torch.zeros((), device=device)

    @torch.no_grad()
    def step(self, momenta: Mapping[str, float]) -> None:
        """Takes in the gradients of a step, before these are overwritten.

        Args:
            momenta: weight of the old moving average, of the layers that keep one.
        """
        self._gather(tuple(momenta))
        if not momenta:
            return
        slots = [p for name in momenta for p in (*self._layers[name].parameters, None)[:2]]  # weight and bias
        gradients = [p.grad if p is not None and p.grad is not None and p.grad.numel() else None for p in slots]
        there = sum(gradient is not None for gradient in gradients)
        on_cpu = self._alive.device.type == "cpu"
        norms = self._norms(gradients, 2 if on_cpu else 1)
        if on_cpu and int(norms.count_nonzero()) < there:  # squares of tiny entries vanish, but are faster there
            norms = self._norms(gradients, 1)
        used = norms.view(-1, 2).amax(1).sign_()
        self._alive.mul_(self._decays(tuple(momenta.values())))
        torch.maximum(self._alive, used, out=self._alive)

    def _norms(self, gradients: Sequence[Tensor | None], order: int) -> Tensor:
        """What is positive where a gradient has an entry, and 0 where there is none."""
        there = [gradient for gradient in gradients if gradient is not None]
        norms = torch._foreach_norm(there, order) if there else ()
        if any(norm.dtype != torch.float32 for norm in norms):
            norms = tuple(norm.sign().float() for norm in norms)  # before the cast, in which it could vanish
        found = iter(norms)
        return torch.stack([self._none if gradient is None else next(found) for gradient in gradients])

    def _decays(self, momenta: Sequence[float]) -> Tensor | float:
        """One number where all layers have the same."""
        return momenta[0] if len(set(momenta)) == 1 else torch.tensor(momenta, device=self._alive.device)

    def _gather(self, names: tuple[str, ...]) -> None:
        """Has the states' numbers be views of one tensor, where they are others after a restart or a failed step."""
        states = [self._states[name] for name in names]
        same = all(s.momentum.get("alive") is v for s, v in zip(states, self._views, strict=False))
        if names == self._names and same:
            return
        self._names, self._alive = names, torch.ones(len(names), device=self._alive.device)
        self._views = self._alive.split(1) if names else ()
        for state, view in zip(states, self._views, strict=True):
            if "alive" in state.momentum:
                view.copy_(state.momentum["alive"])
            state.momentum["alive"] = view
