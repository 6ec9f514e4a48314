"""Collectives against plain sums, over MPI and torch.distributed, for each dtype, rank count and kind of segment."""

from __future__ import annotations

import pytest
import torch

from hpc_kfac.distributed import Communicator, communicator
from hpc_kfac.distributed.communicator import SUMMABLE

RANKS = (1, 2, 3, 4, 6)
ROUNDING = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}  # relative, of one addition


@pytest.fixture(params=["mpi", "gloo"])
def carrier(request, comm):
    return communicator(comm if request.param == "mpi" else request.getfixturevalue("process_group"))


def drawn(dtype: torch.dtype, count: int, rank: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1000 * seed + rank)
    if dtype.is_floating_point:
        return torch.randn(count, generator=generator, dtype=torch.float64).to(dtype)
    return torch.randint(-9, 10, (count,), generator=generator).to(dtype)


def assert_summed(result: torch.Tensor, terms: list[torch.Tensor]) -> None:
    exact = torch.stack(terms).double()
    rounding = ROUNDING.get(result.dtype, 0.0 if not result.dtype.is_floating_point else torch.finfo(result.dtype).eps)
    # Each of the size - 1 additions rounds a partial sum, which is at most the sum of magnitudes.
    bound = (len(terms) - 1) * rounding * exact.abs().sum(0) * 1.01
    assert ((result.double() - exact.sum(0)).abs() <= bound).all()


def uneven(size: int) -> list[int]:
    """A count per rank, some of them zero."""
    return [(5 * rank) % 7 if rank % 3 != 1 else 0 for rank in range(size)]


@pytest.mark.ranks(*RANKS)
@pytest.mark.parametrize("dtype", SUMMABLE, ids=str)
def test_allreduce(carrier: Communicator, dtype):
    for count in (0, 1, 1001):
        tensor = drawn(dtype, count, carrier.rank)
        carrier.allreduce(tensor, "sum").wait()
        assert_summed(tensor, [drawn(dtype, count, rank) for rank in range(carrier.size)])


@pytest.mark.ranks(*RANKS)
@pytest.mark.parametrize("dtype", SUMMABLE, ids=str)
def test_reduce_scatter(carrier: Communicator, dtype):
    size, rank = carrier.size, carrier.rank
    for counts in ([3] * size, uneven(size), [0] * size, [0] * (size - 1) + [1001]):
        start = sum(counts[:rank])
        tensor = drawn(dtype, sum(counts), rank)
        carrier.reduce_scatter(tensor, counts, "scatter").wait()
        mine = slice(start, start + counts[rank])
        assert_summed(tensor[mine], [drawn(dtype, sum(counts), r)[mine] for r in range(size)])


@pytest.mark.ranks(*RANKS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.uint8], ids=str)
def test_allgatherv_and_broadcast_and_allgather(carrier: Communicator, dtype):
    size, rank = carrier.size, carrier.rank
    for counts in ([2] * size, uneven(size), [0] * size, [501] + [0] * (size - 1)):
        tensor = torch.full((sum(counts),), 99).to(dtype)
        tensor.split(counts)[rank].copy_(drawn(dtype, counts[rank], rank, seed=1))
        carrier.allgatherv(tensor, counts, "gather").wait()
        assert torch.equal(tensor, torch.cat([drawn(dtype, n, r, seed=1) for r, n in enumerate(counts)]))
    for root in range(size):
        tensor = drawn(dtype, 7, rank)
        carrier.broadcast(tensor, root, "broadcast").wait()
        assert torch.equal(tensor, drawn(dtype, 7, root))
    parts, work = carrier.allgather(drawn(dtype, 6, rank).view(2, 3), "gather")
    work.wait()
    assert torch.equal(parts, torch.stack([drawn(dtype, 6, r).view(2, 3) for r in range(size)]))


