"""One forward and backward pass on the meta device: what every operation computes, reads and writes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from hpc_kfac.layers import Capture, LayerShape
from hpc_kfac.tasks.outlines import Outline


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
