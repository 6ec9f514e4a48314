"""How long the preconditioned step may be.

Without a bound a block-diagonal step is too long by about the number of layers (Bernacchia et al. 2018).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from hpc_kfac.damping import positive


@dataclass(frozen=True)
class KLClip:
    """One scale for all layers that bounds the KL divergence of the step to about `kappa`.

    scale = min(1, sqrt(kappa / sum over layers of lr^2 <U, D>)), U the preconditioned and D the raw gradient
    (Ba et al. 2017; Wu et al. 2017). It needs the learning rate, so the preconditioner must know the optimizer.

    Args:
        kappa: the bound.
    """

    kappa: float = 1e-3

    def __post_init__(self) -> None:
        positive("kl_clip", self.kappa)

    def scale(self, quadratic: float) -> float:
        """The factor for all updates, from sum over layers of lr^2 <U, D>."""
        return 1.0 if quadratic <= self.kappa else math.sqrt(self.kappa / quadratic)


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
