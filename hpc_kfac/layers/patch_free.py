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

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

# Elements of a spectrum, 2 MiB in float32, and the least number of samples that is worth the additions of its moment.
CHUNK, SAMPLES = 1 << 19, 32
# Largest kernel that is planned: the borders of larger ones have too many lines.
POSITIONS = 49

# Measured on one AVX-512 core in float32, nanoseconds.
FLOP, COPY, CALL = 0.012, 0.7, 20_000.0
# Share of a symmetric product that is multiplied out.
HALF = 0.65

Sides = tuple[tuple[int, int], ...]
Sizes = tuple[int, ...]


@dataclass(frozen=True)
class Line:
    """One axis of a product that is fixed to a pixel of the left and the pixel of the right image `offset` further."""

    pixel: int
    offset: int

    @property
    def ends(self) -> tuple[int, int]:
        """Pixel of the left and of the right image; `pixel` is the lower one."""
        return self.pixel + max(0, -self.offset), self.pixel + max(0, self.offset)


@dataclass(frozen=True)
class Border:
    """Products of the left and right image along lines, where some axes are fixed.

    Attributes:
        fixed: the axes.
        lines: where they are fixed.
        offsets: of the other axes.
        weights: [pairs, lines * offsets] what each product adds to each pair of kernel positions.
    """

    fixed: Sizes
    lines: list[tuple[Line, ...]]
    offsets: list[Sizes]
    weights: Tensor


