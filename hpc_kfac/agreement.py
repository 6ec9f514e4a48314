"""The one scalar reduction of a step: KL clip, finite check, counts, layer reports and the caller's own numbers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from hpc_kfac.distributed.communicator import Communicator
from hpc_kfac.layers import CapturedLayer
from hpc_kfac.step_control import KLClip, StepControl
from hpc_kfac.step_report import LayerReport, StepInputs

LOGGED = 5
"""Numbers of each layer that a logged step reduces, too: <U, D>, <U, U>, <D, D>, size of the update, staleness."""
FIXED = 4
"""Numbers that every step reduces: <U, D>, ranks with a gradient that is not finite, refreshed layers, failures."""


@dataclass
class Agreed:
    """What all ranks have agreed on.

    Attributes:
        applied: all gradients are finite.
        kl_scale: what the update was shortened by.
        refreshed: number of layers.
        failures: number of decompositions.
        scalars: sums of the caller's numbers.
        changes: how much the factors of a layer have changed between two refreshes, where that was measured.
        layers: reports, where asked for.
    """

    applied: bool
    kl_scale: float
    refreshed: int
    failures: int
    scalars: dict[str, float]
    changes: dict[str, float]
    layers: dict[str, LayerReport] = field(default_factory=dict)


class Agreement:
    """Measures updates layer by layer and reduces what was measured. Allocates nothing on an ordinary step.

    Args:
        model: for its gradients, which are all checked, those that are left to the optimizer too.
        layers: captured layers by name.
        owned: layer name -> whether its products count on this rank.
        comm: the ranks that agree.
        control: bounds the step.
        dtype: of the products.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Mapping[str, CapturedLayer],
        owned: Mapping[str, bool],
        comm: Communicator,
        control: StepControl,
        dtype: torch.dtype,
    ) -> None:
        self._layers, self._owned, self._comm, self._control = layers, owned, comm, control
        captured = {id(p) for layer in layers.values() for p in layer.parameters}
        parameters = [p for p in model.parameters() if p.requires_grad]
        self._others = [p for p in parameters if id(p) not in captured]
        self._captured = [p for p in parameters if id(p) in captured]
        device = parameters[0].device
        self._products = torch.zeros(len(layers), LOGGED, dtype=dtype, device=device)
        self._rows = {name: row.split(1) for name, row in zip(layers, self._products, strict=True)}
        self._squares = torch.zeros(len(self._others), dtype=dtype, device=device)
        self._scale = torch.ones((), dtype=dtype, device=device)
        self._vectors: dict[int, Tensor] = {}
        self._measured: set[str] = set()

    def size(self, inputs: StepInputs, changes: Sequence[str]) -> int:
        """How many numbers the reduction carries."""
        return FIXED + len(inputs.scalars) + len(changes) + (LOGGED * len(self._layers) if inputs.log else 0)

    def start_step(self) -> None:
        self._measured.clear()

    def measure(self, name: str, update: Tensor, gradient: Tensor, log: bool) -> None:
        """Notes <U, D> of a layer that this rank preconditions; with `log` also <U, U> and <D, D>."""
        row = self._rows[name]
        _dot(update, gradient, row[0])
        if log:
            _dot(update, update, row[1])
            _dot(gradient, gradient, row[2])
        self._measured.add(name)

    def measure_size(self, name: str, update: Tensor, staleness: int) -> None:
        """Notes how large a layer's update is by its weights, and how old its curvature; on logged steps alone."""
        row = self._rows[name]
        weights = torch.stack([p.detach().norm() for p in self._layers[name].parameters]).norm()
        row[3].copy_(update.norm() / weights.clamp(min=torch.finfo(weights.dtype).tiny))
        row[4].fill_(staleness)

    def reduce(
        self, inputs: StepInputs, refreshed: float, failures: int, changes: Mapping[str, float | None]
    ) -> Agreed:
        """Agrees with all ranks, and applies the KL clip. Collective.

        Args:
            inputs: of the step.
            refreshed: layers that this rank has renewed.
            failures: decompositions that failed on this rank.
            changes: the layers whose change is asked for, with the change where this rank has measured it.
        """
        products = dict(zip(self._layers, self._products.tolist(), strict=True))
        clip = self._control if isinstance(self._control, KLClip) else None
        owned = [name for name in self._layers if name in self._measured and self._owned[name]]
        weights = [1.0 if clip is None else clip.weight(inputs.learning_rates[name]) for name in owned]
        quadratic = sum(weight * products[name][0] for weight, name in zip(weights, owned, strict=True))
        finite = self._others_finite() and all(math.isfinite(products[name][0]) for name in self._measured)
        values = [quadratic if finite else 0.0, float(not finite), refreshed, float(failures), *inputs.scalars.values()]
        values += [0.0 if change is None else 1.0 + change for change in changes.values()]
        if inputs.log:
            values += [x for name in self._layers for x in (products[name] if name in owned else [0.0] * LOGGED)]
        totals = self._sum(values)
        scale = 1.0 if clip is None else clip.scale(totals[0])
        gradients = [p.grad for p in self._captured if p.grad is not None]
        if scale != 1.0 and gradients:
            self._scale.fill_(scale)  # a number would be made a tensor for every gradient
            torch._foreach_mul_(gradients, self._scale)
        first_change = FIXED + len(inputs.scalars)
        first_log = first_change + len(changes)
        found = zip(changes, totals[first_change:first_log], strict=True)
        return Agreed(
            applied=totals[1] == 0,
            kl_scale=scale,
            refreshed=round(totals[2]),
            failures=int(totals[3]),
            scalars=dict(zip(inputs.scalars, totals[FIXED:first_change], strict=True)),
            changes={name: value - 1.0 for name, value in found if value > 0},
            layers=self._reports(totals[first_log:], inputs.damping, scale) if inputs.log else {},
        )

    def _sum(self, values: list[float]) -> list[float]:
        vector = self._vectors.get(len(values))
        if vector is None:
            vector = self._vectors[len(values)] = torch.empty(len(values), dtype=torch.float64)
        array = vector.numpy()
        array[:] = values
        if self._comm.size > 1:
            self._comm.allreduce(vector, "control", "step control").wait()
        return vector.tolist()

    def _others_finite(self) -> bool:
        """Whether the gradients that are left to the optimizer are; a bad one of this rank alone counts as well."""
        for i, parameter in enumerate(self._others):
            if parameter.grad is None:
                self._squares[i].zero_()
            else:
                _dot(parameter.grad, parameter.grad, self._squares[i : i + 1])
        return all(math.isfinite(value) for value in self._squares.tolist())

    def _reports(self, values: list[float], damping: float, scale: float) -> dict[str, LayerReport]:
        reports = {}
        for position, name in enumerate(self._layers):
            product, update, gradient, size, staleness = values[LOGGED * position : LOGGED * (position + 1)]
            norms = math.sqrt(update * gradient)
            share = 1.0 - damping * update / product if product > 0 else 0.0
            reports[name] = LayerReport(product / norms if norms > 0 else 1.0, share, scale * size, int(staleness))
        return reports


def _dot(left: Tensor, right: Tensor, out: Tensor) -> None:
    """The sum of elementwise products in `out` [1]; allocates nothing where the tensors are plain. torch.dot does."""
    if left.dtype == right.dtype == out.dtype and left.is_contiguous() and right.is_contiguous():
        torch.mv(left.view(1, -1), right.view(-1), out=out)
    else:
        out.copy_((left * right).sum())
