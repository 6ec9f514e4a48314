"""How well the quadratic model foretold the change of the loss: what the Levenberg-Marquardt rule adapts damping by."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from hpc_kfac.distributed import Communicator
from hpc_kfac.engine.plan import Problem
from hpc_kfac.engine.state import LayerState
from hpc_kfac.layers import CapturedLayer, LayerShape
from hpc_kfac.methods.method import Method
from hpc_kfac.options.step_control import FixedNorm, StepControl


def check_steers(method: Method, shapes: Mapping[str, LayerShape], control: StepControl) -> None:
    """Refuses the Levenberg-Marquardt rule where its ratio is not one of the step that is taken.

    Raises:
        ValueError: a length rule, or a method whose update does not come of a damped quadratic model.
    """
    if isinstance(control, FixedNorm):
        raise ValueError(
            f"damping is LevenbergMarquardt, whose ratio steers nothing while step_control {type(control).__name__}"
            " sets the length of every step; use step_control=None (none in a run file), TrustRegion() or KLClip()"
        )
    others = [name for name, shape in shapes.items() if not method.is_damped(shape)]
    if others:
        raise ValueError(
            f"damping is LevenbergMarquardt, but {type(method).__name__}'s update of layer {others[0]!r} is not"
            " (F + damping)^-1 D, so that there is no quadratic model to compare with; use a number,"
            " ScheduledDamping or AnnealedDamping, or a method such as KFAC or EKFAC"
        )


class ReductionRatio:
    """Change of the loss over the change that gradient and curvature foretold (Martens & Grosse 2015, section 6.5).

    Each layer's part of the model is worked out by its owner; what is left to the optimizer has no curvature.

    Args:
        model: the model.
        layers: captured layers by name.
        states: their curvature on this rank.
        problem: method and placement.
        comm: the ranks that train.

    Attributes:
        due: the step just taken is to be measured.
        sharded: `.grad` exists on the owner of a parameter alone.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Mapping[str, CapturedLayer],
        states: Mapping[str, LayerState],
        problem: Problem,
        comm: Communicator,
    ) -> None:
        self._model, self._layers, self._states, self._problem, self._comm = model, layers, states, problem, comm
        self.due = self.sharded = False
        self._before: dict[str, tuple[Tensor, Tensor]] = {}
        self._others: list[tuple[Tensor, Tensor, Tensor]] = []

    def follow(self, problem: Problem) -> None:
        """Goes on with other layers."""
        self._problem = problem
        self._before, self._others, self.due = {}, [], False

    def remember(self) -> None:
        """Keeps weights and gradients as they are before the step."""
        owner = self._problem.assignment.owner
        for name, layer in self._layers.items():
            if owner[name] == self._comm.rank:
                weights = layer.matrix([p.detach() for p in layer.parameters]).clone()
                self._before[name] = (weights.to(self._problem.precision.wire), layer.gradient().clone())
        captured = {id(p) for layer in self._layers.values() for p in layer.parameters}
        self._others = [
            (p.detach(), p.detach().clone(), p.grad.clone())
            for p in self._model.parameters()
            if p.grad is not None and id(p) not in captured and (self.sharded or self._comm.rank == 0)
        ]

    def measure(self, change: float, damping: float) -> float:
        """The ratio; NaN where the model does not expect the loss to fall. Collective.

        Args:
            change: of this rank's mean loss.
            damping: of the step just taken.
        """
        parts = dict.fromkeys(self._layers, 0.0)
        for name, (weights, gradient) in self._before.items():
            layer = self._layers[name]
            delta = layer.matrix([p.detach() for p in layer.parameters]).to(gradient.dtype) - weights
            parts[name] = float((delta * gradient).sum() + 0.5 * self._curved(name, delta, damping))
        others = sum(float(((weight - before) * slope).sum()) for weight, before, slope in self._others)
        self._before, self._others = {}, []
        self.due = False
        # Layer by layer, so that the sum is rounded alike wherever the layers' owners are.
        totals = torch.tensor([change / self._comm.size, others, *parts.values()], dtype=torch.float64)
        if self._comm.size > 1:
            self._comm.allreduce(totals, "damping", "change of the loss").wait()
        model = sum(totals[1:].tolist())
        # A step that the model expects to raise the loss, as momentum can make it, is no good whatever came of it.
        return totals[0].item() / model if model < 0 else math.nan

    def _curved(self, name: str, delta: Tensor, damping: float) -> Tensor | float:
        """<delta, (F + damping) delta>, as the update was damped; 0 for a plain gradient, before there is curvature."""
        method, shape, view = self._problem.method, self._problem.shapes[name], self._states[name].view()
        if not self._problem.has_curvature(name, view):
            return 0.0
        return method.quadratic(delta, view, shape) + method.damping_form(delta, view, shape, damping)
