"""How long the preconditioned step may be.

Without a bound a block-diagonal step is too long by about the number of layers (Bernacchia et al. 2018).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from hpc_kfac.damping import positive
from hpc_kfac.linalg.orthogonal import orthogonal


@dataclass(frozen=True)
class KLClip:
    """One scale for all layers that bounds the KL divergence of the step to about `kappa`.

    scale = min(1, sqrt(kappa / sum over layers of lr^2 <U, D>)), U the preconditioned and D the raw gradient
    (Ba et al. 2017; Wu et al. 2017). It needs the learning rate, so the preconditioner must know the optimizer. As long
    as it binds, the learning rate has no effect on the length of the step: see `TrustRegion`.

    Args:
        kappa: the bound.
    """

    kappa: float = 1e-3
    needs_learning_rate: ClassVar[bool] = True

    def __post_init__(self) -> None:
        positive("kl_clip", self.kappa)

    def weight(self, learning_rate: float) -> float:
        """The weight of a layer's <U, D> in the sum."""
        return learning_rate**2 if self.needs_learning_rate else 1.0

    def scale(self, quadratic: float) -> float:
        """The factor for all updates, from the weighted sum over layers of <U, D>."""
        return 1.0 if quadratic <= self.kappa else math.sqrt(self.kappa / quadratic)


@dataclass(frozen=True)
class TrustRegion(KLClip):
    """As `KLClip` for a learning rate of 1: the learning rate multiplies the bounded step and so shortens it.

    The KL divergence is bounded to about lr^2 kappa. A schedule that lowers the learning rate takes effect at once,
    where KLClip keeps the step at full length until the learning rate has fallen below what the bound allows.

    Args:
        kappa: the bound at a learning rate of 1.
    """

    kappa: float = 0.1
    needs_learning_rate: ClassVar[bool] = False


@dataclass(frozen=True)
class FixedNorm:
    """Every layer's update is scaled to a root mean square of `rms`: only its direction is kept.

    With `momentum` not the gradient D is preconditioned but its moving average, ahead by one step (Nesterov):
    m = momentum * m + (1 - momentum) * D, then (1 - momentum) * D + momentum * m. Leave the optimizer's own momentum at
    0 then. Averaging before the length is fixed keeps noise from setting the length.

    Args:
        rms: root mean square of a layer's update before the learning rate. Adam's is about 0.2, so with 0.2 learning
            rates carry over from there (Liu et al. 2025).
        momentum: weight of the old average of gradients, from 0 up to below 1; 0 keeps none.

    Raises:
        ValueError: a setting out of range.
    """

    rms: float = 0.2
    momentum: float = 0.0

    def __post_init__(self) -> None:
        positive("rms", self.rms)
        if not 0.0 <= self.momentum < 1.0:
            raise ValueError(f"momentum is {self.momentum}; give a number from 0 up to below 1")

    def bound(self, update: Tensor) -> Tensor:
        """The update [p, o, a] at its length; the given one may be overwritten."""
        length = self.rms * math.sqrt(update.numel())
        return update.mul_(length / update.norm().clamp(min=torch.finfo(update.dtype).tiny))


@dataclass(frozen=True)
class Orthogonal(FixedNorm):
    """As `FixedNorm`, and before that all singular values of the update become about 1 (Muon, Jordan et al. 2024).

    Of a block's preconditioned gradient U S V^T remains about U V^T, by Newton-Schulz iterations. For layers whose mean
    gradient is far from the per-sample ones that the factors describe, as in transformers.

    Args:
        rms: root mean square of a layer's update before the learning rate.
        momentum: weight of the old average of gradients, from 0 up to below 1; 0 keeps none.
        iterations: of Newton and Schulz. Muon needs 5; what factors have whitened already is there sooner.

    Raises:
        ValueError: a setting out of range.
    """

    iterations: int = 3

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.iterations < 1:
            raise ValueError(f"iterations is {self.iterations}; give at least 1, such as 3")

    def bound(self, update: Tensor) -> Tensor:
        return super().bound(orthogonal(update, self.iterations))


StepControl = KLClip | FixedNorm | None
