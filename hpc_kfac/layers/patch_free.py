"""The patch second moment of a convolution without patches, through the spectrum of its input.

Apart from borders, the moment of kernel positions p and q depends on the offset q - p alone: it is the autocorrelation
of the input at that offset. The discrete Fourier transform, a matrix product for each axis, turns all offsets at once
into one C x C product for each frequency, several times fewer multiplications than patches or offsets take. Pairs of
pixels that both lie in the image, while the output position that would pair them does not, are taken off again by
products of single lines and points.

The moment is linear in all of these products, so that one cached matrix turns them into the moment. A stride splits the
image into phases: the moment is then part of that of a convolution with stride 1 over the phases as channels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from hpc_kfac.layers.patch_free_plan import Plan, Sides, Sizes, phase_shape, plan
from hpc_kfac.linalg.symmetric import mirror_

# Bytes of a spectrum, and the least number of samples that is worth the additions of its moment.
CHUNK, SAMPLES = 1 << 21, 32
# Most channels for which one product of real and imaginary parts together costs less than two of what is needed.
JOINT = {torch.bfloat16: 64}


@dataclass(frozen=True)
class Tables:
    """A plan's tensors where they are used.

    Attributes:
        transforms: as `Plan.transforms`, in the dtype of the input.
        even: as `Plan.spectral`, in at least float32, as are all weights.
        odd: likewise.
        ring: pixels that meet a border.
        borders: left and right pixels, as places in the ring, and weights.
        offsets: as `Plan.pair_offsets`.
        places: as `Plan.places`, flat.
    """

    transforms: list[Tensor]
    even: Tensor
    odd: Tensor
    ring: Tensor
    borders: list[tuple[Tensor, Tensor, Tensor]]
    offsets: Tensor
    places: Tensor


@lru_cache(maxsize=256)
def _tables(one: Plan, dtype: torch.dtype, device: torch.device) -> Tables:
    exact = torch.promote_types(dtype, torch.float32)
    even, odd = (table.to(device, exact) for table in one.spectral)
    ids = [ids.flatten() for border in one.borders for ids in (border.left, border.right)]
    ring = torch.cat([torch.zeros(0, dtype=torch.long), *ids]).unique()
    ring = ring[ring >= 0]
    # What lies outside the image is the last place of the ring, which holds zeros.
    place = torch.full((math.prod(one.space) + 1,), len(ring))
    place[ring] = torch.arange(len(ring))
    borders = [
        (place[border.left].to(device), place[border.right].to(device), border.weights.to(device, exact))
        for border in one.borders
    ]
    transforms = [matrix.to(device, dtype) for matrix in one.transforms]
    offsets, places = one.pair_offsets.to(device), one.places.flatten().to(device)
    return Tables(transforms, even, odd, ring.to(device), borders, offsets, places)


def patch_free_moment(
    x: Tensor, kernel: Sequence[int], padding: Sides, stride: Sequence[int], dilation: Sequence[int]
) -> Tensor:
    """Sum over samples and output positions of patch patch^T, for one group and zero padding.

    Args:
        x: input [N, C, *space], float32 or float64; bfloat16 is transformed and multiplied as it is, with the sums of
            every ``SAMPLES`` samples or more rounded to bfloat16 once.
        kernel: kernel size for each dimension.
        padding: zeros before and after each dimension.
        stride: for each dimension.
        dilation: for each dimension.

    Returns:
        [C * k, C * k] in torch's order [C, *kernel], in at least float32.
    """
    if set(stride) != {1}:
        x, kernel, index = _phases(x, kernel, padding, stride, dilation)
        one = (1,) * len(kernel)
        moment = patch_free_moment(x, kernel, ((0, 0),) * len(kernel), one, one)
        index = index.to(x.device)
        return moment[index[:, None], index]
    one_plan = plan(tuple(x.shape[2:]), tuple(kernel), tuple(dilation), padding)
    channels, positions = x.shape[1], math.prod(kernel)
    tables = _tables(one_plan, x.dtype, x.device)
    even, odd, ring = _spectrum_moments(x, one_plan, tables)
    # One row of C x C for each offset, then for each pair of kernel positions.
    rows = torch.mm(tables.even, even.flatten(1)).addmm_(tables.odd, (odd - odd.mT).flatten(1))[tables.offsets]
    for left, right, weights in tables.borders:
        rows.addmm_(weights, _border_products(ring, left, right).flatten(1))
    rows = torch.cat((rows, rows.view(-1, channels, channels).mT.flatten(1)))[tables.places]
    moment = rows.T.contiguous().view(channels, channels, positions, positions)
    mirror_(moment.diagonal(dim1=2, dim2=3).movedim(-1, 0))
    return moment.transpose(1, 2).reshape(channels * positions, -1)


def _spectrum_moments(x: Tensor, one: Plan, tables: Tables) -> tuple[Tensor, Tensor, Tensor]:
    """For each frequency sum over samples of re re^T + im im^T and of im re^T, [frequencies, C, C] each.

    Also the pixels of the ring and one of zeros, [pixels + 1, C, N].
    """
    channels, frequencies, transforms = x.shape[1], one.frequencies, tables.transforms
    exact = torch.promote_types(x.dtype, torch.float32)
    ring = x.new_zeros(len(tables.ring) + 1, channels, len(x))
    joint = channels <= JOINT.get(x.dtype, 0)
    even, odd = x.new_zeros(2, frequencies, channels, channels, dtype=exact)
    products: Tensor | None = None
    start = 0
    for piece in x.chunk(-(-len(x) // max(SAMPLES, CHUNK // (2 * frequencies * channels * x.itemsize)))):
        samples = len(piece)
        # Pixels first: every product takes one axis and leaves [frequencies so far, 2, the axes behind it, rows]. Rows
        # are channels, then samples, where real and imaginary parts are multiplied together.
        if joint:  # two transpositions of two axes are faster than one of three
            rows = piece.reshape(samples, -1).T.contiguous().view(channels, -1, samples).transpose(0, 1).contiguous()
            pixels = rows.index_select(0, tables.ring)
        else:
            rows = piece.reshape(samples * channels, -1).T.contiguous()
            pixels = rows.index_select(0, tables.ring).view(-1, samples, channels).mT
        ring[:-1, :, start : start + samples] = pixels
        start += samples
        rows = torch.mm(transforms[0], rows.view(one.space[0], -1))
        for axis in range(1, len(one.space)):
            before = math.prod(one.circle[1:axis]) * (one.circle[0] // 2 + 1)
            rows = torch.matmul(transforms[axis], rows.view(before, 2 * one.space[axis], -1))
        if joint:
            rows = rows.view(frequencies, 2 * channels, samples)
            product = torch.bmm(rows, rows.mT).to(exact)
            products = product if products is None else products.add_(product)
        elif x.dtype == torch.bfloat16:
            rows = rows.view(frequencies, 2 * samples, channels)
            even += torch.bmm(rows.mT, rows)
            odd += torch.bmm(rows[:, samples:].mT, rows[:, :samples])
        else:
            rows = rows.view(frequencies, 2 * samples, channels)
            even.baddbmm_(rows.mT, rows)
            odd.baddbmm_(rows[:, samples:].mT, rows[:, :samples])
    if products is not None:
        even = products[:, :channels, :channels] + products[:, channels:, channels:]
        odd = products[:, channels:, :channels]
    return even, odd, ring


def _border_products(ring: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """Sum over samples and pixels of left right^T for every line and every offset of the other axes [., C, C]."""
    (lines, offsets, _), (channels, samples) = right.shape, ring.shape[1:]
    one = ring.index_select(0, left.flatten()).view(lines, -1, channels, samples).transpose(1, 2)
    other = ring.index_select(0, right.flatten()).view(lines, offsets, -1, channels, samples).transpose(2, 3)
    products = torch.bmm(one.flatten(2), other.flatten(3).flatten(1, 2).mT)
    products = products.to(torch.promote_types(ring.dtype, torch.float32))
    return products.view(lines, channels, offsets, channels).transpose(1, 2).flatten(0, 1)


def _phases(
    x: Tensor, kernel: Sequence[int], padding: Sides, stride: Sequence[int], dilation: Sequence[int]
) -> tuple[Tensor, Sizes, Tensor]:
    """A strided convolution as part of one with stride 1 and no padding.

    Returns:
        The phases of the padded input as channels [N, C * phases, *space], the kernel size over them, and where in its
        patches those of the strided convolution are [C * k].
    """
    shape, moved = phase_shape(x.shape, kernel, padding, stride, dilation)
    sides = []
    for size, length, step, (before, _) in zip(x.shape[2:], shape[2:], stride, padding, strict=True):
        sides.append((before, length * step - size - before))
    x = F.pad(x, [side for pair in reversed(sides) for side in pair])
    x = x.reshape(*x.shape[:2], *(part for pair in zip(shape[2:], stride, strict=True) for part in pair))
    dims = len(kernel)
    x = x.permute(0, 1, *range(3, 3 + 2 * dims, 2), *range(2, 2 + 2 * dims, 2)).reshape(shape)
    # Each kernel position is a phase and a position among that phase's pixels.
    place = torch.arange(x.shape[1] // math.prod(stride)).view(-1, *[1] * dims)
    phase, shift = torch.zeros(1, dtype=torch.long), torch.zeros(1, dtype=torch.long)
    for axis in range(dims):
        reach = (torch.arange(kernel[axis]) * dilation[axis]).view(*[-1 if axis == i else 1 for i in range(dims)])
        phase = phase * stride[axis] + reach % stride[axis]
        shift = shift * moved[axis] + reach // stride[axis]
    index = (place * math.prod(stride) + phase) * math.prod(moved) + shift
    return x, moved, index.flatten()
