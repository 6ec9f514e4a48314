"""KAISA's grid as a pure function, for many rank counts."""

from __future__ import annotations

import random
import time

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from hpc_kfac import Kaisa
from hpc_kfac.distributed import Assignment, Rates, UnitCost
from hpc_kfac.distributed.placement import balance

EPS = 1e-9
MIXED = Rates(flops=1e3, latency=0.0, bandwidth=1.0)  # so that the drawn bytes decide


def _divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]


@st.composite
def grids(draw, largest: int = 64):
    """Ranks, grad workers and units of up to two parts."""
    ranks = draw(st.integers(1, largest))
    workers = draw(st.sampled_from(_divisors(ranks)))
    cost = st.builds(UnitCost, st.floats(0, 1e9), st.integers(0, 10**6))
    parts = draw(st.lists(st.sampled_from([("",), ("A", "G")]), min_size=1, max_size=40))
    return ranks, workers, {(f"layer{i}", part): draw(cost) for i, names in enumerate(parts) for part in names}


policies = st.sampled_from(
    [
        {},
        {"colocate": False},
        {"factors": "owner"},
        {"factors": "local"},
        {"all_local": MIXED},
        {"all_local": MIXED, "colocate": False},
    ]
)


def _loads(assignment: Assignment, costs) -> list[float]:
    """Decomposition work of every rank."""
    loads = [0.0] * assignment.ranks
    for unit, ranks in assignment.solvers.items():
        for rank in ranks:
            loads[rank] += costs[unit].refresh
    return loads


def _by_layer(costs) -> dict[str, float]:
    work: dict[str, float] = {}
    for (layer, _), cost in costs.items():
        work[layer] = work.get(layer, 0.0) + cost.refresh
    return work


