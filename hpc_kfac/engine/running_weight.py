"""What running means stand for, and so how much of them is each rank's and each step's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hpc_kfac.methods.method import Over

NUMBERS = 4
"""How many numbers travel beside running means."""


@dataclass
class Weight:
    """Of one rank's running means of a layer that are reduced at the same time; decays as they do.

    A layer that no rank used in a step only ages. One that some rank used has its sums over g divided by the loss terms
    of all ranks, so that a rank which did not use it has to tell its own; whether another did shows in a reduction.

    Attributes:
        uses: positions at which the layer was used; None: unknown, taken for terms until a fold shows what a term has.
        terms: loss terms.
        idle: loss terms of steps since the last reduction in which this rank did not use the layer.
        used: this rank has used the layer since the last reduction.
    """

    uses: float | None = 0.0
    terms: float = 0.0
    idle: float = 0.0
    used: bool = False

    def of(self, over: Over) -> float:
        """The weight of means over the one or the other."""
        return self.terms if over == "terms" or self.uses is None else self.uses

    def fold(self, decay: float, uses: float, terms: float) -> dict[Over, float]:
        """Takes a step in; the weight of the old value in the means.

        Args:
            decay: of the old weight.
            uses: of this step, times the weight of the new.
            terms: of this step, likewise.
        """
        if self.uses is None:
            self.uses = self.terms * uses / terms if terms > 0 else self.terms
        old: dict[Over, float] = {"uses": decay * self.uses, "terms": decay * self.terms}
        self.uses, self.terms = old["uses"] + uses, old["terms"] + terms
        self.idle *= decay
        self.used = True
        new: dict[Over, float] = {"uses": self.uses, "terms": self.terms}
        return {over: weight / new[over] if new[over] > 0 else 1.0 for over, weight in old.items()}

    def skip(self, decay: float, terms: float) -> None:
        """Takes a step in that did not use the layer here."""
        self.uses = None if self.uses is None else decay * self.uses
        self.terms *= decay
        self.idle = decay * self.idle + terms

    def settle(self, used: bool) -> None:
        """After a reduction to all ranks, which showed whether any of them has used the layer."""
        self.terms += self.idle if used else 0.0
        self.idle, self.used = 0.0, False

    def numbers(self, there: bool) -> list[float]:
        """What a reduction sums over ranks, of means that are there on this rank or not."""
        return [self.of("uses") * there, self.terms * there, self.idle, float(self.used)]

    def saved(self) -> list[float]:
        """As plain numbers."""
        return [-1.0 if self.uses is None else self.uses, self.terms, self.idle, float(self.used)]

    @staticmethod
    def restored(saved: Sequence[float]) -> Weight:
        """What `saved` told."""
        uses, terms, idle, used = saved
        return Weight(None if uses < 0 else uses, terms, idle, used > 0)


def total(numbers: Sequence[float], over: Over) -> float:
    """What the sum over ranks of weighted means is divided by, out of summed numbers; 0 if no rank has any."""
    uses, terms, idle, used = numbers
    if over == "uses" or terms <= 0:
        return uses if over == "uses" else 0.0
    return terms + (idle if used > 0 else 0.0)


def divisors(numbers: Tensor) -> Tensor:
    """`total` over uses and over terms of many [..., NUMBERS] -> [..., 2]."""
    uses, terms, idle, used = numbers.unbind(-1)
    return torch.stack([uses, terms + idle * ((used > 0) & (terms > 0))], dim=-1)
