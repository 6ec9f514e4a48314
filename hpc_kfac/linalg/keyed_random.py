"""Random numbers that depend on keys and sample numbers only: not on rank, rank count, device or call order.

A counter-based generator: each number is a hash of (keys, sample, position). The hash is the finaliser of SplitMix64
(Steele, Lea & Flood 2014, with the constants of Stafford's "Mix13"); positions of a sample are the successive outputs
of a SplitMix64 generator that the keys and the sample seed.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

_MASK = (1 << 64) - 1
_GAMMA = 0x9E3779B97F4A7C15
_MIX1 = 0xBF58476D1CE4E5B9
_MIX2 = 0x94D049BB133111EB


def _signed(value: int) -> int:
    """The int64 with these 64 bits."""
    value &= _MASK
    return value - (1 << 64) if value >> 63 else value


def _mix_integer(z: int) -> int:
    z = ((z ^ (z >> 30)) * _MIX1) & _MASK
    z = ((z ^ (z >> 27)) * _MIX2) & _MASK
    return z ^ (z >> 31)


def _mix_(z: Tensor) -> Tensor:
    """The same in place on int64 tensors: products wrap around; the mask makes the right shifts logical."""

    def shifted(bits: int) -> Tensor:
        return (z >> bits).bitwise_and_((1 << (64 - bits)) - 1)

    z.bitwise_xor_(shifted(30)).mul_(_signed(_MIX1))
    z.bitwise_xor_(shifted(27)).mul_(_signed(_MIX2))
    return z.bitwise_xor_(shifted(31))


def uniform(shape: tuple[int, ...], sample_index: Tensor, *keys: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Uniform numbers in [0, 1), the same for the same keys and sample whatever the rank or device.

    Args:
        shape: shape of one sample's numbers; ``()`` for one number.
        sample_index: int64 ``[n]``, global sample numbers.
        *keys: any integers, such as seed, step and the number of a layer; their order matters.
        dtype: float32 (24 random bits) or float64 (53).

    Returns:
        ``[n, *shape]`` on the device of `sample_index`.

    Raises:
        ValueError: another dtype.
        TypeError: `sample_index` is not a vector of int64.
    """
    bits = {torch.float32: 24, torch.float64: 53}.get(dtype)
    if bits is None:
        raise ValueError(f"dtype = {dtype}: uniform gives float32 or float64")
    if sample_index.dtype != torch.int64 or sample_index.ndim != 1:
        raise TypeError(
            f"sample_index is {sample_index.dtype} of shape {tuple(sample_index.shape)}; it must be an int64 vector"
        )
    seed = 0
    for key in keys:
        seed = _mix_integer((seed + key + 1) * _GAMMA & _MASK)
    streams = _mix_((sample_index + 1).mul_(_signed(_GAMMA)).add_(_signed(seed)))
    positions = torch.arange(1, math.prod(shape) + 1, device=sample_index.device).mul_(_signed(_GAMMA))
    top = (_mix_(streams[:, None] + positions) >> (64 - bits)).bitwise_and_((1 << bits) - 1)
    return top.to(dtype).mul_(2.0**-bits).view(len(sample_index), *shape)
