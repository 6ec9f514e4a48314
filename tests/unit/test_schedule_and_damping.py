"""Intervals; refreshes that are spread, late, repeated or adapted; damping schedules, the Levenberg-Marquardt rule."""

from __future__ import annotations

import copy
import json
import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hpc_kfac import AnnealedDamping, Damping, LevenbergMarquardt, Schedule, ScheduledDamping
from hpc_kfac.options.schedule import RefreshTimes, Similarity, TraceChange

COSTS = {"a": 5.0, "b": 3.0, "c": 3.0, "d": 1.0}


def test_intervals_and_first_step():
    schedule = Schedule(statistics=3, refresh=6)
    assert [s for s in range(10) if schedule.statistics_due(s)] == [0, 3, 6, 9]
    assert [s for s in range(13) if schedule.refresh_due(s)] == [0, 6, 12]


def test_refresh_always_takes_statistics():
    schedule = Schedule(statistics=10, refresh=4)
    assert all(schedule.statistics_due(s) for s in range(40) if schedule.refresh_due(s))


def test_interval_that_changes():
    schedule = Schedule(statistics={0: 1, 4: 3}, refresh={0: 2, 4: 6})
    assert [s for s in range(12) if schedule.statistics_due(s)] == [0, 1, 2, 3, 4, 7, 10]
    assert [s for s in range(12) if schedule.refresh_due(s)] == [0, 2, 4, 10]


@pytest.mark.parametrize("bad", [0, -1, {0: 0}, {5: 1}])
def test_bad_intervals_are_named(bad):
    with pytest.raises(ValueError, match="schedule.refresh is"):
        Schedule(refresh=bad)


@st.composite
def intervals(draw):
    """A number or a mapping of up to four changes."""
    value = st.integers(1, 12)
    if draw(st.booleans()):
        return draw(value)
    return {0: draw(value)} | draw(st.dictionaries(st.integers(1, 40), value, max_size=3))


def _gap(refresh) -> int:
    """Shortest time between two refreshes, by looking."""
    due = [step for step in range(120) if Schedule(refresh=refresh).refresh_due(step)]
    return min(later - earlier for earlier, later in pairwise(due))


@st.composite
def schedules(draw, adapt=st.none()):  # noqa: B008 - a description
    refresh = draw(intervals())
    gap = _gap(refresh)
    spread, lag = draw(st.integers(1, gap)), draw(st.integers(0, gap - 1))
    return Schedule(draw(intervals()), refresh, spread, lag, draw(adapt))


def _run(times: RefreshTimes, steps: range, bad=(), changes=None) -> dict[int, tuple]:
    """step -> (statistics, starting, landing); what starts at a bad step is overdue."""
    log = {}
    for step in steps:
        log[step] = (times.statistics_due(step), times.starting(step), times.landing(step))
        if step in bad:
            times.overdue(log[step][1], step)
        elif changes:
            for layer in log[step][1]:
                times.record(layer, step, changes(layer, step))
            # What was asked may be asked again within the step.
            assert log[step] == (times.statistics_due(step), times.starting(step), times.landing(step))
    return log


def test_plain_schedule_takes_all_layers_when_due():
    schedule = Schedule(3, {0: 2, 8: 5})
    for step, (statistics, starting, landing) in _run(RefreshTimes(schedule, COSTS), range(30)).items():
        assert statistics == schedule.statistics_due(step)
        assert starting == landing == (tuple(COSTS) if schedule.refresh_due(step) else ())


@given(intervals())
def test_spread_and_lag_reach_up_to_the_next_refresh(refresh):
    gap = _gap(refresh)
    Schedule(refresh=refresh, spread=gap, lag=gap - 1)
    with pytest.raises(ValueError, match=f"schedule.spread is {gap + 1} .* is {gap} steps; give 1 to {gap}"):
        Schedule(refresh=refresh, spread=gap + 1)
    with pytest.raises(ValueError, match=f"schedule.lag is {gap} .* is {gap} steps; give 0 to {gap - 1}"):
        Schedule(refresh=refresh, lag=gap)


