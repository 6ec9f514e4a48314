"""The entries of a step's plan."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from hpc_kfac.distributed.layout import Slot, in_order

Kind = Literal[
    "fold", "reduce", "scaled", "scatter", "gather", "refresh", "launch", "collect", "broadcast", "precondition",
    "share", "control",
]  # fmt: skip

WEIGHT = "weight_"
"""Slot that carries how many loss terms a rank's running averages stand for; "statistics" or "refresh" follows, since
what is reduced at the one may be there before what is reduced at the other."""
SOLVED = "solved"
"""Slot that carries whether the owner's decomposition succeeded."""
UPDATE = "update"
"""Slot that carries a preconditioned gradient."""


@dataclass(frozen=True)
class Due:
    """What a step has to do.

    Attributes:
        statistics: fold statistics into the running averages.
        starting: layers whose decomposition starts.
        landing: layers whose solved form comes into use; without a lag the same.
    """

    statistics: bool = False
    starting: tuple[str, ...] = ()
    landing: tuple[str, ...] = ()


@dataclass(frozen=True)
class Operation:
    """One entry of a plan.

    Attributes:
        kind: what is done.
        layers: the layers concerned.
        ranks: the ranks that take part.
        root: the rank whose data count (broadcast, share).
        slots: what lies in the message.
        bytes: payload of the message.
        flops: arithmetic on each taking part rank.
        part: the part of the layer (refresh, launch, collect).
    """

    kind: Kind
    layers: tuple[str, ...]
    ranks: Sequence[int]
    root: int | None = None
    slots: tuple[Slot, ...] = ()
    bytes: int = 0
    flops: float = 0.0
    part: str = ""

    @property
    def about(self) -> str:
        """The layers in words."""
        if len(self.layers) > 2:
            return f"layers {self.layers[0]} .. {self.layers[-1]}"
        return ", ".join(f"layer {name or '(the model)'}" for name in self.layers) or "step control"

    def sent(self) -> float:
        """Bytes that a rank puts on the wire with ring or tree algorithms, averaged over the ranks that take part."""
        others = (len(self.ranks) - 1) / max(len(self.ranks), 1)
        return self.bytes * others * (2.0 if self.kind in ("reduce", "scaled", "control") else 1.0)


def message(kind: Kind, slots: Sequence[Slot], ranks: Sequence[int], root: int | None = None) -> Operation:
    """The collective that carries these slots."""
    layers = tuple(dict.fromkeys(slot.layer for slot in slots))
    return Operation(kind, layers, ranks, root, in_order(slots), sum(slot.bytes for slot in slots))


def buckets(groups: Sequence[list[Slot]], limit: int) -> Iterator[list[Slot]]:
    """Groups fused into messages of up to so many bytes; one that is larger goes alone."""
    bucket: list[Slot] = []
    for group in groups:
        if bucket and sum(slot.bytes for slot in bucket + group) > limit:
            yield bucket
            bucket = []
        bucket = bucket + group
    if bucket:
        yield bucket
