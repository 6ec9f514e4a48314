"""What the preconditioner needs to know of the optimizer that takes its gradients."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from hpc_kfac.layers import CapturedLayer


@dataclass(frozen=True)
class Rule:
    """How the optimizer treats a layer at present.

    Attributes:
        learning_rate: 1 without an optimizer, 0 for a layer that it does not have.
        momentum: weight of the old velocity or first moment; 0 for none.
        dampening: share of an update that the velocity leaves out.
        held: whether a group of the optimizer has the layer's weight.
        bias: by how much more than the weight's group that of the bias makes of an update for good.
    """

    learning_rate: float = 1.0
    momentum: float = 0.0
    dampening: float = 0.0
    held: bool = True
    bias: float = 1.0

    @property
    def gain(self) -> float:
        """What the optimizer makes of an update for good, without the learning rate."""
        return (1.0 - self.dampening) / (1.0 - self.momentum) if self.momentum < 1.0 else math.inf


@dataclass(frozen=True)
class BaseOptimizer:
    """Reads a torch optimizer's groups.

    Args:
        optimizer: the optimizer, possibly wrapped; None if there is none to ask.
        layers: captured layers by name.
    """

    optimizer: Any
    layers: Mapping[str, CapturedLayer]

    def rules(self) -> dict[str, Rule]:
        """How each layer is treated at present, by its weight's group.

        Raises:
            ValueError: the optimizer has no groups.
        """
        if self.optimizer is None:
            return dict.fromkeys(self.layers, Rule())
        if not hasattr(self.optimizer, "param_groups"):
            kind = type(self.optimizer).__name__
            raise ValueError(f"optimizer is a {kind}, which has no param_groups; pass the torch optimizer of the model")
        groups = [(_rule(group), group["params"]) for group in self.optimizer.param_groups]
        found = {id(p): rule for rule, parameters in groups for p in parameters}
        return {name: self._rule_of(layer, found) for name, layer in self.layers.items()}

    @staticmethod
    def _rule_of(layer: CapturedLayer, found: Mapping[int, Rule]) -> Rule:
        rule, *others = (found.get(id(parameter), ABSENT) for parameter in layer.parameters)
        for other in others:
            if other is not rule and other.held and rule.held and other.gain != rule.gain:
                return replace(rule, bias=other.gain / rule.gain)
        return rule

    def learning_rates(self) -> dict[str, float]:
        """Of each layer at present; 1 without an optimizer, 0 for a layer that it does not have."""
        return {name: rule.learning_rate for name, rule in self.rules().items()}

    def momentum(self) -> float:
        """The largest that it has for what is preconditioned, Adam's first moment included; 0 for none."""
        return max((rule.momentum for rule in self.rules().values()), default=0.0)


def rates_of(rules: Iterable[Rule]) -> float:
    """A number that changes with any learning rate, and any momentum that goes with one."""
    return sum(rate * (2.0 + momentum) for rate, momentum in sorted({(r.learning_rate, r.momentum) for r in rules}))


ABSENT = Rule(learning_rate=0.0, held=False)


def _rule(group: Mapping[str, Any]) -> Rule:
    if "weight_sum" in group:  # schedule-free: its momentum weighs an average of weights, and adds up no updates
        return Rule(float(group["lr"]))
    momentum = float(group.get("momentum") or group.get("betas", [0.0])[0] or 0.0)
    dampening = float(group.get("dampening") or 0.0) if momentum else 0.0
    return Rule(float(group["lr"]), momentum, dampening)
