"""Seconds of collectives by closed formulas (Thakur, Rabenseifner & Gropp 2005; double trees: Sanders et al. 2009).

a is the latency of a message, b the seconds of a byte, n the ranks, B the bytes of the whole message:

    ring           allreduce 2 (n-1) a + 2 (n-1)/n B b          reduce-scatter and all-gather: half of it
    tree           allreduce 2 log2 n a + 2 B b                 broadcast log2 n a + B b, pipelined
    halving        reduce-scatter and all-gather log2 n a + (n-1)/n B b, one after the other an allreduce
    hierarchical   a ring inside each node, then one between nodes on a share of the message for each rank of a node

A group of ranks is told by how many nodes it meets and how many of its ranks share a node. Where it has fewer ranks on
a node than the node has, other groups are taken to send at the same time: it gets its share of the node's network.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from hpc_kfac.planning.machine import Link, Machine

ALLREDUCE = ("reduce", "scaled", "control", "gradients")
HALF = ("scatter", "gather", "weights", "gradient_scatter")
"""Reduce-scatter and all-gather."""
ROOTED = ("broadcast", "share")


@dataclass(frozen=True)
class Group:
    """Ranks that communicate.

    Attributes:
        ranks: how many.
        local: on each node.
    """

    ranks: int
    local: int

    @property
    def nodes(self) -> int:
        """How many it meets."""
        return -(-self.ranks // self.local)


def group_of(ranks: Sequence[int], machine: Machine) -> Group:
    """What matters of ranks that are numbered node by node."""
    step = ranks.step if isinstance(ranks, range) else 1
    return Group(len(ranks), max(1, min(len(ranks), machine.ranks_per_node // step)))


@lru_cache(maxsize=4096)
def seconds(kind: str, nbytes: float, group: Group, machine: Machine) -> float:
    """Of one collective.

    Args:
        kind: of the plan's operation, or gradients, gradient_scatter, weights.
        nbytes: the whole message; of an all-gather, what each rank has in the end.
        group: who takes part.
        machine: its networks.
    """
    if group.ranks < 2:
        return 0.0
    part = _PARTS[kind]
    if machine.collective == "hierarchical":
        return _hierarchical(part, nbytes, group, machine)
    link = _link(group, machine)
    times = {"ring": _ring(part, nbytes, group.ranks, link), "tree": _tree(part, nbytes, group.ranks, link)}
    if machine.collective != "fastest":
        return times[machine.collective]
    return min(*times.values(), _halving(part, nbytes, group.ranks, link), _hierarchical(part, nbytes, group, machine))


_PARTS = {kind: 2.0 for kind in ALLREDUCE} | {kind: 1.0 for kind in HALF} | {kind: 0.0 for kind in ROOTED}
"""How often a message crosses a ring; 0 for what comes from a root."""


def _link(group: Group, machine: Machine) -> Link:
    """The slowest link that a flat algorithm meets."""
    if group.nodes == 1:
        return machine.inside
    share = machine.between.bandwidth * group.local / machine.ranks_per_node
    return Link(machine.between.latency, min(machine.inside.bandwidth, share))


def _ring(part: float, nbytes: float, ranks: int, link: Link) -> float:
    part = part or 2.0  # a broadcast as scatter and all-gather
    return part * (ranks - 1) * (link.latency + nbytes / ranks / link.bandwidth)


def _tree(part: float, nbytes: float, ranks: int, link: Link) -> float:
    part = part or 1.0
    return part * (math.log2(ranks) * link.latency + nbytes / link.bandwidth)


def _halving(part: float, nbytes: float, ranks: int, link: Link) -> float:
    part = part or 2.0
    return part * (math.ceil(math.log2(ranks)) * link.latency + (ranks - 1) / ranks * nbytes / link.bandwidth)


def _hierarchical(part: float, nbytes: float, group: Group, machine: Machine) -> float:
    local, nodes = group.local, group.nodes
    inside = _fast(part, nbytes, local, machine.inside) if local > 1 else 0.0
    if nodes == 1:
        return inside
    # Each of a node's ranks sends a share of the message; together they have the node's network to themselves.
    share = Link(machine.between.latency, machine.between.bandwidth / machine.ranks_per_node)
    return inside + _fast(part, nbytes / local, nodes, share)


def _fast(part: float, nbytes: float, ranks: int, link: Link) -> float:
    return min(_ring(part, nbytes, ranks, link), _tree(part, nbytes, ranks, link), _halving(part, nbytes, ranks, link))
