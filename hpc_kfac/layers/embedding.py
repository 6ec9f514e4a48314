"""Embeddings: linear layers of one-hot rows, whose A is the diagonal of token frequencies."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from hpc_kfac.layers.batch import LayerShape, Reading, Use, kept_positions
from hpc_kfac.layers.layer import CapturedLayer
from hpc_kfac.layers.positions import quadratic_form, refuse_draws, spread, weighted_gram
from hpc_kfac.linalg.structure import Diagonal, Structure


class EmbeddingBatch:
    """All positions of all uses in one list: sample, token, and gradient [K, positions, o]."""

    ranks = 1

    def __init__(
        self, shape: LayerShape, padding: int | None, uses: Sequence[Use], count: float, reading: Reading
    ) -> None:
        self.shape, self.count, self.reading = shape, count, reading
        first_sample: dict[tuple[int, int], int] = {}
        self.samples = 0
        tokens, gradients, owners = [], [], []
        for use in uses:
            assert use.gradient is not None
            token = use.inputs.unsqueeze(0) if use.inputs.dim() == 0 else use.inputs
            group = (use.micro_batch, token.shape[0])
            if group not in first_sample:
                first_sample[group] = self.samples
                self.samples += token.shape[0]
            gradient = use.gradient if reading.draws else use.gradient.unsqueeze(0)
            keep = torch.ones_like(token, dtype=torch.bool) if padding is None else token != padding
            masked = kept_positions(reading.mask, token.shape, gradient)
            keep = keep if masked is None else keep & masked
            sample = torch.arange(token.shape[0], device=token.device) + first_sample[group]
            sample = sample.view(-1, *[1] * (token.dim() - 1)).expand_as(token)
            keep = keep.flatten().nonzero().squeeze(1)
            tokens.append(token.flatten()[keep])
            owners.append(sample.flatten()[keep])
            gradients.append(gradient.reshape(gradient.shape[0], -1, shape.outputs)[:, keep].to(reading.dtype))
        self.token, self.sample, self.g = torch.cat(tokens), torch.cat(owners), torch.cat(gradients, dim=1)
        lengths = torch.bincount(self.sample, minlength=self.samples)
        if self.samples and len(self.token):  # samples of which no position counts are none
            self.sample = (lengths > 0).cumsum(0)[self.sample] - 1
            lengths = lengths[lengths > 0]
            self.samples = len(lengths)
        self.lengths = lengths

    @property
    def input_rows(self) -> float:
        """As in ``LayerBatch``."""
        return float((self.lengths > 0).sum()) if self.reading.reduce else float(len(self.token))

    def input_moment(self, structure: Structure) -> Tensor:
        if not isinstance(structure, Diagonal):
            raise ValueError(f"the activation factor of an embedding is diagonal; got structure {structure}")
        diagonal = self.g.new_zeros(self.shape.inputs)
        if not self.reading.reduce:
            frequency = torch.bincount(self.token, minlength=self.shape.inputs)
            return (frequency.to(diagonal) / max(len(self.token), 1)).unsqueeze(0)
        key, occurrences = torch.unique(self.sample * self.shape.inputs + self.token, return_counts=True)
        shares = occurrences.to(diagonal) / self.lengths[key // self.shape.inputs]
        diagonal.index_add_(0, key % self.shape.inputs, shares.square())
        return (diagonal / (self.lengths > 0).sum().clamp(min=1)).unsqueeze(0)

    def output_moment(self, structure: Structure) -> Tensor:
        g = self._sample_gradients() if self.reading.reduce else self.g
        return structure.gram(g.flatten(0, 1).unsqueeze(0)).to(g.dtype) * (self.reading.scale**2 / self.count)

    def means(self) -> tuple[Tensor, Tensor]:
        refuse_draws(self.reading.draws)
        return self.input_mean(), self.g.sum(1) * (self.reading.scale / self.count)

    def input_mean(self) -> Tensor:
        if self.reading.reduce:
            return (self._sample_inputs().sum(0) / max(self.input_rows, 1.0)).unsqueeze(0)
        frequency = torch.bincount(self.token, minlength=self.shape.inputs).to(self.g) / max(len(self.token), 1)
        return frequency.unsqueeze(0)

    def paired_moments(
        self,
        output_form: Tensor | None,
        input_form: Tensor | None,
        output_structure: Structure,
        input_structure: Structure,
    ) -> tuple[Tensor, Tensor]:
        factor = self.reading.scale**2 / self.count
        if self.reading.reduce:
            x, g = self._sample_inputs(), self._sample_gradients()
            by_x, by_g = x.square(), quadratic_form(g, output_form, output_structure).sum(0)
            by_x = (by_x if input_form is None else by_x * input_form).sum(1)
            diagonal = by_g @ x.square()
        else:
            g, by_g = self.g, quadratic_form(self.g, output_form, output_structure).sum(0)
            by_x = self.g.new_ones(len(self.token)) if input_form is None else input_form[0].to(self.g)[self.token]
            diagonal = self.g.new_zeros(self.shape.inputs).index_add_(0, self.token, by_g)
        moment = weighted_gram(g.flatten(0, 1).unsqueeze(0), by_x.repeat(g.shape[0]).unsqueeze(0), output_structure)
        return diagonal.unsqueeze(0) * factor, moment * factor

    def mean_gradient(self) -> Tensor:
        refuse_draws(self.reading.draws)
        factor = self.reading.scale / self.count
        if self.reading.reduce:
            return (self._sample_gradients()[0].mT @ self._sample_inputs()).unsqueeze(0) * factor
        total = self.g.new_zeros(self.shape.inputs, self.shape.outputs).index_add_(0, self.token, self.g[0])
        return total.t().unsqueeze(0) * factor

    def projected_square(
        self,
        output_basis: Tensor | None,
        input_basis: Tensor | None,
        output_structure: Structure,
        input_structure: Structure,
    ) -> Tensor:
        if self.reading.reduce:
            g = self._sample_gradients()
            turned = output_structure.rotate_right(g.flatten(0, 1).unsqueeze(0), output_basis).view_as(g)
            squares = turned.square().sum(0).t() @ self._sample_inputs().square()
            return squares.unsqueeze(0) * (self.reading.scale**2 / self.count)
        # A sample's gradient has one column for each token in it: the sum of g over the token's positions.
        key, owner = torch.unique(self.sample * self.shape.inputs + self.token, return_inverse=True)
        columns = self.g.new_zeros(self.g.shape[0], len(key), self.shape.outputs).index_add_(1, owner, self.g)
        rotated = output_structure.rotate_right(columns.flatten(0, 1).unsqueeze(0), output_basis).view_as(columns)
        total = self.g.new_zeros(self.shape.inputs, self.shape.outputs)
        total.index_add_(0, key % self.shape.inputs, rotated.square().sum(0))
        return total.t().unsqueeze(0) * (self.reading.scale**2 / self.count)

    def rows(self, limit: int) -> tuple[Tensor, Tensor]:
        """As ``LayerBatch.rows``, scaled as those of the other families."""
        draws = self.g.shape[0]
        sample, draw = spread(limit, self.samples, draws, self.token.device)
        chosen, row = torch.unique(sample, return_inverse=True)
        place = torch.full((self.samples,), -1, device=self.token.device)
        place[chosen] = torch.arange(len(chosen), device=self.token.device)
        kept = place[self.sample] >= 0
        x = self.g.new_zeros(len(chosen) * self.shape.inputs)
        ones = torch.ones_like(self.token[kept], dtype=x.dtype)
        x.index_add_(0, place[self.sample[kept]] * self.shape.inputs + self.token[kept], ones)
        x = x.view(len(chosen), -1) / self.lengths[chosen].clamp(min=1)[:, None]
        factor = self.reading.scale * (self.samples * draws / self.count) ** 0.5
        return x[row].unsqueeze(0), self._sample_gradients()[draw, sample].unsqueeze(0) * factor

    def available(self, positions: bool) -> int:
        """As ``LayerBatch.available``."""
        return self.g.shape[0] * (len(self.token) if positions and not self.reading.reduce else self.samples)

    def sample_gradients(self, limit: int) -> Tensor:
        """As ``LayerBatch.sample_gradients``: a column for each token."""
        if self.reading.reduce:
            x, r = self.rows(limit)
            return r.unsqueeze(3) * x.unsqueeze(2)
        draws = self.g.shape[0]
        sample, draw = spread(limit, self.samples, draws, self.token.device)
        found = self.g.new_zeros(len(sample), self.shape.inputs, self.shape.outputs)
        for row, (s, k) in enumerate(zip(sample.tolist(), draw.tolist(), strict=True)):
            here = self.sample == s
            found[row].index_add_(0, self.token[here], self.g[k, here])
        return found.mT.unsqueeze(0) * (self.reading.scale * (self.samples * draws / self.count) ** 0.5)

    def position_rows(self, limit: int) -> tuple[Tensor, Tensor]:
        """As ``LayerBatch.position_rows``, scaled as those of the other families."""
        if self.reading.reduce:
            return self.rows(limit)
        draws = self.g.shape[0]
        place, draw = spread(limit, len(self.token), draws, self.token.device)
        x = torch.nn.functional.one_hot(self.token[place], self.shape.inputs).to(self.g)
        factor = self.reading.scale * (len(self.token) * draws / self.count) ** 0.5
        return x.unsqueeze(0), self.g[draw, place].unsqueeze(0) * factor

    def _sample_inputs(self) -> Tensor:
        """Frequencies of the tokens of each sample [N, a]."""
        counts = self.g.new_zeros(self.samples * self.shape.inputs)
        counts.index_add_(0, self.sample * self.shape.inputs + self.token, torch.ones_like(self.g[0, :, 0]))
        return counts.view(self.samples, -1) / self.lengths.clamp(min=1)[:, None]

    def _sample_gradients(self) -> Tensor:
        """Gradients summed over the positions of each sample [K, N, o]."""
        return self.g.new_zeros(self.g.shape[0], self.samples, self.shape.outputs).index_add_(1, self.sample, self.g)


class EmbeddingLayer(CapturedLayer):
    """The weight is [vocabulary, o]: torch keeps it transposed, so that D is its gradient's transpose."""

    families = (nn.Embedding,)
    module: nn.Embedding

    @property
    def feature_dims(self) -> int:
        return 0

    @staticmethod
    def obstacle(module: nn.Module) -> str | None:
        if module.sparse:
            return "sparse gradients cannot be preconditioned"
        if module.scale_grad_by_freq:
            return "scale_grad_by_freq changes the gradient after the layer"
        return "max_norm changes the weight in the forward pass" if module.max_norm is not None else None

    def _shape(self) -> LayerShape:
        inputs, outputs = self.parameters[0].shape
        return LayerShape(1, inputs, outputs, input_structure=Diagonal())

    def matrix(self, tensors: Sequence[Tensor]) -> Tensor:
        return tensors[0].t().unsqueeze(0)

    def tensors(self, matrix: Tensor) -> list[Tensor]:
        return [matrix.squeeze(0).t()]

    def batch(self, uses: Sequence[Use], count: float, reading: Reading = Reading()) -> EmbeddingBatch:  # noqa: B008
        return EmbeddingBatch(self.shape, self.module.padding_idx, uses, count, reading)
