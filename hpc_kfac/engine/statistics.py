"""Statistics of one optimisation step: from captured passes, micro-batch by micro-batch, into the running averages.

With the empirical Fisher a layer's statistics are computed in the backward pass, as soon as the gradient of its weight
is complete; with the others in `observe`. The last micro-batch completes the layer: its running averages can be reduced
while the backward pass goes on.
"""

from __future__ import annotations

import math
import weakref
from collections import Counter
from collections.abc import Callable, Mapping, Set

import torch
from torch import Tensor

from hpc_kfac.engine.micro_batches import Merged, StepTerms, fold
from hpc_kfac.engine.observing import aligned, check_observed, masked_terms
from hpc_kfac.engine.state import LayerState
from hpc_kfac.engine.timing import timed
from hpc_kfac.guards.doubts import Doubts
from hpc_kfac.layers import Capture, LayerBatch, LayerShape
from hpc_kfac.linalg.keyed_random import uniform
from hpc_kfac.methods.method import Method
from hpc_kfac.notices import Notices, Refused
from hpc_kfac.options.fisher import FisherSource, OutputDistribution, Uniform

UNDISTURBED = 2
"""After so many statistics steps without a discarded pass, layers are folded while the backward pass goes on."""


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
        micro_batches: forward and backward passes of an optimisation step.
        ready: called with the name of a layer whose running averages are complete for the step.
        timings: gets the seconds of statistics.
        notices: for what a user should know of the passes.

    Attributes:
        passes: micro-batches that went into the statistics of this step, by layer.
        left: layers that no rank takes statistics of in the present step.
        wanted_by: the method, if it is what chose the Fisher source.
        doubts: tells of what the passes leave in doubt.
        folds: how often statistics were folded; the first time they become the running averages.

    Raises:
        ValueError: an unknown source, or no micro-batch.
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
        micro_batches: int,
        ready: Callable[[str], None],
        timings: dict[str, float],
        notices: Notices,
    ) -> None:
        if fisher not in ("empirical", "sampled", "exact"):
            raise ValueError(f"fisher is {fisher!r}; use 'empirical', 'sampled' or 'exact'")
        if micro_batches < 1:
            raise ValueError(f"micro_batches is {micro_batches}; give the number of backward passes of a step")
        self._capture, self._method, self._shapes, self._states = capture, method, shapes, states
        self._fisher, self._seed, self._rank, self._ranks = fisher, seed, rank, ranks
        self._micro_batches, self._ready, self._timings = micro_batches, ready, timings
        self._notices = notices
        self.doubts = Doubts(capture, notices, micro_batches, getattr(method, "relative_damping", None) is True)
        self.folds = 0
        self.left: frozenset[str] = frozenset()
        self.wanted_by = ""
        self._undisturbed = 0.0
        capture.keep_output_gradients = fisher == "empirical"
        capture.on_boundary = self._next_micro_batch
        capture.on_gradient = self._reached
        capture.on_discard = self._discard
        self.start(0, armed=False)

    def follow(self, shapes: Mapping[str, LayerShape]) -> None:
        """Goes on with other layers, between two steps."""
        self._shapes = shapes
        self.doubts.follow()

    def start(self, step: int, armed: bool) -> None:
        """Begins an optimisation step; nothing is captured unless `armed`."""
        self._capture.clear()
        self._capture.armed = armed
        self._step = step
        self._merged: dict[str, Merged] = {}
        self._terms = StepTerms()
        self._folded: set[str] = set()
        self._observed: tuple[float | None, float | None, Tensor | None] = (None, None, None)
        self.passes: Counter[str] = Counter()
        self._observations = 0
        self._last: weakref.ref[Tensor] | None = None  # outputs that were observed
        self._discarded = False  # some pass of this step
        self._overflown: set[str] = set()
        self._guessed = False  # the number of loss terms
        self.doubts.start()
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
        sampled = self._fisher != "empirical" and not self._capture.paused
        check_observed(outputs, loss, count, mask, loss_scale, sample_index, sampled)
        if self._capture.backward_seen:
            raise Refused(
                "observe() was called after loss.backward(), which has taken the statistics already; call it between"
                " forward pass and backward(): outputs = model(x); preconditioner.observe(outputs); loss.backward()"
            )
        terms = float(masked_terms(mask, outputs, loss) if count is None else count)
        mask = loss.mask(outputs) if mask is None else mask
        if terms > 0 and not loss_scale > 0:  # a micro-batch without a valid term has a share of 0
            raise ValueError(f"loss_scale is {loss_scale} with {terms:g} loss terms; give a positive number")
        self._forget_unfinished(outputs)
        if self._fisher == "empirical":
            reduction = terms if loss.reduction == "mean" else 1.0
            self._observed = (terms, reduction / loss_scale if terms > 0 else 0.0, mask)
            self._terms.note(self._pass, terms)
        else:
            self._observations += 1
            self._terms.note(self._observations, terms)
            with timed(self._timings, "statistics"):
                self._derive(outputs, loss, terms, mask, sample_index)
            if self._observations == self._micro_batches and self._undisturbed >= UNDISTURBED:
                for name in [name for name in reversed(tuple(self._states)) if name in self._merged]:
                    self._complete(name)

    def _forget_unfinished(self, outputs: Tensor) -> None:
        """Passes that were observed and are no part of the gradient: it was cleared, or their outputs were dropped."""
        self._capture.discard_cleared()
        if self._observations and not self._capture.completions and self._last is not None and self._last() is None:
            self._discard(set(self.passes))
        self._last = weakref.ref(outputs)

    def finish_passes(self) -> None:
        """Takes what is left of the step's passes. Before anything else of the step, because it refuses.

        Raises:
            RuntimeError: more passes than `micro_batches`.
            Refused: no `observe` in a step with a backward pass, where the Fisher needs it.
        """
        if self._fisher == "empirical":
            for name in self._states:
                self._collect(name)
        elif self._capture.completions and not self._observations:
            why = f", which {self.wanted_by} wants," if self.wanted_by else ""
            raise Refused(
                f"fisher={self._fisher!r}{why} takes its statistics in observe(), and step {self._step} had none: call"
                " preconditioner.observe(outputs, loss=...) between the forward pass and loss.backward(), or use"
                " fisher='empirical'"
            )
        self._check_passes()
        self.doubts.tell(self._step, self._guessed, self.passes.keys(), self._discarded)

    def fold(self) -> None:
        """Folds what is left of the step's statistics; layers that were not used only age."""
        self._undisturbed += 1
        for name in self._states:
            if name not in self._folded:
                self._fold(name)

    def finish(self, applied: bool) -> None:
        """Ends a step with statistics. If the first one of all came to nothing, the next one is the first again."""
        if applied:
            self.doubts.overflown(self._overflown, self._step)
        if applied or self.folds:
            self.folds += 1
            return
        for state in self._states.values():
            state.running.clear()
            state.weights = LayerState().weights
            state.local = False

    def _next_micro_batch(self) -> None:
        if self._fisher == "empirical":
            for name in self._states:
                self._collect(name)
            self._observed = (None, None, None)

    def _discard(self, names: Set[str]) -> None:
        """The gradients that these layers had so far were cleared: so is what was taken with them."""
        self._undisturbed, self._discarded = -math.inf, True
        for name in names:
            self._merged.pop(name, None)
            self.passes.pop(name, None)
            self._terms.discard(name)
        if not self._capture.completions:  # the step begins anew
            self._observations = self._sampled = 0
            self._terms = StepTerms()
        late = [name for name in names if name in self._folded]
        if late:
            self._notices.once(
                "discarded pass",
                f"step {self._step}: the statistics of {len(late)} layer(s), {late[0]!r} among them, have taken in a"
                " backward pass whose gradient was cleared before the step; from now on such passes are left out. Put"
                " passes that are no part of a step into `with preconditioner.paused():`",
            )

    def _reached(self, name: str) -> None:
        """A backward pass has completed the layer's weight gradient."""
        if self._observed[0] is None:
            self.doubts.reached(name)
        if self._fisher == "empirical":
            self._collect(name)
            whole = self.passes[name] == self._micro_batches
            if whole and self._undisturbed >= UNDISTURBED and name not in self._folded:
                self._complete(name)

    def _collect(self, name: str) -> None:
        with timed(self._timings, "statistics"):
            batch = self._capture.take(name, *self._observed)
            if batch is not None:
                self._guessed |= self._observed[0] is None
                self._accumulate(name, batch)

    def _check_passes(self) -> None:
        passes = max([*self.passes.values(), self._observations])
        if passes > self._micro_batches:
            raise RuntimeError(
                f"the step has {passes} forward and backward passes, and the preconditioner was told of"
                f" {self._micro_batches}: use Preconditioner(..., micro_batches={passes}), or put passes that are no"
                " part of the step into `with preconditioner.paused():`"
            )

    def _complete(self, name: str) -> None:
        with timed(self._timings, "statistics"):
            self._fold(name)
        self._ready(name)

    def _fold(self, name: str) -> None:
        """Folds a layer's statistics into its running averages, which stay weighted by what they are means over."""
        decay, missed = self._method.decay, self._micro_batches - self.passes[name]
        terms = 0.0 if name in self.left and not self.passes[name] else self._terms.of(name, missed)
        merged, state = self._merged.pop(name, Merged()), self._states[name]
        share = 1.0 - decay if self.folds else 1.0
        if not fold(self._method, self._shapes[name], state, merged, terms, self._ranks, decay, share):
            self._overflown.add(name)
        self._folded.add(name)

    def _derive(
        self, outputs: Tensor, loss: OutputDistribution, terms: float, mask: Tensor | None, sample_index: Tensor | None
    ) -> None:
        """Derivatives of the model's own distribution towards every layer's output, beside the training gradient."""
        pairs = self._capture.edges(outputs)
        if not pairs:
            return
        exact = self._fisher == "exact"
        if exact:
            seeds = loss.root(outputs.detach())
        else:
            seeds = loss.sample_gradient(outputs.detach(), self._label_source(outputs, sample_index))
        shaped = None if mask is None else aligned(mask, outputs, loss)
        if shaped is not None:
            seeds = seeds * shaped.to(seeds.dtype)
        elif not terms:
            seeds = torch.zeros_like(seeds)
        edges = [edge for _, edge in pairs]
        gradients = torch.autograd.grad(
            outputs, edges, grad_outputs=seeds, retain_graph=True, allow_unused=True, is_grads_batched=exact
        )
        by_use = {use: gradient for (use, _), gradient in zip(pairs, gradients, strict=True)}
        for name, batch in self._capture.take_gradients(by_use, count=terms, draws=exact, mask=mask).items():
            self._accumulate(name, batch)

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

    @property
    def _pass(self) -> int:
        """Number of the present micro-batch."""
        return self._capture.micro_batch if self._fisher == "empirical" else self._observations

    @torch.no_grad()
    def _accumulate(self, name: str, batch: LayerBatch) -> None:
        """Statistics of one micro-batch, merged with those of the earlier ones of this step."""
        self.passes[name] += 1
        self._terms.use(name, self._pass, max(batch.count, 0.0))
        if batch.count < 0:
            return
        batch.ranks = self._ranks
        merged = self._merged.setdefault(name, Merged())
        if not merged.add(self._method, batch, self._states[name], self._shapes[name]):
            self._overflown.add(name)  # as a gradient scaler meets it now and then