@pytest.mark.parametrize("bad", [{"spread": 0}, {"spread": -1}, {"lag": -1}])
def test_spread_and_lag_are_counts(bad):
    with pytest.raises(ValueError, match=f"schedule.{next(iter(bad))} is"):
        Schedule(refresh=100, **bad)


@given(schedules())
def test_every_layer_takes_part_once_in_every_refresh(schedule):
    times = RefreshTimes(schedule, COSTS)
    log = _run(times, range(100))
    assert log[0] == (True, tuple(COSTS), tuple(COSTS))
    begins = [step for step in range(1, 80) if schedule.refresh_due(step)]
    started: list[tuple[str, int]] = []
    for begin in begins:
        window = range(begin, begin + schedule.spread)
        started += [(layer, step) for step in window for layer in log[step][1]]
        assert sorted(layer for step in window for layer in log[step][1]) == sorted(COSTS)
        assert log[begin][0]
    assert sum(len(log[step][1]) for step in range(1, 80)) <= len(started)  # and at no other time
    for layer, step in started:
        if step + schedule.lag < 100:
            assert layer in log[step + schedule.lag][2]
    assert all(statistics == schedule.statistics_due(step) for step, (statistics, _, _) in log.items())


@given(schedules(), st.integers(1, 100))
def test_future_steps_may_be_asked_for(schedule, ahead):
    times = RefreshTimes(schedule, COSTS)
    asked = (times.statistics_due(ahead), times.starting(ahead), times.landing(ahead))
    assert _run(times, range(ahead + 1))[ahead] == asked


@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=30), st.integers(1, 10))
def test_spread_balances_costs_and_keeps_the_order(costs, spread):
    table = {f"layer{i}": cost for i, cost in enumerate(costs)}
    times = RefreshTimes(Schedule(refresh=10, spread=spread), table)
    groups = [times.starting(10 + turn) for turn in range(spread)]
    largest = max(sum(table[layer] for layer in group) for group in groups)
    assert largest <= (sum(costs) / spread + max(costs)) * (1 + 1e-9)
    names = list(table)
    assert all([names.index(layer) for layer in group] == sorted(map(names.index, group)) for group in groups)


@given(schedules(), st.sets(st.integers(0, 60), max_size=25))
def test_what_came_to_nothing_is_repeated_and_the_rest_lands(schedule, bad):
    times, lag = RefreshTimes(schedule, COSTS), schedule.lag
    log = _run(times, range(100), bad)
    for layer in COSTS:
        starts = [step for step in log if layer in log[step][1]]
        good = [step for step in starts if step not in bad]
        # A first result is used at once, every other after the lag; nothing else is ever used.
        lands = [good[0]] + [step + lag for step in good[1:] if step + lag < 100]
        void = bad & set(starts)
        assert [step for step in log if layer in log[step][2] and step not in void] == lands
        for step in starts:
            if step in bad:
                assert layer in log[step + 1][1] and log[step + 1][0]
        # No second refresh while one is under way, and never a start with another's landing.
        assert all(later - earlier > lag for earlier, later in pairwise(good[1:]))
        # Every refresh of the schedule is there, or one repeated shortly before is still under way.
        for begin in range(1, 60):
            if schedule.refresh_due(begin) and begin > good[0]:
                assert any(begin - lag - 1 <= step < begin + schedule.spread for step in starts)


def test_repeated_at_the_first_step():
    times = RefreshTimes(Schedule(50, 10, spread=2, lag=3), COSTS)
    log = _run(times, range(30), bad={0, 1})
    everything = tuple(COSTS)
    assert [log[step][:2] for step in range(4)] == [(True, everything)] * 3 + [(False, ())]
    assert log[2][2] == everything  # a first result has nothing to wait behind
    assert log[10][1] + log[11][1] == ("a", "d", "b", "c")
    assert (log[13][2], log[14][2]) == (log[10][1], log[11][1])


