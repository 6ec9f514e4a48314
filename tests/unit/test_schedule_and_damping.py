"""Intervals, damping schedules and the Levenberg-Marquardt rule."""

from __future__ import annotations

import math

import pytest

from hpc_kfac import Damping, LevenbergMarquardt, Schedule, ScheduledDamping


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


def test_scheduled_damping_is_geometric_and_constant_outside():
    damping = ScheduledDamping({10: 1.0, 20: 0.01})
    assert damping.at(0) == 1.0
    assert damping.at(15) == pytest.approx(0.1)
    assert damping.at(500) == 0.01


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


def test_damping_state_is_restored():
    damping = LevenbergMarquardt(1.0)
    damping.adjust(0.0)
    other = LevenbergMarquardt(1.0)
    other.load_state_dict(damping.state_dict())
    assert other.current == damping.current
