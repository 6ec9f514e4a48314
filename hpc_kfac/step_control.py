"""How long the preconditioned step may be.

Without a bound a block-diagonal step is too long by about the number of layers (Bernacchia et al. 2018).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from hpc_kfac.damping import positive


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
    """Every layer's update is scaled to a Frobenius norm of `norm`: only its direction is kept.

    Args:
        norm: the norm of a layer's update before the learning rate.
    """

    norm: float = 1.0

    def __post_init__(self) -> None:
        positive("norm", self.norm)


StepControl = KLClip | FixedNorm | None