def test_repeated_refresh_under_way_holds_back_the_next():
    times = RefreshTimes(Schedule(1, 4, lag=3), {"a": 1.0})
    log = _run(times, range(20), bad={4, 5})
    assert [step for step in log if log[step][1]] == [0, 4, 5, 6, 12, 16]
    assert [step for step in log if log[step][2]] == [0, 9, 15, 19]


@pytest.mark.parametrize("step, landing", [(4, [4, 7, 12]), (5, [5, 12])])
def test_a_layer_that_joins_takes_part_in_the_next_refresh(step, landing):
    """Its own first one has nothing to wait for, and so is not under way any more."""
    times = RefreshTimes(Schedule(1, 5, lag=2), {"a": 1.0})
    times.join({"b": 1.0}, step, {})
    assert [at for at in range(step, 14) if "b" in times.landing(at)] == landing


@pytest.mark.parametrize("left, started", [(4, [7, 10]), (5, [7, 10]), (6, [10])])
def test_a_layer_that_comes_back_makes_up_for_a_refresh_that_it_missed(left, started):
    """The refresh of step 5, unless that was still its own."""
    times = RefreshTimes(Schedule(1, 5), {"a": 1.0, "b": 1.0})
    stood = times.leave("b")
    times.join({"b": 1.0}, 7, {"b": (stood, left)})
    assert [step for step in range(7, 14) if "b" in times.starting(step)] == started


def test_similarity_grows_and_halves_the_interval():
    adapt = Similarity(threshold=0.1, longest=10)
    seen, interval, previous = [], 1, 1
    for change in [0.01] * 6 + [0.1, 0.5, math.nan, math.inf, 0.0, 0.0]:
        interval, previous = adapt.following(change, interval, previous)
        seen.append(interval)
    assert seen == [2, 3, 5, 8, 10, 10, 5, 2, 1, 1, 2, 3]


def test_similarity_is_per_layer_and_in_refresh_intervals():
    times = RefreshTimes(Schedule(7, {0: 2, 10: 5}, adapt=Similarity()), {"calm": 1.0, "wild": 1.0})
    log = _run(times, range(100), changes=lambda layer, step: 0.0 if layer == "calm" else 1.0)
    assert [step for step in log if "wild" in log[step][1]] == [0, 2, 4, 6, 8, *range(10, 100, 5)]
    # After 0, 2 (1 + 1), 3 and 5 refreshes of the schedule: at 0, 4, 10, 35, then 8 * 5 later.
    assert [step for step in log if "calm" in log[step][1]] == [0, 4, 10, 35, 75]


def test_a_step_takes_statistics_only_if_a_layer_is_refreshed():
    times = RefreshTimes(Schedule(1000, 2, adapt=Similarity()), COSTS)
    log = _run(times, range(60), changes=lambda layer, step: 0.0)
    assert [step for step in log if log[step][0]] == [0, 4, 10, 20, 36]


def test_trace_change_leaves_out_and_freezes():
    changes = {"usual": 0.5, "slow": 0.005, "still": 0.0005, "odd": math.nan}
    schedule = Schedule(5, 5, adapt=TraceChange(update=0.01, freeze=0.001))
    log = _run(RefreshTimes(schedule, dict.fromkeys(changes, 1.0)), range(31), changes=lambda layer, _: changes[layer])
    starts = {layer: [step for step in log if layer in log[step][1]] for layer in changes}
    every = [0, 5, 10, 15, 20, 25, 30]
    assert starts == {"usual": every, "slow": [0, 10, 20, 30], "still": [0], "odd": every}
    assert [TraceChange(0.5, 0.25).following(change, 1, 1)[0] for change in (0.51, 0.5, 0.25, 0.24)] == [1, 2, 2, 0]
    assert TraceChange(0.5, freeze=0.0).following(0.0, 1, 1)[0] == 2  # never frozen