@pytest.mark.ranks(2, 3, 6)
def test_several_in_flight_on_split_communicators(carrier: Communicator):
    """The grid of a placement: neighbours sum, then every other rank, and the whole, all posted before any wait."""
    rows, columns = carrier.split(carrier.rank // 2), carrier.split(carrier.rank % 2)
    everywhere = {"all": carrier, "rows": rows, "columns": columns}
    assert rows.members == tuple(r for r in range(carrier.size) if r // 2 == carrier.rank // 2)
    assert columns.split(0).members == columns.members
    tensors = {(name, i): drawn(torch.float64, 2000, carrier.rank, seed=i) for i in range(4) for name in everywhere}
    works = {key: everywhere[key[0]].allreduce(tensor, "sum") for key, tensor in tensors.items()}
    for (name, i), work in reversed(works.items()):
        work.wait()
        work.wait()
        assert_summed(tensors[name, i], [drawn(torch.float64, 2000, r, seed=i) for r in everywhere[name].members])
    assert carrier.traffic is rows.traffic and carrier.traffic == {"sum": 12 * 2000 * 8}
    posted = carrier.monitor.posted
    assert sorted(posted.values()) == [4, 4, 4]


@pytest.mark.ranks(1, 2, 3)
def test_progress_alone_completes_what_is_in_flight(carrier: Communicator):
    tensors = [drawn(torch.float32, 100_000, carrier.rank, seed=i) for i in range(3)]
    works = [carrier.allreduce(tensor, "sum") for tensor in tensors]
    half = drawn(torch.bfloat16, 64, carrier.rank)
    works.append(carrier.reduce_scatter(half, [64] + [0] * (carrier.size - 1), "sum"))
    while not all(work.done() for work in works):
        carrier.progress()
    assert all(work.done() for work in works)
    for i, tensor in enumerate(tensors):
        assert_summed(tensor, [drawn(torch.float32, 100_000, r, seed=i) for r in range(carrier.size)])
    if carrier.rank == 0:
        assert_summed(half, [drawn(torch.bfloat16, 64, r) for r in range(carrier.size)])


@pytest.mark.ranks(2, 3)
def test_traffic_is_the_payload_posted(carrier: Communicator):
    size = carrier.size
    carrier.allreduce(torch.zeros(10, dtype=torch.bfloat16), "a").wait()
    carrier.reduce_scatter(torch.zeros(4 * size), [4] * size, "b").wait()
    carrier.allgatherv(torch.zeros(size, dtype=torch.int8), [1] * size, "c").wait()
    carrier.broadcast(torch.zeros(3, dtype=torch.float64), 0, "c").wait()
    assert carrier.traffic == {"a": 20, "b": 16 * size, "c": size + 24}


@pytest.mark.ranks(2, 3, 4)
def test_scratch_is_allocated_once(comm):
    carrier = communicator(comm)
    counts = [1000 * (rank + 1) for rank in range(comm.size)]

    def step() -> int:
        works = [carrier.reduce_scatter(torch.ones(sum(counts)), counts, "b") for _ in range(3)]
        for work in works:
            work.wait()
        return carrier._family.scratch.allocated

    first = step()
    assert 0 < first <= 3 * counts[comm.rank] * 4 * 9 / 8 + 3 * 64
    assert [step() for _ in range(5)] == [first] * 5
    assert not carrier._family.pending


@pytest.mark.ranks(3, 4, 6)
def test_two_runs_are_bitwise_equal(comm):
    def run() -> list[torch.Tensor]:
        carrier = communicator(comm)
        results = []
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            tensor, scattered = (drawn(dtype, 30_000, comm.rank) for _ in range(2))
            counts = [30_000 // comm.size] * comm.size
            works = [carrier.allreduce(tensor, "a"), carrier.reduce_scatter(scattered, counts, "b")]
            for work in works:
                work.wait()
            results += [tensor, scattered.split(counts)[comm.rank]]
        return results

    first, second = run(), run()
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    for reduced in first[::2]:
        everywhere = comm.allgather(reduced)
        assert all(torch.equal(reduced, other) for other in everywhere)


@pytest.mark.ranks(2)
def test_refusals(carrier: Communicator):
    with pytest.raises(TypeError, match="label: cannot sum torch.int64 .*float32"):
        carrier.allreduce(torch.zeros(2, dtype=torch.int64), "label")
    with pytest.raises(ValueError, match="contiguous"):
        carrier.allreduce(torch.zeros(4, 4)[:, :2], "label")
    for counts in ([4], [4, 4], [-1, 5], [1, 1, 2]):
        with pytest.raises(ValueError, match="one count per rank"):
            carrier.reduce_scatter(torch.zeros(4), counts, "label")
    with pytest.raises(ValueError, match="one count per rank"):
        carrier.allgatherv(torch.zeros(2, 2), [2, 2], "label")
    assert carrier.traffic.total() == 0
