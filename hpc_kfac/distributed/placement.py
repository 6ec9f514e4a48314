"""Which rank decomposes a layer, which ranks precondition it, and which receive the result: a pure function.

KAISA's grid (Pauloski et al. 2021): p ranks form p/m groups of m grad workers. A layer belongs to one group; its
owner, one rank of the group, decomposes the factors and broadcasts the solved form inside the group; worker j of the
group then sends the preconditioned gradient to the ranks that hold place j in the other groups. m = p is COMM-OPT
(every rank preconditions, no traffic on an ordinary step), m = 1 is MEM-OPT (solved forms exist once).
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Assignment:
    """A placement worked out for given layers and ranks.

    Attributes:
        ranks: number of ranks p.
        workers: grad workers per layer, m.
        owner: layer name -> rank that decomposes it.
    """

    ranks: int
    workers: int
    owner: Mapping[str, int]

    def group(self, rank: int) -> int:
        """The worker group that a rank belongs to."""
        return rank // self.workers

    def members(self, group: int) -> range:
        """The ranks of a worker group."""
        return range(group * self.workers, (group + 1) * self.workers)

    def receivers(self, rank: int) -> range:
        """The ranks that exchange preconditioned gradients with `rank`, itself included."""
        return range(rank % self.workers, self.ranks, self.workers)

    def works_on(self, rank: int, layer: str) -> bool:
        """Whether the rank preconditions the layer."""
        return self.group(rank) == self.group(self.owner[layer])


@dataclass(frozen=True)
class Kaisa:
    """KAISA's placement with longest-processing-time balance of the decompositions.

    Args:
        grad_worker_fraction: share of the ranks that precondition a layer: 1 (COMM-OPT), 1/p or 0 (MEM-OPT: one rank),
            or between; fraction times p must be a divisor of p.
    """

    grad_worker_fraction: float = 1.0

    def __post_init__(self) -> None:
        if not 0.0 <= self.grad_worker_fraction <= 1.0:
            raise ValueError(f"grad_worker_fraction is {self.grad_worker_fraction}; give a number from 0 to 1")

    def assign(self, costs: Mapping[str, float], ranks: int) -> Assignment:
        """Places layers on ranks. Deterministic: equal on all ranks without communication.

        Args:
            costs: layer name -> cost of one refresh, any unit; the order breaks ties.
            ranks: number of ranks.

        Raises:
            ValueError: the rank count cannot honour the fraction.
        """
        workers = self._workers(ranks)
        loads = [(0.0, rank) for rank in range(ranks)]
        owner = {}
        for layer in sorted(costs, key=lambda name: -costs[name]):
            load, rank = heapq.heappop(loads)
            owner[layer] = rank
            heapq.heappush(loads, (load + costs[layer], rank))
        return Assignment(ranks, workers, {layer: owner[layer] for layer in costs})

    def _workers(self, ranks: int) -> int:
        wanted = max(1.0, self.grad_worker_fraction * ranks)
        workers = round(wanted)
        if abs(wanted - workers) > 1e-3 * ranks or ranks % workers:
            valid = ", ".join(f"{d}/{ranks}={d / ranks:.4g}" for d in range(1, ranks + 1) if ranks % d == 0)
            raise ValueError(
                f"grad_worker_fraction {self.grad_worker_fraction} cannot be honoured by {ranks} ranks; "
                f"use one of {valid}"
            )
        return workers
