"""What a model takes, by passes on the meta device: arithmetic and bytes of every operation, activations, readiness.

Shapes alone are computed. Two passes with different batches give every figure as a base and a part for each sample.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from hpc_kfac.guards.optimizer_facts import BaseOptimizer
from hpc_kfac.layers import Capture, LayerShape
from hpc_kfac.planning.machine import Machine
from hpc_kfac.tasks.outlines import Outline

BATCHES = (2, 4)
"""Samples of the two passes; batch norm wants more than one."""


@dataclass(frozen=True)
class Work:
    """Operations in their order.

    Attributes:
        flops: [2, operations], the base and what each sample adds.
        bytes: likewise, read and written.
    """

    flops: np.ndarray
    bytes: np.ndarray

    def seconds(self, samples: float, machine: Machine, dtype: torch.dtype) -> np.ndarray:
        """Of each operation, [operations]; a 16-bit dtype halves what is read and written."""
        scale = min(1.0, dtype.itemsize / 4)
        flops, nbytes = (figure[0] + samples * figure[1] for figure in (self.flops, self.bytes * scale))
        bound = np.maximum(flops / machine.rate(dtype), nbytes / machine.memory_bandwidth)
        return np.asarray(machine.overhead + bound)

    def total_flops(self, samples: float) -> float:
        """Of all operations."""
        return float((self.flops[0] + samples * self.flops[1]).sum())


@dataclass(frozen=True)
class Weight:
    """A parameter.

    Attributes:
        name: in the model.
        bytes: of it and of its gradient.
        layer: captured layer that it belongs to; empty where it is left to the optimizer.
        ready: number of operations of the backward pass after which its gradient is complete.
        state: bytes of the optimizer's state.
        trained: whether it has a gradient.
    """

    name: str
    bytes: int
    layer: str
    ready: int
    state: int
    trained: bool = True


@dataclass(frozen=True, eq=False)
class ModelCosts:
    """What a model takes.

    Attributes:
        name: of the model.
        shapes: captured layers.
        shared: whether their weights are used at several positions of a sample.
        rows: positions of a sample, by layer.
        traffic: bytes of a layer's inputs and outputs for each sample.
        weights: parameters in module order.
        buffers: bytes of what is no parameter, such as running means.
        forward: operations.
        backward: operations.
        update: operations of the base optimizer.
        activations: bytes kept for the backward pass, the base and for each sample.
        left_out: what is not preconditioned, in words.
        note: what had to be assumed.
        momentum: the optimizer's, for what is preconditioned.
    """

    name: str
    shapes: Mapping[str, LayerShape]
    shared: Mapping[str, bool]
    rows: Mapping[str, float]
    traffic: Mapping[str, float]
    weights: Sequence[Weight]
    buffers: int
    forward: Work
    backward: Work
    update: Work
    activations: tuple[float, float]
    left_out: str
    note: str
    momentum: float

    @property
    def parameter_bytes(self) -> int:
        """Of all parameters."""
        return sum(weight.bytes for weight in self.weights)

    @property
    def gradient_bytes(self) -> int:
        """Of all gradients."""
        return sum(weight.bytes for weight in self.weights if weight.trained)

    def kept(self, samples: float) -> float:
        """Bytes of activations at the end of a forward pass."""
        return self.activations[0] + samples * self.activations[1]


def model_costs(
    outline: Outline,
    optimizer_of: Callable[[nn.Module], Any],
    skip: Sequence[str] = (),
    frozen: Callable[[nn.Module], object] = lambda model: None,
) -> ModelCosts:
    """Takes a model's figures.

    Args:
        outline: the model.
        optimizer_of: makes its optimizer.
        skip: names of layers that are left to it.
        frozen: takes the gradients of what is not trained away.

    Raises:
        ValueError: nothing of the model can be captured.
    """
    model = outline.model()
    frozen(model)
    capture = Capture(model, skip=skip)
    passes = [traced(model, capture, outline, samples) for samples in BATCHES]
    few, many = passes
    optimizer = optimizer_of(model)
    with Recorder() as update:
        optimizer.step()
    layer_of = {id(p): name for name, layer in capture.layers.items() for p in layer.parameters}
    weights = [
        Weight(
            name,
            p.numel() * p.element_size(),
            layer_of.get(id(p), ""),
            few.ready.get(name, 0),
            _state_bytes(optimizer, p),
            p.requires_grad,
        )
        for name, p in model.named_parameters()
    ]
    return ModelCosts(
        name=outline.name,
        shapes={name: layer.shape for name, layer in capture.layers.items()},
        shared={name: layer.shared for name, layer in capture.layers.items()},
        rows={name: few.rows.get(name, 0.0) for name in capture.layers},
        traffic={name: few.traffic.get(name, 0.0) for name in capture.layers},
        weights=weights,
        buffers=sum(b.numel() * b.element_size() for b in model.buffers()),
        forward=_work(few.forward, many.forward),
        backward=_work(few.backward, many.backward),
        update=_work(update, update),
        activations=_line(few.kept, many.kept),
        left_out=capture.summary(),
        note=outline.note,
        momentum=BaseOptimizer(optimizer, capture.layers).momentum(),
    )


def _work(few: Recorder, many: Recorder) -> Work:
    return Work(_lines(few.flops, many.flops), _lines(few.bytes, many.bytes))


def _lines(few: Sequence[float], many: Sequence[float]) -> np.ndarray:
    low, high = np.asarray(few), np.asarray(many)
    slope = (high - low) / (BATCHES[1] - BATCHES[0])
    return np.stack([low - BATCHES[0] * slope, slope])


def _line(few: float, many: float) -> tuple[float, float]:
    base, slope = _lines([few], [many])
    return float(base[0]), float(slope[0])


def _state_bytes(optimizer: Any, parameter: Tensor) -> int:
    state = optimizer.state.get(parameter, {})
    return sum(nbytes(value) for value in state.values() if isinstance(value, Tensor))


class Recorder(TorchDispatchMode):
    """Notes flops and bytes of every operation that computes something.

    Attributes:
        flops: of each, in time.
        bytes: read and written by each.
    """

    def __init__(self) -> None:
        super().__init__()
        self.flops: list[float] = []
        self.bytes: list[float] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        if not func.is_view:
            count = flop_registry.get(func._overloadpacket)
            self.flops.append(float(count(*args, **(kwargs or {}), out_val=out)) if count else 0.0)
            tensors = [leaf for leaf in tree_leaves((args, kwargs, out)) if isinstance(leaf, Tensor)]
            self.bytes.append(float(sum(nbytes(tensor) for tensor in tensors)))
        return out


class _FusedAttention(TorchFunctionMode):
    """Attention in one operation, as devices have it; the meta device would write out every score."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        given = kwargs or {}
        if func is functional.scaled_dot_product_attention and not set(given) - {"is_causal"} and len(args) == 3:
            return torch.ops.aten._scaled_dot_product_flash_attention(*args, 0.0, given.get("is_causal", False))[0]
        return func(*args, **given)


