"""What the passes of a statistics step leave in doubt, each thing told once: guesses, and what came to nothing."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Set

from torch import Tensor

from hpc_kfac.layers import Capture
from hpc_kfac.notices import Notices

SCALED = 2.0**-10
"""A gradient shorter than this share of what the backward pass left was divided by a loss scale, or clipped hard."""


class Doubts:
    """Looks at the passes of a step on this rank.

    Args:
        capture: the hooks on the model.
        notices: gets what is to be told.
        micro_batches: forward and backward passes of a step.
        relative: damping is a share of the curvature, so that the scale of the loss has no effect.

    Attributes:
        sharded: a rank has gradients of its own layers alone.
    """

    def __init__(self, capture: Capture, notices: Notices, micro_batches: int, relative: bool) -> None:
        self._capture, self._notices, self._micro_batches, self._relative = capture, notices, micro_batches, relative
        self.sharded = False
        self.follow()
        self.start()

    def follow(self) -> None:
        """Goes on with other layers."""
        layers = self._capture.layers
        self._witness = min(layers, key=lambda name: layers[name].parameters[0].numel(), default="")

    def start(self) -> None:
        """Begins a step."""
        self._left: Tensor | None = None

    def reached(self, name: str) -> None:
        """A backward pass has completed a layer's gradient."""
        if name == self._witness:
            gradient = self._capture.layers[name].parameters[0].grad
            self._left = None if gradient is None else gradient.detach().norm()

    def tell(self, step: int, guessed: bool, folded: Set[str], discarded: bool) -> None:
        """Tells of everything that is in doubt.

        Args:
            step: its number.
            guessed: nothing was observed, so that the number of loss terms and their scale are guesses.
            folded: layers that have statistics of this step.
            discarded: backward passes of this step were discarded, because the gradient was cleared.
        """
        if discarded:
            self._put_back()
        if guessed:
            self._count()
            self._scale()
        self._time_first()
        self._nothing(step, folded)

    def overflown(self, layers: Set[str], step: int) -> None:
        """The statistics of these layers were not finite, in a step whose gradients were."""
        if layers:
            self._notices.once(
                "overflown",
                f"the statistics of {_listed(layers)} were not finite in step {step} and are left out, though the"
                " gradients were finite: the inputs or output gradients are too large for squares in the dtype of"
                " Precision(factors=...); normalise the inputs, or use float64",
            )

    def _count(self) -> None:
        sizes = self._capture.sizes
        counts = Counter(micro_batch for micro_batch, _ in sizes)
        mixed = [f"{n} in layer {name!r}" for (micro_batch, n), name in sizes.items() if counts[micro_batch] > 1]
        if mixed:
            self._notices.once(
                "count",
                "the number of loss terms of a batch was guessed from the last layer's input: the layers had inputs of"
                f" {', '.join(mixed[:4])} samples. If the loss is a mean over another number, call"
                " preconditioner.observe(outputs, count=...) before backward()",
            )
        by_micro_batch = [{n for part, n in sizes if part == micro_batch} for micro_batch in counts]
        uneven = any(found != by_micro_batch[0] for found in by_micro_batch)
        if self._micro_batches > 1 and (uneven or not self._relative):
            self._notices.once(
                "micro-batches",
                f"the losses of {self._micro_batches} micro-batches are taken as they are; if each was divided by their"
                " number, or weighted by their size, call preconditioner.observe(outputs, loss_scale=...) with that"
                f" factor, such as 1/{self._micro_batches}, before backward(): else they are weighed wrongly, and are"
                " too small against an absolute damping",
            )

    def _put_back(self) -> None:
        """Whether what was cleared may be in the gradients all the same, as where tasks are merged by hand."""
        for name, (identity, _) in self._capture.completions.items():
            gradient = self._capture.layers[name].parameters[0].grad
            if gradient is not None and id(gradient) != identity:
                self._notices.once(
                    "put back",
                    f"the gradient of layer {name!r} was cleared after a backward pass and replaced by another after"
                    " the last one: statistics are of the passes since it was cleared. If the gradient is made of"
                    " several passes, let them add up in .grad, each as one of Preconditioner(..., micro_batches=n)",
                )
                return

    def _scale(self) -> None:
        gradient = None if self._left is None else self._capture.layers[self._witness].parameters[0].grad
        if self._left is None or gradient is None:
            return
        left, now = float(self._left), float(gradient.detach().norm())
        if 0.0 < now < SCALED * left < math.inf:
            self._notices.once(
                "scale",
                f"the gradient of layer {self._witness!r} became {left / now:.3g} times shorter between backward() and"
                " step(), but nothing was observed. If a gradient scaler did that, the statistics are those of the"
                " scaled loss: call preconditioner.observe(outputs, loss_scale=scaler.get_scale()) before backward()",
            )

    def _time_first(self) -> None:
        capture = self._capture
        if capture.time_first and capture.sequences:
            self._notices.once(
                "time first",
                f"module {capture.time_first!r} takes sequences time-first ([T, N, ...], batch_first=False), but the"
                f" first dimension of an input, as that of layer {capture.sequences!r}, is taken as the sample: use"
                " batch_first=True with methods that look at single samples (ekfac, those of rows), and with all"
                " others call preconditioner.observe(outputs, count=N) before backward()",
            )

    def _nothing(self, step: int, folded: Set[str]) -> None:
        """Layers whose weight got a gradient in a backward pass, and whose output none; or no pass was seen at all."""
        capture = self._capture
        trained = [weight for weight in (x.parameters[0] for x in capture.layers.values()) if weight.requires_grad]
        gradients = self.sharded or any(weight.grad is not None for weight in trained)
        if trained and not (gradients and (capture.completions or folded)):
            seen = "have gradients, but no backward pass was seen that made them" if gradients else "have no gradient"
            self._notices.once(
                "no pass",
                f"step {step} takes statistics, and its layers {seen}: call loss.backward() before every step()"
                " (gradients that torch.autograd.grad returns leave no statistics)",
            )
        for name in capture.completions:
            if name not in folded and name not in capture.uncalled and (capture.only is None or name in capture.only):
                self._notices.once(
                    f"nothing {name}",
                    f"layer {name!r} got a gradient in step {step}, but not through the output of its module, so that"
                    " no statistics came of it (its weight is used without calling the module, or the loss has"
                    " derivatives of its output alone; or the pass ran inside a loop that was compiled as a whole, or"
                    " in a program made of the model: compile or call the model itself)",
                )


def _listed(layers: Set[str]) -> str:
    names = sorted(layers)
    return f"layer {names[0]!r}" + (f" and {len(names) - 1} more" if len(names) > 1 else "")
