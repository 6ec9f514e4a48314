"""What goes into one step and what comes out of it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class LayerReport:
    """How strongly a layer was preconditioned in a step.

    Attributes:
        cosine: between preconditioned and raw gradient; 1 means that the preconditioner did nothing but scale.
        curvature_share: <U, F U> / <U, D> = <U, F U> / <U, (F + damping) U>, with curvature and damping as the layer's
            owner has them: the share of the step's quadratic form that comes from curvature and not from damping, from
            0, a no-op, also of a method that has no curvature yet, to 1. None for an update that is no
            (F + damping)^-1 D, or is 0.
        update: norm of the update that the optimizer is given, before the learning rate, by that of the weights.
        staleness: most steps since the decomposition of a solved form of this layer began; 0 before there is one.
    """

    cosine: float
    curvature_share: float | None
    update: float
    staleness: int


@dataclass(frozen=True)
class StepReport:
    """What one step did; equal on all ranks.

    Attributes:
        applied: False if an update was not finite on some rank; then no rank may step its optimizer.
        kl_scale: the factor by which KLClip shortened the update.
        damping: the damping used.
        statistics: statistics were folded in.
        refreshed: number of layers whose solved form was renewed.
        failures: decompositions that failed, so that their layers kept the last good solved form.
        staleness: most steps since the decomposition of a solved form in use began; 0 before there is one.
        scalars: sums over ranks of the scalars given to the step.
        layers: by layer name, only when asked for.
        uphill: layers whose update U pointed uphill, <U, D> < 0 with the gradient D that was preconditioned, and that
            took D in its place.
    """

    applied: bool
    kl_scale: float
    damping: float
    statistics: bool
    refreshed: int
    failures: int
    staleness: int
    scalars: dict[str, float]
    layers: dict[str, LayerReport]
    uphill: tuple[str, ...] = ()
