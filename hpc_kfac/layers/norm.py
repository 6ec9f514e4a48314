"""Normalisation layers: every channel's (gamma, beta) is an exact block of its own.

A channel's row is its per-sample gradient, (sum of g * xhat, sum of g) over the positions of the sample, so that A is
the exact Fisher block of the channel (unit-wise natural gradient, Osawa et al. 2019); the output side is the identity.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence
from functools import cached_property
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hpc_kfac.layers.batch import LayerShape, Reading, Use, kept_positions
from hpc_kfac.layers.layer import CapturedLayer
from hpc_kfac.layers.positions import refuse_draws, spread
from hpc_kfac.linalg.structure import Identity, Structure

BatchNorm = nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d | nn.SyncBatchNorm


class NormBatch:
    """Rows [p, N, a] of the per-sample gradients, N running over samples and draws; the output rows are ones."""

    ranks = 1

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

    @property
    def input_rows(self) -> float:
        """As in ``LayerBatch``; only ones are averaged over them."""
        return self.count

    def input_moment(self, structure: Structure) -> Tensor:
        return structure.gram(self._rows).to(self._rows.dtype) / self.count

    def output_moment(self, structure: Structure) -> Tensor:
        return self._rows.new_ones(structure.shape(self.shape.blocks, 1))

    def means(self) -> tuple[Tensor, Tensor]:
        return self.input_mean(), self._rows.new_ones(self.shape.blocks, 1)

    def input_mean(self) -> Tensor:
        refuse_draws(self.reading.draws)
        return self._rows.sum(1) / self.count

    def paired_moments(
        self,
        output_form: Tensor | None,
        input_form: Tensor | None,
        output_structure: Structure,
        input_structure: Structure,
    ) -> tuple[Tensor, Tensor]:
        raise ValueError("a norm layer has no output factor to pair its input factor with")

    def mean_gradient(self) -> Tensor:
        refuse_draws(self.reading.draws)
        return self._rows.sum(1, keepdim=True) / self.count

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

    def available(self, positions: bool) -> int:
        """As ``LayerBatch.available``."""
        return self._gradients.shape[0] * self._gradients.shape[1]

    def sample_gradients(self, limit: int) -> Tensor:
        """As ``LayerBatch.sample_gradients``."""
        x, r = self.rows(limit)
        return r.unsqueeze(3) * x.unsqueeze(2)

    def position_rows(self, limit: int) -> tuple[Tensor, Tensor]:
        """The rows of samples: a norm layer's gradient has no positions left."""
        return self.rows(limit)


class NormLayer(CapturedLayer):
    """A normalisation layer with an element-wise weight; a subclass knows how its input is normalised."""

    def _shape(self) -> LayerShape:
        channels = self.parameters[0].numel()
        structure, bias = Identity(), self.has_bias
        return LayerShape(channels, 1 + bias, 1, output_structure=structure, bias=bias, gradient_rows=True)

    def batch(self, uses: Sequence[Use], count: float, reading: Reading = Reading()) -> NormBatch:  # noqa: B008
        return NormBatch(self, uses, count, reading)

    @abstractmethod
    def sample_gradients(self, use: Use, reading: Reading) -> Tensor:
        """Unscaled per-sample gradients of one use [draws, samples, p, a]."""

    def _stack(self, gamma: Tensor, beta: Tensor) -> Tensor:
        return torch.stack([gamma, beta], dim=-1) if self.has_bias else gamma.unsqueeze(-1)


class ChannelNormLayer(NormLayer):
    """Inputs [N, C, ...]: the channel is the second axis. Nothing as large as the input is written."""

    shares_by_nature = True

    module: BatchNorm | nn.GroupNorm

    def sample_gradients(self, use: Use, reading: Reading) -> Tensor:
        assert use.gradient is not None
        dtype = torch.promote_types(reading.dtype, torch.float32)
        x = use.inputs.to(dtype).reshape(*use.inputs.shape[:2], -1)
        g = (use.gradient if reading.draws else use.gradient.unsqueeze(0)).to(dtype)
        keep = kept_positions(reading.mask, (len(x), *g.shape[3:]), g.movedim(2, -1))
        if keep is not None:
            g = g * keep.unsqueeze(1)
        mean, factor = self.statistics(x, use)
        gamma, beta = zip(*(centred_products(draw.reshape(x.shape), x, mean) for draw in g), strict=True)
        rows = self._stack(torch.stack(gamma) * factor, torch.stack(beta))
        return rows.to(reading.dtype)

    @abstractmethod
    def statistics(self, x: Tensor, use: Use) -> tuple[Tensor, Tensor]:
        """Mean and (variance + eps)^-1/2 that normalise each channel of each sample of x [N, C, T]: two [N, C]."""


