"""What the moment of a convolution takes without patches: sizes, tables, and counted cost, from shapes alone."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

import torch
from torch import Tensor

# Largest kernel that is planned: the borders of larger ones have too many lines.
POSITIONS = 49

# Measured on one AVX-512 core in float32, nanoseconds.
FLOP, COPY, CALL = 0.012, 0.7, 20_000.0
# Share of a symmetric product that is multiplied out.
HALF = 0.65

Sides = tuple[tuple[int, int], ...]
Sizes = tuple[int, ...]


# An axis that is fixed: to a pixel, the lower one of two, and the other `offset` further in the right image.
Line = tuple[int, int]


@dataclass(frozen=True)
class Border:
    """Products of the left and the right image along lines, where some axes are fixed.

    Attributes:
        left: [lines, pixels of a line] which pixels of the ring.
        right: [lines, offsets of the other axes, pixels of a line] which pixels they meet, -1 outside the image.
        weights: [pairs, lines * offsets] what each product adds to each pair of kernel positions.
    """

    left: Tensor
    right: Tensor
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
        left = [self._pixels(fixed, [p + max(0, -o) for p, o in lines], None) for lines in rows]
        right = [[self._pixels(fixed, [p + max(0, o) for p, o in lines], rest) for rest in columns] for lines in rows]
        return Border(torch.tensor(left), torch.tensor(right), weights)

    def _pixels(self, fixed: Sizes, at: list[int], offset: Sizes | None) -> list[int]:
        """Pixels of a line, moved by an offset along its own axes; -1 outside the image."""
        steps, pixels = iter(at), [0]
        moves = iter(offset or (0,) * (len(self.space) - len(fixed)))
        for axis, size in enumerate(self.space):
            if axis in fixed:
                places = [next(steps)]
            else:
                move = next(moves)
                places = [place if 0 <= place < size else -1 for place in range(move, size + move)]
            pixels = [-1 if min(pixel, place) < 0 else pixel * size + place for pixel in pixels for place in places]
        return pixels

    def _missing(self, axis: int, p: int, q: int) -> list[Line]:
        """Pairs of pixels along an axis that lie in the image but belong to no output position."""
        size, kernel, dilation = self.space[axis], self.kernel[axis], self.dilation[axis]
        before, after = self.padding[axis]
        offset = (q - p) * dilation
        count = max(0, size - abs(offset))
        low = min(max(0, dilation * min(p, q) - before), count)
        high = min(max(0, dilation * (kernel - 1 - max(p, q)) - after), count - low)
        return [(pixel, offset) for pixel in (*range(low), *range(count - high, count))]

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
            products += samples * border.right.numel() + border.weights.numel()
            calls += 4
        products += 2.0 * self.frequencies * len(self.offsets)
        moment = (channels * math.prod(self.kernel)) ** 2 * 2 * COPY
        return transform + products * square + moment + calls * CALL


@lru_cache(maxsize=256)
def plan(space: Sizes, kernel: Sizes, dilation: Sizes, padding: Sides) -> Plan:
    """The plan of a geometry, made once."""
    return Plan(space, kernel, dilation, padding)


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
