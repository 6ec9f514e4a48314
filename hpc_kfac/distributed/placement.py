"""Which rank decomposes a layer, which ranks precondition it, and which receive the result: a pure function.

KAISA's grid (Pauloski et al. 2021): p ranks form p/m groups of m grad workers. A layer belongs to one group; its
owner, one rank of the group, decomposes the factors and broadcasts the solved form inside the group; worker j of the
group then sends the preconditioned gradient to the ranks that hold place j in the other groups. m = p is COMM-OPT
(every rank preconditions, no traffic on an ordinary step), m = 1 is MEM-OPT (solved forms exist once).

What is decomposed in one go is a unit: a layer, or one of the parts of a layer that a method can decompose apart.
"""

from __future__ import annotations

import heapq
import math
from collections import defaultdict
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import cycle
from typing import Literal, TypeVar

Unit = tuple[str, str]
"""Layer name and part; the part is "" where a method decomposes the whole layer at once."""

Thing = TypeVar("Thing", bound=Hashable)


@dataclass(frozen=True)
class UnitCost:
    """What the refresh of a unit takes.

    Args:
        refresh: floating-point operations of its decomposition.
        bytes: payload of the broadcast of its solved form.
        by_all: every rank that needs the solved form makes it, whatever the rates.
    """

    refresh: float
    bytes: int = 0
    by_all: bool = False


@dataclass(frozen=True)
class Rates:
    """What a machine does, to tell a decomposition that is faster than a broadcast of its result.

    Args:
        flops: floating-point operations per second of a decomposition.
        latency: seconds that a broadcast of nothing takes.
        bandwidth: bytes per second of a broadcast.

    Raises:
        ValueError: a rate that is not positive, or a negative latency.
    """

    flops: float
    latency: float
    bandwidth: float

    def __post_init__(self) -> None:
        for name in ("flops", "bandwidth"):
            value = getattr(self, name)
            if not (value > 0 and math.isfinite(value)):
                raise ValueError(f"all_local.{name} is {value}; give a positive number per second")
        if not (self.latency >= 0 and math.isfinite(self.latency)):
            raise ValueError(f"all_local.latency is {self.latency}; give seconds, 0 or more")

    def computes_faster(self, cost: UnitCost) -> bool:
        """Whether decomposing the unit takes less time than its broadcast."""
        return cost.refresh / self.flops < self.latency + cost.bytes / self.bandwidth


@dataclass(frozen=True)
class Assignment:
    """A placement worked out for given layers and ranks.

    Attributes:
        ranks: number of ranks p, helpers included.
        workers: grad workers per layer, m; a divisor of `trainers`.
        owner: layer name -> rank that answers for it; its group preconditions the layer.
        solvers: unit -> ranks that decompose it: one, which broadcasts, or every rank that needs the result, where
            nobody sends.
        factors: where averaged factors exist, as in `Kaisa`.
        helpers: so many of the last ranks decompose and do nothing else.
    """

    ranks: int
    workers: int
    owner: Mapping[str, int]
    solvers: Mapping[Unit, tuple[int, ...]]
    factors: Literal["all", "owner", "local"] = "all"
    helpers: int = 0

    @property
    def trainers(self) -> int:
        """Number of ranks that train: all but the helpers."""
        return self.ranks - self.helpers

    def group(self, rank: int) -> int:
        """The worker group that a rank belongs to; for a helper a number that no trainer has."""
        return rank // self.workers

    def members(self, group: int) -> range:
        """The ranks of a worker group."""
        return range(group * self.workers, (group + 1) * self.workers)

    def receivers(self, rank: int) -> range:
        """The ranks that exchange preconditioned gradients with `rank`, itself included; none for a helper."""
        return range(rank % self.workers if rank < self.trainers else self.trainers, self.trainers, self.workers)

    def works_on(self, rank: int, layer: str) -> bool:
        """Whether the rank preconditions the layer."""
        return self.group(rank) == self.group(self.owner[layer])


