"""Watches what happens to preconditioned gradients until the optimizer has taken them: what undoes a step is told."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hpc_kfac.guards.optimizer_facts import Rule
from hpc_kfac.layers import CapturedLayer
from hpc_kfac.notices import Notices, Refused
from hpc_kfac.options.step_control import FixedNorm, StepControl

FIRST = 3
"""So many optimizer steps are compared number by number, which waits for the device."""
WATCHED = 3
"""So many parameters are compared, the smallest ones."""
FACTOR, COSINE = 4.0, 0.98
"""An optimizer that moves a weight by so many times more or less than learning rate times update, or not along it,
makes steps of its own."""
ROUNDING = 32.0
"""A step of fewer roundings of the weight shows no direction."""
SECOND_MOMENTS = {"exp_avg_sq", "exp_avg_sq_row", "row_var", "variance", "square_avg", "exp_inf", "sum", "state2"}
"""What optimizers call the squares of gradients, or their largest, that they divide by."""


@dataclass
class Written:
    """What `step` left in a parameter's gradient.

    Attributes:
        gradient: the tensor itself.
        version: torch's count of changes in place.
        values: a copy, in the first steps.
    """

    gradient: Tensor
    version: int
    values: Tensor | None


class OptimizerWatch:
    """Tells once of an optimizer, a clipping or a scaler that undoes what the preconditioner has made.

    Args:
        optimizer: that takes the gradients; None, or one without step hooks, is not watched.
        layers: captured layers by name.
        control: bounds the step.
        notices: says it.
    """

    def __init__(
        self, optimizer: Any, layers: Mapping[str, CapturedLayer], control: StepControl, notices: Notices
    ) -> None:
        self._optimizer, self._layers, self._control, self._notices = optimizer, layers, control, notices
        names = {p: f"{name}.{kind}" for name, layer in layers.items() for kind, p in _named(layer)}
        weights = [layer.parameters[0] for layer in layers.values()]
        self._probe = min(weights, key=lambda p: (p.dim() < 2, p.numel()))  # a matrix where there is one
        smallest = sorted(names, key=torch.numel)[:WATCHED]
        self._names = {p: names[p] for p in [*smallest, self._probe]}
        self._written: dict[nn.Parameter, Written] = {}
        self._moving: tuple[Tensor, Tensor] | None = None
        self._applied = True
        self._steps = 0
        self._decided = self._linear = False
        self._came = self._used = False  # a step of the preconditioner, since the optimizer's last and at all
        self._taken: dict[nn.Parameter, Written] = {}
        self._closure = self._before_closure = False
        self._unsure = False  # whether gradients that are touched are changed
        self._alone = self._passed_by = 0
        self._graph = self._weight = 0
        self._missing: list[str] = []
        if optimizer is None and isinstance(control, FixedNorm):
            notices.once(
                "no optimizer",
                f"{_kind(control)} sets the length of a step for an optimizer without momentum, since none was given;"
                " under a momentum m steps come out 1 / (1 - m) times as long. Write Preconditioner(model, optimizer)",
            )
        self._handles = self._hook()

    def remove(self) -> None:
        """Takes the hooks off the optimizer."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def check_groups(self, rules: Mapping[str, Rule], model: nn.Module) -> None:
        """Tells of layers that no group of the optimizer has.

        Raises:
            Refused: it has nothing of the model.
        """
        missing = [name for name, rule in rules.items() if not rule.held]
        if missing and len(missing) == len(rules):
            held = {id(p) for group in self._optimizer.param_groups for p in group["params"]}
            if held.isdisjoint(map(id, model.parameters())):
                raise Refused(
                    f"optimizer, a {type(self._optimizer).__name__} of {len(held)} parameters, has none of this"
                    " model's, as where one of the two was copied or the weights were replaced; make it with"
                    " model.parameters() of the same model, before the preconditioner"
                )
        if missing == self._missing:
            return
        self._missing = missing
        owned = set(map(id, model.parameters()))  # not those of a layer that was replaced
        missing = [name for name in missing if id(self._layers[name].parameters[0]) in owned]
        if missing:
            self._notices.once(
                f"no group {missing}",
                f"no group of this optimizer ({type(self._optimizer).__name__}) has the weights of"
                f" {_listed(missing)}; if another one has, make a preconditioner with each of the two and"
                " Preconditioner(skip=...), else add them with optimizer.add_param_group",
            )

    def written(self, applied: bool, linear: bool, statistics: bool) -> None:
        """The step's gradients are written; from now on they are the optimizer's, unless they are no good.

        Args:
            applied: whether they are good.
            linear: whether an update of a scaled gradient is scaled alike.
            statistics: whether the step took statistics, and may take time to look at numbers.
        """
        if not self._handles:
            return
        self._note_passed_by()
        self._applied, self._linear, self._came, self._used = applied, linear, True, True
        self._graph, self._weight = torch.autograd._get_sequence_nr(), self._probe._version
        copied = applied and (self._steps < FIRST or (self._unsure and statistics))
        for parameter in self._names:
            gradient = parameter.grad
            if gradient is None:
                self._written.pop(parameter, None)
            else:
                values = gradient.clone() if copied else None
                self._written[parameter] = Written(gradient, gradient._version, values)
        if self._closure and not applied:  # the optimizer goes on with them at once
            self._drop({})

    def retire(self) -> None:
        """The optimizer may go on without the preconditioner."""
        self._used = False

    def _hook(self) -> list[Any]:
        optimizer = self._optimizer
        try:
            return [optimizer.register_step_pre_hook(self._before), optimizer.register_step_post_hook(self._after)]
        except AttributeError:  # a wrapper that has none, or no optimizer
            return []

    @torch._disable_dynamo
    @torch.no_grad()
    def _before(self, _: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Before the optimizer's step; also more than once, where the step of a class calls that of its base."""
        written, self._written = self._written, {}
        came, self._came = self._came, False
        self._passed_by = 0
        if any(map(callable, (*args[1:], kwargs.get("closure")))):  # which makes other gradients
            self._closure, self._taken, self._before_closure = True, written, came
            return
        if not came:
            self._check_alone()
            return
        if not self._applied:
            self._drop(written)
            return
        self._steps += 1
        self._taken = written
        scale = getattr(self._optimizer, "grad_scale", None)  # a scaler leaves the division to a fused optimizer
        divided = scale is not None
        for parameter, name in self._names.items():
            was = written.get(parameter)
            if self._is_touched(parameter, was):
                if self._is_changed(parameter, was):
                    self._tell_changed(name, was is None)
            elif was is not None and was.values is not None and not torch.equal(was.gradient, was.values):
                divided = True  # torch's scaler alone leaves the count of changes as it is
        if divided:
            self._check_divided()
        elif self._looks():
            self._remember()

    @staticmethod
    def _is_touched(parameter: nn.Parameter, was: Written | None) -> bool:
        gradient = parameter.grad
        if gradient is None:
            return False
        return was is None or gradient is not was.gradient or gradient._version != was.version

    def _is_changed(self, parameter: nn.Parameter, was: Written | None) -> bool:
        """Whether a gradient that was touched is another one: a clip that does not bind multiplies by 1."""
        gradient = parameter.grad
        if gradient is None or not self._holds(parameter):
            return False
        if was is None:
            return bool(gradient.any())
        if was.values is None:
            self._unsure = True
            return False
        return not torch.equal(gradient, was.values)

    def _check_divided(self) -> None:
        if self._linear:
            return
        why = (
            "whose update does not grow with the gradient, or its curvature is that of the scaled loss"
            if self._control is None
            else f"and with them the step that {_kind(self._control)} has set the length of"
        )
        told = ""
        if self._control is None:
            told = " and preconditioner.observe(outputs, loss_scale=scaler.get_scale()) before backward()"
        raise Refused(
            f"a gradient scaler divides the gradients after preconditioner.step(), {why}; call"
            f" scaler.unscale_(optimizer) before preconditioner.step(){',' if told else ''}{told}"
        )

    def _drop(self, written: Mapping[nn.Parameter, Written]) -> None:
        """An optimizer that finds no gradients changes nothing: neither by weight decay nor by its momentum.

        Gradients of a later backward pass are left, if they are finite.
        """
        same = all(p.grad is was.gradient for p, was in written.items())
        as_they_were = self._graph == torch.autograd._get_sequence_nr() or not any(
            self._is_touched(p, was) for p, was in written.items()
        )
        parameters = [p for group in self._optimizer.param_groups for p in group["params"] if p.grad is not None]
        if (same and as_they_were) or not all(bool(p.grad.isfinite().all()) for p in parameters):
            for parameter in parameters:
                parameter.grad = None

    def _tell_changed(self, name: str, appeared: bool) -> None:
        if appeared or self._graph != torch.autograd._get_sequence_nr():
            self._tell_order(
                name, "optimizer.step() came before preconditioner.step(), or a backward pass between them"
            )
        elif isinstance(self._control, FixedNorm):
            self._notices.once(
                "gradients changed",
                f"the gradient of {name} was changed between preconditioner.step() and optimizer.step(), and with it"
                f" the length that {_kind(self._control)} has set; clip, scale and add before preconditioner.step(), as"
                " in torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0); preconditioner.step()",
            )

    def _tell_order(self, name: str, what: str) -> None:
        self._unsure = False
        self._notices.once(
            "order",
            f"{what}: the optimizer takes a gradient of {name} that was not preconditioned; the order is"
            " loss.backward(); preconditioner.step(); optimizer.step()",
        )

    def _check_alone(self) -> None:
        """The optimizer steps without a step of the preconditioner, which others have come before."""
        if not self._used or self._alone >= FIRST:
            return
        for parameter, name in self._names.items():
            if self._is_touched(parameter, self._taken.get(parameter)) and self._is_changed(parameter, None):
                self._alone += 1
                self._tell_order(
                    name,
                    "optimizer.step() came without preconditioner.step(), which belongs before each one until"
                    " preconditioner.retire() or remove()",
                )
                return

    def _note_passed_by(self) -> None:
        """What was written before was not taken by this optimizer, and yet the weights have moved."""
        moved = self._came and self._applied and self._probe._version != self._weight
        self._passed_by = self._passed_by + 1 if moved else 0
        if self._passed_by >= FIRST and self._holds(self._probe):
            kind = type(self._optimizer).__name__
            self._notices.once(
                "passed by",
                f"the weights move, but not by the optimizer {kind} that the preconditioner was made with, whose"
                " learning rates and momentum it follows; make the preconditioner with the optimizer that takes the"
                " steps: Preconditioner(model, optimizer)",
            )

    def _holds(self, parameter: nn.Parameter) -> bool:
        return any(p is parameter for group in self._optimizer.param_groups for p in group["params"])

    # Whether the optimizer makes the steps that it is given

    def _looks(self) -> bool:
        """In the first steps, and ever more seldom as long as these were too short to see."""
        return not self._decided and (self._steps <= FIRST or self._steps & (self._steps - 1) == 0)

    def _remember(self) -> None:
        """Before a step that moves the smallest weight: what it is to be moved by."""
        parameter = self._probe
        groups = [group for group in self._optimizer.param_groups if any(p is parameter for p in group["params"])]
        state = {name: value for name, value in self._optimizer.state.get(parameter, {}).items() if value is not None}
        if not groups or state.keys() - {"momentum_buffer"} or parameter.grad is None or parameter.element_size() < 4:
            return
        group = groups[0]
        gradient = -parameter.grad if group.get("maximize") else parameter.grad
        step = gradient + float(group.get("weight_decay") or 0.0) * parameter
        if "momentum_buffer" in state:
            momentum, dampening = float(group.get("momentum") or 0.0), float(group.get("dampening") or 0.0)
            velocity = momentum * state["momentum_buffer"] + (1.0 - dampening) * step
            step = step + momentum * velocity if group.get("nesterov") else velocity
        expected = float(group["lr"]) * step.double()
        length = float(expected.norm())
        rounding = ROUNDING * torch.finfo(parameter.dtype).eps * float(parameter.double().norm())
        if math.isfinite(length) and length > rounding:
            self._moving = parameter.detach().clone(), expected

    @torch._disable_dynamo
    @torch.no_grad()
    def _after(self, *_: Any) -> None:
        if self._closure:
            self._end_closure()
        if not self._looks() or not self._steps:
            return
        divides = sorted(SECOND_MOMENTS & set(self._optimizer.state.get(self._probe, {})))
        if self._moving is None and not divides:
            return
        self._decided = True
        seen = ""
        if self._moving is not None:
            (before, expected), self._moving = self._moving, None
            moved = before.double() - self._probe.double()
            length, right = float(moved.norm()), float(expected.norm())
            along = float((moved / (length or 1.0) * (expected / right)).sum())
            if not divides and right / FACTOR <= length <= right * FACTOR and along > COSINE:
                return
            seen = (
                f": it moved {self._names[self._probe]} by {length:.3g} with a cosine of {along:.2f} to the"
                f" preconditioned gradient, whose length times the learning rate is {right:.3g}"
            )
        kind = type(self._optimizer).__name__
        why = f"divides by its {divides[0]}" if divides else "makes steps of its own"
        self._notices.once(
            "optimizer",
            f"optimizer {kind} {why}{seen}. That undoes what the preconditioner has set; use torch.optim.SGD after the"
            " preconditioner",
        )

    def _end_closure(self) -> None:
        """The preconditioner's step belongs into the closure, which makes the gradients."""
        self._closure = False
        if self._came:
            self._taken, self._written, self._came = self._written, {}, False
            self._steps += 1
        elif not self._before_closure:
            self._check_alone()
        else:
            for parameter, name in self._names.items():
                was = self._taken.get(parameter)
                if self._is_touched(parameter, was) and self._is_changed(parameter, was):
                    self._tell_order(name, "the closure of optimizer.step() has no preconditioner.step() at its end")
                    return


def check_kind(optimizer: Any) -> None:
    """Whether an optimizer can take preconditioned gradients at all.

    Raises:
        ValueError: it cannot.
    """
    if any("LBFGS" in kind.__name__ for kind in type(optimizer).__mro__):
        raise ValueError(
            f"optimizer is {type(optimizer).__name__}, which measures the curvature by differences of gradients"
            " itself and so cannot take preconditioned ones; use torch.optim.SGD"
        )


def _named(layer: CapturedLayer) -> list[tuple[str, nn.Parameter]]:
    return list(zip(("weight", "bias"), layer.parameters, strict=False))


def _kind(control: StepControl) -> str:
    return type(control).__name__


def _listed(names: list[str], shown: int = 5) -> str:
    more = f" and {len(names) - shown} more" if len(names) > shown else ""
    return ", ".join(repr(name) for name in names[:shown]) + more
