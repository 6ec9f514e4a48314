"""TNT: tensor normal training, curvature from moments of mean gradients of sampled labels (Ren & Goldfarb 2021)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from torch import Tensor

from hpc_kfac.methods.kronecker.kfac import KFAC
from hpc_kfac.methods.kronecker.tkfac import Paired
from hpc_kfac.methods.method import Over, State, Terms
from hpc_kfac.options.wants import Wants

if TYPE_CHECKING:
    from hpc_kfac.layers.batch import LayerBatch, LayerShape


@dataclass(frozen=True, kw_only=True)
class TNT(Paired, KFAC):
    """TNT: the covariance of a layer's gradient taken for that of a matrix normal distribution.

    With the mean gradient D of a rank's N samples A = N E[D^T D] and G = N E[D D^T], of one trace delta, and
    F = kron(G, A) / delta. Use it with ``fisher: sampled``: then E[D] = 0, and N D D^T stands for the samples' sum.
    The settings are those of `KFAC`; with the cholesky solver each factor, scaled to equal means, gets sqrt(damping).
    """

    name: ClassVar[str] = "tnt"
    wants = Wants(
        fisher="sampled",
        why="the covariance of gradients of sampled labels, whose mean vanishes (Ren & Goldfarb 2021)",
    )

    def over(self, side: str, shape: LayerShape) -> Over:
        return "terms"

    def statistics(self, batch: LayerBatch, state: State, shape: LayerShape) -> State:
        return self.complete(self.collect(batch, state, shape), Terms.of(batch), state, shape)

    def collect(self, batch: LayerBatch, state: State, shape: LayerShape) -> State:
        return {"D": batch.mean_gradient()}

    def needs_output_means(self, shape: LayerShape) -> bool:
        return True

    def complete(self, merged: State, terms: Terms, state: State, shape: LayerShape) -> State:
        gradient = super().complete(merged, terms, state, shape)["D"]
        return {name: moment * terms.all for name, moment in self.gradient_moments(gradient, shape).items()}

    def split_damping(self, factors: State, shape: LayerShape, damping: float) -> dict[str, Tensor | float]:
        return KFAC.split_damping(self, factors, shape, damping)