def test_measures():
    factor = torch.diag(torch.tensor([3.0, 4.0]))[None]
    old, new = {"A": factor, "G": torch.ones(1, 4)}, {"A": 1.5 * factor, "G": torch.ones(1, 4)}
    new["G"][0, 0] = 1.2
    similarity, trace = Similarity(), TraceChange()
    assert similarity.measure(similarity.remember(old), new) == pytest.approx(0.5)
    assert trace.measure(trace.remember(old), new) == pytest.approx(0.5)
    # A rotation keeps the trace, and off-diagonal entries do not count; a kept diagonal counts whole.
    assert (
        trace.measure(trace.remember({"A": factor}), {"A": factor.flip(1).flip(2) + torch.ones(2, 2).fill_diagonal_(0)})
        == 0
    )
    assert trace.measure(trace.remember({"G": old["G"]}), {"G": new["G"]}) == pytest.approx(0.05)
    assert trace.measure(trace.remember({"A": torch.ones(3, 2, 2)}), {"A": 2 * torch.ones(3, 2, 2)}) == 1.0


@pytest.mark.parametrize("adapt", [Similarity(), TraceChange()])
def test_measures_at_the_edges(adapt):
    zero, one = {"A": torch.zeros(1, 2, 2)}, {"A": torch.ones(1, 2, 2)}
    assert adapt.measure({}, one) == math.inf
    assert adapt.measure(adapt.remember(zero), zero) == 0.0
    assert adapt.measure(adapt.remember(zero), one) == math.inf
    assert math.isnan(adapt.measure(adapt.remember(one), {"A": torch.full((1, 2, 2), math.nan)}))
    kept = adapt.remember(one)
    one["A"].mul_(2)  # running averages change in place
    assert adapt.measure(kept, one) == pytest.approx(1.0)
    assert all(tensor.numel() == (4 if isinstance(adapt, Similarity) else 1) for tensor in kept.values())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Similarity(threshold=0.0), "schedule.adapt.threshold is 0.0; give a positive"),
        (lambda: Similarity(longest=0), "schedule.adapt.longest is 0; give a number of refresh intervals, at least 1"),
        (lambda: TraceChange(update=0.1, freeze=0.2), "freeze is 0.2 and update 0.1; give 0 <= freeze <= update"),
        (lambda: TraceChange(freeze=-1.0), "freeze is -1.0"),
    ],
)
def test_bad_adaptation_is_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@given(
    schedules(adapt=st.sampled_from([None, Similarity(), TraceChange(0.01, 0.001)])),
    st.sets(st.integers(0, 80), max_size=20),
    st.integers(0, 60),
    st.lists(st.sampled_from([0.0, 0.005, 0.05, 1.0, math.nan]), min_size=7, max_size=7),
)
def test_state_restored_in_mid_run_has_the_same_future(schedule, bad, stop, changes):
    def change(layer: str, step: int) -> float:
        return changes[(step + ord(layer)) % 7]

    times = RefreshTimes(schedule, COSTS)
    _run(times, range(stop), bad, change)
    state = json.loads(json.dumps(times.state_dict()))
    restored = RefreshTimes(schedule, COSTS)
    restored.load_state_dict(state)
    assert _run(restored, range(stop, 120), bad, change) == _run(times, range(stop, 120), bad, change)


@given(schedules(adapt=st.just(Similarity())), st.floats(0, 0.2))
def test_adapted_layers_start_and_land_as_any(schedule, change):
    """No refresh is missed or used twice, and none is closer to the next than the lag."""
    log = _run(RefreshTimes(schedule, COSTS), range(100), changes=lambda layer, step: change)
    for layer in COSTS:
        starts = [step for step in log if layer in log[step][1]]
        lands = [step for step in log if layer in log[step][2]]
        assert lands == [0] + [step + schedule.lag for step in starts[1:] if step + schedule.lag < 100]
        assert all(later - earlier > schedule.lag for earlier, later in pairwise(starts[1:]))


def test_state_of_another_model_is_refused():
    times = RefreshTimes(Schedule(), COSTS)
    before = copy.deepcopy(times.state_dict())
    with pytest.raises(ValueError, match="layers differ from the model's: d, e; load the same model"):
        times.load_state_dict(RefreshTimes(Schedule(), {"a": 1, "b": 1, "c": 1, "e": 1}).state_dict())
    assert times.state_dict() == before


