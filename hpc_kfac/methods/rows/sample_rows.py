"""What methods share that work with rows of the latest samples in place of moments."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from hpc_kfac.methods.kronecker.kronecker import mean_or_one
from hpc_kfac.methods.method import Method, State, StateSpec, Terms
from hpc_kfac.options.damping import Damping

if TYPE_CHECKING:
    from hpc_kfac.layers.batch import LayerBatch, LayerShape

REMEMBERED = 8
"""Statistics steps whose loss terms are kept for rows that are older."""


@dataclass(frozen=True, kw_only=True)
class SampleRows(Method):
    """Keeps X [p, n, a] and R [p, n, o] of the latest batch and gathers those of all ranks.

    Rows of all micro-batches of a step are put together; what exceeds `rows` is thinned out evenly. "valid" says for
    how many samples a row stands, "terms" how many loss terms the rank had, and "skipped" how many statistics steps
    have come since, and the loss terms of the latest of these, newest first. So the rows of the last step in which any
    rank used the layer count, and each rank by its loss terms of that step.

    Args:
        damping: added to the curvature, or a `Damping`; None for 0.1, by default of its trace. The value of the last
            refresh counts.
        decay: has no effect, rows are replaced and not averaged.
        rows: that each rank contributes; a batch with fewer leaves the rest empty.
        positions: "sum" makes one row of a sample: x averaged and g summed over its positions; "subsample" takes
            positions apart, evenly spread.
        relative_damping: damping is a share of the curvature's trace. None: only if damping is None.

    Raises:
        ValueError: a setting out of range.
    """

    damping: float | Damping | None = None
    decay: float = 0.0
    rows: int = 64
    positions: Literal["sum", "subsample"] = "sum"
    relative_damping: bool | None = None

    def __post_init__(self) -> None:
        self._default_damping()
        self._check()
        if self.rows < 1:
            raise ValueError(f"rows is {self.rows}; give at least 1 row a rank")
        if self.positions not in ("sum", "subsample"):
            raise ValueError(f"positions is {self.positions!r}; choose sum or subsample")

    def row_specs(self, shape: LayerShape) -> tuple[StateSpec, ...]:
        """X, R, the samples that each row stands for (0 for padding), the rank's loss terms, and steps without it."""
        n, since = self.rows, 1 + REMEMBERED
        sizes = {
            "X": (n, shape.inputs),
            "R": (n, shape.outputs),
            "valid": (n, 1),
            "terms": (1, 1),
            "skipped": (since, 1),
        }
        return tuple(
            StateSpec(
                name,
                (shape.blocks, *size),
                "running",
                reduce="gather",
                lives="all",
                rank_axes=(1,),
                needed=name != "skipped",
            )
            for name, size in sizes.items()
        )

    def added(self, damping: float, kernel: Tensor) -> Tensor | float:
        """The damping in the units of a kernel K = V V^T, whose trace is that of V^T V; a relative one is [p]."""
        return damping * mean_or_one(batch_trace(kernel)) if self.relative_damping else damping

    def is_damped(self, shape: LayerShape) -> bool:
        """In a plane of SENG's too, where <U, D> = <U, (F + damping) U> as well."""
        return True

    def damping_form(self, delta: Tensor, state: State, shape: LayerShape, damping: float) -> Tensor:
        return (state["kernel_damping"].to(delta.dtype) * delta.square().sum((1, 2))).sum()

    def kernel_specs(self, shape: LayerShape, sizes: Mapping[str, int]) -> tuple[StateSpec, ...]:
        """Rows of these sizes as they were at a refresh, and what is solved through their kernel."""
        p, n = shape.blocks, self.rows
        return (
            *(StateSpec(f"{name}_solved", (p, n, d), "solved", rank_axes=(1,)) for name, d in sizes.items()),
            StateSpec("kernel_inverse", (p, n, n), "solved", symmetric=True, rank_axes=(1, 2)),
            StateSpec("kernel_damping", (p,), "solved"),
        )

    def statistics(self, batch: LayerBatch, state: State, shape: LayerShape) -> State:
        return self.complete(self.collect(batch, state, shape), Terms.of(batch), state, shape)

    def collect(self, batch: LayerBatch, state: State, shape: LayerShape) -> State:
        return self.take_rows(batch, self.rows)

    def take_rows(self, batch: LayerBatch, limit: int) -> State:
        """At most so many rows of a batch, of samples or of positions; R in gradients of the sum of the loss terms."""
        inputs, outputs = (batch.rows if self.positions == "sum" else batch.position_rows)(limit)
        samples = batch.available(self.positions != "sum")
        return {"X": inputs, "R": outputs / row_scale(samples, batch.count), "samples": torch.tensor(float(samples))}

    def merge(self, merged: State, fresh: State, share: float) -> None:
        """Puts rows together."""
        self.join(merged, fresh, self.rows)

    def join(self, merged: State, fresh: State, limit: int) -> None:
        """Rows of both, in place; if they are more than the limit, as many, evenly spread over the samples of both."""
        first, second = int(merged["samples"]), int(fresh["samples"])
        for name in merged.keys() - {"samples"}:
            parts = [merged[name], fresh[name]]
            if parts[0].shape[1] + parts[1].shape[1] > limit:
                head = -(-first * limit // (first + second))  # how many of 0, 1/limit, 2/limit ... are in the first
                parts = [_thinned(part, n) for part, n in zip(parts, (head, limit - head), strict=True)]
            merged[name] = torch.cat(parts, dim=1)
        merged["samples"] = torch.tensor(float(first + second))

    def complete(self, merged: State, terms: Terms, state: State, shape: LayerShape) -> State:
        """As many rows as the state has, R scaled so that the mean of r r^T kron x x^T stands for the Fisher block."""
        found = dict(merged)
        samples = float(found.pop("samples"))
        for name in found.keys() - {"X"}:
            found[name] = found[name] * row_scale(samples, terms.all)
        return self.padded(found, samples, terms)

    def padded(self, found: State, samples: float, terms: Terms) -> State:
        """Rows [p, n, d] with zeros after them, for how many samples each stands, and the loss terms."""
        first = next(iter(found.values()))
        p, n = first.shape[:2]
        found = {**found, "valid": first.new_full((p, n, 1), samples / max(n, 1))}
        padded = {name: F.pad(rows, (0, 0, 0, self.rows - n)) for name, rows in found.items()}
        skipped = first.new_zeros((p, 1 + REMEMBERED, 1))
        return {**padded, "terms": first.new_full((p, 1, 1), terms.all), "skipped": skipped}

    def skip(self, running: State, terms: float, shape: LayerShape) -> None:
        """Older rows only count where no rank has newer ones."""
        old = running.get("skipped", torch.zeros(shape.blocks, 1 + REMEMBERED, 1))
        running["skipped"] = torch.cat([old[:, :1] + 1.0, torch.full_like(old[:, :1], terms), old[:, 1:-1]], dim=1)

    def fold(self, state: State, fresh: State, decay: float) -> None:
        """Replaces the rows."""
        state.update(fresh)


def batch_trace(matrix: Tensor) -> Tensor:
    """Trace of each of [p, n, n]."""
    return matrix.diagonal(dim1=-2, dim2=-1).sum(-1)


def input_weights(state: State) -> Tensor:
    """Weights [p, n, 1] of the rows of all ranks with which the sum of x x^T is A."""
    valid = _valid(state)
    return valid / valid.sum(1, keepdim=True).clamp_min(1.0)


def output_weights(state: State) -> Tensor:
    """Weights [p, n, 1] of the rows of all ranks with which the sum of r r^T kron x x^T is F, that of r r^T is G.

    Each rank's rows stand for its own F as a mean over its samples, of which F is the mean by loss terms.
    """
    valid = _valid(state)
    terms = rank_terms(state)
    own = valid.unflatten(1, (terms.shape[1], -1))
    share = terms / terms.sum(1, keepdim=True).clamp_min(1.0) / own.sum(2).clamp_min(1.0)
    return (own * share.unsqueeze(2)).flatten(1, 2)


def rank_terms(state: State) -> Tensor:
    """Loss terms [p, ranks, 1] of each rank in the step whose rows count; of rows saved without any, the samples."""
    valid = _valid(state)
    if "terms" not in state:
        return valid.sum(1, keepdim=True)
    terms, (steps, newest) = state["terms"].to(valid), _ages(state)
    if "skipped" in state:
        since = state["skipped"].to(valid).unflatten(1, (terms.shape[1], -1))[:, :, 1:, 0]
        then = newest.long().clamp_max(REMEMBERED - 1).expand(*steps.shape[:2], 1)
        terms = torch.where(steps == newest, terms, since.gather(2, then))
    told = terms.sum(1, keepdim=True) != 0
    return torch.where(told, terms, valid.unflatten(1, (terms.shape[1], -1)).sum(2))


def _valid(state: State) -> Tensor:
    """How many samples each row stands for [p, n, 1]; 0 for rows of another step than the last one with any."""
    valid = state["valid"].abs()  # older checkpoints have negative ones
    if "terms" not in state:
        return valid
    steps, newest = _ages(state)
    return (valid.unflatten(1, (steps.shape[1], -1)) * (steps == newest).unsqueeze(2)).flatten(1, 2)


def _ages(state: State) -> tuple[Tensor, Tensor]:
    """Of the ranks' rows, in statistics steps [p, ranks, 1], inf where a rank has none; and of the newest [p, 1, 1]."""
    own = state["valid"].abs().unflatten(1, (state["terms"].shape[1], -1)).sum(2)
    steps = torch.zeros_like(own)
    if "skipped" in state:
        steps = state["skipped"].to(own).unflatten(1, (own.shape[1], -1))[:, :, 0]
    steps = torch.where(own > 0, steps, torch.inf)
    newest = steps.amin(1, keepdim=True)
    return steps, torch.where(newest < torch.inf, newest, 0.0)


def _thinned(rows: Tensor, n: int) -> Tensor:
    """So many of the rows [p, k, d], evenly spaced."""
    return rows[:, torch.arange(n, device=rows.device) * rows.shape[1] // max(n, 1)]


def row_scale(samples: float, terms: float) -> float:
    """What gradients of the sum of the terms are multiplied with: the mean over samples is then (1/M) the sum."""
    return (samples / terms) ** 0.5 if terms > 0 else 0.0
