"""Augmentation of image batches, by draws that depend on seed, epoch and sample number only."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from hpc_kfac.linalg.keyed_random import uniform


@dataclass(frozen=True)
class CropAndFlip:
    """A random crop of the image padded with zeros, and a mirror image every second time (He et al. 2016, section 4.2).

    Zero is the mean colour of scaled images.

    Args:
        padding: pixels added on each side before the crop.
    """

    padding: int = 4

    def __call__(self, inputs: Tensor, indices: Tensor, seed: int, epoch: int) -> Tensor:
        """Changes ``[n, channels, height, width]`` and leaves the channels last in memory.

        Args:
            inputs: images.
            indices: the samples' numbers, int64 ``[n]``.
            seed: of the run.
            epoch: from 0.
        """
        height, width = inputs.shape[-2:]
        draws = uniform((3,), indices, seed, epoch)
        top, left = (draws[:, :2] * (2 * self.padding + 1)).long().unbind(1)
        rows = top[:, None] + torch.arange(height)
        columns = torch.arange(width).expand(len(inputs), width)
        columns = left[:, None] + torch.where(draws[:, 2:] < 0.5, columns, columns.flip(1))
        padded = functional.pad(inputs, (self.padding,) * 4).permute(0, 2, 3, 1)
        sample = torch.arange(len(inputs))[:, None, None]
        return padded[sample, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)