def test_scheduled_damping_is_geometric_and_constant_outside():
    damping = ScheduledDamping({10: 1.0, 20: 0.01})
    assert damping.at(0, 1.0) == 1.0
    assert damping.at(15, 1.0) == pytest.approx(0.1)
    assert damping.at(500, 1.0) == 0.01


def test_annealed_damping_follows_the_learning_rate() -> None:
    damping = AnnealedDamping(0.4, power=2.0, floor=0.1)
    rates = [0.01, 0.1, 0.2, 0.1, 0.02, 0.0, 0.1]  # a warm-up first
    assert [damping.at(step, rate) for step, rate in enumerate(rates)] == pytest.approx(
        [0.4, 0.4, 0.4, 0.1, 0.04, 0.04, 0.1]
    )
    again = AnnealedDamping(0.4, power=2.0, floor=0.1)
    again.load_state_dict(damping.state_dict())
    again.raise_by(4.0)
    assert again.at(9, 0.1) == pytest.approx(0.4) and again.current == pytest.approx(0.4)
    assert AnnealedDamping(0.4).at(0, 0.0) == 0.4
    with pytest.raises(ValueError, match="damping floor is 2.0; give a share"):
        AnnealedDamping(0.4, floor=2.0)


@pytest.mark.parametrize("value", [0.0, -1.0, math.nan, math.inf])
def test_damping_must_be_positive(value):
    with pytest.raises(ValueError, match="damping is"):
        Damping(value)


def test_levenberg_marquardt_follows_the_ratio():
    damping = LevenbergMarquardt(1.0, interval=2, factor=0.9)
    damping.adjust(0.9)
    assert damping.current == pytest.approx(0.81)
    damping.adjust(0.5)
    assert damping.current == pytest.approx(0.81)
    damping.adjust(0.1)
    assert damping.current == pytest.approx(1.0)
    damping.adjust(math.nan)
    assert damping.current == pytest.approx(1 / 0.81)
    assert [s for s in range(6) if damping.due(s)] == [1, 3, 5]


@pytest.mark.parametrize("ratio, change", [(0.76, 0.81), (0.74, 1.0), (0.26, 1.0), (0.24, 1 / 0.81)])
def test_levenberg_marquardt_has_its_thresholds_at_quarters(ratio, change):
    damping = LevenbergMarquardt(2.0, interval=2, factor=0.9)
    damping.adjust(ratio)
    assert damping.current == pytest.approx(2.0 * change)


def test_levenberg_marquardt_stays_within_its_bounds():
    damping, found = LevenbergMarquardt(1.0, interval=1, factor=0.5, minimum=0.4, maximum=1.5), []
    for ratio in (1.0, 1.0, 0.0, 0.0):
        damping.adjust(ratio)
        found.append(damping.current)
    assert found == pytest.approx([0.5, 0.4, 0.8, 1.5])


@pytest.mark.parametrize(
    "make", [lambda: Damping(0.3), lambda: ScheduledDamping({0: 1.0, 4: 0.01}), lambda: AnnealedDamping(0.3)]
)
def test_what_is_raised_stays_so_and_outlives_a_restart(make):
    damping, again, other = make(), make(), make()
    future = [(2, 0.1), (3, 0.2), (9, 0.1)]
    for one in (damping, other):
        one.at(0, 0.1)
        one.at(1, 0.4)
    damping.raise_by(4.0)
    again.load_state_dict(damping.state_dict())
    expected = [4.0 * other.at(*step) for step in future]
    assert [damping.at(*step) for step in future] == pytest.approx(expected)
    assert [again.at(*step) for step in future] == pytest.approx(expected)


def test_damping_state_is_restored():
    damping = LevenbergMarquardt(1.0)
    damping.adjust(0.0)
    other = LevenbergMarquardt(1.0)
    other.load_state_dict(damping.state_dict())
    assert other.current == damping.current
