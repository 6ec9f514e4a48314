"""Collectives' seconds against messages that are counted one by one."""

from __future__ import annotations

from dataclasses import replace

import pytest

from hpc_kfac.planning.collectives import Group, group_of, seconds
from hpc_kfac.planning.machine import Link, Machine, load

LATENCY, BANDWIDTH = 3e-6, 2e9


def flat(algorithm: str) -> Machine:
    """A machine of one node."""
    link = Link(LATENCY, BANDWIDTH)
    return replace(load("laptop"), ranks_per_node=64, inside=link, between=link, collective=algorithm)


def ring(ranks: int, nbytes: float, rounds: int) -> float:
    """Every rank hands one piece to its neighbour in every round."""
    return sum(LATENCY + nbytes / ranks / BANDWIDTH for _ in range(rounds))


@pytest.mark.parametrize("ranks", [2, 3, 8])
def test_rings(ranks: int) -> None:
    machine, group = flat("ring"), Group(ranks, ranks)
    assert seconds("reduce", 1e6, group, machine) == pytest.approx(ring(ranks, 1e6, 2 * (ranks - 1)))
    assert seconds("scatter", 1e6, group, machine) == pytest.approx(ring(ranks, 1e6, ranks - 1))
    assert seconds("gather", 1e6, group, machine) == pytest.approx(ring(ranks, 1e6, ranks - 1))


def test_trees() -> None:
    """As many levels as doublings, up and down for an allreduce; the message passes once each way, pipelined."""
    machine, group = flat("tree"), Group(16, 16)
    assert seconds("broadcast", 1e6, group, machine) == pytest.approx(4 * LATENCY + 1e6 / BANDWIDTH)
    assert seconds("reduce", 1e6, group, machine) == pytest.approx(8 * LATENCY + 2e6 / BANDWIDTH)


def test_hierarchies() -> None:
    """4 ranks on each of 8 nodes: within a node, then on a quarter of the message between nodes, 4 at a time."""
    fast, slow = Link(1e-6, 100e9), Link(20e-6, 8e9)
    machine = replace(flat("hierarchical"), ranks_per_node=4, inside=fast, between=slow)
    nbytes = 64e6  # long enough for the bandwidth-optimal algorithms, whose bytes are those of the ring
    inside, between = 2 * 3 / 4 * nbytes / 100e9, 2 * 7 / 8 * (nbytes / 4) / (8e9 / 4)
    found = seconds("reduce", nbytes, Group(32, 4), machine)
    assert found == pytest.approx(inside + between, rel=0.02) and found > inside + between
    flat_ring = seconds("reduce", nbytes, Group(32, 4), replace(machine, collective="ring"))
    assert found < 1.1 * flat_ring


def test_the_fastest_is_taken_for_each_message() -> None:
    group = Group(64, 64)
    for nbytes in (8, 1e4, 1e6, 1e9):
        each = [seconds("reduce", nbytes, group, flat(name)) for name in ("ring", "tree", "hierarchical")]
        assert seconds("reduce", nbytes, group, flat("fastest")) <= min(each)
    assert seconds("reduce", 8, group, flat("tree")) < seconds("reduce", 8, group, flat("ring")) / 5


def test_one_rank_sends_nothing() -> None:
    assert seconds("reduce", 1e9, Group(1, 1), flat("ring")) == 0.0


def test_groups_by_node() -> None:
    machine = replace(load("a100"), ranks_per_node=8)
    assert group_of(range(0, 64), machine) == Group(64, 8) and group_of(range(0, 64), machine).nodes == 8
    assert group_of(range(3, 64, 8), machine) == Group(8, 1)  # one of each node
    assert group_of(range(0, 4), machine) == Group(4, 4)
    # Beside seven others of its kind it gets an eighth of the nodes' networks.
    alone = seconds("share", 1e8, Group(8, 1), replace(machine, ranks_per_node=1, collective="ring"))
    assert seconds("share", 1e8, Group(8, 1), replace(machine, collective="ring")) > 4 * alone
