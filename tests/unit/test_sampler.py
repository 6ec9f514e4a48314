from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hpc_kfac.data.sampler import ShardedSampler


@st.composite
def cases(draw: st.DrawFn) -> tuple[int, int, int]:
    ranks = draw(st.integers(1, 9))
    return draw(st.integers(1, 200)), draw(st.integers(ranks, 80)), ranks


def epoch_of(samples: int, batch: int, ranks: int, epoch: int, seed: int = 5, start: int = 0):
    """Batches as lists over ranks."""
    parts = (list(ShardedSampler(samples, batch, rank, ranks, seed).batches(epoch, start)) for rank in range(ranks))
    return list(zip(*parts, strict=True))


@given(cases(), st.integers(0, 3))
@settings(deadline=None)
def test_every_sample_once_whatever_the_ranks(case: tuple[int, int, int], epoch: int) -> None:
    samples, batch, ranks = case
    seen = torch.cat([part.indices for parts in epoch_of(samples, batch, ranks, epoch) for part in parts])
    assert seen.sort().values.tolist() == list(range(samples))


@given(cases(), st.integers(0, 3))
@settings(deadline=None)
def test_global_batches_do_not_depend_on_the_ranks(case: tuple[int, int, int], epoch: int) -> None:
    samples, batch, ranks = case
    serial = list(ShardedSampler(samples, batch, seed=5).batches(epoch))
    split = epoch_of(samples, batch, ranks, epoch)
    assert len(serial) == len(split) == ShardedSampler(samples, batch).batches_per_epoch
    for whole, parts in zip(serial, split, strict=True):
        assert torch.cat([part.indices for part in parts]).equal(whole.indices)
        lengths = [len(part.indices) for part in parts]
        assert max(lengths) - min(lengths) <= 1
        assert {(part.epoch, part.index, part.size) for part in parts} == {(epoch, whole.index, sum(lengths))}
        assert [part.offset for part in parts] == [sum(lengths[:rank]) for rank in range(ranks)]


@given(cases(), st.data())
@settings(deadline=None)
def test_positioned_anywhere(case: tuple[int, int, int], data: st.DataObject) -> None:
    samples, batch, ranks = case
    sampler = ShardedSampler(samples, batch, ranks - 1, ranks)
    start = data.draw(st.integers(0, sampler.batches_per_epoch))
    everything = [(part.index, part.indices.tolist()) for part in sampler.batches(1)]
    fresh = ShardedSampler(samples, batch, ranks - 1, ranks)
    assert [(part.index, part.indices.tolist()) for part in fresh.batches(1, start)] == everything[start:]


def test_epochs_and_seeds_differ_and_repeat() -> None:
    one, other = ShardedSampler(500, 50, seed=1), ShardedSampler(500, 50, seed=2)
    first = one.order(0).clone()
    assert not one.order(1).equal(first)
    assert not other.order(0).equal(first)
    assert one.order(0).equal(first)
    assert first.sort().values.equal(torch.arange(500))


def test_without_shuffling_the_order_is_the_files() -> None:
    sampler = ShardedSampler(10, 4, rank=1, ranks=2, shuffle=False)
    assert [part.indices.tolist() for part in sampler.batches(7)] == [[2, 3], [6, 7], [9]]


def test_a_short_last_batch_may_leave_a_rank_without_samples() -> None:
    lengths = [len(parts[-1].indices) for parts in zip(*epoch_of(9, 8, 4, 0), strict=True)]
    assert sorted(lengths) == [0, 0, 0, 1]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"samples": 0, "global_batch": 4}, "samples = 0.*at least one"),
        ({"samples": 9, "global_batch": 3, "ranks": 4}, "global batch = 3.*ranks, 4.*at least 4"),
        ({"samples": 9, "global_batch": 4, "rank": 4, "ranks": 4}, "rank = 4.*outside"),
    ],
)
def test_bad_settings_are_named(settings: dict[str, int], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        ShardedSampler(**settings)


@pytest.mark.parametrize("start", [-1, 4])
def test_a_start_outside_the_epoch_is_refused(start: int) -> None:
    with pytest.raises(ValueError, match=f"start = {start}.*3 batches"):
        ShardedSampler(9, 3).batches(0, start)