@dataclass(frozen=True)
class Kaisa:
    """KAISA's placement with longest-processing-time balance of the decompositions.

    Args:
        grad_worker_fraction: share of the ranks that precondition a layer: 1 (COMM-OPT), 1/p or 0 (MEM-OPT: one rank),
            or between; fraction times p must be a divisor of p. None is 0, and 1 where helpers, all_local or factors
            apart are of use only to several, or where a method's solved forms are never sent.
        colocate: false lets different ranks of a group decompose the factors of one layer.
        factors: "all" averages running factors over all ranks; "owner" reduces them to the layer's owner alone, so
            that they exist once; "local" takes the owner's samples only, without factor traffic (Zhang et al. 2022).
        helpers: so many of the ranks decompose and do nothing else (Ba et al. 2017).
        all_local: rates of the machine, or "measured"; what it decomposes faster than it broadcasts is then decomposed
            by every grad worker (Shi et al. 2021).
        costs: "declared" balances by the method's formulas, "measured" by a trial of every size before training.

    Raises:
        ValueError: a value out of its range, or settings that exclude each other.
    """

    grad_worker_fraction: float | None = None
    colocate: bool = True
    factors: Literal["all", "owner", "local"] = "all"
    helpers: int = 0
    all_local: Rates | Literal["measured"] | None = None
    costs: Literal["declared", "measured"] = "declared"

    def __post_init__(self) -> None:
        if not 0.0 <= self.fraction <= 1.0:
            raise ValueError(f"grad_worker_fraction is {self.grad_worker_fraction}; give a number from 0 to 1")
        if self.factors not in ("all", "owner", "local"):
            raise ValueError(f"factors is {self.factors!r}; give one of 'all', 'owner', 'local'")
        if self.costs not in ("declared", "measured"):
            raise ValueError(f"costs is {self.costs!r}; give 'declared' or 'measured'")
        if isinstance(self.all_local, str) and self.all_local != "measured":
            raise ValueError(f"all_local is {self.all_local!r}; give rates, or 'measured'")
        if self.helpers < 0:
            raise ValueError(f"helpers is {self.helpers}; give a number of ranks, 0 or more")
        if self.factors != "all" and not self.colocate:
            raise ValueError(f"factors={self.factors!r} keeps a layer's factors on one rank; set colocate=True")
        if self.helpers and self.fraction != 1.0:
            raise ValueError(
                f"helpers={self.helpers} serve every trainer alike, but grad_worker_fraction is "
                f"{self.grad_worker_fraction}; set it to 1"
            )
        if self.helpers and self.factors != "all":
            raise ValueError(f"helpers={self.helpers} need factors='all', not {self.factors!r}")
        if self.all_local and (self.helpers or self.factors != "all"):
            other = f"helpers={self.helpers}" if self.helpers else f"factors={self.factors!r}"
            raise ValueError(f"all_local needs the factors on every rank that decomposes; drop it or {other}")

    @property
    def fraction(self) -> float:
        """The share of the ranks that precondition a layer, None worked out as for a method that sends solved forms."""
        if self.grad_worker_fraction is not None:
            return self.grad_worker_fraction
        return float(self.helpers > 0 or self.all_local is not None or not self.colocate)

    def suited(self, by_all: bool) -> Kaisa:
        """The same with None worked out.

        Args:
            by_all: every rank makes the solved forms that it needs, so that a preconditioned gradient would be the only
                thing to be sent.
        """
        everywhere = by_all and self.factors == "all" and self.grad_worker_fraction is None
        return replace(self, grad_worker_fraction=1.0 if everywhere else self.fraction)

    def assign(self, costs: Mapping[Unit, UnitCost], ranks: int) -> Assignment:
        """Places layers on ranks. Deterministic: equal on all ranks without communication.

        Args:
            costs: unit -> cost of one refresh; the order of equal costs decides between them.
            ranks: number of ranks, helpers included.

        Raises:
            ValueError: the rank count cannot honour the fraction or the helpers.
        """
        if self.helpers >= ranks:
            raise ValueError(f"helpers is {self.helpers} of {ranks} ranks and leaves none to train; use less")
        workers = self._workers(ranks - self.helpers)
        layers: dict[str, list[Unit]] = defaultdict(list)
        for unit in costs:
            layers[unit[0]].append(unit)
        if self.helpers:
            owner, solvers = self._on_helpers(layers, costs, ranks)
        else:
            groups = [range(start, start + workers) for start in range(0, ranks, workers)]
            spread = self._together if self.colocate else self._apart
            owner, solvers = spread(layers, costs, groups)
        return Assignment(
            ranks,
            workers,
            {layer: owner[layer] for layer in layers},
            {unit: solvers[unit] for unit in costs},
            self.factors,
            self.helpers,
        )

    def _on_helpers(
        self, layers: Mapping[str, Sequence[Unit]], costs: Mapping[Unit, UnitCost], ranks: int
    ) -> tuple[dict[str, int], dict[Unit, tuple[int, ...]]]:
        trainers = ranks - self.helpers
        jobs = list(layers.values()) if self.colocate else [[unit] for unit in costs]
        work = {number: _flops(job, costs) for number, job in enumerate(jobs)}
        helper = balance(work, range(trainers, ranks))
        owner = {layer: number % trainers for number, layer in enumerate(layers)}
        return owner, {unit: (helper[number],) for number, job in enumerate(jobs) for unit in job}

    def _together(
        self, layers: Mapping[str, Sequence[Unit]], costs: Mapping[Unit, UnitCost], groups: Sequence[range]
    ) -> tuple[dict[str, int], dict[Unit, tuple[int, ...]]]:
        """A layer's units on one rank; layers that every grad worker decomposes fill up the least loaded groups."""
        workers = len(groups[0])
        sent = {layer: [u for u in units if not self._everywhere(costs[u], workers)] for layer, units in layers.items()}
        work = {layer: _flops(units, costs) for layer, units in sent.items() if units}
        owner = balance(work, range(groups[-1].stop))
        loads = [0.0] * len(groups)
        for layer, rank in owner.items():
            own = work[layer]
            loads[rank // workers] += own / workers + _flops(layers[layer], costs) - own
        everywhere = {layer: _flops(units, costs) for layer, units in layers.items() if not sent[layer]}
        turns = [cycle(group) for group in groups]
        for layer, group in balance(everywhere, range(len(groups)), loads).items():
            owner[layer] = next(turns[group])
        everyone = [tuple(group) for group in groups]
        solvers: dict[Unit, tuple[int, ...]] = {}
        for layer, units in layers.items():
            rank = owner[layer]
            solvers |= {unit: (rank,) if unit in sent[layer] else everyone[rank // workers] for unit in units}
        return owner, solvers

    def _apart(
        self, layers: Mapping[str, Sequence[Unit]], costs: Mapping[Unit, UnitCost], groups: Sequence[range]
    ) -> tuple[dict[str, int], dict[Unit, tuple[int, ...]]]:
        """A layer to the least loaded group, then its units to the least loaded ranks of that group."""
        workers = len(groups[0])
        everywhere = {unit for unit, cost in costs.items() if self._everywhere(cost, workers)}
        share = {unit: cost.refresh / (1 if unit in everywhere else workers) for unit, cost in costs.items()}
        chosen = balance({layer: sum(share[u] for u in units) for layer, units in layers.items()}, range(len(groups)))
        inside: dict[int, list[str]] = defaultdict(list)
        for layer, group in chosen.items():
            inside[group].append(layer)
        owner: dict[str, int] = {}
        solvers: dict[Unit, tuple[int, ...]] = {}
        for group, names in inside.items():
            everyone, turn = tuple(groups[group]), cycle(groups[group])
            sent = {u: costs[u].refresh for layer in names for u in layers[layer] if u not in everywhere}
            rank = balance(sent, everyone)
            for layer in names:
                own = [unit for unit in layers[layer] if unit in rank]
                owner[layer] = rank[max(own, key=sent.__getitem__)] if own else next(turn)
                solvers |= {unit: (rank[unit],) if unit in rank else everyone for unit in layers[layer]}
        return owner, solvers

    def _everywhere(self, cost: UnitCost, workers: int) -> bool:
        if workers == 1:
            return False
        if cost.by_all or self.all_local is None:
            return cost.by_all
        assert isinstance(self.all_local, Rates), "measured rates are filled in before"
        return self.all_local.computes_faster(cost)

    def _workers(self, ranks: int) -> int:
        wanted = max(1.0, self.fraction * ranks)
        workers = round(wanted)
        if abs(wanted - workers) > 1e-3 * ranks or ranks % workers:
            valid = ", ".join(f"{d}/{ranks}={d / ranks:.4g}" for d in range(1, ranks + 1) if ranks % d == 0)
            raise ValueError(
                f"grad_worker_fraction {self.grad_worker_fraction} cannot be honoured by {ranks} ranks; "
                f"use one of {valid}"
            )
        return workers


def balance(costs: Mapping[Thing, float], places: Iterable[int], loads: Sequence[float] = ()) -> dict[Thing, int]:
    """Longest processing time first (Graham 1969): the costliest left goes to the least loaded place.

    Where nothing was there before, no place gets more than the mean plus the largest cost. Equal costs are taken in
    the given order, equal loads by the number of things there, then in order of the places.

    Args:
        costs: thing -> cost.
        places: numbers of the places.
        loads: what each place carries before; nothing by default.
    """
    before = loads or cycle([0.0])
    heap = [(load, 0, place) for place, load in zip(places, before, strict=False)]
    heapq.heapify(heap)
    chosen = {}
    for thing in sorted(costs, key=lambda thing: -costs[thing]):
        load, count, place = heap[0]
        heapq.heapreplace(heap, (load + costs[thing], count + 1, place))
        chosen[thing] = place
    return chosen


def _flops(units: Iterable[Unit], costs: Mapping[Unit, UnitCost]) -> float:
    return sum(costs[unit].refresh for unit in units)
