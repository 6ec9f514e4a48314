"""What distribution the model's outputs stand for: the source of the sampled and the exact Fisher.

An `OutputDistribution` turns outputs into derivatives with respect to them, without labels. For a loss that is a
negative log-likelihood the second moment of `sample_gradient` and the sum over `root` are the Fisher of one term; where
the loss carries a weight they are scaled so that they give the generalised Gauss-Newton matrix of that loss
(Martens 2020).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Uniform = Callable[[tuple[int, ...]], Tensor]
"""Draws uniform numbers: the shape of one sample -> [N, *shape] in [0, 1)."""


class OutputDistribution(ABC):
    """Subclass it for a loss of your own.

    Attributes:
        reduction: "mean" if the training loss is a mean over `terms`, "sum" if it is their sum.
    """

    reduction: Literal["mean", "sum"] = "mean"

    @abstractmethod
    def terms(self, outputs: Tensor) -> int:
        """Number of loss terms in outputs [N, ...]."""

    @abstractmethod
    def sample_gradient(self, outputs: Tensor, uniform: Uniform) -> Tensor:
        """Derivative of each term's loss with respect to the outputs, for labels drawn from the model."""

    @abstractmethod
    def root(self, outputs: Tensor) -> Tensor:
        """[K, *outputs.shape]: vectors whose outer products, summed over K, give each term's output Fisher."""


@dataclass(frozen=True)
class CrossEntropy(OutputDistribution):
    """Softmax cross-entropy over `class_dim`, with or without label smoothing.

    Args:
        class_dim: axis of the classes, 1 as in torch.nn.CrossEntropyLoss; every other position is a term.
        reduction: of the training loss.
    """

    class_dim: int = 1
    reduction: Literal["mean", "sum"] = "mean"

    def terms(self, outputs: Tensor) -> int:
        return outputs.numel() // outputs.shape[self.class_dim]

    def sample_gradient(self, outputs: Tensor, uniform: Uniform) -> Tensor:
        probabilities = _wide(outputs).softmax(self.class_dim).movedim(self.class_dim, -1)
        cumulative = probabilities.cumsum(-1)
        drawn = uniform(tuple(probabilities.shape[1:-1])).unsqueeze(-1).to(cumulative) * cumulative[..., -1:]
        label = (cumulative <= drawn).sum(-1, keepdim=True).clamp_(max=probabilities.shape[-1] - 1)
        gradient = probabilities.scatter_add(-1, label, torch.full_like(label, -1, dtype=probabilities.dtype))
        return gradient.movedim(-1, self.class_dim).to(outputs.dtype)

    def root(self, outputs: Tensor) -> Tensor:
        probabilities = _wide(outputs).softmax(self.class_dim).movedim(self.class_dim, -1)
        # Column c of diag(sqrt p) - p sqrt(p)^T.
        eye = torch.eye(probabilities.shape[-1], dtype=probabilities.dtype, device=outputs.device)
        columns = (eye - probabilities.unsqueeze(-2)) * probabilities.sqrt().unsqueeze(-1)
        class_dim = self.class_dim + 1 if self.class_dim >= 0 else self.class_dim
        return columns.movedim(-2, 0).movedim(-1, class_dim).to(outputs.dtype)


@dataclass(frozen=True)
class SquaredError(OutputDistribution):
    """Each sample's loss is weight * |f - y|^2: a Gaussian output of variance 1 / (2 weight).

    Args:
        weight: None means 1 / (outputs per sample), as torch.nn.MSELoss has it; 1 or 0.5 for a loss
            summed over outputs.
        reduction: of the training loss over samples.
    """

    weight: float | None = None
    reduction: Literal["mean", "sum"] = "mean"

    def terms(self, outputs: Tensor) -> int:
        return outputs.shape[0]

    def sample_gradient(self, outputs: Tensor, uniform: Uniform) -> Tensor:
        drawn = uniform(tuple(outputs.shape[1:])).to(outputs.device)
        normal = torch.special.ndtri(drawn.clamp(1e-7, 1 - 1e-7))
        return (normal * self._curvature(outputs) ** 0.5).to(outputs.dtype)

    def root(self, outputs: Tensor) -> Tensor:
        size = outputs[0].numel()
        columns = torch.eye(size, dtype=outputs.dtype, device=outputs.device) * self._curvature(outputs) ** 0.5
        return columns.view(size, 1, *outputs.shape[1:]).expand(size, *outputs.shape).contiguous()

    def _curvature(self, outputs: Tensor) -> float:
        return 2.0 * _weight(self.weight, outputs)


@dataclass(frozen=True)
class BinaryCrossEntropy(OutputDistribution):
    """Each sample's loss is weight * sum over outputs of the binary cross-entropy of a logit.

    Args:
        weight: None means 1 / (outputs per sample), as torch.nn.BCEWithLogitsLoss has it; 1 for a loss
            summed over outputs.
        reduction: of the training loss over samples.
    """

    weight: float | None = None
    reduction: Literal["mean", "sum"] = "mean"

    def terms(self, outputs: Tensor) -> int:
        return outputs.shape[0]

    def sample_gradient(self, outputs: Tensor, uniform: Uniform) -> Tensor:
        probability = _wide(outputs).sigmoid()
        drawn = uniform(tuple(outputs.shape[1:])).to(probability)
        scale = math.sqrt(_weight(self.weight, outputs))
        return ((probability - (drawn < probability).to(probability)) * scale).to(outputs.dtype)

    def root(self, outputs: Tensor) -> Tensor:
        probability = _wide(outputs).sigmoid()
        spread = (probability * (1 - probability) * _weight(self.weight, outputs)).sqrt()
        size = outputs[0].numel()
        eye = torch.eye(size, dtype=spread.dtype, device=outputs.device).view(size, 1, *outputs.shape[1:])
        return (eye * spread).to(outputs.dtype)


def _weight(weight: float | None, outputs: Tensor) -> float:
    return 1.0 / outputs[0].numel() if weight is None else weight


def _wide(outputs: Tensor) -> Tensor:
    # Probabilities of half-precision outputs are formed in fp32.
    return outputs.to(torch.promote_types(outputs.dtype, torch.float32))
