"""Normalisation layers: every channel's (gamma, beta) is an exact block of its own.

A channel's row is its per-sample gradient, (sum of g * xhat, sum of g) over the positions of the sample, so that A is
the exact Fisher block of the channel (unit-wise natural gradient, Osawa et al. 2019); the output side is the identity.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence
from functools import cached_property
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hpc_kfac.layers.batch import LayerShape, Reading, Use
from hpc_kfac.layers.layer import CapturedLayer
from hpc_kfac.layers.positions import refuse_draws, spread
from hpc_kfac.linalg.structure import Identity, Structure

BatchNorm = nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d | nn.SyncBatchNorm


class NormBatch:
    """Rows [p, N, a] of the per-sample gradients, N running over samples and draws; the output rows are ones."""

    def __init__(self, layer: NormLayer, uses: Sequence[Use], count: float, reading: Reading) -> None:
        self.shape, self.count, self.reading = layer.shape, count, reading
        self.layer, self.uses = layer, uses

    @cached_property
    def _gradients(self) -> Tensor:
        """Per-sample gradients of the sum of the loss terms [draws, samples, p, a]."""
        groups: dict[tuple[int, int], Tensor] = {}
        for use in self.uses:
            row = self.layer.sample_gradients(use, self.reading)
            group = (use.micro_batch, row.shape[1])
            groups[group] = groups[group] + row if group in groups else row
        return torch.cat(list(groups.values()), dim=1) * self.reading.scale

    @cached_property
    def _rows(self) -> Tensor:
        return self._gradients.flatten(0, 1).transpose(0, 1).contiguous()

    def input_moment(self, structure: Structure) -> Tensor:
        return structure.gram(self._rows) / self.count

    def output_moment(self, structure: Structure) -> Tensor:
        return self._rows.new_ones(structure.shape(self.shape.blocks, 1))

    def means(self) -> tuple[Tensor, Tensor]:
        refuse_draws(self.reading.draws)
        return self._rows.sum(1) / self.count, self._rows.new_ones(self.shape.blocks, 1)

    def projected_square(
        self,
        output_basis: Tensor | None,
        input_basis: Tensor | None,
        output_structure: Structure,
        input_structure: Structure,
    ) -> Tensor:
        rows = input_structure.rotate_right(self._rows, input_basis)
        return rows.square().sum(1, keepdim=True) / self.count

    def rows(self, limit: int) -> tuple[Tensor, Tensor]:
        """As ``LayerBatch.rows``, scaled as those of the other families."""
        draws, samples = self._gradients.shape[:2]
        sample, draw = spread(limit, samples, draws, self._gradients.device)
        x = self._gradients[draw, sample].transpose(0, 1)
        r = x.new_full((self.shape.blocks, len(sample), 1), (samples * draws / self.count) ** 0.5)
        return x, r


class NormLayer(CapturedLayer):
    """A normalisation layer with an element-wise weight; a subclass knows how its input is normalised."""

    def _shape(self) -> LayerShape:
        channels = self.parameters[0].numel()
        return LayerShape(channels, 1 + self.has_bias, 1, output_structure=Identity(), bias=self.has_bias)

    def batch(self, uses: Sequence[Use], count: float, reading: Reading = Reading()) -> NormBatch:  # noqa: B008
        return NormBatch(self, uses, count, reading)

    @abstractmethod
    def normalised(self, x: Tensor, use: Use) -> Tensor:
        """xhat, in the layout and dtype of x; ``use.inputs`` has the original dtype."""

    @abstractmethod
    def channels_last(self, tensor: Tensor, dims: int) -> Tensor:
        """A tensor with ``dims`` leading draws, in the module's layout behind them, as [..., samples, positions, p]."""

    @abstractmethod
    def leading(self, use: Use) -> torch.Size:
        """The leading dimensions of an input, for masks."""

    def sample_gradients(self, use: Use, reading: Reading) -> Tensor:
        """Unscaled per-sample gradients of one use [draws, samples, p, a]."""
        assert use.gradient is not None
        g = (use.gradient if reading.draws else use.gradient.unsqueeze(0)).to(reading.dtype)
        xhat = self.channels_last(self.normalised(use.inputs.to(reading.dtype), use), 0)
        g = self.channels_last(g, 1)
        if reading.mask is not None and reading.mask.shape == self.leading(use):
            g = g * reading.mask.reshape(xhat.shape[0], -1, 1)
        gamma = (g * xhat).sum(2)
        return torch.stack([gamma, g.sum(2)], dim=-1) if self.has_bias else gamma.unsqueeze(-1)


class ChannelNormLayer(NormLayer):
    """Inputs [N, C, ...]: the channel is the second axis."""

    def channels_last(self, tensor: Tensor, dims: int) -> Tensor:
        flat = tensor.reshape(*tensor.shape[: dims + 2], -1)
        return flat.transpose(-1, -2)

    def leading(self, use: Use) -> torch.Size:
        return use.inputs.shape[:1]


class BatchNormLayer(ChannelNormLayer):
    """Batch statistics in training, running ones in evaluation.

    Of a ``SyncBatchNorm`` it sees only the local batch, whose statistics stand for those of all processes.
    """

    families = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
    module: BatchNorm

    def normalised(self, x: Tensor, use: Use) -> Tensor:
        module = self.module
        if use.training or module.running_mean is None or module.running_var is None:
            return F.batch_norm(x, None, None, training=True, eps=module.eps)
        return F.batch_norm(x, module.running_mean.to(x), module.running_var.to(x), eps=module.eps)


class GroupNormLayer(ChannelNormLayer):
    families = (nn.GroupNorm,)
    module: nn.GroupNorm

    def normalised(self, x: Tensor, use: Use) -> Tensor:
        return F.group_norm(x, self.module.num_groups, eps=self.module.eps)


class LayerNormLayer(NormLayer):
    """Inputs [N, ..., *normalized_shape]: every element of the normalised shape is a channel."""

    families: ClassVar[tuple[type[nn.Module], ...]] = (nn.LayerNorm,)
    module: nn.LayerNorm | nn.RMSNorm

    def normalised(self, x: Tensor, use: Use) -> Tensor:
        return F.layer_norm(x, list(self.module.normalized_shape), eps=self.module.eps or 0.0)

    def channels_last(self, tensor: Tensor, dims: int) -> Tensor:
        shape = tuple(self.module.normalized_shape)
        lead = tensor.shape[: tensor.dim() - len(shape)]
        samples = lead[dims] if len(lead) > dims else 1
        return tensor.reshape(*lead[:dims], samples, math.prod(lead[dims + 1 :]), math.prod(shape))

    def leading(self, use: Use) -> torch.Size:
        return use.inputs.shape[: use.inputs.dim() - len(self.module.normalized_shape)]


class RMSNormLayer(LayerNormLayer):
    families = (nn.RMSNorm,)

    def normalised(self, x: Tensor, use: Use) -> Tensor:
        eps = torch.finfo(use.inputs.dtype).eps if self.module.eps is None else self.module.eps
        return F.rms_norm(x, list(self.module.normalized_shape), eps=eps)
