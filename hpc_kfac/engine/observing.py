"""Checks of what `Preconditioner.observe` is told of a forward pass, by types, shapes and plain numbers alone."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from hpc_kfac.engine.arguments import shown
from hpc_kfac.notices import Refused
from hpc_kfac.options.fisher import CrossEntropy, OutputDistribution

LOSSES = "pass hk.CrossEntropy(), hk.SquaredError() or hk.BinaryCrossEntropy()"


def check_observed(
    outputs: Any,
    loss: Any,
    count: Any,
    mask: Any,
    loss_scale: Any,
    sample_index: Any,
    sampled: bool,
) -> None:
    """Checks the arguments of `observe`; no device is asked.

    Args:
        outputs: as for `observe`, like those that follow.
        loss: the distribution.
        count: loss terms.
        mask: positions that count.
        loss_scale: of the tensor on which backward() is called.
        sample_index: of the samples.
        sampled: whether the outputs' derivatives are taken: the sampled or exact Fisher, and passes are noted.

    Raises:
        ValueError: an argument has no meaning; with its name, its value and the mend.
        Refused: outputs without a graph where their derivatives are taken.
    """
    if not isinstance(outputs, Tensor):
        raise ValueError(
            f"outputs is {_kind(outputs)}; pass the tensor that the loss is made of, as in observe(logits)"
        )
    if outputs.dim() == 0:
        raise ValueError("outputs is a single number, as a loss is; pass the model's outputs [N, ...]")
    if not isinstance(loss, OutputDistribution):
        raise ValueError(f"loss is {shown(loss)}; {LOSSES}")
    _check_number("count", count, "number of loss terms", least=0.0)
    _check_number("loss_scale", loss_scale, "positive number", least=-math.inf)
    if isinstance(loss, CrossEntropy):
        _check_classes(outputs, loss.class_dim, sampled, count is None and mask is None)
    if mask is not None:
        _check_mask(outputs, mask, loss, sampled, count)
        if isinstance(loss, CrossEntropy) and loss.targets is not None:
            raise ValueError(
                "mask is given beside the targets of CrossEntropy; mark what does not count by ignore_index in targets"
            )
    if sample_index is not None:
        _check_index(outputs, sample_index)
    if sampled and not outputs.requires_grad:
        raise Refused(
            "observe() was given outputs without a graph (detached, or made under torch.no_grad()), and the sampled and"
            " exact Fisher take their derivatives; pass the outputs as the model returns them, and put passes that are"
            " no part of a step into `with preconditioner.paused():`"
        )


def _kind(value: Any) -> str:
    return "None" if value is None else f"a {type(value).__name__}"


def _check_number(name: str, value: Any, what: str, least: float) -> None:
    if value is None and name == "count":
        return
    if isinstance(value, Tensor) and value.numel() == 1:  # on a device, perhaps, which is not asked
        return
    try:
        number = math.nan if isinstance(value, str | bytes) else float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not (math.isfinite(number) and number >= least):
        raise ValueError(f"{name} is {shown(value)}; give a finite {what}")


def _check_classes(outputs: Tensor, class_dim: int, sampled: bool, counted: bool) -> None:
    shape = list(outputs.shape)
    if not -outputs.dim() <= class_dim < outputs.dim():
        if sampled or counted:
            raise ValueError(
                f"outputs {shape} have no class dimension {class_dim} for CrossEntropy; pass"
                " loss=hk.CrossEntropy(class_dim=...), hk.SquaredError() or hk.BinaryCrossEntropy()"
            )
    elif sampled and outputs.shape[class_dim] == 1:
        raise ValueError(
            "CrossEntropy over 1 class has no curvature; pass loss=hk.SquaredError() or hk.BinaryCrossEntropy()"
        )


def _check_mask(outputs: Tensor, mask: Any, loss: OutputDistribution, sampled: bool, count: Any) -> None:
    """That of inputs [N, S] with a `count` is for layers alone."""
    if not isinstance(mask, Tensor):
        raise ValueError(f"mask is {_kind(mask)}; pass a tensor, True where a position counts")
    has, wants = list(mask.shape), list(outputs.shape)
    inputs = not sampled and count is not None and len(has) > 1 and has[0] == wants[0]
    if not inputs and aligned(mask, outputs, loss) is None:
        raise ValueError(
            f"mask has the shape {has}, which does not fit outputs {wants}; give one entry for each"
            f" position, such as {wants[:1]} for samples"
        )


def aligned(mask: Tensor, outputs: Tensor, loss: OutputDistribution) -> Tensor | None:
    """The mask with a dimension for each of the outputs' dimensions, 1 where it says nothing of; None if it cannot be.

    A mask has the outputs' leading dimensions, or all but that of the classes, or as many entries as these have, flat
    where they are not or the other way round.
    """
    wants = tuple(outputs.shape)
    kept = [wants[:1]]  # dimensions that a mask may be of, of which the classes' is left out
    axis = 1
    if len(wants) > 1:
        axis = loss.class_dim % len(wants) if isinstance(loss, CrossEntropy) else 1
        kept.insert(0, wants[:axis] + wants[axis + 1 :])
    for shape in kept:
        if mask.shape == shape or (mask.numel() == math.prod(shape) and 1 in (mask.dim(), len(shape)) and mask.dim()):
            found = mask.reshape(shape)
            return found.unsqueeze(axis) if len(shape) == len(wants) - 1 else _trailing(found, len(wants))
    return _trailing(mask, len(wants)) if mask.dim() and mask.shape == wants[: mask.dim()] else None


def masked_terms(mask: Tensor | None, outputs: Tensor, loss: OutputDistribution) -> float:
    """Loss terms: entries of the mask that count, and under cross-entropy all positions of a sample that does."""
    if mask is None:
        return loss.terms(outputs)
    shaped = aligned(mask, outputs, loss) if isinstance(loss, CrossEntropy) else None
    positions = 1.0 if shaped is None or shaped.shape == outputs.shape else loss.terms(outputs) / max(shaped.numel(), 1)
    return float(mask.sum()) * positions


def _trailing(mask: Tensor, dims: int) -> Tensor:
    return mask[(..., *[None] * (dims - mask.dim()))]


def _check_index(outputs: Tensor, index: Any) -> None:
    rows = outputs.shape[0]
    if not isinstance(index, Tensor) or index.dim() != 1 or index.is_floating_point() or index.dtype == torch.bool:
        what = f"{index.dtype} {list(index.shape)}" if isinstance(index, Tensor) else _kind(index)
        raise ValueError(f"sample_index is {what}; pass whole numbers [N], one for each sample")
    if rows and (len(index) == 0 or rows % len(index) != 0):
        raise ValueError(
            f"sample_index has {len(index)} entries for outputs {list(outputs.shape)}; give one for each sample"
        )
