"""What a captured layer hands to a curvature method: its shape, its uses, and the statistics of one batch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, Protocol

import torch
from torch import Tensor

from hpc_kfac.linalg.structure import Dense, Structure


@dataclass(frozen=True)
class LayerShape:
    """Shape of one captured layer: independent Kronecker blocks, each of an ``outputs x inputs`` weight matrix.

    Attributes:
        blocks: number of blocks p: 1 for most layers, groups of a grouped convolution, channels of a norm layer.
        inputs: columns a of the weight matrix, the bias included as the last one.
        outputs: rows o of the weight matrix.
        input_structure: the densest structure that makes sense for A.
        output_structure: the densest structure that makes sense for G.
        kernel: kernel positions of a convolution; 1 otherwise.
        bias: whether the last column is a bias.
        gradient_rows: whether the rows x are the samples' gradients and the rows g ones, as in norm layers: the sums
            over x are then divided by the loss terms.
    """

    blocks: int
    inputs: int
    outputs: int
    input_structure: Structure = field(default_factory=Dense)
    output_structure: Structure = field(default_factory=Dense)
    kernel: int = 1
    bias: bool = False
    gradient_rows: bool = False

    @property
    def input_over(self) -> Literal["uses", "terms"]:
        """What means of x are means over, as in `StateSpec.over`."""
        return "terms" if self.gradient_rows else "uses"

    @property
    def output_over(self) -> Literal["uses", "terms"]:
        """What means of g are means over."""
        return "uses" if self.gradient_rows else "terms"

    @property
    def parameters(self) -> int:
        """Number of weights, p * o * a."""
        return self.blocks * self.outputs * self.inputs


@dataclass(eq=False)
class Use:
    """One call of a captured module in a forward pass. Holds references, never copies.

    Attributes:
        layer: name of the module.
        inputs: the module's input as it came.
        training: whether the module was in training mode.
        micro_batch: number of the micro-batch; uses of one micro-batch share their samples.
        version: autograd's version counter of ``inputs``, to notice a later in-place change.
        noted: what the layer noted of the call, see ``CapturedLayer.noted``.
        gradient: gradient of the output, by the backward passes that count (empirical Fisher).
        number: of the use, in the order of the forward passes.
        samples: leading dimension of the input, 1 where only the feature dimensions are there.
        arriving: gradient of the output if the backward pass that is under way counts.
        task: that pass, by autograd's number.
        taken: it has gone into statistics.
    """

    layer: str
    inputs: Tensor
    training: bool
    micro_batch: int = 0
    version: int = 0
    noted: tuple[Tensor, ...] = ()
    gradient: Tensor | None = None
    number: int = 0
    samples: int = 1
    arriving: Tensor | None = None
    task: int = -1
    taken: bool = False

    def moved(self) -> Use:
        """A use with all that this one holds, of which nothing is left."""
        moved = replace(self)
        self.inputs, self.noted, self.gradient, self.arriving = self.inputs.new_empty(0), (), None, None
        self.taken = True
        return moved


@dataclass(frozen=True)
class Reading:
    """How captured uses are to be read.

    Attributes:
        scale: what the stored gradients are multiplied with to become gradients of the sum of the loss terms.
        draws: whether the gradients have a leading axis of draws (exact Fisher).
        mask: True at the positions that count, or at the samples; applied as `kept_positions` tells.
        reduce: weight sharing as ``reduce`` instead of ``expand`` (Eschenhagen et al. 2023).
        dtype: the dtype of the statistics.
        rows: the dtype of the rows that are multiplied into moments; None for the same.
    """

    scale: float = 1.0
    draws: bool = False
    mask: Tensor | None = None
    reduce: bool = False
    dtype: torch.dtype = torch.float32
    rows: torch.dtype | None = None


def kept_positions(mask: Tensor | None, leading: Sequence[int], gradient: Tensor) -> Tensor | None:
    """The mask at all positions of a layer, bool; None where it does not apply, so that all count.

    Applied by shape: dimensions that the layer's begin with, the same ones flattened or not, or the first two of them
    exchanged (time first). A layer that has the samples of the mask but other positions, as after pooling, keeps the
    samples of which any position counts. Where rows could be several of a sample, or one of several entries, they are
    only left out if their gradients are zero, as those of what counts nowhere are.

    Args:
        mask: True where a position counts, samples first, or flat.
        leading: the layer's dimensions before the features, samples first.
        gradient: of its output [draws, *leading, ...].
    """
    if mask is None or mask.dim() == 0 or not leading:
        return None
    mask, leading = mask != 0, tuple(leading)
    found = _by_shape(mask, leading)
    if found is None:
        samples = mask if mask.dim() == 1 else mask.flatten(1).any(1)
        found = samples if len(samples) == leading[0] else _by_gradient(samples, leading[0], gradient)
    return None if found is None else found.view(*found.shape, *[1] * (len(leading) - found.dim())).expand(*leading)


def _by_shape(mask: Tensor, leading: tuple[int, ...]) -> Tensor | None:
    """The mask in the layer's first dimensions, if they can be its own."""
    if mask.shape == leading[: mask.dim()]:
        return mask
    if mask.dim() > 1 and (mask.shape[1], mask.shape[0], *mask.shape[2:]) == leading[: mask.dim()]:
        return mask.transpose(0, 1)
    for dims in range(1, len(leading) + 1):
        flat = dims == 1 or mask.dim() == 1 or (mask.shape[0] == leading[0] and 2 in (dims, mask.dim()))
        if flat and math.prod(leading[:dims]) == mask.numel():
            return mask.reshape(leading[:dims])
    return None