@given(grids(), policies)
def test_groups_tile_the_ranks_and_every_layer_has_one_owner(grid, policy):
    ranks, workers, costs = grid
    assignment = Kaisa(workers / ranks, **policy).assign(costs, ranks)
    assert (assignment.workers, assignment.trainers) == (workers, ranks)
    assert list(assignment.owner) == list(dict.fromkeys(layer for layer, _ in costs))
    groups = [assignment.members(g) for g in range(ranks // workers)]
    assert sorted(r for group in groups for r in group) == list(range(ranks))
    for layer, owner in assignment.owner.items():
        assert assignment.works_on(owner, layer)
        assert sum(assignment.works_on(r, layer) for r in range(ranks)) == workers
    for rank in range(ranks):
        # Each rank hears from exactly one member of every group, in its own place.
        assert [assignment.group(r) for r in assignment.receivers(rank)] == list(range(ranks // workers))
        assert rank in assignment.receivers(rank)


@given(grids(), policies)
def test_every_unit_is_decomposed_once_or_by_every_grad_worker(grid, policy):
    ranks, workers, costs = grid
    kaisa = Kaisa(workers / ranks, **policy)
    assignment = kaisa.assign(costs, ranks)
    assert list(assignment.solvers) == list(costs)
    for unit, solvers in assignment.solvers.items():
        members = tuple(assignment.members(assignment.group(assignment.owner[unit[0]])))
        if kaisa.all_local and workers > 1 and costs[unit].refresh / 1e3 < costs[unit].bytes:
            assert solvers == members
        else:
            assert len(solvers) == 1
            assert solvers[0] in members
        if kaisa.colocate and len(solvers) == 1:
            assert solvers == (assignment.owner[unit[0]],)


@given(grids())
def test_load_is_within_the_bound_of_list_scheduling(grid):
    ranks, workers, costs = grid
    assignment = Kaisa(workers / ranks).assign(costs, ranks)
    work = _by_layer(costs).values()
    assert max(_loads(assignment, costs)) <= (sum(work) / ranks + max(work)) * (1 + EPS)


@given(grids(largest=5))
def test_load_is_within_grahams_bound_of_the_best(grid):
    """At most 4/3 - 1/(3p) of the best; the best by trying all, for the costliest layers alone."""
    ranks, workers, costs = grid
    work = sorted(_by_layer(costs).values(), reverse=True)[:6]
    few = {(f"layer{i}", ""): UnitCost(cost) for i, cost in enumerate(work)}
    assignment = Kaisa(workers / ranks).assign(few, ranks)

    def best(rest: list[float], loads: tuple[float, ...]) -> float:
        if not rest:
            return max(loads)
        tried = {tuple(sorted((*loads[:r], loads[r] + rest[0], *loads[r + 1 :]))) for r in range(ranks)}
        return min(best(rest[1:], loads) for loads in tried)

    bound = (4 / 3 - 1 / (3 * ranks)) * best(work, (0.0,) * ranks)
    assert max(_loads(assignment, few)) <= bound * (1 + EPS)


@given(grids())
def test_load_apart_is_within_the_bound_of_both_stages(grid):
    ranks, workers, costs = grid
    assignment = Kaisa(workers / ranks, colocate=False).assign(costs, ranks)
    layers, units = _by_layer(costs), [cost.refresh for cost in costs.values()]
    bound = sum(units) / ranks + max(layers.values()) / workers + max(units)
    assert max(_loads(assignment, costs)) <= bound * (1 + EPS)
    for layer, owner in assignment.owner.items():
        mine = {unit: cost.refresh for unit, cost in costs.items() if unit[0] == layer}
        assert assignment.solvers[max(mine, key=mine.__getitem__)] == (owner,)


def test_apart_halves_a_layer_of_two_equal_factors():
    costs = {("fc", "A"): UnitCost(8.0), ("fc", "G"): UnitCost(8.0)}
    assert max(_loads(Kaisa(1.0).assign(costs, 2), costs)) == 16.0
    assert _loads(Kaisa(1.0, colocate=False).assign(costs, 2), costs) == [8.0, 8.0]


@given(grids(), st.integers(1, 8), st.booleans())
def test_helpers_decompose_everything_and_own_nothing(grid, helpers, colocate):
    trainers, _, costs = grid
    assignment = Kaisa(helpers=helpers, colocate=colocate).assign(costs, trainers + helpers)
    assert (assignment.trainers, assignment.workers, assignment.helpers) == (trainers, trainers, helpers)
    assert all(owner < trainers for owner in assignment.owner.values())
    assert all(len(ranks) == 1 and ranks[0] >= trainers for ranks in assignment.solvers.values())
    for helper in range(trainers, trainers + helpers):
        assert not any(assignment.works_on(helper, layer) for layer in assignment.owner)
        assert not assignment.receivers(helper)
    assert all(list(assignment.receivers(rank)) == [rank] for rank in range(trainers))
    work = list(_by_layer(costs).values()) if colocate else [cost.refresh for cost in costs.values()]
    assert max(_loads(assignment, costs)) <= (sum(work) / helpers + max(work)) * (1 + EPS)
    counts = [list(assignment.owner.values()).count(rank) for rank in range(trainers)]
    assert max(counts) - min(counts) <= 1


@given(grids(), st.booleans())
def test_all_local_keeps_groups_even(grid, colocate):
    """Work per rank of a group differs between two groups by no more than one layer's."""
    ranks, workers, costs = grid
    assignment = Kaisa(workers / ranks, all_local=Rates(1.0, 1e12, 1.0), colocate=colocate).assign(costs, ranks)
    if workers > 1:
        assert all(len(solvers) == workers for solvers in assignment.solvers.values())
    loads = _loads(assignment, costs)
    assert max(loads) - min(loads) <= max(_by_layer(costs).values()) * (1 + EPS) + EPS * sum(loads)


def test_groups_carry_what_every_worker_does_of_a_layer_in_part():
    """`a` and `b` are owned in one group, `c` and `d` in the other; all workers of its group do the rest of `a`."""
    sent = {("a", "A"): UnitCost(4.0), ("b", ""): UnitCost(6.0), ("c", ""): UnitCost(3.0), ("d", ""): UnitCost(3.0)}
    local = {unit: UnitCost(cost, 10**6) for unit, cost in ((("a", "G"), 100.0), (("e", ""), 10.0), (("f", ""), 10.0))}
    owner = Kaisa(0.5, all_local=MIXED).assign(sent | local, 4).owner
    assert {owner["b"], owner["a"]} == {0, 1} and {owner["c"], owner["d"], owner["e"], owner["f"]} == {2, 3}


def test_groups_share_what_is_sent_and_do_the_rest_in_full():
    """Units apart: 12 flops that one of two workers does are 6 for each, 10 that both do are 10."""
    costs = {("a", ""): UnitCost(10.0, 10**6), ("b", ""): UnitCost(12.0), ("c", ""): UnitCost(12.0)}
    owner = Kaisa(0.5, all_local=MIXED, colocate=False).assign(costs, 4).owner
    assert (owner["a"] // 2, owner["b"] // 2, owner["c"] // 2) == (0, 1, 1)


def test_all_local_threshold_is_computing_against_broadcasting():
    rates = Rates(flops=1e9, latency=1e-4, bandwidth=1e8)
    costs = {
        ("small", ""): UnitCost(refresh=9e4, bytes=0),  # 90 us against 100 us
        ("large", ""): UnitCost(refresh=3e5, bytes=10**4),  # 300 us against 200 us
        ("wide", ""): UnitCost(refresh=3e5, bytes=10**5),  # 300 us against 1100 us
    }
    solvers = Kaisa(1.0, all_local=rates).assign(costs, 4).solvers
    everyone = (0, 1, 2, 3)
    assert (solvers["small", ""], solvers["large", ""], solvers["wide", ""]) == (everyone, (0,), everyone)
    # One grad worker has nobody to broadcast to.
    assert all(len(ranks) == 1 for ranks in Kaisa(0.0, all_local=rates).assign(costs, 4).solvers.values())


def test_layers_without_cost_are_spread():
    """Methods that decompose nothing still precondition."""
    costs = {(f"layer{i}", ""): UnitCost(0.0) for i in range(8)}
    for policy in ({}, {"colocate": False}, {"all_local": MIXED}):
        owners = list(Kaisa(0.0, **policy).assign(costs, 4).owner.values())
        assert sorted(owners) == [0, 0, 1, 1, 2, 2, 3, 3]


def test_balance_breaks_ties_by_order():
    assert balance({"a": 1.0, "b": 2.0, "c": 1.0, "d": 1.0}, range(3)) == {"b": 0, "a": 1, "c": 2, "d": 1}
    assert balance({"d": 1.0, "a": 1.0}, [4, 7]) == {"d": 4, "a": 7}
    assert balance({"a": 1.0, "b": 1.0}, range(2), loads=[5.0, 0.0]) == {"a": 1, "b": 1}


@given(
    st.lists(st.integers(0, 10**6), min_size=2, max_size=20, unique=True),
    policies,
    st.randoms(use_true_random=False),
)
def test_order_decides_between_equal_costs_only(work, policy, rng: random.Random):
    costs = {(f"layer{i // 2}", "AG"[i % 2]): UnitCost(float(cost), 500) for i, cost in enumerate(work)}
    layers = _by_layer(costs)
    assume(len(set(layers.values())) == len(layers))
    kaisa = Kaisa(0.5, **policy)
    shuffled = rng.sample(list(costs), len(costs))
    assert kaisa.assign({unit: costs[unit] for unit in shuffled}, 6) == kaisa.assign(costs, 6)


def test_zero_fraction_is_one_worker():
    assert Kaisa(0.0).assign({("a", ""): UnitCost(1.0)}, 6).workers == 1


@pytest.mark.parametrize(
    ("settings", "by_all", "fraction"),
    [
        ({}, False, 0.0),
        ({}, True, 1.0),  # nothing is sent to the grad workers, so all may be
        ({"grad_worker_fraction": 0.5}, True, 0.5),
        ({"factors": "local"}, True, 0.0),
        ({"factors": "owner"}, True, 0.0),
        ({"helpers": 1}, False, 1.0),
        ({"colocate": False}, False, 1.0),
        ({"all_local": MIXED}, False, 1.0),
    ],
)
def test_fraction_that_is_not_given_suits_the_method(settings, by_all, fraction):
    assert Kaisa(**settings).suited(by_all) == Kaisa(**{**settings, "grad_worker_fraction": fraction})


def test_fraction_that_cannot_be_honoured_names_the_valid_ones():
    with pytest.raises(ValueError, match=r"fraction 0.4 cannot be honoured by 4 ranks; use one of 1/4=0.25"):
        Kaisa(0.4).assign({("a", ""): UnitCost(1.0)}, 4)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"grad_worker_fraction": 1.5}, "grad_worker_fraction is 1.5; give a number from 0 to 1"),
        ({"factors": "some"}, "factors is 'some'; give one of 'all', 'owner', 'local'"),
        ({"factors": "owner", "colocate": False}, "factors='owner' .* set colocate=True"),
        ({"helpers": -1}, "helpers is -1; give a number of ranks, 0 or more"),
        ({"helpers": 1, "grad_worker_fraction": 0.5}, "grad_worker_fraction is 0.5; set it to 1"),
        ({"helpers": 1, "factors": "local"}, "helpers=1 need factors='all', not 'local'"),
        ({"helpers": 1, "all_local": MIXED}, "all_local .* drop it or helpers=1"),
        ({"factors": "owner", "all_local": MIXED}, "all_local .* drop it or factors='owner'"),
    ],
)
def test_refused_settings_name_thing_value_and_mend(settings, message):
    with pytest.raises(ValueError, match=message):
        Kaisa(**settings)


def test_helpers_must_leave_a_trainer():
    with pytest.raises(ValueError, match="helpers is 3 of 3 ranks and leaves none to train; use less"):
        Kaisa(helpers=3).assign({("a", ""): UnitCost(1.0)}, 3)


@pytest.mark.parametrize("bad", [(0.0, 0.0, 1.0), (1.0, -1.0, 1.0), (1.0, 0.0, float("nan"))])
def test_rates_are_checked(bad):
    with pytest.raises(ValueError, match=r"all_local\.(flops|latency|bandwidth) is"):
        Rates(*bad)


@pytest.mark.alone
@pytest.mark.parametrize(
    "kaisa",
    [
        Kaisa(1.0),
        Kaisa(0.5),
        Kaisa(0.0),
        Kaisa(1.0, colocate=False),
        Kaisa(0.0, colocate=False),
        Kaisa(1.0, helpers=96),
        Kaisa(0.25, all_local=MIXED),
        Kaisa(1.0, all_local=MIXED, colocate=False),
    ],
    ids=str,
)
def test_thousands_of_ranks_in_milliseconds(kaisa):
    costs = {(f"layer{i}", part): UnitCost(float(i % 17 + 1), i % 3) for i in range(500) for part in "AG"}
    took = []
    for _ in range(3):
        start = time.perf_counter()
        kaisa.assign(costs, 4096)
        took.append(time.perf_counter() - start)
    assert min(took) < 0.1
