"""How long the preconditioned step may be.

Without a bound a block-diagonal step is too long by about the number of layers (Bernacchia et al. 2018).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import ClassVar

from torch import Tensor

from hpc_kfac.linalg.orthogonal import orthogonal
from hpc_kfac.linalg.scaling import at_norm
from hpc_kfac.options.damping import positive


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
    """Every layer's update gets one length: only its direction is kept.

    The length is norm * sqrt(max(o, a)) for a block of o rows and a columns, that of a matrix whose longer side's
    vectors are `norm` long, less what the optimizer's own momentum m makes of it: (1 - m) times. So one learning rate
    fits narrow and wide layers, with and without momentum. The momentum of each layer's group is read in every step.

    A gradient that is zero moves nothing. A layer that has none in a step moves on by its moving average alone, and in
    each such step by `momentum` times the length of the last; with its next gradient the length is the full one again.

    With momentum not the gradient D is preconditioned but its moving average, ahead by one step (Nesterov):
    m = momentum * m + (1 - momentum) * D, then (1 - momentum) * D + momentum * m. Averaging before the length is fixed
    keeps noise from setting the length; an optimizer's own momentum, which comes after, cannot.

    Args:
        norm: of an update's vectors, before the learning rate. With 0.2 a learning rate of 0.1 is a good first try.
        momentum: weight of the old average of gradients, from 0 up to below 1; 0 keeps none. None is the method's,
            for most 0.9, and 0 where the optimizer has a momentum.

    Raises:
        ValueError: a setting out of range.
    """

    norm: float = 0.2
    momentum: float | None = None

    def __post_init__(self) -> None:
        positive("norm", self.norm)
        if not 0.0 <= (self.momentum or 0.0) < 1.0:
            raise ValueError(f"momentum is {self.momentum}; give a number from 0 up to below 1")

    def under(self, momentum: float, dampening: float = 0.0, own: float = 0.9) -> FixedNorm:
        """What to use with an optimizer of this momentum, 0 for none: updates are as much shorter as it adds up.

        Args:
            momentum: weight of the optimizer's old velocity, below 1.
            dampening: share of the update that its velocity leaves out; it adds up to (1 - dampening) / (1 - momentum).
            own: momentum of this rule where neither it nor the optimizer has one, as the method wants it.

        Raises:
            ValueError: a momentum or dampening of 1 or more.
        """
        return _under(self, momentum, dampening, own)

    def bound(self, update: Tensor, shared: bool, alive: Tensor | None = None) -> Tensor:
        """The update [p, o, a] at its length; the given one may be overwritten. One that is zero stays so.

        Args:
            update: preconditioned gradient.
            shared: whether the layer's weights are used at several positions of a sample.
            alive: a factor for the length [1], where the layer may have had no gradient for a while.
        """
        return at_norm(update, self.norm * math.sqrt(update.shape[0] * max(update.shape[1:])), factor=alive)


@lru_cache(maxsize=256)  # asked for every layer in every step
def _under(control: FixedNorm, momentum: float, dampening: float, own: float) -> FixedNorm:
    for name, value in (("momentum", momentum), ("dampening", dampening)):
        if not value < 1.0:
            raise ValueError(
                f"the optimizer's {name} is {value}, under which no length of a step follows from"
                f" {type(control).__name__}; use a {name} below 1, or step_control=None"
            )
    if control.momentum is not None or momentum:
        own = control.momentum or 0.0
    return replace(control, norm=control.norm * (1.0 - momentum) / (1.0 - dampening), momentum=own)


@dataclass(frozen=True)
class Orthogonal(FixedNorm):
    """As `FixedNorm`, and before that singular values become about 1 where weights are shared by positions.

    Of a block's preconditioned gradient U S V^T remains about U V^T, by Newton-Schulz iterations (as in Muon, Jordan
    et al. 2024). In convolutions and transformers a sample's gradient is a sum over positions, which a Kronecker
    product describes coarsely; this takes out what is left. Where a sample's gradient is of rank one, the factors
    describe it well, and small singular values are noise: such layers keep theirs.

    Args:
        norm: of an update's vectors, before the learning rate.
        momentum: weight of the old average of gradients, from 0 up to below 1; 0 keeps none. None is the method's,
            for most 0.9, and 0 where the optimizer has a momentum.
        iterations: of Newton and Schulz. Muon needs 5; what factors have whitened already is there sooner.

    Raises:
        ValueError: a setting out of range.
    """

    iterations: int = 3

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.iterations < 1:
            raise ValueError(f"iterations is {self.iterations}; give at least 1, such as 3")

    def bound(self, update: Tensor, shared: bool, alive: Tensor | None = None) -> Tensor:
        return super().bound(orthogonal(update, self.iterations) if shared else update, shared, alive)


StepControl = KLClip | FixedNorm | None