def _by_gradient(samples: Tensor, rows: int, gradient: Tensor) -> Tensor | None:
    """Which of so many rows of all samples, or samples of all entries, count: in one of the orders that are usual."""
    count = len(samples)
    orders: list[Tensor] = []
    if count and rows > count and rows % count == 0:
        orders = [samples.repeat_interleave(rows // count), samples.repeat(rows // count)]
    elif rows and count % rows == 0:
        orders = [samples.view(rows, -1).any(1), samples.view(-1, rows).any(0)]
    return next((kept for kept in orders if not gradient[:, ~kept].any()), None)


class LayerBatch(Protocol):
    """Statistics of one layer over one batch on this rank.

    x are the layer's input rows (a 1 appended where it has a bias), g the gradients of the SUM of the loss terms with
    respect to its output. A sample has one or more positions: tokens, pixels, repeated uses. With an exact Fisher there
    are several g (draws) for each position; sums over g then run over the draws too.

    Attributes:
        count: M, the number of loss terms on this rank, of samples that used the layer or not.
        input_rows: how many rows x are averaged over: positions that count, or samples that have any.
        ranks: how many ranks take statistics of the layer.
    """

    count: float
    ranks: int

    @property
    def input_rows(self) -> float: ...

    def input_moment(self, structure: Structure) -> Tensor:
        """A, the mean of x x^T over positions, in the given structure."""
        ...

    def output_moment(self, structure: Structure) -> Tensor:
        """G = (1/M) sum of g g^T over positions, in the given structure. Never asked of an ``Identity`` output."""
        ...

    def input_mean(self) -> Tensor:
        """The first of `means`.

        Raises:
            ValueError: with an exact Fisher, if the rows x are gradients.
        """
        ...

    def means(self) -> tuple[Tensor, Tensor]:
        """Mean of x over positions [p, a], under `reduce` over samples, and (1/M) sum of g [p, o].

        Raises:
            ValueError: with an exact Fisher, whose g have no meaningful mean.
        """
        ...

    def paired_moments(
        self,
        output_form: Tensor | None,
        input_form: Tensor | None,
        output_structure: Structure,
        input_structure: Structure,
    ) -> tuple[Tensor, Tensor]:
        """Moments weighted by the other side: (1/M) sum of (g^T W_G g) x x^T, and (1/M) sum of (x^T W_A x) g g^T.

        Sums over positions, each as if it were a sample, in the given structures; so are the forms W, of which None is
        the identity: F applied to W_G and to W_A, for the F of these samples. Never asked where a side is ``Identity``.
        """
        ...

    def mean_gradient(self) -> Tensor:
        """(1/M) sum of g x^T over positions, [p, o, a].

        Raises:
            ValueError: with an exact Fisher, whose g have no meaningful mean.
        """
        ...

    def projected_square(
        self,
        output_basis: Tensor | None,
        input_basis: Tensor | None,
        output_structure: Structure,
        input_structure: Structure,
    ) -> Tensor:
        """(1/M) sum over samples of (Q_G^T (sum_t g_t x_t^T) Q_A)^2, elementwise, [p, o, a] (George et al. 2018).

        Under ``reduce`` of the rows that A and G are of, (Q_G^T (sum_t g_t) (mean_t x_t)^T Q_A)^2.
        """
        ...

    def rows(self, limit: int) -> tuple[Tensor, Tensor]:
        """X [p, n, a] and R [p, n, o] of n <= limit evenly spaced samples: x averaged over positions, g summed."""
        ...

    def available(self, positions: bool) -> int:
        """How many samples, or positions, times draws there are to choose rows from."""
        ...

    def sample_gradients(self, limit: int) -> Tensor:
        """Gradients [p, n, o, a] of n <= limit evenly spaced samples, scaled so that the mean of u u^T stands for F."""
        ...

    def position_rows(self, limit: int) -> tuple[Tensor, Tensor]:
        """As `rows`, of n <= limit evenly spaced positions of all samples."""
        ...
