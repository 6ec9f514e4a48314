"""The pool of reused buffers."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hpc_kfac.distributed import BufferPool
from hpc_kfac.distributed.layout import Message, Slot, in_order
from hpc_kfac.engine.operations import buckets


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 5000)), max_size=40))
def test_a_round_that_ran_once_allocates_nothing_again(requests: list[tuple[bool, int]]) -> None:
    pool = BufferPool()

    def round_trip() -> None:
        held: list[torch.Tensor] = []
        for give, nbytes in requests:
            if give and held:
                pool.give_back(held.pop(nbytes % len(held)))
            else:
                held.append(pool.take(nbytes, "cpu"))
        for buffer in held:
            pool.give_back(buffer)

    round_trip()
    allocated = pool.allocated
    for _ in range(2):
        round_trip()
        assert pool.allocated == allocated


@pytest.mark.parametrize("nbytes", [0, 1, 63, 64, 65, 1000, 4097, 1 << 20, (1 << 20) + 1])
def test_size_and_alignment(nbytes: int) -> None:
    pool = BufferPool()
    buffer = pool.take(nbytes)
    assert buffer.dtype == torch.uint8 and buffer.shape == (nbytes,)
    assert buffer.untyped_storage().data_ptr() % 64 == 0 and buffer.storage_offset() == 0
    assert nbytes <= pool.allocated <= max(nbytes + 64, nbytes * 9 / 8)


def test_buffers_in_use_do_not_overlap() -> None:
    pool = BufferPool()
    buffers = [pool.take(100).fill_(i) for i in range(10)]
    pool.give_back(buffers[3])
    buffers[3] = pool.take(99).fill_(42)
    assert [int(b[0]) for b in buffers] == [0, 1, 2, 42, 4, 5, 6, 7, 8, 9]
    assert all(bool((b == b[0]).all()) for b in buffers)


def test_a_view_of_another_type_can_be_given_back() -> None:
    pool = BufferPool()
    pool.give_back(pool.take(400).view(torch.float32)[5:])
    allocated = pool.allocated
    assert pool.take(400).numel() == 400 and pool.allocated == allocated


def test_refusals() -> None:
    pool = BufferPool()
    buffer = pool.take(10)
    pool.give_back(buffer)
    with pytest.raises(ValueError, match="once"):
        pool.give_back(buffer)
    with pytest.raises(ValueError, match="in use"):
        pool.give_back(torch.empty(4))
    with pytest.raises(ValueError, match="-1 bytes"):
        pool.take(-1)


def test_messages_are_fused_up_to_their_limit() -> None:
    groups = [[Slot(str(i), "x", (n,), torch.int8)] for i, n in enumerate([3, 5, 1, 9, 2, 6])]
    found = [[slot.bytes for slot in bucket] for bucket in buckets(groups, 8)]
    assert found == [[3, 5], [1], [9], [2, 6]]


def test_segments_of_a_message_hold_one_dtype_and_every_slot() -> None:
    """In order of the owners, as a reduce-scatter cuts them; dtypes of one size do not mix."""
    kinds = [torch.float16, torch.bfloat16, torch.float32, torch.float16, torch.bfloat16]
    slots = in_order([Slot(str(i), "x", (i + 1,), kind, owner=i % 2) for i, kind in enumerate(kinds)])
    message = Message(slots, BufferPool(), torch.device("cpu"))
    for slot in slots:
        message.put(slot, torch.full(slot.shape, float(slot.layer)))
    segments = message.segments()
    assert [part.dtype for part, _ in segments] == list(dict.fromkeys(slot.dtype for slot in slots))
    for part, held in segments:
        assert [slot.owner for slot in held] == sorted(slot.owner for slot in held)
        assert part.tolist() == [float(slot.layer) for slot in held for _ in range(slot.shape[0])]
