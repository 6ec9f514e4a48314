"""KAISA's grid as a pure function, for many rank counts."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hpc_kfac import Kaisa


def _divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]


@st.composite
def grids(draw):
    ranks = draw(st.integers(1, 64))
    workers = draw(st.sampled_from(_divisors(ranks)))
    costs = draw(st.lists(st.floats(0, 1e9), min_size=1, max_size=40))
    return ranks, workers, {f"layer{i}": cost for i, cost in enumerate(costs)}


@given(grids())
def test_every_layer_has_one_owner_and_groups_tile_the_ranks(grid):
    ranks, workers, costs = grid
    assignment = Kaisa(workers / ranks).assign(costs, ranks)
    assert assignment.workers == workers
    assert set(assignment.owner) == set(costs)
    groups = [assignment.members(g) for g in range(ranks // workers)]
    assert sorted(r for group in groups for r in group) == list(range(ranks))
    for layer, owner in assignment.owner.items():
        assert assignment.works_on(owner, layer)
        assert sum(assignment.works_on(r, layer) for r in range(ranks)) == workers
    for rank in range(ranks):
        # Each rank hears from exactly one member of every group, in its own place.
        assert [assignment.group(r) for r in assignment.receivers(rank)] == list(range(ranks // workers))
        assert rank in assignment.receivers(rank)


@given(grids())
def test_load_is_within_the_longest_processing_time_bound(grid):
    ranks, workers, costs = grid
    assignment = Kaisa(workers / ranks).assign(costs, ranks)
    loads = [sum(c for layer, c in costs.items() if assignment.owner[layer] == r) for r in range(ranks)]
    optimum = max(max(costs.values()), sum(costs.values()) / ranks)
    assert max(loads) <= (4 / 3) * optimum + sum(costs.values()) / ranks / 3 + 1e-6


def test_zero_fraction_is_one_worker():
    assert Kaisa(0.0).assign({"a": 1.0}, 6).workers == 1


def test_fraction_that_cannot_be_honoured_names_the_valid_ones():
    with pytest.raises(ValueError, match=r"fraction 0.4 cannot be honoured by 4 ranks; use one of 1/4=0.25"):
        Kaisa(0.4).assign({"a": 1.0}, 4)
    with pytest.raises(ValueError, match="grad_worker_fraction is 1.5; give a number from 0 to 1"):
        Kaisa(1.5)


def test_thousands_of_ranks_in_milliseconds():
    costs = {f"layer{i}": float(i % 17 + 1) for i in range(200)}
    assignment = Kaisa(0.5).assign(costs, 4096)
    assert len(set(assignment.owner.values())) == 200
