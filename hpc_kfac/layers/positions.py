"""Statistics of layers with one input row and one output gradient at every position: Linear and convolutions."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, reduce

import torch
import torch.nn.functional as F
from torch import Tensor

from hpc_kfac.layers.batch import LayerShape, Reading, Use
from hpc_kfac.linalg.structure import Dense, Structure

# Elements of the largest temporary (patches, per-sample gradients): 16 MiB in float32.
CHUNK = 1 << 22
ROUNDING = 64.0
"""Rounding errors that a sum over a batch may be off by."""


@dataclass
class Part:
    """One use, with the sample axis made explicit.

    Attributes:
        x: input, samples first.
        g: gradient of the output as it was captured: draws, samples, ...
        keep: [samples, positions] True at the positions that count; None when all do.
        positions: number of positions of one sample.
    """

    x: Tensor
    g: Tensor
    keep: Tensor | None
    positions: int

    @property
    def samples(self) -> int:
        return self.x.shape[0]

    def kept(self) -> Tensor:
        """Positions of each sample that count [samples]."""
        if self.keep is not None:
            return self.keep.sum(1)
        return torch.full((self.samples,), self.positions, device=self.x.device)

    def all_kept(self) -> int:
        """Positions of all samples that count; without a mask no device is asked."""
        return self.samples * self.positions if self.keep is None else int(self.keep.sum())


class PositionBatch(ABC):
    """A ``LayerBatch`` for a family that knows its input and gradient rows; it overrides what it does faster."""

    ranks = 1

    def __init__(self, shape: LayerShape, uses: Sequence[Use], count: float, reading: Reading) -> None:
        self.shape, self.count = shape, count
        self.scale, self.draws, self.reduce, self.dtype = reading.scale, reading.draws, reading.reduce, reading.dtype
        self.row_dtype: torch.dtype = reading.rows or reading.dtype
        # Uses of one micro-batch with equally many samples share them; their positions are added up.
        groups: dict[tuple[int, int], list[Part]] = {}
        for use in uses:
            assert use.gradient is not None
            gradient = use.gradient if reading.draws else use.gradient.unsqueeze(0)
            part = self.part(use.inputs, gradient, reading.mask)
            groups.setdefault((use.micro_batch, part.samples), []).append(part)
        self.groups = list(groups.values())

    @abstractmethod
    def part(self, x: Tensor, g: Tensor, mask: Tensor | None) -> Part:
        """Bring one use's input and gradients [draws, ...] into the family's layout."""

    @abstractmethod
    def inputs(self, part: Part, which: slice | Tensor) -> Tensor:
        """Input rows of some samples [p, n, T, a] in the statistics dtype, zeros where masked."""

    @abstractmethod
    def gradients(self, part: Part, which: slice | Tensor) -> Tensor:
        """Unscaled gradient rows of some samples [p, K, n, T, o] in the statistics dtype, zeros where masked."""

    @cached_property
    def input_rows(self) -> float:
        """As in ``LayerBatch``."""
        if self.reduce:
            return float(sum(int((_kept(group) > 0).sum()) for group in self.groups))
        return float(sum(part.all_kept() for part in self._parts()))

    def input_moment(self, structure: Structure) -> Tensor:
        if self.reduce:
            rows = torch.cat([self._sample_inputs(group, slice(None)) for group in self.groups], dim=1)
            return self.gram(rows, structure) / max(self.input_rows, 1.0)
        total: Tensor | float = 0.0
        for part in self._parts():
            total = total + self.input_gram(part, structure)
        return torch.as_tensor(total) / self._positions()

    def input_gram(self, part: Part, structure: Structure) -> Tensor:
        """Sum of x x^T over the samples and positions of one use."""
        total: Tensor | float = 0.0
        for which in self._input_chunks(part):
            total = total + self.gram(self.inputs(part, which).flatten(1, 2), structure)
        return torch.as_tensor(total)

    def gram(self, rows: Tensor, structure: Structure) -> Tensor:
        """Sum of r r^T over rows [p, n, d]; dense products take rows in the dtype for rows, and none other does."""
        return structure.gram(rows.to(self.row_dtype) if isinstance(structure, Dense) else rows).to(self.dtype)

    def output_moment(self, structure: Structure) -> Tensor:
        if self.reduce:
            rows = [self._sample_gradients(group, slice(None)).flatten(1, 2) for group in self.groups]
        else:
            rows = [self.gradients(part, slice(None)).flatten(1, 3) for part in self._parts()]
        return torch.stack([self.gram(some, structure) for some in rows]).sum(0) * (self.scale**2 / self.count)

    def means(self) -> tuple[Tensor, Tensor]:
        refuse_draws(self.draws)
        g = reduce(torch.add, [self.output_sum(part) for part in self._parts()])
        return self.input_mean(), self._cleared(g) * (self.scale / self.count)

    def input_mean(self) -> Tensor:
        if self.reduce:
            rows = torch.cat([self._sample_inputs(group, slice(None)) for group in self.groups], dim=1)
            return rows.sum(1) / max(self.input_rows, 1.0)
        return reduce(torch.add, [self.input_sum(part) for part in self._parts()]) / self._positions()

    def input_sum(self, part: Part) -> Tensor:
        """Sum of the input rows over samples and positions [p, a]."""
        return torch.stack([self.inputs(part, which).sum((1, 2)) for which in self._input_chunks(part)]).sum(0)

    def with_bias(self, sums: Tensor, part: Part) -> Tensor:
        """Sums over samples and positions, to which a bias adds a column: their number."""
        return F.pad(sums, (0, 1), value=float(part.all_kept())) if self.shape.bias else sums

    def output_sum(self, part: Part) -> Tensor:
        """Sum of the unscaled gradient rows over draws, samples and positions [p, o]."""
        return self.gradients(part, slice(None)).sum((1, 2, 3))

    def _cleared(self, sums: Tensor) -> Tensor:
        """A block's sum of gradient rows [p, o], zeros where it is but rounding.

        The gradients of what a batch norm follows sum to zero, and what rounding leaves of that is no direction.
        """
        parts = list(self._parts())
        norms = [torch.linalg.vector_norm(self.gradients(part, slice(None)), dim=(1, 2, 3, 4)) for part in parts]
        norm = torch.stack(norms).square().sum(0).sqrt()
        rows = max(sum(part.all_kept() for part in parts), 1)
        # Sums of rounding errors: those of the sum and of the norm's own means, and of rows that were rounded apart.
        own = max(torch.finfo(part.g.dtype).eps for part in parts)
        least = max(ROUNDING * torch.finfo(sums.dtype).eps * rows**0.5, 2.0 * own) * norm
        length = torch.linalg.vector_norm(sums, dim=1)
        return torch.where((length > least) | ~torch.isfinite(norm), 1.0, 0.0).to(sums.dtype).unsqueeze(1) * sums

    def paired_moments(
        self,
        output_form: Tensor | None,
        input_form: Tensor | None,
        output_structure: Structure,
        input_structure: Structure,
    ) -> tuple[Tensor, Tensor]:
        totals: list[Tensor | float] = [0.0, 0.0]
        for x, g in self._pairs():
            by_x = quadratic_form(x, input_form, input_structure).unsqueeze(1)
            by_g = quadratic_form(g, output_form, output_structure).sum(1)
            totals[0] = totals[0] + weighted_gram(x.flatten(1, 2), by_g.flatten(1), input_structure)
            weights = by_x.expand(g.shape[:-1]).flatten(1)
            totals[1] = totals[1] + weighted_gram(g.flatten(1, 3), weights, output_structure)
        factor = self.scale**2 / self.count
        return torch.as_tensor(totals[0]) * factor, torch.as_tensor(totals[1]) * factor

    def mean_gradient(self) -> Tensor:
        refuse_draws(self.draws)
        total = sum(g[:, 0].flatten(1, 2).mT @ x.flatten(1, 2) for x, g in self._pairs())
        return torch.as_tensor(total) * (self.scale / self.count)

    def _pairs(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Input rows [p, n, T, a] and their gradients [p, K, n, T, o], some samples at a time."""
        for group in self.groups:
            draws = group[0].g.shape[0]
            width = self.shape.blocks * (self.shape.inputs + draws * self.shape.outputs)
            for which in self._chunks(group[0].samples, width * max(part.positions for part in group)):
                if self.reduce:
                    x, g = self._sample_inputs(group, which), self._sample_gradients(group, which)
                    yield x.unsqueeze(2), g.unsqueeze(3)
                else:
                    for part in group:
                        yield self.inputs(part, which), self.gradients(part, which)

    def projected_square(
        self,
        output_basis: Tensor | None,
        input_basis: Tensor | None,
        output_structure: Structure,
        input_structure: Structure,
    ) -> Tensor:
        def rotate(rows: Tensor, structure: Structure, basis: Tensor | None) -> Tensor:
            """The last axis of [p, ..., d] into the basis."""
            if basis is None:
                return rows
            return structure.rotate_right(rows.flatten(1, -2), basis).view_as(rows)

        p, o, a = self.shape.blocks, self.shape.outputs, self.shape.inputs
        total: Tensor | float = 0.0
        for x, g in self._pairs() if self.reduce else ():
            x, g = rotate(x, input_structure, input_basis), rotate(g, output_structure, output_basis)
            total = total + g.square().sum(1).squeeze(2).transpose(1, 2) @ x.square().squeeze(2)
        for group in () if self.reduce else self.groups:
            positions = sum(part.positions for part in group)
            single = positions == 1
            # Rotating rows costs T (a^2 + o^2) a sample, rotating per-sample gradients o a (a + o).
            rows_first = single or positions * (a * a + o * o) <= o * a * (a + o)
            draws = group[0].g.shape[0]
            elements = p * max(positions * (a + draws * o), 0 if single else draws * o * a)
            for which in self._chunks(group[0].samples, elements):
                gradient: Tensor | float = 0.0
                for part in group:
                    x, g = self.inputs(part, which), self.gradients(part, which)
                    if rows_first:
                        x, g = rotate(x, input_structure, input_basis), rotate(g, output_structure, output_basis)
                    if single:
                        squares = g.square().sum(1).squeeze(2)
                        total = total + squares.transpose(1, 2) @ x.square().squeeze(2)
                    else:
                        gradient = gradient + g.transpose(3, 4) @ x.unsqueeze(1)
                if isinstance(gradient, Tensor):
                    if not rows_first:
                        gradient = rotate(gradient, input_structure, input_basis)
                        gradient = rotate(gradient.transpose(3, 4).contiguous(), output_structure, output_basis)
                        gradient = gradient.transpose(3, 4)
                    total = total + gradient.square().sum((1, 2))
        return torch.as_tensor(total) * (self.scale**2 / self.count)

    def rows(self, limit: int) -> tuple[Tensor, Tensor]:
        """As ``LayerBatch.rows``.

        R is scaled so that the mean over rows of r r^T kron x x^T stands for (1/M) times its sum over all samples and
        draws: nothing changes where there is one loss term a sample and one draw.
        """
        draws = self.groups[0][0].g.shape[0]
        sizes = [len(samples) for samples in self._samples]
        sample, draw = spread(limit, sum(sizes), draws, self.groups[0][0].x.device)
        xs, gs, start = [], [], 0
        for group, samples, size in zip(self.groups, self._samples, sizes, strict=True):
            chosen = (sample >= start) & (sample < start + size)
            which = samples[sample[chosen] - start]
            xs.append(self._sample_inputs(group, which))
            gradients = self._sample_gradients(group, which)
            gs.append(gradients[:, draw[chosen], torch.arange(len(which), device=which.device)])
            start += size
        factor = self.scale * (sum(sizes) * draws / self.count) ** 0.5
        return torch.cat(xs, dim=1), torch.cat(gs, dim=1) * factor

    def available(self, positions: bool) -> int:
        """As ``LayerBatch.available``."""
        draws = self.groups[0][0].g.shape[0]
        if positions and not self.reduce:
            return draws * sum(len(places) for places in self._places)
        return draws * sum(len(samples) for samples in self._samples)

    @cached_property
    def _samples(self) -> list[Tensor]:
        """Of each group the samples that count; all if none does."""

        def masked(group: list[Part]) -> bool:
            return any(part.keep is not None for part in group)

        return [
            _counting(group[0].samples, _kept(group) > 0 if masked(group) else None, group[0].x.device)
            for group in self.groups
        ]

    @cached_property
    def _places(self) -> list[Tensor]:
        """Of each use the places, sample * positions + position, that count."""
        return [_counting(part.samples * part.positions, part.keep, part.x.device) for part in self._parts()]

    def sample_gradients(self, limit: int) -> Tensor:
        """As ``LayerBatch.sample_gradients``: sums over positions, exact where weights are shared."""
        if self.reduce:
            x, r = self.rows(limit)
            return r.unsqueeze(3) * x.unsqueeze(2)
        draws, sizes = self.groups[0][0].g.shape[0], [len(samples) for samples in self._samples]
        sample, draw = spread(limit, sum(sizes), draws, self.groups[0][0].x.device)
        found, start = [], 0
        for group, samples, size in zip(self.groups, self._samples, sizes, strict=True):
            chosen = (sample >= start) & (sample < start + size)
            which, row = samples[sample[chosen] - start], torch.arange(int(chosen.sum()), device=sample.device)
            terms = [self.gradients(part, which)[:, draw[chosen], row].mT @ self.inputs(part, which) for part in group]
            found.append(torch.stack(terms).sum(0))
            start += size
        return torch.cat(found, dim=1) * (self.scale * (sum(sizes) * draws / self.count) ** 0.5)

    def position_rows(self, limit: int) -> tuple[Tensor, Tensor]:
        """As ``LayerBatch.position_rows``, R scaled so that the mean of r r^T stands for G."""
        if self.reduce:
            return self.rows(limit)
        parts = self._parts()
        draws, sizes = parts[0].g.shape[0], [len(places) for places in self._places]
        place, draw = spread(limit, sum(sizes), draws, parts[0].x.device)
        xs, gs, start = [], [], 0
        for part, places, size in zip(parts, self._places, sizes, strict=True):
            chosen = (place >= start) & (place < start + size)
            which = places[place[chosen] - start]
            sample, position = which // max(part.positions, 1), which % max(part.positions, 1)
            row = torch.arange(len(which), device=which.device)
            xs.append(self.inputs(part, sample)[:, row, position])
            gs.append(self.gradients(part, sample)[:, draw[chosen], row, position])
            start += size
        factor = self.scale * (sum(sizes) * draws / self.count) ** 0.5
        return torch.cat(xs, dim=1), torch.cat(gs, dim=1) * factor

    def _parts(self) -> list[Part]:
        return [part for group in self.groups for part in group]

    def _positions(self) -> int:
        return max(sum(part.all_kept() for part in self._parts()), 1)

    def _sample_inputs(self, group: list[Part], which: slice | Tensor) -> Tensor:
        """Input rows averaged over the positions of each sample [p, n, a]."""
        kept = _kept(group)[which].clamp(min=1)
        sums = []
        for part in group:
            index = torch.arange(part.samples, device=part.x.device)[which]
            chunks = self._chunks(len(index), self.shape.blocks * part.positions * self.shape.inputs)
            sums.append(torch.cat([self.inputs(part, index[chunk]).sum(2) for chunk in chunks], dim=1))
        return torch.stack(sums).sum(0) / kept[:, None]

    def _sample_gradients(self, group: list[Part], which: slice | Tensor) -> Tensor:
        """Gradient rows summed over the positions of each sample [p, K, n, o], unscaled."""
        return torch.stack([self.gradients(part, which).sum(3) for part in group]).sum(0)

    def _input_chunks(self, part: Part) -> Iterator[slice]:
        return self._chunks(part.samples, self.shape.blocks * part.positions * self.shape.inputs)

    @staticmethod
    def _chunks(samples: int, elements: int) -> Iterator[slice]:
        """Slices of samples whose temporaries, ``elements`` a sample, stay near ``CHUNK``."""
        step = max(1, CHUNK // max(elements, 1))
        for start in range(0, max(samples, 1), step):
            yield slice(start, start + step)


def spread(limit: int, samples: int, draws: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """At most ``limit`` different (sample, draw) pairs, spread evenly over the samples and over the draws."""
    n = min(limit, samples * draws)
    pair = torch.arange(n, device=device) * (samples * draws) // max(n, 1)
    sample = pair // draws
    return sample, (pair + sample) % draws


def quadratic_form(rows: Tensor, form: Tensor | None, structure: Structure) -> Tensor:
    """r^T W r of each row [p, ..., d] -> [p, ...]; None is the identity."""
    if form is None:
        return rows.square().sum(-1)
    flat = rows.flatten(1, -2)
    return (flat * structure.right(flat, form.to(rows.dtype))).sum(-1).view(rows.shape[:-1])


def weighted_gram(rows: Tensor, weights: Tensor, structure: Structure) -> Tensor:
    """Sum of w r r^T over rows [p, n, d] and weights [p, n] of any sign."""
    total = structure.gram(rows * weights.clamp(min=0).sqrt().unsqueeze(-1))
    if bool((weights < 0).any()):
        total = total - structure.gram(rows * weights.neg().clamp(min=0).sqrt().unsqueeze(-1))
    return total.to(rows.dtype)


def refuse_draws(draws: bool) -> None:
    if draws:
        raise ValueError("the exact Fisher has no mean output gradient; use fisher='empirical' or 'sampled'")


def _kept(group: list[Part]) -> Tensor:
    return torch.stack([part.kept() for part in group]).sum(0)


def _counting(number: int, keep: Tensor | None, device: torch.device) -> Tensor:
    """Indices of what counts; of all where nothing does."""
    kept = None if keep is None else keep.flatten().nonzero().squeeze(1)
    return torch.arange(number, device=device) if kept is None or not len(kept) else kept
