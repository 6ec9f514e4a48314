"""Collectives over torch.distributed, for DistributedDataParallel users without MPI."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from hpc_kfac.distributed.communicator import Communicator, Family, Flight, segments
from hpc_kfac.distributed.letters import StoreLetters


class TorchCommunicator(Communicator):
    """A torch.distributed process group (gloo or nccl). It is duplicated, because hooks of others post on theirs.

    gloo has no collectives on segments of unequal size: they are one reduction or broadcast per segment.
    """

    def __init__(self, group: Any = None, family: Family | None = None, name: str = "all") -> None:
        dist = torch.distributed
        self._global = dist.get_process_group_ranks(group or dist.group.WORLD)
        members = self._global if family is not None else range(len(self._global))
        if family is None:
            group = _take(self._global, reuse=tuple(self._global) in _spare())
        super().__init__(family, name, members)
        self._group = group
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        if family is None:
            self.monitor.rank = self.rank
            if self.size > 1:
                self._family.letters = StoreLetters(group.group_name, self.monitor, self.size)

    def _split(self, color: int, name: str) -> Communicator:
        told: list[tuple[int, set[tuple[int, ...]]]] = [(0, set())] * self.size
        torch.distributed.all_gather_object(told, (color, set(_spare())), self._group)
        by_color: dict[int, list[int]] = {}
        for rank, (its, _) in zip(self._global, told, strict=True):
            by_color.setdefault(its, []).append(rank)
        # All ranks or none, as torch names a new group by the number of those that a rank has.
        reuse = all(tuple(by_color[its]) in spare for its, spare in told)
        return TorchCommunicator(_take(by_color[color], reuse), self._family, name)

    def _free(self) -> None:
        if torch.distributed.is_initialized():
            _spare().setdefault(tuple(self._global), []).append(self._group)

    def _allreduce(self, tensor: Tensor) -> Flight:
        return _flight([torch.distributed.all_reduce(tensor, group=self._group, async_op=True)])

    def _reduce_scatter(self, tensor: Tensor, counts: Sequence[int]) -> Flight:
        pieces = zip(self._global, segments(tensor, counts), strict=True)
        reduce = torch.distributed.reduce
        return _flight([reduce(t, rank, group=self._group, async_op=True) for rank, t in pieces if t.numel()])

    def _broadcast(self, tensor: Tensor, root: int) -> Flight:
        return _flight([torch.distributed.broadcast(tensor, self._global[root], group=self._group, async_op=True)])

    def _allgather(self, tensor: Tensor, out: Tensor) -> Flight:
        return _flight([torch.distributed.all_gather(list(out.unbind(0)), tensor, group=self._group, async_op=True)])

    def _allgatherv(self, tensor: Tensor, counts: Sequence[int]) -> Flight:
        pieces = zip(self._global, segments(tensor, counts), strict=True)
        broadcast = torch.distributed.broadcast
        return _flight([broadcast(t, rank, group=self._group, async_op=True) for rank, t in pieces if t.numel()])


def _flight(handles: Iterable[Any]) -> Flight:
    handles = list(handles)

    def wait() -> None:
        for handle in handles:
            handle.wait()

    # A handle raises what went wrong, and orders a GPU's streams, in its wait only.
    return Flight(wait, lambda: all(handle.is_completed() for handle in handles), wait)


_SPARE: dict[str, Any] = {"world": None, "groups": {}}


def _spare() -> dict[tuple[int, ...], list[Any]]:
    """Freed groups by their ranks, of the present world.

    They are kept for the next communicator and not destroyed: torch gives the next group the same name, under which its
    ranks find addresses that are no more, and hang.
    """
    world = torch.distributed.group.WORLD
    if _SPARE["world"] is not world:
        _SPARE.update(world=world, groups={})
    return _SPARE["groups"]


def _take(ranks: list[int], reuse: bool) -> Any:
    """A group of these ranks that nobody else uses. Collective among them alone, who need not be the whole world."""
    if not reuse:
        return torch.distributed.new_group(ranks, use_local_synchronization=True)
    spare = _spare()
    group = spare[tuple(ranks)].pop()
    if not spare[tuple(ranks)]:
        del spare[tuple(ranks)]
    return group
