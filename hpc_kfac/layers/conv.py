"""Convolutions in one, two and three dimensions, with stride, any padding, dilation and groups."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hpc_kfac.layers.batch import LayerShape, Reading, Use, kept_positions
from hpc_kfac.layers.layer import CapturedLayer
from hpc_kfac.layers.patch_free import patch_free_moment
from hpc_kfac.layers.patch_free_plan import patch_free_is_cheaper
from hpc_kfac.layers.positions import Part, PositionBatch
from hpc_kfac.linalg.spatial import SpatiallyUncorrelated
from hpc_kfac.linalg.structure import Dense, Diagonal, Structure
from hpc_kfac.linalg.symmetric import mirror_

Convolution = nn.Conv1d | nn.Conv2d | nn.Conv3d


class ConvBatch(PositionBatch):
    """x [N, C, *space] and g [K, N, O, *space of the output]; the output positions are the positions.

    The input moment takes the cheapest exact path for the structure: sums of squares over windows for a diagonal,
    pixels weighted by the number of patches that read them for a spatially uncorrelated one, offsets instead of patches
    where the convolution allows it, and patches otherwise.
    """

    def __init__(
        self, module: Convolution, shape: LayerShape, uses: Sequence[Use], count: float, reading: Reading
    ) -> None:
        self.module = module
        self.kernel, self.stride, self.dilation = module.kernel_size, module.stride, module.dilation
        super().__init__(shape, uses, count, reading)

    def part(self, x: Tensor, g: Tensor, mask: Tensor | None) -> Part:
        if x.dim() == len(self.kernel) + 1:
            x, g = x.unsqueeze(0), g.unsqueeze(1)
        positions = math.prod(g.shape[3:])
        keep = kept_positions(mask, (len(x), *g.shape[3:]), g.movedim(2, -1))
        if keep is not None:  # whole samples are dropped, so that what is faster without a mask has none
            keep = keep.reshape(len(x), -1)
            some = keep.any(1)
            x, g, keep = x[some], g[:, some], keep[some]
            keep = None if bool(keep.all()) else keep
        return Part(x, g, keep, positions)

    def inputs(self, part: Part, which: slice | Tensor) -> Tensor:
        patches = self.patches(self._padded(part.x[which]))
        return patches if part.keep is None else patches * part.keep[which].unsqueeze(-1)

    def gradients(self, part: Part, which: slice | Tensor) -> Tensor:
        g = part.g[:, which].to(self.dtype)
        g = g.reshape(*g.shape[:2], self.shape.blocks, self.shape.outputs, part.positions).permute(2, 0, 1, 4, 3)
        return g if part.keep is None else g * part.keep[which].unsqueeze(-1)

    def patches(self, padded: Tensor) -> Tensor:
        """Patches of a padded input as rows [p, n, T, a], a 1 appended where there is a bias."""
        windows = self._windows(padded)
        dims, p = len(self.kernel), self.shape.blocks
        samples, channels = padded.shape[:2]
        space = windows.shape[2 : 2 + dims]
        rows = torch.empty(p, samples, math.prod(space), self.shape.inputs, dtype=self.dtype, device=padded.device)
        split = windows.unflatten(1, (p, channels // p))
        order = [1, 0, *range(3, 3 + dims), 2, *range(3 + dims, 3 + 2 * dims)]
        weights = self.shape.inputs - self.shape.bias
        target = rows[..., :weights].view(p, samples, *space, channels // p, *self.kernel)
        target.copy_(split.permute(order))
        rows[..., weights:] = 1.0
        return rows

    def input_gram(self, part: Part, structure: Structure) -> Tensor:
        if part.keep is not None:
            return super().input_gram(part, structure)
        if isinstance(structure, Dense):
            return self._dense(part)
        if isinstance(structure, Diagonal):
            return self.with_bias(self._window_sums(part.x.to(self.dtype).square()), part)
        if isinstance(structure, SpatiallyUncorrelated):
            return self._uncorrelated(part)
        return structure.from_dense(self._dense(part))

    def output_moment(self, structure: Structure) -> Tensor:
        masked = any(part.keep is not None for part in self._parts())
        if masked or self.reduce or not isinstance(structure, Dense):
            return super().output_moment(structure)
        moments = [self._channel_moment(part.g.to(self.dtype).flatten(0, 1)) for part in self._parts()]
        return torch.stack(moments).sum(0) * (self.scale**2 / self.count)

    def input_sum(self, part: Part) -> Tensor:
        if part.keep is not None:
            return super().input_sum(part)
        return self.with_bias(self._window_sums(part.x.to(self.dtype)), part)

    def output_sum(self, part: Part) -> Tensor:
        if part.keep is not None:
            return super().output_sum(part)
        sums = part.g.sum((0, 1, *range(3, part.g.dim())), dtype=self.dtype)
        return sums.view(self.shape.blocks, self.shape.outputs)

    def _padded(self, x: Tensor) -> Tensor:
        mode = "constant" if self.module.padding_mode == "zeros" else self.module.padding_mode
        sides = [side for pair in reversed(_padding(self.module)) for side in pair]
        x = x.to(self.dtype)
        return F.pad(x, sides, mode=mode) if any(sides) else x

    def _windows(self, x: Tensor) -> Tensor:
        """A view [..., *output space, *kernel] of x [..., *space]."""
        dims = len(self.kernel)
        first = x.dim() - dims
        for dim in range(dims):
            x = x.unfold(first + dim, (self.kernel[dim] - 1) * self.dilation[dim] + 1, self.stride[dim])
        if set(self.dilation) == {1}:
            return x
        steps = tuple(slice(None, None, step) for step in self.dilation)
        return x[(slice(None),) * (x.dim() - dims) + steps]

    def _window_sums(self, x: Tensor) -> Tensor:
        """Sums over samples and output positions for each kernel position: [n, C, *space] -> [p, weights of a row]."""
        dims = len(self.kernel)
        padded = self._padded(x.sum(0, keepdim=True))[0]  # padding copies values: summed first, there is less to copy
        sums = self._windows(padded).sum(tuple(range(1, 1 + dims)))
        return sums.reshape(self.shape.blocks, -1)

    def _dense(self, part: Part) -> Tensor:
        """Sum of x x^T over samples and positions [p, a, a]."""
        if set(self.kernel) == {1}:
            x = self._padded(part.x)
            for axis, step in enumerate(self.stride, start=2):
                x = x[(slice(None),) * axis + (slice(None, None, step),)]
            moment = self._channel_moment(x)
        else:
            moment = self._kernel_moment(part)
        if not self.shape.bias:
            return moment
        moment = F.pad(moment, (0, 1, 0, 1))
        moment[:, -1, :] = moment[:, :, -1] = self.input_sum(part)
        return moment

    def _kernel_moment(self, part: Part) -> Tensor:
        """The moment of the patches without a bias, by way of the spectrum where that is cheaper."""
        p = self.shape.blocks
        padding = tuple(_padding(self.module))
        if self.module.padding_mode != "zeros":
            padding = ((0, 0),) * len(padding)
        x = part.x if self.module.padding_mode == "zeros" else self._padded(part.x)
        geometry = self.kernel, padding, self.stride, self.dilation
        shape = (x.shape[0], x.shape[1] // p, *x.shape[2:])
        # The range of float16 is too small for a spectrum.
        if self.row_dtype != torch.float16 and patch_free_is_cheaper(shape, *geometry):
            groups = x.to(self.row_dtype).chunk(p, dim=1)
            return torch.stack([patch_free_moment(group, *geometry) for group in groups]).to(self.dtype)
        total: Tensor | float = 0.0
        # Four times smaller chunks than elsewhere stay in the cache.
        for which in self._chunks(part.samples, 4 * p * part.positions * self.shape.inputs):
            total = total + self.gram(self._pixel_rows(x[which].to(self.row_dtype), padding), Dense())
        split = torch.as_tensor(total).unflatten(2, (-1, shape[1])).unflatten(1, (-1, shape[1]))
        return split.permute(0, 2, 1, 4, 3).reshape(p, self.shape.inputs - self.shape.bias, -1)

    def _pixel_rows(self, x: Tensor, padding: Sequence[tuple[int, int]]) -> Tensor:
        """Patches as rows [p, n * T, kernel positions * C]: channels last, so that whole pixels are copied."""
        dims, p = len(self.kernel), self.shape.blocks
        channels = x.shape[1] // p
        sides = [side for pair in reversed(padding) for side in pair]
        pixels = F.pad(x.movedim(1, -1), [0, 0, *sides]).contiguous()
        windows = self._windows(pixels.movedim(-1, 1)).unflatten(1, (p, channels))
        order = [1, 0, *range(3, 3 + 2 * dims), 2]
        return windows.permute(order).reshape(p, -1, math.prod(self.kernel) * channels)

    def _channel_moment(self, x: Tensor) -> Tensor:
        """Sum over samples and positions of the channels of each group times themselves [p, c, c]."""
        p, positions = self.shape.blocks, math.prod(x.shape[2:])
        if self.row_dtype == torch.bfloat16:  # the range of float16 is too small for gradients
            x = x.to(self.row_dtype)
        x = x.reshape(len(x), p, -1, positions)
        if x.shape[2] > 2 * positions:
            return self.gram(x.permute(1, 0, 3, 2).flatten(1, 2), Dense())
        # A product for each sample spares a transposed copy, as long as it is not much larger than the sample itself.
        x = x.flatten(0, 1)
        return mirror_(torch.bmm(x, x.mT).to(self.dtype).unflatten(0, (-1, p)).sum(0))

    def _uncorrelated(self, part: Part) -> Tensor:
        """Sum over positions of the channel moment, averaged over kernel positions [p, C, C]."""
        x = self._padded(part.x)
        # Each pixel counts once for every (output position, kernel position) that reads it.
        weight = torch.ones((), dtype=self.dtype, device=x.device)
        for size, kernel, stride, dilation in zip(x.shape[2:], self.kernel, self.stride, self.dilation, strict=True):
            positions = (size - (kernel - 1) * dilation - 1) // stride + 1
            reads = torch.arange(positions)[:, None] * stride + torch.arange(kernel) * dilation
            weight = weight.unsqueeze(-1) * torch.bincount(reads.flatten(), minlength=size).to(weight)
        p = self.shape.blocks
        x = (x * weight.sqrt()).reshape(x.shape[0], p, x.shape[1] // p, -1)
        rows = x.permute(1, 0, 3, 2).flatten(1, 2)
        return self.gram(rows, Dense()) / self.shape.kernel


class ConvLayer(CapturedLayer):
    families = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
    shares_by_nature = True
    module: Convolution

    @property
    def feature_dims(self) -> int:
        return 1 + len(self.module.kernel_size)

    def _shape(self) -> LayerShape:
        weight, groups = self.parameters[0], self.module.groups
        inputs = weight[0].numel() + self.has_bias
        return LayerShape(
            groups, inputs, weight.shape[0] // groups, kernel=math.prod(self.module.kernel_size), bias=self.has_bias
        )

    def batch(self, uses: Sequence[Use], count: float, reading: Reading = Reading()) -> ConvBatch:  # noqa: B008
        return ConvBatch(self.module, self.shape, uses, count, reading)


def _padding(module: Convolution) -> list[tuple[int, int]]:
    """Padding before and after each dimension."""
    if module.padding == "valid":
        return [(0, 0)] * len(module.kernel_size)
    if module.padding == "same":
        totals = [step * (size - 1) for step, size in zip(module.dilation, module.kernel_size, strict=True)]
        return [(total // 2, total - total // 2) for total in totals]
    return [(int(side), int(side)) for side in module.padding]
