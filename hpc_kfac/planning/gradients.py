"""Which messages gradients are averaged in, and when each can go out."""

from __future__ import annotations

from collections import Counter

from hpc_kfac.engine.plan import Problem
from hpc_kfac.planning.model_costs import ModelCosts

OWNER_BUCKET = 32 * 2**20  # bytes; as in `OwnerOptimizer`


class Messages:
    """Messages of a backward pass.

    Args:
        costs: of the model.
        averaging: "horovod" sends every gradient by itself as it is complete, "ddp" likewise but in a fixed order,
            "mpi4py" all of them in one message at the end, "owner" buckets in a fixed order.
        ranks: how many there are; one sends nothing.

    Attributes:
        sizes: bytes of each message, in their order.
    """

    def __init__(self, costs: ModelCosts, averaging: str, ranks: int) -> None:
        trained = [index for index, weight in enumerate(costs.weights) if weight.trained]
        self._bucket: dict[int, int] = {}
        self.sizes: list[int] = []
        for index in reversed(trained if ranks > 1 else []):
            nbytes = costs.weights[index].bytes
            joins = bool(self.sizes) and (
                averaging == "mpi4py" or (averaging == "owner" and self.sizes[-1] + nbytes <= OWNER_BUCKET)
            )
            if not joins:
                self.sizes.append(0)
            self.sizes[-1] += nbytes
            self._bucket[index] = len(self.sizes) - 1
        counts = Counter(self._bucket.values())
        self._missing = [counts[bucket] for bucket in range(len(self.sizes))]
        self._in_order = averaging != "horovod"
        self._late = averaging == "mpi4py"
        self._next = 0

    def complete(self, weight: int) -> list[int]:
        """Sizes of the messages that can go out now that this gradient is there."""
        if weight not in self._bucket:
            return []
        bucket = self._bucket[weight]
        self._missing[bucket] -= 1
        if not self._in_order:
            return [self.sizes[bucket]] if self._missing[bucket] == 0 else []
        found = []
        while not self._late and self._next < len(self.sizes) and self._missing[self._next] == 0:
            found.append(self.sizes[self._next])
            self._next += 1
        return found

    def rest(self) -> list[int]:
        """Sizes of what goes out after the backward pass."""
        if self._in_order:
            found, self._next = self.sizes[self._next :], len(self.sizes)
            return found
        return [size for size, missing in zip(self.sizes, self._missing, strict=True) if missing > 0]


def owned_bytes(problem: Problem, costs: ModelCosts) -> int:
    """Bytes of the weights of the rank that owns most, where owners update."""
    loads: Counter[int] = Counter()
    others = 0
    for weight in costs.weights:
        if weight.layer:
            loads[problem.assignment.owner[weight.layer]] += weight.bytes
        else:
            others += weight.bytes
    largest = max(loads.values(), default=0)
    return max(largest, -(-(sum(loads.values()) + others) // problem.assignment.ranks))
