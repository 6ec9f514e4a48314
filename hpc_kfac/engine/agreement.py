"""The one scalar reduction of a step: KL clip, finite check, counts, layer reports and the caller's own numbers."""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from hpc_kfac.distributed.communicator import Communicator
from hpc_kfac.engine.state import StepInputs
from hpc_kfac.engine.step_report import LayerReport
from hpc_kfac.layers import CapturedLayer
from hpc_kfac.linalg.scaling import at_norm, size_of
from hpc_kfac.linalg.workspace import Workspace
from hpc_kfac.notices import Refused
from hpc_kfac.options.step_control import FixedNorm, KLClip, StepControl

LESS = 2.0**-64
"""What <U, D> is measured times: sums of squares of 1e28 are finite then, and what vanishes is far below any bound."""

LOGGED = 5
"""Numbers of each layer that a logged step reduces, too: <U, D>, cosine, curvature share, size of update, staleness."""
FIXED = 11
"""Numbers that every step reduces: ranks with an update that is not finite, refreshed layers, failures, ranks where the
model has changed; ranks with a gradient to compare, its amount and the square of that; the optimizer's rates and the
square of that; a number for the names of the caller's numbers; layers without curvature that need a length. What all N
ranks have alike has N times the sum of squares for the square of its sum."""
NAMES = 52
"""Layers whose names one number carries, a bit each: sums of so many powers of two are exact in float64."""
GRADIENTS, RATES = 1e-3, 1e-5
"""Relative standard deviations over the ranks from which on they differ; gradients may be rounded after averaging."""


