"""What a step needs, and what a layer keeps."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from torch import Tensor

from hpc_kfac.engine.running_weight import Weight
from hpc_kfac.methods.method import State
from hpc_kfac.options.step_control import FixedNorm


@dataclass
class StepInputs:
    """What a step needs besides the plan.

    Attributes:
        number: the step's number.
        damping: damping of this step.
        learning_rates: layer name -> learning rate.
        controls: layer name -> the length rule under the optimizer's present momentum; empty without such a rule.
        scalars: numbers to be summed over ranks.
        log: measure how strongly each layer is preconditioned.
        fold: folds what is left of the step's statistics into the running averages.
        changed: this rank has found the model changed.
        rates: one number of the optimizer's learning rates and momenta, which all ranks are to have alike.
    """

    number: int
    damping: float
    learning_rates: Mapping[str, float]
    scalars: Mapping[str, float]
    log: bool
    fold: Callable[[], None]
    controls: Mapping[str, FixedNorm] = field(default_factory=dict)
    changed: bool = False
    rates: float = 0.0


@dataclass
class LayerState:
    """One layer's tensors on this rank.

    Attributes:
        running: running averages; local between two reductions.
        solved: what refreshes and gathers produced.
        weights: what this rank's share of the running averages stands for: of those that are reduced before a refresh,
            and of those that are with every statistics step.
        refreshed: by part, the step in which the decomposition in use began.
        remembered: what an adaptive schedule compares the next factors with.
        momentum: the "average" [p, o, a] of gradients, where the step control keeps one, and how "alive" [1] it is.
        local: statistics were folded since the running averages were last reduced.
        fresh: a solved form has come that is still in the solve dtype, whatever it is applied in.
    """

    running: State = field(default_factory=dict)
    solved: State = field(default_factory=dict)
    weights: dict[str, Weight] = field(default_factory=lambda: {"refresh": Weight(), "statistics": Weight()})
    refreshed: dict[str, int] = field(default_factory=dict)
    remembered: State = field(default_factory=dict)
    momentum: State = field(default_factory=dict)
    local: bool = False
    fresh: bool = False

    @property
    def weight(self) -> float:
        """Loss terms that this rank's share of the running averages stands for."""
        return self.weights["refresh"].terms

    def age(self, decay: float) -> None:
        """Lets the running averages count less, as in steps that did not use the layer."""
        for weight in self.weights.values():
            weight.skip(decay, 0.0)

    def view(self) -> State:
        """What a method sees: gathered tensors hide this rank's own part."""
        return {**self.running, **self.solved}

    def keep(self, role: str, name: str, tensor: Tensor) -> None:
        """Takes a tensor over, in the storage that is there already."""
        target = self.running if role == "running" else self.solved
        if name in target:
            target[name].copy_(tensor)
        else:
            target[name] = tensor
