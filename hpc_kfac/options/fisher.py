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
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

FisherSource = Literal["empirical", "sampled", "exact"]
"""Where output gradients come from: the labels, labels that are drawn from the model, or all outputs."""

Uniform = Callable[[tuple[int, ...]], Tensor]
"""Draws uniform numbers: the shape of one sample -> [N, *shape] in [0, 1)."""


class OutputDistribution(ABC):
    """Subclass it for a loss of your own.

    Attributes:
        reduction: "mean" if the training loss is a mean over `terms`, "sum" if it is their sum.
    """

    reduction: Literal["mean", "sum"] = "mean"

    @abstractmethod
    def terms(self, outputs: Tensor) -> float:
        """Number of loss terms in outputs [N, ...], or what a weighted mean of them is divided by."""

    def mask(self, outputs: Tensor) -> Tensor | None:
        """True at the positions of outputs that are loss terms; None where all are."""
        return None

    @abstractmethod
    def sample_gradient(self, outputs: Tensor, uniform: Uniform) -> Tensor:
        """Derivative of each term's loss with respect to the outputs, for labels drawn from the model."""

    @abstractmethod
    def root(self, outputs: Tensor) -> Tensor:
        """[K, *outputs.shape]: vectors whose outer products, summed over K, give each term's output Fisher."""


@dataclass(frozen=True)
class CrossEntropy(OutputDistribution):
    """Softmax cross-entropy over `class_dim`, as torch.nn.functional.cross_entropy has it.

    Label smoothing and soft targets leave its second derivative as it is; class weights multiply that of a term by
    sum over classes of weight times smoothed target, and divide the mean by the sum of the targets' weights.

    Args:
        class_dim: axis of the classes, 1 as in torch.nn.CrossEntropyLoss; every other position is a term.
        reduction: of the training loss.
        targets: of this batch: classes [N, ...] without `class_dim`, or probabilities shaped like the outputs. Needed
            with class weights; in place of a mask with `ignore_index`.
        weight: of each class [C].
        label_smoothing: of the training loss.
        ignore_index: targets that are no terms.

    Raises:
        ValueError: weights without targets, a smoothing outside of 0 to 1; later, targets that do not fit the outputs.
    """

    class_dim: int = 1
    reduction: Literal["mean", "sum"] = "mean"
    targets: Tensor | None = field(default=None, compare=False, repr=False)
    weight: Tensor | None = field(default=None, compare=False, repr=False)
    label_smoothing: float = 0.0
    ignore_index: int = -100

    def __post_init__(self) -> None:
        if self.weight is not None and self.targets is None:
            raise ValueError("weight is given without targets, whose classes' weights the terms have; pass targets=...")
        if not 0.0 <= self.label_smoothing <= 1.0:
            raise ValueError(f"label_smoothing is {self.label_smoothing}; give a share from 0 to 1")

    def terms(self, outputs: Tensor) -> float:
        if self.targets is None:
            return outputs.numel() // outputs.shape[self.class_dim]
        weights = self._weights(outputs)
        if self._soft(outputs):
            return outputs.numel() // outputs.shape[self.class_dim]
        valid = self.targets[self.targets != self.ignore_index]
        return float(weights[valid].sum())

    def mask(self, outputs: Tensor) -> Tensor | None:
        if self.targets is None or self._soft(outputs):
            return None
        valid = self.targets != self.ignore_index
        return None if bool(valid.all()) else valid

    def _soft(self, outputs: Tensor) -> bool:
        """Whether targets are probabilities.

        Raises:
            ValueError: they fit the outputs neither so nor as classes.
        """
        assert self.targets is not None
        shape = list(outputs.shape)
        if self.targets.is_floating_point() and list(self.targets.shape) == shape:
            return True
        shape.pop(self.class_dim)
        if self.targets.is_floating_point() or list(self.targets.shape) != shape:
            raise ValueError(
                f"targets are {self.targets.dtype} {list(self.targets.shape)} for outputs {list(outputs.shape)}; pass"
                f" classes {shape}, or probabilities of the outputs' shape"
            )
        return False

    def _weights(self, outputs: Tensor) -> Tensor:
        """Of each class [C].

        Raises:
            ValueError: there is not one for each.
        """
        classes = outputs.shape[self.class_dim]
        if self.weight is None:
            return torch.ones(classes, dtype=torch.promote_types(outputs.dtype, torch.float32), device=outputs.device)
        if self.weight.shape != (classes,):
            raise ValueError(f"weight has the shape {list(self.weight.shape)}; give one for each of {classes} classes")
        return _wide(self.weight.detach()).to(outputs.device)

    def _root_strength(self, outputs: Tensor) -> Tensor | float:
        """The square root of what a term's second derivative is multiplied with, [..., 1] with the classes last."""
        if self.targets is None:
            return 1.0
        weights = self._weights(outputs)
        if self._soft(outputs):
            hard = (self.targets.detach().to(weights).movedim(self.class_dim, -1) * weights).sum(-1)
            valid = torch.ones_like(hard)
        else:
            valid = (self.targets != self.ignore_index).to(weights)
            hard = weights[torch.where(valid > 0, self.targets, 0)]
        strength = (1.0 - self.label_smoothing) * hard + self.label_smoothing * weights.mean()
        return (strength * valid).sqrt().unsqueeze(-1)

    def sample_gradient(self, outputs: Tensor, uniform: Uniform) -> Tensor:
        probabilities = _wide(outputs).softmax(self.class_dim).movedim(self.class_dim, -1)
        cumulative = probabilities.cumsum(-1)
        drawn = uniform(tuple(probabilities.shape[1:-1])).unsqueeze(-1).to(cumulative) * cumulative[..., -1:]
        label = (cumulative <= drawn).sum(-1, keepdim=True).clamp_(max=probabilities.shape[-1] - 1)
        gradient = probabilities.scatter_add(-1, label, torch.full_like(label, -1, dtype=probabilities.dtype))
        gradient = gradient * self._root_strength(outputs)
        return gradient.movedim(-1, self.class_dim).to(outputs.dtype)

    def root(self, outputs: Tensor) -> Tensor:
        probabilities = _wide(outputs).softmax(self.class_dim).movedim(self.class_dim, -1)
        # Column c of diag(sqrt p) - p sqrt(p)^T.
        eye = torch.eye(probabilities.shape[-1], dtype=probabilities.dtype, device=outputs.device)
        roots = (probabilities.sqrt() * self._root_strength(outputs)).unsqueeze(-1)
        columns = (eye - probabilities.unsqueeze(-2)) * roots
        class_dim = self.class_dim + 1 if self.class_dim >= 0 else self.class_dim
        return columns.movedim(-2, 0).movedim(-1, class_dim).to(outputs.dtype)


