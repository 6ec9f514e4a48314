"""The patch second moment of a stride-1 convolution without patches.

Apart from borders, the moment of kernel positions p and q depends on the offset q - p alone, so that (2k-1)^2 blocks of
C x C stand for k^4 of them; half of the offsets follow from the others by symmetry. All blocks at once are the weight
gradient of a convolution whose output gradient is x and whose input is x too. What the borders add is taken off by the
same call on single rows and columns.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

# Measured on one AVX-512 core: one more call costs as much as this many pixels.
CALL = 800


def patch_free_moment(x: Tensor, kernel: Sequence[int], padding: Sequence[int]) -> Tensor:
    """Sum over samples and output positions of patch patch^T, for stride 1, dilation 1, one group and zero padding.

    Args:
        x: input [N, C, W] or [N, C, H, W].
        kernel: kernel size for each dimension.
        padding: zeros on both sides of each dimension.

    Returns:
        [C * k, C * k] in torch's order [C, *kernel].
    """
    if x.dim() == 3:
        x, kernel, padding = x.unsqueeze(2), (1, *kernel), (0, *padding)
    ky, kx = kernel
    channels, height, width = x.shape[1:]
    device = x.device
    x = x.contiguous(memory_format=torch.channels_last)
    # Room for the offsets 0 .. ky-1 downwards and -(kx-1) .. kx-1 sideways.
    room = F.pad(x, (kx - 1, kx - 1, 0, ky - 1))

    def products(rows: slice, columns: slice) -> Tensor:
        """[C, C, ky, 2kx-1]: sum of x[i, u] x[j, u + offset] over the pixels u of a region."""
        left = x[:, :, rows, columns]
        right = room[:, :, rows.start : rows.stop + ky - 1, columns.start : columns.stop + 2 * kx - 2]
        weight = x.new_empty(channels, channels, ky, 2 * kx - 1)
        _, moment, _ = torch.ops.aten.convolution_backward(
            left, right, weight, None, [1, 1], [0, 0], [1, 1], False, [0, 0], 1, [False, True, False]
        )
        return moment

    # All pairs (p, q) of kernel positions with q not above p, and the offset of each.
    positions = torch.cartesian_prod(torch.arange(ky), torch.arange(kx)).view(-1, 2)
    first, second = torch.cartesian_prod(torch.arange(ky * kx), torch.arange(ky * kx)).view(-1, 2).unbind(1)
    keep = positions[second, 0] >= positions[first, 0]
    first, second = first[keep], second[keep]
    down, side = (positions[second] - positions[first]).unbind(1)
    side = side + kx - 1

    blocks = products(slice(0, height), slice(0, width))[:, :, down, side]
    rows, no_row = _border(height, ky, padding[0])
    columns, no_column = _border(width, kx, padding[1])
    no_row, no_column = no_row[positions[first, 0]], no_column[positions[first, 1]]

    def correct(pairs: Tensor, region: Tensor, sign: int) -> None:
        index = pairs.nonzero().squeeze(1)
        blocks[:, :, index] += sign * region[:, :, down[index], side[index]]

    for r, row in enumerate(rows):
        correct(no_row[:, r], products(slice(row, row + 1), slice(0, width)), -1)
    for c, column in enumerate(columns):
        correct(no_column[:, c], products(slice(0, height), slice(column, column + 1)), -1)
        for r, row in enumerate(rows):
            pairs = no_row[:, r] & no_column[:, c]
            correct(pairs, products(slice(row, row + 1), slice(column, column + 1)), 1)

    moment = x.new_empty(ky * kx, ky * kx, channels, channels)
    first, second = first.to(device), second.to(device)
    moment[second, first] = blocks.permute(2, 1, 0)
    moment[first, second] = blocks.permute(2, 0, 1)
    return moment.permute(2, 0, 3, 1).reshape(channels * ky * kx, -1)


def patch_free_is_cheaper(shape: Sequence[int], kernel: Sequence[int], padding: Sequence[int]) -> bool:
    """Whether counted work speaks for the offsets: not for few samples or small images, where the borders dominate.

    Work is counted in channels^2 multiplications; ``CALL`` is what each call adds for its C x C results.
    """
    samples, space = shape[0], shape[2:]
    offsets = kernel[0] if len(kernel) > 1 else 1
    offsets *= 2 * kernel[-1] - 1
    pixels, calls, positions = 1, 1, 1
    for size, width, pad in zip(space, kernel, padding, strict=True):
        border = len(_border(size, width, pad)[0])
        pixels, calls = pixels * (size + border), calls * (1 + border)
        positions *= size + 2 * pad - width + 1
    return offsets * (samples * pixels + CALL * calls) < samples * positions * math.prod(kernel) ** 2


def _border(size: int, kernel: int, padding: int) -> tuple[list[int], Tensor]:
    """Input coordinates that some kernel position never meets, and which position that is [kernel, coordinates]."""
    coordinate = torch.arange(size)
    position = torch.arange(kernel)[:, None]
    missed = (coordinate < position - padding) | (coordinate > position + size + padding - kernel)
    border = missed.any(0).nonzero().squeeze(1)
    return border.tolist(), missed[:, border]
