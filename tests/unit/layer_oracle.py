"""Oracles for captured layers: a loss whose output gradient is known, rows by explicit loops, autograd per sample."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from hpc_kfac.layers import Capture, CapturedLayer, LayerBatch
from hpc_kfac.linalg.spatial import SpatiallyUncorrelated
from hpc_kfac.linalg.structure import Blocks, Dense, Diagonal, Identity, Structure
from unit.fake_batch import FakeBatch


def normal(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def term(output: Tensor, target: Tensor) -> Tensor:
    """The loss of one sample or of many: its gradient with respect to the output is output - target."""
    return 0.5 * (output - target).square().sum()


def take_all(
    capture: Capture, count: float | None = None, scale: float | None = None, mask: Tensor | None = None
) -> dict[str, LayerBatch]:
    """Batches of all layers that a backward pass has reached; forgets the other uses."""
    found = {name: capture.take(name, count, scale, mask) for name in capture.layers}
    capture.forget()
    return {name: batch for name, batch in found.items() if batch is not None}


def captured(module: nn.Module, x: Tensor, reduce: bool = False) -> tuple[CapturedLayer, LayerBatch, Tensor]:
    """One armed forward and backward of a mean loss: the layer, its batch, the gradients of the sum of the terms."""
    capture = Capture(module, weight_sharing="reduce" if reduce else "expand", dtype=torch.float64)
    capture.armed = True
    output = module(x)
    target = normal(*output.shape, seed=7)
    (term(output, target) / len(x)).backward()
    batches = take_all(capture)
    capture.remove()
    return capture.layers[""], batches[""], (output - target).detach()


def sample_gradients(layer: CapturedLayer, x: Tensor, output: Tensor, g: Tensor) -> Tensor:
    """Each sample's gradient by autograd [N, p, o, a]; for modules that treat samples one by one."""
    names = [name for name, parameter in layer.module.named_parameters() if parameter.requires_grad]
    parameters = {name: parameter.detach() for name, parameter in layer.module.named_parameters()}

    def loss(values: dict[str, Tensor], sample: Tensor, target: Tensor) -> Tensor:
        return term(functional_call(layer.module, parameters | values, (sample.unsqueeze(0),)).squeeze(0), target)

    trained = {name: parameters[name] for name in names}
    gradients = vmap(grad(loss), in_dims=(None, 0, 0))(trained, x, output - g)
    return torch.stack([layer.matrix([gradients[name][n] for name in names]) for n in range(len(x))])


def linear_rows(x: Tensor, bias: bool) -> Tensor:
    """[1, N, T, a] of an input [N, ..., d]."""
    rows = x.reshape(len(x), -1, x.shape[-1])
    return (torch.cat([rows, torch.ones_like(rows[..., :1])], dim=-1) if bias else rows).unsqueeze(0)


def conv_rows(module: nn.Conv1d | nn.Conv2d | nn.Conv3d, x: Tensor, bias: bool) -> Tensor:
    """[groups, N, T, a]: every patch by a loop over output positions."""
    mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
    padded = F.pad(x, module._reversed_padding_repeated_twice, mode=mode)
    if isinstance(module.padding, tuple) and module.padding_mode == "zeros":
        padded = F.pad(x, [side for side in reversed(module.padding) for _ in range(2)])
    reach = [(k - 1) * d for k, d in zip(module.kernel_size, module.dilation, strict=True)]
    starts = [range(0, size - r, s) for size, r, s in zip(padded.shape[2:], reach, module.stride, strict=True)]
    patches = []
    for corner in itertools.product(*starts):
        window = tuple(slice(c, c + r + 1, d) for c, r, d in zip(corner, reach, module.dilation, strict=True))
        patches.append(padded[(slice(None), slice(None), *window)])
    rows = torch.stack(patches, dim=1).unflatten(2, (module.groups, -1)).flatten(3).permute(2, 0, 1, 3)
    return torch.cat([rows, torch.ones_like(rows[..., :1])], dim=-1) if bias else rows


def channel_rows(g: Tensor, groups: int = 1) -> Tensor:
    """[groups, N, T, o] of gradients [N, O, ...]."""
    return g.flatten(2).unflatten(1, (groups, -1)).permute(1, 0, 3, 2)


def bases(layer: CapturedLayer) -> tuple[Tensor, Tensor]:
    """Random orthogonal bases of both sides."""
    p, o, a = layer.shape.blocks, layer.shape.outputs, layer.shape.inputs
    return torch.linalg.qr(normal(p, o, o, seed=3))[0], torch.linalg.qr(normal(p, a, a, seed=4))[0]


def indefinite(layer: CapturedLayer) -> tuple[Tensor, Tensor]:
    """Symmetric matrices of both sides, of any sign."""
    p, o, a = layer.shape.blocks, layer.shape.outputs, layer.shape.inputs
    left, right = normal(p, o, o, seed=5), normal(p, a, a, seed=6)
    return left + left.mT, right + right.mT


def structures(layer: CapturedLayer) -> Sequence[Structure]:
    shape = layer.shape
    general = (Dense(), Diagonal(), Blocks(3))
    return general if is_norm(layer) else (*general, SpatiallyUncorrelated(shape.kernel, shape.bias))


def is_norm(layer: CapturedLayer) -> bool:
    return isinstance(layer.shape.output_structure, Identity)


def compare(layer: CapturedLayer, batch: LayerBatch, oracle: FakeBatch) -> None:
    """Every statistic of a batch against its definition."""
    close = torch.testing.assert_close
    for structure in structures(layer):
        close(batch.input_moment(structure), oracle.input_moment(structure))
    for structure in () if is_norm(layer) else (Dense(), Diagonal(), Blocks(2)):
        close(batch.output_moment(structure), oracle.output_moment(structure))
    for side, expected in zip(batch.means(), oracle.means(), strict=True):
        close(side, expected)
    close(batch.mean_gradient(), oracle.mean_gradient())
    for limit in (1, 3, 100):
        for side, expected in zip(batch.rows(limit), oracle.rows(limit), strict=True):
            close(side, expected)
        for side, expected in zip(batch.position_rows(limit), oracle.position_rows(limit), strict=True):
            close(side, expected)
        close(batch.sample_gradients(limit), oracle.sample_gradients(limit))
    for forms in () if is_norm(layer) else ((None, None), indefinite(layer)):
        arguments = (*forms, Dense(), Dense())
        for side, expected in zip(batch.paired_moments(*arguments), oracle.paired_moments(*arguments), strict=True):
            close(side, expected)
    output_basis, input_basis = bases(layer)
    for output, inputs in ((None, None), (output_basis, input_basis), (output_basis, None), (None, input_basis)):
        arguments = (output, inputs, Dense(), Dense())
        close(batch.projected_square(*arguments), oracle.projected_square(*arguments))
    close(layer.gradient(), oracle.gradient())


def check_round_trip(layer: CapturedLayer) -> None:
    """set_gradient inverts gradient and writes in place."""
    before = [parameter.grad for parameter in layer.parameters]
    update = normal(*layer.gradient().shape, seed=9)
    layer.set_gradient(update)
    torch.testing.assert_close(layer.gradient(), update, rtol=0, atol=0)
    assert all(parameter.grad is old for parameter, old in zip(layer.parameters, before, strict=True))
