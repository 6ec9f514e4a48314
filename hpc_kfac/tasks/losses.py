"""Training losses: a mean over terms, the distribution the outputs stand for, and sums for an exact evaluation."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor
from torch.nn import functional

if TYPE_CHECKING:
    from hpc_kfac.options.fisher import OutputDistribution


class Loss(Protocol):
    """A loss the trainer can minimise, evaluate exactly over ranks, and hand to the preconditioner."""

    @property
    def distribution(self) -> OutputDistribution:
        """What the outputs stand for, for the sampled and the exact Fisher."""
        ...

    def __call__(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Mean over the terms; a zero that still has gradients when there is no term."""
        ...

    def terms(self, outputs: Tensor, targets: Tensor) -> int:
        """Number of terms the mean runs over."""
        ...

    def mask(self, targets: Tensor) -> Tensor | None:
        """Which positions count, bool of the targets' shape; None when all do."""
        ...

    def metrics(self, outputs: Tensor, targets: Tensor) -> dict[str, Tensor]:
        """Float64 sums, to be added over batches and ranks: ``loss_sum``, ``terms`` and what the loss adds to them."""
        ...


def _sum(values: Tensor) -> Tensor:
    return values.detach().sum(dtype=torch.float64)


def _number(value: int, like: Tensor) -> Tensor:
    return torch.tensor(float(value), dtype=torch.float64, device=like.device)


def _checked(weight: float | None) -> float | None:
    if weight is not None and weight <= 0:
        raise ValueError(f"weight = {weight} must be positive, or None for the mean over the outputs")
    return weight


def _weight(weight: float | None, outputs: Tensor) -> float:
    return 1 / math.prod(outputs.shape[1:]) if weight is None else weight


class CrossEntropyLoss:
    """Cross-entropy of class scores.

    Its metrics are of the plain targets, without smoothing: ``loss_sum``, ``correct``, ``terms``.

    Args:
        class_dim: axis of the outputs that counts classes; the other axes are the targets' shape.
        label_smoothing: share of the target spread evenly over all classes, from 0 to below 1.
        ignore_index: targets of this value count nowhere.
    """

    def __init__(self, class_dim: int = 1, label_smoothing: float = 0.0, ignore_index: int = -100) -> None:
        if not 0 <= label_smoothing < 1:
            raise ValueError(f"label_smoothing = {label_smoothing} must lie in [0, 1)")
        self.class_dim, self.label_smoothing, self.ignore_index = class_dim, label_smoothing, ignore_index

    @property
    def distribution(self) -> OutputDistribution:
        from hpc_kfac.options.fisher import CrossEntropy

        return CrossEntropy(class_dim=self.class_dim)

    def _rows(self, outputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        return outputs.movedim(self.class_dim, -1).flatten(0, -2), targets.flatten()

    def __call__(self, outputs: Tensor, targets: Tensor) -> Tensor:
        scores, labels = self._rows(outputs, targets)
        total = functional.cross_entropy(
            scores, labels, ignore_index=self.ignore_index, label_smoothing=self.label_smoothing, reduction="sum"
        )
        return total / max(1, self.terms(outputs, targets))

    def terms(self, outputs: Tensor, targets: Tensor) -> int:
        return int((targets != self.ignore_index).sum())

    def mask(self, targets: Tensor) -> Tensor | None:
        valid = targets != self.ignore_index
        return None if bool(valid.all()) else valid

    def metrics(self, outputs: Tensor, targets: Tensor) -> dict[str, Tensor]:
        scores, labels = self._rows(outputs.detach(), targets)
        losses = functional.cross_entropy(scores.float(), labels, ignore_index=self.ignore_index, reduction="none")
        valid = labels != self.ignore_index
        return {
            "loss_sum": _sum(losses),
            "correct": _sum((scores.argmax(-1) == labels) & valid),
            "terms": _sum(valid),
        }


class SquaredErrorLoss:
    """``weight * ||f - y||^2`` per sample, averaged over the samples.

    Its metrics: ``loss_sum``, ``squared_error_sum`` (of ``||f - y||^2``, without the weight), ``terms`` (samples).

    Args:
        weight: factor before the squared norm; None means 1 / (outputs of a sample), torch's mean squared error.
    """

    def __init__(self, weight: float | None = None) -> None:
        self.weight = _checked(weight)

    @property
    def distribution(self) -> OutputDistribution:
        from hpc_kfac.options.fisher import SquaredError

        return SquaredError(weight=self.weight)

    def __call__(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return _weight(self.weight, outputs) * (outputs - targets).square().sum() / max(1, len(outputs))

    def terms(self, outputs: Tensor, targets: Tensor) -> int:
        return len(outputs)

    def mask(self, targets: Tensor) -> Tensor | None:
        return None

    def metrics(self, outputs: Tensor, targets: Tensor) -> dict[str, Tensor]:
        squared = _sum((outputs.detach() - targets).double().square())
        return {
            "loss_sum": squared * _weight(self.weight, outputs),
            "squared_error_sum": squared,
            "terms": _number(len(outputs), outputs),
        }


class BinaryCrossEntropyLoss:
    """``weight * sum over outputs`` of the binary cross-entropy of logits per sample, averaged over the samples.

    Its metrics: ``loss_sum``, ``correct`` (of a sample: the share of outputs on the right side of 1/2), ``terms``
    (samples).

    Args:
        weight: None means 1 / (outputs of a sample), as torch's ``BCEWithLogitsLoss`` has it.
    """

    def __init__(self, weight: float | None = None) -> None:
        self.weight = _checked(weight)

    @property
    def distribution(self) -> OutputDistribution:
        from hpc_kfac.options.fisher import BinaryCrossEntropy

        return BinaryCrossEntropy(weight=self.weight)

    def __call__(self, outputs: Tensor, targets: Tensor) -> Tensor:
        total = functional.binary_cross_entropy_with_logits(outputs, targets.to(outputs.dtype), reduction="sum")
        return _weight(self.weight, outputs) * total / max(1, len(outputs))

    def terms(self, outputs: Tensor, targets: Tensor) -> int:
        return len(outputs)

    def mask(self, targets: Tensor) -> Tensor | None:
        return None

    def metrics(self, outputs: Tensor, targets: Tensor) -> dict[str, Tensor]:
        logits, labels = outputs.detach().float(), targets.float()
        losses = functional.binary_cross_entropy_with_logits(logits, labels, reduction="none")
        return {
            "loss_sum": _sum(losses) * _weight(self.weight, outputs),
            "correct": _sum((logits > 0) == (labels > 0.5)) * _weight(None, outputs),
            "terms": _number(len(outputs), outputs),
        }