@dataclass(frozen=True)
class Plan:
    """What one geometry takes, for stride 1.

    Args:
        space: pixels of each dimension.
        kernel: kernel size.
        dilation: of the kernel.
        padding: zeros before and after each dimension.
    """

    space: Sizes
    kernel: Sizes
    dilation: Sizes
    padding: Sides

    @cached_property
    def circle(self) -> Sizes:
        """Length of the transform: no offset may meet the other end of the image."""
        return tuple(size + (k - 1) * d for size, k, d in zip(self.space, self.kernel, self.dilation, strict=True))

    @property
    def frequencies(self) -> int:
        """The first axis has half of them: the others are their conjugates."""
        return (self.circle[0] // 2 + 1) * math.prod(self.circle[1:])

    @cached_property
    def pairs(self) -> list[tuple[Sizes, Sizes]]:
        """Kernel positions p <= q."""
        return list(itertools.combinations_with_replacement(itertools.product(*map(range, self.kernel)), 2))

    @cached_property
    def borders(self) -> list[Border]:
        """What has to be taken off at the borders, by the axes that are fixed."""
        found: dict[Sizes, list[tuple[tuple[Line, ...], Sizes, int]]] = {}
        for number, (p, q) in enumerate(self.pairs):
            missing = [self._missing(axis, p[axis], q[axis]) for axis in range(len(p))]
            offsets = [(b - a) * d for a, b, d in zip(p, q, self.dilation, strict=True)]
            for choice in itertools.product(*([None, *lines] for lines in missing)):
                fixed = tuple(axis for axis, line in enumerate(choice) if line is not None)
                if fixed:
                    lines = tuple(line for line in choice if line is not None)
                    rest = tuple(offset for axis, offset in enumerate(offsets) if axis not in fixed)
                    found.setdefault(fixed, []).append((lines, rest, number))
        return [self._border(fixed, terms) for fixed, terms in found.items()]

    def _border(self, fixed: Sizes, terms: list[tuple[tuple[Line, ...], Sizes, int]]) -> Border:
        rows = {line: i for i, line in enumerate(dict.fromkeys(lines for lines, _, _ in terms))}
        columns = {rest: i for i, rest in enumerate(dict.fromkeys(rest for _, rest, _ in terms))}
        weights = torch.zeros(len(self.pairs), len(rows) * len(columns), dtype=torch.float64)
        for lines, rest, number in terms:
            weights[number, rows[lines] * len(columns) + columns[rest]] = (-1.0) ** len(fixed)
        return Border(fixed, list(rows), list(columns), weights)

    def _missing(self, axis: int, p: int, q: int) -> list[Line]:
        """Pairs of pixels along an axis that lie in the image but belong to no output position."""
        size, kernel, dilation = self.space[axis], self.kernel[axis], self.dilation[axis]
        before, after = self.padding[axis]
        offset = (q - p) * dilation
        count = max(0, size - abs(offset))
        low = min(max(0, dilation * min(p, q) - before), count)
        high = min(max(0, dilation * (kernel - 1 - max(p, q)) - after), count - low)
        return [Line(pixel, offset) for pixel in (*range(low), *range(count - high, count))]

    @cached_property
    def offsets(self) -> dict[Sizes, int]:
        """The different q - p of all pairs."""
        steps = (tuple(b - a for a, b in zip(p, q, strict=True)) for p, q in self.pairs)
        return {step: i for i, step in enumerate(dict.fromkeys(steps))}

    @cached_property
    def spectral(self) -> tuple[Tensor, Tensor]:
        """[offsets, frequencies] what the even and the odd part of each frequency add at each offset."""
        axes = [torch.arange(length, dtype=torch.float64) / length for length in self.circle]
        axes[0] = axes[0][: self.circle[0] // 2 + 1]
        turns = torch.cartesian_prod(*axes).view(-1, len(axes))
        offsets = torch.tensor(list(self.offsets), dtype=torch.float64) * torch.tensor(self.dilation)
        angle = 2 * math.pi * (turns @ offsets.T)
        # Frequencies beyond half the circle are the conjugates of those before it.
        first = turns[:, :1]
        weight = (2.0 - ((first == 0) | (first == 0.5)).double()) / math.prod(self.circle)
        return (angle.cos() * weight).T.contiguous(), (angle.sin() * weight).T.contiguous()

    @cached_property
    def pair_offsets(self) -> Tensor:
        """[pairs] which offset each pair has."""
        steps = [tuple(b - a for a, b in zip(p, q, strict=True)) for p, q in self.pairs]
        return torch.tensor([self.offsets[step] for step in steps])

    @cached_property
    def transforms(self) -> list[Tensor]:
        """A Fourier matrix for each axis: the first [frequencies * 2, pixels], the others [.. * 2, 2 * pixels].

        Real and imaginary part alternate in what comes out and stand one after the other in what goes in, which is the
        order that the product with the axis before leaves.
        """
        matrices = []
        for axis, (size, length) in enumerate(zip(self.space, self.circle, strict=True)):
            count = length if axis else length // 2 + 1
            angle = 2 * math.pi * torch.outer(torch.arange(count).double(), torch.arange(size).double()) / length
            real, imaginary = angle.cos(), -angle.sin()
            parts = torch.stack((real, imaginary), dim=1)
            if axis:
                parts = torch.cat((parts, torch.stack((-imaginary, real), dim=1)), dim=2)
            matrices.append(parts.flatten(0, 1))
        return matrices

    @cached_property
    def places(self) -> Tensor:
        """[kernel, kernel] the pair of each (p, q); those with p > q come after all pairs, transposed."""
        number = {pair: i for i, pair in enumerate(self.pairs)}
        positions = list(itertools.product(*map(range, self.kernel)))
        count = len(self.pairs)
        return torch.tensor([[number[p, q] if p <= q else count + number[q, p] for q in positions] for p in positions])

    def cost(self, samples: int, channels: int) -> float:
        """Nanoseconds on the measured core."""
        square = 2.0 * channels**2 * FLOP
        transform, left, right = math.prod(self.space) * COPY, 1, math.prod(self.space)
        for size, matrix in zip(self.space, self.transforms, strict=True):
            right //= size
            transform += 2.0 * left * matrix.numel() * right * FLOP
            left *= matrix.shape[0] // 2
        transform *= samples * channels
        products = 3.0 * samples * self.frequencies
        calls = 10
        for border in self.borders:
            rest = math.prod(size for axis, size in enumerate(self.space) if axis not in border.fixed)
            products += samples * len(border.lines) * len(border.offsets) * rest + border.weights.numel()
            calls += 5 + 2 * len(border.lines)
        products += 2.0 * self.frequencies * len(self.offsets)
        moment = (channels * math.prod(self.kernel)) ** 2 * 2 * COPY
        return transform + products * square + moment + calls * CALL


@lru_cache(maxsize=256)
def plan(space: Sizes, kernel: Sizes, dilation: Sizes, padding: Sides) -> Plan:
    """The plan of a geometry, made once."""
    return Plan(space, kernel, dilation, padding)


@lru_cache(maxsize=256)
def _tables(
    one: Plan, dtype: torch.dtype, device: torch.device
) -> tuple[list[Tensor], list[Tensor], list[Tensor], Tensor, Tensor]:
    """Fourier matrices, weights of the spectrum and of the borders, offsets and places of the pairs, where needed."""
    transforms = [matrix.to(device, dtype) for matrix in one.transforms]
    dtype = torch.promote_types(dtype, torch.float32)
    spectral = [table.to(device, dtype) for table in one.spectral]
    borders = [border.weights.to(device, dtype) for border in one.borders]
    return transforms, spectral, borders, one.pair_offsets.to(device), one.places.to(device)


def patch_free_moment(
    x: Tensor, kernel: Sequence[int], padding: Sides, stride: Sequence[int], dilation: Sequence[int]
) -> Tensor:
    """Sum over samples and output positions of patch patch^T, for one group and zero padding.

    Args:
        x: input [N, C, *space], float32 or float64; bfloat16 is transformed and multiplied as it is, with sums of every
            ``SAMPLES`` samples rounded to bfloat16 once.
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
    transforms, spectral, borders, pair_offsets, places = _tables(one_plan, x.dtype, x.device)
    even, odd = _spectrum_moments(x, one_plan, transforms)
    # One row of C x C for each offset, then for each pair of kernel positions.
    rows = torch.mm(spectral[0], even.flatten(1)).addmm_(spectral[1], (odd - odd.mT).flatten(1))[pair_offsets]
    for border, weights in zip(one_plan.borders, borders, strict=True):
        rows.addmm_(weights, _border_products(x, border).flatten(1))
    rows = torch.cat((rows, rows.view(-1, channels, channels).mT.flatten(1)))[places.flatten()]
    moment = rows.T.contiguous().view(channels, channels, positions, positions)
    return moment.transpose(1, 2).reshape(channels * positions, -1)


def _spectrum_moments(x: Tensor, one: Plan, transforms: list[Tensor]) -> tuple[Tensor, Tensor]:
    """For each frequency sum over samples of re re^T + im im^T and of im re^T, [frequencies, C, C] each."""
    channels, frequencies = x.shape[1], one.frequencies
    half = x.dtype == torch.bfloat16
    even = x.new_zeros(frequencies, channels, channels, dtype=torch.promote_types(x.dtype, torch.float32))
    odd = torch.zeros_like(even)
    for piece in x.split(SAMPLES if half else max(SAMPLES, CHUNK // (2 * frequencies * channels))):
        samples = len(piece)
        # Pixels first: every product takes one axis and leaves [frequencies so far, 2, the axes behind it, rows].
        rows = piece.reshape(samples * channels, -1).T.contiguous()
        rows = torch.mm(transforms[0], rows.view(one.space[0], -1))
        for axis in range(1, len(one.space)):
            before = math.prod(one.circle[1:axis]) * (one.circle[0] // 2 + 1)
            rows = torch.matmul(transforms[axis], rows.view(before, 2 * one.space[axis], -1))
        rows = rows.view(frequencies, 2 * samples, channels)
        if half:
            even += torch.bmm(rows.mT, rows)
            odd += torch.bmm(rows[:, samples:].mT, rows[:, :samples])
        else:
            even.baddbmm_(rows.mT, rows)
            odd.baddbmm_(rows[:, samples:].mT, rows[:, :samples])
    return even, odd


def _border_products(x: Tensor, border: Border) -> Tensor:
    """Sum over samples and pixels of left right^T for every line and every offset of the other axes [., C, C]."""
    x = x.movedim(1, -1)
    ends: list[list[Tensor]] = [[], []]
    for lines in border.lines:
        for side in (0, 1):
            end = x
            # From the last axis on, so that the others keep their number.
            for axis, line in reversed(list(zip(border.fixed, lines, strict=True))):
                end = end.select(1 + axis, line.ends[side])
            ends[side].append(end)
    dtype = torch.promote_types(x.dtype, torch.float32)
    left = torch.stack(ends[0]).to(dtype)
    # A line is most often multiplied with itself.
    same = all(line.offset == 0 for lines in border.lines for line in lines)
    right = left if same else torch.stack(ends[1]).to(dtype)
    count, channels, space = left.shape[0], left.shape[-1], left.shape[2:-1]
    if space:
        room = [max(abs(offset[axis]) for offset in border.offsets) for axis in range(len(space))]
        right = F.pad(right, [0, 0, *(side for size in reversed(room) for side in (size, size))])
        shifted = []
        for offset in border.offsets:
            end = right
            for axis, (step, margin, size) in enumerate(zip(offset, room, space, strict=True)):
                end = end.narrow(2 + axis, margin + step, size)
            shifted.append(end)
        right = torch.stack(shifted, dim=-2)
    left = left.flatten(1, -2)
    product = torch.bmm(left.mT, right.reshape(count, left.shape[1], -1))
    return product.view(count, channels, -1, channels).transpose(1, 2).reshape(-1, channels, channels)


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


def phase_shape(
    shape: Sequence[int], kernel: Sequence[int], padding: Sides, stride: Sequence[int], dilation: Sequence[int]
) -> tuple[Sizes, Sizes]:
    """Shape of the phases [N, C * phases, *space] of an input [N, C, *space], and the kernel size over them."""
    moved, space = [], []
    for size, k, (before, after), s, d in zip(shape[2:], kernel, padding, stride, dilation, strict=True):
        reach = d * (k - 1)
        moved.append(reach // s + 1)
        space.append((size + before + after - reach - 1) // s + moved[-1])
    return (shape[0], shape[1] * math.prod(stride), *space), tuple(moved)


def patch_free_is_cheaper(
    shape: Sequence[int], kernel: Sequence[int], padding: Sides, stride: Sequence[int], dilation: Sequence[int]
) -> bool:
    """Whether counted work, in measured nanoseconds, speaks for the spectrum; not so for few channels or samples."""
    width = shape[1] * math.prod(kernel)
    rows = shape[0]
    for size, k, (before, after), s, d in zip(shape[2:], kernel, padding, stride, dilation, strict=True):
        rows *= (size + before + after - d * (k - 1) - 1) // s + 1
    patches = rows * width * (COPY + 2 * HALF * width * FLOP) + 5 * CALL
    if set(stride) != {1}:
        shape, kernel = phase_shape(shape, kernel, padding, stride, dilation)
        padding, dilation = ((0, 0),) * len(kernel), (1,) * len(kernel)
    if math.prod(kernel) > POSITIONS:
        return False
    cost = plan(tuple(shape[2:]), tuple(kernel), tuple(dilation), padding).cost(shape[0], shape[1])
    return cost + (width**2 * COPY if set(stride) != {1} else 0.0) < patches
