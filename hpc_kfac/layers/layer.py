"""A captured layer: its parameters seen as one [p, o, a] matrix, and the batches made of its uses."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

from hpc_kfac.layers.batch import LayerBatch, LayerShape, Reading, Use
from hpc_kfac.linalg.workspace import Workspace


class CapturedLayer(ABC):
    """One module whose gradient is preconditioned.

    Attributes:
        name: the module's name in the model.
        module: the module.
        shape: the blocks of its weight matrix.
        parameters: the weight and, where it is trained, the bias.
        shared: whether the weights were used at several positions of a sample, in the last forward pass that was seen;
            before one, as on a rank whose samples never come by, what the family's weights are for.
    """

    families: ClassVar[tuple[type[nn.Module], ...]] = ()
    """The torch modules that the class captures."""
    parameter_names: ClassVar[tuple[str, ...]] = ("weight", "bias")
    """What the module calls its weight and, if it can have one, its bias."""

    shares_by_nature: ClassVar[bool] = False
    """Whether the family's weights are made to be used at several positions."""

    def __init__(self, name: str, module: nn.Module) -> None:
        self.name = name
        self.module = module
        weight, *others = (module._parameters.get(name) for name in self.parameter_names)
        assert weight is not None
        self.parameters: list[nn.Parameter] = [weight]
        self.parameters += [bias for bias in others if bias is not None and bias.requires_grad]
        self._sizes = [parameter.shape for parameter in self.parameters]
        self.shape = self._shape()
        self.shared = self.shares_by_nature

    @staticmethod
    def obstacle(module: nn.Module) -> str | None:
        """Why this module of the family cannot be captured; None when it can."""
        return None

    @abstractmethod
    def _shape(self) -> LayerShape: ...

    @abstractmethod
    def batch(self, uses: Sequence[Use], count: float, reading: Reading = Reading()) -> LayerBatch:  # noqa: B008
        """Statistics of uses of this layer, each with its gradient set, over ``count`` loss terms."""

    @property
    def feature_dims(self) -> int:
        """Last dimensions of an input that are features of one sample; the first one before them is the sample."""
        return 1

    def noted(self, output: Tensor) -> tuple[Tensor, ...]:
        """Small tensors of a forward pass that its statistics can use and that the backward pass may free."""
        return ()

    def is_as(self, other: CapturedLayer | None) -> bool:
        """Whether it is the same module with the same trained parameters."""
        if other is None or other.module is not self.module:
            return False
        return [id(p) for p in self.parameters] == [id(p) for p in other.parameters]

    def reshaped(self) -> str:
        """What a parameter's shape has become since it was captured, in words; "" if it is as it was."""
        for kind, parameter, size in zip(("weight", "bias"), self.parameters, self._sizes, strict=False):
            if parameter.shape != size:
                return (
                    f"layer {self.name or 'the model'!r}: its {kind} has the shape {list(parameter.shape)}, and had"
                    f" {list(size)} when the preconditioner was made; change the model first, then make optimizer and"
                    " preconditioner"
                )
        return ""

    @property
    def has_bias(self) -> bool:
        return len(self.parameters) > 1

    def matrix(self, tensors: Sequence[Tensor]) -> Tensor:
        """Tensors shaped like ``parameters`` as one [p, o, a] tensor, the bias as last column."""
        shape = self.shape
        columns = [tensor.reshape(shape.blocks, shape.outputs, -1) for tensor in tensors]
        return columns[0] if len(columns) == 1 else torch.cat(columns, dim=2)

    def tensors(self, matrix: Tensor) -> list[Tensor]:
        """The inverse of ``matrix``: views shaped like ``parameters``."""
        if not self.has_bias:
            return [matrix.reshape_as(self.parameters[0])]
        columns = (matrix.narrow(2, 0, self.shape.inputs - 1), matrix.select(2, -1))
        return [column.reshape_as(parameter) for column, parameter in zip(columns, self.parameters, strict=True)]

    def gradient(self, work: Workspace | None = None) -> Tensor:
        """The gradient [p, o, a] in at least float32; a missing ``.grad`` counts as zeros.

        It is a view of ``.grad`` where that has the right form already, and otherwise lies in the workspace, under the
        name "gradient".
        """
        dtype = torch.float32
        for parameter in self.parameters:
            make_writable(parameter)
            dtype = torch.promote_types(dtype, parameter.dtype)
        grad = self.parameters[0].grad
        if not self.has_bias and grad is not None and grad.dtype == dtype and grad.is_contiguous():
            return self.matrix([grad])
        work = Workspace() if work is None else work
        shape = self.shape
        matrix = work.take("gradient", (shape.blocks, shape.outputs, shape.inputs), dtype, self.parameters[0].device)
        for parameter, tensor in zip(self.parameters, work.views(matrix, self.name, self.tensors), strict=True):
            if parameter.grad is None:
                tensor.zero_()
            else:
                tensor.copy_(parameter.grad)
        return matrix

    @torch.no_grad()
    def set_gradient(self, update: Tensor, work: Workspace | None = None) -> None:
        """Write ``update`` [p, o, a] into ``.grad`` in place; a missing ``.grad`` stays missing."""
        work = Workspace() if work is None else work
        for parameter, tensor in zip(self.parameters, work.views(update, self.name, self.tensors), strict=True):
            make_writable(parameter)
            if parameter.grad is not None:
                parameter.grad.copy_(tensor)


def make_writable(parameter: nn.Parameter) -> None:
    """Puts a gradient that can be written in place of one with a graph, overlapping entries, or from inference mode."""
    gradient = parameter.grad
    if gradient is None:
        return
    if gradient.requires_grad:
        gradient = parameter.grad = gradient.detach()
    overlaps = not gradient.is_sparse and not gradient.is_contiguous() and 0 in gradient.stride()
    if overlaps or (gradient.is_inference() and not torch.is_inference_mode_enabled()):
        parameter.grad = gradient.clone(memory_format=torch.contiguous_format)