@dataclass
class Pass:
    """What one pass shows.

    Attributes:
        forward: its operations.
        backward: its operations.
        ready: parameter -> number of operations of the backward pass after which its gradient is complete.
        rows: positions of a sample, by layer.
        traffic: bytes of inputs and outputs for each sample, by layer.
        kept: bytes of activations at the end of the forward pass.
    """

    forward: Recorder = field(default_factory=Recorder)
    backward: Recorder = field(default_factory=Recorder)
    ready: dict[str, int] = field(default_factory=dict)
    rows: dict[str, float] = field(default_factory=dict)
    traffic: dict[str, float] = field(default_factory=dict)
    kept: float = 0.0


def traced(model: nn.Module, capture: Capture, outline: Outline, samples: int) -> Pass:
    """Takes a model on the meta device through a pass with so many samples."""
    found = Pass()
    saved: dict[int, Any] = {}  # storages are held, so that none takes the place of another
    own = {tensor.untyped_storage()._cdata for tensor in (*model.parameters(), *model.buffers())}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            saved[storage._cdata] = storage
        return tensor

    handles = [
        layer.module.register_forward_hook(_rows_hook(found, name, layer.shape, samples))
        for name, layer in capture.layers.items()
    ]
    for name, parameter in model.named_parameters():
        parameter.grad = None
        if parameter.requires_grad:
            handles.append(parameter.register_post_accumulate_grad_hook(_ready_hook(found, name)))
    inputs = outline.inputs(samples, torch.device("meta"))
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), found.forward, _FusedAttention():
        loss = torch.log_softmax(model(inputs), -1).mean()
    found.kept = float(sum(storage.nbytes() for storage in saved.values()))
    with found.backward:
        loss.backward()
    for handle in handles:
        handle.remove()
    return found


def _rows_hook(found: Pass, name: str, shape: LayerShape, samples: int) -> Callable[..., None]:
    def hook(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        found.rows[name] = found.rows.get(name, 0.0) + output.numel() / (shape.blocks * shape.outputs * samples)
        both = nbytes(output) + sum(nbytes(arg) for arg in args if isinstance(arg, Tensor))
        found.traffic[name] = found.traffic.get(name, 0.0) + both / samples

    return hook


def _ready_hook(found: Pass, name: str) -> Callable[[Tensor], None]:
    def hook(parameter: Tensor) -> None:
        found.ready[name] = len(found.backward.flops)

    return hook


def nbytes(tensor: Tensor) -> int:
    """Of a tensor's numbers."""
    return tensor.numel() * tensor.element_size()
