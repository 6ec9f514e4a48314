"""Watches what happens to preconditioned gradients until the optimizer has taken them: what undoes a step is told."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hpc_kfac.base_optimizer import Rule
from hpc_kfac.layers import CapturedLayer
from hpc_kfac.notices import Notices, Refused
from hpc_kfac.step_control import FixedNorm, StepControl

FIRST = 3
"""So many optimizer steps are compared number by number, which waits for the device."""
WATCHED = 3
"""So many parameters are compared, the smallest ones."""
FACTOR, COSINE = 4.0, 0.98
"""An optimizer that moves a weight by so many times more or less than learning rate times update, or not along it,
makes steps of its own."""
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
        self._fresh: bool | None = None
        self._decided = False
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
        if missing:
            self._notices.once(
                f"no group {missing}",
                f"no group of the optimizer has the weights of {_listed(missing)}, so that nothing updates them; add"
                " them with optimizer.add_param_group, or leave them out with Preconditioner(skip=...)",
            )

    def written(self, applied: bool) -> None:
        """The step's gradients are written; from now on they are the optimizer's, unless they are no good."""
        if not self._handles:
            return
        self._applied = applied
        copied = applied and self._steps < FIRST
        for parameter in self._names:
            gradient = parameter.grad
            if gradient is None:
                self._written.pop(parameter, None)
            else:
                values = gradient.clone() if copied else None
                self._written[parameter] = Written(gradient, gradient._version, values)

    def _hook(self) -> list[Any]:
        optimizer = self._optimizer
        try:
            return [optimizer.register_step_pre_hook(self._before), optimizer.register_step_post_hook(self._after)]
        except AttributeError:  # a wrapper that has none, or no optimizer
            return []

    @torch.no_grad()
    def _before(self, *_: Any) -> None:
        written, self._written = self._written, {}
        if not written:
            return
        if not self._applied:
            self._drop(written)
            return
        self._steps += 1
        scale = getattr(self._optimizer, "grad_scale", None)  # a scaler leaves the division to a fused optimizer
        divided = scale is not None
        for parameter, was in written.items():
            gradient = parameter.grad
            if gradient is None:
                continue
            if gradient is not was.gradient or gradient._version != was.version:
                self._tell_changed(self._names[parameter])
            elif was.values is not None and not torch.equal(gradient, was.values):
                divided = True  # torch's scaler alone leaves the count of changes as it is
        if divided and self._control is not None:
            raise Refused(
                f"a gradient scaler divides the gradients after preconditioner.step(), and with them the step that"
                f" {_kind(self._control)} has set the length of; call scaler.unscale_(optimizer) before"
                " preconditioner.step()"
            )
        if self._steps <= FIRST and not divided:
            self._remember()

    def _drop(self, written: Mapping[nn.Parameter, Written]) -> None:
        """An optimizer that finds no gradients changes nothing: neither by weight decay nor by its momentum."""
        if all(p.grad is was.gradient and p.grad._version == was.version for p, was in written.items()):
            for group in self._optimizer.param_groups:
                for parameter in group["params"]:
                    parameter.grad = None

    def _tell_changed(self, name: str) -> None:
        if isinstance(self._control, FixedNorm):
            self._notices.once(
                "gradients changed",
                f"the gradient of {name} was changed between preconditioner.step() and optimizer.step(), and with it"
                f" the length that {_kind(self._control)} has set; clip, scale and add before preconditioner.step(), as"
                " in torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0); preconditioner.step()",
            )

    # Whether the optimizer makes the steps that it is given

    def _remember(self) -> None:
        """Before the first step that moves the smallest weight: what it is to be moved by."""
        parameter = self._probe
        if self._fresh is None:
            self._fresh = not self._optimizer.state.get(parameter)
        groups = [group for group in self._optimizer.param_groups if any(p is parameter for p in group["params"])]
        if not (self._fresh and groups) or parameter.grad is None or parameter.element_size() < 4:
            return
        group = groups[0]
        step = parameter.grad + float(group.get("weight_decay") or 0.0) * parameter
        rate = -float(group["lr"]) if group.get("maximize") else float(group["lr"])
        if rate and step.count_nonzero():
            self._moving = parameter.detach().clone(), rate * step

    @torch.no_grad()
    def _after(self, *_: Any) -> None:
        if self._decided or not 0 < self._steps <= FIRST:
            return
        divides = sorted(SECOND_MOMENTS & set(self._optimizer.state.get(self._probe, {})))
        if self._moving is None and not divides:
            return
        self._decided = True
        seen = ""
        if self._moving is not None:
            (before, expected), self._moving = self._moving, None
            moved = before - self._probe
            length, right = float(moved.norm()), float(expected.norm())
            along = float(torch.nn.functional.cosine_similarity(moved.flatten(), expected.flatten(), dim=0))
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


def _named(layer: CapturedLayer) -> list[tuple[str, nn.Parameter]]:
    return list(zip(("weight", "bias"), layer.parameters, strict=False))


def _kind(control: StepControl) -> str:
    return type(control).__name__


def _listed(names: list[str], shown: int = 5) -> str:
    more = f" and {len(names) - shown} more" if len(names) > shown else ""
    return ", ".join(repr(name) for name in names[:shown]) + more