def numbers(layers: int, control: StepControl) -> int:
    """How many numbers an ordinary step reduces: which layers' updates pointed uphill, and under a clip all <U, D>.

    Each comes from the layer's owner alone, so that the sum over layers is taken in their order on every rank: summed
    over ranks, it would be rounded differently for each way of placing layers on ranks.
    """
    return FIXED + -(-layers // NAMES) + (layers if isinstance(control, KLClip) else 0)


@dataclass
class Agreed:
    """What all ranks have agreed on.

    Attributes:
        applied: all updates are finite.
        kl_scale: what the update was shortened by.
        refreshed: number of layers.
        failures: number of decompositions.
        scalars: sums of the caller's numbers.
        changes: how much the factors of a layer have changed between two refreshes, where that was measured.
        layers: reports, where asked for.
        changed: some rank has found the model changed.
        differing: what the ranks do not have alike: "gradients", "optimizers" or nothing.
        uphill: layers whose update pointed uphill.
    """

    applied: bool
    kl_scale: float
    refreshed: int
    failures: int
    scalars: dict[str, float]
    changes: dict[str, float]
    layers: dict[str, LayerReport] = field(default_factory=dict)
    changed: bool = False
    differing: str = ""
    uphill: tuple[str, ...] = ()


class Agreement:
    """Measures updates layer by layer and reduces what was measured. Allocates nothing on an ordinary step.

    Args:
        model: for its gradients, which are all checked, those that are left to the optimizer too.
        layers: captured layers by name.
        owned: layer name -> whether its products count on this rank.
        comm: the ranks that agree.
        control: bounds the step.
        dtype: of the products.

    Attributes:
        witness: the parameter whose averaged gradient all ranks compare in every step; None if there is none.
        amount: of its gradient in this step; NaN where that is missing or sparse.
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
        device = next(model.parameters()).device
        self._products = torch.zeros(len(layers), LOGGED, dtype=dtype, device=device)
        self._rows = {name: row.split(1) for name, row in zip(layers, self._products, strict=True)}
        self.watch(model, layers)
        self._work = Workspace()
        self._scale = torch.ones((), dtype=dtype, device=device)
        self._vectors: dict[int, Tensor] = {}
        self._measured: set[str] = set()
        self._plain: set[str] = set()
        self._written: dict[str, float] = {}
        self._asked: dict[tuple[bool, tuple[str, ...]], float] = {(False, ()): 0.0}

    def watch(self, model: nn.Module, layers: Mapping[str, CapturedLayer]) -> None:
        """Takes the parameters that are trained now; only those of these layers are clipped."""
        captured = {id(p) for layer in layers.values() for p in layer.parameters}
        parameters = [p for p in model.parameters() if p.requires_grad]
        self._others = [p for p in parameters if id(p) not in captured]
        self._captured = [p for p in parameters if id(p) in captured]
        # Of what each layer is given, each other gradient and the witness: squares would overflow long before sums.
        # Behind them, whether each layer's update pointed uphill: what is asked of the device is asked at once.
        self._sums = self._products.new_zeros(2 * len(self._layers) + len(self._others) + 1)
        self.witness = min(self._captured, key=torch.numel, default=None)
        self.amount = math.nan
        self._entries = self._sums.unbind()
        self._entry = dict(zip(self._layers, self._entries, strict=False))
        self._witnessed = len(self._layers) + len(self._others)
        self._uphill = self._sums[self._witnessed + 1 :]
        self._flag = dict(zip(self._layers, self._uphill.split(1), strict=True))
        self._limits = {name: _limit(layer) for name, layer in self._layers.items()}

    def size(self, inputs: StepInputs, changes: Sequence[str]) -> int:
        """How many numbers the reduction carries."""
        logged = LOGGED * len(self._layers) if inputs.log else 0
        return numbers(len(self._layers), self._control) + len(inputs.scalars) + len(changes) + logged

    def start_step(self) -> None:
        """Looks at the averaged gradients, which are still there."""
        self._measured.clear()
        self._uphill.zero_()
        self._plain.clear()
        gradient = None if self.witness is None else self.witness.grad
        if self._comm.size == 1 or gradient is None or gradient.is_sparse:
            self._entries[self._witnessed].fill_(math.nan)
        else:
            _amount(gradient, self._entries[self._witnessed])

    def downhill(self, name: str, update: Tensor, gradient: Tensor, control: FixedNorm | None) -> Tensor:
        """The update U of a layer, or the gradient D where <U, D> is below 0, which is noted; no device is asked.

        Args:
            name: of the layer.
            update: [p, o, a], at its length.
            gradient: what was preconditioned; overwritten under a length rule, where it takes the update's length.
            control: the layer's length rule; None for none.
        """
        self._measure(name, update, gradient, control)
        product, flag = self._rows[name][0], self._flag[name]
        if update is gradient or (product.device.type == "cpu" and not product.item() < 0):
            return update
        flag.copy_(product < 0)
        if control is not None:  # both are at the same length, but for the layer's singular values
            length = torch.linalg.vector_norm(update)
            gradient = at_norm(gradient, factor=length.view(1))
        update = torch.where(flag > 0, gradient, update)
        self._measure(name, update, gradient, control)
        return update

    def _measure(self, name: str, update: Tensor, gradient: Tensor, control: FixedNorm | None) -> None:
        """Notes <U, D>; without a length rule times `LESS`."""
        if control is None:
            less = self._work.number("less", LESS, gradient.dtype, gradient.device)
            gradient = torch.mul(gradient, less, out=self._work.like("scaled", gradient))
        _dot(update, gradient, self._rows[name][0], self._work)

    def describe(self, name: str, update: Tensor, gradient: Tensor, share: Tensor | float) -> None:
        """Notes cosine and curvature share, on logged steps alone, for any size of the numbers.

        Args:
            name: of the layer.
            update: [p, o, a] U, before its length is bounded.
            gradient: [p, o, a] D.
            share: of the curvature; NaN where there is none to tell.
        """
        unit_update, unit_gradient = update / size_of(update), gradient / size_of(gradient)
        product = (unit_update * unit_gradient).sum().double()
        norms = unit_update.norm().double() * unit_gradient.norm().double()
        row = self._rows[name]
        row[1].copy_(torch.where(norms > 0, product / norms, 1.0))
        row[2].copy_(torch.as_tensor(share))

    def check(self, name: str, update: Tensor) -> None:
        """Notes whether what is written into a layer's gradient is finite there."""
        _amount(update, self._entry[name], exact=self._limits[name] < math.inf)
        self._measured.add(name)

    def plain(self, name: str) -> None:
        """Notes that a layer has no curvature yet, so that its update is its gradient."""
        self._plain.add(name)

    def measure_size(self, name: str, update: Tensor, staleness: int) -> None:
        """Notes how large a layer's update is by its weights, and how old its curvature; on logged steps alone."""
        row = self._rows[name]
        parameters = self._layers[name].parameters
        weights = torch.stack([torch.linalg.vector_norm(p.detach(), dtype=update.dtype) for p in parameters]).norm()
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
        asked = self._compare(inputs)
        clip = self._control if isinstance(self._control, KLClip) else None
        measured = self._products.tolist() if clip is not None or inputs.log else [[0.0] * LOGGED] * len(self._layers)
        products = dict(zip(self._layers, measured, strict=True))
        owned = [name for name in self._layers if name in self._measured and self._owned[name]]
        bounded: dict[str, float] = {}
        if clip is not None:
            bounded = {name: clip.weight(inputs.learning_rates[name]) / LESS * products[name][0] for name in owned}
        finite, uphill = self._looked_at()
        finite = finite and all(math.isfinite(value) for value in bounded.values())
        values = [float(not finite), refreshed, float(failures), float(inputs.changed)]
        seen = self.amount if math.isfinite(self.amount) else 0.0
        values += [float(math.isfinite(self.amount)), seen, seen**2, inputs.rates, inputs.rates**2, asked]
        values.append(float(self._without_length(owned)))
        values += inputs.scalars.values()
        values += [0.0 if change is None else 1.0 + change for change in changes.values()]
        first_clip = len(values)
        if clip is not None:
            values += [bounded.get(name, 0.0) if finite else 0.0 for name in self._layers]
        first_log = len(values)
        if inputs.log:
            for name in self._layers:  # the gradient of one that was left as it is has a cosine of 1 with itself
                left = [0.0, float(self._owned[name]), 0.0, 0.0, 0.0]
                values += products[name] if name in owned else left
        first_name = len(values)
        values += self._names([name in owned and name in uphill for name in self._layers])
        totals = self._sum(values)
        self._comm.monitor.steps += self._comm.size > 1
        if totals[9] != self._comm.size * asked:
            raise Refused("ranks differ in the names of step(scalars=...) or in log: give all the same")
        some = 0 < totals[10] < len(self._layers)  # not where all have retired
        factors = self._lengthen(owned) if some and totals[0] == 0 else {}
        products_of = zip(self._layers, totals[first_clip:first_log], strict=False)
        quadratic = sum(factors.get(name, 1.0) * product for name, product in products_of)
        scale = 1.0 if clip is None else clip.scale(quadratic)
        gradients = [p.grad for p in self._captured if p.grad is not None]
        if scale != 1.0 and gradients:
            self._scale.fill_(scale)  # a number would be made a tensor for every gradient
            torch._foreach_mul_(gradients, self._scale)
        first_change = FIXED + len(inputs.scalars)
        found = zip(changes, totals[first_change:first_clip], strict=True)
        differing = "" if totals[3] > 0 else self._differing(totals)
        return Agreed(
            applied=totals[0] == 0 and math.isfinite(quadratic) and not differing,
            kl_scale=scale,
            refreshed=round(totals[1]),
            failures=int(totals[2]),
            scalars=dict(zip(inputs.scalars, totals[FIXED:first_change], strict=True)),
            changes={name: value - 1.0 for name, value in found if value > 0},
            changed=totals[3] > 0,
            differing=differing,
            uphill=self._named(totals[first_name:]),
            layers=self._reports(totals[first_log:], scale, factors) if inputs.log else {},
        )

    def _without_length(self, owned: Sequence[str]) -> int:
        """Layers that take their gradient as it is, which has any length, and is not zero."""
        if isinstance(self._control, FixedNorm):
            return 0
        return sum(name in self._plain and self._written[name] > 0 for name in owned)

    def _lengthen(self, owned: Sequence[str]) -> dict[str, float]:
        """Gives gradients of layers without curvature the length of the other layers' updates. Collective.

        A length is counted as `FixedNorm` does, by sqrt(max(o, a)) of each block; that of the others is their root mean
        square. Where no layer has curvature, gradients stay as they are.

        Returns:
            what such a layer's gradient was multiplied by.
        """
        values = [[0.0, 0.0] for _ in self._layers]
        for value, (name, layer) in zip(values, self._layers.items(), strict=True):
            if name in owned:
                norm = torch.linalg.vector_norm(layer.gradient(), dtype=torch.float64)
                value[:] = norm.item(), float(name in self._plain)
        totals = self._sum([number for value in values for number in value])
        sizes = {
            name: layer.shape.blocks * max(layer.shape.outputs, layer.shape.inputs)
            for name, layer in self._layers.items()
        }
        norms = dict(zip(self._layers, totals[::2], strict=True))
        plain = {name for name, flag in zip(self._layers, totals[1::2], strict=True) if flag > 0}
        others = [name for name in self._layers if name not in plain and norms[name] > 0]
        if not others:
            return {}
        length = math.hypot(*(norms[name] for name in others)) / math.sqrt(sum(sizes[name] for name in others))
        factors = {name: length * math.sqrt(sizes[name]) / norms[name] for name in plain if norms[name] > 0}
        for name, number in factors.items():
            for gradient in (p.grad for p in self._layers[name].parameters if p.grad is not None):
                root = math.sqrt(number)  # twice, since the number itself may be too large for the gradient's dtype
                gradient.mul_(root).mul_(root)
        return factors

    def _compare(self, inputs: StepInputs) -> float:
        """A number for what is asked for beside the step; what is new must be so on all ranks: lengths depend on it."""
        key = (bool(inputs.log), tuple(inputs.scalars))
        if key not in self._asked:
            self._comm.meet(_call(inputs))
            self._asked[key] = float(zlib.crc32(repr(key).encode()) + 1)
        return self._asked[key]

    def _sum(self, values: list[float]) -> list[float]:
        vector = self._vectors.get(len(values))
        if vector is None:
            vector = self._vectors[len(values)] = torch.empty(len(values), dtype=torch.float64)
        array = vector.numpy()
        array[:] = values
        if self._comm.size > 1:
            self._comm.allreduce(vector, "control", "step control").wait()
        return vector.tolist()

    @staticmethod
    def _names(marked: Sequence[bool]) -> list[float]:
        """The marked ones of the layers as numbers, `NAMES` layers in each."""
        words = range(0, len(marked), NAMES)
        return [float(sum(2**bit for bit, mark in enumerate(marked[i : i + NAMES]) if mark)) for i in words]

    def _named(self, words: Sequence[float]) -> tuple[str, ...]:
        """The layers that `_names` has marked."""
        return tuple(name for i, name in enumerate(self._layers) if int(words[i // NAMES]) >> i % NAMES & 1)

    def _looked_at(self) -> tuple[bool, set[str]]:
        """Whether all is finite that was written or is left to the optimizer, and which updates pointed uphill.

        A gradient that is not finite on this rank alone counts.
        """
        for parameter, entry in zip(self._others, self._entries[len(self._layers) : self._witnessed], strict=True):
            if parameter.grad is None:
                entry.zero_()
            else:
                _amount(parameter.grad, entry)
        seen = self._sums.tolist()
        largest, self.amount = seen[: self._witnessed], seen[self._witnessed]
        uphill = {name for name, flag in zip(self._layers, seen[self._witnessed + 1 :], strict=True) if flag > 0}
        written = dict(zip(self._layers, largest, strict=False))
        self._written = written
        others = largest[len(self._layers) :]
        finite = all(map(math.isfinite, others)) and all(written[n] < self._limits[n] for n in self._measured)
        return finite, uphill

    def _differing(self, totals: Sequence[float]) -> str:
        """What the ranks do not have alike, by the sums of numbers and squares."""
        compared, amounts, squares, rates, squared = totals[4:9]
        rounded = 0.0 if self.witness is None else 4 * torch.finfo(self.witness.dtype).eps
        if _deviation(compared, amounts, squares) > max(GRADIENTS, rounded):
            return "gradients"
        return "optimizers" if _deviation(self._comm.size, rates, squared) > RATES else ""

    def _reports(self, values: list[float], scale: float, factors: Mapping[str, float]) -> dict[str, LayerReport]:
        reports = {}
        for position, name in enumerate(self._layers):
            _, cosine, share, size, staleness = values[LOGGED * position : LOGGED * (position + 1)]
            size *= scale * factors.get(name, 1.0)
            reports[name] = LayerReport(cosine, None if math.isnan(share) else share, size, int(staleness))
        return reports


def _deviation(count: float, total: float, squares: float) -> float:
    """The standard deviation of so many numbers, by their root mean square; 0 for what is none."""
    whole = count * squares
    return math.sqrt(max(whole - total**2, 0.0) / whole) if 0 < whole < math.inf else 0.0


def _call(inputs: StepInputs) -> str:
    return f"step(scalars={{{', '.join(map(repr, inputs.scalars))}}}, log={bool(inputs.log)})"


def _limit(layer: CapturedLayer) -> float:
    """What rounds to infinity in a layer's gradients."""
    least = min((torch.finfo(p.dtype) for p in layer.parameters), key=lambda info: info.max)
    return least.max * (1.0 + least.eps / 4) if least.max < torch.finfo(torch.float32).max else math.inf


def _amount(tensor: Tensor, out: Tensor, exact: bool = False) -> None:
    """The sum of absolute entries; inf and NaN are kept. Allocates nothing where the dtypes are the same.

    Where `exact`, or where the sum could overflow in the dtype, the largest of them, which takes longer on CPUs.
    """
    values = tensor._values() if tensor.is_sparse else tensor
    order = math.inf if exact or values.element_size() < 4 else 1
    if values.numel() == 0:
        out.zero_()
    elif values.dtype == out.dtype:
        torch.linalg.vector_norm(values, order, out=out)
    else:
        out.copy_(torch.linalg.vector_norm(values, order))


def _dot(left: Tensor, right: Tensor, out: Tensor, work: Workspace) -> None:
    """The sum of elementwise products in `out` [1]; allocates nothing where the tensors have one dtype.

    Not by BLAS, whose sums depend on some processors on where in memory a tensor begins.
    """
    products = torch.mul(left, right, out=work.like("products", left))
    if products.dtype == out.dtype:
        torch.sum(products, (0, 1, 2), out=out.view(()))
    else:
        out.copy_(products.sum())
