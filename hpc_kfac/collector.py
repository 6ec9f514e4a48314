"""Statistics of one optimisation step: from captured passes, micro-batch by micro-batch, into the running averages."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

from hpc_kfac.execution import LayerState
from hpc_kfac.fisher import OutputDistribution, Uniform
from hpc_kfac.keyed_random import uniform
from hpc_kfac.layers import Capture, LayerBatch, LayerShape
from hpc_kfac.methods.method import Method, State

FisherSource = Literal["empirical", "sampled", "exact"]


class Collector:
    """Collects statistics on this rank; knows nothing of the others but their number.

    Args:
        capture: the hooks on the model.
        method: says what statistics are.
        shapes: layer name -> shape.
        states: running averages by layer, folded into in place.
        fisher: source of the output gradients.
        seed: for sampled labels.
        rank: this rank.
        ranks: number of ranks.

    Raises:
        ValueError: an unknown source.
    """

    def __init__(
        self,
        capture: Capture,
        method: Method,
        shapes: Mapping[str, LayerShape],
        states: Mapping[str, LayerState],
        fisher: FisherSource,
        seed: int,
        rank: int,
        ranks: int,
    ) -> None:
        if fisher not in ("empirical", "sampled", "exact"):
            raise ValueError(f"fisher is {fisher!r}; use 'empirical', 'sampled' or 'exact'")
        self._capture, self._method, self._shapes, self._states = capture, method, shapes, states
        self._fisher, self._seed, self._rank, self._ranks = fisher, seed, rank, ranks
        capture.keep_output_gradients = fisher == "empirical"
        capture.on_boundary = self.take
        self.start(0, armed=False)

    def start(self, step: int, armed: bool) -> None:
        """Begins an optimisation step; nothing is captured unless `armed`."""
        self._capture.clear()
        self._capture.armed = armed
        self._step = step
        self._fresh: dict[str, tuple[State, float]] = {}
        self._observed: tuple[float | None, float | None, Tensor | None] = (None, None, None)
        self._sampled = 0  # rows of this step's earlier micro-batches

    def observe(
        self,
        outputs: Tensor,
        loss: OutputDistribution,
        count: int | None,
        mask: Tensor | None,
        loss_scale: float,
        sample_index: Tensor | None,
    ) -> None:
        """As `Preconditioner.observe`."""
        terms = float(count if count is not None else mask.sum().item() if mask is not None else loss.terms(outputs))
        if terms > 0 and not loss_scale > 0:  # a micro-batch without a valid term has a share of 0
            raise ValueError(f"loss_scale is {loss_scale} with {terms:g} loss terms; give a positive number")
        if self._fisher == "empirical":
            reduction = terms if loss.reduction == "mean" else 1.0
            self._observed = (terms, reduction / loss_scale if terms > 0 else 0.0, mask)
        else:
            self._derive(outputs, loss, terms, mask, sample_index)

    def take(self) -> None:
        """Takes in what backward passes have delivered since the last call (empirical Fisher)."""
        if self._fisher != "empirical":
            return
        count, scale, mask = self._observed
        self._observed = (None, None, None)
        self._accumulate(self._capture.take(count, scale, mask))

    def fold(self) -> None:
        """Folds the step's statistics into the running averages, which stay weighted by their loss terms."""
        for name, state in self._states.items():
            fresh, count = self._fresh.get(name, ({}, 0.0))
            old = self._method.decay * state.weight
            new = old + (1.0 - self._method.decay if state.weight > 0 else 1.0) * count
            if count > 0:
                self._method.fold(state.running, fresh, old / new)
            state.weight = new
        self._fresh = {}

    def _derive(
        self, outputs: Tensor, loss: OutputDistribution, terms: float, mask: Tensor | None, sample_index: Tensor | None
    ) -> None:
        """Derivatives of the model's own distribution towards every layer's output, beside the training gradient."""
        pairs = self._capture.edges()
        edges = [use.edge for _, use in pairs if use.edge is not None]
        if not edges:
            return
        exact = self._fisher == "exact"
        if exact:
            seeds = loss.root(outputs.detach())
        else:
            seeds = loss.sample_gradient(outputs.detach(), self._label_source(outputs, sample_index))
        if mask is not None:
            seeds = seeds * _aligned(mask, seeds, outputs)
        gradients = torch.autograd.grad(
            outputs, edges, grad_outputs=seeds, retain_graph=True, allow_unused=True, is_grads_batched=exact
        )
        by_use = {use: gradient for (_, use), gradient in zip(pairs, gradients, strict=True)}
        self._accumulate(self._capture.take_gradients(by_use, count=terms, draws=exact, mask=mask))

    def _label_source(self, outputs: Tensor, sample_index: Tensor | None) -> Uniform:
        rows = outputs.shape[0]
        if sample_index is None:
            sample_index = torch.arange(self._sampled, self._sampled + rows) * self._ranks + self._rank
            self._sampled += rows
        per_sample = rows // len(sample_index) if len(sample_index) else 1  # tokens of a flattened sequence

        def draw(shape: tuple[int, ...]) -> Tensor:
            numbers = uniform((per_sample, *shape), sample_index, self._seed, self._step)
            return numbers.reshape(rows, *shape).to(outputs.device)

        return draw

    def _accumulate(self, batches: Mapping[str, LayerBatch]) -> None:
        """Statistics of one micro-batch, merged with those of the earlier ones of this step."""
        for name, batch in batches.items():
            if batch.count <= 0:
                continue
            fresh = self._method.statistics(batch, self._states[name].view(), self._shapes[name])
            if not all(bool(torch.isfinite(tensor.sum())) for tensor in fresh.values()):
                continue  # an overflown micro-batch, as a gradient scaler meets now and then
            if name in self._fresh:
                merged, count = self._fresh[name]
                self._method.fold(merged, fresh, count / (count + batch.count))
                self._fresh[name] = (merged, count + batch.count)
            else:
                self._fresh[name] = (fresh, batch.count)


def _aligned(mask: Tensor, seeds: Tensor, outputs: Tensor) -> Tensor:
    """The mask of valid positions [N, ...] in a shape that multiplies derivatives ([K,] *outputs.shape)."""
    extra = outputs.dim() - mask.dim()
    if mask.shape == outputs.shape:
        return mask.to(seeds.dtype)
    # Class axis 1 as in cross-entropy of [N, C, ...], else trailing axes.
    shaped = mask.unsqueeze(1) if extra == 1 and mask.shape[1:] == outputs.shape[2:] else mask[(..., *[None] * extra)]
    return shaped.to(seeds.dtype)
