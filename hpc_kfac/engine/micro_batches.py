"""A layer's statistics of one optimisation step, from its micro-batches into the running averages."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from hpc_kfac.engine.state import LayerState
from hpc_kfac.layers.batch import LayerBatch, LayerShape
from hpc_kfac.linalg.solve import is_finite
from hpc_kfac.methods.method import Method, Over, State, StateSpec, Terms


@dataclass
class Merged:
    """What was collected of the micro-batches that used a layer.

    Attributes:
        state: as `Method.merge` left it.
        weights: uses and loss terms that it stands for.
        lost: loss terms of micro-batches whose statistics were not finite.
    """

    state: State = field(default_factory=dict)
    weights: dict[Over, float] = field(default_factory=lambda: {"uses": 0.0, "terms": 0.0})
    lost: float = 0.0

    def add(self, method: Method, batch: LayerBatch, state: LayerState, shape: LayerShape) -> bool:
        """Takes one more micro-batch in, unless it has overflown; whether it did.

        One without loss terms, whose gradients are zeros, counts where means are over uses.
        """
        if not (batch.count or batch.input_rows):
            return True
        count, batch.count = batch.count, batch.count or 1.0  # sums of zeros are divided by it
        fresh = method.collect(batch, state.view(), shape)
        if not all(is_finite(tensor) for tensor in fresh.values()):
            self.lost += count
            return False
        counts: dict[Over, float] = {"uses": batch.input_rows, "terms": count}
        if self.state:
            self._merge(method, fresh, counts, shape)
        else:
            self.state = fresh
        for over, more in counts.items():
            self.weights[over] += more
        return True

    def _merge(self, method: Method, fresh: State, counts: dict[Over, float], shape: LayerShape) -> None:
        over = {spec.name: spec.over for spec in method.state(shape)}
        for kind, count in counts.items():
            part = {name: tensor for name, tensor in fresh.items() if over.get(name, "terms") == kind}
            if part:
                method.merge(self.state, part, count / (self.weights[kind] + count) if count > 0 else 0.0)


class StepTerms:
    """Loss terms of one step's micro-batches on this rank, and of those that used each layer."""

    def __init__(self) -> None:
        self._all: dict[int, float] = {}
        self._used: dict[str, dict[int, float]] = {}

    def note(self, number: int, terms: float) -> None:
        """A micro-batch has so many."""
        self._all[number] = terms

    def use(self, layer: str, number: int, terms: float) -> None:
        """A micro-batch has used the layer."""
        self.note(number, terms)
        self._used.setdefault(layer, {})[number] = terms

    def discard(self, layer: str) -> None:
        """What the layer was used in so far is no part of the step."""
        self._used.pop(layer, None)

    def of(self, layer: str, missing: int) -> float:
        """Terms of the step as a layer counts them, when so many of its micro-batches did not use it.

        Passes of other layers may be there too (a generator's beside a discriminator's): only the missing count.
        """
        used = self._used.get(layer, {})
        others = [terms for number, terms in self._all.items() if number not in used]
        extra = sum(others) * min(1.0, missing / len(others)) if others and missing > 0 else 0.0
        return sum(used.values()) + extra


def fold(
    method: Method,
    shape: LayerShape,
    state: LayerState,
    merged: Merged,
    terms: float,
    ranks: int,
    decay: float,
    share: float,
) -> bool:
    """Folds a step's statistics into a layer's running averages, or lets them age.

    Statistics that cannot be completed, or are not finite then, are left out.

    Args:
        method: says how.
        shape: of the layer.
        state: changed.
        merged: what the step's micro-batches came to.
        terms: loss terms of all of the step's micro-batches on this rank.
        ranks: that take statistics.
        decay: of what there is.
        share: of the fresh statistics.

    Returns:
        False if they were left out.
    """
    found: State | None = {}
    everything = terms - merged.lost
    if merged.state:
        used = merged.weights["terms"]
        found = _completed(method, merged.state, Terms(used, everything, ranks), state, shape)
        everything -= used if found is None else 0.0
    state.local = True
    if not found:
        for weight in state.weights.values():
            weight.skip(decay, share * everything)
        if ranks > 1:  # also one without any term: its older rows are those of another step
            method.skip(state.running, everything, shape)
        return found is not None
    specs = {spec.name: spec for spec in method.state(shape)}
    for at, weight in state.weights.items():
        kept = weight.fold(decay, share * merged.weights["uses"], share * everything)
        for over, ratio in kept.items():
            part = {name: value for name, value in found.items() if _weighed(specs[name], at, over)}
            if part:
                method.fold(state.running, part, ratio)
    return True


def _completed(method: Method, merged: State, terms: Terms, state: LayerState, shape: LayerShape) -> State | None:
    """The statistics of a step; None if they cannot be worked out, or are not finite."""
    collected = dict(merged)
    try:
        found = method.complete(merged, terms, state.view(), shape)
    except torch.linalg.LinAlgError:
        return None
    made = [value for name, value in found.items() if value is not collected.get(name)]
    return found if all(map(is_finite, made)) else None


def _weighed(spec: StateSpec, at: str, over: Over) -> bool:
    return (spec.reduce_at, spec.over) == (at, over)