class BatchNormLayer(ChannelNormLayer):
    """Batch statistics in training, running ones in evaluation.

    Of a ``SyncBatchNorm`` it sees only the local batch, whose statistics stand for those of all processes.
    """

    families = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
    module: BatchNorm

    def noted(self, output: Tensor) -> tuple[Tensor, ...]:
        """The statistics of the forward pass, where torch's own kernel computed them."""
        node: Any = output.grad_fn
        # Under hooks on saved tensors, as a checkpoint sets them, reading one could repeat the forward pass. Torch
        # before 2.8 does not show whether there are any.
        hooks = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)
        if hooks is None or hooks(True) is not None:
            return ()
        if node is None or node.name() != "NativeBatchNormBackward0" or not node._saved_training:
            return ()
        return node._saved_result1.detach(), node._saved_result2.detach()

    def statistics(self, x: Tensor, use: Use) -> tuple[Tensor, Tensor]:
        module, shape = self.module, x.shape[:2]
        if use.noted:
            mean, factor = use.noted
            return mean.to(x).expand(shape), factor.to(x).expand(shape)
        if not (use.training or module.running_mean is None or module.running_var is None):
            mean, variance = module.running_mean.to(x), module.running_var.to(x)
        else:
            count = x.shape[0] * x.shape[2]
            mean = x.sum(2).sum(0) / count
            variance = centred_products(x, x, mean.expand(shape))[0].sum(0) / count
        return mean.expand(shape), (variance + module.eps).rsqrt().expand(shape)


class GroupNormLayer(ChannelNormLayer):
    families = (nn.GroupNorm,)
    module: nn.GroupNorm

    def statistics(self, x: Tensor, use: Use) -> tuple[Tensor, Tensor]:
        def average(sums: Tensor) -> Tensor:
            """From sums over positions of [N, C] to the mean over positions and the channels of the group."""
            groups = sums.unflatten(1, (self.module.num_groups, -1)) / x.shape[2]
            return groups.mean(2, keepdim=True).expand_as(groups).flatten(1)

        mean = average(x.sum(2))
        return mean, (average(centred_products(x, x, mean)[0]) + self.module.eps).rsqrt()


def centred_products(g: Tensor, x: Tensor, mean: Tensor) -> tuple[Tensor, Tensor]:
    """Sums over positions of g * (x - mean) and of g, both [N, C], for g and x [N, C, T] and mean [N, C].

    These are the weight and bias gradients of a batch normalisation with given statistics, where every channel of every
    sample is a channel: one fused pass, as precise as subtracting first.
    """
    channels = (1, -1, x.shape[2])
    mean = mean.reshape(-1)
    _, product, total = torch.ops.aten.native_batch_norm_backward(
        g.reshape(channels), x.reshape(channels), None, mean, torch.ones_like(mean), None, None, False, 0.0,
        [False, True, True],
    )  # fmt: skip
    return product.view(x.shape[:2]), total.view(x.shape[:2])


class LayerNormLayer(NormLayer):
    """Inputs [N, ..., *normalized_shape]: every element of the normalised shape is a channel."""

    families: ClassVar[tuple[type[nn.Module], ...]] = (nn.LayerNorm,)
    module: nn.LayerNorm | nn.RMSNorm

    @property
    def feature_dims(self) -> int:
        return len(self.module.normalized_shape)

    def sample_gradients(self, use: Use, reading: Reading) -> Tensor:
        assert use.gradient is not None
        g = (use.gradient if reading.draws else use.gradient.unsqueeze(0)).to(reading.dtype)
        xhat = self.positions(self.normalised(use.inputs.to(reading.dtype), use), 0)
        g = self.positions(g, 1)
        leading = use.inputs.shape[: use.inputs.dim() - len(self.module.normalized_shape)]
        keep = kept_positions(reading.mask, leading, use.gradient if reading.draws else use.gradient.unsqueeze(0))
        if keep is not None:
            g = g * keep.reshape(xhat.shape[0], -1, 1)
        return self._stack((g * xhat).sum(2), g.sum(2))

    def normalised(self, x: Tensor, use: Use) -> Tensor:
        """xhat, in the layout and dtype of x; ``use.inputs`` has the original dtype."""
        return F.layer_norm(x, list(self.module.normalized_shape), eps=self.module.eps or 0.0)

    def positions(self, tensor: Tensor, dims: int) -> Tensor:
        """A tensor with ``dims`` leading draws as [..., samples, positions, p]."""
        shape = tuple(self.module.normalized_shape)
        lead = tensor.shape[: tensor.dim() - len(shape)]
        samples = lead[dims] if len(lead) > dims else 1
        return tensor.reshape(*lead[:dims], samples, math.prod(lead[dims + 1 :]), math.prod(shape))


class RMSNormLayer(LayerNormLayer):
    families = (nn.RMSNorm,)

    def normalised(self, x: Tensor, use: Use) -> Tensor:
        eps = torch.finfo(use.inputs.dtype).eps if self.module.eps is None else self.module.eps
        return F.rms_norm(x, list(self.module.normalized_shape), eps=eps)
