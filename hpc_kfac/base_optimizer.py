"""What the preconditioner needs to know of the optimizer that takes its gradients."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from hpc_kfac.layers import CapturedLayer


@dataclass(frozen=True)
class BaseOptimizer:
    """Reads a torch optimizer's groups.

    Args:
        optimizer: the optimizer, possibly wrapped; None if there is none to ask.
        layers: captured layers by name.
    """

    optimizer: Any
    layers: Mapping[str, CapturedLayer]

    def learning_rates(self) -> dict[str, float]:
        """Of each layer at present; 1 without an optimizer, 0 for a layer that it does not have."""
        if self.optimizer is None:
            return dict.fromkeys(self.layers, 1.0)
        rates = {id(p): group["lr"] for group in self.optimizer.param_groups for p in group["params"]}
        return {name: float(rates.get(id(layer.parameters[0]), 0.0)) for name, layer in self.layers.items()}

    def momentum(self) -> float:
        """The largest that it has for what is preconditioned, Adam's first moment included; 0 for none."""
        return max(
            (float(group.get("momentum") or group.get("betas", [0.0])[0]) for group in self._groups()), default=0
        )

    def _groups(self) -> Iterator[dict[str, Any]]:
        captured = {id(p) for layer in self.layers.values() for p in layer.parameters}
        for group in [] if self.optimizer is None else self.optimizer.param_groups:
            if any(id(p) in captured for p in group["params"]):
                yield group
