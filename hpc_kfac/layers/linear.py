"""Linear layers with any leading dimensions: [N, a], [N, T, a], ..."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from hpc_kfac.layers.batch import LayerShape, Reading, Use, kept_positions
from hpc_kfac.layers.layer import CapturedLayer
from hpc_kfac.layers.positions import Part, PositionBatch


class LinearBatch(PositionBatch):
    """x [N, T, a] and g [K, N, T, o]; the first leading dimension is the sample, the others are positions."""

    def part(self, x: Tensor, g: Tensor, mask: Tensor | None) -> Part:
        keep = kept_positions(mask, x.shape[:-1], g)
        if x.dim() == 1:
            x, g = x.unsqueeze(0), g.unsqueeze(1)
        samples = x.shape[0]
        x = x.reshape(samples, -1, x.shape[-1]) if x.numel() else x.reshape(samples, 0, x.shape[-1])
        g = g.reshape(g.shape[0], samples, x.shape[1], g.shape[-1])
        return Part(x, g, None if keep is None else keep.reshape(samples, -1), x.shape[1])

    def inputs(self, part: Part, which: slice | Tensor) -> Tensor:
        x = part.x[which].to(self.dtype)
        if self.shape.bias:
            x = nn.functional.pad(x, (0, 1), value=1.0)
        return _masked(x, part, which).unsqueeze(0)

    def input_sum(self, part: Part) -> Tensor:
        sums = _masked(part.x, part, slice(None)).sum((0, 1), dtype=self.dtype)
        return self.with_bias(sums.unsqueeze(0), part)

    def gradients(self, part: Part, which: slice | Tensor) -> Tensor:
        return _masked(part.g[:, which].to(self.dtype), part, which).unsqueeze(0)


def _masked(rows: Tensor, part: Part, which: slice | Tensor) -> Tensor:
    """Rows [..., n, T, d] of some samples, zeros at the positions that do not count."""
    return rows if part.keep is None else rows * part.keep[which].unsqueeze(-1)


class LinearLayer(CapturedLayer):
    families = (nn.Linear,)

    def _shape(self) -> LayerShape:
        outputs, inputs = self.parameters[0].shape
        return LayerShape(1, inputs + self.has_bias, outputs, bias=self.has_bias)

    def batch(self, uses: Sequence[Use], count: float, reading: Reading = Reading()) -> LinearBatch:  # noqa: B008
        return LinearBatch(self.shape, uses, count, reading)