@dataclass(frozen=True)
class _WeightedSamples(OutputDistribution):
    """Each sample is one term: weight times a sum over its outputs, or their mean where there is no weight."""

    weight: float | None = None
    reduction: Literal["mean", "sum"] = "mean"

    def __post_init__(self) -> None:
        """Refuses weights of single outputs, as torch's losses take them, too: the terms' curvature would need targets.

        Raises:
            ValueError: the weight is not a positive number.
        """
        weight: object = self.weight
        if weight is not None and not (isinstance(weight, int | float) and 0 < weight < math.inf):
            shown = f"a tensor {list(weight.shape)}" if isinstance(weight, Tensor) else repr(weight)
            raise ValueError(
                f"weight is {shown}; give a positive number or None, and for weights of single outputs or pos_weight a"
                " subclass of OutputDistribution"
            )

    def terms(self, outputs: Tensor) -> int:
        return outputs.shape[0]

    def _weight(self, outputs: Tensor) -> float:
        return 1.0 / outputs[0].numel() if self.weight is None else self.weight


@dataclass(frozen=True)
class SquaredError(_WeightedSamples):
    """Each sample's loss is weight * |f - y|^2: a Gaussian output of variance 1 / (2 weight).

    Args:
        weight: None means 1 / (outputs per sample), as torch.nn.MSELoss has it; 1 or 0.5 for a loss
            summed over outputs.
        reduction: of the training loss over samples.
    """

    def sample_gradient(self, outputs: Tensor, uniform: Uniform) -> Tensor:
        drawn = uniform(tuple(outputs.shape[1:])).to(outputs.device)
        normal = torch.special.ndtri(drawn.clamp(1e-7, 1 - 1e-7))
        return (normal * self._curvature(outputs) ** 0.5).to(outputs.dtype)

    def root(self, outputs: Tensor) -> Tensor:
        size = outputs[0].numel()
        columns = torch.eye(size, dtype=outputs.dtype, device=outputs.device) * self._curvature(outputs) ** 0.5
        return columns.view(size, 1, *outputs.shape[1:]).expand(size, *outputs.shape).contiguous()

    def _curvature(self, outputs: Tensor) -> float:
        return 2.0 * self._weight(outputs)


@dataclass(frozen=True)
class BinaryCrossEntropy(_WeightedSamples):
    """Each sample's loss is weight * sum over outputs of the binary cross-entropy of a logit.

    Args:
        weight: None means 1 / (outputs per sample), as torch.nn.BCEWithLogitsLoss has it; 1 for a loss
            summed over outputs.
        reduction: of the training loss over samples.
    """

    def sample_gradient(self, outputs: Tensor, uniform: Uniform) -> Tensor:
        probability = _wide(outputs).sigmoid()
        drawn = uniform(tuple(outputs.shape[1:])).to(probability)
        scale = math.sqrt(self._weight(outputs))
        return ((probability - (drawn < probability).to(probability)) * scale).to(outputs.dtype)

    def root(self, outputs: Tensor) -> Tensor:
        probability = _wide(outputs).sigmoid()
        spread = (probability * (1 - probability) * self._weight(outputs)).sqrt()
        size = outputs[0].numel()
        eye = torch.eye(size, dtype=spread.dtype, device=outputs.device).view(size, 1, *outputs.shape[1:])
        return (eye * spread).to(outputs.dtype)


def _wide(outputs: Tensor) -> Tensor:
    # Probabilities of half-precision outputs are formed in fp32.
    return outputs.to(torch.promote_types(outputs.dtype, torch.float32))
